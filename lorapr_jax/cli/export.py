"""export: a run's workdir or a folder, in another layout or format."""

from lorapr_jax.cli.arguments import Parser, print_json
from lorapr_jax.exporting import sources
from lorapr_jax.exporting.routes import Route
from lorapr_jax.hf.layout import LAYOUTS, MODEL_TYPES
from lorapr_jax.hf.write import DTYPES, GGUF_DTYPES
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.runtime.sizes import parse_size
from lorapr_jax.runtime.terminal import say
from lorapr_jax.settings.sections import ROUTES


def main(argv: list[str]) -> None:
  """Exports, and says what was written and how well it was read back."""
  parser = Parser('export', __doc__)
  parser.add_argument(
    'source',
    type=path_of,
    help="a run's workdir, whose last checkpoint is cut and merged, or a "
    'Hugging Face folder, such as an earlier export',
  )
  parser.add_argument(
    'destination', type=path_of, help='a new folder; for gguf a new .gguf file'
  )
  parser.add_argument(
    '--format',
    choices=ROUTES,
    default='hf',
    help='hf: a Hugging Face folder; gguf: a file for llama.cpp; peft: LoRA '
    'as an adapter over the pruned base',
  )
  parser.add_argument(
    '--layout',
    choices=LAYOUTS,
    default='auto',
    help='uniform: layers of one size, which stock code loads; two_shape: any '
    'sizes, by remote code; padded: the sizes before the cut, with zeros; '
    'auto: uniform where it can be, else two_shape',
  )
  parser.add_argument('--model_type', choices=MODEL_TYPES, default='auto')
  parser.add_argument(
    '--dtype',
    choices=('auto', *DTYPES, *GGUF_DTYPES),
    default='auto',
    help="of the weights; auto: the source's",
  )
  parser.add_argument(
    '--max_shard_size', default='5GB', help='of one weights file of a folder'
  )
  parser.add_argument(
    '--base', type=path_of, help="where a run's base is now, if it has moved"
  )
  parser.add_json()
  args = parser.parse_args(argv)
  route = Route(
    kind=args.format,
    path=args.destination,
    layout=args.layout,
    model_type=args.model_type,
    dtype=args.dtype,
    max_shard_bytes=parse_size('--max_shard_size', args.max_shard_size),
  )
  result = sources.export(args.source, route, args.base)
  if args.json:
    print_json(result)
  else:
    say(
      f'{result["path"]}: {result["parameters"]:,} parameters, '
      f'{result["dtype"]}, read back, logits differ by at most '
      f'{result["max_logit_difference"]:.1e}'
    )
