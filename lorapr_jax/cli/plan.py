"""plan: what a run would need, on devices that need not exist here."""

import contextlib
import dataclasses
import re
from typing import Any

import jax
from ml_collections import config_dict
from rich import box
from rich.table import Table

from lorapr_jax.cli.arguments import Parser, print_json, print_tables
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.errors import UserError
from lorapr_jax.planning.compiled import Compiled
from lorapr_jax.planning.needs import Needs, plan_run
from lorapr_jax.planning.search import Tried, search
from lorapr_jax.planning.topology import SLICES, Chip, Topology
from lorapr_jax.pruning.importance import CRITERIA
from lorapr_jax.report import units
from lorapr_jax.runtime.sharding import mesh_sizes
from lorapr_jax.runtime.terminal import say

# (criterion, what a function needs), in the order in which they are shown.
Found = list[tuple[str, Needs]]


def main(argv: list[str]) -> None:
  """Compiles each function for the topology and prints what it takes."""
  parser = Parser('plan', __doc__)
  parser.add_argument('--config', required=True, help='as of train')
  parser.add_argument(
    '--topology',
    required=True,
    help='v4, v5e, v5p or v6e with the sizes of a slice, such as v5e:4x4; or '
    'cpu:N. No TPU is needed, but its compiler: pip install "jax[tpu]"',
  )
  parser.add_argument(
    '--mesh', default='', help='such as data=1,fsdp=16, over config.mesh'
  )
  parser.add_argument(
    '--search',
    action='store_true',
    help='--topology is a kind alone, such as v5e: its smallest slice, and the '
    'mesh, that the run fits on',
  )
  parser.add_argument(
    '--criteria',
    default='',
    help="such as lora,obs, each planned; default: the config's",
  )
  parser.add_json()
  args, flags = parser.parse_known_args(argv)
  _only_cpus(args.topology)
  flags = [f'--config={args.config}', *flags, *_mesh_flags(args.mesh)]
  config, _ = parse_flags([*flags, '--workdir=none'], 'plan')
  criteria = _criteria(args.criteria) or [config.prune.criterion]
  if args.search:
    if args.mesh or len(criteria) > 1:
      raise UserError('--search goes with no --mesh, and with one criterion')
    topology, found = _searched(config, args.topology, *criteria)
  else:
    topology, found = _planned(config, args.topology, criteria)
  mesh = mesh_sizes(**config.mesh, devices=len(topology.devices))
  if args.json:
    print_json(_report(found, topology, mesh))
  else:
    show(found, topology, mesh)


def _planned(
  config: config_dict.ConfigDict, name: str, criteria: list[str]
) -> tuple[Topology, Found]:
  """The topology of that name, and what the run needs there."""
  topology, found = Topology.of(name), []
  for criterion in criteria:
    config.prune.criterion = criterion
    for needs in plan_run(config, topology):
      say(f'compiled: {criterion}, {needs.name}', error=True)
      found.append((criterion, needs))
  return topology, found


def _searched(
  config: config_dict.ConfigDict, kind: str, criterion: str
) -> tuple[Topology, Found]:
  """The smallest slice that the run fits on, and what it needs there.

  Its mesh is the config's then.
  """
  if kind not in SLICES:
    raise UserError(f'--topology={kind} --search: one of {", ".join(SLICES)}')
  config.prune.criterion = criterion
  for tried in search(config, kind):
    name, axes = tried.topology.name, _axes(tried.mesh)
    say(f'{name}, {axes}: {_verdict(tried)}', error=True)
  if not tried.fits:
    raise UserError(f'no slice up to {tried.topology.name} holds the run')
  return tried.topology, [(criterion, needs) for needs in tried.needs]


def _axes(mesh: dict[str, int]) -> str:
  return ','.join(f'{axis}={size}' for axis, size in mesh.items())


def _verdict(tried: Tried) -> str:
  if not tried.needs or tried.fits:
    return tried.reason or 'fits'
  last = tried.needs[-1]
  size = units.size(last.total)
  return f'{last.name} takes {size} of {units.size(tried.topology.chip.hbm)}'


def _only_cpus(topology: str) -> None:
  """Makes JAX use CPUs alone, as many as the topology asks for."""
  jax.config.update('jax_platforms', 'cpu')
  if count := re.fullmatch(r'cpu:(\d+)', topology):
    # JAX refuses once it has made its devices; `Topology` counts them.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', int(count[1]))
  else:
    # Programs for devices that do not exist here cannot be read from a cache.
    jax.config.update('jax_enable_compilation_cache', False)


def _mesh_flags(mesh: str) -> list[str]:
  """Flags of the config for data=1,fsdp=16; the config refuses unknown axes."""
  flags = []
  for part in filter(None, mesh.split(',')):
    axis, equals, size = part.partition('=')
    if not equals or not re.fullmatch(r'-?\d+', size):
      raise UserError(f'--mesh={mesh}: AXIS=SIZE,..., such as data=1,fsdp=16')
    flags.append(f'--config.mesh.{axis.strip()}={size}')
  return flags


def _criteria(names: str) -> list[str]:
  found = list(dict.fromkeys(filter(None, names.split(','))))
  for name in found:
    if name not in CRITERIA:
      raise UserError(f'--criteria={names}: choose from {", ".join(CRITERIA)}')
  return found


def _report(
  found: Found, topology: Topology, mesh: dict[str, int]
) -> dict[str, Any]:
  phases = []
  for criterion, needs in found:
    phase = {
      'criterion': criterion,
      'phase': needs.name,
      **dataclasses.asdict(needs),
    }
    del phase['name']
    if needs.compiled:
      del phase['compiled']['text']  # Megabytes.
    if topology.chip and needs.compiled:
      phase['roofline_seconds'] = needs.compiled.roofline(topology.chip)
    phases.append(phase)
  fits = [phase['fits'] for phase in phases]
  return {
    'topology': topology.name,
    'devices': len(topology.devices),
    'mesh': mesh,
    'hbm_bytes': topology.chip and topology.chip.hbm,
    'fits': None if None in fits else all(fits),
    'phases': phases,
  }


def show(found: Found, topology: Topology, mesh: dict[str, int]) -> None:
  """Prints a table of memory and one of work, with a row for each function."""
  memory = _table(
    'arguments', 'outputs', 'temporaries', 'beside', 'all', 'fits'
  )
  work = _table('products', 'received', 'floor', 'of')
  for criterion, needs in found:
    row = criterion, needs.name
    memory.add_row(*row, *_memory(needs))
    if needs.compiled:
      work.add_row(*row, *_work(needs.compiled, topology.chip))
  each = f', {units.size(topology.chip.hbm)} each' if topology.chip else ''
  say(f'{topology.name}: {len(topology.devices)} devices{each}; {_axes(mesh)}')
  print_tables(memory, work)
  say('Each figure is of one device. beside: what else of the run lies there.')
  if any(needs.compiled is None for _, needs in found):
    say(
      'The compiler refuses the functions without arguments: all is the figure '
      'that it names.'
    )
  if topology.chip:
    say(
      'floor: the longest of the products at the peak of bfloat16, of '
      'arguments, outputs and twice the temporaries at the bandwidth of the '
      'memory, and of what is received at that of the interconnect. Nothing '
      'was timed.'
    )


def _table(*columns: str) -> Table:
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
  table.add_column('criterion', no_wrap=True)
  table.add_column('function', no_wrap=True)
  for name in columns:
    table.add_column(name, justify='right', no_wrap=True)
  return table


def _memory(needs: Needs) -> list[str]:
  fits = {True: 'yes', False: 'no', None: '–'}[needs.fits]
  own, sizes = needs.compiled, ['–'] * 3
  if own:
    sizes = map(units.size, (own.arguments, own.outputs, own.temporaries))
  return [*sizes, units.size(needs.beside), units.size(needs.total), fits]


def _work(own: Compiled, chip: Chip | None) -> list[str]:
  if own.flops is None:
    return ['–'] * 4
  cells = [units.operations(own.flops), units.size(own.received())]
  if chip is None:
    return [*cells, '–', '–']
  floors = own.roofline(chip)
  longest = max(floors, key=floors.__getitem__)
  return [*cells, units.milliseconds(floors[longest]), longest]
