"""PEFT's adapter layers, 4-bit linears, and frozen ones where PyTorch has no fast product, on this project's ops.

    accelerate:  layer.__class__ = the fused subclass of its class          restore:  the way back

Only the class of a layer changes: its parameters, ``__dict__`` and ``state_dict`` stay what they were, so saving,
copying, pickling, merging and adding or deleting adapters go on as PEFT wrote them. (DoRA alone leaves two small
things, which restore takes back: a chosen ``dora_dropout``, and over an NF4Linear a LoRA variant that can dequantize
it.) On each call a fused layer asks its ``stock_reason``, which :func:`peft_ext.explain` reports, whether the op
computes what PEFT would, unless a call with the same facts was accepted before; where not, PEFT's own forward runs.

PEFT's layers are matched by exact type: a subclass may have changed the forward that would be replaced. They are in
``adapter_layers``, and why a call takes the stock path in ``adapter_layers/reasons.py``. Blocks of a model are known by
the code of their forward, see ``forms`` and ``model_blocks``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from torch import nn

from .._imports import MISSING, optional, say_missing
from ..nn import NF4Experts, NF4Linear
from ..ops.checks import check_module
from .adapter_layers import adalora, embedding, ia3, linear4bit, reasons  # noqa: F401  the layers register themselves
from .adapter_layers.base import (
    FOUR_BIT,
    FUSED,
    KEPT,
    QUANTIZED,
    STOCK,
    class_name,
    give_back,
    is_fully_sharded,
    is_repacked,
    without_adapters,
)
from .adapter_layers.dora import DORA_DROPOUT, clear_dora, prepare_dora
from .adapter_layers.dora_experts import is_dora
from .adapter_layers.experts import EXPERTS_DROPOUT, clear_experts, prepare_experts
from .adapter_layers.linear import FusedLinear, linear_dtype, would_widen
from .adapter_layers.lora import Lora
from .adapter_layers.reasons import as_in_forward, kernel_reason, tensor_reason, variant_name
from .model_blocks.blocks import block_parts, fuse_blocks, plain_blocks
from .model_blocks.loss import compute_losses, defer_losses, loss_parts

PeftModel = BaseTunerLayer = None
with optional("peft", "accelerate does not know an adapted model that has no layer to fuse"):
    from peft import PeftModel
with optional("peft", "explain lists no adapter layers"):
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Explanation", "Row", "accelerate", "explain", "restore"]

_NOT_ACCELERATED = "accelerate(model) was not called on it"
_METHODS = {"adalora": "AdaLoRA", "bitfit": "BitFit", "bottleneck": "bottleneck adapter", "delora": "DeLoRA",
            "diff_pruning": "Diff Pruning",
            "gralora": "GraLoRA", "ln_tuning": "LN Tuning", "loha": "LoHa", "lokr": "LoKr", "lora": "LoRA",
            "miss": "MiSS", "partial": "partial fine-tuning", "poly": "Poly", "randlora": "RandLora",
            "road": "RoAd", "vblora": "VB-LoRA", "vera": "VeRA", "xlora": "X-LoRA"}  # fmt: skip
_FUSED_METHODS = ("adalora", "ia3", "lora")
_OWN_TENSORS = ("bitfit", "diff_pruning", "partial")
_DORA_DROPOUTS = ("peft", "lora")


# --- public -----------------------------------------------------------------------------------------------------------


def accelerate(
    model: nn.Module, *, blocks: bool = True, dora_dropout: str = "peft", experts_dropout: float = 0.0
) -> nn.Module:
    """Puts the adapter layers and 4-bit linears of a live model on the fused ops, in place.

    Where the CPU has no instructions for products in a 16-bit dtype, which PyTorch then multiplies in a plain loop, the
    frozen ``nn.Linear`` layers that compute in it are put on :func:`peft_ext.ops.frozen_linear` as well, the head of a
    language model among them; a layer whose weight trains is not. :func:`explain` lists them.

    Args:
        model: a Hugging Face PeftModel, or any module tree with PEFT's linear layers of LoRA (several active adapters
            included, and mixed batches by ``adapter_names``), DoRA, AdaLoRA or (IA)³ over nn.Linear, Conv1D, NF4Linear
            or bitsandbytes ``Linear4bit``, with its LoRA on the experts of a mixture (``target_parameters``), or with
            ``Linear4bit`` layers alone. Over another base layer (bitsandbytes ``Linear8bitLt``, one with hooks) the
            part of LoRA, AdaLoRA or (IA)³ alone is fused, over its own forward. A layer that can't be fused goes on as
            it was; :func:`explain` tells why.
            Layers that are added later stay stock until the next call.
        blocks: more than layers. Norms, which save x and a number a row; MLPs, gated or not, whose inner activation is
            computed again in the backward; attentions, whose layers of one input are computed together and whose
            softmax(q kᵀ) v on a CPU is the operator: each where the code of its forward is a known form
            (docs/known-forms.md) as this is called, and else left as it is. On a CPU, dropouts. And the loss of a
            language model under a frozen head, where its ``loss_function`` is transformers' ``ForCausalLMLoss``: in a
            training step with labels :func:`peft_ext.ops.linear_cross_entropy` computes it from the hidden states, and
            the output computes its logits when they are asked for. False: the layers alone.
        dora_dropout: what DoRA's dropout drops in training. "peft": x, for the base layer's term too, as PEFT does,
            which takes a second product with the base weight. "lora": x on the low-rank path alone, as LoRA does: one
            product, and other gradients than PEFT's. Layers and their copies keep it until the next call.
        experts_dropout: in training, the probability to drop an element of what a mixture's experts get, on the
            low-rank path of their LoRA (``target_parameters``), a mask for each row. PEFT, which adds W + s B A, has
            none, and refuses a ``lora_dropout`` there; its files don't say it. Kept like dora_dropout.

    Returns: the same model. Calling again is harmless. Outputs and gradients agree with PEFT's to rounding; dropout
    draws its mask from the same generator, not the same mask. Not offered: the gradient of a gradient. Under
    forward-mode differentiation and torch.func's transforms PEFT's code runs.

    Raises: TypeError where model is no nn.Module; ValueError where dora_dropout is none of the two, or experts_dropout
    no probability below 1. Warns where model has no adapter and no 4-bit layer, and where bitsandbytes has repacked a
    4-bit weight, which it then can't train.
    """
    if dora_dropout not in _DORA_DROPOUTS:
        raise ValueError(f"accelerate: dora_dropout is {dora_dropout!r}, wanted one of {_DORA_DROPOUTS}")
    if not isinstance(experts_dropout, (int, float)) or not 0.0 <= experts_dropout < 1.0:
        raise ValueError(f"accelerate: experts_dropout is {experts_dropout!r}, wanted 0 <= p < 1")
    found = False
    adapted = tuple(kind for kind in (NF4Linear, BaseTunerLayer, PeftModel) if kind is not None)
    check_module("accelerate", model)
    compute_losses(model)  # a head of before may be an adapter's base now
    if not blocks:
        plain_blocks(model)
    for module in without_adapters(model):
        if would_widen(module):
            module.__class__ = FusedLinear
    for module in model.modules():
        if type(module) is not nn.Linear and (fused := FUSED.get(type(module))) is not None:
            if (lacking := _lacking(module, fused)) is not None:
                found = True
                say_missing(type(module).__module__.partition(".")[0], lacking, "its layers are not fused")
                continue
            module.__class__ = fused
        if isinstance(module, Lora):
            prepare_dora(module, dora_dropout)
        found = found or type(module) in STOCK or isinstance(module, adapted)
    prepare_experts(model, float(experts_dropout))
    if blocks:
        fuse_blocks(model)
        defer_losses(model)
    repacked = [name for name, module in model.named_modules() if type(module) in FOUR_BIT and is_repacked(module)]
    if repacked:
        warnings.warn(
            f"accelerate: bitsandbytes repacked the weight of {repacked[0]} for its CPU inference ({len(repacked)} in "
            "all): training gets no gradients through it, and it is not fused. Load the model anew, and call "
            "accelerate before it is evaluated",
            stacklevel=2,
        )
    if not found:
        warnings.warn(
            f"accelerate: {type(model).__name__} has no adapter layer and no 4-bit layer, nothing to accelerate: call "
            "it after peft.get_peft_model",
            stacklevel=2,
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`accelerate` in place: every layer has the class it had, and nothing is left behind.

    Raises: TypeError where model is no nn.Module; RuntimeError, before anything is changed, where a layer is merged
    into an NF4 weight, which only the fused layer can unmerge, or was itself wrapped by ``fully_shard``.
    """
    check_module("restore", model)
    for name, module in model.named_modules():
        kinds = type(module).__mro__
        if is_fully_sharded(kinds[0]) and kinds[0] not in STOCK and any(kind in STOCK for kind in kinds):
            raise RuntimeError(f"restore: fully_shard wrapped {name} itself, and so changed its class; it stays fused")
        if type(module) in STOCK and KEPT in module.__dict__:
            raise RuntimeError(f"restore: {name} is merged into an NF4 weight; call unmerge_adapter() first")
    clear_experts(model)
    plain_blocks(model)
    for module in model.modules():
        if isinstance(module, Lora):
            clear_dora(module)
        give_back(module)
    return model


@dataclass(frozen=True)
class Row:
    """What one layer does: ``kind`` as "LoRA over Linear4bit".

    ``reason``: why it is not fused; of a fused layer empty, or why its base layer runs on its own and the adapter's
    part alone is fused.
    """

    name: str
    kind: str
    fused: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """A row for each PEFT layer, and for each linear that is not the base of one and is quantized, or computes in a
    16-bit dtype for whose products the CPU has no instructions. Prints as a table.

    ``blocks``: a row for each norm and MLP that is known, and for each loss of a language model; ``fused_share`` is of
    the layers alone.

    ``missing``: a sentence for each name that the installed PEFT, bitsandbytes or transformers does not have where this
    package looks for it, and what is not fused for want of it.
    """

    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    blocks: list[Row] = field(default_factory=list)

    # A table of more rows than this shows like rows as one, with their count and the first one's name.
    LONGEST = 20

    @property
    def fused_share(self) -> float:
        """Fused layers over all layers; 0 where there is none."""
        return sum(row.fused for row in self.rows) / len(self.rows) if self.rows else 0.0

    def __str__(self) -> str:
        grouped = alike(self.rows).items()
        if len(self.rows) <= self.LONGEST:
            grouped = [((row.kind, row.fused, row.reason), [row.name]) for row in self.rows]
        lines = [("layer", "kind", "fused", "reason")]
        for (kind, fused, reason), names in grouped:
            more = f"{len(names)} x, first {names[0]}" if len(names) > 1 else names[0]
            lines.append((more, kind, "yes" if fused else "no", reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        table = ["  ".join(line).rstrip() for line in cells]
        fused = sum(row.fused for row in self.rows)
        share = f"{fused} of {len(self.rows)} layers fused ({self.fused_share:.0%})"
        blocks = [
            f"{kind}: {'fused' if fused else 'stock'}, {f'{len(names)} x, first {names[0]}' if names[1:] else names[0]}"
            f"{f': {reason}' if reason else ''}"
            for (kind, fused, reason), names in alike(self.blocks).items()
        ]
        blocks = blocks if any(row.fused for row in self.blocks) else []
        return "\n".join([*table, share, *blocks, *self.missing])


def alike(rows: Iterable[Row]) -> dict[tuple[str, bool, str], list[str]]:
    """Returns the names of the layers by kind, whether they are fused, and reason."""
    grouped: dict[tuple[str, bool, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row.kind, row.fused, row.reason), []).append(row.name)
    return grouped


def explain(model: nn.Module) -> Explanation:
    """Returns which layers run fused right now, and why the others do not.

    "Right now" is literal: the rows change with ``train()``, ``set_adapter``, ``merge_adapter``, autocast and the rest
    of the state that :func:`accelerate` honours. What depends on a single call is not known here: extra arguments but
    ``adapter_names``, and an input whose dtype does not fit, take the stock path as well.

    Under FSDP2 the rows are of a call of ``model``, in which a layer sees the parameters that ``fully_shard`` gathers;
    nothing is communicated, so that one process alone may ask.

    Raises: TypeError where model is no nn.Module.
    """
    check_module("explain", model)
    with as_in_forward(model):
        return Explanation(list(_rows(model)), list(MISSING), list(_blocks(model)))


def _blocks(model: nn.Module) -> Iterator[Row]:
    names = {id(module): name for name, module in model.named_modules()}
    for name, kind, reason in block_parts(model):
        yield Row(name, kind, reason is None, reason or "")
    for layer, reason in loss_parts(model):
        yield Row(names.get(id(layer), ""), "loss", reason is None, reason or "logits in chunks")


def _rows(model: nn.Module) -> Iterator[Row]:
    bases = set()
    frozen = (module for module in without_adapters(model) if isinstance(module, FusedLinear) or would_widen(module))
    linears = {id(module) for module in frozen}
    for name, module in model.named_modules():
        kind = reason = None
        if BaseTunerLayer is not None and isinstance(module, BaseTunerLayer):
            bases.add(module.get_base_layer())
            method, base = _method(module), getattr(module, "base_layer", module)
            kind = f"{method} over {class_name(type(base))}"
            if parameter := getattr(module, "parameter_name", None):  # of one or several nested around the experts
                kind = f"{method} over {class_name(type(module.get_base_layer()))}.{parameter}"
            if type(module) not in STOCK and type(module) not in FUSED and not hasattr(module, "stock_reason"):
                reason = _unmatched_reason(module, method, kind)
        elif module in bases:
            continue
        elif isinstance(module, NF4Linear):
            kind, reason = "NF4Linear", tensor_reason("its weight", module.weight)
            reason = reason or kernel_reason("nf4_linear", module.weight.device.type) or ""
            if not reason and module.merge_error is not None:
                yield Row(name, kind, True, f"an adapter was merged: requantizing moved it by {module.merge_error:.2%}")
                continue
        elif isinstance(module, NF4Experts):
            device = next(iter(module._parameters.values())).device.type
            kind, reason = f"{class_name(type(module))} over NF4", kernel_reason("lora_experts", device) or ""
        elif isinstance(module, QUANTIZED):
            kind = class_name(type(module))
            if type(module) not in FOUR_BIT:
                reason = f"{kind} is not fused; only Linear4bit itself is"
        elif id(module) in linears and linear_dtype(module) in reasons.WIDENED:
            kind = "Linear"
        if kind is None:
            continue
        if reason is None:
            fused = FUSED.get(type(module))
            reason = module.stock_reason() if fused is None else _lacking(module, fused) or _NOT_ACCELERATED
        part = None if reason else getattr(module, "part_reason", lambda: None)()
        yield Row(name, kind, not reason, reason or (f"the adapter's part: {part}" if part else ""))


def _lacking(module: nn.Module, fused: type) -> Optional[str]:
    """Returns which attribute the fused class reads that ``module``, of its stock class, lacks; None: it has all."""
    for path in fused.reads:
        found: Any = module
        for name in path.split("."):
            if not hasattr(found, name):
                return f"{type(found).__module__}.{type(found).__qualname__} has no {name}"
            if (found := getattr(found, name)) is None:  # a weight that is not quantized yet
                break
    return None


def _package(module: nn.Module) -> tuple[str, type]:
    """Returns the tuner's package, ``x`` of ``peft.tuners.x`` or of ours, and its class that the layer derives from."""
    for kind in type(module).__mro__:
        kind = STOCK.get(kind, kind)
        path = kind.__module__.split(".")
        if path[0] in ("peft", "peft_ext") and path[1:2] == ["tuners"] and len(path) > 2:
            return path[2], kind
    return type(module).__name__, type(module)


def _method(module: Any) -> str:
    package, _ = _package(module)
    if package == "lora":
        for name in module.active_adapters:
            if (variant := getattr(module, "lora_variant", {}).get(name)) is not None:
                method = variant_name(variant)
                own = method == "DoRA" and getattr(module, DORA_DROPOUT, "peft") == "lora"
                return f"{method} (dropout on the low-rank path)" if own else method
        if hasattr(module, "parameter_name"):
            method = "DoRA" if is_dora(module, module.active_adapters) else "LoRA"
            return f"{method} with dropout {p:g}" if (p := module.__dict__.get(EXPERTS_DROPOUT)) else method
    return _METHODS.get(package, package.replace("_", " ").upper())


def _unmatched_reason(module: nn.Module, method: str, kind: str) -> str:
    package, stock = _package(module)
    if is_fully_sharded(type(module)):
        return "fully_shard wrapped the layer itself, and so changed its class: call accelerate(model) before that"
    if stock in FUSED and type(module) is not stock:
        return f"{type(module).__name__} is a subclass of PEFT's {stock.__name__}, which is matched exactly"
    if package in _OWN_TENSORS:
        return f"{method} runs the layer's own code on the adapter's tensors: there is nothing to fuse"
    return f"{kind if package in _FUSED_METHODS else method} is not fused yet"
