"""lm_eval: lm-evaluation-harness's own command line, with `--model lorapr`.

python -m lorapr_jax lm_eval run --model lorapr --tasks arc_easy
  --model_args pretrained=FOLDER
"""

import sys

from lorapr_jax.eval.zero_shot import import_harness


def main(argv: list[str]) -> None:
  """Registers our model, for which it has no plug-ins, and hands over."""
  import_harness()
  from lm_eval.__main__ import cli_evaluate

  sys.argv = ['lm-eval', *argv]
  cli_evaluate()
