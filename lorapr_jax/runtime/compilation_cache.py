"""Keeps what XLA compiles on the disk, for the next start."""

from collections.abc import Sequence
import hashlib
import logging
import os
from pathlib import Path
import platform
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import cache_dir

_LARGEST = 4 * 2**30

_log = logging.getLogger(__name__)


def keep_compiled() -> None:
  """Tells JAX to keep what it compiles, in the folder `compiled` of the cache.

  Call it before JAX is imported: it sets JAX's environment variables, unless
  they are set already. JAX keeps nothing where JAX_COMPILATION_CACHE_DIR is set
  and empty, or where the folder cannot be written or is another user's. Others
  may not read it.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  try:
    folder = cache_dir() / 'compiled' / _cpu()
  except UserError:
    return  # There is no home folder. What needs one says so.
  try:
    there = next(path for path in folder.parents if path.exists())
  except PermissionError:
    return  # The home folder is another user's.
  if not os.access(there, os.W_OK) or not _is_private(folder):
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  # When that is full, JAX deletes what was not used for longest.
  os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(_LARGEST))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')


def _is_private(folder: Path) -> bool:
  """Makes a folder that nobody else may read or write; whether it is one.

  What lies in it is loaded and run. A folder of another user stays as it is.
  """
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid == os.geteuid():
      folder.chmod(0o700)
      return True
  except OSError as error:
    reason = error.strerror
  else:
    reason = 'it is of another user'
  _log.warning(
    '%s: what is compiled is not kept (%s); remove it, or set LORAPR_CACHE',
    *(folder, reason),
  )
  return False


def disable_on_cpu_meshes(devices: Sequence[Any]) -> None:
  """Turns JAX's cache off if `devices` are several CPU devices.

  A program of XLA's CPU backend that is read from the cache has lost the order
  of its collectives. One device begins with one collective, another device with
  another, and they wait for each other until XLA aborts (jaxlib 0.10.2).
  """
  if len(devices) > 1 and devices[0].platform == 'cpu':
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update('jax_enable_compilation_cache', False)
    # JAX decides only once whether to use the cache: let it decide again.
    compilation_cache.reset_cache()


def _cpu() -> str:
  """A name for this kind of CPU.

  What is compiled for one CPU may use instructions that another does not have.
  JAX's own key does not tell them apart, and machines may share a home folder.
  """
  kind = platform.machine()
  cpuinfo = Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text(encoding='utf-8').splitlines()
    # The instructions are called flags on x86, and Features on ARM.
    kind += next((x for x in lines if x.startswith(('flags', 'Features'))), '')
  return hashlib.sha256(kind.encode()).hexdigest()[:16]
