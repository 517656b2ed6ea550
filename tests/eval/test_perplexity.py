"""Perplexity equals transformers', of dense and of exported pruned models."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
import torch
import transformers

from lorapr_jax.cli.main import main
from lorapr_jax.eval.perplexity import HeldOut
from lorapr_jax.hf.load import load_config
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.masks import by_stack, initial_masks, select_masks
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.shrink import kept_groups, shrink, shrunk_config
from lorapr_jax.pruning.targets import Targets

WORDS = ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog']
SEQ_LEN = 16
BATCH = 8
VOCAB = 96  # conftest.py's models'


@pytest.fixture(scope='module')
def text():
  rng = np.random.default_rng(0)
  return ' '.join(rng.choice(WORDS, 900)) + '\n'


@pytest.fixture(scope='module')
def folder(save_hf, tmp_path_factory, text):
  """A random model of grouped-query attention, with a tokenizer."""
  folder = tmp_path_factory.mktemp('perplexity') / 'dense'
  shutil.copytree(save_hf('gqa'), folder)
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=40, show_progress=False)
  tokenizer.train_from_iterator([text], trainer)
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'})
  )
  return folder


@pytest.fixture(scope='module')
def spec(folder, text):
  (folder.parent / 'text.txt').write_text(text)
  return f'file:{folder.parent}/text.txt'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))


@pytest.fixture(scope='module')
def windows(folder, text):
  """The protocol in a few lines, with transformers' tokenizer."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer(text)['input_ids']
  count = len(ids) // SEQ_LEN
  # So that a remainder is dropped, and the last batch is not full.
  assert len(ids) % SEQ_LEN and count % BATCH and count > 3 * BATCH
  return np.array(ids[: count * SEQ_LEN]).reshape(count, SEQ_LEN)


def torch_nll(folder, windows):
  """The mean NLL by transformers, one window at a time."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True
  )
  total = 0.0
  for window in torch.tensor(windows):
    with torch.no_grad():
      log_p = model(window[None]).logits[0, :-1].double().log_softmax(-1)
    total -= log_p.gather(-1, window[1:, None]).sum().item()
  return total / (windows.shape[0] * (windows.shape[1] - 1))


def evaluate(capsys, *args):
  """What the command prints, parsed."""
  assert main(['evaluate', *map(str, args), '--json']) == 0
  return json.loads(capsys.readouterr().out)


def test_it_is_transformers_on_the_same_windows(folder, load, windows):
  config, params = load(folder)
  result = HeldOut(windows, 'text', BATCH).perplexity(params, Compute(config))
  nll = torch_nll(folder, windows)
  # A model that is far from uniform: mistakes show.
  assert math.exp(nll) > 1.5 * VOCAB
  assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-3)
  assert result.nll == pytest.approx(nll, rel=1e-4)
  assert result.windows == len(windows)
  assert result.tokens == len(windows) * (SEQ_LEN - 1)
  assert (result.seq_len, result.data) == (SEQ_LEN, 'text')
  assert result.tokens_per_second > 0


def test_it_does_not_depend_on_the_batch_size(folder, load, windows):
  config, params = load(folder)
  few = windows[:5]
  perplexities = [
    HeldOut(few, '', size).perplexity(params, Compute(config)).perplexity
    for size in (2, 5, 100)
  ]
  assert perplexities == pytest.approx(perplexities[:1] * 3, rel=1e-5)


def test_the_command_prints_one_json_object(capsys, folder, spec, windows):
  result = evaluate(
    capsys, '--model', folder, '--data', spec, '--seq_len', SEQ_LEN
  )
  assert result.keys() >= {
    'perplexity',
    'nll',
    'tokens',
    'windows',
    'seq_len',
    'data',
  }
  nll = torch_nll(folder, windows)
  assert result['perplexity'] == pytest.approx(math.exp(nll), rel=1e-3)
  assert result['nll'] == pytest.approx(nll, rel=1e-4)
  assert result['tokens'] == len(windows) * (SEQ_LEN - 1)
  assert result['windows'] == len(windows)
  assert (result['seq_len'], result['data']) == (SEQ_LEN, spec)
  assert result['model'] == str(folder)


def test_a_loss_beyond_floats_is_infinite_and_null_in_json(
  capsys, folder, spec, windows, tmp_path
):
  """The logits of the model a million times as large."""
  large = shutil.copytree(folder, tmp_path / 'large')
  tensors = load_file(large / 'model.safetensors')
  tensors['lm_head.weight'] = tensors['lm_head.weight'] * 1e6
  save_file(tensors, large / 'model.safetensors', {'format': 'pt'})
  args = ('--model', large, '--data', spec, '--seq_len', SEQ_LEN)
  result = evaluate(capsys, *args)
  nll = torch_nll(large, windows)
  assert nll > 1e5
  assert result['nll'] == pytest.approx(nll, rel=1e-4)
  assert result['perplexity'] is None
  assert main(['evaluate', *map(str, args)]) == 0
  assert capsys.readouterr().out.startswith('perplexity inf on ')


def test_the_first_windows_alone(capsys, folder, spec, windows):
  args = ('--model', folder, '--data', spec, '--seq_len', SEQ_LEN)
  result = evaluate(capsys, *args, '--max_windows', 3)
  assert result['windows'] == 3
  nll = torch_nll(folder, windows[:3])
  assert result['nll'] == pytest.approx(nll, rel=1e-4)
  assert main(['evaluate', *map(str, args), '--max_windows', '3']) == 0
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  assert f'{result["perplexity"]:.4f}' in out and spec in out


@pytest.mark.parametrize('protect', ['reference', 'none'])
def test_an_exported_pruned_model_has_the_masked_models_perplexity(
  capsys, folder, spec, windows, load, tmp_path, protect
):
  config, params = load(folder)
  plan = plan_pruning(config, Targets(target=0.5, protect=protect))
  stacks = tuple((s.size, config.sizes(s.shape)) for s in config.stacks)
  masks = initial_masks(tuple(plan.keep), stacks)
  rng = np.random.default_rng(0)
  importance = jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape)), masks)
  masks = select_masks(importance, masks, by_stack(plan.keep, config))
  masked = HeldOut(windows, '', BATCH).perplexity(
    params, Compute(config), masks=masks
  )

  kept = kept_groups(masks)
  small = shrunk_config(config, kept)
  cut = shrink(params['stacks'], block_axes(config)['params'], kept, config)
  export = tmp_path / 'export'
  export_model(export, {**params, 'stacks': cut}, small, base=folder)
  assert load_config(export) == small
  assert small.is_uniform == (protect == 'none')
  result = evaluate(
    capsys, '--model', export, '--data', spec, '--seq_len', SEQ_LEN
  )
  assert result['windows'] == masked.windows
  assert result['nll'] == pytest.approx(masked.nll, rel=1e-5)
  assert result['nll'] == pytest.approx(torch_nll(export, windows), rel=1e-4)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'--model': 'nowhere'}, 'nowhere is not a folder'),
    ({'--model': '{empty}'}, 'config.json does not exist'),
    ({'--model': None}, 'the following arguments are required: --model'),
    ({'--data': 'file:nowhere.txt'}, 'nowhere.txt is not a file'),
    ({'--data': 'wikitext2'}, "data spec 'wikitext2' is not known"),
    ({'--data': 'synthetic:1'}, 'it needs a model without a tokenizer'),
    ({'--seq_len': '1'}, 'seq_len is 1: it must be at least 2'),
    ({'--seq_len': 'many'}, "--seq_len: invalid int value: 'many'"),
    ({'--seq_len': '129'}, 'the model has 128 positions'),
    ({'--data': '{short}'}, 'fewer than one window of 16'),
    ({'--max_windows': '0'}, 'max_windows is 0: it must be at least 1'),
    ({'--batch_size': '0'}, 'batch_size is 0: it must be at least 1'),
    ({'--dtype': 'int8'}, "--dtype: invalid choice: 'int8'"),
    ({'--windows': '3'}, 'unrecognized arguments: --windows'),
  ],
)
def test_a_mistake_is_one_line_and_exit_status_one(
  capsys, folder, spec, tmp_path, changes, message
):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'short.txt').write_text('a dog')
  args = {'--model': str(folder), '--data': spec, '--seq_len': '16', **changes}
  argv = ['evaluate', '--json']
  for name, value in args.items():
    if value is not None:
      value = value.replace('{empty}', str(tmp_path / 'empty'))
      value = value.replace('{short}', f'file:{tmp_path}/short.txt')
      argv += [name, value]
  assert main(argv) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err


def test_a_model_without_a_tokenizer_is_a_mistake(capsys, save_hf, spec):
  argv = ['evaluate', '--model', str(save_hf('gqa')), '--data', spec]
  assert main([*argv, '--seq_len', '16']) == 1
  assert 'holds no tokenizer files' in capsys.readouterr().err
