"""Width, depth and both, at equal parameters: their part of docs/results.md."""

from collections.abc import Sequence
import statistics

from benchmarks.results_rows import Results, markdown
from lorapr_jax.eval.benchmark import NEW_TOKENS, PROMPT_TOKENS, REPEATS


def ways(
  dense: dict[str, float], results: Results, texts: Sequence[str]
) -> str:
  """A line for each run; times beside how many times as fast it is."""
  head = ('parameters', 'what goes', *texts, 'prompt, ms', '', 'token, ms', '')
  lines = [head, ('---',) * len(head)]
  runs = {row: found[0] for row, found in results.items()}

  def milliseconds(phase: str) -> str:
    """Of the dense model, beside all others."""
    seconds = [run['times'][phase]['against'] for run in runs.values()]
    return f'{1e3 * statistics.median(seconds):.1f}'

  scores = (f'{dense[text]:.1f}' for text in texts)
  own = milliseconds('prefill'), '', milliseconds('decode'), ''
  lines.append(('100%', 'nothing', *scores, *own))
  for row, run in runs.items():
    scores = (f'{run["perplexity"][text]:.1f}' for text in texts)
    times = [
      cell
      for phase in ('prefill', 'decode')
      for cell in (
        f'{1e3 * run["times"][phase]["model"]:.1f}',
        f'x {run["times"][phase]["speedup"]:.2f}',
      )
    ]
    lines.append((f'{run["kept"]:.1%}', row.way, *scores, *times))
  return markdown(lines)


def section(
  dense: dict[str, float], results: Results, texts: Sequence[str]
) -> str:
  """Of docs/results.md, from rows with a way; nothing where none is made."""
  if not results:
    return ''
  return f"""
## Width, depth, or both

The same shares of all parameters go as heads and channels (`width`), as whole
layers (`depth`, the fewest with which no more stays), or half of them as layers
and the rest as heads and channels (`both`); [explore.md](explore.md) has the
rule. All else is `everything` of the list below, one seed. Times are those of
our `benchmark`: one sequence, a prompt of {PROMPT_TOKENS} tokens and
{NEW_TOKENS} that follow, the median of {REPEATS} turns with the dense model.
Beside each is how many times as fast the model is as the dense one in these
turns. Compare these: the machine was not as fast at all times.

{ways(dense, results, texts)}
"""
