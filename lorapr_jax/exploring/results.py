"""What was measured, in a folder: a line for each size, so that it goes on."""

import json
from pathlib import Path
from typing import Any

from lorapr_jax.exploring.ways import Size
from lorapr_jax.report.run import PERPLEXITY, read_lines
from lorapr_jax.runtime.files import write_text
from lorapr_jax.runtime.forms import (
  INDEX,
  NUMBER,
  POSITIVE,
  SHARE,
  TEXT,
  Maybe,
)

SIZES_FILE, RESULT_FILE, PAGE_FILE = (
  *('explored.jsonl', 'explored.json', 'explored.html'),
)
_TIME = {'seconds': POSITIVE, 'dense': POSITIVE, 'speedup': POSITIVE}
_LINE = {
  'way': TEXT,
  'share': SHARE,
  'asked': TEXT,
  'perplexity': PERPLEXITY,
  'repair': {},
  'latency': Maybe({'prefill': _TIME, 'decode': _TIME}),
  'gone': [INDEX],
  'seconds': NUMBER,
}

Results = dict[Size, dict[str, Any]]


def read_results(folder: Path) -> Results:
  """What a folder holds; {} of a new one.

  Raises:
    UserError: if a line is damaged.
  """
  lines = read_lines(folder / SIZES_FILE, _LINE)
  return {Size(*(line[key] for key in Size._fields)): line for line in lines}


def write_results(folder: Path, results: Results) -> None:
  """Writes a line for each size. The old file stays until it is complete."""
  lines = (json.dumps(line) + '\n' for line in results.values())
  write_text(folder / SIZES_FILE, ''.join(lines))
