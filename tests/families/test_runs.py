"""Whole runs, by pairwise cover of what models have and what runs do.

In `make test-families` every feature is met with every setting, and every two
settings. `make test` has test_glm4.py, and cheaper tests of each feature.
"""

import json
import random

import numpy as np
import pytest
import torch
import transformers

from configs import tiny
from lorapr_jax import train
from lorapr_jax.hf.load import load_config
from lorapr_jax.models import decoder
from lorapr_jax.pruning.importance import CRITERIA
from tests.families.cover import GROUPED, pairs
from tests.kinds import KINDS, save

SETTINGS = {
  'prune.heads': ('kv_groups', 'queries'),
  'prune.criterion': tuple(CRITERIA),
  'prune.order': ('joint', 'prune_then_tune', 'none'),
  'prune.compensate': ('ridge', 'none'),
  'prune.shrink': ('end', '0.5'),
  'prune.protect': ('none', 'reference'),
  'train.distill': ('0', '0.5'),
  'model.base_dtype': ('float32', 'bfloat16', 'int8'),
  'data.packing': ('documents', 'concatenate'),
  'recover.steps': ('0', '2'),
}
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 32))


# Of each kind.
HAS = {kind: set(KINDS[kind].features) for kind in GROUPED}


def _settings(case):
  return dict(setting.split('=') for setting in case[1:])


def _is_run(case):
  """Whether a run takes these settings together."""
  of = _settings(case)
  joint, trained = of['prune.order'] == 'joint', of['prune.order'] != 'none'
  exact = of['model.base_dtype'] != 'int8'
  return (
    (joint or of['prune.shrink'] == 'end')
    and (trained or (of['train.distill'], of['recover.steps']) == ('0', '0'))
    and (exact or of['prune.criterion'] != 'gradient')
    and (of['prune.shrink'] == 'end' or of['prune.criterion'] != 'random')
  )


def _draw(rng, wanted):
  """A run that has what is wanted: (kind, setting=value, ...)."""
  kinds = [
    kind
    for kind, has in HAS.items()
    if wanted & (has | {KINDS[kind].keys['model_type']})
  ]
  while True:
    case = [rng.choice(kinds or list(HAS))]
    for key, values in SETTINGS.items():
      texts = [f'{key}={value}' for value in values]
      case.append(next((x for x in texts if x in wanted), rng.choice(texts)))
    if _is_run(case):
      return tuple(case)


def _pairs(case):
  kind, *settings = case
  family = frozenset((KINDS[kind].keys['model_type'],))
  return pairs(HAS[kind], *([x] for x in settings)) | {family}


def _runs():
  """Runs of every family, in which every two things meet that can."""
  rng = random.Random(0)
  left = pairs(
    set().union(*HAS.values()),
    *([f'{key}={v}' for v in values] for key, values in SETTINGS.items()),
  )
  left = {pair for pair in left if _can_meet(pair)}
  left |= {frozenset((KINDS[kind].keys['model_type'],)) for kind in HAS}
  found = []
  while left:
    wanted = rng.choice(sorted(left, key=sorted))
    drawn = [_draw(rng, wanted) for _ in range(30)]
    found.append(max(drawn, key=lambda case: len(_pairs(case) & left)))
    left -= _pairs(found[-1])
  return found


def _can_meet(pair):
  """Whether a run can have both; all other settings are the first ones."""
  case = [
    next(
      (x for x in (f'{key}={v}' for v in values) if x in pair),
      f'{key}={values[0]}',
    )
    for key, values in SETTINGS.items()
  ]
  return _is_run(['', *case])


RUNS = _runs()


@pytest.mark.families
@pytest.mark.parametrize('case', RUNS, ids=lambda case: case[0])
def test_a_run_prunes_as_asked_and_transformers_loads_it(
  case, add_tokenizer, load, tmp_path
):
  base, workdir, text = (tmp_path / name for name in ('base', 'run', 'a.txt'))
  sizes = {'vocab_size': 320, 'max_position_embeddings': 128}
  save(KINDS[case[0]].keys | sizes, base)
  add_tokenizer(base)
  text.write_text('the quick brown fox jumps over the lazy dog\n\n' * 300)
  config = tiny.get_config()
  config.model.path, config.model.sizes = str(base), {}
  config.data.train, config.data.eval = f'file:{text}', ''
  config.report.prompts = ()
  train_settings = {'steps': 6, 'batch_size': 4, 'micro_batch_size': 4}
  config.train.update(train_settings)
  config.prune.every = config.prune.calibration_steps = 2
  config.mesh.fsdp = 1
  for name, value in _settings(case).items():
    section, key = name.split('.')
    config[section][key] = type(config[section][key])(value)
  summary = train.run(config, workdir)
  for kind in ('heads', 'channels'):
    assert summary['sparsity'][kind]['achieved'] == pytest.approx(0.5, abs=0.05)
  out = workdir / 'export'
  model = transformers.AutoModelForCausalLM.from_pretrained(
    out,
    dtype=torch.float32,
    trust_remote_code=not load_config(out).is_uniform,
    attn_implementation='eager',
  )
  with torch.no_grad():
    found = model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
  small, params = load(out)
  hidden = decoder.hidden_states(params, TOKENS, small)
  expected = np.asarray(decoder.logits(params, hidden, small))
  bound = 1e-4 * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert all(np.isfinite(json.loads(line)['loss']) for line in lines)
