"""The logits of a language model's head that are not computed before something uses them.

In a training step the head returns a :class:`Pending`, a plain object, in place of logits. A loss function that takes
the Pending unused is computed without whole logits, by :meth:`Call.loss`. Any other use computes the real logits, once.
A scale, a soft cap and a cast to float32 are steps that the Pending notes, and that :meth:`Call.loss` computes.

torch.compile traces a Pending: a compiled forward has the operator of the loss in its graph, and no logits. The output
of a compiled forward has the Pending for ``logits``. The Pending computes the logits, outside of the graph, at any use.
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
from ..adapter_layers.reasons import is_plain

__all__ = ["Call", "Pending", "computed", "real"]

# Keyword arguments of a model's forward that reach its loss function, which ignores them.
_IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
})  # fmt: skip
# PyTorch's own functions, also where somebody replaces them later.
_FUNCTIONAL = {name: value for name, value in vars(F).items() if getattr(value, "__globals__", None) is vars(F)}


def _state_of(tensors: list[Tensor]) -> list[list[int]]:
    """Returns the version of each tensor, -1 in inference mode, and the address of its storage."""
    return [[-1 if one.is_inference() else one._version, one.untyped_storage()._cdata] for one in tensors]


# torch.compile traces neither a version nor an address. A graph has this operator, which reads both as the graph runs.
@torch.library.custom_op("peft_ext_python::state_of", mutates_args=())
def _state_in_graph(tensors: list[Tensor]) -> Tensor:
    return torch.tensor(_state_of(tensors), dtype=torch.int64)


@_state_in_graph.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return torch.empty((len(tensors), 2), dtype=torch.int64, device="cpu")


class Call:
    """One call of a head: the tensors from which its logits are computed, or its loss without logits.

    ``inputs``: the hidden states, and, of an adapter with dropout, the hidden states after dropout. ``forward``:
    computes the logits from the inputs, as the head does. ``operands``: the arguments of ``ops.linear_cross_entropy``
    beside the inputs and the labels.
    """

    def __init__(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, forward: Callable[..., Tensor],
        operands: dict[str, Any],
    ) -> None:  # fmt: skip
        self._is_traced = torch.compiler.is_compiling()
        # A trace sees no change of the inputs: it takes copies, which the compiler removes where nothing is changed.
        self.inputs = tuple(x.clone() for x in inputs) if self._is_traced else inputs
        self.operands, self.dtype, self.device = operands, dtype, inputs[0].device
        self.shape = torch.Size((*inputs[0].shape[:-1], operands["weight"].shape[0]))
        self.is_taken = False  # a loss was computed without the logits
        self.is_widened = False  # by accelerate's mixed precision, which casts the outputs of a model to float32
        self.logits: Optional[Tensor] = None
        # All that stand for these logits or a function of them, while the model's forward runs.
        self.pending: list[Pending] = []
        device = self.device.type
        self.has_autocast = torch.is_autocast_enabled(device)
        self._autocast = device, torch.get_autocast_dtype(device)
        self._layer, self._forward = layer, forward
        self._settings_then, self._tensors_then = self._settings(), self._tensors()
        self._state_then: Any = (_state_in_graph if self._is_traced else _state_of)(self._tensors_then)

    def autocast(self) -> torch.autocast:
        """Returns the autocast under which the head was called."""
        return torch.autocast(*self._autocast, enabled=self.has_autocast)

    def _settings(self) -> tuple:
        """Returns the head's class and adapters. A merged adapter shows in no tensor's version."""
        names = "merged_adapters", "active_adapters"
        held = (tuple(getattr(self._layer, name, ())) for name in names)
        return type(self._layer), *held, getattr(self._layer, "disable_adapters", False)

    def _tensors(self) -> list[Tensor]:
        """Returns the tensors that the logits are computed with, without copies."""
        operands = [value for value in self.operands.values() if isinstance(value, Tensor)]
        return [*(() if self._is_traced else self.inputs), *self._layer.parameters(), *operands]

    def _is_changed(self) -> bool:
        """Returns whether the logits would be others than those of the head's call."""
        if torch.compiler.is_compiling():
            return False  # the trace of one forward
        found, then = self._tensors(), self._tensors_then
        if len(found) != len(then) or any(one is not other for one, other in zip(found, then, strict=True)):
            return True
        state = self._state_then.tolist() if self._is_traced else self._state_then
        return self._settings() != self._settings_then or _state_of(found) != state

    def compute(self) -> Tensor:
        """Returns the real logits with their graph, by the head's own forward, computed once."""
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
        """Returns the causal loss, after ``steps``, by :func:`peft_ext.ops.linear_cross_entropy`.

        Returns None where the loss function has to run.
        """
        (hidden, *low), items = self.inputs, num_items_in_batch
        given = labels if shift_labels is None else shift_labels
        if rest.keys() - _IGNORED or vocab_size != self.shape[-1] or type(ignore_index) is not int:
            return None
        if (formula := _scale_and_cap(steps)) is None:
            return None
        if not is_plain(given) or given.dtype is not torch.int64 or given.numel() != hidden.shape[:-1].numel():
            return None
        if not torch.is_grad_enabled() or self._is_changed():
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
                    logit_scale=formula[0], softcap=formula[1], ignore_index=ignore_index, num_items_in_batch=items,
                )  # fmt: skip
        except RuntimeError:
            outside = ((given < 0) | (given >= vocab_size)) & (given != ignore_index)
            if hidden.device.type != "cpu" or not outside.any():
                raise
            return None  # to raise the loss function's own error
        self.is_taken = True
        return loss


# A step between the head and the loss: ("mul" or "div", number), ("tanh", None) or ("float", None).
Step = tuple[str, Optional[float]]
_APPLIED: dict[str, Callable[..., Tensor]] = {
    "mul": lambda z, number: z * number, "div": lambda z, number: z / number, "tanh": lambda z, _: torch.tanh(z),
    "float": lambda z, _: z.float(),
}  # fmt: skip


def _scale_and_cap(steps: tuple[Step, ...]) -> Optional[tuple[float, Optional[float]]]:
    """Returns scale s and cap c of ``c tanh(s z / c)`` or, without a cap, of ``s z``; None: the steps are neither."""
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
    """The logits of a head, or a scaled or capped form of them, not computed before something uses them. No tensor.

    A Pending is gone when the model's forward ends, but of a compiled forward, whose output has it for logits.
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
        """Returns this Pending after one more step; the real result where it is computed, or ``number`` is none."""
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
        # A function of torch.nn.functional that calls this names what stands in its module, which may be a wrapper
        # around it that is under way already.
        name = next((name for name, value in vars(F).items() if value is func), None)
        args, kwargs = pytree.tree_map(real, (args, kwargs or {}))
        return _FUNCTIONAL.get(name, func)(*args, **kwargs)


def real(value: Any) -> Any:
    """Returns the real logits of a Pending, and anything else as it is."""
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
    """Computes the logits and, before anything can change them in place, all that stands for a function of them."""
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
