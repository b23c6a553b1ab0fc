"""Shards the model of transformers' Trainer, or of a subclass, by FSDP2 of the library accelerate, with one FSDP unit
for each decoder layer.

:meth:`peft_ext.integrations.trainer.PeftExtCallback.attach` calls :func:`prepare_fsdp2`. The library accelerate itself
would make FSDP units of the embedding and of the head. If the head is a unit of its own, ``fully_shard`` gives the head
another class, and whole logits are computed. :func:`prepare_fsdp2` calls ``fully_shard`` before the accelerate library
would, and the accelerate library then leaves the model unchanged.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, StateDictType, fully_shard
from torch.distributed.tensor import DTensor

from .._imports import required

with required("accelerate", "peft_ext.integrations.fsdp2"):
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["adapter_state", "prepare_fsdp2"]

# Maps each method whose code computes with the adapter's tensors outside of the layers' forward, where the tensors are
# shards, to the reason that the error gives.
_UNSHARDED = {
    "ADALORA": "PEFT's orthogonal regularization computes with whole lora_A and lora_B; use DDP",
    "DIFF_PRUNING": "the penalty and the pruning compute with whole differences; train in one process",
}


def prepare_fsdp2(trainer: Trainer) -> bool:
    """Shards the model of a Trainer by FSDP2, if the accelerate library's configuration or
    ``TrainingArguments(fsdp=...)`` asks for FSDP2. Returns whether the configuration asks for FSDP2.

    Each decoder layer is an FSDP unit. The root unit has all other parameters, also the embedding, the final norm and
    the head. The root unit keeps its gathered parameters until the backward, so that the loss needs no whole logits.
    The packed codes of 4-bit layers are sharded as bytes, and buffers stay whole in each process. The classes of the
    decoder layers are ``transformer_layer_cls_to_wrap`` of the configuration, by default ``model._no_split_modules``;
    the wrapping policy of the configuration is not used. The mesh, ``reshard_after_forward`` of the decoder layers,
    mixed precision, offloading and ignored modules are those of the accelerate library's FSDP plugin. For processes on
    CPUs, the accelerate library ignores a configuration of FSDP, so ``prepare_fsdp2`` makes the plugin itself and sets
    the distributed type in accelerate's state to FSDP.

    Call ``prepare_fsdp2`` after the trainer is made, before ``trainer.train()`` and ``trainer.evaluate()``, in all
    processes. Modules to which ``fully_shard`` was applied before are left unchanged. For a PeftModel,
    ``trainer.save_model`` writes PEFT's files after a call of ``prepare_fsdp2``, with every state dict type, and
    checkpoints are sharded (``SHARDED_STATE_DICT``) and have PEFT's files too.

    Raises: ValueError if a configuration cannot work with FSDP2: AdaLoRA, Diff Pruning, learned prompts, tensor,
    context or sequence parallelism, offloaded activation checkpointing, mixed precision over a base in FP8,
    ``cpu_ram_efficient_loading`` over bitsandbytes' weights, an optimizer of unsharded parameters or a model_init of
    the trainer, no decoder layer, a trained parameter that has hooks or is not sharded.
    """
    plugin = _plugin(trainer)
    if plugin is None:
        return False
    model, accelerator = trainer.model, trainer.accelerator
    _check(trainer, plugin)
    if plugin.activation_checkpointing:
        # The accelerate library's checkpointing draws new dropout masks in the recomputation; Trainer's checkpointing
        # draws the masks of the forward again.
        plugin.activation_checkpointing = False
        new = hasattr(trainer.args, "activation_checkpointing")
        setattr(trainer.args, "activation_checkpointing" if new else "gradient_checkpointing", True)
    units = _units(model, plugin)
    options: dict[str, Any] = {
        "mesh": _mesh(accelerator), "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }  # fmt: skip
    if plugin.ignored_modules is not None:
        from accelerate.utils.fsdp_utils import get_parameters_from_modules

        options["ignored_params"] = get_parameters_from_modules(plugin.ignored_modules, model, accelerator.device)
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        (_send_from_first if plugin.cpu_ram_efficient_loading else _send_trained)(model, accelerator.device)
        for parameter in model.parameters():
            if accelerator.mixed_precision != "no" and parameter.requires_grad:
                parameter.data = parameter.data.float()
    for unit in units:
        if not isinstance(unit, FSDPModule):
            fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, **options)
    if not isinstance(model, FSDPModule):
        fully_shard(model, **options)
    for name, parameter in model.named_parameters():
        # FSDP2 would not reduce the gradient of a trained parameter that is not sharded.
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(f"prepare_fsdp2: {name} is trained and not sharded; add adapters before fully_shard")
    # With the plugin's auto_wrap_policy, the accelerate library would look for decoder layers by the names of their
    # classes, which fully_shard has changed.
    plugin.auto_wrap_policy = None
    _keep_parameters(accelerator)
    _save_adapters(trainer, plugin)
    return True


def _plugin(trainer: Trainer) -> Optional[FullyShardedDataParallelPlugin]:
    """Returns the accelerate library's FSDP plugin if the configuration asks for FSDP2, else None. For processes on
    CPUs, where the accelerate library ignores a configuration of FSDP, makes the plugin and sets the distributed type
    in accelerate's state to FSDP."""
    state = trainer.accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and state.distributed_type is DistributedType.MULTI_CPU:
        given = getattr(trainer.args, "fsdp_plugin_args", None)
        if given is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            plugin = FullyShardedDataParallelPlugin(**(given or {}))
    if plugin is None or plugin.fsdp_version != 2:
        return None
    if state.distributed_type is DistributedType.MULTI_CPU:
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin, trainer.is_fsdp_enabled = plugin, True
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return plugin


def _check(trainer: Trainer, plugin: FullyShardedDataParallelPlugin) -> None:
    def fail(reason: str) -> None:
        raise ValueError(f"prepare_fsdp2: {reason}")

    for config in getattr(trainer.model, "peft_config", {}).values():
        name = getattr(config.peft_type, "value", config.peft_type)
        if name in _UNSHARDED:
            fail(f"{name} does not work with FSDP2: {_UNSHARDED[name]}")
        if getattr(config, "is_prompt_learning", False):
            fail(f"{name} does not work with FSDP2: PEFT computes the saved prompt from whole parameters; use DDP")
    for name, parameter in trainer.model.named_parameters():
        hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
        if parameter.requires_grad and any(hooks) and not isinstance(parameter, DTensor):
            fail(f"{name} has hooks, which the parameters that FSDP2 makes of it would lose")
    cast = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    for name, parameter in trainer.model.named_parameters() if cast is not None else ():
        if parameter.is_floating_point() and parameter.dtype.itemsize == 1:
            fail(f"{name} has codes of {parameter.dtype}, which FSDP2's mixed precision would cast to {cast}; train "
                 "with bf16=False and fp16=False over a base that is loaded in bfloat16")  # fmt: skip
    if plugin.cpu_ram_efficient_loading and any(hasattr(p, "quant_state") for p in trainer.model.parameters()):
        fail("cpu_ram_efficient_loading does not send the scales of bitsandbytes' weights; wanted False")
    if trainer.model_init is not None:
        fail("the trainer has a model_init, whose model Trainer makes when the training begins; pass a model")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        fail(f"tp_size {parallel.tp_size}, cp_size {parallel.cp_size}, sp_size {parallel.sp_size}: wanted 1, since the "
             "fused layers know only data parallelism")  # fmt: skip
    if plugin.activation_checkpointing and getattr(plugin, "activation_checkpointing_offload", False):
        fail("activation_checkpointing_offload is True, wanted False")
    if trainer.optimizer is not None:
        known = set(trainer.model.parameters())
        optimized = {parameter for group in trainer.optimizer.param_groups for parameter in group["params"]}
        if not (isinstance(trainer.model, FSDPModule) and optimized <= known):
            fail("the trainer has an optimizer of unsharded parameters; let Trainer create the optimizer")


def _units(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """Returns the decoder layers; a layer inside of another decoder layer comes before the outer layer. A module that
    contains the input embedding, whose weight a head may share, is not returned."""
    names = set(plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or ())
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    units = [module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}
             and embedding not in set(module.modules())]  # fmt: skip
    if not units:
        raise ValueError(
            f"prepare_fsdp2: {type(model).__name__} has no module of the classes {sorted(names)}; set "
            "transformer_layer_cls_to_wrap of the FSDP configuration to the class of the model's decoder layers"
        )
    return units[::-1]


def _mesh(accelerator: Any) -> Any:
    # From version 1.10 on, the accelerate library makes a device mesh.
    if getattr(accelerator, "torch_device_mesh", None) is not None:
        return accelerator.torch_device_mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _send(tensor: Tensor, device: torch.device) -> None:
    """Sends a tensor of process 0 to all processes, as bytes, because gloo does not know every dtype."""
    sent = tensor.detach().to(device).contiguous()
    dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
    tensor.detach().copy_(sent)


def _send_trained(model: nn.Module, device: torch.device) -> None:
    """Sends the trained parameters of process 0 to all processes, because ``fully_shard`` sends nothing: each process
    makes its shard from its own copy of the parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            _send(parameter, device)


def _send_from_first(model: nn.Module, device: torch.device) -> None:
    """Sends parameters and buffers of process 0 to all processes. With ``cpu_ram_efficient_loading``, only process 0
    needs to have loaded the parameters and buffers."""
    # Maps the id of a tensor on the meta device to the tensor and to its replacement, so that tied weights stay tied.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():  # transformers leaves a tensor on the meta device if the files lack it
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    new = torch.empty_like(tensor, device=device)
                    new = nn.Parameter(new, tensor.requires_grad) if held is module._parameters else new
                    made[id(tensor)] = tensor, new
                _, held[name] = made[id(tensor)]
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        _send(tensor, device)


def _keep_parameters(accelerator: Any) -> None:
    """Makes ``accelerator.prepare`` keep the parameters of an optimizer, and accept a sharded model without an
    optimizer.

    The accelerate library replaces an optimizer's parameters by the model's parameters at the same addresses. Empty
    shards all have the address 0, so an optimizer would get one empty shard several times, and lose the other empty
    shards.
    """
    prepare = accelerator.prepare
    if hasattr(prepare, "keeps_parameters"):
        return

    @functools.wraps(prepare)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        # An evaluation before the training calls accelerator.prepare with the model alone.
        if len(args) == 1 and isinstance(args[0], FSDPModule):
            return args[0]
        models = [getattr(arg, "_orig_mod", arg) for arg in args if isinstance(arg, nn.Module)]
        if not all(isinstance(model, FSDPModule) for model in models):  # `prepare` then shards the models
            return prepare(*args, **kwargs)
        optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
        kept = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
        found = prepare(*args, **kwargs)
        for optimizer, groups in zip(optimizers, kept, strict=True):
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
        return found

    keeping.keeps_parameters = True  # type: ignore[attr-defined]
    accelerator.prepare = keeping


def _save_adapters(trainer: Trainer, plugin: FullyShardedDataParallelPlugin) -> None:
    """Makes ``trainer.save_model`` write the adapter without gathering the decoder layers' frozen base layers, and
    makes Trainer's checkpoints sharded.

    Trainer writes no model with SHARDED_STATE_DICT, and with FULL_STATE_DICT gathers the whole base in process 0.
    PyTorch can't load a checkpoint of FULL_STATE_DICT over NF4 weights, because the checkpoint has the scales of the
    weights.
    """
    save_model, accelerator = trainer.save_model, trainer.accelerator
    if not hasattr(trainer.model, "peft_config") or hasattr(save_model, "saves_adapters"):
        return
    # The attributes state_dict_config and optim_state_dict_config are set to None, so that set_state_dict_type sets
    # them anew.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("SHARDED_STATE_DICT")

    @functools.wraps(save_model)
    def saving(*args: Any, **kwargs: Any) -> None:
        kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        gather, accelerator.get_state_dict = accelerator.get_state_dict, adapter_state
        try:
            save_model(*args, **kwargs)
        finally:
            plugin.state_dict_type, accelerator.get_state_dict = kind, gather

    saving.saves_adapters = True  # type: ignore[attr-defined]
    trainer.save_model = saving


def adapter_state(model: nn.Module, unwrap: bool = True) -> dict[str, Tensor]:
    """Gathers the state dict of a PeftModel without the frozen base layers of the decoder layers. Process 0 gets the
    tensors, and every other process gets an empty dict."""
    model = getattr(model, "_orig_mod", model)  # torch.compile keeps the module of a compiled model in `_orig_mod`
    adapters = set(getattr(model, "peft_config", ()))
    units = tuple(f"{name}." for name, module in model.named_modules() if name and isinstance(module, FSDPModule))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    found = {}
    for name, tensor in model.state_dict().items():
        if (
            name in frozen
            and name.startswith(units)
            and ".base_layer." in name
            and adapters.isdisjoint(name.split("."))
        ):
            continue
        if isinstance(tensor, DTensor):  # an offloaded shard is on the CPU, and is gathered on its mesh's device
            tensor = tensor.to(tensor.device_mesh.device_type)
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            found[name] = whole.cpu()
    return found
