"""Text to ids and back; chat templates wherever a folder keeps them."""

import json

import pytest
import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError

PLACES = ['chat_template.jinja', 'tokenizer_config.json']
TALK = [
  {'role': 'user', 'content': 'the fox'},
  {'role': 'assistant', 'content': 'over'},
  {'role': 'user', 'content': 'the dog?'},
]


def test_decode_is_the_inverse_of_encode(tmp_path, add_tokenizer):
  tokenizer = Tokenizer(add_tokenizer(tmp_path))
  text = ' the lazy  fox , née 🌊\n'
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_no_text(tmp_path, add_tokenizer):
  tokenizer = Tokenizer(add_tokenizer(tmp_path))
  assert tokenizer.decode([0, *tokenizer.encode('dog'), 0]) == 'dog'


@pytest.mark.parametrize('place', PLACES)
def test_a_conversation_goes_through_the_template(
  tmp_path, add_tokenizer, place
):
  tokenizer = Tokenizer(add_tokenizer(tmp_path, place))
  assert tokenizer.has_chat_template
  assert tokenizer.decode(tokenizer.encode_chat(TALK)) == (
    '<|user|>the fox\n<|assistant|>over\n<|user|>the dog?\n<|assistant|>'
  )


def test_without_a_template_there_is_no_conversation(tmp_path, add_tokenizer):
  tokenizer = Tokenizer(add_tokenizer(tmp_path))
  assert not tokenizer.has_chat_template
  with pytest.raises(UserError, match='the chat template of') as error:
    tokenizer.encode_chat(TALK)
  assert '\n' not in str(error.value)


def test_what_the_template_refuses_is_a_mistake(tmp_path, add_tokenizer):
  tokenizer = Tokenizer(add_tokenizer(tmp_path, PLACES[0]))
  with pytest.raises(UserError, match='no system message, please'):
    tokenizer.encode_chat([{'role': 'system', 'content': 'be brief'}, *TALK])


def test_every_file_of_a_vocabulary_is_in_the_fingerprint(
  tmp_path, add_tokenizer
):
  tokenizer = Tokenizer(add_tokenizer(tmp_path))
  seen = {tokenizer.fingerprint}
  for name in ('tekken.json', 'merges.txt', 'chat_template.jinja'):
    (tmp_path / name).write_text('one')
    seen.add(tokenizer.fingerprint)
    (tmp_path / name).write_text('two')
    seen.add(tokenizer.fingerprint)
  assert len(seen) == 7


@pytest.mark.parametrize('library', ['tokenizers', 'transformers'])
def test_another_version_of_a_library_is_another_fingerprint(
  tmp_path, add_tokenizer, library, monkeypatch
):
  tokenizer = Tokenizer(add_tokenizer(tmp_path))
  before = tokenizer.fingerprint
  monkeypatch.setattr(f'{library}.__version__', '1.2.3')
  assert tokenizer.fingerprint != before


# Where text of a tokenizer.json has spaces, ligatures and small letters.
ODD_TEXT = 'the quick ﬁne fox\n  jumps² over'
NORMALIZERS = {
  'nfkc': [normalizers.NFKC(), normalizers.Replace(' ', '▁')],
  'prepends': [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')],
  'replaces': [normalizers.Replace(' ', '▁')],
  'byte level': [],
}


def save(folder, kind='byte level', **settings):
  """Saves tokenizer.json of a kind; and settings with Llama's tokens."""
  made = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
  alphabet = []
  if steps := NORMALIZERS[kind]:
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Replace('▁', ' ')
  else:
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=['<unk>', '<s>', '</s>'],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  made.train_from_iterator([ODD_TEXT] * 2, trainer)
  # What is for training on short texts changes no text here.
  made.enable_truncation(4)
  made.enable_padding()
  made.save(str(folder / 'tokenizer.json'))
  settings = {'bos_token': '<s>', 'eos_token': '</s>', **settings}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  (folder / 'config.json').write_text(
    json.dumps({'model_type': 'llama', 'bos_token_id': 0, 'eos_token_id': [2]})
  )
  made.no_truncation()
  made.no_padding()
  return made


@pytest.mark.parametrize(
  'name', ['LlamaTokenizerFast', 'LlamaTokenizer', 'PreTrainedTokenizerFast']
)
@pytest.mark.parametrize('kind', NORMALIZERS)
def test_ids_are_those_of_tokenizer_json_whatever_the_class(
  tmp_path, kind, name
):
  oracle = save(tmp_path, kind, tokenizer_class=name)
  ids = oracle.encode(ODD_TEXT, add_special_tokens=False).ids
  found = Tokenizer(tmp_path)
  assert found.encode(ODD_TEXT).tolist() == ids
  assert found.decode(ids) == oracle.decode(ids)
  assert found.eos_token_id == 2


@pytest.mark.parametrize('in_file', [False, True])
@pytest.mark.parametrize('says', [None, False, True])
def test_bos_is_where_the_settings_say_else_where_tokenizer_json_does(
  tmp_path, says, in_file
):
  oracle = save(tmp_path, **({} if says is None else {'add_bos_token': says}))
  if in_file:
    oracle.post_processor = processors.TemplateProcessing(
      single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)]
    )
    oracle.save(str(tmp_path / 'tokenizer.json'))
  bare = oracle.encode('fox', add_special_tokens=False).ids
  expected = [1, *bare] if (in_file if says is None else says) else bare
  assert Tokenizer(tmp_path).encode('fox').tolist() == expected


def test_special_tokens_are_the_settings_else_the_configs(tmp_path):
  save(tmp_path, eos_token={'content': '<s>', 'lstrip': False})
  assert Tokenizer(tmp_path).eos_token_id == 1
  (tmp_path / 'special_tokens_map.json').write_text('{"eos_token": "</s>"}')
  assert Tokenizer(tmp_path).eos_token_id == 1
  save(tmp_path, eos_token=None)
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  assert Tokenizer(tmp_path).eos_token_id == 2
  (tmp_path / 'special_tokens_map.json').unlink()
  assert Tokenizer(tmp_path).eos_token_id == 2
  save(tmp_path, eos_token='<|end|>')
  with pytest.raises(UserError, match=r"eos_token '<\|end\|>', which .* lacks"):
    Tokenizer(tmp_path)


def test_tokens_that_the_settings_alone_name_are_added(tmp_path):
  token = AddedToken('<|im_start|>', normalized=False, special=True)
  oracle = save(
    tmp_path,
    added_tokens_decoder={
      '2': {'content': '</s>', 'special': True},
      '900': {'content': token.content, 'normalized': False, 'special': True},
    },
  )
  before = oracle.get_vocab_size()
  oracle.add_tokens([token])
  text = 'fox<|im_start|>fox'
  ids = Tokenizer(tmp_path).encode(text).tolist()
  assert before in ids
  assert ids == oracle.encode(text, add_special_tokens=False).ids


def test_of_several_chat_templates_the_default_is_used(tmp_path):
  named = {'default': '{{ bos_token }}{{ messages[0].content }}', 'rag': 'x'}
  entries = [{'name': name, 'template': t} for name, t in named.items()]
  save(tmp_path, chat_template=entries)
  assert Tokenizer(tmp_path).chat_text(TALK) == '<s>the fox'
  save(tmp_path, chat_template=entries[1:])
  assert not Tokenizer(tmp_path).has_chat_template


def test_a_missing_file_is_named(tmp_path, add_tokenizer):
  (add_tokenizer(tmp_path) / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match=r'tokenizer\.json .* is missing'):
    Tokenizer(tmp_path)


def test_a_pruned_model_brings_no_warnings(tmp_path, add_tokenizer, capfd):
  text = '{"model_type": "pruned_llama", "rope_scaling": null}'
  (tmp_path / 'config.json').write_text(text)
  Tokenizer(add_tokenizer(tmp_path))
  assert capfd.readouterr().err == ''
