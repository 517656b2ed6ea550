"""convert: a GGUF file or a Hugging Face folder to a Hugging Face folder."""

from lorapr_jax.cli.arguments import Parser, print_json
from lorapr_jax.exporting.convert import DEMO, convert
from lorapr_jax.runtime.terminal import say


def main(argv: list[str]) -> None:
  """Converts, and says what was written."""
  parser = Parser('convert', __doc__)
  parser.add_argument('source', help=f'a .gguf file, a folder or {DEMO}')
  parser.add_argument('destination', help='a new folder')
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help="of the weights; default: float32 for a GGUF, else the source's",
  )
  parser.add_json()
  args = parser.parse_args(argv)
  config = convert(args.source, args.destination, args.dtype)
  if args.json:
    print_json(
      {'folder': args.destination, 'parameters': config.num_parameters}
    )
  else:
    say(f'{args.destination}: {config.num_parameters:,} parameters')
