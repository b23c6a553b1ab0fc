"""``accelerate``, ``restore`` and ``explain``: the fused operators for the layers and blocks of a live model.

    accelerate:  layer.__class__ = the fused subclass of its class          restore:  layer.__class__ = the stock class

``accelerate`` changes the class of a layer; the parameters and the ``state_dict`` stay unchanged, so PEFT's code for
saving, copying, pickling, and adding or deleting adapters still works. Beside the class, ``accelerate`` sets three
things, which ``restore`` removes: a chosen ``dora_dropout`` or ``experts_dropout`` is an attribute of the layer, DoRA
over an NF4Linear gets a LoRA variant that can dequantize the weight, and the ``config`` of a fused attention becomes a
view of the model's configuration that names peft_ext's attention function in place of ``sdpa``.

A call of a fused adapter layer first runs the checks in ``adapter_layers/reasons.py``, unless the checks have accepted
an earlier call with equal types, dtypes, shapes, devices and settings. If a check fails, the stock forward of the
layer, or of the layer's base layer, runs. :func:`peft_ext.explain` runs the same checks and reports which check fails.

The function ``peft_ext.accelerate`` recognizes PEFT's layers by exact type, because a subclass may have another
forward. The code of the fused layers is in the folder ``adapter_layers``. Blocks of a model are recognized by the code
of their forward, see ``forms`` and ``model_blocks``.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from torch import nn

from .._imports import MISSING, optional, say_missing
from .._native import release_scratch
from ..nn import Float8Linear, NF4Experts, NF4Linear, PackedExperts, PackedLinear
from ..ops import cards, prove
from ..ops.checks import check_module
from ..ops.format_proofs import family_of
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
    quant_state_of,
    without_adapters,
)
from .adapter_layers.dora import DORA_DROPOUT, clear_dora, prepare_dora
from .adapter_layers.dora_experts import is_dora
from .adapter_layers.experts import EXPERTS_DROPOUT, clear_experts, prepare_experts
from .adapter_layers.linear import FusedLinear, linear_dtype, would_widen
from .adapter_layers.lora import Lora
from .adapter_layers.packed_codes import adapters_that_read_codes
from .adapter_layers.reasons import as_in_forward, kernel_reason, tensor_reason, variant_name
from .adapter_layers.tensor_parallel import is_split
from .model_blocks.block import Block
from .model_blocks.blocks import block_parts, expected_input, fuse_blocks, plain_blocks
from .model_blocks.decoder_layer import DecoderLayer
from .model_blocks.loss import LanguageModel, compute_losses, defer_losses, loss_parts

PeftModel = BaseTunerLayer = None
with optional("peft", "accelerate does not know an adapted model that has no layer to fuse"):
    from peft import PeftModel
with optional("peft", "explain lists no adapter layers"):
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Explanation", "Row", "accelerate", "explain", "restore"]

_READS_CODES = "computes with the codes of the packed weight as if they were the values of the weight"
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
    model: nn.Module, *, blocks: Optional[bool] = True, dora_dropout: Optional[str] = "peft",
    experts_dropout: Optional[float] = 0.0,
) -> nn.Module:  # fmt: skip
    """Replaces, in place, the classes of the adapter layers, 4-bit linear layers and known blocks of a live model by
    classes that run fused operators.

    If the CPU has no instructions for products in a 16-bit dtype, or the environment forbids these instructions, the
    frozen ``nn.Linear`` layers of a CPU model that compute in this dtype, for example the head of a language model, run
    :func:`peft_ext.ops.frozen_linear`. The function :func:`peft_ext.explain` lists the frozen ``nn.Linear`` layers that
    compute in such a dtype, except the base layers of adapters. On the CPU path ``avx512_bf16``, large frozen bfloat16
    layers run ``frozen_linear`` too, in calls of few tokens without a gradient.

    Args:
        model: a Hugging Face PeftModel, or any module tree with PEFT's layers or with bitsandbytes ``Linear4bit``
            layers. LoRA (also with several active adapters, and mixed batches by ``adapter_names``), DoRA, AdaLoRA and
            (IA)³ are fused over nn.Linear, Conv1D, FalconLinear, NF4Linear, PackedLinear and ``Linear4bit``. LoRA is
            also fused over nn.Embedding, PackedEmbedding and the quantized layers of other packages that
            ``adapter_layers/foreign.py`` reads, and LoRA and DoRA on the experts of a mixture (``target_parameters``).
            If the operators can't compute the base layer (for example bitsandbytes ``Linear8bitLt`` or a layer with
            hooks), the base layer's own forward runs and only the adapter's part of LoRA, AdaLoRA or (IA)³ is fused;
            (IA)³ over ``Linear8bitLt`` is not fused. A layer that can't be fused runs its stock forward, and
            :func:`peft_ext.explain` tells why. Layers that are added after a call of ``accelerate`` are not fused until
            ``accelerate`` is called again.
        blocks: whether to fuse norms, MLPs, attentions, decoder layers, dropouts and the loss, and not only layers.
            Norms, MLPs, attentions and decoder layers are fused if the code of their forward is a known form
            (docs/known-forms.md) at the time of the call. A fused norm saves x, its weight and one or two numbers per
            row of x for the backward. An MLP computes the input of its last layer again in the backward, unless, for
            example, the last layer has hooks. An attention computes the adapted layers that get one input together, and
            on an x86 CPU with AVX2 runs softmax(q kᵀ) v on an operator where the operator was measured to be faster
            than PyTorch. A decoder layer on a CPU checks a call of few tokens without a gradient once for all its
            blocks. Dropouts are fused on a CPU. The loss of a language model is fused if the head is frozen (LoRA on
            the head may train) and the model's ``loss_function`` has the form of transformers' ``ForCausalLMLoss``: in
            a training step with labels, :func:`peft_ext.ops.linear_cross_entropy` computes the loss from the hidden
            states, and the output computes its logits at the first read. With blocks False, only adapter layers, 4-bit
            layers and frozen linear layers are fused.
        dora_dropout: "peft" or "lora": where DoRA's dropout acts in training. With "peft", the dropout acts on x in the
            low-rank term and in the base layer's term, as in PEFT; the dropout in the base layer's term needs a second
            product with the base weight, or on a CPU, for a small dropout and enough tokens, a product with the dropped
            elements alone. With "lora", the dropout acts on x in the low-rank term only, as in LoRA, which needs one
            product with the base weight and gives other values than PEFT. Layers and their copies keep dora_dropout
            until a call of ``accelerate`` that does not pass None for dora_dropout, or until ``restore``.
        experts_dropout: the probability with which, in training, an element of the input of a mixture's experts is
            dropped on the low-rank path of LoRA or DoRA (``target_parameters``). Each row of an expert's input gets its
            own mask. PEFT itself has no dropout on experts and rejects a ``lora_dropout`` on experts, and PEFT's
            adapter files do not store experts_dropout. Layers and their copies keep experts_dropout until a call of
            ``accelerate`` that does not pass None for experts_dropout, or until ``restore``.

    With ``blocks=None``, ``dora_dropout=None`` or ``experts_dropout=None``, the model keeps what an earlier call of
    ``accelerate`` chose; a layer for which no call has chosen gets the default.

    Before ``accelerate`` returns, the kernels that the model needs are proved, that is compared with the reference
    (``peft_ext.ops.prove``). ``accelerate`` waits for no other process, unless tensor parallelism of transformers
    splits layers of the model.

    Returns: the same model. ``accelerate`` may be called again on the same model. Without dropout, the outputs and
    gradients of a fused layer agree with PEFT's up to rounding. A fused dropout uses the same random generator as PEFT,
    but draws another mask. The fused operators do not support the gradient of a gradient. Under forward-mode
    differentiation and torch.func's transforms, the stock code of the adapter layers runs.

    Raises: TypeError if model is no nn.Module; ValueError if dora_dropout is none of "peft", "lora" and None, or
    experts_dropout is neither None nor a number p with 0 <= p < 1. Warns if ``accelerate`` finds no layer to fuse (no
    adapter, no 4-bit layer), if bitsandbytes has repacked a 4-bit weight, because no gradient then flows through the
    layer to x, if a layer lacks an attribute that the fused class reads, and if a method's code in PEFT computes with
    the codes of a packed weight.
    """
    if dora_dropout is not None and dora_dropout not in _DORA_DROPOUTS:
        raise ValueError(f"accelerate: dora_dropout is {dora_dropout!r}, wanted one of {_DORA_DROPOUTS}")
    if experts_dropout is not None:
        if not isinstance(experts_dropout, (int, float)) or not 0.0 <= experts_dropout < 1.0:
            raise ValueError(f"accelerate: experts_dropout is {experts_dropout!r}, wanted 0 <= p < 1")
    found = False
    adapted = tuple(kind for kind in (NF4Linear, BaseTunerLayer, PeftModel) if kind is not None)
    check_module("accelerate", model)
    if blocks is None:
        kinds = {type(module) for module in model.modules()}
        blocks = kinds.isdisjoint(STOCK) or any(issubclass(kind, (Block, LanguageModel)) for kind in kinds)
    compute_losses(model)  # a head of an earlier call of accelerate may now be a base layer
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
    prepare_experts(model, experts_dropout)
    if blocks:
        fuse_blocks(model)
        defer_losses(model)
    repacked = [name for name, module in model.named_modules() if type(module) in FOUR_BIT
                and getattr(quant_state_of(module), "packing_format_for_cpu", False)]  # fmt: skip
    if repacked:
        warnings.warn(
            f"accelerate: bitsandbytes repacked the weight of {repacked[0]} for its CPU inference ({len(repacked)} in "
            "all): training gets no gradients through it, and it is not fused. Load the model anew, and call "
            "accelerate before it is evaluated",
            stacklevel=2,
        )
    reading = adapters_that_read_codes(model)
    for name, module in model.named_modules():
        if id(module) in reading:
            warnings.warn(
                f"accelerate: {reading[id(module)]} {_READS_CODES} of {name} ({len(reading)} in all). Its results are "
                "wrong: call peft_ext.dequantize_packed(model) or dequantize_nf4(model) before the adapter is added",
                stacklevel=2,
            )
            break
    if not found:
        warnings.warn(
            f"accelerate: {type(model).__name__} has no adapter layer and no 4-bit layer, nothing to accelerate: call "
            "it after peft.get_peft_model",
            stacklevel=2,
        )
    # ``explain`` runs the checks of the layers, and the checks prove the kernels that the model needs. For a layer that
    # tensor parallelism splits, the operators sum other tensors over the processes than PEFT's code sums, so all
    # processes have to choose the operators or all have to choose PEFT's code.
    (prove.agree if any(map(is_split, model.modules())) else prove.settle_by)(lambda: explain(model))
    return model


def agree(model: nn.Module) -> None:
    """Makes all ranks of a distributed training run use the same kernels.

    Each rank proves its kernels by itself, that is compares them with the reference (see the section "The proof on the
    machine" in docs/reliability.md). Without ``agree``, if a family of kernels failed on one rank, the operators of
    this family compute with the reference on that rank alone, and the gradients of the ranks differ by rounding.
    ``agree`` exchanges the results of the proofs through the store of the default process group. If a family failed on
    any rank, its operators compute with the reference on all ranks. In a training loop of your own, call ``agree`` on
    every rank, after ``accelerate`` and before the first step. With transformers' Trainer, ``PeftExtCallback`` makes
    all ranks use the same kernels when training begins.

    ``agree`` proves the kernels of the layers and blocks of ``model`` that :func:`explain` lists. Operators that only
    your own code calls are proved at their first call, and the ranks do not exchange the results of these proofs.

    Nothing is exchanged without a process group of several ranks, or with ``PEFT_EXT_PROVE=0``.

    Raises: TypeError if model is no nn.Module; RuntimeError if another rank does not call ``agree`` within 600 seconds.
    """
    check_module("agree", model)
    prove.agree(lambda: explain(model))


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`accelerate` in place: sets the stock classes and removes what :func:`accelerate` stored.

    ``restore`` also releases the scratch memory that the threads of CPU operators keep from call to call.

    Raises: TypeError if model is no nn.Module; RuntimeError, before anything is changed, if an adapter is merged into a
    packed weight (only the fused layer can unmerge the adapter), or if ``fully_shard`` was called on a fused module
    itself, other than a decoder layer.
    """
    check_module("restore", model)
    for name, module in model.named_modules():
        # A sharded decoder layer may keep its fused class after restore: once its norms, attention and MLP have their
        # stock classes again, the decoder layer runs its stock forward.
        fused = any(kind in STOCK and not issubclass(kind, DecoderLayer) for kind in type(module).__mro__)
        if fused and is_fully_sharded(type(module)) and type(module) not in STOCK:
            raise RuntimeError(f"restore: fully_shard wrapped {name} itself, and so changed its class; it stays fused")
        if type(module) in STOCK and KEPT in module.__dict__:
            raise RuntimeError(f"restore: {name} is merged into a packed weight; call unmerge_adapter() first")
    clear_experts(model)
    plain_blocks(model)
    for module in model.modules():
        if isinstance(module, Lora):
            clear_dora(module)
        give_back(module)
    release_scratch()
    return model


@dataclass(frozen=True)
class Row:
    """The state of one layer or block. ``kind``: the method and the base layer, for example "LoRA over Linear4bit", or
    the kind of block.

    ``reason``: why the layer or block is not fused, as a text. The reason of a fused layer or block is "" or a remark,
    such as why only the adapter's part is fused.
    """

    name: str
    kind: str
    fused: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`peft_ext.explain`. ``str`` of an Explanation is a table.

    ``rows``: a row for each adapter layer, for each other linear layer or experts' module that peft_ext or bitsandbytes
    keeps quantized, and for each other frozen linear layer that computes in a 16-bit dtype for whose products the CPU
    has no instructions. ``blocks``: a row for each part of a block (norm, MLP, attention, decoder layer, dropout) and
    for each loss of a language model. ``fused_share`` counts ``rows`` and not ``blocks``.

    ``missing``: a sentence for each name that the installed PEFT, bitsandbytes or transformers lacks, which says what
    is not fused without this name.
    """

    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    blocks: list[Row] = field(default_factory=list)

    # ``str`` of an Explanation with more rows than LONGEST shows one line for all layers with equal kind and reason,
    # with the number of these layers and the name of the first of them.
    LONGEST = 20

    @property
    def fused_share(self) -> float:
        """The number of fused layers divided by the number of layers, both counted in ``rows``; 0 if ``rows`` is empty.

        Blocks and losses, which are in ``blocks``, do not count.
        """
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
    """Returns a dict from (kind, fused, reason) to the names of the rows that have these values."""
    grouped: dict[tuple[str, bool, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row.kind, row.fused, row.reason), []).append(row.name)
    return grouped


def explain(model: nn.Module) -> Explanation:
    """Returns which layers and blocks of ``model`` run fused now, and why other layers and blocks do not.

    The result depends on the current state: ``train()``, ``set_adapter``, ``merge_adapter``, autocast and other state
    change the result. For example, a decoder layer is fused in evaluation only, and a loss and a dropout in training
    only. The result does not cover the arguments of a single call: a call with arguments that the operators do not
    accept (such as an x of another dtype) takes the stock path.

    Under FSDP2, the result is for a call of ``model``, in which ``fully_shard`` gathers the parameters. ``explain``
    communicates nothing, so a single process may call it.

    Raises: TypeError if model is no nn.Module.
    """
    check_module("explain", model)
    with as_in_forward(model):
        return Explanation(list(_rows(model)), list(MISSING), list(_blocks(model)))


def _blocks(model: nn.Module) -> Iterator[Row]:
    names = {id(module): name for name, module in model.named_modules()}
    held = dict(model.named_modules())
    for name, kind, reason in block_parts(model):
        reason = reason or _old_card(held[name])
        yield Row(name, kind, reason is None, reason or getattr(held[name], "fused_remark", ""))
    for layer, reason in loss_parts(model):
        reason = reason or _old_card(layer)
        yield Row(names.get(id(layer), ""), "loss", reason is None, reason or "logits in chunks")


def _rows(model: nn.Module) -> Iterator[Row]:
    bases, reading = set(), adapters_that_read_codes(model)
    frozen = (module for module in without_adapters(model) if isinstance(module, FusedLinear) or would_widen(module))
    linears = {id(module) for module in frozen}
    for name, module in model.named_modules():
        kind = reason = None
        if BaseTunerLayer is not None and isinstance(module, BaseTunerLayer):
            bases.add(module.get_base_layer())
            method, base = _method(module), getattr(module, "base_layer", module)
            kind = f"{method} over {class_name(type(base))}{_format(base)}"
            # The layer wraps one parameter of a mixture's experts.
            if parameter := getattr(module, "parameter_name", None):
                kind = f"{method} over {class_name(type(module.get_base_layer()))}.{parameter}"
            if type(module) not in STOCK and type(module) not in FUSED and not hasattr(module, "stock_reason"):
                reason = _unmatched_reason(module, method, kind)
            if id(module) in reading:
                reason = f"{method} {_READS_CODES}: its results are wrong"
        elif module in bases:
            continue
        elif isinstance(module, NF4Linear):
            kind, reason = "NF4Linear", tensor_reason("its weight", module.weight)
            reason = reason or kernel_reason("nf4_linear", module.weight.device.type) or ""
        elif isinstance(module, Float8Linear):
            kind = f"Float8Linear{_format(module)}"
            reason = kernel_reason("frozen_linear", module.weight.device.type) or ""
        elif isinstance(module, PackedLinear):
            kind, reason = f"PackedLinear{_format(module)}", reasons.weight_reason(module)
            reason = reason or kernel_reason("frozen_linear", module.weight.device.type) or ""
        elif isinstance(module, PackedExperts):
            device = next(iter(module._parameters.values())).device.type
            held = sorted({weight.format.name for weight in map(module.frozen, module.packed_names)})
            kind = f"{class_name(type(module))} over {', '.join(held)}"
            reason = kernel_reason("lora_experts", device) or prove.proved(device, *map(family_of, held)) or ""
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
        old = _old_card(module)
        if reason == "" and old is None and (error := getattr(module, "merge_error", None)) is not None:
            yield Row(name, kind, True, f"an adapter was merged: requantizing moved it by {error:.2%}")
            continue
        if reason is None:
            fused = FUSED.get(type(module))
            reason = module.stock_reason() if fused is None else _lacking(module, fused) or _NOT_ACCELERATED
        reason = reason or old
        part = None
        if not reason and hasattr(module, "part_reason"):
            part = module.part_reason(expected_input(model, name.rpartition(".")[0]))
        text = reason or (f"the adapter's part: {part}" if part else "")
        yield Row(name, kind, not reason, "; ".join(filter(None, (text, _note(module)))))


def _old_card(module: nn.Module) -> Optional[str]:
    """Returns why the reference, and not a kernel, computes a module that is on an old GPU beside a newer GPU; None for
    other modules. See cards.why_old."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    return None if tensor is None else cards.why_old(tensor.device)


def _format(base: nn.Module) -> str:
    """Returns the format of a PackedLinear in brackets; "" for another layer."""
    return f" ({base.format.name})" if isinstance(base, PackedLinear) else ""


def _note(module: Any) -> str:
    """Returns the ``note`` of a layer, or of the base layer of an adapter: what the layer leaves out of the computation
    of the checkpoint's own layer, that the layer quantizes its input, or why a packed weight was decoded; "" without a
    note."""
    below = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    note = getattr(below, "note", "")
    if isinstance(below, Float8Linear) and (reason := below.decoded_reason()):
        return f"{note}; its weight is decoded in each call: {reason}"
    return note if isinstance(note, str) else ""


def _lacking(module: nn.Module, fused: type) -> Optional[str]:
    """Returns a text that names an attribute that the fused class reads and ``module`` lacks; None if ``module`` lacks
    no such attribute."""
    for path in fused.reads:
        found: Any = module
        for name in path.split("."):
            if not hasattr(found, name):
                return f"{type(found).__module__}.{type(found).__qualname__} has no {name}"
            if (found := getattr(found, name)) is None:  # the quant_state is None while the weight is not quantized yet
                break
    return None


def _package(module: nn.Module) -> tuple[str, type]:
    """Returns the name of the layer's tuner, ``x`` of ``peft.tuners.x`` or ``peft_ext.tuners.x``, and the layer's stock
    class in this tuner; for a layer of neither package, the name of its class and its class."""
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
