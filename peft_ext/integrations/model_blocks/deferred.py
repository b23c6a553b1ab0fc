"""Logits that are not computed before something reads them, so that a loss of them never has them whole.

A head (:mod:`.head`) returns :class:`DeferredLogits` while a model trains. What losses do to logits on their way, a
change of dtype, of shape, a choice of positions, a scale, a soft cap, is recorded; ``F.cross_entropy`` of what is left
runs as :func:`peft_ext.ops.linear_cross_entropy` of the hidden states. Whatever else is asked of them, from Python or
below it, gets the real logits, that the layer's own forward computes then, with all that was recorded done to them:
reading, printing, metrics, another loss, other gradients. They are a tensor to every caller.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import distributed
from torch.utils._pytree import tree_map  # noqa: PLC2701  torch has no public name for it

from ... import ops
from ...weight import FLOATS
from ..adapter_layers.reasons import is_plain

__all__ = ["DeferredLogits", "Head"]

_NO_GRADIENT = (
    "{what} of a model's logits after its loss was computed: the loss did not go through the logits, which are not "
    "computed in training. Ask before the loss, or call peft_ext.accelerate(model, blocks=False)"
)


_EDITED = (
    "peft_ext: a gradient of logits that were changed in place and then given to a function below Python (an "
    "autograd.Function, say): it would lack the change. Change a copy, or call peft_ext.accelerate(model, blocks=False)"
)


class Head:
    """One call of a head: its hidden states, how to compute its logits, and what its loss takes instead.

    Args:
        inputs: what the logits of a position are computed from, ``[..., K]`` each: the hidden states, as the head got
            them, and, of an adapter with dropout, what that left of them.
        outputs: V. dtype: of the logits.
        forward: ``*inputs -> logits``, the layer's own.
        state: what that computes with beside the inputs, to be compared; first of it what the operands do not show.
        operands: what :func:`peft_ext.ops.linear_cross_entropy` takes beside inputs and labels.
        parameters: the tensors of the head that train.
    """

    def __init__(
        self, inputs: Sequence[Tensor], outputs: int, dtype: torch.dtype, forward: Callable[..., Tensor],
        operands: dict[str, Any], parameters: Sequence[Tensor] = (), state: Callable[[], Any] = tuple,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs, self.dtype = tuple(inputs), outputs, dtype
        self.operands, self.parameters = operands, tuple(parameters)
        self.lost = False  # a loss was computed without the logits
        self.edited = False  # values were read of logits that had been changed in place, with a graph of their own
        self.hooks: list[Callable[[Tensor], Any]] = []  # FSDP's, which any gradient that comes back has to run
        device = inputs[0].device.type
        self._forward = forward
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._state, self._state_then = state, state()
        self._versions = self._versions_now()
        self._logits: Optional[Tensor] = None
        self._logits_version, self.node = 0, None
        self._derived: list[weakref.ref[DeferredLogits]] = []

    def _versions_now(self) -> list[int]:
        held = [value for value in self.operands.values() if isinstance(value, Tensor)]
        return [t._version for t in (*self.inputs, *self.parameters, *held) if not t.is_inference()]

    def autocast(self) -> torch.autocast:
        """Returns the autocast that the head was called in."""
        device, dtype, enabled = self._autocast
        return torch.autocast(device, dtype, enabled=enabled)

    def compute(self, *inputs: Tensor) -> Tensor:
        """Returns the logits by the layer's own forward."""
        self.check(self._state() == self._state_then)
        with self.autocast():
            return self._forward(*inputs)

    def check(self, is_as_it_was: bool = True) -> None:
        merged = self._state()[:1] == self._state_then[:1]
        if not (is_as_it_was and merged) or self._versions != self._versions_now():
            raise RuntimeError(
                "peft_ext: the logits are read after their hidden states, or the head's weight or adapter, were "
                "changed in place (by an optimizer's step?) or replaced (by FSDP2, whose backward frees it?), and were "
                "not computed before. Read them earlier, or call peft_ext.accelerate(model, blocks=False)"
            )

    def logits(self) -> Tensor:
        """Returns the real logits, computed once and with their graph, as the layer would have returned them; with all
        that was recorded of them, which a change in place must not reach where it is a copy."""
        if self._logits is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._logits = self.compute(*self.inputs)
            self._logits_version, self.node = self._logits._version, self._logits.grad_fn
            for hook in self.hooks if self._logits.requires_grad else ():
                self._logits.register_hook(hook)
            for deferred in [held() for held in self._derived]:
                if deferred is not None:
                    deferred.real()
        return self._logits

    @property
    def is_computed(self) -> bool:
        """Whether the logits were computed."""
        return self._logits is not None

    @property
    def is_real(self) -> bool:
        """Whether the logits were computed with their graph: a loss then goes through them."""
        return self._logits is not None and self._logits.requires_grad

    def gradients(self, wanted: Sequence[Tensor], grad: Tensor) -> Optional[tuple[Tensor, ...]]:
        """Returns those of ``wanted``, of the inputs and parameters, through the logits that were computed; None: there
        are none, something was done to them or their gradient, or one input is made of another."""
        logits = self._logits
        if not self.is_real or logits._version != self._logits_version or logits._backward_hooks:
            return None
        return None if len(self.inputs) > 1 else torch.autograd.grad(logits, wanted, grad, retain_graph=True)

    def defer(self) -> DeferredLogits:
        """Returns the logits, not computed yet."""
        deferred = _Defer.apply(self, *self.inputs, *self.parameters)
        deferred._begin(self, self.inputs)
        return deferred

    def derive(
        self, parent: DeferredLogits, step: Step, inputs: tuple[Tensor, ...], dtype: torch.dtype, second: bool
    ) -> DeferredLogits:
        """Returns what ``step`` makes of ``parent``, not computed either; with the classes ``second`` or last."""
        leading = inputs[0].shape[:-1]
        shape = (leading[0], self.outputs, *leading[1:]) if second else (*leading, self.outputs)
        with torch._C.DisableTorchFunctionSubclass():
            deferred = _Derive.apply(parent, step, shape, dtype)
        deferred._begin(self, inputs, parent, step, second)
        self._derived.append(weakref.ref(deferred))
        return deferred

    def copy(self, parent: DeferredLogits) -> DeferredLogits:
        """Returns a copy of ``parent``, not computed either, whose graph is its caller's to make."""
        with torch._C.DisableTorchFunctionSubclass():
            deferred = _empty(parent.shape, parent.dtype, parent.device)
        deferred._begin(self, parent._inputs, parent, Step(Tensor.clone, (), {}), parent._second)
        self._derived.append(weakref.ref(deferred))
        return deferred


class Step:
    """A recorded call: a function of the logits, and what it was given beside them."""

    def __init__(self, function: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits, *self.args, **self.kwargs)


class _Defer(torch.autograd.Function):
    """The graph of deferred logits, for what reads them below Python: a gradient through the layer's own forward."""

    @staticmethod
    def forward(ctx: Any, head: Head, *tensors: Tensor) -> Tensor:
        ctx.head = head
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _empty((*tensors[0].shape[:-1], head.outputs), head.dtype, tensors[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(tensors))
        if ctx.head.edited:
            raise RuntimeError(_EDITED)
        count = len(ctx.head.inputs)
        held = (*ctx.head.inputs, *ctx.head.parameters)
        found = ctx.head.gradients([value for value, need in zip(held, needs, strict=True) if need], grad)
        if found is not None:
            found = iter(found)
            return None, *(next(found) if need else None for need in needs)
        with torch.enable_grad():
            inputs = [value.detach().requires_grad_(need) for value, need in zip(tensors[:count], needs, strict=False)]
            logits = ctx.head.compute(*inputs)
        wanted = [value for value, need in zip((*inputs, *tensors[count:]), needs, strict=True) if need]
        found = iter(torch.autograd.grad(logits, wanted, grad))
        return None, *(next(found) if need else None for need in needs)


class _Derive(torch.autograd.Function):
    """The graph of what was recorded."""

    @staticmethod
    def forward(ctx: Any, parent: Tensor, step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.step, ctx.shape, ctx.dtype = step, parent.shape, parent.dtype
        ctx.linear = step.function not in _TANH
        ctx.set_materialize_grads(False)
        if not ctx.linear:
            ctx.parent = parent
        return _empty(shape, dtype, parent.device)

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        if grad is None:
            return (None,) * 4
        with torch.enable_grad():
            # A linear step's gradient does not depend on where it is taken.
            at = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device) if ctx.linear else _value(ctx.parent)
            at = at.detach().requires_grad_()
            return torch.autograd.grad(ctx.step(at), at, grad)[0], None, None, None


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> DeferredLogits:
    return Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=dtype, device=device)


class DeferredLogits(Tensor):
    """Logits ``[..., V]`` that are computed where something reads them."""

    _head: Head
    _inputs: tuple[Tensor, ...]

    def _begin(
        self, head: Head, inputs: tuple[Tensor, ...], parent: Optional[DeferredLogits] = None,
        step: Optional[Step] = None, second: bool = False,
    ) -> None:  # fmt: skip
        # What a cross entropy of these takes: inputs [..., K] of the positions that are left, z = c tanh(a x / c).
        self._head, self._inputs, self._second = head, inputs, second
        self._scale, self._softcap, self._in_tanh = 1.0, 0.0, False
        self._real: Optional[Tensor] = None
        self._node: Any = None
        self._parent, self._step = parent, step
        self._is_derived = parent is not None
        if parent is not None:
            self._scale, self._softcap, self._in_tanh = parent._scale, parent._softcap, parent._in_tanh

    def real(self) -> Tensor:
        """Returns the real logits with all steps done to them, computed once and with their graph."""
        logits = self._head.logits()  # and all that is derived of them
        if not self._is_derived:
            return logits
        if self._real is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._real = self._step(self._parent.real())
            self._node = self._real.grad_fn
            self._parent = None  # what nobody else holds is freed
        return self._real

    def read(self) -> Tensor:
        """Returns :meth:`real` to what takes the values alone, and may have a gradient for them later."""
        value = self.real()
        self._head.edited |= value.grad_fn is not (self._node if self._is_derived else self._head.node)
        return value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA or (func in _OF_VIEWS and not args[0]._is_derived and not args[0]._head.is_computed):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (record := _RECORDS.get(func)) is not None and args and isinstance(args[0], cls):
            if (found := record(func, *args, **kwargs)) is not None:
                return found
        if func is F.cross_entropy and (found := _cross_entropy(*args, **kwargs)) is not None:
            return found
        if func in _OF_THE_GRAPH:
            return _of_the_graph(func, args, kwargs)
        if func == Tensor.grad.__get__ and not args[0]._head.is_real:
            return None  # as of any tensor that is not to retain it
        real = cls.real if torch.is_grad_enabled() else cls.read
        args, kwargs = tree_map(lambda value: real(value) if isinstance(value, cls) else value, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        # Below autograd, which has recorded the call on these logits: the values alone are wanted.
        args, kwargs = tree_map(lambda value: _value(value) if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _value(deferred: DeferredLogits) -> Tensor:
    with torch.no_grad():
        return deferred.read().detach()


def _deferred_in(values: Any) -> list[DeferredLogits]:
    found: list[DeferredLogits] = []
    tree_map(lambda value: found.append(value) if isinstance(value, DeferredLogits) else None, values)
    return found


# --- what is recorded -------------------------------------------------------------------------------------------------


def _same(value: Tensor) -> Tensor:
    return value


def _derive(
    logits: DeferredLogits, step: Step, of_inputs: Callable[[Tensor], Tensor] = _same, dtype: Any = None,
    second: bool = False,
) -> Optional[DeferredLogits]:  # fmt: skip
    # Without a graph something computes values: an autograd.Function, say, whose backward is its own. Where somebody
    # has the logits already, a loss is to go through them.
    if logits._head.is_real or not torch.is_grad_enabled():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        dtype = dtype or logits.dtype
    return logits._head.derive(logits, step, tuple(map(of_inputs, logits._inputs)), dtype, second or logits._second)


def _derive_leading(
    logits: DeferredLogits, step: Step, of_inputs: Optional[Callable[[Tensor], Tensor]] = None
) -> Optional[DeferredLogits]:
    """Of a step that leaves the last dimension alone, where that is the classes': the inputs' [..., K] take it too."""
    if logits._second:
        return None
    try:
        return _derive(logits, step, of_inputs or step)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None  # to be PyTorch's own, of the logits


def _record_float(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    return None if args or kwargs else _derive(logits, Step(func, (), {}), dtype=torch.float32)


def _record_to(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    """Of ``to(dtype)``, ``type(dtype)``, and ``to(device)`` of the device where they are."""
    wanted = [*args, *kwargs.values()]
    if len(wanted) != 1 or set(kwargs) - {"dtype", "device"}:
        return None
    if func is Tensor.type and not isinstance(wanted[0], torch.dtype):
        return None
    if isinstance(wanted[0], torch.dtype):
        wide = wanted[0] in FLOATS and torch.promote_types(wanted[0], logits.dtype) is wanted[0]
        return _derive(logits, Step(func, args, kwargs), dtype=wanted[0]) if wide else None
    if isinstance(wanted[0], (str, torch.device)) and torch.device(wanted[0]) == logits.device:
        return logits
    return None


def _record_contiguous(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    if args or kwargs or not logits._is_derived:
        return None if args or kwargs else logits
    return _derive(logits, Step(func, (), {}))  # a copy of some, which a view wants in one piece


def _record_clone(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    if args or kwargs:
        return None
    if not torch.is_grad_enabled() and not logits._head.is_real and _in_ddp():
        return logits._head.copy(logits)
    return _derive(logits, Step(func, (), {}))


def _in_ddp() -> bool:
    """Returns whether DDP copies what a model returned, to see which outputs get gradients (find_unused_parameters).

    The graph of its copy hands gradients on as they are, so that a loss may go past it. That of a static graph does
    more.
    """
    frame = sys._getframe(3)  # of this function, of the record, of __torch_function__
    for _ in range(2):  # a generator's, within its own
        if frame is not None and frame.f_code is _DDP_COPIES:
            ddp = frame.f_locals.get("ddp_weakref", lambda: None)()
            return ddp is not None and not ddp.static_graph
        frame = frame and frame.f_back
    return False


def _record_view(func: Any, logits: DeferredLogits, *shape: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    """Of a shape whose last dimension is V still."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if kwargs or not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    if sizes[-1] == -1 and -1 not in sizes[:-1]:
        whole = logits.numel() == logits.shape[-1] * torch.Size(sizes[:-1]).numel()
        sizes = (*sizes[:-1], logits.shape[-1]) if whole else sizes
    if sizes[-1] != logits.shape[-1] or logits._second:
        return None
    return _derive(logits, Step(func, shape, {}), lambda value: value.reshape(*sizes[:-1], value.shape[-1]))


def _record_flatten(
    func: Any, logits: DeferredLogits, start_dim: int = 0, end_dim: int = -1
) -> Optional[DeferredLogits]:
    leading = _is_leading(start_dim, logits.dim()) and _is_leading(end_dim, logits.dim())
    return _derive_leading(logits, Step(func, (start_dim, end_dim), {})) if leading else None


def _record_squeeze(func: Any, logits: DeferredLogits, *dim: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    count, given = logits.dim(), [*dim, *kwargs.values()]
    if len(given) > 1 or set(kwargs) - {"dim"} or (not given and logits.shape[-1] == 1):
        return None
    dims = given[0] if given else range(count - 1)
    dims = tuple(dims) if isinstance(dims, (tuple, list, range)) else (dims,)
    if not all(_is_leading(one, count) for one in dims):
        return None
    return _derive_leading(logits, Step(func, dim, kwargs), lambda value: value.squeeze(dims))


def _record_unsqueeze(func: Any, logits: DeferredLogits, dim: Any) -> Optional[DeferredLogits]:
    return _derive_leading(logits, Step(func, (dim,), {})) if _is_leading(dim, logits.dim() + 1) else None


def _record_narrow(func: Any, logits: DeferredLogits, dim: Any, start: Any, length: Any) -> Optional[DeferredLogits]:
    if not _is_leading(dim, logits.dim()) or not isinstance(start, int) or not isinstance(length, int):
        return None
    return _derive_leading(logits, Step(func, (dim, start, length), {}))


def _is_leading(dim: Any, count: int) -> bool:
    """Returns whether ``dim`` of ``count`` is one before the last."""
    return isinstance(dim, int) and -count <= dim < count and dim % count != count - 1


def _record_permutation(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    """Of the order ``[B, V, ...]``, in which a cross entropy takes logits of more than two dimensions."""
    count = logits.dim()
    if logits._second or count < 3:
        return None
    try:
        sizes = func(torch.empty(tuple(range(count)), device="meta"), *args, **kwargs).shape
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    if sizes != (0, count - 1, *range(1, count - 1)):
        return None
    return _derive(logits, Step(func, args, kwargs), second=True)


def _record_index(func: Any, logits: DeferredLogits, index: Any) -> Optional[DeferredLogits]:
    """Of the dimensions before the last: slices, numbers, tensors of these, masks, new dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    taken = [_taken(part) for part in parts]
    if None in taken or sum(part is Ellipsis for part in parts) > 1 or sum(taken) > logits.dim():
        return None
    for at, part in enumerate(parts):
        if part is Ellipsis:
            parts = (*parts[:at], *[slice(None)] * (logits.dim() - sum(taken)), *parts[at + 1 :])
            break
    if sum(map(_taken, parts)) == logits.dim():  # the classes too, of which all have to be left
        if not isinstance(parts[-1], slice) or parts[-1] != slice(None):
            return None
        parts = parts[:-1]
    # Copies: the logits may be computed after a mask was changed.
    parts = tuple(part.clone() if isinstance(part, Tensor) else part for part in parts)
    return _derive_leading(logits, Step(func, (parts,), {}))


def _taken(part: Any) -> Optional[int]:
    """Returns of how many dimensions a part of an index chooses; None: it is not recorded."""
    if part is Ellipsis or part is None:
        return 0
    if isinstance(part, slice):
        return 1 if all(type(at) in (int, type(None)) for at in (part.start, part.stop, part.step)) else None
    if type(part) is int:
        return 1
    if isinstance(part, Tensor) and is_plain(part):
        if part.dtype is torch.bool:
            return part.dim() or None
        return 1 if part.dtype in (torch.int64, torch.int32) else None
    return None


def _record_scale(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Optional[DeferredLogits]:
    """Of a product with a number, or a quotient by one: of the cap's tanh once, by the cap itself."""
    factor = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not factor or not math.isfinite(factor):
        return None
    times = 1.0 / factor if func in _DIVISIONS else float(factor)
    if logits._softcap or (logits._in_tanh and times <= 0):
        return None
    if (derived := _derive(logits, Step(func, (factor,), {}))) is None:
        return None
    derived._scale = logits._scale * times
    derived._softcap = times if logits._in_tanh else 0.0
    return derived


def _record_tanh(func: Any, logits: DeferredLogits, **kwargs: Any) -> Optional[DeferredLogits]:
    if kwargs or logits._in_tanh or (derived := _derive(logits, Step(func, (), {}))) is None:
        return None
    derived._in_tanh = True
    return derived


def _cross_entropy(
    logits: Any, labels: Any, weight: Optional[Tensor] = None, size_average: Optional[bool] = None,
    ignore_index: int = -100, reduce: Optional[bool] = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Optional[Tensor]:  # fmt: skip
    """Returns the loss of deferred logits ``[T, V]`` or ``[B, V, ...]``; None: PyTorch's own of the real ones."""
    known = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    if not known or not isinstance(logits, DeferredLogits) or isinstance(labels, DeferredLogits):
        return None
    head, (hidden, *low) = logits._head, logits._inputs
    if head.is_real or (logits._in_tanh and not logits._softcap) or not torch.is_grad_enabled():
        return None
    if not is_plain(labels) or labels.dtype is not torch.int64 or labels.shape != hidden.shape[:-1]:
        return None
    if not (logits._second or hidden.dim() == 2) or labels.device != hidden.device:
        return None
    head.check()
    try:
        with head.autocast():
            loss = ops.linear_cross_entropy(
                hidden, labels=labels, lora_input=low[0] if low else None, **head.operands, logit_scale=logits._scale,
                softcap=logits._softcap or None, label_smoothing=label_smoothing, ignore_index=ignore_index,
                reduction=reduction,
            )  # fmt: skip
    except RuntimeError as error:
        outside = labels[((labels < 0) | (labels >= head.outputs)) & (labels != ignore_index)]
        if hidden.device.type != "cpu" or not outside.numel():
            raise
        wanted = f"0 to {head.outputs - 1}, or {ignore_index}, which is ignored"
        raise IndexError(f"Target {outside[0].item()} is out of bounds. cross_entropy: wanted {wanted}") from error
    head.lost = True
    # Autocast takes a loss in float32.
    loss = loss if torch.is_autocast_enabled(hidden.device.type) else loss.to(logits.dtype)
    for hook in head.hooks if loss.requires_grad else ():
        loss.register_hook(hook)
    return loss


def _of_the_graph(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A hook on the logits, or their gradient: they are computed for it, so that the loss goes through them."""
    hook = args[1] if len(args) > 1 else kwargs.get("hook")
    is_engines = func is Tensor.register_hook and _is_engines(hook)
    if is_engines and not args[0]._head.is_computed:
        args[0]._head.hooks.append(hook)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    for value in _deferred_in((args, kwargs)):
        if value._head.lost and not is_engines:
            raise RuntimeError("peft_ext: " + _NO_GRADIENT.format(what=getattr(func, "__name__", "a gradient")))
    args, kwargs = tree_map(lambda value: value.real() if isinstance(value, DeferredLogits) else value, (args, kwargs))
    return func(*args, **kwargs)


def _is_engines(hook: Any) -> bool:
    """Returns whether FSDP asks for a hook on all that a module returns: its own work, whatever the gradient is."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


_DIVISIONS = {Tensor.div, Tensor.true_divide, Tensor.__truediv__, torch.div, torch.true_divide}
_PRODUCTS = {Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply}
_TANH = {Tensor.tanh, torch.tanh}
_PERMUTATIONS = {
    getattr(kind, name)
    for kind in (torch, Tensor)
    for name in ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis")
} | {Tensor.mT.__get__}
_RECORDS: dict[Any, Callable[..., Union[DeferredLogits, None]]] = {
    Tensor.float: _record_float,
    Tensor.to: _record_to,
    Tensor.contiguous: _record_contiguous,
    Tensor.view: _record_view,
    Tensor.reshape: _record_view,
    torch.reshape: _record_view,
    Tensor.__getitem__: _record_index,
    Tensor.type: _record_to,
    **dict.fromkeys((Tensor.clone, torch.clone), _record_clone),
    **dict.fromkeys((Tensor.flatten, torch.flatten), _record_flatten),
    **dict.fromkeys((Tensor.squeeze, torch.squeeze), _record_squeeze),
    **dict.fromkeys((Tensor.unsqueeze, torch.unsqueeze), _record_unsqueeze),
    **dict.fromkeys((Tensor.narrow, torch.narrow), _record_narrow),
    **dict.fromkeys(_PERMUTATIONS, _record_permutation),
    **dict.fromkeys(_DIVISIONS | _PRODUCTS, _record_scale),
    **dict.fromkeys(_TANH, _record_tanh),
}
_OF_THE_GRAPH = {Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad}
_OF_VIEWS = {Tensor._base.__get__, Tensor._is_view}  # no view of anything, before they are computed
_DDP_COPIES = getattr(getattr(getattr(distributed, "_DDPSink", None), "forward", None), "__code__", None)
_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
                 "is_cpu", "is_meta", "is_mps", "is_xla", "is_xpu", "is_sparse", "is_quantized", "is_nested", "names",
                 "_version", "output_nr", "itemsize", "nbytes", "is_mkldnn")
    if hasattr(getattr(Tensor, name, None), "__get__")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex, torch.numel,
    Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.__hash__, Tensor.is_inference,
    Tensor.storage_offset,
}  # fmt: skip
