"""Data specs and files that cannot be read as text."""

import gzip
import json

from tests.errors.case import (
  Case,
  Place,
  evaluate,
  train_model,
  train_tiny,
  with_argv,
)


def _file(did: str, spec: str, **files: str | bytes) -> Case:
  """`evaluate` on a spec, with these files; `a_txt` is written as a.txt."""

  def argv(place: Place) -> list[str]:
    place.copy('MODEL')
    for name, content in files.items():
      place.write(name.replace('_', '.'), content)
    return evaluate('--data', spec)

  return Case(f'`{spec}`, {did}' if did else f'`{spec}`', argv)


def _train(did: str, text: str, *overrides: str, **more) -> Case:
  def argv(place: Place) -> list[str]:
    place.copy('MODEL')
    place.text(text)
    return train_model(*overrides)

  return Case(did, argv, **more)


def _template(did: str, record: str, *overrides: str, chat: str = '') -> Case:
  """Training on two records of a .jsonl; `chat` is MODEL's chat template."""

  def argv(place: Place) -> list[str]:
    place.copy('MODEL')
    if chat:
      place.write('MODEL/chat_template.jinja', chat)
    place.write('a.jsonl', f'{record}\n{record}\n')
    return train_model('data.train=file:a.jsonl', *overrides)

  return Case(did, argv, late=True)


CASES = [
  Case('`data.train=`', with_argv(*train_tiny('data.train='))),
  _file('', 'wikitext2'),
  _file('', 'http://example.org/text.txt'),
  _file('', 'demo:news:test'),
  _file('a mixture', '0.7*file:a.txt + 0.3*file:a.txt', a_txt='word'),
  _file('which is not there', 'file:NONE.txt'),
  _file('which matches nothing', 'file:*.jsonl'),
  _file('which is a folder', 'file:MODEL'),
  _file('a kind that is not read', 'file:a.pdf', a_pdf='%PDF'),
  _file('of two kinds', 'file:[ab].*', a_txt='word', b_csv='text\nword\n'),
  _file('an unknown option', 'file:a.txt?field=text', a_txt='word'),
  _file('', 'tfds:the news'),
  _file('a folder that has no such data set', 'tfds:news?data_dir=MODEL'),
  _file('', 'synthetic:many'),
  _file('', 'synthetic:0?windows=0'),
  _file('', 'synthetic:0?rows=8'),
  _file('of a model with a tokenizer', 'synthetic:0'),
  _file('which is not UTF-8', 'file:a.txt', a_txt='größe'.encode('latin-1')),
  _file('which is empty', 'file:b.txt', b_txt=''),
  _file('two words, for windows of 32', 'file:c.txt', c_txt='word word'),
  _file(
    'line 2 is cut short',
    'file:a.jsonl',
    a_jsonl='{"text": "word"}\n{"text": "wo',
  ),
  _file(
    'a list that is cut short', 'file:a.json', a_json='[{"text": "word"},\n'
  ),
  _file('without the field', 'file:b.jsonl', b_jsonl='{"body": "word"}'),
  _file('where the field is a number', 'file:c.jsonl', c_jsonl='{"text": 3}'),
  _file('a list', 'file:d.jsonl', d_jsonl='["word"]'),
  _file('without the column', 'file:a.csv', a_csv='title,body\na,b\n'),
  _file('which is empty', 'file:b.csv', b_csv=''),
  _file(
    'a comma outside quotes', 'file:c.csv', c_csv='n,text\n1,Rain, then sun\n'
  ),
  _file('a quote that is not closed', 'file:d.csv', d_csv='text\n"Rain\nSun\n'),
  _file(
    'a line of 129 MiB once it is unpacked',
    'file:f.jsonl.gz',
    f_jsonl_gz=gzip.compress(b'x' * 2**20) * 129,
  ),
  _file('a lone surrogate', 'file:e.jsonl', e_jsonl='{"text": "\\ud800"}'),
  _file('which is not gzip', 'file:a.jsonl.gz', a_jsonl_gz='{"text": "word"}'),
  _file('which is not Parquet', 'file:a.parquet', a_parquet='text'),
  _train(
    '`data.train=0.7*file:TEXT.txt + file:TEXT.txt`',
    'word ' * 600,
    'data.train=0.7*file:TEXT.txt + file:TEXT.txt',
  ),
  _train(
    '`data.train=1*file:TEXT.txt + 0*file:TEXT.txt`',
    'word ' * 600,
    'data.train=1*file:TEXT.txt + 0*file:TEXT.txt',
  ),
  _train(
    '`data.train=0.5*file:TEXT.txt + 0.5*synthetic:0`',
    'word ' * 600,
    'data.train=0.5*file:TEXT.txt + 0.5*synthetic:0',
  ),
  _train(
    '`data.eval=0.5*file:TEXT.txt + 0.5*file:TEXT.txt`',
    'word ' * 600,
    'data.eval=0.5*file:TEXT.txt + 0.5*file:TEXT.txt',
  ),
  Case(
    '`data.train=file:TEXT.txt` for random weights',
    lambda place: [
      *train_tiny(f'data.train=file:{place.text().name}'),
    ],
    late=True,
  ),
  Case(
    '`data.train=synthetic:1?windows=15`, with train.batch_size=16',
    with_argv(*train_tiny('data.train=synthetic:1?windows=15')),
    late=True,
  ),
  _train(
    '`data.train` of seven windows, with train.batch_size=8',
    'word ' * 223,
    late=True,
    leaves=('CACHE', 'CACHE/'),
  ),
  _train(
    '`data.eval=file:NONE.txt`, which is not there',
    'word ' * 600,
    'data.eval=file:NONE.txt',
  ),
  _train(
    '`data.eval_seq_len=65` of a model with 64 positions',
    'word ' * 600,
    'data.eval_seq_len=65',
  ),
  _train('`data.packing=pad`', 'word ' * 600, 'data.packing=pad'),
  _train(
    '`data.max_tokens=31`, with train.seq_len=32',
    'word ' * 600,
    'data.max_tokens=31',
  ),
  _train(
    '`data.packing=concatenate` of two words, for windows of 32',
    'word word',
    'data.packing=concatenate',
    late=True,
  ),
  _train('`data.loss=answers`', 'word ' * 600, 'data.loss=answers'),
  _train(
    '`data.loss=response`, without data.response',
    'word ' * 600,
    'data.loss=response',
  ),
  _train('`data.template={{text`', 'word ' * 600, 'data.template={{text'),
  _train(
    '`data.template={{text}}` for a text file',
    'word ' * 600,
    'data.template={{text}}',
  ),
  _train(
    '`data.response={{answer}}`, without data.template',
    'word ' * 600,
    'data.response={{answer}}',
  ),
  _template(
    '`data.template={{question}}`, which the records have not',
    '{"q": "word", "a": "word"}',
    'data.template={{question}}',
  ),
  _template(
    '`data.template=chat`, where MODEL has no chat template',
    '{"messages": []}',
    'data.template=chat',
  ),
  _template(
    '`data.template=chat` for records without messages',
    '{"q": "word", "a": "word"}',
    'data.template=chat',
    chat='{{ messages }}',
  ),
  _template(
    '`data.template={{a}}` where `a` is always empty',
    '{"a": ""}',
    'data.template={{a}}',
  ),
  _template(
    '`data.template={{a * 10**10}}`, more memory than a record may take',
    '{"a": "word"}',
    'data.template={{a * 10**10}}',
  ),
  _template(
    '`data.loss=response` where the response is always empty',
    '{"q": "word", "a": ""}',
    'data.template={{q}}',
    'data.response={{a}}',
    'data.loss=response',
  ),
  _template(
    '`data.loss=response` where the prompts fill all windows',
    json.dumps({'q': 'word ' * 70, 'a': 'word'}),
    'data.template={{q}}',
    'data.response={{a}}',
    'data.loss=response',
    'data.max_tokens=64',
  ),
  _train('`data.eval_windows=-1`', 'word ' * 600, 'data.eval_windows=-1'),
]
