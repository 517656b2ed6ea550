"""inspect: what is pruned together, and what a target would leave."""

import dataclasses
from typing import Any

from rich.table import Table

from lorapr_jax.cli.arguments import Parser, print_json, print_tables
from lorapr_jax.errors import UserError
from lorapr_jax.eval.speedup import plan_targets
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.fit import Footprint
from lorapr_jax.pruning.groups import (
  CHANNELS,
  KV_HEADS,
  QUERIES,
  couplings,
  group_size,
  kind,
  member_parameters,
  protected_layers,
)
from lorapr_jax.pruning.masks import without_layers
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.runtime.terminal import say
from lorapr_jax.settings.files import read_config

_BYTES = {'float32': 4, 'bfloat16': 2}


def main(argv: list[str]) -> None:
  """Prints what is pruned together, and with a target what would be left."""
  parser = Parser('inspect', __doc__)
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--model', help='a folder; only its config.json is read')
  source.add_argument(
    '--config', help='a config with model.sizes, such as models:qwen3-8b'
  )
  parser.add_argument('--dtype', choices=tuple(_BYTES), default='bfloat16')
  defaults = vars(Targets()) | {'channels': 'true'}
  for derived in 'tensor_parallel', 'heads_divide':
    del defaults[derived]
  for name, default in defaults.items():
    parser.add_argument(
      f'--{name}',
      type=float if default is None else type(default),
      default=default,
      choices=('true', 'false') if name == 'channels' else None,
      help=f'prune.{name}',
    )
  parser.add_json()
  args = parser.parse_args(argv)
  given = {name: getattr(args, name) for name in defaults}
  given |= {'channels': args.channels == 'true'}
  targets = Targets(**given)
  shares = (args.target, args.heads_target, args.channels_target)
  shares += (args.layers_target or None,)
  asked = targets.by_size or any(share is not None for share in shares)
  if args.target is None and not targets.by_size:
    targets = dataclasses.replace(targets, target=0.0)
  config = _sizes(args.config) if args.config else load_config(args.model)
  report = describe(config, args.protect, _BYTES[args.dtype])
  if asked:
    report['plan'] = describe_plan(config, targets, _BYTES[args.dtype])
  if args.json:
    print_json(report)
  else:
    show(report)


def _sizes(name: str) -> ModelConfig:
  """The model of a config that has sizes and no folder."""
  sizes = read_config(name).model.sizes.to_dict()
  if not sizes:
    raise UserError(f'{name} has no model.sizes: give a folder in --model')
  return config_from_hf(sizes)


def describe(
  config: ModelConfig, protect: str, bytes_each: int
) -> dict[str, Any]:
  """Every group: its tensors with the axis that shrinks, counts and bytes."""
  tree = block_axes(config)['params']
  shapes = dict.fromkeys(config.layers)
  return {
    'parameters': config.num_parameters,
    'bytes': bytes_each * config.num_parameters,
    'layers': len(config.layers),
    'protected_layers': sorted(protected_layers(len(config.layers), protect)),
    'layer_bytes': [bytes_each * config.layer_parameters(s) for s in shapes],
    'groups': {
      group: {
        'kind': kind(group),
        'tensors': {name: list(axes) for name, axes in couplings(tree, group)},
        'per_layer': [group_size(config, s, group) for s in config.layers],
        'bytes_each': [
          bytes_each * member_parameters(config, s, group) for s in shapes
        ],
      }
      for group in (KV_HEADS, QUERIES, CHANNELS)
    },
  }


def describe_plan(
  config: ModelConfig, targets: Targets, bytes_each: int
) -> dict[str, Any]:
  """What a target would leave, asked and reached."""
  plan = plan_targets(config, targets)
  return {
    'kept_per_layer': without_layers(plan.keep),
    'kept_layers': len(config.layers) - len(plan.going),
    'kept_by_depth': plan.kept_by_depth,
    'parameters': plan.pruned_config.num_parameters,
    'bytes': bytes_each * plan.pruned_config.num_parameters,
    'target': plan.targets_by_kind(),
    'achieved': plan.sparsity(plan.keep),
  } | (
    {'fit': targets.room.footprint(plan.pruned_config)._asdict()}
    if targets.fit
    else {}
  )


def show(report: dict[str, Any]) -> None:
  """Prints a report for people."""
  say(
    f'{report["parameters"]:,} parameters, {report["bytes"] / 1e6:,.1f} MB, '
    f'{report["layers"]} layers; protected: '
    + (', '.join(map(str, report['protected_layers'])) or 'none')
  )
  sizes = '/'.join(f'{size:,}' for size in sorted(set(report['layer_bytes'])))
  say(f'a layer: {sizes} bytes')
  for group, entry in report['groups'].items():
    counts = sorted(set(entry['per_layer']))
    sizes = sorted(set(entry['bytes_each']))
    table = Table(
      title=f'{group}: {"/".join(map(str, counts))} a layer'
      + (' under each KV head' if group == QUERIES else '')
      + f', {"/".join(f"{size:,}" for size in sizes)} bytes for one'
      + (' under every KV head' if group == QUERIES else ''),
      title_justify='left',
    )
    table.add_column('tensor of a layer')
    table.add_column('axes (those of the group in capitals)')
    for name, axes in entry['tensors'].items():
      ours = group.split(',')
      marked = [axis.upper() if axis in ours else axis for axis in axes]
      table.add_row(name, ' '.join(marked))
    print_tables(table)
  if 'plan' in report:
    plan = report['plan']
    say(
      f'left: {plan["parameters"]:,} parameters, {plan["bytes"] / 1e6:,.1f} MB'
    )
    if 'fit' in plan:
      say(f'served: {Footprint(**plan["fit"])}')
    if plan['kept_layers'] < report['layers']:
      say(
        f'layers: {plan["kept_layers"]} kept, of which protected: '
        f'{len(report["protected_layers"])}'
      )
    for group, kept in plan['kept_by_depth'].items():
      if len(kept) == 1:
        text = f'{kept[0][0]} kept in each layer not protected'
      else:
        counts = ', '.join(f'{count} in {layers}' for count, layers in kept)
        text = f'kept by depth in those not protected: {counts} layers'
      say(f'{group}: {text}')
    for name, achieved in plan['achieved'].items():
      target = plan['target'][name]
      asked = '' if target is None else f' (target {target:.2%})'
      say(f'{name} removed: {achieved:.2%}{asked}')
