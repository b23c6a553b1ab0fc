"""What a traced step needs: bytes by kind in each phase, and the estimate that is made of them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "temporary")

_GIB = 2**30
_UNITS = ((_GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training step; prints as a table.

    Each kind is the most that there is of it at any moment; ``peak`` is what there is of each at the moment when the
    sum is largest, and ``total`` is that sum. So a kind may be larger than its part of the peak: while the loss is
    computed there are no gradients yet.

    Attributes:
        weights: parameters of the base model, packed where they are quantized, and its buffers.
        quantization: scales of quantized weights and what decodes them.
        adapters: trainable parameters of a model that is partly frozen, and the adapters that are not active.
        gradients: of every trainable parameter.
        optimizer: the optimizer's states, and the importance scores that AdaLoRA keeps beside them.
        activations: what the forward saves for the backward, without logits.
        logits: from the language model's head to the loss, and back: logits, their float32 copies and gradients.
        temporary: what lives within a layer, an operator or the optimizer's step alone.
        total: the peak.
        peak: bytes by kind at the peak.
        parameters, trainable: how many there are.
        about: what was traced, in one line.
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
            gpu_memory_gb: in GiB, as cards are sold ("24 GB").
            headroom: the part that tensors don't get: CUDA's context (0.3 to 0.6 GiB), the workspaces of cuBLAS, and
                what PyTorch's allocator loses between blocks.

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
    """Bytes by kind in each phase of the step: at its peak, and the most of each kind.

    The phases are the forward; the backward of the head and the last layer of a stack, of the layers between, of its
    first layer, of what is before it; and the optimizer's step. In all but those between, the peak grows linearly with
    the number of equal layers, which the largest of the peaks does not.
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
        """Returns ``self + steps · (other - self)``: of more layers, from two profiles of few.

        A peak between first and last layer is no larger than both of theirs, and may be missing.
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
