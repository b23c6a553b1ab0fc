"""One model of the model fuzzer: how it is built, hooked and called, and which values of a call are compared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import bitsandbytes as bnb
import torch
from peft.tuners import adalora, ia3
from peft_models import spread, tuners
from torch import Tensor, nn

import peft_ext
from peft_ext.nn import NF4Linear
from peft_ext.quantize import HEADS

Parts = dict[str, Optional[Tensor]]

# --- models -----------------------------------------------------------------------------------------------------------


def widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a copy of the model over dense layers with the dequantized weights, cast to ``dtype``.

    A copy in a wider dtype gives the exact values for the model.
    """
    model = copy.deepcopy(model)
    model.zero_grad()
    for parent in list(model.modules()):
        for name, base in list(parent.named_children()):
            if isinstance(base, NF4Linear):
                weight = base.dequantize()
            elif isinstance(base, bnb.nn.Linear4bit):
                # After pickling, only the module still has quant_state, and the weight does not.
                state = getattr(base.weight, "quant_state", None) or base.quant_state
                weight = peft_ext.NF4Weight.from_bitsandbytes(base.weight, state).dequantize(base.compute_dtype)
            else:
                continue
            dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta").train(base.training)
            dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
            dense.bias = base.bias
            dense._forward_hooks, dense._forward_pre_hooks = base._forward_hooks, base._forward_pre_hooks
            setattr(parent, name, dense)
        if isinstance(parent, ia3.Linear4bit):  # PEFT's class of 4-bit IA3 layers casts to float32
            parent.__class__, parent.fan_in_fan_out = ia3.Linear, False
        if hasattr(getattr(parent, "config", None), "_experts_implementation"):
            parent.config._experts_implementation = "eager"  # the grouped products do not support float64
    return model.to(dtype)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a model as transformers loads it: modules that transformers keeps in float32, and rotary frequencies, stay
    float32.
    """
    keep = {*kept_in_float32(model), "inv_freq", "original_inv_freq"}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not keep & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def kept_in_float32(model: nn.Module) -> set[str]:
    return {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}


def apart(model: nn.Module) -> set[str]:
    """Returns parts of the names of modules that must not be quantized; Mamba reads the weight of its dt_proj
    directly.
    """
    return {*HEADS, "dt_proj", *kept_in_float32(model)}


def linears(model: nn.Module) -> dict[str, list[str]]:
    """Returns the full names of the linear layers by the last part of the name, as target_modules uses them."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear", "Linear4bit", "NF4Linear"):
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def stir(model: nn.Module, name: str, generator: torch.Generator) -> None:
    """Gives adapter ``name`` values as after some training: PEFT starts from B = 0, or from values as large as W."""
    spread(model, name)
    for layer in tuners(model).values():
        if name in getattr(layer, "lora_embedding_B", {}):
            weight = layer.lora_embedding_B[name]
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        if name in getattr(layer, "lora_B", {}) and not isinstance(layer, adalora.SVDLinear):
            for parameter in layer.lora_B[name].parameters() if isinstance(layer.lora_B[name], nn.Module) else ():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


# --- hooks: at module level, for models are pickled with them ---------------------------------------------------------


def _halved(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 0.5


def _plus_input(module: nn.Module, args: tuple) -> tuple:
    return (args[0] * 1.25, *args[1:])


def _seen(module: nn.Module, args: tuple, output: Tensor) -> None:
    assert isinstance(output, Tensor)


def change_in_place(module: nn.Module, args: tuple, output: Tensor, how: str) -> None:
    getattr(output, how)(*([0.5] if how in ("add_", "mul_") else []))


def _grad_halved(module: nn.Module, grad_input: tuple, grad_output: tuple) -> tuple:
    return tuple(None if grad is None else 0.5 * grad for grad in grad_input)


HOOKS: dict[str, tuple[str, Callable]] = {
    "halves its output": ("register_forward_hook", _halved),
    "scales its input": ("register_forward_pre_hook", _plus_input),
    "looks at its output": ("register_forward_hook", _seen),
    "halves its input's gradient": ("register_full_backward_hook", _grad_halved),
}
IN_PLACE = ("add_", "mul_", "relu_", "neg_", "tanh_")


# --- a probe: one call of a model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """The options of one call of a model, and the choice of the values that are compared."""

    training: bool = True
    backward: bool = True
    autocast: bool = False
    own_loss: bool = True
    steps: int = 1
    disabled: bool = False
    adapter_names: Optional[tuple[str, ...]] = None
    inference: bool = False
    seed: int = 0

    def __str__(self) -> str:
        kind = "trains" if self.training else "evaluates"
        extra = [
            "" if self.backward else "without gradients", "bfloat16 autocast" if self.autocast else "",
            "" if self.own_loss else "another loss", f"{self.steps} steps" if self.steps > 1 else "",
            "adapters disabled" if self.disabled else "", "inference_mode" if self.inference else "",
            f"adapter_names={self.adapter_names}" if self.adapter_names else "",
        ]  # fmt: skip
        return ", ".join([kind, *filter(None, extra)])


def measure(model: nn.Module, batch: dict[str, Any], probe: Probe, dtype: torch.dtype) -> Parts:
    """Returns outputs, loss and gradients of one call, with floating inputs in ``dtype``."""
    model.train(probe.training)
    model.zero_grad()
    torch.manual_seed(probe.seed)
    given, inputs = dict(batch), {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = inputs[name] = value.detach().to(dtype, copy=True).requires_grad_(probe.backward)
    if probe.adapter_names is not None:
        given["adapter_names"] = list(probe.adapter_names)
    parts: Parts = {}
    with contextlib.ExitStack() as stack:
        if probe.autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if probe.disabled:
            stack.enter_context(model.disable_adapter())
        if not probe.backward:
            stack.enter_context(torch.inference_mode() if probe.inference else torch.no_grad())
        for _ in range(probe.steps):
            output = model(**given)
            getattr(output, "logits", None)  # the access computes the logits that peft_ext deferred
            floats = {key: value for key, value in output.items()
                      if isinstance(value, Tensor) and value.is_floating_point() and key != "loss"}  # fmt: skip
            loss = getattr(output, "loss", None)
            if loss is None or not probe.own_loss:
                generator = torch.Generator().manual_seed(probe.seed)
                loss = sum((value.float() * torch.randn(value.shape, generator=generator)).sum() / value.numel() ** 0.5
                           for value in floats.values())  # fmt: skip
            if probe.backward:
                loss.backward()
    parts.update({f"output {key}": value.detach() for key, value in floats.items()})
    parts["loss"] = loss.detach()
    if probe.backward:
        parts.update({f"grad of {name}": value.grad for name, value in inputs.items()})
        parts.update({f"grad of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad})
    return parts
