"""A panic in Rust is an error like any other, and prints nothing."""

import os

import pytest
from tokenizers import Regex, pre_tokenizers

from lorapr_jax.runtime.rust import RustError, rust_errors


def panic():
  runaway = pre_tokenizers.Split(Regex('(a+)+$'), 'isolated')
  runaway.pre_tokenize_str('a' * 60 + 'b')


def test_a_panic_is_raised_and_not_printed(capfd):
  problem = pytest.raises(RustError, match='retry-limit-in-match over')
  with problem, rust_errors():
    panic()
  assert capfd.readouterr().err == ''
  os.write(2, b'later')
  assert capfd.readouterr().err == 'later'


def test_a_plain_exception_is_raised_as_well(capfd):
  with pytest.raises(RustError, match='^no token$'), rust_errors():
    os.write(2, b'a warning')
    raise Exception('no token')
  assert capfd.readouterr().err == 'a warning'


@pytest.mark.parametrize('error', [KeyError, KeyboardInterrupt])
def test_what_is_not_of_rust_goes_on(error, capfd):
  with pytest.raises(error), rust_errors():
    os.write(2, b'a warning')
    raise error
  assert capfd.readouterr().err == 'a warning'


def test_what_is_printed_meanwhile_is_shown(capfd):
  with rust_errors():
    os.write(2, b'a warning')
    assert capfd.readouterr().err == ''
  assert capfd.readouterr().err == 'a warning'


def test_a_closed_stream_is_no_hindrance():
  kept = os.dup(2)
  os.close(2)
  try:
    with rust_errors():
      value = 3
  finally:
    os.dup2(kept, 2)
    os.close(kept)
  assert value == 3
