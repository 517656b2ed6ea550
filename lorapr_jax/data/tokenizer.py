"""A folder's tokenizer: turns text into ids and back, and writes chats."""

from collections.abc import Iterator, Sequence
import contextlib
import hashlib
from pathlib import Path
from typing import Any
import warnings

import numpy as np

from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import files_in, path_of, tokenizer_folder

# One of these holds the vocabulary.
_VOCABULARIES = ('tokenizer.json', 'tokenizer.model*', 'vocab.json', 'tekken*')


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
      UserError: if there is no tokenizer that transformers can read.
    """
    # Imported here: it takes seconds, and synthetic data do not need it.
    import transformers

    self.folder = path_of(folder)
    self._local = tokenizer_folder(self.folder)
    if not files_in(self._local, *_VOCABULARIES):
      raise UserError(
        f'{folder} holds no tokenizer files: tokenizer.json (or '
        "tokenizer.model) is missing; copy the original model's"
      )
    # transformers cannot always read the config of our own export without its
    # remote code. A tokenizer does not need that config: give it another.
    path = self._local / 'config.json'
    remote = path.exists() and 'auto_map' in read_json(path)
    try:
      with _quiet(transformers.logging):
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
          self._local,
          config=transformers.LlamaConfig() if remote else None,
          local_files_only=True,
          trust_remote_code=False,
        )
    # For a damaged file the libraries raise many kinds of errors, and even
    # Exception itself.
    except Exception as error:
      self._check_files()
      raise self._error('the tokenizer', error) from error
    self.eos_token_id = self._tokenizer.eos_token_id

  def _check_files(self) -> None:
    """Raises a UserError for files that ask for code of their own."""
    for path in files_in(self._local, 'tokenizer*.json'):
      if read_json(path).get('auto_map'):
        raise UserError(
          f'{path} asks for code of its own (auto_map), and no code of a model '
          'is ever run: use tokenizer files that need none'
        )

  def encode(self, text: str) -> np.ndarray:
    """The ids of a text, with BOS in front if the tokenizer puts it there."""
    return self.encode_batch([text])[0]

  def encode_batch(
    self, texts: list[str], *, special: bool = True
  ) -> list[np.ndarray]:
    """The ids of each text, with BOS as in `encode` if `special` is set."""
    if not texts:
      return []
    batch = self._tokenizer(texts, add_special_tokens=special, verbose=False)
    ids = [np.asarray(ids, np.int32) for ids in batch['input_ids']]
    if not special:
      return ids
    # Some tokenizers end every text with EOS, but here the packing adds it.
    return [i[:-1] if len(i) and i[-1] == self.eos_token_id else i for i in ids]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens. Half a character is U+FFFD."""
    return self._tokenizer.decode(
      [int(i) for i in ids],
      skip_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )

  @property
  def wrapped(self) -> Any:
    """transformers' own object, for code that needs one."""
    return self._tokenizer

  @property
  def has_chat_template(self) -> bool:
    """Whether `encode_chat` can be used."""
    return bool(self._tokenizer.chat_template)

  def encode_chat(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
    """The ids of a conversation, up to where the assistant's answer begins.

    Args:
      messages: {'role': 'system', 'user' or 'assistant', 'content': text}.

    Raises:
      UserError: if there is no template, or it does not take these messages.
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
      messages: as for `encode_chat`.
      answer_next: whether the text ends where an assistant's answer begins.
      last_goes_on: whether it ends with the last message's own text.

    Raises:
      UserError: as `encode_chat`.
    """
    import jinja2

    try:
      return self._tokenizer.apply_chat_template(
        list(messages),
        add_generation_prompt=answer_next,
        continue_final_message=last_goes_on,
        tokenize=False,
      )
    except (ValueError, jinja2.TemplateError) as error:
      raise self._error('the chat template', error) from None

  def _error(self, what: str, error: Exception) -> UserError:
    reason = first_line(error)
    return UserError(f'{what} of {self.folder} cannot be used: {reason}')

  @property
  def fingerprint(self) -> bytes:
    """A hash of the tokenizer's files."""
    digest = hashlib.sha256()
    names = (*_VOCABULARIES, '*token*', 'merges.txt', 'chat_template*')
    for file in files_in(self._local, *names):
      digest.update(file.name.encode() + b'\0' + file.read_bytes())
    return digest.digest()
