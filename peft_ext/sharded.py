"""Loads a model for FSDP2, so that no process ever holds the whole model.

    base = meta_base(folder, config, dtype=torch.bfloat16, quant="nf4")   # a model on the meta device, files checked
    with adapter_values(device):
        model = peft.get_peft_model(base.model, peft_config)              # the adapter has values, the base has none
    peft_ext.accelerate(model)
    shard_and_load(model, base, mesh)                                     # fully_shard, then reads the files

A process reads the rows of a dense weight that its own shard has. An NF4 weight is read and quantized whole by one
process of each node, because the scales of a weight are quantized together. The process then sends codes and scales to
the other processes of its node, and each process keeps its shard of the codes. The processes of a node take turns.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from . import ops
from ._imports import has, required
from .nn import NF4Experts, NF4Linear
from .nn.experts import is_stored_transposed
from .quantize import quantize_meta
from .sources.conversion import Group, plan
from .sources.json_file import first_line, raised_as
from .sources.model import SourceError, widen
from .sources.tensor_files import TensorFiles
from .weight import NF4Weight

with required("peft", "peft_ext.sharded"):
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    has(DoraLinearLayer, "update_layer")
    has(BaseTuner, "_replace_module")
    has(BaseTunerLayer, "_move_adapter_to_device_of_base_layer")

__all__ = ["MetaBase", "adapter_values", "meta_base", "shard_and_load"]

PIECE = 4 << 20  # bytes of a dense weight that are read at once
METHODS = ("LORA", "IA3")  # PEFT's names of the methods whose adapters can be sharded
_INITS = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights that need no values of the base
_LISTS = ("layers", "h", "blocks")  # names of the list of decoder layers in transformers' models

# Older releases make each shard a parameter that requires gradients, which uint8 can't: pytorch/pytorch#177844.
_SHARDS_BYTES = torch.__version__ >= (2, 13)


@dataclass
class MetaBase:
    """A model on the meta device, and the plan by which its tensors are made from the files.

    Attributes:
        model: the transformers model. Buffers that are in no file have values, on the CPU.
        folder: the folder of the files.
        layers: the decoder layers, which are the units of FSDP2.
        groups: the plan, in the order of the decoder layers. The second value is the index of the decoder layer, or -1.
        places: name in the state dict of the dense model -> the module and its attribute that hold the tensor.
    """

    model: Any
    folder: Path
    files: TensorFiles
    layers: list[nn.Module]
    groups: list[tuple[Group, int]]
    places: dict[str, tuple[nn.Module, str]]


# --- the model on the meta device -------------------------------------------------------------------------------------


def meta_base(
    folder: Union[str, Path], config: Any, *, dtype: torch.dtype, quant: str = "none", blocksize: int = 64
) -> MetaBase:
    """Returns the frozen causal language model of ``folder`` on the meta device, in eval mode.

    The function reads the headers of the files and no weight, and communicates with no other process. The weights are
    rounded to bfloat16 when they are read, and then cast to ``dtype``.

    Args:
        folder: a folder with config.json and safetensors files.
        config: the transformers configuration, which is copied.
        dtype: bfloat16 or float32, the dtype of dense weights.
        quant: "nf4" puts :class:`peft_ext.nn.NF4Linear` and NF4 experts where :func:`peft_ext.quantize_nf4` puts them;
            "none" does not.
        blocksize: see :func:`peft_ext.quantize_nf4`. The scales are quantized too.

    Raises: SourceError where a file is missing or broken, where the files lack a tensor or have a tensor of a wrong
    shape or dtype, where transformers converts the files in a way that needs the whole model, where the files are
    quantized, or where the decoder layers are not found. ValueError for another ``dtype`` or ``quant``.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in (torch.bfloat16, torch.float32) or quant not in ("nf4", "none"):
        raise ValueError(f"meta_base: dtype is {dtype} and quant {quant!r}, wanted bfloat16 or float32, nf4 or none")
    folder, config = Path(folder), copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        raise SourceError(f"model {folder}: the weights are quantized, wanted dense weights")
    config.name_or_path = str(folder)
    with raised_as(SourceError, f"model {folder}: ", ValueError, TypeError, KeyError, RuntimeError):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.eval().requires_grad_(False)
    files = TensorFiles(folder)
    groups, initialized = plan(model, files, torch.bfloat16)
    _initialize_buffers(model, initialized)
    _read_generation_config(model, folder)
    layers = decoder_layers(model)
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    if quant == "nf4":
        quantize_meta(model, blocksize)
    if dtype != torch.bfloat16:
        widen(model)
    places = {}
    for group in groups:
        for name in group.shapes:
            owner, _, attribute = name.rpartition(".")
            places[name] = (model.get_submodule(owner), attribute)
    units = [next((i for i, name in enumerate(names) if group.name.startswith(f"{name}.")), -1) for group in groups]
    in_order = sorted(zip(groups, units, strict=True), key=lambda item: item[1])
    return MetaBase(model, folder, files, layers, in_order, places)


def _initialize_buffers(model: Any, names: set[str]) -> None:
    """Gives values to the buffers that are in no file, as ``from_pretrained`` does: with the model's ``_init_weights``.

    ``names``: buffers of the state dict that the files lack.
    """
    kept = {name for name, _ in model.named_non_persistent_buffers()} | names
    for name, buffer in list(model.named_buffers()):
        if name in kept:
            owner, _, local = name.rpartition(".")
            model.get_submodule(owner)._buffers[local] = torch.empty_like(buffer, device="cpu")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in kept:
            tensor._is_hf_initialized = True  # transformers initializes only tensors without this mark
    model.initialize_weights()


def _read_generation_config(model: Any, folder: Path) -> None:
    """Sets the generation configuration as ``from_pretrained`` does."""
    if hasattr(model, "adjust_generation_fn"):
        hub = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        model.adjust_generation_fn(None, True, None, str(folder), force_download=False, local_files_only=True,
                                   subfolder="", trust_remote_code=False, **hub)  # fmt: skip


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the decoder layers of a transformers model: the items of the lists of ``_no_split_modules``.

    For a model whose class names no such modules, returns the items of the list ``layers``, ``h`` or ``blocks`` that
    has as many items as the configuration has layers. Raises SourceError where there is no such list.
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    chosen = [module for _, module in lists if all(type(item).__name__ in whole for item in module)]
    if not chosen:
        chosen = [module for name, module in lists if name.rpartition(".")[2] in _LISTS and len(module) == count]
    if not chosen:
        raise SourceError(f"{type(model).__name__}: no list of decoder layers, wanted a list of "
                          f"{', '.join(sorted(whole)) or 'layers'}")  # fmt: skip
    return [layer for module in chosen for layer in module]


# --- the adapter ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def adapter_values(device: Union[str, torch.device]) -> Iterator[None]:
    """Within the context, PEFT adds adapters with values on ``device`` to a base on the meta device.

    PEFT draws an adapter's initial values on the CPU, casts the values to the base's dtype and moves the values to the
    base's device. Over a base on the meta device the values would be lost: within the context PEFT moves the values to
    ``device``, and the values equal those of an adapter over a base on ``device``. Exception: DoRA's magnitude is the
    norm of a base weight, and stays on the meta device until :func:`shard_and_load` reads the weight.
    """

    def moving(move: Any) -> Any:
        @functools.wraps(move)
        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> None:
            with _kept(layer, device):
                move(layer, *args, **kwargs)

        return run

    def replacing(replace: Any) -> Any:
        @functools.wraps(replace)
        def run(tuner: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
            with _kept(new_module, device):
                replace(tuner, parent, child_name, new_module, child)

        return run

    def updating(update: Any) -> Any:
        @functools.wraps(update)
        def run(layer: Any, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, **kwargs: Any) -> None:
            if any(parameter.is_meta for parameter in base_layer.parameters()):
                lora_A, lora_B = lora_A.to("meta"), lora_B.to("meta")
            update(layer, base_layer=base_layer, lora_A=lora_A, lora_B=lora_B, **kwargs)

        return run

    stock = []
    for kind, name, wrap in (
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", moving), (BaseTuner, "_replace_module", replacing),
        (DoraLinearLayer, "update_layer", updating),
    ):  # fmt: skip
        stock += [(one, name, vars(one)[name], wrap) for one in {kind, *_subclasses(kind)} if name in vars(one)]
    try:
        for kind, name, method, wrap in stock:
            setattr(kind, name, wrap(method))
        yield
    finally:
        for kind, name, method, _ in stock:
            setattr(kind, name, method)


@contextlib.contextmanager
def _kept(module: nn.Module, device: Union[str, torch.device]) -> Iterator[None]:
    """Moves the tensors of ``module`` to ``device`` that the block moves to the meta device; casts stay."""
    values = {name: tensor.detach() for name, tensor in _tensors(module) if not tensor.is_meta}
    yield
    for name, tensor in list(_tensors(module)):
        if not tensor.is_meta or name not in values:
            continue
        value, (owner, _, local) = values[name].to(device, tensor.dtype), name.rpartition(".")
        held = module.get_submodule(owner)
        if isinstance(tensor, nn.Parameter):
            held._parameters[local] = nn.Parameter(value, tensor.requires_grad)
        else:
            held._buffers[local] = value


def _subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _subclasses(one)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _check_adapter(model: nn.Module) -> None:
    """Raises SourceError where the model has an adapter whose method or whose initial values can't be sharded."""
    for config in getattr(model, "peft_config", {}).values():
        method = getattr(config.peft_type, "value", config.peft_type)
        if method not in METHODS:
            raise SourceError(f"the adapter is {method}, wanted one of {', '.join(METHODS)} for a sharded model")
        init = getattr(config, "init_lora_weights", True)
        if init not in _INITS:
            raise SourceError(f"the adapter has init_lora_weights={init!r}, which needs the weights of the base")
    for name, parameter in model.named_parameters():
        if parameter.is_meta and parameter.requires_grad and "lora_magnitude_vector" not in name:
            raise SourceError(f"{name} has no values: add the adapter within adapter_values(device)")


# --- sharding and loading ---------------------------------------------------------------------------------------------


def shard_and_load(
    model: nn.Module, base: MetaBase, mesh: Any, *, node: Optional[Union[int, str]] = None, **options: Any
) -> nn.Module:
    """Shards ``model`` with FSDP2, each decoder layer and the rest as one unit, and reads the weights of its base.

    All processes of the default process group must call the function, after all of them made ``base``. Where one
    process can't read a file, all processes raise, at the latest after the decoder layer. A process holds at most its
    shard, the weights that FSDP2 does not shard, and one tensor with its quantized form.

    Args:
        model: ``base.model``, or a PeftModel around ``base.model``.
        base: the result of :func:`meta_base`.
        mesh: a DeviceMesh over all processes: one dimension for FSDP, two dimensions (replicate, shard) for HSDP.
        node: name of this process's node. Default: torchrun's GROUP_RANK, else the host's name.
        options: further arguments of ``fully_shard``, such as ``mp_policy``.

    Returns: ``model``.

    Raises: SourceError where a weight can't be read or the adapter can't be sharded. ValueError where ``mesh`` does not
    have all processes.
    """
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"shard_and_load: mesh has {mesh.size()} processes, wanted all {dist.get_world_size()}")
    error: Optional[Exception] = None
    try:
        _check_adapter(model)
        for entry in {entry.file: entry for entry in base.files.entries.values()}.values():
            base.files.open(entry.file)
    except SourceError as found:
        error = found
    node = os.environ.get("GROUP_RANK", socket.gethostname()) if node is None else node
    with _Loader(model, base, mesh, _node_group(str(node), error)) as loader:
        for layer in base.layers:
            fully_shard(layer, mesh=mesh, **loader.ignored(layer), **options)
        fully_shard(model, mesh=mesh, **loader.ignored(model), **options)
        loader.load()
    return model


def _node_group(node: str, error: Optional[Exception]) -> Any:
    """Returns the process group of this node; raises in all processes where one process has an error."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (node, None if error is None else first_line(error)))
    _raise_first([why for _, why in found], error)
    nodes: dict[str, list[int]] = {}
    for rank, (name, _) in enumerate(found):
        nodes.setdefault(name, []).append(rank)
    if len(nodes) == 1:
        return dist.group.WORLD
    groups = {name: dist.new_group(ranks) for name, ranks in nodes.items()}  # each process makes all groups
    return groups[node]


def _raise_first(errors: list[Optional[str]], own: Optional[Exception]) -> None:
    """Raises this process's error, or else the first error of another process."""
    if own is not None:
        raise own
    for rank, error in enumerate(errors):
        if error is not None:
            raise SourceError(f"process {rank}: {error}")


class _Loader:
    """Fills the shards of one model. All processes of a node call the methods in one order."""

    def __init__(self, model: nn.Module, base: MetaBase, mesh: Any, group: Any) -> None:
        self.model, self.base, self.group = model, base, group
        kind = mesh.device_type
        self.device = (
            torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
        )
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shard, self.shards = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
        self.turn = 0
        self.error: Optional[Exception] = None
        self.doras: dict[int, list[tuple[Any, str]]] = {}
        for layer in model.modules():
            for name, module in getattr(layer, "lora_magnitude_vector", {}).items():
                if module.weight.is_meta:
                    self.doras.setdefault(id(layer.get_base_layer()), []).append((layer, name))

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.base.files.close()
        if self.group is not dist.group.WORLD:
            dist.destroy_process_group(self.group)

    def ignored(self, unit: nn.Module) -> dict[str, Any]:
        """Returns the argument of ``fully_shard`` that leaves codes whole where PyTorch can't shard bytes."""
        if _SHARDS_BYTES:
            return {}
        return {"ignored_params": {p for p in unit.parameters() if not p.is_floating_point()}}

    @torch.no_grad()
    def load(self) -> None:
        self.holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.holders.setdefault(id(parameter), []).append((module, name))
        unit: Optional[int] = None
        for group, of in self.base.groups:
            if unit is not None and of != unit:
                self._agree()
            unit = of
            self._load(group)
        self._agree()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        if empty := next((name for name, tensor in _tensors(self.model) if tensor.is_meta), None):
            raise SourceError(f"model {self.base.folder}: {empty} has no values after loading")

    def _agree(self) -> None:
        """Raises in all processes where one process could not read or make a tensor."""
        failed = torch.tensor([self.error is not None], dtype=torch.int32, device=self.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed.item():
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, None if self.error is None else first_line(self.error))
            _raise_first(found, self.error)

    def _load(self, group: Group) -> None:
        places = [self.base.places[name] for name in group.shapes if name in self.base.places]
        alone = len(places) == 1 and group.is_by_rows and not _is_nf4(*places[0]) and id(places[0][0]) not in self.doras
        if not alone:
            self._share(group, places)
            return
        try:
            self._read(group, *places[0])
        except Exception as error:  # raised in _agree, in all processes
            self.error = self.error or error

    # --- a tensor of which each process reads its own rows ------------------------------------------------------------

    def _read(self, group: Group, module: nn.Module, attribute: str) -> None:
        tensor = module._parameters.get(attribute)
        if tensor is None:
            dtype = module._buffers[attribute].dtype
            module._buffers[attribute] = group.whole()[group.name].to(self.device, dtype)
            return
        tied = not tensor.is_meta  # the files have the tensor under both names
        held = tensor if tied else self._new(tensor)
        rows, start = held.to_local(), self._bounds(held.shape[0])[0]
        size = max(1, PIECE // max(1, math.prod(held.shape[1:]) * group.dtype.itemsize))
        for at in range(0, rows.shape[0], size):
            piece = rows[at : at + size]
            came = group.rows(start + at, start + at + piece.shape[0]).to(self.device, piece.dtype)
            if tied and not torch.equal(piece, came):
                raise SourceError(f"model {group.where}: the configuration ties {group.name} to another tensor, which "
                                  "has other values in the files; wanted tie_word_embeddings=False")  # fmt: skip
            if not tied:
                piece.copy_(came)

    def _bounds(self, rows: int) -> tuple[int, int]:
        """Returns the first row of this process's shard, and the row behind the last."""
        size = -(-rows // self.shards)
        return min(self.shard * size, rows), min((self.shard + 1) * size, rows)

    def _new(self, tensor: Any) -> Any:
        """Replaces a parameter on the meta device by a parameter on the device, in all modules that hold it."""
        new = nn.Parameter(torch.empty_like(tensor, device=self.device), requires_grad=tensor.requires_grad)
        for module, name in self.holders[id(tensor)]:
            module._parameters[name] = new
        return new

    # --- tensors that one process of the node makes -------------------------------------------------------------------

    def _share(self, group: Group, places: list[tuple[nn.Module, str]]) -> None:
        """Makes the tensors of a group in one process of the node, sends the tensors, and keeps this process's shard."""
        self.turn, owner = self.turn + 1, self.turn % self.ranks
        doras = [
            dora for module, attribute in places if attribute == "weight" for dora in self.doras.get(id(module), ())
        ]
        factors = [_factors(layer, name) for layer, name in doras]  # all processes of the mesh gather the factors
        targets = [target for module, attribute in places for target in _targets(module, attribute)]
        targets += [(layer.lora_magnitude_vector[name], "weight") for layer, name in doras]
        made: list[Tensor] = []
        if self.rank == owner:
            try:
                made = self._made(group, factors, doras)
            except Exception as error:  # raised in _agree, because the other processes wait for this process's tensors
                self.error = self.error or error
        source = dist.get_global_rank(self.group, owner)
        for module, name in targets:
            like = module._parameters[name] if name in module._parameters else module._buffers[name]
            tensor = (
                made.pop(0).to(self.device) if made else torch.zeros(like.shape, dtype=like.dtype, device=self.device)
            )
            tensor = tensor.contiguous()
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), source, self.group)
            self._keep(module, name, tensor)

    def _keep(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        like = module._parameters.get(name)
        if like is None:
            module._buffers[name] = tensor
        elif isinstance(like, DTensor):
            start, end = self._bounds(tensor.shape[0])
            self._new(like).to_local().copy_(tensor[start:end])
        else:
            for holder, attribute in self.holders[id(like)]:
                holder._parameters[attribute] = nn.Parameter(tensor, requires_grad=like.requires_grad)

    def _made(self, group: Group, factors: list[tuple[Tensor, Tensor]], doras: list[tuple[Any, str]]) -> list[Tensor]:
        """Returns the tensors for :func:`_targets` of the group's places, then the magnitudes of ``doras``."""
        made, dense = [], {} if group.is_by_rows else group.whole()
        last: Optional[Tensor] = None
        for name in group.shapes:
            if name not in self.base.places:
                continue
            module, attribute = self.base.places[name]
            if isinstance(module, NF4Experts) and attribute in module.nf4_shapes:
                nf4 = self._quantized_experts(group, module, attribute, dense.pop(name, None))
                made += [nf4.packed.view(nf4.shape[0], -1), *list(nf4.tensors().values())[1:]]
                continue
            weight = dense.pop(name) if dense else group.rows(0, group.shapes[name][0])
            weight = weight.to(self.device)
            if _is_nf4(module, attribute):
                nf4 = ops.nf4_quantize(weight, module.blocksize, module.nested_absmax is not None)
                made += nf4.tensors().values()
                last = nf4.dequantize() if doras else None
            else:
                last = weight.to(_held(module, attribute).dtype)
                made.append(last)
        for (layer, adapter), (lora_A, lora_B) in zip(doras, factors, strict=True):
            made.append(_magnitude(layer, adapter, last, lora_A, lora_B))
        return made

    def _quantized_experts(self, group: Group, module: Any, name: str, dense: Optional[Tensor]) -> NF4Weight:
        found = []
        for i in range(module.nf4_shapes[name][0]):
            one = (group.rows(i, i + 1)[0] if dense is None else dense[i]).to(self.device)
            one = one.transpose(0, 1) if is_stored_transposed(module) else one
            double_quant = module._buffers[f"{name}_nested_absmax"] is not None
            found.append(ops.nf4_quantize(one.contiguous(), module.blocksize, double_quant))
        return NF4Weight.stack(found)


def _held(module: nn.Module, name: str) -> Tensor:
    return module._parameters[name] if name in module._parameters else module._buffers[name]


def _is_nf4(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, NF4Experts):
        return attribute in module.nf4_shapes
    return isinstance(module, NF4Linear) and attribute == "weight"


def _targets(module: nn.Module, attribute: str) -> list[tuple[nn.Module, str]]:
    """Returns the places of a finished tensor: its own place, and of an NF4 weight the buffers of the scales, too."""
    if not _is_nf4(module, attribute):
        return [(module, attribute)]
    scales = ("absmax", "nested_absmax", "nested_code", "nested_offset")
    names = [f"{attribute}_{scale}" if isinstance(module, NF4Experts) else scale for scale in scales]
    return [(module, name) for name in (attribute, *names) if _held(module, name) is not None]


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Returns the whole factors A and B of an adapter, in the dtype in which PEFT computes DoRA's magnitude."""
    found = []
    weight = layer.get_base_layer().weight
    for held in (layer.lora_A, layer.lora_B):
        factor = held[adapter].weight
        factor = factor.full_tensor() if isinstance(factor, DTensor) else factor
        found.append(factor.to(weight.dtype) if weight.is_floating_point() else factor)
    return found[0], found[1]


def _magnitude(layer: Any, adapter: str, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Returns DoRA's magnitude of ``weight``, computed by PEFT, in the dtype of the adapter."""
    held = layer.lora_magnitude_vector[adapter]
    base = nn.Linear(1, 1, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    dora = DoraLinearLayer(fan_in_fan_out=held.fan_in_fan_out)
    dora.update_layer(base_layer=base, lora_A=lora_A, lora_B=lora_B, scaling=layer.scaling[adapter])
    return dora.weight.detach().to(held.weight.dtype)
