"""Functions that the tests of rotary positions and of attention share."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

import peft_ext


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=5e-5 * value.abs().max().item())


def assert_taken_back(
    model: nn.Module,
    step: Callable[[nn.Module], dict[str, Tensor]],
    calls: Callable[[nn.Module], int],
    rows: Callable[[nn.Module], list[tuple[bool, str]]],
) -> None:
    """Asserts that a part that is fused in both layers of a model stays fused in copies, and is stock after
    ``accelerate(model, blocks=False)`` and after ``restore``."""
    kinds, wanted = [type(module) for module in model.modules()], step(model)
    peft_ext.accelerate(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert calls(other) == 2
        assert_alike(step(other), wanted)
    peft_ext.accelerate(model, blocks=False)
    assert calls(model) == 0 and not any(fused for fused, _ in rows(model))
    peft_ext.restore(peft_ext.accelerate(model))
    assert [type(module) for module in model.modules()] == kinds
