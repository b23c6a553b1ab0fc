"""Fused attention of transformers' models: q, k and v from one operator, rotary positions in one pass, softmax(q kᵀ) v.

If the row of an attention's form in ``forms.tsv`` says ``forward=rotary``, ``Attention._rotary_forward`` computes the
projections q, k and v together where possible, then rotary positions, the cache, attention, and the output projection.
Otherwise, or if ``_rotary_forward`` does not accept the call, the attention's own code runs, and the layers that get
one input tensor (``inputs`` of the row) are computed together where possible. If the module's forward was replaced,
only the replaced forward runs.

peft_ext registers an attention function in transformers' public registry, under a name of its own. A fused attention
that takes its function from the registry gets peft_ext's function in place of the function that is registered as
``sdpa``. peft_ext's function calls :func:`peft_ext.ops.scaled_dot_product_attention` for the calls that the operator
accepts and computes faster, and otherwise the function that is registered as ``sdpa``. On a GPU, peft_ext's function
always calls the function that is registered as ``sdpa``.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _native, ops
from ..._imports import optional
from ...ops.checks import autocast_dtype
from ...text import dtype_name
from ..adapter_layers import siblings
from ..adapter_layers.few_tokens import Facts, direct, few_reason, kernel_of, plan_of, together
from ..adapter_layers.reasons import accepts_input, kernel_reason, replaced_on_instance
from ..forms import KINDS, Row, row_of
from .block import Block, device_of, input_reason
from .cache import Room, appended, room_for
from .config_view import OURS, View, option_of, view_of
from .norm import NormCall, RMSNorm

ALL_ATTENTION_FUNCTIONS: Any = None
# AttentionInterface stays None if transformers lacks one of the four names that the next lines import.
AttentionInterface: Any = None
with optional("transformers", "attention is not fused"):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

__all__ = ["Attention", "look_at_sdpa", "set_view", "take_view"]

_OPERATOR = "scaled_dot_product_attention"
_OF_PYTORCH = torch._C._nn.scaled_dot_product_attention
# The CPU paths on which the operator scaled_dot_product_attention was measured to be faster than PyTorch's own
# attention.
_PATHS = ("avx2", "avx512", "avx512_bf16", "amx")
# On the CPU path `amx`, PyTorch's own attention computes a bfloat16 call without dropout that has more keys than a
# limit, because PyTorch's attention was measured to be faster than the operator there, at a time when the operator did
# not use AMX tiles. The key True has the limit for causal attention without a mask or a bias, the key False the limit
# for all other attention.
_MOST_KEYS_ON_AMX = {True: 512, False: 128}
# The operator's kernels for blocks of 64 queries run for calls of at least _LEAST_QUERIES queries. The operator has
# another kernel for calls of at most _FEW_QUERIES queries without a gradient. For most other calls of fewer than
# _LEAST_QUERIES queries, PyTorch's own attention is faster than the operator.
_LEAST_QUERIES, _FEW_QUERIES = 16, 8
# Largest size of a head for which the operator runs. The operator's scratch memory per thread grows with the size of a
# head.
_LARGEST_HEAD = 512
_NUMBERS = (int, float)
_rotate, _attention = kernel_of("rotary_embedding"), kernel_of("scaled_dot_product_attention")
# Keyword arguments of an attention call that transformers' attention function for sdpa ignores, see _argument_reason.
_IGNORED = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "seq_idx", "sliding_window",
    "use_cache",
})  # fmt: skip
# Maps a function that was registered as "sdpa" to whether the function accepts a bias of the attention scores, or to
# None if the form of the function is unknown.
_SDPA: dict[Any, Optional[bool]] = {}


# --- the module -------------------------------------------------------------------------------------------------------


class Attention(Block):
    """A fused attention.

    Some values of an attention's row in the table of forms: ``inputs``, groups of layers that get one tensor;
    ``interface``, whether the forward takes its attention function from transformers' registry; ``forward``, "rotary"
    if ``_rotary_forward`` can replace the module's own forward. The docstring of :func:`peft_ext.register_form`
    explains the other values.
    """

    block_kind = "attention"

    @classmethod
    def settled(cls, stock: type, row: Row) -> dict[str, Any]:
        cache_name, _, cache_style = row.get("cache").partition(":")
        # The globals of the Python module that defines the forward. If a function of this Python module is replaced
        # later, the globals have the new function.
        names = inspect.unwrap(stock.forward).__globals__
        groups = tuple(tuple(group.split("+")) for group in row.names("inputs"))
        # A row of the kind "projections" has the value `inputs` alone, so its other values are empty.
        empty = dict.fromkeys(KINDS["attention"], "")
        return {**empty, **super().settled(stock, row), "groups": groups, "cache_name": cache_name,
                "cache_style": cache_style,
                "options": tuple(tuple(option.split(":", 1)) for option in row.names("options")),
                "names": names, "found": {name: names.get(name) for name in (_ROTATES, _EAGER)}}  # fmt: skip

    def block_parts(self, like: Tensor) -> Iterator[tuple[str, Optional[str]]]:
        replaced, known = self.replaced_reason(), self.peft_ext_known
        if known.groups:
            yield "projections of one input", replaced or self._joint_reason(like)
        if known.forward:
            reason = replaced or self._own_reason() or kernel_reason(_ROTARY, device_of(self))
            yield "rotary positions", reason or input_reason(like) or self._rotary_reason(like)
        if known.interface:
            yield "attention", replaced or _reason(self) or input_reason(like) or self._option_reason()

    def _joint_reason(self, like: Tensor) -> Optional[str]:
        reasons = []
        for names in self.peft_ext_known.groups:
            layers = [layer for name in names if siblings.joins_siblings(layer := self._modules.get(name))]
            states = [layer.joint_state() for layer in layers]
            reasons.append(siblings.joint_reason(layers, states, like.device.type))
        return None if None in reasons else f"{', '.join(self.peft_ext_known.groups[0])}: {reasons[0]}"

    def _rotary_reason(self, x: Tensor) -> Optional[str]:
        """Returns why transformers' function, and not the operator rotary_embedding, rotates the q and k of hidden
        states x; else None.

        If q and k have norms, which may change the dtype of q and k, ``_rotary_reason`` does not compare the dtype of q
        and k with the dtype of the rotary positions; :func:`_fits_rotary` compares the two dtypes in each call.
        """
        if type(size := self.__dict__.get("head_dim")) is int and size % 2:
            return f"the size of its heads is {size}, wanted an even number"
        cast = autocast_dtype(x)
        if self.peft_ext_known.norms or cast in (None, x.dtype):
            return None
        return f"autocast computes q and k in {dtype_name(cast)}, and the positions are {dtype_name(x.dtype)}"

    def _option_reason(self) -> Optional[str]:
        """Returns why no attention call of the module can run the operator, because of the size of the module's heads
        or because of the value of one of the ``options`` in the row of the table of forms; else None."""
        if type(size := self.__dict__.get("head_dim")) is int and size > _LARGEST_HEAD:
            return f"the size of its heads is {size}, wanted at most {_LARGEST_HEAD}"
        given = {name: option_of(self, attribute, None) for name, attribute in self.peft_ext_known.options}
        return _argument_reason(given)

    def _own_reason(self) -> Optional[str]:
        """Returns a reason if ``apply_rotary_pos_emb`` or ``eager_attention_forward`` of the model's Python module,
        which ``_rotary_forward`` calls, was replaced after peft_ext made the fused class; else None."""
        known = self.peft_ext_known
        changed = [name for name, value in known.found.items() if known.names.get(name) is not value]
        return f"{changed[0]} was replaced" if changed else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Attention):
            return type(self).forward(self, *args, **kwargs)
        known = self.peft_ext_known
        if known.forward and not args and few_reason(kwargs.get("hidden_states")) is None and self._takes(kwargs):
            if (plan := plan_of(self, kwargs["hidden_states"], self._few)) is not None:
                return self._rotary_forward(plan, **kwargs)
        if replaced_on_instance(self) or self.replaced_reason() is not None:
            return super(Block, self).forward(*args, **kwargs)
        if known.forward and not args and self._own_reason() is None and self._takes(kwargs):
            return self._rotary_forward(**kwargs)
        with siblings.together(self, known.groups):
            return super(Block, self).forward(*args, **kwargs)

    def _takes(self, given: dict[str, Any]) -> bool:
        """Returns whether ``_rotary_forward`` accepts a call with the keyword arguments ``given``: the call has hidden
        states and a pair of position tensors, and passes no cache under another keyword than the one that the row of
        the table of forms names."""
        positions = given.get("position_embeddings")
        return (
            accepts_input(given.get("hidden_states"))
            and isinstance(positions, tuple)
            and len(positions) == 2
            and all(map(accepts_input, positions))
            and not (_OTHER_CACHES - {self.peft_ext_known.cache_name}) & given.keys()
        )

    def _rotary_forward(
        self, plan: Optional[SimpleNamespace] = None, /, *, hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor], attention_mask: Any = None, **given: Any,
    ) -> tuple[Tensor, Optional[Tensor]]:  # fmt: skip
        """Returns the output and the attention weights of attention with rotary positions. ``plan``: the plan that
        :meth:`_few` made for few tokens without a gradient; None for other calls."""
        known, modules, x, (cos, sin) = self.peft_ext_known, self._modules, hidden_states, position_embeddings
        heads = (*x.shape[:-1], -1, self.head_dim)
        with nullcontext() if plan is not None else siblings.together(self, known.groups):
            q, k, v = [modules[name](x) for name in known.groups[0]] if plan is None else plan.projections(x)
        norms = plan.norms if plan is not None else [modules[name] for name in _NORMS if known.norms]
        if known.norms == "flat":
            q, k = norms[0](q), norms[1](k)
        q, k = q.view(heads), k.view(heads)
        if known.norms == "head":
            q, k = norms[0](q), norms[1](k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.view(heads).transpose(1, 2)
        if plan is not None and plan.are_direct and _are_positions(cos, sin, x, plan.size):
            q, k = _rotate(q, k, cos, sin)
        else:
            rotate = ops.rotary_embedding if _fits_rotary(q, k, cos, sin) else known.names[_ROTATES]
            q, k = rotate(q, k, cos, sin)
        k, v = self._appended(given, k, v, cos, sin, few=plan is not None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, known.names.get(_EAGER))
        project = modules[known.o] if plan is None else plan.o
        if plan is not None and plan.attends and attend is sdpa_attention_forward and x.shape[1] <= _FEW_QUERIES:
            if _argument_reason(given) is None and (out := _of_few(q, k, v, attention_mask, plan.scaling)) is not None:
                return project(out.view(*x.shape[:-1], -1)), None
        options = {name: option_of(self, attribute) for name, attribute in known.options}
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options, **given)
        return project(out.reshape(*x.shape[:-1], -1).contiguous()), weights

    def _few(self, facts: Facts, x: Tensor) -> Union[SimpleNamespace, str]:
        """Returns the attention's plan for calls of few tokens without a gradient: the functions and numbers that
        :meth:`_rotary_forward` and the operator decoder_layer use. Returns a reason, a string, if the attention has no
        plan."""
        known, held = self.peft_ext_known, self.__dict__
        if not known.forward:
            return "no forward of peft_ext replaces its own"
        for name in known.found:
            facts.value(known.names, name)
        own = [attribute for _, attribute in known.options if not attribute.startswith("config.")]
        names = ("head_dim", "layer_idx", "scaling", "training", *own)
        for name in names:
            facts.value(held, name)
        groups, is_causal = facts.value(held, "num_key_value_groups"), facts.value(held, "is_causal")
        layers = [facts.child(self, name) for name in (*known.groups[0], known.o)]
        norms = [facts.child(self, name) for name in _NORMS if known.norms]
        if self.training:
            return "it is in training"
        if reason := self.held_reason(facts) or self._own_reason() or kernel_reason(_ROTARY, "cpu"):
            return reason
        if any(name not in held for name in names) or len(layers) != 4 or None in (*layers, *norms):
            return "it lacks a layer or a number that its class's forward reads"
        q, k, v, o = (direct(facts, layer, x) for layer in layers)
        are_direct = q is not layers[0] and k is not layers[1]
        if are_direct and norms:
            widths = [self.head_dim if known.norms == "head" else layer.out_features for layer in layers[:2]]
            norms = [_norm_call(facts, norm, x, width) for norm, width in zip(norms, widths, strict=True)]
        is_plain = _IGNORED.issuperset(name for name, _ in known.options)
        own = facts.value(vars(F), _OPERATOR) is _OF_PYTORCH and kernel_reason(_OPERATOR, "cpu") is None
        attends = type(groups) is int and is_causal is True and is_plain and own
        return SimpleNamespace(
            layers=(q, k, v, o), projections=together((q, k, v)), o=o, norms=norms, size=self.head_dim,
            kv_heads=getattr(layers[1], "out_features", 0) // self.head_dim, scaling=self.scaling, attends=attends,
            are_direct=are_direct and all(type(norm) is NormCall for norm in norms),
        )  # fmt: skip

    def repeats(self, plan: Any, x: Tensor, given: dict[str, Any]) -> bool:
        """Returns whether a call equals this thread's last call whose arguments the checks in ``_takes`` and
        :meth:`room_of_few` accepted: the same argument objects, an attention of the same fused class and head size, and
        an x of the same shape and dtype. When ``repeats`` returns True, as in the next layer of a model, the checks of
        the arguments do not run again."""
        return _LAST.__dict__.get("call") == self._call(plan, x, given)

    def _call(self, plan: Any, x: Tensor, given: dict[str, Any]) -> tuple:
        return (id(self.peft_ext_known), x.shape, x.dtype, plan.size, *given, *map(id, given.values()))

    def room_of_few(self, plan: Any, x: Tensor, given: dict[str, Any], repeats: bool = False) -> Optional[Room]:
        """Returns room in the cache for the tokens of x if the operator decoder_layer can compute the attention of this
        call as a part of the decoder layer; else None. ``repeats``: the result of :meth:`repeats` for this call."""
        known, tokens = self.peft_ext_known, x.shape[1]
        cache, mask = given.get(known.cache_name), given.get("attention_mask")
        if cache is None:
            return None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, known.names.get(_EAGER))
        if attend is not sdpa_attention_forward:
            return None
        if _knows_bias(ALL_ATTENTION_FUNCTIONS["sdpa"]) is None or _setting_reason():
            return None
        if not repeats:
            cos, sin = given["position_embeddings"]
            if tokens > _FEW_QUERIES or not _are_positions(cos, sin, x, plan.size):
                return None
            others = {name: value for name, value in given.items() if name not in (known.cache_name, "attention_mask")}
            if _argument_reason(others) is not None:
                return None
            # _LAST holds the arguments, so that no later argument can have the address of one of these arguments. _LAST
            # does not hold the key-value cache, which may be large: each call checks the cache.
            _LAST.held, _LAST.call = (mask, *others.values()), self._call(plan, x, given)
        room = room_for(cache, self.layer_idx, (x.shape[0], plan.kv_heads, tokens, plan.size), x.dtype)
        if room is None or not _sees(mask, x.shape[0], tokens, room.past + tokens):
            return None
        return None if _tiles_are_ahead(x.dtype, room.past + tokens) else room

    def _appended(
        self, given: dict[str, Any], k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, few: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Removes the cache from the arguments ``given``, appends k and v to the cache, and returns all keys and values
        of the cache; without a cache, returns k and v. ``few``: whether k and v are of few tokens without a
        gradient."""
        known = self.peft_ext_known
        cache = given.pop(known.cache_name, None)
        positions = given.pop("cache_position", None) if known.cache_style == "positions" else None
        if cache is None:
            return k, v
        if few and (found := appended(cache, self.layer_idx, k, v)) is not None:
            return found
        if known.cache_style == "kwargs":
            return cache.update(k, v, self.layer_idx, kwargs=given)
        if known.cache_style == "positions":
            return cache.update(k, v, self.layer_idx, {"sin": sin, "cos": cos, "cache_position": positions})
        return cache.update(k, v, self.layer_idx)


# For each thread: the thread's last call of an attention whose arguments room_of_few accepted, see Attention.repeats.
_LAST = threading.local()

_NORMS = ("q_norm", "k_norm")  # the names of the norms of q and of k in every known form that has them
_ROTATES, _EAGER, _ROTARY = "apply_rotary_pos_emb", "eager_attention_forward", "rotary_embedding"
_OTHER_CACHES = frozenset({"cache", "past_key_value", "past_key_values"})


def _norm_call(facts: Facts, norm: nn.Module, x: Tensor, width: int) -> Any:
    """Returns the plan of the norm of q or k for rows of ``width`` values of x's dtype; the norm itself if it has no
    plan."""
    own = Facts()
    if not isinstance(norm, RMSNorm) or not own.plain(norm):
        return norm
    if isinstance(call := norm._few(own, x.new_empty((1, 1, width))), str):
        return norm
    facts.add(own)
    return call


def _are_positions(cos: Tensor, sin: Tensor, x: Tensor, size: int) -> bool:
    """Returns whether the rotary positions cos and sin have x's dtype and device, and the shape ``[1 or batch, tokens,
    size]`` with the batch and the tokens of x."""
    shape = cos.shape
    return (
        cos.dtype is sin.dtype is x.dtype and shape == sin.shape and len(shape) == 3 and shape[0] in (1, x.shape[0])
        and shape[1:] == (x.shape[1], size) and cos.device == x.device == sin.device
    )  # fmt: skip


def _fits_rotary(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Returns whether the operator rotary_embedding accepts q, k, cos and sin."""
    if not all(map(accepts_input, (q, k))) or (q.dim(), k.dim(), cos.dim()) != (4, 4, 3):
        return False
    if not q.dtype is k.dtype is cos.dtype is sin.dtype or not q.device == k.device == cos.device == sin.device:
        return False
    batch, _, tokens, size = q.shape
    if size % 2 or cos.shape != sin.shape or cos.shape[1:] != (tokens, size) or cos.shape[0] not in (1, batch):
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    return k.shape[0] == batch and k.shape[2:] == (tokens, size) and not kernel_reason(_ROTARY, q.device.type)


# --- the registry -----------------------------------------------------------------------------------------------------


def set_view(module: nn.Module) -> None:
    """Replaces the configuration of a fused attention by a view of the configuration if the attention takes its
    attention function from transformers' registry."""
    config = module.__dict__.get("config")
    asks = AttentionInterface is not None and isinstance(module, Attention) and module.peft_ext_known.interface
    if asks and not isinstance(config, View):
        if isinstance(getattr(type(config), "_attn_implementation", None), property):
            module.__dict__["config"] = view_of(config)


def take_view(module: nn.Module) -> None:
    """Undoes :func:`set_view`."""
    if isinstance(config := module.__dict__.get("config"), View):
        module.__dict__["config"] = config.original


def look_at_sdpa() -> None:
    """Clears the cache of known sdpa functions, and reads the form of the function now registered as ``sdpa``."""
    _SDPA.clear()
    if AttentionInterface is not None:
        _knows_bias(ALL_ATTENTION_FUNCTIONS["sdpa"])


def _knows_bias(function: Any) -> Optional[bool]:
    """Returns whether an attention function with a known form accepts a bias that is added to the attention scores.

    Returns None if the form of the function is unknown, or under torch.compile if no earlier call has found the answer.
    """
    if function not in _SDPA:
        if torch.compiler.is_compiling():
            return None
        found = row_of(function) if inspect.isfunction(function) else ""
        is_known = not isinstance(found, str) and found[0].kind == "sdpa"
        _SDPA[function] = found[0].get("bias") == "yes" if is_known else None
    return _SDPA[function]


def _reason(module: Any) -> Optional[str]:
    """Returns why no attention call of the module runs peft_ext's operator; None if some calls may run the operator."""
    config = module.__dict__.get("config")
    implementation = getattr(getattr(config, "original", config), "_attn_implementation", None)
    if implementation != "sdpa":
        return f"its attention implementation is {implementation}"
    if not isinstance(config, View):
        return "accelerate(model) was not called on it, or with blocks=False"
    if _knows_bias(ALL_ATTENTION_FUNCTIONS["sdpa"]) is None:
        return "its attention implementation is sdpa, and the function there is none of the known forms"
    return _device_reason(device_of(module))


@torch.compiler.assume_constant_result
def _isa() -> str:
    """Returns the CPU path in use. torch.compile calls ``_isa`` while it traces, and puts the result into the graph as
    a constant."""
    return _native.STATE.isa


@torch.compiler.assume_constant_result
def _device_reason(device: str) -> Optional[str]:
    if F.scaled_dot_product_attention is not _OF_PYTORCH:
        return "torch.nn.functional.scaled_dot_product_attention was replaced"
    if device == "cuda":
        return "on a GPU PyTorch's own kernels are used"
    return _setting_reason() or kernel_reason(_OPERATOR, device)


def _setting_reason() -> Optional[str]:
    """Returns why PyTorch's own attention runs on a CPU under settings of PyTorch and peft_ext that may change between
    two calls; else None."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return "PyTorch is told to take its formula (torch.nn.attention.sdpa_kernel)"
    if _isa() not in _PATHS:
        return f"PyTorch's own is used on this CPU path ({_isa()})"
    return None


def sdpa_attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    **kwargs: Any,
) -> Any:
    """Computes attention on the operator scaled_dot_product_attention if the operator accepts the call and is faster,
    else by the function that is registered as ``sdpa``. transformers' registry has sdpa_attention_forward under the
    name in the constant OURS."""
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    knows_bias, bias = _knows_bias(function), kwargs.get("position_bias")
    if (
        knows_bias is None
        or not _fits(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        or not (bias is None or (knows_bias and _fits_bias(bias, query, key, attention_mask)))
        or _tiles_are_ahead(
            autocast_dtype(query) or query.dtype,
            key.shape[2],
            dropout,
            bias is None and _causal(module, attention_mask, is_causal),
        )
    ):
        return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                        is_causal=is_causal, **kwargs)  # fmt: skip
    return by_operator(module, query, key, value, attention_mask, dropout, scaling, is_causal, bias)


if AttentionInterface is not None:
    AttentionInterface.register(OURS, sdpa_attention_forward)
    AttentionMaskInterface.register(OURS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _argument_reason(given: dict[str, Any], *read: str) -> Optional[str]:
    """Returns a reason if a keyword argument of an attention call may change the result of transformers' function for
    sdpa, and is neither ignored by transformers' function nor named in ``read``; else None."""
    for name, value in given.items():
        if value is not None and name not in _IGNORED and name not in read:
            if name != "output_attentions" or value:
                return f"its call has a {name}, which only transformers' function reads"
    return None


def _of_few(q: Tensor, k: Any, v: Any, mask: Any, scaling: float) -> Optional[Tensor]:
    """Returns the operator's attention ``[batch, queries, heads, size]`` of few queries ``q [batch, heads, queries,
    size]``, which see all keys or the keys of a mask.

    Returns None if transformers' function has to compute the call.
    """
    if _knows_bias(ALL_ATTENTION_FUNCTIONS["sdpa"]) is None or _setting_reason():
        return None
    if not (accepts_input(k) and accepts_input(v) and k.dtype is v.dtype is q.dtype and k.shape == v.shape):
        return None
    batch, heads, queries, size = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != size or heads % k.shape[1] or size > _LARGEST_HEAD:
        return None
    if not _sees(mask, batch, queries, k.shape[2]) or _tiles_are_ahead(q.dtype, k.shape[2]):
        return None
    return _attention(q, k, v, mask, False, scaling, 0.0, None, None)[0].transpose(1, 2)


def _sees(mask: Any, batch: int, queries: int, keys: int) -> bool:
    """Returns whether the operator can use ``mask``: a boolean mask ``[batch, 1, queries, keys]``, or None if there is
    a single query, which sees all keys."""
    if mask is None:
        return queries == 1
    return isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == (batch, 1, queries, keys)


def by_operator(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], dropout: float = 0.0,
    scaling: Optional[float] = None, is_causal: Optional[bool] = None, position_bias: Optional[Tensor] = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Returns what transformers' ``sdpa_attention_forward`` returns, computed by the operator, for a call that the
    operator accepts."""
    causal = q.shape[2] > 1 and _causal(module, mask, is_causal)
    if position_bias is not None and (dtype := autocast_dtype(q)) is not None:
        position_bias = position_bias.to(dtype)
    if causal and k.shape[2] > (queries := q.shape[2]):
        # In causal attention, no query sees the keys behind the first `queries` keys. These later keys are an empty
        # part of a static cache, or the recomputation of a checkpoint added the keys to the cache again. The
        # recomputation must save tensors of the shapes that the first forward saved, so the later keys are cut off.
        k, v = k[:, :, :queries], v[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    out = ops.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=scaling, dropout_p=dropout, training=True, bias=position_bias
    )
    return out.transpose(1, 2).contiguous(), None


def _causal(module: Any, mask: Optional[Tensor], is_causal: Optional[bool]) -> bool:
    return mask is None and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _fits(
    module: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float, scaling: Any, others: dict[str, Any]
) -> bool:  # fmt: skip
    """Returns whether the operator accepts an attention call and is to be used on the call's device. The shape and the
    dtype of a position bias are not checked, see :func:`_fits_bias`."""
    if not all(map(accepts_input, (q, k, v))) or (q.dim(), k.dim(), v.dim()) != (4, 4, 4):
        return False
    if not q.device == k.device == v.device or _device_reason(q.device.type):
        return False
    if not q.dtype is k.dtype is v.dtype and autocast_dtype(q) is None:
        return False
    if type(dropout) not in _NUMBERS or not 0 <= dropout < 1:
        return False
    if scaling is not None and (type(scaling) not in _NUMBERS or not 0 < scaling < math.inf):
        return False
    if _argument_reason(others, "position_bias") is not None:
        return False
    batch, heads, queries, size = q.shape
    _, kv_heads, keys, _ = k.shape
    if (
        (queries < _LEAST_QUERIES and not _are_few(queries, dropout, others))
        or max(size, v.shape[3]) > _LARGEST_HEAD
        or k.shape != (batch, kv_heads, keys, size)
        or v.shape[:3] != k.shape[:3]
    ):
        return False
    if heads != kv_heads * max(getattr(module, "num_key_value_groups", 1), 1):
        return False
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.dim() == 4 and mask.device == q.device
        and all(size in (1, of) for size, of in zip(mask.shape, (batch, heads, queries, keys), strict=True))
    ):  # fmt: skip
        return False
    return True


def _are_few(queries: int, dropout: float, others: dict[str, Any]) -> bool:
    """Returns whether the operator's kernel for few queries can compute a call: at most _FEW_QUERIES queries, no
    dropout, no bias of the scores, and gradients turned off."""
    return (
        queries <= _FEW_QUERIES and dropout == 0 and others.get("position_bias") is None and not torch.is_grad_enabled()
    )


def _fits_bias(bias: Any, q: Tensor, k: Tensor, mask: Optional[Tensor]) -> bool:
    """Returns whether the operator accepts a bias that is added to the scores, as T5's relative positions are.

    Returns False for a bias that needs a gradient, which the operator does not compute. Returns False if some query
    sees no key: transformers hides keys by a finite bias, so in transformers a query that sees no key gets the mean of
    all values.
    """
    if not accepts_input(bias) or bias.dim() != 4 or bias.device != q.device:
        return False
    if bias.dtype not in (q.dtype, torch.float32):
        return False
    scores = (*q.shape[:3], k.shape[2])
    if any(size not in (1, of) for size, of in zip(bias.shape, scores, strict=True)):
        return False
    if bias.requires_grad and torch.is_grad_enabled():
        return False
    return type(mask) is not Tensor or bool(mask.any(-1).all())


def _tiles_are_ahead(dtype: torch.dtype, keys: int, dropout: float = 0.0, causal: bool = False) -> bool:
    """Returns whether PyTorch's own attention has to compute a call on the CPU path ``amx`` because the call has more
    keys than _MOST_KEYS_ON_AMX allows."""
    return _isa() == "amx" and dropout == 0 and dtype is torch.bfloat16 and keys > _MOST_KEYS_ON_AMX[causal]
