"""inspect: what is pruned together, and what a target would leave."""

import dataclasses
from typing import Any

from rich.table import Table

from lorapr_jax.cli.arguments import Parser, print_json, print_tables
from lorapr_jax.hf.load import load_config
from lorapr_jax.pruning.groups import QUERIES
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.report.inspection import describe, describe_plan
from lorapr_jax.runtime.terminal import say

_BYTES = {'float32': 4, 'bfloat16': 2}


def main(argv: list[str]) -> None:
  """Prints what is pruned together, and with a target what would be left."""
  parser = Parser('inspect', __doc__)
  parser.add_argument(
    '--model', required=True, help='a folder; only its config.json is read'
  )
  parser.add_argument('--dtype', choices=tuple(_BYTES), default='bfloat16')
  for field in dataclasses.fields(Targets):
    if field.name in ('channels', 'tensor_parallel'):
      continue
    is_float = field.name.endswith('target')
    parser.add_argument(
      f'--{field.name}',
      type=float if is_float else type(field.default),
      default=None if field.name == 'target' else field.default,
      help=f'prune.{field.name}',
    )
  parser.add_argument(
    '--channels',
    choices=('true', 'false'),
    default='true',
    help='prune.channels',
  )
  parser.add_json()
  args = parser.parse_args(argv)
  fields = {
    field.name: getattr(args, field.name)
    for field in dataclasses.fields(Targets)
    if field.name != 'tensor_parallel'
  }
  asked = (args.target, args.heads_target, args.channels_target)
  fields |= {'channels': args.channels == 'true', 'target': args.target or 0.0}
  targets = Targets(**fields)
  config = load_config(args.model)
  report = describe(config, args.protect, _BYTES[args.dtype])
  if any(value is not None for value in asked):
    report['plan'] = describe_plan(config, targets, _BYTES[args.dtype])
  if args.json:
    print_json(report)
  else:
    show(report)


def show(report: dict[str, Any]) -> None:
  """Prints a report for people."""
  say(
    f'{report["parameters"]:,} parameters, {report["bytes"] / 1e6:,.1f} MB, '
    f'{report["layers"]} layers; protected: '
    + (', '.join(map(str, report['protected_layers'])) or 'none')
  )
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
