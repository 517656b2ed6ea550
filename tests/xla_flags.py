"""What tests tell XLA."""

from jaxlib.version import __version_info__

DEVICES = '--xla_force_host_platform_device_count'
# Most of a test's time is compiling, and LLVM takes a fifth of it longer to
# make faster code of the same operations.
QUICKLY = '--xla_backend_optimization_level=0'
# Up to 0.11.0 the CPU's fusions can be compiled as before, in half of the time;
# later ones end a process that asks for it.
if __version_info__ <= (0, 11, 0):
  QUICKLY += ' --xla_cpu_use_fusion_emitters=false'
