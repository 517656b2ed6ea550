"""What the phases of a run know before its first step."""

import pytest

from lorapr_jax.models.cost import (
  forward_flops_per_token,
  pass_flops_per_token,
)
from lorapr_jax.settings.files import read_config
from lorapr_jax.settings.run import split_config


def first_phase(**prune):
  config = read_config('tiny')
  config.prune.update(prune)
  return split_config(config).phases[0]


def test_calls_compile_at_the_first_step_the_cuts_and_the_first_repairs():
  phase = first_phase(shrink='0.5,0.8')
  cuts, repairs = phase.pruning.cuts, phase.pruning.passes
  assert len(cuts) == 2 and repairs == phase.pruning.milestones.maskings
  # After the last cut nothing is left to be masked.
  one, two = (next(r for r in repairs if r >= start) for start in (0, cuts[0]))
  assert repairs[-1] < cuts[1]
  assert phase.compiling(0) == {0, one, cuts[0], two, cuts[1]}
  # A run that goes on compiles for the size that it has then.
  first = cuts[0] + 1
  later = next(r for r in repairs if r >= first)
  assert phase.compiling(first) == {first, later, cuts[1]}


def test_without_repair_only_sizes_compile():
  phase = first_phase(shrink='0.5', compensate='none')
  assert phase.compiling(0) == {0, *phase.pruning.cuts}
  assert phase.pruning.pass_batches == 0


@pytest.mark.parametrize('batches, kept', [(2, 2), (9, 6), (100, 6)])
def test_a_repair_is_fitted_to_no_more_batches_than_there_are(batches, kept):
  # Masking begins at step 5 of 60, since two of four heads go over the ramp.
  pruning = first_phase(compensate_batches=batches, warmup=0.0).pruning
  assert min(pruning.passes) == 5
  assert pruning.pass_batches == kept


def test_each_event_reads_new_batches_of_its_own_text():
  own = {'compensate_data': 'synthetic:7', 'compensate_batches': 9}
  pruning = first_phase(**own, warmup=0.0).pruning
  first, second, *_ = pruning.passes
  assert pruning.pass_batches == 9 and pruning.texts == ('synthetic:7',)
  assert pruning.own_batches(first) == range(9)
  assert pruning.own_batches(second) == range(9, 18)
  assert pruning.own_batches(first + 1) == range(0)
  assert first_phase().pruning.own_batches(first) == range(0)


def test_where_nothing_is_pruned_only_the_first_step_compiles():
  phase = first_phase(target=0.0)
  assert phase.pruning is None and phase.compiling(7) == {7}


@pytest.mark.parametrize('steps, every', [(60, 5), (1000, 10), (1000, 500)])
def test_the_passes_of_all_events_take_a_quarter_of_the_steps(steps, every):
  config = read_config('tiny')
  config.train.steps, config.prune.every = steps, every
  pruning = split_config(config).phases[0].pruning
  sizes = pruning.plan.config
  of_steps = steps * 3 * forward_flops_per_token(sizes, 32)
  each = len(pruning.passes) * pass_flops_per_token(sizes, 32)
  # One batch more would be too much, but for the least and the most.
  assert 2 <= pruning.batches <= 2**17 // (16 * 32)
  assert pruning.batches == 2 or pruning.batches * each <= of_steps / 4
  more = (pruning.batches + 1) * each > of_steps / 4
  assert more or pruning.batches == 2**17 // (16 * 32)


def test_a_ladder_at_once_prunes_while_it_tunes():
  config = read_config('tiny')
  config.export.ladder = '0.9,0.8'
  config.prune.update({'order': 'prune_then_tune', 'rung_steps': '4,6'})
  own = {'compensate_data': 'synthetic:7', 'compensate_batches': 3}
  config.prune.update(own)
  settings = split_config(config)
  calibrate, tune = settings.until_cut
  assert settings.phases == (calibrate, tune)
  assert (calibrate.steps, tune.steps, tune.first_step) == (10, 50, 10)
  first, then = calibrate.pruning, tune.pruning
  assert then is settings.pruning and then.plan == settings.plan
  assert first.plan == settings.ladder[0] and first.passes == (9,)
  assert then.passes == (4, 10) and then.cuts == (0, 5, 11)
  assert settings.cuts == [10, 15, 21]
  # Text of their own goes on from event to event.
  assert [*first.own_batches(9), *then.own_batches(4)] == [*range(6)]
  assert tune.compiling(0) >= {0, 4, 5, 10, 11}
  rates = [float(tune.learning_rate(step)) for step in range(50)]
  assert rates[0] == rates[4] == rates[10] == max(rates)
  assert rates[3] == pytest.approx(rates[0] / 4) and rates[49] < rates[10] / 30
  # The newest batches are those of the calibration too.
  config.prune.update({'compensate_data': '', 'compensate_batches': 12})
  first, then = (p.pruning for p in split_config(config).until_cut)
  assert (first.pass_batches, then.pass_batches) == (10, 12)


@pytest.mark.parametrize('order', ['none', 'prune_then_tune'])
def test_an_event_reads_no_more_tokens_than_its_most(order):
  config = read_config('tiny')
  config.prune.update({'order': order, 'calibration_steps': 40})
  config.train.update({'steps': 2000, 'batch_size': 8192})
  pruning = split_config(config).phases[0].pruning
  assert pruning.pass_batches == 2
  config.train.batch_size = 128
  assert split_config(config).phases[0].pruning.pass_batches == 32
