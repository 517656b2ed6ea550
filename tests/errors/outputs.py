"""export, generate and report."""

from collections.abc import Callable
import json
from pathlib import Path
import shutil

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.errors.case import Case, Place, change_json, train_model, with_argv
from tests.errors.commands import CHOICES
from tests.errors.runs import FULL, damage_checkpoint


def _model(*argv: str) -> Callable[[Place], list[str]]:
  """A command on a good MODEL."""

  def make(place: Place) -> list[str]:
    place.copy('MODEL')
    return list(argv)

  return make


def _run(
  *argv: str, change: Callable[[Path], None] = lambda run: None
) -> Callable[[Place], list[str]]:
  """A command on a finished RUN, after `change`."""

  def make(place: Place) -> list[str]:
    change(place.copy('RUN'))
    return list(argv)

  return make


def _another_lora(run: Path) -> None:
  config = json.loads((run / 'run.json').read_text())['config']
  config['lora']['rank'] = 2
  change_json(run / 'run.json', config=config)


def _generate(did: str, *argv: str, **more) -> Case:
  command = ('generate', '--model', 'MODEL', '--prompt', 'word', *argv)
  return Case(did, _model(*command), **more)


def _without_tokenizer(place: Place) -> list[str]:
  model = place.copy('MODEL')
  (model / 'tokenizer.json').unlink()
  return ['generate', '--model', 'MODEL', '--prompt', 'word']


def _gguf(place: Place) -> list[str]:
  # With a tokenizer that llama.cpp has.
  tokenizer = tokenizers.Tokenizer(
    models.BPE(vocab={'<eos>': 0, 'a': 1, 'b': 2, 'ab': 3}, merges=[('a', 'b')])
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.save(str(place.copy('MODEL') / 'tokenizer.json'))
  return ['export', 'MODEL', 'OUT.gguf', '--format', 'gguf']


def _no_architecture(place: Place) -> list[str]:
  scaling = {'rope_type': 'dynamic', 'factor': 2.0}
  place.model(rope_scaling=scaling)
  place.text()
  return train_model('export.format=hf,gguf')


def _existing(place: Place) -> list[str]:
  place.copy('MODEL')
  place.write('OUT/notes.txt', 'mine')
  return ['export', 'MODEL', 'OUT']


def _existing_page(place: Place) -> list[str]:
  place.copy('RUN')
  place.write('PAGE.html', 'mine')
  return ['report', 'RUN', '--out', 'PAGE.html']


def _foreign(place: Place) -> list[str]:
  place.write('RUN/notes.txt', 'mine')
  return ['report', 'RUN']


CASES = [
  Case('`export MODEL` without a destination', _model('export', 'MODEL')),
  Case('`export MODEL OUT`, where OUT exists', _existing),
  Case(
    '`export NONE OUT`, which does not exist',
    with_argv('export', 'NONE', 'OUT'),
  ),
  Case(
    '`export MODEL OUT --format gguf`',
    _model('export', 'MODEL', 'OUT', '--format', 'gguf'),
  ),
  Case('`export MODEL OUT.gguf`', _model('export', 'MODEL', 'OUT.gguf')),
  Case(
    '`export MODEL OUT.gguf --format gguf` of a tokenizer that is no BPE',
    _model('export', 'MODEL', 'OUT.gguf', '--format', 'gguf'),
  ),
  Case(
    'Training MODEL, whose RoPE llama.cpp has not, with '
    '`--config.export.format=hf,gguf`',
    _no_architecture,
  ),
  Case(
    '`export MODEL OUT --format zip`',
    _model('export', 'MODEL', 'OUT', '--format', 'zip'),
    varies=CHOICES,
  ),
  Case(
    '`export MODEL OUT --format peft`',
    _model('export', 'MODEL', 'OUT', '--format', 'peft'),
  ),
  Case(
    '`export MODEL OUT --layout padded`',
    _model('export', 'MODEL', 'OUT', '--layout', 'padded'),
  ),
  Case(
    '`export MODEL OUT --dtype q8_0`',
    _model('export', 'MODEL', 'OUT', '--dtype', 'q8_0'),
  ),
  Case(
    '`export MODEL OUT --max_shard_size 5`',
    _model('export', 'MODEL', 'OUT', '--max_shard_size', '5'),
  ),
  Case(
    '`export MODEL OUT --base MODEL`',
    _model('export', 'MODEL', 'OUT', '--base', 'MODEL'),
  ),
  Case(
    '`export MODEL OUT` on a full disk',
    _model('export', 'MODEL', 'OUT'),
    max_file_bytes=20_000,
    varies=FULL,
  ),
  Case(
    '`export RUN OUT --base NONE` of a run from random weights',
    _run('export', 'RUN', 'OUT', '--base', 'NONE'),
  ),
  Case(
    '`export RUN OUT` without checkpoints',
    _run(
      *('export', 'RUN', 'OUT'),
      change=lambda run: shutil.rmtree(run / 'checkpoints'),
    ),
  ),
  Case(
    '`export RUN OUT` with a damaged checkpoint',
    _run('export', 'RUN', 'OUT', change=damage_checkpoint),
  ),
  Case(
    '`export RUN OUT` with the checkpoints of a run with another LoRA',
    _run('export', 'RUN', 'OUT', change=_another_lora),
  ),
  Case(
    '`export MODEL OUT.gguf --format gguf` on a full disk',
    _gguf,
    max_file_bytes=20_000,
    varies=FULL,
  ),
  Case('`generate` without `--model`', with_argv('generate')),
  _generate('`generate --prompt ""`, an empty prompt', '--prompt', ''),
  _generate(
    '`generate --prompt` of more tokens than positions',
    '--prompt',
    'word ' * 65,
  ),
  _generate('`generate --prompt` that is not UTF-8', '--prompt', 'gr\udcf6sse'),
  _generate('`generate --max_new_tokens 0`', '--max_new_tokens', '0'),
  _generate('`generate --temperature -1`', '--temperature', '-1'),
  _generate('`generate --top_p 0`', '--top_p', '0'),
  _generate('`generate --seed -1`', '--seed', '-1'),
  _generate('`generate --dtype int8`', '--dtype', 'int8', varies=CHOICES),
  Case('`generate` without a tokenizer', _without_tokenizer),
  Case('`report` without a run', with_argv('report')),
  Case('`report NONE`, which does not exist', with_argv('report', 'NONE')),
  Case('`report RUN`, a folder with other files', _foreign),
  Case(
    '`report RUN` of a run that is not finished',
    _run('report', 'RUN', change=lambda run: (run / 'summary.json').unlink()),
  ),
  Case(
    '`report RUN`, whose summary.json is cut short',
    _run(
      *('report', 'RUN'),
      change=lambda run: (run / 'summary.json').write_text('{"model": "t'),
    ),
  ),
  Case(
    '`report RUN`, whose metrics.jsonl is not JSON',
    _run(
      *('report', 'RUN', '--out', 'PAGE.html'),
      change=lambda run: (run / 'metrics.jsonl').write_text('loss 3\n'),
    ),
  ),
  Case(
    '`report RUN`, whose summary.json was edited',
    _run(
      *('report', 'RUN'),
      change=lambda run: change_json(run / 'summary.json', params_dense='many'),
    ),
  ),
  Case(
    '`report RUN`, whose export/pruning.json is of other sizes',
    _run(
      *('report', 'RUN'),
      change=lambda run: change_json(
        run / 'export' / 'pruning.json', kept=[{}]
      ),
    ),
  ),
  Case('`report RUN --out PAGE.html`, which exists', _existing_page),
  Case(
    '`report RUN --out NONE/PAGE.html`, in a folder that does not exist',
    _run('report', 'RUN', '--out', 'NONE/PAGE.html'),
  ),
]
