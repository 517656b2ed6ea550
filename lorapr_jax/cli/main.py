"""Runs a command. A mistake or a signal prints one line, no traceback."""

import contextlib
import importlib
import os
import shlex
import signal
import sys

from lorapr_jax.errors import Stopped, UserError, first_line
from lorapr_jax.runtime import ending
from lorapr_jax.runtime.compilation_cache import keep_compiled
from lorapr_jax.runtime.terminal import say, show_all, show_warnings

COMMANDS = {
  'train': 'prune a model by a config',
  'convert': 'turn a GGUF file or a Hugging Face folder into such a folder',
  'evaluate': 'perplexities of a folder, or its scores in tasks',
  'lm_eval': "lm-evaluation-harness's own command line, with our model",
  'export': 'write a run or a folder in another layout or format',
  'generate': 'text from a folder, streamed; a chat where it has a template',
  'benchmark': 'how fast a folder runs, beside another',
  'report': 'the page of a finished run, or several runs compared',
  'plan': 'what a run would need on TPUs that need not be there',
  'inspect': 'what is pruned together, and what a target would leave',
  'explore': 'every size of a model at a glance, before a run',
}

# Packages behind gs:// and the like, whose errors are not all OSErrors.
_STORES = ('aiohttp', 'botocore', 'gcsfs', 'google')


def main(argv: list[str] | None = None) -> int:
  """Runs one command; returns its exit status.

  Ctrl-C, SIGTERM and SIGHUP end the process with status 128 plus the signal,
  unless the command handles them.
  """
  argv = sys.argv[1:] if argv is None else argv
  show_all()
  if argv[:1] in ([], ['-h'], ['--help']):
    texts = (f'  {name:10}{text}' for name, text in COMMANDS.items())
    say('usage: python -m lorapr_jax COMMAND ...', *texts)
    return 0 if argv else 1
  try:
    if argv[0] not in COMMANDS:
      raise UserError(
        f'{argv[0]!r} is no command: choose from {", ".join(COMMANDS)}'
      )
    show_warnings()
    keep_compiled()  # Nothing has imported JAX so far.
    # Imported here: a command loads only what it needs.
    with ending.in_order():
      importlib.import_module(f'lorapr_jax.cli.{argv[0]}').main(argv[1:])
  except UserError as error:
    return _failed(str(error))
  except OSError as error:
    where = f'{error.filename}: ' if error.filename else ''
    return _failed(f'{where}{error.strerror or error}')
  except Stopped as stopped:
    _stopped(f'{stopped}; {_how_to_go_on()}')
    return stopped.status
  except (KeyboardInterrupt, ending.Ended) as end:
    hint = f'; {_how_to_go_on()}' if argv[0] == 'train' else ''
    _stopped(f'stopped{hint}')
    with contextlib.suppress(OSError):
      sys.stdout.flush()
    # Not sys.exit, in which JAX waits for all that it was given to compute.
    os._exit(getattr(end, 'code', 128 + signal.SIGINT))
  except MemoryError as error:
    return _no_memory(error)
  except Exception as error:
    if 'RESOURCE_EXHAUSTED' in str(error):  # JAX's, which may not be loaded.
      return _no_memory(error)
    if type(error).__module__.partition('.')[0] not in _STORES:
      raise
    return _failed(f'{type(error).__name__}: {error}')
  return 0


def _failed(message: str) -> int:
  """The exit status; one of many processes ends here, and so do the others."""
  say(f'error: {message}', error=True)
  jax = sys.modules.get('jax')
  if jax and jax.distributed.is_initialized():
    sys.stdout.flush()
    os._exit(1)  # An ordinary end would wait for the others.
  return 1


def _no_memory(error: Exception) -> int:
  return _failed(
    f'there is not enough memory ({first_line(error)}): "Out of memory" in '
    'docs/troubleshooting.md says what to try'
  )


def _stopped(text: str) -> None:
  # A flag may hold lines, which the command to run again needs as they are.
  say(*text.split('\n'), error=True)


def _how_to_go_on() -> str:
  command = shlex.join(sys.orig_argv)
  return f'to go on, run the same command again: {command}'
