"""Folders come in and go out bit by bit, or are refused by what is wrong."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
import torch
import transformers

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.errors import UserError
from lorapr_jax.hf.files import content_hash
from lorapr_jax.hf.layout import check_padded, hf_config
from lorapr_jax.hf.load import load_config, load_params, weight_places
from lorapr_jax.hf.write import check_companions, export_model
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.rope import Llama3, Rope
from lorapr_jax.runtime import sharding

SIZES = dict(vocab_size=96, embed_dim=32, head_dim=8, ropes=(Rope(500.0),))
LLAMA = ModelConfig(
  **SIZES, layers=(LayerShape(2, 2, 40),) * 2, tie_embeddings=True
)
# Three heads do not divide the 32 of the residual stream.
MISTRAL = ModelConfig(**SIZES, layers=(LayerShape(1, 3, 40),) * 2)
UNEQUAL = ModelConfig(
  **SIZES | {'ropes': (Rope(500.0, Llama3(4.0, 1.0, 4.0, 32)),)},
  layers=(LayerShape(2, 3, 40), LayerShape(1, 3, 24), LayerShape(2, 3, 40)),
)
BOTH = LORA_TARGETS
INDEX = 'model.safetensors.index.json'
SOME_SHARDS = 20_000


def _tensors(folder):
  """Name -> what is stored, from all files of a folder."""
  tensors = {}
  for path in folder.glob('*.safetensors'):
    tensors |= load_file(path)
  return tensors


def _differences(folder, other):
  """The names of the tensors that are not the same bit by bit."""
  one, two = (
    {n: (x.dtype, x.shape, x.tobytes()) for n, x in _tensors(f).items()}
    for f in (folder, other)
  )
  assert one
  return sorted(n for n in one.keys() | two.keys() if one.get(n) != two.get(n))


# --- In and out again.


@pytest.mark.parametrize('kind', ['mha', 'gqa_tied', 'mistral'])
def test_many_shards_go_in_and_out(kind, save_hf, load, tmp_path):
  source = save_hf(kind, max_shard_size='20KB')
  config, params = load(source)
  export_model(tmp_path / 'out', params, config, max_shard_bytes=SOME_SHARDS)
  for folder in (source, tmp_path / 'out'):
    assert (folder / INDEX).exists()
    assert not (folder / 'model.safetensors').exists()
  assert _differences(source, tmp_path / 'out') == []
  assert load_config(tmp_path / 'out') == config


@pytest.mark.parametrize('max_shard_bytes', [1, SOME_SHARDS, 10**9])
def test_shards_are_small_and_the_index_finds_all(
  max_shard_bytes, random_params, tmp_path
):
  out = tmp_path / 'out'
  params = random_params(LLAMA)
  export_model(out, params, LLAMA, max_shard_bytes=max_shard_bytes)
  files = sorted(path.name for path in out.glob('*.safetensors'))
  held = {name: load_file(out / name) for name in files}
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  for name, tensors in held.items():
    size = sum(x.nbytes for x in tensors.values())
    assert size <= max_shard_bytes or len(tensors) == 1
    with safe_open(out / name, framework='np') as file:
      assert file.metadata() == {'format': 'pt'}
    # Others than the owner can read them.
    assert (out / name).stat().st_mode & 0o777 == 0o644
  if max_shard_bytes > total:
    assert files == ['model.safetensors']
    assert not (out / INDEX).exists()
    return
  assert files == [
    f'model-{i + 1:05d}-of-{len(files):05d}.safetensors'
    for i in range(len(files))
  ]
  assert json.loads((out / INDEX).read_text()) == {
    'metadata': {'total_size': total},
    'weight_map': {
      tensor: name for name, tensors in held.items() for tensor in tensors
    },
  }


@pytest.mark.mesh
@pytest.mark.parametrize(
  'kind, sizes',
  [
    ('gqa', (1, 4, 2)),
    ('gqa_tied', (2, 2, 2)),
    ('mha', (1, 2, 4)),
    ('mistral', (1, 8, 1)),
    ('biases', (1, 4, 2)),
  ],
)
def test_each_device_gets_its_slices(kind, sizes, save_hf, load):
  folder = save_hf(kind, max_shard_size='20KB')
  config, want = load(folder)
  mesh = sharding.make_mesh(sharding.mesh_sizes(*sizes))
  places = weight_places(config, jnp.float32, mesh)
  got = load_params(folder, config, places, np.dtype('float32'))
  q = got['stacks'][0]['self_attn']['q_proj']['weight']
  assert q.addressable_shards[0].data.size == q.size // (sizes[1] * sizes[2])

  def check(x, y, place):
    assert x.sharding == place
    np.testing.assert_array_equal(x, y)

  jax.tree.map(check, got, want, places)


@pytest.mark.mesh
@pytest.mark.parametrize('width, fsdp', [(32, 8), (36, 4), (35, 1)])
def test_all_devices_share_a_model_as_far_as_its_width_divides(width, fsdp):
  config = ModelConfig(
    vocab_size=8, embed_dim=width, head_dim=4, layers=(LayerShape(1, 1, 8),)
  )
  place = weight_places(config, jnp.float32)['norm']['weight']
  assert dict(place.mesh.shape) == {
    'data': 8 // fsdp,
    'fsdp': fsdp,
    'sequence': 1,
    'tensor': 1,
  }
  assert place.shard_shape((width,)) == (width // fsdp,)


# --- What is wrong with a folder is named.


@pytest.fixture
def damaged(save_hf, tmp_path):
  """A copy of a good folder, to be damaged."""
  return shutil.copytree(save_hf('gqa_tied'), tmp_path / 'damaged')


def _rewrite(folder, change):
  path = folder / 'model.safetensors'
  tensors = load_file(path)
  change(tensors)
  save_file(tensors, path, metadata={'format': 'pt'})


def _refusal(load, folder):
  with pytest.raises(UserError) as error:
    load(folder)
  assert str(folder) in str(error.value)
  return str(error.value)


Q_PROJ = 'model.layers.1.self_attn.q_proj'


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda t: t.pop(f'{Q_PROJ}.weight'), f'lacks tensor {Q_PROJ}.weight'),
    (
      lambda t: t.update({f'{Q_PROJ}.bias': np.zeros(32, np.float32)}),
      f'has the unknown tensor {Q_PROJ}.bias',
    ),
    (
      lambda t: t.update({f'{Q_PROJ}.weight': np.zeros((16, 32), np.float32)}),
      f'{Q_PROJ}.weight has shape (16, 32), but config.json says (32, 32)',
    ),
  ],
)
def test_a_tensor_that_is_wrong_is_named(damaged, change, message, load):
  _rewrite(damaged, change)
  assert message in _refusal(load, damaged)


def test_a_file_with_fewer_layers_than_its_config_is_refused(damaged, load):
  hf = json.loads((damaged / 'config.json').read_text())
  hf['num_hidden_layers'] = 3
  (damaged / 'config.json').write_text(json.dumps(hf))
  message = _refusal(load, damaged)
  assert 'lacks tensor model.layers.2.' in message
  assert 'and 8 more' in message


def test_tensors_that_mean_nothing_are_ignored(damaged, load):
  want = load(damaged)[1]
  inverse = 'model.layers.0.self_attn.rotary_emb.inv_freq'

  def change(tensors):
    tensors[inverse] = np.zeros(4, np.float32)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()

  _rewrite(damaged, change)
  jax.tree.map(np.testing.assert_array_equal, load(damaged)[1], want)


def test_of_a_model_that_sees_too_the_text_model_is_loaded(damaged, load):
  want = load(damaged)[1]

  def change(tensors):
    for name in list(tensors):
      tensors[f'language_model.{name}'] = tensors.pop(name)
    tensors['vision_tower.head.probe'] = np.zeros(4, np.float32)
    tensors['multi_modal_projector.weight'] = np.zeros(4, np.int8)

  _rewrite(damaged, change)
  jax.tree.map(np.testing.assert_array_equal, load(damaged)[1], want)


@pytest.mark.parametrize('size', [4, 200, -100])
def test_a_truncated_file_is_named(damaged, size, load):
  path = damaged / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:size])
  assert str(path) in _refusal(load, damaged)


def test_a_missing_shard_is_named(save_hf, tmp_path, load):
  folder = shutil.copytree(
    save_hf('gqa', max_shard_size='20KB'), tmp_path / 'damaged'
  )
  shard = sorted(folder.glob('*.safetensors'))[1]
  shard.unlink()
  assert str(shard) in _refusal(load, folder)


def test_a_folder_without_safetensors_is_refused(damaged, load):
  (damaged / 'model.safetensors').rename(damaged / 'pytorch_model.bin')
  assert 'no model.safetensors and no' in _refusal(load, damaged)


@pytest.mark.parametrize('text', [None, '{"vocab_size": ', '[1]', '\udcff'])
def test_a_config_that_is_missing_or_damaged_is_named(damaged, text, load):
  path = damaged / 'config.json'
  path.unlink()
  if text is not None:
    path.write_bytes(text.encode(errors='surrogateescape'))
  assert str(path) in _refusal(load, damaged)


def test_an_unsupported_config_is_named_with_its_folder(damaged, load):
  hf = json.loads((damaged / 'config.json').read_text())
  (damaged / 'config.json').write_text(json.dumps({**hf, 'hidden_act': 'relu'}))
  assert 'hidden_act' in _refusal(load, damaged)


def test_a_folder_without_the_biases_that_it_says_is_refused(damaged, load):
  hf = json.loads((damaged / 'config.json').read_text())
  (damaged / 'config.json').write_text(json.dumps({**hf, 'mlp_bias': True}))
  message = _refusal(load, damaged)
  assert 'lacks tensor model.layers.0.mlp.down_proj.bias and 5 more' in message


def test_what_is_no_folder_is_refused(tmp_path, load):
  assert 'not a folder' in _refusal(load, tmp_path / 'nowhere')


# --- Exports.


TOKENS = np.random.default_rng(0).integers(0, 96, (2, 48))
PROMPT, NEW = 5, 8


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, tokens, config):
  return decoder.logits(
    params, decoder.hidden_states(params, tokens, config), config
  )


@pytest.mark.parametrize(
  'config, options, model_type',
  [
    (LLAMA, {}, 'llama'),
    (MISTRAL, {}, 'mistral'),
    (LLAMA, {'model_type': 'mistral'}, 'mistral'),
    (UNEQUAL, {}, 'pruned_llama'),
    (LLAMA, {'layout': 'two_shape'}, 'pruned_llama'),
    (LLAMA.with_biases(BOTH), {}, 'llama'),
    (LLAMA.with_biases(PROJECTIONS['mlp']), {'layout': 'uniform'}, 'llama'),
    (UNEQUAL.with_biases(BOTH), {}, 'pruned_llama'),
    # There is no mistral with biases.
    (MISTRAL.with_biases(PROJECTIONS['self_attn']), {}, 'granite'),
  ],
)
def test_transformers_runs_what_was_exported(
  config, options, model_type, random_params, load, tmp_path
):
  out = tmp_path / 'out'
  params = random_params(config)
  export_model(out, params, config, **options)
  hf = json.loads((out / 'config.json').read_text())
  assert hf['model_type'] == model_type
  assert hf['torch_dtype'] == 'float32'
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    out,
    trust_remote_code=model_type == 'pruned_llama',
    dtype=torch.float32,
    output_loading_info=True,
  )
  assert not any(info.values()), info
  with torch.no_grad():
    got = model(torch.from_numpy(TOKENS)).logits.numpy()
  want = _logits(params, TOKENS, config)
  assert want.std() > 0.5
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)

  prompt = torch.from_numpy(TOKENS[:, :PROMPT])
  generated = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=NEW,
    do_sample=False,
  ).numpy()
  assert generated.shape == (2, PROMPT + NEW)
  ours = _logits(params, generated, config)[:, PROMPT - 1 : -1].argmax(-1)
  np.testing.assert_array_equal(generated[:, PROMPT:], ours)

  # And we read it back.
  read_config, read = load(out)
  assert read_config == config
  jax.tree.map(np.testing.assert_array_equal, read, params)


def test_an_export_in_another_dtype_is_rounded_once(random_params, tmp_path):
  params = random_params(UNEQUAL)
  export_model(tmp_path / 'exact', params, UNEQUAL)
  export_model(tmp_path / 'out', params, UNEQUAL, dtype='bfloat16')
  exact, rounded = _tensors(tmp_path / 'exact'), _tensors(tmp_path / 'out')
  assert exact.keys() == rounded.keys()
  for name, x in exact.items():
    np.testing.assert_array_equal(rounded[name], x.astype(jnp.bfloat16))
  hf = json.loads((tmp_path / 'out/config.json').read_text())
  assert hf['torch_dtype'] == 'bfloat16'


COMPANIONS = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
  'generation_config.json',
  'LICENSE',
  'NOTICE.txt',
  'USE_POLICY.md',
)


def test_companions_are_copied_byte_for_byte(random_params, tmp_path):
  base, out = tmp_path / 'base', tmp_path / 'out'
  base.mkdir()
  for i, name in enumerate(COMPANIONS):
    (base / name).write_bytes(b'\xff\x00\r\n {"a":  1}' + bytes([i]))
  for name in ('config.json', 'model.safetensors', 'other.txt', INDEX):
    (base / name).write_bytes(b'of the base')
  (base / 'LICENSES').mkdir()  # Only files are copied.
  export_model(
    out,
    random_params(LLAMA),
    LLAMA,
    base=base,
    pruning={'kept': [1, 2]},
    card='# Ü\n',
  )
  for name in COMPANIONS:
    assert (out / name).read_bytes() == (base / name).read_bytes()
  assert json.loads((out / 'pruning.json').read_text()) == {'kept': [1, 2]}
  assert (out / 'README.md').read_text(encoding='utf-8') == '# Ü\n'
  assert {path.name for path in out.iterdir()} == {
    *COMPANIONS,
    'README.md',
    'config.json',
    'model.safetensors',
    'pruning.json',
  }


@pytest.mark.parametrize('name', COMPANIONS)
def test_companions_are_read_before_any_work(tmp_path, name):
  path = tmp_path / name
  (tmp_path / 'LICENSES').mkdir()
  path.write_text('{"a": 1}')
  check_companions(tmp_path)
  # The tokenizer's own reader reads it before any work, too.
  if path.suffix == '.json' and name != 'tokenizer.json':
    for text in '', '{"a": 1', '[1]', '{"a": ' + '[' * 9999:
      path.write_text(text)
      with pytest.raises(UserError, match=name):
        check_companions(tmp_path)
  path.unlink()
  path.symlink_to(tmp_path / 'absent')
  with pytest.raises(UserError, match=f'{name} is a link to .*absent'):
    check_companions(tmp_path)


def test_the_remote_code_goes_only_where_it_is_needed(random_params, tmp_path):
  code = {'configuration_pruned_llama.py', 'modeling_pruned_llama.py'}
  for config, expected in ((LLAMA, set()), (UNEQUAL, code)):
    out = tmp_path / f'{len(config.layers)}'
    export_model(out, random_params(config), config)
    assert {path.name for path in out.glob('*.py')} == expected


@pytest.mark.parametrize(
  'vocab_size, layers, version',
  [
    (100_000, MISTRAL.layers, None),
    (100_001, MISTRAL.layers, '5.0.0'),
    (100_001, LLAMA.layers, None),
  ],
)
def test_a_large_vocabulary_needs_a_version_as_mistral(
  vocab_size, layers, version
):
  sizes = SIZES | {'vocab_size': vocab_size}
  config = ModelConfig(**sizes, layers=layers)
  hf = hf_config(config, 'float32', 'auto', 'auto')
  assert hf.get('transformers_version') == version
  if hf['model_type'] == 'mistral':
    assert hf['sliding_window'] is None


def test_zeros_of_heads_would_count_in_norms_over_all_heads():
  before = dataclasses.replace(LLAMA, qk_norm='heads')
  heads, channels = (
    dataclasses.replace(
      before, layers=(dataclasses.replace(LLAMA.layers[0], **change),) * 2
    )
    for change in ({'num_kv_heads': 1}, {'mlp_dim': 8})
  )
  check_padded(before, channels)
  with pytest.raises(UserError, match='would count their zeros'):
    check_padded(before, heads)


@pytest.mark.parametrize(
  'config, options, message',
  [
    (UNEQUAL, {'layout': 'uniform'}, 'export.layout=uniform'),
    (UNEQUAL, {'layout': 'padded'}, 'export.layout=padded'),
    (UNEQUAL, {'layout': 'flat'}, "export.layout is 'flat'"),
    (LLAMA, {'model_type': 'gpt2'}, "export.model_type is 'gpt2'"),
    (
      LLAMA.with_biases(BOTH),
      {'model_type': 'mistral'},
      'export.model_type=mistral cannot hold the biases',
    ),
  ],
)
def test_what_an_export_cannot_hold_is_refused(
  config, options, message, random_params, tmp_path
):
  with pytest.raises(UserError, match=re.escape(message)):
    export_model(tmp_path / 'out', random_params(config), config, **options)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('below', ['', 'below/'])
def test_a_folders_hash_is_of_its_config_and_all_weights(below, tmp_path):
  shards = f'{below}a.safetensors', f'{below}b.safetensors'
  files = {'config.json': b'{}', **dict.fromkeys(shards, b'1')}
  (tmp_path / 'below').mkdir()
  index = {'weight_map': {name: name for name in shards}}
  (tmp_path / INDEX).write_text(json.dumps(index))
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  seen = [content_hash(tmp_path)]
  assert content_hash(tmp_path) == seen[0]
  for name, content in files.items():
    (tmp_path / name).write_bytes(content[::-1] + b'!')
    seen.append(content_hash(tmp_path))
  (tmp_path / 'README.md').write_text('Not part of it.')
  (tmp_path / 'adapter_model.safetensors').write_text('Nor is this.')
  assert content_hash(tmp_path) == seen[-1] and len(set(seen)) == 4


def test_nothing_is_written_over_a_folder(random_params, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'precious').write_text('of the user')
  with pytest.raises(UserError, match=re.escape(f'{out} exists already')):
    export_model(out, random_params(LLAMA), LLAMA)
  assert [path.name for path in tmp_path.rglob('*')] == ['out', 'precious']


def test_an_export_that_fails_leaves_nothing(random_params, tmp_path):
  params = random_params(LLAMA)
  # Met after the first shards are written.
  params['stacks'][0]['self_attn']['v_proj']['weight'] = jnp.zeros(())
  with pytest.raises(IndexError):
    export_model(tmp_path / 'out', params, LLAMA, max_shard_bytes=1000)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('change', [None, 'one', 'all'])
@pytest.mark.parametrize('shards', ['one', 'many'])
def test_another_head_than_tied_embeddings_is_used_as_in_transformers(
  change, shards, save_hf, load, tmp_path, caplog
):
  source = save_hf('gqa_tied')
  tied, params = load(source)
  head = np.array(params['embed_tokens']['weight'])
  if change:
    head[-1 if change == 'one' else slice(None)] += 0.5
  folder, index = tmp_path / 'model', tmp_path / 'model' / INDEX
  export_model(
    folder,
    params | {'lm_head': {'weight': jnp.asarray(head)}},
    dataclasses.replace(tied, tie_embeddings=False),
    **({'max_shard_bytes': SOME_SHARDS} if shards == 'many' else {}),
  )
  assert index.exists() == (shards == 'many')
  shutil.copy(source / 'config.json', folder)
  config, read = load(folder)
  assert config.tie_embeddings == (change is None)
  warned = [record.getMessage() for record in caplog.records]
  assert len(warned) == bool(change) and all(str(folder) in w for w in warned)
  # Up to version 4 it has to be told.
  told = {'tie_word_embeddings': change is None}
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    **({} if int(transformers.__version__.split('.')[0]) > 4 else told),
  )
  with torch.no_grad():
    want = model(torch.from_numpy(TOKENS % 64)).logits.numpy()
  got = _logits(read, TOKENS % 64, config)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  # What comes out says what it is.
  export_model(tmp_path / 'out', read, config)
  hf = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert hf['tie_word_embeddings'] == (change is None)
  assert ('lm_head.weight' in _tensors(tmp_path / 'out')) == bool(change)


def test_sizes_are_read_where_the_weights_have_not_come(save_hf, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(save_hf('gqa_tied', max_shard_size='20KB'), folder)
  for path in sorted(folder.glob('*.safetensors')):
    path.unlink()
    assert load_config(folder).tie_embeddings


@pytest.mark.mesh
@pytest.mark.parametrize(
  'name',
  [
    'model.embed_tokens.weight',
    'model.layers.1.self_attn.k_proj.weight',
    'model.layers.1.mlp.down_proj.weight',
    'model.layers.0.input_layernorm.weight',
    'model.norm.weight',
    'lm_head.weight',
  ],
)
@pytest.mark.parametrize('value', [np.nan, -np.inf])
@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
def test_a_weight_that_is_not_finite_is_named(
  kind, value, name, save_hf, tmp_path
):
  folder = shutil.copytree(save_hf('gqa'), tmp_path / 'model')
  dtype = jnp.dtype('float32' if kind == 'int8' else kind)
  config = load_config(folder)
  if kind == 'int8':
    config = dataclasses.replace(config, quantized=('k_proj', 'down_proj'))
  mesh = sharding.make_mesh(sharding.mesh_sizes(1, 4, 2))
  places = weight_places(config, dtype, mesh)
  load_params(folder, config, places, dtype)

  def change(tensors):
    tensors[name].flat[-1] = value

  _rewrite(folder, change)
  message = f'{folder}: {name} holds NaN or infinity as {dtype.name}: fetch'
  with pytest.raises(UserError, match=message):
    load_params(folder, config, places, dtype)


def test_a_weight_that_a_dtype_cannot_hold_is_named(damaged, load):
  _rewrite(damaged, lambda t: t[f'{Q_PROJ}.weight'].fill(1e6))
  load(damaged)
  with pytest.raises(
    UserError, match=f'{Q_PROJ}.weight .* infinity as float16'
  ):
    load(damaged, 'float16')
