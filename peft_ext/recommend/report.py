"""The classes of the results of ``recommend_peft_method``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from ..memory import MemoryEstimate
from ..methods import make_config
from ..text import gigabytes


@dataclass(frozen=True)
class Alternative:
    """A method that was not recommended.

    Attributes:
        why_not: the reason against the method.
        memory: memory of a training step of the method in the recommended setting (full fine-tuning: without
            quantization); None where the method can't run in the setting.
        fits: whether a training step of the method fits the card in the setting of ``memory``.
    """

    method: str
    name: str
    why_not: str
    memory: Optional[MemoryEstimate]
    fits: bool


@dataclass(frozen=True)
class Recommendation:
    """The result of :func:`peft_ext.recommend_peft_method`. ``str(recommendation)`` is a text for people.

    Attributes:
        method: one of :data:`peft_ext.methods.METHODS`; None where no method fits.
        name: common name of the method, such as "LoRA", "QLoRA" or "IA3"; "nothing fits" where no method fits.
        quantization: format of the quantized weights, such as "nf4"; None for dense weights.
        gradient_checkpointing, batch_size, sequence_length: the setting of the training step.
        config_class: full name of the configuration's class; "" where no method fits.
        config_kwargs: arguments of the configuration's class.
        memory: memory of the training step; where no method fits, memory of the method that needs the least memory.
        gpu_memory_gb, headroom: memory of the card in GiB, and the part of this memory that stays free of tensors.
        reasons: reasons for the recommendation, as sentences.
        alternatives: the other methods, best first.
    """

    method: Optional[str]
    name: str
    quantization: Optional[str]
    gradient_checkpointing: bool
    batch_size: int
    sequence_length: int
    config_class: str
    config_kwargs: Mapping[str, Any]
    memory: MemoryEstimate
    gpu_memory_gb: float
    headroom: float
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...]

    @property
    def fits(self) -> bool:
        """Whether a method fits the card."""
        return self.method is not None

    def config(self) -> Any:
        """Makes and returns the PEFT configuration of the method. Raises RuntimeError where no method fits."""
        if self.method is None:
            raise RuntimeError("Recommendation: nothing fits, so there is no configuration; see reasons")
        return make_config(self.config_class, self.config_kwargs)

    def __str__(self) -> str:
        setting = [f"{self.batch_size} x {self.sequence_length} tokens", self.quantization or "dense weights"]
        setting += ["gradient checkpointing"] * self.gradient_checkpointing
        lines = [f"{self.name}: {', '.join(setting)}; {gigabytes(self.memory.total)} of {self.gpu_memory_gb:g} GB, "
                 f"{self.headroom:.0%} of which is kept free"]  # fmt: skip
        if self.method is not None:
            given = ", ".join(f"{name}={value!r}" for name, value in self.config_kwargs.items())
            lines.append(f"{self.config_class.rpartition('.')[2]}({given})")
        lines += [f"- {reason}" for reason in self.reasons]
        if self.alternatives:
            lines.append("not taken:")
        for other in self.alternatives:
            too_much = ", does not fit" if self.fits and not other.fits else ""
            needs = "" if other.memory is None else f" ({gigabytes(other.memory.total)}{too_much})"
            lines.append(f"- {other.name}{needs}: {other.why_not}")
        return "\n".join(lines)
