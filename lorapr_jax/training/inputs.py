"""What a run reads, by its content: it goes on with what it began with."""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from lorapr_jax.data.sources import identity, parse_mixture
from lorapr_jax.data.tokenizer_files import tokenizer_files
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
    tokenizer: {file of the tokenizer: SHA-256}.
    data: {spec: hash of what it gives}.
  """

  folder: Path | None = None
  base: dict[str, str] = dataclasses.field(default_factory=dict)
  tokenizer: dict[str, str] = dataclasses.field(default_factory=dict)
  data: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def sha256(self) -> str | None:
    """Of the base, as `hf.files.content_hash`."""
    return combined(self.base.values()) if self.base else None

  def recorded(self) -> dict[str, Any]:
    """What run.json holds of them."""
    files = self.base | self.tokenizer
    return {'sha256': self.sha256, 'files': files, 'data': self.data}

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
def reading(
  folder: Path | None, mixtures: Iterable[str]
) -> Iterator[Callable[[], Inputs]]:
  """Hashes a run's inputs; the base while the block reads the data.

  Gives a function that waits for the `Inputs`. `mixtures` are data specs.

  Raises:
    UserError: if an input cannot be read, or if data changed in the block.
  """
  if not processes.is_first():
    yield Inputs
    return
  base = base_files(folder) if folder else []
  tokenizer = tokenizer_files(folder) if folder else []
  with hashing(dict.fromkeys([*base, *tokenizer])) as hashes:
    specs = [spec for mixture in mixtures for _, spec in parse_mixture(mixture)]
    before = {spec.text: identity(spec).hex() for spec in specs}

    def inputs() -> Inputs:
      for spec in specs:
        if identity(spec).hex() != before[spec.text]:
          raise UserError(
            f'{spec.text} changed while it was read: run the same command again'
          )
      found = hashes()
      return Inputs(
        folder,
        base={str(path): found[str(path)] for path in base},
        tokenizer={str(path): found[str(path)] for path in tokenizer},
        data=before,
      )

    yield inputs
