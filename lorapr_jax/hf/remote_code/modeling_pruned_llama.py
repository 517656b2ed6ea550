"""A LLaMA model whose layers differ in size, for transformers.

The maths, the cache and the tensor names are those of transformers' own Llama
classes; only the sizes with which each layer is built differ.

This file travels beside the weights and is loaded with
`trust_remote_code=True`. It needs torch and transformers 4.57 or newer.
"""

import torch
from transformers.models.llama.modeling_llama import (
  LlamaDecoderLayer,
  LlamaForCausalLM,
  LlamaModel,
)

from .configuration_pruned_llama import PrunedLlamaConfig


class PrunedLlamaModel(LlamaModel):
  """LlamaModel with layer i built from `config.layer_config(i)`."""

  config_class = PrunedLlamaConfig

  def __init__(self, config):
    # Everything but the layers is the same at any layer's sizes. No layer is
    # built here, lest a full-size model be allocated and thrown away.
    trunk = config.layer_config(0)
    trunk.num_hidden_layers = 0
    super().__init__(trunk)

    # One config for the whole model, as in LlamaModel: attention reads its
    # implementation from it at every call, so that a later change of
    # config._attn_implementation reaches every layer.
    config._attn_implementation = trunk._attn_implementation
    self.config = config
    self.layers = torch.nn.ModuleList(
      LlamaDecoderLayer(config.layer_config(i), i)
      for i in range(config.num_hidden_layers)
    )
    for layer in self.layers:
      layer.self_attn.config = config
    self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
  """LlamaForCausalLM around a PrunedLlamaModel."""

  config_class = PrunedLlamaConfig

  def __init__(self, config):
    # Past LlamaForCausalLM's own, which would build a LlamaModel.
    super(LlamaForCausalLM, self).__init__(config)
    self.model = PrunedLlamaModel(config)
    self.vocab_size = config.vocab_size
    self.lm_head = torch.nn.Linear(
      config.hidden_size, config.vocab_size, bias=False
    )
    self.post_init()
