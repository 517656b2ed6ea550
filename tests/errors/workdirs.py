"""The files of a finished run, to be bent: `report` and `export` read them."""

from collections.abc import Iterator
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lorapr_jax.cli.main import main
from lorapr_jax.errors import UserError
from lorapr_jax.exporting.routes import Route
from lorapr_jax.exporting.sources import export
from lorapr_jax.settings.files import read_config
from lorapr_jax.settings.run import split_config
from tests.errors.bend import Bent, bent_bytes, bent_json
from tests.errors.survive import Kind

_SHARE = {'target': 0.5, 'achieved': 0.5}
_SHARES = {'heads': _SHARE, 'channels': _SHARE, 'params': _SHARE}
_PAIR = {'dense': 4.0, 'pruned': 2}
_MEASURED = {'value': 9.5, 'data': 'file:a.txt', 'seq_len': 32, 'windows': 8}
SUMMARY = {
  'model': 'MODEL',
  'base': {'name': 'MODEL', 'sha256': None},
  'params_dense': 400,
  'params_pruned': 200,
  'bytes': _PAIR,
  'flops_per_token': {**_PAIR, 'seq_len': 32},
  'kv_cache_bytes_per_token': _PAIR,
  'sparsity': _SHARES,
  'perplexity': {'dense': _MEASURED, 'cut': _MEASURED, 'pruned': _MEASURED},
  'latency': {**_PAIR, 'batch_size': 1, 'seq_len': 32},
  'generations': [{'prompt': 'word', 'dense': 'word', 'pruned': 'word'}],
  'seconds': {'data': 1.5, 'prune': 2},
  'tokens_per_second': 9.5,
  'peak_memory_bytes': 10**9,
  'warnings': ['a warning'],
  'exports': {
    'hf': {
      'path': 'RUN/export',
      'layout': 'uniform',
      'dtype': 'float32',
      'max_logit_difference': 0.0,
    }
  },
  'versions': {'python': '3.13'},
  'command': 'train.py --config=tiny',
}
PRUNING = {
  'base': {
    'name': 'MODEL',
    'sha256': None,
    'config': {
      'num_hidden_layers': 2,
      'num_attention_heads': 4,
      'num_key_value_heads': 2,
      'intermediate_size': 8,
    },
  },
  'sparsity': _SHARES,
  'kept': [
    {'kv_heads,queries_per_kv': [[0], [1]], 'mlp': [0, 2, 3, 7]},
    {'kv_heads,queries_per_kv': [[0, 1], [0, 1]], 'mlp': [*range(8)]},
  ],
}
RECORD = {
  'step': 0,
  'loss': 2.5,
  'heads_sparsity': 0.5,
  'channels_sparsity': 0.5,
  'params_kept': 0.5,
  'perplexity': 9.5,
}
GROUP = 'layers.0.mlp'
SCORES = {
  f'{GROUP}.importance': np.arange(8, dtype=np.float32),
  f'{GROUP}.mask': np.asarray([1, 0, 1, 1, 0, 0, 0, 1], np.float32),
}


def _make(name: str):
  def make(folder: Path) -> Path:
    settings = split_config(config := read_config('tiny'))
    run = {'config': config.to_dict(), 'resolved': settings.resolved()}
    files = {
      'run.json': json.dumps(run | {'inputs': {}}),
      'summary.json': json.dumps(SUMMARY),
      'metrics.jsonl': json.dumps(RECORD) + '\n',
      'export/pruning.json': json.dumps(PRUNING),
    }
    (folder / 'RUN' / 'export').mkdir(parents=True)
    for path, text in files.items():
      (folder / 'RUN' / path).write_text(text)
    (folder / 'RUN' / 'importance.safetensors').write_bytes(save(SCORES))
    return folder / 'RUN' / name

  return make


def _line(good: bytes) -> Iterator[Bent]:
  """A line of metrics.jsonl is bent, behind a good one."""
  for did, content in bent_json(json.loads(good), 40):
    yield Bent(did, good + content + b'\n')


def _scores(good: bytes) -> Iterator[Bent]:
  """The header is bent, or there are other tensors."""
  header = 8 + int.from_bytes(good[:8], 'little')
  for did, content in bent_bytes(good[:header], 40):
    yield Bent(did, content + good[header:])
  importance, mask = SCORES.values()
  for did, tensors in {
    'no mask': {'importance': importance},
    'a smaller mask': {'importance': importance, 'mask': mask[:4]},
    'a mask with an axis more': {'importance': importance, 'mask': mask[None]},
    'no axis': {'importance': importance[0], 'mask': mask[0]},
    'nothing': {'importance': importance[:0], 'mask': mask[:0]},
    **{
      dtype: {'importance': importance.astype(dtype), 'mask': mask}
      for dtype in ('float64', 'float16', 'int32', 'uint8', 'bool')
    },
  }.items():
    named = {f'{GROUP}.{x}': np.array(value) for x, value in tensors.items()}
    yield Bent(did, save(named))
  for name in ('mlp', 'layers.0', 'layers.x.mlp', 'layers.0.heads', 'a.1.mlp'):
    named = {f'{name}.importance': importance, f'{name}.mask': mask}
    yield Bent(name, save(named))


def _report(_: Path) -> int:
  return main(['report', 'RUN', '--out', 'PAGE.html'])


def _export(folder: Path) -> None:
  """Exports; all that is missing is a checkpoint."""
  route = Route('hf', folder / 'OUT')
  with pytest.raises(UserError) as caught:
    export(Path('RUN'), route)
  if 'holds no checkpoint' not in str(caught.value):
    raise caught.value


KINDS = {
  'summary.json': Kind(
    make=_make('summary.json'),
    bend=lambda good: bent_json(json.loads(good), 40),
    read=_report,
    accepts=frozenset(
      {
        'latency.pruned is 32.0',
        'latency.dense is 2**31',
        'bytes.pruned is 2.5',
        'bytes.pruned is 2**31',
        'exports.hf.layout is text with escapes',
        'perplexity.dense.value is 10**18',
        'warnings.0 is text',
        'sparsity.heads.target is null',
      }
    ),
  ),
  'pruning.json': Kind(
    make=_make('export/pruning.json'),
    bend=lambda good: bent_json(json.loads(good), 40),
    read=_report,
    accepts=frozenset({'kept.1 is null'}),  # The layer is gone.
  ),
  'metrics.jsonl': Kind(
    make=_make('metrics.jsonl'),
    bend=_line,
    read=_report,
    accepts=frozenset(
      {
        'channels_sparsity is 0',
        'perplexity is 2.5',
        'step is 0',
        'perplexity is NaN',
        'loss is 2**31',
        'params_kept is 0',
      }
    ),
  ),
  'importance.safetensors': Kind(
    make=_make('importance.safetensors'), bend=_scores, read=_report
  ),
  'run.json': Kind(
    make=_make('run.json'),
    bend=lambda good: bent_json(json.loads(good), 40),
    read=_export,
    # Of what an export does not ask for.
    accepts=(
      'config.model.remat *',
      'config.recover*',
      'config.report.*',
      'config.train.*',
      'resolved.matmul_dtype *',
    ),
  ),
}
