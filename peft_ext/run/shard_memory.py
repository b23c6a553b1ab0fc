"""The memory of one process of a run whose base is sharded by FSDP2, computed from the shapes of the tensors.

FSDP2 splits each parameter by rows: with n shards, the first process holds ``ceil(rows / n)`` rows of each parameter,
and no process holds more. Buffers, such as the scales of packed weights, are whole in each process. A unit of FSDP2 is
a decoder layer, or the rest of the model. The parameters outside of the decoder layers stay gathered from the forward
to the backward. In the backward, FSDP2 may gather a decoder layer while it computes with another decoder layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from torch import Tensor, nn

from ..nn import NF4Linear, PackedLinear
from ..nn.experts import FrozenExperts

if TYPE_CHECKING:
    from ..memory import MemoryEstimate


@dataclass(frozen=True)
class ShardedMemory:
    """Bytes of memory of the process that holds the largest shards.

    Attributes:
        shards: number of processes that share one copy of the base.
        frozen: the process's rows of the frozen parameters, and the whole buffers.
        adapter, gradients, optimizer: the process's rows of the trained parameters, of their gradients, and of Adam's
            two states, with Adam's count of the steps.
        gathered: upper bound of the parameters that FSDP2 gathers in a step, in addition to the shards: the parameters
            outside of the decoder layers, and those of the two largest decoder layers.
        other: bytes of activations, logits and temporary tensors at the peak of a step; 0 where the memory of a step
            could not be estimated.
        reading: upper bound of the tensors that exist in addition to the shards while the base loads.
    """

    shards: int
    frozen: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int
    other: int
    reading: int

    @property
    def step(self) -> int:
        """Bytes of a training step in the process with the largest shards."""
        return self.frozen + self.adapter + self.gradients + self.optimizer + self.gathered + self.other

    @property
    def load(self) -> int:
        """Bytes of the process with the largest shards while the base loads."""
        return self.frozen + self.adapter + self.reading

    @property
    def check(self) -> int:
        """Bytes during the last check, which loads the base a second time beside the trained model."""
        return self.load + self.frozen + self.adapter


def sharded_memory(
    model: nn.Module, shards: int, memory: Optional[MemoryEstimate], quant: Optional[str] = None
) -> ShardedMemory:
    """Returns the memory of the process with the largest shards.

    Args:
        model: the base with its adapter, as it is trained, on the meta device or with tensors without values.
        shards: number of processes that share one copy of the base.
        memory: estimate of the memory of a training step in an unsharded process; None: no estimate was possible.
        quant: the format to which the run quantizes weights as it reads them; None: the run quantizes no weight.
    """
    # this import needs PEFT, which `peft-ext doctor` and `peft-ext --version` do without
    from ..sharded.base import decoder_layers

    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = sum(_rows(p, shards) for p in parameters if not p.requires_grad) + sum(t.nbytes for t in model.buffers())
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    rest = sum(p.nbytes for p in parameters) - sum(layers)
    adapter = sum(_rows(p, shards) for p in trained)
    # `gathered` leaves out the rows that the process itself holds, because `frozen` and `adapter` count these rows.
    gathered = 0 if shards == 1 else (rest + sum(sorted(layers)[-2:])) * (shards - 1) // shards
    kinds = ("activations", "logits", "temporary")
    other = 0 if memory is None else sum(memory.peak[kind] for kind in kinds)
    states = 2 * adapter + 4 * len(trained)  # Adam counts the steps of each parameter
    return ShardedMemory(shards, frozen, adapter, adapter, states, gathered, other, _reading(model, quant))


def _rows(parameter: Tensor, shards: int) -> int:
    """Returns the bytes of the largest shard of a parameter."""
    rows = parameter.shape[0]
    return -(-rows // shards) * (parameter.nbytes // max(1, rows))


def _reading(model: nn.Module, quant: Optional[str]) -> int:
    """Returns the most bytes that a process holds in addition to the shards while it reads one weight of the base.

    While a weight is quantized, it exists in bfloat16 and in its packed form. The quantizers of ``PACKED_FORMATS`` have
    temporary tensors, of some 12 bytes an element in a measurement of MXFP4. DoRA's magnitude needs the weight in the
    dtype of the computation, and one more copy. A weight that is neither quantized nor under a DoRA adapter is read in
    pieces.
    """
    from ..sharded.load import PIECE

    each = {None: 0, "nf4": 2}.get(quant, 2 + 16)  # bytes of an element of a weight that is quantized while it is read
    doras = {id(layer.get_base_layer()) for layer in model.modules() if getattr(layer, "lora_magnitude_vector", None)}
    most = PIECE
    for module in model.modules():
        held = sum(t.nbytes for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        if isinstance(module, FrozenExperts):
            sizes = [shape.numel() for shape in module.frozen_shapes().values()]
        elif isinstance(module, (NF4Linear, PackedLinear)):
            sizes = [module.in_features * module.out_features]
        elif id(module) in doras:
            sizes, held = [max(p.numel() for p in module.parameters(recurse=False))], 0
        else:
            continue
        of_dora = 8 if id(module) in doras else 0
        most = max(most, *(each * size + held + of_dora * size for size in sizes))
    return most
