"""A folder's tokenizer: turns text into ids and back, and writes chats."""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import functools
import hashlib
from pathlib import Path
from typing import Any
import warnings

import numpy as np

from lorapr_jax.data import tokenizer_files
from lorapr_jax.data.conversations import OddConversation
from lorapr_jax.data.pieces import Pieces, ids_of
from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime.limits import bounded_text
from lorapr_jax.runtime.paths import path_of, tokenizer_folder
from lorapr_jax.runtime.rust import RustError, rust_errors

# A text of more characters is tokenised in pieces.
LONG = 2**20


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
  """Hides transformers' warnings about model types that it does not know."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity_error()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', FutureWarning)
      yield
  finally:
    logging.set_verbosity(verbosity)


class Tokenizer:
  """A folder's tokenizer, which adds special tokens in its own way.

  Attributes:
    folder: the folder.
    eos_token_id: the id that ends a text; None if there is none.
  """

  def __init__(self, folder: str | Path):
    """Loads the files of a Hugging Face folder.

    Raises:
      UserError: if there is no tokenizer that can be read.
    """
    # Imported here: it takes seconds, and synthetic data do not need it.
    import transformers

    self.folder = path_of(folder)
    self._local = tokenizer_folder(self.folder)
    if not tokenizer_files.vocabulary_files(self._local):
      raise UserError(
        f'{folder} holds no tokenizer files: tokenizer.json (or '
        "tokenizer.model) is missing; copy the original model's"
      )
    try:
      with _quiet(transformers.logging), rust_errors():
        self._loaded = tokenizer_files.load_tokenizer(self._local)
    except UserError:
      raise
    # For a damaged file the libraries raise many kinds of errors, and even
    # Exception itself.
    except Exception as error:
      raise UserError(self._reason('the tokenizer', error)) from error
    self._pieces = Pieces(self._loaded.fast)
    self.eos_token_id = self.wrapped.eos_token_id

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, with BOS in front if the tokenizer puts it there."""
    return self.encode_batch([text])[0]

  def encode_batch(
    self, texts: list[str], *, special: bool = True
  ) -> list[np.ndarray]:
    """The ids of each text, with BOS as in `encode` if `special` is set.

    EOS stands behind none of them.
    """
    if not texts:
      return []
    if max(map(len, texts)) > LONG:
      return [
        np.concatenate(list(self.encode_parts([text], special=special)))
        for text in texts
      ]
    fast, wrapped, front = self._loaded
    if fast is None:
      batch = wrapped(texts, add_special_tokens=False, verbose=False)
      found = batch['input_ids']
    else:
      with self._named_errors():
        found = ids_of(fast, texts)
    front = front if special else []
    return [np.asarray([*front, *ids], np.int32) for ids in found]

  def encode_parts(
    self, parts: Iterable[str], *, special: bool = True
  ) -> Iterator[np.ndarray]:
    """Yields the ids of one text, some at a time, in bounded memory.

    Together they are those of `encode_batch`. The parts are read as they are
    needed, but a tokenizer that transformers runs in Python takes the whole.
    """
    fast, wrapped, front = self._loaded
    yield np.asarray(front if special else [], np.int32)
    if fast is None:
      text = ''.join(parts)
      ids = wrapped.encode(text, add_special_tokens=False, verbose=False)
      yield np.asarray(ids, np.int32)
    else:
      with self._named_errors():
        yield from self._pieces.encode(parts)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens. Half a character is U+FFFD."""
    ids = [int(i) for i in ids]
    if self._loaded.fast is not None:
      with self._named_errors(), rust_errors():
        return self._loaded.fast.decode(ids)
    return self.wrapped.decode(
      ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )

  @property
  def wrapped(self) -> Any:
    """transformers' object: the special tokens and the chat template."""
    return self._loaded.wrapped

  @property
  def has_chat_template(self) -> bool:
    """Whether `encode_chat` can be used."""
    return bool(self.wrapped.chat_template)

  def encode_chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
    """The ids of a conversation, up to where the assistant's answer begins.

    The arguments and errors are those of `chat_text`.
    """
    text = self.chat_text(messages, answer_next=True)
    return self.encode_batch([text], special=False)[0]

  def chat_text(
    self,
    messages: Sequence[dict[str, str]],
    *,
    answer_next: bool = False,
    last_goes_on: bool = False,
  ) -> str:
    """A conversation as the chat template writes it, special tokens included.

    Args:
      messages: {'role': 'system', 'user' or 'assistant', 'content': text}.
      answer_next: whether the text ends where an assistant's answer begins.
      last_goes_on: whether it ends with the last message's own text.

    Raises:
      OddConversation: if there is no template, or it does not take these
        messages.
      UserError: if it takes too long or too much memory.
    """
    render = functools.partial(
      self.wrapped.apply_chat_template,
      list(messages),
      add_generation_prompt=answer_next,
      continue_final_message=last_goes_on,
      tokenize=False,
    )
    try:
      text = bounded_text(render)
      text.encode()  # Half a character cannot be tokenised.
      return text
    except (TimeoutError, MemoryError) as error:
      raise UserError(self._reason('the chat template', error)) from error
    # A template can raise anything, depending on what its author wrote.
    except Exception as error:
      reason = self._reason('the chat template', error)
      raise OddConversation(reason) from error

  @contextlib.contextmanager
  def _named_errors(self) -> Iterator[None]:
    """What the library gives up with in the block names this tokenizer."""
    try:
      yield
    except RustError as error:
      raise UserError(self._reason('the tokenizer', error)) from None

  def _reason(self, what: str, error: Exception) -> str:
    return f'{what} of {self.folder} cannot be used: {first_line(error)}'

  @property
  def fingerprint(self) -> bytes:
    """A hash of the tokenizer's files, and of the libraries that read them."""
    import tokenizers
    import transformers

    versions = tokenizers.__version__, transformers.__version__
    digest = hashlib.sha256(repr(versions).encode())
    for path in tokenizer_files.tokenizer_files(self._local):
      with path.open('rb') as file:
        content = hashlib.file_digest(file, 'sha256').digest()
      digest.update(path.name.encode() + b'\0' + content)
    return digest.digest()
