"""What XLA has compiled, kept on the disk for the next start."""

from collections.abc import Sequence
import hashlib
import os
from pathlib import Path
import platform
from typing import Any

from lorapr_jax.runtime.files import cache_dir

_LARGEST = 4 * 2**30


def keep_compiled() -> None:
  """Has JAX keep what it compiles in the cache's folder `compiled`.

  To be called before JAX is imported: it goes by JAX's own variables, and
  those that are set already are left alone. JAX_COMPILATION_CACHE_DIR= (empty)
  keeps nothing, nor does a cache that takes no files.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  try:
    folder = cache_dir() / 'compiled' / _cpu()
  except RuntimeError:
    return  # There is no home folder.
  try:
    there = next(path for path in folder.parents if path.exists())
  except PermissionError:
    return  # The home folder is another user's.
  if not os.access(there, os.W_OK):
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  # What was not used for longest makes room.
  os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(_LARGEST))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')


def disable_on_cpu_meshes(devices: Sequence[Any]) -> None:
  """Turns JAX's cache off if these are several CPU devices.

  Read from the cache, a program of XLA's CPU backend has lost the order of its
  collectives: one device begins with one, another with another, and they wait
  for each other until XLA aborts (seen with jaxlib 0.10.2).
  """
  if len(devices) > 1 and devices[0].platform == 'cpu':
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update('jax_enable_compilation_cache', False)
    # JAX remembers that it is used once it was.
    compilation_cache.reset_cache()


def _cpu() -> str:
  """A name for this kind of CPU.

  What is compiled for one with more instructions does not run on another, and
  JAX's own key for an entry does not have them. A home is often shared.
  """
  kind = platform.machine()
  cpuinfo = Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text(encoding='utf-8').splitlines()
    # As x86 and ARM call them.
    kind += next((x for x in lines if x.startswith(('flags', 'Features'))), '')
  return hashlib.sha256(kind.encode()).hexdigest()[:16]
