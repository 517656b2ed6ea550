"""Reads the files of a folder's tokenizer.

tokenizer.json says alone which ids a text has: the tokenizers library reads it
as it is. tokenizer_config.json says which tokens begin and end a text, and has
the chat template. Only a folder without a tokenizer.json leaves all to
transformers.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lorapr_jax.errors import UserError, short
from lorapr_jax.runtime.files import read_bytes, read_json
from lorapr_jax.runtime.paths import files_in

# One of these holds the vocabulary.
_VOCABULARIES = ('tokenizer.json', 'tokenizer.model*', 'vocab.json', 'tekken*')
# The names of special tokens that a chat template may use.
_ROLES = ('bos_token', 'eos_token', 'unk_token', 'pad_token')


# In bytes. The vocabulary of 262,144 tokens takes half of that; templates have
# thousands.
_MOST, _MOST_TEMPLATE = 2**26, 2**22
# The library takes memory for every id up to the highest.
_MOST_TOKENS = 2**22


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
  """tokenizer_config.json of a local folder, over special_tokens_map.json.

  A special token is its text alone, as it is in newer files.
  """
  settings = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (path := folder / name).is_file():
      settings |= read_json(path)
  for role in _ROLES:
    if isinstance(token := settings.get(role), dict):
      settings[role] = token.get('content', token)
    _check(folder, settings, role, str | None, 'the text of a token')
  for key in ('add_bos_token', 'add_eos_token'):
    _check(folder, settings, key, bool | None, 'true or false')
  _check(folder, settings, 'added_tokens_decoder', dict | None, 'an object')
  return settings


def _check(
  folder: Path, settings: dict[str, Any], key: str, kind: Any, what: str
) -> None:
  value = settings.get(key)
  if not isinstance(value, kind):
    raise UserError(
      f'{folder}/tokenizer_config.json: {key} is {short(repr(value))}, not '
      f'{what}'
    )


def chat_template_of(folder: Path, settings: dict[str, Any]) -> str | None:
  """The chat template of a local folder: a file, or one of its settings.

  Raises:
    UserError: if it is no text.
  """
  path = folder / 'chat_template.jinja'
  if path.is_file():
    try:
      return read_bytes(path, _MOST_TEMPLATE).decode()
    except UnicodeDecodeError as error:
      raise UserError(f'{path} is no text in UTF-8: {error}') from None
  template = settings.get('chat_template')
  if isinstance(template, list):
    named = {}
    for entry in template:
      entry = entry if isinstance(entry, dict) else {}
      for key in ('name', 'template'):
        _check(folder, entry, key, str, 'the text that a chat_template needs')
      named[entry['name']] = entry['template']
    template = named.get('default')
  settings = {'chat_template': template}
  _check(folder, settings, 'chat_template', str | None, 'a text')
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

  for path in vocabulary_files(folder):
    if path.stat().st_size > _MOST:
      raise UserError(
        f'{path} has {path.stat().st_size} bytes; {_MOST} of a vocabulary are '
        'read'
      )
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
  _check_ids(folder, front)
  return Loaded(fast, wrapped, front)


def read_fast(path: Path) -> Any:
  """A tokenizer.json as an object of the tokenizers library.

  Raises:
    UserError: if it is no JSON, or has ids for which memory would be taken.
    Exception: of many kinds, if it is damaged otherwise.
  """
  import tokenizers

  contents = read_json(path, _MOST)
  model, added = contents.get('model'), contents.get('added_tokens')
  vocab = model.get('vocab') if isinstance(model, dict) else None
  ids = list(vocab.values()) if isinstance(vocab, dict) else []
  if isinstance(added, list):
    ids += [token.get('id') for token in added if isinstance(token, dict)]
  _check_ids(path, ids)
  return tokenizers.Tokenizer.from_file(str(path))


def _check_ids(path: Path, ids: list[Any]) -> None:
  most = max((i for i in ids if type(i) is int), default=0)
  if most >= _MOST_TOKENS:
    raise UserError(
      f'{path} has the id {short(str(most))}; ids up to {_MOST_TOKENS - 1} are '
      'supported'
    )


def _read(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
  import tokenizers
  import transformers

  fast = read_fast(folder / 'tokenizer.json')
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
        f'{folder}/tokenizer_config.json has the {role} '
        f'{short(repr(tokens[role]))}, which tokenizer.json lacks: take both '
        'files from one tokenizer'
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
  first = next(iter(ids), None) if isinstance(ids, list) else ids
  if first is None:
    return None
  if type(first) is not int or first >= 2**31:
    raise UserError(
      f'{path}: {role}_id is {short(repr(ids))}, not the id of a token'
    )
  # Old files have -1 for no token.
  return None if first < 0 else fast.id_to_token(first)


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
  `adds_bos` is what tokenizer_config.json says; where that is None, the
  tokenizer's own files decide.
  """

  def ids(special: bool) -> list[int]:
    if fast is None:
      return wrapped.encode('a', add_special_tokens=special)
    return fast.encode('a', add_special_tokens=special).ids

  bare, full = ids(special=False), ids(special=True)
  places = range(len(full) - len(bare) + 1)
  found = [i for i in places if full[i : i + len(bare)] == bare]
  if not found:
    raise ValueError('its special tokens are not around a text')
  first = found[0]
  if adds_bos is None or wrapped.bos_token_id is None:
    return full[:first]
  return (full[:first] or [wrapped.bos_token_id]) if adds_bos else []
