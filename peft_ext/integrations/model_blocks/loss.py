"""The loss of a language model without whole logits, between two public points of transformers.

While a model trains with labels, its head (point one) returns :class:`Pending`: a plain object in place of the logits,
which lives inside of the model's forward alone. Any use of a Pending computes the real logits, once, and hands them on.
``PreTrainedModel.loss_function`` (point two) takes a Pending that arrives unused, and runs
:func:`peft_ext.ops.linear_cross_entropy`. The model's output then computes its ``logits`` when they are asked for.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # noqa: PLC2701  torch has no public name for it

from ... import ops
from ..._imports import optional
from ...ops.checks import autocast_dtype, under_a_transform
from ..adapter_layers import lora
from ..adapter_layers.base import LINEAR, STOCK, class_name, operands, sums_wider
from ..adapter_layers.linear import FusedLinear
from ..adapter_layers.reasons import (
    accepts_input,
    any_global_hook,
    freed_reason,
    is_plain,
    kernel_reason,
    replaced_on_instance,
    weight_reason,
)
from ..forms import row_of

ModelOutput: Any = ()  # of which nothing is an instance
with optional("transformers", "the loss of a language model takes whole logits"):
    from transformers.utils import ModelOutput

FusedLoraLinear = getattr(lora, "FusedLoraLinear", None)  # absent without PEFT

__all__ = ["compute_losses", "defer_losses", "loss_parts"]

# The name under which an output holds the call of its head, and the node of its loss a weak reference to that.
_CALL = "_peft_ext_call"
# Keyword arguments of a model's forward that reach its loss function, which ignores them.
_IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
})  # fmt: skip
# PyTorch's own functions, also where somebody replaces them later.
_FUNCTIONAL = {name: value for name, value in vars(F).items() if getattr(value, "__globals__", None) is vars(F)}


# By loss function: what it called when its code was looked at; None where its form is unknown.
_LOSSES: dict[Any, Optional[tuple[Any, ...]]] = {}


def _called_by(function: Any) -> tuple[Any, ...]:
    return function.__globals__.get("fixed_cross_entropy"), F.cross_entropy


def _is_known_loss(function: Any) -> bool:
    """Returns whether a loss function is a known one, and calls what it called when its code was looked at."""
    if not inspect.isfunction(function):
        return False
    if function not in _LOSSES:
        found = row_of(function)
        is_known = not isinstance(found, str) and found[0].kind == "causal_loss"
        _LOSSES[function] = _called_by(function) if is_known else None
    return _LOSSES[function] is not None and _LOSSES[function] == _called_by(function)


# --- one call of a head -----------------------------------------------------------------------------------------------


class Call:
    """One call of a head: what its logits are computed from, and what its loss takes instead of them.

    ``inputs``: the hidden states, and, of an adapter with dropout, what dropout left of them. ``forward``: of the
    inputs, the head's own. ``operands``: of ``ops.linear_cross_entropy``, beside inputs and labels.
    """

    def __init__(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, forward: Callable[..., Tensor],
        operands: dict[str, Any],
    ) -> None:  # fmt: skip
        self.inputs, self.operands = inputs, operands
        self.shape = torch.Size((*inputs[0].shape[:-1], operands["weight"].shape[0]))
        self.dtype, self.device = dtype, inputs[0].device
        self.is_taken = False  # a loss was computed without the logits
        self.is_widened = False  # by accelerate's mixed precision, which takes what a model returns to float32
        self.real: Optional[Tensor] = None
        device = self.device.type
        cast, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.autocast = functools.partial(torch.autocast, device, cast, enabled=enabled)
        self._layer, self._forward = layer, forward
        self._state_then = self._state()

    def _state(self) -> tuple:
        """Returns what the logits are computed with, to be compared. A merged adapter shows in no tensor's version."""
        layer, held = self._layer, (*self.inputs, *self.operands.values())
        return (
            type(layer), *(tuple(getattr(layer, name, ())) for name in ("merged_adapters", "active_adapters")),
            getattr(layer, "disable_adapters", False),
            [(id(p), p.is_inference() or p._version, p.untyped_storage()._cdata) for p in layer.parameters()],
            [t._version for t in held if isinstance(t, Tensor) and not t.is_inference()],
        )  # fmt: skip

    def logits(self) -> Tensor:
        """Returns the real logits with their graph, by the head's own forward, computed once."""
        if self.real is None:
            if self._state() != self._state_then:
                raise RuntimeError(
                    "peft_ext: the logits are read after their hidden states, or the head's weight or adapter, were "
                    "changed in place (by an optimizer's step?) or replaced (by FSDP2, whose backward frees it?), and "
                    "were not computed before. Read them earlier, or call peft_ext.accelerate(model, blocks=False)"
                )
            with torch.inference_mode(False), torch.enable_grad(), self.autocast():
                self.real = self._forward(*self.inputs)
        return self.real

    def loss(
        self, labels: Any = None, vocab_size: Any = None, num_items_in_batch: Any = None, ignore_index: Any = -100,
        shift_labels: Any = None, **rest: Any,
    ) -> Optional[Tensor]:  # fmt: skip
        """Returns the causal loss by :func:`peft_ext.ops.linear_cross_entropy`; None: the loss function has to run."""
        (hidden, *low), items = self.inputs, num_items_in_batch
        given = labels if shift_labels is None else shift_labels
        if rest.keys() - _IGNORED or vocab_size != self.shape[-1] or type(ignore_index) is not int:
            return None
        if not is_plain(given) or given.dtype is not torch.int64 or given.numel() != hidden.shape[:-1].numel():
            return None
        if not torch.is_grad_enabled() or self._state() != self._state_then:
            return None
        if isinstance(items, Tensor):
            if not is_plain(items) or items.dim():
                return None
            items = items.to(hidden.device)
        if shift_labels is None:
            given = F.pad(given, (0, 1), value=ignore_index)[..., 1:]
        given = given.reshape(hidden.shape[:-1]).to(hidden.device)
        try:
            with self.autocast():
                loss = ops.linear_cross_entropy(
                    hidden, labels=given, lora_input=low[0] if low else None, **self.operands,
                    ignore_index=ignore_index, num_items_in_batch=items,
                )  # fmt: skip
        except RuntimeError:
            outside = ((given < 0) | (given >= vocab_size)) & (given != ignore_index)
            if hidden.device.type != "cpu" or not outside.any():
                raise
            return None  # to raise the loss function's own error
        self.is_taken = True
        return loss


class Pending:
    """The logits of a head, not computed before something uses them. No tensor; gone when the model's forward ends."""

    __slots__ = ("_call",)
    __array_priority__ = Tensor.__array_priority__

    def __init__(self, call: Call) -> None:
        object.__setattr__(self, "_call", call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call if name in ("device", "dtype", "shape") else _real(self), name)

    def size(self, dim: Optional[int] = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_real(self), name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        # A function of torch.nn.functional that calls this names what stands in its module, which may be a wrapper
        # around it that is under way already.
        name = next((name for name, value in vars(F).items() if value is func), None)
        args, kwargs = pytree.tree_map(_real, (args, kwargs or {}))
        return _FUNCTIONAL.get(name, func)(*args, **kwargs)


def _real(value: Any) -> Any:
    """Returns the real logits of a Pending, and anything else as it is."""
    if type(value) is not Pending:
        return value
    if not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()):
        raise RuntimeError(
            "peft_ext: a forward of an autograd.Function got the logits of a language model before they were computed, "
            "and would lose their gradient. Call peft_ext.accelerate(model, blocks=False)"
        )
    return value._call.logits()


def _through(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(_real(self), name)(*args, **kwargs)


for _name in dir(Tensor):
    _plumbing = {*dir(object), "__torch_dispatch__"} - {
        "__dir__", "__eq__", "__format__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__", "__reduce__",
        "__reduce_ex__", "__repr__", "__str__",
    }  # fmt: skip
    if _name.startswith("__") and _name not in {*_plumbing, *vars(Pending)} and callable(getattr(Tensor, _name)):
        setattr(Pending, _name, _through(_name))


# --- the head ---------------------------------------------------------------------------------------------------------


# ``step``: of a forward under way, its ``model``, that model's ``head``, and the ``calls`` that it left to the loss.
_THREAD = threading.local()


def _step() -> Any:
    return None if torch.compiler.is_compiling() else getattr(_THREAD, "step", None)


class DefersLoss:
    """A layer whose outputs are a model's logits, over a frozen weight. A subclass gives ``_reason``, beside what is
    asked of each, and ``_call``: this call, for the loss; None where the logits have to be computed."""

    def head_reason(self) -> Optional[str]:
        """Returns why the logits are computed whole in training."""
        reason = self._reason() or kernel_reason("linear_cross_entropy", next(self.parameters()).device.type)
        if not reason and (self._forward_hooks or self._backward_hooks or self._backward_pre_hooks):
            reason = "hooks on the head have to run"
        return reason or ("global hooks of torch.nn have to run" if any_global_hook() else freed_reason(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, DefersLoss):  # restored, and called by who held the bound method
            return type(self).forward(self, *args, **kwargs)
        step, call = _step(), None
        if step is not None and step.head is self and len(args) == 1 and not kwargs and accepts_input(args[0]):
            if args[0].dim() >= 2 and torch.is_grad_enabled() and self.head_reason() is None:
                call = self._call(*args)
        if call is None or not any(getattr(t, "requires_grad", False) for t in (*args, *call.operands.values())):
            return super().forward(*args, **kwargs)
        step.calls.append(call)
        return Pending(call)


class LinearHead(DefersLoss, FusedLinear):
    """A frozen ``nn.Linear`` whose outputs are a model's logits."""

    def _reason(self) -> Optional[str]:
        if replaced_on_instance(self):
            return "its forward was replaced on the instance (accelerate's device hooks do that)"
        return weight_reason(self)

    def _call(self, x: Tensor) -> Optional[Call]:
        if (found := operands(self, x)) is None:
            return None
        _, weight, bias, dtype = found
        return Call(self, (x,), dtype, super(DefersLoss, self).forward, {"weight": weight, "bias": bias})


LinearHead.__name__, LinearHead.stock_class = "Linear", nn.Linear
STOCK[LinearHead] = nn.Linear
LINEAR.append(LinearHead)

# Head by the class of a layer, stock or fused; and the classes of heads, with the class of the layer alone.
HEADS: dict[type, type] = {nn.Linear: LinearHead, FusedLinear: LinearHead}
LAYERS: dict[type, type] = {LinearHead: nn.Linear}

if FusedLoraLinear is not None:

    class LoraHead(DefersLoss, FusedLoraLinear):
        """A head with one LoRA adapter over a frozen weight. Its dropout is PEFT's own, of PyTorch's mask."""

        def _reason(self) -> Optional[str]:
            reason, alone = self._reasons()
            if reason or alone:
                return reason or alone
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
    """A model of transformers, the head of which leaves its logits to the loss function in a training step."""

    stock_class: type
    stock_loss_function: Callable[..., Any]

    def __init_subclass__(cls, **_: Any) -> None:
        """Does nothing: transformers' own would take the made class for a new model."""

    @property
    def loss_function(self) -> Any:
        if torch.compiler.is_compiling():  # which can't trace a property of super()
            return self.stock_loss_function()
        function, step = super().loss_function, _step()
        return function if step is None or step.model is not self else functools.partial(_loss, function)

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        super(LanguageModel, type(self)).loss_function.__set__(self, value)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class was made at run time: it is made again from the model's.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.stock_class,), *state


def _new(stock: type) -> Any:
    kind = _on_loss(stock)
    return kind.__new__(kind)


@functools.cache
def _on_loss(stock: type) -> type:
    """Returns the subclass of a model's class ``stock`` that leaves its logits to the loss, made once."""
    names = list(inspect.signature(stock.forward).parameters)
    at = names.index("labels") - 1 if "labels" in names else sys.maxsize

    @functools.wraps(stock.forward)  # whose signature Trainer and generate read
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, LanguageModel):  # restored, and called by who held the bound method
            return type(self).forward(self, *args, **kwargs)
        run = super(LanguageModel, self).forward
        if torch.compiler.is_compiling() or not self.training or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        labels = args[at] if at < len(args) else kwargs.get("labels")
        known = labels is not None and _is_known_loss(super(LanguageModel, self).loss_function)
        if not known or under_a_transform() or torch.jit.is_tracing() or "_is_replica" in self.__dict__:
            return run(*args, **kwargs)
        before, step = _step(), SimpleNamespace(model=self, head=_head_of(self), calls=[])
        _THREAD.step = step
        try:
            output = run(*args, **kwargs)
        finally:
            _THREAD.step = before
        return _settled(output, step)

    held = {"stock_class": stock, "stock_forward": stock.forward, "stock_loss_function": stock.loss_function.fget,
            "forward": forward, "__doc__": stock.__doc__, "__module__": stock.__module__}  # fmt: skip
    made = type.__new__(type(stock), stock.__name__, (LanguageModel, stock), held)
    STOCK[made] = stock
    return made


def _loss(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Takes a Pending that nothing has used past the logits; else calls the model's loss function with real logits."""
    first = args[0] if args else kwargs.get("logits")
    if type(first) is Pending and first._call.real is None:
        named = {name: value for name, value in kwargs.items() if name != "logits"}
        if len(args) <= 6 and (loss := first._call.loss(*args[1:], **named)) is not None:
            return loss
    args, kwargs = pytree.tree_map(_real, (args, kwargs))
    return function(*args, **kwargs)


# --- what a forward returns -------------------------------------------------------------------------------------------


def _settled(output: Any, step: Any) -> Any:
    """Returns a forward's output with real logits, or of a ModelOutput with logits that wait to be asked for."""
    used = "its forward does not hand its head's logits to its loss function"
    if any(call.real is not None for call in step.calls):
        used = "its forward uses the logits before the loss (a soft cap, a scale, ...), or has another loss"
    elif any(call.is_taken for call in step.calls):
        used = ""
    if isinstance(output, ModelOutput) and (node := getattr(output.__dict__.get("loss"), "grad_fn", None)) is not None:
        logits = output.__dict__.get("logits")
        if type(logits) is Pending and logits._call.is_taken and logits._call.real is None:
            node.metadata[_CALL] = weakref.ref(logits._call)
            OrderedDict.__delitem__(output, "logits")
            del output.__dict__["logits"]
            output.__class__, output.__dict__[_CALL] = _waiting(type(output)), logits._call
    output = _without_pending(output)
    if not used and any(call.real is not None for call in step.calls):
        used = "its forward returns the logits in a tuple"
    _USED[step.model] = used
    return output


def _without_pending(value: Any) -> Any:
    if pytree.tree_any(lambda one: type(one) is Pending, value):
        return pytree.tree_map(_real, value)
    for name, one in list(getattr(value, "__dict__", {}).items()):  # of an output that is no container
        if type(one) is Pending:
            setattr(value, name, _real(one))
    return value


class _Logits:
    """The logits of an output that waits. No field: FSDP2 searches fields for tensors, DDP and pytrees items."""

    def __get__(self, output: Any, kind: Any = None) -> Any:
        return None if output is None else output._whole().logits


def _call_behind(nodes: list[Any], depth: int = 4) -> Optional[Call]:
    """Returns the call behind a loss that may have been cast or copied since; None: there is none, or several."""
    nodes = [node for node in nodes if node is not None]
    if found := [node.metadata[_CALL] for node in nodes if _CALL in node.metadata]:
        return found[0]() if len(found) == 1 else None
    return _call_behind([one for node in nodes for one, _ in node.next_functions], depth - 1) if depth else None


class _Waits:
    """An output until its logits are asked for, by name or place; it then has the class that it would have had."""

    logits = _Logits()

    def _whole(self) -> Any:
        if (call := self.__dict__.get(_CALL)) is None:
            raise RuntimeError("peft_ext: this copy of a model's output has lost its logits; read the output's own")
        logits = call.logits().float() if call.is_widened else call.logits()
        del self.__dict__[_CALL]
        self.__class__ = type(self).__mro__[2]
        self["logits"] = logits
        names = list(self.__dataclass_fields__)
        for name in names[names.index("logits") + 1 :]:
            if name in self.keys():
                self.move_to_end(name)
        return self

    def __post_init__(self) -> None:
        """Of an output made of another's items, as DDP, FSDP and accelerate do: finds the call behind the loss."""
        if (logits := self.__dict__.pop("logits", None)) is not None:
            self.__class__ = type(self).__mro__[2]
            self["logits"] = logits
            return self.__post_init__()
        is_accelerates = isinstance(self.__dict__.get("loss"), dict)
        super().__post_init__()
        call = self.__dict__[_CALL] = _call_behind([getattr(self.__dict__.get("loss"), "grad_fn", None)])
        if call is not None and is_accelerates:
            call.is_widened = call.is_widened or call.autocast.keywords["enabled"]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and key == 0:
            return next(iter(self.values()))  # the loss
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
    """Returns the subclass of an output's class whose logits wait. One for all: the garbage collector alone frees a
    class, and hidden states that it reaches would wait for that."""
    fields = {name: field for name, field in kind.__dataclass_fields__.items() if name != "logits"}
    held = {"__doc__": kind.__doc__, "__module__": __name__, "__dataclass_fields__": fields}
    made = type(kind)(kind.__name__, (_Waits, kind), held)
    made.__qualname__ = kind.__qualname__
    return made


# --- accelerate, restore, explain -------------------------------------------------------------------------------------

# Why the last training step of a model had whole logits; empty: it had none.
_USED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _head_of(owner: Any) -> Optional[nn.Module]:
    try:
        found = owner.get_output_embeddings()
    except Exception:  # a model without a head; another's method of this name, which wants arguments
        return None
    return found if isinstance(found, nn.Module) else None


def _owners(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields the language models in ``model``, each with its head."""
    seen: set[int] = set()  # a model and the one around it may name the same
    for module in model.modules():
        if hasattr(type(module), "get_output_embeddings") and (head := _head_of(module)) is not None:
            if id(head) not in seen:
                seen.add(id(head))
                yield module, head


def defer_losses(model: nn.Module) -> None:
    """Gives each language model with a known loss function, and its head, the class that leaves the logits to it."""
    _LOSSES.clear()
    for owner, layer in list(_owners(model)):
        has_points = type(layer) in HEADS and isinstance(getattr(type(owner), "loss_function", None), property)
        if has_points and _is_known_loss(owner.loss_function):
            layer.__class__ = HEADS[type(layer)]
            if not isinstance(owner, LanguageModel):  # as it stays where fully_shard has made a class of the class
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
    """Yields the heads of the language models in ``model``, each with the reason why its logits are computed whole."""
    _LOSSES.clear()
    for owner, layer in _owners(model):
        yield layer, _reason(owner, layer)


def _reason(owner: Any, layer: nn.Module) -> Optional[str]:
    if not isinstance(layer, DefersLoss) and type(layer) not in HEADS:
        return f"its head is a {class_name(type(layer))}, wanted a Linear, or LoRA over one"
    if not _is_known_loss(getattr(owner, "loss_function", None)):
        return "its loss function is none of the known ones"
    if not isinstance(layer, DefersLoss) or not isinstance(owner, LanguageModel):
        return "accelerate(model) was not called on it, or with blocks=False"
    if reason := layer.head_reason():
        return reason
    if replaced_on_instance(owner):
        inner = (owner.__dict__.get(name) for name in ("_original_forward", "_old_forward"))  # accelerate's, around it
        if not any(getattr(one, "__func__", None) is type(owner).forward for one in inner):
            return "the model's forward was replaced on the instance (TRL does, and computes the loss by itself)"
    return _USED.get(owner) or None
