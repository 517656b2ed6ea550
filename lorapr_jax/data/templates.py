"""Makes documents of records: as they are, or by a Jinja or chat template."""

from collections.abc import Iterator
import dataclasses
import functools
import logging
from typing import Any, NamedTuple

from lorapr_jax.data import text_files
from lorapr_jax.data.conversations import OddConversation, read_messages
from lorapr_jax.data.sources import Spec, read_documents, read_records
from lorapr_jax.data.tokenizer import LONG, Tokenizer
from lorapr_jax.errors import UserError, choose, first_line
from lorapr_jax.runtime.limits import bounded, bounded_text

LOSSES = ('all', 'response')
CHAT = 'chat'

_log = logging.getLogger(__name__)
# So many of the conversations that are left out are named.
_NAMED = 3


@functools.cache
def _compile(key: str, source: str) -> Any:
  # Imported here because only templates need it.
  import jinja2
  from jinja2 import sandbox

  environment = sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    finalize=lambda value: '' if value is None else value,
  )
  try:
    return bounded(lambda: environment.from_string(source))
  except jinja2.TemplateSyntaxError as error:
    raise UserError(
      f'{key} is no Jinja template: line {error.lineno}: {error.message}'
    ) from None
  # Its constants are computed, and the Python that it becomes is compiled.
  except Exception as error:
    raise UserError(f'{key} cannot be compiled: {first_line(error)}') from error


def _render(key: str, source: str, record: dict[str, Any], where: str) -> str:
  import jinja2

  template = _compile(key, source)
  try:
    return bounded_text(lambda: template.render(record))
  except jinja2.UndefinedError as error:
    raise UserError(
      f'{where}: {key}: {error.message}; the record has {", ".join(record)}'
    ) from None
  # A template can raise anything, depending on what its author wrote.
  except Exception as error:
    raise UserError(f'{where}: {key}: {first_line(error)}') from error


class Document(NamedTuple):
  """A text to learn.

  Attributes:
    text: the text, which is not empty.
    responses: the (start, end) of each run of characters that counts in the
      loss; None: all characters count.
    rest: what follows of a long text, in parts that must be read before the
      next document; None if that is all.
  """

  text: str
  responses: tuple[tuple[int, int], ...] | None = None
  rest: Iterator[str] | None = None


@dataclasses.dataclass(frozen=True)
class Template:
  """Makes a text of a record: the settings data.template, response and loss.

  Attributes:
    template: a Jinja template over the record's columns; or `chat` for the
      tokenizer's chat template, over the column `messages` or `conversations`.
    response: a Jinja template of the answer, which is put after the first text.
    loss: one of LOSSES: whether all tokens count, or only those of the answer.
  """

  template: str = ''
  response: str = ''
  loss: str = 'all'

  def __post_init__(self):
    """Refuses settings that do not go together."""
    choose('data.loss', self.loss, LOSSES)
    if self.response and (not self.template or self.is_chat):
      raise UserError(
        'data.response follows a Jinja template: set data.template to one, or '
        'leave data.response empty'
      )
    if self.loss == 'response' and not (self.response or self.is_chat):
      raise UserError(
        'data.loss=response needs to know the response: set data.template and '
        'data.response, or data.template=chat'
      )
    if not self.is_chat:
      _compile('data.template', self.template)
      _compile('data.response', self.response)

  @property
  def is_chat(self) -> bool:
    """Whether the tokenizer's chat template is used."""
    return self.template == CHAT

  def applies_to(self, spec: Spec) -> bool:
    """Whether the records of a spec are put into the template.

    They are not if they are plain text: text files, the demo's news, and specs
    that name their column (`?column=text`). So a mixture can have both.
    """
    if not self.template or {'column', 'field'} & set(spec.options):
      return False
    if spec.scheme == 'file':
      return text_files.kind_of(spec.path) != '.txt'
    return spec.scheme not in ('demo', 'synthetic')


PLAIN = Template()


def template_documents(
  spec: Spec, template: Template, tokenizer: Tokenizer
) -> Iterator[Document]:
  """Yields the documents of a spec, made by the template where it applies.

  Records that give no text, or no response to learn, are left out. At the end a
  warning says how many.

  Raises:
    UserError: if a record does not fit the template, or if no text is left.
  """
  if not template.applies_to(spec):
    yield from map(_plain, read_documents(spec))
    return
  if template.is_chat and not tokenizer.has_chat_template:
    raise UserError(
      f'data.template=chat: the tokenizer of {tokenizer.folder} has no chat '
      'template; give a Jinja template instead'
    )
  render = functools.partial(_chat, tokenizer) if template.is_chat else _fill
  total = empty = odd = 0
  named: list[str] = []
  for record in read_records(spec):
    total += 1
    where = f'{spec.text}, record {total}'
    try:
      document = render(template, record, where)
    except OddConversation as error:
      odd += 1
      named += [f'record {total}: {error}'] if odd <= _NAMED else []
      continue
    learnt = document.responses is None or any(
      document.text[slice(*span)].strip() for span in document.responses
    )
    if learnt and document.text.strip():
      yield document
    else:
      empty += 1
  what = 'text' if template.loss == 'all' else 'response to learn'
  if empty + odd == total:
    what = '; '.join([f'any {what} by data.template', *named[:1]])
    raise UserError(f'{spec.text}: none of its {total} records gives {what}')
  if empty:
    _log.warning(
      '%s: %d of %d records give no %s and are left out',
      *(spec.text, empty, total, what),
    )
  if odd:
    named += ['...'] if odd > _NAMED else []
    _log.warning(
      '%s: %d of %d conversations cannot be read and are left out: %s',
      *(spec.text, odd, total, '; '.join(named)),
    )


def _plain(parts: Iterator[str]) -> Document:
  head, size = [], 0
  for part in parts:
    head.append(part)
    size += len(part)
    if size > LONG:
      return Document(''.join(head), rest=parts)
  return Document(''.join(head))


def _fill(template: Template, record: dict[str, Any], where: str) -> Document:
  prompt = _render('data.template', template.template, record, where)
  answer = _render('data.response', template.response, record, where)
  text = prompt + answer
  if template.loss == 'all':
    return Document(text)
  return Document(text, ((len(prompt), len(text)),))


def _chat(
  tokenizer: Tokenizer,
  template: Template,
  record: dict[str, Any],
  where: str,
) -> Document:
  """A conversation. Each turn of the assistant is a response, with its end.

  A turn that comes before all others but the system's answers nothing, and is
  no response.
  """
  messages = read_messages(record)
  try:
    text = tokenizer.chat_text(messages)
    if template.loss == 'all':
      return Document(text)
    spans = []
    asked = False
    for i, message in enumerate(messages):
      if asked and message['role'] == 'assistant':
        before = tokenizer.chat_text(messages[:i], answer_next=True)
        through = tokenizer.chat_text(messages[: i + 1])
        if not (text.startswith(through) and through.startswith(before)):
          raise OddConversation(
            "the tokenizer's chat template writes a turn otherwise once others "
            'follow, so that responses cannot be told: use data.loss=all'
          )
        spans.append((len(before), len(through)))
      asked = asked or message['role'] not in ('system', 'assistant')
  except OddConversation:
    raise
  except UserError as error:
    raise UserError(f'{where}: {error}') from None
  return Document(text, tuple(spans))
