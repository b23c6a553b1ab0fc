"""DoRA on the experts of a mixture, which PEFT refuses, as a layer of PEFT's kind: a wrapper of one parameter.

    W'_e = g_e ∘ (W_e + s B_e A_e),  g_e = magnitude_e / ‖W_e + s B_e A_e‖  per output, the norm a constant

Alone it does as PEFT's wrapper does: it makes W' of all experts on each forward, and lets the experts' own forward run
over that; :mod:`.experts` computes it on the rows. Saved in PEFT's files, under PEFT's names for DoRA: the magnitudes
are ``lora_magnitude_vector``, ``[E, N]``, and ``use_dora`` is true, by which PEFT alone refuses the file and says so.
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
from ...nn.experts import NF4Experts, expert_parameters, is_stored_transposed
from ...reference.dora import output_scale

ParamWrapper = DoraParamWrapper = None
with optional("peft", "DoRA on the experts of a mixture is not known"):
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import ParamWrapper as _ParamWrapper
    from peft.tuners.tuners_utils import check_adapters_to_merge

    has(_ParamWrapper, "update_layer", "get_delta_weight", "_activate_lora")
    ParamWrapper = _ParamWrapper


def factors(wrapper: Any, name: str) -> tuple[Tensor, Tensor]:
    """Returns an adapter's lora_A ``[E, R, K]`` and lora_B ``[E, N, R]``, of the parameters' memory."""
    a, b = (wrapper._modules[kind]._modules[name]._parameters["weight"] for kind in ("lora_A", "lora_B"))
    count = wrapper.num_experts
    a, b = a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 0, 1)
    if is_stored_transposed(wrapper.get_base_layer()) is wrapper._did_swap_in_out_features:
        # PEFT takes the parameter, as it is stored, for [E, out, in]; here it is the other way round, and so are A and
        # B.
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b


def magnitude_of(wrapper: Any, name: str) -> Optional[Tensor]:
    """Returns an adapter's magnitude ``[E, N]``; None: it is LoRA."""
    held = wrapper._modules["lora_magnitude_vector"]._modules.get(name)
    return None if held is None else held._parameters["weight"]


def is_dora(wrapper: Any, names: list[str]) -> bool:
    return any(magnitude_of(wrapper, name) is not None for name in names)


def register(config: Any, model: nn.Module) -> None:
    """Lets a configuration with ``use_dora`` adapt the experts of ``model``; PEFT's own wrappers there take it too."""
    if DoraParamWrapper is None or not getattr(config, "use_dora", False):
        return
    # Of NF4Experts the class they had, which theirs derives from: made at run time, it can't be pickled.
    kinds = {getattr(module, "stock_class", type(module)) for module in model.modules() if expert_parameters(module)}
    if kinds:
        config._register_custom_module(dict.fromkeys(kinds, _made))
    for module in model.modules():
        if type(module) is ParamWrapper and expert_parameters(module.get_base_layer()):
            module.__class__ = DoraParamWrapper


def _made(target: Any, adapter_name: str, *, parameter_name: Optional[str] = None, **kwargs: Any) -> Any:
    """What PEFT calls to make a layer; None: it is asked for another, of the module itself."""
    if parameter_name is None:
        return None
    return DoraParamWrapper(target, adapter_name, parameter_name=parameter_name, **kwargs)


class _Plus(nn.Module):
    """A parametrization: the weight and what DoRA adds to it."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


if ParamWrapper is not None:

    class ExpertsMagnitude(DoraLinearLayer):
        """The magnitudes ``[E, N]`` of one adapter, and PEFT's cache of their norms."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__(fan_in_fan_out=False)
            self.weight = nn.Parameter(weight)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            raise NotImplementedError("the wrapper computes")

        def __repr__(self) -> str:
            return f"lora.dora.{type(self).__name__}({', '.join(map(str, self.weight.shape))})"

    class DoraParamWrapper(ParamWrapper):
        """LoRA or DoRA, as each adapter's configuration says, on one parameter of a mixture's experts."""

        def __init__(self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: Any, **kwargs: Any):
            super().__init__(base_layer, adapter_name, parameter_name, _without_dora(config), **kwargs)
            if config.use_dora:
                self._add_magnitude(adapter_name, config)

        def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
            super().update_layer(adapter_name, *args, config=_without_dora(config), **kwargs)
            if config.use_dora:
                self._add_magnitude(adapter_name, config)

        def _add_magnitude(self, name: str, config: Any) -> None:
            self.use_dora[name] = True
            if "lora_magnitude_vector" not in self.adapter_layer_names:
                self.adapter_layer_names = (*self.adapter_layer_names, "lora_magnitude_vector")
            norm = self.weight_norm(name).to(self.lora_A[name].weight.dtype)
            self.lora_magnitude_vector[name] = ExpertsMagnitude(norm)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

        @torch.no_grad()
        def weight_norm(self, name: str) -> Tensor:
            """Returns ``‖W_e + s B_e A_e‖`` of each output ``[E, N]``, float32."""
            experts, (lora_A, lora_B) = self.get_base_layer(), factors(self, name)
            if isinstance(experts, NF4Experts):
                weight = experts.nf4(self.parameter_name)
            else:
                weight = self.get_param().detach()
                weight = weight.transpose(1, 2) if is_stored_transposed(experts) else weight
            if lora_A.device.type == "meta":
                return torch.empty(lora_B.shape[:2], device="meta")
            lora_A, lora_B = lora_A.to(weight.device), lora_B.to(weight.device)
            return ops.dora_experts_weight_norm(weight, lora_A, lora_B, float(self.scaling[name]))

        def _scale(self, name: str, norm: Optional[Tensor] = None) -> Tensor:
            """Returns g as it meets the parameter: ``[E, N, 1]``, or ``[E, 1, N]`` where it is stored that way."""
            g = output_scale(self.lora_magnitude_vector[name].weight, self.weight_norm(name) if norm is None else norm)
            return g[:, None, :] if is_stored_transposed(self.get_base_layer()) else g[:, :, None]

        def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
            """Returns what is to be added to the parameter as it is now: of DoRA ``g ∘ (W + s B A) - W``."""
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
            # As PEFT's DoRA has several adapters: each adds to the output of the base what it alone would change.
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
                else:  # somebody else's is on it as well
                    del held[-1]

        def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
            """As PEFT's. Of DoRA the norm is kept, and so is the way back."""
            for name in check_adapters_to_merge(self, adapter_names):
                if name not in self.lora_A:
                    continue
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

    DoraParamWrapper.__name__ = "ParamWrapper"  # by which PEFT nests wrappers


def _without_dora(config: Any) -> Any:
    """Returns the configuration of the LoRA that a DoRA has in it."""
    plain = copy.copy(config)
    plain.use_dora = False
    return plain
