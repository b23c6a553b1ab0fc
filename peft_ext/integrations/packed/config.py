"""PackedConfig, the quantization_config that makes transformers keep a checkpoint's weights packed."""

from __future__ import annotations

import copy
from typing import Any, Optional, Union

from ..._imports import has, required
from .rules import Rules, read_rules

with required("transformers", "peft_ext.PackedConfig"):
    from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config
    from transformers.utils.quantization_config import QuantizationConfigMixin

    has(AutoHfQuantizer, "merge_quantization_configs")

__all__ = ["METHOD", "PackedConfig"]

# Name of the quantization method under which transformers finds PackedConfig and the quantizer.
METHOD = "peft_ext"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Keeps the weights of a quantized checkpoint packed, so that adapters can be trained over them::

        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=peft_ext.PackedConfig())

    PackedConfig reads from the checkpoint's own ``quantization_config`` how the weights are stored. Supported are the
    quantization methods fp8, mxfp4, compressed-tensors, gptq, awq and hqq. Linear layers become
    :class:`peft_ext.nn.PackedLinear`, embeddings :class:`peft_ext.nn.PackedEmbedding`, and the experts of a mixture
    :class:`peft_ext.nn.PackedExperts`. Layers that the checkpoint stores dense stay dense. bitsandbytes' 4-bit weights
    become bitsandbytes' own layers, which keep the weights packed, too.

    A packed layer multiplies by the decoded weight. Where the checkpoint's own library also quantizes the layer's input
    while the model runs (``activation_scheme`` "dynamic"), the packed layer does not quantize the input, and
    ``peft_ext.explain`` says so. With ``activation_scheme="dynamic"``, the linear layers of FP8 checkpoints become
    :class:`peft_ext.nn.Float8Linear`, which quantize their input as the checkpoint's own library does. The inputs of
    packed experts are not quantized.

    Args:
        activation_scheme: None, or "dynamic", for a checkpoint whose own library quantizes the inputs of FP8 layers
            with a scale for each token (for weights in blocks: for each token and each block's columns).

    ``model.save_pretrained`` writes the tensors with the names and bytes of the checkpoint, and the checkpoint's own
    ``quantization_config``, so that other libraries can load the saved model.

    Raises: ValueError for another ``activation_scheme``. ``from_pretrained`` raises a ValueError that names the method,
    bits, scheme or layer that is not supported, before a weight is read; also if ``activation_scheme`` is "dynamic" and
    the checkpoint's own library quantizes no layer's input in that way. ``from_pretrained`` raises a ValueError after
    the weights are read if the gate and the up of an expert differ in a tensor that has to be equal in both, such as a
    g_idx.
    """

    def __init__(
        self, checkpoint: Optional[dict[str, Any]] = None, activation_scheme: Optional[str] = None, **kwargs: Any
    ) -> None:
        if activation_scheme not in (None, "dynamic"):
            raise ValueError(f"PackedConfig: activation_scheme is {activation_scheme!r}, wanted None or 'dynamic'")
        self.quant_method = METHOD
        self.checkpoint, self.activation_scheme = checkpoint, activation_scheme
        self.rules: Optional[Rules] = None if checkpoint is None else read_rules(checkpoint)
        if self.rules is not None and activation_scheme and not any(s.quantizes for s in self.rules.schemes.values()):
            raise ValueError(
                f"PackedConfig: activation_scheme is 'dynamic', and the checkpoint ({self.rules.method}) has no FP8 "
                "layers whose inputs are quantized with a scale for each token and the columns of a weight's scale"
            )

    def over(self, checkpoint: Union[dict[str, Any], QuantizationConfigMixin]) -> PackedConfig:
        """Returns a PackedConfig for a checkpoint whose config.json has the quantization_config ``checkpoint``."""
        if not isinstance(checkpoint, dict):
            checkpoint = checkpoint.to_dict()
        return type(self)(copy.deepcopy(checkpoint), self.activation_scheme)

    def __getstate__(self) -> dict[str, Any]:
        # `rules` holds functions, which can't be pickled.
        return {name: value for name, value in self.__dict__.items() if name != "rules"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rules = None if self.checkpoint is None else read_rules(self.checkpoint)

    def to_dict(self) -> dict[str, Any]:
        """Returns the quantization_config of the checkpoint, which ``save_pretrained`` writes."""
        return {"quant_method": METHOD} if self.checkpoint is None else copy.deepcopy(self.checkpoint)


def _is_bitsandbytes(checkpoint: Any) -> bool:
    """Returns whether a checkpoint has 4-bit weights of bitsandbytes, which transformers itself keeps packed."""
    get = checkpoint.get if isinstance(checkpoint, dict) else lambda name: getattr(checkpoint, name, None)
    return bool(get("load_in_4bit")) and getattr(get("quant_method"), "value", get("quant_method")) == "bitsandbytes"


_merge = AutoHfQuantizer.merge_quantization_configs


def _merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """Replaces transformers' function that merges a checkpoint's quantization_config with the caller's
    quantization_config.

    transformers refuses a config of another class than the checkpoint's, and has no public way to register an
    exception. ``_merge_quantization_configs`` therefore handles a PackedConfig itself, and passes every other config to
    transformers' own function.
    """
    if isinstance(quantization_config_from_args, PackedConfig):
        if not _is_bitsandbytes(quantization_config):
            return quantization_config_from_args.over(quantization_config)
        if quantization_config_from_args.activation_scheme is not None:
            raise ValueError("PackedConfig: activation_scheme is 'dynamic', and the checkpoint's layers (bitsandbytes) "
                             "quantize no inputs")  # fmt: skip
        quantization_config_from_args = None
    return _merge(quantization_config, quantization_config_from_args)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_quantization_configs)
