"""Tests the checks of the CUDA operators' tensors: their devices and sizes.

The public functions check their arguments. These tests call the operators themselves, each with the arguments of its
proof, of which one tensor is on another device or too short.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_kernels import kernels
from torch import Tensor

from peft_ext.ops import prove
from peft_ext.ops.library import OPERATORS, PROOFS
from peft_ext.ops.proof_inputs import ProofInputs

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Arguments that an operator accepts and does not read: the biases in a backward. A tuple has the argument's index, and
# the index within the argument if the argument is a list.
UNREAD = {("ia3_linear_backward", (9,)), ("lora_linears_backward", (2, 1))}


@pytest.fixture(scope="module")
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.config.getoption("--device") == "cuda":
        pytest.skip("--device cuda: the emulator does not run")
    return kernels("emulated")


@pytest.fixture
def elsewhere(call: Callable[..., Any]) -> Iterator[Callable[[int], None]]:
    """Yields a function that declares the data at an address to be on another device than all other data."""
    yield from declaring("peft_ext_emulated_elsewhere")


@pytest.fixture
def on_host(call: Callable[..., Any]) -> Iterator[Callable[[int], None]]:
    """Yields a function that declares the data at an address to be memory of the host that no kernel can read."""
    yield from declaring("peft_ext_emulated_on_host")


def declaring(name: str) -> Iterator[Callable[[int], None]]:
    import emulated_cuda

    declare = getattr(ctypes.CDLL(str(emulated_cuda.load())), name)
    yield lambda address: declare(ctypes.c_void_p(address))
    declare(None)


def cases(family: str) -> Iterator[tuple[str, list[Any]]]:
    for name, arguments in PROOFS[family](ProofInputs(CPU, torch.bfloat16, prove.SMALL["CUDA"])):
        if OPERATORS[name].cuda:
            yield name, copied(arguments)


def copied(value: Any) -> Any:
    """Returns the arguments with tensors that share no memory."""
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.preserve_format)
    return [copied(part) for part in value] if isinstance(value, (list, tuple)) else copy.copy(value)


def places(value: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yields each tensor of the arguments that has elements, with its place."""
    for i, part in enumerate(value):
        if isinstance(part, Tensor) and part.numel():
            yield (*at, i), part
        elif isinstance(part, list):
            yield from places(part, (*at, i))


def replaced(value: list[Any], place: tuple[int, ...], by: Tensor) -> list[Any]:
    first, *rest = place
    return [replaced(part, tuple(rest), by) if i == first and rest else by if i == first else part
            for i, part in enumerate(value)]  # fmt: skip


@pytest.mark.parametrize("family", prove.families("CUDA"))
def test_a_tensor_on_another_device_is_refused(
    family: str, call: Callable[..., Any], elsewhere: Callable[[int], None]
) -> None:
    accepted = []
    for name, arguments in cases(family):
        tensors = list(places(arguments))
        for place, tensor in tensors if len(tensors) > 1 else []:
            if (name, place) in UNREAD:
                continue
            elsewhere(tensor.data_ptr())
            try:
                call(name, *arguments)
                accepted.append((name, place))
            except RuntimeError as error:
                if "device" not in str(error):
                    accepted.append((name, place, str(error)))
    assert not accepted


DROPOUTS = ("lora", "gated_lora", "siblings", "dora", "experts")


def seeds(family: str) -> Iterator[tuple[str, list[Any], Tensor]]:
    """Yields the family's cases with a dropout, and the seed of the dropout."""
    drawn = ProofInputs(CPU, torch.bfloat16, prove.SMALL["CUDA"]).seed
    for name, arguments in cases(family):
        for _, tensor in places(arguments):
            if tensor.dtype is torch.int64 and torch.equal(tensor, drawn):
                yield name, arguments, tensor


@pytest.mark.parametrize("family", DROPOUTS)
def test_a_seed_of_the_host_gives_the_bits_of_a_seed_in_device_memory(
    family: str, call: Callable[..., Any], on_host: Callable[[int], None]
) -> None:
    """The emulator lets no kernel read a tensor that only the host may read."""
    found = 0
    for name, arguments, seed in seeds(family):
        wanted = call(name, *arguments)
        on_host(seed.data_ptr())
        for got, bits in zip(call(name, *arguments), wanted, strict=True):
            assert torch.equal(got, bits), name
        on_host(0)
        seed[1] += 1
        assert not all(map(torch.equal, call(name, *arguments), wanted)), f"{name} does not read its seed"
        found += 1
    assert found


def test_all_families_with_a_dropout_are_tested() -> None:
    assert {family for family in prove.families("CUDA") if any(seeds(family))} == set(DROPOUTS)


@pytest.mark.parametrize("family", prove.families("CUDA"))
def test_a_tensor_that_is_too_short_is_not_read_beyond_its_end(family: str, call: Callable[..., Any]) -> None:
    faults = []
    for name, arguments in cases(family):
        for place, tensor in places(arguments):
            for dim in range(tensor.dim()):
                short = tensor.narrow(dim, 0, tensor.shape[dim] - 1).clone()
                try:
                    call(name, *replaced(arguments, place, short))
                except RuntimeError as error:
                    if "memory" in str(error) or "emulator" in str(error):
                        faults.append((name, place, dim, str(error)[:200]))
    assert not faults
