"""Finds the modules of a model whose forward is a known form, and gives these modules fused classes.

Whether a module is fused does not depend on the name of its class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from ..adapter_layers.base import STOCK, give_back, is_fully_sharded, without_adapters
from ..adapter_layers.few_tokens import clear_plans
from ..adapter_layers.lora import LowRank
from ..forms import Form, Row, row_of
from ..forms.activations import activation_name, refresh
from .attention import Attention, look_at_sdpa, set_view, take_view
from .block import Block, class_of
from .cache import forget_caches
from .decoder_layer import DecoderLayer
from .dropout import Dropout, dropouts_of_adapters
from .mlp import Mlp
from .norm import FloatLayerNorm, LayerNorm, RMSNorm

__all__ = ["MIXINS", "block_parts", "expected_input", "fuse_blocks", "plain_blocks"]

MIXINS: dict[str, type[Block]] = {
    "attention": Attention, "decoder_layer": DecoderLayer, "dropout": Dropout, "float_layer_norm": FloatLayerNorm,
    "layer_norm": LayerNorm, "mlp": Mlp, "projections": Attention, "rms_norm": RMSNorm,
}  # fmt: skip
_COPIED_BY = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
_NOT_ACCELERATED = "accelerate(model) was not called on it, or with blocks=False"
_CHANGED = "its code is no longer the known form: call accelerate(model) again"
# Parts of class names in lower case, each with the kind of block that a class with this part in its name is taken for.
# `explain` reports a module whose form is unknown only if its class name has one of the parts in _CALLED.
_CALLED = (("norm", "norm"), ("attention", "attention"), ("attn", "attention"), ("mlp", "MLP"), ("feedforward", "MLP"))


def _stock(module: nn.Module) -> type:
    return module.stock_class if isinstance(module, Block) else type(module)


def _found(module: nn.Module, rows: Callable[[type], Any]) -> Union[tuple[Row, Form], str, None]:
    """Returns the row in the table of forms, and the form, of a module that is a block; or the reason why the module
    can't be fused as a block. ``rows`` is a cache of :func:`row_of` for one walk through a model.

    Returns None for a module that is no block to fuse or to report, such as a linear layer or a dropout with p = 0.
    """
    stock = _stock(module)
    if stock in STOCK or issubclass(stock, (nn.Linear, nn.Embedding, nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return None
    if stock.__module__.startswith(("torch.", "peft.", "peft_ext.", "bitsandbytes.")):
        if stock not in (nn.LayerNorm, nn.Dropout):
            return None
    found = rows(stock)
    if isinstance(found, str):
        return found if module._modules or module._parameters else None
    row, form = found
    if row.kind not in MIXINS:
        return None
    if row.kind == "projections" and not _joins(module, row):
        return None
    if stock is nn.Dropout and (module.inplace or not 0.0 < module.p < 1.0):
        return None
    if is_fully_sharded(stock):
        return "fully_shard wrapped the module itself, and so changed its class: call accelerate(model) before that"
    if any(getattr(stock, name, None) is not getattr(nn.Module, name, None) for name in _COPIED_BY):
        return "its class has its copies made in a way of its own"
    if hidden := [name for name in form.of_class if name in module.__dict__]:
        return f"it has a {hidden[0]} of its own, which its class's code would find"
    return found


def _joins(module: nn.Module, row: Row) -> bool:
    """Returns whether some group of layers that get one tensor has at least two LoRA or AdaLoRA layers."""
    groups = (group.split("+") for group in row.names("inputs"))
    return any(sum(isinstance(module._modules.get(name), LowRank) for name in group) > 1 for group in groups)


def fuse_blocks(model: nn.Module) -> None:
    """Gives a fused class to each block of ``model`` for which :func:`_found` returns a row of the table of forms,
    except to the dropouts of LoRA and AdaLoRA layers. Other blocks that have a fused class get their stock class back.
    A fused block that ``fully_shard`` has wrapped keeps its class."""
    rows, skipped = functools.cache(row_of), dropouts_of_adapters(model)
    refresh()
    look_at_sdpa()
    clear_plans()
    forget_caches()
    for module in model.modules():
        if module in skipped:
            continue
        if isinstance(module, Block) and is_fully_sharded(type(module)):
            continue  # another class would replace the class of fully_shard, and the module would not be sharded
        found = _found(module, rows)
        if isinstance(found, tuple):
            row, form = found
            module.__class__ = class_of(MIXINS[row.kind], _stock(module), row, form)
            set_view(module)
            if isinstance(module, Mlp):
                # Caches the activation's name now, before torch.compile may trace the MLP.
                activation_name(getattr(module, row.get("act"), None))
        elif isinstance(module, Block) and type(module).peft_ext_known.row.kind in MIXINS:
            _plain(module)


def plain_blocks(model: nn.Module) -> None:
    """Undoes :func:`fuse_blocks`."""
    clear_plans()
    forget_caches()
    for module in model.modules():
        if isinstance(module, Block) and type(module).peft_ext_known.row.kind in MIXINS:
            _plain(module)


def _plain(module: nn.Module) -> None:
    take_view(module)
    give_back(module)


def block_parts(model: nn.Module) -> Iterator[tuple[str, str, Optional[str]]]:
    """Yields, for each block of ``model``, the block's name, each part that can be fused, and the reason why the part
    is not fused (None for a fused part)."""
    rows, skipped = functools.cache(row_of), dropouts_of_adapters(model)
    refresh()
    look_at_sdpa()
    for name, module in model.named_modules():
        if module in skipped:
            continue
        found = _found(module, rows)
        if isinstance(module, Block) and type(module).peft_ext_known.row.kind in MIXINS:
            changed = not isinstance(found, tuple) or found[0] != type(module).peft_ext_known.row
            for kind, reason in module.block_parts(expected_input(model, name)):
                yield name, kind, reason or (_CHANGED if changed else None)
        elif isinstance(found, tuple):
            yield name, MIXINS[found[0].kind].block_kind, _NOT_ACCELERATED
        elif found is not None and (kind := _called(module)) is not None:
            yield name, kind, found


def _called(module: nn.Module) -> Optional[str]:
    """Returns the kind of block (norm, attention or MLP) that the name of the module's class stands for.

    Returns None if the name stands for no kind, or if the class name of a module inside of ``module`` contains the same
    part of a name.
    """
    name = _stock(module).__name__.lower()
    part, kind = next(((part, kind) for part, kind in _CALLED if part in name), ("", None))
    inner = (child for child in module.modules() if child is not module)
    return None if any(part in _stock(child).__name__.lower() for child in inner) else kind


def expected_input(model: nn.Module, name: str) -> Tensor:
    """Returns an empty tensor with the dtype and the device that the input of the module ``name`` is expected to have.

    The dtype and the device are those of the first parameter that is floating-point, has at least 16 bits and belongs
    to no adapter, in the module ``name`` or in the nearest module around it that has such a parameter.
    """
    around = [model]
    for part in filter(None, name.split(".")):  # get_submodule would call the __getattr__ that a class may define
        around.append(around[-1]._modules[part])
    for nearest in reversed(around):
        for module in without_adapters(nearest):
            for one in module._parameters.values():
                if one is not None and one.is_floating_point() and one.itemsize > 1:
                    return torch.empty(0, dtype=one.dtype, device=one.device)
    return torch.empty(0)
