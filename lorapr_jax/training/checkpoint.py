"""Checkpoints of the train state, by orbax; and the log that goes with them."""

import asyncio
from collections.abc import Iterator
import contextlib
import logging
from pathlib import Path
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np
import orbax.checkpoint as ocp

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.paths import is_folder, make_folder, move
from lorapr_jax.training.state import TrainState

# One function of all arrays, not one compiled for each shape.
_copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))


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

  Args:
    workdir: of the run.
    folder: of the phase's checkpoints in it.

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
  path = _for_orbax(newest / 'default')
  with _reading(newest), ocp.StandardCheckpointer() as checkpointer:
    # Its own metadata say which shapes it has.
    shapes = ocp.StandardCheckpointHandler().metadata(path).tree
    state = checkpointer.restore(
      path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    )
  return _with_tuples(state)


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
  before = asyncio.get_event_loop_policy()
  asyncio.set_event_loop_policy(_PatientLoops())
  try:
    yield
  finally:
    asyncio.set_event_loop_policy(before)


class Damaged(UserError):
  """A checkpoint cannot be read."""


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
  try:
    with _patient_loops():
      yield
  except Exception as error:  # What damage raises is up to orbax.
    raise Damaged(
      f'{folder} cannot be read, because it is damaged: move it away to go on '
      'from the checkpoint before it, or from the start'
    ) from error


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


class Checkpoints:
  """The train states of a phase: everything but what stays of the base."""

  def __init__(self, folder: Path, keep: int):
    """Opens a folder; the newest `keep` are kept."""
    self._folder = folder
    self._manager = _Manager(
      _for_orbax(folder),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
    )
    self._loops = _patient_loops()
    # Before it raises an error, orbax logs its traceback.
    logging.getLogger('absl').setLevel(logging.CRITICAL)

  def newest(self) -> int | None:
    """The step of the newest complete checkpoint, if there is one."""
    return self._manager.latest_step()

  def restore(
    self, step: int, shapes: TrainState, place: Sharding
  ) -> TrainState:
    """The state of a checkpoint.

    Args:
      step: from `newest`.
      shapes: `jax.ShapeDtypeStruct`s of the size that it has.
      place: where all that has no sharding of its own will lie.

    Raises:
      Damaged: if it cannot be read.
    """
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding or place
      ),
      shapes,
    )
    with _reading(self._folder / str(step)):
      return self._manager.restore(
        step, args=ocp.args.StandardRestore(abstract)
      )

  def set_newest_aside(self) -> str | None:
    """Moves the newest checkpoint away, if there is one before it.

    Returns:
      What was done, for the user; None if there is no other.
    """
    *before, step = sorted(self._manager.all_steps())
    if not before:
      return None
    folder = self._folder
    aside = folder.with_name(f'{folder.name}-damaged') / str(step)
    if processes.is_first():
      make_folder(aside.parent)
      move(folder / str(step), aside)
    processes.wait_for_others(f'set step {step} aside')
    self._manager.reload()
    return (
      f'{folder / str(step)} cannot be read, because it is damaged: it is now '
      f'{aside}, and the run goes on from step {before[-1]}'
    )

  def save(self, step: int, state: TrainState) -> None:
    """Saves in the background; `state` may be donated once this returns.

    Args:
      step: the next one.
      state: of a phase.
    """
    # A copy: on CPU the writer would read the very buffers that the next step
    # is given to write into.
    state = _copied(state)
    with _writing(self._folder):
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def __enter__(self) -> 'Checkpoints':
    self._loops.__enter__()
    return self

  def __exit__(self, *_: Any) -> None:
    try:
      self.close()
    finally:
      self._loops.__exit__(None, None, None)

  def close(self) -> None:
    """Waits until everything is written."""
    with _writing(self._folder):
      self._manager.close()
