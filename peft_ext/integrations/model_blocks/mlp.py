"""MLPs computed by fused operators: down(act(gate x) ∘ up x) and down(act(up x)).

The activation's operator runs in one pass, and saves its inputs for the backward: the outputs of ``gate`` and ``up``,
or of ``up`` alone. If ``down`` needs its input in the backward and has no hooks, the backward computes this input
again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import ops
from ...reference.activations import ACTIVATIONS
from ..adapter_layers import siblings
from ..adapter_layers.few_tokens import Facts, direct, is_few, kernel_of, plan_of, together
from ..adapter_layers.reasons import accepts_input, any_global_hook, hooked, kernel_reason
from ..adapter_layers.recompute import computed_again
from ..forms import Row
from ..forms.activations import activation_name
from .block import Fused, device_of

__all__ = ["Mlp"]

_gated = kernel_of("gated_activation")


class MlpCall(NamedTuple):
    """Computes a gated MLP for few tokens without a gradient."""

    layers: tuple[Callable[[Tensor], Tensor], ...]  # functions that compute gate, up and down
    both: Callable[[Tensor], Any]  # function that computes gate and up of one input
    are_direct: bool  # whether neither gate nor up is called as a module
    act: nn.Module
    number: int

    def __call__(self, x: Tensor) -> Tensor:
        one, other = self.both(x)
        if not (self.are_direct or (is_few(one) and is_few(other) and one.dtype is other.dtype is x.dtype)):
            return self.layers[2](self.act(one) * other)
        return self.layers[2](_gated(one, other, self.number))


class Mlp(Fused):
    """A fused MLP.

    Facts of an MLP's row in the table of forms: ``inner``, the names of the first layer, or of gate and up; ``out``,
    the name of the last layer or "" if the module ends behind the activation; ``act``, the name of the activation's
    attribute; ``gated``, whether the MLP is gated; ``drops``, "out" for a dropout behind the last layer, "act" for one
    behind the activation, "" for none; ``dropout``, the name of the attribute that holds the dropout module or the
    dropout's probability.
    """

    block_kind = "MLP"

    @classmethod
    def settled(cls, stock: type, row: Row) -> dict[str, Any]:
        drops, dropout = row.get("drop").partition(":")[0], row.get("drop").rpartition(":")[2]
        own = {"inner": row.names("inner"), "out": row.get("out"), "act": row.get("act")}
        own["layers"] = (*own["inner"], own["out"]) if own["out"] else own["inner"]
        own |= {"gated": row.get("gated") == "yes", "drops": drops, "dropout": dropout}
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
        return kernel_reason("gated_activation" if known.gated else "activation", device_of(self))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and is_few(args[0]) and isinstance(self, Mlp):
            if (run := plan_of(self, args[0], self._few)) is not None:
                return run(args[0])
        return Fused.forward(self, *args, **kwargs)

    def _few(self, facts: Facts, x: Tensor) -> Optional[MlpCall]:
        """Returns the function that computes the MLP for few tokens; None if the MLP has no plan."""
        known = self.peft_ext_known
        if not known.gated or not known.out:
            return None
        out, act = facts.child(self, known.out), facts.child(self, known.act)
        inner = [facts.child(self, name) for name in known.inner]
        if not self.holds(facts) or self.block_reason() is not None or known.drops:
            return None
        if act is None or not facts.plain(act) or len(inner) != 2 or (name := activation_name(act, x.dtype)) is None:
            return None
        for attribute in list(act.__dict__):
            if attribute != "training":
                facts.value(act.__dict__, attribute)
        number = ACTIVATIONS.index(name)
        gate, up, down = (direct(facts, layer, x) for layer in (*inner, out))
        are_direct = gate is not inner[0] and up is not inner[1]
        return MlpCall((gate, up, down), together((gate, up)), are_direct, act, number)

    def _fused(self, x: Tensor) -> Tensor:
        known, modules = self.peft_ext_known, self._modules
        out, act = modules[known.out] if known.out else None, getattr(self, known.act)
        if known.drops == "act" and getattr(getattr(out, "weight", x), "dtype", None) is not x.dtype:
            return self.stock_class.forward(self, x)  # T5's MLP casts the input of the last layer to the weight's dtype
        with siblings.together(self, (known.inner,)):
            inner = [modules[name](x) for name in known.inner]
        # The operator runs for contiguous inputs alone, because its result is contiguous, while PyTorch's result has
        # the strides of the input.
        plain = all(accepts_input(value) and value.is_contiguous() for value in inner)
        name = activation_name(act, inner[0].dtype) if plain else None
        if name is None or len({value.dtype for value in inner}) > 1:
            halves = inner[0].chunk(2, dim=-1) if known.gated and len(inner) == 1 else inner
            h = act(halves[0])
            h = h * halves[1] if known.gated else h
            return h if out is None else self._dropped(out(self._dropped(h, "act")), "out")
        operator = ops.gated_activation if known.gated else ops.activation
        args = (*inner, *([None] if known.gated and len(inner) == 1 else []), name)
        return operator(*args) if out is None else self._dropped(self._finished(operator, args, out), "out")

    def _finished(self, operator: Callable[..., Tensor], args: tuple, out: nn.Module) -> Tensor:
        if torch.compiler.is_compiling():  # torch.compile can't trace saved-tensor hooks, but can trace a checkpoint
            h = checkpoint(operator, *args, use_reentrant=False) if torch.is_grad_enabled() else operator(*args)
            return out(self._dropped(h, "act"))
        h = operator(*args)
        with computed_again(h, operator, *args) if not _calls_hooks(out) else nullcontext():
            return out(self._dropped(h, "act"))

    def _dropped(self, x: Tensor, where: str) -> Tensor:
        known = self.peft_ext_known
        if known.drops != where:
            return x
        dropout = getattr(self, known.dropout)
        return dropout(x) if isinstance(dropout, nn.Module) else F.dropout(x, p=dropout, training=self.training)


def _calls_hooks(layer: nn.Module) -> bool:
    """Returns whether hooks on the layer or its children get the layer's input. A hook may change the layer's input in
    place without an increase of the input's version counter."""
    return hooked(layer) or any(child is not None and hooked(child) for child in layer._modules.values())
