"""Whether an accelerated model computes what the stock model does, on a user's own model and batch.

    ‖accelerated - yardstick‖  ≤  factor ‖stock - yardstick‖ + floor ‖yardstick‖

for the loss, the logits and the gradient of each trained parameter. The yardstick is the stock model in float32, or in
float64 where the model itself computes in float32. All three are copies over the model's own weights, see
:mod:`.twins`: the model that was given is never called.
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

__all__ = ["Compared", "Verification", "verify"]

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_NARROW = (torch.bfloat16, torch.float16)


# --- what is reported -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What :func:`peft_ext.verify` found. Prints as a short table: outputs, the five worst gradients, the worst block.

    Attributes:
        rows: the loss, the outputs and each trained gradient.
        blocks: each fused layer or block alone.
        about: the model's class, dtype and mode, and the yardstick. notes: sentences on what limits the comparison.
    """

    rows: list[Compared]
    blocks: list[Compared]
    about: str
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row and every block is within its limit."""
        return all(row.ok for row in (*self.rows, *self.blocks))

    @property
    def worst_block(self) -> Optional[Compared]:
        """Of the blocks over their limit the innermost that is worst; where there is none, the closest to its limit."""
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

    An output is right where its error against the yardstick is at most twice the stock model's own error, a gradient
    where it is at most three times that (of some hundred gradients of a right model one is 2.5 times as far off), plus
    a floor: half of the dtype's eps, one eps for a tensor of 16 elements or fewer (the loss is one), and never less
    than 4e-6. The yardstick is the stock model in float32; where the model computes in float32, in float64. 4-bit
    weights are dequantized for it to the values that the stock layer multiplies with. Where it can't run (quantized
    otherwise than NF4, code that takes no float64, too little memory; ``notes`` has the reason), the difference to
    stock has to be at most 16 eps, or 1e-4.

    Each fused layer and block is also compared alone, by the same rule: its stock and its fused forward run on the
    input that it has in the stock model. ``worst_block`` is the one to look at.

    Every dropout is off, also those of attention and of adapters: results under two masks can't be compared. Where two
    stock forwards under two seeds still differ, the model draws random numbers that can't be switched off, and
    evaluation mode is compared, with gradients. A model in training mode is compared as it is, one in evaluation mode
    as ``train()`` makes it. Autocast that is on counts for both models, and not for the yardstick.

    Nothing of ``model`` and ``batch`` changes, also where an error is raised: not weights, buffers, gradients, modes,
    hooks or classes, and no generator of random numbers. The modules' hooks run in the copies, those of parameters do
    not.

    Memory: a stock training step in the yardstick's dtype; the weights in that dtype, but for NF4 layers, which are
    dequantized one at a time (a mixture's NF4 experts are dequantized whole, twice); the logits and the trained
    gradients three times. Time: about ten stock training steps, fifteen where the base is in NF4.

    Args:
        model: a PeftModel, or any module that :func:`accelerate` takes. Where it is accelerated, it is compared as it
            stands, else as ``accelerate(model)`` would make it. Of a compiled model the module inside is compared.
        batch: keyword arguments of the model's forward, as a DataLoader gives them, on the model's device. Without
            labels, where the output has no loss, the loss is the sum of the outputs times fixed random numbers.

    Raises: TypeError where model is no nn.Module, or batch no mapping with strings as keys. ValueError where batch has
    no tensor or one on another device; where no parameter of model trains; where model is sharded or wrapped for
    several devices, is on the meta device, can't be copied, holds a closure that calls the model itself where a copy
    should be called, returns no float tensor, or draws random numbers in evaluation mode, too. What the model's own
    forward raises is raised as it is.
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
    """Returns the devices of model's parameters. Raises TypeError and ValueError."""
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
    """Yields what seeds PyTorch's, Python's and NumPy's generators, whose states are put back behind the block."""
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
    """Yields the dtypes of the autocast that modules are called under within the block.

    Raises ValueError there where a module of ``model`` is called, by a closure that a copy shares.
    """
    names, casts = {module: name for name, module in model.named_modules()}, set()
    device = next(model.parameters()).device.type

    def refuse(module: nn.Module, args: Any) -> None:
        if module in names:
            raise ValueError(
                f"verify: a copy of model calls {names[module] or 'model'} itself, by a function that holds it (a "
                "forward replaced by a closure), wanted a bound method"
            )

        if torch.is_autocast_enabled(device):
            casts.add(torch.get_autocast_dtype(device))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield casts
    finally:
        handle.remove()


def _compute_dtype(model: nn.Module, casts: set[torch.dtype]) -> torch.dtype:
    """Returns the narrowest float dtype that the model computes in."""
    found = casts | {parameter.dtype for parameter in model.parameters()}
    found |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    return next((dtype for dtype in _NARROW if dtype in found), torch.float32)


# --- the three models -------------------------------------------------------------------------------------------------


def _fused_twin(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Returns a copy without dropout, accelerated as the model is, else as ``accelerate`` does, and notes on it."""
    made = without_dropout(twin(model))
    if not any(type(module) in STOCK for module in model.modules()):
        return accelerate(made), []
    given, kept = explain(model), explain(made)
    if [row.fused for row in (*given.rows, *given.blocks)] == [row.fused for row in (*kept.rows, *kept.blocks)]:
        return made, []
    accelerate(restore(made), blocks=any(row.fused for row in given.blocks))
    return made, ["the copy was accelerated anew: a block that looks at its dropout's probability had fallen to stock"]


def _measured(
    stock: nn.Module, batch: Any, wide: torch.dtype, narrow: torch.dtype, seed: Seed, casts: set[torch.dtype]
) -> tuple[Optional[nn.Module], Optional[Results], Optional[str]]:
    """Returns the yardstick and its step; or why there is none."""
    try:
        model = twin(stock, wide, narrow)
        if "_original_forward" in vars(model):  # of an Accelerator, which wraps the forward in autocast
            model.forward = model._original_forward
        elif casts and not torch.is_autocast_enabled(next(model.parameters()).device.type):
            raise ValueError("its forward switches autocast on")
        with without_autocast(model):
            return model, step(model, cast(batch, wide), seed), None
    except (ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        return None, None, f"the stock model does not run in {dtype_name(wide)} ({why})"
