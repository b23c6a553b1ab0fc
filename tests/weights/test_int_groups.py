"""Tests of compressed-tensors' integers, GPTQ, AWQ and HQQ: the decoded bits of the libraries, on every CPU path.

A library that is not installed skips its tests; the tests against decoders of a few lines of Python need no library.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Optional

import numpy as np
import pytest
import torch
from format_libraries import format_library
from packed_bits import check_paths, same_bits, set_path  # noqa: F401  a fixture
from torch import Tensor

from peft_ext import _native
from peft_ext.reference.formats import decoded
from peft_ext.weights import PackedWeight, int_groups
from peft_ext.weights.int4_quantize import quantize_int4

SCALES = (torch.bfloat16, torch.float16, torch.float32)
# Rows, columns, group: tails of words, rows that are not whole runs, groups that cross runs of 32 columns.
SHAPES = ((40, 192, 64), (17, 96, 32), (24, 40, 8), (8, 96, 48), (16, 160, 0), (33, 33, 0), (1, 64, 16))


def draw(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int64).to(dtype)


def draw_words(*shape: int) -> Tensor:
    return draw(-(2**31), 2**31, *shape, dtype=torch.int32)


def draw_scales(dtype: torch.dtype, *shape: int) -> Tensor:
    """Returns scales of any bits: negative, subnormal, zero, infinite and NaN ones, and as many usual scales."""
    kind, half = (torch.int32, 2**31) if dtype is torch.float32 else (torch.int16, 2**15)
    wild = draw(-half, half, *shape, dtype=kind).view(dtype)
    return torch.where(torch.rand(shape) < 0.5, wild, torch.randn(shape).to(dtype) * 0.01)


def every_scale(dtype: torch.dtype) -> Tensor:
    """Returns all 65536 values of a 16-bit float dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Returns codes of 0 and more ``[R, C]`` in words ``[R, ceil(C · bits / 32)]``, the lowest bits first, by numpy."""
    count = 32 // bits
    held = np.zeros((codes.shape[0], -(-codes.shape[1] // count) * count), dtype=np.uint32)
    held[:, : codes.shape[1]] = codes.numpy()
    words = np.zeros((held.shape[0], held.shape[1] // count), dtype=np.uint32)
    for i in range(count):
        words |= held[:, i::count] << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def formula(q: Tensor, zeros: Tensor, scales: Tensor, at: Tensor) -> Tensor:
    """Returns (q - zero) · scale, in the scales' dtype, in which the libraries compute. ``at``: groups of columns."""
    return (q.to(scales.dtype) - zeros.to(scales.dtype)[:, at]) * scales[:, at]


def groups(columns: int, group: int, permuted: bool = False) -> tuple[int, Tensor]:
    """Returns the number of groups and the group of each column."""
    at = torch.arange(columns) // (group or columns)
    return int(at[-1]) + 1, at[torch.randperm(columns)] if permuted else at


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def compressed(bits: int, group: int, symmetric: bool, strategy: Optional[str] = None) -> dict:
    strategy = strategy or ("group" if group else "channel")
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group or None,
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "g_idx"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_integers(bits, symmetric, permuted, set_path):  # noqa: F811
    half = 1 << bits - 1
    for (rows, columns, group), kind in zip(SHAPES, itertools.cycle(SCALES), strict=False):
        count, at = groups(columns, group, permuted)
        q, zeros = draw(-half, half, rows, columns), draw(-half, half, rows, count)
        state = {"weight_packed": packed(q.int() + half, bits), "weight_scale": draw_scales(kind, rows, count),
                 "weight_shape": torch.tensor([rows, columns])}  # fmt: skip
        if not symmetric:
            state["weight_zero_point"] = packed((zeros.int() + half).T, bits).T.contiguous()
        if permuted:
            state["weight_g_idx"] = at.int()
        weight = int_groups.from_state(compressed(bits, group, symmetric), state)
        assert weight.parts[0].data_ptr() == state["weight_packed"].data_ptr() and weight.dtype is kind
        want = formula(q, zeros * (not symmetric), state["weight_scale"], at)
        same_bits(decoded(weight, kind), want)
        check_paths(weight, set_path)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_points"])
def test_plain_integers(symmetric, set_path):  # noqa: F811
    for (rows, columns, group), kind in zip(SHAPES, itertools.cycle(SCALES), strict=False):
        count, at = groups(columns, group)
        q, zeros = draw(-128, 128, rows, columns), draw(-128, 128, rows, count)
        state = {"weight": q, "weight_scale": draw_scales(kind, rows, count)}
        if not symmetric:
            state["weight_zero_point"] = zeros
        weight = int_groups.from_state(compressed(8, group, symmetric) | {"format": "int-quantized"}, state)
        same_bits(decoded(weight, kind), formula(q, zeros * (not symmetric), state["weight_scale"], at))
        check_paths(weight, set_path)


def test_one_scale_of_a_plain_weight(set_path):  # noqa: F811
    q = draw(-128, 128, 9, 64)
    state = {
        "weight": q,
        "weight_scale": torch.tensor([0.02]),
        "weight_zero_point": torch.tensor([-5], dtype=torch.int8),
    }
    weight = int_groups.from_state(compressed(8, 0, False, "tensor") | {"format": "naive-quantized"}, state)
    same_bits(decoded(weight, torch.float32), (q.float() + 5) * 0.02)
    check_paths(weight, set_path)


@pytest.mark.parametrize("kind", SCALES[:2], ids=str)
def test_every_scale_and_difference_of_packed_integers(kind, set_path):  # noqa: F811
    scales = every_scale(kind).view(-1, 1)
    q, zeros = torch.arange(-8, 8, dtype=torch.int8).repeat(len(scales), 2), draw(-8, 8, len(scales), 1)
    weight = int_groups.int_rows(packed(q.int() + 8, 4), scales, q.shape,
                                 zero_points=packed((zeros.int() + 8).T, 4).T.contiguous())  # fmt: skip
    same_bits(decoded(weight, kind), formula(q, zeros, scales, torch.zeros(32, dtype=torch.long)))
    check_paths(weight, set_path, (kind,))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_has_the_bits_of_compressed_tensors(bits, symmetric):
    library = format_library("compressed_tensors.quantization")
    packing = format_library("compressed_tensors.compressors.pack_quantized.base")
    plain = format_library("compressed_tensors.compressors.naive_quantized.base")
    for (rows, columns, group), kind in itertools.product(((40, 192, 64), (33, 96, 32), (16, 160, 0)), SCALES):
        config = compressed(bits, group, symmetric)
        weights = config["config_groups"]["group_0"]["weights"]
        scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**weights))
        scales = torch.rand(rows, columns // group if group else 1).add(0.01).to(kind)
        zeros = draw(-(1 << bits - 1), 1 << bits - 1, *scales.shape)
        state = {"weight": torch.randn(rows, columns).to(kind), "weight_scale": scales, "weight_zero_point": zeros}
        if symmetric:
            state["weight_zero_point"] = torch.zeros_like(zeros)
        held = packing.PackedQuantizationCompressor.compress(dict(state), scheme)
        want = packing.PackedQuantizationCompressor.decompress(dict(held), scheme)["weight"]
        same_bits(decoded(int_groups.from_state(config, held), kind), want)
        module = torch.nn.Module()
        for name, tensor in held.items():
            module.register_buffer(name, tensor)
        module.quantization_scheme = scheme
        weight = int_groups.from_compressed_tensors(module)
        assert weight.parts[0].data_ptr() == held["weight_packed"].data_ptr()
        same_bits(decoded(weight, kind), want)
        held = plain.NaiveQuantizationCompressor.compress(dict(state), scheme)
        want = plain.NaiveQuantizationCompressor.decompress(dict(held), scheme)["weight"]
        same_bits(decoded(int_groups.from_state(config | {"format": "int-quantized"}, held), kind), want)


def test_a_g_idx_that_was_not_set_means_consecutive_groups():
    codes, scales = draw_words(8, 8), torch.rand(8, 2)
    for g_idx in (torch.full((64,), -1, dtype=torch.int32), (torch.arange(64) // 32).int()):
        assert int_groups.int_rows(codes, scales, (8, 64), g_idx=g_idx).parts[3] is None


def test_experts_of_packed_integers(set_path):  # noqa: F811
    codes, scales, zeros = draw_words(3, 16, 8), torch.rand(3, 16, 2), draw_words(3, 2, 2)
    weight = int_groups.int_rows(codes, scales, (3, 16, 64), zero_points=zeros)
    assert weight.stacked
    for e in range(3):
        one = int_groups.int_rows(codes[e], scales[e], (16, 64), zero_points=zeros[e])
        same_bits(decoded(weight, torch.float32)[e], decoded(one, torch.float32))
    check_paths(weight, set_path)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def gptq_state(rows: int, columns: int, group: int, bits: int, kind: torch.dtype, permuted: bool) -> dict[str, Tensor]:
    count, at = groups(columns, group, permuted)
    return {"qweight": draw_words(-(-columns * bits // 32), rows), "qzeros": draw_words(count, -(-rows * bits // 32)),
            "scales": draw_scales(kind, count, rows), "g_idx": at.int()}  # fmt: skip


def fields(word: int, bits: int) -> list[int]:
    return [(word & 0xFFFFFFFF) >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]


@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "desc_act"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, version, permuted, set_path):  # noqa: F811
    ones = sum(1 << shift for shift in range(0, 32, bits)) if version == "gptq" else 0
    for (rows, columns, group), kind in zip(SHAPES, itertools.cycle(SCALES), strict=False):
        state = gptq_state(rows, columns, group, bits, kind, permuted)
        q = [[code for word in column for code in fields(word, bits)] for column in state["qweight"].T.tolist()]
        zeros = [[code for word in row for code in fields(word + ones, bits)] for row in state["qzeros"].tolist()]
        config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "checkpoint_format": version}
        weight = int_groups.from_state(config, state, (rows, columns))
        assert weight.parts[0].data_ptr() == state["qweight"].data_ptr()
        want = formula(
            torch.tensor(q)[:, :columns], torch.tensor(zeros)[:, :rows].T, state["scales"].T, state["g_idx"].long()
        )
        same_bits(decoded(weight, kind), want)
        check_paths(weight, set_path)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_has_the_bits_of_gptqmodel(bits):
    library = format_library("gptqmodel.nn_modules.qlinear.torch")
    convert = format_library("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    shapes = ((64, 128, 32), (96, 256, 128), (48, 160, 0), (17, 128, 64))
    for (rows, columns, group), v1, permuted in itertools.product(shapes, (False, True), (False, True)):
        module = library.TorchLinear(bits=bits, group_size=group or -1, sym=False, desc_act=permuted,
                                     in_features=columns, out_features=rows, pack_dtype=torch.int32).eval()  # fmt: skip
        state = gptq_state(rows, columns, group, bits, SCALES[rows % 2], permuted)
        for name, tensor in state.items():
            setattr(module, name, tensor.clone())
        if v1:
            convert(module, bits, torch.int32)
        module.qzero_format(2)
        want = module.dequantize_weight().T
        weight = int_groups.from_gptq(module)
        assert weight.parts[0].data_ptr() == module.qweight.data_ptr()
        same_bits(decoded(weight, weight.dtype), want)
        config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1,
                  "checkpoint_format": "gptq" if v1 else "gptq_v2"}  # fmt: skip
        same_bits(decoded(int_groups.from_state(config, state, (rows, columns)), weight.dtype), want)


def test_a_g_idx_outside_of_the_groups_reads_the_last_group(set_path):  # noqa: F811
    """Raw operators do not read g_idx before the kernels do, and the kernels stay inside of the scales."""
    state = gptq_state(16, 64, 32, 4, torch.float32, True)
    bad, last = state["g_idx"].clone(), state["g_idx"].clone()
    bad[3], bad[40], last[3], last[40] = -7, 2**30, 1, 1
    option = int_groups.gptq(**{k: state[k] for k in ("qweight", "qzeros", "scales")}, group=32).option
    want, got = (
        PackedWeight(int_groups.GPTQ, (*(state[k] for k in ("qweight", "scales", "qzeros")), order), (16, 64),
                     torch.float32, group=32, option=option)
        for order in (last, bad)
    )  # fmt: skip
    for path in _native.STATE.module.isas():
        set_path(path)
        same_bits(got.dequantize(), decoded(want, torch.float32))


# --- AWQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCALES, ids=str)
def test_awq(kind, set_path):  # noqa: F811
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    for rows, columns, group in ((64, 128, 32), (40, 192, 64), (24, 40, 8), (8, 96, 48), (16, 160, 0)):
        count, at = groups(columns, group)
        q, zeros = draw(0, 16, columns, rows, dtype=torch.int32), draw(0, 16, count, rows, dtype=torch.int32)
        words = [packed(codes.unflatten(1, (-1, 8))[..., order].flatten(1), 4) for codes in (q, zeros)]
        scales = draw_scales(kind, count, rows)
        config = {"quant_method": "awq", "bits": 4, "group_size": group or -1, "version": "gemm", "zero_point": True}
        state = {"qweight": words[0], "qzeros": words[1], "scales": scales}
        weight = int_groups.from_state(config, state, (rows, columns))
        assert weight.parts[0] is not None and weight.parts[0].data_ptr() == words[0].data_ptr()
        same_bits(decoded(weight, kind), formula(q.T, zeros.T, scales.T, at))
        check_paths(weight, set_path)
        library = SimpleNamespace(
            qweight=words[0], qzeros=words[1], scales=scales, w_bit=4, group_size=group or columns
        )
        same_bits(decoded(int_groups.from_awq(library), kind), decoded(weight, kind))


def test_has_the_bits_of_gptqmodels_awq():
    library = format_library("gptqmodel.quantization.awq.utils.packing_utils")
    for (rows, columns, group), kind in itertools.product(((64, 128, 32), (24, 256, 128), (40, 160, 160)), SCALES):
        words, zeros = draw_words(columns, rows // 8), draw_words(columns // group, rows // 8)
        scales = draw_scales(kind, columns // group, rows)
        want = library.dequantize_gemm(words, zeros, scales, 4, group).T
        same_bits(decoded(int_groups.awq(words, zeros, scales), kind), want)


# --- HQQ --------------------------------------------------------------------------------------------------------------


def hqq_meta(rows: int, columns: int, group: int, bits: int, axis: int, kind: torch.dtype) -> dict:
    count = rows * columns // group
    each = (count, 1) if axis == 1 else (1, count)
    zero = torch.where(torch.rand(each) < 0.8, (torch.randn(each) * 4 + 8).to(kind), draw_scales(kind, *each))
    return {"nbits": bits, "group_size": group, "shape": torch.Size((rows, columns)), "axis": axis,
            "scale": draw_scales(kind, *each), "zero": zero, "packing": f"{bits}bit_u8", "view_as_float": False,
            "unpack_view_dtype": torch.uint8, "compute_dtype": kind, "quant_scale": False,
            "quant_zero": False}  # fmt: skip


HQQ_SHAPES = ((64, 128, 64), (32, 96, 32), (6, 40, 20), (16, 1024, 64), (24, 320, 48))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", SCALES, ids=str)
def test_hqq(kind, bits, axis, set_path):  # noqa: F811
    for rows, columns, group in HQQ_SHAPES:
        meta = hqq_meta(rows, columns, group, bits, axis, kind)
        q = draw(0, 1 << bits, *((rows * columns // group, group)[:: 1 if axis else -1]), dtype=torch.uint8)
        half = len(q) // 2
        codes = q if bits == 8 else q[:half] << 4 | q[half:]
        weight = int_groups.from_hqq(SimpleNamespace(W_q=codes, meta=meta))
        assert weight.parts[0].data_ptr() == codes.data_ptr()
        want = ((q.to(kind) - meta["zero"]) * meta["scale"]).reshape(rows, columns)
        same_bits(decoded(weight, kind), want)
        check_paths(weight, set_path)


@pytest.mark.parametrize("kind", SCALES[:2], ids=str)
def test_every_zero_of_hqq(kind, set_path):  # noqa: F811
    zero = every_scale(kind).view(-1, 1)
    scale = zero[torch.randperm(len(zero))]
    q = torch.arange(32, dtype=torch.uint8).remainder(16).repeat(len(zero), 1)
    half = len(q) // 2
    weight = int_groups.hqq(q[:half] << 4 | q[half:], scale, zero, q.shape, group=32)
    same_bits(decoded(weight, kind), (q.to(kind) - zero) * scale)
    check_paths(weight, set_path, (kind, torch.float32))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", SCALES, ids=str)
def test_has_the_bits_of_hqq(kind, axis):
    library = format_library("hqq.core.quantize")
    for bits, (rows, columns, group) in itertools.product((4, 8), HQQ_SHAPES):
        meta = hqq_meta(rows, columns, group, bits, axis, kind)
        shape = (rows * columns // group, group)[:: 1 if axis else -1]
        codes = draw(0, 256, shape[0] * bits // 8, shape[1], dtype=torch.uint8)
        weight = int_groups.from_hqq(SimpleNamespace(W_q=codes, meta=meta))
        same_bits(decoded(weight, kind), library.Quantizer.dequantize(codes, meta))
    for floats in (False, True):
        config = library.BaseQuantizeConfig(nbits=4, group_size=64, axis=axis, view_as_float=floats)
        module = library.HQQLinear(torch.nn.Linear(256, 96), config, compute_dtype=kind, device="cpu")
        want = module.dequantize()
        same_bits(decoded(int_groups.from_hqq(module), kind), want)
        same_bits(decoded(int_groups.from_state({"quant_method": "hqq"}, module.state_dict()), kind), want)


# --- quantize_int4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_points"])
@pytest.mark.parametrize("kind", SCALES, ids=str)
def test_quantize_has_the_codes_of_compressed_tensors(kind, symmetric, monkeypatch):
    library = format_library("compressed_tensors.quantization")
    rule = format_library("compressed_tensors.quantization.utils").calculate_qparams
    lifecycle = format_library("compressed_tensors.quantization.lifecycle.forward")
    monkeypatch.setattr("peft_ext.weights.int4_quantize._CHUNK", 1000)
    for rows, columns, group in ((37, 256, 128), (8, 96, 32), (5, 40, 0)):
        weight = (torch.randn(rows, columns) * torch.randn(rows, 1).exp()).to(kind)
        weight[0], weight[1], weight[2] = 0, weight[1].abs() + 1, -weight[2].abs() - 3
        args = library.QuantizationArgs(num_bits=4, group_size=group or -1, symmetric=symmetric, scale_dtype=kind,
                                        strategy="group" if group else "channel")  # fmt: skip
        by_group = weight.float().unflatten(1, (-1, group or columns))
        scales, zeros = rule(by_group.amin(-1), by_group.amax(-1), args)
        scales = scales.to(kind)
        q = lifecycle.quantize(weight.float(), scales, zeros, args, dtype=torch.int8)
        got = quantize_int4(weight, group, symmetric)
        assert torch.equal(got.parts[0], packed(q.int() + 8, 4)) and torch.equal(got.parts[1], scales)
        if symmetric:
            assert got.parts[2] is None
        else:
            assert torch.equal(got.parts[2], packed((zeros.int() + 8).T, 4).T)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero_points"])
def test_quantize_errs_by_half_a_step(symmetric):
    weight = torch.randn(24, 256) + (0 if symmetric else 0.3)
    got = quantize_int4(weight, 64, symmetric)
    step = got.parts[1].repeat_interleave(64, 1)
    # The zero point is rounded, too. A value at the end of the range errs by up to half a step more.
    assert ((got.dequantize() - weight).abs() <= (0.501 if symmetric else 1.001) * step).all()
    assert got.bits == 4.5 if symmetric else got.bits > 4.5


@pytest.mark.parametrize(
    ("weight", "group"), [(torch.ones(4, 96), 64), (torch.ones(4), 4), (torch.ones(4, 8).int(), 8)]
)
def test_quantize_refuses_what_has_no_groups(weight, group):
    with pytest.raises(ValueError, match="quantize_int4: (group is 64|weight is)"):
        quantize_int4(weight, group)


# --- errors -----------------------------------------------------------------------------------------------------------

WORDS, ZEROS, HALF = draw_words(64, 8), draw_words(2, 8), torch.ones(2, 64, dtype=torch.float16)
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32}
GPTQ_STATE = {"qweight": WORDS[:8].repeat(1, 8), "qzeros": ZEROS, "scales": HALF}
AWQ_STATE = {"qweight": WORDS, "qzeros": ZEROS, "scales": HALF}
INT_STATE = {"weight_packed": WORDS, "weight_scale": torch.ones(64, 2), "weight_shape": torch.tensor([64, 64])}
BYTES = torch.zeros(32, 64, dtype=torch.uint8)
HQQ_STATE = {"W_q": BYTES, "scale": torch.ones(64, 1), "zero": torch.ones(64, 1),
             "nbits": 4, "group_size": 64, "axis": 1, "shape": torch.Size((64, 64))}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "state", "message"),
    [
        ({"quant_method": "marlin"}, {}, "quant_method is 'marlin', wanted one of compressed-tensors, gptq, awq, hqq"),
        (GPTQ_CONFIG, {"qweight": WORDS}, "gptq lacks qzeros, scales; the tensors are qweight"),
        (GPTQ_CONFIG | {"bits": 3}, GPTQ_STATE, "bits of gptq is 3, wanted 2, 4 or 8"),
        (GPTQ_CONFIG | {"group_size": 16}, GPTQ_STATE, r"scales of gptq is \[2, 64\], wanted \[4, 64\]"),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, GPTQ_STATE, "checkpoint_format of gptq is 'marlin', wanted"),
        (GPTQ_CONFIG | {"pack_dtype": "int16"}, GPTQ_STATE, "pack_dtype of gptq is 'int16', wanted 'int32'"),
        (GPTQ_CONFIG, GPTQ_STATE | {"g_idx": torch.arange(64).int()}, "g_idx of gptq is from 0 to 63, wanted groups"),
        (GPTQ_CONFIG, GPTQ_STATE | {"qweight": GPTQ_STATE["qweight"].long()}, "qweight of gptq is torch.int64 with"),
        ({"quant_method": "awq", "version": "gemv"}, AWQ_STATE, "version of awq is 'gemv', wanted 'gemm'"),
        ({"quant_method": "awq", "bits": 8}, AWQ_STATE, "bits of awq is 8, wanted 4"),
        ({"quant_method": "awq", "group_size": 64}, AWQ_STATE, "group_size of awq is 64, wanted 32"),
        ({"quant_method": "awq"}, AWQ_STATE | {"qweight": WORDS.T}, r"wanted \[G, N\]|qweight of awq is \[8, 64\]"),
        (compressed(3, 32, True), INT_STATE, "num_bits of compressed-tensors is 3, wanted 2, 4 or 8"),
        (compressed(4, 32, False), INT_STATE, "compressed-tensors lacks weight_zero_point"),
        (compressed(4, 64, True), INT_STATE, "group_size of compressed-tensors is 64, wanted 32"),
        (compressed(4, 32, True, "block"), INT_STATE, "strategy of compressed-tensors is 'block', wanted 'group'"),
        (compressed(8, 32, True), INT_STATE, "codes of int is torch.int32 with 512 elements, wanted"),
        (compressed(4, 32, True) | {"config_groups": {"a": {}, "b": {}}}, INT_STATE, r"\['a', 'b'\], wanted one"),
        ({"quant_method": "hqq"}, HQQ_STATE | {"nbits": 3}, "nbits of hqq is 3, wanted 4 or 8"),
        ({"quant_method": "hqq"}, HQQ_STATE | {"quant_zero": True}, "quant_zero of hqq is True, wanted False"),
        ({"quant_method": "hqq"}, HQQ_STATE | {"zero_scale": torch.ones(2)}, "hqq has zero_scale, wanted scale"),
        ({"quant_method": "hqq"}, HQQ_STATE | {"compute_dtype": torch.float16}, "compute_dtype of hqq is torch.float"),
        ({"quant_method": "hqq"}, HQQ_STATE | {"group_size": 60}, "group of hqq is 60, wanted a divisor of the 4096"),
        ({"quant_method": "hqq"}, HQQ_STATE | {"W_q": BYTES[0, :9]}, "W_q of hqq is torch.uint8 with 9"),
    ],
)  # fmt: skip
def test_a_wrong_part_is_named(config, state, message):
    with pytest.raises(ValueError, match=message):
        int_groups.from_state(config, state)


def test_scales_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match="the scales of awq are torch.float64"):
        int_groups.awq(WORDS, ZEROS, HALF.double())
