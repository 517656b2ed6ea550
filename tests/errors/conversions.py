"""convert: what is there already, damaged GGUF files, a full disk."""

import struct

import gguf

from tests.errors.bend_gguf import METADATA, TENSORS, make_gguf
from tests.errors.case import Case, Place, with_argv
from tests.errors.commands import CHOICES
from tests.errors.runs import FULL

KINDS = 'tokenizer.ggml.token_type'


def _gguf(arch: str, **integers: int):
  def argv(place: Place) -> list[str]:
    writer = gguf.GGUFWriter(place.folder / 'MODEL.gguf', arch)
    for key, value in integers.items():
      writer.add_uint32(f'{arch}.{key}', value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ['convert', 'MODEL.gguf', 'OUT']

  return argv


def _bytes(content: bytes):
  def argv(place: Place) -> list[str]:
    place.write('MODEL.gguf', content)
    return ['convert', 'MODEL.gguf', 'OUT']

  return argv


def _lying(**parts):
  return _bytes(b''.join(make_gguf(**parts)))


def _to_existing(place: Place) -> list[str]:
  place.copy('MODEL')
  place.write('OUT/notes.txt', 'mine')
  return ['convert', 'MODEL', 'OUT']


def _model_to(*argv: str):
  def make(place: Place) -> list[str]:
    place.copy('MODEL')
    return ['convert', *argv]

  return make


CASES = [
  Case('`convert MODEL` without a destination', with_argv('convert', 'MODEL')),
  Case('`convert MODEL OUT`, where OUT exists', _to_existing),
  Case('`convert MODEL MODEL`, onto itself', _model_to('MODEL', 'MODEL')),
  Case(
    '`convert MODEL /dev/null/OUT`, a file in the way',
    _model_to('MODEL', '/dev/null/OUT'),
  ),
  Case(
    '`convert MODEL OUT --dtype int8`',
    _model_to('MODEL', 'OUT', '--dtype', 'int8'),
    varies=CHOICES,
  ),
  Case(
    '`convert MODEL OUT` on a full disk',
    _model_to('MODEL', 'OUT'),
    max_file_bytes=20_000,
    varies=FULL,
  ),
  Case(
    '`convert NONE OUT`, which does not exist',
    with_argv('convert', 'NONE', 'OUT'),
  ),
  Case(
    '`convert NONE.gguf OUT`, which does not exist',
    with_argv('convert', 'NONE.gguf', 'OUT'),
  ),
  Case(
    'MODEL.gguf is text',
    _bytes(b'version 1 of a pointer'),
    varies=r'(?<=GGUF \().*(?=\))',
  ),
  Case('MODEL.gguf is empty', _bytes(b''), varies=r'(?<=GGUF \().*(?=\))'),
  Case(
    'MODEL.gguf is cut short',
    _bytes(b'GGUF\x03' + 3 * b'\0' + 8 * b'\1'),
    varies=r'(?<=GGUF \().*(?=\))',
  ),
  Case('MODEL.gguf is a falcon', _gguf('falcon')),
  Case('MODEL.gguf lacks its sizes', _gguf('llama')),
  Case(
    'MODEL.gguf has a list in its metadata that ends behind its end',
    _lying(metadata=METADATA | {KINDS: struct.pack('<IIQ', 9, 0, 2**60)}),
  ),
  Case(
    'MODEL.gguf has 2,000,000,000 layers',
    _lying(metadata=METADATA | {'llama.block_count': 2 * 10**9}),
  ),
  Case(
    'A tensor of MODEL.gguf has other sizes than its metadata say',
    _lying(tensors=TENSORS | {'blk.0.ffn_down.weight': (4, 6)}),
  ),
  Case(
    'The tokens of MODEL.gguf are fewer than their types',
    _lying(metadata=METADATA | {KINDS: [3] * 6}),
  ),
  Case(
    'A token of MODEL.gguf is behind the end of its vocabulary',
    _lying(metadata=METADATA | {'tokenizer.ggml.bos_token_id': 5}),
  ),
]
