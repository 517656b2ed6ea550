"""The commands; a user's mistake is one line and exit status 1."""

import argparse
import importlib
import sys

from lorapr_jax.errors import UserError

COMMANDS = {
  'train': 'prune a model by a config',
  'convert': 'turn a GGUF file or a Hugging Face folder into such a folder',
  'evaluate': 'the perplexity of a folder on a text',
  'inspect': 'what is pruned together, and what a target would leave',
}


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns its exit status."""
  parser = argparse.ArgumentParser(prog='python -m lorapr_jax')
  commands = parser.add_subparsers(dest='command', required=True)
  for name, text in COMMANDS.items():
    commands.add_parser(name, help=text, add_help=False)
  argv = sys.argv[1:] if argv is None else argv
  command = parser.parse_args(argv[:1]).command
  # Imported here: a command loads only what it needs.
  module = importlib.import_module(f'lorapr_jax.cli.{command}')
  try:
    module.main(argv[1:])
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0
