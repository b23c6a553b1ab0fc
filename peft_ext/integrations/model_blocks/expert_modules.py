"""Experts that are modules of their own, computed together on :func:`peft_ext.ops.lora_expert_linears`.

A mixture whose experts are a ModuleList or a ModuleDict calls them one after the other, each with its rows. Where its
loop can be split (:mod:`.split_loops`) all calls are known before the first: MLPs of one class (:mod:`.mlp`) whose
layers are adapted, or frozen, linear layers, dense or 4-bit, then run as

    rows of all experts, one behind the other → each layer in → the activation → the layer out → each expert's own rows

with every layer where it is: no weight is copied. In every other case each expert is called as it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ...nn import NF4Linear
from ..adapter_layers.base import FOUR_BIT, LINEAR, STOCK, operands, sums_wider
from ..adapter_layers.lora import LowRank
from ..adapter_layers.reasons import accepts_input, any_global_hook, hooked, kernel_reason, weight_reason
from .mlp import Mlp
from .split_loops import split

__all__ = ["experts_of", "has_experts", "outputs", "reason", "split_forward"]

_LISTS = (nn.ModuleList, nn.ModuleDict)
_OPERATOR = "lora_expert_linears"


def split_forward(forward: Callable) -> Optional[Callable]:
    """Returns a forward whose loop over experts hands them to :func:`outputs`; None: it has none that can be split."""
    return split(forward, outputs)


def has_experts(module: nn.Module, fused_class: Callable[[nn.Module], Optional[type]]) -> bool:
    """Returns whether a module is, or has, a list of MLPs with adapters in them. ``fused_class`` tells what a module
    that is not fused yet would be."""
    for experts in _lists(module):
        kind = type(experts[0]) if isinstance(experts[0], Mlp) else fused_class(experts[0])
        if kind is not None and issubclass(kind, Mlp) and any(_layers(experts[0], kind.formula)):
            return True
    return False


def experts_of(module: nn.Module) -> Iterator[Mlp]:
    """Yields the fused MLPs of a module's lists of experts."""
    for experts in _lists(module):
        yield from (expert for expert in experts if isinstance(expert, Mlp))


def _lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Yields the experts of each list: those of its first's class, of which there are several."""
    for child in (module, *module._modules.values()):
        if isinstance(child, _LISTS) and len(child):
            first, *others = child._modules.values()
            experts = [first, *(one for one in others if type(one) is type(first))]
            if first is not None and len(experts) > 1:
                yield experts


def _layers(expert: nn.Module, formula: tuple) -> list[Any]:
    """Returns an MLP's layers that have adapters."""
    into, out, *_ = formula
    layers = [expert._modules.get(name) for name in (*into, out)]
    return [layer for layer in layers if isinstance(layer, LowRank)]


def reason(module: nn.Module) -> Optional[str]:
    """Returns why the experts of a module's are called one by one; None: it takes their inputs to tell."""
    why = "it has no list of experts whose MLPs are known"
    for experts in _lists(module):
        first = experts[0]
        if not isinstance(first, Mlp):
            continue
        if any_global_hook() or any(map(hooked, experts)):
            why = "hooks on the experts would not run"
        elif (block := first.block_reason()) is not None:
            why = block
        elif not (adapted := _layers(first, first.formula)):
            why = "no layer of its experts has an adapter"
        elif (state := next((layer for layer in adapted if layer.joint_state() is None), None)) is not None:
            why = state.stock_reason() or state.part_reason() or "an adapter is of a kind that runs by itself"
        else:
            return kernel_reason(_OPERATOR, next(adapted[0].parameters()).device.type)
    return why


# --- while a forward runs ---------------------------------------------------------------------------------------------


def outputs(waiting: Sequence[tuple[Any, Any, tuple]]) -> Iterator[tuple[Tensor, tuple]]:
    """Yields what each expert gives, and what waited with it, of entries ``(expert, rows, ...)``."""
    found = _together([expert for expert, *_ in waiting], [x for _, x, _ in waiting])
    for i, (expert, x, held) in enumerate(waiting):
        yield expert(x) if found is None else found[i], held


def _together(experts: list[Any], xs: list[Any]) -> Optional[Sequence[Tensor]]:
    """Returns what each expert gives of its x; None: each is to be called."""
    if len(experts) < 2 or any_global_hook() or not isinstance(experts[0], Mlp):
        return None
    first, x = experts[0], xs[0]
    if not accepts_input(x) or kernel_reason(_OPERATOR, x.device.type) is not None or not first.takes(x):
        return None
    dropout = _dropout(first)
    if type(first).__call__ is not nn.Module.__call__ or dropout is None:
        return None
    for expert in experts:
        if type(expert) is not type(first) or hooked(expert) or expert.block_reason() is not None:
            return None
        if not expert.takes(x) or _dropout(expert) != dropout:
            return None
    for one in xs:
        if not accepts_input(one) or one.dim() != 2 or one.dtype is not x.dtype or one.device != x.device:
            return None
    if len({one.shape[1] for one in xs}) > 1:
        return None
    into, out, *_ = first.formula
    rows = [one.shape[0] for one in xs]
    if (calls := [_calls(experts, name, x) for name in into]).count(None):
        return None
    with torch.autocast(x.device.type, enabled=False):  # which refuses the other 16-bit dtype
        x = torch.cat(xs)
    of_out = _calls(experts, out, x.new_empty(0, 0))
    seeds = _seeds([*calls, *([] if of_out is None else [of_out])], x)
    inner = [_linears(called, x, rows, seeds[i]) for i, called in enumerate(calls)]

    def down(h: Tensor) -> Tensor:
        called = of_out if of_out is None or h.dtype is x.dtype else _calls(experts, out, h)  # autocast's h
        if called is not None and accepts_input(h):
            return _linears(called, h, rows, seeds[-1])
        parts = zip(experts, h.split(rows), strict=True)
        return torch.cat([expert._modules[out](part) for expert, part in parts])

    # Each is a tensor of its own to autograd, as an expert's result is: it may be changed in place.
    return torch.unsafe_split_with_sizes(first.finish(inner, down), rows)


def _dropout(expert: Any) -> Optional[tuple]:
    """Returns what an expert's own dropout does; None: it has one that has to run by itself."""
    dropout = expert._modules.get("dropout")
    if dropout is None:
        return ()
    kind = STOCK.get(type(dropout), type(dropout))
    if hooked(dropout) or kind not in (nn.Dropout, nn.Identity):
        return None
    return kind, getattr(dropout, "p", 0.0), getattr(dropout, "inplace", False), dropout.training


def _seeds(calls: list[list[tuple]], x: Tensor) -> list[Optional[list[Optional[Tensor]]]]:
    """Returns the dropouts' seeds of each layer of each expert: drawn in the order in which the experts would, one by
    one, so that each has the mask that it would have."""
    drops = [[of_layer[i][6] > 0.0 for of_layer in calls] for i in range(len(calls[0]))]
    count = sum(map(sum, drops))
    if not count:
        return [None] * len(calls)
    drawn = iter(torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, device=x.device).unbind())
    of_experts = [[next(drawn) if drop else None for drop in of_expert] for of_expert in drops]
    return [list(of_layer) for of_layer in zip(*of_experts, strict=True)]


def _linears(called: list[tuple], x: Tensor, rows: list[int], seeds: Optional[list[Optional[Tensor]]]) -> Tensor:
    weights, biases, lora_As, lora_Bs, rank_scales, scalings, ps, dtypes = zip(*called, strict=True)
    scales = None if rank_scales.count(None) == len(rank_scales) else rank_scales
    y = ops.lora_expert_linears(x, rows, weights, lora_As, lora_Bs, biases, rank_scales=scales, scalings=scalings,
                                dropout_ps=ps, training=True, seeds=seeds)  # fmt: skip
    return y if y.dtype is dtypes[0] else y.to(dtypes[0])


def _calls(experts: list[Any], name: str, x: Tensor) -> Optional[list[tuple]]:
    """Returns what :meth:`LowRank.own_call` does of a layer of each expert; None: one has to run by itself."""
    found = []
    for expert in experts:
        if (call := _call(expert._modules[name], x)) is None:
            return None
        found.append(call)
    shape, dtype = found[0][0].shape, found[0][-1]
    return found if all(call[0].shape == shape and call[-1] is dtype for call in found) else None


def _call(layer: Any, x: Tensor) -> Optional[tuple]:
    if hooked(layer):
        return None
    if isinstance(layer, LowRank):
        return layer.own_call(x)
    kind = type(layer)
    if kind not in LINEAR and kind is not NF4Linear and kind not in FOUR_BIT:
        return None
    if weight_reason(layer) is not None or layer._parameters["weight"].requires_grad or sums_wider(layer, x):
        return None
    found = operands(layer, x)
    if found is None or found[0] is not x:
        return None
    return found[1], found[2], None, None, None, 1.0, 0.0, found[3]
