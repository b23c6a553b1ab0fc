"""Runs a training step of a model, or each fused block alone, and measures how the results of two models differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..integrations.adapter_layers.base import STOCK
from ..integrations.model_blocks.loss import LanguageModel
from ..nn import NF4Linear, PackedLinear

GRADIENT = "gradient of "
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
_CHUNK = 1 << 24  # number of elements that are compared in float64 at a time

Results = dict[str, Tensor]
Seed = Callable[[int], None]


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Comparison of one tensor of a training step, or of the worst tensor of one block.

    The yardstick is the stock model in a wider dtype, see :func:`peft_ext.verify`.

    Attributes:
        name: "loss", "logits" or another output's name, or "gradient of " with the name of a parameter; for a block the
            module's name.
        kind: for a block, the block's class and the name of the tensor with the largest ``share``, or, if the fused
            block raised an error, the block's class and the error's class; otherwise "".
        error, stock_error: ``‖x - yardstick‖ / ‖yardstick‖`` with x from the accelerated or the stock model. ``error``
            and ``stock_error`` are None if the stock model could not run in the wider dtype. An error is infinity if x
            is not finite where the yardstick is finite.
        difference: ``‖accelerated - stock‖ / ‖stock‖``.
        limit: largest allowed value of ``error``, or of ``difference`` without a yardstick.
    """

    name: str
    kind: str
    error: Optional[float]
    stock_error: Optional[float]
    difference: float
    limit: float

    @property
    def share(self) -> float:
        """Returns ``error``, or without a yardstick ``difference``, divided by ``limit``. Returns 0 if the dividend
        (``error`` or ``difference``) is 0 or equals ``stock_error``."""
        error = self.difference if self.error is None else self.error
        return 0.0 if error in (0, self.stock_error) else error / self.limit

    @property
    def ok(self) -> bool:
        return self.share <= 1.0


def compared(
    name: str, kind: str, found: Optional[Tensor], right: Optional[Tensor], exact: Optional[Results],
    dtype: torch.dtype, what: str = "",
) -> Compared:  # fmt: skip
    """Compares ``found``, a tensor of the accelerated model, with ``right``, the same tensor of the stock model, and
    both with the tensor ``what`` (by default ``name``) of ``exact``, the results of the yardstick. None for ``found``
    or ``right`` stands for zeros."""
    what, eps, difference = what or name, torch.finfo(dtype).eps, _error(found, right)
    if exact is None:
        return Compared(name, kind, None, None, difference, max(16 * eps, 1e-4))
    error, theirs = _error(found, exact.get(what)), _error(right, exact.get(what))
    few = (right if found is None else found).numel() <= 16  # the error of few elements depends much on chance
    floor = max(eps if few else eps / 2, 4e-6)
    return Compared(name, kind, error, theirs, difference, (3 if what.startswith(GRADIENT) else 2) * theirs + floor)


def _error(found: Optional[Tensor], wanted: Optional[Tensor]) -> float:
    """Returns ``‖found - wanted‖ / ‖wanted‖``, or infinity if the quotient is NaN or the shapes differ.

    None stands for a tensor of zeros. At the same place of the two tensors, two infinities of one sign are equal, and
    two NaNs are equal.
    """
    if found is None and wanted is None:
        return 0.0
    found = torch.zeros_like(wanted) if found is None else found
    wanted = torch.zeros_like(found) if wanted is None else wanted
    if found.shape != wanted.shape:
        return math.inf
    moved = size = 0.0
    for a, b in zip(found.reshape(-1).split(_CHUNK), wanted.reshape(-1).split(_CHUNK), strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        moved += (a.double() - b.double()).masked_fill_(same, 0.0).square().sum().item()
        size += b.double().square().sum().item()
    if moved == 0:
        return 0.0
    share = math.sqrt(moved / size) if size > 0 else math.inf
    return math.inf if math.isnan(share) else share


# --- a step -----------------------------------------------------------------------------------------------------------


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in {"cpu", *(parameter.device.type for parameter in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a copy of ``value`` with ``change`` applied to every tensor in its mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    return type(value)(_mapped(one, change) for one in value) if type(value) in (list, tuple) else value


def cast(value: Any, dtype: torch.dtype) -> Any:
    return _mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _call(model: nn.Module, batch: Any, seed: Seed, value: int = 0) -> tuple[Optional[Tensor], Results]:
    """Runs a forward, and returns the loss and the other outputs. The loss that ``_call`` returns is None if the
    forward returns no loss. The other outputs are the logits alone, or, if the forward returns no logits, all float
    outputs but the loss."""
    seed(value)
    output = model(**_mapped(batch, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad)))
    named: dict[str, Any] = {}
    if isinstance(output, Tensor):
        named = {"output": output}
    elif isinstance(output, Mapping):
        named = {**output, "logits": getattr(output, "logits", output.get("logits"))}
    elif isinstance(output, (tuple, list)):
        named = {f"output {index}": one for index, one in enumerate(output)}
        if isinstance(first := named.get("output 0"), Tensor) and first.dim() == 0:
            named = {"loss": first, **named}
            del named["output 0"]
    found = {name: one for name, one in named.items() if isinstance(one, Tensor) and one.is_floating_point()}
    if not found:
        raise ValueError(
            f"verify: model returned {type(output).__name__} without float tensors, wanted a loss or others"
        )
    loss = found.pop("loss", None)
    return loss, {"logits": found["logits"]} if "logits" in found else found


def draws(model: nn.Module, batch: Any, seed: Seed) -> bool:
    """Returns whether the results of two forwards under two seeds have a relative difference of more than 1e-6."""
    with torch.no_grad():
        (loss, first), (again, second) = (_call(model, batch, seed, value) for value in (0, 1))
    pairs = [(loss, again), *((value, second.get(name)) for name, value in first.items())]
    return any(_error(b, a) > 1e-6 for a, b in pairs)


def step(model: nn.Module, batch: Any, seed: Seed) -> Results:
    """Runs one forward and backward of ``model``. Returns a dict, by name, of the loss, of the outputs, and of the
    gradients of the trained parameters."""
    loss, outputs = _call(model, batch, seed)
    # The outputs are copied without their autograd graph, and are released before the backward.
    with torch.no_grad():
        found = {name: value.detach().clone() for name, value in outputs.items()}
    total = _weighed(outputs.values()) if loss is None else loss.sum()
    if not total.requires_grad:
        raise ValueError("verify: no trained parameter of model takes part in the loss, which has no gradient")
    del outputs
    total.backward()
    found = found if loss is None else {"loss": loss.detach(), **found}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[GRADIENT + name], parameter.grad = parameter.grad, None
    return found


def _weighed(values: Iterable[Tensor]) -> Any:
    """Returns the sum of the values times fixed random weights. The weights are bfloat16 numbers, so that they are
    equal for values of every dtype."""
    total: Any = 0
    for value in values:
        generator = torch.Generator(value.device).manual_seed(0)
        weights = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32).bfloat16()
        total = total + (value * weights.to(value.dtype)).sum(dtype=torch.promote_types(value.dtype, torch.float32))
    return total


# --- each block alone -------------------------------------------------------------------------------------------------


def blocks_alone(
    fused: nn.Module, stock: nn.Module, yardstick: Optional[nn.Module], batch: Any, wide: torch.dtype,
    narrow: torch.dtype, seed: Seed,
) -> list[Compared]:  # fmt: skip
    """Compares each fused module and each packed linear layer with its stock module, if the stock module can be called
    alone. Returns a list with one :class:`Compared` for each compared module.

    The stock module, the fused module and the yardstick's module all run on the input that the stock module gets in a
    forward of ``stock``.
    """
    found: dict[str, Compared] = {}
    inside = False

    def compare(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        ours, exact = fused.get_submodule(name), None
        kind = type(ours).__name__
        try:
            right = _alone(module, args, kwargs)
            if yardstick is not None:
                with without_autocast(yardstick):
                    exact = _alone(yardstick.get_submodule(name), cast(args, wide), cast(kwargs, wide))
        except _REFUSALS:
            # The stock module can't be called alone, or can't be called a second time, and is not compared.
            return
        try:
            mine = _alone(ours, args, kwargs)
        except _REFUSALS as error:
            found[name] = Compared(name, f"{kind}, raised {type(error).__name__}", math.inf, 0.0, math.inf, 1.0)
            return
        for what in {**right, **mine}:
            row = compared(name, f"{kind}, {what}", mine.get(what), right.get(what), exact, narrow, what)
            if name not in found or row.share > found[name].share:
                found[name] = row

    def hook(name: str) -> Callable[..., None]:
        def run(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal inside
            if inside:
                return
            inside = True
            try:
                compare(name, module, args, kwargs)
            finally:
                inside = False

        return run

    fused_parts = ((name, part) for name, part in fused.named_modules() if not isinstance(part, LanguageModel))
    names = [name for name, part in fused_parts if type(part) in STOCK or isinstance(part, (NF4Linear, PackedLinear))]
    for name in names:
        # A base_layer is compared as a part of the adapter layer that wraps the base_layer.
        if not (name.endswith(".base_layer") and name.removesuffix(".base_layer") in names):
            stock.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
    with torch.no_grad():
        _call(stock, batch, seed)
    return [found[name] for name in names if name in found]


def _alone(module: nn.Module, args: Any, kwargs: Any) -> Results:
    """Runs one module of a model alone, forward and backward. Returns a dict, by name, of the module's outputs that
    require a gradient, and of the gradients of the module's inputs and trained parameters."""
    leaves: dict[str, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point():
            leaves[f"input {len(leaves)}"] = tensor.requires_grad_()
        return tensor

    outputs: list[Tensor] = []
    with torch.enable_grad():
        output = module(*_mapped(args, leaf), **_mapped(kwargs, leaf))
        _mapped(output, lambda tensor: outputs.append(tensor) or tensor)
        outputs = [value for value in outputs if value.is_floating_point() and value.requires_grad]
        leaves |= {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        grads = torch.autograd.grad(_weighed(outputs), list(leaves.values()), allow_unused=True)
    found = {f"output {index}": value.detach() for index, value in enumerate(outputs)}
    return found | {GRADIENT + name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
