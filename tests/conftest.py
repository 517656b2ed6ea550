"""What must be set before jax and transformers load; and tiny random models."""

import functools
import gc
import os
import shutil
import tempfile

import filelock
import pytest

from tests.kinds import KINDS, LLAMAS, save
from tests.xla_flags import DEVICES, FLAGS

_MODULES = tempfile.TemporaryDirectory(prefix='transformers-modules-')
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['HF_MODULES_CACHE'] = _MODULES.name
# In tensors as small as ours, torch's threads only wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What one worker has compiled, the others and their processes read.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _COMPILED = tempfile.TemporaryDirectory(prefix='xla-')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'
# Tracing makes objects by the million, of which hardly any is garbage.
gc.set_threshold(100_000, 50, 100)
_FLAGS = os.environ.get('XLA_FLAGS', '')
if DEVICES not in _FLAGS:
  # A GPU runs what users run.
  _OURS = FLAGS if os.environ['JAX_PLATFORMS'] == 'cpu' else ''
  os.environ['XLA_FLAGS'] = f'{_FLAGS} {_OURS} {DEVICES}=8'.strip()

# The markers of tests that see all devices.
_SEVERAL = ('mesh', 'aot', 'gpu')
# First, so that at the end no worker has long to go alone.
_LONGEST = (
  *('test_shrinking', 'test_docs', 'test_processes', 'test_phases'),
  'test_steps',
)


def pytest_collection_modifyitems(items):
  def rank(item):
    name = item.path.stem
    return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

  items.sort(key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Shows a test one device, as most users have; those marked `mesh`, eight."""
  from tests.devices import cache, one_device

  several = any(item.get_closest_marker(name) for name in _SEVERAL)
  with cache(False) if several else one_device():
    return (yield)


def pytest_unconfigure():
  _MODULES.cleanup()


@pytest.fixture(params=LLAMAS)
def kind(request):
  """A kind of LLaMA."""
  return request.param


@pytest.fixture(scope='session')
def save_hf(tmp_path_factory):
  """Saves transformers' model of a kind with random weights; the folder."""

  @functools.cache
  def save_hf(kind, dtype='float32', max_shard_size='1GB'):
    folder = tmp_path_factory.mktemp(kind) / 'model'
    save(KINDS[kind].keys, folder, dtype, max_shard_size)
    return folder

  return save_hf


@pytest.fixture(scope='session')
def load():
  """Reads a folder onto one device: (config, params)."""
  import jax

  from lorapr_jax.hf.load import load_config, load_params
  from lorapr_jax.models.trees import param_shapes

  def load(folder, dtype='float32'):
    dtype = jax.numpy.dtype(dtype)
    config = load_config(folder)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: place, param_shapes(config, dtype))
    return config, load_params(folder, config, places, dtype)

  return load


@pytest.fixture(scope='session')
def random_params():
  """Random weights for a config, large enough for every part to count."""
  import jax
  import numpy as np

  from lorapr_jax.models.trees import param_shapes

  def random_params(config, dtype='float32'):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
      mean = 1.0 if 'norm' in jax.tree_util.keystr(path) else 0.0
      drawn = rng.normal(mean, 0.3, leaf.shape).astype(leaf.dtype)
      return jax.device_put(drawn)

    shapes = param_shapes(config, jax.numpy.dtype(dtype))
    return jax.tree_util.tree_map_with_path(draw, shapes)

  return random_params


@pytest.fixture(scope='session')
def random_lora():
  """Random adapters for a config, B included."""
  import jax
  import numpy as np

  from lorapr_jax.models.trees import init_lora

  def random_lora(config, lora_config):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(
      lambda key: init_lora(key, config, lora_config), jax.random.key(0)
    )
    return jax.tree.map(
      lambda leaf: jax.device_put(
        rng.normal(0, 0.3, leaf.shape).astype(np.float32)
      ),
      shapes,
    )

  return random_lora


# A conversation as the tests' chat template writes it.
TEMPLATE = (
  "{% for m in messages %}{% if m.role == 'system' %}"
  "{{ raise_exception('no system message, please') }}{% endif %}"
  '<|{{ m.role }}|>{{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


@pytest.fixture(scope='session')
def add_tokenizer():
  """Puts a byte-level BPE of 300 ids into a folder; id 0 is EOS."""
  import json

  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  def add(folder, template_in=None):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<|end|>'],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    tokenizer.train_from_iterator(
      ['the quick brown fox jumps over the lazy dog and the other one'], trainer
    )
    tokenizer.save(str(folder / 'tokenizer.json'))
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'eos_token': '<|end|>',
    }
    if template_in == 'tokenizer_config.json':
      config['chat_template'] = TEMPLATE
    elif template_in:
      (folder / template_in).write_text(TEMPLATE)
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return folder

  return add


@pytest.fixture(scope='session')
def text_model(tmp_path_factory, add_tokenizer):
  """The folder of a tiny random model with a tokenizer and a chat template."""
  import torch
  import transformers

  folder = tmp_path_factory.mktemp('text') / 'llama'
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=None,
    eos_token_id=0,
    tie_word_embeddings=True,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  return add_tokenizer(folder, 'chat_template.jinja')


@pytest.fixture(scope='session')
def made_once(tmp_path_factory):
  """Has one of the workers make a folder; all use it, and may not change it.

  made_once(name, make) is the folder that make(folder) filled.
  """
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent  # That of the session.

  def made_once(name, make):
    folder = root / 'made' / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f'{name}.done')
    with filelock.FileLock(f'{folder}.lock'):
      if not done.exists():
        folder.mkdir()
        make(folder)
        done.touch()
    return folder

  return made_once


@pytest.fixture(scope='session')
def finished_run(made_once):
  """The workdir of a short run on configs/tiny.py: 12 steps, all files."""
  return made_once('finished_run', finish_run) / 'run'


def finish_run(folder):
  import json

  from configs import tiny
  from lorapr_jax import train

  config = tiny.get_config()
  config.train.steps, config.train.log_every, config.prune.every = 12, 1, 3
  config.data.eval_every = 3
  config.export.format = 'hf,gguf'
  summary = train.run(config, folder / 'run')
  # Random weights have no tokenizer to write with.
  summary['generations'] = [
    {'prompt': 'Once', 'dense': ' upon a time', 'pruned': ' in a while'}
  ]
  (folder / 'run' / 'summary.json').write_text(json.dumps(summary))


@pytest.fixture
def workdir(finished_run, tmp_path):
  """A copy of `finished_run` that a test may change, without its weights."""
  copy = tmp_path / 'run'
  shutil.copytree(
    finished_run,
    copy,
    ignore=shutil.ignore_patterns('checkpoints', 'export-gguf'),
  )
  return copy
