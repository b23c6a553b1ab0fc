"""PEFT's two ways to an adapted model, with this project's methods known and its kernels in place."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Union

import peft
from peft import PeftConfig, PeftModel
from peft.tuners import lora
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn

from . import tuners  # noqa: F401  registers the methods that PEFT lacks
from .integrations._peft_base import FUSED
from .integrations.peft import accelerate as _accelerate
from .nn import NF4Linear

__all__ = ["get_peft_model", "load_adapter"]


def get_peft_model(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str = "default",
    *,
    accelerate: bool = True,
    dora_dropout: str = "peft",
    **kwargs: Any,
) -> PeftModel:
    """``peft.get_peft_model``, then :func:`peft_ext.accelerate`: a new adapter on ``model``, in place.

    Args:
        model: a transformers model, or any module.
        config: of one of PEFT's methods, or a BottleneckConfig, BitFitConfig, PartialConfig or DiffPruningConfig.
        adapter_name: the new adapter's name.
        accelerate: put the layers on the fused ops; what can't be fused stays stock. False: PEFT's model as it is.
        dora_dropout: see :func:`peft_ext.accelerate`.
        kwargs: PEFT's others: ``mixed``, ``autocast_adapter_dtype``, ``revision``, ``low_cpu_mem_usage``.

    Returns: the PeftModel, around the same model.

    Raises: TypeError where config is no PeftConfig; whatever PEFT raises for a configuration that does not fit.
    """
    if not isinstance(config, PeftConfig):
        raise TypeError(f"get_peft_model: config is {type(config).__name__}, wanted a PeftConfig")
    _take_nf4(config, model)
    adapted = peft.get_peft_model(model, config, adapter_name, **kwargs)
    return _accelerate(adapted, dora_dropout=dora_dropout) if accelerate else adapted


def load_adapter(
    model: nn.Module,
    path: Union[str, Path],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    accelerate: bool = True,
    dora_dropout: str = "peft",
    **kwargs: Any,
) -> PeftModel:
    """A saved adapter on ``model``, active, then :func:`peft_ext.accelerate`.

    Args:
        model: a base model, which ``PeftModel.from_pretrained`` wraps, or a PeftModel, which gets one adapter more.
        path: a folder that ``save_pretrained`` wrote, or the name of a repository on the Hugging Face Hub.
        adapter_name: the name it gets here; the one it was saved under is not on disk.
        is_trainable: train it on; otherwise it is frozen and the model is put in eval mode.
        accelerate, dora_dropout: see :func:`get_peft_model`.
        kwargs: PEFT's others: ``low_cpu_mem_usage``, ``autocast_adapter_dtype``, ``torch_device``, ``key_mapping``,
            ``subfolder``, ``revision``, ``token`` and the like.

    Returns: the PeftModel: ``model`` itself where it is one.

    Raises: TypeError where model is no module; ValueError where the weights are no safetensors (a pickle runs code as
    it is read), or where the PeftModel has an adapter of this name; FileNotFoundError where there are no weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_adapter: model is {type(model).__name__}, wanted a model or a PeftModel")
    loaded = isinstance(model, PeftModel)
    if loaded and adapter_name in model.peft_config:
        raise ValueError(f"load_adapter: the model has an adapter {adapter_name!r} already, give another adapter_name")
    _check_safetensors(str(path), kwargs)
    if loaded:
        if accelerate:  # a layer over NF4 that is to take a DoRA adapter has to be ours before it
            _accelerate(model, dora_dropout=dora_dropout)
        model.load_adapter(str(path), adapter_name, is_trainable=is_trainable, **kwargs)
        model.set_adapter(adapter_name, inference_mode=not is_trainable)
    else:
        if "config" not in kwargs and _holds_nf4(model):
            known = {key: kwargs[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in kwargs}
            kwargs["config"] = PeftConfig.from_pretrained(str(path), **known)
        if "config" in kwargs:
            _take_nf4(kwargs["config"], model)
        model = PeftModel.from_pretrained(model, str(path), adapter_name, is_trainable=is_trainable, **kwargs)
    return _accelerate(model, dora_dropout=dora_dropout) if accelerate else model


def _holds_nf4(model: nn.Module) -> bool:
    return any(isinstance(module, NF4Linear) for module in model.modules())


def _take_nf4(config: PeftConfig, model: nn.Module) -> None:
    """PEFT makes a DoRA layer with the norm of its weight, which of an NF4Linear the fused layer alone can take."""
    if getattr(config, "use_dora", False) and _holds_nf4(model):
        config._register_custom_module({NF4Linear: FUSED[lora.Linear]})


def _check_safetensors(path: str, kwargs: dict[str, Any]) -> None:
    """PEFT takes safetensors where there are any, and a pickle else."""
    folder = Path(path)
    if not folder.is_dir():
        return _check_hub(path, kwargs)
    folder = folder / (kwargs.get("subfolder") or "")
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        return
    if (folder / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"load_adapter: {folder} has {WEIGHTS_NAME}, a pickle, and no {SAFETENSORS_WEIGHTS_NAME}; save the adapter "
            "again with safe_serialization=True"
        )
    raise FileNotFoundError(f"load_adapter: {folder} has no {SAFETENSORS_WEIGHTS_NAME}")


def _check_hub(repository: str, kwargs: dict[str, Any]) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    taken = {key: kwargs[key] for key in inspect.signature(hf_hub_download).parameters if key in kwargs}
    try:
        hf_hub_download(repository, SAFETENSORS_WEIGHTS_NAME, **taken)
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"load_adapter: {repository} is no folder, and no repository within reach") from error
    except EntryNotFoundError as error:
        raise ValueError(f"load_adapter: the repository {repository} has no {SAFETENSORS_WEIGHTS_NAME}") from error
