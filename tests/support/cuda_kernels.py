"""Functions by which tests call kernels: CUDA kernels on a GPU or under the emulator, and CPU kernels."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_ext import _native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


def emulated_ops() -> Any:
    """Returns the CUDA kernels under the emulator as operators on CPU tensors. Skips the test if the emulator can't be
    built."""
    emulated_cuda = pytest.importorskip("emulated_cuda", reason="tools/ is not here: not a checkout")
    if why := emulated_cuda.missing():
        pytest.skip(why)
    emulated_cuda.load()
    return torch.ops.peft_ext_emulated


def kernels(where: str) -> Callable[..., Any]:
    """Returns a function ``call(name, *args)`` that runs an operator's kernel and returns CPU tensors.

    ``where``: "cpu", "cuda", or another name for the emulator. Skips the test if the kernels are not available.
    """
    if where == "cpu":
        namespace, device = torch.ops.peft_ext, "cpu"
    elif where == "cuda":
        if not (_native.STATE.cuda_loaded and torch.cuda.is_available()):
            pytest.skip(f"no GPU, or no CUDA library: {_native.STATE.cuda_error}")
        namespace, device = torch.ops.peft_ext, "cuda"
    else:
        namespace, device = emulated_ops(), "cpu"

    def to_device(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def call(name: str, *args: Any) -> Any:
        moved = [[to_device(part) for part in arg] if isinstance(arg, list) else to_device(arg) for arg in args]
        found = getattr(namespace, name)(*moved)
        return found.cpu() if isinstance(found, Tensor) else tuple(part.cpu() for part in found)

    return call


@pytest.fixture(scope="module", params=["cuda", pytest.param("emulated", marks=pytest.mark.slow)])
def cuda_call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param == "emulated" and request.config.getoption("--device") == "cuda":
        pytest.skip("--device cuda: the kernels run on the GPU")
    return kernels(request.param)


class Launches:
    """Calls operators under the emulator and counts the launches of kernels. PyTorch's products are not counted."""

    def __init__(self) -> None:
        self.call = kernels("emulated")
        import emulated_cuda

        self.count = ctypes.CDLL(str(emulated_cuda.load())).peft_ext_emulated_launches
        self.count.restype = ctypes.c_int64

    def of(self, name: str, *args: Any) -> tuple[Any, int]:
        before = self.count()
        found = self.call(name, *args)
        return found, self.count() - before


@pytest.fixture(scope="module")
def launches(request: pytest.FixtureRequest) -> Launches:
    if request.config.getoption("--device") == "cuda":
        pytest.skip("--device cuda: the emulator does not run")
    return Launches()


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Asserts that dtypes, shapes and bits of two tensors are equal. All NaNs count as equal, and an infinity counts as
    the largest finite number."""
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = (value.nan_to_num(-7.0) if value.is_floating_point() else value for value in (got, want))
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[want.element_size()]
    wrong = (got.contiguous().view(kind) != want.contiguous().view(kind)).sum().item()
    assert wrong == 0, f"{wrong} of {want.numel()} elements differ"
