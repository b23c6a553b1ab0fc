"""Compares a training step of the accelerated model with the stock model's step, for a user's own model and batch.

The loss, the outputs and the gradient of each trained parameter must satisfy

    ‖accelerated - yardstick‖  ≤  factor ‖stock - yardstick‖ + floor ‖yardstick‖

The docstring of :func:`verify` gives the factor and the floor. The "yardstick" is the stock model in float32, or in
float64 if the user's model computes in float32. The stock model, the accelerated model and the yardstick are copies,
see :mod:`.twins`: the stock and the accelerated copy share the user's weights, and the yardstick has the weights in the
wider dtype. The user's model itself is never called.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..integrations.adapter_layers.base import STOCK, is_fully_sharded
from ..integrations.peft import accelerate, explain, restore
from ..ops.checks import check_module
from ..text import dtype_name
from .steps import GRADIENT, Compared, Results, Seed, blocks_alone, cast, compared, draws, step, without_autocast
from .twins import dequantizing, twin, without_dropout

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_NARROW = (torch.bfloat16, torch.float16)


# --- what is reported -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """Result of :func:`peft_ext.verify`.

    ``str()`` gives ``about``, a table of the loss, the outputs, the five worst gradients and the worst block, a
    verdict, and ``notes``.

    Attributes:
        rows: comparisons of the loss, of the outputs, and of the gradient of each trained parameter.
        blocks: one comparison for each fused layer, packed linear layer or block that could be run alone.
        about: one sentence with the model's class, dtype and mode, and the model against which errors are measured.
        notes: further sentences, for example why the yardstick (the stock model in a wider dtype) could not run.
    """

    rows: list[Compared]
    blocks: list[Compared]
    about: str
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Returns whether every comparison in ``rows`` and in ``blocks`` is within its limit."""
        return all(row.ok for row in (*self.rows, *self.blocks))

    @property
    def worst_block(self) -> Optional[Compared]:
        """Returns the worst of those blocks that are over their limits and contain no other block over its limit.

        If no block is over its limit, returns the block closest to its limit; without blocks, returns None.
        """
        wrong = [block for block in self.blocks if not block.ok]
        inner = [block for block in wrong if not any(other.name.startswith(f"{block.name}.") for other in wrong)]
        return max(inner or self.blocks, key=lambda block: block.share, default=None)

    def __str__(self) -> str:
        gradients = [row for row in self.rows if row.name.startswith(GRADIENT)]
        shown = [row for row in self.rows if row not in gradients]
        shown += sorted(gradients, key=lambda row: -row.share)[:5]
        shown += [block for block in [self.worst_block] if block is not None]
        lines = [("", "accelerated", "stock", "difference", "limit", "")]
        for row in shown:
            name = f"block {row.name} ({row.kind})" if row.kind else row.name
            numbers = (row.error, row.stock_error, row.difference, row.limit)
            lines.append((name, *("-" if x is None else f"{x:.1e}" for x in numbers), "ok" if row.ok else "WRONG"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        wrong, alone = (sum(not row.ok for row in rows) for rows in (self.rows, self.blocks))
        verdict = (
            f"{'as good' if self.ok else 'NOT as good'} as stock: {wrong} of {len(self.rows)} tensors and {alone} of "
            f"{len(self.blocks)} blocks are over their limits"
        )
        return "\n".join([self.about, *("  ".join(line).rstrip() for line in cells), verdict, *self.notes])


# --- public -----------------------------------------------------------------------------------------------------------


def verify(model: nn.Module, batch: Mapping[str, Any]) -> Verification:
    """Compares a training step of the accelerated model with the same step of the stock model, tensor by tensor.

    Errors are measured against the yardstick, which is the stock model in a wider dtype. The limit of an output's error
    is twice the stock model's error, plus a floor. A gradient's limit is three times the stock model's error, plus the
    floor, because in a correct model with about a hundred gradients, one gradient may have 2.5 times the stock model's
    error. The floor, which is added to each limit, is half of the dtype's eps (one eps for a tensor of 16 elements or
    fewer, such as the loss), and at least 4e-6. The yardstick is the stock model in float32, or in float64 if the model
    computes in float32. The yardstick multiplies by the same dequantized weights as the stock layers. If the stock
    model can't run in the wider dtype (layers of bitsandbytes that are not NF4, code that refuses float64, too little
    memory), the difference between accelerated and stock must be at most 16 eps or 1e-4, whichever is larger, and
    ``notes`` has the reason.

    Each fused layer, packed layer and block that can be called alone is also compared alone, with the same limits: the
    stock forward and the fused forward get the input that the layer has in the stock model. If a comparison is over its
    limit, look at the block ``worst_block`` first.

    Dropout is off, also in attention and in adapters, because results under two dropout masks can't be compared. If two
    stock forwards under two seeds still differ, the model draws random numbers that can't be switched off; the
    comparison then runs in evaluation mode, with gradients. In all other cases the comparison runs in training mode,
    also for a model in evaluation mode. If autocast is on, it applies to the accelerated and the stock model, but not
    to the stock model in the wider dtype.

    ``model`` and ``batch`` do not change, even if an error is raised: weights, buffers, gradients, modes, hooks and
    classes stay the same. The random number generators of PyTorch, Python and NumPy keep their states. Hooks of modules
    run in the copies; hooks of parameters do not run.

    The comparison needs the memory of a stock training step in the wider dtype, of the weights in the wider dtype, and
    of three copies of the logits and of the trained gradients. Packed layers are dequantized one at a time. Packed
    experts of a mixture are dequantized whole, and held in two copies: in the model's dtype and in the wider dtype. The
    comparison takes the time of about ten stock training steps, or of fifteen steps if the base is packed.

    Args:
        model: a PeftModel, or any module that :func:`peft_ext.accelerate` takes. An accelerated model is compared in
            its present state; a model that is not accelerated is compared in the state that ``peft_ext.accelerate``
            would give. For a model of ``torch.compile``, the module that was compiled is compared.
        batch: keyword arguments of the model's forward, as from a DataLoader, on the model's device. If the output has
            no loss, as without labels, the loss is the sum of the outputs times fixed random numbers.

    Raises: TypeError if model is not an nn.Module, or batch is not a mapping with string keys. ValueError if batch has
    no tensor, or, for a model on one device, a tensor on another device; if no parameter of model is trained, or none
    takes part in the loss; or if model is sharded, is wrapped for several devices, is on the meta device, can't be
    copied, holds a closure that calls the model instead of the copy, returns no float tensor, or draws random numbers
    in evaluation mode too. An error of the model's own forward is raised unchanged.
    """
    check_module("verify", model)
    model = model._modules.get("_orig_mod") or model
    devices = _check(model, batch)
    with _as_it_was(devices) as seed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused, notes = _fused_twin(model)
        stock = dequantizing(restore(without_dropout(twin(model))))
        if (explained := explain(fused)).rows:
            notes += [line for line in str(explained).splitlines() if " layers fused (" in line]
        if not model.training:
            fused.train(), stock.train()
        mode = "training mode, dropout off"
        with _watched(model) as casts:
            random_in_training = draws(stock, batch, seed)
        if random_in_training:
            mode = "evaluation mode"
            notes.append("this model draws random numbers that can't be switched off: evaluation mode is compared")
            fused.eval(), stock.eval()
            if draws(stock, batch, seed):
                raise ValueError("verify: model draws random numbers in evaluation mode, too: nothing can be compared")
        narrow = _compute_dtype(model, casts)
        wide = torch.float32 if narrow in _NARROW else torch.float64
        yardstick, exact, why = _measured(stock, batch, wide, narrow, seed, casts)
        notes += [] if why is None else [f"accelerated is compared with stock alone: {why}"]
        right, found = step(stock, batch, seed), step(fused, batch, seed)
        rows = [compared(name, "", found.get(name), right.get(name), exact, narrow) for name in {**right, **found}]
        del right, found, exact
        blocks = blocks_alone(fused, stock, yardstick, batch, wide, narrow, seed)
    against = "stock" if yardstick is None else f"stock in {dtype_name(wide)}"
    about = f"{type(model).__name__} in {dtype_name(narrow)}, {mode}; relative errors against {against}"
    if not blocks:
        notes.append("no layer and no block is fused: stock was compared with itself")
    elif all(block.ok for block in blocks) and not all(row.ok for row in rows):
        notes.append("each block alone is right: look at the loss, and at what runs between blocks")
    return Verification(rows, blocks, about, notes)


# --- arguments and the process's state --------------------------------------------------------------------------------


def _check(model: nn.Module, batch: Any) -> list[torch.device]:
    """Checks the arguments of ``verify``, and returns the devices of model's parameters."""
    kind = type(model).__name__
    if kind in _WRAPPERS or any(is_fully_sharded(type(module)) for module in model.modules()):
        raise ValueError(f"verify: model is sharded, or wrapped for several devices ({kind}), wanted the plain module")
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        raise TypeError(f"verify: batch is {type(batch).__name__}, wanted a mapping of keyword arguments to tensors")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("verify: no parameter of model has requires_grad, wanted one that trains")
    devices = list(dict.fromkeys(parameter.device for parameter in model.parameters()))
    if any(device.type == "meta" for device in devices):
        raise ValueError("verify: model has parameters on the meta device (offloaded, or not loaded)")
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"verify: batch has no tensor, wanted some among {list(batch)} (return_tensors='pt')")
    for name, tensor in tensors.items():
        if len(devices) == 1 and tensor.device != devices[0]:
            raise ValueError(f"verify: batch[{name!r}] is on {tensor.device}, wanted {devices[0]}, where model is")
    return devices


@contextmanager
def _as_it_was(devices: list[torch.device]) -> Iterator[Seed]:
    """Yields a function that seeds PyTorch's, Python's and NumPy's random generators. Within the context, autograd
    records gradients. The end of the context restores the generators' states."""
    cuda = [device for device in devices if device.type == "cuda"]
    numpy = sys.modules.get("numpy")
    python, numbers = random.getstate(), numpy.random.get_state() if numpy else None

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)
        for device in cuda:
            torch.cuda.default_generators[device.index].manual_seed(value)
        random.seed(value)
        if numpy:
            numpy.random.seed(value)

    try:
        with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
            yield seed
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numbers)


@contextmanager
def _watched(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Yields a set, which collects the autocast dtypes under which modules are called within the context.

    Within the context, a call of a copy of ``model`` raises ValueError if a closure in the copy calls a module of
    ``model`` itself.
    """
    names, casts = {module: name for name, module in model.named_modules()}, set()
    device = next(model.parameters()).device.type

    def refuse(module: nn.Module, args: Any) -> None:
        if module in names:
            raise ValueError(
                f"verify: a copy of model calls {names[module] or 'model'} itself, through a function that refers to "
                "model (a forward replaced by a closure), wanted a bound method"
            )

        if torch.is_autocast_enabled(device):
            casts.add(torch.get_autocast_dtype(device))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield casts
    finally:
        handle.remove()


def _compute_dtype(model: nn.Module, casts: set[torch.dtype]) -> torch.dtype:
    """Returns bfloat16 or float16 if a parameter, a ``compute_dtype`` or autocast has this dtype, else float32."""
    found = casts | {parameter.dtype for parameter in model.parameters()}
    found |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    return next((dtype for dtype in _NARROW if dtype in found), torch.float32)


# --- the three models -------------------------------------------------------------------------------------------------


def _fused_twin(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Returns an accelerated copy of ``model`` without dropout, and notes for the user.

    The copy of an accelerated model is accelerated again only if setting dropout to 0 changes which layers or blocks
    are fused.
    """
    made = without_dropout(twin(model))
    if not any(type(module) in STOCK for module in model.modules()):
        return accelerate(made), []
    given, kept = explain(model), explain(made)
    if [row.fused for row in (*given.rows, *given.blocks)] == [row.fused for row in (*kept.rows, *kept.blocks)]:
        return made, []
    accelerate(restore(made), blocks=any(row.fused for row in given.blocks))
    return made, ["the copy was accelerated anew, because the code of a block depends on its dropout's probability and "
                  "was not fused"]  # fmt: skip


def _measured(
    stock: nn.Module, batch: Any, wide: torch.dtype, narrow: torch.dtype, seed: Seed, casts: set[torch.dtype]
) -> tuple[Optional[nn.Module], Optional[Results], Optional[str]]:
    """Returns ``(yardstick, results, None)``, or ``(None, None, reason)`` if the yardstick can't run.

    The yardstick is a copy of the stock model in the dtype ``wide``. ``results`` are the results of a training step of
    the yardstick.
    """
    try:
        model = twin(stock, wide, narrow)
        if "_original_forward" in vars(model):  # the forward that an Accelerator has wrapped in autocast
            model.forward = model._original_forward
        elif casts and not torch.is_autocast_enabled(next(model.parameters()).device.type):
            raise ValueError("its forward switches autocast on")
        with without_autocast(model):
            return model, step(model, cast(batch, wide), seed), None
    except (ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        return None, None, f"the stock model does not run in {dtype_name(wide)} ({why})"
