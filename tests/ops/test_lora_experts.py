"""Tests the operators over experts beyond the battery: routings, threads, single experts, and wrong offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from nf4_cases import nf4_weight
from op_db import SEED
from op_params import TILES
from torch import Tensor

from peft_ext import NF4Weight, ops, reference

K, N, R = 96, 80, 8

ROUTINGS = {
    "one expert has all": [0, 0, 200, 200],
    "the last has all": [0, 0, 0, 200],
    "none has any": [0, 0, 0, 0],
    "one row each": [1, 2, 3, 4],
    "uneven": [130, 131, 131, 200],
    "some rows are nobody's": [20, 33, 70, 120],
}


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape) * 0.1).to(dtype)


def operands(dtype: torch.dtype, kind: str, experts: int = 4, rows: int = 200) -> dict:
    torch.manual_seed(0)
    weight = draw(experts, N, K, dtype=dtype)
    if kind == "nf4":
        weight = NF4Weight.stack([nf4_weight(N, K, dtype, 64, True) for _ in range(experts)])
    return {"x": draw(rows, K, dtype=dtype), "weight": weight, "lora_A": draw(experts, R, K),
            "lora_B": draw(N, R, experts).permute(2, 0, 1), "bias": draw(experts, N, dtype=dtype)}  # fmt: skip


def with_magnitude(held: dict) -> dict:
    """Returns the operands with a magnitude for DoRA."""
    norm = ops.dora_experts_weight_norm(held["weight"], held["lora_A"], held["lora_B"], 0.5)
    return held | {"magnitude": norm * (1 + 0.1 * torch.sin(torch.arange(norm.numel())).view(norm.shape))}


def step(held: dict, offsets: Tensor, p: float = 0.25) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in held.items() if name != "weight"}
    function = ops.dora_experts if "magnitude" in held else ops.lora_experts
    y = function(weight=held["weight"], offsets=offsets, **leaves, scaling=0.5, dropout_p=p, training=True,
                 seed=SEED.to(offsets.device))  # fmt: skip
    torch.manual_seed(1)
    y.backward(draw(*y.shape, dtype=y.dtype).to(y.device))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def moved(held: dict, device: torch.device) -> dict:
    return {name: value.to(device) for name, value in held.items()}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_expert_is_a_layer_of_its_own(
    routing: str, dtype: torch.dtype, kind: str, method: str, device: torch.device, pytestconfig: pytest.Config
) -> None:
    """Compares each expert, with its dropout mask, with a layer of its own; experts without rows get zeros.

    On the CPU the bits are equal. On a GPU the operator rounds Y and dX once, and the layer rounds them twice.
    """
    exact = pytestconfig.getoption("--device") == "cpu"

    def same(got: Tensor, wanted: Tensor, made_of: torch.dtype = torch.float32) -> bool:
        bound = 2.0**-7 if torch.bfloat16 in (got.dtype, made_of) else 2.0**-20
        return torch.equal(got, wanted) if exact else ((got - wanted).norm() <= bound * wanted.norm()).item()

    held, ends = operands(dtype, kind), ROUTINGS[routing]
    held = moved(with_magnitude(held) if method == "dora" else held, device)
    trained = ("lora_A", "lora_B", "magnitude") if method == "dora" else ("lora_A", "lora_B")
    found = step(held, torch.tensor(ends, device=device))
    torch.manual_seed(1)
    grad, begin = draw(200, N, dtype=dtype).to(device), 0
    for e, end in enumerate(ends):
        rows, begin = slice(begin, end), end
        if rows.start == rows.stop:
            assert not any(found[name][e].any() for name in (*trained, "bias"))
            continue
        x, *adapter = (t.detach().clone().contiguous().requires_grad_()
                       for t in (held["x"][rows], *(held[name][e] for name in trained)))  # fmt: skip
        weight = held["weight"].expert(e) if kind == "nf4" else held["weight"][e]
        seed = (SEED + torch.tensor([0, e])).to(device)
        layer = ops.dora_linear if method == "dora" else ops.lora_linear
        y = layer(x, weight, *adapter, held["bias"][e], scaling=0.5, dropout_p=0.25, training=True, seed=seed)
        y.backward(grad[rows])
        for name, wanted in (("y", y), ("x", x.grad)):
            assert same(found[name][rows], wanted.detach()), name
        for name, value in zip(trained, adapter, strict=True):
            # The magnitude's gradient is computed from Z, which is kept in x's dtype.
            assert same(found[name][e], value.grad, dtype if name == "magnitude" else torch.float32), name
    assert not found["y"][begin:].any() and not found["x"][begin:].any()


# (rows of each expert, K, N, R) at which kernels take other branches: tiles of 64 rows, chunks of 1,024 rows, passes of
# 16, 32 and 64 ranks, blocks of 128 columns, sums in slabs of 64, many rows for each expert on average, and more
# experts than a block has threads.
SHAPES = {
    "tiles": ([64, 65, 0, 1, 127], 64, 128, 16),
    "chunks": ([0, 2100, 3, 1024, 1025], 64, 64, 4),
    "rank 32": ([70, 20], 96, 136, 32),
    "rank 40": ([70, 20], 160, 264, 40),
    "rank 72": ([33, 90], 32, 72, 72),
    "many rows": ([200, 0, 500], 72, 200, 8),
    "many experts": ([i % 3 for i in range(600)], 32, 8, 2),
    "one slab": ([5, 16, 17, 33], 64, 8, 3),
    "odd": ([5, 70], 37, 41, 5),
}


DROPPED = {"NK", "KN", "nested", "DoRA"}
DORA = {"DoRA", "DoRA, KN", "DoRA, nested", "DoRA, strided, bf16 adapters"}
KINDS = (*DROPPED, *DORA, "strided", "nf4", "bf16 adapters", "frozen", "NK, nothing dropped")


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in sorted(set(KINDS))]
    + [(torch.float16, "NK"), (torch.float16, "nf4"), (torch.float16, "DoRA")],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_against_float64(shape: str, dtype: torch.dtype, kind: str, device: torch.device) -> None:
    counts, k, n, r = SHAPES[shape]
    e, rows, p = len(counts), sum(counts) + 3, 0.25 if kind in DROPPED else 0.0
    torch.manual_seed(0)
    weight: Tensor | NF4Weight = draw(e, n, k, dtype=dtype)
    if "KN" in kind:
        weight = draw(e, k, n, dtype=dtype).transpose(1, 2)
    elif "strided" in kind:
        weight = draw(e, n, 2, k + 3, dtype=dtype)[:, :, 1, :k]
    elif kind == "nf4" or "nested" in kind:
        weight = NF4Weight.stack([nf4_weight(n, k, dtype, 64, "nested" in kind) for _ in range(e)])
    of_adapters = torch.bfloat16 if "bf16 adapters" in kind else torch.float32
    a, b = draw(e, r, k, dtype=of_adapters), draw(n, r, e, dtype=of_adapters).permute(2, 0, 1)
    held = {"x": draw(rows, k, dtype=dtype), "bias": draw(e, n, dtype=dtype)}
    if kind != "frozen":
        held |= {"lora_A": a, "lora_B": b}
    wide = weight.dequantize().double() if isinstance(weight, NF4Weight) else weight.double()
    if kind in DORA:
        norm = reference.dora_experts_weight_norm(wide, a, b, 0.5)
        held["magnitude"] = (norm * (1 + torch.randn(norm.shape) / 8)).to(of_adapters)
    ends, grad = torch.tensor(counts).cumsum(0), draw(rows, n, dtype=dtype)
    scale = {"scaling": 0.5, "dropout_p": p, "training": True} if kind != "frozen" else {}

    def run(of: Callable[[Tensor], Tensor], function: Callable[..., Tensor], base: Tensor | NF4Weight) -> list[Tensor]:
        leaves = {name: of(value).detach().requires_grad_() for name, value in held.items()}
        seed = {"seed": SEED.to(leaves["x"].device)} if scale else {}
        y = function(weight=base, offsets=ends.to(leaves["x"].device), **leaves, **scale, **seed)
        y.backward(of(grad))
        return [y, *(leaf.grad for leaf in leaves.values())]

    ours, plain = (ops.dora_experts, reference.dora_experts) if kind in DORA else (
        ops.experts_linear if kind == "frozen" else ops.lora_experts, reference.lora_experts)  # fmt: skip
    found = run(lambda value: value.to(device), ours, weight.to(device))
    bound = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1.5e-3}
    for got, want in zip(found, run(Tensor.double, plain, wide), strict=True):
        assert (got.cpu().double() - want).norm() <= max(bound[got.dtype], bound[dtype]) * want.norm()
    assert found[2 if kind == "frozen" else 3].stride() == held["bias" if kind == "frozen" else "lora_A"].stride()


@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_the_experts_that_have_rows(shape: str, kind: str, device: torch.device) -> None:
    counts, k, n, r = SHAPES[shape]
    torch.manual_seed(0)
    weight: Tensor | NF4Weight = draw(len(counts), n, k, dtype=torch.bfloat16)
    if kind == "nested":
        weight = NF4Weight.stack([nf4_weight(n, k, torch.bfloat16, 64, True) for _ in counts])
    a, b = draw(len(counts), r, k), draw(n, r, len(counts)).permute(2, 0, 1)
    wanted = reference.dora_experts_weight_norm(weight.dequantize().double() if kind == "nested" else weight.double(),
                                                a.double(), b.double(), 2.0)  # fmt: skip
    has = torch.tensor(counts) > 0
    for offsets in (None, torch.tensor(counts, device=device).cumsum(0)):
        found = ops.dora_experts_weight_norm(weight.to(device), a.to(device), b.to(device), 2.0, offsets=offsets).cpu()
        assert found.dtype is torch.float32
        asked = wanted if offsets is None else wanted * has[:, None]
        # On a GPU the kernel splits A and B into two bfloat16 terms each.
        torch.testing.assert_close(found, asked.float(), rtol=1e-5, atol=0)


@pytest.mark.cpu_only("it is about CPU threads")
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_count_of_threads_changes_a_bit(dtype: torch.dtype, method: str) -> None:
    held = operands(dtype, "nf4" if dtype is torch.bfloat16 else "dense", experts=40, rows=700)
    held = with_magnitude(held) if method == "dora" else held
    counts = torch.randint(0, 20, (40,), generator=torch.Generator().manual_seed(0))
    counts[7] = 700 - int(counts.sum()) + int(counts[7])  # expert 7 has more rows than a thread's share
    offsets, before, found = counts.cumsum(0), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16, 64):
            torch.set_num_threads(threads)
            found.append(step(held, offsets))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, wanted in found[0].items():
            # Without tiles for the dtype the value comes from PyTorch's product, whose bits may depend on the threads.
            of_pytorch = name in ("y", "x", "magnitude") and not (TILES and dtype is torch.bfloat16)
            assert torch.equal(other[name], wanted) or of_pytorch, name
            rtol = 1e-4 if dtype is torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(other[name], wanted, rtol=rtol, atol=1e-5)


def test_offsets_of_any_kind(device: torch.device) -> None:
    held = moved(operands(torch.float32, "dense"), device)
    wanted = step(held, torch.tensor([20, 33, 70, 120], device=device))
    strided = torch.tensor([20, 0, 33, 0, 70, 0, 120, 0], device=device)[::2]
    for offsets in (torch.tensor([20, 33, 70, 120], dtype=torch.int32, device=device), strided):
        for name, value in step(held, offsets).items():
            assert torch.equal(value, wanted[name]), name


@pytest.mark.cpu_only("a GPU does not read them on the host")
@pytest.mark.parametrize(
    ("ends", "text"),
    [([20, 10, 70, 120], "offsets has 10 at 1, wanted 20 to 200"), ([0, 0, 0, 201], "offsets has 201 at 3"),
     ([-1, 0, 0, 0], "offsets has -1 at 0")],
)  # fmt: skip
def test_offsets_that_are_none(ends: list[int], text: str) -> None:
    held = operands(torch.float32, "dense")
    with pytest.raises(RuntimeError, match=text):
        step(held, torch.tensor(ends))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("ends", [[20, 10, 70, 120], [200, 0, 200, 0], [-1, 0, 0, 0], [0, 0, 0, 201], [2**40, 3, 3, 3]])
def test_a_gpu_stays_within_its_memory(
    ends: list[int], kind: str, device: torch.device, pytestconfig: pytest.Config
) -> None:
    """For any offsets, a CUDA kernel accesses no memory out of bounds; the emulator checks each access."""
    if pytestconfig.getoption("--device") == "cpu":
        pytest.skip("the CPU refuses them")
    held = operands(torch.bfloat16, kind)
    for each in (held, with_magnitude(held)):
        found = step(moved(each, device), torch.tensor(ends, device=device))
        assert all(value.shape for value in found.values())


def test_what_nobody_has_is_not_touched(device: torch.device) -> None:
    """Rows after the last expert's rows, and the magnitude of an expert without rows, have no effect on a result."""
    held, ends = with_magnitude(operands(torch.bfloat16, "dense")), torch.tensor([20, 20, 70, 120])
    clean = step(moved(held, device), ends.to(device))
    held["x"][120:] = float("nan")
    held["magnitude"][1] = float("nan")
    for name, value in step(moved(held, device), ends.to(device)).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_stack_is_its_weights(double_quant: bool) -> None:
    weights = [nf4_weight(24, 40, torch.bfloat16, 32, double_quant) for _ in range(3)]
    stack = NF4Weight.stack(weights)
    assert tuple(stack.shape) == (3, 24, 40) and stack.stacked
    for e, weight in enumerate(weights):
        for name, tensor in weight.tensors().items():
            assert torch.equal(stack.expert(e).tensors()[name].reshape(-1), tensor.reshape(-1)), name
    assert torch.equal(stack.dequantize(), torch.stack([weight.dequantize() for weight in weights]))
    assert stack.nbytes <= sum(weight.nbytes for weight in weights)
    with pytest.raises(ValueError, match="differ"):
        NF4Weight.stack([weights[0], nf4_weight(24, 40, torch.bfloat16, 64, double_quant)])
    with pytest.raises(TypeError, match="empty"):
        NF4Weight.stack([])
    with pytest.raises(ValueError, match="wanted a result of NF4Weight.stack"):
        weights[0].expert(0)
    with pytest.raises(ValueError, match=r"wanted \(E, N, K\)"):
        replace(weights[0], stacked=True)
