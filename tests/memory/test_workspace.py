"""Compares the estimated scratch memory of operators with the operators' allocations."""

import pytest
import torch
from cuda_kernels import emulated_ops
from packed_weights import packed_weight
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from memory_steps import LLAMA, TOKENS, adapted, allocated, lora, one_thread  # noqa: F401  one_thread: a fixture

import peft_ext
from peft_ext import _cpu, _native, ops
from peft_ext.memory import estimate_memory, workspace
from peft_ext.weights import PackedWeight

pytestmark = pytest.mark.cpu_only("the estimated steps run on the CPU or not at all")


def test_a_dequantized_weight_is_temporary():
    model = nn.Sequential(nn.Linear(8, 256), peft_ext.nn.NF4Linear(256, 1024, bias=False))
    estimate = estimate_memory(model, inputs={"input": torch.empty(2, 8)})
    assert 0 <= estimate.temporary - 4 * 256 * 1024 < 2**16


@pytest.mark.parametrize("isa", ["amx", "avx2"])
def test_what_the_cpu_multiplies_is_temporary(isa: str, monkeypatch: pytest.MonkeyPatch):
    """In bfloat16 a layer's scratch is strips of activations, or float32 copies on a CPU without bfloat16 products."""
    monkeypatch.setattr(type(_native.STATE), "isa", isa)
    tokens, k, n = 512, 256, 1024
    model = nn.Sequential(peft_ext.nn.NF4Linear(k, n, bias=False), nn.Linear(n, 8, dtype=torch.bfloat16))
    inputs = {"input": torch.empty(tokens, k, dtype=torch.bfloat16)}
    estimate = estimate_memory(model, inputs=inputs, device="cpu")
    wanted = 2 * tokens * k if isa == "amx" else 4 * (tokens * (k + n) + n * k) + 2 * n * k
    assert 0 <= estimate.temporary - wanted < 2**16
    on_cuda = estimate_memory(model, inputs=inputs, device="cuda").temporary
    assert 0 <= on_cuda - 2 * k * n < 2**16


@pytest.mark.parametrize("chunk", [128, 512], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("rank", [0, 64], ids=["head", "LoRA on the head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_loss_takes_for_itself(dtype: torch.dtype, rank: int, chunk: int):
    """A loss needs scratch for a chunk's logits, for float32 logits where the loss widens, and for gradients of an
    adapter.
    """
    if dtype in _cpu.widened_dtypes() and dtype is torch.bfloat16 and _native.STATE.isa in _native.TILE_PATHS:
        pytest.skip("the tiles' strips, which are counted, are no tensors of PyTorch's")
    tokens, vocab, k = 512, 4096, 128
    hidden, labels = torch.randn(tokens, k).to(dtype), torch.zeros(tokens, dtype=torch.int64)
    lora_A, lora_B = (torch.randn(rank, k), torch.randn(vocab, rank)) if rank else (None, None)
    weight = ops.checks.weight_args(torch.randn(vocab, k).to(dtype))
    layer = (hidden, *weight, None, None, lora_A, lora_B, 1.0)
    loss = (1.0, 0.0, 0.0, -100, chunk, True)  # a summed loss without softcap and label smoothing
    args = (*layer, labels, torch.ones(tokens), *loss, True, bool(rank), False)
    results = sum(t.nbytes for t in workspace.LOSS(*args))
    wanted = allocated(lambda: workspace.LOSS(*args)) - results
    # PyTorch's own product in 16 bits packs 200 KB a thread.
    assert abs(workspace.workspace_bytes(workspace.LOSS, args, "cpu") - wanted) < 2**18


def test_the_weight_is_packed_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch):
    """On AVX-512 without bfloat16 instructions the portable path calls oneDNN, which packs the weight."""
    model = adapted(LLAMA, lora(), torch.bfloat16)
    chunk, weight = 2 * 2 * 64 * 512, 2 * 512 * 128
    seen = {}
    for isa, avx512, has in (("scalar", True, True), ("scalar", True, False), ("scalar", False, False),
                             ("avx512", True, False)):  # fmt: skip
        monkeypatch.setattr(type(_native.STATE), "isa", isa)
        monkeypatch.setattr(_cpu, "multiplies", lambda dtype, has=has: has or dtype is torch.float32)
        monkeypatch.setattr(_cpu, "capabilities", lambda avx512=avx512: {"avx512_f": avx512})
        seen[isa, avx512, has] = estimate_memory(model, **TOKENS).logits
    plain = seen["scalar", True, True]
    assert chunk <= plain < chunk + 2**16
    assert seen["scalar", True, False] == plain + weight and seen["scalar", False, False] == plain
    assert seen["avx512", True, False] > plain + 2 * chunk  # peft_ext's own product widens to float32


def of_cuda(name: str, *args: object) -> tuple[list[torch.Tensor], int, int]:
    """Returns the results of an operator's emulated CUDA kernels, the bytes that the call allocated in addition to the
    results, and the estimate of these bytes."""
    found = getattr(emulated_ops(), name)(*args)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    taken = allocated(lambda: getattr(emulated_ops(), name)(*args)) - sum(value.nbytes for value in found)
    return found, taken, workspace.workspace_bytes(getattr(torch.ops.peft_ext, name).default, args, "cuda")


@pytest.mark.parametrize("want_z", [True, False])
def test_the_estimate_of_a_dropout_of_dora_s_base_on_cuda(want_z: bool):
    """The dropout writes x; the backward writes the two gradients of x, and dY; without z, the forward writes Y."""
    tokens, k, n, r = 8, 32, 48, 4
    x, grad, lora = (
        torch.randn(tokens, k),
        torch.randn(tokens, n),
        (torch.randn(r, k), torch.randn(n, r), torch.rand(n)),
    )
    weight, dropout = ops.checks.weight_args(torch.randn(n, k)), (0.5, 0.25, torch.tensor([1, 2]), True)

    def estimate(name: str, *args: object) -> int:
        return workspace.workspace_bytes(getattr(torch.ops.peft_ext, name).default, args, "cuda")

    forward = estimate("dora_linear", x, *weight, None, *lora, *dropout, want_z)
    assert forward >= 4 * tokens * (k + (0 if want_z else n))
    s, z = torch.ops.peft_ext.dora_linear(x, *weight, None, *lora, *dropout, want_z)[1:]
    backward = estimate("dora_linear_backward", grad, x, *weight, *lora, s, z, False, *dropout, True, True)
    assert backward >= 4 * tokens * 2 * k


@pytest.mark.slow
@pytest.mark.parametrize("want_z", [True, False])
def test_what_a_dropout_of_dora_s_base_takes_on_cuda(want_z: bool):
    tokens, k, n, r = 512, 256, 384, 4
    x, lora = torch.randn(tokens, k), (torch.randn(r, k), torch.randn(n, r), torch.rand(n))
    weight = ops.checks.weight_args(torch.randn(n, k))
    dropout = (0.5, 0.25, torch.tensor([1, 2]), True)
    (_, s, z), taken, estimate = of_cuda("dora_linear", x, *weight, None, *lora, *dropout, want_z)
    assert 4 * tokens * k <= estimate <= taken < estimate + 2**17  # the terms of the adapter are not counted
    if want_z:
        grad = torch.randn(tokens, n)
        _, taken, estimate = of_cuda("dora_linear_backward", grad, x, *weight, *lora, s, z, False, *dropout, True, True)
        assert 4 * tokens * (2 * k + n) <= estimate <= taken < estimate + 2**17


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_gated_activation_takes_on_cuda(dtype: torch.dtype, rank: int):
    """One pass computes the activation and S, or (in float32, and for rank 33) the activation is computed first."""
    tokens, f, n = 1024, 512, 128
    gate, up, grad = (torch.randn(tokens, size).to(dtype) for size in (f, f, n))
    weight, lora = (
        ops.checks.weight_args(torch.randn(n, f).to(dtype)),
        (torch.randn(rank, f), torch.randn(n, rank), None),
    )
    given, scale = (gate, up, 3, *weight), (0.5, 0.25, torch.tensor([1, 2]))
    (_, s), taken, estimate = of_cuda("gated_lora_linear", *given, None, *lora, *scale)
    small = 2**21 if rank > 16 else 2**19  # the partial sums and the terms of the adapter are not counted
    assert gate.nbytes <= estimate <= taken < estimate + small
    for needs in (True, False):
        _, taken, estimate = of_cuda("gated_lora_linear_backward", grad, *given, *lora, s, *scale, needs)
        assert gate.nbytes <= estimate and taken < estimate + small


@pytest.mark.slow
def test_what_a_scaled_input_takes_on_cuda():
    tokens, k, n = 512, 256, 384
    weight = ops.checks.weight_args(torch.randn(n, k))
    _, taken, estimate = of_cuda("ia3_linear", torch.randn(tokens, k), *weight, None, torch.rand(k), True, True)
    assert estimate == taken == 4 * tokens * k


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["mxfp4", "dense"])
def test_what_a_stack_of_packed_experts_takes_on_cuda(packed: str):
    experts, rows, k, n, r = 4, 64, 256, 384, 4
    dense = torch.randn(experts, n, k)
    generator = torch.Generator().manual_seed(0)
    kept = [packed_weight("mxfp4", n, k, generator, dtype=torch.float32) for _ in range(experts)]
    weight = (*[dense, None, None, None, None], 0, [experts, n, k])
    decoded = 0
    if packed != "dense":
        weight, decoded = ops.checks.weight_args(PackedWeight.stack(kept)), dense.nbytes
    x, ends = torch.randn(rows, k), torch.tensor([10, 30, 30, rows])
    lora = (torch.randn(experts, r, k), torch.randn(experts, n, r))
    (_, s, z), taken, estimate = of_cuda("lora_experts", x, *weight, None, ends, *lora, None, 0.5, 0.0, None, False)
    assert decoded <= estimate <= taken < estimate + 2**19  # most tables and terms of the rows are not counted
    _, taken, estimate = of_cuda(
        "lora_experts_backward", torch.randn(rows, n), x, *weight, ends, *lora, None, s, z, 0.5, 0.0, None, True, False
    )
    assert decoded <= estimate <= taken < estimate + 2**19
    _, taken, estimate = of_cuda("dora_experts_weight_norm", *weight, None, *lora, 0.5, torch.float32)
    assert decoded <= estimate <= taken < estimate + 2**19
