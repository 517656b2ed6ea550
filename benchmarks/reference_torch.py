"""LoRAPrune's reference algorithm as plain PyTorch, to time ours against.

A transcription of docs/method.md with the reference's choices: transformers'
model, adapters and masks as module wrappers, importance from each projection's
dense guided gradient at every step.

  PYTHONPATH=. python benchmarks/reference_torch.py --model FOLDER
    --tokens FILE.npy

FOLDER is a model with as many KV heads as heads (benchmarks/make_mha.py makes
one), FILE.npy holds (steps, sequences, tokens) ids. Prints one JSON object: the
dtype, which is the faster one here, the seconds of each step, and the process's
peak memory in bytes.
"""

import argparse
import math
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.torch_steps import fastest_dtype, print_result

RANK, ALPHA, DROPOUT, CLIP, LR, DECAY = 8, 16.0, 0.05, 1.0, 1e-3, 0.9
EVERY, WARMUP, COOLDOWN, TARGET = 5, 0.1, 0.1, 0.5
MASKED = ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj')
HEADS = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
CHANNELS = ('gate_proj', 'up_proj', 'down_proj')


class LoRALinear(torch.nn.Module):
  """(x W + s dropout(x) A B) times a mask over the output, where it has one."""

  def __init__(self, base: torch.nn.Linear, masked: bool):
    super().__init__()
    self.base = base
    self.a = torch.nn.Parameter(torch.empty(RANK, base.in_features))
    torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
    self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK))
    self.mask = torch.ones(base.out_features) if masked else None

  def forward(self, x):
    low = torch.nn.functional.dropout(x, DROPOUT, self.training)
    low = torch.nn.functional.linear(low, self.a.to(x.dtype))
    update = torch.nn.functional.linear(low, self.b.to(x.dtype))
    y = self.base(x) + update * (ALPHA / RANK)
    return y if self.mask is None else y * self.mask.to(y.dtype)

  @torch.no_grad()
  def scores(self) -> torch.Tensor:
    """|G (W + s A B)| of every element, (out, in)."""
    a, b, ga, gb = self.a, self.b, self.a.grad, self.b.grad
    gradient = gb @ a + b @ ga - gb @ ga
    return (gradient * (self.base.weight + (ALPHA / RANK) * (b @ a))).abs()


def wrap(model) -> list[dict[str, LoRALinear]]:
  """Puts adapters on every projection; returns them by layer."""
  model.requires_grad_(False)
  layers = []
  for block in model.model.layers:
    adapters = {}
    for part in (block.self_attn, block.mlp):
      for name, module in list(part.named_children()):
        if isinstance(module, torch.nn.Linear):
          adapters[name] = LoRALinear(module, name in MASKED)
          setattr(part, name, adapters[name])
    layers.append(adapters)
  return layers


def group_scores(layer, names, groups) -> torch.Tensor:
  """Each projection's group vector over its L2 norm, summed."""
  total = torch.zeros(groups)
  for name in names:
    scores = layer[name].scores()
    by_input = name in ('o_proj', 'down_proj')
    vector = scores.sum(0 if by_input else 1).view(groups, -1).sum(1)
    total += vector / (vector.norm() + 1e-8)
  return total


def prune(layer, names, average, sparsity) -> None:
  """Masks the lowest share of the groups."""
  groups = len(average)
  mask = torch.ones(groups)
  mask[average.argsort()[: int(sparsity * groups)]] = 0
  for name in names:
    if layer[name].mask is not None:
      each = layer[name].base.out_features // groups
      layer[name].mask = mask.repeat_interleave(each)


def main() -> None:
  """Trains, prunes and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', required=True)
  parser.add_argument('--tokens', required=True)
  args = parser.parse_args()
  dtype, batches = fastest_dtype(), np.load(args.tokens)
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
  model.config.use_cache = False
  layers = wrap(model)
  model.train()
  heads = model.config.num_attention_heads
  kinds = ((HEADS, heads), (CHANNELS, model.config.intermediate_size))
  averages = [[torch.zeros(n) for _, n in kinds] for _ in layers]
  weights = [p for p in model.parameters() if p.requires_grad]
  adamw = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
  protected = {*range(int(0.1 * len(layers))), len(layers) - 1}
  seconds = []
  for step, batch in enumerate(torch.from_numpy(batches).long()):
    start = time.perf_counter()
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, CLIP)
    ramp = step / len(batches) - WARMUP
    done = min(1.0, max(0.0, ramp) / (1 - WARMUP - COOLDOWN))
    sparsity = TARGET * (1 - (1 - done) ** 3)
    for i, layer in enumerate(layers):
      if i in protected:
        continue
      for k, (names, groups) in enumerate(kinds):
        new = group_scores(layer, names, groups)
        averages[i][k] = DECAY * averages[i][k] + (1 - DECAY) * new
        if step % EVERY == 0:
          prune(layer, names, averages[i][k], sparsity)
    adamw.step()
    adamw.zero_grad()
    seconds.append(time.perf_counter() - start)
  print_result(dtype, seconds)


if __name__ == '__main__':
  main()
