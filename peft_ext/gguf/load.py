"""Loads a transformers model from a GGUF file and keeps the quantized weights packed, as in the file.

transformers builds the model on the meta device. :func:`~peft_ext.gguf.pack.pack` then replaces layers of the model by
packed layers, and returns the tensors to load: the quantized weights are mapped from the disk. Finally, transformers
loads the returned tensors into the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .._imports import required
from .header import GgufHeader, read_header
from .metadata import read_config
from .pack import Packed, no_tensor, pack

with required("transformers", "a model in a GGUF file"):
    import transformers
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin

# Name of the quantization method under which transformers finds the quantizer of this module.
METHOD = "peft_ext_gguf"


def load_gguf(
    path: Union[str, Path],
    *,
    dtype: torch.dtype = torch.bfloat16,
    model_class: Optional[Any] = None,
    device_map: Any = None,
    **kwargs: Any,
) -> Any:
    """Returns the transformers model in a GGUF file, with the file's quantized weights packed and mapped from the disk.

    With quantized weights, linear layers are :class:`peft_ext.nn.PackedLinear`, the embedding is a
    :class:`peft_ext.nn.PackedEmbedding`, and the experts of a layer are a :class:`peft_ext.nn.PackedExperts`. Most of
    PEFT's adapters can be trained over the packed layers. A tied head shares the embedding's packed weight. A weight
    whose rows the file stores in another order (``attn_q`` and ``attn_k`` of Llama and Mistral, ``attn_qkv`` of Bloom)
    and the joined weights of experts are copied, without being decoded. Norms and biases, and weights that the file
    stores in F32, F16 or BF16, are dense. A quantized weight that no packed layer can hold is decoded:
    ``model.peft_ext_dense`` maps the name of the parameter to the reason, and :func:`peft_ext.explain` shows the
    reason.

    The model's configuration has the values of the metadata that change the model's function. If transformers'
    configuration has no field for a value that changes the model's function, load_gguf raises ValueError.

    Args:
        path: the GGUF file. The architecture of the model may be bloom, falcon (with one key-value head), gemma2,
            gemma3, gpt-oss, gpt2, lfm2, llama, mamba, minimax-m2, mistral, nemotron, phi3, qwen2, qwen2moe, qwen3,
            qwen3moe, qwen35, qwen35moe, stablelm, starcoder2, t5 or t5encoder.
        dtype: dtype of the dense weights and of the computation.
        model_class: the transformers class; default ``AutoModelForCausalLM``, and for T5 ``AutoModelForSeq2SeqLM`` or
            ``T5EncoderModel``.
        device_map, kwargs: further arguments of transformers' ``from_pretrained``.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is damaged, is no model, or its model is not supported. The message names the file.
    """
    header = read_header(path)
    config = read_config(header)
    about = GgufPackedConfig(str(header.path))
    about.header = header
    made = _class_of(model_class, config, header)
    try:
        loaded, info = made.from_pretrained(
            None, config=config, state_dict=about.tensors, quantization_config=about, dtype=dtype,
            device_map=device_map, output_loading_info=True, **kwargs,
        )  # fmt: skip
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise header.error(f"tensors of the file have other sizes than the parameters of {made.__name__}") from error
    if wrong := sorted(map(str, info["missing_keys"])):
        raise no_tensor(header, wrong, made)
    loaded.config._name_or_path = loaded.name_or_path = str(header.path)
    return loaded


def _class_of(model_class: Optional[Any], config: Any, header: GgufHeader) -> Any:
    """Returns the class of the model: ``model_class`` or, if ``model_class`` is an Auto class or None, the class that
    the Auto class has for the configuration."""
    if model_class is None and header.architecture == "t5encoder":
        return getattr(transformers, config.architectures[0])
    if model_class is None:
        seq2seq = config.is_encoder_decoder
        model_class = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        raise header.error(f"{model_class.__name__} has no class for {config.model_type}")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


@register_quantization_config(METHOD)
class GgufPackedConfig(QuantizationConfigMixin):
    """The quantization_config of a model that :func:`load_gguf` has loaded.

    Attributes:
        file: path of the GGUF file.
        header: the file's header until transformers has loaded the model, and None later.
        tensors: the tensors that transformers loads (see :class:`.pack.Packed`); empty after transformers has loaded
            the model.
    """

    header: Optional[GgufHeader] = None

    def __init__(self, file: Optional[str] = None, **kwargs: Any) -> None:
        self.quant_method, self.file = METHOD, file
        self.tensors: dict[str, Tensor] = {}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "file": self.file}

    def __deepcopy__(self, memo: Any) -> GgufPackedConfig:
        return self


@register_quantizer(METHOD)
class GgufPackedQuantizer(HfQuantizer):
    """Keeps the weights of a GGUF file packed; see :func:`load_gguf`."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.header is None:
            raise ValueError("a model with packed GGUF weights is loaded by peft_ext.load_gguf")
        self._packed: Optional[Packed] = None

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Optional[torch.dtype] = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self._packed = pack(model, config.header, dtype or torch.get_default_dtype())
        config.tensors.update(self._packed.tensors)
        model.peft_ext_dense = self._packed.dense

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Returns the conversions of GGUF's tensors, in place of ``weight_conversions`` of safetensors files."""
        return self._packed.conversions or []

    def get_new_dtype(self, converter: Any, param: Any, dtype: Optional[torch.dtype]) -> Optional[torch.dtype]:
        """Returns None for packed bytes, so that transformers does not cast them."""
        return None if getattr(param, "dtype", None) is torch.uint8 else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # Drops the tensors, which the model holds now, and the header, whose open file can't be pickled.
        self.quantization_config.tensors.clear()
        self.quantization_config.header = self._packed = None
        for parameter in model.parameters():
            if parameter.dtype is torch.uint8:
                parameter.requires_grad_(False)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        """Returns False, because transformers can't write a GGUF file, and warns that only the adapter can be saved."""
        logging.get_logger(__name__).warning(
            f"The base of this model is the GGUF file {self.quantization_config.file}, which is not written again. "
            "Save the adapter with save_pretrained of the PeftModel."
        )
        return False
