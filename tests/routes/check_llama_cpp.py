"""GGUF files in llama.cpp, through llama-cpp-python.

  .venvs/llama_cpp/bin/python tests/routes/check_llama_cpp.py FOLDER

FOLDER is what make_exports.py has written.
"""

from checks import Export, Results, Truth, differing, exports, folder_argument
import llama_cpp
import numpy as np

# By dtype: where our two best logits are nearer, which of them wins is left
# to rounding.
_GAPS = {'f32': 0.01, 'f16': 0.05, 'bf16': 0.1, 'q8_0': 0.2}


def main() -> None:
  """Every GGUF."""
  folder = folder_argument()
  results = Results(folder, 'llama_cpp_python')
  for export, truth in exports(folder, 'gguf'):
    check_file(export, truth, results)


def check_file(export: Export, truth: Truth, results: Results) -> None:
  """The best token everywhere, the perplexity, the tokenizer."""
  model = llama_cpp.Llama(
    export.path,
    n_ctx=truth.tokens.shape[1],
    logits_all=True,
    verbose=False,
    # Not rounded to float16, as they are by default.
    type_k=llama_cpp.GGML_TYPE_F32,
    type_v=llama_cpp.GGML_TYPE_F32,
  )
  theirs = logits(model, truth.tokens)
  second, best = np.sort(truth.logits, axis=-1)[..., -2:].swapaxes(0, -1)
  clear = (best - second > _GAPS[export.dtype]).T
  if clear.mean() < 0.5:
    raise RuntimeError(f'{export.name}: only {clear.mean():.0%} are clear')
  results.add(
    export,
    'best tokens',
    differing(truth.logits.argmax(-1)[clear], theirs.argmax(-1)[clear]),
    0,
  )
  ratio = perplexity(theirs, truth.tokens) / truth.perplexity
  results.add(export, 'perplexity ratio', abs(ratio - 1), 0.01)
  ids = model.tokenize(truth.text.encode(), add_bos=True, special=True)
  results.add(export, 'tokenizer ids', differing(truth.ids, ids), 0)


def logits(model: llama_cpp.Llama, tokens: np.ndarray) -> np.ndarray:
  """(W, T) ids to (W, T, V) logits, each window alone."""
  windows = []
  for window in tokens:
    model.reset()
    model.eval(window.tolist())
    windows.append(np.array(model.scores[: len(window)]))
  return np.stack(windows)


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
  """exp of the mean negative log-likelihood of every token but the first."""
  logits = logits[:, :-1].astype(np.float64)
  highest = logits.max(axis=-1, keepdims=True)
  log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
  chosen = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
  return float(np.exp((log_sum - chosen).mean()))


if __name__ == '__main__':
  main()
