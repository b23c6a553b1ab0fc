"""Norms, MLPs, dropouts and parts of attentions on fused operators: known by their structure, and tried, or nn's own.

    RMSNorm, LayerNorm   saved: x and one or two numbers a row, no float32 copy of x
    dropout              a CPU's: the mask is drawn in a vector's lanes, and again in the backward
    MLP                  down(act(gate x) ∘ up x), down(act(up x)): the activation in one pass; saved: gate and up. What
                         ``down`` saves, act(gate) ∘ up, is computed again in the backward
    attention            layers of one input together, rotary positions in one pass, softmax(q kᵀ) v without the scores;
                         the rest is the model's own code

A block's class is a subclass of the model's own, made once for what a trial of that class found: its formula, tried on
random numbers with weights of the trial's own. A class whose forward computes anything else keeps it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from . import attention, rotary, siblings
from .base import STOCK, is_fully_sharded
from .lora import LowRank
from .names import inner_function, named, with_names
from .reasons import accepts_input, hooked, kernel_reason, tensor_reason

__all__ = ["Block", "fuse_blocks", "plain_blocks"]

# What a trial of a class of the model's gave: its fused class, None where it is another function.
_TRIED: dict[tuple, Optional[type]] = {}
_TOLERANCE = 1e-5  # of a trial in float32, of the largest value


class Block:
    """A module of a model on fused operators. A subclass gives ``formula``, ``block_reason`` and ``_fused``, or its own
    ``parts`` and ``forward``."""

    stock_class: type
    formula: tuple = ()
    kind = ""

    def block_reason(self) -> Optional[str]:
        """Returns why the module's own forward runs."""
        raise NotImplementedError

    def parts(self) -> Iterator[tuple[str, Optional[str]]]:
        """Yields what is fused of the module, and why it is not now."""
        yield self.kind, self.block_reason()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and accepts_input(args[0])
        return self._fused(*args) if alone and self.block_reason() is None else super().forward(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class was made at run time: it is made again from the model's.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).__mro__[1], self.stock_class, self.formula), *state


def _new(mixin: type, stock: type, formula: tuple) -> Block:
    kind = _class(mixin, stock, formula)
    if mixin is Forward:
        attention.asks(stock.forward)  # in a process that has tried nothing yet
    return kind.__new__(kind)


@functools.cache
def _class(mixin: type, stock: type, formula: tuple) -> type:
    """Returns the class of ``stock`` on fused operators by ``formula``, made once."""
    held = {"stock_class": stock, "formula": formula, "__doc__": stock.__doc__, "__module__": stock.__module__}
    made = type(stock.__name__, (mixin, stock), held)
    STOCK[made] = stock
    return made


# --- norms ------------------------------------------------------------------------------------------------------------


class Norm(Block):
    """A norm over the last dimension."""

    def block_reason(self) -> Optional[str]:
        if "forward" in self.__dict__:
            return "its forward was replaced on the instance"
        for name, value in self._parameters.items():
            if value is not None and (reason := tensor_reason(f"its {name}", value, 1)):
                return reason
        weight = self._parameters["weight"]
        return None if weight is None else kernel_reason(type(self).operator, weight.device.type)


class RMSNorm(Norm):
    """``formula``: the attribute that eps is in, the operator's offset and round_before_weight, and whether it is the
    operator's formula for a weight of another dtype than x's, too."""

    kind, operator = "RMSNorm", "rms_norm"

    def _fused(self, x: Tensor) -> Tensor:
        eps, offset, rounds, mixes = self.formula
        weight = self._parameters["weight"]
        if not mixes and x.dtype is not weight.dtype:
            return self.stock_class.forward(self, x)
        return ops.rms_norm(x, weight, getattr(self, eps), offset=offset, round_before_weight=rounds)


class LayerNorm(Norm):
    """nn.LayerNorm over the last dimension; autocast, which takes it in float32, is PyTorch's."""

    kind, operator = "LayerNorm", "layer_norm"

    def block_reason(self) -> Optional[str]:
        weight = self._parameters["weight"]
        if weight is None or len(self.normalized_shape) != 1:
            return "it has no weight, or is over several dimensions"
        return "autocast takes it in float32" if autocast_dtype(weight) else super().block_reason()

    def _fused(self, x: Tensor) -> Tensor:
        if x.dtype is not self._parameters["weight"].dtype or x.shape[-1:] != self.normalized_shape:
            return nn.LayerNorm.forward(self, x)  # PyTorch's error, or what it makes of the two
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
    trial = _stub(module)
    wide, narrow = torch.float32, torch.bfloat16

    def tried(forward: Callable, norm: Any, of_x: torch.dtype, of_weight: torch.dtype) -> list[Tensor]:
        trial._parameters["weight"] = nn.Parameter(w.to(of_weight))
        return _with_gradients(forward, norm, x.to(of_x))

    wanted: dict[tuple[torch.dtype, torch.dtype], list[Tensor]] = {}
    for dtypes in itertools.product((wide, narrow), repeat=2):
        try:
            wanted[dtypes] = tried(type(module).forward, trial, *dtypes)
        except Exception:  # whatever another function raises
            return None
    for offset, rounds in itertools.product((0.0, 1.0), (True, False)):
        fused = _as(trial, RMSNorm, (names[0], offset, rounds, True))
        alike = {}
        for dtypes, values in wanted.items():
            found = tried(type(fused)._fused, fused, *dtypes)
            if narrow not in dtypes:
                alike[dtypes] = _alike(found, values)
            elif dtypes[0] is narrow:  # where it rounds is the formula: the bits of most results have to be the same
                same = (found[0] == values[0]).double().mean() > 0.97
                alike[dtypes] = found[0].dtype is values[0].dtype and bool(same)
            else:
                alike[dtypes] = _alike(found[:1], values[:1])
        if alike[wide, wide] and alike[narrow, narrow]:
            return names[0], offset, rounds, all(alike.values())
    return None


# --- dropout ----------------------------------------------------------------------------------------------------------


class Dropout(Block):
    """nn.Dropout, on a CPU. Those of adapters are the adapter layers' own."""

    kind = "dropout"

    def block_reason(self) -> Optional[str]:
        if "forward" in self.__dict__:
            return "its forward was replaced on the instance"
        if self.inplace or not 0.0 <= self.p < 1.0:
            return "it drops in place, or all"
        return kernel_reason(self.kind, "cpu")

    def forward(self, input: Tensor) -> Tensor:
        acts = self.training and self.p > 0.0 and not torch.compiler.is_compiling() and accepts_input(input)
        # PyTorch's result has the input's strides.
        if not acts or input.device.type != "cpu" or not input.is_contiguous() or self.block_reason() is not None:
            return self.stock_class.forward(self, input)
        return ops.dropout(input, self.p)


def dropouts_of_adapters(model: nn.Module) -> set[nn.Module]:
    """Returns the dropouts of LoRA's layers, which read their probabilities."""
    held = (module._modules.get("lora_dropout") for module in model.modules())
    return {dropout for children in held if children is not None for dropout in children.modules()}


# --- MLPs -------------------------------------------------------------------------------------------------------------

# Names of the layers into the inner dimension, of the one out of it, and of the activation, in transformers' models.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj", "act_fn"),
    (("gate_up_proj",), "down_proj", "activation_fn"),
    (("gate_up_proj",), "down_proj", "act_fn"),
    (("up_proj",), "down_proj", "act_fn"),
    (("w1", "w3"), "w2", "act_fn"),
    (("fc1",), "fc2", "activation_fn"),
    (("fc1",), "fc2", "act"),
    (("c_fc",), "c_proj", "act"),
    (("dense_h_to_4h",), "dense_4h_to_h", "act"),
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

_ACTS: dict[Hashable, Optional[str]] = {}  # what was tried


class Mlp(Block):
    """``formula``: names of the layers in and out and of the activation, which one, gated or not, a dropout or none."""

    kind = "MLP"

    def block_reason(self) -> Optional[str]:
        if "forward" in self.__dict__:
            return "its forward was replaced on the instance"
        _, _, act, function, gated, _ = self.formula
        if isinstance(getattr(self, act), nn.Module) and hooked(getattr(self, act)):
            return "hooks on the activation would not run"
        if activation_name(getattr(self, act)) != function:
            return "its activation is another one than when it was tried"
        device = next((p.device.type for p in self.parameters()), "cpu")
        return kernel_reason("gated_activation" if gated else "activation", device)

    def _fused(self, x: Tensor) -> Tensor:
        into, out, act, function, gated, drops = self.formula
        modules = self._modules
        with siblings.together(self, (into,)):
            inner = [modules[name](x) for name in into]
        if not all(map(accepts_input, inner)) or len({value.dtype for value in inner}) > 1:
            halves = inner[0].chunk(2, dim=-1) if gated and len(inner) == 1 else inner
            h = getattr(self, act)(halves[0])
            y = modules[out](h * halves[1] if gated else h)
        else:
            operator = ops.gated_activation if gated else ops.activation
            args = (*inner, *([None] if gated and len(inner) == 1 else []), function)
            h = operator(*args)
            with computed_again(h, operator, *args):
                y = modules[out](h)
        return modules["dropout"](y) if drops else y


@contextmanager
def computed_again(h: Tensor, operator: Callable[..., Tensor], *args: Any) -> Iterator[None]:
    """Has what is saved of ``h`` within computed again in the backward: ``operator(*args)``.

    Not where somebody else's hooks see to what is saved, as checkpointing's do.
    """
    if not (torch.is_grad_enabled() and h.requires_grad) or _hooks_are_set():
        yield
        return
    # The storage and not its address, which a tensor without data, as the estimate of memory has, does not have.
    storage, version, numel, dtype, held = h.untyped_storage()._cdata, h._version, h.numel(), h.dtype, [_nothing]
    tensors = [value for value in args if isinstance(value, Tensor)]
    versions = [value._version for value in tensors]
    args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)

    def pack(value: Tensor) -> Any:
        # What somebody changed in place is no longer what the operator gives.
        if value.numel() != numel or value.dtype is not dtype or value._version != version:
            return value
        if value.storage_offset() or value.untyped_storage()._cdata != storage:
            return value
        return _Again(tuple(value.shape), value.stride())

    def unpack(value: Any) -> Tensor:
        if not isinstance(value, _Again):
            return value
        if versions != [tensor._version for tensor in tensors]:
            raise RuntimeError("peft_ext: the inputs of an MLP's activation were changed in place before the backward; "
                               "call peft_ext.accelerate(model, blocks=False)")  # fmt: skip
        if (found := held[0]()) is None:
            with torch.no_grad():
                found = operator(*args)
            held[0] = weakref.ref(found)
        return found.as_strided(value.shape, value.stride)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _nothing() -> None:
    """A reference to what was not computed again yet."""


class _Again(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _hooks_are_set() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def activation_name(act: Any) -> Optional[str]:
    """Returns which activation a function or a module is, by its values; None: another one."""
    if not isinstance(act, Hashable):
        return None
    key = (type(act), repr(act)) if isinstance(act, nn.Module) else act  # a module's settings may change
    if key not in _ACTS:
        x = torch.linspace(-8, 8, 321, dtype=torch.float32)
        try:
            y = act(x.clone())
        except Exception:  # whatever another function raises
            y = None
        alike = [name for name, function in _ACTIVATIONS.items()
                 if isinstance(y, Tensor) and y.shape == x.shape and (y - function(x)).abs().max() < 3e-6]  # fmt: skip
        _ACTS[key] = alike[0] if alike else None
    return _ACTS[key]


def _mlp_formula(module: nn.Module) -> Optional[tuple]:
    """Returns the formula of a module that looks like an MLP, by trial; None: it is another function."""
    for into, out, act in _MLPS:
        children = [name for name, child in module._modules.items() if child is not None]
        if not all(name in children for name in (*into, out)) or not hasattr(module, act):
            continue
        others = set(children) - {*into, out, act}
        if others - {"dropout"} or module._parameters or (function := activation_name(getattr(module, act))) is None:
            continue
        drops = "dropout" in others
        for gated in (True, False) if into == ("gate_up_proj",) else (len(into) == 2,):
            formula = (into, out, act, function, gated, drops)
            if _mlp_is(module, formula):
                return formula
    return None


def _mlp_is(module: nn.Module, formula: tuple) -> bool:
    into, out, _, _, gated, drops = formula
    generator = torch.Generator().manual_seed(0)
    trial = _stub(module)
    trial._modules = dict(module._modules)
    wide = 24 if gated and len(into) == 1 else 12
    for name in (*into, out):
        layer = nn.Linear(8 if name != out else 12, 8 if name == out else wide, dtype=torch.float32)
        with torch.no_grad():
            for value in layer.parameters():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float32))
        trial._modules[name] = layer
    if drops:
        trial._modules["dropout"] = nn.Dropout(0.5)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float32)
    try:
        wanted = _with_gradients(type(module).forward, trial, x)
    except Exception:  # whatever another function raises
        return False
    return _alike(_with_gradients(Mlp._fused, _as(trial, Mlp, formula), x), wanted)


# --- within a module's own forward ------------------------------------------------------------------------------------


class Forward(Block):
    """A module's own forward, of which some parts may be others: children that are adapter layers and get one tensor
    are computed together (:mod:`.siblings`), rotary positions are taken in one pass (:mod:`.rotary`), and attention is
    the operator (:mod:`.attention`).

    ``formula``: groups of the children's names, the function that rotates, or None, and whether it is an attention.
    """

    def parts(self) -> Iterator[tuple[str, Optional[str]]]:
        groups, function, attends = self.formula
        replaced = "its forward was replaced on the instance" if "forward" in self.__dict__ else None
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


_JOINT, _ROTARY, _ATTENTION = "projections of one input", "rotary positions", "attention"


@functools.cache
def _with_parts(forward: Callable, function: Optional[Callable], attends: bool) -> Optional[Callable]:
    """Returns a forward of the same code in which these parts are others; None: it can't be made."""
    others: list[tuple[str, Any]] = []
    if function is not None:
        others.append((rotary.NAME, rotary.fused(function)))
    if attends and (inner := inner_function(forward)) is not None:
        others.append((attention.NAME, attention.interfaces(inner)))
    return with_names(forward, tuple(others)) if others else forward


def _forward_class(module: nn.Module) -> Optional[type]:
    """Returns the class of a module in whose forward a part can be another; None: there is none."""
    stock = module.stock_class if isinstance(module, Forward) else type(module)
    groups = tuple(names for names in siblings.groups_in(stock.forward)
                   if sum(isinstance(module._modules.get(name), LowRank) for name in names) > 1)  # fmt: skip
    function, attends = rotary.rotary_function(stock.forward), attention.asks(stock.forward)
    if _with_parts(stock.forward, function, attends) is None:
        function, attends = None, False
    return _class(Forward, stock, (groups, function, attends)) if groups or function is not None or attends else None


# --- trials -----------------------------------------------------------------------------------------------------------


def _stub(module: nn.Module) -> Any:
    """Returns an object with what ``module`` has, whose parameters and layers can be others."""
    trial = copy.copy(module)
    trial.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters), "_modules": dict(module._modules)}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        trial.__dict__[hooks] = {}
    return trial


def _as(trial: nn.Module, mixin: type, formula: tuple) -> Any:
    """Returns the trial as an instance of the fused class, with the same parameters and layers."""
    fused = copy.copy(trial)
    fused.__class__ = _class(mixin, type(trial), formula)
    fused.__dict__ = trial.__dict__
    return fused


def _with_gradients(forward: Callable[[Any, Tensor], Tensor], trial: Any, x: Tensor) -> list[Tensor]:
    """Returns what ``forward`` gives and the gradients of x and of what the trial holds, under a seed of its own."""
    layers = [child for child in trial._modules.values() if child is not None]
    held = [p for p in (*trial._parameters.values(), *(p for child in layers for p in child.parameters()))
            if p is not None]  # fmt: skip
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng([]):
        torch.manual_seed(0)
        x = x.detach().clone().requires_grad_()
        y = forward(trial, x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        grads = torch.autograd.grad((y * weights).sum(), [x, *held], allow_unused=True)
        return [y.detach(), *(grad for grad in grads if grad is not None)]


def _alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        a.shape == b.shape and a.dtype is b.dtype
        and bool((a - b).abs().max() <= _TOLERANCE * b.abs().max().clamp(min=1e-3))
        for a, b in zip(found, wanted, strict=True)
    )  # fmt: skip


# --- in a model -------------------------------------------------------------------------------------------------------


def _fused_class(module: nn.Module) -> Optional[type]:
    """Returns the fused class of a module, by trial, once for each class; None: its own forward stays."""
    stock = type(module)
    if stock in STOCK and issubclass(stock, Forward):  # of whose children others may have an adapter now
        return _forward_class(module) or module.stock_class
    if stock is nn.LayerNorm:
        return _class(LayerNorm, stock, ())
    if stock is nn.Dropout:
        return _class(Dropout, stock, ()) if 0.0 < module.p < 1.0 and not module.inplace else None
    if stock.__module__.startswith(("torch.", "peft.", "peft_ext.", "bitsandbytes.")) or stock in STOCK:
        return None
    if is_fully_sharded(stock):
        return None  # whose forward gathers parameters first
    act = tuple(repr(getattr(module, name, None)) for name in ("act_fn", "activation_fn", "act"))
    key = (stock, act, tuple(module._modules), tuple(module._parameters))
    if key not in _TRIED:
        found = None
        # Whatever device and mode the model is accelerated under.
        with torch.device("cpu"), torch.inference_mode(False):
            if (formula := _rms_formula(module)) is not None:
                found = _class(RMSNorm, stock, formula)
            elif (formula := _mlp_formula(module)) is not None:
                found = _class(Mlp, stock, formula)
        _TRIED[key] = found
    return _TRIED[key] or _forward_class(module)


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
            names = [_JOINT] * bool(groups) + [_ROTARY] * (function is not None) + [_ATTENTION] * attends
        for name in names:
            yield name, "accelerate(model) was not called on it, or with blocks=False"


def fuse_blocks(model: nn.Module) -> None:
    """Gives the blocks of ``model`` that are known, and were tried, their fused classes."""
    skipped = dropouts_of_adapters(model)
    for module in model.modules():
        if module not in skipped and (kind := _fused_class(module)) is not None:
            module.__class__ = kind


def plain_blocks(model: nn.Module) -> None:
    """Undoes :func:`fuse_blocks`."""
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = module.stock_class
