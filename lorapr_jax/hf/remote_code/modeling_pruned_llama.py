"""A LLaMA model whose layers differ in size, for transformers.

The maths, the cache and the tensor names are those of transformers' own Llama
classes; only the sizes with which each layer is built differ.

This file travels beside the weights and is loaded with
`trust_remote_code=True`. It needs torch and transformers 4.57 or newer.
"""

import torch
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_pruned_llama import PrunedLlamaConfig


class PrunedLlamaModel(LlamaModel):
  """LlamaModel with layer i built from `config.layer_config(i)`."""

  config_class = PrunedLlamaConfig

  def __init__(self, config):
    super().__init__(_of_one_layer(config))
    _build_layers(self, config)
    self.config = config
    self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
  """LlamaForCausalLM with layer i built from `config.layer_config(i)`."""

  config_class = PrunedLlamaConfig

  def __init__(self, config):
    super().__init__(_of_one_layer(config))
    _build_layers(self.model, config)
    self.model.config = self.config = config
    self.post_init()


def _of_one_layer(config):
  """Everything but the layers is the same at any layer's sizes."""
  one = config.layer_config(0)
  one.num_hidden_layers = 1
  return one


def _build_layers(model, config):
  build = type(model.layers[0])
  model.layers = torch.nn.ModuleList(
    build(config.layer_config(i), i) for i in range(config.num_hidden_layers)
  )
