"""What a folder computes, by our own code."""

from pathlib import Path
from typing import Any

from checks import Truth
import jax
import jax.numpy as jnp
import numpy as np

from lorapr_jax.data import pipeline
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.generation import Sampling, stream_tokens
from lorapr_jax.eval.perplexity import HeldOut
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.models import decoder
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.trees import param_shapes

_WINDOWS, _LENGTH = 8, 48
_PROMPT, _NEW = 12, 24
# Of the held-out text, for the tokenizer and for log-likelihoods: so many
# lines, of at most so many tokens.
_LINES, _LONGEST = 12, 96


def measure(folder: Path, text: Path) -> None:
  """Writes the `Truth` of a Hugging Face folder into it.

  Args:
    folder: with weights and tokenizer.
    text: held out.
  """
  config = load_config(folder)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda _: place, param_shapes(config, np.float32))
  params = load_params(folder, config, places, np.float32)
  tokenizer = Tokenizer(folder)
  windows = np.array(
    pipeline.evaluation_windows(
      f'file:{text}', tokenizer, _LENGTH, config.vocab_size
    )[:_WINDOWS]
  )

  @jax.jit
  def logits(tokens):
    hidden = decoder.hidden_states(params, tokens, config, dtype=jnp.float32)
    return decoder.logits(params, hidden, config)

  lines = text.read_text(encoding='utf-8').splitlines()
  lines = [line for line in lines if len(line.split()) > 3][:_LINES]
  prompt = windows[0, :_PROMPT]
  Truth(
    tokens=windows,
    logits=np.asarray(logits(windows)),
    prompt=prompt,
    greedy=np.fromiter(
      stream_tokens(
        params,
        config,
        prompt,
        Sampling(max_new_tokens=_NEW),
        dtype=jnp.float32,
      ),
      np.int32,
    ),
    perplexity=HeldOut(windows, str(text), _WINDOWS)
    .perplexity(params, Compute(config))
    .perplexity,
    text='\n'.join(lines),
    ids=tokenizer.encode('\n'.join(lines)).tolist(),
    continuations=[_continuation(line, tokenizer, logits) for line in lines],
  ).save(folder)


def _continuation(
  line: str, tokenizer: Tokenizer, logits: Any
) -> dict[str, Any]:
  """The line in two, and the log-likelihood of the second part."""
  words = line.split(' ')
  middle = len(words) // 2
  context = ' '.join(words[:middle])
  continuation = ''.join(f' {word}' for word in words[middle:])
  ids = tokenizer.encode(line)
  start = len(tokenizer.encode(context))
  # One length for all, so that it compiles once.
  padded = np.pad(ids, (0, _LONGEST - len(ids)))
  log_probs = np.asarray(jax.nn.log_softmax(logits(padded[None])[0]))
  chosen = ids[start:]
  rows = log_probs[start - 1 : len(ids) - 1]
  return {
    'context': context,
    'continuation': continuation,
    'log_likelihood': float(rows[np.arange(len(chosen)), chosen].sum()),
  }
