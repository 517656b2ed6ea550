"""What XLA has compiled, kept on the disk: a second start compiles nothing."""

import hashlib
import logging
import os
from pathlib import Path
import platform
import tempfile

from lorapr_jax.files import cache_dir

_LARGEST = 4 * 2**30


def keep_compiled() -> None:
  """Has JAX keep what it compiles in the cache's folder `compiled`.

  To be called before JAX is imported: it goes by JAX's own variables, and
  those that are set already are left alone. JAX_COMPILATION_CACHE_DIR= (empty)
  keeps nothing.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  folder = cache_dir() / 'compiled' / _cpu()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    logging.getLogger(__name__).warning(
      '%s takes no files (%s): everything is compiled anew at every start',
      folder,
      error.strerror,
    )
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  # What was not used for longest makes room.
  os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(_LARGEST))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')


def _cpu() -> str:
  """A name for this kind of CPU.

  What is compiled for one with more instructions does not run on another, and
  JAX's own key for an entry does not have them. A home is often shared.
  """
  kind = f'{platform.machine()} {platform.processor()}'
  cpuinfo = Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text(encoding='utf-8').splitlines()
    # As x86 and ARM call them.
    kind += next((x for x in lines if x.startswith(('flags', 'Features'))), '')
  return hashlib.sha256(kind.encode()).hexdigest()[:16]
