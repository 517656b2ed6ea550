"""Templates that would compute for ever, or take all memory: one line each."""

import resource
import time

import pytest

from lorapr_jax.data.sources import parse_spec
from lorapr_jax.data.templates import Template, template_documents
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.runtime import limits

# Expressions; `n` is 10**10, `s` is a text of 10**6 letters.
EXPRESSIONS = (
  *('range(n)', 'range(n)|list', 's * n', '[0] * n', '(0,) * n'),
  *('9 ** (9 ** 9)', 'n ** n', '2 ** n % 7', '1|round(n, "ceil")', '1 / 0'),
  *('s.center(n)', 's.ljust(n)', 's.zfill(n)', 's|center(n)', 's|indent(n)'),
  *(
    's.join(s)',
    's|replace("x", s)',
    's.replace("x", s)',
    '[s]|batch(n, s)|list',
  ),
  *('"%10000000000d" % 1', '"{:10000000000}".format(s)', '"%d" % s'),
  *('"%s %s" % s', '"{}{}".format(s)', 's + 1', 's()'),
  *('s|no_such', 'no_such()', 's.__class__.__mro__', '().__class__.__base__'),
  *('lipsum(n=n)', '[1, 2]|slice(n)|list', '(s * 70)|upper', 'cycler()'),
  *('s|map("no")|list', '"t".expandtabs(n) ~ (s*99)'),
)
STATEMENTS = (
  '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}'
  '{% endfor %}',
  '{% for i in s %}{% for j in s %}{{ s }}{% endfor %}{% endfor %}',
  '{% set t = namespace(x=s) %}{% for i in range(99) %}'
  '{% set t.x = t.x ~ t.x %}{% endfor %}',
  '{% set t = namespace(x=[s]) %}{% for i in range(99) %}'
  '{% set t.x = t.x + t.x %}{% endfor %}',
  '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}',
  '{% for x in [[s]] recursive %}{{ loop([x]) }}{% endfor %}',
  '{% import "a" as a %}',
  '{% from "a" import b %}',
  '{% include "a" %}',
  '{% extends "a" %}',
  '{% if %}',
  '{% for %}',
  '{{ ' + '(' * 3000,
  '{{ ' + '[' * 500 + ']' * 500 + ' }}',
  '{{ ' + '-' * 9000 + '1 }}',
  '{% if s %}' * 300 + '{% endif %}' * 300,
  '{% for i in s %}' * 30 + '{% endfor %}' * 30,
  '{{ s' + '|upper' * 5000 + ' }}',
)
HEAD = '{% set n = 10 ** 10 %}{% set s = "x" * 10 ** 6 %}'
SOURCES = [
  *(f'{HEAD}{{{{ {expression} }}}}' for expression in EXPRESSIONS),
  *(HEAD + statement for statement in STATEMENTS),
  *('{{ "x" * 10 ** 10 }}', '{{ 9 ** (9 ** 9) }}', '{{ "x"|center(2**40) }}'),
]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory, add_tokenizer):
  folder = tmp_path_factory.mktemp('tokenizer')
  return Tokenizer(add_tokenizer(folder, 'chat_template.jinja'))


@pytest.fixture
def spec(tmp_path):
  record = '{"messages": [{"role": "user", "content": "the fox"}]}\n'
  (tmp_path / 'a.jsonl').write_text(record)
  return parse_spec(f'file:{tmp_path}/a.jsonl')


@pytest.fixture(autouse=True)
def bounds(monkeypatch):
  """Little time; and what was used stays used as it was."""
  monkeypatch.setattr(limits, 'SECONDS', 0.1)
  before = resource.getrlimit(resource.RLIMIT_AS)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.process_time()
  yield
  assert resource.getrlimit(resource.RLIMIT_AS) == before
  now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert now - peak < 10**6
  assert time.process_time() - start < 10


def message(make, spec, tokenizer):
  with pytest.raises(UserError) as caught:
    list(template_documents(spec, make(), tokenizer))
  text = str(caught.value)
  assert '\n' not in text and len(text) < 800
  return text


@pytest.mark.parametrize('source', SOURCES, ids=lambda x: x[-60:])
def test_a_template_that_is_too_much_is_one_line(source, spec, tokenizer):
  text = message(lambda: Template(source), spec, tokenizer)
  compiled = f'{spec.text}, record 1: data.template: '
  assert text.startswith((compiled, 'data.template '))


@pytest.mark.parametrize('source', SOURCES, ids=lambda x: x[-60:])
def test_so_is_a_chat_template(source, spec, tokenizer, monkeypatch):
  monkeypatch.setattr(tokenizer.wrapped, 'chat_template', source)
  text = message(lambda: Template('chat'), spec, tokenizer)
  # Where it takes no conversation at all, the first is named.
  assert text.startswith(
    (
      f'{spec.text}, record 1: the chat template of ',
      f'{spec.text}: none of its 1 records gives any text by data.template; '
      'record 1: the chat template of ',
    )
  )


def test_what_was_too_much_is_said(spec, tokenizer):
  def said(source):
    return message(lambda: Template(HEAD + source), spec, tokenizer)

  assert 'more than 0.1 seconds' in said('{{ n ** n }}')
  assert 'more than 512 MiB of memory' in said('{{ s * n }}')
  assert 'more than 67,108,864 characters' in said('{{ s * 70 }}')
