"""The logits of a language model's head that are not computed before something uses them.

In a training step a fused head (see :mod:`.loss`) returns a :class:`Pending`, a plain object, in place of logits. If a
loss function gets a Pending that nothing has used, :meth:`Call.loss` computes the loss without whole logits. If the
model scales or soft-caps the logits or casts them to float32, a new Pending records the step, and :meth:`Call.loss`
applies the step. Reading the shape, dtype or device of a Pending computes nothing. Other uses of the Pending, such as
indexing, compute the real logits; the real logits are computed once.

torch.compile traces a Pending: a compiled forward has the operator of the loss in its graph, and no logits. The
``logits`` of a compiled forward's output is the Pending, which computes the logits outside of the graph when it is
used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # noqa: PLC2701  torch has no public name for it

from ... import ops
from ..adapter_layers.reasons import plain_types

__all__ = ["Call", "Pending", "computed", "real"]

# Keyword arguments of a model's forward that reach the model's loss function, and that the loss function ignores.
_IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
})  # fmt: skip
# The functions of torch.nn.functional as they were at import, by name. Another library may replace a function in
# torch.nn.functional later.
_FUNCTIONAL = {name: value for name, value in vars(F).items() if getattr(value, "__globals__", None) is vars(F)}


def _state_of(tensors: list[Tensor]) -> list[list[int]]:
    """Returns for each tensor its version counter (-1 for an inference tensor) and the address of its storage."""
    return [[-1 if one.is_inference() else one._version, one.untyped_storage()._cdata] for one in tensors]


# torch.compile can trace neither a tensor's version counter nor the address of its storage. The graph of a compiled
# forward therefore contains the operator ``state_of``, which reads the version counters and addresses as the graph
# runs.
@torch.library.custom_op("peft_ext_python::state_of", mutates_args=())
def _state_in_graph(tensors: list[Tensor]) -> Tensor:
    return torch.tensor(_state_of(tensors), dtype=torch.int64)


@_state_in_graph.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return torch.empty((len(tensors), 2), dtype=torch.int64, device="cpu")


class Call:
    """One call of a head: the tensors from which the call's logits, or the loss without logits, can be computed.

    ``inputs``: the hidden states and, if the head's adapter has dropout, the hidden states after dropout. ``forward``:
    the function that computes the logits from the inputs as the head does. ``operands``: the arguments of
    ``ops.linear_cross_entropy`` that depend on the head alone.
    """

    def __init__(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, forward: Callable[..., Tensor],
        operands: dict[str, Any],
    ) -> None:  # fmt: skip
        self._is_traced = torch.compiler.is_compiling()
        # Traced code can't check whether the inputs were changed, so a traced Call keeps copies of the inputs. The
        # compiler removes the copy of an input that the graph does not change.
        self.inputs = tuple(x.clone() for x in inputs) if self._is_traced else inputs
        self.operands, self.dtype, self.device = operands, dtype, inputs[0].device
        self.shape = torch.Size((*inputs[0].shape[:-1], operands["weight"].shape[0]))
        self.is_taken = False  # Whether a loss was computed without the logits.
        self.is_widened = False  # Whether mixed precision of the library accelerate cast the outputs to float32.
        self.logits: Optional[Tensor] = None
        # The Pendings of this call's logits, and of the scaled or capped logits, while the model's forward runs.
        self.pending: list[Pending] = []
        device = self.device.type
        self.has_autocast = torch.is_autocast_enabled(device)
        self._autocast = device, torch.get_autocast_dtype(device)
        self._layer, self._forward = layer, forward
        self._settings_then, self._tensors_then = self._settings(), self._tensors()
        self._state_then: Any = (_state_in_graph if self._is_traced else _state_of)(self._tensors_then)

    def autocast(self) -> torch.autocast:
        """Returns an autocast context with the settings under which the head was called."""
        return torch.autocast(*self._autocast, enabled=self.has_autocast)

    def _settings(self) -> tuple:
        """Returns the head's class, its merged and its active adapters, and whether its adapters are disabled. These
        settings are compared in addition to the tensors' versions, because a merge need not change a version."""
        names = "merged_adapters", "active_adapters"
        held = (tuple(getattr(self._layer, name, ())) for name in names)
        return type(self._layer), *held, getattr(self._layer, "disable_adapters", False)

    def _tensors(self) -> list[Tensor]:
        """Returns the tensors from which the logits are computed, except inputs that were copied for a trace."""
        operands = [value for value in self.operands.values() if isinstance(value, Tensor)]
        return [*(() if self._is_traced else self.inputs), *self._layer.parameters(), *operands]

    def _is_changed(self) -> bool:
        """Returns whether the inputs, the head or its adapters have changed since the head's call, so that logits
        computed now would differ from the logits of that call."""
        if torch.compiler.is_compiling():
            return False  # torch.compile traces one forward, in which the head's tensors do not change
        found, then = self._tensors(), self._tensors_then
        if len(found) != len(then) or any(one is not other for one, other in zip(found, then, strict=True)):
            return True
        state = self._state_then.tolist() if self._is_traced else self._state_then
        return self._settings() != self._settings_then or _state_of(found) != state

    def compute(self) -> Tensor:
        """Returns the real logits with their autograd graph; the first call computes them by ``forward``. Raises
        RuntimeError if the inputs, the head or its adapters have changed since the head's call."""
        if self.logits is None:
            if self._is_changed():
                raise RuntimeError(
                    "peft_ext: the logits are read after their hidden states, or the head's weight or adapter, were "
                    "changed in place (by an optimizer's step?) or replaced (by FSDP2, whose backward frees it?), and "
                    "were not computed before. Read them earlier, or call peft_ext.accelerate(model, blocks=False)"
                )
            with torch.inference_mode(False), torch.enable_grad(), self.autocast():
                self.logits = self._forward(*self.inputs)
        return self.logits

    def loss(
        self, steps: tuple[Step, ...], labels: Any = None, vocab_size: Any = None, num_items_in_batch: Any = None,
        ignore_index: Any = -100, shift_labels: Any = None, **rest: Any,
    ) -> Optional[Tensor]:  # fmt: skip
        """Returns the causal loss of the logits after ``steps``, by :func:`peft_ext.ops.linear_cross_entropy`.

        Returns None if the model's own loss function has to run on real logits.
        """
        (hidden, *low), items = self.inputs, num_items_in_batch
        given = labels if shift_labels is None else shift_labels
        if rest.keys() - _IGNORED or vocab_size != self.shape[-1] or type(ignore_index) is not int:
            return None
        if (formula := _scale_and_cap(steps)) is None:
            return None
        if type(given) not in plain_types() or given.dtype is not torch.int64:
            return None
        if given.numel() != hidden.shape[:-1].numel() or not torch.is_grad_enabled() or self._is_changed():
            return None
        if isinstance(items, Tensor):
            if type(items) not in plain_types() or items.dim():
                return None
            items = items.to(hidden.device)
        if shift_labels is None:
            given = F.pad(given, (0, 1), value=ignore_index)[..., 1:]
        given = given.reshape(hidden.shape[:-1]).to(hidden.device)
        try:
            with self.autocast():
                loss = ops.linear_cross_entropy(
                    hidden, labels=given, lora_input=low[0] if low else None, **self.operands,
                    logit_scale=formula[0], softcap=formula[1], ignore_index=ignore_index, num_items_in_batch=items,
                )  # fmt: skip
        except RuntimeError:
            outside = ((given < 0) | (given >= vocab_size)) & (given != ignore_index)
            if hidden.device.type != "cpu" or not outside.any():
                raise
            return None  # the model's own loss function then runs, and raises its error for a label out of range
        self.is_taken = True
        return loss


# A step between the head and the loss: ("mul" or "div", number), ("tanh", None) or ("float", None).
Step = tuple[str, Optional[float]]
_APPLIED: dict[str, Callable[..., Tensor]] = {
    "mul": lambda z, number: z * number, "div": lambda z, number: z / number, "tanh": lambda z, _: torch.tanh(z),
    "float": lambda z, _: z.float(),
}  # fmt: skip


def _scale_and_cap(steps: tuple[Step, ...]) -> Optional[tuple[float, Optional[float]]]:
    """Returns the scale s and the cap c if the steps compute ``c tanh(s z / c)`` from logits z, or s and None if the
    steps compute ``s z``. Returns None if the steps compute another function of the logits."""
    scale, inner = 1.0, None
    for name, number in steps:
        if name == "tanh" and inner is not None:
            return None
        if name == "tanh":
            scale, inner = 1.0, scale
        elif name != "float":
            scale = scale * number if name == "mul" else scale / number
    if inner is None:
        return (scale, None) if -math.inf < scale < math.inf else None
    return (inner * scale, scale) if 0.0 < scale < math.inf and -math.inf < inner * scale < math.inf else None


class Pending:
    """Stands for the logits of a head, or for scaled or capped logits, until something uses them. A Pending is no
    tensor.

    A caller of the model gets a Pending only from a compiled forward, as the ``logits`` of the output. The output of a
    forward that is not compiled holds its Pending internally, and gives real logits.
    """

    __array_priority__ = Tensor.__array_priority__

    def __init__(self, call: Call, steps: tuple[Step, ...] = ()) -> None:
        object.__setattr__(self, "_call", call)
        object.__setattr__(self, "_steps", steps)
        object.__setattr__(self, "_value", None)
        call.pending.append(self)

    def __getattr__(self, name: str) -> Any:
        if name == "dtype":
            return torch.float32 if ("float", None) in self._steps else self._call.dtype
        return getattr(self._call if name in ("device", "shape") else real(self), name)

    def _after(self, name: str, number: Any = None) -> Any:
        """Returns a Pending with one more step, or the step's real result if the Pending was computed already, if
        gradients are off, or if ``number`` is no finite number other than 0."""
        is_number = number is None or (type(number) in (float, int) and number != 0 and -math.inf < number < math.inf)
        if self._value is not None or not is_number or not torch.is_grad_enabled():
            return _APPLIED[name](real(self), number)
        return Pending(self._call, (*self._steps, (name, number)))

    def float(self) -> Any:
        return self._after("float")

    def tanh(self) -> Any:
        return self._after("tanh")

    def __mul__(self, other: Any) -> Any:
        return self._after("mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._after("div", other)

    def size(self, dim: Optional[int] = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(real(self), name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        # If a function of torch.nn.functional gets a Pending, `func` is the object that now has the function's name in
        # torch.nn.functional. If a library put a wrapper in the function's place, calling `func` would enter the
        # wrapper again. Therefore a Pending calls PyTorch's own function of the name, as it was at import.
        name = next((name for name, value in vars(F).items() if value is func), None)
        args, kwargs = pytree.tree_map(real, (args, kwargs or {}))
        return _FUNCTIONAL.get(name, func)(*args, **kwargs)


def real(value: Any) -> Any:
    """Returns the real logits of a Pending, and returns any other value unchanged."""
    if type(value) is not Pending:
        return value
    has_grad = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if not (has_grad or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()):
        raise RuntimeError(
            "peft_ext: a forward of an autograd.Function got the logits of a language model before they were computed, "
            "and would lose their gradient. Call peft_ext.accelerate(model, blocks=False)"
        )
    return computed(value)


def computed(pending: Pending) -> Tensor:
    """Returns the logits for which a Pending stands, with the steps of the Pending applied.

    All Pendings of one call of the head are computed at once, because later code may change the logits in place.
    """
    if pending._value is None:
        logits = pending._call.compute()
        for one in (pending, *pending._call.pending):
            if one._value is None:
                with torch.inference_mode(False), torch.enable_grad(), one._call.autocast():
                    value = logits
                    for name, number in one._steps:
                        value = _APPLIED[name](value, number)
                object.__setattr__(one, "_value", value)
    return pending._value


def _through(name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(real(self), name)(*args, **kwargs)


for _name in dir(Tensor):
    _plumbing = {*dir(object), "__torch_dispatch__"} - {
        "__dir__", "__eq__", "__format__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__", "__reduce__",
        "__reduce_ex__", "__repr__", "__str__",
    }  # fmt: skip
    if _name.startswith("__") and _name not in {*_plumbing, *vars(Pending)} and callable(getattr(Tensor, _name)):
        setattr(Pending, _name, _through(_name))
