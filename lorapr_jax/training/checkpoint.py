"""Checkpoints of the train state, by orbax.

Beside the arrays lies the sum of their bits, since neither orbax nor what it
writes with has a check of their values.
"""

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import logging
from pathlib import Path
import re
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np
import orbax.checkpoint as ocp

from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.files import LARGE, read_json
from lorapr_jax.runtime.paths import is_folder, make_folder, move
from lorapr_jax.runtime.workdir import RUN_FILE
from lorapr_jax.training.state import TrainState

# What storage says when the fault is not in the files.
_OUT_OF_REACH = re.compile(
  'PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED'
)

# One function of all arrays, not one compiled for each shape.
_copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))


def _bits(x: Any) -> Any:
  """The sum of an array's bits modulo 2**32, however it is divided."""
  return x.view(f'uint{8 * x.dtype.itemsize}').sum(dtype=np.uint32)


_bits_on_devices = jax.jit(_bits)  # One for each shape: many arrays have it.


def _sum(tree: Any) -> int:
  """Of the bits of all arrays, on the host or on devices."""
  sums = [
    (_bits if isinstance(x, np.ndarray) else _bits_on_devices)(x)
    for x in jax.tree.leaves(tree)
  ]
  return sum(map(int, sums))


def saved_steps(folder: Path) -> list[int]:
  """The steps of the complete checkpoints in a folder, if it is there."""
  if not is_folder(folder):
    return []
  return ocp.utils.checkpoint_steps(_for_orbax(folder))


def _for_orbax(folder: Path) -> epath.Path:
  """Its paths are of etils, which know gs:// too."""
  return epath.Path(str(folder.absolute()))


def read_state(workdir: Path, folder: str) -> dict[str, Any]:
  """The newest complete checkpoint of one phase.

  It comes as host arrays, wherever they lay in training, and nothing in the
  workdir changes.

  Returns:
    The fields of the `TrainState`, at the size that it had.

  Raises:
    UserError: if there is no checkpoint, or it cannot be read.
  """
  folder = workdir / folder
  steps = saved_steps(folder)
  if not steps:
    raise UserError(
      f'{workdir} holds no checkpoint: go on with its run, which writes one '
      'every train.checkpoint_every steps'
    )
  newest = folder / str(max(steps))
  state = _read(
    newest,
    lambda shapes: jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes),
  )
  return _with_tuples(state)


def restore(
  folder: Path, step: int, shapes: TrainState, place: Sharding
) -> TrainState:
  """The state of a checkpoint, on devices.

  `shapes` have the sizes of its arrays. An array whose shape has no sharding
  will lie at `place`.

  Raises:
    Damaged: if it cannot be read.
  """
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding or place
    ),
    shapes,
  )
  return _read(folder / str(step), lambda _: placed)


def _read(folder: Path, expected: Callable[[Any], Any]) -> Any:
  """The arrays of one checkpoint.

  `expected` gives what to read, from what the checkpoint says that it holds.

  Raises:
    Damaged: if they cannot be read, or are not as they were saved.
    UserError: if they are of another run.
  """
  path = _for_orbax(folder / 'default')
  with _reading(folder), ocp.StandardCheckpointer() as checkpointer:
    held = ocp.StandardCheckpointHandler().metadata(path)
    # An earlier version wrote no such things.
    noted = held.custom_metadata or {}
    run = _run_of(folder.parent.parent)
    if noted.get('run') not in (None, run):
      raise UserError(
        f'{folder} is of a run with another model, base or LoRA than '
        f'{folder.parent.parent / RUN_FILE} says: put back the files that '
        'belong together'
      )
    state = checkpointer.restore(path, expected(held.tree))
  found = _sum(state)
  if noted.get('sum', found) != found:
    raise _damaged(folder)
  return state


def _run_of(workdir: Path) -> str | None:
  """A hash of what gives the arrays of a run's states their sizes and meaning.

  None where there is no run.json.
  """
  path = workdir / RUN_FILE
  if not path.exists():
    return None
  run = read_json(path, LARGE)
  base = run.get('inputs', {}).get('sha256')
  parts = run['resolved']['model'], run['config'].get('lora'), base
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _with_tuples(tree: Any) -> Any:
  """Orbax gives lists where a state has tuples."""
  if isinstance(tree, dict):
    return {key: _with_tuples(value) for key, value in tree.items()}
  return tuple(map(_with_tuples, tree)) if isinstance(tree, list) else tree


class _PatientLoop(asyncio.SelectorEventLoop):
  """An event loop that closes once its tasks have ended.

  Orbax closes its loops at the first error; each of the reads and writes that
  are still under way would then print a traceback.
  """

  def close(self) -> None:
    tasks = set() if self.is_closed() else asyncio.all_tasks(self)
    if tasks:
      ended = asyncio.gather(*tasks, return_exceptions=True)
      self.run_until_complete(asyncio.wait([ended], timeout=30))
    super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return _PatientLoop()


@contextlib.contextmanager
def _patient_loops() -> Iterator[None]:
  # Before it raises an error, orbax logs its traceback.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_PatientLoops())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(before)


class Damaged(UserError):
  """A checkpoint cannot be read."""


def _damaged(folder: Path) -> Damaged:
  return Damaged(
    f'{folder} cannot be read, because it is damaged: move it away to go on '
    'from the checkpoint before it, or from the start'
  )


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
  """Tells damage from a lack of memory, of permission or of a connection."""
  try:
    with _patient_loops():
      yield
  except (MemoryError, UserError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # What damage raises is up to orbax.
    beyond = isinstance(error, PermissionError | ConnectionError | TimeoutError)
    if beyond or _OUT_OF_REACH.search(f'{error} {error.__cause__}'):
      raise UserError(
        f'{folder} is out of reach: {first_line(error)}'
      ) from error
    raise _damaged(folder) from error


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # As above.
    raise UserError(
      f'{folder} cannot be written ({error}): make room, and run the same '
      'command again to go on from the last checkpoint'
    ) from error


class _Manager(ocp.CheckpointManager):
  """Orbax's, but that the loop alone asks whether it is to stop."""

  def reached_preemption(self, step: int) -> bool:
    return False


def set_aside(folder: Path, step: int, left: int) -> str:
  """Moves a step's checkpoint, which cannot be read, away; that of `left` can.

  Returns:
    What was done, for the user.
  """
  aside = folder.with_name(f'{folder.name}-damaged') / str(step)
  if processes.is_first():
    if aside.exists():  # The same step was damaged before.
      aside = aside.with_name(f'{step}-{time.time_ns()}')
    make_folder(aside.parent)
    move(folder / str(step), aside)
  processes.wait_for_others(f'set step {step} aside')
  return (
    f'{folder / str(step)} cannot be read, because it is damaged: it is now '
    f'{aside}, and the run goes on from step {left}'
  )


class Checkpoints:
  """Writes the train states of a phase: all but what stays of the base."""

  def __init__(self, folder: Path, keep: int):
    """Opens a folder; the newest `keep` are kept."""
    self._folder, self._run = folder, _run_of(folder.parent)
    self._manager = _Manager(
      _for_orbax(folder),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )
    self._loops = _patient_loops()

  def save(self, step: int, state: TrainState) -> None:
    """Saves in the background; `state` may be donated once this returns."""
    # A copy: on CPU the writer would read the very buffers that the next step
    # is given to write into.
    state = _copied(state)
    noted = {'sum': _sum(state), 'run': self._run}
    args = ocp.args.StandardSave(state, custom_metadata=noted)
    with _writing(self._folder):
      self._manager.save(step, args=args)

  def wait(self) -> None:
    """Waits until everything is written."""
    with _writing(self._folder):
      self._manager.wait_until_finished()

  def __enter__(self) -> 'Checkpoints':
    self._loops.__enter__()
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      with _writing(self._folder):  # It waits until everything is written.
        self._manager.close()
    finally:
      self._loops.__exit__(None, None, None)
