"""PEFT's LoRA and DoRA layers, computed by :func:`peft_ext.ops.lora_linear` and :func:`peft_ext.ops.dora_linear`.

Several active LoRA adapters run as one adapter whose rank is the sum of their ranks: A and B are concatenated, and
different scales become a scale per rank. The last layer of a gated MLP may be computed together with the activation, by
:func:`peft_ext.ops.gated_lora_linear`. If the base layer's own forward has to run (for example over an 8-bit weight,
or because of hooks), only LoRA's low-rank part is fused, by :func:`peft_ext.ops.lora_residual`. A mixed batch is
computed by :func:`peft_ext.ops.grouped_lora_linear`.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ..._imports import optional
from ...nn import NF4Linear
from ...ops.checks import autocast_dtype
from ...ops.lora import checked_lora_linear
from ...reference.dora import output_scale
from ...weights.nf4 import NF4Weight
from . import dora, siblings, tensor_parallel
from .base import (
    FOUR_BIT,
    Fused,
    Linear8bitLt,
    active_in,
    fused_class,
    fuses,
    operands,
    runs_as_made,
    sums_wider,
    weight_of,
)
from .known import KNOWN, facts_of, remember, single_name
from .merging import Merged, MergesNF4
from .reasons import (
    Pairs,
    accepts_input,
    alone_reason,
    any_global_hook,
    base_reason,
    checked_adapters,
    kernel_reason,
    layer_reason,
    lora_adapter,
    variant_name,
)
from .recompute import has_hooks

LoraLinear = LoraLinear8bitLt = LoraLinear4bit = GPTQLoraLinear = AwqLoraLinear = HqqLoraLinear = None
with optional("peft", "LoRA over GPTQModel's layers is not fused"):
    from peft.tuners.lora.gptq import GPTQLoraLinear
with optional("peft", "LoRA over GPTQModel's AWQ layers is not fused"):
    from peft.tuners.lora.awq import AwqLoraLinear
with optional("peft", "LoRA over hqq's layers is not fused"):
    from peft.tuners.lora import hqq as _hqq

    HqqLoraLinear = getattr(_hqq, "HqqLoraLinear", None)  # PEFT defines HqqLoraLinear only if hqq is installed
with optional("peft", "LoRA and DoRA over a linear layer that is not bitsandbytes' are not fused"):
    from peft.tuners.lora import Linear as LoraLinear
if Linear8bitLt is not None:
    with optional("peft", "LoRA over bitsandbytes' Linear8bitLt is not fused"):
        from peft.tuners.lora import Linear8bitLt as LoraLinear8bitLt
if FOUR_BIT:
    with optional("peft", "LoRA and DoRA over bitsandbytes' Linear4bit are not fused"):
        from peft.tuners.lora import Linear4bit as LoraLinear4bit


class LowRank(Fused):
    """Base class of the fused layers with lora_A, lora_B and an optional scale per rank.

    A subclass defines ``pair``, ``checked_adapter`` and ``_parts``.
    """

    reads = (*Fused.reads, "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "cast_input_dtype_enabled")

    def _names(self) -> list[str]:
        """Returns the names of the active adapters that this layer has, in the order in which PEFT adds up the
        adapters' results."""
        return active_in(self, self._modules["lora_A"])

    def _reasons(self) -> tuple[Optional[str], Optional[str]]:
        return self._checked(self._names())[:2]

    def _checked(self, names: list[str]) -> tuple[Optional[str], Optional[str], Pairs]:
        """Returns three values for a call with the adapters ``names``: why PEFT's own forward has to run, why the base
        layer's own forward has to run (each None if it need not run), and each adapter's pair (lora_A, lora_B)."""
        if reason := layer_reason(self):
            return reason, None, []
        if tensor_parallel.is_split(self._modules["base_layer"]):
            return tensor_parallel.checked(self, names)[0], None, []
        reason, pairs = checked_adapters(self, names, len(names) > 1)
        if reason is not None:
            return reason, None, []
        is_dora, device = names[0] in self.lora_variant, pairs[0][0].device.type
        if (reason := base_reason(self)) is None:
            return kernel_reason("dora_linear" if is_dora else "lora_linear", device), None, pairs
        if is_dora:
            return reason, None, pairs
        alone = alone_reason(self)
        return (f"{reason}; {alone}" if alone else kernel_reason("lora_residual", device)), reason, pairs

    def joint_state(self) -> Optional[tuple]:
        """Returns the state on which the layer's output depends, as a tuple that can be compared: the adapter's name,
        scaling and dropout, and the identity and version of each tensor.

        Returns None if the layer can't be computed together with siblings.
        """
        names, modules = self._names(), self._modules
        if tensor_parallel.is_split(modules["base_layer"]):
            return None if layer_reason(self) else tensor_parallel.joint_state(self, names)
        reason, alone, pairs = self._checked(names)
        if reason is not None or alone is not None or len(names) > 1 or names[0] in self.lora_variant:
            return None
        name, base, dropout = names[0], modules["base_layer"], modules["lora_dropout"]._modules[names[0]]
        if self._bias(name) is not None or isinstance(self.scaling[name], Tensor):
            return None
        held = (*base._parameters.values(), *base._buffers.values(), *pairs[0], *self._scale_tensors(name))
        held = [tensor for tensor in held if tensor is not None]
        if any(tensor.is_inference() for tensor in held):
            return None
        versions = tuple((id(tensor), tensor._version) for tensor in held)
        return name, self.scaling[name], getattr(dropout, "p", 0.0), dropout.training, versions

    def joint_call(self, x: Tensor) -> Optional[tuple]:
        """Returns the layer's operands in a call of ``lora_linears`` or ``gated_lora_linear``: weight, bias, lora_A,
        lora_B, rank_scale, scaling, dropout p and the dtype of the output.

        Returns None if the base layer's own forward has to run (:func:`.base.operands` returns None, or
        :func:`.base.sums_wider` is true), if the base layer multiplies another tensor than x, for example a cast of x,
        or if x does not fit this process's shard of a split base layer. Call ``joint_call`` only if :meth:`joint_state`
        returned a tuple.
        """
        (name,), base = self._names(), self._modules["base_layer"]
        if tensor_parallel.is_split(base):
            return tensor_parallel.joint_call(self, x, [name])
        if sums_wider(base, x) or (found := operands(base, x)) is None or found[0] is not x:
            return None
        _, weight, bias, dtype = found
        rank_scale, scaling = self._scales(name)
        rank_scale = None if rank_scale is None else rank_scale.flatten()
        return weight, bias, *self.pair(name), rank_scale, scaling, self.dropout_p(name), dtype

    def joint_split(self) -> Union[tensor_parallel.Split, str, None]:
        """Returns how transformers split the base layer between processes; None if the base layer is not split."""
        base = self._modules["base_layer"]
        return tensor_parallel.split_of(base) if tensor_parallel.is_split(base) else None

    def joins_gated(self) -> bool:
        """Returns whether :meth:`output_of_gated` may compute the layer, as far as this depends on the layer's class
        and adapters: the layer has one active adapter, and the adapter is no variant of LoRA such as DoRA."""
        return runs_as_made(self) and (name := single_name(self)) is not None and name not in self.lora_variant

    def output_of_gated(self, gate: Tensor, up: Optional[Tensor], activation: str) -> Optional[Tensor]:
        """Returns the layer's output for the input ``act(gate) ∘ up``, computed by one operator for the activation and
        the layer; see :func:`peft_ext.ops.gated_lora_linear` for the arguments.

        Returns None if the caller has to compute the activation and then call the layer: under torch.compile, if
        :meth:`joins_gated` is false, if the layer or a child of it has hooks, if autocast would cast the layer's input,
        if gradients are recorded but gate and up need none (gate and up would be kept in place of their product), if no
        kernel computes the activation and the layer together on this device, if the layer can't be computed together
        with siblings (see :meth:`joint_state` and :meth:`joint_call`), or if the base layer is split between processes.
        """
        if torch.compiler.is_compiling() or any_global_hook() or not self.joins_gated() or has_hooks(self):
            return None
        if torch.is_grad_enabled() and not (gate.requires_grad or (up is not None and up.requires_grad)):
            return None
        if autocast_dtype(gate) not in (None, gate.dtype) or self.joint_split() is not None:
            return None
        if self.joint_state() is None or kernel_reason("gated_lora_linear", gate.device.type) is not None:
            return None
        like = gate if up is not None else gate[..., : gate.shape[-1] // 2]  # of the shape, dtype and device of h
        if not accepts_input(like) or (call := self.joint_call(like)) is None:
            return None
        weight, bias, lora_A, lora_B, rank_scale, scaling, p, _ = call  # the dtype of the output is gate's
        return ops.gated_lora_linear(gate, up, activation, weight, lora_A, lora_B, bias, rank_scale=rank_scale,
                                     scaling=scaling, dropout_p=p, training=True)  # fmt: skip

    def _scale_tensors(self, name: str) -> tuple[Tensor, ...]:
        """Returns the tensors from which :meth:`_rank_scale` computes the scale per rank."""
        return ()

    def _rank_scale(self, name: str, scaling: float) -> Optional[Tensor]:
        """Returns ``scaling`` times the adapter's scale per rank ``[R]``; None if the adapter has no scale per rank, as
        in LoRA."""
        return None

    def _scales(self, name: str, is_common: bool = False) -> tuple[Optional[Tensor], float]:
        """Returns ``rank_scale`` and ``scaling`` for :func:`peft_ext.ops.lora_linear`, if the adapter's scaling is a
        number. ``is_common``: whether :meth:`_common` has found that the call is eager and its tensors are plain."""
        return self._rank_scale(name, 1.0), self.scaling[name]

    def _bias(self, name: str) -> Optional[Tensor]:
        """Returns the bias ``[N]`` of lora_B, which PEFT multiplies by the adapter's scaling; None without a bias."""
        return None

    def dropout_p(self, name: str) -> float:
        """Returns the probability with which the next call drops an element of the adapter's input."""
        dropout = self._modules["lora_dropout"]._modules[name]
        return float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _parts(self, name: str) -> Optional[tuple]:
        """Returns an adapter's lora_A and lora_B, and three tuples: the adapter's modules, tensors and types, as far as
        the checks read them.

        Returns None if the adapter can't take the fast path of :mod:`.known`.
        """
        raise NotImplementedError

    def _common(self, x: Any) -> Optional[tuple]:
        """Returns a tuple for a call with one active adapter: the facts (see :mod:`.known`), the adapter's name, the
        base layer, lora_A, lora_B and the dropout's p.

        Returns None for a call that the fast path of :mod:`.known` does not cover; the checks then have to run.
        """
        if (name := single_name(self)) is None or (parts := self._parts(name)) is None:
            return None
        lora_A, lora_B, modules, tensors, types = parts
        base, dropout = self._modules["base_layer"], self._modules["lora_dropout"]._modules[name]
        scaling, held, training = self.scaling[name], dropout.__dict__, dropout.training
        p = held.get("p", 0.0)
        if type(scaling) not in (float, int) or type(p) not in (float, int):
            return None
        numbers = (scaling, self.cast_input_dtype_enabled, p, held.get("inplace"), training, *types)
        op = "dora_linear" if name in self.lora_variant else "lora_linear"
        facts = facts_of(self, x, op, (dropout, *modules), tensors, numbers)
        if facts is None:
            return None
        return facts, name, base, lora_A, lora_B, float(p) if training else 0.0

    def _fused(self, x: Tensor) -> Optional[Tensor]:
        """Returns ``x Wᵀ + (dropout(x) Aᵀ ∘ ρ) Bᵀ + b`` with the adapter's scale per rank ρ, or DoRA's output, in the
        dtype of PEFT's result.

        Returns None if PEFT's own forward has to run.
        """
        if siblings.NOW.groups and (y := siblings.output_of(self, x)) is not None:
            return y
        if (common := self._common(x)) is not None and common[0] in KNOWN:
            _, name, base, lora_A, lora_B, p = common
            weight = base.nf4 if type(base) is NF4Linear else weight_of(base)
            bias = base._parameters["bias"]
            if name in self.lora_variant:
                return dora.forward(self, name, x, weight, bias, (lora_A, lora_B), x.dtype, True)
            rank_scale, scaling = self._scales(name, True)
            return checked_lora_linear(x, weight, bias, lora_A, lora_B, rank_scale, float(scaling), p)
        names, modules = self._names(), self._modules
        if tensor_parallel.is_split(modules["base_layer"]):
            return None if layer_reason(self) else tensor_parallel.forward(self, x, names)
        reason, alone, pairs = self._checked(names)
        if reason is not None or not accepts_input(x):
            return None
        base, name = modules["base_layer"], names[0]
        if alone is None and type(base) in FOUR_BIT and sums_wider(base, x):
            if name in self.lora_variant:
                return dora.forward_over(self, name, base, x)
            alone = "its sum is float32's"
        if alone is None:
            if (found := operands(base, x)) is None:
                return None
            if common is not None and (
                found[0] is not x or found[2] is not base._parameters["bias"] or found[3] is not x.dtype
            ):
                common = None
            x, weight, bias, dtype = found
            if name in self.lora_variant:
                y = dora.forward(self, name, x, weight, bias, pairs[0], dtype)
                if common is not None and y.dtype is dtype:
                    remember(common[0])
                return y
        if len(names) == 1:
            (lora_A, lora_B), scaling = pairs[0], self.scaling[name]
            if isinstance(scaling, Tensor):
                scaling, rank_scale = 1.0, _times(scaling, self._rank_scale(name, 1.0), lora_A.shape[0])
            else:
                rank_scale, scaling = self._scales(name)
        else:
            lora_A, lora_B, scaling, rank_scale = self._concatenated(names)
        p = self.dropout_p(name)
        if alone is None:
            y = ops.lora_linear(x, weight, lora_A, lora_B, bias, rank_scale=rank_scale, scaling=scaling, dropout_p=p,
                                training=True)  # fmt: skip
            if common is not None and self._bias(name) is None:
                remember(common[0])
        else:
            result = base(x)
            dtype = result.dtype
            if not accepts_input(result) or result.shape[:-1] != x.shape[:-1]:
                return self._added(names, x, result)
            wide = torch.promote_types(x.dtype, dtype)
            # Autocast is off because it would round the base layer's result; PEFT adds to the unrounded result.
            with torch.autocast(x.device.type, enabled=False):
                y = ops.lora_residual(x.to(wide), result.to(wide), lora_A, lora_B, scaling=scaling,
                                      rank_scale=rank_scale, dropout_p=p, training=True)  # fmt: skip
        for name in names:
            if (bias := self._bias(name)) is not None:
                y = y + self.scaling[name] * bias
        return y if y.dtype is dtype else y.to(dtype)

    def _added(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        """Adds the low-rank terms to ``result`` with PyTorch's functions, as PEFT does, and returns the sum.

        A layer calls ``_added`` if ``ops.lora_residual`` does not accept the base layer's result. PEFT's own forward
        can't replace ``_added``, because PEFT's forward would run the base layer a second time.
        """
        dtype = result.dtype
        for name in names:
            lora_A, lora_B = self.pair(name)
            if (rank_scale := self._rank_scale(name, 1.0)) is not None:
                lora_A = lora_A * rank_scale.unsqueeze(1)
            dropped = self._modules["lora_dropout"]._modules[name](x.to(lora_A.dtype))
            result = result + F.linear(F.linear(dropped, lora_A), lora_B, self._bias(name)) * self.scaling[name]
        return result.to(dtype)

    def _side_by_side(self, names: list[str]) -> tuple[Tensor, Tensor, None]:
        """Returns three values: the adapters' lora_A ``[R, K]``, multiplied by the scaling and the scale per rank, and
        their lora_B ``[N, R]``, both concatenated along the rank R in float32; and None, because LoRA scales no output
        row."""
        pairs, scaled = [self.pair(name) for name in names], []
        for name, (a, _) in zip(names, pairs, strict=True):
            scale = _times(self.scaling[name], self._rank_scale(name, 1.0), a.shape[0], a.device)
            scaled.append(scale.unsqueeze(1) * a.float())
        return torch.cat(scaled), torch.cat([b.float() for _, b in pairs], dim=1), None

    def _concatenated(self, names: list[str]) -> tuple[Tensor, Tensor, float, Optional[Tensor]]:
        """Returns lora_A, lora_B, the scaling and the scale per rank of several adapters concatenated along the rank.

        A scaling that is a number becomes a tensor by ``torch.full`` on the device, because a copy from the host would
        wait for the device.
        """
        pairs = [self.pair(name) for name in names]
        lora_A, lora_B = _cat([a for a, _ in pairs]), _cat([b for _, b in pairs], dim=1)
        scalings = [self.scaling[name] for name in names]
        if any(isinstance(scaling, Tensor) for scaling in scalings):
            given = [_times(scaling, self._rank_scale(name, 1.0), a.shape[0], a.device)
                     for name, scaling, (a, _) in zip(names, scalings, pairs, strict=True)]  # fmt: skip
            return lora_A, lora_B, 1.0, _cat(given)
        scales = [self._rank_scale(name, scaling) for name, scaling in zip(names, scalings, strict=True)]
        if scales[0] is not None:
            return lora_A, lora_B, 1.0, _cat(scales)
        if scalings.count(scalings[0]) == len(scalings):
            return lora_A, lora_B, scalings[0], None
        filled = [
            torch.full((a.shape[0],), scaling, dtype=torch.float32, device=a.device)
            for (a, _), scaling in zip(pairs, scalings, strict=True)
        ]
        return lora_A, lora_B, 1.0, torch.cat(filled)


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Returns ``torch.cat(tensors, dim)`` without autocast: a CPU's bfloat16 autocast rejects float16 tensors."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return torch.cat(tensors, dim)


def _times(scaling: Any, rank_scale: Optional[Tensor], rank: int, device: Any = None) -> Tensor:
    """Returns the scale per rank ``[R]``, float32: ``scaling`` (a number or a tensor of one element) times the
    adapter's ``rank_scale``, if there is one."""
    if not isinstance(scaling, Tensor):
        scaling = torch.full((1,), scaling, dtype=torch.float32, device=device)
    scaling = scaling.to(torch.float32).reshape(1)
    return scaling.expand(rank) if rank_scale is None else scaling * rank_scale


class Lora(LowRank):
    """Base class of the fused LoRA and DoRA layers, with modules lora_A and lora_B and one scaling per adapter."""

    reads = (
        *LowRank.reads, "lora_bias", "lora_magnitude_vector", "_check_forward_args", "get_base_layer",
    )  # fmt: skip

    def _fused_with(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Optional[Tensor]:
        """Returns the output of a mixed batch, in which ``adapter_names`` gives one adapter name per sample.

        A sample whose name is no adapter of this layer (such as ``__base__``) gets the base layer's output. Returns
        None if PEFT's own forward has to run.
        """
        names = kwargs.get("adapter_names")
        if names is None or args or len(kwargs) > 1:
            return None
        self._check_forward_args(x, adapter_names=names)
        held = self._modules["lora_A"]._modules
        used = [name for name in dict.fromkeys(names) if name in held]
        if not used or layer_reason(self) is not None or not accepts_input(x) or x.dim() < 2:
            return None
        reason, pairs = checked_adapters(self, used, True)
        if reason is not None or base_reason(self) is not None:
            return None
        if any(isinstance(self.scaling[name], Tensor) or self._bias(name) is not None for name in used):
            return None
        if kernel_reason("grouped_lora_linear", pairs[0][0].device.type) is not None:
            return None
        if (found := operands(self._modules["base_layer"], x)) is None:
            return None
        x, weight, bias, dtype = found
        index = {name: i for i, name in enumerate(used)}
        y = ops.grouped_lora_linear(
            x, weight, [a for a, _ in pairs], [b for _, b in pairs], [index.get(name, -1) for name in names], bias,
            scaling=[self.scaling[name] for name in used],
        )  # fmt: skip
        return y if y.dtype is dtype else y.to(dtype)

    checked_adapter = lora_adapter

    def _parts(self, name: str) -> Optional[tuple]:
        modules, variant = self._modules, self.lora_variant.get(name)
        lora_A, lora_B = modules["lora_A"]._modules.get(name), modules["lora_B"]._modules.get(name)
        if lora_A is None or lora_B is None:
            return None
        a, b, held = lora_A._parameters, lora_B._parameters, (lora_A, lora_B)
        weight_A, weight_B = a.get("weight"), b.get("weight")
        tensors = (weight_A, weight_B, a.get("bias"), b.get("bias"))
        if variant is None:
            return weight_A, weight_B, held, tensors, ()
        if (magnitude := modules["lora_magnitude_vector"]._modules.get(name)) is None:
            return None
        return weight_A, weight_B, (*held, magnitude), (*tensors, magnitude._parameters.get("weight")), (type(variant),)

    def pair(self, name: str) -> tuple[Optional[Tensor], Optional[Tensor]]:
        modules = self._modules
        lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_A._parameters.get("weight"), lora_B._parameters.get("weight")

    def _bias(self, name: str) -> Optional[Tensor]:
        return self._modules["lora_B"]._modules[name]._parameters.get("bias")

    def dora_dtype(self, dtype: torch.dtype, magnitude: Tensor) -> torch.dtype:
        """Returns the dtype of the result of PEFT's DoRA over a base layer whose result has dtype ``dtype``."""
        return dtype


if LoraLinear is not None:

    @fuses(LoraLinear)
    class FusedLoraLinear(Lora, MergesNF4, LoraLinear):
        """Fused ``peft.tuners.lora.Linear``: LoRA and DoRA."""

        def known_call(self, x: Tensor) -> Optional[tuple]:
            """Returns what :meth:`_common` returns: a tuple that begins with the facts of the call (see :mod:`.known`),
            or None. A block that calls the layer's kernel directly (see :mod:`.few_tokens`) uses ``known_call``."""
            return self._common(x)

        def resolve_lora_variant(self, **kwargs: Any) -> Any:
            variant = super().resolve_lora_variant(**kwargs)
            if variant is None or not isinstance(self.get_base_layer(), NF4Linear):
                return variant
            if type(variant) is not dora.DoraLinearVariant:
                raise NotImplementedError(f"{variant_name(variant)} over an NF4Linear is not supported yet")
            return dora.DoraNF4Variant()

        def _factors(self, names: list[str], nf4: NF4Weight) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
            plain = not any(self.lora_bias[name] for name in names)
            variants_of = [self.lora_variant.get(name) for name in names]
            if plain and all(variant is None for variant in variants_of):
                return self._side_by_side(names)
            if not plain or len(names) > 1 or type(variants_of[0]) not in dora.VARIANTS:
                return None
            lora_A, lora_B, _ = self._side_by_side(names)
            norm = ops.dora_weight_norm(nf4, lora_A, lora_B, dtype=torch.float32)
            return lora_A, lora_B, output_scale(self.lora_magnitude_vector[names[0]].weight, norm)

        def _merged(self, name: str, weight: Tensor, bias: Optional[Tensor], unmerged: Tensor) -> Merged:
            variant = self.lora_variant.get(name)
            delta = self.get_delta_weight(name).float()
            merged = weight + delta
            if type(variant) in dora.VARIANTS:  # as in the forward, DoRA's norm is that of the unmerged weight + delta
                norm = torch.linalg.norm(unmerged + delta, dim=1)
                merged = output_scale(self.lora_magnitude_vector[name].weight, norm).unsqueeze(1) * merged
            elif variant is not None:
                raise NotImplementedError(f"{variant_name(variant)} over a packed weight can't be merged")
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(  # the error has the text of PEFT's own error
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                bias = bias + self.lora_B[name].bias * self.scaling[name]
            return merged, bias


# The following fused classes have no code but that of Lora. Over ``Linear8bitLt`` only the low-rank part is fused.
FusedGPTQLoraLinear = fused_class("FusedGPTQLoraLinear", Lora, GPTQLoraLinear)
FusedAwqLoraLinear = fused_class("FusedAwqLoraLinear", Lora, AwqLoraLinear)
FusedHqqLoraLinear = fused_class("FusedHqqLoraLinear", Lora, HqqLoraLinear)
FusedLoraLinear8bitLt = fused_class("FusedLoraLinear8bitLt", Lora, LoraLinear8bitLt)


if LoraLinear4bit is not None:

    @fuses(LoraLinear4bit)
    class FusedLoraLinear4bit(Lora, LoraLinear4bit):
        """Fused ``peft.tuners.lora.bnb.Linear4bit``: QLoRA and QDoRA."""

        def dora_dtype(self, dtype: torch.dtype, magnitude: Tensor) -> torch.dtype:
            # PEFT checks CUDA's autocast on every device, and casts the result back only outside of that autocast.
            return torch.promote_types(dtype, magnitude.dtype) if torch.is_autocast_enabled() else dtype
