"""What other tools came to, each run by its own code on the same setting.

SmolLM2-135M-Instruct with repeated KV heads is pruned by the tool, and then
LoRA trains for the 100 steps of compare.py (rank 8, a learning rate of 1e-3
down to 0, the same batches) in float32 with torch 2.13, transformers 5.24 and
peft 0.21.2. The perplexities are of the same texts, windows and lengths: of the
dense model both harnesses give the same. One run each; compare.py does not make
them again.
"""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Peer:
  """A tool, after its pruning and LoRA.

  Attributes:
    name: shown.
    percent: of the groups that went.
    kept: the share of the parameters.
    commit: of the tool's code.
    settings: that differ from its defaults.
    perplexity: {text: value}, by the names of compare.py's texts.
  """

  name: str
  percent: int
  kept: float
  commit: str
  settings: str
  perplexity: Mapping[str, float]


def _perplexity(news: float, ptb: float, wikitext2: float) -> dict[str, float]:
  return {
    'held-out news': news,
    'PTB validation': ptb,
    'WikiText2 validation': wikitext2,
  }


PEERS = (
  Peer(
    'FLAP + LoRA',
    50,
    0.6630,
    '3bb57db',
    'WIFV, the same counts in each of our 26 layers, its bias compensation, '
    '128 windows of 128 tokens',
    _perplexity(79.4, 211.8, 100.1),
  ),
  Peer(
    'LLM-Pruner + LoRA',
    50,
    0.6628,
    '128a07d',
    'Taylor param_first, block-wise, 80 windows of 128 tokens',
    _perplexity(100.1, 328.0, 177.8),
  ),
)
