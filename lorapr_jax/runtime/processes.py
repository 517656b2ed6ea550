"""The processes of a run: how they find each other, and which one writes."""

from collections.abc import Callable
import hashlib
import importlib.util
import itertools
import json
import os
from pathlib import Path
import signal
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import compilation_cache
from lorapr_jax.runtime.terminal import say

# The others end once a process is silent for this long: it was killed, or its
# machine is gone.
HEARTBEAT_SECONDS = 60
# A file that one process has made must be visible to the others after this.
VISIBLE_SECONDS = 90
_FLAGS = '--coordinator_address, --num_processes, --process_id'


def connect(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes of the run, if there are any.

  Without arguments JAX finds them: on Cloud TPU, under SLURM and under Open
  MPI. Call this before anything asks for devices. The coordinator is the first
  process, at HOST:PORT, and processes are numbered from 0.

  Raises:
    UserError: if some arguments are given and others not, or one is wrong.
  """
  given = (coordinator_address, num_processes, process_id)
  if given == (None, None, None):
    found = _has_others()
    if found or _on_tpu_host():
      try:
        _initialize()
      except ValueError as error:  # JAX knows no such cluster.
        if found:
          raise UserError(f'{error} Give {_FLAGS}') from None
    return
  if None in given:
    raise UserError(f'{_FLAGS} go together: give all, or none')
  host, _, port = coordinator_address.rpartition(':')
  if not host or not port.isdecimal():
    raise UserError(f'--coordinator_address={coordinator_address}: HOST:PORT')
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id={process_id}: a number from 0, below '
      f'--num_processes={num_processes}'
    )
  _initialize(
    *given,
    # Under SLURM, JAX would otherwise give each process one device.
    cluster_detection_method='deactivate',
  )


def _initialize(*given: Any, **how: Any) -> None:
  jax.distributed.initialize(
    *given,
    **how,
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=HEARTBEAT_SECONDS,
  )
  compilation_cache.disable_on_cpu_meshes(jax.devices())
  if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    # JAX tells the other processes of SIGTERM, and of no other signal.
    signal.signal(
      signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
  wait_for_others('connect')
  if not is_first():
    place = f'process {jax.process_index()} of {count()}: process 0 has the log'
    say(f'{place}; {hint()}', error=True)


def _has_others() -> bool:
  """Whether SLURM or Open MPI says that it started other processes too."""
  counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  return any(int(os.environ.get(name, 1)) > 1 for name in counts)


def _on_tpu_host() -> bool:
  """Whether this machine has TPU chips: it may then be one host of a pod."""
  chips = (*Path('/dev').glob('accel[0-9]*'), *Path('/dev/vfio').glob('[0-9]*'))
  wanted = os.environ.get('JAX_PLATFORMS', 'tpu')
  libtpu = importlib.util.find_spec('libtpu') is not None
  return bool(chips) and libtpu and 'tpu' in wanted


def count() -> int:
  """How many processes there are."""
  return jax.process_count()


def is_first() -> bool:
  """Whether this is the process that writes files and prints."""
  return jax.process_index() == 0


def hint() -> str:
  """What to do if one of many processes dies: the others then die silently."""
  if count() == 1:
    return ''
  return 'if a process dies, run the same command again on all of them'


def wait_for_others(where: str) -> None:
  """Waits until all processes have come to the place that `where` names."""
  if count() > 1:
    multihost_utils.sync_global_devices(where)


# Counts the calls of `told_to_stop`.
_asked = itertools.count(1)


def told_to_stop() -> bool:
  """Whether one of many processes got SIGTERM; all see it at the same call."""
  # JAX wants the number of this call. The number of the step would not do: a
  # resumed run begins at a later step.
  return count() > 1 and multihost_utils.reached_preemption_sync_point(
    next(_asked)
  )


def check_shared(path: Path) -> None:
  """Refuses a path that the first process made and this process cannot see.

  Raises:
    UserError: if the path does not appear in VISIBLE_SECONDS.
  """
  if is_first():
    return
  # A network file system may show a new file only after a while.
  end = time.monotonic() + VISIBLE_SECONDS
  while not path.exists():
    if time.monotonic() > end:
      raise UserError(
        f'{path} is not there on process {jax.process_index()}: all processes '
        'need the same --workdir on a file system that they share'
      )
    time.sleep(0.5)


def check_same(settings: Any) -> None:
  """Checks that all processes have the same settings, which JSON can hold.

  Raises:
    UserError: on all processes, if they have not.
  """
  if count() == 1:
    return
  text = json.dumps(settings, sort_keys=True)
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  others = multihost_utils.process_allgather(digest)
  if (others != others[0]).any():
    raise UserError(
      'settings differ between processes: start all of them with the same '
      'command, code and files'
    )


def from_first(make: Callable[[], Any]) -> Any:
  """What the first process makes, on all of them; the others wait for it.

  It is what JSON can hold.

  Raises:
    UserError: on all processes, if the first raises one.
  """
  if count() == 1:
    return make()
  made = {}
  if is_first():
    try:
      made = {'value': make()}
    except UserError as error:
      made = {'error': str(error)}
  text = np.frombuffer(json.dumps(made).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(max(lengths), np.uint8)
  padded[: len(text)] = text
  first = multihost_utils.process_allgather(padded)[0][: lengths[0]]
  made = json.loads(bytes(first))
  if 'error' in made:
    raise UserError(made['error'])
  return made['value']


def to_host(x: Any) -> np.ndarray:
  """The whole array. If it lies on several processes, all must call this."""
  if isinstance(x, jax.Array) and not (
    x.is_fully_addressable or x.is_fully_replicated
  ):
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
