"""Builds, copies and quantizes models whose tensors have no data.

A model is built, copied and adapted with tensors on the meta device. A model is quantized and accelerated with
stand-ins: a stand-in is a plain CPU tensor of one element, expanded to the shape of the tensor that it stands for.

No parameter and no buffer of a model without data takes more memory than one element. bitsandbytes' layers, and the
layers that are to be quantized, become layers whose packed weights and scales are stand-ins or meta tensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..integrations.adapter_layers.base import FOUR_BIT, QUANTIZED, Linear8bitLt
from ..nn import NF4Linear
from ..nn.nf4 import empty_nf4
from ..quantize import HEADS, linear_groups, quantize_meta, replace_group
from ..sources.model import AUTO_CLASSES
from ..weights.quantizers import PACKED_FORMATS


def build_model(
    config: Any, task_type: Optional[str] = None, dtype: Optional[torch.dtype] = None
) -> tuple[nn.Module, torch.dtype]:
    """Returns the model of a transformers configuration on the meta device, and the dtype for its weights."""
    import transformers

    if not isinstance(config, transformers.PretrainedConfig):
        raise TypeError(f"estimate_memory: model is {type(config).__name__}, wanted an nn.Module or a transformers "
                        "configuration")  # fmt: skip
    config = copy.deepcopy(config)
    named = getattr(transformers, (getattr(config, "architectures", None) or ("",))[0], None)
    with torch.device("meta"):
        if task_type is None and named is not None:
            model = named(config)
        else:
            default = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
            model = getattr(transformers, AUTO_CLASSES[task_type or default]).from_config(config)
    return model, dtype or config.dtype or torch.float32


# --- a model without its data -----------------------------------------------------------------------------------------


def _meta(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="meta")


def stand_in(t: Tensor) -> Tensor:
    """Returns one element expanded to the shape of ``t``: a plain CPU tensor of the same shape and dtype."""
    return torch.empty((), dtype=t.dtype).expand(t.shape)


def fake(t: Tensor) -> Tensor:
    """Returns a CPU tensor of ``t``'s shape and dtype, without its values. Under FakeTensorMode the result is a
    FakeTensor.
    """
    return torch.empty(t.shape, dtype=t.dtype)


def _like(t: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    new = make(t)
    return nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new


def copy_to_meta(model: nn.Module, dtype: Optional[torch.dtype], accelerated: bool) -> nn.Module:
    """Returns a copy of the model on the meta device.

    In the copy, an NF4Linear or a Dequantized, with tensors of the same sizes, replaces each linear layer of
    bitsandbytes.
    """
    partly = any(not p.requires_grad for p in model.parameters())
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        memo[id(t)] = _like(t, _meta)
        # The cast to dtype does not change packed codes, of which some are 8-bit floats.
        if dtype is not None and isinstance(t, nn.Parameter) and t.is_floating_point() and t.element_size() > 1:
            if not (partly and t.requires_grad):  # the cast to dtype does not change an adapter's trainable parameters
                memo[id(t)].data = memo[id(t)].data.to(dtype)
    for module in model.modules():
        if (other := _of_bitsandbytes(module, accelerated)) is not None:
            replace_tensors(other, _meta)
            memo[id(module)] = other
    model = copy.deepcopy(model, memo)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
    return model


def replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replaces every parameter and buffer by ``make(tensor)``; modules that shared a tensor share the new tensor."""
    # `made` keeps each old tensor alive, so that no new tensor gets the id of an old tensor.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None:
                    if id(t) not in made:
                        made[id(t)] = (t, _like(t, make))
                    held[name] = made[id(t)][1]


class Dequantized(nn.Module):
    """Stands for a linear layer of bitsandbytes: a frozen layer that dequantizes its whole weight on each use.

    Each read of ``weight`` makes a dense weight, as PEFT does when PEFT dequantizes a layer.
    """

    def __init__(self, held: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, bias: Any) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.saves_x = "packed" not in held  # bitsandbytes' int8 layer saves x, though its backward does not need x
        for name, t in held.items():
            self.register_buffer(name, t)
        self.bias = bias

    @property
    def weight(self) -> nn.Parameter:
        return nn.Parameter(self.dense(self.dtype), requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _DequantizedLinear.apply(x, self.bias, self)


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Optional[Tensor], layer: Dequantized) -> Tensor:
        ctx.layer = layer
        if layer.saves_x:
            ctx.save_for_backward(x)
        bias = bias if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x, layer.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.layer.dense(grad.dtype), grad_bias, None


def _quantized(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, bias: Any, blocksize: int, double_quant: bool, fused: bool
) -> nn.Module:
    """Returns a quantized linear layer whose tensors have no data: an NF4Linear for NF4 if ``fused``, otherwise a
    Dequantized."""
    if kind == "int8":
        held = {"CB": torch.empty((), dtype=torch.int8).expand(shape), "SCB": torch.empty(()).expand(shape[0])}
        return Dequantized(held, shape, dtype, bias)
    nf4 = empty_nf4(*shape, blocksize, double_quant, dtype, lambda like, size: torch.empty((), dtype=like).expand(size))
    return NF4Linear.from_nf4(nf4, bias) if fused else Dequantized(nf4.tensors(), shape, dtype, bias)


def _of_bitsandbytes(module: nn.Module, accelerated: bool) -> Optional[nn.Module]:
    """Returns the layer that replaces one of bitsandbytes' linear layers; None for any other module."""
    if not isinstance(module, QUANTIZED):
        return None
    bias = module.bias if module.bias is None else _like(module.bias, _meta)
    shape = (module.out_features, module.in_features)
    if Linear8bitLt is not None and isinstance(module, Linear8bitLt):
        dtype = torch.float16 if bias is None else bias.dtype
        return _quantized("int8", shape, dtype, bias, 64, False, False)
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    blocksize, nested = (
        (weight.blocksize, weight.compress_statistics) if state is None else (state.blocksize, state.nested)
    )
    dtype = module.compute_dtype or (weight.dtype if state is None else state.dtype)
    fused = accelerated and type(module) in FOUR_BIT and (state is None or state.quant_type == "nf4")
    return _quantized("nf4", shape, dtype, bias, blocksize, bool(nested), fused)


def quantize_stand_ins(model: nn.Module, kind: str, blocksize: int, double_quant: bool, fused: bool) -> None:
    """Replaces the layers that quantize_nf4, quantize_packed or bitsandbytes would quantize by quantized layers without
    data."""
    if kind in PACKED_FORMATS or (kind == "nf4" and fused):
        replace_tensors(model, _meta)
        with warnings.catch_warnings():  # hides the warning about a model without layers to quantize
            warnings.filterwarnings("ignore", "quantize_(nf4|packed): .* has no nn.Linear")
            quantize_meta(model, kind, blocksize, double_quant)
        replace_tensors(model, stand_in)
        return

    def make(linear: nn.Linear, first: Optional[nn.Module]) -> nn.Module:
        shape = (linear.out_features, linear.in_features)
        module = _quantized(kind, shape, linear.weight.dtype, linear.bias, blocksize, double_quant, False)
        if first is not None:  # layers that shared one weight share the quantized tensors
            module._buffers.update(first._buffers)
        return module.train()

    for same in linear_groups(model, set(HEADS)):  # bitsandbytes leaves a mixture's experts dense
        replace_group(same, make)
