"""Reads conversations out of records, in OpenAI's and in ShareGPT's form."""

from typing import Any

from lorapr_jax.errors import UserError

Message = dict[str, str]  # {'role', 'content'}

# The names that chat templates use, of ShareGPT's.
_ROLES = {'human': 'user', 'gpt': 'assistant'}


class OddConversation(UserError):
  """One that cannot be read, or that a chat template does not take."""


def read_messages(record: dict[str, Any]) -> list[Message]:
  """The turns of a conversation.

  They are in the field messages (role, content) or conversations (from, value).
  A text in the field system comes before them.

  Raises:
    OddConversation: if there are none, or if what one says is not plain: it
      calls a tool, or shows an image.
  """
  fields = [name for name in ('messages', 'conversations') if name in record]
  if not fields:
    raise OddConversation(
      'data.template=chat needs the field messages or conversations; the '
      f'record has {", ".join(record)}'
    )
  turns = next((record[name] for name in fields if record[name]), [])
  if not isinstance(turns, list):
    raise OddConversation(f'{fields[0]} is no list')
  messages = [_message(turn, i) for i, turn in enumerate(turns, 1)]
  if not messages:
    raise OddConversation('there are no messages')
  if record.get('tools') not in (None, '', '[]', []):
    raise OddConversation('it offers tools, which are not read')
  system = record.get('system')
  if system in (None, '', messages[0]['content']):
    return messages
  if not isinstance(system, str) or messages[0]['role'] == 'system':
    raise OddConversation('its system is no text, or a second one')
  return [{'role': 'system', 'content': system}, *messages]


def _message(turn: Any, number: int) -> Message:
  where = f'message {number}'
  if not isinstance(turn, dict):
    raise OddConversation(
      f'{where} is no object with the texts role and content (or from and '
      'value)'
    )
  if turn.get('tool_calls') or turn.get('function_call'):
    raise OddConversation(f'{where} calls a tool, which is not read')
  role, content = (
    next((turn[name] for name in names if turn.get(name) is not None), None)
    for names in (('role', 'from'), ('content', 'value'))
  )
  if isinstance(content, list):
    content = _joined(content)
  if not (isinstance(role, str) and isinstance(content, str)):
    raise OddConversation(
      f'{where} has not the texts role and content (or from and value)'
    )
  return {'role': _ROLES.get(role, role), 'content': content}


def _joined(parts: list[Any]) -> str | None:
  """The text of a message's parts; None if one is something else."""
  texts = [
    part.get('text')
    if isinstance(part, dict) and part.get('type') == 'text'
    else part
    for part in parts
  ]
  return ''.join(texts) if all(isinstance(x, str) for x in texts) else None
