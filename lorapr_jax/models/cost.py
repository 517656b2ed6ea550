"""What a model costs to run, from its sizes alone."""

from lorapr_jax.models.config import ModelConfig


def forward_flops_per_token(
  config: ModelConfig, seq_len: int, *, with_logits: float = 1.0
) -> float:
  """Floating-point operations of a forward pass, for each of `seq_len` tokens.

  Two for each weight that multiplies a token, the output matrix among them,
  plus causal attention: token t meets t keys and t values, so on average
  4 H (T + 1) / 2 operations in each of a layer's query heads. Norms, RoPE, the
  softmax and biases are left out: they are less than a hundredth.

  Args:
    config: the sizes.
    seq_len: T, tokens.
    with_logits: the share of the tokens that the output matrix multiplies; a
      prefill needs the last one's logits alone.
  """
  tables = config.vocab_size * config.embed_dim
  vectors = sum(config.layer_vectors(shape) for shape in config.layers)
  weights = config.num_parameters - vectors - config.embed_dim
  if not config.tie_embeddings:
    weights -= tables  # The input embeddings are looked up.
  weights -= (1.0 - with_logits) * tables
  return 2.0 * weights + attention_flops_per_token(config, seq_len)


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """The part of `forward_flops_per_token` that is causal attention."""
  heads = sum(layer.num_heads for layer in config.layers)
  return 2.0 * config.head_dim * heads * (seq_len + 1)


def pass_flops_per_token(config: ModelConfig, seq_len: int) -> float:
  """The operations of a pruning event for each token: layers, and X^T X."""
  layers = forward_flops_per_token(config, seq_len, with_logits=0.0)
  inputs = (
    (shape.num_heads * config.head_dim, shape.mlp_dim)
    for shape in config.layers
  )
  return layers + 2.0 * sum(a * a + b * b for a, b in inputs)


# Of a scale of int8 weights, which is float32.
_SCALE_BYTES = 4


def weight_bytes(config: ModelConfig, bytes_each: int) -> int:
  """What all weights take; tied embeddings are there once.

  A number takes `bytes_each`. In a projection that the config says is
  quantised it takes one byte, and each output a scale beside it.
  """
  total = config.num_parameters * bytes_each
  for _, layers, shape in config.stacks:
    values, scales = config.quantized_numbers(shape)
    total += layers * (values * (1 - bytes_each) + scales * _SCALE_BYTES)
  return total


def kv_cache_bytes(
  config: ModelConfig, batch: int, context: int, bytes_each: int
) -> int:
  """What serving keeps of `batch` texts of `context` tokens each.

  That is a key and a value a KV head, of every token that a layer still sees:
  a layer with a window keeps no more than its window. A number takes
  `bytes_each`.
  """
  kept = sum(
    shape.num_kv_heads * min(context, window or context)
    for shape, window in zip(config.layers, config.layer_windows, strict=True)
  )
  return 2 * config.head_dim * batch * kept * bytes_each


def kv_cache_bytes_per_token(config: ModelConfig, bytes_each: int) -> int:
  """What generation keeps of every token; see `kv_cache_bytes`."""
  return kv_cache_bytes(config, 1, 1, bytes_each)
