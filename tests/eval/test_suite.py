"""The papers' suite: transformers' perplexity of the same windows."""

import json
import math

import datasets
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import torch
import transformers

from lorapr_jax.cli.main import main
from lorapr_jax.data.hub import parse_hub
from lorapr_jax.eval.perplexity import HeldOut
from lorapr_jax.eval.suite import PAPER_TEXTS
from lorapr_jax.hf.load import load
from lorapr_jax.models.compute import Compute
from lorapr_jax.runtime import sharding

SENTENCES = (
  'The quick brown fox jumps over the lazy dog .',
  'And the other one , as old as the news , is still asleep .',
  'Rain fell on the town all day ; nobody <unk> minded .',
)


@pytest.fixture(scope='module')
def rows():
  """As WikiText2 has them: with line ends, and some empty."""
  rng = np.random.default_rng(0)
  return [
    '' if i % 3 == 0 else f' {SENTENCES[rng.integers(3)]} {i} \n'
    for i in range(120)
  ]


@pytest.fixture(scope='module')
def specs(rows, tmp_path_factory):
  """A data set of rows, and a file with a sentence a line."""
  folder = tmp_path_factory.mktemp('texts')
  data = datasets.DatasetDict(
    {'test': datasets.Dataset.from_dict({'text': rows})}
  )
  data.save_to_disk(folder / 'wiki')
  (folder / 'ptb.txt').write_text(
    '\n'.join(f' {SENTENCES[i % 3]} {i} ' for i in range(60)) + '\n'
  )
  return {
    'wikitext2': f'hf:{folder}/wiki:test',
    'ptb': f'file:{folder}/ptb.txt?lines',
  }


@pytest.fixture(scope='module')
def texts(rows):
  """What the protocol makes of them."""
  lines = [f'{SENTENCES[i % 3]} {i}' for i in range(60)]
  return {'wikitext2': '\n\n'.join(rows), 'ptb': '\n\n'.join(lines)}


def windows_of(folder, text, length):
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer(text)['input_ids']
  count = len(ids) // length
  return np.array(ids[: count * length]).reshape(count, length)


def torch_perplexity(folder, windows):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  tokens = torch.tensor(windows)
  with torch.no_grad():
    log_p = model(tokens).logits[:, :-1].double().log_softmax(-1)
  return math.exp(-log_p.gather(-1, tokens[:, 1:, None]).mean().item())


def run(text_model, specs, *more):
  flags = [f'--{name}={spec}' for name, spec in specs.items()]
  argv = ['evaluate', '--model', str(text_model), '--suite', 'paper', *flags]
  return main([*argv, *more])


def test_every_text_at_every_length_is_transformers(
  capsys, text_model, specs, texts
):
  assert run(text_model, specs, '--json') == 0
  out, err = capsys.readouterr()
  report = json.loads(out)
  tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
  found = [(r['name'], r['seq_len']) for r in report['results']]
  assert found == [(name, n) for name in specs for n in (128, 512)]
  for result in report['results']:
    windows = windows_of(text_model, texts[result['name']], result['seq_len'])
    assert result['windows'] == len(windows)
    assert result['perplexity'] == pytest.approx(
      torch_perplexity(text_model, windows), rel=1e-3
    )
    assert result['data'] == specs[result['name']]
    assert result['tokens_per_second'] > 0
    ids = tokenizer(texts[result['name']])['input_ids']
    assert result['left_out'] == len(ids) - windows.size < len(windows[0])
  # The model has 512 positions.
  skipped = [(s['name'], s['seq_len']) for s in report['skipped']]
  assert skipped == [('wikitext2', 2048), ('ptb', 2048)]
  assert 'skipped: ptb at 2048: the model has 512 positions' in err


def test_the_table_names_text_length_and_windows(capsys, text_model, specs):
  assert run(text_model, specs, '--seq_len=128', '--max_windows=3') == 0
  out = capsys.readouterr().out
  rows = [line.split() for line in out.splitlines() if line.strip()]
  for name in specs:
    assert [name, '128', '3'] in [row[:3] for row in rows]
  assert all(f'{name}: {spec}' in out for name, spec in specs.items())


def test_the_default_texts_are_on_the_hub_and_named():
  specs = [parse_hub(s[3:].partition('?')[0]) for s in PAPER_TEXTS.values()]
  assert [(spec.name, spec.config, spec.split) for spec in specs] == [
    ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'test'),
    ('ptb-text-only/ptb_text_only', None, 'validation'),
  ]
  assert specs[1].revision == 'refs/convert/parquet'


@pytest.mark.parametrize(
  'more, message',
  [
    (['--seq_len=2048'], 'seq_len is 2048, but the model has 512 positions'),
    (['--seq_len=1'], 'seq_len is 1: it must be at least 2'),
    (['--data=file:x.txt'], 'not allowed with argument'),
    (['--limit=3'], '--limit has no meaning with --suite'),
    (['--ptb=file:none.txt'], 'none.txt is not a file'),
  ],
)
def test_a_mistake_is_one_line(capsys, text_model, specs, more, message):
  assert run(text_model, specs, *more) == 1
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('error: ') and err.count('\n') == 1
  assert message in err


def test_a_text_that_is_too_short_is_skipped_or_refused(
  capsys, text_model, tmp_path, specs
):
  (tmp_path / 'short.txt').write_text('a dog ' * 100)
  short = {**specs, 'ptb': f'file:{tmp_path}/short.txt'}
  assert run(text_model, short, '--max_windows=1', '--json') == 0
  out, err = capsys.readouterr()
  names = [(r['name'], r['seq_len']) for r in json.loads(out)['results']]
  assert ('ptb', 128) in names and ('ptb', 512) not in names
  assert 'skipped: ptb at 512: ' in err
  assert run(text_model, short, '--seq_len=512') == 1
  assert 'fewer than one window of 512' in capsys.readouterr().err


@pytest.mark.mesh
def test_a_batch_is_shared_by_the_devices(text_model, texts):
  model = load(text_model)
  assert model.params['norm']['weight'].sharding.mesh.shape == {
    'data': 1,
    'fsdp': 8,
    'sequence': 1,
    'tensor': 1,
  }
  place = sharding.beside(model.params, ('batch', 'length'))
  assert isinstance(place, NamedSharding)
  assert place.spec == P(('data', 'fsdp'), 'sequence')
  assert sharding.batch_parts(model.params) == 8
  windows = windows_of(text_model, texts['ptb'], 128)[:11]
  text = HeldOut(windows, data='', batch_size=3)
  found = text.perplexity(model.params, Compute(model.config))
  assert found.windows == 11
  assert found.perplexity == pytest.approx(
    torch_perplexity(text_model, windows), rel=1e-3
  )
