"""Adds an adapter with values to a base on the meta device, and computes the values that need the base's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import ops
from .._imports import has, required
from ..integrations.adapter_layers.dora_experts import factors_of
from ..nn.experts import is_stored_transposed
from ..sources.model import SourceError
from ..weights.packed import PackedWeight

with required("peft", "peft_ext.sharded"):
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    has(DoraLinearLayer, "get_weight_norm", "update_layer")
    has(BaseTuner, "_replace_module")
    has(BaseTunerLayer, "_move_adapter_to_device_of_base_layer")

Adapted = tuple[Any, str]  # a LoRA layer of PEFT, and the name of one of its adapters

METHODS = ("LORA", "IA3")  # PEFT's names of the methods whose adapters can be sharded.
_INITS = (True, False, "gaussian")  # Values of init_lora_weights for which PEFT reads no base weight.


@contextlib.contextmanager
def adapter_values(device: Union[str, torch.device]) -> Iterator[None]:
    """Within the context, PEFT adds adapters with values on ``device`` to a base on the meta device.

    PEFT draws an adapter's initial values on the CPU, casts the values to the base's dtype and moves the values to the
    base's device. Over a base on the meta device, PEFT would lose the values. Within the context, PEFT moves the values
    to ``device``, so that the adapter's values equal those of an adapter over a base on ``device``. Only DoRA's
    magnitude, which is the norm of a base weight, stays on the meta device until :func:`shard_and_load` reads the
    weight.
    """

    def keeping(position: int, move: Any) -> Any:
        """Returns the method ``move``, which moves the module at ``position`` of its arguments, so that the module
        keeps its values."""

        @functools.wraps(move)
        def run(*args: Any, **kwargs: Any) -> None:
            with _kept(args[position], device):
                move(*args, **kwargs)

        return run

    def updating(update: Any) -> Any:
        @functools.wraps(update)
        def run(layer: Any, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, **kwargs: Any) -> None:
            if any(parameter.is_meta for parameter in base_layer.parameters()):
                lora_A, lora_B = lora_A.to("meta"), lora_B.to("meta")
            update(layer, base_layer=base_layer, lora_A=lora_A, lora_B=lora_B, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for kind, name, wrap in (
            (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", functools.partial(keeping, 0)),
            (BaseTuner, "_replace_module", functools.partial(keeping, 3)),
            (DoraLinearLayer, "update_layer", updating),
        ):
            for one in {kind, *_subclasses(kind)}:
                if (method := vars(one).get(name)) is not None:
                    stack.callback(setattr, one, name, method)
                    setattr(one, name, wrap(method))
        yield


@contextlib.contextmanager
def _kept(module: nn.Module, device: Union[str, torch.device]) -> Iterator[None]:
    """Gives those tensors of ``module`` that the code in the context moved to the meta device their values again, on
    ``device`` and in the dtype to which the code cast them."""
    values = {name: tensor.detach() for name, tensor in tensors_of(module) if not tensor.is_meta}
    yield
    for name, tensor in list(tensors_of(module)):
        if not tensor.is_meta or name not in values:
            continue
        value, (owner, _, local) = values[name].to(device, tensor.dtype), name.rpartition(".")
        held = module.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            held._parameters[local] = nn.Parameter(value, tensor.requires_grad)
        else:
            held._buffers[local] = value


def _subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def check_adapter(model: nn.Module) -> None:
    """Raises SourceError where the model has an adapter that can't be sharded.

    The following adapters can't be sharded: an adapter of a method outside of ``METHODS``, with initial values that
    need the base's weights, of another LoRA variant than DoRA, with DoRA over an embedding, or with trained parameters
    on the meta device other than DoRA's magnitudes.
    """
    for config in getattr(model, "peft_config", {}).values():
        method = getattr(config.peft_type, "value", config.peft_type)
        if method not in METHODS:
            raise SourceError(f"the adapter is {method}, wanted one of {', '.join(METHODS)} for a sharded model")
        init = getattr(config, "init_lora_weights", True)
        if init not in _INITS:
            raise SourceError(f"the adapter has init_lora_weights={init!r}, which needs the weights of the base")
    for name, module in model.named_modules():
        for variant in getattr(module, "lora_variant", {}).values():
            if variant is not None and "Dora" not in type(variant).__name__:
                raise SourceError(f"{name} has the variant {type(variant).__name__}, wanted LoRA or DoRA")
        if getattr(module, "lora_magnitude_vector", None) and getattr(module, "lora_embedding_A", None):
            raise SourceError(f"{name} has DoRA over an embedding, which can't be sharded")
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad and "lora_magnitude_vector" not in name:
            raise SourceError(f"{name} has no values: add the adapter within adapter_values(device), and without "
                              "modules_to_save")  # fmt: skip


# --- DoRA's magnitude -------------------------------------------------------------------------------------------------


def base_of(layer: Any) -> tuple[int, str]:
    """Returns the id of the module whose weight a LoRA layer adapts, and the name of the weight in this module."""
    # Only PEFT's layers for target_parameters have the attribute parameter_name.
    name = getattr(layer, "parameter_name", None)
    return id(layer.get_base_layer()), name if isinstance(name, str) else "weight"


def magnitudes_to_compute(model: nn.Module) -> dict[tuple[int, str], list[Adapted]]:
    """Returns the DoRA adapters whose magnitude is on the meta device, grouped by the result of :func:`base_of`."""
    found: dict[tuple[int, str], list[Adapted]] = {}
    for layer in model.modules():
        for name, module in getattr(layer, "lora_magnitude_vector", {}).items():
            if module.weight.is_meta:
                found.setdefault(base_of(layer), []).append((layer, name))
    return found


def whole_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Returns an adapter's A and B, gathered from all shards, in the dtype in which PEFT computes DoRA's magnitude.

    PEFT casts a new adapter to the ``compute_dtype`` of a packed layer, or to the dtype of a floating-point base
    weight, before PEFT computes the magnitude. All processes of the mesh must call ``whole_factors`` together.
    """
    base, name, found = layer.get_base_layer(), base_of(layer)[1], []
    dtype = getattr(base, name).dtype
    if name == "weight":
        dtype = getattr(base, "compute_dtype", None) or dtype
    for held in (layer.lora_A, layer.lora_B):
        factor = held[adapter].weight.detach()
        factor = factor.full_tensor() if isinstance(factor, DTensor) else factor
        found.append(factor.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else factor)
    return found[0], found[1]


def magnitude(layer: Any, adapter: str, weight: Union[Tensor, PackedWeight], lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Returns DoRA's magnitude of the whole base weight, as PEFT or peft_ext computes it when an adapter is added.

    ``weight`` is the base weight, dense or packed. ``lora_A`` and ``lora_B`` are the results of :func:`whole_factors`.
    """
    held, scaling = layer.lora_magnitude_vector[adapter], layer.scaling[adapter]
    experts = layer.get_base_layer()
    if base_of(layer)[1] != "weight":
        if isinstance(weight, Tensor) and is_stored_transposed(experts):
            weight = weight.transpose(1, 2)
        norm = ops.dora_experts_weight_norm(weight, *factors_of(layer, lora_A, lora_B), float(scaling))
        return norm.to(lora_A.dtype).to(held.weight.dtype)
    if isinstance(weight, PackedWeight):
        weight = weight.dequantize(getattr(experts, "compute_dtype", None))
    dora = DoraLinearLayer(fan_in_fan_out=held.fan_in_fan_out)
    if not lora_B.any():
        # Because lora_B is zero, the norm is that of the weight alone. A zero matrix of size 1 x 1 can replace B A.
        return dora.get_weight_norm(weight, lora_B.new_zeros(1, 1), scaling).to(held.weight.dtype)
    base = nn.Linear(1, 1, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    dora.update_layer(base_layer=base, lora_A=lora_A, lora_B=lora_B, scaling=scaling)
    return dora.weight.detach().to(held.weight.dtype)
