"""Quantize a model's linear layers to NF4, in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional, TypeVar

import torch
from torch import nn

from .nn import NF4Linear
from .ops import _checks as checks

__all__ = ["quantize_nf4"]

_Model = TypeVar("_Model", bound=nn.Module)
_Item = TypeVar("_Item")

# Heads of the task: small, and trained or read in full precision.
HEADS = ("lm_head", "score", "classifier", "classification_head", "qa_outputs")

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def quantize_nf4(
    model: _Model,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = HEADS,
    progress: bool = True,
) -> _Model:
    """Replace every ``nn.Linear`` of ``model`` by a frozen :class:`peft_ext.nn.NF4Linear`, in place.

    A layer's dense weight is freed before the next layer is quantized: the peak is the model plus one layer. Left as
    they are: subclasses of ``nn.Linear``, layers under a name in ``skip`` or under one that a transformers model keeps
    in float32 (``_keep_in_fp32_modules``: T5 reads the dtype of ``wo``), what an adapter of PEFT adds (its base layer
    is quantized), what an adapter replaces whole (partial fine-tuning, Diff Pruning), and a layer whose weight is tied
    to something that stays dense, as a head to its embedding. Layers that share one weight share the quantized one.
    Forward and backward hooks are kept. The weights are frozen, the biases too, except under an adapter, whose
    configuration decides on them.

    Args:
        model: any module, on any real device.
        blocksize, double_quant: see :func:`peft_ext.ops.nf4_quantize`.
        skip: names; a layer is left alone if one of them is a component of its dotted name. Default: the heads of
            language models and of classifiers.
        progress: show a progress bar (if tqdm is there), on a terminal only.

    Returns: ``model``.

    Raises:
        TypeError: ``model`` is itself an ``nn.Linear``, or a weight is not a plain float parameter.
        ValueError: blocksize; a weight on the meta device; a merged adapter; a layer with a replaced ``forward``.
        All are raised before anything is changed.

    Source: QLoRA, arXiv 2305.14314.
    """
    if type(model) is nn.Linear:
        raise TypeError("quantize_nf4: model is an nn.Linear and can't be replaced in place, use NF4Linear.from_linear")
    checks.check_blocksize("quantize_nf4", blocksize)
    places = _places(model, {skip} if isinstance(skip, str) else set(skip))

    def make(linear: nn.Linear, first: Optional[nn.Module]) -> NF4Linear:
        if first is None:
            module = NF4Linear.from_linear(linear, blocksize, double_quant)
        else:
            module = NF4Linear.from_nf4(first.nf4, linear.bias).train(linear.training)
        _carry_over(linear, module)
        return module

    for same in _progress(places) if progress else places:
        _replace(same, make)
    return model


class _Place:
    """Where a linear layer hangs: its parent's attribute. Holds no reference to the layer, which is to be freed."""

    def __init__(self, parent: nn.Module, attribute: str, adapted: bool) -> None:
        self.parent, self.attribute, self.adapted = parent, attribute, adapted

    @property
    def linear(self) -> nn.Linear:
        return self.parent._modules[self.attribute]


def _is_adapter(module: nn.Module) -> bool:
    """PEFT's tuner layers and wrappers of trained modules, told without importing PEFT; and our own."""
    return hasattr(type(module), "adapter_layer_names") or "base_layer" in module._modules


def _replaces_weights(module: nn.Module) -> bool:
    """Whether an adapter has a weight of its own in place of its base layer's, which then must stay dense."""
    names = getattr(module, "names", {}) if hasattr(type(module), "replacements") else {}
    return any(name.rpartition(".")[2] == "weight" for owned in names.values() for name in owned)


def _walk(module: nn.Module, prefix: str, adapted: bool, seen: set[int]) -> Iterator[tuple[str, _Place]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    children = module._modules
    if _is_adapter(module):
        if getattr(module, "merged", False):
            raise ValueError(f"quantize_nf4: {prefix} has a merged adapter, unmerge it first")
        if _replaces_weights(module):
            return
        adapted = True
        children = {"base_layer": module._modules["base_layer"]} if "base_layer" in module._modules else {}
    for attribute, child in children.items():
        if child is None:
            continue
        name = f"{prefix}.{attribute}" if prefix else attribute
        if type(child) is nn.Linear:
            yield name, _Place(module, attribute, adapted)
        else:
            yield from _walk(child, name, adapted, seen)


def _places(model: nn.Module, skip: set[str]) -> list[list[_Place]]:
    """The layers to quantize, checked; places whose weight is one and the same are one group."""
    skip = skip.union(*(getattr(module, "_keep_in_fp32_modules", None) or () for module in model.modules()))
    groups: dict[int, list[_Place]] = {}
    layers: dict[int, set[int]] = {}  # by weight: the layers that are quantized with it
    for name, place in _walk(model, "", False, set()):
        linear = place.linear
        if skip.isdisjoint(name.split(".")):
            _check(name, linear)
            groups.setdefault(id(linear.weight), []).append(place)
            layers.setdefault(id(linear.weight), set()).add(id(linear))
    # Anything else that holds the same parameter would be left with a dense copy of its own.
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in groups and id(module) not in layers[id(parameter)]:
                del groups[id(parameter)]
    return list(groups.values())


def _check(name: str, linear: nn.Linear) -> None:
    weight = linear._parameters.get("weight")
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        came = type(getattr(linear, "weight", None)).__name__
        raise TypeError(f"quantize_nf4: {name}.weight is a {came}, wanted a plain parameter")
    if weight.is_meta:
        raise ValueError(f"quantize_nf4: {name}.weight is on the meta device, load the model's weights first")
    checks.check_float("quantize_nf4", f"{name}.weight", weight)
    if "forward" in linear.__dict__:
        raise ValueError(f"quantize_nf4: {name} has its forward replaced (an offloading hook?), remove that first")


def _replace(same: list[_Place], make: Callable[[nn.Linear, Optional[nn.Module]], nn.Module]) -> None:
    """Put ``make(linear, first)`` in place of each linear; ``first``: what was made of one of its weight, or None."""
    done: dict[int, nn.Module] = {}
    for place in same:
        linear = place.linear
        if (module := done.get(id(linear))) is None:
            module = make(linear, next(iter(done.values()), None))
            if module.bias is not None and not place.adapted:
                module.bias.requires_grad_(False)
            done[id(linear)] = module
        setattr(place.parent, place.attribute, module)


def _carry_over(linear: nn.Linear, module: NF4Linear) -> None:
    for hooks in _HOOKS:
        setattr(module, hooks, getattr(linear, hooks))  # the dict itself, so that handles still remove
    for name, value in linear.__dict__.items():
        if name not in module.__dict__:
            setattr(module, name, value)  # marks that others left on the layer


def _progress(items: list[_Item]) -> Iterable[_Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Any = tqdm(items, desc="NF4", unit="layer", leave=False, disable=not sys.stderr.isatty())
    return bar
