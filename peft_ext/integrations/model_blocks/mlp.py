"""MLPs computed by fused operators: down(act(gate x) ∘ up x) and down(act(up x)).

The operator of the activation computes its result in one pass, and saves for the backward only the operator's inputs,
which are the outputs of the MLP's first layers. If ``down`` needs its input in the backward, the backward computes this
input again, except, for example, if ``down`` has hooks. If ``down`` is a fused layer with one LoRA or AdaLoRA adapter,
one operator computes the gated activation and ``down`` (see :func:`peft_ext.ops.gated_lora_linear`) in an eager call
without hooks on ``down`` and without a dropout behind the activation. If gradients are recorded, gate or up must need a
gradient; :meth:`.LowRank.output_of_gated` lists all conditions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import ops
from ...ops.checks import autocast_dtype
from ...reference.activations import ACTIVATIONS
from ...text import dtype_name
from ..adapter_layers import siblings
from ..adapter_layers.few_tokens import Facts, direct, few_reason, kernel_of, together
from ..adapter_layers.lora import LowRank
from ..adapter_layers.reasons import accepts_input, any_global_hook, hooked, kernel_reason
from ..adapter_layers.recompute import computed_again, has_hooks
from ..forms import Row
from ..forms.activations import activation_name
from .block import Planned, device_of

__all__ = ["Mlp"]

_gated = kernel_of("gated_activation")


class MlpCall(NamedTuple):
    """The plan of a gated MLP: computes the MLP for few tokens without a gradient."""

    layers: tuple[Callable[[Tensor], Tensor], ...]  # Functions that compute gate, up and down.
    both: Callable[[Tensor], Any]  # Function that computes gate and up of one input.
    are_direct: bool  # Whether neither gate nor up is called as a module.
    block: weakref.ref[Mlp]
    number: int

    def __call__(self, x: Tensor) -> Tensor:
        one, other = self.both(x)
        if not self.are_direct and (few_reason(one) or few_reason(other) or not one.dtype is other.dtype is x.dtype):
            return self.block()._behind((one, other), x)
        return self.layers[2](_gated(one, other, self.number))


class Mlp(Planned):
    """A fused MLP.

    What ``peft_ext_known`` holds of an MLP's row in the table of forms: ``inner``, the names of the first layer, or of
    gate and up; ``out``, the name of the last layer or "" if the module ends behind the activation; ``act``, the name
    of the activation's attribute; ``gated``, whether the MLP is gated; ``drops``, "out" for a dropout behind the last
    layer, "act" for a dropout behind the activation, "" for no dropout; ``dropout``, the name of the attribute that
    holds the dropout module or the dropout's probability.
    """

    block_kind = "MLP"

    @classmethod
    def settled(cls, stock: type, row: Row) -> dict[str, Any]:
        drops, dropout = row.get("drop").partition(":")[0], row.get("drop").rpartition(":")[2]
        layers = (*row.names("inner"), *row.names("out"))
        own = {"inner": row.names("inner"), "layers": layers, "drops": drops, "dropout": dropout}
        return {**super().settled(stock, row), **own}

    def block_reason(self) -> Optional[str]:
        if reason := self.replaced_reason():
            return reason
        known = self.peft_ext_known
        act = getattr(self, known.act)
        if isinstance(act, nn.Module) and hooked(act):
            return "hooks on the activation would not run"
        if isinstance(act, nn.Module) and any_global_hook():
            return "global hooks of torch.nn would not run on its activation"
        if activation_name(act) is None:
            return "its activation is none of the known ones"
        if any(not isinstance(self._modules.get(name), nn.Module) for name in known.layers):
            return "one of its layers is no module"
        device = device_of(self)
        if self._joins(self._modules[known.out] if known.out else None):
            # Proves the kernels of gated_lora_linear before the first step, as ``accelerate`` does for all operators of
            # the model. If these kernels can't run, two operators compute the activation and the last layer.
            kernel_reason("gated_lora_linear", device)
        return kernel_reason("gated_activation" if known.gated else "activation", device)

    def _joins(self, out: Any) -> bool:
        """Returns whether one operator may compute the activation and the last layer ``out``. If ``out`` is a wrapper
        around a layer, such as FSDP's or a checkpoint wrapper, the result is False, so that the MLP calls the wrapper
        as a module, even if the wrapper's ``__getattr__`` returns the layer's attributes."""
        known = self.peft_ext_known
        return known.gated and known.drops != "act" and isinstance(out, LowRank) and out.joins_gated()

    def _act_reason(self, dtype: torch.dtype) -> Optional[str]:
        is_known = activation_name(getattr(self, self.peft_ext_known.act), dtype) is not None
        return None if is_known else f"its activation is none of the known ones in {dtype_name(dtype)}"

    def _cast_reason(self, x: Tensor) -> Optional[str]:
        known = self.peft_ext_known
        if known.drops != "act":
            return None
        # T5's MLP casts the input of the last layer to the dtype of the layer's weight.
        dtype = getattr(getattr(self._modules[known.out], "weight", x), "dtype", None)
        return None if dtype is x.dtype else f"its input is {dtype_name(x.dtype)}, and it casts for its {known.out}"

    def call_reason(self, x: Tensor) -> Optional[str]:
        return self._cast_reason(x) or self._act_reason(autocast_dtype(x) or x.dtype)

    def _few(self, facts: Facts, x: Tensor) -> Union[MlpCall, str]:
        known = self.peft_ext_known
        if not known.gated or len(known.layers) != 3 or known.drops:
            return "it is not down(act(gate x) * up x) without a dropout"
        act = facts.child(self, known.act)
        *inner, out = [facts.child(self, name) for name in known.layers]
        if reason := self.held_reason(facts) or self.block_reason():
            return reason
        if act is None or not facts.plain(act):
            return "its activation is no module, or has hooks"
        if (name := activation_name(act, x.dtype)) is None:
            return self._act_reason(x.dtype)
        for attribute in list(act.__dict__):
            if attribute != "training":
                facts.value(act.__dict__, attribute)
        number = ACTIVATIONS.index(name)
        gate, up, down = (direct(facts, layer, x) for layer in (*inner, out))
        are_direct = gate is not inner[0] and up is not inner[1]
        return MlpCall((gate, up, down), together((gate, up)), are_direct, weakref.ref(self), number)

    def _fused(self, x: Tensor) -> Tensor:
        known, modules = self.peft_ext_known, self._modules
        out, act = modules[known.out] if known.out else None, getattr(self, known.act)
        if self._cast_reason(x) is not None:
            return self.stock_class.forward(self, x)
        with siblings.together(self, (known.inner,)):
            inner = [modules[name](x) for name in known.inner]
        # The activation's operator runs for contiguous inputs alone, because its result is contiguous, while PyTorch's
        # result has the strides of the input.
        plain = all(accepts_input(value) and value.is_contiguous() for value in inner)
        name = activation_name(act, inner[0].dtype) if plain else None
        if name is None or len({value.dtype for value in inner}) > 1:
            return self._behind(inner, x)
        operator = ops.gated_activation if known.gated else ops.activation
        args = (*inner, *([None] if known.gated and len(inner) == 1 else []), name)
        if self._joins(out) and (y := out.output_of_gated(*args)) is not None:
            return self._dropped(y, "out")
        return operator(*args) if out is None else self._dropped(self._finished(operator, args, out), "out")

    def _behind(self, inner: Sequence[Tensor], x: Tensor) -> Tensor:
        """Returns the result of the class's own forward for x, given the outputs ``inner`` of the class's first layers.
        The class's own code runs because this code may round at other places than the operator's formula."""
        return self.stock_class.forward(_Called(self, dict(zip(self.peft_ext_known.inner, inner, strict=True))), x)

    def _finished(self, operator: Callable[..., Tensor], args: tuple, out: nn.Module) -> Tensor:
        if torch.compiler.is_compiling():  # torch.compile can't trace saved-tensor hooks, but can trace a checkpoint
            h = checkpoint(operator, *args, use_reentrant=False) if torch.is_grad_enabled() else operator(*args)
            return out(self._dropped(h, "act"))
        h = operator(*args)
        with computed_again(h, operator, *args) if not has_hooks(out) else nullcontext():
            return out(self._dropped(h, "act"))

    def _dropped(self, x: Tensor, where: str) -> Tensor:
        known = self.peft_ext_known
        if known.drops != where:
            return x
        dropout = getattr(self, known.dropout)
        return dropout(x) if isinstance(dropout, nn.Module) else F.dropout(x, p=dropout, training=self.training)


class _Called:
    """Stands for an MLP whose first layers were called: in place of each of these layers it has a function that returns
    the layer's output."""

    def __init__(self, mlp: Mlp, outputs: dict[str, Tensor]) -> None:
        self._mlp, self._outputs = mlp, outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mlp, name) if name not in self._outputs else lambda _: self._outputs[name]
