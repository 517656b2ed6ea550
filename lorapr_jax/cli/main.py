"""The commands; a user's mistake is one line and exit status 1."""

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
  argv = sys.argv[1:] if argv is None else argv
  texts = '\n'.join(f'  {name:10}{text}' for name, text in COMMANDS.items())
  if argv[:1] in ([], ['-h'], ['--help']):
    print(f'usage: python -m lorapr_jax COMMAND ...\n{texts}')
    return 0 if argv else 1
  try:
    if argv[0] not in COMMANDS:
      raise UserError(
        f'{argv[0]!r} is no command: choose from {", ".join(COMMANDS)}'
      )
    # Imported here: a command loads only what it needs.
    importlib.import_module(f'lorapr_jax.cli.{argv[0]}').main(argv[1:])
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    where = f'{error.filename}: ' if error.filename else ''
    print(f'error: {where}{error.strerror or error}', file=sys.stderr)
    return 1
  return 0
