"""What a run says before it begins and at its end."""

from configs import tiny
from lorapr_jax.eval import speedup
from lorapr_jax.report import summary
from lorapr_jax.settings.run import split_config


def plan_of(ladder='', **prune):
  config = tiny.get_config()
  config.export.ladder = ladder
  config.mesh.data, config.mesh.fsdp = -1, 1
  config.prune.update(prune)
  settings, lines = split_config(config), []
  dense = settings.compute.config
  summary.print_plan(dense, settings.pruning, lines.append)
  return lines


def test_a_plan_says_what_each_layer_keeps():
  lines = plan_of()
  assert lines[:4] == [
    '4 layers, 164,416 parameters',
    'kv_heads: 2 of 4 kept in each layer not protected',
    'mlp: 64 of 128 kept in each layer not protected',
    '1 of 4 layers protected (prune.protect); 109,120 parameters will be left',
  ]
  assert lines[-3:] == [
    'heads to remove: 50.00% (target 50.00%)',
    'channels to remove: 50.00% (target 50.00%)',
    'params to remove: 33.63%',
  ]


def test_a_plan_by_depth_says_how_many_layers_keep_how_many():
  lines = plan_of(layer_profile='1.25,1,0.75', protect='none')
  start = 'mlp: kept of 128, from the first layers not protected to the last: '
  (line,) = (line for line in lines if line.startswith(start))
  counts = [part.split(' in ') for part in line.removeprefix(start).split(', ')]
  kept = [int(count) for count, layers in counts for _ in range(int(layers))]
  assert len(kept) == 4 and sum(kept) == 4 * 64
  assert kept == sorted(kept) and len(counts) > 1


def test_a_plan_says_when_groups_are_cut():
  ramp = 'masked groups are cut out after the last step'
  assert ramp in plan_of() and ramp not in plan_of(order='prune_then_tune')
  once = 'groups are masked and cut out after step 7'
  assert once in plan_of(order='prune_then_tune', calibration_steps=7)


def test_nothing_to_prune_is_said():
  assert plan_of(target=0.0)[1:] == ['nothing is pruned (prune.target=0)']


def test_the_table_has_no_negative_nothing(capsys):
  both = {'dense': 1e6, 'pruned': 1e6 - 1}
  summary.print_summary(
    {
      'model': 'a [model]',
      'params_dense': 10,
      'params_pruned': 5,
      'perplexity': {
        name: {
          'value': value,
          'data': 'file:[x].txt',
          'windows': 3,
          'seq_len': 8,
        }
        for name, value in (both | {'cut': 2e6}).items()
      },
      'latency': both | {'batch_size': 1, 'seq_len': 128},
      'sparsity': {'heads': {'target': 0.5, 'achieved': 0.5}},
      'rungs': [],
      'repair': {'unrepaired': 1, 'error_left': {'a': 0.705, 'b': None}},
      'seconds': {'data': 1.0},
      'tokens_per_second': 1000.0,
      'peak_memory_bytes': 2e9,
      'exports': {},
    }
  )
  out = capsys.readouterr().out
  assert 'a [model], pruned' in out
  rows = {
    cells[1].strip(): cells[-2].strip()
    for cells in (line.split('│') for line in out.splitlines() if '│' in line)
  }
  assert rows == {
    'parameters': '-50.0%',
    'perplexity': '+0.0%',
    '... right after the cut': '+100.0%',
    'latency, ms': '+0.0%',
  }
  assert 'perplexity: file:[x].txt, 3 windows of 8 tokens\n' in out
  assert 'latency: prefill of 128 tokens, batch size 1\n' in out
  error = 'error left by repairs, on other tokens of'
  assert f'{error} a: 70%\n{error} b: not measured\n' in out


def test_a_plan_says_what_is_exported_on_the_way():
  ladder = '0.9,0.8'
  lines = plan_of(ladder)
  found = [line for line in lines if line.startswith('rung ')]
  assert found[0] == (
    'rung 0.9 of export.ladder: 147,712 parameters, exported before step 16'
  )
  once = plan_of(ladder, order='prune_then_tune', rung_steps='7,9')
  found = [line for line in once if line.startswith('rung ')]
  assert [line.rpartition(' ')[2] for line in found] == ['17', '26']
  assert (
    'masked groups are cut out before steps 10, 18, 27, and after the last step'
  ) in once


def test_a_plan_says_what_it_has_to_come_to(monkeypatch):
  lines = plan_of(fit='300KB', fit_context=100)
  [line] = [line for line in lines if 'prune.fit' in line]
  assert line == (
    'what is left fits in 300KB (prune.fit): 257 kB of weights and 41.6 kB of '
    'KV cache, in bfloat16, for a text of 100 tokens'
  )
  assert lines[-1].startswith('params to remove: ')
  assert 'target' not in ''.join(lines[-3:])
  monkeypatch.setattr(speedup, 'measured_speedup', lambda *_: 2.0)
  lines = plan_of(speedup=1.5, speedup_of='prefill')
  assert (
    'what is left was measured to prefill at least 1.5 times as fast '
    '(prune.speedup)'
  ) in lines
