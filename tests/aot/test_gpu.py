"""What the compiler for NVIDIA GPUs makes of the step: no GPU is needed for it.

Run by `make test-aot`, in an environment that has it, without CUDA's libraries.
"""

from pathlib import Path

import jax
from jax.experimental import topologies
import pytest

from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.planning.compiled import Compiled
from lorapr_jax.planning.functions import loop_functions
from lorapr_jax.planning.hlo import Program
from tests.aot.overlap import overlapped

pytestmark = pytest.mark.aot

MODELS = Path(__file__).parents[2] / 'configs' / 'models.py'
# What the compiler asks of a GPU that is there, of an H100.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
"""


@pytest.fixture(autouse=True)
def _not_kept():
  # What is compiled for devices that are not there cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', True)


def _step_of_llama_7b(*options: str) -> Compiled:
  """On eight GPUs of one host."""
  devices = topologies.get_topology_desc(
    'h100', 'cuda', target_config=H100, topology='1x1x8'
  ).devices
  # Candidates for a product are timed, and cuDNN builds its attention, where
  # there is a GPU. Without dropout, as for the TPU.
  options = ','.join(('xla_gpu_autotune_level=0', *options))
  config, _ = parse_flags(
    [
      f'--config={MODELS}:llama-7b',
      '--workdir=none',
      '--config.mesh.data=1',
      '--config.mesh.fsdp=8',
      '--config.lora.dropout=0.0',
      '--config.model.attention=xla',
      f'--config.train.compiler_options={options}',
    ]
  )
  step = next(loop_functions(config, devices))
  return Compiled.of(step.lowered)


def test_products_run_while_eight_gpus_gather():
  limit = 'xla_gpu_experimental_parallel_collective_overlap_limit=4'
  step, in_parallel = _step_of_llama_7b(), _step_of_llama_7b(limit)
  received = step.received()
  assert in_parallel.received() == received
  beside, more = (
    overlapped(Program.parse(x.text)) for x in (step, in_parallel)
  )
  # The compiler's own defaults, and what docs/scaling.md says of the option.
  assert beside > 0.6 * received
  assert more > beside + 0.1 * received
  assert in_parallel.temporaries < step.temporaries + 0.05e9
