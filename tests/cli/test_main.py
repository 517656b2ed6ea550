"""What the command line makes of errors that are nobody's mistake."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.cli.main import main


def on_device():
  too_large = jax.jit(lambda: jnp.zeros((2**50,), jnp.int8))
  jax.block_until_ready(too_large())


def on_host():
  np.zeros((2**50,), np.int64)


@pytest.mark.parametrize(
  'command, reason',
  [
    (on_device, 'RESOURCE_EXHAUSTED: Out of memory allocating'),
    (on_host, 'Unable to allocate 8.00 PiB'),
  ],
)
def test_too_little_memory_is_one_line(command, reason, monkeypatch, capsys):
  name = 'lorapr_jax.cli.evaluate'
  module = types.ModuleType(name)
  module.main = lambda argv: command()
  monkeypatch.setitem(sys.modules, name, module)
  assert main(['evaluate']) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith(f'error: there is not enough memory ({reason}')
  assert err.endswith(
    '"Out of memory" in docs/troubleshooting.md says what to try\n'
  )
  assert err.count('\n') == 1
