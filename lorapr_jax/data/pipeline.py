"""Text to token windows on disk to batches; batch t depends on seed and t."""

from collections.abc import Callable
import hashlib
import os
from pathlib import Path
import tempfile

import grain
import numpy as np

from lorapr_jax.data.demo import cache_dir
from lorapr_jax.data.sources import parse_spec, read_documents
from lorapr_jax.errors import UserError
from lorapr_jax.files import read_json

# Part of the cache's key: raise it when the windows change.
_FORMAT = 1


class Tokenizer:
  """A folder's tokenizer, with its own habits about special tokens."""

  def __init__(self, folder: str | Path):
    """Loads the files of a Hugging Face folder.

    Raises:
      UserError: if there is no tokenizer that transformers can read.
    """
    # Here, since it takes seconds and synthetic data needs none.
    import transformers

    self.folder = Path(folder)
    if not list(self.folder.glob('tokenizer*')):
      raise UserError(
        f'{folder} holds no tokenizer files: copy them from the original model'
      )
    try:
      self._tokenizer = transformers.AutoTokenizer.from_pretrained(
        self.folder, local_files_only=True, trust_remote_code=False
      )
    # What a damaged file raises is up to transformers and tokenizers, which
    # raises Exception itself.
    except Exception as error:
      raise UserError(
        f'the tokenizer of {folder} cannot be read ({self._reason(error)}): '
        'copy the files of its original anew'
      ) from error
    self.eos_token_id = self._tokenizer.eos_token_id

  def _reason(self, error: Exception) -> str:
    for path in sorted(self.folder.glob('tokenizer*.json')):
      if read_json(path).get('auto_map'):
        return (
          f'{path.name} asks for code of its own (auto_map), and no code of a '
          'model is ever run'
        )
    return str(error).strip().partition('\n')[0] or repr(error)

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, with BOS in front if that is the tokenizer's habit."""
    ids = self._tokenizer(text, verbose=False)['input_ids']
    # Some tokenizers end every text with EOS: that is the packing's business.
    if ids and ids[-1] == self.eos_token_id:
      ids = ids[:-1]
    return np.asarray(ids, np.int32)

  @property
  def fingerprint(self) -> bytes:
    """A hash of the tokenizer's files."""
    digest = hashlib.sha256()
    names = ('*token*', 'vocab.json', 'merges.txt')
    for file in sorted(f for n in names for f in self.folder.glob(n)):
      digest.update(file.name.encode() + b'\0' + file.read_bytes())
    return digest.digest()


def training_windows(
  spec: str, tokenizer: Tokenizer | None, seq_len: int, vocab_size: int
) -> np.ndarray:
  """Every document followed by EOS, end to end, cut into windows (W, T).

  The last, incomplete window is dropped. Packed once, then memory-mapped from
  the cache, whose key is a hash of text, tokenizer and length.

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
  documents = read_documents(spec)
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
  documents = read_documents(spec)

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
    count = len(tokens) // seq_len
    if count == 0:
      raise UserError(
        f'{spec} has {len(tokens)} tokens: fewer than one window of {seq_len}'
      )
    if tokens.max() >= vocab_size:
      raise UserError(
        f'the tokenizer of {tokenizer.folder} gives id {tokens.max()}, but '
        f'the model has a vocabulary of {vocab_size}'
      )
    windows = tokens[: count * seq_len].reshape(count, seq_len)
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(dir=path.parent) as partial:
        # Not by its name: NumPy's own writing says nothing of a full disk.
        with tempfile.NamedTemporaryFile(dir=partial, delete=False) as file:
          np.save(file, windows)
        os.replace(file.name, path)
    except OSError as error:
      raise UserError(
        f'{path.parent} cannot hold the packed text: '
        f'{error.strerror or error}; set LORAPR_CACHE to a folder with room'
      ) from error
  return np.load(path, mmap_mode='r')


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
