"""The files that describe an export: pruning.json, and README.md as a card."""

from collections.abc import Mapping
from typing import Any

import yaml

from lorapr_jax.axes import LAYERS
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.shrink import Kept
from lorapr_jax.report.summary import sparsity_report
from lorapr_jax.runtime.terminal import one_line


def pruning_report(
  plan: PruningPlan | None, kept: Kept, base: dict[str, Any], settings: Any
) -> dict[str, Any]:
  """The contents of pruning.json.

  `kept` is by layer, in the base's numbering; query heads are listed by KV
  head, and a layer that is gone is null. `base` is its name, hash and sizes;
  `settings` are of the method.
  """
  return {
    'base': base,
    'sparsity': sparsity_report(plan, kept),
    'kept': [_kept_of(layer) for layer in kept],
    'settings': settings,
  }


def _kept_of(layer: Mapping[str, Any]) -> dict[str, Any] | None:
  if LAYERS in layer and not layer[LAYERS].size:
    return None
  return {g: x.tolist() for g, x in layer.items() if g != LAYERS}


def model_card(
  pruning: Mapping[str, Any], sizes: ModelConfig, layout: str, *, padded: bool
) -> str:
  """A README.md for a folder with a pruned model of these sizes.

  `pruning` is the contents of pruning.json. The weights of a padded folder have
  the sizes before the cut.
  """
  shares = ', '.join(
    f'{share["achieved"]:.1%} of the {kind}'
    for kind, share in pruning['sparsity'].items()
  )
  of = 'the layers that were pruned'
  if LAYERS in pruning['sparsity']:
    of = 'the layers that were pruned and stay'
  zeros = '\nWhat was removed is stored as zeros.' if padded else ''
  name = one_line(pruning['base']['name'])
  return f"""{_header(name, 'transformers')}
{name}, pruned with lorapr_jax: {shares} removed
(heads and channels as shares of {of}), which leaves
{sizes.num_parameters:,} parameters. What was kept, and by which settings, is in
pruning.json.{zeros}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained('.'{_trust(layout)})
tokenizer = AutoTokenizer.from_pretrained('.')
```
"""


def adapter_card(name: str, layout: str) -> str:
  """A README.md for a folder with a PEFT adapter over a pruned model."""
  name = one_line(name)
  return f"""{_header(name, 'peft')}
LoRA of {name}, which was pruned with lorapr_jax.
The pruned model, in which it is not merged, is in base/.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained('base'{_trust(layout)})
model = PeftModel.from_pretrained(model, '.')
```
"""


def _header(name: str, library: str) -> str:
  fields = {
    'base_model': name,
    'library_name': library,
    'tags': ['pruned', 'lorapr_jax'],
  }
  text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
  return f'---\n{text}---'


def _trust(layout: str) -> str:
  return ', trust_remote_code=True' if layout == 'two_shape' else ''
