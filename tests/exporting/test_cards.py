"""The header of a model card is YAML, whatever the base is called."""

import pytest
import yaml

from lorapr_jax.exporting.cards import adapter_card


@pytest.mark.parametrize(
  'name',
  [
    *('models/a', 'a: b', '# c', '---', 'no', '1.0', 'q\'"', 'größe 字 😀'),
    *('', '[x]', '{y}', '&z', '*z', '!t', '%d', '@a', '`b`', 'a\tb', ' c '),
    *('a' * 200 + ' ' + 'b' * 90, 'r[/bold]x'),
  ],
)
def test_the_header_holds_the_name(name):
  assert header(name)['base_model'] == name


@pytest.mark.parametrize(
  'name, shown',
  [
    ('a\nlicense: mit\n---', r'a\nlicense: mit\n---'),
    ('\x1b[31m\udcff\x85', r'\x1b[31m\udcff\x85'),
  ],
)
def test_control_characters_add_no_key(name, shown):
  assert header(name)['base_model'] == shown


def header(name):
  card = adapter_card(name, 'uniform')
  begin, text, rest = card.split('---\n', 2)
  found = yaml.safe_load(text)
  assert begin == '' and found.keys() == {'base_model', 'library_name', 'tags'}
  assert rest.splitlines()[0].startswith('LoRA of ')
  return found
