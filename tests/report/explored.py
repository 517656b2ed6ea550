"""The result of an exploration, with figures that were made up."""

from lorapr_jax.exploring.ways import WAYS


def _row(name, share, perplexity, size, times=None):
  way = name.partition(' ')[0]
  is_size = way in WAYS
  return {
    'name': name,
    'way': way,
    'share': share,
    'settings': {'target': round(1 - share, 9)} if is_size else None,
    'gone': [5, 3] if way == 'depth' else [],
    'kept_by_depth': {'mlp': [(round(1536 * share), 26)]} if is_size else None,
    'parameters': round(134_515_008 * share),
    'bytes': size,
    'kv_cache_bytes': round(188_743_680 * share),
    'perplexity': {'value': perplexity},
    'repair': {},
    'latency': times,
    'seconds': 98.7,
  }


def _times(seconds, **more):
  return {
    'prefill': {'seconds': seconds, **more},
    'decode': {'seconds': seconds / 10, **more},
  }


RESULT = {
  'model': 'smollm2-135m-instruct',
  'dtype': 'float32',
  'context': 4096,
  'measured_on': {'data': 'file:heldout.txt', 'seq_len': 128, 'windows': 80},
  'repaired_on': {'data': 'file:corpus.jsonl', 'tokens': 16384},
  'timed_on': {'device': 'cpu', 'prompt_tokens': 128, 'new_tokens': 32},
  'left_out': ['both 0.9'],
  'rows': [
    _row('dense', 1.0, 37.3, 538_060_032, _times(0.431)),
    _row('int8', 1.0, 37.4, 220_000_000),
    _row('int4', 1.0, 52.7, 173_000_000),
    _row('width 0.8', 0.8, 49.9, 430_000_000, _times(0.35, speedup=1.2)),
    _row('width 0.6', 0.6, 180.5, 322_000_000, _times(0.25, speedup=1.7)),
    _row('depth 0.6', 0.59, 90.5, 320_000_000, _times(0.24, speedup=1.8)),
    _row('width 0.5', 0.5, float('inf'), 269_000_000, _times(0.2, speedup=2.0)),
  ],
  'verdict': 'Quantising alone is better than width 0.8 and width 0.6.',
  'chosen': 'width 0.8',
  'command': 'python train.py --config=default '
  '--config.model.path=models/smollm2-135m-instruct '
  '--config.data.train=file:corpus.jsonl --config.data.eval=file:heldout.txt '
  '--workdir=runs/smollm2-135m-instruct-pruned --config.prune.unit=params '
  '--config.prune.target=0.2',
  'seconds': 592.2,
}
