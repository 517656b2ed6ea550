"""Python runs this first in every process that a test starts.

As conftest.py: what JAX traces is made of objects by the million, of which
hardly any is garbage.
"""

import gc

gc.set_threshold(100_000, 50, 100)
