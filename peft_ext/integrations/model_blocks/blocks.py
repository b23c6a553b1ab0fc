"""Norms, MLPs, dropouts and parts of attentions on fused operators: known by their structure, and tried, or nn's own.

    RMSNorm, LayerNorm   saved: x and one or two numbers a row, no float32 copy of x
    dropout              a CPU's: the mask is drawn in a vector's lanes, and again in the backward
    MLP                  down(act(gate x) ∘ up x), down(act(up x)): see :mod:`.mlp`
    attention            layers of one input together, rotary positions in one pass, softmax(q kᵀ) v without the scores;
                         the rest is the model's own code

Which class is which is found by trial, see :mod:`.block`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from ..adapter_layers import siblings
from ..adapter_layers.base import STOCK, give_back, is_fully_sharded
from ..adapter_layers.lora import LowRank
from ..adapter_layers.reasons import accepts_input, kernel_reason, replaced_on_instance, tensor_reason
from . import attention, rotary
from .block import Block, are_alike, class_of, stub, tried_as, with_gradients
from .held import HELD, held_by, holds_others, lasts
from .mlp import Mlp, mlp_formula
from .names import inner_function, named, with_names
from .reads import looks_at_its_type, reached_by

__all__ = ["clear_blocks", "fuse_blocks", "plain_blocks"]

# What a trial of a class of the model's gave: its fused class, None where it is another function.
_TRIED: weakref.WeakKeyDictionary[type, dict[tuple, Optional[type]]] = weakref.WeakKeyDictionary()
_COPIED_BY = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
_NEVER = type("_Never", (), {})  # stands for what was not tried


# --- norms ------------------------------------------------------------------------------------------------------------


class Norm(Block):
    """A norm over the last dimension."""

    affine: tuple[str, ...] = ()  # parameters beside the weight

    def block_reason(self) -> Optional[str]:
        if reason := self.replaced():
            return reason
        for name in ("weight", *self.affine):
            if name not in self._parameters:
                return f"its {name} is no parameter of its own (torch.nn.utils.prune and parametrize make it of others)"
        for name, value in self._parameters.items():
            if value is not None and (reason := tensor_reason(f"its {name}", value, 1)):
                return reason
        if type(self._eps()) not in (int, float):
            return f"its eps is a {type(self._eps()).__name__}, wanted a number"
        weight = self._parameters["weight"]
        return "it has no weight" if weight is None else kernel_reason(type(self).operator, weight.device.type)

    def _eps(self) -> Any:
        return self.eps


class RMSNorm(Norm):
    """``formula``: the attribute that eps is in, the operator's offset and round_before_weight, and whether it is the
    operator's formula for a weight of another dtype than x's, too."""

    kind, operator = "RMSNorm", "rms_norm"

    def block_reason(self) -> Optional[str]:
        if holds_others(self, self.stock_class, but=self.formula[0]):
            return "it holds another number, name, function or layer than when it was tried"
        return super().block_reason()

    def _eps(self) -> Any:
        return getattr(self, self.formula[0])

    def _fused(self, x: Tensor) -> Tensor:
        _, offset, rounds, mixes = self.formula
        weight = self._parameters["weight"]
        if not mixes and x.dtype is not weight.dtype:
            return self.stock_class.forward(self, x)
        eps = self._eps()
        if x.is_contiguous():
            return ops.rms_norm(x, weight, eps, offset=offset, round_before_weight=rounds)
        # The result lies in memory as x does, as that of a formula of elements.
        order = sorted(range(x.dim()), key=lambda dim: (dim == x.dim() - 1, -x.stride(dim)))
        y = ops.rms_norm(x.permute(order), weight, eps, offset=offset, round_before_weight=rounds)
        return y.permute([order.index(dim) for dim in range(x.dim())])


class LayerNorm(Norm):
    """nn.LayerNorm over the last dimension. Autocast, which takes it in float32, is PyTorch's, and so are few elements
    on a CPU, where its shorter call is the faster one."""

    kind, operator, affine = "LayerNorm", "layer_norm", ("bias",)
    least = {torch.bfloat16: 1 << 17, torch.float16: 1 << 17, torch.float32: 1 << 20}  # elements that are not few

    def block_reason(self) -> Optional[str]:
        weight = self._parameters.get("weight")
        if weight is None or len(self.normalized_shape) != 1:
            return "it has no weight of its own, or is over several dimensions"
        return "autocast takes it in float32" if autocast_dtype(weight) else super().block_reason()

    def _fused(self, x: Tensor) -> Tensor:
        if x.dtype is not self._parameters["weight"].dtype or x.shape[-1:] != self.normalized_shape:
            return nn.LayerNorm.forward(self, x)  # PyTorch's error, or what it makes of the two
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() < self.least.get(x.dtype, 0):
            return nn.LayerNorm.forward(self, x)
        return ops.layer_norm(x, self._parameters["weight"], self._parameters["bias"], self.eps)


def _rms_formula(module: nn.Module) -> Optional[tuple]:
    """Returns the formula of a module that looks like an RMSNorm, by trial; None: it is another function."""
    weight = module._parameters.get("weight")
    names = [name for name in ("variance_epsilon", "eps", "epsilon") if isinstance(getattr(module, name, None), float)]
    if list(module._parameters) != ["weight"] or module._modules or len(names) != 1 or weight is None:
        return None
    if weight.dim() != 1 or module._buffers or len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    k, generator = 24, torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in ((3, 5, k), (k,)))
    x[0, 0] *= 1e-3  # where eps counts
    trial, before = stub(module), held_by(module)
    wide, narrow = torch.float32, torch.bfloat16

    def tried(forward: Callable, norm: Any, of_x: torch.dtype, of_weight: torch.dtype) -> list[Tensor]:
        trial._parameters["weight"] = nn.Parameter(w.to(of_weight))
        return with_gradients(forward, norm, x.to(of_x))

    wanted: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = {}
    for dtypes in itertools.product((wide, narrow), repeat=2):
        try:
            wanted[dtypes] = tried(type(module).forward, trial, *dtypes)
        except Exception:  # whatever another function raises
            return None
    if not _is_one_function(type(module).forward, trial, x):
        return None
    for offset, rounds in itertools.product((0.0, 1.0), (True, False)):
        fused = tried_as(trial, RMSNorm, (names[0], offset, rounds, True))
        alike = {}
        for dtypes, values in wanted.items():
            found = tried(type(fused)._fused, fused, *dtypes)
            if narrow not in dtypes:
                alike[dtypes] = are_alike(found, values)
            elif dtypes[0] is narrow:  # where it rounds is the formula: the bits of most results have to be the same
                same = (found[0] == values[0]).double().mean() > 0.97
                alike[dtypes] = found[0].dtype is values[0].dtype and bool(same)
            else:
                alike[dtypes] = are_alike(found[:1], values[:1])
        if alike[wide, wide] and alike[narrow, narrow] and held_by(trial) == before:
            return names[0], offset, rounds, all(alike.values())
    return None


def _is_one_function(forward: Callable[..., Tensor], trial: Any, x: Tensor) -> bool:
    """Returns whether a norm computes the same in training and evaluation, with and without a gradient, of any rank."""
    trial._parameters["weight"] = nn.Parameter(torch.linspace(0.5, 2, x.shape[-1], dtype=torch.float32))
    x, found, mode = x.detach(), [], trial.training
    for trial.training, grads in itertools.product((True, False), repeat=2):
        for shape in (x.shape, (-1, x.shape[-1]), (1, *x.shape)):
            with torch.set_grad_enabled(grads), torch.autocast("cpu", enabled=False):
                try:
                    found.append(forward(trial, x.view(shape)).detach().view(x.shape))
                except Exception:  # whatever another function raises
                    return False
    trial.training = mode
    return all(torch.allclose(value, found[0], rtol=1e-6, atol=1e-6) for value in found)


# --- dropout ----------------------------------------------------------------------------------------------------------


class Dropout(Block):
    """nn.Dropout, on a CPU. Those of adapters are the adapter layers' own."""

    kind = "dropout"

    def block_reason(self) -> Optional[str]:
        if reason := self.replaced():
            return reason
        if self.inplace or not 0.0 <= self.p < 1.0:
            return "it drops in place, or all"
        return kernel_reason(self.kind, "cpu")

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(self, Dropout):
            return type(self).forward(self, input)
        acts = self.training and self.p > 0.0 and not torch.compiler.is_compiling() and accepts_input(input)
        # PyTorch's result has the input's strides.
        if not acts or input.device.type != "cpu" or not input.is_contiguous() or self.block_reason() is not None:
            return self.stock_class.forward(self, input)
        return ops.dropout(input, self.p)


def dropouts_of_adapters(model: nn.Module) -> set[nn.Module]:
    """Returns the dropouts of LoRA's layers, which read their probabilities."""
    held = (getattr(module, "lora_dropout", None) for module in model.modules())
    return {dropout for children in held if isinstance(children, nn.Module) for dropout in children.modules()}


# --- within a module's own forward ------------------------------------------------------------------------------------


class Forward(Block):
    """A module's own forward, of which some parts may be others: children that are adapter layers and get one tensor
    are computed together (:mod:`.siblings`), rotary positions are taken in one pass (:mod:`.rotary`), and attention is
    the operator (:mod:`.attention`).

    ``formula``: groups of the children's names, the function that rotates, or None, and whether it is an attention.
    """

    @classmethod
    def prepare(cls, stock: type) -> None:
        attention.asks(stock.forward)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The function that rotates is found, and tried, where the class is made again.
        _, (mixin, stock, (groups, function, attends)), *state = super().__reduce_ex__(protocol)
        return _new_forward, (stock, groups, function is not None, attends), *state

    def parts(self) -> Iterator[tuple[str, Optional[str]]]:
        groups, function, attends = self.formula
        replaced = "its forward was replaced on the instance" if replaced_on_instance(self) else None
        if groups:
            yield _JOINT, replaced or self._joint_reason(groups)
        if function is not None:
            yield _ROTARY, replaced or self._rotary_reason(function)
        if attends:
            yield _ATTENTION, replaced or attention.reason(self, self.stock_class.forward)

    def _joint_reason(self, groups: tuple[tuple[str, ...], ...]) -> Optional[str]:
        for names in groups:
            layers = [self._modules.get(name) for name in names]
            joint = [layer for layer in layers if isinstance(layer, LowRank) and layer.joint_state() is not None]
            if len(joint) > 1:
                return kernel_reason("lora_linears", next(joint[0].parameters()).device.type)
        return f"no two of {', '.join(groups[0])} have an adapter that can be computed with another's"

    def _rotary_reason(self, function: Callable) -> Optional[str]:
        if named(self.stock_class.forward, rotary.NAME) is not function:
            return f"{rotary.NAME} was replaced"
        return kernel_reason("rotary_embedding", next((p.device.type for p in self.parameters()), "cpu"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Forward):
            return type(self).forward(self, *args, **kwargs)
        run = self.stock_class.forward
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        groups, function, attends = self.formula
        if function is not None and named(run, rotary.NAME) is not function:
            function = None
        run = _with_parts(run, function, attends) or run
        if not groups:
            return run(self, *args, **kwargs)
        with siblings.together(self, groups):
            return run(self, *args, **kwargs)


def _new_forward(stock: type, groups: tuple, rotates: bool, attends: bool) -> Forward:
    function = rotary.rotary_function(stock.forward) if rotates else None
    kind = class_of(Forward, stock, (groups, function, attends))
    kind.prepare(stock)
    return kind.__new__(kind)


_JOINT, _ROTARY, _ATTENTION = "projections of one input", "rotary positions", "attention"


@functools.cache
def _with_others(forward: Callable, function: Optional[Callable], attends: bool) -> Optional[Callable]:
    """Returns what :func:`_with_parts` does of a forward with others."""
    others: list[tuple[str, Any]] = []
    if function is not None:
        others.append((rotary.NAME, rotary.fused(function)))
    if attends and (inner := inner_function(forward)) is not None:
        others.append((attention.NAME, attention.interfaces(inner)))
    return with_names(forward, tuple(others)) if others else forward


def _with_parts(forward: Callable, function: Optional[Callable], attends: bool) -> Optional[Callable]:
    """Returns a forward of the same code in which these parts are others; None: it can't be made."""
    return _with_others(forward, function, attends) if function or attends else forward


def _forward_class(module: nn.Module) -> Optional[type]:
    """Returns the class of a module in whose forward a part can be another; None: there is none."""
    stock = module.stock_class if isinstance(module, Forward) else type(module)
    if looks_at_its_type(stock.forward):
        return None
    groups = tuple(names for names in siblings.groups_in(stock.forward)
                   if sum(isinstance(module._modules.get(name), LowRank) for name in names) > 1)  # fmt: skip
    function, attends = rotary.rotary_function(stock.forward), attention.asks(stock.forward)
    if _with_parts(stock.forward, function, attends) is None:
        function, attends = None, False
    formula = (groups, function, attends)
    return class_of(Forward, stock, formula) if groups or function is not None or attends else None


# --- in a model -------------------------------------------------------------------------------------------------------


def _settings(module: nn.Module) -> Optional[tuple]:
    """Returns what a module holds, and its configuration's values: its forward may depend on it; None: on a tensor."""
    config = vars(module).get("config")
    held = held_by(module)
    return None if held is None else (tuple(held.items()), repr(getattr(config, "__dict__", config)))


def _fused_class(module: nn.Module) -> Optional[type]:
    """Returns the fused class of a module, by trial, once for each class; None: its own forward stays."""
    stock = type(module)
    if stock in STOCK and issubclass(stock, Forward):  # of whose children others may have an adapter now
        return _forward_class(module) or module.stock_class
    if stock is nn.LayerNorm:
        return class_of(LayerNorm, stock, ())
    if stock is nn.Dropout:
        return class_of(Dropout, stock, ()) if 0.0 < module.p < 1.0 and not module.inplace else None
    if stock.__module__.startswith(("torch.", "peft.", "peft_ext.", "bitsandbytes.")) or stock in STOCK:
        return None
    if is_fully_sharded(stock):
        return None  # whose forward gathers parameters first
    if any(getattr(stock, name, None) is not getattr(nn.Module, name, None) for name in _COPIED_BY):
        return None  # whose copies are made in its own way
    act = tuple(repr(getattr(module, name, None)) for name in ("act_fn", "activation_fn", "act"))
    settings, reached = _settings(module), reached_by(stock.forward, stock)
    if settings is None or reached is None or looks_at_its_type(stock.forward):
        return _forward_class(module)
    key = (stock.forward, act, tuple(module._parameters), settings, tuple(one[1:] for one in reached))
    tried = _TRIED.setdefault(stock, {})
    if (found := tried.get(key, _NEVER)) is _NEVER:
        found = None
        # Whatever device and mode the model is accelerated under, and no draw of the caller's generator.
        with torch.device("cpu"), torch.inference_mode(False), torch.random.fork_rng([]):
            if (formula := _rms_formula(module)) is not None:
                found = class_of(RMSNorm, stock, formula)
            elif (formula := mlp_formula(module)) is not None:
                found = class_of(Mlp, stock, formula)
        if found is not None:
            found.stock_forward, found.watched = stock.forward, reached
        if lasts(settings):
            tried[key] = found
    return found or _forward_class(module)


def block_parts(model: nn.Module) -> Iterator[tuple[str, str, Optional[str]]]:
    """Yields the names of ``model``'s blocks, what is fused of each, or could be, and why it is not."""
    skipped = dropouts_of_adapters(model)
    for name, module in model.named_modules():
        if module not in skipped:
            for kind, reason in _parts_of(module):
                if reason is None and isinstance(module, Dropout) and (device := _device_around(model, name)) != "cpu":
                    reason = f"it is on {device}, where PyTorch's own is used"
                yield name, kind, reason


def _device_around(model: nn.Module, name: str) -> str:
    """Returns the type of the device of the first parameter around a module that has none."""
    while name:
        name = name.rpartition(".")[0]
        if (parameter := next(model.get_submodule(name).parameters(), None)) is not None:
            return parameter.device.type
    return "cpu"


def _parts_of(module: nn.Module) -> Iterator[tuple[str, Optional[str]]]:
    if isinstance(module, Block):
        yield from module.parts()
    elif (kind := _fused_class(module)) is not None:
        names = [kind.kind]
        if issubclass(kind, Forward):
            groups, function, attends = kind.formula
            names = [_JOINT] * bool(groups) + [_ROTARY] * (function is not None)
            names += [_ATTENTION] * attends
        for name in names:
            yield name, "accelerate(model) was not called on it, or with blocks=False"


def fuse_blocks(model: nn.Module) -> None:
    """Gives the blocks of ``model`` that are known, and were tried, their fused classes."""
    skipped = dropouts_of_adapters(model)
    for module in model.modules():
        if module not in skipped and (kind := _fused_class(module)) is not None:
            module.__class__ = kind
            if isinstance(module, (Mlp, RMSNorm)):
                module.__dict__[HELD] = held_by(module)


def plain_blocks(model: nn.Module) -> None:
    """Undoes :func:`fuse_blocks`."""
    for module in model.modules():
        if isinstance(module, Block):
            give_back(module)
    clear_blocks(model)


def clear_blocks(model: nn.Module) -> None:
    """Takes away what :func:`fuse_blocks` leaves on modules beside their classes."""
    for module in model.modules():
        module.__dict__.pop(HELD, None)
