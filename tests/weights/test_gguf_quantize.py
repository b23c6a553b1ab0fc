"""Tests of quantizing to GGUF's types: bits of the package gguf and of llama.cpp, errors, and merging into the types.

llama.cpp's library is read from the package llama_cpp, or from the path in PEFT_EXT_GGML (libggml-base.so). Checksums
of its bits need no library.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

import peft_ext
from peft_ext.nn import PackedLinear
from peft_ext.reference.formats import decoded
from peft_ext.weights import gguf
from peft_ext.weights.gguf_k_quants import QUANTIZERS
from peft_ext.weights.gguf_quantize import QUANTIZED_BY_GGUF, can_quantize, quantize_gguf
from peft_ext.weights.quantizers import quantized_like

pytest.importorskip("gguf")

MADE = [*QUANTIZED_BY_GGUF, *QUANTIZERS]
LEFT = [type.name for type in gguf.TYPES.values() if type.name not in MADE]

# ‖Q(N) − N‖ / ‖N‖ for normally distributed N.
ERRORS = {"Q4_0": 0.0860, "Q4_1": 0.0782, "Q5_0": 0.0427, "Q5_1": 0.0379, "Q8_0": 0.00535, "Q2_K": 0.2968,
          "Q3_K": 0.1507, "Q4_K": 0.0714, "Q5_K": 0.0361, "Q6_K": 0.0177, "IQ4_NL": 0.0761, "IQ4_XS": 0.0767,
          "TQ1_0": 0.806, "TQ2_0": 0.808, "MXFP4": 0.1165}  # fmt: skip

# zlib.crc32 of the bits of llama.cpp (ggml 0.25.3, built for x86-64) of weights().
CHECKSUMS = {"Q2_K": 3419940984, "Q3_K": 3797273555, "Q4_K": 977384235, "Q5_K": 1231744693, "Q6_K": 2207571549,
             "IQ4_NL": 4182758834, "IQ4_XS": 4229373899}  # fmt: skip

# A group of 16 columns, times 2**24, whose scale in Q6_K is that of the last of the 18 trial scales. Another
# trial has almost the same error: the rounding of float32 decides between the two.
LAST_TRIAL = (7199996, -5535280, -6577705, 7123968, -4174850, 109721, 841822, -3292423, 3551047, 4891103, -5934173,
              -5567192, -730288, -374904, -69269, 5694475)  # fmt: skip
LAST_TRIAL_CHECKSUM = 792141647  # zlib.crc32 of llama.cpp's bits of last_trial()


def weights() -> Tensor:
    """Returns float32 ``[256, 1024]``: rows of many sizes, groups of zeros, of one value, and with one large value.

    Some blocks of the uniform rows at the end need all five tries of Q3_K's search.

    The values are integers times powers of two, so that they do not depend on a library's random normal numbers.
    """
    generator = torch.Generator().manual_seed(7)
    parts = [torch.randint(-4000, 4001, (128, 1024), generator=generator) for _ in range(3)]
    x = sum(parts).float() * 2.0**-13  # nearly normal
    x[16:32] *= 2.0 ** torch.randint(-30, 8, (16, 32), generator=generator).repeat_interleave(32, 1)
    x[32:48] *= 2.0 ** torch.randint(-30, 8, (16, 64), generator=generator).repeat_interleave(16, 1)
    x[48:52, :256] = 0
    x[50:60, 300:340] = 0
    x[60:64] = x[60:64].abs()
    x[64:68] = -x[64:68].abs()
    x[68:70, 512:544], x[70:72, 512:544] = 0.25, -1.0
    x[72:80, ::37] *= 64
    x[80:84] = x[80:84].round()
    x[84:86] *= 2.0**-60
    x[86:88] *= 2.0**-130
    x[88:90] *= 2.0**20
    return torch.cat([x, torch.randint(-40, 41, (128, 1024), generator=generator) / 64])


def library() -> Optional[Any]:
    found = importlib.util.find_spec("llama_cpp")
    path = os.environ.get("PEFT_EXT_GGML")
    if path is None and found is not None and found.origin is not None:
        path = str(Path(found.origin).parent / "lib" / "libggml-base.so")
    if path is None or not Path(path).is_file():
        return None
    ggml = ctypes.CDLL(path)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3,
                                         ctypes.c_void_p]  # fmt: skip
    return ggml


def by_llama(x: Tensor, name: str, ggml: Any) -> Tensor:
    number = gguf.type_number(name)
    _, columns, size, _ = gguf.TYPES[number]
    out = torch.zeros(len(x), x.shape[1] // columns * size, dtype=torch.uint8)
    x = x.contiguous()
    written = ggml.ggml_quantize_chunk(number, x.data_ptr(), out.data_ptr(), 0, *x.shape, None)
    assert written == out.numel()
    return out


def values(data: Tensor, name: str) -> Tensor:
    return decoded(gguf.gguf_weight(data, name), torch.float32)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED_BY_GGUF)
def test_bits_are_those_of_the_package_gguf(name: str) -> None:
    import gguf as package
    import numpy

    x = weights()
    with numpy.errstate(all="ignore"):
        wanted = package.quants.quantize(x.numpy(), package.GGMLQuantizationType(gguf.type_number(name)))
    assert torch.equal(quantize_gguf(x, name), torch.from_numpy(wanted))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bits_are_those_of_llama_cpp(name: str) -> None:
    assert zlib.crc32(quantize_gguf(weights(), name).numpy().tobytes()) == CHECKSUMS[name]


def last_trial() -> Tensor:
    """Returns float32 ``[1, 256]``, 16 times the group ``LAST_TRIAL``."""
    return (torch.tensor(LAST_TRIAL) * 2.0**-24).repeat(16)[None]


def test_the_last_trial_scale_of_q6_k() -> None:
    assert zlib.crc32(quantize_gguf(last_trial(), "Q6_K").numpy().tobytes()) == LAST_TRIAL_CHECKSUM


@pytest.mark.skipif(library() is None, reason="neither llama_cpp nor PEFT_EXT_GGML is here")
@pytest.mark.parametrize("name", MADE)
def test_bits_against_the_library(name: str) -> None:
    ggml = library()
    torch.manual_seed(0)
    for x in (weights(), last_trial(), torch.randn(96, 2048), torch.randn(64, 1024) * torch.rand(64, 1024) ** 4):
        assert torch.equal(quantize_gguf(x, name), by_llama(x, name, ggml))
    if name in CHECKSUMS:
        assert zlib.crc32(by_llama(weights(), name, ggml).numpy().tobytes()) == CHECKSUMS[name]


@pytest.mark.parametrize("name", MADE)
def test_errors_on_normal_weights(name: str) -> None:
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    error = torch.dist(values(quantize_gguf(x, name), name), x) / x.norm()
    assert error.item() == pytest.approx(ERRORS[name], rel=0.03)


@pytest.mark.parametrize("name", MADE)
def test_chunks_shapes_and_dtypes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, 512, generator=torch.Generator().manual_seed(2))
    whole = quantize_gguf(x, name)
    size = gguf.TYPES[gguf.type_number(name)]
    assert whole.shape == (10, 512 // size.columns * size.bytes) and whole.dtype is torch.uint8
    assert torch.equal(quantize_gguf(x.view(2, 5, 512), name), whole.view(2, 5, -1))
    assert torch.equal(quantize_gguf(x.t().contiguous().t(), name), whole)
    assert torch.equal(quantize_gguf(x.double(), gguf.type_number(name)), whole)
    assert torch.equal(quantize_gguf(x.bfloat16(), name), quantize_gguf(x.bfloat16().float(), name))
    assert torch.equal(quantize_gguf(nn.Parameter(x), name.lower()), whole)
    monkeypatch.setattr("peft_ext.weights.gguf_quantize._CHUNK", 1024)
    assert torch.equal(quantize_gguf(x, name), whole)
    for row in range(10):
        assert torch.equal(quantize_gguf(x[row], name), whole[row])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F64"])
def test_dense_types_round_to_the_nearest(name: str) -> None:
    x = torch.cat([weights().view(-1), torch.tensor([1e-8, -1e-45, 65504.0, 0.0])])[None]
    data = quantize_gguf(x, name)
    dtype = gguf.dense_dtype(name)
    assert data.dtype is torch.uint8 and torch.equal(data.view(dtype), x.to(dtype))
    if name == "BF16":
        import gguf as package

        wanted = package.quants.quantize(x.numpy(), package.GGMLQuantizationType.BF16)
        assert data.numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", QUANTIZED_BY_GGUF)
def test_quantized_values_stay(name: str) -> None:
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    data = quantize_gguf(x, name)
    assert torch.equal(values(quantize_gguf(values(data, name), name), name), values(data, name))


def test_refuses() -> None:
    for name in LEFT:
        assert not can_quantize(name)
        with pytest.raises(ValueError, match=f"no quantizer for {name}, wanted for example Q8_0"):
            quantize_gguf(torch.zeros(2, 256), name)
    with pytest.raises(ValueError, match="the ggml type is 'Q9'"):
        quantize_gguf(torch.zeros(2, 256), "Q9")
    with pytest.raises(TypeError, match="values is torch.int64, wanted a float tensor"):
        quantize_gguf(torch.zeros(2, 256, dtype=torch.int64), "Q4_K")
    with pytest.raises(TypeError, match="values is list"):
        quantize_gguf([0.0], "Q4_K")  # type: ignore[arg-type]
    for name, columns in (("Q4_K", 128), ("Q8_0", 48), ("IQ4_NL", 0)):
        with pytest.raises(ValueError, match=r"values has shape \(2, [0-9]+\), wanted rows of a multiple of"):
            quantize_gguf(torch.zeros(2, columns), name)
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(2, 256)
        x[1, 7] = bad
        with pytest.raises(ValueError, match="a NaN or an infinity"):
            quantize_gguf(x, "Q6_K")


# --- merging into packed layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_quantized_like(name: str) -> None:
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(4))
    like = gguf.gguf_weight(quantize_gguf(torch.zeros(8, 512), name), name, dtype=torch.bfloat16)
    found = quantized_like(x, like)
    assert found.layout == like.layout and found.dtype is torch.bfloat16 and found.shape == (8, 512)
    assert torch.equal(found.parts[0], quantize_gguf(x, name))


def test_no_quantizer_for_other_types() -> None:
    size = gguf.TYPES[gguf.type_number("IQ2_S")]
    like = gguf.gguf_weight(torch.zeros(4, size.bytes, dtype=torch.uint8), "IQ2_S")
    assert quantized_like(torch.zeros(4, 256), like) is None


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", [name for name in MADE if gguf.has_kernel(name)])
def test_merge_of_an_accelerated_layer_and_back(name: str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    data = quantize_gguf(torch.randn(64, 256), name)
    layer = PackedLinear.from_packed(gguf.gguf_weight(data.clone(), name), ("weight",), dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["0"], r=4, use_dora=dora, init_lora_weights=False)
    model = peft_ext.accelerate(peft.get_peft_model(nn.Sequential(layer), config))
    lora = model.base_model.model[0]
    dense = nn.Sequential(nn.Linear(256, 64, bias=False))
    dense[0].weight.data = values(data, name)
    stock = peft.get_peft_model(dense, copy.deepcopy(config))
    state = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert not stock.load_state_dict(state, strict=False).unexpected_keys
    exact = stock.merge_and_unload()[0].weight.detach()
    with pytest.warns(UserWarning, match=f"merging into a packed weight .gguf_{name.lower()}."):
        lora.merge()
    held = lora.get_base_layer().packed
    error = (torch.dist(held.dequantize(), exact) / exact.norm()).item()
    assert lora.get_base_layer().merge_error == pytest.approx(error, rel=1e-3)
    assert error < 1.5 * ERRORS[name] + 1e-4 and not torch.equal(held.parts[0], data)
    lora.unmerge()
    assert torch.equal(lora.get_base_layer().packed.parts[0], data)
