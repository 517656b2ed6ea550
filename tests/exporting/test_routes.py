"""Every route out holds the same model; what does not is refused."""

import functools
import json
import re

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.errors import UserError
from lorapr_jax.exporting import sources as exports
from lorapr_jax.exporting.cards import pruning_report
from lorapr_jax.exporting.model import (
  Description,
  Weights,
  merge,
  model_name,
)
from lorapr_jax.exporting.routes import Route
from lorapr_jax.exporting.write import write
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.place import place_params
from lorapr_jax.hf.write import hf_tensors
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.rope import Rope
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.masks import by_stack, initial_masks, select_masks
from lorapr_jax.pruning.shrink import kept_groups, shrink, shrunk_config
from lorapr_jax.settings.sections import ExportSettings
from lorapr_jax.training.base import cut_params
from lorapr_jax.training.cut import cut_adapters

BEFORE = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 2, 48),) * 3,
  ropes=(Rope(500.0),),
  max_positions=64,
)
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.0)
# The first layer is protected; of the others, all lose as much or not.
CUTS = {
  'kv_heads': {KV_HEADS: (2, 1, 1), CHANNELS: (48, 32, 32)},
  'queries': {QUERIES: (2, 1, 1), CHANNELS: (48, 40, 24)},
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
INDEX = 'model.safetensors.index.json'


@pytest.fixture(scope='module')
def pruned(random_params, random_lora):
  """A model that was cut and merged: (Description, Weights)."""

  @functools.cache
  def make(case='queries', dtype='float32', biased=()):
    keep, before = CUTS[case], BEFORE.with_biases(biased)
    masks = initial_masks(
      tuple(keep), tuple((s.size, BEFORE.sizes(s.shape)) for s in BEFORE.stacks)
    )
    rng = np.random.default_rng(1)
    importance = jax.tree.map(lambda x: rng.normal(size=x.shape), masks)
    select = jax.jit(select_masks)
    masks = select(importance, masks, by_stack(keep, BEFORE))
    kept = kept_groups(masks)
    params = cut_params(random_params(before, dtype), kept, before)
    lora = cut_adapters(random_lora(BEFORE, LORA), kept, BEFORE, LORA)
    weights = merge(params, lora, LORA, unmerged=True)
    origin = {'name': 'tiny', 'sha256': None, 'config': config_to_hf(BEFORE)}
    model = Description(
      name='tiny',
      config=shrunk_config(before, kept),
      dtype=dtype,
      base=None,
      before=before,
      kept=kept,
      pruning=pruning_report(None, kept, origin, {}),
    )
    return model, weights

  return make


@functools.partial(jax.jit, static_argnames='config')
def logits(params, config, tokens=TOKENS):
  return decoder.logits(
    params, decoder.hidden_states(params, tokens, config), config
  )


def check_logits(params, config):
  """On the tokens that are compared when a model was written."""
  tokens = jax.random.randint(jax.random.key(0), (1, 32), 0, config.vocab_size)
  return np.asarray(logits(params, config, tokens))


def torch_logits(folder, model_class):
  model, info = model_class.from_pretrained(
    folder, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info.values()), info
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.numpy()


def tensors(folder):
  """Name -> what is stored, from all files of a folder."""
  found = {}
  for path in folder.glob('*.safetensors'):
    found |= load_file(path)
  return found


def assert_same_tensors(folder, other):
  found, expected = tensors(folder), tensors(other)
  assert found.keys() == expected.keys()
  for name, x in found.items():
    assert x.dtype == expected[name].dtype
    np.testing.assert_array_equal(x, expected[name], err_msg=name)


# --- Padded.


@pytest.mark.parametrize('case', CUTS)
def test_padded_is_a_stock_llama_with_the_same_logits(
  case, pruned, load, tmp_path
):
  model, weights = pruned(case)
  result = write(
    Route('hf', tmp_path / 'padded', layout='padded'), model, weights
  )
  assert result == {
    'path': str(tmp_path / 'padded'),
    'layout': 'padded',
    'dtype': 'float32',
    'max_logit_difference': result['max_logit_difference'],
  }
  assert result['max_logit_difference'] < 1e-4
  hf = json.loads((tmp_path / 'padded/config.json').read_text())
  assert hf['model_type'] == 'llama' and 'auto_map' not in hf
  assert not list((tmp_path / 'padded').glob('*.py'))

  config, read = load(tmp_path / 'padded')
  assert config == BEFORE
  expected = logits(weights.merged, model.config)
  assert expected.std() > 0.5
  np.testing.assert_allclose(logits(read, config), expected, atol=1e-4)
  found = torch_logits(tmp_path / 'padded', transformers.LlamaForCausalLM)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

  # What was kept is where it was; all the rest is zero.
  axes = block_axes(BEFORE)['params']
  cut = jax.jit(lambda stacks: shrink(stacks, axes, model.kept, BEFORE))
  back = cut(read['stacks'])
  jax.tree.map(
    np.testing.assert_array_equal, back, tuple(weights.merged['stacks'])
  )

  def ones(tree):
    return sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(tree))

  assert ones(read) == ones(weights.merged)


@pytest.mark.parametrize('case', CUTS)
def test_padded_from_an_export_is_padded_from_the_run(case, pruned, tmp_path):
  model, weights = pruned(case)
  first, run, later, again = (tmp_path / name for name in 'abcd')
  write(Route('hf', first), model, weights)
  write(Route('hf', run, layout='padded'), model, weights)
  result = exports.export(first, Route('hf', later, layout='padded'))
  assert result['layout'] == 'padded'
  assert result['parameters'] == model.config.num_parameters
  assert_same_tensors(later, run)
  for name in ('config.json', 'pruning.json', 'README.md'):
    assert (later / name).read_text() == (run / name).read_text()
  assert 'stored as zeros' in (later / 'README.md').read_text()
  # A padded folder is padded already.
  exports.export(later, Route('hf', again, layout='padded'))
  assert_same_tensors(again, run)
  assert (again / 'README.md').read_text() == (run / 'README.md').read_text()


@pytest.mark.parametrize('layout', ['auto', 'padded'])
@pytest.mark.parametrize('kind', ['hf', 'gguf', 'peft'])
def test_every_route_holds_biases(kind, layout, pruned, load, tmp_path):
  model, weights = pruned(biased=LORA_TARGETS)
  path = tmp_path / ('a.gguf' if kind == 'gguf' else 'a')
  result = write(Route(kind, path, layout=layout), model, weights)
  assert result['max_logit_difference'] < 1e-4
  if (kind, layout) != ('hf', 'padded'):
    return
  config, read = load(path)
  assert config == model.before and config.biases
  expected = logits(weights.merged, model.config)
  found = torch_logits(path, transformers.LlamaForCausalLM)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_uniform_stays_refused_for_unequal_layers(pruned, tmp_path):
  model, weights = pruned()
  with pytest.raises(UserError, match='export.layout=uniform needs layers of'):
    write(Route('hf', tmp_path / 'a', layout='uniform'), model, weights)
  assert list(tmp_path.iterdir()) == []


# --- Dtypes and shards.


def test_float16_rounds_every_weight_once(pruned, tmp_path):
  model, weights = pruned()
  write(Route('hf', tmp_path / 'exact'), model, weights)
  half = Route('hf', tmp_path / 'half', dtype='float16')
  result = write(half, model, weights)
  assert result['dtype'] == 'float16'
  assert 0 < result['max_logit_difference'] < 0.1
  exact, rounded = tensors(tmp_path / 'exact'), tensors(tmp_path / 'half')
  for name, x in exact.items():
    np.testing.assert_array_equal(rounded[name], x.astype(np.float16))
  hf = json.loads((tmp_path / 'half/config.json').read_text())
  assert hf['torch_dtype'] == 'float16'


def test_a_weight_beyond_float16_is_named(pruned, tmp_path):
  model, weights = pruned()
  norm = {'weight': weights.merged['norm']['weight'].at[3].set(-7e4)}
  weights = Weights({**weights.merged, 'norm': norm})
  route = Route('hf', tmp_path / 'half', dtype='float16')
  with pytest.raises(UserError) as error:
    write(route, model, weights)
  assert 'model.norm.weight has a weight of 70000' in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_shards_are_as_small_as_asked(pruned, tmp_path):
  model, weights = pruned()
  small = 20_000
  write(Route('hf', tmp_path / 'one'), model, weights)
  many = Route('hf', tmp_path / 'many', max_shard_bytes=small)
  assert write(many, model, weights)['max_logit_difference'] == 0.0
  assert (tmp_path / 'many' / INDEX).exists()
  for path in (tmp_path / 'many').glob('*.safetensors'):
    assert sum(x.nbytes for x in load_file(path).values()) <= small
  assert_same_tensors(tmp_path / 'one', tmp_path / 'many')


# --- GGUF and PEFT.


@pytest.mark.parametrize(
  'dtype, stored',
  [('auto', 'f32'), ('float16', 'f16'), ('bf16', 'bf16'), ('q8_0', 'q8_0')],
)
def test_a_gguf_differs_by_its_rounding_alone(dtype, stored, pruned, tmp_path):
  model, weights = pruned()
  route = Route('gguf', tmp_path / 'a.gguf', dtype=dtype)
  result = write(route, model, weights)
  difference = result.pop('max_logit_difference')
  assert result == {'path': str(route.path), 'layout': None, 'dtype': stored}
  assert open_gguf(route.path).config.layers == model.config.layers

  def rounded(weight):
    """As gguf-py rounds; norms and what q8_0 has no blocks for stay finer."""
    name = 'F32' if weight.ndim == 1 else stored.upper()
    if name == 'Q8_0' and weight.shape[1] % 32:
      name = 'F16'
    kind = gguf.GGMLQuantizationType[name]
    return gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)

  held = hf_tensors(weights.merged, model.config, np.float32)
  read = place_params(
    {name: rounded(weight) for name, weight in held}.__getitem__,
    model.config,
    jax.tree.map(lambda x: x.sharding, weights.merged),
    np.dtype('float32'),
  )
  expected = check_logits(read, model.config)
  exact = check_logits(weights.merged, model.config)
  assert difference == pytest.approx(abs(expected - exact).max(), abs=1e-4)
  assert (difference == 0) == (stored == 'f32')


def test_a_padded_gguf_has_the_sizes_before(pruned, tmp_path):
  model, weights = pruned()
  route = Route('gguf', tmp_path / 'a.gguf', layout='padded')
  assert write(route, model, weights)['layout'] == 'padded'
  assert open_gguf(route.path).config.layers == BEFORE.layers


@pytest.mark.parametrize('layout', ['auto', 'padded'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_adapter_over_the_base_is_the_merged_model(
  layout, dtype, pruned, load, tmp_path
):
  model, weights = pruned(dtype=dtype)
  out = tmp_path / 'peft'
  result = write(Route('peft', out, layout=layout), model, weights)
  assert result['layout'] == ('two_shape' if layout == 'auto' else 'padded')
  assert result['dtype'] == dtype
  # The base is rounded nowhere, and the sum once, as in memory.
  assert result['max_logit_difference'] < 1e-4
  assert {path.name for path in out.iterdir()} == {
    *('README.md', 'adapter_config.json', 'adapter_model.safetensors', 'base')
  }
  config, base = load(out / 'base', dtype)
  assert (
    config.layers == (BEFORE if layout == 'padded' else model.config).layers
  )
  if layout == 'auto':
    jax.tree.map(np.testing.assert_array_equal, base, weights.base)
  trusts = 'trust_remote_code=True' in (out / 'README.md').read_text()
  assert trusts == (layout == 'auto')


# --- A comparison that fails.


def test_adapters_that_were_not_merged_are_found(pruned, tmp_path):
  model, weights = pruned()
  other = jax.tree.map(lambda x: 2.0 * x, weights.lora)
  with pytest.raises(RuntimeError, match='read back its logits differ by'):
    write(Route('peft', tmp_path / 'a'), model, weights._replace(lora=other))


@pytest.mark.parametrize(
  'value, error, message',
  [
    # Finite, but what is computed with it is not.
    (3e38, RuntimeError, 'read back its logits differ by nan'),
    (np.nan, UserError, 'model.norm.weight holds NaN or infinity'),
  ],
)
def test_what_computes_nan_is_never_the_same(
  pruned, tmp_path, value, error, message
):
  model, weights = pruned()
  norm = {'weight': weights.merged['norm']['weight'].at[3].set(value)}
  with pytest.raises(error, match=message):
    write(
      Route('hf', tmp_path / 'a'),
      model,
      Weights({**weights.merged, 'norm': norm}),
    )
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'options, message',
  [
    (dict(kind='gguf', path='a'), 'a: the name of a GGUF file ends in .gguf'),
    (dict(kind='hf', path='a.gguf'), 'a.gguf is named like a GGUF file'),
    (dict(kind='hf', path='a', dtype='q8_0'), 'dtype q8_0 is one of format'),
    (dict(kind='peft', path='a', dtype='f16'), 'dtype f16 is one of format'),
    (
      dict(kind='hf', path='.'),
      'exists already, and nothing is written',
    ),
  ],
)
def test_a_route_that_cannot_be_is_refused(options, message, pruned, tmp_path):
  model, weights = pruned()
  route = Route(**options | {'path': tmp_path / options['path']})
  with pytest.raises(UserError, match=re.escape(message)):
    write(route, model, weights)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'folder, name',
  [
    ('llama', 'llama'),
    (
      'models--meta-llama--Llama-2-7b/snapshots/01c7f73d',
      'meta-llama/Llama-2-7b',
    ),
    ('models--gpt2/snapshots/607a30d7', 'gpt2'),
    ('models--a--b/other/607a30d7', '607a30d7'),
    ('data--a--b/snapshots/607a30d7', '607a30d7'),
  ],
)
def test_a_snapshot_of_the_hub_has_its_repositorys_name(folder, name, tmp_path):
  (tmp_path / folder).mkdir(parents=True)
  assert model_name(tmp_path / folder) == name
  (tmp_path / 'link').symlink_to(folder)
  assert model_name(tmp_path / 'link') == name
  description = Description(name, None, 'bfloat16', None)
  route = Route.of_run('gguf', tmp_path, ExportSettings(), description)
  file = f'{name.rpartition("/")[2]}-bf16.gguf'
  assert route.path == tmp_path / 'export-gguf' / file
