"""Text to token windows on disk to batches; batch t depends on seed and t."""

from collections.abc import Callable
import hashlib
import logging
import os
from pathlib import Path
import tempfile

import grain
import numpy as np

from lorapr_jax.data.demo import cache_dir
from lorapr_jax.data.sources import parse_spec, read_documents
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError

# Part of the cache's key: raise it when the windows change.
_FORMAT = 2

_log = logging.getLogger(__name__)


def training_windows(
  spec: str, tokenizer: Tokenizer | None, seq_len: int, vocab_size: int
) -> np.ndarray:
  """Every document followed by EOS, end to end, cut into windows (W, T).

  The last, incomplete window is dropped, with a warning. Packed once, then
  memory-mapped from the cache, whose key is a hash of text, tokenizer and
  length.

  Args:
    spec: a data spec (data/sources.py).
    tokenizer: None for synthetic data.
    seq_len: T.
    vocab_size: the model's.

  Raises:
    UserError: if there is less than one window, or a token that the model
      does not know.
  """
  if tokenizer is None:
    return _synthetic(spec, seq_len, vocab_size)
  documents = list(read_documents(spec))
  eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

  def encode() -> np.ndarray:
    return np.concatenate(
      [np.append(tokenizer.encode(d), eos) for d in documents]
    )

  return _windows(
    'train', spec, documents, tokenizer, seq_len, vocab_size, encode
  )


def evaluation_windows(
  spec: str, tokenizer: Tokenizer | None, seq_len: int, vocab_size: int
) -> np.ndarray:
  """One text, tokenised once, cut into windows (W, T); the rest is dropped.

  Documents are joined by a blank line (docs/method.md, evaluation). The
  arguments and errors are those of `training_windows`.
  """
  if tokenizer is None:
    return _synthetic(spec, seq_len, vocab_size)
  documents = list(read_documents(spec))

  def encode() -> np.ndarray:
    return tokenizer.encode('\n\n'.join(documents))

  return _windows(
    'eval', spec, documents, tokenizer, seq_len, vocab_size, encode
  )


def _windows(
  purpose: str,
  spec: str,
  documents: list[str],
  tokenizer: Tokenizer,
  seq_len: int,
  vocab_size: int,
  encode: Callable[[], np.ndarray],
) -> np.ndarray:
  key = f'{_FORMAT} {purpose} {seq_len} {vocab_size}'
  digest = hashlib.sha256(key.encode())
  digest.update(tokenizer.fingerprint)
  for document in documents:
    digest.update(document.encode() + b'\0')
  path = cache_dir() / 'windows' / f'{digest.hexdigest()[:32]}.npy'
  if not path.exists():
    tokens = encode().astype(np.int32)
    if len(tokens) < seq_len:
      raise UserError(
        f'{spec} has {len(tokens)} tokens: fewer than one window of {seq_len}'
      )
    if tokens.max() >= vocab_size:
      raise UserError(
        f'the tokenizer of {tokenizer.folder} gives id {tokens.max()}, but '
        f'the model has a vocabulary of {vocab_size}'
      )
    _keep(path, tokens)
  tokens = np.load(path, mmap_mode='r')
  rest = len(tokens) % seq_len
  if rest:
    _log.warning(
      '%s: the last %d of %d tokens fill no window of %d and are left out',
      *(spec, rest, len(tokens), seq_len),
    )
  return tokens[: len(tokens) - rest].reshape(-1, seq_len)


def _keep(path: Path, tokens: np.ndarray) -> None:
  """Writes an array to the cache, whole or not at all."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as partial:
      # Not by its name: NumPy's own writing may say nothing of a full disk.
      with tempfile.NamedTemporaryFile(dir=partial, delete=False) as file:
        np.save(file, tokens)
      os.replace(file.name, path)
  except OSError as error:
    raise UserError(
      f'{path.parent} cannot hold the packed text ({error.strerror or error}): '
      'set LORAPR_CACHE to a folder with room'
    ) from error


def _synthetic(spec: str, seq_len: int, vocab_size: int) -> np.ndarray:
  """A language in which nine tokens of ten follow from the one before."""
  parsed = parse_spec(spec)
  if parsed.scheme != 'synthetic':
    raise UserError(
      f'{spec} is text, but the model has no tokenizer: set model.path to a '
      'Hugging Face folder, or use synthetic:SEED'
    )
  count = int(parsed.options.get('windows', 256))
  successor = np.random.default_rng(0).permutation(vocab_size)
  rng = np.random.default_rng((1, int(parsed.path)))
  tokens = rng.integers(vocab_size, size=(count, seq_len), dtype=np.int32)
  follows = rng.random((count, seq_len)) < 0.9
  for t in range(1, seq_len):
    tokens[:, t] = np.where(
      follows[:, t], successor[tokens[:, t - 1]], tokens[:, t]
    )
  return tokens


def batches(
  windows: np.ndarray,
  *,
  batch_size: int,
  micro_batch_size: int,
  seed: int,
  shuffle: bool,
) -> Callable[[int], dict[str, np.ndarray]]:
  """The function t -> batch t: {'tokens', 'weights'}, each (M, B, T).

  A pure function of the seed and t, so that a resumed run goes on with the
  data it would have seen. Every epoch has its own order.

  Args:
    windows: (W, T).
    batch_size: windows a batch, M B.
    micro_batch_size: B.
    seed: of the order.
    shuffle: False takes the windows as they come.

  Raises:
    UserError: if there is less than one batch.
  """
  if len(windows) < batch_size:
    raise UserError(
      f'the training data has {len(windows)} windows of {windows.shape[1]} '
      f'tokens: fewer than one batch of {batch_size}'
    )
  dataset = grain.MapDataset.source(windows)
  if shuffle:
    dataset = dataset.seed(seed).shuffle()
  dataset = dataset.repeat().batch(batch_size)

  def batch(t: int) -> dict[str, np.ndarray]:
    tokens = dataset[t].reshape(-1, micro_batch_size, windows.shape[1])
    return {'tokens': tokens, 'weights': np.ones(tokens.shape, np.float32)}

  return batch
