"""What must be set before jax and transformers load; and tiny random models."""

import functools
import os
import shutil
import tempfile

import pytest

_MODULES = tempfile.TemporaryDirectory(prefix='transformers-modules-')
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_MODULES_CACHE'] = _MODULES.name
# In tensors as small as ours, torch's threads only wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_DEVICES = '--xla_force_host_platform_device_count'
_FLAGS = os.environ.get('XLA_FLAGS', '')
if _DEVICES not in _FLAGS:
  os.environ['XLA_FLAGS'] = f'{_FLAGS} {_DEVICES}=8'

_LLAMA = {
  'model_type': 'llama',
  'vocab_size': 96,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500.0,
  'tie_word_embeddings': False,
  'bos_token_id': None,
  'eos_token_id': None,
}
# One of the four frequencies is kept, one blended, two are divided.
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
# The keys of config.json, for a model of every kind.
HF_CONFIGS = {
  'mha': _LLAMA | {'num_key_value_heads': 4},
  'mha_tied': _LLAMA | {'num_key_value_heads': 4, 'tie_word_embeddings': True},
  'gqa': _LLAMA,
  'gqa_tied': _LLAMA | {'tie_word_embeddings': True},
  'wide_heads': _LLAMA | {'head_dim': 16},
  'llama3': _LLAMA | {'rope_scaling': _LLAMA3, 'tie_word_embeddings': True},
  'mistral': _LLAMA
  | {
    'model_type': 'mistral',
    'num_attention_heads': 3,
    'num_key_value_heads': 1,
    'head_dim': 8,
    'sliding_window': None,
  },
}


def pytest_unconfigure():
  _MODULES.cleanup()


@pytest.fixture(params=HF_CONFIGS)
def kind(request):
  """A key of HF_CONFIGS."""
  return request.param


@pytest.fixture(scope='session')
def save_hf(tmp_path_factory):
  """Saves transformers' model of a kind with random weights; the folder."""
  import torch
  import transformers

  @functools.cache
  def save(kind, dtype='float32', max_shard_size='1GB'):
    folder = tmp_path_factory.mktemp(kind) / 'model'
    model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**HF_CONFIGS[kind])
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
      for weight in model.parameters():
        mean = 1.0 if weight.ndim == 1 else 0.0
        weight.normal_(mean, 0.3, generator=generator)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder

  return save


@pytest.fixture(scope='session')
def load():
  """Reads a folder onto one device: (config, params)."""
  import jax

  from lorapr_jax.hf.load import load_config, load_params
  from lorapr_jax.models import llama

  def load(folder, dtype='float32'):
    dtype = jax.numpy.dtype(dtype)
    config = load_config(folder)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, llama.param_shapes(config, dtype))
    return config, load_params(folder, config, places, dtype)

  return load


@pytest.fixture(scope='session')
def random_params():
  """Random weights for a config, large enough for every part to count."""
  import jax
  import numpy as np

  from lorapr_jax.models import llama

  def random_params(config, dtype='float32'):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
      mean = 1.0 if 'norm' in jax.tree_util.keystr(path) else 0.0
      return jax.numpy.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    shapes = llama.param_shapes(config, jax.numpy.dtype(dtype))
    return jax.tree_util.tree_map_with_path(draw, shapes)

  return random_params


@pytest.fixture(scope='session')
def random_lora():
  """Random adapters for a config, B included."""
  import jax
  import numpy as np

  from lorapr_jax.models import llama

  def random_lora(config, lora_config):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(
      lambda key: llama.init_lora(key, config, lora_config), jax.random.key(0)
    )
    return jax.tree.map(
      lambda leaf: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape), 'float32'),
      shapes,
    )

  return random_lora


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
  """The workdir of a short run on configs/tiny.py: 12 steps, all files."""
  import json

  from safetensors.numpy import save_file

  from configs import tiny
  from lorapr_jax import train

  config = tiny.get_config()
  config.train.steps, config.train.log_every, config.prune.every = 12, 1, 3
  config.mesh.data, config.mesh.fsdp = -1, 1
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  summary = train.run(config, workdir)
  save_file(_importance(workdir), workdir / 'importance.safetensors')
  log = workdir / 'metrics.jsonl'
  records = [json.loads(line) for line in log.read_text().splitlines()]
  for record in records[2::3]:
    record['perplexity'] = 250.0 - record['step']
  log.write_text(''.join(json.dumps(record) + '\n' for record in records))
  summary |= {
    'base': {'name': 'random weights', 'sha256': None},
    'bytes': {'dense': 657664, 'pruned': 436480},
    'flops_per_token': {'dense': 345678, 'pruned': 234567, 'seq_len': 32},
    'kv_cache_bytes_per_token': {'dense': 2048, 'pruned': 1280},
    'generations': [
      {'prompt': 'Once', 'dense': ' upon a time', 'pruned': ' in a while'}
    ],
    'skipped_steps': 0,
    'warnings': [],
    'exports': {
      'hf': {
        'path': str(workdir / 'export'),
        'layout': 'two_shape',
        'dtype': 'float32',
        'max_logit_difference': 0.0,
      },
      'gguf': {
        'path': 'export-gguf/a model.gguf',
        'layout': None,
        'dtype': 'f16',
        'max_logit_difference': 0.00123,
      },
    },
  }
  (workdir / 'summary.json').write_text(json.dumps(summary))
  return workdir


def _importance(workdir):
  """importance.safetensors from the last checkpoint."""
  import numpy as np
  import orbax.checkpoint as ocp

  manager = ocp.CheckpointManager(workdir / 'checkpoints')
  state = manager.restore(12, args=ocp.args.StandardRestore())
  tensors = {}
  for group, masks in state['masks'][0].items():
    importance = np.asarray(state['importance'][0][group])
    for layer, mask in enumerate(np.asarray(masks)):
      if not mask.all():
        name = f'layers.{layer}.{group}'
        tensors[f'{name}.importance'] = importance[layer].astype('float32')
        tensors[f'{name}.mask'] = mask.astype('float32')
  return tensors


@pytest.fixture
def workdir(finished_run, tmp_path):
  """A copy of `finished_run` that a test may change, without its weights."""
  copy = tmp_path / 'run'
  shutil.copytree(
    finished_run,
    copy,
    ignore=shutil.ignore_patterns('checkpoints', '*.safetensors.partial'),
  )
  return copy
