"""Tests the seeds of dropout masks: the draw by the host from a GPU's generator, and seeds that are CPU tensors.

No test here needs a GPU but the tests marked ``needs_gpu``: a stand-in for the generator of a GPU has the three methods
that the draw calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from peft_ext import ops
from peft_ext.reference import common
from peft_ext.reference.experts import seed_of
from peft_ext.reference.philox import dropout_keep_mask

GPU = torch.device("cuda", 1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Generator:
    """Stands in for the generator of a GPU."""

    def __init__(self, seed: int = 7) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        held = self.offset
        time.sleep(0)  # lets another thread run
        return held

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0, "torch.Generator.set_offset refuses such an offset"
        self.offset = offset


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    """Makes the operators draw their seeds on the host from the returned generator."""
    generator = Generator()
    monkeypatch.setattr(common, "host_generator", lambda device: generator)
    return generator


def draw(count: Optional[int] = None) -> Any:
    """Returns a drawn seed, or ``count`` seeds, as lists."""
    if count is None:
        return common.dropout_seed(None, 0.1, True, GPU).tolist()
    return [seed.tolist() for seed in common.drawn_seeds(count, GPU)]


# --- the draw by the host ---------------------------------------------------------------------------------------------


def test_a_seed_is_a_function_of_the_generators_state(generator: Generator) -> None:
    first, second = draw(), draw()
    assert first != second
    generator.offset = 0  # as torch.manual_seed, torch.cuda.set_rng_state and fork_rng set the offset
    assert (draw(), draw()) == (first, second)
    generator.offset, generator.seed = 0, 8
    assert draw() not in (first, second)


def test_seeds_of_several_layers_are_those_of_one_layer_after_another(generator: Generator) -> None:
    one_by_one = [draw() for _ in range(3)]
    after = generator.offset
    generator.offset = 0
    assert draw(3) == one_by_one
    assert generator.offset == after


def test_a_seed_is_an_int64_tensor_of_the_cpu(generator: Generator) -> None:
    with torch.device("meta"):  # the default device of tensors
        seed = common.dropout_seed(None, 0.1, True, GPU)
    assert seed.dtype is torch.int64 and seed.shape == (2,) and seed.device == torch.device("cpu")
    assert common.dropout_seed(None, 0.1, False, GPU) is None and common.dropout_seed(None, 0.0, True, GPU) is None


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 4, 2**32, 2**49 - 4, 2**62, 2**64 - 8])
def test_every_state_has_a_seed_of_signed_integers(seed: int, offset: int) -> None:
    (key, first), (_, second) = common.seeds_at(seed, offset, 2)
    assert key % 2**64 == seed
    assert first != second
    torch.tensor([key, first, second], dtype=torch.int64)  # an integer out of range raises an error


def test_experts_of_one_call_share_no_seed_with_the_next_call(generator: Generator) -> None:
    calls = [torch.tensor(draw()) for _ in range(3)]
    last = 2**16 - 1
    drawn = [tuple(seed_of(seed, expert).tolist()) for seed in calls for expert in (0, 1, 5, last)]
    assert len(set(drawn)) == len(drawn)
    first, second = (seed[1].item() for seed in calls[:2])
    assert second - first > last


def test_masks_of_successive_seeds_are_independent(generator: Generator) -> None:
    masks = [dropout_keep_mask(torch.tensor(seed), 0.3, torch.Size((1000, 1000))).double() - 0.7 for seed in draw(3)]
    for i, one in enumerate(masks):
        for j, other in enumerate(masks):
            assert abs((one * other).mean() / 0.21 - int(i == j)) < 5e-3


def test_threads_share_no_seed(generator: Generator) -> None:
    drawn: list[tuple[int, int]] = []

    def run() -> None:
        for _ in range(200):
            drawn.append(tuple(draw()))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == len(set(drawn)) == 1600


# --- where the GPU must draw ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces PyTorch's functions of GPUs. Returns a dict: "capturing" holds the GPUs with a stream whose work is
    captured into a CUDA graph, "generators" the GPUs' generators."""
    held: dict[str, Any] = {"capturing": set(), "generators": (Generator(1), Generator(2)), "current": 0}

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        before, held["current"] = held["current"], device.index
        yield
        held["current"] = before

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch.compile would save a GPU's generator
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: held["current"] in held["capturing"])
    monkeypatch.setattr(torch.cuda, "default_generators", held["generators"])
    return held


def test_the_host_draws_from_the_generator_of_the_tensors_gpu(gpu: dict[str, Any]) -> None:
    assert common.host_generator(GPU) is gpu["generators"][1]
    assert common.host_generator(torch.device("cpu")) is None
    assert common.host_generator(torch.device("meta")) is None
    for capturing in (0, 1):  # the generator's functions raise while the current GPU, 0, captures
        gpu["capturing"] = {capturing}
        assert common.host_generator(GPU) is None


def _trace(run: Callable[[Tensor], Tensor]) -> None:
    torch.jit.trace(run, torch.ones(2), check_trace=False)


def _make_fx(run: Callable[[Tensor], Tensor]) -> None:
    make_fx(run)(torch.ones(2))


def _make_fx_before_dispatch(run: Callable[[Tensor], Tensor]) -> None:
    make_fx(run, pre_dispatch=True)(torch.ones(2))


def _fake(run: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        run(torch.ones(2))


def _functional(run: Callable[[Tensor], Tensor]) -> None:
    torch.func.functionalize(run)(torch.ones(2))


def _vmap(run: Callable[[Tensor], Tensor]) -> None:
    torch.vmap(run)(torch.ones(2, 2))


def _grad(run: Callable[[Tensor], Tensor]) -> None:
    torch.func.grad(lambda x: run(x).sum())(torch.ones(2))


@pytest.mark.parametrize("trace", [_trace, _make_fx, _make_fx_before_dispatch, _fake, _functional, _vmap, _grad])
@pytest.mark.filterwarnings("ignore")
def test_the_gpu_draws_under_tracers_and_transforms(gpu: dict[str, Any], trace: Callable) -> None:
    found = []

    def run(x: Tensor) -> Tensor:
        found.append(common.host_generator(GPU))
        return x * 2

    trace(run)
    assert found == [None]
    run(torch.ones(2))
    assert found[-1] is gpu["generators"][1]


def test_the_gpu_draws_under_a_compiler(gpu: dict[str, Any]) -> None:
    def run(x: Tensor) -> Tensor:
        return x * 2 if common.host_generator(GPU) is None else x

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [2, 2]
    assert run(torch.ones(2)).tolist() == [1, 1]


# --- layers -----------------------------------------------------------------------------------------------------------


def step(op: str, seed: Optional[Tensor]) -> list[Tensor]:
    """Returns the output and the gradients of an operator with a dropout and the given seed."""
    numbers = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=numbers).requires_grad_()

    how = {"dropout_p": 0.5, "training": True}
    x, a, b, weight = leaf(24, 64), leaf(4, 64), leaf(32, 4), leaf(32, 64).detach()
    leaves = [x, a, b]
    if op == "lora_linear":
        y = ops.lora_linear(x, weight, a, b, **how, seed=seed)
    elif op == "lora_residual":
        y = ops.lora_residual(x, weight[:24, :32], a, b, **how, seed=seed)
    elif op == "gated_lora_linear":
        leaves.append(leaf(24, 64))
        y = ops.gated_lora_linear(x, leaves[-1], "silu", weight, a, b, **how, seed=seed)
    elif op == "dora_linear":
        leaves.append(leaf(32))
        y = ops.dora_linear(x, weight, a, b, leaves[-1], **how, seed=seed)
    elif op == "lora_experts":
        leaves = [x, leaf(2, 4, 64), leaf(2, 32, 4)]
        stack, ends = torch.stack([weight, weight]), torch.tensor([10, 24])
        y = ops.lora_experts(x, stack, ends, *leaves[1:], **how, seed=seed)
    else:
        seeds = None if seed is None else [seed, seed + torch.tensor([0, 1 << 16])]
        given = {"dropout_ps": [0.5, 0.5], "training": True, "seeds": seeds}
        y = torch.cat(ops.lora_linears(x, [weight, weight], [a, a], [b, b], **given))
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize(
    "op", ["lora_linear", "lora_residual", "gated_lora_linear", "dora_linear", "lora_experts", "lora_linears"]
)
def test_layers_draw_on_the_host(op: str, generator: Generator) -> None:
    drawn = step(op, None)
    assert generator.offset == 8 if op == "lora_linears" else 4
    ((key, offset),) = common.seeds_at(7, 0, 1)
    for got, wanted in zip(drawn, step(op, torch.tensor([key, offset])), strict=True):
        assert torch.equal(got, wanted)
    assert not torch.equal(step(op, None)[0], drawn[0])


def test_the_reference_moves_a_seed_to_the_device_of_x() -> None:
    assert common.dropped(torch.ones(8, 64, device="meta"), 0.5, torch.tensor([1, 2])).is_meta


@pytest.mark.parametrize("op", [ops.lora_linear, ops.dropout])
def test_a_seed_of_the_cpu_goes_with_any_device(op: Callable) -> None:
    x, weight, a, b = (torch.ones(*shape, device="meta") for shape in ((8, 64), (32, 64), (4, 64), (32, 4)))
    given = (x,) if op is ops.dropout else (x, weight, a, b)
    y = op(*given, dropout_p=0.5, training=True, seed=torch.tensor([1, 2]))
    assert y.is_meta and y.shape == (8, 64 if op is ops.dropout else 32)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def layer_on_gpu() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    x, weight, a, b = (torch.randn(*shape, device="cuda") for shape in ((24, 64), (32, 64), (4, 64), (32, 4)))

    def layer(x: Tensor, seed: Optional[Tensor] = None) -> Tensor:
        return ops.lora_linear(x, weight, a, b, dropout_p=0.5, training=True, seed=seed)

    layer(x)  # proves and compiles the kernels
    return layer, x


@needs_gpu
def test_a_seed_of_the_cpu_and_a_seed_of_the_gpu_give_equal_bits() -> None:
    layer, x = layer_on_gpu()
    seed = torch.tensor([5, -6])
    assert torch.equal(layer(x, seed), layer(x, seed.cuda()))


@needs_gpu
def test_the_states_of_a_gpus_generator_repeat_masks() -> None:
    layer, x = layer_on_gpu()
    torch.manual_seed(3)
    first, state = layer(x), torch.cuda.get_rng_state()
    second = layer(x)
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state)
    assert torch.equal(layer(x), second)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    with torch.random.fork_rng():
        layer(x)
    assert torch.equal(layer(x), second)


@needs_gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_mask_on_a_gpu(reentrant: bool) -> None:
    layer, x = layer_on_gpu()
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = run(leaf.tanh())
        layer(x)  # moves the generator before the backward
        grads.append(torch.autograd.grad(y.square().sum(), leaf)[0] if not reentrant else _backward(y, leaf))
    assert torch.equal(*grads)


def _backward(y: Tensor, leaf: Tensor) -> Tensor:
    y.square().sum().backward()
    return leaf.grad


@needs_gpu
def test_a_drawn_seed_waits_for_nothing() -> None:
    layer, x = layer_on_gpu()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_each_replay_of_a_graph_draws_anew() -> None:
    layer, x = layer_on_gpu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)
