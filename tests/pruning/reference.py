"""method.md, section 1, in NumPy: written from its text, float64, with loops.

Everything is a matrix, as in y = x W + s (x A) B: W (in, out), A (in, r),
B (r, out). Query head n is the columns [n H, (n + 1) H) of q_proj's W, and
belongs to KV head n // G. Nothing here knows of axis names.
"""

import numpy as np


def guided_gradient(a, b, grad_a, grad_b, *, lora_gradient, inputs):
  """Step 4: dL/d(AB) ~ A gB + gA B - gA gB, or one of its terms."""
  if lora_gradient == 'own':
    return grad_a @ b if inputs else a @ grad_b
  assert lora_gradient == 'full'
  return a @ grad_b + grad_a @ b - grad_a @ grad_b


def element_scores(w, a, b, grad_a, grad_b, *, s, score, **gradient):
  """Step 3: [dL/d(BA)_ij ((BA)_ij + W_ij)]^2, or the absolute value.

  Section 3, row 3: s is in the weight's term, not in the gradient's.
  """
  gradient = guided_gradient(a, b, grad_a, grad_b, **gradient)
  term = gradient * (w + s * (a @ b))
  return np.abs(term) if score == 'abs' else term**2


def members(group, *, K, G, H, F):
  """Step 2: what goes together.

  Returns:
    {projection: (axis, indices)}: the rows (axis 0) or columns (axis 1) of
    W that belong to member u are indices[u].
  """
  if group == 'mlp':
    channels = [[f] for f in range(F)]
    return {
      'gate_proj': (1, channels),
      'up_proj': (1, channels),
      'down_proj': (0, channels),
    }
  query_heads = [list(range(n * H, (n + 1) * H)) for n in range(K * G)]
  if group == 'kv_heads,queries_per_kv':
    return {'q_proj': (1, query_heads), 'o_proj': (0, query_heads)}
  kv_heads = [list(range(k * H, (k + 1) * H)) for k in range(K)]
  queries_of = [
    [i for n in range(K * G) if n // G == k for i in query_heads[n]]
    for k in range(K)
  ]
  return {
    'q_proj': (1, queries_of),
    'k_proj': (1, kv_heads),
    'v_proj': (1, kv_heads),
    'o_proj': (0, queries_of),
  }


def group_scores(scores, mask, group_members, *, norm):
  """Step 2's sum, for one layer.

  Args:
    scores: {projection: matrix}; projections without a score are left out.
    mask: (U,), 0 for what is masked.
    group_members: from `members`.
    norm: section 3, row 2, with section 2's 1e-8 and row 15's zeros.
  """
  total = np.zeros(len(mask))
  for name, (axis, indices) in group_members.items():
    if name not in scores:
      continue
    vector = np.zeros(len(mask))
    for u, alive in enumerate(mask):
      if alive:
        vector[u] = np.take(scores[name], indices[u], axis=axis).sum()
    if norm:
      vector = vector / (np.sqrt((vector**2).sum()) + 1e-8)
    total = total + vector
  return total


def moving_average(old, new, *, decay):
  """Step 5: G_t = 0.9 G_{t-1} + 0.1 Ghat_t."""
  return decay * old + (1 - decay) * new
