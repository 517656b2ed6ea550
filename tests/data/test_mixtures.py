"""Mixtures of data specs: taken apart, weighed, and refused."""

import pytest

from lorapr_jax.data.sources import parse_mixture, parse_spec
from lorapr_jax.errors import UserError


def write(path):
  path.write_text('text')
  return path


def mixture(spec):
  return [(weight, part.text) for weight, part in parse_mixture(spec)]


def test_one_spec_is_a_mixture_of_weight_one(tmp_path):
  assert mixture('synthetic:3?windows=2') == [(1.0, 'synthetic:3?windows=2')]
  spec = f'file:{write(tmp_path / "a.txt")}'
  assert parse_mixture(spec)[0][1] == parse_spec(spec)
  assert mixture(f'0.3*{spec}') == [(1.0, spec)]


def test_weights_are_made_shares(tmp_path):
  names = ('a.txt', '2*b.txt', 'c + d.txt')
  specs = [f'file:{write(tmp_path / name)}' for name in names]
  a, b, c = specs
  for spec, expected in (
    (f'0.75*{a} + 0.25*{b}', [(0.75, a), (0.25, b)]),
    (f'3*{a}  +  1*demo:news:train', [(0.75, a), (0.25, 'demo:news:train')]),
    (f' 1e3 * {a} + .5e3*{a} + 500.0*{b} ', [(0.5, a), (0.25, a), (0.25, b)]),
    # Stars and plusses of paths: wildcards, and names as they are.
    (f'1*{tmp_path_spec(a)} + 1*{c}', [(0.5, tmp_path_spec(a)), (0.5, c)]),
    (c, [(1.0, c)]),
  ):
    assert mixture(spec) == expected
    assert sum(weight for weight, _ in expected) == 1


def tmp_path_spec(spec):
  """All texts of its folder."""
  return spec.replace('a.txt', '*.txt')


@pytest.mark.parametrize(
  'spec, message',
  [
    ('0.7*{} + {}', "'file:.*a.txt' has no weight; write 0.7.SPEC"),
    ('{} + 0.3*{}', "'file:.*a.txt' has no weight"),
    ('0*{}', 'the weight 0 is not a number above 0'),
    ('1*{} + -0.5*{}', 'the weight -0.5 is not a number above 0'),
    ('1*{} + 1e999*{}', 'the weight 1e999 is not a number above 0'),
    ('0.5*{} + 0.5*fil:b.txt', "data spec 'fil:b.txt' is not known"),
    ('0.5*{} + 0.5*', "data spec '' is not known"),
    ('0.5*{} + 0.5*synthetic:1', 'nothing mixes with it'),
    ('0.5*{} + 0.5*file:no.txt', 'no.txt is not a file'),
    ('x*{}', 'is not known: use file:PATH'),
  ],
)
def test_a_mixture_that_cannot_be_is_refused(tmp_path, spec, message):
  part = f'file:{write(tmp_path / "a.txt")}'
  with pytest.raises(UserError, match=message) as error:
    parse_mixture(spec.format(part, part))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'spec', ['0.7*synthetic:1', '0.7*file:a.txt + 0.3*demo:news:train']
)
def test_where_one_spec_is_asked_for_a_mixture_is_refused(spec):
  with pytest.raises(UserError, match='is a mixture, which only text to train'):
    parse_spec(spec)
