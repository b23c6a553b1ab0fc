"""Tests of GGUF's quantized types: the decoded bits of the package gguf, on every CPU path.

A library that is not installed skips its tests; checksums of decoded patterns need no library.
"""

from __future__ import annotations

import itertools
import sys
import zlib

import pytest
import torch
from packed_bits import check_paths, same_bits, set_path  # noqa: F401  a fixture
from torch import Tensor

from peft_ext import _native, nn, ops
from peft_ext.reference.formats import decoded
from peft_ext.run.demo_model import packed_model
from peft_ext.weights import gguf

KERNELS = [number for number in gguf.TYPES if gguf.has_kernel(number)]
OTHERS = [number for number in gguf.TYPES if not gguf.has_kernel(number)]

# Byte offsets of a block's float16 scales.
SCALES = {35: (64,), 2: (0,), 3: (0, 2), 6: (0,), 7: (0, 2), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2),
          14: (208,), 20: (0,), 23: (0,), 39: ()}  # fmt: skip

# Bits of float16: zeros, subnormals, the smallest normal, 1, -1, the largest, infinities, NaNs, 0.1.
SPECIAL = (0, 0x8000, 1, 0x83FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFC01, 0x2E66)

# zlib.crc32 of the bits of gguf's values of pattern(number), by gguf 0.19.
CHECKSUMS = {2: 1891529760, 3: 746990763, 6: 1646526925, 7: 1981819889, 8: 1350765526, 10: 1857334669,
             11: 3158864187, 12: 4131481841, 13: 3227684687, 14: 4012852378, 20: 1871729361, 23: 3685236409,
             35: 3564096701, 39: 1780049655}  # fmt: skip


def name(number: int) -> str:
    return gguf.TYPES[number].name


def library_values(data: Tensor, number: int) -> Tensor:
    """Returns the values of bytes ``[rows, bytes of a row]`` by the package gguf."""
    library, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    with numpy.errstate(all="ignore"):
        values = library.quants.dequantize(data.numpy(), library.GGMLQuantizationType(number))
    return torch.from_numpy(values)


def every_byte(number: int, seed: int = 0) -> Tensor:
    """Returns 256 blocks, uint8 ``[8, bytes of a row]``: every place of a block has every byte once."""
    torch.manual_seed(100 * seed + number)
    return torch.stack([torch.randperm(256) for _ in range(gguf.TYPES[number].bytes)], 1).byte().view(8, -1)


def put_scales(data: Tensor, number: int, scales: list[tuple[int, ...]]) -> Tensor:
    """Returns a copy of the blocks with the float16 scales of these bits: block i has ``scales[i % len(scales)]``."""
    blocks = data.reshape(-1, gguf.TYPES[number].bytes).clone()
    bits = torch.tensor(scales).repeat(-(-len(blocks) // len(scales)), 1)[: len(blocks)]
    for i, at in enumerate(SCALES[number]):
        blocks[:, at], blocks[:, at + 1] = bits[:, i] & 255, bits[:, i] >> 8
    return blocks.view(data.shape)


def special(number: int) -> Tensor:
    """Returns 2048 blocks with all combinations of the special scales."""
    data = torch.cat([every_byte(number, seed) for seed in range(8)])
    return put_scales(data, number, list(itertools.product(SPECIAL, repeat=len(SCALES[number]))))


def pattern(number: int) -> Tensor:
    """Returns four rows of two blocks with finite scales, from a formula."""
    size = 8 * gguf.TYPES[number].bytes
    bits = (0x2E66, 0x3C01)[: len(SCALES[number])]
    return put_scales(((torch.arange(size) * 167 + 13) % 251).byte().view(4, -1), number, [bits])


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", gguf.TYPES, ids=name)
def test_every_byte_has_the_bits_of_gguf(number):
    data = every_byte(number)
    same_bits(decoded(gguf.gguf_weight(data, number), torch.float32), library_values(data, number))


@pytest.mark.parametrize("number", KERNELS, ids=name)
def test_special_scales_have_the_bits_of_gguf(number):
    data = special(number)
    same_bits(decoded(gguf.gguf_weight(data, number), torch.float32), library_values(data, number))


@pytest.mark.parametrize("number", KERNELS, ids=name)
def test_the_kernels_have_the_bits_of_the_reference(number, set_path):  # noqa: F811
    check_paths(gguf.gguf_weight(every_byte(number), number), set_path)
    check_paths(gguf.gguf_weight(special(number), number), set_path)


@pytest.mark.parametrize("number", [2, 3, 6, 7, 8], ids=name)
def test_quantized_numbers_come_back(number, set_path):  # noqa: F811
    library = pytest.importorskip("gguf")
    numbers = torch.randn(16, 96) * torch.logspace(-2, 2, 16)[:, None]
    data = library.quants.quantize(numbers.numpy(), library.GGMLQuantizationType(number))
    weight = gguf.gguf_weight(torch.from_numpy(data), number)
    same_bits(decoded(weight, torch.float32), library_values(torch.from_numpy(data), number))
    check_paths(weight, set_path)
    error = (weight.dequantize() - numbers).abs().amax(1) / numbers.abs().amax(1)
    assert error.max() < {2: 0.14, 3: 0.07, 6: 0.07, 7: 0.04, 8: 0.005}[number]


@pytest.mark.parametrize("number", KERNELS, ids=name)
def test_a_pattern_has_stored_bits(number):
    values = gguf.gguf_weight(pattern(number), number).dequantize()
    assert values.isfinite().all()
    assert zlib.crc32(values.numpy().tobytes()) == CHECKSUMS[number]


@pytest.mark.parametrize("number", [3, 12, 39], ids=name)
def test_parts_of_rows_and_experts(number, set_path):  # noqa: F811
    columns, size = gguf.TYPES[number].columns, gguf.TYPES[number].bytes
    flat = every_byte(number).view(-1)[: 3 * 5 * 3 * size].contiguous()
    weight = gguf.gguf_weight(flat, name(number), (3, 5, 3 * columns), torch.bfloat16)
    assert weight.stacked and weight.parts[0] is flat and weight.dtype is torch.bfloat16
    check_paths(weight, set_path)
    same_bits(weight.dequantize()[1], gguf.gguf_weight(flat.view(3, 5, -1)[1], number).dequantize(torch.bfloat16))
    assert gguf.gguf_weight(flat.view(3, 5, -1), number).shape == weight.shape
    assert gguf.gguf_weight(flat[:0].view(0, 3 * size), number).dequantize().shape == (0, 3 * columns)
    assert weight.bits == pytest.approx(8 * size / columns)


@pytest.mark.slow
def test_the_demo_model_has_the_bits_of_gguf():
    library = pytest.importorskip("gguf")
    if (path := packed_model()) is None:
        pytest.skip("the package of the demo model is not installed")
    quantized = [t for t in library.GGUFReader(path).tensors if gguf.dense_dtype(t.tensor_type) is None]
    for tensor in (quantized[0], quantized[1], quantized[-1]):
        data, shape = torch.from_numpy(tensor.data.copy()), tuple(int(size) for size in reversed(tensor.shape))
        weight = gguf.gguf_weight(data, tensor.tensor_type, shape)
        same_bits(weight.dequantize(), library_values(data, int(tensor.tensor_type)))


@pytest.mark.parametrize("number", KERNELS, ids=name)
def test_products_with_few_and_many_tokens(number, set_path):  # noqa: F811
    kind, rows, columns = gguf.TYPES[number], 21, 5 * gguf.TYPES[number].columns
    data = torch.randint(0, 256, (rows, 5 * kind.bytes), dtype=torch.uint8)
    data.view(-1, kind.bytes)[:, 0] &= 127  # MXFP4's exponent stays finite in float16
    data = put_scales(data, number, [(0x1E66, 0x2001)[: len(SCALES[number])]])
    weight = gguf.gguf_weight(data, number)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)):
        dense = decoded(weight, dtype).double()
        for tokens in (1, 2, 3, 7, 40):
            x = torch.randn(tokens, columns).to(dtype)
            want, scale = x.double() @ dense.T, x.double().abs() @ dense.abs().T
            if number == 3:  # Q4_1: sum(x * scale * code) and sum(x * offset) are rounded, then nearly cancel
                scale += x.double().abs().sum(1, keepdim=True) * dense.abs().max()
            for path in _native.STATE.module.isas():
                set_path(path)
                error = (ops.frozen_linear(x, weight).double() - want).abs()
                assert (error <= limit * scale).all(), (dtype, tokens, path, (error / scale).max())


# --- Types ------------------------------------------------------------------------------------------------------------


def test_types_are_those_of_gguf():
    library = pytest.importorskip("gguf")
    decoders = {int(kind) for kind in library.quants._type_traits}
    for number, kind in gguf.TYPES.items():
        theirs = library.GGMLQuantizationType(number)
        assert (theirs.name, library.GGML_QUANT_SIZES[theirs]) == (kind.name, (kind.columns, kind.bytes))
        assert gguf.type_number(theirs) == gguf.type_number(kind.name.lower()) == number
    assert decoders - {30} == set(gguf.TYPES)


def test_kernels_and_dense_types():
    assert sorted(map(name, KERNELS)) == ["IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0",
                                          "Q5_1", "Q5_K", "Q6_K", "Q8_0", "TQ2_0"]  # fmt: skip
    assert not gguf.has_kernel("F32") and not gguf.has_kernel("IQ2_XXS")
    dense = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "Q4_K": None}
    assert {kind: gguf.dense_dtype(kind) for kind in dense} == dense


@pytest.mark.parametrize("number", OTHERS, ids=name)
def test_a_type_without_a_kernel_is_decoded_and_held_by_no_layer(number):
    data = every_byte(number)
    weight = gguf.gguf_weight(data, number)
    assert torch.equal(weight.dequantize().view(torch.int32), library_values(data, number).view(torch.int32))
    stacked = gguf.gguf_weight(data.view(2, 4, -1), number)
    assert torch.equal(stacked.dequantize().view(torch.int32).flatten(0, 1), weight.dequantize().view(torch.int32))
    for hold in (nn.PackedLinear.from_packed, nn.PackedEmbedding.from_packed):
        with pytest.raises(ValueError, match=f"no kernel decodes the weight's format gguf_{name(number).lower()}"):
            hold(weight, ("weight",))


def test_a_type_without_a_kernel_needs_gguf(monkeypatch):
    weight = gguf.gguf_weight(torch.zeros(2, 66, dtype=torch.uint8), "IQ2_XXS")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf IQ2_XXS needs the package gguf \(pip install gguf\)"):
        decoded(weight, torch.float32)


# --- Errors -----------------------------------------------------------------------------------------------------------

BYTES = torch.zeros(4, 144, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((BYTES, 15), ValueError, "ggml type is 15, wanted one of Q4_0, "),
        ((BYTES, "Q7_K"), ValueError, "ggml type is 'Q7_K', wanted one of Q4_0, "),
        ((BYTES, "F16"), ValueError, r"'F16' is dense \(torch.float16\), wanted a quantized type"),
        ((BYTES.numpy(), "Q4_K"), TypeError, "data is ndarray, wanted a Tensor"),
        ((BYTES[:, :143], "Q4_K"), ValueError, r"data of Q4_K has shape \(4, 143\), wanted .* blocks of 144 bytes"),
        ((BYTES.view(-1), "Q4_K"), ValueError, r"data of Q4_K has shape \(576,\), wanted .* or the argument shape"),
        ((BYTES, "Q4_K", (4, 128)), ValueError, "gguf Q4_K has 128 columns, wanted a multiple of its block of 256"),
        ((BYTES, "Q4_0", (4, 48)), ValueError, "gguf Q4_0 has 48 columns, wanted a multiple of its block of 32"),
        ((BYTES, "Q4_K", (5, 256)), ValueError, r"data of gguf Q4_K is torch.uint8 with 576 elements, .* with 720 for"),
        ((BYTES.char(), "Q4_K"), ValueError, "data of gguf Q4_K is torch.int8 with 576 elements, wanted torch.uint8"),
        ((BYTES, "Q4_K", (1024,)), ValueError, r"gguf_q4_k has shape \(1024,\), wanted \(N, K\)"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(args, error, message):
    with pytest.raises(error, match=message):
        gguf.gguf_weight(*args)


# --- transformers -----------------------------------------------------------------------------------------------------


def gguf_linear(number: int, rows: int, columns: int) -> torch.nn.Module:
    library = pytest.importorskip("transformers.integrations.gguf.utils")
    layer = library.GgufLinear(columns, rows, number)
    layer.weight.data.copy_(every_byte(number).view(-1)[: layer.weight.numel()].view_as(layer.weight))
    return layer


def test_a_gguf_linear_is_not_copied():
    layer = gguf_linear(12, 6, 512)
    weight = gguf.from_gguf_linear(layer, torch.bfloat16)
    assert weight.parts[0].data_ptr() == layer.weight.data_ptr() and weight.format.name == "gguf_q4_k"
    assert weight.shape == (6, 512) and weight.dtype is torch.bfloat16
    layer.input_permutation = torch.arange(512)
    with pytest.raises(ValueError, match="has an input_permutation, wanted a layer without"):
        gguf.from_gguf_linear(layer)
    with pytest.raises(TypeError, match="module is Linear, wanted a GgufLinear"):
        gguf.from_gguf_linear(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("number", [2, 3, 8, 10, 11, 12, 13, 14, 20, 23], ids=name)
def test_values_in_float32_have_the_bits_of_transformers(number):
    library = pytest.importorskip("transformers.integrations.gguf.dequant")
    data = every_byte(number)
    weight = gguf.gguf_weight(data, number)
    same_bits(weight.dequantize(), library.dequantize(data, number).view(weight.shape))


def test_rows_of_llama_are_in_the_order_of_transformers():
    library = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    heads, kv_heads = 6, 3
    processor = library.LlamaTensorProcessor({"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    for kind, count in (("q", heads), ("k", kv_heads)):
        data = every_byte(3).view(-1)[: count * 8 * 40].view(count * 8, 40)
        weight = gguf.gguf_weight(data, "Q4_1")
        moved = gguf.permuted_rows(weight, gguf.llama_row_order(count * 8, count))
        want = processor.process(weight.dequantize().numpy(), f"blk.0.attn_{kind}.weight").weights
        same_bits(moved.dequantize(), torch.from_numpy(want.copy()))


def test_errors_of_row_orders():
    weight = gguf.gguf_weight(BYTES, "Q4_K")
    with pytest.raises(ValueError, match="10 rows for 4 heads, wanted a multiple of 8"):
        gguf.llama_row_order(10, 4)
    with pytest.raises(ValueError, match=r"order has shape \(3,\), wanted \(4,\)"):
        gguf.permuted_rows(weight, torch.arange(3))
    with pytest.raises(ValueError, match="wanted a GGUF weight"):
        gguf.permuted_rows(gguf.gguf_weight(BYTES, "Q4_K", (2, 2, 256)), torch.arange(2))
