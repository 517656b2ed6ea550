"""What a run reads, by its content."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from pathlib import Path

from lorapr_jax.errors import UserError
from lorapr_jax.hf.files import base_files, content_hash
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.content import combined, hashing


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the first process of a run has read; empty on the others.

  Attributes:
    folder: of the base; None for random weights.
    base: {file of the base: SHA-256}.
  """

  folder: Path | None
  base: dict[str, str]

  @property
  def sha256(self) -> str | None:
    """Of the base, as `hf.files.content_hash`."""
    return combined(self.base.values()) if self.base else None

  def check_base(self) -> None:
    """Refuses a base that is no longer what was hashed.

    Call it after the base was loaded.

    Raises:
      UserError: if a file has changed.
    """
    if self.base and content_hash(self.folder) != self.sha256:
      raise UserError(
        f'{self.folder} has changed since the run began: put back what it '
        'held, and run the same command again'
      )


@contextlib.contextmanager
def reading(folder: Path | None) -> Iterator[Callable[[], Inputs]]:
  """Hashes a run's inputs while the block does other work.

  Gives a function that waits for the result.
  """
  paths = base_files(folder) if folder and processes.is_first() else ()
  with hashing(paths) as hashes:
    yield lambda: Inputs(folder, hashes())
