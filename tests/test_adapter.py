"""Adapters as plain numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ciphertune.adapter import Adapter, LoraFactors, in_bfloat16


@given(arrays(np.float32, (3, 5), elements=st.floats(width=32, allow_nan=False)))
def test_rounding_to_bfloat16_is_torchs(values: np.ndarray) -> None:
    rounded = in_bfloat16(Adapter({"x": LoraFactors(values, values.T, 1.0)}, {"h": values}))
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(rounded.layers["x"].a, expected)
    assert np.array_equal(rounded.layers["x"].b, expected.T)
    assert np.array_equal(rounded.heads["h"], expected)
