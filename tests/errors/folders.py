"""Model folders and tokenizers that cannot be used."""

from collections.abc import Callable
import json
from pathlib import Path
import shutil
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.errors import strangers
from tests.errors.case import (
  Case,
  Place,
  change_json,
  evaluate,
  train_model,
  with_argv,
)


def _changed(did: str, change: Callable[[Path], None], **more) -> Case:
  """`evaluate` of a good model after `change`."""

  def argv(place: Place) -> list[str]:
    change(place.copy('MODEL'))
    place.text()
    return evaluate()

  return Case(did, argv, **more)


def _config(did: str, **changes) -> Case:
  def change(model):
    change_json(model / 'config.json', **changes)

  return _changed(f'MODEL/config.json has {did}', change)


def _weights(
  did: str, edit: Callable[[dict[str, np.ndarray]], None], **more
) -> Case:
  def change(model):
    tensors = load_file(model / 'model.safetensors')
    edit(tensors)
    save_file(tensors, model / 'model.safetensors')

  return _changed(did, change, **more)


def _cast(name: str, dtype: str) -> Callable[[dict[str, np.ndarray]], None]:
  def edit(tensors):
    tensors[name] = tensors[name].astype(dtype)

  return edit


def _write(name: str, content: str) -> Callable[[Path], None]:
  return lambda model: (model / name).write_text(content)


def _truncate(name: str) -> Callable[[Path], None]:
  def change(model):
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])

  return change


def _index(index: dict[str, Any]) -> Callable[[Path], None]:
  def change(model):
    (model / 'model.safetensors').unlink()
    (model / 'model.safetensors.index.json').write_text(json.dumps(index))

  return change


def _weight_map(weight_map) -> Callable[[Path], None]:
  return _index({'weight_map': weight_map})


def _twice(model: Path) -> None:
  shutil.copy(model / 'model.safetensors', model / 'a.safetensors')
  (model / 'model.safetensors').rename(model / 'b.safetensors')
  index = {QUERIES: 'a.safetensors', 'lm_head.weight': 'b.safetensors'}
  (model / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': index})
  )


def _dangling_link(model: Path) -> None:
  (model / 'model.safetensors').unlink()
  (model / 'model.safetensors').symlink_to('../../blobs/2f9c')


def _device(model: Path) -> None:
  (model / 'config.json').unlink()
  (model / 'config.json').symlink_to('/dev/zero')


def _only_pickle(model: Path) -> None:
  strangers.add_pickle(model)
  (model / 'model.safetensors').unlink()


def _strangers_model(model: Path) -> None:
  strangers.add_model_code(model)
  change_json(model / 'config.json', model_type='stranger')


def _strangers_tokenizer(model: Path) -> None:
  strangers.add_tokenizer_code(model)
  change_json(
    model / 'tokenizer_config.json', tokenizer_class='StrangersTokenizer'
  )


def _id_of_word(i: int) -> Callable[[Path], None]:
  def change(model):
    tokenizer = json.loads((model / 'tokenizer.json').read_text())
    tokenizer['model']['vocab']['word'] = i
    (model / 'tokenizer.json').write_text(json.dumps(tokenizer))

  return change


def _pattern(model: Path) -> None:
  split = {'pattern': {'Regex': '(.*)*\\d'}, 'invert': False}
  split |= {'type': 'Split', 'behavior': 'Isolated'}
  change_json(model / 'tokenizer.json', pre_tokenizer=split)


def _setting(key: str, value: Any) -> Callable[[Path], None]:
  return lambda model: change_json(
    model / 'tokenizer_config.json', **{key: value}
  )


QUERIES = 'model.layers.1.self_attn.q_proj.weight'


def _bad_companion(place: Place) -> list[str]:
  """It shows before any text is packed."""
  model = place.copy('MODEL')
  (model / 'generation_config.json').write_text('{"eos_token_id": 0,')
  place.text()
  return train_model()


CASES = [
  Case(
    '`--model MODEL`, which does not exist',
    with_argv(*evaluate('--data', 'synthetic:0')),
  ),
  _changed('MODEL is a file', lambda m: m.rename('OLD') and m.write_text('')),
  _changed('no MODEL/config.json', lambda m: (m / 'config.json').unlink()),
  _changed('MODEL/config.json is cut short', _write('config.json', '{"a": 1')),
  _changed('MODEL/config.json is a list', _write('config.json', '[]')),
  _changed('MODEL/config.json is a link to a device', _device),
  _changed(
    'MODEL/config.json has an integer of 5,000 digits',
    _write('config.json', f'{{"hidden_size": {"9" * 5000}}}'),
  ),
  _changed(
    'MODEL/config.json has lists in lists, 100,000 deep',
    _write('config.json', '[' * 100_000 + ']' * 100_000),
  ),
  _config('model_type qwen3_next', model_type='qwen3_next'),
  _config('sliding_window 4096', sliding_window=4096),
  _config('attention_bias true, the weights without', attention_bias=True),
  _config('mlp_bias "yes"', mlp_bias='yes'),
  _config('hidden_act gelu', hidden_act='gelu'),
  _config(
    'a quantization_config', quantization_config={'quant_method': 'gptq'}
  ),
  _config(
    'layer_types with sliding_attention',
    layer_types=['full_attention', 'sliding_attention'],
  ),
  _config(
    'rope_scaling of type axial',
    rope_scaling={'rope_type': 'axial', 'factor': 4.0},
  ),
  _config(
    'rope_scaling of type llama3 without its factors',
    rope_scaling={'rope_type': 'llama3', 'factor': 4.0},
  ),
  _config('rope_scaling that is a list', rope_scaling=['yarn']),
  _config('rope_theta "high"', rope_theta='high'),
  _config('no hidden_size', hidden_size=None),
  _config('vocab_size "64"', vocab_size='64'),
  _config('num_hidden_layers 0', num_hidden_layers=0),
  _config('num_hidden_layers 100,000,000', num_hidden_layers=10**8),
  _config('num_key_value_heads "2"', num_key_value_heads='2'),
  _config('num_key_value_heads 3 for 4 heads', num_key_value_heads=3),
  _config('head_dim 7', head_dim=7),
  _config('rms_norm_eps "small"', rms_norm_eps='small'),
  _config('max_position_embeddings "64"', max_position_embeddings='64'),
  _config('intermediate_size 40, the weights 48', intermediate_size=40),
  _config('num_hidden_layers 3, the weights 2', num_hidden_layers=3),
  _config(
    'per_layer_config of a llama',
    per_layer_config={'0': {'intermediate_size': 40}},
  ),
  _config(
    'per_layer_config for layer 7',
    model_type='pruned_llama',
    per_layer_config={'7': {'intermediate_size': 40}},
  ),
  # Weights.
  _weights(f'MODEL lacks {QUERIES}', lambda t: t.pop(QUERIES) is None),
  _weights(
    'MODEL has q_proj.bias as well',
    lambda t: t.update({QUERIES.replace('weight', 'bias'): np.zeros(32)}),
  ),
  _weights(
    f'{QUERIES} is transposed and cut',
    lambda t: t.update({QUERIES: np.zeros((32, 16), np.float32)}),
  ),
  _weights(f'{QUERIES} is int8', _cast(QUERIES, 'int8')),
  _weights(
    f'{QUERIES} holds NaN',
    lambda t: t[QUERIES].fill(np.nan),
    leaves=('CACHE', 'CACHE/'),
  ),
  _changed(
    'MODEL/model.safetensors is cut short',
    _truncate('model.safetensors'),
    varies=r'(?<=read: ).*',
  ),
  _changed(
    'MODEL/model.safetensors is text',
    _write('model.safetensors', 'version 1 of a pointer'),
    varies=r'(?<=read: ).*',
  ),
  _changed(
    'MODEL/model.safetensors.index.json names an absent file',
    _weight_map({QUERIES: 'model-00001-of-00002.safetensors'}),
  ),
  _changed(
    'MODEL/model.safetensors.index.json has no weight_map',
    _index({}),
  ),
  _changed(
    'MODEL/model.safetensors.index.json has a list as weight_map',
    _weight_map(['model.safetensors']),
  ),
  _changed(
    'MODEL/model.safetensors.index.json names a file of another folder',
    _weight_map({QUERIES: '../OTHER/model.safetensors'}),
  ),
  _changed('Two files of MODEL hold the same tensor', _twice),
  _changed(
    'MODEL/model.safetensors is a link that leads nowhere', _dangling_link
  ),
  _changed('MODEL has pytorch_model.bin alone', _only_pickle),
  _changed(
    'MODEL names code of its own in auto_map',
    _strangers_model,
    varies='(?<=only )llama, .*(?= are supported)',
  ),
  Case('MODEL/generation_config.json is cut short', _bad_companion),
  # Tokenizers.
  _changed(
    'the tokenizer names code of its own in auto_map', _strangers_tokenizer
  ),
  _changed(
    'MODEL has no tokenizer',
    lambda m: [path.unlink() for path in m.glob('tokenizer*')] and None,
  ),
  _changed('MODEL/tokenizer.json is cut short', _truncate('tokenizer.json')),
  _changed(
    'MODEL/tokenizer.json is empty JSON',
    _write('tokenizer.json', '{}'),
    varies=r'(?<=used: ).*',
  ),
  _changed(
    'MODEL/tokenizer_config.json is cut short',
    _write('tokenizer_config.json', '{"a'),
  ),
  _changed('the tokenizer has more tokens than MODEL', _id_of_word(64)),
  _changed(
    'MODEL/tokenizer.json gives a token the id 2,147,483,648',
    _id_of_word(2**31),
  ),
  _changed(
    'MODEL/tokenizer.json has a pattern that takes too long',
    _pattern,
    late=True,
    leaves=('CACHE', 'CACHE/windows'),
    varies=r'(?<=used: ).*',
  ),
  _changed(
    'the chat_template of MODEL is a number', _setting('chat_template', 5)
  ),
  _changed('the bos_token of MODEL is a list', _setting('bos_token', ['<s>'])),
]
