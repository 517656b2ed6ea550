"""Makes every export with the commands, and what each must compute.

  python tests/routes/make_exports.py FOLDER [--model HF_FOLDER]

FOLDER is to be made. Without --model the models are tiny and random.
"""

import argparse
from collections.abc import Iterator
import json
from pathlib import Path
import shutil

from checks import MANIFEST, Export
import families
import tiny
from truth import measure

from lorapr_jax.cli.main import main as lorapr

ROOT = Path(__file__).resolve().parents[2]
# Rows of 32 weights are what llama.cpp's Q8_0 rounds together.
_COMMON = (
  'prune.channels_multiple_of=32',
  'prune.criterion=lora',
  'prune.order=joint',
  'lora.dropout=0',
)
_TINY = (
  'train.steps=20',
  'train.batch_size=8',
  'train.micro_batch_size=8',
  'train.seq_len=48',
  'train.learning_rate=1e-2',
  'prune.every=5',
)
# Lightly: a model that was cut hard and hardly trained is so far off that
# rounding changes what it says.
_REAL = (
  'train.steps=10',
  'train.batch_size=4',
  'train.micro_batch_size=4',
  'train.seq_len=48',
  'train.learning_rate=1e-3',
  'prune.every=1',
  'prune.heads=queries',
  'prune.heads_target=0.34',
  'prune.channels_target=0.2',
)
# As by default.
_AT_ONCE = ('prune.criterion=obs', 'prune.order=prune_then_tune')
_ALL_FORMATS = ('export.format=hf,gguf,peft', 'export.gguf_dtype=f32')
# Workdir -> base and settings. The tiny ones: 4 of 8 heads; 6 of 8, which do
# not divide the hidden size of 128; and, in the layers that are not protected,
# one query head of two under every KV head, or 4 of 8 of a base with biases.
_TINY_RUNS = {
  'uniform': ('base', ('prune.protect=none',)),
  'odd': (
    'base',
    ('prune.protect=none', 'prune.heads_target=0.25', *_AT_ONCE),
  ),
  'two_shape': ('second', ('prune.heads=queries', *_ALL_FORMATS)),
  'biases': ('biased', _ALL_FORMATS),
}
_REAL_RUNS = {
  'uniform': ('base', ('prune.protect=none',)),
  'two_shape': ('base', _ALL_FORMATS),
}
# The flags of `export`, by run.
_EXPORTS = {
  'uniform': (
    '--model_type=mistral --max_shard_size=1MB',
    '--layout=two_shape',
    '--dtype=bfloat16',
    '--format=gguf --dtype=f32',
    '--format=gguf --dtype=bf16',
    '--format=gguf --dtype=q8_0',
    '--format=peft',
  ),
  'odd': ('--format=gguf --dtype=f16', '--format=peft'),
  'two_shape': (
    '--layout=padded',
    '--format=gguf --dtype=q8_0',
    '--format=gguf --layout=padded --dtype=f32',
  ),
  'biases': ('--layout=padded', '--format=gguf --layout=padded --dtype=f32'),
}
# Those whose layers differ.
_MIXED = ('two_shape', 'biases')


def main() -> None:
  """Bases, runs, exports, truths, manifest."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('folder', type=Path, help='to be made')
  parser.add_argument('--model', type=Path, help='prune this one instead')
  args = parser.parse_args()
  folder = args.folder.absolute()
  folder.mkdir(parents=True)
  text, held_out = folder / 'train.txt', folder / 'held_out.txt'
  if args.model:
    (folder / 'base').symlink_to(args.model.absolute())
    shutil.copyfile(ROOT / 'docs/method.md', text)
    shutil.copyfile(ROOT / 'README.md', held_out)
    runs, settings = _REAL_RUNS, _COMMON + _REAL
  else:
    tiny.write_sentences(text, seed=0, count=400)
    tiny.write_sentences(held_out, seed=1, count=60)
    tiny.make_base(folder / 'base', tiny.CONFIG, text)
    tiny.make_base(folder / 'second', tiny.SECOND_CONFIG, text)
    tiny.make_base(folder / 'biased', tiny.BIASED_CONFIG, text)
    runs, settings = _TINY_RUNS, _COMMON + _TINY
  for name, (base, own) in runs.items():
    train(folder / name, folder / base, text, settings + own)
  found = [export for name in runs for export in exports(folder / name)]
  if not args.model:
    found += families.make_exports(folder, text)
  for path in sorted({export.truth for export in found}):
    measure(Path(path), held_out)
  manifest = [export._asdict() for export in found]
  (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def train(
  workdir: Path, base: Path, text: Path, settings: tuple[str, ...]
) -> None:
  """Prunes `base` by the command."""
  command(
    'train',
    f'--config={ROOT / "configs/default.py"}',
    f'--workdir={workdir}',
    f'--config.model.path={base}',
    f'--config.data.train=file:{text}',
    *(f'--config.{setting}' for setting in settings),
  )


def exports(workdir: Path) -> Iterator[Export]:
  """What a run has made, and what the command `export` makes from it.

  All hold the same weights as the run's own folder, but for a folder of
  another dtype: that one is measured for itself.
  """
  run, truth = workdir.name, workdir / 'export'
  mixed = run in _MIXED
  yield Export(run, 'hf', str(truth), str(truth), mixed)
  if mixed:
    (gguf,) = (workdir / 'export-gguf').glob('*-f32.gguf')
    yield Export(f'{run}, its gguf', 'gguf', str(gguf), str(truth), dtype='f32')
    peft = workdir / 'export-peft'
    yield Export(f'{run}, its peft', 'peft', str(peft), str(truth), mixed)
  for number, flags in enumerate(_EXPORTS[run]):
    options = dict(flag.split('=') for flag in flags.split())
    kind = options.get('--format', 'hf')
    path = workdir.with_name(f'{run}-{number}')
    if kind == 'gguf':
      path = path.with_suffix('.gguf')
    command('export', workdir, path, *flags.split())
    dtype = options.get('--dtype', 'float32')
    yield Export(
      name=f'{run} {flags}',
      kind=kind,
      path=str(path),
      truth=str(path if kind == 'hf' and dtype != 'float32' else truth),
      remote_code=options.get('--layout') == 'two_shape',
      dtype=dtype,
    )


def command(*arguments: str | Path) -> None:
  """Runs `python -m lorapr_jax ...` in this process."""
  if lorapr([str(argument) for argument in arguments]):
    raise SystemExit(f'failed: lorapr_jax {" ".join(map(str, arguments))}')


if __name__ == '__main__':
  main()
