"""Reads the files of a folder's tokenizer.

tokenizer.json says alone which ids a text has: the tokenizers library reads it
as it is. tokenizer_config.json says which tokens begin and end a text, and has
the chat template. Only a folder without a tokenizer.json leaves all to
transformers.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import files_in

# One of these holds the vocabulary.
_VOCABULARIES = ('tokenizer.json', 'tokenizer.model*', 'vocab.json', 'tekken*')
# The names of special tokens that a chat template may use.
_ROLES = ('bos_token', 'eos_token', 'unk_token', 'pad_token')


class Loaded(NamedTuple):
  """A tokenizer as the libraries know it.

  Attributes:
    fast: of the tokenizers library; None where transformers runs Python.
    wrapped: transformers' object, whose chat template and special tokens are
      used, and whose ids are where `fast` is None.
    front: the ids that stand before every text: BOS, or none.
  """

  fast: Any
  wrapped: Any
  front: list[int]


def settings_of(folder: Path) -> dict[str, Any]:
  """tokenizer_config.json, over the older special_tokens_map.json.

  A special token is its text alone, as it is in newer files.

  Args:
    folder: a local one.
  """
  settings = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (path := folder / name).is_file():
      settings |= read_json(path)
  for role in _ROLES:
    if isinstance(token := settings.get(role), dict):
      settings[role] = token.get('content')
  return settings


def chat_template_of(folder: Path, settings: dict[str, Any]) -> str | None:
  """The chat template of a local folder: a file, or one of its settings."""
  path = folder / 'chat_template.jinja'
  if path.is_file():
    return path.read_text(encoding='utf-8')
  template = settings.get('chat_template')
  if isinstance(template, list):
    named = {entry['name']: entry['template'] for entry in template}
    return named.get('default')
  return template


def vocabulary_files(folder: Path) -> list[Path]:
  """The files of which one holds the vocabulary."""
  return files_in(folder, *_VOCABULARIES)


def tokenizer_files(folder: Path) -> list[Path]:
  """All that ids or a chat's text depend on."""
  names = (*_VOCABULARIES, '*token*', 'merges.txt', 'chat_template*')
  return files_in(folder, *names)


def load_tokenizer(folder: Path) -> Loaded:
  """Reads the tokenizer of a local folder.

  Raises:
    UserError: if its files ask for code of their own, or contradict.
    Exception: of many kinds, if a file is damaged.
  """
  # Imported here: it takes seconds, and synthetic data do not need it.
  import transformers

  settings = settings_of(folder)
  own = str(settings.get('tokenizer_class'))
  if settings.get('auto_map') and not hasattr(transformers, own):
    raise UserError(
      f'{folder}/tokenizer_config.json asks for code of its own (auto_map), '
      'and no code of a model is ever run: use tokenizer files that need none'
    )
  if (folder / 'tokenizer.json').is_file():
    fast, wrapped = _read(folder, settings)
  else:
    wrapped = _read_by_transformers(folder)
    fast = wrapped.backend_tokenizer if wrapped.is_fast else None
  front = _front(fast, wrapped, settings.get('add_bos_token'))
  return Loaded(fast, wrapped, front)


def _read(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
  import tokenizers
  import transformers

  fast = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  fast.no_truncation()
  fast.no_padding()
  # Tokens that some folders name in tokenizer_config.json alone.
  named = settings.get('added_tokens_decoder') or {}
  for token in (named[i] for i in sorted(named, key=int)):
    if fast.token_to_id(token['content']) is None:
      fast.add_tokens([tokenizers.AddedToken(**token)])
  tokens = {role: settings.get(role) for role in _ROLES}
  for role in ('bos_token', 'eos_token'):
    if not tokens[role]:
      tokens[role] = _by_config(folder, fast, role)
    elif fast.token_to_id(tokens[role]) is None:
      raise UserError(
        f'{folder}/tokenizer_config.json has the {role} {tokens[role]!r}, '
        'which tokenizer.json lacks: take both files from one tokenizer'
      )
  wrapped = transformers.PreTrainedTokenizerFast(
    tokenizer_object=fast,
    chat_template=chat_template_of(folder, settings),
    **{role: token for role, token in tokens.items() if token},
  )
  return fast, wrapped


def _by_config(folder: Path, fast: Any, role: str) -> str | None:
  """The token that config.json gives a role, the first of several."""
  path = folder / 'config.json'
  ids = read_json(path).get(f'{role}_id') if path.is_file() else None
  first = ids[0] if isinstance(ids, list) else ids
  # Old files have -1 for no token.
  return None if first is None or first < 0 else fast.id_to_token(first)


def _read_by_transformers(folder: Path) -> Any:
  import transformers

  # transformers cannot always read the config of our own export without its
  # remote code. A tokenizer does not need that config: give it another.
  path = folder / 'config.json'
  remote = path.exists() and 'auto_map' in read_json(path)
  return transformers.AutoTokenizer.from_pretrained(
    folder,
    config=transformers.LlamaConfig() if remote else None,
    local_files_only=True,
    trust_remote_code=False,
  )


def _front(fast: Any, wrapped: Any, adds_bos: bool | None) -> list[int]:
  """The ids before every text.

  Some tokenizers also end every text with EOS. That is left to packing.

  Args:
    fast: as of `Loaded`.
    wrapped: as of `Loaded`.
    adds_bos: what tokenizer_config.json says; None if it says nothing. Then
      the tokenizer's own files decide.
  """

  def ids(special: bool) -> list[int]:
    if fast is None:
      return wrapped.encode('a', add_special_tokens=special)
    return fast.encode('a', add_special_tokens=special).ids

  bare, full = ids(special=False), ids(special=True)
  places = range(len(full) - len(bare) + 1)
  first = next(i for i in places if full[i : i + len(bare)] == bare)
  if adds_bos is None or wrapped.bos_token_id is None:
    return full[:first]
  return (full[:first] or [wrapped.bos_token_id]) if adds_bos else []
