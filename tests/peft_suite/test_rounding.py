"""Tests which differences the plugin rounding.py takes for rounding."""

import pytest
import rounding
import torch

ONE = torch.tensor([1.0, 100.0])


@pytest.mark.parametrize(
    "one, other, taken",
    [
        (ONE, ONE + torch.tensor([1e-4, 0.0]), True),  # 1e-6 of the largest value; allclose alone would refuse it
        (ONE, ONE + torch.tensor([1e-3, 0.0]), False),
        (ONE, ONE * torch.tensor([float("nan"), 1.0]), False),
        (ONE.half(), ONE.half() + torch.tensor([0.1, 0.0]).half(), False),
        (ONE, ONE[:1], False),
    ],
)
def test_so_small_a_difference_of_float32_is_taken_and_counted(one, other, taken, monkeypatch) -> None:
    monkeypatch.setattr(rounding, "_test", "this one")
    rounding.TAKEN.clear()
    if one.shape == other.shape:
        assert not torch.allclose(one, other) and rounding.allclose(one, other) is taken
    if taken:
        rounding.assert_close(one, other)
    else:
        with pytest.raises(AssertionError):
            rounding.assert_close(one, other)
    assert bool(rounding.TAKEN) is taken
