"""Partial fine-tuning: chosen modules or layers are trained whole, and they alone are saved.

Y = base(x; θ)          θ: the adapter's copy of every tensor of the module
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from torch import Tensor, nn

from .layer import ReplacingLayer, ReplacingTuner, tree
from .register import peft_type, register
from .targets import Plan, TargetConfig, last_layers, own_units, plan

__all__ = ["PartialConfig", "PartialLayer", "PartialModel"]


@dataclass
class PartialConfig(TargetConfig):
    """Partial fine-tuning: train every tensor of the targets; the rest is frozen.

    Args:
        num_last_layers: only what lies in the last layers, so many of them, of each stack of the model: T5's encoder
            and decoder, a vision and a text tower; ``target_modules=["decoder"]`` beside it leaves one.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see
            :class:`~peft_ext.tuners.targets.TargetConfig`. A container, such as "model.layers.11", means everything
            below it; None means everything in the layers that num_last_layers or layers_to_transform leaves, and one of
            the three must be given.

    Raises: TypeError or ValueError where a field is not of these forms, or where nothing says what to train.
    """

    num_last_layers: Optional[int] = field(
        default=None, metadata={"help": "Train only what lies in the last layers, so many of each stack."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("PARTIAL")
        last = self.num_last_layers
        if last is not None and (type(last) is not int or last < 1):
            self._fail("num_last_layers", last, "None or a number of layers, 1 or more")
        if last is not None and self.layers_to_transform is not None:
            self._fail("layers_to_transform", self.layers_to_transform, "None where num_last_layers is given")


class PartialLayer(ReplacingLayer):
    """``base_layer`` with the active adapter's copies in place of its parameters and of its saved buffers.

    A copy may be float32 over a base in less (PEFT's ``autocast_adapter_dtype``): it is cast for each forward, and is
    the master weight of the training. In the state dict: ``partial_tensors.<name in the module>``.
    """

    adapter_layer_names = ("partial_tensors",)

    def own(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        tensors = self.adapters[adapter]
        found = {name: tensor.to(self.base_tensor(name).dtype) for name, tensor in tensors.named_parameters()}
        return {**found, **dict(tensors.named_buffers())}


class PartialModel(ReplacingTuner):
    """A model of which a part is trained, see :class:`peft_ext.PartialConfig`; ``peft.get_peft_model`` makes it.

    The adapter of each name has a copy of what is trained, so that several can be held, switched and disabled. A tensor
    that modules share, as an embedding and the output head, is copied once and stays shared, where all of them are
    targets. Where ``target_modules`` names "embed_tokens" or "lm_head", PEFT saves their frozen weight as well;
    ``save_pretrained(..., save_embedding_layers=False)`` leaves it out.

    Raises: ValueError where there is nothing to train, where a target is quantized, or where a shared tensor is a
    target in one place alone.
    """

    prefix = "partial_"
    tuner_layer_cls = PartialLayer

    def make_plan(self, config: PartialConfig, model: nn.Module) -> Plan:
        if config.target_modules is None and config.num_last_layers is None and config.layers_to_transform is None:
            raise ValueError("PartialConfig: give target_modules, num_last_layers or layers_to_transform")
        within = None if config.num_last_layers is None else last_layers(model, config.num_last_layers)
        chosen = own_units(model, config, within=within, buffers=True)
        if not chosen:
            options = f"target_modules={config.target_modules}, num_last_layers={config.num_last_layers}"
            raise ValueError(
                f"PartialConfig: nothing to train in {type(model).__name__} with {options}, "
                f"layers_to_transform={config.layers_to_transform}"
            )
        return plan(model, config, chosen)

    def make(self, layer: PartialLayer, key: str, names: list[str], config: PartialConfig) -> nn.Module:
        tensors = {}
        for name in names:
            tensor = layer.base_tensor(name)
            copy = tensor.detach().clone()
            tensors[name] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
        return tree(tensors)


register("partial", PartialConfig, PartialModel)
