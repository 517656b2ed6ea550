"""LoRA alone with transformers and PEFT: the price without any pruning.

  python benchmarks/peft_lora.py --model FOLDER --tokens FILE.npy

FILE.npy holds (steps, sequences, tokens) ids. Prints one JSON object: the
dtype, which is the faster one here, the seconds of each step, and the
process's peak memory in bytes.
"""

import argparse
import time

import numpy as np
from peft import LoraConfig, get_peft_model
import torch
from transformers import AutoModelForCausalLM

from benchmarks.torch_steps import fastest_dtype, print_result

RANK, ALPHA, DROPOUT, CLIP, LR = 8, 16, 0.05, 1.0, 1e-3
TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
TARGETS = (*TARGETS, 'gate_proj', 'up_proj', 'down_proj')


def main() -> None:
  """Trains and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', required=True)
  parser.add_argument('--tokens', required=True)
  args = parser.parse_args()
  dtype = fastest_dtype()
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
  model.config.use_cache = False
  lora = LoraConfig(
    r=RANK,
    lora_alpha=ALPHA,
    lora_dropout=DROPOUT,
    target_modules=list(TARGETS),
    task_type='CAUSAL_LM',
  )
  model = get_peft_model(model, lora)
  model.train()
  weights = [p for p in model.parameters() if p.requires_grad]
  adamw = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
  seconds = []
  for batch in torch.from_numpy(np.load(args.tokens)).long():
    start = time.perf_counter()
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, CLIP)
    adamw.step()
    adamw.zero_grad()
    seconds.append(time.perf_counter() - start)
  print_result(dtype, seconds)


if __name__ == '__main__':
  main()
