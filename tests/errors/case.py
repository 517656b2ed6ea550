"""What a case of the table of errors is, and the places that cases are made in.

A case makes a bad input in an empty folder, which is the current folder while
its command runs, so that its paths read MODEL, TEXT.txt or RUN.
"""

from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import shutil

CONFIGS = Path(__file__).parents[2] / 'configs'


@dataclasses.dataclass(frozen=True)
class Case:
  """A mistake.

  Attributes:
    did: what the user did: the left column of docs/errors.md.
    argv: makes the bad input in a place; returns the command's arguments.
    late: whether it shows only once work has begun, and been reported.
    varies: a pattern of what is others' wording, shown as an ellipsis.
    leaves: what may be there afterwards that was not there before: paths;
      those that end in a slash stand for all that lies in them.
    max_file_bytes: of any file that is written, as on a disk that is full.
    devices: that the command sees: 1 or 8.
  """

  did: str
  argv: Callable[['Place'], list[str]]
  late: bool = False
  varies: str = ''
  leaves: tuple[str, ...] = ()
  max_file_bytes: int | None = None
  devices: int = 1


class Place:
  """The folder of one case, and what is often needed in it."""

  def __init__(self, folder: Path, good: Callable[[str], Path]):
    """Works in `folder`; `good` gives the good MODEL or the finished RUN."""
    self.folder, self._good = folder, good

  def copy(self, name: str, to: str = '') -> Path:
    """A copy of the good MODEL or RUN."""
    target = self.folder / (to or name)
    shutil.copytree(self._good(name), target)
    return target

  def write(self, name: str, content: str | bytes) -> Path:
    """A file; its folder is made if need be."""
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
      content = content.encode()
    path.write_bytes(content)
    return path

  def model(self, **changes) -> Path:
    """A good MODEL, but for these keys of its config.json."""
    model = self.copy('MODEL')
    change_json(model / 'config.json', **changes)
    return model

  def text(self, text: str | bytes = 'word ' * 600) -> Path:
    """TEXT.txt."""
    return self.write('TEXT.txt', text)


def change_json(path: Path, **changes) -> None:
  """Sets keys of a JSON file; None takes a key away."""
  values = json.loads(path.read_text()) | changes
  kept = {key: value for key, value in values.items() if value is not None}
  path.write_text(json.dumps(kept))


def train_tiny(*overrides: str) -> list[str]:
  """Trains configs/tiny.py with these settings."""
  return [
    *('train', f'--config={CONFIGS}/tiny.py', '--workdir=RUN'),
    *(f'--config.{override}' for override in overrides),
  ]


def train_model(*overrides: str) -> list[str]:
  """Prunes MODEL on TEXT.txt with these settings."""
  return [
    *('train', f'--config={CONFIGS}/default.py', '--workdir=RUN'),
    *('--config.model.path=MODEL', '--config.data.train=file:TEXT.txt'),
    *('--config.train.batch_size=8', '--config.train.micro_batch_size=8'),
    '--config.train.seq_len=32',
    *(f'--config.{override}' for override in overrides),
  ]


def evaluate(*more: str) -> list[str]:
  """Evaluates MODEL on TEXT.txt."""
  return [
    *('evaluate', '--model', 'MODEL', '--data', 'file:TEXT.txt'),
    *('--seq_len', '32', *more),
  ]


def with_argv(*argv: str) -> Callable[[Place], list[str]]:
  """The `argv` of a case whose input is the command line alone."""
  return lambda _: list(argv)


def tiny_override(override: str, did: str = '', **more) -> Case:
  """configs/tiny.py with one setting that cannot be."""
  return Case(
    f'`--config.{override}`' + (f', {did}' if did else ''),
    with_argv(*train_tiny(override)),
    **more,
  )
