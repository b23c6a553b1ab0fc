"""Shards a model with FSDP2 and fills the shards from files."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .. import ops
from ..nn import NF4Experts, NF4Linear, PackedExperts, PackedLinear
from ..nn.experts import FrozenExperts, is_stored_transposed
from ..nn.packed import HoldsPacked
from ..sources.conversion import Group
from ..sources.json_file import first_line, raised_as
from ..sources.model import SourceError
from ..weights.packed import PackedWeight
from ..weights.quantizers import quantized
from .adapter import Adapted, base_of, check_adapter, magnitude, magnitudes_to_compute, tensors_of, whole_factors
from .base import MetaBase

PIECE = 4 << 20  # number of bytes of a weight's rows that a process reads at once

# Whether FSDP2 can shard uint8 parameters. Before 2.13, PyTorch makes each shard a parameter that requires gradients,
# which uint8 does not allow: pytorch/pytorch#177844.
SHARDS_BYTES = torch.__version__ >= (2, 13)


def shard_and_load(
    model: nn.Module, base: MetaBase, mesh: Any, *, node: Optional[Union[int, str]] = None, **options: Any
) -> nn.Module:
    """Shards ``model`` with FSDP2, and reads the weights of the base. Each decoder layer is one unit of FSDP2, and the
    rest of the model is another unit.

    All processes of the default process group must call the function together, after each process made ``base``. If one
    process can't read or make a tensor, all processes raise an error, at the latest after the last tensor of the same
    unit; for DoRA's magnitudes over packed weights, after all magnitudes. If one process raises any other error, for
    example because its memory runs out while it receives a tensor, this process has to end, because the other processes
    wait for it.

    A process holds at most its shard, the tensors that FSDP2 does not shard, and one group of tensors: one weight in
    the files' dtype together with its packed form, or the weights that transformers makes of one tensor. To compute
    DoRA's magnitude, a process also holds the dequantized weight and one copy of this weight in the adapter's dtype, or
    three copies if B is not zero.

    With HSDP inside of one node, a weight of which each process reads its own rows is read from the files once for each
    replica of the model.

    Args:
        model: ``base.model``, or a PeftModel around ``base.model``.
        base: the result of :func:`meta_base`.
        mesh: a DeviceMesh over all processes: one dimension for FSDP, two dimensions (replicate, shard) for HSDP.
        node: name of this process's node. By default, the name is torchrun's GROUP_RANK, else the host's name.
        options: further arguments of ``fully_shard``, such as ``mp_policy``.

    Returns: ``model``.

    Raises: SourceError where a weight can't be read or the adapter can't be sharded. ValueError where ``mesh`` does not
    have all processes, has more than two dimensions, or has two dimensions without names, or where ``offload_policy``
    is a CPUOffloadPolicy.
    """
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"shard_and_load: mesh has {mesh.size()} processes, wanted all {dist.get_world_size()}")
    if mesh.ndim > 1 and (mesh.ndim > 2 or mesh.mesh_dim_names is None):
        raise ValueError(f"shard_and_load: mesh has {mesh.ndim} dimensions and the names {mesh.mesh_dim_names}, wanted "
                         'one dimension, or two with mesh_dim_names=("replicate", "shard")')  # fmt: skip
    if isinstance(options.get("offload_policy"), CPUOffloadPolicy):
        raise ValueError("shard_and_load: offload_policy is CPUOffloadPolicy, and shards are loaded onto the device")
    error: Optional[Exception] = None
    try:
        check_adapter(model)
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
    """Returns the process group of this node. If one process has an error, raises an error in all processes."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (node, None if error is None else first_line(error)))
    _raise_first([why for _, why in found], error)
    nodes: dict[str, list[int]] = {}
    for rank, (name, _) in enumerate(found):
        nodes.setdefault(name, []).append(rank)
    if len(nodes) == 1:
        return dist.group.WORLD
    # PyTorch requires that every process makes all groups, also the groups of other nodes.
    groups = {name: dist.new_group(ranks) for name, ranks in nodes.items()}
    return groups[node]


def _raise_first(errors: list[Optional[str]], own: Optional[Exception]) -> None:
    """Raises this process's own error if there is one, else the first error of another process, if any."""
    if own is not None:
        raise own
    for rank, error in enumerate(errors):
        if error is not None:
            raise SourceError(f"process {rank}: {error}")


class _Loader:
    """Fills the shards of one model. All processes of the mesh must call the methods in the same order."""

    def __init__(self, model: nn.Module, base: MetaBase, mesh: Any, group: Any) -> None:
        self.model, self.base, self.group = model, base, group
        self.device = torch.device(mesh.device_type)
        if self.device.type != "cpu":
            self.device = torch.device(self.device.type, torch.accelerator.current_device_index())
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shard, self.shards = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
        self.turn = 0
        self.error: Optional[Exception] = None
        self.doras = magnitudes_to_compute(model)
        # The packed weights of the checkpoint that have DoRA adapters. The magnitudes of the DoRA adapters over packed
        # weights are computed after all weights are read.
        self.later: list[tuple[Group, nn.Module, str]] = []

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.base.files.close()
        if self.group is not dist.group.WORLD:
            dist.destroy_process_group(self.group)

    def ignored(self, unit: nn.Module) -> dict[str, Any]:
        """Returns the arguments with which ``fully_shard`` leaves packed codes whole if this PyTorch can't shard uint8;
        else {}."""
        if SHARDS_BYTES:
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
        for name, module in self.base.packed:
            with raised_as(SourceError, f"model {self.base.folder}: ", ValueError):
                self.base.quantizer.describe(name, module)
        for group, module, attribute in self.later:
            self._share_magnitudes(group, module, attribute)
        self._agree()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        if empty := next((name for name, tensor in tensors_of(self.model) if tensor.is_meta), None):
            raise SourceError(f"model {self.base.folder}: {empty} has no values after loading")

    def _agree(self) -> None:
        """Raises an error in all processes of the default process group if one of them could not read or make a
        tensor."""
        failed = torch.tensor([self.error is not None], dtype=torch.int32, device=self.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed.item():
            found: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(found, None if self.error is None else first_line(self.error))
            _raise_first(found, self.error)

    def _load(self, group: Group) -> None:
        places = [self.base.places[name] for name in group.shapes if name in self.base.places]
        if len(places) == 1 and group.is_by_rows and self._packed_doras(*places[0]):
            self.later.append((group, *places[0]))
        alone = len(places) == 1 and group.is_by_rows and not self._quantizes(*places[0]) and not self._doras(places)
        if not alone:
            self._share(group, places)
            return
        try:
            self._read(group, *places[0])
        except Exception as error:
            # The error is raised later, in _agree, by all processes.
            self.error = self.error or error

    # --- a tensor of which each process reads its own rows ------------------------------------------------------------

    def _read(self, group: Group, module: nn.Module, attribute: str) -> None:
        tensor = module._parameters.get(attribute)
        if tensor is None:
            dtype = module._buffers[attribute].dtype
            module._buffers[attribute] = group.whole()[group.name].to(self.device, dtype)
            return
        # A tied tensor that is no longer on the meta device was filled already, under its other name.
        tied = not tensor.is_meta
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
        """Returns the first row of this process's shard of a tensor with ``rows`` rows, and the row after the last."""
        size = -(-rows // self.shards)
        return min(self.shard * size, rows), min((self.shard + 1) * size, rows)

    def _new(self, tensor: Any) -> Any:
        """Replaces a meta parameter by an empty parameter on ``self.device``, in all modules that hold the meta
        parameter."""
        new = nn.Parameter(torch.empty_like(tensor, device=self.device), requires_grad=tensor.requires_grad)
        for module, name in self.holders[id(tensor)]:
            module._parameters[name] = new
        return new

    # --- tensors that one process of the node makes -------------------------------------------------------------------

    def _share(self, group: Group, places: list[tuple[nn.Module, str]]) -> None:
        """Makes the tensors of a group in one process of the node and sends them, see :meth:`_send`."""
        doras = self._doras(places)
        # All processes of the mesh gather the adapters' A and B together.
        factors = [whole_factors(layer, name) for layer, name in doras]
        targets = [target for module, attribute in places for target in self._targets(module, attribute)]
        targets += [(layer.lora_magnitude_vector[name], "weight") for layer, name in doras]
        self._send(group, targets, lambda: self._made(group, doras, factors))

    def _send(self, group: Group, targets: list[tuple[nn.Module, str]], make: Callable[[], list[Tensor]]) -> None:
        """Sends the tensors that ``make`` returns in one process of the node, the next in turn, to all processes of the
        node. Each process keeps its own shard of each tensor, and keeps whole a tensor that FSDP2 does not shard."""
        self.turn, owner = self.turn + 1, self.turn % self.ranks
        made: list[Optional[Tensor]] = [None] * len(targets)
        if self.rank == owner:
            try:
                made = list(make())
                _check_made(group, made, targets)
            except Exception as error:
                # The error is raised later, in _agree. Zeros are sent in place of the tensors, because the other
                # processes of the node wait for the tensors.
                self.error, made = self.error or error, [None] * len(targets)
        source = dist.get_global_rank(self.group, owner)
        for i, (module, name) in enumerate(targets):
            like, tensor = _held(module, name), made[i]
            if tensor is None:
                tensor = torch.zeros(like.shape, dtype=like.dtype, device=self.device)
            made[i] = None
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

    def _made(self, group: Group, doras: list[Adapted], factors: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Returns the finished tensors of the group in the order of :meth:`_targets`, and then the magnitudes of the
        DoRA adapters ``doras``, whose matrices A and B are ``factors``."""
        made, dense = [], {} if group.is_by_rows else group.whole()
        weights: dict[tuple[int, str], Any] = {}  # the finished weights of layers with DoRA adapters
        for name in group.shapes:
            if name not in self.base.places:
                continue
            module, attribute = self.base.places[name]
            weight = dense.pop(name, None)
            if isinstance(module, FrozenExperts) and self._quantizes(module, attribute):
                finished = self._quantized_experts(group, module, attribute, weight)
                codes, *scales = finished.tensors().values()
                made += [codes.view(finished.shape[0], -1) if self.base.quant == "nf4" else codes, *scales]
            else:
                weight = (group.rows(0, group.shapes[name][0]) if weight is None else weight).to(self.device)
                if self._quantizes(module, attribute):
                    finished = self._quantized(weight, module, module._buffers.get("nested_absmax") is not None)
                    made += finished.tensors().values()
                else:
                    finished = weight.to(_held(module, attribute).dtype)
                    made.append(finished)
            del weight  # the dense weight is not needed for the magnitude of a packed weight
            if self._doras([(module, attribute)]):
                weights[id(module), attribute] = finished
        for (layer, adapter), (lora_A, lora_B) in zip(doras, factors, strict=True):
            made.append(magnitude(layer, adapter, weights[base_of(layer)], lora_A, lora_B))
        return made

    def _doras(self, places: list[tuple[nn.Module, str]]) -> list[Adapted]:
        """Returns the DoRA adapters that have a magnitude without values over a weight at ``places``, except over
        weights that the checkpoint stores packed."""
        return [dora for module, attribute in places if not self._stays_packed(module)
                for dora in self.doras.get((id(module), attribute), ())]  # fmt: skip

    def _stays_packed(self, module: nn.Module) -> bool:
        return self.base.quantizer is not None and isinstance(module, (HoldsPacked, PackedExperts))

    def _quantizes(self, module: nn.Module, attribute: str) -> bool:
        """Returns whether the weight that becomes ``attribute`` of ``module`` is quantized when it is read."""
        if self.base.quant == "none":
            return False
        if isinstance(module, FrozenExperts):
            return attribute in module.frozen_shapes()
        return isinstance(module, (NF4Linear, PackedLinear)) and attribute == "weight"

    def _quantized(self, weight: Tensor, module: Any, double_quant: bool) -> PackedWeight:
        if self.base.quant == "nf4":
            return ops.nf4_quantize(weight, module.blocksize, double_quant)
        return quantized(weight, self.base.quant)

    def _quantized_experts(self, group: Group, module: Any, name: str, dense: Optional[Tensor]) -> PackedWeight:
        found = []
        for i in range(module.frozen_shapes()[name][0]):
            one = (group.rows(i, i + 1)[0] if dense is None else dense[i]).to(self.device)
            one = one.transpose(0, 1) if is_stored_transposed(module) else one
            double_quant = module._buffers.get(f"{name}_nested_absmax") is not None
            found.append(self._quantized(one.contiguous(), module, double_quant))
        return type(found[0]).stack(found)

    def _targets(self, module: nn.Module, attribute: str) -> list[tuple[nn.Module, str]]:
        """Returns the places (module and attribute) of the tensors that one weight of the files becomes: one place, or
        if the weight is quantized when it is read, the places of the codes and of the scales."""
        if not self._quantizes(module, attribute):
            return [(module, attribute)]
        if isinstance(module, PackedLinear):
            names = [name for name in module.names if name is not None]
        elif isinstance(module, PackedExperts):
            names = [attribute, *(name for name in module.packed_names[attribute][1:] if name is not None)]
        else:
            scales = ("absmax", "nested_absmax", "nested_code", "nested_offset")
            of = f"{attribute}_" if isinstance(module, NF4Experts) else ""
            names = [attribute, *(of + scale for scale in scales if _held(module, of + scale) is not None)]
        return [(module, name) for name in names]

    # --- DoRA over the weights of a packed checkpoint -----------------------------------------------------------------

    def _packed_doras(self, module: nn.Module, attribute: str) -> list[Adapted]:
        """Returns the DoRA adapters whose magnitude is the norm of the packed weight that has its codes in the
        attribute ``attribute`` of ``module``."""
        if not self._stays_packed(module):
            return []
        if isinstance(module, HoldsPacked):
            attribute = "weight" if attribute == module.places()[module.names[0]] else ""
        return list(self.doras.get((id(module), attribute), ()))

    def _share_magnitudes(self, group: Group, module: Any, attribute: str) -> None:
        """Computes the DoRA magnitudes over one packed weight in one process of the node, and sends the magnitudes.

        The process that computes the magnitudes reads all codes of the weight again, because each process has kept only
        its own shard of the codes.
        """
        doras = self._packed_doras(module, attribute)
        factors = [whole_factors(layer, name) for layer, name in doras]

        def make() -> list[Tensor]:
            codes = group.rows(0, next(iter(group.shapes.values()))[0]).to(self.device)
            held = (codes,) if isinstance(module, HoldsPacked) else (attribute, codes)
            weight = module.with_codes(*held)
            return [magnitude(layer, name, weight, *pair) for (layer, name), pair in zip(doras, factors, strict=True)]

        self._send(group, [(layer.lora_magnitude_vector[name], "weight") for layer, name in doras], make)


def _held(module: nn.Module, name: str) -> Tensor:
    return module._parameters[name] if name in module._parameters else module._buffers[name]


def _check_made(group: Group, made: list[Tensor], targets: list[tuple[nn.Module, str]]) -> None:
    for tensor, (module, name) in zip(made, targets, strict=True):
        like = _held(module, name)
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise SourceError(f"model {group.where}: {name} of {group.name} is {tuple(tensor.shape)} {tensor.dtype}, "
                              f"wanted {tuple(like.shape)} {like.dtype}")  # fmt: skip
