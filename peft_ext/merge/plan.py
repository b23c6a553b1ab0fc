"""Plans the tensors of a merged model, then merges one module at a time and writes the planned tensors."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from .._imports import required
from ..files import atomic_file
from ..model import register_layers, without_copies
from ..sources.expressions import check_expressions
from ..sources.json_file import first_line
from ..sources.model import INDEX
from ..text import dtype_name
from ..tuners.layer import ReplacingLayer
from ..weights.gguf_quantize import is_finite
from . import writer
from .base import Base
from .errors import MergeError, as_merge_error, fail

with required("peft", "peft_ext.merge_to_dense"):
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import CONFIG_NAME, set_peft_model_state_dict
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

_ADAPTER = "default"


class Plan:
    """Names, shapes, dtypes and origins of all tensors of the output, known before the first tensor is written.

    ``origin`` of a tensor is (path of the adapted module, name within the module); ("", name) for a tensor outside of
    adapted modules; ("", "") for a tensor of zeros.
    """

    def __init__(
        self, base: Base, config: PeftConfig, weights: dict[str, Tensor], dtype: Optional[torch.dtype]
    ) -> None:
        self.base, self.dtype = base, base.kept if dtype is None else dtype
        self.largest_change: tuple[Optional[str], float] = (None, 0.0)
        self.untied: list[str] = []
        ignored = set(base.model._keys_to_ignore_on_save or ())
        state = base.model.state_dict(keep_vars=True)
        self.before = {name: tensor for name, tensor in state.items() if name not in ignored}
        self.adapted = _adapt(base, config, weights)
        self.targets = dict(_find_targets(base.model, ""))
        if not self.targets:
            fail(f"the adapter changes no module of {type(base.model).__name__}")
        self._check_absent()
        self.after = base.model.state_dict(keep_vars=True)
        self._made: dict[str, dict[str, Tensor]] = {}
        self.origin = self._origins()
        self.config = copy.deepcopy(base.model.config)
        self.config.dtype = base.model.dtype if self.dtype is None else self.dtype
        self._untie()
        self.meta = {name: self._planned(name) for name in self.origin}
        self._check_against_config()
        self._uses = Counter(origin[0] for origin in self.origin.values())

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _check_absent(self) -> None:
        for name in self.base.absent:
            path = self._target_of(name)
            given = isinstance(self.targets.get(path), (ModulesToSaveWrapper, ReplacingLayer))
            if name in self.before and not given:
                fail(f"{name} is in neither the base's files nor the adapter, so it would be random")

    def _target_of(self, name: str) -> str:
        parts = name.split(".")
        return next((p for p in (".".join(parts[:n]) for n in range(1, len(parts))) if p in self.targets), "")

    def _origins(self) -> dict[str, tuple[str, str]]:
        paths = {id(module): path for path, module in self.targets.items()}
        origins: dict[str, tuple[str, str]] = {}
        for name in self.before:
            path = self._target_of(name)
            local = name.removeprefix(f"{path}.") if path else name
            layer = self.targets.get(path)
            if isinstance(layer, ReplacingLayer):
                owner, owned = layer.tied.get(_ADAPTER, {}).get(local, (layer, local))
                held = owned in owner.names.get(_ADAPTER, ())
                origins[name] = (paths[id(owner)], owned) if held else (path, local)
            else:
                origins[name] = (path, local)
        for path, layer in self.targets.items():
            if isinstance(layer, ReplacingLayer):  # the adapter may add a bias that the base does not have
                for local in layer.names.get(_ADAPTER, ()):
                    origins.setdefault(f"{path}.{local}", (path, local))
        return origins

    def _untie(self) -> None:
        """Finds the tied weights of which the adapter changed one, and unties them in the config."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.before.items():
            groups[id(tensor)].append(name)
        for names in groups.values():
            if len(names) < 2:
                continue
            first = next((n for n in names if self.origin[n][0] == "" and self.after[n] is not self.before[n]), None)
            # Where the adapter's tensor replaced one of the tied tensors, the other names get the adapter's tensor too,
            # as when PEFT loads the adapter.
            for name in names:
                if self.origin[name][0] == "" and self.after[name] is self.before[name] and first is not None:
                    self.after[name] = self.after[first]
            kept = names[0]
            torn = [n for n in names[1:] if not self._is_same(kept, n)]
            for name in names[1:]:
                if name not in torn:
                    self.origin[name] = self.origin[kept]
            self.untied += torn
        if self.untied and getattr(self.config, "tie_word_embeddings", False):
            apart = type(self.config).from_dict({**self.config.to_dict(), "tie_word_embeddings": False})
            about, wanted = apart.to_dict(), self.config.to_dict()
            wanted["tie_word_embeddings"] = False
            # T5's config derives another option from tie_word_embeddings, so T5 keeps tie_word_embeddings as it is:
            # transformers does not tie weights that differ in the files.
            if about == wanted:
                self.config.tie_word_embeddings = False

    def is_changed(self, name: str) -> bool:
        """Returns whether the adapter may change the tensor. In adapted modules, the result is False only for a tensor
        of a ReplacingLayer that the adapter does not own. Outside of adapted modules, the result is True only for a
        tensor that the adapter added or replaced."""
        path, local = self.origin[name]
        layer = self.targets.get(path)
        if isinstance(layer, ReplacingLayer):
            return local in layer.names.get(_ADAPTER, ())
        return path != "" or local == "" or self.after[local] is not self.before.get(name)

    def _is_same(self, one: str, other: str) -> bool:
        a, b = self.origin[one], self.origin[other]
        if a == b or (a[0] == b[0] == "" and self.after[one] is self.after[other]):
            return True
        return torch.equal(self._value(one).float(), self._value(other).float())

    def _planned(self, name: str) -> Tensor:
        """Returns a meta tensor of the shape and dtype in which the tensor ``name`` is written."""
        path, local = self.origin[name]
        if name in self.before:
            shape, dtype = self.before[name].shape, self.before[name].dtype
        else:
            layer = self.targets[path]
            shape = layer.own(_ADAPTER, training=False)[local].shape
            dtype = layer.base_layer.weight.dtype
        return torch.empty(shape, dtype=self._dtype_of(name, dtype), device="meta")

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if self.dtype is None or not dtype.is_floating_point:
            return dtype
        model = self.base.model
        wide = set(model._keep_in_fp32_modules or ()) if self.dtype is torch.float16 else set()
        if self.dtype is not torch.float32:
            wide |= set(model._keep_in_fp32_modules_strict or ())
        return torch.float32 if wide.intersection(name.split(".")) else self.dtype

    def _check_against_config(self) -> None:
        """Checks that a model that is made from the config has the planned tensors.

        If the adapter adds biases, sets the config's flags for biases, and plans zeros for the other biases that the
        flags add to the model. Removes the second name of two weights that stay tied from the plan.
        """
        fresh = _fresh(type(self.base.model), self.config)
        if added := sorted(self.meta.keys() - fresh.state_dict().keys()):
            for flag in ("attention_bias", "mlp_bias", "qkv_bias", "use_bias"):
                if getattr(self.config, flag, None) is False:
                    setattr(self.config, flag, True)
            fresh = _fresh(type(self.base.model), self.config)
        wanted = {n: t for n, t in fresh.state_dict().items() if n not in (fresh._keys_to_ignore_on_save or ())}
        if extra := sorted(self.meta.keys() - wanted.keys()):
            fail(f"a plain {type(fresh).__name__} has no {extra[0]}, which the adapter adds")
        for name in wanted.keys() - self.meta.keys():
            if not added or not name.endswith(".bias"):
                fail(f"a plain {type(fresh).__name__} has {name}, which the base does not have")
            self.origin[name] = ("", "")  # the flag adds this bias, for which the adapter has no tensor: zeros
            self.meta[name] = torch.empty_like(wanted[name], dtype=self.meta[added[0]].dtype)
        for name, tensor in wanted.items():
            if tensor.shape != self.meta[name].shape:
                fail(f"{name} is {tuple(self.meta[name].shape)}, the config asks for {tuple(tensor.shape)}")
        tied = set(fresh.all_tied_weights_keys or ())
        whole = {origin: sum(o == origin for o in self.origin.values()) for origin in set(self.origin.values())}
        for name in tied & self.meta.keys():
            if self.origin[name] != ("", "") and whole[self.origin[name]] > 1 and name not in self.untied:
                source = fresh.all_tied_weights_keys[name]
                if source in self.meta and self.origin[source] == self.origin[name]:
                    del self.meta[name], self.origin[name]

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """A dict that maps the name of each tensor in the output's files to a tensor on the meta device of its shape
        and dtype."""
        return {name: tensor for _, outputs in self.groups for name, tensor in outputs.items()}

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.outputs.values())

    @cached_property
    def groups(self) -> list[tuple[list[str], dict[str, Tensor]]]:
        """Returns groups of tensors that transformers converts together when it saves a model.

        A group is a tuple: a list of names of tensors in the model, and a dict that maps names in the files to the
        tensors that transformers makes of the tensors in the list.

        The groups are the smallest that give the right result: each tensor by itself; or, if transformers' conversion
        joins tensors of a layer, the tensors of each layer together; or, if the conversion joins tensors of several
        layers, all tensors together.
        """
        model, meta = self.base.model, self.meta
        whole = revert_weight_conversion(model, dict(meta))
        by_layer: dict[str, list[str]] = defaultdict(list)
        for name in meta:
            found = re.match(r".*?\.\d+(?=\.)", name)
            by_layer[found[0] if found else name].append(name)
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()}
        for parts in ([[name] for name in meta], list(by_layer.values())):
            try:
                groups = [(names, revert_weight_conversion(model, {n: meta[n] for n in names})) for names in parts]
            except Exception:  # the conversion needs more tensors than a group in `parts` has
                continue
            found = [(n, (t.shape, t.dtype)) for _, outputs in groups for n, t in outputs.items()]
            if len(found) == len(wanted) and dict(found) == wanted:
                return groups
        return [(list(meta), whole)]

    # --- the tensors --------------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Tensor:
        """Returns the value of a planned tensor. A merged tensor of a 16-bit dtype is returned in float32."""
        path, local = self.origin[name]
        if path == "":
            return self.base.read(self.after[local]) if local else torch.zeros(self.meta[name].shape)
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path][local]

    def _make(self, path: str) -> dict[str, Tensor]:
        """Merges an adapted module by the layer's own ``merge``; returns the module's tensors, widened to float32."""
        target = self.targets[path]
        inner = target.original_module if isinstance(target, AuxiliaryTrainingWrapper) else target.get_base_layer()
        before = {} if isinstance(target, ModulesToSaveWrapper) else self._widen(inner)
        for module in target.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
                        held[name] = _like(tensor, tensor.detach().float())
        try:
            if hasattr(target, "unload_and_optionally_merge_module"):
                merged = target.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                target.merge(safe_merge=True)
                merged = target.get_base_layer()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            reason = first_line(error) if str(error).strip() else f"{type(target).__name__} has no merge"
            raise MergeError(f"merge_to_dense: {path}: {reason}") from error
        found = dict(merged.state_dict())
        locals_ = {origin[1] for origin in self.origin.values() if origin[0] == path}
        if missing := sorted(locals_ - found.keys()):
            fail(f"{path}: merged, it has no {missing[0]}")
        for name, tensor in before.items():
            norm = torch.linalg.vector_norm(tensor).item()
            if name in found and norm and tensor.shape == found[name].shape:
                change = torch.dist(tensor, found[name].float()).item() / norm
                if change > self.largest_change[1]:
                    self.largest_change = (f"{path}.{name}", change)
        return {name: found[name] for name in locals_}

    def _widen(self, module: nn.Module) -> dict[str, Tensor]:
        """Replaces the module's parameters by parameters in float32 (float64 stays), and returns the new tensors.

        The module's old parameters, which other modules may share, are not changed.
        """
        wide = {}
        for prefix, below in list(module.named_modules()):
            for name, parameter in below._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    tensor = self.base.read(parameter)
                    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                    below._parameters[name] = _like(parameter, tensor)
                    wide[f"{prefix}.{name}".lstrip(".")] = tensor
        return wide

    def will_take(self, names: Iterable[str]) -> None:
        """Tells the plan that :meth:`take` will be called for the tensors ``names`` only, and not for all tensors."""
        self._uses = Counter(self.origin[name][0] for name in names)

    def take(self, name: str) -> Tensor:
        """Returns the value of a planned tensor; may be called once for each tensor. The call for a module's last
        tensor frees the memory of the module."""
        value, path = self._value(name), self.origin[name][0]
        self._uses[path] -= 1
        if path and not self._uses[path]:
            del self._made[path]
            self.targets[path] = nn.Identity()
            parent, _, leaf = path.rpartition(".")
            self.base.model.get_submodule(parent)._modules[leaf] = self.targets[path]
        return value

    def _group(self, names: list[str]) -> dict[str, Tensor]:
        """Returns the tensors of a group with the names, shapes and dtypes that they have in the files."""
        found = {name: _cast(name, self.take(name), self.meta[name].dtype) for name in names}
        return revert_weight_conversion(self.base.model, found)

    # --- the files ----------------------------------------------------------------------------------------------------

    def write(self, folder: Path, max_shard_size: Union[int, str], advance: Callable[[int], None]) -> list[str]:
        """Writes the tensors one group at a time, and an index if there are several files. Returns the names of the
        files of tensors, without the index."""
        with as_merge_error(ValueError, about=f"max_shard_size is {max_shard_size!r}: "):
            split = split_torch_state_dict_into_shards(
                self.outputs, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
            )
        group_of = {name: index for index, (_, outputs) in enumerate(self.groups) for name in outputs}
        ready: dict[str, Tensor] = {}

        def take(name: str) -> Tensor:
            if name not in ready:
                ready.update(self._group(self.groups[group_of[name]][0]))
            return ready.pop(name)

        for file, names in split.filename_to_tensors.items():
            with open(folder / file, "wb") as stream:
                writer.write_safetensors(stream, {name: self.outputs[name] for name in names}, take, advance)
        if split.is_sharded:
            total = sum(tensor.numel() for tensor in self.outputs.values())
            about = {"total_parameters": total, "total_size": self.nbytes}
            index = {"metadata": about, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            with atomic_file(folder / INDEX) as file:
                file.write(json.dumps(index, indent=2) + "\n")
        return list(split.filename_to_tensors)


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor ``value``, cast to ``dtype``. Raises MergeError where a finite number is too large for
    ``dtype``."""
    cast = value.to(dtype)
    narrowed = dtype != value.dtype and dtype.is_floating_point and dtype.itemsize > 1 and value.numel()
    if narrowed and not is_finite(cast) and (cast.isfinite() != value.isfinite()).any():
        fail(f"{name}: a value is too large for {dtype_name(dtype)}, wanted another dtype")
    return cast


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _without_packed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter's file without the tensors of packed base layers, except the biases of these
    layers.

    PEFT saves the base layer of an adapted embedding or head with the adapter. The merge reads a packed base layer from
    the base.
    """
    # A packed layer has a tensor of integers or of 8-bit floats, and an adapter has neither.
    packed = {
        key.rpartition(".base_layer.")[0] for key, tensor in weights.items()
        if ".base_layer." in key and not (tensor.is_floating_point() and tensor.element_size() > 1)
    }  # fmt: skip
    return {
        key: tensor for key, tensor in weights.items()
        if key.rpartition(".base_layer.")[0] not in packed or key.endswith(".bias")
    }  # fmt: skip


def _adapt(base: Base, config: PeftConfig, weights: dict[str, Tensor]) -> PeftModel:
    """Adapts the base by PEFT and loads the adapter's tensors without a copy or a cast. Raises MergeError where the
    adapter does not fit the base."""
    weights = _without_packed(weights)
    kind = str(config.peft_type.value)
    with as_merge_error(ValueError, about=f"the adapter's {CONFIG_NAME}: "):
        check_expressions(config, dict(base.model.named_modules()))
    unfit = f"the adapter does not fit {type(base.model).__name__}: "
    with as_merge_error(ValueError, TypeError, KeyError, RuntimeError, AttributeError, about=unfit):
        register_layers(config, base.model)
        # AdaLoRA's parameter ranknum is in no adapter's file, and must not stay on the meta device.
        model = get_peft_model(base.model, config, _ADAPTER, low_cpu_mem_usage=kind != "ADALORA").eval()

    def assign(state: dict[str, Tensor], strict: bool = False, **kwargs: Any) -> Any:
        # Copying the adapter's tensors into the model would round to the base's dtype, and would overwrite weights that
        # the caller's model shares with this model.
        return type(model).load_state_dict(model, state, strict=strict, assign=True)

    model.__dict__["load_state_dict"] = assign
    try:
        with as_merge_error(RuntimeError, about=unfit):
            result = set_peft_model_state_dict(model, weights, _ADAPTER)
    except KeyError as error:
        raise MergeError(f"merge_to_dense: the adapter's file has no {error.args[0]}") from error
    finally:
        del model.__dict__["load_state_dict"]
    if extra := sorted(without_copies(result.unexpected_keys)):
        fail(f"the adapter's file has {extra[0]}, which is no part of {type(base.model).__name__} with {kind}")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [key for key in result.missing_keys if prefix and prefix in key and _ADAPTER in key]
    held = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing := sorted({*missing, *held}):
        fail(f"the adapter's file has no {missing[0].replace(f'.{_ADAPTER}', '')}")
    return model


def _find_targets(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and module of the outermost layers that PEFT wrapped."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield below, child
        else:
            yield from _find_targets(child, below)


def _fresh(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))
