"""Every family's folder comes out as it came in, bit by bit."""

import pytest
from safetensors.numpy import load_file

from lorapr_jax.hf.load import load_config
from lorapr_jax.hf.write import export_model
from tests.families.cover import each
from tests.kinds import KINDS

# Each kind, each dtype; and the rest of the matrix.
CASES = {(k, d): {k, d} for k in KINDS for d in ('float32', 'bfloat16')}


@pytest.mark.parametrize(('kind', 'dtype'), each(CASES))
def test_out_comes_what_came_in(kind, dtype, save_hf, load, tmp_path):
  source = save_hf(kind, dtype)
  config, params = load(source, dtype)
  export_model(tmp_path / 'out', params, config)
  assert load_config(tmp_path / 'out') == config
  before, after = (
    load_file(folder / 'model.safetensors')
    for folder in (source, tmp_path / 'out')
  )
  assert before.keys() == after.keys()
  for name, x in before.items():
    assert (x.dtype, x.shape) == (after[name].dtype, after[name].shape)
    assert x.tobytes() == after[name].tobytes(), name
