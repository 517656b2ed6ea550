"""The benchmarks' tools that others rely on."""

from pathlib import Path
import subprocess
import sys

import jax
import numpy as np

from lorapr_jax.hf.export import export_model
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.models import llama
from lorapr_jax.models.config import LayerShape, LlamaConfig

ROOT = Path(__file__).parent.parent


def test_the_mha_copy_is_the_same_function(tmp_path):
  config = LlamaConfig(
    vocab_size=32,
    embed_dim=24,
    head_dim=4,
    layers=(LayerShape(2, 3, 16),) * 2,
    tie_embeddings=True,
  )
  params = llama.init_params(jax.random.key(0), config, np.float32)
  export_model(tmp_path / 'gqa', params, config)
  subprocess.run(
    [
      *(sys.executable, 'benchmarks/make_mha.py'),
      *(tmp_path / 'gqa', tmp_path / 'mha'),
    ],
    cwd=ROOT,
    env={'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'},
    check=True,
  )
  copy = load_config(tmp_path / 'mha')
  assert copy.layers == (LayerShape(6, 1, 16),) * 2
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda _: device, llama.param_shapes(copy, np.float32))
  repeated = load_params(tmp_path / 'mha', copy, places, np.float32)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
  np.testing.assert_allclose(
    llama.hidden_states(repeated, tokens, copy),
    llama.hidden_states(params, tokens, config),
    atol=1e-5,
  )
