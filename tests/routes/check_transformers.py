"""Folders and adapters in transformers and PEFT, of whichever version.

  .venvs/transformers5/bin/python tests/routes/check_transformers.py FOLDER

FOLDER is what make_exports.py has written.
"""

import json
from pathlib import Path
import tempfile

from checks import (
  TOLERANCE,
  Export,
  Results,
  Truth,
  differing,
  distance,
  exports,
  folder_argument,
)
import numpy as np
from peft import PeftModel
import torch
from transformers import (
  CONFIG_MAPPING,
  AutoModelForCausalLM,
  AutoTokenizer,
)


def main() -> None:
  """Every folder and every adapter."""
  folder = folder_argument()
  results = Results(folder, 'transformers')
  with torch.inference_mode():
    for export, truth in exports(folder, 'hf'):
      check_folder(export, truth, results)
    for export, truth in exports(folder, 'family'):
      if is_known(export.path):
        check_folder(export, truth, results)
    results = Results(folder, 'peft', 'transformers')
    for export, truth in exports(folder, 'peft'):
      if is_known(Path(export.path) / 'base'):
        check_adapter(export, truth, results)


def is_known(folder: str | Path) -> bool:
  """Whether this version of transformers is as new as a folder's family."""
  config = json.loads((Path(folder) / 'config.json').read_text())
  return config['model_type'].removeprefix('pruned_') in CONFIG_MAPPING


def check_folder(export: Export, truth: Truth, results: Results) -> None:
  """Loads, computes, generates, tokenises; saves, and loads again."""
  model = load(export.path, export.remote_code)
  first = logits(model, truth)
  results.add(export, 'logits', distance(first, truth.logits), TOLERANCE)
  results.add(
    export, 'greedy ids', differing(truth.greedy, generate(model, truth)), 0
  )
  tokenizer = AutoTokenizer.from_pretrained(
    export.path, trust_remote_code=export.remote_code
  )
  results.add(
    export,
    'tokenizer ids',
    differing(truth.ids, tokenizer(truth.text)['input_ids']),
    0,
  )
  with tempfile.TemporaryDirectory() as temporary:
    model.save_pretrained(temporary)
    again = logits(load(temporary, export.remote_code), truth)
  results.add(export, 'saved again', distance(again, first), 0)


def check_adapter(export: Export, truth: Truth, results: Results) -> None:
  """Loads the adapter over its base; merges it."""
  base = load(Path(export.path) / 'base', export.remote_code)
  model = PeftModel.from_pretrained(base, export.path)
  results.add(
    export, 'logits', distance(logits(model, truth), truth.logits), TOLERANCE
  )
  merged = logits(model.merge_and_unload(), truth)
  results.add(export, 'merged', distance(merged, truth.logits), TOLERANCE)


def load(folder: str | Path, remote_code: bool) -> torch.nn.Module:
  """As a user loads it; every tensor must have found its place."""
  hf = json.loads((Path(folder) / 'config.json').read_text())
  # The default of transformers 4 leaves the cap of Gemma 2's scores out.
  eager = {'attn_implementation': 'eager'}
  model, info = AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    trust_remote_code=remote_code,
    output_loading_info=True,
    **(eager if hf.get('attn_logit_softcapping') else {}),
  )
  if any(info.values()):
    raise RuntimeError(f'{folder}: {info}')
  return model


def logits(model: torch.nn.Module, truth: Truth) -> np.ndarray:
  """(W, T, V)."""
  return model(torch.tensor(truth.tokens, dtype=torch.long)).logits.numpy()


def generate(model: torch.nn.Module, truth: Truth) -> np.ndarray:
  """The ids that follow the prompt, the likeliest at every place."""
  prompt = torch.tensor(truth.prompt, dtype=torch.long)[None]
  # Ours were not stopped by an EOS either.
  model.generation_config.eos_token_id = None
  output = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    do_sample=False,
    max_new_tokens=len(truth.greedy),
    pad_token_id=0,
  )
  return output[0, len(truth.prompt) :].numpy()


if __name__ == '__main__':
  main()
