"""What a stranger may put into a model's folder to have it run.

Each leaves a file EXECUTED in the current folder where it is run.
"""

from pathlib import Path
import pickle

from tests.errors.case import change_json

MARK = 'EXECUTED'
_CODE = f"open('{MARK}', 'w').close()\n"


class _Mark:
  """Makes the file when it is unpickled."""

  def __reduce__(self):
    return exec, (_CODE,)


def add_pickle(model: Path) -> None:
  """Weights as torch.save writes them: a pickle, which runs what it likes."""
  (model / 'pytorch_model.bin').write_bytes(pickle.dumps(_Mark()))


def add_model_code(model: Path) -> None:
  """Code beside the weights that config.json asks for."""
  (model / 'stranger.py').write_text(_CODE)
  change_json(
    model / 'config.json',
    auto_map={
      'AutoConfig': 'stranger.StrangersConfig',
      'AutoModelForCausalLM': 'stranger.StrangersModel',
    },
  )


def add_tokenizer_code(model: Path) -> None:
  """Code beside the weights that tokenizer_config.json asks for."""
  (model / 'stranger.py').write_text(_CODE)
  change_json(
    model / 'tokenizer_config.json',
    auto_map={'AutoTokenizer': ['stranger.StrangersTokenizer', None]},
  )
