"""What the adapted layers share: the frozen base, merging with an exact way back, and a pair of low-rank factors."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..weight import NF4Weight
from .nf4 import NF4Linear, requantized

__all__ = ["AdaptedLinear", "LowRankLinear"]

_MERGES = "_peft_ext_merges"  # an attribute of a base: how many layers are merged into it


class AdaptedLinear(nn.Module):
    """A frozen ``base_layer`` (``nn.Linear`` or :class:`NF4Linear`) under an adapter that can be merged into it.

    A subclass has a ``_setup(base, ...)`` that calls :meth:`_hold` and makes the adapter's parameters,
    :meth:`reset_parameters`, :meth:`adapted`, and :meth:`merged_weight`, and :meth:`merged_bias` if the bias changes.
    """

    base_layer: nn.Linear

    @classmethod
    def _over(cls, linear: nn.Linear, *args: Any, **kwargs: Any) -> Any:
        """Returns an adapted layer over ``linear`` itself; arguments as ``_setup`` takes them."""
        if not isinstance(linear, nn.Linear):
            came = type(linear).__name__
            raise TypeError(f"{cls.__name__}: linear is {came}, wanted an nn.Linear or an NF4Linear")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(linear, *args, **kwargs)
        return module.train(linear.training)

    def _hold(self, base: nn.Linear) -> None:
        self.base_layer = base.requires_grad_(False)
        self._unmerged: Optional[tuple[Union[Tensor, NF4Weight], Optional[Tensor]]] = None

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def _weight(self) -> Union[Tensor, NF4Weight]:
        """Returns the frozen weight; while merged, the one from before."""
        if self._unmerged is not None:
            return self._unmerged[0]
        return self.base_layer.nf4 if isinstance(self.base_layer, NF4Linear) else self.base_layer.weight

    def _bias(self, x: Tensor) -> Optional[Tensor]:
        bias = self.base_layer.bias
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.merged else self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """Returns what the layer computes where it is not merged."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Returns the weight with the adapter folded in; ``weight`` is the base's, dense, in float32 (float64)."""
        raise NotImplementedError

    def _merged_nf4(self, weight: NF4Weight) -> tuple[NF4Weight, Tensor]:
        """Returns the same of an NF4 weight, requantized, and the relative error that brings."""
        return requantized(self.merged_weight(weight.dequantize(torch.float32)), weight)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Returns the bias with the adapter folded in."""
        return bias

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the adapter into the base: rounded to its dtype, or requantized to NF4, which moves it by
        ``base_layer.merge_error``.

        Weight and bias from before are kept (not in the state dict), so that :meth:`unmerge` gives back their very
        bits.
        """
        if self.merged:
            return
        base = self.base_layer
        if "weight" not in base._parameters:
            raise RuntimeError(
                f"{type(self).__name__}: merge: base_layer's weight is made of others (torch.nn.utils.parametrize or "
                "prune), wanted a parameter of its own"
            )
        held = self._weight()
        bias = None if base.bias is None else base.bias.data
        if isinstance(held, NF4Weight):
            base.set_merged(*self._merged_nf4(held))
            self._unmerged = (held, bias)
        else:
            wide = torch.promote_types(held.dtype, torch.float32)
            merged = self.merged_weight(held.to(wide)).to(held.dtype)
            self._unmerged = (held.data, bias)
            held.data = merged
        if bias is not None:
            base.bias.data = self.merged_bias(bias).to(bias.dtype)
        self._merges = base.__dict__.get(_MERGES, 0) + 1
        base.__dict__[_MERGES] = self._merges

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the very bits from before :meth:`merge`.

        Raises: RuntimeError where another layer over the same base was merged after this one, and is still.
        """
        if self._unmerged is None:
            return
        if self.base_layer.__dict__.get(_MERGES, 0) != self._merges:
            raise RuntimeError(
                f"{type(self).__name__}: unmerge: another layer over the same base was merged after this one, unmerge "
                "that one first"
            )
        weight, bias = self._unmerged
        if isinstance(weight, NF4Weight):
            self.base_layer.set_nf4(weight)
        else:
            self.base_layer.weight.data = weight
        if bias is not None:
            self.base_layer.bias.data = bias
        self._unmerged = None
        self.base_layer.__dict__[_MERGES] = self._merges - 1

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            weight, bias = self._unmerged
            # Codes and scales keep their bits under a cast, as NF4Linear's do.
            weight = weight.to(self.base_layer.weight.device) if isinstance(weight, NF4Weight) else fn(weight)
            self._unmerged = (weight, bias if bias is None else fn(bias))
        return self


class LowRankLinear(AdaptedLinear):
    """``lora_A [r, in_features]`` and ``lora_B [out_features, r]``, and the dropout on x before them."""

    def _hold_low_rank(self, r: int, lora_alpha: float, lora_dropout: float, dtype: torch.dtype) -> None:
        name, base = type(self).__name__, self.base_layer
        checks.check_count(name, "r", r)
        checks.check_scale(name, lora_alpha, argument="lora_alpha")
        checks.check_dtype(name, dtype)
        if not isinstance(lora_dropout, (int, float)) or not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"{name}: lora_dropout is {lora_dropout}, wanted 0 <= p < 1")
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, device=device, dtype=dtype))

    @property
    def scaling(self) -> float:
        raise NotImplementedError

    def _scaled_A(self) -> Tensor:
        """Returns ``lora_A``, its rows scaled as the method scales each rank."""
        return self.lora_A

    def _row_scale(self) -> Optional[Tensor]:
        """Returns ``g [out_features]``, which scales the rows of ``W + s · B A``; None: nothing does."""
        return None

    def delta_weight(self) -> Tensor:
        """Returns ``s · B A``, A scaled, ``[out_features, in_features]``, in the adapters' dtype."""
        return self.scaling * (self.lora_B @ self._scaled_A())

    def merged_weight(self, weight: Tensor) -> Tensor:
        merged, g = weight + self.delta_weight().to(weight.dtype), self._row_scale()
        return merged if g is None else g.to(weight.dtype)[:, None] * merged

    def _merged_nf4(self, weight: NF4Weight) -> tuple[NF4Weight, Tensor]:
        return ops.nf4_merge(weight, self._scaled_A(), self.lora_B, scaling=self.scaling, row_scale=self._row_scale())

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, merged={self.merged}"
