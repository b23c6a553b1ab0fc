"""Tests that the CUDA library loads and registers its kernels (without a GPU), and that its bits are the
reference's.
"""

from __future__ import annotations

import op_db
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_ext
from peft_ext import _native
from peft_ext.ops.library import OPERATORS, has_kernel
from peft_ext.reference import nf4 as reference
from peft_ext.weights.nf4 import BLOCKSIZES

if torch.version.cuda is None:
    pytest.skip("torch is not a CUDA build", allow_module_level=True)
if not _native.STATE.cuda_loaded:
    pytest.skip(f"the CUDA library is not loaded: {_native.STATE.cuda_error}", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
op = torch.ops.peft_ext.nf4_dequantize.default


def dequantize_args(numel: int, blocksize: int, nested: bool) -> tuple:
    """Returns an NF4 weight with every code and a flat shape, as the arguments of the operator."""
    generator = torch.Generator().manual_seed(numel + blocksize)
    weight = torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator).mul(-8).exp()
    _, absmax, *rest = reference.nf4_quantize(weight, blocksize, nested).op_args()
    packed = torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8, generator=generator)
    return (packed, absmax, *rest)


def moved(args: tuple, device: str) -> list:
    return [arg.to(device) if isinstance(arg, torch.Tensor) else arg for arg in args]


def check_bits(args: tuple, dtype: torch.dtype) -> None:
    got = op(*moved(args, "cuda"), dtype).cpu()
    want = reference.dequantize(*args, dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
    assert got.dtype == want.dtype and got.shape == want.shape
    wrong = (got.view(bits) != want.view(bits)).sum().item()
    assert wrong == 0, f"{wrong} of {want.numel()} elements differ"


def test_every_op_has_a_kernel():
    assert all(has_kernel(op.name, "CUDA") == op.cuda for op in OPERATORS.values())


@pytest.mark.parametrize("case", [case for case in op_db.CASES if not case.exact], ids=lambda case: case.name)
def test_fake_tensors_on_cuda_have_the_shapes_of_results(case):
    """Tests the forward alone, because a backward of autograd needs the device."""
    shape, dtype = case.fit(op_db.SHAPES[0]), torch.bfloat16
    sample = case.make(dtype, shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = case.call(**sample.to(torch.device("cuda")).inputs)
    assert (y.dtype, tuple(y.shape), y.device.type) == (*case.result(dtype, shape), "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fake_tensors_have_the_result_of_the_kernel(dtype):
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed = torch.empty((256, 1), dtype=torch.uint8, device="cuda")
        absmax = torch.empty(8, device="cuda")
        out = op(packed, absmax, None, None, None, 64, [8, 64], dtype)
    assert (out.shape, out.dtype, out.device.type) == ((8, 64), dtype, "cuda")
    assert out.is_contiguous()


def test_arguments_reach_the_kernel():
    # Calls the CUDA kernel with CPU tensors: the kernel unboxes all arguments before its first check raises an error.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="nf4_dequantize: weight is not on a CUDA device"):
        op.redispatch(keys, *dequantize_args(512, 64, True), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bits_are_the_reference_s(blocksize, nested, dtype):
    # The counts are below, at and above the elements of a vector, of a warp and of a thread block, odd, and very large.
    for numel in (1, 2, 7, 8, 9, 31, 32, 33, 1023, 1024, 1025, 8191, 8192, 8193, 333 * 77, 1024 * 1024 + 5):
        check_bits(dequantize_args(numel, blocksize, nested), dtype)


@needs_gpu
def test_empty_weight_launches_nothing():
    args = moved(dequantize_args(64, 64, False), "cuda")
    out = op(args[0][:0], args[1][:0], None, None, None, 64, [0, 64], torch.bfloat16)
    assert out.shape == (0, 64)


@needs_gpu
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_packed_bytes_at_any_address(offset):
    packed, *rest = dequantize_args(4096, 64, True)
    shifted = torch.empty(packed.numel() + offset, dtype=torch.uint8, device="cuda")[offset:].view(-1, 1)
    shifted.copy_(packed)
    got = op(shifted, *moved(tuple(rest), "cuda"), torch.bfloat16).cpu()
    assert torch.equal(got, reference.dequantize(packed, *rest, torch.bfloat16))


@needs_gpu
def test_graph_capture():
    args = moved(dequantize_args(1 << 16, 64, True), "cuda")
    want = op(*args, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*args, torch.bfloat16)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@needs_gpu
def test_wrong_arguments_name_what_came_and_what_was_wanted():
    packed, absmax, *rest = moved(dequantize_args(512, 64, False), "cuda")
    with pytest.raises(RuntimeError, match="absmax is Float with 7 elements, wanted Float with 8"):
        op(packed, absmax[:7], *rest, torch.bfloat16)
    with pytest.raises(RuntimeError, match="weight is Char with 256 elements, wanted Byte with 256"):
        op(packed.view(torch.int8), absmax, *rest, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype is Int, wanted Float"):
        op(packed, absmax, *rest, torch.int32)
    with pytest.raises(RuntimeError, match="blocksize is 48, wanted a power of two"):
        op(packed, absmax, None, None, None, 48, [8, 64], torch.bfloat16)


@needs_gpu
def test_public_function_takes_the_kernel():
    weight = peft_ext.ops.nf4_quantize(torch.randn(96, 80), double_quant=True)
    assert torch.equal(peft_ext.ops.nf4_dequantize(weight.to("cuda")).cpu(), reference.nf4_dequantize(weight))
