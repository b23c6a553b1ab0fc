"""MLPs on fused operators: down(act(gate x) ∘ up x), down(act(up x)), known by their structure, and tried.

The activation is one pass; saved are gate and up, and what ``down`` saves of act(gate) ∘ up is computed again in the
backward.
"""

from __future__ import annotations

import itertools
import math
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import (  # noqa: PLC2701  no public name for it
    _disable_current_modes as disable_current_modes,
)

from ... import ops
from ..adapter_layers import siblings
from ..adapter_layers.reasons import accepts_input, any_global_hook, hooked, kernel_reason
from .block import Block, are_alike, stub, tried_as, with_gradients
from .held import held_by, holds_others
from .reads import Watched, are_as_watched, reached_by

__all__ = ["Mlp", "activation_name", "computed_again", "mlp_formula"]

# Names of the layers into the inner dimension, of the one out of it, and of the activation, in transformers' models.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj", "act_fn"),
    (("gate_up_proj",), "down_proj", "activation_fn"),
    (("gate_up_proj",), "down_proj", "act_fn"),
    (("up_proj",), "down_proj", "act_fn"),
    (("w1", "w3"), "w2", "act_fn"),
    (("fc1",), "fc2", "activation_fn"),
    (("fc1",), "fc2", "act"),
    (("wi_0", "wi_1"), "wo", "act"),
    (("wi",), "wo", "act"),
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

# What a trial's inputs are multiplied with: a bound that a value is clamped to shows beyond it alone.
_MAGNITUDES = (1.0, 1e-2, 30.0, 1e4)
# Other inputs than float32's of three dimensions: a forward may ask for these, too.
_DTYPES, _SHAPES = (torch.bfloat16, torch.float16), ((6, 8), (1, 3, 2, 8))
_ROUNDING = 0.03  # of the largest value, in 16 bits


class Mlp(Block):
    """``formula``: names of the layers in and out and of the activation, which one, gated or not, and where there is a
    dropout: behind "out", behind the activation ("act"), or nowhere ("")."""

    kind = "MLP"

    def block_reason(self) -> Optional[str]:
        if reason := self.replaced():
            return reason
        if holds_others(self, self.stock_class):
            return "it holds another number, name, function or layer than when it was tried"
        _, _, act, function, gated, _ = self.formula
        if isinstance(getattr(self, act), nn.Module):
            if hooked(getattr(self, act)):
                return "hooks on the activation would not run"
            if any_global_hook():
                return "global hooks of torch.nn would not run on its activation"
        if activation_name(getattr(self, act)) != function:
            return "its activation is another one than when it was tried"
        device = next((p.device.type for p in self.parameters()), "cpu")
        return kernel_reason("gated_activation" if gated else "activation", device)

    def _fused(self, x: Tensor) -> Tensor:
        into, out, *_ = self.formula
        if not self.takes(x):
            return self.stock_class.forward(self, x)
        modules = self._modules
        with siblings.together(self, (into,)):
            inner = [modules[name](x) for name in into]
        return self.finish(inner, modules[out], again=not _calls_hooks(modules[out]))

    def takes(self, x: Tensor) -> bool:
        """Returns whether the forward changes no dtype on its way; T5's kind does, where its layers are of two."""
        _, out, _, _, _, drops = self.formula
        weight = getattr(self._modules[out], "weight", None) if drops == "act" else None
        return not isinstance(weight, Tensor) or weight.dtype is x.dtype

    def finish(self, inner: list[Tensor], out: Callable[[Tensor], Tensor], again: bool = True) -> Tensor:
        """Returns what the MLP makes of what its layers in gave, with ``out`` for its layer out, which, if ``again``,
        may save what is computed again."""
        _, _, act, function, gated, drops = self.formula
        if not all(map(accepts_input, inner)) or len({value.dtype for value in inner}) > 1:
            halves = inner[0].chunk(2, dim=-1) if gated and len(inner) == 1 else inner
            h = getattr(self, act)(halves[0])
            h = h * halves[1] if gated else h
            return self._dropped(out(self._dropped(h, "act")), "out")
        operator = ops.gated_activation if gated else ops.activation
        args = (*inner, *([None] if gated and len(inner) == 1 else []), function)
        h = operator(*args)
        with computed_again(h, operator, *args) if again else nullcontext():
            y = out(self._dropped(h, "act"))
        return self._dropped(y, "out")

    def _dropped(self, x: Tensor, where: str) -> Tensor:
        return self._modules["dropout"](x) if self.formula[-1] == where else x


def _calls_hooks(layer: nn.Module) -> bool:
    """Returns whether hooks see the layer's input, which they may change where no version shows it."""
    return hooked(layer) or any(child is not None and hooked(child) for child in layer._modules.values())


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
            return value, value._version
        if value.storage_offset() or value.untyped_storage()._cdata != storage:
            return value, value._version
        return _Again(tuple(value.shape), value.stride())

    def unpack(value: Any) -> Tensor:
        if not isinstance(value, _Again):
            value, saved = value
            if value._version != saved:  # autograd does not look where there are hooks
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{value.dtype} {tuple(value.shape)} is at version {value._version}, expected version {saved}"
                )
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
    autograd = torch._C._autograd
    forbidden = autograd._saved_tensors_hooks_get_disabled_error_message() is not None
    return forbidden or autograd._top_saved_tensors_default_hooks(False) is not None


def activation_name(act: Any) -> Optional[str]:
    """Returns which activation a function or a module is, by its values; None: another one."""
    if not isinstance(act, Hashable):
        return None
    if (key := _act_key(act) if isinstance(act, nn.Module) else act) is None or not _is_told(act):
        return None
    if key not in _ACTS:
        with disable_current_modes(), torch.device("cpu"):  # an estimate's tensors have no values
            _ACTS[key] = _activation_tried(act)
    return _ACTS[key]


_REACHED: weakref.WeakKeyDictionary[Any, Optional[tuple[Watched, ...]]] = weakref.WeakKeyDictionary()


def _is_told(act: Callable[[Tensor], Any]) -> bool:
    """Returns whether what an activation computes is told by its values, and what it finds by name is as it was."""
    forward, kind = (type(act).forward, type(act)) if isinstance(act, nn.Module) else (act, object)
    inner = act._modules.values() if isinstance(act, nn.Module) else ()
    if not all(_is_told(child) for child in inner if child is not None):
        return False
    if not isinstance(forward, types.FunctionType) or forward.__module__.startswith("torch."):
        return True
    if forward not in _REACHED:
        _REACHED[forward] = reached_by(forward, kind)
    return (reached := _REACHED[forward]) is not None and are_as_watched(reached)


def _activation_tried(act: Callable[[Tensor], Any]) -> Optional[str]:
    far = torch.tensor([8.5, 10.5, 13.0, 25.0, 120.0, 1e3, 1e4], dtype=torch.float32)
    x = torch.cat((torch.linspace(-8, 8, 321, dtype=torch.float32), far, -far))
    try:
        y = act(x.clone())
    except Exception:  # whatever another function raises
        y = None
    alike = [name for name, function in _ACTIVATIONS.items()
             if isinstance(y, Tensor) and y.shape == x.shape
             and ((y - (wanted := function(x))).abs() / wanted.abs().clamp(min=1)).max() < 3e-6]  # fmt: skip
    return alike[0] if alike else None


def _act_key(act: nn.Module) -> Optional[Hashable]:
    """Returns what an activation's values depend on, which may change; None: on tensors, or what can't be compared."""
    if act._parameters:
        return None
    held = held_by(act)
    inner = tuple(None if child is None else _act_key(child) for child in act._modules.values())
    known = held is not None and None not in inner
    return (type(act), type(act).forward, act.training, tuple(held.items()), inner) if known else None


def mlp_formula(module: nn.Module) -> Optional[tuple]:
    """Returns the formula of a module that looks like an MLP, by trial; None: it is another function."""
    for into, out, act in _MLPS:
        children = [name for name, child in module._modules.items() if child is not None]
        if not all(name in children for name in (*into, out)) or not hasattr(module, act):
            continue
        others = set(children) - {*into, out, act}
        if others - {"dropout"} or module._parameters or (function := activation_name(getattr(module, act))) is None:
            continue
        gates = (True, False) if into == ("gate_up_proj",) else (len(into) == 2,)
        for gated, drops in itertools.product(gates, ("out", "act") if "dropout" in others else ("",)):
            formula = (into, out, act, function, gated, drops)
            if _mlp_is(module, formula):
                return formula
    return None


def _mlp_is(module: nn.Module, formula: tuple) -> bool:
    into, out, _, _, gated, drops = formula
    generator = torch.Generator().manual_seed(0)
    trial = stub(module)
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
    fused, before = tried_as(trial, Mlp, formula), held_by(trial)
    # Training too: what it drops it may drop by a function.
    for trial.training, magnitude in itertools.product((True, False), _MAGNITUDES):
        try:
            wanted = with_gradients(type(module).forward, trial, magnitude * x)
        except Exception:  # whatever another function raises
            return False
        if not are_alike(with_gradients(Mlp._fused, fused, magnitude * x), wanted):
            return False
    return _is_alike_elsewhere(type(module).forward, trial, fused, x) and held_by(trial) == before


def _is_alike_elsewhere(stock: Callable[..., Tensor], trial: Any, fused: Any, x: Tensor) -> bool:
    """Returns whether the two forwards agree without a gradient, on inputs of other ranks and in 16 bits, where the
    stock one takes them."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float32, *_DTYPES):
            for layer in trial._modules.values():
                if isinstance(layer, nn.Linear):
                    layer.to(dtype)
            for shape in (x.shape, *_SHAPES):
                value = x.flatten()[: math.prod(shape)].view(shape).to(dtype)
                torch.default_generator.manual_seed(0)
                try:
                    wanted = stock(trial, value.clone())
                except Exception:  # whatever another function raises
                    continue
                torch.default_generator.manual_seed(0)
                found = Mlp._fused(fused, value.clone())
                if not isinstance(wanted, Tensor) or found.shape != wanted.shape or found.dtype is not wanted.dtype:
                    return False
                bound = _ROUNDING if dtype in _DTYPES else 1e-5
                if not (found - wanted).abs().max() <= bound * wanted.abs().max().clamp(min=1e-3):
                    return False
    return True
