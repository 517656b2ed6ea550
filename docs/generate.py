"""Writes the parts of docs/ that follow from the code: `make docs`.

configuration.md from configs/default.py, the table of targets.md from the
planner, that of models.md from models/families.py, the figures of
how-it-works.md; and build/docs/api, the reference.
"""

import ast
from collections.abc import Callable
import dataclasses
from pathlib import Path
import pkgutil

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import pdoc

from benchmarks.svg import write_svg
from configs import default, models
import lorapr_jax
from lorapr_jax.errors import UserError
from lorapr_jax.gguf.archs import architecture
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.layout import resolve_model_type
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.families import FAMILIES
from lorapr_jax.pruning.groups import CHANNELS
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.schedule import PruneSchedule
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.runtime.files import write_text

DOCS = Path(__file__).parent
BEGIN, END = '<!-- generated: {} -->', '<!-- end -->'

# By their names in configs/models.py.
MODELS = {
  'LLaMA-7B': 'llama-7b',
  'LLaMA-13B': 'llama-13b',
  'Llama-3-8B': 'llama3-8b',
  'Llama-3-70B': 'llama3-70b',
  'Mistral-7B': 'mistral-7b',
  'Qwen2.5-7B': 'qwen2.5-7b',
  'Qwen3-0.6B': 'qwen3-0.6b',
  'Qwen3-8B': 'qwen3-8b',
  'Qwen3-32B': 'qwen3-32b',
  'Gemma-3-4B': 'gemma3-4b',
  'Gemma-3-12B': 'gemma3-12b',
  'GLM-4-9B-0414': 'glm4-9b',
  'OLMo-2-7B': 'olmo2-7b',
  'Phi-4': 'phi4-14b',
  'Granite-3.3-8B': 'granite-8b',
  'SmolLM3-3B': 'smollm3-3b',
}
# What people know of each family, by model_type.
KNOWN_AS = {
  'cwm': 'Code World Model',
  'ernie4_5': 'ERNIE 4.5, without experts',
  'exaone4': 'EXAONE 4',
  'gemma': 'Gemma 1',
  'gemma2': 'Gemma 2',
  'gemma3_text': 'Gemma 3, its text model',
  'glm': 'GLM-4-9B (the `-hf` folders)',
  'glm4': 'GLM-4-0414, GLM-Z1',
  'granite': 'Granite 3',
  'helium': 'Helium',
  'hunyuan_v1_dense': 'Hunyuan, dense',
  'internlm3': 'InternLM 3',
  'iquestcoder': 'IQuest-Coder',
  'llama': 'LLaMA 1, 2, 3, SmolLM2, TinyLlama, R1-Distill-Llama',
  'ministral': 'Ministral 8B',
  'ministral3': 'Ministral 3',
  'mistral': 'Mistral 7B, Nemo, Small',
  'olmo2': 'OLMo 2',
  'olmo3': 'OLMo 3',
  'phi3': 'Phi-3, Phi-4',
  'qwen2': 'Qwen2, Qwen2.5, R1-Distill-Qwen',
  'qwen3': 'Qwen3, without experts',
  'seed_oss': 'Seed-OSS',
  'smollm3': 'SmolLM3',
}
TARGETS = (
  Targets(target=0.2),
  Targets(target=0.5),
  Targets(target=0.2, unit='params'),
  Targets(target=0.5, unit='params'),
  Targets(target=0.5, protect='none', channels_multiple_of=256),
)


def configuration() -> str:
  """configs/default.py as tables: key, default, meaning."""
  lines = [
    '# Configuration',
    '',
    'Every setting of `train.py`, from [configs/default.py](../configs/'
    'default.py). `--config.KEY=VALUE` changes one on the command line.',
  ]
  section = None
  for key, meaning in _comments(Path(default.__file__).read_text()):
    name, _, _ = key.partition('.')
    if name != section:
      section = name
      lines += ['', f'## {name}', '', '| key | default | meaning |']
      lines += ['|---|---|---|']
    value = default.get_config().get_ref(name).get().get(key.split('.')[1])
    lines.append(f'| `{key}` | {_shown(value)} | {_cell(meaning)} |')
  return '\n'.join(lines) + '\n'


def _comments(source: str) -> list[tuple[str, str]]:
  """(key, the comment above its assignment) for every key, in order.

  A key without a comment of its own shares the one above.
  """
  lines, found, meaning = source.splitlines(), [], ''
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Assign):
      continue
    target = ast.unparse(node.targets[0])
    if target.count('.') != 2:
      continue
    above = []
    for line in reversed(lines[: node.lineno - 1]):
      if not line.strip().startswith('#'):
        break
      above.insert(0, line.strip().removeprefix('#').strip())
    meaning = ' '.join(above) if above else ''
    found.append((target.removeprefix('config.'), meaning))
  return found


def _shown(value: object) -> str:
  if value is None:
    return 'unset'
  if hasattr(value, 'to_dict'):
    return '`{}`'
  return f'`{value!r}`' if isinstance(value, str) else f'`{value}`'


def _cell(text: str) -> str:
  return text.replace('|', '\\|').replace('<', '&lt;')


def family_table() -> str:
  """Every family, and what a pruned model of it can be saved as."""
  lines = [
    '| `model_type` | models | layers alike | GGUF | GGUF, layers differ |',
    '|---|---|---|---|---|',
  ]
  for name in sorted(FAMILIES):
    # As it is, with a number of heads that divides its width no more, and with
    # fewer channels in one of its layers.
    whole, odd = _pruned(name, 4), _pruned(name, 3)
    first, *others = odd.layers
    unequal = dataclasses.replace(
      odd, layers=(dataclasses.replace(first, mlp_dim=64), *others)
    )
    saved = [
      _named(resolve_model_type, x, 'uniform', 'auto') for x in (whole, odd)
    ]
    ggufs = map(_gguf, (odd, unequal))
    lines.append(
      f'| `{name}` | {KNOWN_AS[name]} | {", ".join(dict.fromkeys(saved))} | '
      f'{" | ".join(ggufs)} |'
    )
  return '\n'.join(lines)


def _pruned(model_type: str, heads: int) -> ModelConfig:
  """A model of four layers with so many heads.

  Its windows are those of published models: where only some layers have one, or
  `layer_types` says which, there are windows.
  """
  row = FAMILIES[model_type]
  windows = row.has_layer_types and 'use_sliding_window' not in row.absent
  return config_from_hf(
    {
      'model_type': model_type,
      'vocab_size': 256,
      'hidden_size': 64,
      'head_dim': 16,
      'num_hidden_layers': 4,
      'num_attention_heads': heads,
      'num_key_value_heads': 1,
      'intermediate_size': 128,
      'query_pre_attn_scalar': 16,
      **({} if windows else {'sliding_window': None}),
    }
  )


def _gguf(config: ModelConfig) -> str:
  """The architecture of a model; or that of one with tied embeddings."""
  tied = dataclasses.replace(config, tie_embeddings=True)
  names = [_named(architecture, x) for x in (config, tied)]
  if names[0] == 'no' and names[1] != 'no':
    return f'{names[1]} (tied embeddings)'
  return names[0]


def _named(form: Callable[..., str], *model: object) -> str:
  """The name of a form that holds a model."""
  try:
    return f'`{form(*model)}`'
  except UserError:
    return 'no'


def target_table() -> str:
  """What each target leaves of models that many people use."""
  lines = [
    '| model | target | KV heads kept | channels kept | parameters | left |',
    '|---|---|---|---|---|---|',
  ]
  for name, size in MODELS.items():
    config = _config(size)
    lines.append(
      f'| {name} | none | {config.layers[0].num_kv_heads} | '
      f'{config.layers[0].mlp_dim:,} | {_billions(config)} | 100.0% |'
    )
    for targets in TARGETS:
      try:
        plan = plan_pruning(config, targets)
      except UserError:  # So few KV heads that none of them can go.
        targets = dataclasses.replace(targets, heads='queries')
        plan = plan_pruning(config, targets)
      layer = plan.prunable_layers[0]
      share = plan.pruned_config.num_parameters / config.num_parameters
      left = plan.pruned_config.layers[layer]
      lines.append(
        f'| | {_flags(targets)} | {left.num_kv_heads} | '
        f'{plan.keep[CHANNELS][layer]:,} | {_billions(plan.pruned_config)} | '
        f'{share:.1%} |'
      )
  return '\n'.join(lines)


def _config(size: str) -> ModelConfig:
  return config_from_hf(models.SIZES[size])


def _billions(config: ModelConfig) -> str:
  return f'{config.num_parameters / 1e9:.2f} B'


def _flags(targets: Targets) -> str:
  text = f'`target={targets.target}`'
  if targets.heads != 'kv_groups':
    text += f' `heads={targets.heads}`'
  if targets.unit != 'groups':
    text += f' `unit={targets.unit}`'
  if targets.protect != 'reference':
    text += f' `protect={targets.protect}`'
  if targets.channels_multiple_of != 1:
    text += f' `channels_multiple_of={targets.channels_multiple_of}`'
  return text


def fill(page: str, name: str, content: str) -> str:
  """`page` with what is between the markers of `name` replaced."""
  begin = BEGIN.format(name)
  head, found, rest = page.partition(begin)
  _, end, tail = rest.partition(END)
  if not (found and end):
    raise ValueError(f'no {begin} ... {END} in the page')
  return f'{head}{begin}\n{content}\n{end}{tail}'


def ramp_figure() -> Figure:
  """The cubic ramp, and the steps at which groups are masked."""
  steps, every = 100, 10
  figure = Figure(figsize=(6, 3))
  axes = figure.add_subplot()
  schedule = PruneSchedule(steps, every, warmup=0.1, cooldown=0.1)
  share = [0.5 * schedule.progress(step) for step in range(steps)]
  axes.plot(range(steps), share, color='#888', label='cubic ramp')
  events = [step for step in range(0, steps, every) if share[step] > 0]
  held = [0.0]
  for step in range(1, steps):
    held.append(share[step] if step in events else held[-1])
  axes.step(
    range(steps), held, where='post', color='#2a6fbb', label='masked groups'
  )
  for left, right, text in ((0, 10, 'warm-up'), (90, 100, 'cool-down')):
    axes.axvspan(left, right, color='#888', alpha=0.15, linewidth=0)
    axes.text((left + right) / 2, 0.02, text, ha='center', rotation=90)
  axes.set(
    xlabel='step', ylabel='share of groups', xlim=(0, 100), ylim=(0, 0.55)
  )
  axes.legend(loc='center right', frameon=False)
  figure.tight_layout()
  return figure


def group_figure() -> Figure:
  """Which rows and columns of a layer's weights each group is made of."""
  figure = Figure(figsize=(7, 3.4))
  axes = figure.add_subplot()
  # (name, x, width, height, along which axis the groups lie, how many).
  tall, wide = 3.0, 2.4
  weights = (
    ('q_proj', 0, wide, tall, 'columns', 6),
    ('k_proj', 3.2, 0.8, tall, 'columns', 2),
    ('v_proj', 4.6, 0.8, tall, 'columns', 2),
    ('o_proj', 6.2, tall, wide, 'rows', 6),
    ('gate_proj', 10.2, wide, tall, 'columns', 8),
    ('up_proj', 13.2, wide, tall, 'columns', 8),
    ('down_proj', 16.2, tall, wide, 'rows', 8),
  )
  for name, x, width, height, along, parts in weights:
    head = name in ('q_proj', 'k_proj', 'v_proj', 'o_proj')
    marked = range(parts // 2, parts) if head else (parts // 2,)
    for part in range(parts):
      step = (width if along == 'columns' else height) / parts
      at = (
        (x + part * step, -height)
        if along == 'columns'
        else (x, -(part + 1) * step)
      )
      size = (step, height) if along == 'columns' else (width, step)
      color = '#2a6fbb' if part in marked else '#dddddd'
      axes.add_patch(Rectangle(at, *size, facecolor=color, edgecolor='white'))
    axes.text(x + width / 2, 0.15, name, ha='center', fontsize=8)
  axes.text(4.6, -3.6, 'a KV head with its query heads', ha='center')
  axes.text(14.7, -3.6, 'a channel', ha='center')
  axes.set(xlim=(-0.3, 19.5), ylim=(-4, 0.8), aspect='equal')
  axes.axis('off')
  figure.tight_layout()
  return figure


def write_figures(folder: Path) -> None:
  """The figures of how-it-works.md."""
  folder.mkdir(exist_ok=True)
  for name, figure in (('ramp', ramp_figure()), ('groups', group_figure())):
    write_svg(figure, folder / f'{name}.svg')


def write_reference(folder: Path) -> None:
  """The reference of every public function, as HTML, from the docstrings."""
  # pdoc does not see what is loaded when it is first used.
  for name in lorapr_jax.__all__:
    setattr(lorapr_jax, name, getattr(lorapr_jax, name))
  modules = [
    module.name
    for module in pkgutil.iter_modules(lorapr_jax.__path__, 'lorapr_jax.')
    if not module.name.endswith('__main__')
  ]
  pdoc.render.configure(docformat='google', show_source=False)
  pdoc.pdoc('lorapr_jax', *modules, output_directory=folder)


def main() -> None:
  """Writes everything anew."""
  write_text(DOCS / 'configuration.md', configuration())
  page = DOCS / 'targets.md'
  text = page.read_text(encoding='utf-8')
  write_text(page, fill(text, 'targets', target_table()))
  page = DOCS / 'models.md'
  text = page.read_text(encoding='utf-8')
  write_text(page, fill(text, 'families', family_table()))
  write_figures(DOCS / 'figures')
  write_reference(DOCS.parent / 'build' / 'docs' / 'api')


if __name__ == '__main__':
  main()
