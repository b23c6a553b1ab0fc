"""Tests raw operators, which the public functions' checks do not protect: wrong sizes, modes, memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_ext import _native, ops

pytestmark = pytest.mark.cpu_only("the checks of a GPU's are its own, and threads a CPU's")

RAW = torch.ops.peft_ext
X, A, B, G = torch.randn(3, 16), torch.randn(4, 16), torch.randn(8, 4), torch.ones(8)
HEADS = torch.randn(1, 3, 5, 8)
DENSE = (torch.randn(8, 16), None, None, None, None, 0, [8, 16])
FLAT = (torch.zeros(64, dtype=torch.uint8), torch.ones(2), None, None, None, 64, [128])


def norm(lora_A: Tensor, lora_B: Tensor) -> object:
    return RAW.dora_weight_norm(*DENSE, lora_A, lora_B, 1.0, torch.float32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: norm(torch.randn(4, 200_000), B), r"lora_A has 800000 elements, wanted \[R, 16\]"),
        (lambda: norm(A, B[:2]), r"lora_B is not \[8, 4\]"),
        (lambda: norm(A[:0], B[:, :0]), "of a rank of 1 or more"),
        (lambda: RAW.dora_weight_norm_backward(G, *DENSE, A, B, G, torch.randn(1, 4), 1.0, torch.float32),
         r"u has 4 elements, wanted \[8, 4\]"),
        (lambda: RAW.dora_linear(X, *DENSE, None, A[:0], B[:, :0], G, 1.0, 0.0, None, False, False),
         "of a rank of 1 or more"),
        (lambda: RAW.lora_linear(X, *DENSE, None, A, B[:, :3], None, 1.0, 0.0, None), r"lora_B is not \[8, 4\]"),
        (lambda: RAW.scaled_dot_product_attention(HEADS, HEADS[:, :2], HEADS[:, :2], None, False, 1.0, 0.0, None, None),
         "q has 3 heads, wanted a multiple of k's 2"),
        (lambda: RAW.cross_entropy_rows(B.T, torch.zeros(4, dtype=torch.int64), None, 1.0, 0.0, 0.0, -100, True),
         r"logits is not \[T, V\] .* contiguous"),
        (lambda: RAW.gated_activation(torch.randn(3, 5), None, 0), "gate has 5 columns, wanted an even number"),
        (lambda: RAW.gated_activation(torch.randn(12, 1), torch.randn(1, 12), 3), "up is not of gate's shape"),
        (lambda: RAW.gated_activation_backward(torch.randn(3, 4), torch.randn(2, 6), torch.randn(2, 6), 3),
         "grad is not of the result's shape"),
        (lambda: RAW.ia3_scale_backward(torch.randn(3, 64), torch.randn(3, 8), torch.ones(8), True, False),
         "grad is not of x's shape"),
        (lambda: RAW.bottleneck_adapter_backward(torch.randn(9, 8).bfloat16(), torch.randn(9, 8), torch.zeros(9, 3),
                                                 torch.randn(3, 8), torch.randn(8, 3), 1.0, 0, True, True),
         "grad is not .* of x's type"),
        (lambda: RAW.bottleneck_adapter_backward(torch.randn(9, 6), torch.randn(9, 8), torch.zeros(9, 3),
                                                 torch.randn(3, 8), torch.randn(6, 3), 1.0, 0, True, True),
         "up_weight has 6 rows, wanted 8"),
        (lambda: RAW.ia3_linear(X, *FLAT, None, G, False, False), "ia3_linear: .* wanted"),
        (lambda: RAW.nf4_linear_backward(torch.randn(3, 8), *FLAT), "grad has 24 elements, wanted rows of 0"),
        (lambda: RAW.bottleneck_adapter(X, X, torch.randn(3, 16), torch.zeros(3), torch.randn(16, 3), torch.zeros(3),
                                        1.0, 0), "up_bias has 3 elements, wanted 16"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        call()


def lists_of_a_decoder_layer(size: int, norms: tuple[torch.dtype, ...], pairs: int = 1) -> tuple[list, list, list]:
    """Returns the lists of a layer with norms of these dtypes. ``pairs``: which norms these are."""
    tensors, sizes, numbers = [torch.ones(size, dtype=dtype) for dtype in norms], [0, 1, pairs], []
    numbers += [*(1e-5 for _ in norms), 0.0, 0.2]
    for _ in range(7):  # q, k, v, o, gate, up and down without adapters
        tensors.append(torch.eye(size, dtype=torch.bfloat16 if torch.bfloat16 in norms else torch.float32))
        sizes += [1, 0, size, size]
        numbers += [0.0, 0.0]
    return tensors, sizes, numbers


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"norms": (torch.float32, torch.bfloat16)}, "a norm's weight is not of x's type"),
        ({"norms": (torch.bfloat16, torch.float32)}, "a norm's weight is not of x's type"),
        ({"pairs": 8}, "the pairs of norms are 8, wanted a number from 0 to 7"),
        ({"pairs": -1}, "the pairs of norms are -1, wanted a number from 0 to 7"),
        ({"pairs": 0}, "tensors or numbers are not those of 0 norms and 7 layers"),
        ({"pairs": 7}, "tensors or numbers are not those of 6 norms and 7 layers"),
        ({"norms": (torch.bfloat16,) * 4, "last": 3}, "a norm's weight has 3 elements, wanted a divisor of 8"),
        ({"norms": (torch.bfloat16,) * 4, "last": 16}, "a norm's weight has 16 elements, wanted a divisor of 8"),
        ({"norms": (torch.bfloat16,) * 4, "last": 0}, "a norm's weight has 0 elements, wanted a divisor of 8"),
        ({"norms": (torch.bfloat16,) * 4, "pairs": 3, "last": 4}, "a norm's weight has 4 elements, wanted 8"),
        ({"norms": (torch.bfloat16,) * 3 + (torch.float32,)}, "a norm's weight is not of x's type"),
        ({"past": 7}, "no room for the tokens of x behind 7 tokens"),
        ({"past": 2**63 - 1}, "no room for the tokens of x"),
    ],
    ids=str,
)
def test_a_decoder_layer_writes_only_into_the_room_of_its_cache(changed: dict[str, Any], says: str) -> None:
    bf16, size = torch.bfloat16, 8
    past, norms = changed.get("past", 6), changed.get("norms", (bf16, bf16))
    lists = lists_of_a_decoder_layer(size, norms, changed.get("pairs", {2: 1, 4: 5}[len(norms)]))
    if "last" in changed:
        lists[0][3] = torch.ones(changed["last"], dtype=bf16)
    keys = torch.zeros(1, 1, 8, size, dtype=bf16)
    angles = torch.ones(1, 2, size, dtype=bf16)
    x = torch.randn(1, 2, size, dtype=bf16)
    with pytest.raises(RuntimeError, match=says):
        RAW.decoder_layer(x, angles, angles, None, keys, keys.clone(), past, *lists, 0)
    assert not keys.any()


def test_a_decoder_layer_keeps_lists_until_they_are_forgotten() -> None:
    size, plan, empty = 8, 2**62, ([], [], [])
    x, angles = torch.randn(1, 2, size), torch.ones(1, 2, size)

    def call(lists: tuple, plan: int) -> torch.Tensor:
        keys, values = torch.zeros(2, 1, 1, 8, size)
        return RAW.decoder_layer(x, angles, angles, None, keys, values, 3, *lists, plan)

    first = lists_of_a_decoder_layer(size, (torch.float32, torch.float32))
    second = lists_of_a_decoder_layer(size, (torch.float32, torch.float32))
    second[0][2].mul_(2)
    y, other = call(first, plan), call(second, 0)
    assert torch.equal(call(empty, plan), y) and not torch.equal(y, other)
    assert torch.equal(call(second, plan), other) and torch.equal(call(empty, plan), other)
    _native.STATE.module.forget_plan(plan)
    _native.STATE.module.forget_plan(plan)  # a second call for this plan does nothing
    for unknown in (plan, 0, -1):
        with pytest.raises(RuntimeError, match=f"none are kept under plan {unknown}"):
            call(empty, unknown)


def adapted_lists_of_a_decoder_layer(size: int) -> tuple[dict[str, torch.Tensor], tuple[list, list, list]]:
    """Returns the lists of a float32 decoder layer whose layers have a bias and an adapter with a scale for each rank,
    and o a double-quantized NF4 weight. Also returns the tensors of down, and ``offset``, the NF4 weight's offset."""
    generator, rank = torch.Generator().manual_seed(0), 4

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    named: dict[str, torch.Tensor] = {}
    tensors, sizes, numbers = [random(size), random(size)], [0, 1, 1], [1e-5, 1e-5, 0.0, 0.2]
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        weight, parts, layout = random(size, size) / size, [], 0
        if name == "o":
            weight, *parts, layout, _ = ops.nf4_quantize(weight, double_quant=True).op_args()
            named["offset"] = parts[3]
        own = {"bias": random(size), "A": random(rank, size), "B": random(size, rank), "scale": random(rank)}
        if name == "down":
            named |= {"weight": weight, **own}
        tensors += [weight, *parts, *own.values()]
        sizes += [0b0111100001 | (0b11110 if parts else 0), layout, size, size]
        numbers += [0.5, 0.0]
    return named, (tensors, sizes, numbers)


def replaced(tensor: torch.Tensor) -> None:
    tensor.data = (tensor.data + 1).contiguous()


def transposed(tensor: torch.Tensor) -> None:
    tensor.data = (tensor.data + 1).t().contiguous().t()  # no longer contiguous


def test_a_kept_decoder_layer_sees_each_change() -> None:
    """The layers that a call checked are kept: a later call reads new values, and checks again what has moved."""
    size, plan, empty = 64, 2**62 + 1, ([], [], [])
    named, lists = adapted_lists_of_a_decoder_layer(size)

    def call(lists: tuple, plan: int, tokens: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        x, keys = (torch.randn(1, *shape, generator=generator) for shape in ((tokens, size), (4, 16, 16)))
        angles = torch.ones(1, tokens, 16)
        return RAW.decoder_layer(x, angles, angles, None, keys, keys.clone(), 3, *lists, plan)

    last = call(lists, plan)
    assert torch.equal(call(empty, plan), last)
    changes: list[tuple[str, Callable]] = [(name, lambda tensor: tensor.mul_(1.5)) for name in named]
    changes += [(name, replaced) for name in named] + [(name, transposed) for name in ("weight", "A", "B")]
    changes += [("A", lambda tensor: tensor.mul_(1.5)), *((name, replaced) for name in ("weight", "A", "B"))]
    for name, change in changes:
        change(named[name])
        wanted = call(lists, 0)
        assert not torch.equal(wanted, last), name
        assert torch.equal(call(empty, plan), wanted), name
        last = wanted
    for tokens in (3, 1, 8, 1):
        assert torch.equal(call(empty, plan, tokens), call(lists, 0, tokens)), tokens
    with pytest.raises(RuntimeError, match="decoder_layer: x has 9 tokens, wanted at most 8"):
        call(lists, 0, 9)
    module = _native.STATE.module
    before, found = module.isa(), set()
    try:
        for path in module.isas():
            module.set_isa(path)
            assert torch.equal(call(empty, plan), wanted := call(lists, 0)), path
            found.add(wanted.numpy().tobytes())
    finally:
        module.set_isa(before)
    assert len(found) > 1 or len(module.isas()) == 1  # paths sum in different orders
    _native.STATE.module.forget_plan(plan)


@pytest.mark.parametrize("batch, tokens", [(2, 1), (1, 3), (2, 2)])
def test_a_decoder_layer_has_the_same_bits_on_any_number_of_threads(batch: int, tokens: int) -> None:
    """The threads take the pieces of a stage in any order; with 24 threads, a thread waits for threads without a core.
    Calls of two Python threads run at the same time. The last call runs each stage as a loop of its own."""
    size, before = 512, torch.get_num_threads()
    stages_as_loops = ctypes.CDLL(str(Path(_native.__file__).with_name("_kernels.so"))).peft_ext_stages_as_loops
    _, lists = adapted_lists_of_a_decoder_layer(size)
    x, keys = torch.randn(batch, tokens, size), torch.randn(batch, size // 16, 16, 16)
    angles = torch.rand(1, tokens, 16)

    def call(_: int = 0) -> tuple[torch.Tensor, ...]:
        memory = keys.clone(), keys.clone()
        return (RAW.decoder_layer(x, angles, angles, None, *memory, 3, *lists, 0), *memory)

    try:
        torch.set_num_threads(1)
        wanted = call()
        for threads in (2, 3, 7, 24):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, call(), wanted)), threads
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(call, range(8)):
                assert all(map(torch.equal, found, wanted))
        stages_as_loops(1)
        assert all(map(torch.equal, call(), wanted))
    finally:
        torch.set_num_threads(before)
        stages_as_loops(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_a_rank_that_is_padded_under_inference_mode(dtype: torch.dtype) -> None:
    """The other threads of a parallel loop are not in inference mode, but write into tensors made in inference mode."""
    torch.manual_seed(0)
    ends, before = torch.arange(3000, 18001, 3000), torch.get_num_threads()
    x, weight = torch.randn(18000, 64).to(dtype), torch.randn(6, 64, 64).to(dtype)
    factors = torch.randn(6, 8, 64), torch.randn(6, 64, 8)
    wanted = ops.lora_experts(x, weight, ends, *factors)
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            for _ in range(5):
                assert torch.equal(ops.lora_experts(x, weight, ends, *factors), wanted)
    finally:
        torch.set_num_threads(before)


WITHOUT_MEMORY = """
import resource, torch
from peft_ext import ops
torch.set_num_threads(2)
wide = 2**18  # the result is one value a query: what is large is a thread's own
q, k, v = torch.zeros(1, 2, 64, wide), torch.zeros(1, 2, 1, wide), torch.zeros(1, 2, 1, 1)
ops.scaled_dot_product_attention(*(value[..., :64] for value in (q, k, v)))  # the threads are there
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 32 * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    ops.scaled_dot_product_attention(q, k, v)
except RuntimeError as error:
    print(error)
"""


def test_what_a_thread_says_of_memory_is_heard() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True)
    assert "can't allocate memory" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("shape", "says"),
    [([-3, 4], "shape has -3, wanted sizes of 0 and more"), ([2**40, 2**40], "wanted one that 63 bits hold")],
    ids=["negative", "overflow"],
)
def test_a_shape_that_no_tensor_has_is_no_lack_of_memory(shape: list[int], says: str) -> None:
    packed, absmax = FLAT[:2]
    with pytest.raises(RuntimeError, match=says) as caught:
        RAW.nf4_dequantize(packed, absmax, None, None, None, 64, shape, torch.float32)
    assert "memory" not in str(caught.value)


def test_the_sums_of_many_keys() -> None:
    """One key has a large probability and all others an equal small one, which a sum one by one would round away."""
    q, k, v = torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 131072, 8), torch.rand(1, 1, 131072, 8)
    q[..., 0], k[..., 0], k[0, 0, 0, 0] = 1, -1, 0
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    found = ops.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_what_hides_all_keys_by_a_finite_bias_hides_none() -> None:
    q, k, v = (torch.randn(1, 1, count, 8) for count in (16, 33, 33))
    for hidden in (torch.finfo(torch.float32).min, -1e38):
        bias = torch.full((1, 1, 16, 33), hidden)
        bias[0, 0, 3, 5] = 0.0
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.1)
        torch.testing.assert_close(ops.scaled_dot_product_attention(q, k, v, bias=bias, scale=0.1), wanted)


@pytest.mark.parametrize("scale", [0.1, 0.125, 1.0])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e9, -1e5, 3e4])
def test_the_gradients_of_a_query_whose_keys_all_have_a_large_bias(hidden: float, scale: float) -> None:
    bias = torch.randn(1, 1, 16, 33)
    bias[0, 0, 3:7] = hidden
    bias[0, 0, 7] = -torch.inf
    bias[0, 0, 7, 0] = 0.0
    torch.manual_seed(0)
    operands = [torch.randn(1, 1, count, 8) for count in (16, 33, 33)]
    found, wanted = [], []
    for dtype, gradients in ((torch.float32, found), (torch.float64, wanted)):
        moved = bias.to(dtype)
        # A constant that is added to a query's scores for all keys does not change the softmax.
        moved[0, 0, 3:7] = hidden if dtype is torch.float32 else 0.0
        leaves = [value.detach().clone().to(dtype).requires_grad_() for value in operands]
        attention = ops.scaled_dot_product_attention if dtype is torch.float32 else F.scaled_dot_product_attention
        y = attention(*leaves, **{"bias" if dtype is torch.float32 else "attn_mask": moved}, scale=scale)
        y.cos().sum().backward()
        gradients += [leaf.grad for leaf in leaves]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["is_causal", "mask"])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e9, 3e4])
def test_the_gradients_of_a_query_that_sees_only_keys_with_a_large_bias(hidden: float, by: str) -> None:
    torch.manual_seed(0)
    padding = torch.zeros(1, 1, 1, 16)
    padding[..., :5] = hidden  # keys of padding on the left: the first five queries see no other keys
    sees = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    how = {"is_causal": True} if by == "is_causal" else {"mask": sees}
    operands = [torch.randn(1, 2, 16, 8) for _ in range(3)]
    leaves = [value.clone().requires_grad_() for value in operands]
    exact = [value.double().requires_grad_() for value in operands]
    ops.scaled_dot_product_attention(*leaves, bias=padding.expand(1, 1, 16, 16), **how).cos().sum().backward()
    moved = padding.double().expand(1, 1, 16, 16).clone()
    moved[:, :, :5] = 0.0  # a constant that is added to a query's scores for all keys does not change the softmax
    F.scaled_dot_product_attention(*exact, moved.masked_fill(~sees, -torch.inf)).cos().sum().backward()
    for one, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_a_scale_s_gradient_holds_no_more_than_itself() -> None:
    scale = torch.randn(64).requires_grad_()
    ops.ia3_linear(torch.randn(300, 32), torch.randn(64, 32), scale).sum().backward()
    assert scale.grad is not None and scale.grad.untyped_storage().nbytes() == 64 * 4


def test_subnormal_halves_are_numbers_though_a_thread_flushes_floats() -> None:
    x = torch.full((4, 19), 2.0**-20, dtype=torch.float16)
    wanted = ops.ia3_scale(x, torch.ones(19))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush")
    try:
        assert torch.equal(ops.ia3_scale(x, torch.ones(19)), wanted) and torch.equal(wanted, x)
    finally:
        torch.set_flush_denormal(False)
