"""A GGUF that we write is the same model to us and to transformers."""

import dataclasses
import json
import shutil
import struct
import unicodedata

import gguf
import jax
import numpy as np
import pytest
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.errors import UserError
from lorapr_jax.exporting.convert import convert
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.gguf.rope import FACTORS, Says, rope_tables
from lorapr_jax.gguf.write import write_gguf
from lorapr_jax.hf.write import GGUF_DTYPES, hf_tensors
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.rope import Llama3, Rope
from lorapr_jax.models.rotation import rope_frequencies

UNEQUAL = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(
    LayerShape(num_kv_heads=2, queries_per_kv=2, mlp_dim=64),
    LayerShape(num_kv_heads=1, queries_per_kv=2, mlp_dim=40),
    LayerShape(num_kv_heads=2, queries_per_kv=1, mlp_dim=32),
    LayerShape(num_kv_heads=2, queries_per_kv=1, mlp_dim=32),
  ),
  norm_eps=1e-5,
  ropes=(Rope(500.0, Llama3(4.0, 1.0, 4.0, 32)),),
  max_positions=128,
  bos_token_id=1,
  eos_token_id=(2, 5),
)
TOKENS = np.random.default_rng(2).integers(0, 96, (2, 24))
TEXT = (
  'In  1999 the mill-wheel turned 12345 times; it\'s "half": ½ m², WE\'RE\n\n'
  'The the   mill <|bos|>wheel <think>then</think> stopped. Größe 日本<|eos|>'
)


def write(path, params, config, **options):
  options = {'base': None, 'dtype': 'f32', 'name': 'Tiny', **options}
  write_gguf(path, params, config, **options)
  return path


def stored(weight, type_name):
  kind = gguf.GGMLQuantizationType[type_name]
  return gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)


def logits(params, config):
  hidden = decoder.hidden_states(params, TOKENS, config)
  return np.asarray(hidden) @ np.asarray(decoder.output_weight(params)).T


def contents(path):
  fields = gguf.GGUFReader(path).fields
  return {key: field.contents() for key, field in fields.items()}


def test_every_kind_is_read_back_exactly(kind, save_hf, load, tmp_path):
  config, params = load(save_hf(kind))
  path = write(tmp_path / 'new' / 'a.gguf', params, config)
  model = open_gguf(path)
  assert model.config == config
  found, expected = (
    dict(tensors)
    for tensors in (model.tensors(), hf_tensors(params, config, np.float32))
  )
  assert found.keys() == expected.keys()
  for name, weight in expected.items():
    np.testing.assert_array_equal(found[name], weight, err_msg=name)
  metadata = contents(path)
  assert metadata['general.architecture'] == 'llama'
  assert metadata['general.name'] == 'Tiny'
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('dtype', GGUF_DTYPES)
def test_every_dtype(dtype, random_params, tmp_path):
  """Norms stay float32; in q8_0, rows of 40 are stored as f16."""
  params = random_params(UNEQUAL, 'bfloat16' if dtype == 'bf16' else 'float32')
  path = write(tmp_path / 'a.gguf', params, UNEQUAL, dtype=dtype)
  found = dict(open_gguf(path).tensors())
  for name, weight in hf_tensors(params, UNEQUAL, np.float32):
    kind = 'F32' if weight.ndim == 1 else dtype.upper()
    if kind == 'Q8_0' and weight.shape[-1] % 32:
      kind = 'F16'
    # Blocks lie within rows, which heads are reordered by.
    np.testing.assert_array_equal(
      found[name], stored(weight, kind), err_msg=name
    )
  types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
  assert types['output_norm.weight'] == 'F32'
  assert types['token_embd.weight'] == types['output.weight'] == dtype.upper()
  odd = 'F16' if dtype == 'q8_0' else dtype.upper()
  assert types['blk.1.ffn_down.weight'] == odd
  name = {'f32': 'ALL_F32'}.get(dtype, f'MOSTLY_{dtype.upper()}')
  file_type = contents(path)['general.file_type']
  assert gguf.LlamaFileType(file_type).name == name


@pytest.mark.parametrize('tied', [False, True])
def test_unequal_layers(tied, random_params, load, tmp_path):
  config = dataclasses.replace(UNEQUAL, tie_embeddings=tied)
  params = random_params(config)
  path = write(tmp_path / 'a.gguf', params, config)
  metadata = contents(path)
  assert metadata['general.architecture'] == 'deci'
  assert metadata['deci.attention.head_count'] == [4, 2, 2, 2]
  assert metadata['deci.attention.head_count_kv'] == [2, 1, 2, 2]
  assert metadata['deci.feed_forward_length'] == [64, 40, 32, 32]
  assert metadata['deci.attention.key_length'] == 8

  assert convert(str(path), tmp_path / 'folder') == config
  files = json.loads((tmp_path / 'folder' / 'config.json').read_text())
  assert files['model_type'] == 'pruned_llama'
  again, read = load(tmp_path / 'folder')
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, read, params)
  np.testing.assert_array_equal(logits(read, again), logits(params, config))


def test_biases_lie_as_their_weights_do(random_params, tmp_path):
  """Each is stored as a column of its weight would be."""
  config = UNEQUAL.with_biases(LORA_TARGETS)
  params = random_params(config)
  for stack in params['stacks']:
    for part, names in PROJECTIONS.items():
      for name in names.keys() - {'o_proj', 'down_proj'}:
        leaves = stack[part][name]
        leaves['weight'] = leaves['weight'].at[:, 0].set(leaves['bias'])
  path = write(tmp_path / 'a.gguf', params, config, dtype='bf16')
  tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
  for i in range(4):
    for name in ('attn_q', 'attn_k', 'attn_v', 'ffn_gate', 'ffn_up'):
      weight, bias = (
        tensors[f'blk.{i}.{name}.{leaf}'] for leaf in ('weight', 'bias')
      )
      assert bias.tensor_type.name == 'F32'
      column = stored(np.asarray(bias.data), 'BF16')
      matrix = gguf.quants.dequantize(weight.data, weight.tensor_type)
      np.testing.assert_array_equal(matrix[:, 0], column)
  found = dict(open_gguf(path).tensors())
  for name, weight in hf_tensors(params, config, np.float32):
    kind = 'F32' if weight.ndim == 1 else 'BF16'
    np.testing.assert_array_equal(found[name], stored(weight, kind))


@pytest.mark.parametrize(
  'kind', ['mha', 'mha_tied', 'gqa', 'gqa_tied', 'wide_heads']
)
def test_transformers_reads_the_same_model(kind, save_hf, load, tmp_path):
  """Without `from_pretrained`, which also asks for the package accelerate."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  config, params = load(save_hf(kind))
  path = write(tmp_path / 'a.gguf', params, config)
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
  )
  read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
  missing, unknown = model.load_state_dict(read['tensors'], strict=False)
  assert missing == (['lm_head.weight'] if config.tie_embeddings else [])
  assert not unknown
  with torch.no_grad():
    theirs = model(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(logits(params, config), theirs, atol=2e-4)


def test_rope_factors_are_what_frequencies_are_divided_by():
  config = UNEQUAL
  plain, scaled = (
    rope_frequencies(config.head_dim, rope, 1, config.max_positions)
    for rope in (Rope(config.ropes[0].theta), *config.ropes)
  )
  factors = rope_tables(config, Says())[FACTORS]
  np.testing.assert_allclose(plain / factors, scaled, rtol=1e-5)
  assert factors[0] == 1.0 < factors[1] < factors[3] == 4.0


def test_a_table_of_other_factors_is_refused(random_params, tmp_path):
  path = write(tmp_path / 'a.gguf', random_params(UNEQUAL), UNEQUAL)
  factor = struct.pack('<f', rope_tables(UNEQUAL, Says())[FACTORS][1])
  content = path.read_bytes()
  assert content.count(factor) == 1
  path.write_bytes(content.replace(factor, struct.pack('<f', 3.0)))
  with pytest.raises(UserError, match='rope_freqs.weight holds a RoPE scaling'):
    open_gguf(path)


def test_without_a_tokenizer(random_params, tmp_path):
  # As in the config.json of LLaMA 1.
  config = dataclasses.replace(UNEQUAL, pad_token_id=-1)
  path = write(tmp_path / 'a.gguf', random_params(config), config)
  metadata = contents(path)
  assert 'tokenizer.ggml.padding_token_id' not in metadata
  assert metadata['tokenizer.ggml.model'] == 'none'
  assert metadata['tokenizer.ggml.eos_token_id'] == 2
  folder = tmp_path / 'folder'
  folder.mkdir()
  open_gguf(path).write_tokenizer(folder)
  assert [p.name for p in folder.iterdir()] == ['generation_config.json']


def test_llama_cpp_loads_it_under_its_name(random_params, tmp_path):
  """It looks up tokens of Phi-3 where a name has it."""
  params = random_params(UNEQUAL)
  for name, written in {'Phi-3-mini': 'Phi 3-mini', 'my': 'my'}.items():
    path = write(tmp_path / f'{name}.gguf', params, UNEQUAL, name=name)
    assert contents(path)['general.name'] == written
  tokenizer = sentencepiece()
  tokenizer.add_tokens(['<|endoftext|>'])
  base = save_sentencepiece(tmp_path / 'base', tokenizer)
  config = config_of(tokenizer.get_vocab_size())
  params = random_params(config)
  path = write(tmp_path / 'a.gguf', params, config, base=base, name='phi3')
  assert contents(path)['general.name'] == 'phi3'


def byte_level(pre):
  """A small tokenizer of 298 tokens that splits text in this way."""
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  digits = pre_tokenizers.Digits(individual_digits=True)
  trained = Tokenizer(models.BPE())
  # Trained without splitting digits apart, so that the splitting shows.
  trained.pre_tokenizer = byte_level
  trainer = trainers.BpeTrainer(
    vocab_size=296,
    special_tokens=['<|pad|>', '<|bos|>', '<|eos|>'],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  trained.train_from_iterator(
    [TEXT] * 3 + [" 1999 12345 000 WE'RE"] * 3, trainer
  )
  model = json.loads(trained.to_str())['model']
  vocab, merges = model['vocab'], [tuple(pair) for pair in model['merges']]
  tokenizer = Tokenizer(
    models.BPE(vocab, merges, ignore_merges=pre == 'llama-bpe')
  )
  words = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(
        Regex(
          r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
          + (r'|\p{N}' if pre == 'qwen2' else r'|\p{N}{1,3}')
          + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
        ),
        'isolated',
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.pre_tokenizer = {
    'gpt-2': byte_level,
    'smollm': pre_tokenizers.Sequence([digits, byte_level]),
  }.get(pre, words)
  if pre == 'qwen2':
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<|pad|>', '<|bos|>', '<|eos|>'])
  tokenizer.add_tokens(
    [AddedToken(t, normalized=False) for t in ('<think>', '</think>')]
  )
  if pre == 'llama-bpe':
    tokenizer.post_processor = processors.TemplateProcessing(
      single='<|bos|> $A',
      pair='<|bos|> $A <|bos|> $B',
      special_tokens=[('<|bos|>', 1)],
    )
  return tokenizer


def save_tokenizer(folder, tokenizer, **settings):
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings = {'bos_token': '<|bos|>', 'eos_token': '<|eos|>'} | settings
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return folder


def config_of(vocab_size):
  shape = LayerShape(num_kv_heads=1, queries_per_kv=1, mlp_dim=16)
  return ModelConfig(
    vocab_size=vocab_size, embed_dim=8, head_dim=8, layers=(shape,)
  )


def write_with(folder, tmp_path, random_params, vocab_size=300):
  config = config_of(vocab_size)
  return write(tmp_path / 'a.gguf', random_params(config), config, base=folder)


@pytest.mark.parametrize(
  'pre', ['gpt-2', 'smollm', 'llama-bpe', 'dbrx', 'qwen2']
)
def test_byte_level_tokenizer_comes_back(pre, tmp_path, random_params):
  original = byte_level(pre)
  base = save_tokenizer(
    tmp_path / 'base',
    original,
    pad_token={'content': '<|pad|>', 'lstrip': False},
    chat_template='not this one',
  )
  (base / 'chat_template.jinja').write_text('{{ "½" }}\n', encoding='utf-8')
  path = write_with(base, tmp_path, random_params)
  metadata = contents(path)
  assert metadata['tokenizer.ggml.pre'] == pre
  assert metadata['tokenizer.ggml.add_bos_token'] == (pre == 'llama-bpe')
  # 296 trained, 2 added, 2 to fill up.
  kinds = [3] * 3 + [1] * 293 + [4] * 2 + [5] * 2
  assert metadata['tokenizer.ggml.token_type'] == kinds
  assert metadata['tokenizer.ggml.tokens'][-2:] == ['[PAD298]', '[PAD299]']
  assert metadata['tokenizer.ggml.bos_token_id'] == 1
  assert metadata['tokenizer.ggml.eos_token_id'] == 2
  assert metadata['tokenizer.ggml.padding_token_id'] == 0

  folder = tmp_path / 'folder'
  folder.mkdir()
  open_gguf(path).write_tokenizer(folder)
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  ids = original.encode(TEXT).ids
  assert tokenizer.encode(TEXT).ids == ids
  assert tokenizer.get_vocab() == original.get_vocab()
  assert tokenizer.decode(ids) == original.decode(ids)
  apart = unicodedata.normalize('NFD', TEXT)
  assert tokenizer.encode(apart).ids == original.encode(apart).ids
  # A word of the vocabulary is one token, whatever the merges say.
  model = json.loads(tokenizer.to_str())['model']
  assert model['ignore_merges'] == (pre == 'llama-bpe')
  template = folder / 'chat_template.jinja'
  assert template.read_text(encoding='utf-8') == '{{ "½" }}\n'
  # The text tells the ways to split it apart.
  others = {'gpt-2', 'smollm', 'llama-bpe'} - {pre}
  if pre == 'qwen2':  # It splits this text as smollm does.
    others.remove('smollm')
  for other in others:
    assert byte_level(other).encode(TEXT).ids != ids


PIECES = ['▁', 't', 'h', 'e', 'a', 's', 'n', 'i', 'd']
UNIONS = ['▁t', 'he', 'an', '▁the', 'is', '▁an', 'the', 'and', 'this', 'th']
SPM_TEXT = 'the thesis and this ant  hath ½ then <x▁> t'


def sentencepiece(unions=UNIONS):
  """As transformers makes it of a SentencePiece model: every split merges."""
  special = ['<unk>', '<s>', '</s>']
  tokens = special + [f'<0x{i:02X}>' for i in range(256)] + unions + PIECES
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = [
    (union[:cut], union[cut:])
    for union in unions
    for cut in range(1, len(union))
    if union[:cut] in vocab and union[cut:] in vocab
  ]
  tokenizer = Tokenizer(
    models.BPE(vocab, merges, unk_token='<unk>', byte_fallback=True)
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 1)]
  )
  tokenizer.add_special_tokens(special)
  tokenizer.add_tokens([AddedToken('<x▁>', normalized=False)])
  return tokenizer


def merged_by_score(text, tokens, scores):
  """SentencePiece's rule: the union of the highest score first."""
  parts = list('▁' + text.replace(' ', '▁'))
  while True:
    unions = [
      (scores[tokens.index(left + right)], -i)
      for i, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
      if left + right in tokens
    ]
    if not unions:
      break
    at = -max(unions)[1]
    parts[at : at + 2] = [parts[at] + parts[at + 1]]
  return [
    token
    for part in parts
    for token in (
      [part] if part in tokens else [f'<0x{b:02X}>' for b in part.encode()]
    )
  ]


def save_sentencepiece(folder, tokenizer):
  names = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
  return save_tokenizer(folder, tokenizer, **names)


def test_sentencepiece_scores_merge_alike(tmp_path, random_params):
  tokenizer = sentencepiece()
  base = save_sentencepiece(tmp_path / 'base', tokenizer)
  metadata = contents(write_with(base, tmp_path, random_params))
  assert metadata['tokenizer.ggml.model'] == 'llama'
  tokens = metadata['tokenizer.ggml.tokens']
  scores = metadata['tokenizer.ggml.scores']
  count = tokenizer.get_vocab_size()
  assert count == 3 + 256 + len(UNIONS) + len(PIECES) + 1
  expected = [tokenizer.id_to_token(i) for i in range(count - 1)] + ['<x >']
  assert tokens[:count] == expected
  assert metadata['tokenizer.ggml.token_type'] == (
    [2, 3, 3]
    + [6] * 256
    + [1] * len(UNIONS + PIECES)
    + [4]
    + [5] * (300 - count)
  )
  assert metadata['tokenizer.ggml.add_bos_token'] is True
  assert metadata['tokenizer.ggml.add_space_prefix'] is True
  assert metadata['tokenizer.ggml.unknown_token_id'] == 0
  for text in SPM_TEXT.split('<x▁>'):
    theirs = tokenizer.encode(text).tokens
    assert ['<s>', *merged_by_score(text, tokens, scores)] == theirs


@pytest.mark.parametrize('prepend', ['always', 'first', 'never'])
def test_spaces_in_the_pre_tokenizer(prepend, tmp_path, random_params):
  """As newer folders of Llama 2 have them."""
  tokenizer = sentencepiece()
  tokenizer.normalizer = None
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    prepend_scheme=prepend, split=False
  )
  base = save_sentencepiece(tmp_path / 'base', tokenizer)
  metadata = contents(write_with(base, tmp_path, random_params))
  prefix = metadata['tokenizer.ggml.add_space_prefix']
  assert prefix == (prepend != 'never')


def test_gemmas_spaces_are_gone_before_it_splits(tmp_path, random_params):
  tokenizer = sentencepiece()
  tokenizer.normalizer = normalizers.Replace(' ', '▁')
  tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  base = save_sentencepiece(tmp_path / 'base', tokenizer)
  metadata = contents(write_with(base, tmp_path, random_params))
  assert not metadata['tokenizer.ggml.add_space_prefix']


def test_words_split_at_spaces_are_refused(tmp_path, random_params):
  tokenizer = sentencepiece()
  tokenizer.normalizer = None
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
  base = save_sentencepiece(tmp_path / 'base', tokenizer)
  with pytest.raises(UserError, match='"split": true'):
    write_with(base, tmp_path, random_params)


def field(number, value):
  """A field of a protocol buffer."""
  if isinstance(value, int):
    return bytes([number << 3, value])
  if isinstance(value, float):
    return bytes([number << 3 | 5]) + struct.pack('<f', value)
  size = len(value)
  return bytes([number << 3 | 2, size & 127 | 128, size >> 7]) + value


def save_pieces(path, tokenizer, model_type=2):
  """A tokenizer.model with a score for every id."""
  count = tokenizer.get_vocab_size() - 1
  pieces = b''
  for i in range(count):
    text = tokenizer.id_to_token(i)
    kind = 6 if text.startswith('<0x') else {0: 2, 1: 3, 2: 3}.get(i, 1)
    piece = field(1, text.encode()) + field(2, -0.5 * i) + field(3, kind)
    pieces += field(1, piece)
  path.write_bytes(pieces + field(2, field(3, model_type)))
  return count


def test_sentencepiece_model_gives_the_scores(tmp_path, random_params):
  tokenizer = sentencepiece()
  base = save_sentencepiece(tmp_path / 'base', tokenizer)
  count = save_pieces(base / 'tokenizer.model', tokenizer)
  metadata = contents(write_with(base, tmp_path, random_params))
  scores = metadata['tokenizer.ggml.scores']
  assert scores[:count] == [-0.5 * i for i in range(count)]
  assert scores[count:] == [-1000.0] * (300 - count)
  kinds = metadata['tokenizer.ggml.token_type']
  assert kinds[:4] == [2, 3, 3, 6] and kinds[count : count + 2] == [4, 5]


def other_pieces(base):
  save_pieces(base / 'tokenizer.model', sentencepiece(UNIONS[::-1]))


def unigram(base):
  save_pieces(base / 'tokenizer.model', sentencepiece(), model_type=1)


def half_a_model(base):
  unigram(base)
  path = base / 'tokenizer.model'
  path.write_bytes(path.read_bytes()[:1000])


def missing_merge(base):
  path = base / 'tokenizer.json'
  data = json.loads(path.read_text())
  data['model']['merges'].remove(['t', 'he'])
  path.write_text(json.dumps(data))


def late_merge(base):
  path = base / 'tokenizer.json'
  data = json.loads(path.read_text())
  merges = data['model']['merges']
  merges.append(merges.pop(merges.index(['t', 'he'])))
  path.write_text(json.dumps(data))


@pytest.mark.parametrize(
  'damage, problem',
  [
    (late_merge, 'merges are not those of a SentencePiece'),
    (missing_merge, 'merges are not those of a SentencePiece'),
    (other_pieces, "differ: token 259, 'th'"),
    (unigram, 'no SentencePiece model of type BPE'),
    (half_a_model, 'is no SentencePiece model: '),
  ],
)
def test_a_sentencepiece_that_does_not_fit(
  damage, problem, tmp_path, random_params
):
  base = save_sentencepiece(tmp_path / 'base', sentencepiece())
  damage(base)
  with pytest.raises(UserError, match=problem):
    write_with(base, tmp_path, random_params)
  assert list(tmp_path.iterdir()) == [base]


def set_normalizer(tokenizer):
  tokenizer.normalizer = normalizers.NFC()


def set_pre_tokenizer(tokenizer):
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def set_model(tokenizer):
  tokenizer.model = models.WordLevel({'a': 0}, unk_token='a')


def set_dropout(tokenizer):
  tokenizer.model.dropout = 0.5


def set_ignore_merges(tokenizer):
  tokenizer.model.ignore_merges = True


def set_template(tokenizer):
  tokenizer.post_processor = processors.TemplateProcessing(
    single='$A <|eos|>', special_tokens=[('<|eos|>', 2)]
  )


@pytest.mark.parametrize(
  'change, problem',
  [
    (set_normalizer, 'normalizer .*NFC'),
    (set_pre_tokenizer, 'pre_tokenizer .*"add_prefix_space": true'),
    (set_model, 'a model of type WordLevel'),
    (set_dropout, 'a model of dropout 0.5'),
    (set_ignore_merges, 'ignore_merges True with gpt-2'),
    (set_template, 'adds 1 tokens to a text'),
  ],
)
def test_another_tokenizer_is_named(change, problem, tmp_path, random_params):
  tokenizer = byte_level('gpt-2')
  change(tokenizer)
  base = save_tokenizer(tmp_path / 'base', tokenizer)
  with pytest.raises(UserError, match=problem):
    write_with(base, tmp_path, random_params)
  assert list(tmp_path.iterdir()) == [base]


def test_a_larger_vocabulary_is_refused(tmp_path, random_params):
  base = save_tokenizer(tmp_path / 'base', byte_level('gpt-2'))
  write_with(base, tmp_path, random_params, vocab_size=298)
  (tmp_path / 'a.gguf').unlink()
  with pytest.raises(UserError, match='ids up to 297, but the model has 297'):
    write_with(base, tmp_path, random_params, vocab_size=297)


def test_a_folder_without_tokenizer_json(tmp_path, random_params):
  base = save_tokenizer(tmp_path / 'base', byte_level('gpt-2'))
  (base / 'tokenizer.json').write_text('{}')
  with pytest.raises(UserError, match='tokenizer.json cannot be read'):
    write_with(base, tmp_path, random_params)
  (base / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='tokenizer.json is absent'):
    write_with(base, tmp_path, random_params)


def test_the_tokenizers_habit_is_kept(tmp_path, random_params):
  """add_bos_token of the settings, and special_tokens_map.json."""
  base = save_tokenizer(
    tmp_path / 'base', byte_level('gpt-2'), add_bos_token=True
  )
  metadata = contents(write_with(base, tmp_path, random_params))
  assert metadata['tokenizer.ggml.add_bos_token'] is True
  shutil.move(base / 'tokenizer_config.json', base / 'special_tokens_map.json')
  (tmp_path / 'a.gguf').unlink()
  again = contents(write_with(base, tmp_path, random_params))
  assert again == metadata
  (base / 'special_tokens_map.json').write_text('{"add_bos_token": true}')
  (tmp_path / 'a.gguf').unlink()
  with pytest.raises(UserError, match='no token has that role'):
    write_with(base, tmp_path, random_params)
  (base / 'special_tokens_map.json').write_text('{"add_eos_token": true}')
  with pytest.raises(UserError, match='add_eos_token is not supported'):
    write_with(base, tmp_path, random_params)


def test_nothing_is_written_over(tmp_path, random_params):
  path = tmp_path / 'a.gguf'
  path.write_text('precious')
  with pytest.raises(UserError, match='a.gguf exists already'):
    write(path, random_params(UNEQUAL), UNEQUAL)
  assert path.read_text() == 'precious'


def test_an_unknown_dtype_is_named(tmp_path, random_params):
  with pytest.raises(UserError, match="export.gguf_dtype is 'q4_0': choose"):
    write(tmp_path / 'a.gguf', random_params(UNEQUAL), UNEQUAL, dtype='q4_0')
