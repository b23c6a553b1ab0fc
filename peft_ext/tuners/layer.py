"""Base classes of tuners that run a module with some of its tensors replaced by the active adapter's tensors.

    Y = base(x; θ)          θ: base's tensors, with some replaced by tensors of the active adapter

A tuner that derives from ReplacingTuner adds no term to the output of a module. The base module's own forward runs once
with the replaced tensors, so that the result has the same bits as the result of a model with these tensors. A module is
wrapped only if parameters are registered on the module itself. Reading an attribute of the wrapper (``weight``,
``bias``, ``padding_idx``) gives the base module's attribute, with the adapter's tensors in place of the module's own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .._imports import required
from .targets import Plan, TargetConfig, expand_all_linear
from .tuner import Tuner, Wrapper

with required("peft", "peft_ext.tuners"):
    from peft.tuners.tuners_utils import (
        _ExcludedModule,  # noqa: PLC2701  the return type of PEFT's own lookup
        check_adapters_to_merge,
    )


class NormTensors(nn.LayerNorm):
    """The tensors that an adapter puts in place of the tensors of ``norm``. transformers' Trainer does not apply weight
    decay to the parameters of an ``nn.LayerNorm``, whatever their names are."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, elementwise_affine=False)


def tree(items: dict[str, Union[Tensor, nn.Module]], base: Optional[nn.Module] = None) -> nn.Module:
    """Returns a module that holds ``items`` under their names. A name with a dot, such as "a.b", becomes the item b of
    a submodule a.

    Parameters and modules are registered as parameters and modules, other tensors as buffers. ``base``: a module that
    has tensors with the names in ``items``. Items whose names belong to an ``nn.LayerNorm`` in ``base`` are held by an
    ``nn.LayerNorm`` too.
    """

    def holder(path: str) -> nn.Module:
        norm = None if base is None else base.get_submodule(path)
        return NormTensors(norm) if isinstance(norm, nn.LayerNorm) else nn.Module()

    root = holder("")
    for name, item in items.items():
        *path, leaf = name.split(".")
        module = root
        for depth, part in enumerate(path, 1):
            if part not in module._modules:
                module.add_module(part, holder(".".join(path[:depth])))
            module = module._modules[part]
        if isinstance(item, nn.Module):
            module.add_module(leaf, item)
        elif isinstance(item, nn.Parameter):
            module.register_parameter(leaf, item)
        else:
            module.register_buffer(leaf, item)
    return root


class _Lock:
    """A re-entrant lock. Copying or unpickling a lock makes a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple]:
        return _Lock, ()


class ReplacingLayer(Wrapper):
    """Runs ``base_layer`` with tensors of the active adapter in place of the layer's own tensors.

    A subclass defines ``adapter_layer_names``, the name of the attribute that holds the adapters, and :meth:`own`.

    While ``base_layer`` runs, it holds the adapter's tensors, so only one thread at a time runs a layer, except under
    torch.compile. If ``base_layer`` or a module in it checkpoints a forward, as a decoder layer of transformers and
    PyTorch's CheckpointWrapper do, the recomputation in the backward uses the same tensors as the forward.
    """

    other_param_names = ("names", "tied")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        # `names` maps an adapter to the names of the tensors that the adapter owns in this layer. `tied` maps an
        # adapter to a dict from the name of a shared tensor to the layer that owns the tensor and the tensor's name in
        # the owner.
        self.names: dict[str, list[str]] = {}
        self.tied: dict[str, dict[str, tuple[ReplacingLayer, str]]] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: dict[str, Optional[Tensor]] = {}
        self._lock = _Lock()
        self._active_adapter = []
        self.training = base_layer.training

    # --- methods of a subclass ----------------------------------------------------------------------------------------

    def own(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        """Returns the tensors that ``adapter`` owns in this layer, by name, in the dtypes in which they replace tensors
        of the base module.

        ``training``: whether to return the values for training; Diff Pruning then draws random gates. ``x``: the
        layer's input; None if the input is not known.
        """
        raise NotImplementedError

    # --- the forward --------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> nn.ModuleDict:
        return getattr(self, self.adapter_layer_names[0])

    def replacements(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        """Returns the tensors that ``adapter`` puts in place of parameters of this layer, by the parameter's name.

        The returned dictionary also has the replacement of each parameter that this layer shares with another layer and
        that the other layer's adapter owns.
        """
        with self._locked():  # while another thread runs the layer, base_layer does not hold its own tensors
            found = self.own(adapter, training, x)
        for name, (layer, owned) in self.tied.get(adapter, {}).items():
            if layer is self:
                owner = found
            else:
                with layer._locked():
                    owner = layer.own(adapter, training)
            if owned in owner:
                found[name] = owner[owned]
        return found

    def _locked(self) -> contextlib.AbstractContextManager:
        # torch.compile can't trace a lock.
        return contextlib.nullcontext() if torch.compiler.is_compiling() else self._lock

    def running(self) -> Optional[str]:
        """Returns the adapter that the next forward uses, or None if the next forward runs the base module alone.

        If adapters are disabled and one adapter is merged, ``running`` unmerges the adapter. Raises ValueError if this
        layer holds several of the active adapters.
        """
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        if self.merged:
            return None
        names = self.held(self.active_adapters)
        if len(names) > 1:
            raise ValueError(_several(self, names))
        return names[0] if names else None

    def held(self, names: list[str]) -> list[str]:
        """Returns the adapters among ``names`` that this layer holds."""
        return [name for name in names if name in self.adapters]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self.running()
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        if getattr(self, "_is_replica", False):
            raise RuntimeError(f"{type(self).__name__}: nn.DataParallel makes copies without parameters; wanted "
                               "DistributedDataParallel, or one GPU (CUDA_VISIBLE_DEVICES=0)")  # fmt: skip
        below = list(self.base_layer.modules()) if self.base_layer._modules else [self.base_layer]
        if any(getattr(module.__dict__.get("_hf_hook"), "offload", False) for module in below):
            name = f"{type(self).__name__} over {type(self.base_layer).__name__}"
            raise RuntimeError(f"{name}: accelerate offloads its tensors, wanted a module that stays on a device")
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with self._locked():
            checkpoints = _checkpoints_of(below)
            tensors = self.replacements(adapter, self.training, x)
            try:
                for module, name, func in checkpoints:
                    setattr(module, name, functools.partial(self._checkpoint, func, tensors))
                return self._run(tensors, self.base_layer, *args, **kwargs)
            finally:
                for module, name, func in checkpoints:
                    setattr(module, name, func)

    def _run(self, tensors: dict[str, Tensor], function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Calls ``function`` while ``base_layer`` holds ``tensors`` in place of its own tensors of these names."""
        places = []
        try:
            for name, tensor in tensors.items():
                held, leaf = self._place(name)
                places.append((held, leaf, held[leaf]))
                held[leaf] = tensor
            return function(*args, **kwargs)
        finally:
            for held, leaf, tensor in places:
                held[leaf] = tensor

    def _checkpoint(
        self, checkpoint: Callable[..., Any], tensors: dict[str, Tensor], function: Callable[..., Any], /, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Checkpoints ``function`` so that its recomputation in the backward uses ``tensors`` too, although
        :meth:`forward` has restored the tensors of ``base_layer`` by then."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._locked():
                return self._run(tensors, function, *args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    def _place(self, name: str) -> tuple[dict[str, Optional[Tensor]], str]:
        """Returns the dictionary of parameters or buffers that holds the base module's tensor ``name``, and the
        tensor's key."""
        path, _, leaf = name.rpartition(".")
        module = self.base_layer.get_submodule(path)
        return module._buffers if leaf in module._buffers else module._parameters, leaf

    def base_tensor(self, name: str) -> Optional[Tensor]:
        held, leaf = self._place(name)
        return held[leaf]

    def _read(self, name: str) -> Any:
        """Returns base_layer's attribute ``name`` with the adapter's tensors in place of the layer's own, because some
        models read a layer's weight without calling the layer."""
        adapter = self.running()
        replaced = () if adapter is None else (*self.names[adapter], *self.tied[adapter])
        if not any(one == name or one.startswith(f"{name}.") for one in replaced):
            return getattr(self.base_layer, name)
        tensors = self.replacements(adapter, self.training)
        if name in tensors:
            return tensors[name]
        below = {one.removeprefix(f"{name}."): tensor for one, tensor in tensors.items() if one.startswith(f"{name}.")}
        found = getattr(self.base_layer, name)
        return _with_tensors(found, below) if below else found

    @property
    def weight(self) -> Tensor:
        return self._read("weight")

    @property
    def bias(self) -> Optional[Tensor]:
        return self._read("bias")

    # --- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Copies an adapter's tensors into the base module. :meth:`unmerge` restores the original bits.

        Raises: ValueError if another adapter is merged already, if several adapters are given, or if ``safe_merge`` is
        True and a tensor is not finite.
        """
        names = self.held(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if len(names) > 1 or self.merged:
            raise ValueError(_several(self, [*self.merged_adapters, *names]))
        with self._locked():  # while another thread runs the layer, base_layer does not hold its own tensors
            found = self.own(names[0], training=False)
            if safe_merge:
                for name, tensor in found.items():
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise ValueError(f"NaNs detected in {name} of the adapter {names[0]}, which seems to be broken")
            for name, tensor in found.items():
                self._unmerged[name] = self._exchange(name, tensor.detach().clone())
            self.merged_adapters.append(names[0])

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with self._locked():
            for name, tensor in self._unmerged.items():
                merged = self.base_tensor(name)
                self._exchange(name, tensor if tensor is None else tensor.to(merged.device, merged.dtype))
            self._unmerged.clear()
        # A shared tensor is merged in the layer that owns the tensor. The owner of a shared tensor may wrap a module
        # that is never called, such as T5's embedding, so the other layers that share the tensor unmerge the owner.
        owners = [layer for name in self.merged_adapters for layer, _ in self.tied.get(name, {}).values()]
        self.merged_adapters.clear()
        for layer in owners:
            if layer.merged:
                layer.unmerge()

    def _exchange(self, name: str, tensor: Optional[Tensor]) -> Optional[Tensor]:
        """Sets the base module's tensor ``name`` to ``tensor`` and returns the previous tensor.

        A parameter stays the same object, so that modules that share the parameter continue to share it.
        """
        held, leaf = self._place(name)
        before = held[leaf]
        if isinstance(before, nn.Parameter) and tensor is not None:
            data = before.data
            before.data = tensor
            return data
        parameter = tensor is not None and held is not self.base_layer.get_submodule(name.rpartition(".")[0])._buffers
        held[leaf] = nn.Parameter(tensor, requires_grad=False) if parameter else tensor
        return before

    # --- adapters -----------------------------------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        # Unmerge now, before any forward: after an unmerge during the forward, some of the modules that share a tensor
        # would run merged, and other modules would not.
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def add(
        self, adapter: str, names: list[str], tensors: nn.Module, tied: dict[str, tuple[ReplacingLayer, str]]
    ) -> None:
        self.adapters[adapter], self.names[adapter], self.tied[adapter] = tensors, names, tied

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        # PEFT's _move_adapter_to_device_of_base_layer also casts to the base weight's dtype, which would round an
        # adapter that was saved in float32.
        if adapter_name in self.adapters:
            tensors = self.adapters[adapter_name]
            if not any(parameter.is_meta for parameter in tensors.parameters()):
                tensors.to(device or next(self.base_layer.parameters()).device)


def _with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Returns a shallow copy of ``module`` with ``tensors`` in place of the module's own tensors of these names."""
    view = copy.copy(module)
    for attribute in ("_parameters", "_buffers", "_modules"):
        setattr(view, attribute, dict(getattr(module, attribute)))
    for attribute in ("forward", "_old_forward"):  # hooks of the accelerate library set both attributes
        if attribute in vars(module):
            setattr(view, attribute, _of_copy(vars(module)[attribute], module, view))
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = tensor
        else:
            (view._buffers if head in view._buffers else view._parameters)[head] = tensor
    for head, below in inner.items():
        view._modules[head] = _with_tensors(module._modules[head], below)
    return view


def _of_copy(forward: Callable[..., Any], module: nn.Module, view: nn.Module) -> Callable[..., Any]:
    """Returns ``forward`` with ``view`` in place of ``module`` if ``forward`` is a method of ``module`` or a partial
    function whose first argument is ``module``; else ``forward`` itself."""
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        return types.MethodType(forward.__func__, view)
    if isinstance(forward, functools.partial) and forward.args and forward.args[0] is module:
        return functools.partial(forward.func, view, *forward.args[1:], **forward.keywords)
    return forward


def _checkpoints_of(modules: list[nn.Module]) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
    """Returns a tuple for each of ``modules`` that checkpoints a forward: the module, the name of the attribute that
    holds the checkpointing function, and this function. ``_checkpoints_of`` finds transformers' layers with gradient
    checkpointing, and PyTorch's CheckpointWrapper."""
    found = []
    for module in modules:
        func = module.__dict__.get("_gradient_checkpointing_func")
        if func is not None and getattr(module, "gradient_checkpointing", False):
            found.append((module, "_gradient_checkpointing_func", func))
        if "_checkpoint_wrapped_module" in module._modules and "checkpoint_fn" in module.__dict__:
            found.append((module, "checkpoint_fn", module.checkpoint_fn))
    return found


def _several(layer: nn.Module, names: list[str]) -> str:
    base = type(layer.base_layer).__name__
    return f"{type(layer).__name__} over {base}: {names} replace the same tensors, only one of them can be in effect"


class ReplacingTuner(Tuner):
    """Base class of a tuner whose layers derive from :class:`ReplacingLayer`. A subclass defines :meth:`make_plan` and
    :meth:`make`."""

    def make_plan(self, config: Any, model: nn.Module) -> Plan:
        """Returns a Plan: for each layer, the names of the parameters that an adapter with the configuration ``config``
        replaces. Raises ValueError, before the model changes, if ``config`` does not fit the model.
        """
        raise NotImplementedError

    def make(self, layer: Any, key: str, names: list[str], config: Any) -> nn.Module:
        """Returns a module with the tensors of a new adapter. ``names``: the names of the tensors of ``layer`` that the
        adapter replaces.

        ``key``: the dotted name of ``layer`` in the model.
        """
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config  # PEFT's _prepare_adapter_config refuses target_modules=None, TargetConfig's default

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config.target_modules = expand_all_linear(model, peft_config.target_modules, peft_config)
        self._plan = self.make_plan(peft_config, model)
        self._plan_of = peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        if peft_config is not self._plan_of:
            self._prepare_model(peft_config, self.model)
        return key in self._plan.units or (_ExcludedModule() if key in self._plan.excluded else False)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str,
    ) -> None:  # fmt: skip
        if current_key not in self._plan.units:  # PEFT may take current_key from a state dict
            raise ValueError(f"{type(self).__name__}: {current_key} is not a target of the adapter {adapter_name!r}")
        if not isinstance(target, self.tuner_layer_cls):
            target = self.tuner_layer_cls(target)
            setattr(parent, target_name, target)
        tied = self._plan.tied[current_key].items()
        owners = {name: (self.model.get_submodule(unit), owned) for name, (unit, owned) in tied}
        names = self._plan.units[current_key]
        target.add(adapter_name, names, self.make(target, current_key, names, peft_config), owners)

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yields a tuple for each wrapping layer of this tuner: the layer's full name in the base model, and the
        layer."""
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls):
                yield name, module

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Activates adapters as PEFT does. Raises ValueError, before any change, if a layer holds two of the named
        adapters."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, layer in self.layers():
            if len(held := layer.held(names)) > 1:
                raise ValueError(f"set_adapter: {name}: {_several(layer, held)}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    # An adapter keeps shared tensors shared (see Plan.tied). PEFT's warning about tied modules is therefore limited to
    # modules_to_save.

    def _check_tied_modules(self, model: nn.Module, peft_config: TargetConfig) -> None:
        super()._check_tied_modules(model, dataclasses.replace(peft_config, target_modules=None))

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []
