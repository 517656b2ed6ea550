"""What a folder computes, by our own code."""

from pathlib import Path
from typing import Any

from checks import Truth
import jax
import jax.numpy as jnp
import numpy as np

from lorapr_jax import steps
from lorapr_jax.data import pipeline
from lorapr_jax.eval.perplexity import evaluate_perplexity
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.models import llama

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
  places = jax.tree.map(lambda _: place, llama.param_shapes(config, np.float32))
  params = load_params(folder, config, places, np.float32)
  tokenizer = pipeline.Tokenizer(folder)
  windows = np.array(
    pipeline.evaluation_windows(
      f'file:{text}', tokenizer, _LENGTH, config.vocab_size
    )[:_WINDOWS]
  )

  @jax.jit
  def logits(tokens):
    hidden = llama.hidden_states(params, tokens, config, dtype=jnp.float32)
    return llama.logits(params, hidden)

  lines = text.read_text(encoding='utf-8').splitlines()[:_LINES]
  prompt = windows[0, :_PROMPT]
  Truth(
    tokens=windows,
    logits=np.asarray(logits(windows)),
    prompt=prompt,
    greedy=_greedy(logits, prompt),
    perplexity=evaluate_perplexity(
      params,
      windows,
      steps.StepSettings(config),
      data=str(text),
      batch_size=_WINDOWS,
    ).perplexity,
    text='\n'.join(lines),
    ids=tokenizer.encode('\n'.join(lines)).tolist(),
    continuations=[_continuation(line, tokenizer, logits) for line in lines],
  ).save(folder)


def _greedy(logits: Any, prompt: np.ndarray) -> np.ndarray:
  """Without a cache: everything is computed again for every token."""
  ids = np.zeros(_PROMPT + _NEW, np.int32)
  ids[:_PROMPT] = prompt
  for i in range(_PROMPT, len(ids)):
    ids[i] = int(logits(ids[None])[0, i - 1].argmax())
  return ids[_PROMPT:]


def _continuation(
  line: str, tokenizer: pipeline.Tokenizer, logits: Any
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
