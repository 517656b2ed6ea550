"""The page: complete, self-contained, and safe with what others wrote."""

import html.parser
import json
import re
import shlex

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.report import units
from lorapr_jax.report.page import render_comparison, render_report

_VOID = {'br', 'col', 'hr', 'img', 'input', 'link', 'meta'}


class Page(html.parser.HTMLParser):
  """Reads a page; fails where a tag is not closed in its order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.attributes, self.pieces = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  @property
  def text(self):
    return re.sub(r'\s+', ' ', ' '.join(self.pieces))

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attributes += [(tag, *pair) for pair in attrs]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] not in ('style', 'script'):
      self.pieces.append(data)


def change_summary(workdir, change):
  path = workdir / 'summary.json'
  summary = json.loads(path.read_text())
  change(summary)
  path.write_text(json.dumps(summary))


def check_alone(text):
  """The page asks for nothing but itself, and its ids are its own."""
  page = Page(text)
  for tag, name, value in page.attributes:
    if name in ('src', 'href', 'srcset', 'action', 'data'):
      assert value.startswith('#') or value == 'data:,', (tag, name, value)
    assert not name.startswith('on')
  assert '@import' not in text and 'http-equiv' not in text
  assert all(url.startswith('#') for url in re.findall(r'url\(([^)]*)', text))
  assert '<script' not in text
  ids = [value for _, name, value in page.attributes if name == 'id']
  assert len(ids) == len(set(ids))
  return page


def test_the_page_holds_every_number(finished_run):
  text = render_report(finished_run)
  page = check_alone(text)
  summary = json.loads((finished_run / 'summary.json').read_text())
  perplexity, latency = summary['perplexity'], summary['latency']
  flops = summary['flops_per_token']
  cache = summary['kv_cache_bytes_per_token']
  expected = [
    'random weights, pruned',
    f'{summary["params_dense"]:,}',
    f'{summary["params_pruned"]:,}',
    '−33.6%',
    'heads 50.00% 50.00%',
    'channels 50.00% 50.00%',
    'parameters – 33.63%',
    f'{perplexity["dense"]["value"]:.2f}',
    f'{perplexity["pruned"]["value"]:.2f}',
    'synthetic:1?windows=32, 32 windows of 32 tokens',
    *('658 kB', '436 kB'),
    *(units.operations(flops[name]) for name in ('dense', 'pruned')),
    *(units.size(cache[name]) for name in ('dense', 'pruned')),
    'forward, at 32 tokens of context',
    units.milliseconds(latency['dense']),
    'prefill of 1 x 128 tokens',
    *('Once', 'upon a time', 'in a while'),
    'Warnings None.',
    f'{summary["tokens_per_second"]:,.0f} tokens a second',
    f'{units.size(summary["peak_memory_bytes"])} of memory',
    'its logits are the same',
    'trust_remote_code=True',
    f'llama-cli -m {shlex.quote(summary["exports"]["gguf"]["path"])}',
    summary['versions']['jax'],
    '"hidden_size": 64',
    '0 to 2: KV heads 2 4 50.00%',
    '3: channels 128 128 100.00%',
    'All that were cut lie below it.',
  ]
  for phase, seconds in summary['seconds'].items():
    expected.append(f'{phase} {units.duration(seconds)}')
  for piece in expected:
    assert piece in page.text, piece
  # Three curves, two maps, and two figures of importance for each kind.
  assert text.count('<svg') == 9


def test_a_difference_after_reading_back_is_said(workdir):
  def change(summary):
    summary['exports']['hf']['max_logit_difference'] = 0.00123

  change_summary(workdir, change)
  assert 'differ by at most 1.2e-03' in Page(render_report(workdir)).text


def test_the_run_wrote_a_page(finished_run):
  text = (finished_run / 'report.html').read_text(encoding='utf-8')
  assert 'random weights, pruned' in check_alone(text).text


def test_equal_files_give_an_equal_page(finished_run):
  assert render_report(finished_run) == render_report(finished_run)


def test_what_others_wrote_is_shown_and_not_run(workdir):
  evil = '</p><script>alert(1)</script><img src=x onerror=y> & "quoted"'
  sample = {'prompt': evil, 'dense': evil, 'pruned': evil}

  def change(summary):
    summary['model'] = evil
    summary['generations'] = [sample]
    summary['warnings'] = [evil]
    summary['base'] = {'name': evil, 'sha256': evil}
    summary['command'] = f'train.py {units.__name__} "{evil[:20]}"'
    summary['exports']['hf']['path'] = evil
    for measured in summary['perplexity'].values():
      measured['data'] = evil

  change_summary(workdir, change)
  for text in (render_report(workdir), render_comparison([workdir, workdir])):
    page = check_alone(text)
    assert '<script>alert(1)</script>' in page.text
    assert not [name for _, name, _ in page.attributes if name == 'onerror']


def test_sizes_on_the_way_are_a_table_a_curve_and_samples(workdir):
  def change(summary):
    as_it_was = 'bytes', 'kv_cache_bytes_per_token', 'exports'
    summary['rungs'] = [
      {
        **{'share': share, 'steps': 6, 'params_pruned': 123456 - i},
        **{key: summary[key] for key in as_it_was},
        'perplexity': {
          'pruned': {**summary['perplexity']['pruned'], 'value': 321.5 + i}
        },
        'generations': [{'prompt': 'Once', 'pruned': f' at size {share}'}],
      }
      for i, share in enumerate((0.9, 0.8))
    ]

  assert 'Sizes on the way' not in render_report(workdir)
  change_summary(workdir, change)
  page = check_alone(render_report(workdir))
  for piece in (
    *('Sizes on the way', '123,456', '123,455', '321.50', '322.50'),
    *('at size 0.9', 'at size 0.8', ' in a while'),
  ):
    assert piece in page.text, piece
  assert ('svg', 'aria-label', 'Perplexity against parameters kept') in [
    attribute for attribute in page.attributes if attribute[0] == 'svg'
  ]
  change_summary(workdir, lambda x: x['rungs'][1].update(perplexity={}))
  with pytest.raises(UserError, match=r'rungs\.perplexity'):
    render_report(workdir)


def test_a_page_says_what_is_not_there(workdir):
  (workdir / 'importance.safetensors').unlink()
  (workdir / 'metrics.jsonl').write_text('')
  (workdir / 'export' / 'pruning.json').unlink()

  def change(summary):
    summary['perplexity'] = {}
    summary['generations'] = []

  change_summary(workdir, change)
  page = check_alone(render_report(workdir))
  for piece in (
    'perplexity was not measured and',
    'No perplexity was measured',
    'metrics.jsonl is not there or empty',
    'export/pruning.json is not there',
    'importance.safetensors is not there',
    'The run holds no generations.',
  ):
    assert piece in page.text, piece


def test_a_run_without_steps_that_prune_has_no_map(workdir):
  (workdir / 'importance.safetensors').unlink()
  path = workdir / 'export' / 'pruning.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'kept': []}))

  def change(summary):
    summary['params_pruned'] = summary['params_dense']

  change_summary(workdir, change)
  text = check_alone(render_report(workdir)).text
  assert 'No parameters were removed' in text
  assert 'Nothing was pruned.' in text


def test_warnings_are_listed_and_what_is_not_finite_is_one(workdir):
  def change(summary):
    summary['warnings'] = ['tokens were dropped']
    summary['perplexity']['pruned']['value'] = float('inf')

  change_summary(workdir, change)
  text = Page(render_report(workdir)).text
  assert 'tokens were dropped' in text
  assert 'the perplexity of the pruned model is not finite' in text


@pytest.mark.parametrize('kept', [[[0], [1]], [[1], [1]]])
def test_query_heads_are_counted_over_all_kv_heads(workdir, kept):
  (workdir / 'importance.safetensors').unlink()
  group = 'kv_heads,queries_per_kv'
  path = workdir / 'export' / 'pruning.json'
  pruning = json.loads(path.read_text())
  pruning['base']['config'] = {
    'num_hidden_layers': 2,
    'num_key_value_heads': 2,
    'num_attention_heads': 4,
    'intermediate_size': 8,
  }
  pruning['kept'] = [{group: kept}, {group: [[0, 1], [0, 1]]}]
  path.write_text(json.dumps(pruning))
  text = Page(render_report(workdir)).text
  assert '0: query heads 2 4 50.00%' in text
  assert '1: query heads 4 4 100.00%' in text


def test_a_comparison_holds_its_runs(finished_run, workdir):
  def change(summary):
    summary['params_pruned'] = 150_000
    for measured in summary['perplexity'].values():
      measured['seq_len'] = 64

  change_summary(workdir, change)
  page = check_alone(render_comparison([finished_run, workdir]))
  assert '150,000' in page.text
  assert 'another length: 32 (' in page.text
  assert 'perplexities do not compare, another length' in page.text


def test_runs_that_compare_are_said_to(finished_run, workdir):
  text = Page(render_comparison([finished_run, workdir])).text
  assert 'measured on the same text in the same way' in text


@pytest.mark.parametrize(
  ('name', 'contents', 'message'),
  [
    (
      'summary.json',
      '{"model": "x"}',
      'is none of ours: it has no base',
    ),
    ('summary.json', '{"mod', 'is not JSON'),
    ('metrics.jsonl', '{"step": 1, "lo\n', 'a line that is not JSON'),
    ('importance.safetensors', 'short', 'cannot be read'),
    ('export/pruning.json', '[]', 'holds no JSON object'),
  ],
)
def test_a_damaged_file_is_named(workdir, name, contents, message):
  (workdir / name).write_text(contents)
  with pytest.raises(UserError, match=message) as error:
    render_report(workdir)
  assert name in str(error.value)


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (0, '0 B'),
    (999, '999 B'),
    (1000, '1.00 kB'),
    (538_060_032, '538 MB'),
    (94.2e6, '94.2 MB'),
    (140e15, '140 PB'),
  ],
)
def test_sizes(value, text):
  assert units.size(value) == text


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (0.64, '0.6 s'),
    (42.2, '42 s'),
    (387.7, '6 min 28 s'),
    (7505, '2 h 5 min'),
  ],
)
def test_durations(value, text):
  assert units.duration(value) == text


def test_changes():
  assert units.change(100, 70.1) == '−29.9%'
  assert units.change(100, 268.5) == '+168.5%'
  assert units.change(7, 7) == '0%'
  assert units.change(1e6, 1e6 - 1) == '+0.0%'
  assert units.change(0, 7) == units.change(7, float('nan')) == '–'
