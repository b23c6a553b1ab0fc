"""Partial fine-tuning trains all parameters of chosen modules or layers, and saves the tensors of these modules.

Y = base(x; θ)          θ: the adapter's copies of all parameters and saved buffers of the module
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
    """Partial fine-tuning: trains every parameter of the targets.

    All parameters outside of the targets are frozen, except the parameters of ``modules_to_save``.

    Args:
        num_last_layers: how many layers at the end of each stack of layers may hold targets; None: all layers may. T5
            has two stacks, encoder and decoder; most vision-language models have a vision and a text stack. To train
            layers of one stack only, also give ``target_modules``, such as ``["decoder"]``.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see
            :class:`~peft_ext.tuners.targets.TargetConfig`. The name of a container, such as "model.layers.11", stands
            for all modules below the container. If target_modules is None, all modules in the layers of num_last_layers
            or layers_to_transform are targets. At least one of target_modules, num_last_layers and layers_to_transform
            must be given.

    Raises: TypeError or ValueError if a field has a value of a wrong type, or a value that is not allowed.
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
    """Runs ``base_layer`` with the active adapter's copies in place of the layer's parameters and saved buffers.

    The adapter's copy of a tensor may be float32 although the base has a narrower dtype (PEFT's
    ``autocast_adapter_dtype``). A float32 copy over a narrower base is the master weight in training and is cast to the
    base's dtype for each forward. In an adapter's file the keys are ``partial_tensors.<name in the module>`` after the
    module's name. transformers' Trainer applies weight decay to the same parameters as in full fine-tuning.
    """

    adapter_layer_names = ("partial_tensors",)

    def own(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        tensors = self.adapters[adapter]
        found = {name: tensor.to(self.base_tensor(name).dtype) for name, tensor in tensors.named_parameters()}
        return {**found, **dict(tensors.named_buffers())}


class PartialModel(ReplacingTuner):
    """A model of which chosen modules are trained, made by ``peft.get_peft_model``; see
    :class:`peft_ext.PartialConfig`.

    Each adapter has its own copy of the trained tensors, so that one model can hold, switch and disable several
    adapters. If modules share a tensor, such as an embedding and the output head, and all these modules are targets,
    the tensor is copied once and stays shared. If ``target_modules`` names "embed_tokens" or "lm_head", PEFT also saves
    the frozen weight of the named layer; ``save_pretrained(..., save_embedding_layers=False)`` prevents this.

    Raises: ValueError if the configuration names no modules or layers to train, if nothing is left to train, if a
    target is quantized or a shard, or if a shared tensor belongs both to a target and to a module that is not a target.
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
        return tree(tensors, layer.base_layer)


register("partial", PartialConfig, PartialModel)
