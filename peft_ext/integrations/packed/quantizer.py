"""The quantizer of PackedConfig: replaces layers by packed layers before transformers reads the checkpoint's weights.

transformers calls :meth:`PackedQuantizer._process_model_before_weight_loading` with the model on the meta device. The
headers of the checkpoint's files say which layers are stored packed, and with which tensors. Each layer that is stored
packed becomes a packed layer with the names, dtypes and shapes of the stored tensors. transformers then reads each
tensor, without a cast, into the attribute of the tensor's name; tensors of a mixture's experts may be merged first (see
:mod:`.merging`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..._imports import required
from ...nn import Float8Linear, PackedEmbedding, PackedLinear
from ...nn.experts import expert_parameters
from ...nn.packed import HoldsPacked
from ...nn.packed_experts import PackedExperts, hold_packed
from ...weight_reads import weights_read_past
from ...weights.packed import PackedWeight
from .config import METHOD
from .files import Stored, stored_tensors
from .layouts import LAYOUTS, Layout
from .merging import Common, merged_shape, operations_of
from .rules import Rules, Scheme

with required("transformers", "peft_ext.PackedConfig"):
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    from transformers.integrations.accelerate import expand_device_map
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
        self._schemes: dict[str, Scheme] = {}  # Maps a layer's name to its scheme.
        self._merged: dict[str, Scheme] = {}  # Maps a layout to the scheme of merged experts.
        self._apart = False  # Whether some layers of the model have dense experts.
        self._experts: list[str] = []  # Names of the modules whose experts are packed.
        # The operations that keep the first of some tensors that should be equal, such as the g_idx of an expert's gate
        # and up.
        self._common: list[Common] = []

    @property
    def rules(self) -> Rules:
        return self.quantization_config.rules

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Optional[torch.dtype] = None, checkpoint_files: Optional[Sequence[str]] = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        dtype = dtype or torch.get_default_dtype()
        stored = stored_tensors(checkpoint_files)
        if "awq" in self.rules.layouts:
            _check_activations(stored)
        tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
        read = weights_read_past(model)
        experts: dict[str, dict[str, Place]] = defaultdict(dict)
        for place in self._places(model, stored):
            name, _, parameter = place.target.rpartition(".")
            if parameter != "weight":
                experts[name][parameter] = place
                continue
            if name in tied:
                raise ValueError(f"PackedConfig: {name} is stored packed and shares its weight with another layer, "
                                 "wanted tie_word_embeddings false")  # fmt: skip
            if name in read:
                raise ValueError(f"PackedConfig: {name} is stored packed, and the code of another module reads its "
                                 "weight, wanted a dense weight")  # fmt: skip
            module = model.get_submodule(name)
            scheme = self._schemes[name] = self._scheme(name, module)
            quantizes = scheme.quantizes and self.quantization_config.activation_scheme == "dynamic"
            model.set_submodule(name, _layer(name, module, scheme, place, stored, dtype, quantizes))
        mixtures = {name for name, module in model.named_modules() if expert_parameters(module)}
        self._apart, self._experts = bool(mixtures - experts.keys()), sorted(experts)
        self.validate_environment(kwargs.get("device_map"))
        for name, places in experts.items():
            module, first = model.get_submodule(name), next(iter(places.values()))
            # Experts that transformers merges are stored as linear layers, so the config's rules get the name of a
            # linear layer of the files.
            merged = first.converter is not None
            scheme = self._scheme(first.first, nn.Linear(1, 1)) if merged else self._scheme(name, module)
            self._schemes[name] = scheme
            _hold_experts(name, module, scheme, places, stored, dtype, self._apart)
            if merged:
                self._merged[scheme.layout] = scheme
        for name, module in model.named_modules():
            for key in _held(module):
                self._packed.add(f"{name}.{key}")
                # transformers would draw random values for a tensor that is offloaded and therefore still on the meta
                # device.
                _attribute_of(module, key)._is_hf_initialized = True
        if not self._packed:
            raise ValueError(
                f"PackedConfig: the checkpoint's quant_method is {self.rules.method}, and no layer of its files is "
                f"stored as {' or '.join(sorted(self.rules.layouts))}"
            )

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError if ``device_map`` offloads packed experts to the disk and other layers have dense experts.

        transformers finds offloaded experts by the name of the dense parameter, which the codes of packed experts don't
        have if other layers have dense experts (see ``_suffix``). transformers calls ``validate_environment`` before it
        makes the model, and again with a device map that it computes.
        """
        if not self._apart or not isinstance(device_map, dict):
            return
        on_disk = [name for name, place in expand_device_map(device_map, self._experts).items() if place == "disk"]
        if on_disk:
            raise ValueError(f"PackedConfig: {on_disk[0]} is packed and other layers have dense experts; device_map "
                             "places it on the disk, wanted another device")  # fmt: skip

    def _scheme(self, name: str, module: nn.Module) -> Scheme:
        """Returns the scheme (layout, bits, size of groups and so on) in which the weight of the layer ``name`` is
        stored. Raises ValueError if the config says that the layer is dense."""
        if (scheme := self.rules.scheme(name, module)) is None:
            raise ValueError(f"PackedConfig: the quantization_config leaves {name} dense, and the file has packed "
                             "tensors of it")  # fmt: skip
        return scheme

    def _places(self, model: Any, stored: dict[str, Stored]) -> list[Place]:
        """Returns a Place for each dense parameter of ``model`` that the files store packed.

        A name in the files becomes a name in the model by transformers' own renamings. transformers' converters merge
        the linear layers of experts to one parameter.
        """
        if missing := self.rules.layouts - LAYOUTS.keys():
            raise ValueError(f"PackedConfig: the layout {', '.join(sorted(missing))} of {self.rules.method} is not "
                             "supported")  # fmt: skip
        transforms = get_model_conversion_mapping(model)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        of_source = {source: one for one in converters for source in one.source_patterns}
        known, found = model.state_dict(), {}
        for layout in {LAYOUTS[name].codes: LAYOUTS[name] for name in sorted(self.rules.layouts)}.values():
            end = layout.joined + layout.codes
            for key in sorted(stored, key=dot_natural_key):
                dtype = stored[key].dtype
                if not key.endswith(end) or (dtype.is_floating_point and dtype.itemsize > 1):
                    continue
                base = key.removesuffix(end)
                dense = f"{base}.weight" if layout.joined else base
                target, source = rename_source_key(dense, renamings, converters, model.base_model_prefix, known)
                if target in known:  # the file may have layers that the model lacks, such as multi-token prediction
                    place = found.setdefault(target, Place(target, of_source.get(source)))
                    place.bases.setdefault(source, []).append(base)
        return list(found.values())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Returns ``weight_conversions``, transformers' conversions for the model, with additions: for each conversion
        that merges experts, a copy for each tensor of a packed layout."""
        updated = []
        for one in weight_conversions:
            updated.append(one)
            sources = getattr(one, "source_patterns", ())
            if isinstance(one, WeightConverter) and sources and all(name.endswith(".weight") for name in sources):
                for layout, scheme in ((LAYOUTS[name], scheme) for name, scheme in self._merged.items()):
                    for part in (*layout.parts, *layout.extra):
                        if part != "weight":
                            targets = [name + _suffix(layout, part, self._apart) for name in one.target_patterns]
                            parts = [name.removesuffix("weight") + part for name in sources]
                            steps = operations_of(layout, scheme, part, one.operations)
                            self._common += [step for step in steps if isinstance(step, Common)]
                            updated.append(one.copy(parts, targets, operations=steps))
        return super().update_weight_conversions(updated, model)

    # --- the reading of the tensors -----------------------------------------------------------------------------------

    def get_new_dtype(self, converter: Any, param: Any, dtype: Optional[torch.dtype]) -> Optional[torch.dtype]:
        """Returns None for a packed tensor, so that transformers does not cast the tensor."""
        if self._packed.intersection(getattr(converter, "target_patterns", ())) or _is_packed_dtype(param):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Freezes the codes, and describes packed weights anew by the tensors that were read. Raises ValueError if
        tensors that have to be equal in an expert's gate and up are not equal.

        The layout of a weight may depend on the values of a tensor: a g_idx whose groups are in order is not needed.
        """
        if differ := sorted({name for one in self._common for name in one.differ}):
            raise ValueError(
                f"PackedConfig: {differ[0]}: the gate and the up of an expert differ in this tensor, wanted equal "
                "tensors"
            )
        for name, module in model.named_modules():
            if isinstance(module, PackedExperts):
                for parameter in module.packed_names:
                    module._parameters[parameter].requires_grad_(False)
                    self._describe_experts(name, module, parameter)
            elif isinstance(module, HoldsPacked):
                module.weight.requires_grad_(False)
                self.describe(name, module)

    def describe(self, name: str, module: HoldsPacked) -> None:
        """Makes the description of a layer's weight (format, group, option, and names of the tensors) again from the
        tensors that were read.

        ``name``: the layer's name before an adapter was added. A layer with a tensor on the meta device, which is
        offloaded to the disk, is left unchanged. The codes of the layer may be sharded between processes. Raises
        ValueError if a tensor is missing or does not fit.
        """
        scheme, tensors = self._schemes[name], {key: module.tensor(key) for key in _held(module)}
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        for key, tensor in tensors.items():
            # No layout depends on the values of the codes, so a tensor without values stands for the codes of a sharded
            # layer.
            if hasattr(tensor, "to_local"):
                tensors[key] = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        shape = (module.out_features, module.in_features) if isinstance(module, PackedLinear) else (
            module.num_embeddings, module.embedding_dim)  # fmt: skip
        with _named(name):
            weight, names, extra = LAYOUTS[scheme.layout].built(tensors, shape, scheme)
        module.describe(weight, names, extra)

    def _describe_experts(self, name: str, experts: PackedExperts, parameter: str) -> None:
        """Describes the packed weight of experts anew, by the tensors that were read, if the weight has a g_idx, whose
        values decide the weight's layout."""
        scheme = self._schemes[name]
        layout = LAYOUTS[scheme.layout]
        ends = {part: parameter + _suffix(layout, part, self._apart) for part in layout.parts if part.endswith("g_idx")}
        names = experts.packed_names[parameter]
        if not any(name in ends.values() for name in names):
            return
        tensors = {
            part: getattr(experts, one) for part, one in zip(layout.parts, names, strict=True) if one is not None
        }
        if any(tensor.is_meta for tensor in tensors.values()):
            return  # the experts are offloaded to the disk
        with _named(f"{name}.{parameter}"):
            again, kept, extra = layout.built(tensors, experts._templates[parameter].shape, scheme)
        kept_names = [None if one is None else parameter + _suffix(layout, one, self._apart) for one in kept]
        experts.set_packed(parameter, again, kept_names)
        experts.extra = (*experts.extra, *(parameter + _suffix(layout, one, self._apart) for one in extra))

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True


def _check_activations(stored: dict[str, Stored]) -> None:
    """Raises ValueError if a checkpoint of AWQ has the scales of an activation, such as ``mlp.act.scales``.

    AutoAWQ's ``ScaledActivation`` divides the result of an activation by the tensor ``scales``. The scales of a weight
    are stored beside its codes ``qweight``.
    """
    for name in stored:
        if name.endswith(".scales") and f"{name.removesuffix('scales')}qweight" not in stored:
            raise ValueError(f"PackedConfig: the file has {name} without qweight, the scales of an activation (AWQ's "
                             "ScaledActivation), which are not supported")  # fmt: skip


def _attribute_of(module: Any, name: str) -> Tensor:
    return module.tensor(name) if isinstance(module, HoldsPacked) else getattr(module, name)


def _held(module: nn.Module) -> Iterator[str]:
    """Yields the names that a module's packed tensors have in the state dict."""
    if isinstance(module, HoldsPacked):
        yield from (name for name in (*module.names, *module.extra) if name is not None)
    elif isinstance(module, PackedExperts):
        yield from (name for names in module.packed_names.values() for name in names if name is not None)
        yield from module.extra


def _is_packed_dtype(param: Any) -> bool:
    """Returns whether a tensor of the file has a float dtype of 8 bits, in which only codes and scales are stored."""
    kind = param.get_dtype() if hasattr(param, "get_dtype") else ""
    return kind.startswith("F8_")


@dataclass
class Place:
    """A dense parameter of the model that the files store packed.

    Attributes:
        target: name of the parameter in the model.
        converter: transformers' converter that merges the tensors of the files to the parameter; None if nothing is
            merged.
        bases: a dict from each source pattern of the converter (None without a converter) to a list: for each layer in
            the files that the pattern matches, the start that the names of the layer's tensors have in common, for
            example "model.layers.0.mlp.up_proj" for "model.layers.0.mlp.up_proj.weight_packed".
    """

    target: str
    converter: Any
    bases: dict[Optional[str], list[str]] = field(default_factory=dict)

    @property
    def first(self) -> str:
        return next(iter(self.bases.values()))[0]

    def tensors(self, layout: Layout, scheme: Scheme, stored: dict[str, Stored]) -> dict[str, Tensor]:
        """Returns, on the meta device, the tensors (codes, scales and so on) in which ``layout`` stores the parameter,
        with the shapes that these tensors have after transformers merged the experts."""
        found = {}
        for name in (*layout.parts, *layout.extra):
            each = [[stored.get(base + layout.joined + name) for base in bases] for bases in self.bases.values()]
            if all(tensor is None for group in each for tensor in group):
                continue
            kinds = {None if one is None else (one.dtype, one.shape) for group in each for one in group}
            if len(kinds) > 1 or None in kinds or len({len(group) for group in each}) > 1:
                raise ValueError(f"the experts differ in {name}")
            ((dtype, shape),) = kinds
            if self.converter is not None:
                steps = self.converter.operations
                shape = merged_shape(layout, scheme, name, steps, len(self.bases), len(each[0]), shape)
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
        return found


def _suffix(layout: Layout, part: str, apart: bool) -> str:
    """Returns the end of the name of a tensor of merged experts, after the name of the dense parameter.

    By default, the codes have the name of the dense parameter, because offloading to the disk needs the dense name. If
    some layers of the model have dense experts (``apart``), the codes have a name of their own, unless the layout
    stores the codes under the name "weight". The reason: transformers looks up, by a tensor's name in the model, the
    names under which ``save_pretrained`` writes the tensor.
    """
    return "" if part == layout.codes and (part == "weight" or not apart) else f"_{part}"


def _build(
    scheme: Scheme, place: Place, stored: dict[str, Stored], shape: tuple[int, ...]
) -> tuple[PackedWeight, list[Optional[str]], dict[str, Tensor]]:
    """Returns a packed weight on the meta device, the names of its parts, and the tensors of the file that are no part
    of the weight."""
    layout = LAYOUTS[scheme.layout]
    with _named(place.target):
        return layout.built(place.tensors(layout, scheme, stored), shape, scheme)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns a ValueError or TypeError into a ValueError whose text has the ``name`` of a layer or parameter."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"PackedConfig: {name}: {error}") from error


def _layer(
    name: str, module: nn.Module, scheme: Scheme, place: Place, stored: dict[str, Stored], dtype: torch.dtype,
    quantizes: bool,
) -> HoldsPacked:  # fmt: skip
    """Returns the packed layer, on the meta device, that takes the place of ``module``. ``quantizes``: whether a linear
    layer quantizes its input."""
    if type(module) not in _LAYERS:
        wanted = " or ".join(kind.__name__ for kind in _LAYERS)
        raise ValueError(f"PackedConfig: {name} is stored packed and is a {type(module).__name__}, wanted {wanted}")
    weight, names, extra = _build(scheme, place, stored, tuple(module.weight.shape))
    if isinstance(module, nn.Embedding):
        new: HoldsPacked = PackedEmbedding.from_packed(weight, names, module.padding_idx, extra=extra, dtype=dtype)
    else:
        kind = Float8Linear if quantizes else PackedLinear
        new = kind.from_packed(weight, names, module.bias, extra=extra, dtype=dtype)
    new.note = new.note or scheme.note
    return new.train(module.training)


def _hold_experts(
    name: str, module: nn.Module, scheme: Scheme, places: dict[str, Place], stored: dict[str, Stored],
    dtype: torch.dtype, apart: bool,
) -> None:  # fmt: skip
    """Turns an experts' module on the meta device into PackedExperts."""
    wanted, layout = expert_parameters(module), LAYOUTS[scheme.layout]
    if not wanted or set(places) != set(wanted):
        held = ", ".join(sorted(places))
        raise ValueError(f"PackedConfig: {name} ({type(module).__name__}) has the packed parameters {held}, wanted "
                         f"{' and '.join(wanted) or 'the experts of a mixture'}")  # fmt: skip
    found, extras = {}, {}
    for parameter, place in places.items():
        shape = tuple(getattr(module, parameter).shape)
        shape = (shape[0], shape[2], shape[1]) if module.is_transposed else shape
        weight, names, extra = _build(scheme, place, stored, shape)
        ends = [one if place.converter is None or one is None else _suffix(layout, one, apart) for one in names]
        found[parameter] = weight, [None if end is None else parameter + end for end in ends]
        extras |= {parameter + _suffix(layout, one, apart): tensor for one, tensor in extra.items()}
    hold_packed(module, found, dtype, extras)
    module.note = scheme.note
