"""A projection's einsum says which axes its tensors have."""

import pytest

from lorapr_jax.axes import ProjectionLetters


@pytest.mark.parametrize(
  'spec, letters',
  [
    ('ND,DKGH->NKGH', ('DKGH', 'D', 'KGH')),
    ('NKGH,KGHD->ND', ('KGHD', 'KGH', 'D')),
    ('NF,FD->ND', ('FD', 'F', 'D')),
  ],
)
def test_an_einsum_is_taken_apart(spec, letters):
  assert ProjectionLetters.of(spec) == letters
