"""docs/results.md, from what the runs of compare.py came to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import statistics

from benchmarks.peers import PEERS
from benchmarks.results_rows import (
  ALONE,
  MORE_STEPS,
  OURS,
  PAPER,
  SEQ_LEN,
  STEPS,
  WINDOWS,
  Results,
  Row,
  markdown,
)
from benchmarks.results_tasks import Answers, section
from benchmarks.results_ways import section as of_ways


def spread(values: Sequence[float], form: str = '{:.1f}') -> str:
  """The mean, and in brackets the range where there is one."""
  mean = form.format(statistics.mean(values))
  if len(values) == 1:
    return mean
  return f'{mean} ({form.format(min(values))}-{form.format(max(values))})'


def lead(
  dense: dict[str, float], results: Results, texts: Sequence[str]
) -> str:
  """What a reader wants to know first, peers included."""
  lines = [
    ('', 'parameters', *texts),
    ('---',) * (2 + len(texts)),
    ('dense', '100%', *(f'{dense[text]:.1f}' for text in texts)),
  ]

  def add(name: str, chosen: Callable[[Row], bool]) -> None:
    for row, runs in results.items():
      if chosen(row):
        scores = [[run['perplexity'][text] for run in runs] for text in texts]
        seeds = f', {len(runs)} seeds' if len(runs) > 1 else ''
        kept = f'{runs[0]["kept"]:.1%}'
        lines.append((name + seeds, kept, *map(spread, scores)))

  add(ALONE, lambda row: row.leader == ALONE)
  for percent in sorted({row.percent for row in results} - {0}):

    def here(row: Row, percent: int = percent) -> bool:
      return row.percent == percent

    add(PAPER, lambda row: here(row) and row.is_plain)
    for peer in PEERS:
      if here(peer):
        scores = [peer.perplexity.get(text) for text in texts]
        shown = (f'{x:.1f}' if x else '-' for x in scores)
        lines.append((f'{peer.name} (apart)', f'{peer.kept:.1%}', *shown))
    untrained = f'{OURS}, untrained'
    add(untrained, lambda row: here(row) and row.added.endswith('untrained'))
    add(OURS, lambda row: here(row) and row.is_best)
  return markdown(lines)


def apart() -> str:
  """How the peers were measured."""
  return '\n'.join(
    f'- {peer.name}: commit {peer.commit}; {peer.settings}' for peer in PEERS
  )


def table(
  dense: dict[str, float],
  results: Results,
  texts: Iterable[str],
) -> str:
  """All runs; each row's figures are means over its seeds."""
  head = ('groups', 'order', 'criterion', 'seeds', 'parameters', *texts)
  head = (*head, 'tokens/s', 'peak GB')
  scores = (f'{dense[text]:.1f}' for text in texts)
  lines = [
    head,
    ('---',) * len(head),
    ('0%', 'dense', '', '', '100%', *scores, '', ''),
  ]
  for row, runs in results.items():
    figures = [
      spread([run['perplexity'][text] for run in runs]) for text in texts
    ]
    lines.append(
      (
        f'{row.percent}%',
        row.order,
        row.method,
        str(len(runs)),
        f'{runs[0]["kept"]:.1%}',
        *figures,
        spread([run['speed'] for run in runs], '{:.0f}'),
        f'{max(run["memory"] for run in runs) / 1e9:.2f}',
      )
    )
  return markdown(lines)


def findings(results: Results, texts: Iterable[str]) -> str:
  """LoRAPrune against each alternative, in words: also where it loses."""
  ours = {row.percent: runs for row, runs in results.items() if row.is_plain}
  texts, lines = list(texts), []
  for row, runs in results.items():
    if row.is_plain or row.percent not in ours:
      continue
    parts = []
    for text in texts:
      base = [run['perplexity'][text] for run in ours[row.percent]]
      value = statistics.mean(run['perplexity'][text] for run in runs)
      change = value / statistics.mean(base) - 1
      word = 'higher' if change > 0 else 'lower'
      inside = min(base) <= value <= max(base) and len(base) > 1
      note = ', within the range of its seeds' if inside else ''
      parts.append(f'{abs(change):.0%} {word} on {text}{note}')
    lines.append(
      f'- {row.percent}%, {row.order}, {row.method}: ' + '; '.join(parts)
    )
  return '\n'.join(lines)


def leaders(results: Results, texts: Iterable[str]) -> str:
  """The lowest row on each text, in words."""
  texts, lines = list(texts), []
  for percent in dict.fromkeys(row.percent for row in results if row.percent):
    means = {
      text: {
        row: statistics.mean(run['perplexity'][text] for run in runs)
        for row, runs in results.items()
        if row.percent == percent
      }
      for text in texts
    }
    best = {
      text: min(rows, key=rows.__getitem__) for text, rows in means.items()
    }
    parts = (
      f'{row.order} {row.method} on {text} ({means[text][row]:.1f})'
      for text, row in best.items()
    )
    lines.append(f'- The lowest at {percent}%: ' + ', '.join(parts))
  return '\n'.join(lines)


def of_steps(
  dense: dict[str, float], results: Results, texts: Sequence[str]
) -> str:
  """The part with rows of more steps; nothing where none is made."""
  if not results:
    return ''
  scores = (f'{dense[text]:.1f}' for text in texts)
  lines = [
    ('parameters', 'order', 'criterion', *texts),
    ('---',) * (3 + len(texts)),
    ('100%', 'dense', '', *scores),
  ]
  for row, runs in results.items():
    scores = (f'{runs[0]["perplexity"][text]:.1f}' for text in texts)
    lines.append((f'{runs[0]["kept"]:.1%}', row.order, row.method, *scores))
  return f"""
## After {MORE_STEPS:,} steps

The same groups, one seed, ten times the steps and the text. `lora` is the
paper's method. `fluctuation` is FLAP's choice at once, without a repair, and
then LoRA alone.

{markdown(lines)}
"""


def page(
  dense: dict[str, float],
  results: Results,
  texts: Mapping[str, Mapping[str, str]],
  missing: Sequence[str],
  command: str,
  answers: Answers,
) -> str:
  """docs/results.md; `answers` are the dense model's in tasks."""
  runs = [run for row in results.values() for run in row]
  versions = {
    f'{name} {version}'
    for run in runs
    for name, version in run['versions'].items()
  }
  dates = sorted({run['date'] for run in runs})
  period = ' to '.join(dict.fromkeys((dates[0], dates[-1])))
  specs = '\n'.join(
    f'- {name} is `{text["spec"]}`' for name, text in texts.items()
  )
  rest = ', '.join(missing) or 'none'
  ways = {row: found for row, found in results.items() if row.way}
  longer = {row: x for row, x in results.items() if row.steps != STEPS}
  results = {
    row: x for row, x in results.items() if not row.way and row.steps == STEPS
  }
  parts = (
    section(answers, results),
    of_ways(dense, ways, list(texts)),
    of_steps(dense, longer, list(texts)),
  )
  return f"""# LoRAPrune beside the alternatives

SmolLM2-135M-Instruct after 100 steps of 1,024 tokens of news. Perplexity is at
{SEQ_LEN} tokens, on the first {WINDOWS} windows of each text. A range in
brackets is that of the seeds. A row without one is a single run.

{lead(dense, results, list(texts))}

`{OURS}` is the demo's config, `configs/smollm2_135m.py`, with 24 steps that
only measure, and with its learning rate of 2e-3. All other rows have 1e-3.
Untrained, 32 steps measure and none trains. The rows that say "apart" are of
the tools' own code and of the same LoRA in PyTorch, measured apart, one run
each:

{apart()}

The texts:

{specs}

{period}; {', '.join(sorted(versions))}. Every figure is in
[results.json](results.json). Runs of the list that are not made yet: {rest}.

```sh
PYTHONPATH=. {command}
```
{''.join(parts)}
## All runs

The model has its three KV heads repeated to nine. LoRA has rank 8; its learning
rate goes down to 0 in each phase. The first tenth of the layers and the last
one stay whole. In the other layers "50%" removes 4 of 9 heads and 768 of 1,536
channels, "35%" 3 and 538, and "20%" 1 and 284: at 50% and 20% the counts of the
reference implementation. `joint` prunes while LoRA trains. `prune_then_tune`
prunes after 10 steps that only measure, and then trains LoRA for the other 90.
`none` prunes after those 10. A row without a `+` is the paper's method
(`configs/paper.py:smollm2_135m`). After a `+` comes what is added to it, with
its own defaults:

- `own`: `prune.lora_gradient=own`
- `distillation`: `train.distill=0.5`, from the dense model's 64 most
  probable tokens
- `recovery`: the first 60 steps prune, the other 40 train what is left
- `everything`: the demo's config for one size, with 24 steps that only measure,
  or 32 where it is untrained. Not distilled, it prunes and repairs as
  `configs/default.py` does, on more tokens

{table(dense, results, texts)}

![Perplexity against the share of parameters kept](figures/compare.svg)

## What the numbers say

{leaders(results, texts)}

Against joint lora at the same share of groups:

{findings(results, texts)}

A difference smaller than the range of joint lora's seeds says nothing. For a
row with one seed that range is the only measure of chance. Peak memory is the
process's; `gradient` pays for a gradient of every weight. Tokens per second say
little: other work ran beside each run, and not all runs were on one machine.
"""
