"""What a config.json's `model_type` changes: a row for each family of models.

hf/ and gguf/ read the rows where a file becomes a ModelConfig, and where one
becomes a file. A ModelConfig has numbers and flags alone: nothing else knows
which family a model is of.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from lorapr_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, under the name of its `model_type`.

  Attributes:
    architecture: the class of transformers that has logits.
    gguf: what llama.cpp calls it.
    absent: what keys of a config.json mean that the file lacks. A null means
      the same, but of `sliding_window`, where it means that there is none.
    written: keys of a config.json that no size decides.
    has_biases: whether projections may have biases.
    heads_divide_embed: whether the hidden size must be a multiple of the number
      of heads. transformers 5.4 to 5.23 demand that of some families, even with
      an explicit head_dim (issue 46082).
    names_version: whether its config.json must name a version of transformers
      where it has more than 100,000 tokens: without one, transformers takes the
      tokenizer for one with a known flaw.
    remote_code: the `model_type` of the same family where layers differ in
      size, by the code in hf/remote_code/; None: there is none.
  """

  architecture: str
  gguf: str
  absent: Mapping[str, Any]
  written: Mapping[str, Any]
  has_biases: bool = True
  heads_divide_embed: bool = False
  names_version: bool = False
  remote_code: str | None = None

  def holds(self, config: ModelConfig) -> bool:
    """Whether a model of this family computes what `config` says."""
    return self.has_biases or not config.biased


_ABSENT = {
  'attention_bias': False,
  'max_position_embeddings': 2048,
  'mlp_bias': False,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
}

# An export is of the first that holds the model, if no other is asked for.
FAMILIES = {
  'llama': Family(
    architecture='LlamaForCausalLM',
    gguf='llama',
    absent=_ABSENT,
    written={'attention_bias': False, 'mlp_bias': False},
    heads_divide_embed=True,
    remote_code='pruned_llama',
  ),
  'mistral': Family(
    architecture='MistralForCausalLM',
    gguf='llama',
    absent=_ABSENT
    | {
      'max_position_embeddings': 131072,
      'num_key_value_heads': 8,
      'sliding_window': 4096,
    },
    written={'sliding_window': None},
    has_biases=False,
    names_version=True,
  ),
}
# By the model_type of the remote code.
REMOTE_CODE = {x.remote_code: x for x in FAMILIES.values() if x.remote_code}
