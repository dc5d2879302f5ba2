"""Compiled loops where nothing can be written."""

import numba.core.caching
import numpy as np

from unbraid.kernels import loops


def test_a_loop_is_compiled_even_where_no_folder_can_keep_it(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    count_from = loops.compiled(loops.count_from.py_func)
    assert count_from(2.0, np.array([1.0, 2.0, 3.0])) == 2
