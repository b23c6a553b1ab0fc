"""Tests of FP4, MXFP4, NVFP4 and FP8: the decoded bits of the formats' own libraries, on every CPU path.

A library that is not installed skips its tests; the tests against decoders in Python floats need no library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from format_libraries import format_library
from packed_bits import check_paths, same_bits, set_path  # noqa: F401  a fixture
from torch import Tensor

from peft_ext import _native, ops
from peft_ext.reference.float8 import quantized_input
from peft_ext.reference.formats import decoded
from peft_ext.weights import PackedWeight, fp4, fp8, mx
from peft_ext.weights.nf4 import BLOCKSIZES, NestedAbsmax

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BYTES = torch.arange(256, dtype=torch.uint8)


# --- MXFP4 ------------------------------------------------------------------------------------------------------------


def every_mxfp4() -> PackedWeight:
    """Returns a weight [256, 512] with every byte of codes under every scale: row s has scale s."""
    return mx.mxfp4(BYTES.repeat(256).view(256, 16, 16), BYTES.repeat_interleave(16).view(256, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_has_the_bits_of_transformers(dtype):
    library = pytest.importorskip("transformers.integrations.mxfp4")
    weight = every_mxfp4()
    want = library.convert_moe_packed_tensors(*(part[None] for part in weight.parts), dtype=dtype)[0].T
    # A release of torch whose ldexp multiplies by 2^128 = inf decodes the scale 255 to another value.
    rows = 256 if torch.ldexp(torch.tensor([0.5]), torch.tensor([128])).isfinite() else 255
    same_bits(decoded(weight, dtype)[:rows], want[:rows])


def test_mxfp4_is_e2m1_times_a_power_of_two(set_path):  # noqa: F811
    weight = every_mxfp4()
    codes = [code for byte in range(256) for code in (byte & 15, byte >> 4)]
    want = [[math.copysign(E2M1[code & 7], 0.5 - (code >> 3)) * 2.0 ** (scale - 127) for code in codes]
            for scale in range(256)]  # fmt: skip
    same_bits(weight.dequantize(torch.float32), torch.tensor(want, dtype=torch.float64).float())
    check_paths(weight, set_path)


def test_mxfp4_experts_lie_as_in_gpt_oss(set_path):  # noqa: F811
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    weight = mx.mxfp4(blocks, torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8))
    assert weight.shape == (3, 10, 64) and weight.stacked and weight.parts[0] is blocks
    check_paths(weight, set_path)
    flat = mx.mxfp4(blocks.view(3, 10, 32), weight.parts[1].view(torch.float8_e8m0fnu))
    same_bits(flat.dequantize(), weight.dequantize())
    library = pytest.importorskip("transformers.integrations.mxfp4")
    same_bits(weight.dequantize().transpose(1, 2), library.convert_moe_packed_tensors(*weight.parts))


def test_mxfp4_has_the_bits_of_experts_in_fp8_checkpoints():
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = every_mxfp4()
    codes, scales = weight.parts[0].view(256, 256).view(torch.int8), weight.parts[1].view(torch.float8_e8m0fnu)
    want = library.Fp8Dequantize(None)._dequantize_one(codes, scales)
    same_bits(mx.mxfp4(codes.view(torch.uint8), scales).dequantize()[:255], want[:255])  # scale 255 is a NaN there


# --- NVFP4 ------------------------------------------------------------------------------------------------------------

GLOBALS = (1.0, 0.0023, 2688.0 / 0.37, 1e-30, 3e38, 1e-42, 0.0, math.inf, math.nan)


def every_nvfp4(total: float, reciprocal: bool) -> PackedWeight:
    """Returns a weight [256, 512] with every byte of codes under every scale: row s has scale s."""
    scales = BYTES.repeat_interleave(32).view(256, 32).view(torch.float8_e4m3fn)
    return mx.nvfp4(BYTES.repeat(256).view(256, 256), scales, torch.tensor([total]), reciprocal=reciprocal)


def compressed(bits: int, strategy: str, **kwargs: Any) -> SimpleNamespace:
    """Returns compressed-tensors' scheme of a weight of symmetric floats."""
    library = format_library("compressed_tensors.quantization")
    args = library.QuantizationArgs(num_bits=bits, type="float", strategy=strategy, symmetric=True, **kwargs)
    return library.QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("total", GLOBALS)
def test_nvfp4_has_the_bits_of_compressed_tensors(total):
    library = format_library("compressed_tensors.compressors.nvfp4")
    weight = every_nvfp4(total, reciprocal=True)
    held = dict(zip(("weight_packed", "weight_scale", "weight_global_scale"), weight.parts, strict=True))
    scheme = compressed(4, "tensor_group", group_size=16)
    want = library.NVFP4PackedCompressor.decompress(held, scheme)["weight"]
    same_bits(decoded(weight, weight.dtype), want)
    module = SimpleNamespace(quantization_scheme=scheme, **held)
    same_bits(mx.from_compressed_tensors(module).dequantize(), want)


@pytest.mark.parametrize("total", GLOBALS)
def test_nvfp4_has_the_bits_of_modelopt(total):
    library = format_library("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    weight = every_nvfp4(total, reciprocal=False)
    packed, scales, factor = weight.parts
    for dtype in (torch.bfloat16, torch.float32):
        held = library.NVFP4QTensor(weight.shape, dtype, packed)
        want = held.dequantize(dtype, scale=scales, double_scale=factor, block_sizes={-1: 16})
        same_bits(decoded(weight, dtype), want)


@pytest.mark.parametrize("reciprocal", [False, True])
def test_nvfp4_on_all_paths(reciprocal, set_path):  # noqa: F811
    for total in GLOBALS:
        check_paths(every_nvfp4(total, reciprocal), set_path)
    # Rows of 48 columns are not whole runs of 32 columns.
    packed = torch.randint(0, 256, (3, 5, 24), dtype=torch.uint8)
    scales = torch.randint(0, 255, (3, 5, 3), dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = mx.nvfp4(packed, scales, torch.tensor([0.5, 3.0, 1e-4]), reciprocal=reciprocal)
    check_paths(weight, set_path)
    one = weight.expert(2)
    code, scale = packed[2, 4, 23].item() >> 4, scales[2, 4, 2].float()
    factor = scale / torch.tensor(1e-4) if reciprocal else scale * torch.tensor(1e-4)
    value = math.copysign(E2M1[code & 7], 0.5 - (code >> 3)) * factor
    assert one.dequantize(torch.float32)[4, 47].item() == pytest.approx(value.item(), rel=0, nan_ok=True)


# --- FP8 --------------------------------------------------------------------------------------------------------------


def e4m3(byte: int) -> float:
    magnitude, sign = byte & 127, 1.0 if byte < 128 else -1.0
    if magnitude == 127:
        return math.nan
    return sign * (magnitude * 2.0**-9 if magnitude < 8 else (8 + magnitude % 8) * 2.0 ** (magnitude // 8 - 10))


def every_fp8(scales: Tensor) -> PackedWeight:
    """Returns a weight [scales, 256] with every code under every scale."""
    return fp8.fp8(BYTES.view(torch.float8_e4m3fn).repeat(len(scales), 1), scales[:, None], (1, 0))


ALL_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
SCALES = {
    "e8m0": BYTES.view(torch.float8_e8m0fnu),
    "bfloat16": ALL_BFLOAT16[::29],
    "float16": ALL_BFLOAT16.view(torch.float16)[::29],
    "float32": torch.tensor([0.0, -0.0, 1.0, 0.37, -3.1e-5, 1e-42, 1e-45, 1e38, math.inf, -math.inf, math.nan]),
}


def fp8_dequantized(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Returns transformers' dequantized weight; transformers derives the block sizes from the sizes of the scales."""
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    return library.Fp8Dequantize(None)._dequantize_one(*weight.parts, dtype)


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_fp8_has_the_bits_of_transformers(scales, set_path):  # noqa: F811
    weight = every_fp8(scales)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        same_bits(decoded(weight, dtype), fp8_dequantized(weight, dtype))
    check_paths(weight, set_path)


@pytest.mark.slow
def test_fp8_under_every_bfloat16_scale(set_path):  # noqa: F811
    weight = every_fp8(ALL_BFLOAT16)
    same_bits(decoded(weight, torch.bfloat16), fp8_dequantized(weight, torch.bfloat16))
    check_paths(weight, set_path, (torch.bfloat16,))


def test_fp8_is_e4m3_times_a_scale(set_path):  # noqa: F811
    weight = every_fp8(torch.tensor([1.0, 0.75, -(2.0**-30)]))
    want = torch.tensor([[e4m3(byte) * scale for byte in range(256)] for scale in weight.parts[1].flatten().tolist()])
    same_bits(weight.dequantize(torch.float32), want)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (64, 16), (0, 64), (2, 0), None], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 33), (1, 1), (0, 64)], ids=str)
def test_fp8_blocks_and_edges(shape, block, scale_dtype, set_path):  # noqa: F811
    rows, columns = (size or max(1, whole) for size, whole in zip(block or (0, 0), shape, strict=True))
    grid = (-(-shape[0] // rows), -(-shape[1] // columns))
    scales = torch.rand(grid).add(0.1).to(scale_dtype) if scale_dtype.is_floating_point else torch.randint(
        0, 255, grid, dtype=torch.uint8)  # fmt: skip
    codes = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = fp8.fp8(codes, scales, block)
    check_paths(weight, set_path)
    factors = scales.view(torch.float8_e8m0fnu) if scale_dtype is torch.uint8 else scales
    want = torch.zeros(shape)
    for n in range(0, shape[0], rows):
        for k in range(0, shape[1], columns):
            block_codes, factor = codes[n : n + rows, k : k + columns].float(), factors[n // rows, k // columns].float()
            want[n : n + rows, k : k + columns] = block_codes * factor
    same_bits(weight.dequantize(torch.float32), want)
    if shape[0] and not (shape[0] % rows or shape[1] % columns):
        same_bits(weight.dequantize(), fp8_dequantized(weight, torch.bfloat16))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_fp8_has_the_bits_of_compressed_tensors(strategy, scale_dtype):
    library = format_library("compressed_tensors.compressors.naive_quantized")
    kwargs = {"block_structure": [128, 128]} if strategy == "block" else {}
    scheme = compressed(8, strategy, **kwargs)
    scales = torch.rand({"tensor": (1,), "channel": (130, 1), "block": (2, 2)}[strategy]).to(scale_dtype)
    codes = torch.randint(0, 256, (130, 200), dtype=torch.uint8).view(torch.float8_e4m3fn)
    module = SimpleNamespace(quantization_scheme=scheme, weight=codes, weight_scale=scales)
    weight = fp8.from_compressed_tensors(module)
    assert weight.dtype is scale_dtype and weight.parts[0].data_ptr() == codes.data_ptr()
    held = {"weight": codes, "weight_scale": scales}
    same_bits(weight.dequantize(), library.FloatQuantizationCompressor.decompress(held, scheme)["weight"])


@pytest.mark.parametrize("group", [0, 32])
def test_dynamic_inputs_have_the_bits_of_compressed_tensors(group):
    library = format_library("compressed_tensors.quantization")
    helpers = format_library("compressed_tensors.quantization.utils.helpers")
    forward = format_library("compressed_tensors.quantization.lifecycle.forward")
    kwargs = {"strategy": "group", "group_size": group} if group else {"strategy": "token"}
    args = library.QuantizationArgs(num_bits=8, type="float", symmetric=True, dynamic=True, **kwargs)
    x = torch.randn(2, 7, 96) * torch.logspace(-3, 3, 7)[:, None]
    scale, zero_point = helpers.compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    same_bits(quantized_input(x, group), forward.fake_quantize(x, scale, zero_point, args))


def test_fp8_of_transformers_layers_and_experts(set_path):  # noqa: F811
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    for block in ((128, 128), None):
        module = library.FP8Linear(256, 130, block)
        with torch.no_grad():
            module.weight.copy_(torch.randn(130, 256))
            module.weight_scale_inv.uniform_(0.1, 1.0)
        weight = fp8.from_transformers(module)
        same_bits(weight.dequantize(), decoded(weight, torch.bfloat16))
        assert weight.parts[0].data_ptr() == module.weight.data_ptr()
    with pytest.raises(TypeError, match="from_transformers: module is Linear, wanted FP8Linear"):
        fp8.from_transformers(torch.nn.Linear(2, 2))
    codes = torch.randint(0, 256, (3, 100, 64), dtype=torch.uint8).view(torch.float8_e4m3fn)
    check_paths(fp8.fp8(codes, torch.rand(3, 2, 2), (64, 32)), set_path)


# --- FP4 --------------------------------------------------------------------------------------------------------------


def test_the_table_of_fp4_is_known_under_another_default_device():
    with torch.device("meta"):
        assert fp4.is_fp4_table(torch.tensor(fp4.FP4_CODE, device="cpu"))


def test_fp4_has_the_table_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    same_bits(torch.tensor(fp4.FP4_CODE), functional.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4_has_the_bits_of_bitsandbytes_for_every_code(dtype, set_path):  # noqa: F811
    subnormal = torch.tensor([1e-42, 3e-39])
    absmax = torch.cat([subnormal, torch.tensor([0.0, -0.0, 1.0, 1e-35, 3e38, math.inf, math.nan]), torch.rand(300)])
    weight = fp4.fp4(BYTES.repeat(len(absmax)), absmax, (len(absmax), 512), dtype, blocksize=512)
    check_paths(weight, set_path)
    by_code = torch.tensor([fp4.FP4_CODE[code] for byte in range(256) for code in (byte >> 4, byte & 15)])
    same_bits(weight.dequantize(), (absmax[:, None] * by_code).to(dtype))
    pytest.importorskip("bitsandbytes")
    args = (weight.parts[0].view(-1, 1), absmax, 512, "fp4", list(weight.shape), dtype)
    # bitsandbytes' AVX512_BF16 kernel flushes subnormal results to 0, because the CPU's instruction does.
    want = torch.ops.bitsandbytes.dequantize_4bit.default(*args)
    same_bits(weight.dequantize()[len(subnormal) :], want[len(subnormal) :])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("shape", [(16, 4096), (65, 100), (7, 33), (3, 96), (1, 1)], ids=str)
def test_fp4_has_the_bits_of_bitsandbytes(shape, blocksize, nested, set_path):  # noqa: F811
    functional = pytest.importorskip("bitsandbytes.functional")
    default = pytest.importorskip("bitsandbytes.backends.default.ops")
    packed, state = functional.quantize_4bit(torch.randn(shape).bfloat16(), blocksize=blocksize, quant_type="fp4",
                                             compress_statistics=nested)  # fmt: skip
    weight = fp4.from_params4bit(packed, state)
    assert weight.parts[0].data_ptr() == packed.data_ptr() and weight.shape == shape
    absmax = state.absmax
    if nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    # bitsandbytes' AVX-512 kernel is wrong where a row is not whole blocks; this is the decoder in plain PyTorch, which
    # bitsandbytes would compile for each shape.
    with torch.compiler.set_stance("force_eager"):
        want = default._dequantize_4bit_compute(packed.view(-1), absmax, state.code, blocksize, shape, torch.bfloat16)
    same_bits(weight.dequantize(), want)
    check_paths(weight, set_path)


def test_fp4_experts_and_storage(set_path):  # noqa: F811
    packed, absmax = torch.randint(0, 256, (3, 5 * 33 // 2 + 1), dtype=torch.uint8), torch.rand(3, 3)
    check_paths(fp4.fp4(packed, absmax, (3, 5, 33)), set_path)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    held = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="fp4",
                                      quant_storage=torch.bfloat16).to("cpu")  # fmt: skip
    weight = fp4.from_params4bit(held)
    assert weight.parts[0].dtype is torch.uint8 and weight.parts[0].data_ptr() == held.data_ptr()
    same_bits(weight.dequantize(torch.float32), decoded(weight, torch.float32))


@pytest.mark.parametrize("shape", [(40, 0), (0, 64)], ids=str)
def test_fp4_without_elements(shape, set_path):  # noqa: F811
    empty = torch.empty(0, dtype=torch.uint8)
    nested = NestedAbsmax(torch.empty(0), torch.rand(256), torch.zeros(()))
    for weight in (fp4.fp4(empty, torch.empty(0), shape), fp4.fp4(empty, empty, shape, nested=nested)):
        check_paths(weight, set_path)
        assert torch.equal(ops.frozen_linear(torch.randn(3, shape[1]), weight), torch.zeros(3, shape[0]))


# --- products ---------------------------------------------------------------------------------------------------------


def random_weights(rows: int, columns: int) -> Iterator[PackedWeight]:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    codes[codes & 127 == 127] = 5
    half = codes[:, : columns // 2].contiguous()
    yield fp8.fp8(codes.view(torch.float8_e4m3fn), torch.rand(-(-rows // 32), -(-columns // 64)), (32, 64))
    yield mx.mxfp4(half, torch.randint(118, 126, (rows, columns // 32), dtype=torch.uint8))
    scales = torch.rand(rows, columns // 16).to(torch.float8_e4m3fn)
    yield mx.nvfp4(half, scales, torch.tensor([0.37]), reciprocal=False)
    yield mx.nvfp4(half, scales, torch.tensor([2.9]), reciprocal=True)
    absmax = torch.rand(-(-half.numel() // 32))
    yield fp4.fp4(half, absmax, (rows, columns))
    codes, offset = torch.randint(0, 256, absmax.shape, dtype=torch.uint8), torch.tensor(0.3)
    nested = NestedAbsmax(torch.rand(-(-len(absmax) // 256)), torch.linspace(-1, 1, 256), offset)
    yield fp4.fp4(half, codes, (rows, columns), nested=nested)


@pytest.mark.parametrize("columns", [256, 160, 4128])
def test_products_with_few_and_many_tokens(columns, set_path):  # noqa: F811
    for weight in random_weights(50, columns):
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)):
            dense = decoded(weight, dtype).double()
            for tokens in (1, 2, 3, 4, 7, 40):
                x = torch.randn(tokens, columns).to(dtype)
                want, scale = x.double() @ dense.T, x.double().abs() @ dense.abs().T
                for path in _native.STATE.module.isas():
                    set_path(path)
                    error = (ops.frozen_linear(x, weight).double() - want).abs()
                    assert (error <= limit * scale).all(), (weight, dtype, tokens, path, (error / scale).max())


# --- quantizers -------------------------------------------------------------------------------------------------------


def hard_weight(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns groups of many magnitudes, with zeros, groups of zeros, and values half between codes."""
    weight = torch.randn(rows, columns) * torch.randint(-30, 10, (rows, columns // 16)).exp2().repeat_interleave(16, 1)
    weight[::3, ::5] = 0
    weight[1] = 0
    halves = torch.tensor([0.25, -0.25, 0.75, 1.25, 1.75, -2.5, 3.5, 5.0, 6.0, -6.0, 7.0, 7.5, 4.0, 0.2, -0.0, -1e-30])
    weight[2] = halves.repeat(columns // 16)
    return weight.to(dtype)


@pytest.fixture(params=[1 << 22, 1000], ids=["whole", "in chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "_CHUNK", request.param)
    monkeypatch.setattr(fp8, "_CHUNK", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (1, 0), (0, 0), (32, 64), (0, 32)], ids=str)
def test_quantize_fp8_has_the_bits_of_transformers(block, dtype, chunk):
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    value = hard_weight(256, 384, dtype)
    sizes = [size or whole for size, whole in zip(block, value.shape, strict=True)]
    config = SimpleNamespace(weight_block_size=sizes, scale_fmt="float")
    found = library.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"weight": value})
    weight = fp8.quantize_fp8(value, *block)
    same_bits(weight.parts[0].float(), found["weight"].float())
    same_bits(weight.parts[1], found["weight_scale_inv"])
    assert weight.dtype is dtype


def test_quantize_fp8_of_incomplete_blocks_and_experts(chunk):
    value = torch.randn(2, 130, 200)
    weight = fp8.quantize_fp8(value)
    padded = torch.nn.functional.pad(value, (0, 56, 0, 126))
    want = fp8.quantize_fp8(padded)
    same_bits(weight.dequantize(), want.dequantize()[:, :130, :200])
    assert weight.stacked and weight.parts[1].shape == (2, 2, 2)
    assert (weight.dequantize() - value).abs().max() < 0.04 * value.abs().max()
    assert fp8.quantize_fp8(torch.zeros(0, 64)).shape == (0, 64) and fp8.quantize_fp8(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_nvfp4_has_the_bits_of_modelopt(dtype, chunk):
    library = format_library("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    value = hard_weight(64, 96, dtype)
    held, scales, factor = library.NVFP4QTensor.quantize(value, 16)
    weight = mx.quantize_nvfp4(value)
    assert torch.equal(weight.parts[0], held._quantized_data)
    same_bits(weight.parts[1].float(), scales.float())
    same_bits(weight.parts[2].reshape(()), factor.reshape(()))
    assert torch.equal(mx.quantize_nvfp4(torch.zeros(4, 16)).dequantize(), torch.zeros(4, 16))


def nearest_e2m1(value: float) -> int:
    """Returns the code of the nearest e2m1 value; of two nearest values, the value with the even code."""
    magnitude = min(range(8), key=lambda code: (abs(abs(value) - E2M1[code]), code % 2))
    return magnitude | (8 if value < 0 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_mxfp4_follows_the_specification(dtype, chunk):
    value = hard_weight(20, 64, dtype)
    if dtype is not torch.float16:
        value[3] = 3e38
        value[4] = 1e-40
    weight = mx.quantize_mxfp4(value)
    groups = value.double().view(-1, 32).tolist()
    scales = [max(math.frexp(max(map(abs, group)))[1] - 3, -127) if any(group) else -127 for group in groups]
    assert weight.parts[1].flatten().tolist() == [scale + 127 for scale in scales]
    codes = [nearest_e2m1(x / 2.0**scale) for group, scale in zip(groups, scales, strict=True) for x in group]
    packed = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert weight.parts[0].flatten().tolist() == packed
    again = mx.quantize_mxfp4(weight.dequantize(torch.float32))
    same_bits(again.dequantize(torch.float32), weight.dequantize(torch.float32) + 0.0)


def test_quantize_fp8_of_the_smallest_numbers():
    """The factor of a block stays finite, so that numbers near the smallest float32 do not become NaN."""
    for largest in (1e-36, 1e-38, 1e-40):
        weight = largest * torch.linspace(-1, 1, 33)[None]
        found = fp8.quantize_fp8(weight).dequantize(torch.float32)
        assert (found - weight).abs().max() <= largest / 16, largest


def test_quantizers_refuse_what_they_cannot_store():
    with pytest.raises(ValueError, match="quantize_mxfp4: weight has values that are not finite"):
        mx.quantize_mxfp4(torch.full((2, 32), math.inf))
    with pytest.raises(ValueError, match="the weight has 40 columns, wanted a multiple of 32"):
        mx.quantize_mxfp4(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="the weight has 40 columns, wanted a multiple of 16"):
        mx.quantize_nvfp4(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="fp8 has blocks of 96 columns, wanted a power of two"):
        fp8.quantize_fp8(torch.zeros(2, 96), 1, 96)


# --- malformed weights ------------------------------------------------------------------------------------------------

BYTE, FLOAT = torch.zeros(64, dtype=torch.uint8), torch.zeros(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mx.mxfp4(BYTE, BYTE.view(8, 8)), "blocks of mxfp4 is torch.uint8 with 64 elements, wanted .* 1024 .*"),
        (lambda: mx.mxfp4(BYTE[:32], FLOAT.view(2, 1)), "scales of mxfp4 is torch.float32 .*e8m0"),
        (lambda: mx.nvfp4(BYTE.view(2, 32), BYTE[:4].view(2, 2), FLOAT[:1], reciprocal=True), "packed of nvfp4 .* 32 "),
        (
            lambda: mx.nvfp4(BYTE[:32], BYTE[:4].view(2, 2), torch.ones(3), reciprocal=True),
            "global_scale of nvfp4 .* 1 elem",
        ),
        (
            lambda: mx.nvfp4(BYTE[:48], BYTE[:6].view(3, 2), torch.ones(2), reciprocal=True),
            "3 rows and two global scales, wanted an even number",
        ),
        (lambda: mx.nvfp4(BYTE[:32], FLOAT.repeat(2, 1), FLOAT[:1], reciprocal=True), "scales of nvfp4 .*e4m3"),
        (lambda: fp8.fp8(BYTE.view(torch.float8_e5m2).view(8, 8), FLOAT), "weight of fp8 is torch.float8_e5m2, wanted"),
        (lambda: fp8.fp8(BYTE.view(8, 8).view(torch.int8), FLOAT), "weight of fp8 is torch.int8, wanted"),
        (lambda: fp8.fp8(BYTE.view(8, 8), FLOAT, (128, 128)), "scales of fp8 is .* 2 elements, wanted .* with 1 "),
        (lambda: fp8.fp8(BYTE.view(8, 8), FLOAT, (96, 128)), "fp8 has blocks of 96 rows, wanted a power of two"),
        (lambda: fp8.fp8(BYTE.view(8, 8), FLOAT, (128, 100)), "fp8 has blocks of 100 columns, wanted a power of two"),
        (lambda: fp8.fp8(BYTE.view(8, 8), BYTE[0].view(torch.float8_e4m3fn)), "scales that are not e4m3"),
        (lambda: fp8.fp8(BYTE.view(8, 8), FLOAT.long()), "the scales are torch.int64, wanted one of"),
        (lambda: fp4.fp4(BYTE, FLOAT, (8, 8)), "packed of fp4 is .* 64 elements, wanted torch.uint8 with 32"),
        (lambda: fp4.fp4(BYTE[:32], FLOAT, (8, 8)), "absmax of fp4 is .* 2 elements, wanted torch.float32 with 1"),
        (lambda: fp4.fp4(BYTE[:32], FLOAT[:1], (8, 8), blocksize=48), "fp4 has blocks of 48 elements, wanted one of"),
        (lambda: fp4.fp4(BYTE[:32], BYTE[:1], (8, 8), nested=NestedAbsmax(FLOAT[:1], FLOAT, FLOAT[:1])),
         "nested_code of fp4 is .* 2 elements, wanted torch.float32 with 256"),
        (lambda: fp4.fp4(BYTE, FLOAT, (2, 8, 8), nested=NestedAbsmax(FLOAT, FLOAT, FLOAT)), "stacked fp4 .* nested"),
        (lambda: fp4.from_params4bit(BYTE), "the weight is not quantized yet"),
        (lambda: fp4.from_params4bit(BYTE, SimpleNamespace(quant_type="nf4")), "quant_type is 'nf4', wanted 'fp4'"),
        (lambda: fp8.from_compressed_tensors(torch.nn.Linear(2, 2)), "Linear has no quantization_scheme"),
        (lambda: mx.from_compressed_tensors(torch.nn.Linear(2, 2)), "Linear has no quantization_scheme"),
    ],
)  # fmt: skip
def test_malformed_weights_are_refused_by_name(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("format", "layout"),
    [(1, 64 | 5 << 48), (1, 48 | 6 << 48), (2, 16), (3, 32), (4, 128 | 7 << 48 | 6 << 54), (4, 7 << 48 | 4 << 40)],
)
def test_operators_refuse_options_that_do_not_fit(format, layout):
    with pytest.raises(RuntimeError, match="nf4_dequantize: .* weight .* has group .* and option .*, wanted"):
        torch.ops.peft_ext.nf4_dequantize(BYTE, FLOAT, None, None, None, layout | format << 32, [2, 64], torch.float32)


def test_few_tokens_multiply_exact_codes_of_fp4() -> None:
    """2/3 rounded to bfloat16 would make the second product 0.2% larger, and its result one ulp larger."""
    weight = fp4.fp4(torch.full((16 * 32,), 0x22, dtype=torch.uint8), torch.full((16,), 3.0), (16, 64))
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 40] = 255 / 256, 2**-10
    wanted = (2 * x.double().sum()).bfloat16()
    assert torch.equal(ops.frozen_linear(x.bfloat16(), weight), wanted.expand(1, 16))
