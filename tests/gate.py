"""Whether a commit computes what another does, bit for bit.

  python tests/gate.py OLD NEW

Runs configs/tiny.py in every way below on one device and on eight, with the
code of each commit, and prints the hash of metrics.jsonl (timing apart) and of
the exported weights. Exit status 1 if any differs. What a commit gave is kept
in runs/gate/, so that the next comparison with it runs the other alone.

  --cases tiny,int8   some of the ways
  --devices 1         one device, or eight, alone

XLA_FLAGS of the environment hold for all of them, such as those of
tests/xla_flags.py, with which a program compiles in half of the time. Commits
are only comparable under the same flags.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parents[1]
TIMING = ('seconds', 'tokens_per_second')
# Flags that the compared commits both know.
CASES = {
  'tiny': {},
  'shrink': {'prune.shrink': '0.5,0.8'},
  'phases': {'prune.order': 'prune_then_tune', 'recover.steps': 20},
  'distill': {'train.distill': 0.5, 'train.distill_top_k': 64},
  'obs': {'prune.criterion': 'obs', 'prune.order': 'prune_then_tune'},
  'int8': {'model.base_dtype': 'int8'},
}
# Of eight devices, two share heads and channels.
MESHES = {1: {}, 8: {'mesh.fsdp': 4, 'mesh.tensor': 2}}


def git(*arguments: str) -> str:
  """What a git command prints."""
  return subprocess.run(
    ['git', *arguments], cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout.strip()


def hashes(workdir: Path) -> dict[str, str]:
  """Of a finished run: its log without times, its weights."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [
    {k: v for k, v in json.loads(line).items() if k not in TIMING}
    for line in lines
  ]
  weights = hashlib.sha256()
  for file in sorted((workdir / 'export').glob('*.safetensors')):
    weights.update(file.read_bytes())
  log = hashlib.sha256(json.dumps(records, sort_keys=True).encode())
  return {'metrics': log.hexdigest()[:16], 'weights': weights.hexdigest()[:16]}


def run(tree: Path, case: str, devices: int, scratch: Path) -> dict[str, str]:
  """Of one case with the code in `tree`."""
  workdir = scratch / f'{case}-{devices}'
  settings = CASES[case] | MESHES[devices]
  command = [sys.executable, 'train.py', '--config=tiny']
  command += [f'--config.{key}={value}' for key, value in settings.items()]
  flags = f'--xla_force_host_platform_device_count={devices}'
  flags = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()
  done = subprocess.run(
    [*command, f'--workdir={workdir}'],
    cwd=tree,
    env=os.environ
    | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    | {'LORAPR_CACHE': str(scratch / 'cache')},
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise RuntimeError(f'{case} on {devices}:\n{done.stderr}')
  return hashes(workdir)


def of_commit(
  commit: str, cases: list[tuple[str, int]]
) -> dict[str, dict[str, str]]:
  """{'case on devices': hashes}, those that are kept included."""
  kept = ROOT / 'runs' / 'gate' / f'{commit}.json'
  known = json.loads(kept.read_text()) if kept.exists() else {}
  names = {f'{case} on {devices}': (case, devices) for case, devices in cases}
  missing = {name: x for name, x in names.items() if name not in known}
  with tempfile.TemporaryDirectory() as scratch:
    tree = Path(scratch) / 'tree'
    git('worktree', 'add', '--detach', str(tree), commit)
    try:
      with ThreadPoolExecutor(2) as pool:
        found = pool.map(
          lambda x: run(tree, *x, Path(scratch)), missing.values()
        )
        known |= dict(zip(missing, found, strict=True))
    finally:
      shutil.rmtree(tree)
      git('worktree', 'prune')
  kept.parent.mkdir(parents=True, exist_ok=True)
  kept.write_text(json.dumps(known, indent=2))
  return {name: known[name] for name in names}


def main() -> int:
  """Prints the table; 1 if a hash differs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('commits', nargs='+')
  parser.add_argument('--cases', default=','.join(CASES))
  parser.add_argument('--devices', type=int, choices=MESHES)
  options = parser.parse_args()
  devices = [options.devices] if options.devices else list(MESHES)
  cases = [(c, d) for c in options.cases.split(',') for d in devices]
  results = {
    name: of_commit(git('rev-parse', name), cases) for name in options.commits
  }
  first, *others = results.values()
  print('case | what | ' + ' | '.join(results) + ' | same')
  same = True
  for case, expected in first.items():
    for what, value in expected.items():
      row = [value, *(other[case][what] for other in others)]
      equal = len(set(row)) == 1
      same &= equal
      print(f'{case} | {what} | {" | ".join(row)} | {"yes" if equal else "NO"}')
  return 0 if same else 1


if __name__ == '__main__':
  sys.exit(main())
