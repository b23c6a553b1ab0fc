"""Base classes of the adapted layers, which hold a frozen base layer, and merge and unmerge the adapter."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..weights.nf4 import NF4Weight
from ..weights.packed import PackedWeight
from .nf4 import NF4Linear, check_plain_forward
from .packed import PackedLinear
from .requantize import Frozen, frozen_weight, requantized, set_frozen_weight

# Name of the attribute of a base layer that holds the number of adapted layers that are merged into the base layer.
_MERGES = "_peft_ext_merges"


class AdaptedLinear(nn.Module):
    """A frozen ``base_layer`` with an adapter that can be merged into the base.

    The base is an ``nn.Linear``, an :class:`NF4Linear` or a :class:`PackedLinear`.

    A subclass defines ``_setup(base, ...)``, which calls :meth:`_hold` and creates the adapter's parameters. A subclass
    also defines :meth:`reset_parameters`, :meth:`adapted` and :meth:`merged_weight`, and defines :meth:`merged_bias`
    if merging changes the bias.
    """

    base_layer: nn.Linear

    @classmethod
    def _over(cls, linear: nn.Linear, *args: Any, **kwargs: Any) -> Any:
        """Returns an adapted layer whose base is ``linear`` itself. ``_over`` passes ``args`` and ``kwargs`` to the
        method ``_setup``.

        Raises: TypeError if ``linear`` is no nn.Linear, or of a subclass with another ``forward`` than nn.Linear,
        NF4Linear and PackedLinear have; ValueError if ``linear`` has a replaced ``forward`` or hooks, which the adapted
        layer would not run.
        """
        if not isinstance(linear, nn.Linear):
            came = type(linear).__name__
            raise TypeError(f"{cls.__name__}: linear is {came}, wanted an nn.Linear, an NF4Linear or a PackedLinear")
        check_plain_forward(cls.__name__, linear, (nn.Linear.forward, NF4Linear.forward, PackedLinear.forward))
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(linear, *args, **kwargs)
        return module.train(linear.training)

    def _hold(self, base: nn.Linear) -> None:
        self.base_layer = base.requires_grad_(False)
        self._unmerged: Optional[tuple[Frozen, Optional[Tensor]]] = None

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    def _weight(self) -> Frozen:
        """Returns the frozen weight without this layer's adapter, also while this adapter is merged."""
        if self._unmerged is not None:
            return self._unmerged[0]
        return frozen_weight(self.base_layer)

    def _bias(self, x: Tensor) -> Optional[Tensor]:
        bias = self.base_layer.bias
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.merged else self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """Returns the layer's output for x, computed from the base layer and the adapter, which must not be merged."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Returns the base layer's weight with the adapter merged. ``weight`` is the dense base weight in float32 or
        float64."""
        raise NotImplementedError

    def _merged_packed(self, weight: PackedWeight) -> tuple[PackedWeight, Tensor]:
        """Returns the merged packed weight, requantized, and the relative error of requantizing, a float64 tensor."""
        return requantized(self.merged_weight(weight.dequantize(torch.float32)), weight)

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Returns the base layer's bias with the adapter merged."""
        return bias

    @torch.no_grad()
    def merge(self) -> None:
        """Merges the adapter into the base weight and bias. Does nothing if the adapter is merged already.

        A dense merged weight is rounded to the base's dtype. A merged NF4 weight is quantized to NF4 again, and a
        merged weight of a PackedLinear to the weight's own layout; ``base_layer.merge_error`` is then the relative
        error of that quantization. The unmerged weight and bias are kept outside the state dict, and :meth:`unmerge`
        restores both bit for bit. While the adapter is merged, ``state_dict`` and ``load_state_dict`` raise
        RuntimeError.

        Raises: RuntimeError if ``base_layer.weight`` is not a parameter of ``base_layer``, as under
        torch.nn.utils.parametrize or prune; if no quantizer makes the layout of a PackedLinear's weight; or if the
        codes of an NF4Linear are a DTensor shard, or ZeRO-3 has partitioned the codes of a packed weight.
        """
        if self.merged:
            return
        base = self.base_layer
        if "weight" not in base._parameters and not isinstance(base, PackedLinear):
            raise RuntimeError(
                f"{type(self).__name__}: merge: base_layer.weight is computed from other tensors (by "
                "torch.nn.utils.parametrize or prune), wanted a parameter of base_layer"
            )
        held = self._weight()
        bias = None if base.bias is None else base.bias.data
        if isinstance(held, PackedWeight):
            held = held.map(Tensor.detach)  # `held` keeps the data, because the base's own tensors get the merged data
            set_frozen_weight(base, *self._merged_packed(held))
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
        """Restores the weight and bias from before :meth:`merge`, bit for bit. Does nothing if the adapter is not
        merged.

        Raises: RuntimeError if another layer over the same base was merged after this layer and is still merged.
        """
        if self._unmerged is None:
            return
        if self.base_layer.__dict__.get(_MERGES, 0) != self._merges:
            raise RuntimeError(
                f"{type(self).__name__}: unmerge: another layer over the same base was merged after this one, wanted "
                "that other layer unmerged first"
            )
        weight, bias = self._unmerged
        if isinstance(weight, PackedWeight):
            set_frozen_weight(self.base_layer, weight)
        else:
            self.base_layer.weight.data = weight
        if bias is not None:
            self.base_layer.bias.data = bias
        self._unmerged = None
        self.base_layer.__dict__[_MERGES] = self._merges - 1

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_unmerged("state_dict", "would count the adapter twice when it is loaded")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_unmerged("load_state_dict", "would have no effect on the merged weight")
        super()._load_from_state_dict(*args, **kwargs)

    def _check_unmerged(self, call: str, why: str) -> None:
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: {call}: the adapter is merged, and the state {why}; wanted "
                               "unmerge() first")  # fmt: skip

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            weight, bias = self._unmerged
            # As in NF4Linear, a cast does not change the codes and scales of a packed weight.
            weight = weight.to(self.base_layer.weight.device) if isinstance(weight, PackedWeight) else fn(weight)
            self._unmerged = (weight, bias if bias is None else fn(bias))
        return self


class LowRankLinear(AdaptedLinear):
    """An adapted layer with factors ``lora_A [r, in_features]``, ``lora_B [out_features, r]`` and a dropout on x."""

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
        """Returns ``lora_A``. A subclass for a method that scales ranks, such as AdaLoRA, returns ``lora_A`` with
        scaled rows."""
        return self.lora_A

    def _row_scale(self) -> Optional[Tensor]:
        """Returns ``g [out_features]``, the factor of each row of ``W + s · B A``, or None if no row is scaled."""
        return None

    def delta_weight(self) -> Tensor:
        """Returns ``s · B A`` ``[out_features, in_features]`` in the dtype of lora_A and lora_B.

        AdaLoRA multiplies the rows of A by ``rank_scale()``. DoRA's factor g is not applied.
        """
        return self.scaling * (self.lora_B @ self._scaled_A())

    def merged_weight(self, weight: Tensor) -> Tensor:
        merged, g = weight + self.delta_weight().to(weight.dtype), self._row_scale()
        return merged if g is None else g.to(weight.dtype)[:, None] * merged

    def _merged_packed(self, weight: PackedWeight) -> tuple[PackedWeight, Tensor]:
        if not isinstance(weight, NF4Weight):
            return super()._merged_packed(weight)
        return ops.nf4_merge(weight, self._scaled_A(), self.lora_B, scaling=self.scaling, row_scale=self._row_scale())

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, merged={self.merged}"
