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

_SIZES = ('num_attention_heads', 'num_key_value_heads', 'intermediate_size')


# Not a LlamaConfig: transformers 5 checks in some of its configs that the heads
# divide the hidden size, which pruned layers need not obey.
class PrunedLlamaConfig(PretrainedConfig):
  """The keys of LlamaConfig, and `per_layer_config`."""

  model_type = 'pruned_llama'
  keys_to_ignore_at_inference = ['past_key_values']
  attribute_map = LlamaConfig.attribute_map
  base_model_tp_plan = LlamaConfig.base_model_tp_plan
  base_model_pp_plan = LlamaConfig.base_model_pp_plan

  def __init__(self, *, per_layer_config=None, **kwargs):
    given = {key: kwargs[key] for key in _SIZES if key in kwargs}
    # LlamaConfig fills in what is absent and understands every spelling, at
    # sizes that pass its checks.
    whole = LlamaConfig(**_older(kwargs) | _checked(kwargs))
    super().__init__()
    self.__dict__.update({**whole.__dict__, **given})
    # transformers 5 makes it a property, for which all else must be there.
    self.per_layer_config = per_layer_config or None

  def validate(self):
    """Checks nothing: LlamaConfig has, and this one has no single sizes."""

  def layer_config(self, index):
    """A copy of this config that has the sizes of layer `index` at its top."""
    per_layer = self.per_layer_config
    if per_layer is not None and not isinstance(per_layer, dict):
      # transformers 5.15 and newer resolve the layers themselves.
      layer = copy.copy(per_layer[index])
    else:
      layer = copy.copy(self)
      layer.per_layer_config = None
      # JSON's keys are strings, and transformers 5 saves them as '03'.
      for key, sizes in (per_layer or {}).items():
        if int(key) == index:
          layer.__dict__.update(sizes)
    layer.__class__ = _LayerConfig
    layer._whole = self
    return layer


class _LayerConfig(PrunedLlamaConfig):
  """The config of one layer.

  Attention reads its implementation from it at every call: that is the whole
  model's, which may change later.
  """

  @property
  def _attn_implementation_internal(self):
    return self._whole._attn_implementation_internal

  @_attn_implementation_internal.setter
  def _attn_implementation_internal(self, value):
    self._whole._attn_implementation_internal = value


def _checked(kwargs):
  """Numbers of heads that every check of LlamaConfig passes."""
  hidden, width = kwargs.get('hidden_size'), kwargs.get('head_dim')
  if hidden is None or width is None:
    return {}
  heads = hidden // width if hidden % width == 0 else 1
  return {'num_attention_heads': heads, 'num_key_value_heads': heads}


def _older(kwargs):
  """The same keys with RoPE's as transformers 4 reads them."""
  rope = kwargs.get('rope_parameters')
  if not rope or hasattr(LlamaConfig, 'rope_parameters'):
    return kwargs
  older = {k: x for k, x in kwargs.items() if k != 'rope_parameters'}
  # By type of layer, in families that have two kinds of RoPE.
  if 'full_attention' in rope:
    older['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
    rope = rope['full_attention']
  scaling = dict(rope)
  for key in ('rope_theta', 'partial_rotary_factor'):
    if key in scaling:
      older[key] = scaling.pop(key)
  older['rope_scaling'] = scaling
  if scaling.get('rope_type', scaling.get('type', 'default')) == 'default':
    older['rope_scaling'] = None
  return older
