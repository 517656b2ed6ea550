"""report: the page of a finished run, or several runs compared."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorapr_jax.cli.arguments import (
  Parser,
  make_table,
  print_json,
  print_tables,
)
from lorapr_jax.errors import UserError
from lorapr_jax.report import comparison, units
from lorapr_jax.report.page import render_comparison, render_report
from lorapr_jax.report.run import read_run
from lorapr_jax.report.summary import print_summary
from lorapr_jax.runtime.files import write_text
from lorapr_jax.runtime.paths import is_local, path_of
from lorapr_jax.runtime.terminal import say
from lorapr_jax.runtime.workdir import REPORT_FILE


def main(argv: list[str]) -> None:
  """Prints one run's summary or several runs' table, and writes the page."""
  parser = Parser('report', __doc__)
  parser.add_argument('workdirs', nargs='+', metavar='DIR', help='of a run')
  parser.add_argument('--out', type=path_of, help='a new HTML file')
  parser.add_json()
  args = parser.parse_args(argv)
  runs = [read_run(workdir) for workdir in args.workdirs]
  page = _page(args.out, args.workdirs)
  entries = comparison.entries(runs)
  warnings = comparison.warnings(entries) if len(runs) > 1 else []
  if page and not page.exists():
    if len(runs) == 1:
      text = render_report(args.workdirs[0])
    else:
      text = render_comparison(args.workdirs)
    write_text(page, text)
  report = {
    'runs': entries,
    'warnings': warnings,
    'report': str(page) if page else None,
  }
  if args.json:
    print_json(report)
    return
  if len(runs) == 1:
    print_summary(runs[0].summary)
  else:
    _show(entries, warnings)
  if page:
    say(f'report: {page}')


def _page(out: Path | None, workdirs: Sequence[str]) -> Path | None:
  """The file of the page; the page of one run may exist already."""
  if out is None:
    return path_of(workdirs[0]) / REPORT_FILE if len(workdirs) == 1 else None
  if out.exists():
    raise UserError(f'{out} exists: choose another --out')
  if is_local(out) and not out.absolute().parent.is_dir():
    raise UserError(f'{out} cannot be written: its folder does not exist')
  return out


def _show(entries: list[dict[str, Any]], warnings: list[str]) -> None:
  kinds = 'layers', 'heads', 'channels'
  shares = ('parameters\nkept', *(f'{kind}\nremoved' for kind in kinds))
  costs = 'perplexity\n(dense)', 'latency\n(dense)', 'time'
  table = make_table(('run',), shares + costs)
  for entry in entries:
    table.add_row(
      entry['name'],
      f'{units.count(entry["params_pruned"])}\n'
      f'{units.share(entry["params_kept"])}',
      *(units.share(entry[f'{kind}_removed']) for kind in kinds),
      _pair(entry['perplexity'], lambda measured: f'{measured["value"]:.2f}'),
      _pair(entry['latency'], units.milliseconds),
      units.duration(entry['seconds']),
    )
  print_tables(table)
  for warning in warnings:
    say(f'warning: {warning}')


def _pair(pair: dict[str, Any] | None, form: Callable[[Any], str]) -> str:
  return f'{form(pair["pruned"])}\n({form(pair["dense"])})' if pair else '–'
