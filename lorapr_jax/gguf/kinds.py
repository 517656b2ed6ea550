"""Layers of several kinds in a GGUF: their windows, and how they turn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lorapr_jax.hf.rope import is_positive
from lorapr_jax.models.config import MOST, ModelConfig, kind_fields
from lorapr_jax.models.rope import Rope

WINDOW = 'attention.sliding_window'
SLIDING = 'attention.sliding_window_pattern'
TURNING = 'attention.rope_pattern'
LOCAL_THETA = 'rope.freq_base_swa'
# A window in which all texts fit.
_ENDLESS = 2**30
# How layers with a window turn where the others are scaled: by a theta of
# their own, or by the same; neither is scaled.
OWN_THETA, SAME_THETA = 'own theta', 'same theta'


class Kinds(NamedTuple):
  """The kinds of layers that an architecture knows.

  Attributes:
    period: the last of so many layers has no window, if the file does not say
      which have; None: no layer has a window.
    always: whether some layer must have one.
    local: OWN_THETA or SAME_THETA; None: a window changes no rotation.
    turns: whether layer i turns; None: all do.
    says_turns: whether the file says which layers turn.
  """

  period: int | None = None
  always: bool = False
  local: str | None = None
  turns: Callable[[int], bool] | None = None
  says_turns: bool = False


class Layers(NamedTuple):
  """What tells the layers of a model apart, by layer.

  Attributes:
    windows: how many tokens each sees; None: all before it.
    ropes: how each turns; None: not at all.
  """

  windows: Sequence[int | None]
  ropes: Sequence[Rope | None]

  @classmethod
  def of(cls, config: ModelConfig) -> 'Layers':
    """Those of a model."""
    return cls(config.layer_windows, config.layer_ropes)

  @property
  def local(self) -> Rope | None:
    """How the first layer with a window turns; None: as one that has none."""
    pairs = zip(self.windows, self.ropes, strict=True)
    return next((rope for window, rope in pairs if window), None)


def kinds_lack(config: ModelConfig, kinds: Kinds) -> str | None:
  """What of a model's layers is of no such kind, in words."""
  layers, base = Layers.of(config), config.ropes[0]
  sizes = {*layers.windows} - {None}
  if sizes and kinds.period is None:
    return 'sliding window'
  if len(sizes) > 1:
    return 'windows of several sizes'
  turns = [rope is not None for rope in layers.ropes]
  local = layers.local or base
  if list(layers.ropes) != _ropes(kinds, base, local, layers.windows, turns):
    return 'layers that turn in such ways'
  return None


def _ropes(
  kinds: Kinds,
  base: Rope,
  local: Rope,
  windows: Sequence[int | None],
  turns: Sequence[bool] | None,
) -> list[Rope | None]:
  """How each layer turns.

  Args:
    kinds: of the architecture.
    base: how layers without a window turn.
    local: how those with one do, if `kinds.local` is OWN_THETA.
    windows: by layer.
    turns: by layer, what the file says, if it does.
  """
  theta = local.theta if kinds.local == OWN_THETA else base.theta
  ropes = []
  for i, window in enumerate(windows):
    rope = Rope(theta) if window and kinds.local else base
    if kinds.turns is not None and not kinds.turns(i):
      rope = None
    ropes.append(None if kinds.says_turns and not turns[i] else rope)
  return ropes


def kind_keys(config: ModelConfig, kinds: Kinds) -> dict[str, Any]:
  """The keys that say it, without the architecture's name."""
  layers, keys = Layers.of(config), {}
  if kinds.period is None or not (kinds.always or config.windows):
    return keys
  if config.windows:
    keys[WINDOW] = max(filter(None, layers.windows))
    keys[SLIDING] = [window is not None for window in layers.windows]
  else:  # llama.cpp wants some layer to have one.
    keys[WINDOW], keys[SLIDING] = _ENDLESS, [True for _ in layers.windows]
  if kinds.local == OWN_THETA:
    keys[LOCAL_THETA] = float((layers.local or config.ropes[0]).theta)
  if kinds.says_turns:
    keys[TURNING] = [rope is not None for rope in layers.ropes]
  return keys


def read_kinds(
  keys: dict[str, Any], kinds: Kinds, base: Rope, num_layers: int
) -> dict[str, Any]:
  """The fields of a ModelConfig that keys stand for; these are removed.

  Args:
    keys: of the file, without the architecture's name.
    kinds: of its architecture.
    base: how layers without a window turn.
    num_layers: of the model.

  Raises:
    ValueError: if a list has not an entry for each layer, or a window is none.
  """
  window, slides, local, turns = None, [False] * num_layers, base, None
  if kinds.period is not None:
    window = keys.pop(WINDOW, None)
    slides = keys.pop(SLIDING, kinds.period)
    if not isinstance(slides, list):
      if type(slides) is not int or slides < 1:
        raise ValueError(f'{SLIDING} is no number of layers')
      has_any = window is not None or kinds.always
      slides = [has_any and (i + 1) % slides > 0 for i in range(num_layers)]
    _check_flags(SLIDING, slides, num_layers)
    if any(slides) and (type(window) is not int or not 0 < window <= MOST):
      raise ValueError(f'{WINDOW} is no number of tokens')
  if kinds.local == OWN_THETA:
    theta = keys.pop(LOCAL_THETA, 10000.0)
    if type(theta) is not float or not is_positive(theta):
      raise ValueError(f'{LOCAL_THETA} is no positive number')
    local = Rope(theta)
  if kinds.says_turns:
    turns = keys.pop(TURNING, [True] * num_layers)
    _check_flags(TURNING, turns, num_layers)
  is_seen = any(slides) and window < _ENDLESS
  windows = [window if slide and is_seen else None for slide in slides]
  ropes = _ropes(kinds, base, local, windows, turns)
  return kind_fields(base, windows, ropes)


def _check_flags(key: str, flags: Any, num_layers: int) -> None:
  is_list = isinstance(flags, list) and len(flags) == num_layers
  if not is_list or {*map(type, flags)} != {bool}:
    raise ValueError(f'{key} does not say true or false for each layer')
