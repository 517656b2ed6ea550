"""The command report: one run, several, and mistakes."""

import json

import pytest

from lorapr_jax.cli.main import main


def change_summary(workdir, change):
  path = workdir / 'summary.json'
  summary = json.loads(path.read_text())
  change(summary)
  path.write_text(json.dumps(summary))


def error_of(capsys, *argv):
  assert main(['report', *map(str, argv)]) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1
  return err


def test_one_run_prints_its_table_and_leaves_its_page(workdir, capsys):
  page = workdir / 'report.html'
  page.write_text('mine')
  assert main(['report', str(workdir)]) == 0
  out = capsys.readouterr().out
  assert 'parameters' in out and 'heads removed: 50.00%' in out
  assert f'report: {page}' in out
  assert page.read_text() == 'mine'


def test_a_page_that_is_absent_is_written(workdir, capsys):
  page = workdir / 'report.html'
  page.unlink()
  assert main(['report', str(workdir)]) == 0
  assert page.read_text(encoding='utf-8').startswith('<!DOCTYPE html>')


def test_one_run_as_json_is_one_object(workdir, capsys, tmp_path):
  out = tmp_path / 'page.html'
  assert main(['report', str(workdir), '--out', str(out), '--json']) == 0
  report = json.loads(capsys.readouterr().out)
  assert report['report'] == str(out) and out.exists()
  (run,) = report['runs']
  assert run['heads_removed'] == 0.5 and run['params_pruned'] == 109120
  assert report['warnings'] == []


def test_several_runs_are_a_table_and_a_page(
  finished_run, workdir, capsys, tmp_path
):
  def change(summary):
    summary['params_pruned'] = 150_000
    for measured in summary['perplexity'].values():
      measured['data'] = 'file:other.txt'

  change_summary(workdir, change)
  out = tmp_path / 'comparison.html'
  arguments = ['report', str(finished_run), str(workdir)]
  assert main([*arguments, '--out', str(out)]) == 0
  printed = capsys.readouterr().out
  assert '150,000' in printed and '109,120' in printed
  assert 'warning: perplexities do not compare, other data' in printed
  assert 'file:other.txt' in printed
  assert 'file:other.txt' in out.read_text(encoding='utf-8')
  assert main([*arguments, '--json']) == 0
  report = json.loads(capsys.readouterr().out)
  assert report['report'] is None
  assert len(report['runs']) == 2 and len(report['warnings']) == 1
  # Two folders of one name are told apart.
  assert {run['name'] for run in report['runs']} == {
    str(finished_run),
    str(workdir),
  }


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    (lambda p: p.update(data='x'), 'other data'),
    (lambda p: p.update(seq_len=9), 'another length'),
    (lambda p: p.update(windows=9), 'other windows'),
  ],
)
def test_perplexities_that_do_not_compare(
  finished_run, workdir, capsys, change, reason
):
  change_summary(workdir, lambda s: change(s['perplexity']['pruned']))
  assert main(['report', str(finished_run), str(workdir), '--json']) == 0
  (warning,) = json.loads(capsys.readouterr().out)['warnings']
  assert reason in warning


def test_another_base_and_no_perplexity_are_said(finished_run, workdir, capsys):
  base = {'name': 'b', 'sha256': 'ab' * 32}
  change_summary(workdir, lambda s: s.update(base=base))
  arguments = ['report', str(finished_run), str(workdir), '--json']
  assert main(arguments) == 0
  (warning,) = json.loads(capsys.readouterr().out)['warnings']
  assert 'another base' in warning and 'abababababab' in warning
  change_summary(workdir, lambda s: s.update(perplexity={}))
  assert main(arguments) == 0
  (warning,) = json.loads(capsys.readouterr().out)['warnings']
  assert warning == f'{workdir} has no perplexity'


def test_a_run_that_is_not_finished_says_how_far_it_is(workdir, capsys):
  (workdir / 'summary.json').unlink()
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  # A line cut short by a kill, after six whole ones.
  text = '\n'.join(lines[:6]) + '\n{"step": 6, "lo'
  (workdir / 'metrics.jsonl').write_text(text)
  assert 'step 6 of 12 is logged' in error_of(capsys, workdir)
  (workdir / 'metrics.jsonl').unlink()
  assert 'step 0 of 12 is logged' in error_of(capsys, workdir)


def test_what_is_no_run(tmp_path, capsys):
  assert 'does not exist' in error_of(capsys, tmp_path / 'absent')
  assert 'holds no run' in error_of(capsys, tmp_path)
  assert 'required: DIR' in error_of(capsys)


def test_an_out_that_cannot_be(workdir, capsys, tmp_path):
  (tmp_path / 'old.html').write_text('mine')
  assert 'old.html exists' in error_of(
    capsys, workdir, '--out', tmp_path / 'old.html'
  )
  assert (tmp_path / 'old.html').read_text() == 'mine'
  assert 'its folder does not exist' in error_of(
    capsys, workdir, '--out', tmp_path / 'no' / 'page.html'
  )
