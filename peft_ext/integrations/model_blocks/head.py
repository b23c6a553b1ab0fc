"""Heads of language models that leave their logits to the loss: see :mod:`.deferred`."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from ..adapter_layers import lora
from ..adapter_layers.base import LINEAR, STOCK, class_name, is_fully_sharded, operands, sums_wider
from ..adapter_layers.linear import FusedLinear
from ..adapter_layers.reasons import accepts_input, kernel_reason, replaced_on_instance, weight_reason
from .deferred import Head

FusedLoraLinear = getattr(lora, "FusedLoraLinear", None)  # absent without PEFT


class DefersLoss:
    """A layer whose outputs are a model's logits. A subclass gives ``head_reason`` and ``_head``."""

    def head_reason(self) -> Optional[str]:
        """Returns why the logits are computed whole in training."""
        raise NotImplementedError

    def _head(self, x: Tensor) -> Optional[Head]:
        """Returns this call, for the loss; None: the logits have to be computed."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, DefersLoss):  # restored, and called by who held the bound method
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs or not (self.training and accepts_input(args[0])):
            return super().forward(*args, **kwargs)
        (x,) = args
        if x.dim() < 2 or self.head_reason() is not None or (head := self._head(x)) is None:
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or head.parameters):
            return head.defer()
        return head.compute(*head.inputs)


def _state(layer: nn.Module) -> tuple:
    """Returns what a head's logits are made with beside its input, to be compared: what is merged into its tensors,
    which shows in none of their versions, its class, and they."""
    held = [(id(p), p.is_inference() or p._version, p.untyped_storage()._cdata) for p in layer.parameters()]
    return tuple(getattr(layer, "merged_adapters", ())), type(layer), held


class LinearHead(DefersLoss, FusedLinear):
    """A frozen ``nn.Linear`` whose outputs are a model's logits."""

    def head_reason(self) -> Optional[str]:
        if replaced_on_instance(self):
            return "its forward was replaced on the instance (accelerate's device hooks do that)"
        return weight_reason(self) or _loss_reason(self._parameters["weight"]) or _freed_reason(self)

    def _head(self, x: Tensor) -> Optional[Head]:
        if (found := operands(self, x)) is None:
            return None
        _, weight, bias, dtype = found
        whole = super(DefersLoss, self).forward
        given = {"weight": weight, "bias": bias}
        return Head((x,), self.out_features, dtype, whole, given, state=functools.partial(_state, self))


LinearHead.__name__, LinearHead.stock_class = "Linear", nn.Linear
STOCK[LinearHead] = nn.Linear
LINEAR.append(LinearHead)

# Head by the class of a layer, stock or fused; and the classes of heads, with the class of the layer alone.
HEADS: dict[type, type] = {nn.Linear: LinearHead, FusedLinear: LinearHead}
LAYERS: dict[type, type] = {LinearHead: nn.Linear}

if FusedLoraLinear is not None:

    class LoraHead(DefersLoss, FusedLoraLinear):
        """A head with one LoRA adapter over a frozen weight. Its dropout is PEFT's own, of PyTorch's mask."""

        def head_reason(self) -> Optional[str]:
            reason, alone = self._reasons()
            if reason or alone:
                return reason or alone
            names = self._names()
            if len(names) > 1:
                return "several adapters are active on the head"
            if names[0] in self.lora_variant:
                return "the head's adapter is not plain LoRA"
            if self._bias(names[0]) is not None or isinstance(self.scaling[names[0]], Tensor):
                return "the head's adapter has a bias, or a scale that is a tensor"
            return _loss_reason(self.pair(names[0])[0]) or _freed_reason(self)

        def _head(self, x: Tensor) -> Optional[Head]:
            (name,), base = self._names(), self._modules["base_layer"]
            if sums_wider(base, x) or (found := operands(base, x)) is None:
                return None
            _, weight, bias, dtype = found
            if dtype is not (autocast_dtype(x) or x.dtype):
                return None
            (lora_A, lora_B), scaling = self.pair(name), self.scaling[name]
            dropout = self._modules["lora_dropout"]._modules[name]
            drops = type(dropout) is nn.Dropout and dropout.training and dropout.p > 0

            def forward(x: Tensor, low: Optional[Tensor] = None) -> Tensor:
                return ops.lora_residual(x if low is None else low, base(x), lora_A, lora_B, scaling=scaling)

            given = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "scaling": scaling}
            trained = [value for value in (lora_A, lora_B) if value.requires_grad]
            inputs, state = (x, dropout(x)) if drops else (x,), functools.partial(_state, self)
            return Head(inputs, weight.shape[0], dtype, forward, given, trained, state)

    LoraHead.__name__, LoraHead.stock_class = FusedLoraLinear.__name__, STOCK[FusedLoraLinear]
    STOCK[LoraHead] = STOCK[FusedLoraLinear]
    HEADS[FusedLoraLinear], LAYERS[LoraHead] = LoraHead, FusedLoraLinear

# ‖ours - stock's‖ / ‖stock's‖ that rounding explains.
_WITHIN = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 6e-3}


def _loss_reason(tensor: Tensor) -> Optional[str]:
    return kernel_reason("linear_cross_entropy", tensor.device.type)


def _freed_reason(layer: nn.Module) -> Optional[str]:
    """Returns which engine frees the tensors of ``layer`` after a forward, from which logits could not be computed."""
    if not getattr(layer, "_is_fsdp_managed_module", False):  # PyTorch's own mark of both FSDPs
        return None
    held = {id(parameter) for parameter in layer.parameters()}
    wrapped, is_held = _fully_sharded(), False
    for module, state in wrapped:
        groups = getattr(state, "_fsdp_param_groups", None)  # one or none before torch 2.13
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for parameter in getattr(group, "fsdp_params", ()):
                seen = parameter.sharded_param, getattr(parameter, "_unsharded_param", None)
                if held.isdisjoint(map(id, seen)):
                    continue
                is_held = True
                if group.post_forward_mesh_info is not None and not _will_be_root(module, state, wrapped):
                    return "FSDP2 frees its weight after the forward (reshard_after_forward)"
    if is_held or any(layer in module.modules() for module, _ in wrapped):
        return None
    return "FSDP1 flattens its weight, and frees it after the forward"


def _fully_sharded() -> list[tuple[nn.Module, Any]]:
    """Returns the modules that fully_shard was called on, each with its state; torch.distributed is not imported."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    return [(module, state()) for module, state in list(states.items()) if is_fully_sharded(type(module))]


def _will_be_root(module: nn.Module, state: Any, wrapped: list[tuple[nn.Module, Any]]) -> bool:
    """Returns whether the first forward will find ``module`` the outermost, which keeps its parameters by default."""
    if state._is_root is not None or not getattr(state, "_auto_reshard_after_forward", False):
        return False
    return not any(module in other.modules() for other, _ in wrapped if other is not module)


def owners(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields the language models in ``model``, each with its output embeddings."""
    seen: set[int] = set()  # a model and the one around it may name the same
    for module in model.modules():
        if not hasattr(type(module), "get_output_embeddings"):
            continue
        try:
            found = module.get_output_embeddings()
        except Exception:  # a model without a head; another's method of this name, which wants arguments
            continue
        if isinstance(found, nn.Module) and id(found) not in seen:
            seen.add(id(found))
            yield module, found


def replaced_reason(owner: nn.Module) -> Optional[str]:
    """Returns why a language model's head may not be called in training; accelerate's wrappers do call it."""
    if replaced_on_instance(owner) and not {"_original_forward", "_old_forward"} & owner.__dict__.keys():
        return "the model's forward was replaced on the instance (TRL does, and computes the loss by itself)"
    return None


def no_head_reason(layer: nn.Module) -> str:
    """Returns why ``layer``, a model's output embeddings, is no head of ours."""
    if type(layer) not in HEADS:
        return f"its head is a {class_name(type(layer))}, wanted a Linear, or LoRA over one"
    return FAILED.get(layer) or "accelerate(model) was not called on it, or with blocks=False"


# Why the loss of a layer was found to differ.
FAILED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def defer_losses(model: nn.Module) -> None:
    """Gives each head that can leave its logits to the loss, and gave the same loss on a trial, the class that does."""
    for _, layer in list(owners(model)):
        if type(layer) not in HEADS:
            continue
        before, layer.__class__ = layer.__class__, HEADS[type(layer)]
        if layer.head_reason() is None and (why := _differs(layer)) is not None:
            layer.__class__, FAILED[layer] = before, why
            warnings.warn(f"accelerate: the loss stays PyTorch's: {why}", stacklevel=3)


def compute_losses(model: nn.Module) -> None:
    """Undoes :func:`defer_losses`."""
    for layer in model.modules():
        if (kind := LAYERS.get(type(layer))) is not None:
            layer.__class__ = kind


def _differs(layer: Any) -> Optional[str]:
    """Tries the loss of a few random hidden states both ways; returns what differs, None where nothing does."""
    base = getattr(layer, "base_layer", layer)
    weight = base._parameters["weight"]
    if 0 in weight.stride() and weight.numel():
        return None  # one element seen as the whole: a model without its data
    device, dtype = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    found = []
    # Whatever device and mode the model is accelerated under.
    with (
        torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(),
        torch.autocast(device.type, enabled=False), torch.random.fork_rng(_devices(device)),
    ):  # fmt: skip
        hidden = torch.randn(6, base.in_features, generator=generator, dtype=torch.float32).to(device, dtype)
        labels = torch.randint(0, base.out_features, (6,), generator=generator).to(device)
        labels[2] = -100
        head = layer._head(hidden.requires_grad_())
        if head is None:
            return None
        for logits in (head.defer(), head.compute(*head.inputs)):
            loss = F.cross_entropy(logits.float(), labels)
            found.append((loss.detach(), *torch.autograd.grad(loss, hidden, retain_graph=True)))
    for what, ours, stock in zip(("the loss", "its gradient"), *found, strict=True):
        error = ((ours.double() - stock.double()).norm() / stock.double().norm()).item()
        if not error <= _WITHIN[dtype]:
            return f"{what} is off by {error:.2g} on {device}"
    return None


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
