"""What a run starts from: batches, held-out text, the base on the mesh."""

from collections.abc import Callable, Iterable
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lorapr_jax import sharding
from lorapr_jax.data import pipeline
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.generation import check_prompt
from lorapr_jax.hf.load import load_params
from lorapr_jax.models import llama
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.settings import RunSettings


class Places(NamedTuple):
  """Where things lie on the mesh.

  Attributes:
    base: a sharding for every tensor of the base.
    batch: of (micro-batches, sequences, tokens).
    state: replicated: the state is small.
  """

  base: Any
  batch: NamedSharding
  state: NamedSharding

  @classmethod
  def of(cls, settings: RunSettings, config: LlamaConfig) -> 'Places':
    """Refuses sizes that the mesh does not divide, before any work.

    Args:
      settings: of the run.
      config: the sizes, before the cut or after it.
    """
    mesh, train = sharding.make_mesh(settings.mesh), settings.train
    parts = settings.mesh['data'] * settings.mesh['fsdp']
    if train.micro_batch_size % parts:
      raise UserError(
        f'train.micro_batch_size {train.micro_batch_size} is not a multiple '
        f'of mesh.data * mesh.fsdp = {parts}'
      )
    return cls(
      base=sharding.shardings(
        mesh,
        llama.logical_axes(config)['params'],
        llama.param_shapes(config, settings.base_dtype),
      ),
      batch=sharding.sharding(
        mesh,
        ('accumulation', 'batch', 'length'),
        (1, train.micro_batch_size, train.seq_len),
      ),
      state=NamedSharding(mesh, P()),
    )


def load_base(
  path: Path | None,
  config: LlamaConfig,
  dtype: Any,
  shardings: Any,
  seed: int,
) -> Any:
  """The frozen weights, sharded: from the folder, or random."""
  if path:
    return load_params(path, config, shardings, dtype)
  init = jax.jit(
    functools.partial(llama.init_params, config=config, dtype=dtype),
    out_shardings=shardings,
  )
  return init(jax.random.key(seed))


def load_data(
  settings: RunSettings, specs: Iterable[str]
) -> tuple[dict[str, Callable[[int], Any]], np.ndarray | None]:
  """The batches of each spec, and the held-out windows if there are any.

  Returns:
    {spec: the function t -> batch t}, and (W, T) ids or None.
  """
  train, data = settings.train, settings.data
  path, vocab = settings.model_path, settings.step.config.vocab_size
  tokenizer = Tokenizer(path) if path else None
  if tokenizer:
    for prompt in settings.report.prompts:
      check_prompt(tokenizer.encode(prompt), settings.step.config)
  batches = {
    spec: pipeline.batches(
      pipeline.training_windows(spec, tokenizer, train.seq_len, vocab),
      batch_size=train.batch_size,
      micro_batch_size=train.micro_batch_size,
      seed=train.seed,
      shuffle=data.shuffle,
    )
    for spec in dict.fromkeys(specs)
  }
  if not data.eval:
    return batches, None
  held_out = pipeline.evaluation_windows(
    data.eval, tokenizer, data.eval_seq_len, vocab
  )
  return batches, held_out[: data.eval_windows or None]
