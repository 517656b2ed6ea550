"""evaluate: the perplexity of a folder on a text."""

import dataclasses

from lorapr_jax import sharding
from lorapr_jax.cli.arguments import Parser, print_json
from lorapr_jax.data import pipeline
from lorapr_jax.data.sources import parse_spec
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.eval.perplexity import evaluate_perplexity
from lorapr_jax.hf.load import Shards, check_tensors, load_config, load_params
from lorapr_jax.models.llama import logical_axes, param_shapes
from lorapr_jax.settings import resolve_dtype
from lorapr_jax.steps import StepSettings


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
  for name, least in (('seq_len', 2), ('max_windows', 1), ('batch_size', 1)):
    value = getattr(args, name)
    if value is not None and value < least:
      raise UserError(f'--{name} is {value}: it must be at least {least}')

  parse_spec(args.data)
  config = load_config(args.model)
  if args.seq_len > config.max_positions:
    raise UserError(
      f'--seq_len is {args.seq_len}, but the model has '
      f'{config.max_positions} positions (max_position_embeddings)'
    )
  check_tensors(Shards(args.model), config)
  windows = pipeline.evaluation_windows(
    args.data, Tokenizer(args.model), args.seq_len, config.vocab_size
  )[: args.max_windows]
  dtype = resolve_dtype('--dtype', args.dtype)
  mesh = sharding.make_mesh(sharding.mesh_sizes(data=-1, fsdp=1, tensor=1))
  places = sharding.shardings(
    mesh, logical_axes(config)['params'], param_shapes(config, dtype)
  )
  result = evaluate_perplexity(
    load_params(args.model, config, places, dtype),
    windows,
    StepSettings(config, dtype=dtype),
    data=args.data,
    batch_size=args.batch_size,
  )
  if args.json:
    print_json({**dataclasses.asdict(result), 'model': args.model})
  else:
    print(
      f'perplexity {result.perplexity:.4f} on {result.data}: '
      f'{result.windows} windows of {result.seq_len} tokens, '
      f'{result.tokens_per_second:,.0f} tokens/s'
    )
