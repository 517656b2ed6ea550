"""Text to ids and back; chat templates wherever a folder keeps them."""

import pytest

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


def test_a_missing_file_is_named(tmp_path, add_tokenizer):
  (add_tokenizer(tmp_path) / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match=r'tokenizer\.json .* is missing'):
    Tokenizer(tmp_path)


def test_a_pruned_model_brings_no_warnings(tmp_path, add_tokenizer, capfd):
  text = '{"model_type": "pruned_llama", "rope_scaling": null}'
  (tmp_path / 'config.json').write_text(text)
  Tokenizer(add_tokenizer(tmp_path))
  assert capfd.readouterr().err == ''
