"""Runs 200 cases of the model fuzzer with fixed seeds, and tests that the fuzzer finds errors. See
``model_fuzz.py``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import model_fuzz
from model_life import ACTIONS, Case
from model_pair import BASES, MANY, METHODS, Statistics
from peft.tuners import lora
from tiny_models import FAMILIES

from peft_ext.integrations.adapter_layers import reasons
from peft_ext.integrations.adapter_layers.base import FUSED, KEPT
from peft_ext.integrations.adapter_layers.lora import Lora, LowRank

CASES = 200


@pytest.fixture(scope="module")
def ran() -> tuple[Statistics, list[str]]:
    return model_fuzz.fuzz(range(CASES))


@pytest.mark.slow
def test_random_models_do_what_they_do_under_peft(ran: tuple[Statistics, list[str]]) -> None:
    seen, failures = ran
    assert seen.counts["cases"] == CASES
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_the_cases_draw_what_there_is(ran: tuple[Statistics, list[str]]) -> None:
    counts = ran[0].counts
    drawn = {kind: {key.removeprefix(f"{kind} ") for key in counts if key.startswith(f"{kind} ")}
             for kind in ("family", "method", "base", "action")}  # fmt: skip
    assert len(drawn["family"]) >= 0.95 * len(FAMILIES)
    assert drawn["method"] == set(METHODS)
    assert drawn["base"] == set(BASES)
    assert drawn["action"] == set(ACTIONS)


@pytest.mark.slow
def test_the_cases_compare_much_and_most_of_it_is_fused(ran: tuple[Statistics, list[str]]) -> None:
    counts = ran[0].counts
    assert counts["calls compared"] > 4 * CASES
    assert counts["fused layers"] > 0.75 * counts["layers"]
    assert counts["refused by PEFT"] < 0.15 * counts["calls compared"]  # the measured share is 0.11
    assert len(ran[0].rounded) > MANY


# --- that it can fail -------------------------------------------------------------------------------------------------


class _SavesItsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return grad + 0 * y


def _negative_grad_of_a(patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("peft_ext.ops.lora")

    class Ops:
        def __getattr__(self, name: str) -> Callable:
            op = getattr(torch.ops.peft_ext, name)
            if name != "lora_linear_backward":
                return op
            return lambda *args: (lambda x, a, *rest: (x, -a, *rest))(*op(*args))

    patch.setattr(module, "_ops", Ops())


def _first_scale_for_all(patch: pytest.MonkeyPatch) -> None:
    def concatenated(layer: Any, names: list[str]) -> tuple:
        pairs = [layer._pair(name) for name in names]
        scale = float(layer.scaling[names[0]])
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1), scale, None

    patch.setattr(Lora, "_concatenated", concatenated)


def _stale_base_after_unmerge(patch: pytest.MonkeyPatch) -> None:
    def unmerge(layer: Any) -> None:
        layer.__dict__.pop(KEPT, None)
        layer.merged_adapters.clear()

    patch.setattr(FUSED[lora.Linear], "unmerge", unmerge)


def _output_saved_for_backward(patch: pytest.MonkeyPatch) -> None:
    fused = LowRank._fused

    def saves(layer: Any, x: torch.Tensor) -> Any:
        y = fused(layer, x)
        return y if y is None else _SavesItsOutput.apply(y)

    patch.setattr(LowRank, "_fused", saves)


def _hook_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reasons, "hooked", lambda module: False)


FAULTS = {
    "the gradient of A has the other sign": _negative_grad_of_a,
    "a second active adapter has the first one's scale": _first_scale_for_all,
    "a dense base stays merged after unmerge": _stale_base_after_unmerge,
    "a layer saves what it returns": _output_saved_for_backward,
    "hooks within a layer do not run": _hook_forgotten,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100):
        with monkeypatch.context() as patch:
            FAULTS[fault](patch)
            failure, _ = model_fuzz.run_case(seed)
        if failure is not None and model_fuzz.run_case(seed)[0] is None:
            return
    pytest.fail("100 cases passed")


@pytest.mark.slow
def test_a_case_that_hangs_or_dies_fails_with_the_line_that_repeats_it() -> None:
    """The worker process of this test answers the warm-up, does not return from case 3, and ends in case 5."""
    server = """
import sys, time
for line in sys.stdin:
    if line == "3\\n": time.sleep(600)
    if line == "5\\n": sys.exit(1)
    print('{"failure": null, "seconds": 0.1, "counts": {"family x": 1}, "rounded": []}', flush=True)
"""
    worker = model_fuzz.Worker([sys.executable, "-c", server], limit=20.0)
    seen, failures = model_fuzz.fuzz(range(2, 8), worker=worker)
    assert (seen.counts["cases"], seen.counts["family x"]) == (6, 4)
    assert failures == [
        "case 3: it hangs: 20 s\n  python tests/fuzz/model_fuzz.py --case 3",
        "case 5: it ends its process\n  python tests/fuzz/model_fuzz.py --case 5",
    ]


def test_a_case_is_its_seed() -> None:
    told = []
    for _ in range(2):
        case = Case(7)
        case.draw()
        told.append((case.told, [(name, value.sum().item()) for name, value in case.stock.state_dict().items()]))
    assert told[0] == told[1]
