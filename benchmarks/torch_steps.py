"""What the PyTorch programs that we time have in common."""

import json
import resource
import time

import torch


def matmul_seconds(dtype: torch.dtype, size: int = 1024) -> float:
  """Of the fastest of a few products of two square matrices."""
  a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def fastest_dtype() -> torch.dtype:
  """float32 or bfloat16, whichever multiplies matrices faster here."""
  return min((torch.float32, torch.bfloat16), key=matmul_seconds)


def print_result(dtype: torch.dtype, seconds: list[float]) -> None:
  """One JSON object on standard output."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  name = str(dtype).removeprefix('torch.')
  print(json.dumps({'dtype': name, 'seconds': seconds, 'peak_bytes': peak}))
