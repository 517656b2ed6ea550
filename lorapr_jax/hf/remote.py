"""The code that travels with a folder whose layers differ in size.

There is one pair of files, remote_code/*.py, written for LLaMA: that of another
family has other names of classes.
"""

from pathlib import Path
import re
from typing import Any

from lorapr_jax.models.families import PREFIX, REMOTE_CODE

_FILES = Path(__file__).parent / 'remote_code'


def remote_code_keys(model_type: str) -> dict[str, Any]:
  """The keys of a config.json that name the classes of the code."""
  name = _class_name(model_type)
  return {
    'architectures': [f'{name}ForCausalLM'],
    'model_type': model_type,
    'auto_map': {
      'AutoConfig': f'configuration_{model_type}.{name}Config',
      'AutoModel': f'modeling_{model_type}.{name}Model',
      'AutoModelForCausalLM': f'modeling_{model_type}.{name}ForCausalLM',
    },
  }


def remote_code(model_type: str) -> dict[str, str]:
  """The files' names and contents, for one of REMOTE_CODE."""
  stock = REMOTE_CODE[model_type].architecture.removesuffix('ForCausalLM')
  # Of a family that sees, transformers has a config of the text alone.
  text = 'Text' if model_type.endswith('_text') else ''
  names = {
    r'\bLlama(?=Config|Model)': stock + text,
    'PrunedLlama': _class_name(model_type),
    r'\bLlama(?=ForCausalLM|\b)': stock,
    'LLaMA': model_type.removeprefix(PREFIX),
  }
  files = {}
  for path in sorted(_FILES.glob('*.py')):
    what, _, llama = path.stem.partition('_')
    code = path.read_text(encoding='utf-8').replace(llama, model_type)
    for theirs, ours in names.items():
      code = re.sub(theirs, ours, code)
    files[f'{what}_{model_type}.py'] = code
  return files


def _class_name(model_type: str) -> str:
  return ''.join(word.capitalize() for word in model_type.split('_'))
