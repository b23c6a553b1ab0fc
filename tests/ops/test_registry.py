"""Tests the registry: each operator declares everything that kernels, proofs, the battery and documents need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from battery import output_grad, run
from op_db import CASES, SHAPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_ext import ops
from peft_ext.ops.library import NAMESPACE, OPERATORS, PROOFS, PUBLIC, has_kernel
from peft_ext.ops.proof_inputs import ProofInputs
from peft_ext.ops.prove import SMALL

pytestmark = pytest.mark.cpu_only("declarations are the same on every device")

CPU = torch.device("cpu")


class Called(TorchDispatchMode):
    """Records the names of peft_ext's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == NAMESPACE:
            self.names.add(name)
            if OPERATORS[name].composed:  # this operator calls other operators, which count too
                with self:
                    return OPERATORS[name].reference(*args)
        return func(*args, **(kwargs or {}))


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [part for result in results for part in flat(result)]


def test_every_public_function_is_in_the_registry() -> None:
    assert set(PUBLIC) == set(ops.__all__)
    for name, called in PUBLIC.items():
        assert called and set(called) <= set(OPERATORS), name


def test_every_operator_has_a_proof_and_a_family_calls_no_other_family_s() -> None:
    assert {op.family for op in OPERATORS.values()} == set(PROOFS)
    for family, calls in PROOFS.items():
        called = {name for name, _ in calls(ProofInputs(CPU, torch.float32, SMALL["CUDA"]))}
        assert called == {op.name for op in OPERATORS.values() if op.family == family}


@pytest.mark.parametrize("family", PROOFS)
def test_a_fake_gives_what_the_reference_gives(family: str) -> None:
    for name, arguments in PROOFS[family](ProofInputs(CPU, torch.bfloat16, SMALL["CUDA"])):
        found = flat(OPERATORS[name].reference(*arguments))
        on_meta = [_on_meta(value) for value in arguments]
        fakes = flat(getattr(getattr(torch.ops, NAMESPACE), name).default(*on_meta))
        for fake, real in zip(fakes, found, strict=True):
            assert fake.is_meta and (fake.shape, fake.dtype) == (real.shape, real.dtype), name


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [_on_meta(part) for part in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def test_every_public_function_has_a_case_and_an_error() -> None:
    assert {case.public for case in CASES} == set(PUBLIC)
    assert {case.public for case in CASES if case.errors} == set(PUBLIC)


def test_the_battery_reaches_every_operator() -> None:
    with Called() as called:
        for case in CASES:
            sample = case.make(torch.float32, shape := case.fit(SHAPES[0]))
            run(case.call, sample, None if case.exact else output_grad(case, torch.float32, shape))
    # On a CPU the battery calls the operators that have a CPU kernel and the operators that are composed of others. An
    # operator without a public function has tests of its own.
    reached = {name: op.composed or has_kernel(name, "CPU") for name, op in OPERATORS.items() if not op.inner}
    assert called.names == {name for name, is_reached in reached.items() if is_reached}
