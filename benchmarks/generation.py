"""Prefill and decode of a folder: ours beside transformers, taking turns.

  PYTHONPATH=. python benchmarks/generation.py --model FOLDER
    [--batch_sizes 1,4] [--dtype float32] [--repeats 7]

The prompt is random, the likeliest token is taken, the KV cache is kept. Where
the folder holds code, as two_shape exports do, that is run. Prints a table in
Markdown: medians, and the median of the turns' own ratios.
"""

import argparse
import statistics
import time

import jax
import torch
from transformers import AutoModelForCausalLM

import lorapr_jax as lp
from lorapr_jax.eval.latency import paired_generation
from lorapr_jax.models.compute import Compute


def transformers_turn(
  model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int
) -> tuple[float, float]:
  """Seconds of the prefill, and of each later token."""
  start = time.perf_counter()
  with torch.inference_mode():
    out = model(prompt, use_cache=True, logits_to_keep=1)
    tokens = out.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
      cache = out.past_key_values
      out = model(tokens, past_key_values=cache, use_cache=True)
      tokens = out.logits[:, -1:].argmax(-1)
  return first - start, (time.perf_counter() - first) / (new_tokens - 1)


def main() -> None:
  """Times both and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', required=True)
  parser.add_argument('--batch_sizes', default='1,4')
  parser.add_argument('--prompt_tokens', type=int, default=128)
  parser.add_argument('--new_tokens', type=int, default=32)
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  args = parser.parse_args()
  if jax.default_backend() != 'cpu':
    parser.error('transformers runs on the CPU here: set JAX_PLATFORMS=cpu')
  loaded = lp.load(args.model, args.dtype)
  ours = {'ours': (loaded.params, Compute(loaded.config, dtype=loaded.dtype))}
  theirs = AutoModelForCausalLM.from_pretrained(
    args.model, dtype=getattr(torch, args.dtype), trust_remote_code=True
  )
  print(
    f'{args.dtype}, {args.prompt_tokens} tokens and {args.new_tokens} new '
    f'ones, {args.repeats} turns; jax {jax.__version__}, torch '
    f'{torch.__version__}\n\n| batch | phase | ours, ms | transformers, ms | '
    'theirs over ours |\n|---|---|---|---|---|'
  )
  for batch_size in map(int, args.batch_sizes.split(',')):
    shape = (batch_size, args.prompt_tokens)
    prompt = torch.randint(0, loaded.config.vocab_size, shape)
    turns = []
    for _ in range(args.repeats + 1):
      times = paired_generation(
        ours,
        batch_size=batch_size,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=1,
      )['ours']
      # Each runs twice, of which the second counts: the other's has gone by.
      one = times['prefill'][0], times['decode'][0]
      transformers_turn(theirs, prompt, args.new_tokens)
      turns.append((one, transformers_turn(theirs, prompt, args.new_tokens)))
    for i, phase in enumerate(('prefill', 'decode')):
      # The first turn warms caches up.
      pairs = [(a[i], b[i]) for a, b in turns[1:]]
      mine, other = (
        1e3 * statistics.median(x) for x in zip(*pairs, strict=True)
      )
      ratio = statistics.median(b / a for a, b in pairs)
      print(
        f'| {batch_size} | {phase} | {mine:.1f} | {other:.1f} | {ratio:.2f} |'
      )


if __name__ == '__main__':
  main()
