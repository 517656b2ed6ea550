"""What tests tell XLA, and the processes that they start."""

import os
from pathlib import Path

from jaxlib.version import __version_info__

TESTS = Path(__file__).parent
DEVICES = '--xla_force_host_platform_device_count'
# Most of a test's time is compiling, and LLVM takes a fifth of it longer to
# make faster code of the same operations.
FLAGS = '--xla_backend_optimization_level=0'
FLAGS += ' --xla_llvm_disable_expensive_passes=true'
# On a busy machine one of eight devices may come long after another; after
# 40 s, which is the default, the process would be aborted.
FLAGS += ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
# Up to 0.11.0 the CPU's fusions can be compiled as before, in half of the time;
# later ones end a process that asks for it. In one part, not 32, a small
# program takes a tenth less.
if __version_info__ <= (0, 11, 0):
  FLAGS += ' --xla_cpu_use_fusion_emitters=false'
  FLAGS += ' --xla_cpu_parallel_codegen_split_count=1'
# What conftest.py sets: where JAX keeps what it compiles and from which seconds
# on; and that no operation says from which lines of Python it comes, since that
# takes a twentieth of the time.
JAX = (
  'JAX_COMPILATION_CACHE_DIR',
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS',
  'JAX_TRACEBACK_IN_LOCATIONS_LIMIT',
)


def environment(devices: int = 1, **more: str) -> dict[str, str]:
  """That of a process with so many devices, and nothing of the user's."""
  return {
    'PATH': '/usr/bin:/bin',
    'PYTHONPATH': f'{TESTS.parent}:{TESTS / "startup"}',
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{FLAGS} {DEVICES}={devices}',
    **{name: os.environ[name] for name in JAX},
    **more,
  }
