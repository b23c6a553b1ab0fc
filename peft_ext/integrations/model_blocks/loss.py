"""Computes the loss of a language model without whole logits, by changes at two public points of transformers: the call
of the head, and ``loss_function``.

While a model with a known loss function trains with labels, the model's head returns a :class:`.pending.Pending` in
place of logits, unless the logits have to be computed whole (see, for example, ``DefersLoss.head_reason``).
``PreTrainedModel.loss_function`` computes the loss from a Pending that nothing has used, by
:func:`peft_ext.ops.linear_cross_entropy`. If the loss was computed from a Pending, the model's output computes its
``logits`` at the first read.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # noqa: PLC2701  torch has no public name for it

from ... import ops
from ..._imports import optional
from ...nn import PackedLinear
from ...ops.checks import autocast_dtype, under_a_transform
from ..adapter_layers import lora
from ..adapter_layers.base import LINEAR, PACKED, STOCK, class_name, operands, sums_wider
from ..adapter_layers.linear import FusedLinear
from ..adapter_layers.reasons import (
    accepts_input,
    any_global_hook,
    freed_reason,
    kernel_reason,
    replaced_on_instance,
    weight_reason,
)
from ..forms import row_of
from .pending import Call, Pending, computed, real

# Without transformers, isinstance(x, ModelOutput) is isinstance(x, ()), which is False for every x.
ModelOutput: Any = ()
with optional("transformers", "the loss of a language model takes whole logits"):
    from transformers.utils import ModelOutput

FusedLoraLinear = getattr(lora, "FusedLoraLinear", None)  # without PEFT, `lora` has no FusedLoraLinear

__all__ = ["compute_losses", "defer_losses", "loss_parts"]

# The key under which an output's ``__dict__`` holds its Pending, and under which the metadata of the loss's autograd
# node holds a weak reference to the Pending.
_PENDING = "_peft_ext_pending"
# Maps a loss function to the functions that it called when its code was read; to None if its form is unknown.
_LOSSES: dict[Any, Optional[tuple[Any, ...]]] = {}


def _called_by(function: Any) -> tuple[Any, ...]:
    return function.__globals__.get("fixed_cross_entropy"), F.cross_entropy


def _is_known_loss(function: Any) -> bool:
    """Returns whether a loss function has a known form and still calls the functions that it called when its code was
    read."""
    if not inspect.isfunction(function):
        return False
    if function not in _LOSSES:
        found = row_of(function)
        is_known = not isinstance(found, str) and found[0].kind == "causal_loss"
        _LOSSES[function] = _called_by(function) if is_known else None
    return _LOSSES[function] is not None and _LOSSES[function] == _called_by(function)


# --- the head ---------------------------------------------------------------------------------------------------------


class Forward:
    """The state of a running forward: the model, the model's head, and the calls of the head that returned a
    Pending."""

    def __init__(self, model: nn.Module, head: Optional[nn.Module]) -> None:
        self.model, self.head = model, head
        self.calls: list[Call] = []


def _is_traced() -> bool:
    """Returns whether torch.compile (and not torch.export) is tracing, in a torch release that can trace a Pending."""
    return torch.__version__ >= "2.13" and torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


class _Now(threading.local):
    """``forward``: the Forward that runs on this thread; None if none runs.

    ``__init__`` runs on each thread that uses the object. If a thread had no attribute ``forward``, torch.compile would
    guard on the absence of the attribute, and the traced forward, which sets the attribute, would break this guard.
    """

    def __init__(self) -> None:
        self.forward: Optional[Forward] = None


_NOW = _Now()


class DefersLoss:
    """The base class of fused heads: layers over a frozen weight whose outputs are a model's logits."""

    def _reason(self) -> Optional[str]:
        """Returns why the layer's weight or the layer's replaced forward requires that the logits are computed whole;
        None if neither requires that."""
        if replaced_on_instance(self):
            return "its forward was replaced on the instance (accelerate's device hooks do that)"
        return weight_reason(self)

    def _call(self, x: Tensor) -> Optional[Call]:
        """Returns the Call that stands for the logits of the hidden states x; None if the logits have to be computed
        whole."""
        if (found := operands(self, x)) is None:
            return None
        _, weight, bias, dtype = found
        return Call(self, (x,), dtype, super().forward, {"weight": weight, "bias": bias})

    def head_reason(self) -> Optional[str]:
        """Returns why the head's logits are computed whole in each training step; None if they need not be."""
        reason = self._reason() or kernel_reason("linear_cross_entropy", next(self.parameters()).device.type)
        if not reason and (self._forward_hooks or self._backward_hooks or self._backward_pre_hooks):
            reason = "hooks on the head have to run"
        if not reason and torch.compiler.is_compiling() and getattr(self, "_is_fsdp_managed_module", False):
            return "it is compiled under FSDP"
        return reason or ("global hooks of torch.nn have to run" if any_global_hook() else freed_reason(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, DefersLoss):  # `restore` gave self its stock class, but a caller kept this method
            return type(self).forward(self, *args, **kwargs)
        forward, call = _NOW.forward, None
        if forward is not None and forward.head is self and len(args) == 1 and not kwargs and accepts_input(args[0]):
            if args[0].dim() >= 2 and torch.is_grad_enabled() and self.head_reason() is None:
                call = self._call(*args)
        if call is None or not any(getattr(t, "requires_grad", False) for t in (*args, *call.operands.values())):
            return super().forward(*args, **kwargs)
        forward.calls.append(call)
        return Pending(call)


class LinearHead(DefersLoss, FusedLinear):
    """A frozen ``nn.Linear`` whose outputs are a model's logits."""


class PackedHead(DefersLoss, PackedLinear):
    """A frozen linear layer over a packed weight whose outputs are a model's logits."""


LinearHead.__name__, LinearHead.stock_class = "Linear", nn.Linear
PackedHead.__name__, PackedHead.stock_class = "PackedLinear", PackedLinear
STOCK[LinearHead], STOCK[PackedHead] = nn.Linear, PackedLinear
LINEAR.append(LinearHead)
PACKED.append(PackedHead)

# HEADS maps the class of a layer to the class that the layer gets as the head of a model whose losses are deferred.
# LAYERS maps the class of a head to the class that the layer gets when losses are not deferred any more.
HEADS: dict[type, type] = {nn.Linear: LinearHead, FusedLinear: LinearHead, PackedLinear: PackedHead}
LAYERS: dict[type, type] = {LinearHead: nn.Linear, PackedHead: PackedLinear}

if FusedLoraLinear is not None:

    class LoraHead(DefersLoss, FusedLoraLinear):
        """A head with one LoRA adapter over a frozen weight. Dropout is computed by PEFT's dropout module, with
        PyTorch's mask."""

        def _reason(self) -> Optional[str]:
            reason, alone = self._reasons()
            if reason or alone:
                return reason or alone
            if self.joint_split() is not None:
                return "tensor parallelism splits the head"
            name, *more = self._names()
            if more:
                return "several adapters are active on the head"
            if name in self.lora_variant:
                return "the head's adapter is not plain LoRA"
            has_more = self._bias(name) is not None or isinstance(self.scaling[name], Tensor)
            return "the head's adapter has a bias, or a scale that is a tensor" if has_more else None

        def _call(self, x: Tensor) -> Optional[Call]:
            (name,), base = self._names(), self._modules["base_layer"]
            if sums_wider(base, x) or (found := operands(base, x)) is None:
                return None
            _, weight, bias, dtype = found
            if dtype is not (autocast_dtype(x) or x.dtype):
                return None
            (lora_A, lora_B), scaling = self.pair(name), self.scaling[name]
            dropout = self._modules["lora_dropout"]._modules[name]
            drops = type(dropout) is nn.Dropout and dropout.training and dropout.p > 0

            def forward(x: Tensor, low: Optional[Tensor] = None) -> Tensor:
                return ops.lora_residual(x if low is None else low, base(x), lora_A, lora_B, scaling=scaling)

            given = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "scaling": scaling}
            return Call(self, (x, dropout(x)) if drops else (x,), dtype, forward, given)

    LoraHead.__name__, LoraHead.stock_class = FusedLoraLinear.__name__, STOCK[FusedLoraLinear]
    STOCK[LoraHead] = STOCK[FusedLoraLinear]
    HEADS[FusedLoraLinear], LAYERS[LoraHead] = LoraHead, FusedLoraLinear


# --- the model --------------------------------------------------------------------------------------------------------


class LanguageModel:
    """The base class of fused language models. In a training step the head returns a Pending where possible, and
    ``loss_function`` computes the loss from the Pending."""

    stock_class: type
    stock_loss_function: Callable[..., Any]

    def __init_subclass__(cls, **_: Any) -> None:
        """Does nothing. transformers' ``__init_subclass__`` would treat the fused class as a new model class."""

    @property
    def loss_function(self) -> Any:
        # `stock_loss_function` is called because torch.compile can't trace a property of super().
        function, forward = self.stock_loss_function(), _NOW.forward
        return function if forward is None or forward.model is not self else functools.partial(_loss, function)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        super(LanguageModel, type(self)).loss_function.__set__(self, value)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # Pickle can't find a class that was made at run time, so unpickling makes the class again from the stock class.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.stock_class,), *state


def _new(stock: type) -> Any:
    kind = _on_loss(stock)
    return kind.__new__(kind)


@functools.cache
def _on_loss(stock: type) -> type:
    """Returns the fused subclass of a model's class ``stock``, which computes the loss without whole logits. The first
    call for a class makes the subclass, and later calls return the same subclass."""
    names = list(inspect.signature(stock.forward).parameters)
    at = names.index("labels") - 1 if "labels" in names else sys.maxsize

    @functools.wraps(stock.forward)  # Trainer and generate read the signature of the forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, LanguageModel):  # `restore` gave self its stock class, but a caller kept this method
            return type(self).forward(self, *args, **kwargs)
        run = super(LanguageModel, self).forward
        if not self.training or not torch.is_grad_enabled() or (torch.compiler.is_compiling() and not _is_traced()):
            return run(*args, **kwargs)
        labels = args[at] if at < len(args) else kwargs.get("labels")
        # Under torch.compile only `_loss` checks the loss function. The property `loss_function` may write to a log,
        # which can't be traced.
        known = labels is not None and (torch.compiler.is_compiling() or _is_known_loss(self.stock_loss_function()))
        if not known or under_a_transform() or torch.jit.is_tracing() or "_is_replica" in self.__dict__:
            return run(*args, **kwargs)
        before, now = _NOW.forward, Forward(self, _head_of(self))
        _NOW.forward = now
        try:
            output = run(*args, **kwargs)
        finally:
            _NOW.forward = before
            for call in now.calls:
                call.pending.clear()
        return (_settled_in_graph if torch.compiler.is_compiling() else _settled)(output, now)

    held = {"stock_class": stock, "stock_forward": stock.forward, "stock_loss_function": stock.loss_function.fget,
            "forward": forward, "__doc__": stock.__doc__, "__module__": stock.__module__}  # fmt: skip
    made = type.__new__(type(stock), stock.__name__, (LanguageModel, stock), held)
    STOCK[made] = stock
    return made


def _loss(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Computes the loss without logits if the loss function's logits are a Pending that nothing has used; otherwise
    calls the model's loss function with real logits."""
    first = args[0] if args else kwargs.get("logits")
    if type(first) is Pending and first._value is None and _is_known_loss(function):
        named = {name: value for name, value in kwargs.items() if name != "logits"}
        if len(args) <= 6 and (loss := first._call.loss(first._steps, *args[1:], **named)) is not None:
            return loss
    args, kwargs = pytree.tree_map(real, (args, kwargs))
    return function(*args, **kwargs)


# --- what a forward returns -------------------------------------------------------------------------------------------


def _settled(output: Any, forward: Forward) -> Any:
    """Returns the output of a forward that is not compiled: an output with real logits, or a ModelOutput that computes
    its logits at the first read."""
    used = "its forward does not hand its head's logits to its loss function"
    if any(call.logits is not None for call in forward.calls):
        used = "its forward uses the logits before the loss, other than for a scale or a soft cap, or has another loss"
    elif any(call.is_taken for call in forward.calls):
        used = ""
    if isinstance(output, ModelOutput) and (node := getattr(output.__dict__.get("loss"), "grad_fn", None)) is not None:
        logits = output.__dict__.get("logits")
        if type(logits) is Pending and logits._call.is_taken and logits._value is None:
            node.metadata[_PENDING] = weakref.ref(logits)
            OrderedDict.__delitem__(output, "logits")
            del output.__dict__["logits"]
            output.__class__, output.__dict__[_PENDING] = _waiting(type(output)), logits
    output = _without_pending(output)
    if not used and any(call.logits is not None for call in forward.calls):
        used = "its forward returns the logits in a tuple"
    _USED[forward.model] = used
    return output


def _settled_in_graph(output: Any, _: Forward) -> Any:
    """Returns the output of a compiled forward: an output with real logits, or a ModelOutput whose ``logits`` is a
    Pending that nothing has used."""
    logits = output.get("logits") if isinstance(output, ModelOutput) else None
    if type(logits) is Pending and logits._call.is_taken and logits._value is None:
        return output
    return _without_pending(output)


def _without_pending(value: Any) -> Any:
    if pytree.tree_any(lambda one: type(one) is Pending, value):
        return pytree.tree_map(real, value)
    # This loop replaces the Pendings of an output whose class pytree does not know as a container.
    for name, one in list(getattr(value, "__dict__", {}).items()):
        if type(one) is Pending and name != _PENDING:
            setattr(value, name, real(one))
    return value


class _Logits:
    """The descriptor of ``logits`` in an output whose logits are not computed yet. Reading ``logits`` computes the
    logits.

    The logits are neither a dataclass field nor an item of the output, because FSDP2 looks for tensors in fields, and
    DDP and pytrees look for tensors in items.
    """

    def __get__(self, output: Any, kind: Any = None) -> Any:
        return None if output is None else output._whole().logits


def _pending_behind(nodes: list[Any], depth: int = 4) -> Optional[Pending]:
    """Returns the Pending of a loss, also if the loss was cast or copied after the forward, by a search through at most
    ``depth`` levels of autograd nodes. Returns None if there is no Pending, or several."""
    nodes = [node for node in nodes if node is not None]
    if found := [node.metadata[_PENDING] for node in nodes if _PENDING in node.metadata]:
        return found[0]() if len(found) == 1 else None
    return _pending_behind([one for node in nodes for one, _ in node.next_functions], depth - 1) if depth else None


class _Waits:
    """A model output whose logits are not computed yet. Reading the logits, by name or by position, computes the logits
    and gives the output its stock class."""

    logits = _Logits()

    def _whole(self) -> Any:
        if (pending := self.__dict__.get(_PENDING)) is None:
            raise RuntimeError("peft_ext: this copy of a model's output has lost its logits; read the output's own")
        logits = computed(pending).float() if pending._call.is_widened else computed(pending)
        del self.__dict__[_PENDING]
        self.__class__ = type(self).__mro__[2]
        self["logits"] = logits
        names = list(self.__dataclass_fields__)
        for name in names[names.index("logits") + 1 :]:
            if name in self.keys():
                self.move_to_end(name)
        return self

    def __post_init__(self) -> None:
        """Finds the Pending through the autograd graph of the loss, if DDP, FSDP or the accelerate library made this
        output from the items of another output."""
        if (logits := self.__dict__.pop("logits", None)) is not None:
            self.__class__ = type(self).__mro__[2]
            self["logits"] = logits
            return self.__post_init__()
        is_accelerates = isinstance(self.__dict__.get("loss"), dict)
        super().__post_init__()
        pending = self.__dict__[_PENDING] = _pending_behind([getattr(self.__dict__.get("loss"), "grad_fn", None)])
        if pending is not None and is_accelerates and pending._call.has_autocast:
            pending._call.is_widened = True

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key == 0:
            return next(iter(self.values()))  # item 0 of an output with a deferred loss is the loss
        return super().__getitem__(key) if isinstance(key, str) and key != "logits" else self._whole()[key]

    def __contains__(self, key: Any) -> bool:
        return key == "logits" or super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key == "logits" else super().get(key, default)

    def to_tuple(self) -> tuple:
        return self._whole().to_tuple()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._whole().__reduce_ex__(protocol)


@functools.cache
def _waiting(kind: type) -> type:
    """Returns the subclass of an output's class ``kind`` in which the logits are computed at the first read.

    All outputs of one stock class share one subclass. If each output had a class of its own, hidden states would stay
    in memory until the garbage collector frees this class.
    """
    fields = {name: field for name, field in kind.__dataclass_fields__.items() if name != "logits"}
    held = {"__doc__": kind.__doc__, "__module__": __name__, "__dataclass_fields__": fields}
    made = type(kind)(kind.__name__, (_Waits, kind), held)
    made.__qualname__ = kind.__qualname__
    return made


# --- accelerate, restore, explain -------------------------------------------------------------------------------------

# Maps a model to the reason why the model's last training step computed whole logits; "" if the step computed no whole
# logits.
_USED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _head_of(owner: Any) -> Optional[nn.Module]:
    try:
        found = owner.get_output_embeddings()
    except Exception:  # the model has no head, or a class outside of transformers has its own get_output_embeddings
        return None
    return found if isinstance(found, nn.Module) else None


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields a pair (language model, its head) for each language model in ``model``. A head that several nested models
    share is yielded once, with the outermost of these models."""
    seen: set[int] = set()  # ids of the heads found: a model and a module inside of it may return the same head
    for module in model.modules():
        if hasattr(type(module), "get_output_embeddings") and (head := _head_of(module)) is not None:
            if id(head) not in seen:
                seen.add(id(head))
                yield module, head


def defer_losses(model: nn.Module) -> None:
    """Gives fused classes, with which the loss is computed without whole logits, to each language model that has a
    known loss function and a head of a class in ``HEADS``, and to this head."""
    _LOSSES.clear()
    for owner, layer in list(_owners(model)):
        has_points = type(layer) in HEADS and isinstance(getattr(type(owner), "loss_function", None), property)
        if has_points and _is_known_loss(owner.loss_function):
            layer.__class__ = HEADS[type(layer)]
            # A model that is fused already keeps its class, also if FSDP2 has derived another class from it.
            if not isinstance(owner, LanguageModel):
                owner.__class__ = _on_loss(type(owner))


def compute_losses(model: nn.Module) -> None:
    """Undoes :func:`defer_losses`."""
    for module in model.modules():
        _USED.pop(module, None)
        if isinstance(module, LanguageModel) and type(module) in STOCK:
            module.__class__ = STOCK[type(module)]
        elif (kind := LAYERS.get(type(module))) is not None:
            module.__class__ = kind


def loss_parts(model: nn.Module) -> Iterator[tuple[nn.Module, Optional[str]]]:
    """Yields a pair (head, reason) for each language model in ``model``: the model's head, and the reason why the
    head's logits are computed whole (None if they need not be)."""
    _LOSSES.clear()
    for owner, layer in _owners(model):
        yield layer, _reason(owner, layer)


def _reason(owner: Any, layer: nn.Module) -> Optional[str]:
    if not isinstance(layer, DefersLoss) and type(layer) not in HEADS:
        return f"its head is a {class_name(type(layer))}, wanted a Linear, or LoRA over one"
    # While a fused model's forward runs, `loss_function` is a wrapper of the model's own loss function.
    own = owner.stock_loss_function() if isinstance(owner, LanguageModel) else getattr(owner, "loss_function", None)
    if not _is_known_loss(own):
        return "its loss function is none of the known ones"
    if not isinstance(layer, DefersLoss) or not isinstance(owner, LanguageModel):
        return "accelerate(model) was not called on it, or with blocks=False"
    if reason := layer.head_reason():
        return reason
    if replaced_on_instance(owner):
        # The library accelerate, when it wraps the forward of an instance, keeps the inner forward in the attribute
        # `_original_forward` or `_old_forward`.
        inner = (owner.__dict__.get(name) for name in ("_original_forward", "_old_forward"))
        if not any(getattr(one, "__func__", None) is type(owner).forward for one in inner):
            return "the model's forward was replaced on the instance (TRL does, and computes the loss by itself)"
    return _USED.get(owner) or (None if owner.training else "in evaluation the logits are whole")
