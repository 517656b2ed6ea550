"""The files of a workdir that a run which goes on reads."""

import json

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.workdir import (
  METRICS_FILE,
  claim_workdir,
  trim_metrics,
)

RECORDS = [{'step': i, 'tokens_per_second': 9.5} for i in range(3)]


@pytest.mark.parametrize('cut', [b'', b'{"step": 9', b'\xff\xff', b'[' * 10**5])
def test_what_is_logged_later_is_removed(tmp_path, cut):
  lines = [json.dumps(record).encode() + b'\n' for record in RECORDS]
  path = tmp_path / METRICS_FILE
  path.write_bytes(b''.join(lines) + cut)
  trim_metrics(tmp_path, 9)
  assert path.read_bytes() == b''.join(lines)
  trim_metrics(tmp_path, 2)
  assert path.read_bytes() == b''.join(lines[:2])


@pytest.mark.parametrize(
  'line', ['3', '[]', '{}', '{"step": "2"}', '{"step": 2}', '{"step": NaN}']
)
def test_a_line_that_was_edited_is_named(tmp_path, line):
  content = f'{json.dumps(RECORDS[0])}\n{line}\n'
  (tmp_path / METRICS_FILE).write_text(content)
  with pytest.raises(UserError, match=r'metrics.jsonl.* line 2'):
    trim_metrics(tmp_path, 9)
  assert (tmp_path / METRICS_FILE).read_text() == content


def test_a_run_of_an_earlier_version_is_told_from_one_with_other_inputs(
  tmp_path,
):
  inputs = {'sha256': 'ab', 'files': {}, 'data': {'file:a.txt': 'cd'}}
  claim_workdir(tmp_path, {'config': {}}, inputs)
  claim_workdir(tmp_path, {'config': {}}, inputs)
  with pytest.raises(UserError, match='begun with other contents of file:a.t'):
    claim_workdir(tmp_path, {}, inputs | {'data': {'file:a.txt': 'ef'}})
  (tmp_path / 'run.json').write_text('{"config": {}}')
  with pytest.raises(UserError, match='has no hashes of what its run reads'):
    claim_workdir(tmp_path, {}, inputs)
