"""The sizes of a ladder for the report: a table, a curve and samples."""

from collections.abc import Mapping
from typing import Any

from lorapr_jax.report import plots


def sizes(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The dense model, the rungs and the last size; [] without a ladder."""
  if not (rungs := summary['rungs']):
    return []
  ends = [
    {
      'name': name,
      'parameters': summary[f'params_{key}'],
      'bytes': summary['bytes'][key],
      'cache': summary['kv_cache_bytes_per_token'][key],
      'perplexity': summary['perplexity'].get(key),
      'path': path,
    }
    for name, key, path in (
      ('dense', 'dense', ''),
      ('last', 'pruned', _path(summary)),
    )
  ]
  between = [
    {
      'name': str(rung['share']),
      'parameters': rung['params_pruned'],
      'bytes': rung['bytes']['pruned'],
      'cache': rung['kv_cache_bytes_per_token']['pruned'],
      'perplexity': rung['perplexity'].get('pruned'),
      'path': _path(rung),
    }
    for rung in rungs
  ]
  dense = summary['params_dense']
  return [
    {**size, 'share': size['parameters'] / dense}
    for size in (ends[0], *between, ends[1])
  ]


def _path(of: Mapping[str, Any]) -> str:
  return of['exports']['hf']['path'] if 'hf' in of['exports'] else ''


def curve(found: list[dict[str, Any]]) -> str:
  """The perplexities of `sizes` by what they keep; '' if there are none."""
  if not found or not all(size['perplexity'] for size in found):
    return ''
  (_, *dense), *points = [
    (size['name'], size['share'], size['perplexity']['value']) for size in found
  ]
  return plots.perplexity_against_size(points, [dense])


def samples(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The texts of a run by prompt: [{'prompt', 'texts': [(model, text)]}]."""
  found = []
  for i, sample in enumerate(summary['generations']):
    texts = [('dense', sample['dense'])]
    for rung in summary['rungs']:
      texts += [
        (str(rung['share']), own['pruned'])
        for own in rung['generations'][i : i + 1]
      ]
    texts.append(('pruned', sample['pruned']))
    found.append({'prompt': sample['prompt'], 'texts': texts})
  return found
