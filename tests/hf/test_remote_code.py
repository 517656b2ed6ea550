"""The two torch files beside an export of unequal layers, loaded as users do.

The truth is transformers' own LlamaForCausalLM of one size, with the same
weights padded by zeros.
"""

import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
import torch
import transformers

import lorapr_jax
from lorapr_jax.hf.config import config_from_hf, config_to_hf
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.rope import Llama3, Rope

CODE = Path(lorapr_jax.__path__[0]) / 'hf/remote_code'
CODE_FILES = ('configuration_pruned_llama.py', 'modeling_pruned_llama.py')
AUTO_MAP = {
  'AutoConfig': 'configuration_pruned_llama.PrunedLlamaConfig',
  'AutoModel': 'modeling_pruned_llama.PrunedLlamaModel',
  'AutoModelForCausalLM': 'modeling_pruned_llama.PrunedLlamaForCausalLM',
}
PADDING = 0
SIZES = dict(
  vocab_size=61, embed_dim=24, head_dim=8, ropes=(Rope(500.0),), norm_eps=1e-5
)
LLAMA3 = Rope(
  500.0,
  Llama3(
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
  ),
)


def _config(*layers, **options) -> ModelConfig:
  layers = tuple(LayerShape(*layer) for layer in layers)
  return ModelConfig(layers=layers, **(SIZES | options))


# Each layer is (KV heads, queries per KV head, mlp channels).
CONFIGS = {
  'mha': _config((4, 1, 20), (3, 1, 12), (1, 1, 16), (4, 1, 20)),
  'gqa': _config(
    (2, 3, 20),
    (1, 3, 12),
    (2, 3, 16),
    tie_embeddings=True,
    ropes=(LLAMA3,),
  ),
  'queries': _config((2, 1, 12), (2, 3, 20), (2, 2, 12), ropes=(LLAMA3,)),
  'first_is_smallest': _config((1, 1, 8), (4, 1, 20), tie_embeddings=True),
  'one_shape': _config((2, 2, 12), (2, 2, 12)),
}
# Enough layers for transformers 5 to save the index 3 as '03'.
DEEP = _config(*[(2, 2, 12)] * 3, *[(1, 2, 8)] * 8)


def _weights(config: ModelConfig) -> dict[str, torch.Tensor]:
  """Random weights under the names and in the shapes of LlamaForCausalLM."""
  generator = torch.Generator().manual_seed(0)

  def draw(*shape, mean=0.0):
    return mean + 0.3 * torch.randn(shape, generator=generator)

  d, h = config.embed_dim, config.head_dim
  weights = {
    'model.embed_tokens.weight': draw(config.vocab_size, d),
    'model.norm.weight': draw(d, mean=1.0),
  }
  if not config.tie_embeddings:
    weights['lm_head.weight'] = draw(config.vocab_size, d)
  for i, shape in enumerate(config.layers):
    q, kv, f = shape.num_heads * h, shape.num_kv_heads * h, shape.mlp_dim
    layer = {
      'self_attn.q_proj': draw(q, d),
      'self_attn.k_proj': draw(kv, d),
      'self_attn.v_proj': draw(kv, d),
      'self_attn.o_proj': draw(d, q),
      'mlp.gate_proj': draw(f, d),
      'mlp.up_proj': draw(f, d),
      'mlp.down_proj': draw(d, f),
      'input_layernorm': draw(d, mean=1.0),
      'post_attention_layernorm': draw(d, mean=1.0),
    }
    for name, weight in layer.items():
      weights[f'model.layers.{i}.{name}.weight'] = weight
  return weights


def _write(folder: Path, config: ModelConfig) -> Path:
  folder.mkdir()
  extra = {
    'architectures': ['PrunedLlamaForCausalLM'],
    'model_type': 'pruned_llama',
    'auto_map': AUTO_MAP,
    'torch_dtype': 'float32',
  }
  text = json.dumps({**extra, **config_to_hf(config)}, indent=2)
  (folder / 'config.json').write_text(text)
  save_file(
    _weights(config), folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  for name in CODE_FILES:
    (folder / name).write_bytes((CODE / name).read_bytes())
  return folder


def _load(folder: Path, auto=transformers.AutoModelForCausalLM, **options):
  """Loads a model as a user does; every tensor must have found its place."""
  model, info = auto.from_pretrained(
    folder,
    trust_remote_code=True,
    dtype=torch.float32,
    output_loading_info=True,
    **options,
  )
  assert not any(info.values()), info
  return model


def _pad(weight: torch.Tensor, *sizes: int) -> torch.Tensor:
  """The weight in the corner of a tensor of zeros of the given sizes."""
  padded = torch.zeros(sizes)
  padded[tuple(slice(n) for n in weight.shape)] = weight
  return padded


def _padded_stock(config: ModelConfig) -> transformers.LlamaForCausalLM:
  """LlamaForCausalLM with every layer zero-padded to the largest sizes."""
  d, h = config.embed_dim, config.head_dim
  k_full = max(shape.num_kv_heads for shape in config.layers)
  g_full = max(shape.queries_per_kv for shape in config.layers)
  f_full = max(shape.mlp_dim for shape in config.layers)
  full = LayerShape(k_full, g_full, f_full)
  layers = (full,) * len(config.layers)
  hf = config_to_hf(dataclasses.replace(config, layers=layers))
  weights = _weights(config)
  for i, shape in enumerate(config.layers):
    k, g = shape.num_kv_heads, shape.queries_per_kv
    for name in [n for n in weights if n.startswith(f'model.layers.{i}.')]:
      w = weights[name]
      match name.split('.')[-2]:
        case 'q_proj':
          w = _pad(w.view(k, g, h, d), k_full, g_full, h, d).view(-1, d)
        case 'k_proj' | 'v_proj':
          w = _pad(w.view(k, h, d), k_full, h, d).view(-1, d)
        case 'o_proj':
          w = _pad(w.view(d, k, g, h), d, k_full, g_full, h).view(d, -1)
        case 'gate_proj' | 'up_proj':
          w = _pad(w, f_full, d)
        case 'down_proj':
          w = _pad(w, d, f_full)
      weights[name] = w
  if config.tie_embeddings:
    weights['lm_head.weight'] = weights['model.embed_tokens.weight']
  stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf))
  stock.load_state_dict(weights, strict=True)
  return stock.eval()


def _tokens(config: ModelConfig, length: int = 24) -> torch.Tensor:
  generator = torch.Generator().manual_seed(1)
  return torch.randint(1, config.vocab_size, (2, length), generator=generator)


@torch.no_grad()
def _logits(model, config: ModelConfig) -> torch.Tensor:
  return model(_tokens(config)).logits


@pytest.fixture(params=CONFIGS)
def config(request):
  return CONFIGS[request.param]


def test_every_tensor_of_the_file_is_loaded_and_no_other(config, tmp_path):
  folder = _write(tmp_path / 'export', config)
  model = _load(folder)
  assert type(model).__name__ == 'PrunedLlamaForCausalLM'
  state = model.state_dict()
  saved = load_file(folder / 'model.safetensors')
  assert set(state) - set(saved) == (
    {'lm_head.weight'} if config.tie_embeddings else set()
  )
  for name, weight in saved.items():
    assert torch.equal(state[name], weight), name
  tied = model.lm_head.weight is model.model.embed_tokens.weight
  assert tied == config.tie_embeddings


def test_base_model_loads_by_auto_model(tmp_path):
  # vLLM's Transformers backend builds its model in this way.
  config = CONFIGS['gqa']
  folder = _write(tmp_path / 'export', config)
  base = _load(folder, transformers.AutoModel)
  with torch.no_grad():
    hidden = base(_tokens(config)).last_hidden_state
  logits = hidden @ base.embed_tokens.weight.T
  assert torch.equal(logits, _logits(_load(folder), config))


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
def test_logits_are_those_of_the_padded_stock_model(
  config, attention, tmp_path
):
  folder = _write(tmp_path / 'export', config)
  model = _load(folder, attn_implementation=attention)
  got, want = _logits(model, config), _logits(_padded_stock(config), config)
  assert want.std() > 0.1
  torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_generation_is_the_same_with_the_cache_without_it_and_padded(
  config, tmp_path
):
  model = _load(_write(tmp_path / 'export', config))
  prompt = _tokens(config, length=7)
  mask = torch.ones_like(prompt)
  mask[1, :3] = 0
  prompt = torch.where(mask == 1, prompt, PADDING)

  def generate(model, **options):
    return model.generate(
      prompt,
      attention_mask=mask,
      max_new_tokens=12,
      do_sample=False,
      pad_token_id=PADDING,
      **options,
    )

  cached = generate(model)
  assert cached.shape == (2, 19)
  assert len(set(cached[:, 7:].flatten().tolist())) > 4
  assert torch.equal(cached, generate(model, use_cache=False))
  assert torch.equal(cached, generate(model, cache_implementation='static'))
  assert torch.equal(cached, generate(_padded_stock(config)))


def test_the_cache_of_a_layer_holds_its_own_kv_heads(config, tmp_path):
  model = _load(_write(tmp_path / 'export', config))
  with torch.no_grad():
    cache = model(_tokens(config, length=5), use_cache=True).past_key_values
  assert [tuple(layer.keys.shape) for layer in cache.layers] == [
    (2, shape.num_kv_heads, 5, config.head_dim) for shape in config.layers
  ]


def test_attention_can_be_switched_after_loading(config, tmp_path):
  model = _load(_write(tmp_path / 'export', config))
  assert model.config._attn_implementation == 'sdpa'
  # Only eager attention can return the attention weights.
  model.set_attn_implementation('eager')
  with torch.no_grad():
    attentions = model(
      _tokens(config, length=5), output_attentions=True
    ).attentions
  assert [tuple(weights.shape) for weights in attentions] == [
    (2, shape.num_heads, 5, 5) for shape in config.layers
  ]


# Deprecated in transformers 5 for a name that 4.57 lacks.
@pytest.mark.filterwarnings('ignore:.gradient_checkpointing_enable')
def test_gradient_checkpointing_leaves_the_gradients(config, tmp_path):
  model = _load(_write(tmp_path / 'export', config)).train()
  tokens = _tokens(config)
  calls = []
  model.model.layers[-1].mlp.register_forward_pre_hook(
    lambda *_: calls.append('mlp')
  )

  def gradients():
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}

  plain = gradients()
  assert len(calls) == 1
  model.gradient_checkpointing_enable()
  checkpointed = gradients()
  assert len(calls) == 3  # the layer ran once more, in the backward pass
  for name, gradient in plain.items():
    assert gradient.abs().max() > 0, name
    torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize('auto', ['AutoModel', 'AutoModelForCausalLM'])
def test_a_new_model_is_initialised_in_every_layer(auto, tmp_path):
  folder = _write(tmp_path / 'export', CONFIGS['mha'])
  model = getattr(transformers, auto).from_config(
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True),
    trust_remote_code=True,
  )
  matrices = [p for p in model.parameters() if p.ndim == 2]
  assert len(matrices) == 7 * 4 + (2 if auto == 'AutoModelForCausalLM' else 1)
  for weight in matrices:
    # torch's own default would give 0.11 or more.
    assert weight.std().item() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize('name', [*CONFIGS, 'deep'])
def test_saved_again_it_loads_with_equal_logits(name, tmp_path):
  config = CONFIGS.get(name, DEEP)
  model = _load(_write(tmp_path / 'export', config))
  saved = tmp_path / 'saved'
  model.save_pretrained(saved)
  for file in CODE_FILES:
    assert (saved / file).read_bytes() == (CODE / file).read_bytes()
  hf = json.loads((saved / 'config.json').read_text())
  assert hf['auto_map'] == AUTO_MAP
  assert hf['architectures'] == ['PrunedLlamaForCausalLM']
  assert torch.equal(_logits(_load(saved), config), _logits(model, config))


@pytest.mark.parametrize('name', [*CONFIGS, 'deep'])
def test_a_saved_config_is_read_by_lorapr_jax(name, tmp_path):
  config = CONFIGS.get(name, DEEP)
  model = _load(_write(tmp_path / 'export', config))
  model.config.save_pretrained(tmp_path / 'saved')
  hf = json.loads((tmp_path / 'saved/config.json').read_text())
  assert config_from_hf(hf) == config


@pytest.mark.parametrize('rope', [Rope(500.0), LLAMA3])
def test_reads_the_spelling_of_transformers_5(rope, tmp_path):
  config = dataclasses.replace(DEEP, ropes=(rope,))
  folder = _write(tmp_path / 'export', config)
  before = _load(folder)
  hf = json.loads((folder / 'config.json').read_text())
  rope = hf.pop('rope_scaling') or {'rope_type': 'default'}
  hf['rope_parameters'] = {**rope, 'rope_theta': hf.pop('rope_theta')}
  hf['per_layer_config'] = {
    key.zfill(2): sizes for key, sizes in hf['per_layer_config'].items()
  }
  (folder / 'config.json').write_text(json.dumps(hf))
  assert torch.equal(_logits(_load(folder), config), _logits(before, config))


def test_layer_config_has_the_sizes_of_that_layer(config, tmp_path):
  folder = _write(tmp_path / 'export', config)
  hf = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
  layers = [hf.layer_config(i) for i in range(hf.num_hidden_layers)]
  sizes = [
    LayerShape(
      layer.num_key_value_heads,
      layer.num_attention_heads // layer.num_key_value_heads,
      layer.intermediate_size,
    )
    for layer in layers
  ]
  assert tuple(sizes) == config.layers


def test_loads_offline_in_a_process_without_lorapr_jax(tmp_path):
  folder = _write(tmp_path / 'export', CONFIGS['gqa'])
  home = tmp_path / 'home'
  home.mkdir()
  program = f"""
import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(
  {str(folder)!r}, trust_remote_code=True
)
assert not [name for name in sys.modules if name.startswith('lorapr')]
print(sum(p.numel() for p in model.parameters()))
"""
  result = subprocess.run(
    [sys.executable, '-I', '-c', program],
    env={
      'PATH': os.environ['PATH'],
      'HOME': str(home),
      'HF_HUB_OFFLINE': '1',
      'HF_MODULES_CACHE': str(tmp_path / 'modules'),
    },
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert int(result.stdout) == CONFIGS['gqa'].num_parameters
  assert not list(home.iterdir())
