"""What a device is called, and what Linux says of the processor."""

import os
from pathlib import Path
import platform
import re
from typing import Any


def cpuinfo(field: str) -> str:
  """What Linux says of the first processor under this name; '' elsewhere."""
  try:
    text = Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except FileNotFoundError:
    return ''
  found = re.search(rf'^{field}\s*:\s*(.*)$', text, re.MULTILINE)
  return found[1] if found else ''


def processor() -> str:
  """The processor's name."""
  return cpuinfo('model name') or platform.processor() or platform.machine()


def describe(device: Any) -> str:
  """A device's kind: NVIDIA H200; of a CPU its name, and the cores in use."""
  if device.platform != 'cpu':
    return device.device_kind
  linux = hasattr(os, 'sched_getaffinity')
  cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count()
  return f'{cores} cores of {processor()}'
