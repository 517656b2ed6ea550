"""GLM-4, from a folder to a folder that transformers loads, by the commands."""

import json
import math

import numpy as np
import pytest
import torch
import transformers

from lorapr_jax.cli.main import main
from lorapr_jax.data import pipeline
from lorapr_jax.data.tokenizer import Tokenizer
from tests.kinds import KINDS, save

TEXT = 'the quick brown fox jumps over the lazy dog and the other one\n\n'
LENGTH = 32


@pytest.fixture
def base(tmp_path, add_tokenizer):
  folder = tmp_path / 'glm4'
  save(KINDS['glm4'].keys | {'vocab_size': 320}, folder)
  return add_tokenizer(folder)


def test_glm4_is_pruned_from_folder_to_folder(base, tmp_path, capsys):
  text, workdir = tmp_path / 'a.txt', tmp_path / 'run'
  text.write_text(TEXT * 300)

  assert main(['inspect', '--model', str(base), '--target', '0.5']) == 0
  out = capsys.readouterr().out
  assert 'self_attn.q_proj.bias' in out and 'heads removed: 50.00%' in out

  settings = {
    'model.path': base,
    'data.train': f'file:{text}',
    'data.eval': f'file:{text}',
    'data.eval_windows': 8,
    'train.steps': 9,
    'train.batch_size': 4,
    'train.micro_batch_size': 4,
    'train.seq_len': LENGTH,
    'train.learning_rate': 1e-2,
    'prune.criterion': 'lora',
    'prune.order': 'joint',
    'prune.every': 3,
    'prune.protect': 'none',
    'report.max_new_tokens': 4,
  }
  flags = [f'--config.{key}={value}' for key, value in settings.items()]
  config = '--config=configs/default.py'
  ran = main(['train', config, f'--workdir={workdir}', *flags])
  assert ran == 0, capsys.readouterr().err

  out = workdir / 'export'
  hf = json.loads((out / 'config.json').read_text())
  assert hf['model_type'] == 'glm4' and hf['num_attention_heads'] == 2
  assert hf['intermediate_size'] == 24
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, output_loading_info=True
  )
  assert not any(info.values()), info
  # transformers' perplexity of the text is that of the summary.
  summary = json.loads((workdir / 'summary.json').read_text())
  windows = np.asarray(
    pipeline.evaluation_windows(f'file:{text}', Tokenizer(out), LENGTH, 320)
  )[: summary['perplexity']['pruned']['windows']]
  tokens = torch.from_numpy(windows.astype(np.int64))
  with torch.no_grad():
    loss = model(tokens, labels=tokens).loss.item()
  found = summary['perplexity']['pruned']['value']
  assert math.exp(loss) == pytest.approx(found, rel=1e-3)
  assert found < summary['perplexity']['dense']['value']
  prompt = tokens[:1, :8]
  ids = model.generate(
    prompt,
    attention_mask=torch.ones_like(prompt),
    max_new_tokens=5,
    do_sample=False,
  )
  assert ids.shape == (1, 13)
