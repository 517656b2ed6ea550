"""Records through templates: their text, and which of it is learnt."""

import json

import numpy as np
import pytest

from lorapr_jax.data.packing import tokenise
from lorapr_jax.data.sources import parse_spec
from lorapr_jax.data.templates import Document, Template, template_documents
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError

ALPACA = [
  {'instruction': 'Name a fox.', 'input': '', 'output': 'the quick one'},
  {'instruction': 'Jump.', 'input': 'over the dog', 'output': 'jumps'},
]
PROMPT = (
  '### Instruction:\n{{ instruction }}\n\n'
  '{% if input %}### Input:\n{{ input }}\n\n{% endif %}### Response:\n'
)
TURNS = [
  {'role': 'user', 'content': 'the fox'},
  {'role': 'assistant', 'content': 'jumps'},
  {'role': 'user', 'content': 'over'},
  {'role': 'assistant', 'content': 'the dog'},
]


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory, add_tokenizer):
  folder = tmp_path_factory.mktemp('tokenizer')
  return Tokenizer(add_tokenizer(folder, 'chat_template.jinja'))


@pytest.fixture
def documents(tmp_path, tokenizer):
  """Runs records through a template."""

  def documents(records, template, query=''):
    path = tmp_path / 'records.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    spec = parse_spec(f'file:{path}{query}')
    return list(template_documents(spec, template, tokenizer))

  return documents


def learnt(document, tokenizer, whole=False):
  """The text of the tokens that are targets."""
  [(ids, targets, _)] = tokenise([document], tokenizer, whole=whole)
  assert set(targets) <= {0, 1}
  return tokenizer.wrapped.decode(ids[targets == 1])


def test_a_jinja_template_writes_the_record(documents):
  assert documents(ALPACA, Template(PROMPT + '{{ output }}')) == [
    Document('### Instruction:\nName a fox.\n\n### Response:\nthe quick one'),
    Document(
      '### Instruction:\nJump.\n\n### Input:\nover the dog\n\n'
      '### Response:\njumps'
    ),
  ]


def test_the_response_alone_is_learnt_and_its_end(documents, tokenizer):
  template = Template(PROMPT, '{{ output }}', 'response')
  first, second = documents(ALPACA, template)
  assert first.text.endswith('### Response:\nthe quick one')
  assert learnt(first, tokenizer) == 'the quick one<|end|>'
  assert learnt(second, tokenizer) == 'jumps<|end|>'
  everything = documents(ALPACA, Template(PROMPT, '{{ output }}'))[1]
  assert learnt(everything, tokenizer) == second.text + '<|end|>'


def test_where_tokens_merge_over_the_border_the_token_is_learnt(tokenizer):
  text = 'x the fox'
  whole = tokenizer.encode(text)
  # The prompt ends inside a token of the whole text.
  start = text.index('the') + 1
  assert tokenizer.decode(whole[1:2]).strip() == 'the'
  assert learnt(Document(text, ((start, len(text)),)), tokenizer) == (
    ' the fox<|end|>'
  )


@pytest.mark.parametrize(
  'record',
  [
    {'messages': TURNS},
    {
      'conversations': [
        {
          'from': {'user': 'human', 'assistant': 'gpt'}[turn['role']],
          'value': turn['content'],
        }
        for turn in TURNS
      ]
    },
  ],
)
def test_the_chat_template_learns_the_assistants_turns(
  documents, tokenizer, record
):
  text = (
    '<|user|>the fox\n<|assistant|>jumps\n<|user|>over\n<|assistant|>the dog\n'
  )
  assert documents([record], Template('chat')) == [Document(text)]
  [document] = documents([record], Template('chat', loss='response'))
  assert document.text == text
  assert learnt(document, tokenizer, whole=True) == 'jumps\nthe dog\n'
  # It ends as the template ends it: no token is added.
  [(ids, _, _)] = tokenise([document], tokenizer, whole=True)
  np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_records_without_a_response_are_counted(documents, caplog):
  records = [*ALPACA, {'instruction': 'Sleep.', 'input': '', 'output': ' '}]
  template = Template(PROMPT, '{{ output }}', 'response')
  assert len(documents(records, template)) == 2
  [message] = caplog.messages
  assert message.endswith(
    ': 1 of 3 records give no response to learn and are left out'
  )
  with pytest.raises(UserError, match='none of its 1 records gives any resp'):
    documents(records[2:], template)
  with pytest.raises(UserError, match='none of its 1 records gives any text'):
    documents(records[2:], Template('{{ input }}'))


def test_null_is_nothing(documents):
  [document] = documents([{'a': None, 'b': 'the fox'}], Template('{{a}}{{b}}'))
  assert document.text == 'the fox'


@pytest.mark.parametrize('query, plain', [('', False), ('?field=output', True)])
def test_a_spec_that_names_its_field_is_plain_text(documents, query, plain):
  [first, _] = documents(ALPACA, Template('{{ instruction }}'), query)
  assert first.text == ('the quick one' if plain else 'Name a fox.')


def test_text_files_and_news_are_plain_text(tmp_path):
  (tmp_path / 'a.txt').write_text('the fox')
  for spec in (f'file:{tmp_path}/a.txt', 'demo:news:train', 'synthetic:0'):
    assert not Template('{{ text }}').applies_to(parse_spec(spec))


@pytest.mark.parametrize(
  'record, template, message',
  [
    (
      {'question': 'q', 'output': 'o'},
      Template('{{ instruction }}'),
      "record 1: data.template: 'instruction' is undefined; the record has "
      'question, output',
    ),
    (
      {'question': 'q'},
      Template('{{ question }}', '{{ answer }}'),
      "record 1: data.response: 'answer' is undefined; the record has question",
    ),
    (
      {'n': 3},
      Template("{{ n + 'x' }}"),
      'record 1: data.template: unsupported operand',
    ),
    (
      {'n': 3},
      Template('{{ n.__class__.__mro__ }}'),
      "record 1: data.template: access to attribute '__class__'",
    ),
    (
      {'text': 'x'},
      Template('chat'),
      'record 1: data.template=chat needs the field messages or conversations; '
      'the record has text',
    ),
    ({'messages': []}, Template('chat'), 'record 1: there are no messages'),
    (
      {'messages': ['hello']},
      Template('chat'),
      'record 1: message 1 is no object with the texts role and content',
    ),
    (
      {'messages': [{'role': 'system', 'content': 'x'}]},
      Template('chat'),
      'no system message, please',
    ),
  ],
)
def test_a_record_that_does_not_fit_is_named(
  documents, record, template, message
):
  with pytest.raises(UserError) as error:
    documents([record], template)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


ASKED, ANSWERED = TURNS[:2]
# What a conversation may look like -> what the chat template writes of it, and
# what of that is learnt.
READ = {
  'an answer first': (
    {'messages': [ANSWERED, *TURNS[2:]]},
    '<|assistant|>jumps\n<|user|>over\n<|assistant|>the dog\n',
    'the dog\n',
  ),
  'parts': (
    {
      'messages': [
        {'role': 'user', 'content': [{'type': 'text', 'text': 'the '}, 'fox']},
        {**ANSWERED, 'tool_calls': None},
      ]
    },
    '<|user|>the fox\n<|assistant|>jumps\n',
    'jumps\n',
  ),
  **{
    f'messages {empty} beside conversations': (
      {'messages': empty, 'conversations': TURNS[:2], 'tools': '[]'},
      '<|user|>the fox\n<|assistant|>jumps\n',
      'jumps\n',
    )
    for empty in (None, [])
  },
  'null beside text': (
    {'messages': [{'content': None, 'from': 'human', 'value': 'a'}, ANSWERED]},
    '<|user|>a\n<|assistant|>jumps\n',
    'jumps\n',
  ),
  'an empty system': (
    {'system': '', 'conversations': TURNS[:2]},
    '<|user|>the fox\n<|assistant|>jumps\n',
    'jumps\n',
  ),
}


@pytest.mark.parametrize('what', READ)
def test_an_odd_conversation_is_read_where_it_is_plain(
  documents, tokenizer, what
):
  record, text, response = READ[what]
  assert documents([record], Template('chat')) == [Document(text)]
  [document] = documents([record], Template('chat', loss='response'))
  assert document.text == text
  assert learnt(document, tokenizer, whole=True) == response


def test_a_system_beside_the_conversation_comes_first(tmp_path, add_tokenizer):
  add_tokenizer(tmp_path)
  (tmp_path / 'chat_template.jinja').write_text(
    '{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}'
  )
  tokenizer = Tokenizer(tmp_path)
  system = {'role': 'system', 'content': 'be brief'}
  for record in (
    {'system': 'be brief', 'conversations': TURNS[:2]},
    {'system': 'be brief', 'messages': [system, *TURNS[:2]]},
    {'messages': [system, *TURNS[:2]]},
  ):
    (tmp_path / 'a.jsonl').write_text(json.dumps(record))
    spec = parse_spec(f'file:{tmp_path}/a.jsonl')
    [document] = template_documents(spec, Template('chat'), tokenizer)
    assert document.text == (
      '<|system|>be brief<|user|>the fox<|assistant|>jumps'
    )


IMAGE = {'type': 'image_url', 'image_url': {'url': 'a'}}
CALL = {'role': 'assistant', 'content': None, 'tool_calls': [{'id': 'a'}]}
ODD = [
  {'messages': []},
  {'messages': None},
  {'messages': None, 'conversations': []},
  {'conversations': None, 'text': 'a'},
  {'text': 'a'},
  {'messages': 'the fox'},
  {'messages': {'role': ['user'], 'content': ['a']}},
  {'messages': [None]},
  {'messages': [[ASKED]]},
  {'messages': [ASKED, CALL]},
  {'messages': [ASKED, {**CALL, 'content': 'jumps'}]},
  {'messages': [ASKED, {'role': 'assistant', 'content': None}]},
  {'messages': [ASKED, {'role': 'assistant'}]},
  {'messages': [ASKED, {'role': None, 'content': 'jumps'}]},
  {'messages': [ASKED, {'role': 3, 'content': 'jumps'}]},
  {'messages': [ASKED, {'role': 'assistant', 'content': 3}]},
  {'messages': [ASKED, {'role': 'assistant', 'content': [IMAGE]}]},
  {'messages': [ASKED, {'role': 'assistant', 'content': [3]}]},
  {'messages': [ASKED, {'from': 'gpt', 'value': {'text': 'jumps'}}]},
  {'messages': TURNS, 'tools': [{'name': 'a'}]},
  {'conversations': TURNS, 'system': 3},
  {'conversations': TURNS, 'system': 'which the template refuses'},
  {'messages': [{'role': 'system', 'content': 'a'}, ASKED], 'system': 'b'},
]


@pytest.mark.parametrize('loss', ['all', 'response'])
@pytest.mark.parametrize('odd', ODD)
def test_a_conversation_that_is_not_plain_is_left_out(
  documents, caplog, loss, odd
):
  template = Template('chat', loss=loss)
  good = {'messages': TURNS[:2]}
  assert len(documents([good, odd, good], template)) == 2
  [message] = caplog.messages
  assert (
    ': 1 of 3 conversations cannot be read and are left out: record 2: '
  ) in message
  assert '\n' not in message


def test_the_first_of_many_odd_conversations_are_named(documents, caplog):
  good = {'messages': TURNS[:2]}
  assert len(documents([good, *ODD], Template('chat'))) == 1
  [message] = caplog.messages
  assert f': {len(ODD)} of {len(ODD) + 1} conversations' in message
  assert message.count('record ') == 3 and message.endswith('; ...')


def test_a_tokenizer_without_a_chat_template_says_so(tmp_path, add_tokenizer):
  plain = Tokenizer(add_tokenizer(tmp_path))
  (tmp_path / 'a.jsonl').write_text(json.dumps({'messages': TURNS}))
  spec = parse_spec(f'file:{tmp_path}/a.jsonl')
  with pytest.raises(UserError, match='has no chat template'):
    list(template_documents(spec, Template('chat'), plain))


def test_a_chat_template_that_rewrites_turns_cannot_tell_responses(
  tmp_path, add_tokenizer
):
  """As those that drop the reasoning of all answers but the last."""
  add_tokenizer(tmp_path)
  (tmp_path / 'chat_template.jinja').write_text(
    '{% for m in messages %}{{ m.role if loop.last else "-" }}'
    '{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant'
    '{% endif %}'
  )
  tokenizer = Tokenizer(tmp_path)
  (tmp_path / 'a.jsonl').write_text(json.dumps({'messages': TURNS}))
  spec = parse_spec(f'file:{tmp_path}/a.jsonl')
  assert list(template_documents(spec, Template('chat'), tokenizer))
  with pytest.raises(UserError, match='use data.loss=all'):
    list(template_documents(spec, Template('chat', loss='response'), tokenizer))


@pytest.mark.parametrize(
  'keys, message',
  [
    (('{{ a', '', 'all'), 'data.template is no Jinja template: line 1: '),
    (('a', '{% if %}', 'all'), 'data.response is no Jinja template: line 1: '),
    (('', '{{ a }}', 'all'), 'data.response follows a Jinja template'),
    (('chat', '{{ a }}', 'all'), 'data.response follows a Jinja template'),
    (('{{ a }}', '', 'response'), 'data.loss=response needs to know'),
    (('', '', 'response'), 'data.loss=response needs to know'),
    (('', '', 'answers'), "data.loss is 'answers': choose from all, response"),
  ],
)
def test_templates_that_no_record_fits_are_refused_at_once(keys, message):
  with pytest.raises(UserError) as error:
    Template(*keys)
  assert str(error.value).startswith(message)
