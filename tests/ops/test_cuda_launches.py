"""Compares the launches that tools/cuda_model.py counts with the launches of the kernels.

The emulator counts the kernels of peft_ext. The operators that PyTorch runs beside these kernels are counted on a CPU;
on a GPU, each of these operators launches one kernel, and masked_fill two: a copy and the filling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_kernels import Launches
from nf4_cases import nf4_weight
from test_seeds import Generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext import NF4Weight, ops
from peft_ext.ops import checks
from peft_ext.reference import common

cuda_model = pytest.importorskip("cuda_model", reason="tools/ is not here: not a checkout")

pytestmark = pytest.mark.slow

BF16 = torch.bfloat16
T, K, N, R, E = 200, 128, 136, 8, 3  # more tokens than input features, so that DoRA's g and IA3's l scale W
SEED = torch.tensor([17, 4])
SMALL = ("launch", "launch by PyTorch")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * 0.1).to(dtype)


def kernels_of(method: str) -> int:
    """Returns the number of the kernels of peft_ext in a step of a layer, as the model counts them."""
    parts = cuda_model.LAYERS[method]
    # The part "column pass, g and dg" of cuda_model stands for two kernels if g scales W.
    return len(parts) - parts.count("launch by PyTorch") + parts.count("column pass, g and dg")


@pytest.mark.parametrize("method", ["LoRA", "LoRA, dropout", "QLoRA, dropout"])
def test_launches_of_lora(launches: Launches, method: str) -> None:
    torch.manual_seed(0)
    p, seed = (0.1, SEED) if "dropout" in method else (0.0, None)
    base = nf4_weight(N, K, BF16, 64, True) if "QLoRA" in method else draw(N, K, dtype=BF16)
    weight, adapter = checks.weight_args(base), (draw(R, K), draw(N, R), None)
    x, grad = draw(T, K, dtype=BF16), draw(T, N, dtype=BF16)
    (_, s), forward = launches.of("lora_linear", x, *weight, None, *adapter, 0.5, p, seed)
    _, backward = launches.of("lora_linear_backward", grad, x, *weight, *adapter, s, 0.5, p, seed, True)
    dequantize = "QLoRA" in method
    assert (forward, backward) == (4 + dequantize, 6 + dequantize)
    assert forward + backward == kernels_of(method)


def test_launches_of_dora(launches: Launches) -> None:
    torch.manual_seed(0)
    weight, adapter = checks.weight_args(draw(N, K, dtype=BF16)), (draw(R, K), draw(N, R))
    x, grad, g = draw(T, K, dtype=BF16), draw(T, N, dtype=BF16), draw(N)
    _, norm = launches.of("dora_weight_norm", *weight, *adapter, 0.5, BF16)
    more = (0.5, 0.0, None, False)
    (_, s, z), forward = launches.of("dora_linear", x, *weight, None, *adapter, g, *more, True)
    _, backward = launches.of("dora_linear_backward", grad, x, *weight, *adapter, g, s, z, False, *more, True, True)
    assert (norm, forward, backward) == (5, 5, 7)
    assert norm + forward + backward == kernels_of("DoRA")


def test_launches_of_ia3(launches: Launches) -> None:
    torch.manual_seed(0)
    weight, scale = checks.weight_args(draw(N, K, dtype=BF16)), draw(N)
    x, grad = draw(T, K, dtype=BF16), draw(T, N, dtype=BF16)
    (_, z), forward = launches.of("ia3_linear", x, *weight, None, scale, False, True)
    _, backward = launches.of("ia3_linear_backward", grad, x, *weight, None, scale, z, False, False, True, True)
    assert (forward, backward) == (1, 3)
    assert forward + backward == kernels_of("IA3")


@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "DoRA"])
def test_launches_of_experts(launches: Launches, method: str) -> None:
    torch.manual_seed(0)
    count = cuda_model.EXPERT_LAUNCHES
    base = draw(E, N, K, dtype=BF16)
    if method == "QLoRA":
        base = NF4Weight.stack([nf4_weight(N, K, BF16, 64, True) for _ in range(E)])
    weight, adapter = checks.weight_args(base), (draw(E, R, K), draw(E, N, R))
    x, grad, ends = draw(T, K, dtype=BF16), draw(T, N, dtype=BF16), torch.tensor([70, 70, T])
    dora = method == "DoRA"
    g, norm = None, 0
    if dora:
        g, norm = launches.of("dora_experts_weight_norm", *weight, ends, *adapter, 0.5, BF16)
    (_, s, z), forward = launches.of("lora_experts", x, *weight, None, ends, *adapter, g, 0.5, 0.0, None, dora)
    _, backward = launches.of(
        "lora_experts_backward", grad, x, *weight, ends, *adapter, g, s, z, 0.5, 0.0, None, True, dora
    )
    # Kernels that EXPERT_LAUNCHES does not count: in the forward the pass over x and the product; in the backward the
    # passes for P, dB and dA, and the product; with DoRA also the norm, and the pass for g ∘ dY and dg.
    assert forward == count["forward"] + 2
    assert backward == count["backward"] + 4 + dora * (count["dg"] + 1)
    assert norm == dora * (count["norm"] + 1)


class Counted(TorchDispatchMode):
    """Counts the calls of operators that launch a kernel of PyTorch on a GPU, without products. lift_fresh is called
    for the seed that the host draws."""

    SILENT = (
        "detach lift_fresh view _unsafe_view t transpose empty new_empty empty_like unbind select promote_types".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and (name := func._schema.name.partition("::")[2]) not in self.SILENT:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def launches(self) -> int:
        return sum(self.names.values()) + self.names["masked_fill"]


def steps() -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x = draw(T, K, dtype=BF16).requires_grad_()
    weight, stack = draw(N, K, dtype=BF16), draw(E, N, K, dtype=BF16)
    a, b, magnitude = draw(R, K).requires_grad_(), draw(N, R).requires_grad_(), draw(N).requires_grad_()
    as_, bs, magnitudes = (draw(E, *shape).requires_grad_() for shape in ((R, K), (N, R), (N,)))
    drop, ends = {"dropout_p": 0.1, "training": True}, torch.tensor([70, 70, T])
    return {
        "LoRA": lambda: ops.lora_linear(x, weight, a, b),
        "LoRA, dropout": lambda: ops.lora_linear(x, weight, a, b, **drop),
        "DoRA": lambda: ops.dora_linear(x, weight, a, b, magnitude),
        "IA3": lambda: ops.ia3_linear(x, weight, magnitude),
        "experts, LoRA": lambda: ops.lora_experts(x, stack, ends, as_, bs),
        "experts, LoRA, dropout": lambda: ops.lora_experts(x, stack, ends, as_, bs, **drop),
        "experts, DoRA": lambda: ops.dora_experts(x, stack, ends, as_, bs, magnitudes),
    }


@pytest.mark.parametrize("method", steps())
def test_operators_of_pytorch_in_a_step(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "host_generator", lambda device: Generator())  # as on a GPU
    step, count = steps()[method], cuda_model.EXPERT_LAUNCHES
    with Counted() as forward:
        y = step()
    grad = torch.ones_like(y)
    with Counted() as backward:
        y.backward(grad)
    if method.startswith("experts"):
        assert forward.launches() == count["g, forward"] * ("DoRA" in method), forward.names
        assert backward.launches() == count["g, backward"] * ("DoRA" in method), backward.names
    else:
        found = forward.names + backward.names
        assert forward.launches() + backward.launches() == cuda_model.LAYERS[method].count(SMALL[1]), found
