"""evaluate: the perplexity of a folder on a text."""

import dataclasses

from lorapr_jax import api
from lorapr_jax.cli.arguments import Parser, print_json


def main(argv: list[str]) -> None:
  """Evaluates and prints the perplexity with all that it depends on."""
  parser = Parser('evaluate', __doc__)
  parser.add_argument('--model', required=True, help='a Hugging Face folder')
  parser.add_argument('--data', required=True, help='a data spec')
  parser.add_argument('--seq_len', type=int, required=True)
  parser.add_argument('--max_windows', type=int, help='default: all')
  parser.add_argument('--batch_size', type=int, default=8, help='windows')
  parser.add_argument(
    '--dtype',
    default='auto',
    choices=('auto', 'float32', 'bfloat16'),
    help='of weights and computation; auto: float32 on CPU, else bfloat16',
  )
  parser.add_json()
  args = parser.parse_args(argv)
  result = api.evaluate(
    args.model,
    args.data,
    args.seq_len,
    max_windows=args.max_windows,
    batch_size=args.batch_size,
    dtype=args.dtype,
  )
  if args.json:
    print_json({**dataclasses.asdict(result), 'model': args.model})
  else:
    print(
      f'perplexity {result.perplexity:.4f} on {result.data}: '
      f'{result.windows} windows of {result.seq_len} tokens, '
      f'{result.tokens_per_second:,.0f} tokens/s'
    )
