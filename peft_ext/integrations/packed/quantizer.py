"""The quantizer of PackedConfig: replaces layers by packed layers before transformers reads the checkpoint's weights.

transformers calls :meth:`PackedQuantizer._process_model_before_weight_loading` with the model on the meta device. The
headers of the checkpoint's files say which layers are stored packed, and with which tensors. Each such layer becomes a
packed layer with these tensors' names, dtypes and shapes. transformers then reads each tensor into the attribute of its
name, and converts nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..._imports import required
from ...nn import PackedEmbedding, PackedLinear
from ...nn.experts import expert_parameters
from ...nn.packed import HoldsPacked
from ...nn.packed_experts import PackedExperts, hold_packed
from ...weights.packed import PackedWeight
from .config import METHOD
from .files import Stored, stored_tensors
from .layouts import LAYOUTS
from .rules import Rules, Scheme

with required("transformers", "peft_ext.PackedConfig"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key
    from transformers.quantizers.auto import register_quantizer
    from transformers.quantizers.base import HfQuantizer

__all__ = ["PackedQuantizer"]

# Types of the layers that can be replaced, by exact type.
_LAYERS = (nn.Linear, nn.Embedding)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Keeps a checkpoint's weights packed; see :class:`peft_ext.PackedConfig`."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.rules is None or not self.pre_quantized:
            raise ValueError(
                "PackedConfig: the checkpoint's config.json has no quantization_config that transformers knows, wanted "
                "a quantized checkpoint (for a dense one: peft_ext.quantize_nf4 after loading)"
            )
        self._packed: set[str] = set()
        self._schemes: dict[str, Scheme] = {}  # by the name of a layer

    @property
    def rules(self) -> Rules:
        return self.quantization_config.rules

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Optional[torch.dtype] = None, checkpoint_files: Optional[Sequence[str]] = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        dtype = dtype or torch.get_default_dtype()
        stored = stored_tensors(checkpoint_files)
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        experts: dict[str, dict[str, str]] = defaultdict(dict)
        for target, base in self._places(model, stored).items():
            name, _, parameter = target.rpartition(".")
            module = model.get_submodule(name)
            if parameter != "weight":
                experts[name][parameter] = base
                continue
            if name in tied:
                raise ValueError(f"PackedConfig: {name} is stored packed and shares its weight with another layer, "
                                 "wanted tie_word_embeddings false")  # fmt: skip
            scheme = self._schemes[name] = self._scheme(name, module)
            model.set_submodule(name, _layer(name, module, scheme, base, stored, dtype))
        for name, bases in experts.items():
            module = model.get_submodule(name)
            _hold_experts(name, module, self._scheme(name, module), bases, stored, dtype)
        self._packed = {f"{name}.{key}" for name, module in model.named_modules() for key in _held(module)}
        if not self._packed:
            raise ValueError(
                f"PackedConfig: the checkpoint's quant_method is {self.rules.method}, and no layer of its files is "
                f"stored as {' or '.join(sorted(self.rules.layouts))}"
            )

    def _scheme(self, name: str, module: nn.Module) -> Scheme:
        """Returns how the layer is stored. Raises ValueError if the config says that the layer is dense."""
        if (scheme := self.rules.scheme(name, module)) is None:
            raise ValueError(f"PackedConfig: the quantization_config leaves {name} dense, and the file has packed "
                             "tensors of it")  # fmt: skip
        return scheme

    def _places(self, model: Any, stored: dict[str, Stored]) -> dict[str, str]:
        """Returns, for each dense parameter of ``model`` that is stored packed, the common start of its tensors' names.

        The keys are names in the model; the values are names in the files, such as "model.layers.0.mlp.up_proj" for
        "model.layers.0.mlp.up_proj.weight_packed". A name in the files becomes a name in the model by transformers' own
        renamings.
        """
        if missing := self.rules.layouts - LAYOUTS.keys():
            raise ValueError(f"PackedConfig: the layout {', '.join(sorted(missing))} of {self.rules.method} is not "
                             "supported")  # fmt: skip
        renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
        known, found = model.state_dict(), {}
        for layout in {LAYOUTS[name].codes: LAYOUTS[name] for name in self.rules.layouts}.values():
            end = layout.joined + layout.codes
            for key, tensor in stored.items():
                if not key.endswith(end) or (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1):
                    continue
                base = key.removesuffix(end)
                dense = f"{base}.weight" if layout.joined else base
                target, _ = rename_source_key(dense, renamings, [], model.base_model_prefix, known)
                if target in known:  # other layers are not in this model, for example those of multi-token prediction
                    found[target] = base
        return found

    # --- the reading of the tensors -----------------------------------------------------------------------------------

    def get_new_dtype(self, converter: Any, param: Any, dtype: Optional[torch.dtype]) -> Optional[torch.dtype]:
        """Returns None for a packed tensor, so that transformers does not cast the tensor."""
        if self._packed.intersection(getattr(converter, "target_patterns", ())) or _is_packed_dtype(param):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Freezes the codes, and makes each weight again from the tensors that were read.

        The values of some tensors are part of a weight's layout: a g_idx whose groups are in order is not needed.
        """
        for name, module in model.named_modules():
            if isinstance(module, PackedExperts):
                for parameter in module.packed_names:
                    module._parameters[parameter].requires_grad_(False)
            elif isinstance(module, HoldsPacked):
                module.weight.requires_grad_(False)
                scheme, tensors = self._schemes[name], {key: module.tensor(key) for key in _held(module)}
                if any(tensor.is_meta for tensor in tensors.values()):
                    continue  # the layer is offloaded to the disk
                try:
                    weight, names, extra = LAYOUTS[scheme.layout].built(tensors, module.packed.shape, scheme)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"PackedConfig: {name}: {error}") from error
                module.describe(weight, names, extra)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _held(module: nn.Module) -> Iterator[str]:
    """Yields the names in the state dict of a module's packed tensors."""
    if isinstance(module, HoldsPacked):
        yield from (name for name in (*module.names, *module.extra) if name is not None)
    elif isinstance(module, PackedExperts):
        yield from (name for names in module.packed_names.values() for name in names if name is not None)


def _is_packed_dtype(param: Any) -> bool:
    """Returns whether a tensor of the file has a dtype in which only codes and scales are stored."""
    kind = param.get_dtype() if hasattr(param, "get_dtype") else ""
    return kind.startswith("F8_")


def _build(
    scheme: Scheme, base: str, stored: dict[str, Stored], shape: tuple[int, ...], name: str
) -> tuple[PackedWeight, list[Optional[str]], dict[str, Tensor]]:
    """Returns a packed weight on the meta device, the names of its parts, and the extra tensors. ``name``: the name of
    the dense parameter, for errors."""
    layout = LAYOUTS[scheme.layout]
    names = (*layout.parts, *layout.extra)
    tensors = {one: stored[key].meta() for one in names if (key := base + layout.joined + one) in stored}
    try:
        return layout.built(tensors, shape, scheme)
    except (ValueError, TypeError) as error:
        raise ValueError(f"PackedConfig: {name}: {error}") from error


def _layer(
    name: str, module: nn.Module, scheme: Scheme, base: str, stored: dict[str, Stored], dtype: torch.dtype
) -> HoldsPacked:
    """Returns the packed layer, on the meta device, that takes the place of ``module``."""
    if type(module) not in _LAYERS:
        wanted = " or ".join(kind.__name__ for kind in _LAYERS)
        raise ValueError(f"PackedConfig: {name} is stored packed and is a {type(module).__name__}, wanted {wanted}")
    weight, names, extra = _build(scheme, base, stored, tuple(module.weight.shape), name)
    if isinstance(module, nn.Embedding):
        new: HoldsPacked = PackedEmbedding.from_packed(weight, names, module.padding_idx, extra=extra, dtype=dtype)
    else:
        new = PackedLinear.from_packed(weight, names, module.bias, extra=extra, dtype=dtype)
    new.note = scheme.note
    return new.train(module.training)


def _hold_experts(
    name: str, module: nn.Module, scheme: Scheme, bases: dict[str, str], stored: dict[str, Stored], dtype: torch.dtype
) -> None:
    """Turns an experts' module on the meta device into PackedExperts."""
    wanted = expert_parameters(module)
    if not wanted or set(bases) != set(wanted):
        held = ", ".join(sorted(bases))
        raise ValueError(f"PackedConfig: {name} ({type(module).__name__}) has the packed parameters {held}, wanted "
                         f"{' and '.join(wanted) or 'the experts of a mixture'}")  # fmt: skip
    found = {}
    for parameter, base in bases.items():
        shape = tuple(getattr(module, parameter).shape)
        shape = (shape[0], shape[2], shape[1]) if module.is_transposed else shape
        weight, names, _ = _build(scheme, base, stored, shape, f"{name}.{parameter}")
        found[parameter] = weight, [None if part is None else parameter + part for part in names]
    hold_packed(module, found, dtype)
    module.note = scheme.note
