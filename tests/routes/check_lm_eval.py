"""Folders in lm-eval's model `hf`, on a task of our own.

  .venvs/lm_eval/bin/python tests/routes/check_lm_eval.py FOLDER

FOLDER is what make_exports.py has written.
"""

import json
from pathlib import Path
import tempfile

from checks import Export, Results, Truth, distance, exports, folder_argument
import lm_eval
from lm_eval.tasks import TaskManager
import numpy as np

_TASK = 'continuations'
_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
"""
# Nats, of a whole continuation.
_TOLERANCE = 1e-3


def main() -> None:
  """Every folder."""
  folder = folder_argument()
  results = Results(folder, 'lm_eval')
  for export, truth in exports(folder, 'hf'):
    check_folder(export, truth, results)


def check_folder(export: Export, truth: Truth, results: Results) -> None:
  """The log-likelihood of every continuation."""
  with tempfile.TemporaryDirectory() as temporary:
    theirs = log_likelihoods(export, truth, Path(temporary))
  ours = np.array([c['log_likelihood'] for c in truth.continuations])
  results.add(export, 'log-likelihoods', distance(ours, theirs), _TOLERANCE)


def log_likelihoods(export: Export, truth: Truth, folder: Path) -> np.ndarray:
  """Of every continuation, in nats, by lm-eval."""
  data = folder / 'continuations.jsonl'
  data.write_text(''.join(json.dumps(c) + '\n' for c in truth.continuations))
  (folder / 'task.yaml').write_text(_YAML.format(task=_TASK, data=data))
  result = lm_eval.simple_evaluate(
    model='hf',
    model_args={
      'pretrained': export.path,
      'dtype': 'float32',
      'trust_remote_code': export.remote_code,
    },
    tasks=[_TASK],
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    device='cpu',
    batch_size=4,
    bootstrap_iters=0,
  )
  samples = sorted(result['samples'][_TASK], key=lambda s: s['doc_id'])
  return np.array([sample['filtered_resps'][0][0] for sample in samples])


if __name__ == '__main__':
  main()
