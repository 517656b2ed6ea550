#!/usr/bin/env bash
# The training step and a run on one NVIDIA GPU, from a bare checkout:
#
#   benchmarks/gpu.sh [OUT_FOLDER]
#
# Takes whatever JAX from 0.10 on the machine's python3 has on a GPU; without
# one it makes .venv with the newest. Writes OUT_FOLDER/step.md, runs and cards.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
python=python3
if ! "$python" -c 'import sys, flax, optax, grain, orbax.checkpoint, jax
sys.exit(jax.default_backend() != "gpu")' 2>/dev/null; then
  test -x .venv/bin/python || python3 -m venv .venv
  python=.venv/bin/python
  "$python" -m pip install --quiet -r requirements.txt 'jax[cuda12]'
fi
export PYTHONPATH=.
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv \
  | tee "$out/card.csv"
date --iso-8601 | tee -a "$out/card.csv"

step() {
  echo
  echo "$@"
  "$python" benchmarks/step.py --sizes llama-3.2-1b --batch 16 --seq_len 1024 \
    "$@"
}
# Attention by XLA and by cuDNN; what rematerialisation costs; where it grows.
{
  step --attention xla,cudnn --remat dots
  step --remat offload,blocks,dots,none
  step --remat dots --double
} | tee "$out/step.md"

# All cuts at the end, and on the way: random weights of the same size.
sizes=$("$python" -c 'import json
from benchmarks.step import SIZES
print(json.dumps(SIZES["llama-3.2-1b"]))')
for shrink in end auto; do
  "$python" - "$sizes" "$out/$shrink" "$shrink" <<'PYTHON'
import json
import sys

from ml_collections import config_dict

from lorapr_jax.cli.train import parse_flags
from lorapr_jax.train import run

sizes, workdir, shrink = sys.argv[1:]
flags = {
  'data.train': 'synthetic:2000',
  'train.steps': '200',
  'train.batch_size': '16',
  'train.micro_batch_size': '16',
  'train.seq_len': '1024',
  'model.remat': 'dots',
  'prune.shrink': shrink,
  'report.prompts': '()',
}
flags = [f'--config.{key}={value}' for key, value in flags.items()]
config, _ = parse_flags(['--config=default', '--workdir=none', *flags])
config.model.sizes = config_dict.ConfigDict(json.loads(sizes))
summary = run(config, workdir)
print(shrink, summary['cuts_on_the_way'], summary['seconds'])
PYTHON
done | tee "$out/runs.txt"
