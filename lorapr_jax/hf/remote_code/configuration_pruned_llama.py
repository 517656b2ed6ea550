"""Configuration of a LLaMA model whose layers differ in size.

`per_layer_config` maps a layer's index to the sizes in which that layer differs
from the ones at the top of config.json:

  "per_layer_config": {"3": {"num_attention_heads": 16,
                             "num_key_value_heads": 16,
                             "intermediate_size": 5504}, ...}

This file travels beside the weights and is loaded with
`trust_remote_code=True`. It needs transformers 4.57 or newer, nothing else.
"""

import copy

from transformers import LlamaConfig, PretrainedConfig


# Not a LlamaConfig: transformers 5 checks there that the heads divide the
# hidden size, which pruned layers need not obey.
class PrunedLlamaConfig(PretrainedConfig):
  """The keys of LlamaConfig, and `per_layer_config`."""

  model_type = 'pruned_llama'
  keys_to_ignore_at_inference = ['past_key_values']
  base_model_tp_plan = LlamaConfig.base_model_tp_plan
  base_model_pp_plan = LlamaConfig.base_model_pp_plan
  # transformers 5 fills this in, but only where the attribute exists.
  rope_parameters = None

  def __init__(
    self,
    *,
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    hidden_act='silu',
    max_position_embeddings=2048,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    use_cache=True,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    pretraining_tp=1,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    rope_scaling=None,
    rope_parameters=None,
    attention_bias=False,
    attention_dropout=0.0,
    mlp_bias=False,
    per_layer_config=None,
    **kwargs,
  ):
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.intermediate_size = intermediate_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_key_value_heads or num_attention_heads
    self.head_dim = head_dim or hidden_size // num_attention_heads
    self.hidden_act = hidden_act
    self.max_position_embeddings = max_position_embeddings
    self.initializer_range = initializer_range
    self.rms_norm_eps = rms_norm_eps
    self.use_cache = use_cache
    self.pretraining_tp = pretraining_tp
    self.attention_bias = attention_bias
    self.attention_dropout = attention_dropout
    self.mlp_bias = mlp_bias

    # transformers 4 reads rope_theta and rope_scaling; 5 merges them into
    # rope_parameters and saves that. Accept either, whoever wrote the file.
    rope = dict(rope_parameters or rope_scaling or {})
    self.rope_theta = rope.pop('rope_theta', rope_theta)
    if rope.get('rope_type', rope.get('type', 'default')) == 'default':
      rope = None

    # Through the base class, because transformers 5 merges the rope keys and
    # makes per_layer_config a property, once everything else is set.
    super().__init__(
      pad_token_id=pad_token_id,
      bos_token_id=bos_token_id,
      eos_token_id=eos_token_id,
      tie_word_embeddings=tie_word_embeddings,
      rope_theta=self.rope_theta,
      rope_scaling=rope,
      per_layer_config=per_layer_config or None,
      **kwargs,
    )

  def layer_config(self, index):
    """A copy of this config that has the sizes of layer `index` at its top."""
    per_layer = self.per_layer_config
    if per_layer is not None and not isinstance(per_layer, dict):
      # transformers 5.15 and newer resolve the layers themselves.
      return copy.copy(per_layer[index])
    layer = copy.copy(self)
    layer.per_layer_config = None
    # JSON's keys are strings, and transformers 5 saves them as '03'.
    for key, sizes in (per_layer or {}).items():
      if int(key) == index:
        layer.__dict__.update(sizes)
    return layer
