"""Sizes in bytes, read and shown."""

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.sizes import parse_size, size


@pytest.mark.parametrize(
  'text, expected',
  [
    ('5GB', 5 * 10**9),
    ('300MB', 3 * 10**8),
    (' 1.5 GiB ', 3 * 2**29),
    ('2KB', 2000),
    ('64KiB', 65536),
    ('7B', 7),
  ],
)
def test_sizes_are_read(text, expected):
  assert parse_size('export.max_shard_size', text) == expected


@pytest.mark.parametrize(
  'text', ['', '5', 'GB', '5 gigs', '-5GB', '0.1B', '5G', '8 GX']
)
def test_what_is_no_size_is_refused(text):
  with pytest.raises(UserError) as error:
    parse_size('export.max_shard_size', text)
  assert f'export.max_shard_size is {text!r}' in str(error.value)


@pytest.mark.parametrize(
  'value, shown',
  [(7, '7 B'), (1999, '2.00 kB'), (538e6, '538 MB'), (7.86e9, '7.86 GB')],
)
def test_sizes_are_shown_by_three_digits(value, shown):
  assert size(value) == shown
