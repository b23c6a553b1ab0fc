"""DoRA on the experts of a mixture: a subclass of PEFT's wrapper of one parameter (``ParamWrapper``).

    W'_e = g_e ∘ (W_e + s B_e A_e),  g_e = magnitude_e / ‖W_e + s B_e A_e‖  per output; the norm has no gradient

Expert e has the weight W_e and the adapter B_e A_e, whose scaling is s. PEFT alone refuses DoRA on experts. Without
:func:`peft_ext.accelerate` the wrapper computes the adapted weights W' of all experts on each forward, and the experts'
own forward uses W', as with PEFT's wrapper. After ``peft_ext.accelerate``, :mod:`.experts` computes DoRA on the rows of
each expert without W'. Adapter files have PEFT's names for DoRA: the magnitudes ``[experts, outputs]`` are named
``lora_magnitude_vector``, and the configuration has ``use_dora`` true. PEFT without peft_ext raises an error for
adapter files of DoRA on experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import ops
from ..._imports import has, optional
from ...nn.experts import FrozenExperts, expert_parameters, is_stored_transposed
from ...reference.dora import output_scale

ParamWrapper = DoraParamWrapper = None
with optional("peft", "DoRA on the experts of a mixture is not known"):
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import ParamWrapper as _ParamWrapper
    from peft.tuners.tuners_utils import check_adapters_to_merge

    has(_ParamWrapper, "update_layer", "get_delta_weight", "_activate_lora")
    ParamWrapper = _ParamWrapper


def factors(wrapper: Any, name: str) -> tuple[Tensor, Tensor]:
    """Returns an adapter's lora_A ``[experts, R, K]`` and lora_B ``[experts, N, R]`` as views of the parameters."""
    a, b = (wrapper._modules[kind]._modules[name]._parameters["weight"] for kind in ("lora_A", "lora_B"))
    return factors_of(wrapper, a, b)


def factors_of(wrapper: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weights ``a`` of lora_A and ``b`` of lora_B as views of the shapes that :func:`factors` returns,
    ``[experts, R, K]`` and ``[experts, N, R]``."""
    count = wrapper.num_experts
    a, b = a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 0, 1)
    if is_stored_transposed(wrapper.get_base_layer()) is wrapper._did_swap_in_out_features:
        # PEFT assumes that the parameter is stored as [experts, out, in], unless the experts have a true
        # `is_transposed`. If the assumption is wrong, as for Llama 4, PEFT's lora_A and lora_B are exchanged.
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b


def magnitude_of(wrapper: Any, name: str) -> Optional[Tensor]:
    """Returns an adapter's magnitude ``[experts, outputs]``; None if the adapter is LoRA."""
    held = wrapper._modules["lora_magnitude_vector"]._modules.get(name)
    return None if held is None else held._parameters["weight"]


def is_dora(wrapper: Any, names: list[str]) -> bool:
    return any(magnitude_of(wrapper, name) is not None for name in names)


def check_merged_together(wrapper: Any, names: list[str]) -> None:
    """Raises ValueError if ``names`` are several adapters, one of them DoRA.

    The wrapper's forward adds up the changes that each adapter alone makes to the experts' weight. A second merge would
    start from the merged weight, whose norm differs from the norm of the unmerged weight.
    """
    if len(names) > 1 and is_dora(wrapper, names):
        raise ValueError(f"merge: the adapters {', '.join(names)}, one of them DoRA, into experts: merge one alone")


def register(config: Any, model: nn.Module) -> None:
    """Registers DoraParamWrapper, in a PEFT configuration with ``use_dora``, as the wrapper of ``model``'s classes of
    experts.

    Wrappers of PEFT's own class that are already around experts of ``model`` become DoraParamWrapper, so that a DoRA
    adapter can be added to these wrappers.
    """
    if DoraParamWrapper is None or not getattr(config, "use_dora", False):
        return
    # For packed experts, `kinds` has the stock class: the class of packed experts derives from the stock class, is made
    # at run time, and can't be pickled.
    kinds = {getattr(module, "stock_class", type(module)) for module in model.modules() if expert_parameters(module)}
    if kinds:
        config._register_custom_module(dict.fromkeys(kinds, _made))
    for module in model.modules():
        if type(module) is ParamWrapper and expert_parameters(module.get_base_layer()):
            module.__class__ = DoraParamWrapper


def _made(target: Any, adapter_name: str, *, parameter_name: Optional[str] = None, **kwargs: Any) -> Any:
    """Returns a DoraParamWrapper of the parameter ``parameter_name`` of ``target``; None if ``parameter_name`` is None.
    PEFT calls ``_made`` to make an adapter layer."""
    if parameter_name is None:
        return None
    return DoraParamWrapper(target, adapter_name, parameter_name=parameter_name, **kwargs)


class _Plus(nn.Module):
    """A parametrization that returns the weight plus ``delta``, the sum of the changes that the active adapters make to
    the weight."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


if ParamWrapper is not None:

    class ExpertsMagnitude(DoraLinearLayer):
        """The magnitudes ``[experts, outputs]`` of one adapter, with PEFT's cache of the weight norm."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__(fan_in_fan_out=False)
            self.weight = nn.Parameter(weight)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            raise NotImplementedError("the wrapper computes")

        def __repr__(self) -> str:
            return f"lora.dora.{type(self).__name__}({', '.join(map(str, self.weight.shape))})"

    class DoraParamWrapper(ParamWrapper):
        """A wrapper of one parameter of a mixture's experts, with adapters of LoRA or, where an adapter's configuration
        has ``use_dora``, of DoRA."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: Any, **kwargs: Any):
            super().__init__(base_layer, adapter_name, parameter_name, _without_dora(config), **kwargs)
            if config.use_dora:
                self._add_magnitude(adapter_name, config)

        def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
            super().update_layer(adapter_name, *args, config=_without_dora(config), **kwargs)
            if config.use_dora:
                self._add_magnitude(adapter_name, config)

        def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
            codes = self.get_param()
            if not (codes.is_floating_point() and codes.dtype.itemsize == 1):
                super()._move_adapter_to_device_of_base_layer(adapter_name, device)
                return
            for held in (self.lora_A, self.lora_B):  # PEFT would cast lora_A and lora_B to FP8, the dtype of the codes
                if not held[adapter_name].weight.is_meta:
                    held[adapter_name].to(codes.device if device is None else device)

        def _add_magnitude(self, name: str, config: Any) -> None:
            self.use_dora[name] = True
            if "lora_magnitude_vector" not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, "lora_magnitude_vector")
            norm = self.weight_norm(name).to(self.lora_A[name].weight.dtype)
            self.lora_magnitude_vector[name] = ExpertsMagnitude(norm)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

        @torch.no_grad()
        def weight_norm(self, name: str) -> Tensor:
            """Returns the float32 norm ``‖W_e + s B_e A_e‖`` of each output of each expert e, ``[experts, outputs]``,
            with the adapter's scaling s."""
            experts, (lora_A, lora_B) = self.get_base_layer(), factors(self, name)
            if isinstance(experts, FrozenExperts):
                weight = experts.frozen(self.parameter_name)
            else:
                weight = self.get_param().detach()
                weight = weight.transpose(1, 2) if is_stored_transposed(experts) else weight
            if lora_A.device.type == "meta":
                return torch.empty(lora_B.shape[:2], device="meta")
            lora_A, lora_B = lora_A.to(weight.device), lora_B.to(weight.device)
            return ops.dora_experts_weight_norm(weight, lora_A, lora_B, float(self.scaling[name]))

        def _scale(self, name: str, norm: Optional[Tensor] = None) -> Tensor:
            """Returns DoRA's output scale g, the magnitude divided by the norm, in a shape that broadcasts over the
            parameter: ``[E, N, 1]`` for a parameter stored as ``[E, N, K]``, ``[E, 1, N]`` for one stored as
            ``[E, K, N]``, with E experts, N outputs and K inputs."""
            g = output_scale(self.lora_magnitude_vector[name].weight, self.weight_norm(name) if norm is None else norm)
            return g[:, None, :] if is_stored_transposed(self.get_base_layer()) else g[:, :, None]

        def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
            """Returns the difference that the adapter adds to the parameter W: ``s B A`` for LoRA with the scaling s,
            and ``g ∘ (W + s B A) - W`` for DoRA with the output scale g."""
            delta = super().get_delta_weight(adapter_name, *args, **kwargs)
            if magnitude_of(self, adapter_name) is None:
                return delta
            weight = self.get_param()
            g = self._scale(adapter_name).to(weight.device)
            return (g * (weight.to(g.dtype) + delta) - weight).to(weight.dtype)

        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            names = [name for name in active_adapters if name in self.lora_A]
            if not is_dora(self, names):
                with super()._activate_lora(active_adapters):
                    yield
                return
            # Several adapters add up as in PEFT's DoRA: each adapter adds the change that it alone makes to the weight.
            deltas = [self.get_delta_weight(name) for name in names]
            base, parameter, trains = self.get_base_layer(), self.parameter_name, self.get_param().requires_grad
            parametrize.register_parametrization(base, parameter, _Plus(sum(deltas)))
            held = base.parametrizations[parameter]
            held.original.requires_grad_(trains)
            try:
                with parametrize.cached():
                    yield
            finally:
                if len(held) == 1:
                    parametrize.remove_parametrizations(base, parameter, leave_parametrized=False)
                else:  # the parameter has another parametrization too, which stays
                    del held[-1]

        def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
            """Merges the adapters into the parameter, as PEFT's wrapper does.

            For a DoRA adapter, the norm before the merge is kept for ``unmerge``. Raises ValueError if a DoRA adapter
            would be merged beside another adapter.
            """
            names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            check_merged_together(self, [*self.merged_adapters, *names])
            for name in names:
                if magnitude_of(self, name) is not None:
                    self._norms_at_merge()[name] = self.weight_norm(name)
                super().merge(safe_merge=safe_merge, adapter_names=[name])

        @torch.no_grad()
        def unmerge(self) -> None:
            if not is_dora(self, self.merged_adapters):
                return super().unmerge()
            norms = self._norms_at_merge()
            scales = {name: self._scale(name, norms[name])
                      for name in self.merged_adapters if magnitude_of(self, name) is not None}  # fmt: skip
            if not all(g.all() for g in scales.values()):
                raise RuntimeError("unmerge: a magnitude is 0, which leaves nothing of the weight: load the base model")
            while self.merged_adapters:
                name, param = self.merged_adapters.pop(), self.get_param()
                weight = param.data.to(torch.float32) if name in scales else param.data
                weight = weight / scales[name].to(weight.device) if name in scales else weight
                param.data = (weight - ParamWrapper.get_delta_weight(self, name).to(weight.dtype)).to(param.dtype)
                norms.pop(name, None)

        def _norms_at_merge(self) -> dict[str, Tensor]:
            return self.__dict__.setdefault("_peft_ext_norms_at_merge", {})

    DoraParamWrapper.__name__ = "ParamWrapper"  # PEFT finds nested wrappers by the class name ParamWrapper


def _without_dora(config: Any) -> Any:
    plain = copy.copy(config)
    plain.use_dora = False
    return plain
