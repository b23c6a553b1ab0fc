"""A decoder layer in a call of few tokens without a gradient, as in generation: one plan for all blocks of the layer.

    h = x + post₁(attention(norm₁(x)))        y = h + post₂(mlp(norm₂(h)))

A layer has norms before its attention and its MLP (norm₁ and norm₂), as Llama has them, or behind them (post₁ and
post₂), as OLMo 2 has them, or both, as Gemma 3 has them.

The plan of the layer has the plans of its blocks and one list of facts (values on which the plan depends), so that a
call of the layer compares the facts once, and calls no block as a module. The operator decoder_layer computes the whole
layer if, among other conditions, all linear layers are called as kernels and ``Attention.room_of_few`` finds room for
the tokens in the cache. The layer's own code runs for every call that the plan does not compute.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from ..._native import STATE
from ...ops.library import has_kernel
from ..adapter_layers.few_tokens import Facts, Kernel, few_reason, kernel_of, listed, plan_of
from ..forms import Row
from .attention import Attention
from .block import Block
from .mlp import Mlp, MlpCall
from .norm import NormCall, RMSNorm

__all__ = ["DecoderLayer", "layer_of_parts"]

Part = Callable[..., Any]
_decoder_layer = kernel_of("decoder_layer")


def _same(x: Tensor) -> Tensor:
    return x


def layer_of_parts(
    x: Tensor, norms: Sequence[Part], posts: Sequence[Part], attention: Part, mlp: Part, given: dict
) -> Tensor:
    """Returns the output of a decoder layer. ``norms``: norm₁ and norm₂; ``posts``: post₁ and post₂; each of the two
    is empty if the layer does not have these norms. ``given``: the keyword arguments of the attention besides
    ``hidden_states``."""
    norm1, norm2 = norms or (_same, _same)
    post1, post2 = posts or (_same, _same)
    x = x + post1(attention(hidden_states=norm1(x), **given)[0])
    return x + post2(mlp(norm2(x)))


_EMPTY: tuple[list, list, list] = ([], [], [])


class Lists:
    """The three lists that the operator decoder_layer takes after its argument ``past``, and the number ``plan`` under
    which the kernel keeps the lists of the first call, as long as this object lives. ``given`` has the lists that a
    call passes: the lists themselves in the first call, and empty lists in later calls."""

    _numbers = itertools.count(1)

    def __init__(self, *lists: list) -> None:
        self.given, self.plan = lists, next(Lists._numbers)
        weakref.finalize(self, STATE.module.forget_plan, self.plan).atexit = False


class LayerPlan(NamedTuple):
    """The plans of a decoder layer's blocks, and the layer's attention module. ``lists`` is None if the operator
    decoder_layer can't compute the layer."""

    module: Any
    norms: tuple[Part, ...]
    posts: tuple[Part, ...]
    attention: Any
    mlp: Part
    lists: Optional[Lists]

    def __call__(self, x: Tensor, given: dict[str, Any], repeats: bool = False) -> Tensor:
        """Returns the layer's output. ``repeats``: the result of ``Attention.repeats`` for this call."""
        lists = self.lists
        if lists is not None and (room := self.module.room_of_few(self.attention, x, given, repeats)) is not None:
            mask, memory = given.get("attention_mask"), (room.keys, room.values, room.past)
            y = _decoder_layer(x, *given["position_embeddings"], mask, *memory, *lists.given, lists.plan)
            lists.given = _EMPTY
            room.fill(x.shape[1])
            return y
        attend = functools.partial(self.module._rotary_forward, self.attention)
        return layer_of_parts(x, self.norms, self.posts, attend, self.mlp, given)


def _lists(befores: tuple, posts: tuple, attention: Any, mlp: MlpCall) -> Optional[Lists]:
    """Returns the lists of tensors, sizes and numbers that the operator decoder_layer takes after its argument
    ``past``; None if the operator can't compute the layer. ``befores``: norm₁ and norm₂."""
    calls = (*attention.layers, *mlp.layers)
    if not has_kernel("decoder_layer", "CPU") or not all(type(call) is Kernel for call in calls):
        return None
    pairs = (befores, posts, attention.norms)
    norms = [norm for pair in pairs for norm in pair]
    if not attention.attends or not attention.kv_heads or not all(type(norm) is NormCall for norm in norms):
        return None
    first = norms[0]
    if any(norm[2:] != first[2:] for norm in norms):
        return None
    if type(attention.size) is not int or attention.size % 2 or type(attention.scaling) is not float:
        return None
    tensors, sizes, numbers = listed(calls)
    sizes = [mlp.number, int(first.rounds), sum(bool(pair) << i for i, pair in enumerate(pairs)), *sizes]
    numbers = [*(norm.eps for norm in norms), first.offset, attention.scaling, *numbers]
    return Lists([*(norm.weight for norm in norms), *tensors], sizes, numbers)


class DecoderLayer(Block):
    """A fused decoder layer.

    Values of a decoder layer's row in the table of forms: ``norms``, the names of the norms before the attention and
    before the MLP; ``posts``, the names of the norms behind them (each of the two lists has two names or none);
    ``attention`` and ``mlp``, the names of the attention and of the MLP; ``passes``, the keyword arguments that the
    layer hands to the attention.
    """

    block_kind, fused_remark = "decoder layer", "calls of few tokens without a gradient"

    @classmethod
    def settled(cls, stock: type, row: Row) -> dict[str, Any]:
        own = {name: row.names(name) for name in ("norms", "posts")}
        own["passes"] = frozenset(row.names("passes"))
        parameters = inspect.signature(stock.forward).parameters.values()
        # The arguments that the layer hands to the attention where its caller does not pass them.
        own["defaults"] = {one.name: one.default for one in parameters
                           if one.name in own["passes"] and one.default is not one.empty}  # fmt: skip
        return {**super().settled(stock, row), **own}

    def block_reason(self) -> Optional[str]:
        """Returns why a call of few tokens without a gradient runs the layer's own code; None if the call runs a plan.
        ``block_reason`` finds the reason by making the plan for a call of a single token."""
        known = self.peft_ext_known
        norm = self._modules.get((known.norms + known.posts)[0])
        if reason := self._blocks_reason() or norm.block_reason():
            return reason
        weight = next(norm.parameters())
        with torch.no_grad():
            x = torch.empty((1, 1, weight.shape[0]), dtype=weight.dtype, device=weight.device)
            plan = few_reason(x) or self._few(Facts(), x)
        return plan if isinstance(plan, str) else None

    def _blocks_reason(self) -> Optional[str]:
        known = self.peft_ext_known
        norms = known.norms + known.posts
        for names, kind in ((norms, RMSNorm), ((known.attention,), Attention), ((known.mlp,), Mlp)):
            for name in names:
                if not isinstance(self._modules.get(name), kind):
                    return f"its {name} is not fused"
        return None

    # The class has a `__call__` but no `forward` of its own, because transformers' gradient checkpointing asks whether
    # the class of a layer has the forward that transformers made.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**self.peft_ext_known.defaults, **kwargs}
        if len(args) == 1 and few_reason(args[0]) is None and self.peft_ext_known.passes <= given.keys():
            plan = plan_of(self, args[0], self._few)
            if plan is not None:
                if plan.module.repeats(plan.attention, args[0], given):
                    return plan(args[0], given, True)
                if plan.module._takes({"hidden_states": args[0], **given}):
                    return plan(args[0], given)
        return nn.Module.__call__(self, *args, **kwargs)

    def _few(self, facts: Facts, x: Tensor) -> Union[LayerPlan, str]:
        """Returns the layer's plan for calls of few tokens without a gradient; or the reason why the layer or one of
        its blocks has no plan."""
        known = self.peft_ext_known
        names = (*known.norms, *known.posts, known.attention, known.mlp)
        blocks: list[Any] = [facts.child(self, name) for name in names]
        if reason := self.held_reason(facts) or self._blocks_reason():
            return reason
        plans: list[Any] = []
        for name, block in zip(names, blocks, strict=True):
            if not facts.plain(block):
                return f"hooks on its {name} would not run"
            plans.append(plan := block._few(facts, x))
            if isinstance(plan, str):
                return f"its {name} is called as a module: {plan}"
        *norms, attention, mlp = plans
        parts = tuple(norms[: len(known.norms)]), tuple(norms[len(known.norms) :]), attention, mlp
        return LayerPlan(blocks[-2], *parts, _lists(*parts))
