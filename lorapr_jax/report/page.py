"""Makes the report: one HTML file that needs no other file."""

from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
import shlex
from typing import Any

import numpy as np

from lorapr_jax.axes import LAYERS
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.report import comparison, kept_map, plots, rungs, units
from lorapr_jax.report.run import Run, Scores, read_run

_TEMPLATES = Path(__file__).parent / 'templates'
_NAMES = {
  LAYERS: 'layers',
  KV_HEADS: 'KV heads',
  QUERIES: 'query heads',
  CHANNELS: 'channels',
}
_TITLES = {
  'hf': 'Hugging Face folder',
  'gguf': 'GGUF file',
  'peft': 'LoRA adapter over the pruned base',
}
_KINDS = {
  'layers': 'layers',
  'heads': 'heads',
  'channels': 'channels',
  'params': 'parameters',
}


def render_report(workdir: str | Path) -> str:
  """The page of one run, made from the files of its workdir.

  Raises:
    UserError: if the run is not finished, or a file is damaged.
  """
  run = read_run(workdir)
  summary = run.summary
  sizes = rungs.sizes(summary)
  return render(
    'report.html.jinja',
    summary=summary,
    verdict=_verdict(summary),
    targets=[
      {'kind': name, **summary['sparsity'][kind]}
      for kind, name in _KINDS.items()
      if kind in summary['sparsity']
    ],
    before_after=_before_after(summary),
    sizes=sizes,
    sizes_figure=rungs.curve(sizes),
    curves=_curves(run),
    has_ramp=plots.ramp(run.metrics) is not None,
    kept=_kept(run),
    importance=_importance(run),
    samples=rungs.samples(summary),
    warnings=_warnings(summary),
    total_seconds=sum(summary['seconds'].values()),
    exports=_exports(run),
    command=_command(summary['command']),
    config_json=json.dumps(run.config, indent=2, ensure_ascii=False),
  )


def render_comparison(workdirs: Sequence[str | Path]) -> str:
  """The page that compares finished runs.

  Raises:
    UserError: if a run is not finished, or a file is damaged.
  """
  compared = comparison.entries([read_run(w) for w in workdirs])
  points, dense = [], set()
  for number, entry in enumerate(compared, 1):
    if entry['perplexity']:
      value = entry['perplexity']['pruned']['value']
      points.append((str(number), entry['params_kept'], value))
      dense.add((1.0, entry['perplexity']['dense']['value']))
  return render(
    'comparison.html.jinja',
    entries=compared,
    warnings=comparison.warnings(compared),
    figure=points and plots.perplexity_against_size(points, sorted(dense)),
  )


def render(template: str, **context: Any) -> str:
  """The page that a template makes of what it is given."""
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    name: getattr(units, name)
    for name in ('count', 'duration', 'milliseconds', 'share', 'size')
  }
  environment.globals['change'] = units.change
  return environment.get_template(template).render(context)


def _verdict(summary: Mapping[str, Any]) -> str:
  """One sentence that says, in numbers, what the run did."""
  dense, pruned = summary['params_dense'], summary['params_pruned']
  if dense == pruned:
    text = f'No parameters were removed of {units.parameters(dense)}'
  else:
    text = (
      f'{1 - pruned / dense:.1%} of the parameters were removed '
      f'({units.parameters(dense)} to {units.parameters(pruned)})'
    )
  quality = 'perplexity was not measured'
  if summary['perplexity']:
    before, after = (summary['perplexity'][k] for k in ('dense', 'pruned'))
    quality = (
      f'perplexity went from {before["value"]:.2f} to {after["value"]:.2f} on '
      f'{before["data"]}'
    )
  ratio = summary['latency']['pruned'] / summary['latency']['dense']
  change = f'{abs(1 - ratio):.1%} {"less" if ratio <= 1 else "more"}'
  return f'{text}; {quality} and a prefill takes {change} time.'


def _before_after(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  rows = []

  def add(name, pair, form, note=''):
    before, after = pair['dense'], pair['pruned']
    rows.append(
      {
        'name': name,
        'note': note,
        'dense': form(before),
        'pruned': form(after),
        'change': units.change(before, after),
      }
    )

  params = {k: summary[f'params_{k}'] for k in ('dense', 'pruned')}
  add('parameters', params, units.count)
  add('size of the weights', summary['bytes'], units.size)
  flops = summary['flops_per_token']
  note = f'forward, at {flops["seq_len"]} tokens of context'
  add('operations for a token', flops, units.operations, note)
  add('KV cache for a token', summary['kv_cache_bytes_per_token'], units.size)
  if measured := summary['perplexity']:
    on = measured['dense']
    note = f'{on["data"]}, {on["windows"]} windows of {on["seq_len"]} tokens'
    values = {k: measured[k]['value'] for k in ('dense', 'pruned')}
    add('perplexity', values, '{:.2f}'.format, note)
  latency = summary['latency']
  note = (
    f'median of a prefill of {latency["batch_size"]} x {latency["seq_len"]} '
    'tokens, where the run ran'
  )
  add('latency', latency, units.milliseconds, note)
  return rows


def _curves(run: Run) -> dict[str, str]:
  """The figures over steps; {} if nothing was logged."""
  records = run.metrics
  if not records:
    return {}
  curves = {'loss': plots.loss(records), 'sparsity': plots.sparsity(records)}
  if measured := run.summary['perplexity']:
    curves['perplexity'] = plots.perplexity(
      records,
      measured['dense']['value'],
      measured['pruned']['value'],
      records[-1]['step'] + 1,
    )
  return curves


def _kept(run: Run) -> list[dict[str, Any]]:
  return [
    {
      'name': _NAMES[group],
      'title': _title(_NAMES[group]),
      'total': kept.shape[1],
      'whole': group == LAYERS,
      'binned': kept.shape[1] > kept_map.MAX_COLUMNS,
      'layers': [
        {'first': first, 'last': last, 'count': int(kept[first].sum())}
        for first, last in kept_map.runs(kept.sum(axis=1).tolist())
      ],
      'figure': kept_map.kept_map(f'kept-{i}', _NAMES[group], kept),
    }
    for i, (group, kept) in enumerate(run.kept.items())
  ]


def _title(name: str) -> str:
  return name[0].upper() + name[1:]


def _importance(run: Run) -> list[dict[str, Any]]:
  result = []
  for i, (group, scores) in enumerate(run.scores.items()):
    name = _NAMES[group]
    ratios = plots.over_cut_line(_ranked(group, scores))
    entry = {'title': _title(name), 'bands': '', 'histogram': '', 'above': 0.0}
    if len(ratios['cut']) and len(ratios['kept']):
      entry['bands'] = plots.importance_bands(f'bands-{i}', name, scores)
      entry['histogram'] = plots.importance_histogram(f'cut-{i}', name, ratios)
      entry['above'] = float((ratios['cut'] > 1).mean())
    result.append(entry)
  return result


def _ranked(group: str, scores: Mapping[int, Scores]) -> Mapping[int, Scores]:
  """The same in the rows that are ranked: all layers are one."""
  if group != LAYERS:
    return scores
  columns = zip(*scores.values(), strict=True)
  return {0: Scores(*(np.concatenate(x, axis=1) for x in columns))}


def _warnings(summary: Mapping[str, Any]) -> list[str]:
  return summary['warnings'] + [
    f'the perplexity of the {name} model is not finite'
    for name, measured in summary['perplexity'].items()
    if not math.isfinite(measured['value'])
  ]


def _exports(run: Run) -> list[dict[str, Any]]:
  """Every export, with commands and code that load it."""
  return [
    {**export, 'title': _TITLES[kind], 'snippets': _loaders(kind, export)}
    for kind, export in run.summary['exports'].items()
  ]


def _loaders(kind: str, export: Mapping[str, Any]) -> list[str]:
  path = export['path']
  word = shlex.quote(path)
  # Layers of different sizes need the code that lies beside the weights.
  remote = ', trust_remote_code=True' if export['layout'] == 'two_shape' else ''
  if kind == 'gguf':
    return [f'llama-cli -m {word} -p "Once upon a time"']
  if kind == 'peft':
    return [
      'from peft import PeftModel\n'
      'from transformers import AutoModelForCausalLM\n\n'
      f'folder = {path!r}\n'
      "base = folder + '/base'\n"
      f'model = AutoModelForCausalLM.from_pretrained(base{remote})\n'
      'model = PeftModel.from_pretrained(model, folder)'
    ]
  return [
    'from transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
    f'folder = {path!r}\n'
    f'model = AutoModelForCausalLM.from_pretrained(folder{remote})\n'
    'tokenizer = AutoTokenizer.from_pretrained(folder)',
    f'python -m lorapr_jax generate --model {word}',
  ]


def _command(command: str) -> str:
  """The command line that started the run, from its sys.argv."""
  program, *rest = shlex.split(command)
  if Path(program).parts[-2:] == ('lorapr_jax', '__main__.py'):
    words = ['python', '-m', 'lorapr_jax']
  else:
    words = ['python', program] if program.endswith('.py') else [program]
  lines = [shlex.join(words)]
  for word in rest:
    joint = ' \\\n  ' if word.startswith('-') else ' '
    lines.append(joint + shlex.quote(word))
  return ''.join(lines)
