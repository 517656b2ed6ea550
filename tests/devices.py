"""How many of the simulated devices a test sees."""

from collections.abc import Iterator
import contextlib

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest


@contextlib.contextmanager
def one_device() -> Iterator[None]:
  """Shows the first device alone, and lets JAX read what it has compiled."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('devices', 'local_devices'):
      patch.setattr(jax, name, _first(getattr(jax, name)))
    patch.setattr(jax, 'device_count', lambda: 1)
    with cache(True):
      yield


@contextlib.contextmanager
def cache(enabled: bool) -> Iterator[None]:
  """Whether JAX's cache is used meanwhile.

  What it gives back for several CPU devices may hang: see
  lorapr_jax/runtime/compilation_cache.py.
  """
  before = jax.config.jax_enable_compilation_cache
  _use_cache(enabled)
  try:
    yield
  finally:
    _use_cache(before)


def _use_cache(enabled):
  jax.config.update('jax_enable_compilation_cache', enabled)
  compilation_cache.reset_cache()


def _first(devices):
  return lambda *args, **kwargs: devices(*args, **kwargs)[:1]
