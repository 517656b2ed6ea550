#!/usr/bin/env bash
# The training step and two runs on one NVIDIA GPU, from a bare checkout:
#
#   benchmarks/gpu.sh [OUT_FOLDER]
#
# Takes the JAX of the machine's python3 (and PYTHONPATH) if that is 0.10 or newer
# and sees a GPU; else it says why not, and makes .venv with the newest. OUT_FOLDER,
# runs/gpu of the checkout if not given, gets card.csv, step.md, trace.md and
# runs.txt; what is there of the runs is not run again.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
out=$(realpath -m "${1:-$root/runs/gpu}")
cd "$root"
mkdir -p "$out"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
# A model of 7B and what its backward pass keeps take nine tenths of 80 GB.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.93}"
# The first of the cards that may be used: what is measured is one card's.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"
python=python3
if ! "$python" - <<'PYTHON'; then
import sys

import jax
import jinja2
import matplotlib

import benchmarks.step
import lorapr_jax.train

version = tuple(map(int, jax.__version__.split('.')[:2]))
if version < (0, 10) or jax.default_backend() != 'gpu':
  sys.exit(f'jax {jax.__version__} on {jax.default_backend()}')
PYTHON
  test -x .venv/bin/python || python3 -m venv .venv
  python=.venv/bin/python
  "$python" -m pip install --quiet -r requirements.txt 'jax[cuda12]'
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv \
  | tee "$out/card.csv"
date --iso-8601 | tee -a "$out/card.csv"

# A row that the card has no memory for is said, and the next one follows; the
# script fails if there was anything else.
step() {
  echo
  echo "benchmarks/step.py $*"
  "$python" benchmarks/step.py --batch 16 --seq_len 1024 --sizes "$@"
}
# Attention by XLA and by cuDNN, a text a row and two; what rematerialisation
# costs; layers compiled apart; the paper's model.
{
  step llama-3.2-1b --attention xla,cudnn --remat dots
  step llama-3.2-1b --attention xla,cudnn --remat dots --packed
  step llama-3.2-1b --remat offload,blocks,none
  step llama-3.2-1b --remat dots,none --config.model.scan_layers=False
  step llama-7b --remat dots
  step llama-7b --remat dots --config.lora.dropout=0.0
} | tee "$out/step.md"
echo
# Operations that CUDA runs as one graph have no names of their own.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" \
  "$python" benchmarks/trace_step.py --sizes llama-3.2-1b --batch 16 \
  --seq_len 1024 --config.model.remat=dots | tee "$out/trace.md"

# All cuts at the end, and on the way: random weights of the same size.
for shrink in end auto; do
  test -e "$out/$shrink/summary.json" && continue
  "$python" - "$out/$shrink" "$shrink" <<'PYTHON'
import sys

from ml_collections import config_dict

from benchmarks.step import SIZES
from lorapr_jax.cli.train import parse_flags
from lorapr_jax.train import run

workdir, shrink = sys.argv[1:]
flags = {
  'data.train': 'synthetic:0?windows=1600',
  'train.steps': '100',
  'train.batch_size': '16',
  'train.micro_batch_size': '16',
  'train.seq_len': '1024',
  'model.remat': 'dots',
  'prune.criterion': 'lora',
  'prune.order': 'joint',
  'prune.shrink': shrink,
  'report.prompts': '()',
}
flags = [f'--config.{key}={value}' for key, value in flags.items()]
config, _ = parse_flags(['--config=default', '--workdir=none', *flags])
config.model.sizes = config_dict.ConfigDict(SIZES['llama-3.2-1b'])
summary = run(config, workdir)
print(shrink, summary['cuts_on_the_way'], summary['seconds'])
PYTHON
done | tee -a "$out/runs.txt"
