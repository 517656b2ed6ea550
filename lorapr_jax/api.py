"""The functions of `import lorapr_jax as lp`, for notebooks and scripts."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from lorapr_jax.data import pipeline
from lorapr_jax.data.sources import parse_spec
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError, check_least
from lorapr_jax.eval import generation
from lorapr_jax.eval.perplexity import HeldOut, Perplexity
from lorapr_jax.eval.suite import evaluate_suite as evaluate_suite
from lorapr_jax.eval.zero_shot import evaluate_tasks as evaluate_tasks
from lorapr_jax.hf.load import Model, folder_and_config, in_memory
from lorapr_jax.hf.load import load as load
from lorapr_jax.models.compute import Compute
from lorapr_jax.runtime.paths import is_path, path_of
from lorapr_jax.settings.files import check_config, check_key, read_config


@dataclasses.dataclass(frozen=True)
class PrunedRun:
  """A finished run.

  Attributes:
    summary: what its summary.json holds.
    workdir: the folder with everything that the run made.
  """

  summary: dict[str, Any]
  workdir: Path

  @property
  def export(self) -> Path:
    """The pruned model's Hugging Face folder."""
    return self.workdir / 'export'


def prune(
  config: str | Path | config_dict.ConfigDict,
  workdir: str | Path,
  **sections: dict[str, Any],
) -> PrunedRun:
  """Prunes a model. After a crash, call it again: it goes on.

    lp.prune('default', 'runs/mine', prune={'target': 0.3}, data={...})

  Args:
    config: the name of a shipped config (`default`, `paper:tiny`), the path of
      a config's file, or a config. It is not changed.
    workdir: a new folder for everything that the run makes, or the folder of
      the same run.
    **sections: settings that differ from the config, by its sections.

  Raises:
    UserError: for a mistake in config, data, model or workdir.
  """
  # Imported here: no other function needs it.
  from lorapr_jax import train

  name = 'config'
  if not isinstance(config, config_dict.ConfigDict):
    name = str(config)
    config = read_config(name)
  check_config(config, name)
  config = copy.deepcopy(config)  # Unset keys know their types.
  for section, settings in sections.items():
    check_key(config, f'config.{section}')
    if not isinstance(settings, dict):
      raise UserError(f'config.{section} is {settings!r}: give a dict of keys')
    for key, value in settings.items():
      _set(config, section, key, value)
  config = config.copy_and_resolve_references()
  return PrunedRun(train.run(config, workdir), path_of(workdir))


def _set(
  config: config_dict.ConfigDict, section: str, key: str, value: Any
) -> None:
  name = f'config.{section}.{key}'
  check_key(config, name)
  if is_path(value):
    value = str(value)
  if isinstance(value, dict):
    value = config_dict.ConfigDict(value)
  try:
    config[section][key] = value
  except TypeError as error:
    raise UserError(f'{name}: {error}') from None


def evaluate(
  model: Model | str | Path,
  data: str,
  seq_len: int,
  *,
  max_windows: int | None = None,
  batch_size: int = 8,
  dtype: str = 'auto',
) -> Perplexity:
  """The perplexity of a model on a text, and all that it depends on.

  Args:
    model: a model, or the Hugging Face folder of one.
    data: a data spec (docs/data.md).
    seq_len: the tokens of a window; figures of two lengths do not compare.
    max_windows: the most windows; None: all.
    batch_size: windows at a time.
    dtype: of weights and computation, as in `load`; a model in memory keeps
      its own.

  Raises:
    UserError: for a mistake in the arguments, the folder or the text.
  """
  check_least(
    seq_len=(seq_len, 2),
    max_windows=(max_windows, 1),
    batch_size=(batch_size, 1),
  )
  synthetic = parse_spec(data).scheme == 'synthetic'
  folder, config = folder_and_config(model)
  if seq_len > config.longest:
    raise UserError(
      f'seq_len is {seq_len}, but the model has {config.longest} '
      'positions (max_position_embeddings)'
    )
  without_tokenizer = synthetic and not any(folder.glob('tokenizer*'))
  windows = pipeline.evaluation_windows(
    data,
    None if without_tokenizer else Tokenizer(folder),
    seq_len,
    config.vocab_size,
  )[:max_windows]
  # The weights come last, when everything else has been checked.
  loaded = in_memory(model, dtype)
  compute = Compute(config, dtype=loaded.dtype)
  return HeldOut(windows, data, batch_size).perplexity(loaded.params, compute)


def export(
  source: Model | PrunedRun | str | Path,
  destination: str | Path,
  *,
  format: str = 'hf',
  layout: str = 'auto',
  model_type: str = 'auto',
  dtype: str = 'auto',
  max_shard_size: str = '5GB',
) -> Path:
  """Writes a model in another format, layout or dtype, and reads it back.

  Args:
    source: a model, a run or its workdir (its last checkpoint is cut and
      merged), or a Hugging Face folder.
    destination: a new folder; for gguf a new .gguf file.
    format: hf; gguf; or peft: LoRA as an adapter over the pruned base, which
      only a run has.
    layout: uniform, two_shape, padded or auto; see configs/default.py.
    model_type: llama, mistral or auto.
    dtype: of the weights; auto: that of the source.
    max_shard_size: the largest size of one weights file of a folder.

  Returns:
    The destination.

  Raises:
    UserError: if the source cannot be exported so; before weights are read.
    RuntimeError: if what was read back is another model.
  """
  # Imported here: no other function needs it.
  from lorapr_jax.exporting import sources
  from lorapr_jax.exporting.routes import Route
  from lorapr_jax.runtime.sizes import parse_size
  from lorapr_jax.settings.sections import ROUTES

  if format not in ROUTES:
    raise UserError(f'format is {format!r}: choose from {", ".join(ROUTES)}')
  route = Route(
    kind=format,
    path=path_of(destination),
    layout=layout,
    model_type=model_type,
    dtype=dtype,
    max_shard_bytes=parse_size('max_shard_size', max_shard_size),
  )
  if isinstance(source, PrunedRun):
    source = source.workdir
  elif not isinstance(source, Model):
    source = path_of(source)
  sources.export(source, route)
  return route.path


def generate(
  model: Model | str | Path,
  prompt: str,
  *,
  max_new_tokens: int = 128,
  temperature: float = 0.0,
  top_p: float = 1.0,
  seed: int = 0,
  raw: bool = False,
  dtype: str = 'auto',
) -> str:
  """A model's answer to a prompt, or its continuation of a text.

  Args:
    model: a model, or the Hugging Face folder of one.
    prompt: a user's message if the tokenizer has a chat template, else the
      beginning of a text.
    max_new_tokens: the most tokens to generate.
    temperature: of the draws; 0 takes the likeliest token.
    top_p: tokens are drawn from the likeliest ones of this total probability.
    seed: of the draws.
    raw: whether the prompt is the beginning of a text even if the tokenizer
      has a chat template.
    dtype: of weights and computation, as in `load`; a model in memory keeps
      its own.

  Raises:
    UserError: for a mistake in the arguments or the folder.
  """
  sampling = generation.Sampling(max_new_tokens, temperature, top_p, seed)
  folder, config = folder_and_config(model)
  tokenizer = Tokenizer(folder)
  question = {'role': 'user', 'content': prompt}
  ids = generation.encode_prompt(tokenizer, config, [question], raw=raw)
  loaded = in_memory(model, dtype)
  pieces = generation.stream_text(
    loaded.params, config, tokenizer, ids, sampling, dtype=loaded.dtype
  )
  return ''.join(pieces)
