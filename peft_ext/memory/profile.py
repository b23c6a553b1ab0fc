"""The result of the trace of a training step: bytes by kind of memory in each phase of the step, and the estimate made
of these phases."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "temporary")

_GIB = 2**30
_UNITS = ((_GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step, by kind of memory. ``str(estimate)`` gives a table.

    The field with the name of a kind of memory is the largest number of bytes of this kind at any moment. ``peak`` has
    the bytes of each kind at the moment when their sum is largest, and ``total`` is that sum. A kind's field may be
    larger than its entry in ``peak``: while the loss is computed, for example, there are no gradients yet.

    Attributes:
        weights: parameters and buffers of the base model; quantized parameters count in their packed form.
        quantization: scales of quantized weights, and the tables and offsets that decode the scales.
        adapters: trainable parameters of a partly frozen model, and adapters that are not active.
        gradients: gradients of all trainable parameters.
        optimizer: the optimizer's states, and AdaLoRA's importance scores.
        activations: the inputs, and the tensors other than logits that the forward saves for the backward.
        logits: logits, their float32 copies and their gradients, between the language model's head and the loss, and
            the scratch memory of peft_ext's operator ``linear_cross_entropy``.
        temporary: tensors that exist only within a layer, an operator or the optimizer's step.
        total: sum of the bytes at the peak.
        peak: a mapping from the name of each kind of memory to the bytes of this kind at the moment of the peak.
        parameters, trainable: numbers of all parameters and of the trainable ones.
        about: description of the traced step, in one line.
    """

    weights: int
    quantization: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int
    total: int
    peak: Mapping[str, int]
    parameters: int
    trainable: int
    about: str

    def fits(self, gpu_memory_gb: float, *, headroom: float = 0.1) -> bool:
        """Returns whether ``total`` is at most ``1 - headroom`` of a card's memory.

        Args:
            gpu_memory_gb: memory of the card in GiB, as cards are sold ("24 GB").
            headroom: fraction of the memory that tensors can't use: CUDA's context (0.3 to 0.6 GiB), the workspaces of
                cuBLAS, and the fragmentation of PyTorch's allocator.

        Raises: ValueError where gpu_memory_gb is not positive, or headroom not in ``[0, 1)``.
        """
        if not gpu_memory_gb > 0:
            raise ValueError(f"fits: gpu_memory_gb is {gpu_memory_gb}, wanted more than 0")
        if not 0 <= headroom < 1:
            raise ValueError(f"fits: headroom is {headroom}, wanted 0 <= headroom < 1")
        return self.total <= (1 - headroom) * gpu_memory_gb * _GIB

    def __str__(self) -> str:
        unit, name = next(((u, n) for u, n in _UNITS if self.total >= 4 * u), _UNITS[-1])
        rows = [(name, "most", "at the peak")]
        rows += [(kind, f"{getattr(self, kind) / unit:,.1f}", f"{self.peak[kind] / unit:,.1f}") for kind in KINDS]
        rows.append(("total", "", f"{self.total / unit:,.1f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join((a.ljust(widths[0]), b.rjust(widths[1]), c.rjust(widths[2]))) for a, b, c in rows]
        trained = f"{self.trainable:,} of {self.parameters:,} parameters train"
        return "\n".join([self.about, trained, *table])


@dataclass(frozen=True)
class Profile:
    """Bytes by kind in each phase of a training step.

    ``peaks`` has, for each phase, the bytes of each kind of memory at the moment when the sum over all kinds is
    largest. ``most`` has, for each phase and each kind of memory, the largest number of bytes at any moment.

    The phases are: the forward; the backward of the head and of the last layer of a stack; the backward of the layers
    between the last and the first layer; the backward of the first layer; the backward of the modules before the stack;
    and the optimizer's step. The peak of a phase grows linearly with the number of equal layers, except in the phase of
    the layers between the last and the first. The largest peak of all phases is no linear function of the number of
    layers, so :meth:`extrapolate` works phase by phase.
    """

    peaks: dict[str, dict[str, int]]
    most: dict[str, dict[str, int]]
    parameters: int
    trainable: int

    def estimate(self, about: str) -> MemoryEstimate:
        peak = max(self.peaks.values(), key=lambda phase: sum(phase.values()))
        most = {kind: max(phase[kind] for phase in self.most.values()) for kind in KINDS}
        return MemoryEstimate(
            **most, total=sum(peak.values()), peak=types.MappingProxyType(dict(peak)),
            parameters=self.parameters, trainable=self.trainable, about=about,
        )  # fmt: skip

    def extrapolate(self, other: Profile, steps: float) -> Profile:
        """Returns ``self + steps · (other - self)``, the profile of a model with more layers than those of self and
        other.

        The returned profile leaves out a phase of the step that ``self`` or ``other`` lacks. ``self`` and ``other`` may
        lack only the phase of the layers between the last and the first layer, which a model of two layers does not
        have: the peak of this phase is at most the larger of the peaks of the first and of the last layer.
        """

        shared = [name for name in self.peaks if name in other.peaks]

        def line(a: int, b: int) -> int:
            return round(a + steps * (b - a))

        def lines(a: dict[str, dict[str, int]], b: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
            return {name: {kind: max(0, line(a[name][kind], b[name][kind])) for kind in KINDS} for name in shared}

        return Profile(
            lines(self.peaks, other.peaks), lines(self.most, other.most), line(self.parameters, other.parameters),
            line(self.trainable, other.trainable),
        )  # fmt: skip
