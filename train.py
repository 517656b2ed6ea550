"""Prunes a model: python train.py --config=configs/X.py --workdir=DIR.

Any setting of the config can be changed on the command line, for example
--config.prune.target=0.3; configs/default.py lists them all.
"""

import sys

from lorapr_jax.cli.main import main

if __name__ == '__main__':
  sys.exit(main(['train', *sys.argv[1:]]))
