"""``get_peft_model`` and ``load_adapter``: PEFT's functions for PEFT's and peft_ext's methods, with fused operators."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import peft
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from . import tuners  # noqa: F401  registers the methods that PEFT lacks
from ._imports import required
from .integrations.adapter_layers import dora_experts
from .integrations.adapter_layers.base import FUSED
from .integrations.adapter_layers.dora import DORA_DROPOUT
from .integrations.adapter_layers.experts import EXPERTS_DROPOUT
from .integrations.adapter_layers.packed_codes import code_reader
from .integrations.peft import accelerate as _accelerate
from .nn import NF4Experts, NF4Linear, PackedEmbedding
from .nn.experts import FrozenExperts
from .nn.packed import HoldsPacked
from .sources.adapter import checked_config
from .sources.expressions import check_expressions
from .sources.weight_files import check_finite

with required("peft", "peft_ext.get_peft_model and load_adapter"):
    from peft import PeftConfig, PeftModel, PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners import lora
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import (
        CONFIG_NAME,
        SAFETENSORS_WEIGHTS_NAME,
        load_peft_weights,
        set_peft_model_state_dict,
    )

__all__ = ["get_peft_model", "load_adapter"]


def get_peft_model(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str = "default",
    *,
    accelerate: bool = True,
    blocks: bool = True,
    dora_dropout: str = "peft",
    experts_dropout: float = 0.0,
    **kwargs: Any,
) -> PeftModel:
    """Adds a new adapter to ``model`` in place by ``peft.get_peft_model``, then calls :func:`peft_ext.accelerate`.

    AdaLoRA divides by the parameter ``ranknum``, which ``get_peft_model`` sets to ``requires_grad=False``. Over a base
    that is not float32, PEFT without peft_ext trains ``ranknum`` and does not save ``ranknum``.

    Args:
        model: a transformers model, or any module.
        config: a configuration of one of PEFT's methods, or a BottleneckConfig, BitFitConfig, PartialConfig or
            DiffPruningConfig.
        adapter_name: the new adapter's name.
        accelerate: whether to call :func:`peft_ext.accelerate`. Layers that can't be fused run PEFT's code.
        blocks, dora_dropout, experts_dropout: see :func:`peft_ext.accelerate`.
        kwargs: further arguments of ``peft.get_peft_model``: ``mixed``, ``autocast_adapter_dtype``, ``revision``,
            ``low_cpu_mem_usage``.

    Returns: the PeftModel around the same model.

    Raises: TypeError where config is no PeftConfig; ValueError where the configuration trains or replaces a packed
    weight, or where PEFT's code for the method would compute with the codes of a packed weight; PEFT's errors for a
    configuration that does not fit the model.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(f"get_peft_model: config is {type(config).__name__}, wanted a PeftConfig")
    _check_packed("get_peft_model: ", config, model)
    register_layers(config, model)
    adapted = peft.get_peft_model(model, config, adapter_name, **kwargs)
    freeze_ranknum(adapted)
    if not accelerate:
        return adapted
    return _accelerate(adapted, blocks=blocks, dora_dropout=dora_dropout, experts_dropout=experts_dropout)


def _check_packed(op: str, config: PeftConfig, model: nn.Module) -> None:
    """Raises ValueError if a configuration makes PEFT train the codes of a packed weight, or read the codes as the
    values of a dense weight.

    PEFT trains copies of the layers in ``modules_to_save``, writes the rows of ``trainable_token_indices`` into an
    embedding's weight, and computes DoRA's norms of an embedding from the embedding's weight. Some of PEFT's methods
    compute the output of a layer from the layer's weight, without a call of the base layer.
    """

    def refuse(what: str, name: str, module: nn.Module) -> None:
        is_nf4 = isinstance(module, (NF4Linear, NF4Experts))
        raise ValueError(
            f"{op}{what} the packed weight of {name} ({type(module).__name__}), wanted a dense weight: leave the layer "
            f"out, or call peft_ext.{'dequantize_nf4' if is_nf4 else 'dequantize_packed'}(model) first"
        )

    for name, module in _packed_targets(config, model):
        if method := code_reader(config, module):
            refuse(f"{method} would compute with the codes of", name, module)
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    tokens = getattr(config, "trainable_token_indices", None) or ()
    tables = tuple(tokens) if isinstance(tokens, dict) else ()
    # If trainable_token_indices is a list, PEFT trains these tokens of the model's input embedding, whatever its name.
    inputs = model.get_input_embeddings() if tokens and not tables and hasattr(model, "get_input_embeddings") else None
    targets = getattr(config, "target_modules", None) or ()
    for name, module in model.named_modules():
        if saved and name.endswith(saved):
            for inner in module.modules():
                if isinstance(inner, (HoldsPacked, NF4Linear, FrozenExperts)):
                    refuse("modules_to_save would train a copy of", name, inner)
        if not isinstance(module, PackedEmbedding):
            continue
        if module is inputs or (tables and name.endswith(tables)):
            refuse("trainable_token_indices would write into", name, module)
        if getattr(config, "use_dora", False):
            if isinstance(targets, str):
                adapted = re.fullmatch(targets, name) is not None  # target_modules="all-linear" matches no embedding
            else:
                adapted = any(f".{name}".endswith(f".{one}") for one in targets)
            if adapted:
                refuse("DoRA's norm needs", name, module)


def _packed_targets(config: Any, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of each packed layer of the base model ``model`` that is a target of ``config``, or lies
    within a target. If ``config`` names neither modules nor parameters, and PEFT has no default targets of the method
    for this type of model, yields the packed linear layers except the head (for trainable tokens, the packed
    embeddings)."""
    if not hasattr(config, "target_modules"):
        return
    found, targets = copy.copy(config), config.target_modules
    if targets is None:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        kind = getattr(getattr(model, "config", None), "model_type", None)
        default = None if getattr(config, "target_parameters", None) else "all-linear"
        targets = found.target_modules = getattr(tuner, "target_module_mapping", {}).get(kind, default)
    is_every = isinstance(targets, str) and targets.lower() == "all-linear"
    wanted = nn.Embedding if getattr(config.peft_type, "value", "") == "TRAINABLE_TOKENS" else nn.Linear
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if not isinstance(module, (HoldsPacked, NF4Linear)):
            continue
        name = name.removesuffix(".base_layer")
        if is_every:
            if module is head or not isinstance(module, wanted):
                continue
            found.target_modules = {name}
        parts = name.split(".")
        if any(check_target_module_exists(found, ".".join(parts[:end])) for end in range(len(parts), 0, -1)):
            yield name, module


def load_adapter(
    model: nn.Module,
    path: Union[str, Path],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    accelerate: bool = True,
    blocks: bool = True,
    dora_dropout: Optional[str] = None,
    experts_dropout: Optional[float] = None,
    **kwargs: Any,
) -> PeftModel:
    """Loads a saved adapter onto ``model``, makes the adapter active, then calls :func:`peft_ext.accelerate`.

    ``load_adapter`` checks the adapter's files before PEFT reads them, and differs from PEFT in these points, among
    others: An AdaLoRA adapter with pruned ranks over a base that is not float32 keeps the bits of the adapter's file
    (unless ``autocast_adapter_dtype=False``). AdaLoRA's divisor ``ranknum`` is set to ``requires_grad=False``. A model
    with tied embeddings and a second adapter of trainable tokens runs, although PEFT wraps the head of this model
    twice.

    Args:
        model: a base model, which ``PeftModel.from_pretrained`` wraps, or a PeftModel, which gets another adapter.
        path: a folder that ``save_pretrained`` wrote, or the name of a repository on the Hugging Face Hub.
        adapter_name: the adapter's name in the model. The adapter's files do not contain a name of the adapter.
        is_trainable: whether the adapter can be trained further. If ``is_trainable`` is False, the adapter is frozen
            and the model is in eval mode.
        accelerate, blocks, dora_dropout, experts_dropout: see :func:`get_peft_model`. If dora_dropout or
            experts_dropout is None, the value that the layers of a PeftModel have is used, else the default of
            :func:`get_peft_model`.
        kwargs: further arguments of PEFT: ``low_cpu_mem_usage``, ``autocast_adapter_dtype``, ``torch_device``,
            ``key_mapping``, ``subfolder``, ``revision``, ``token`` and the like.

    Returns: the PeftModel, which is ``model`` itself where ``model`` is a PeftModel. If the adapter can't be loaded,
    ``load_adapter`` restores the modules of ``model``. Warns if the adapter's file has a tensor that the model lacks,
    except for prompt learning.

    Raises: TypeError where model is no module. ValueError where the weights are no safetensors (a pickle runs code as
    it is read) or are not finite; where the configuration has a field of a wrong type, asks for larger tensors than the
    file has, or has a regular expression that does not end in ten seconds; where the configuration needs a dense weight
    that is packed; where the file lacks a tensor; where a repository on the hub lacks the weights or the configuration;
    or where the PeftModel has an adapter of this name. FileNotFoundError where a folder lacks the weights or the
    configuration, and where the repository can't be reached.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_adapter: model is {type(model).__name__}, wanted a model or a PeftModel")
    loaded, key_mapping = isinstance(model, PeftModel), kwargs.get("key_mapping")
    if loaded and adapter_name in model.peft_config:
        raise ValueError(f"load_adapter: the model has an adapter {adapter_name!r} already, give another adapter_name")
    folder = _adapter_folder(str(path), kwargs)
    try:
        config = kwargs["config"] if "config" in kwargs and not loaded else checked_config(folder)
        if isinstance(config, PeftConfig):
            base = model.get_base_model() if loaded else model
            check_expressions(config, dict(base.named_modules()))
            _check_packed("", config, base)
        check_finite(folder / SAFETENSORS_WEIGHTS_NAME)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"load_adapter: {error}") from error
    options = {
        "dora_dropout": _held(model, DORA_DROPOUT, "peft") if dora_dropout is None else dora_dropout,
        "experts_dropout": _held(model, EXPERTS_DROPOUT, 0.0) if experts_dropout is None else experts_dropout,
    }
    with _as_it_was_on_failure(model, folder / SAFETENSORS_WEIGHTS_NAME):
        if loaded:
            if accelerate:  # PEFT can add a DoRA adapter to a LoRA layer over NF4 only after the layer is fused
                _accelerate(model, blocks=False, **options)
            dora_experts.register(config, model)
            result = model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **kwargs)
            _check_keys(model, adapter_name, folder, result.missing_keys, result.unexpected_keys)
            _unwrap_tied_heads(model)
            model.set_adapter(adapter_name, inference_mode=not is_trainable)
            adapted = model
        else:
            if key_mapping is None:
                # PeftModel.from_pretrained takes key_mapping from the model by default, unlike PeftModel.load_adapter.
                key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            adapted, results = _wrapped(model, str(path), adapter_name, is_trainable, config, kwargs)
            for result in results:
                _check_keys(adapted, adapter_name, folder, result.missing_keys, result.unexpected_keys)
            if not is_trainable:
                # PEFT casts some tensors of a frozen AdaLoRA or IA3 adapter, and the cast makes these tensors
                # trainable.
                adapted.requires_grad_(False)
        _load_unrounded(adapted, str(path), adapter_name, key_mapping, kwargs)
        freeze_ranknum(adapted)
        return _accelerate(adapted, blocks=blocks, **options) if accelerate else adapted


def _wrapped(
    model: nn.Module, path: str, adapter_name: str, is_trainable: bool, config: Any, kwargs: dict[str, Any]
) -> tuple[PeftModel, list[Any]]:
    """Returns the PeftModel that ``PeftModel.from_pretrained`` makes of a base model, and the results of
    ``load_state_dict``. ``kwargs`` are further arguments of ``PeftModel.from_pretrained``."""
    if "config" not in kwargs and getattr(config, "use_dora", False):
        kwargs["config"] = config
    if "config" in kwargs:
        register_layers(kwargs["config"], model)
    # from_pretrained does not return the result of load_state_dict; a hook of the base model receives the result.
    found: list[Any] = []
    hook = model.register_load_state_dict_post_hook(lambda module, keys: found.append(keys))
    try:
        return PeftModel.from_pretrained(model, path, adapter_name, is_trainable=is_trainable, **kwargs), found
    finally:
        hook.remove()


def _held(model: nn.Module, attribute: str, default: Any) -> Any:
    """Returns the value that :func:`peft_ext.accelerate` stored as ``attribute`` on the first layer that has this
    attribute; ``default`` if no layer has it."""
    found = (module.__dict__[attribute] for module in model.modules() if attribute in module.__dict__)
    return next(found, default)


@contextmanager
def _as_it_was_on_failure(model: nn.Module, file: Path) -> Iterator[None]:
    """If the code in the context raises, restores the modules of ``model``: classes, children, tensors, modes and all
    other attributes. Values that the code wrote into a tensor in place are not restored.

    ``file`` is the adapter's file, which the error about a missing tensor names.
    """
    before = [(module, type(module), dict(module.__dict__), _contents(module)) for module in model.modules()]
    tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in model.parameters()]
    try:
        yield
    except Exception as error:
        for module, kind, attributes, contents in before:
            module.__class__ = kind
            for held, content in contents:
                held.clear()
                (held.extend if isinstance(held, list) else held.update)(content)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for tensor, data, requires_grad in tensors:
            if type(data) is Tensor and tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            tensor.requires_grad_(requires_grad)
        _raise_of_sizes(error)
        # PEFT looks up the tensors of modules_to_save, of trainable tokens and of prompts in the adapter's file.
        if isinstance(error, KeyError) and str(error.args[0]).startswith(("base_model.", "prompt_embeddings")):
            raise ValueError(f"load_adapter: {file} lacks {error.args[0]}") from error
        raise


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Returns a tuple for each attribute of ``module`` that is a dict, list or set: the attribute's value, and a copy
    of it."""
    return [(held, held.copy()) for held in module.__dict__.values() if type(held) in (dict, OrderedDict, list, set)]


def _unwrap_tied_heads(model: nn.Module) -> None:
    """Removes the inner one of two nested TrainableTokensLayers.

    PEFT wraps a tied head twice if a second adapter has trainable tokens. A forward can't pass through both
    TrainableTokensLayers, because they share the tensors of the embedding.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and isinstance(module.base_layer, TrainableTokensLayer):
            module.base_layer = module.base_layer.get_base_layer()


def _raise_of_sizes(error: Exception) -> None:
    """Raises a ValueError if ``error`` is PyTorch's error that sizes do not match; otherwise returns."""
    if isinstance(error, RuntimeError) and "size mismatch" in str(error):
        raise ValueError(f"load_adapter: {error}") from error


def register_layers(config: PeftConfig, model: nn.Module) -> None:
    """Registers peft_ext's adapter layers, in a DoRA configuration, for NF4Linear and for the experts of a mixture.

    PEFT's own DoRA can't dequantize the weight of an NF4Linear, and refuses the parameters of experts.
    """
    if not getattr(config, "use_dora", False):
        return
    if any(isinstance(module, NF4Linear) for module in model.modules()):
        config._register_custom_module({NF4Linear: FUSED[lora.Linear]})
    dora_experts.register(config, model)


def freeze_ranknum(model: nn.Module) -> None:
    """Sets ``requires_grad`` of AdaLoRA's divisor ``ranknum`` to False. PEFT sets ``requires_grad`` of ``ranknum`` to
    False too, but later casts ``ranknum``, and the cast sets ``requires_grad`` to True again."""
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            module.ranknum.requires_grad_(False)


def _load_unrounded(
    model: PeftModel, path: str, adapter_name: str, key_mapping: Optional[dict[str, str]], kwargs: dict[str, Any]
) -> None:
    """Loads the tensors of an AdaLoRA adapter with pruned ranks a second time, because PEFT has rounded them to the
    base's dtype."""
    config = model.peft_config[adapter_name]
    if config.peft_type != PeftType.ADALORA or not config.rank_pattern:
        return
    weights = load_peft_weights(path, kwargs.get("torch_device"), key_mapping, **_of_hub(kwargs))
    # The layers have the pruned shapes already, and PEFT prunes no layer if the configuration has no rank_pattern.
    rank_pattern, config.rank_pattern = config.rank_pattern, None
    try:
        set_peft_model_state_dict(
            model, weights, adapter_name, ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False)
        )
    finally:
        config.rank_pattern = rank_pattern


def _of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of ``kwargs`` that are arguments of ``hf_hub_download``."""
    return {key: kwargs[key] for key in inspect.signature(hf_hub_download).parameters if key in kwargs}


def _check_keys(model: PeftModel, adapter_name: str, folder: Path, missing: list[str], unexpected: list[str]) -> None:
    """Checks the result of PEFT's ``load_state_dict``: ValueError for a missing tensor, a warning for an extra tensor.

    PEFT's list of missing keys may also have keys of other adapters, if the names of these adapters contain
    ``adapter_name``. Tied embeddings share one tensor of an adapter, and the file has this tensor once.
    """
    config, file = model.peft_config[adapter_name], folder / SAFETENSORS_WEIGHTS_NAME
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    tensors, unread = dict(model.named_parameters(remove_duplicate=False)), set(missing)
    read = {id(tensor) for key, tensor in tensors.items() if key not in unread}
    own = (key for key in missing if prefix in key and adapter_name in key.split("."))
    if lacks := [key for key in dict.fromkeys(own) if key not in tensors or id(tensors[key]) not in read]:
        raise ValueError(f"load_adapter: {file} lacks {len(lacks)} of the adapter's tensors, first {lacks[0]}")
    extra = [] if config.is_prompt_learning else sorted(without_copies(unexpected))
    if extra:
        name, key = type(model.get_base_model()).__name__, extra[0].replace(f".{adapter_name}.", ".")
        warnings.warn(f"load_adapter: {file} has {key}, which is no part of {name}: it was left out", stacklevel=3)


def without_copies(keys: list[str]) -> list[str]:
    """Returns the ``keys`` of an adapter's file that have neither ".modules_to_save." nor ".original_module." in them.

    With bias="all" PEFT saves the biases of ``modules_to_save`` a second time, under their full names in the model,
    which have ".modules_to_save." or ".original_module." in them.
    """
    return [key for key in keys if not any(part in key for part in (".modules_to_save.", ".original_module."))]


def _adapter_folder(path: str, kwargs: dict[str, Any]) -> Path:
    """Returns the folder of the adapter's files; for the name of a hub repository, downloads the files to the hub's
    cache."""
    if Path(path).is_dir():
        return Path(path, kwargs.get("subfolder") or "")
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            file = hf_hub_download(path, name, **_of_hub(kwargs))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"load_adapter: {path} is no folder, and no repository within reach") from error
    except EntryNotFoundError as error:
        raise ValueError(f"load_adapter: the repository {path} has no {name}") from error
    return Path(file).parent
