"""python -m lorapr_jax COMMAND."""

import sys

from lorapr_jax.cli.main import main

sys.exit(main(sys.argv[1:]))
