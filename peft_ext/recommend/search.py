"""Searches for the first method of a ranking that fits the card, and for the first setting in which the method fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Optional, Union

import torch

from ..memory import MemoryEstimate
from ..methods import METHODS, make_config, method_config
from ..sources.json_file import first_line
from ..text import dtype_name, gigabytes
from .ranking import Candidate
from .report import Alternative, Recommendation
from .subjects import Given, parameters_text

# Maps a method to a pair: the method's common name over dense weights, and its common name over NF4 weights.
NAMES = {name: (method.title, method.quantized_title) for name, method in METHODS.items()}
NAMES["full"] = ("full fine-tuning", "full fine-tuning")


def name_of(method: str, quantization: Optional[str]) -> str:
    """Returns the common name of a method over dense weights (``quantization`` None) or over quantized weights."""
    dense, over_nf4 = NAMES[method]
    if quantization in (None, "nf4") or method == "full":
        return dense if quantization is None else over_nf4
    return f"{dense} over {quantization.upper()}"


_CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)

# Pairs (whether the weights are quantized, whether gradient checkpointing is on), in the order of the search.
# Checkpointing adds a second forward, about a third of the step's time, and costs no accuracy. Quantized weights cost
# the time to dequantize them, and sometimes accuracy.
_SETTINGS = ((False, False), (False, True), (True, False), (True, True))


@dataclass(frozen=True)
class _Setting:
    quantization: Optional[str]
    gradient_checkpointing: bool
    batch_size: int
    sequence_length: int


class Search:
    def __init__(
        self, subject: Any, gpu_memory_gb: float, headroom: float, batch_size: int, sequence_length: int,
        dtype: torch.dtype, optimizer: str, accelerated: bool, quantization: str = "nf4",
    ) -> None:  # fmt: skip
        self.subject, self.gpu_memory_gb, self.headroom = subject, gpu_memory_gb, headroom
        self.dense = dtype_name(dtype)
        self.fixed = {"dtype": dtype, "optimizer": optimizer, "accelerated": accelerated}
        settings = [
            _Setting(quantization if quantizes else None, checkpoints, batch_size, sequence_length)
            for quantizes, checkpoints in _SETTINGS
        ]
        settings += [replace(settings[-1], batch_size=1)] * (batch_size > 1)
        self.settings = settings
        # Maps a method and a setting to the memory of a training step, to the error that PEFT or the model raised, or
        # to None where the method does not work in the setting.
        self._known: dict[tuple[str, _Setting], Union[MemoryEstimate, Exception, None]] = {}

    def _has_room(self, memory: Optional[MemoryEstimate]) -> bool:
        return memory is not None and memory.fits(self.gpu_memory_gb, headroom=self.headroom)

    def _fields(self, candidate: Candidate) -> tuple[str, dict[str, Any]]:
        path, fields = method_config(candidate.method, self.subject.task)
        fields |= dict(candidate.changes)
        return path, fields | self.subject.fields(candidate.method, fields.get("exclude_modules"))

    def _memory(self, candidate: Candidate, setting: _Setting) -> Optional[MemoryEstimate]:
        """Returns the memory of a training step of the method; None where the method does not work in the setting."""
        key = (candidate.method, setting)
        if key not in self._known:
            try:
                self._known[key] = self._estimate(candidate, setting)
            except (ValueError, RuntimeError) as error:
                if not isinstance(self.subject, Given):
                    raise
                self._known[key] = error
        found = self._known[key]
        return None if isinstance(found, Exception) else found

    def _estimate(self, candidate: Candidate, setting: _Setting) -> Optional[MemoryEstimate]:
        if candidate.method == "full":
            if setting.quantization is not None:
                return None
            adapted: dict[str, Any] = {"method": "full"}
        elif candidate.method == "prefix" and setting.gradient_checkpointing:
            return None
        else:
            adapted = {"config": make_config(*self._fields(candidate))}
        profile = self.subject.profile(**adapted, **self.fixed, **vars(setting))
        name = name_of(candidate.method, setting.quantization)
        return profile.estimate(f"{name} for {self.subject.about}")

    def recommend(self, ranked: list[Candidate]) -> Recommendation:
        for candidate in ranked:
            if candidate.method == "full":
                continue
            least = self._memory(candidate, self.settings[-1])
            if least is not None and not self._has_room(least):
                continue
            for setting in self.settings:
                memory = self._memory(candidate, setting)
                if memory is not None and self._has_room(memory):
                    return self._found(candidate, setting, memory, ranked)
        return self._nothing(ranked)

    def _found(
        self, chosen: Candidate, setting: _Setting, memory: MemoryEstimate, ranked: list[Candidate]
    ) -> Recommendation:
        name = name_of(chosen.method, setting.quantization)
        why = chosen.why if chosen is ranked[0] else f"{name} is the first that fits; {chosen.why_not}."
        reasons = [why[0].upper() + why[1:], *self._setting_reasons(chosen, setting, memory)]
        for other in ranked[: ranked.index(chosen)]:
            but = self._refusal(other, self.settings) or "does not fit"
            reasons.append(f"{NAMES[other.method][0]} would come before it, but {but}.")
        path, fields = self._fields(chosen)
        return self._recommendation(chosen, name, setting, memory, reasons, ranked, path, fields)

    def _recommendation(
        self, chosen: Optional[Candidate], name: str, setting: _Setting, memory: MemoryEstimate, reasons: list[str],
        ranked: list[Candidate], path: str = "", fields: Mapping[str, Any] = MappingProxyType({}),
    ) -> Recommendation:  # fmt: skip
        return Recommendation(
            method=None if chosen is None else chosen.method, name=name, **vars(setting), config_class=path,
            config_kwargs=MappingProxyType(fields), memory=memory, gpu_memory_gb=self.gpu_memory_gb,
            headroom=self.headroom, reasons=tuple(reasons), alternatives=self._alternatives(ranked, setting, chosen),
        )  # fmt: skip

    def _outcome(self, candidate: Candidate, settings: Sequence[_Setting]) -> tuple[Optional[str], bool]:
        """Returns a pair: the first line of the first error that the method raised in one of ``settings`` (None: no
        error), and whether the method works in one of ``settings``. Settings that were not tried do not count."""
        found = [self._known.get((candidate.method, setting)) for setting in settings]
        error = next((first_line(one) for one in found if isinstance(one, Exception)), None)
        return error, any(isinstance(one, MemoryEstimate) for one in found)

    def _refusal(self, candidate: Candidate, settings: Sequence[_Setting]) -> Optional[str]:
        """Returns why the method works in none of ``settings``; None if a setting works, or if no setting raised an
        error."""
        error, works = self._outcome(candidate, settings)
        return None if error is None or works else f"it can't adapt this model ({error})"

    def _alternatives(
        self, ranked: list[Candidate], setting: _Setting, chosen: Optional[Candidate]
    ) -> tuple[Alternative, ...]:
        found = []
        for other in ranked:
            if other is chosen:
                continue
            # Full fine-tuning trains the base's weights, and quantized weights can't be trained.
            at = setting if other.method != "full" else replace(setting, quantization=None)
            memory = self._memory(other, at)
            name = name_of(other.method, at.quantization)
            why_not = self._refusal(other, [at]) or ("it does not fit" if chosen is None else other.why_not)
            found.append(Alternative(other.method, name, why_not, memory, self._has_room(memory)))
        return tuple(found)

    def _setting_reasons(self, chosen: Candidate, setting: _Setting, memory: MemoryEstimate) -> list[str]:
        left = f"{memory.total / 2**30:.1f} of {self.gpu_memory_gb:g} GB"
        reasons = []
        if setting.quantization is not None:
            error, fits_not = self._outcome(chosen, [s for s in self.settings if s.quantization is None])
            why = ["do not fit"] * (fits_not or error is None)
            why += [f"could not be estimated ({error})"] * (error is not None)
            text = f"{self.dense} weights {', or '.join(why)}: they are quantized to {setting.quantization.upper()}, "
            text += gigabytes(memory.weights)
            if setting.quantization == "nf4":
                text += ", with which QLoRA matched 16-bit fine-tuning (arXiv 2305.14314)"
            reasons.append(f"{text}.")
        else:
            reasons.append(f"{self.dense} weights fit, so they are not quantized.")
        if setting.gradient_checkpointing:
            reasons.append("Gradient checkpointing computes each layer again instead of keeping its activations: about "
                           "a third more time (arXiv 1604.06174).")  # fmt: skip
        if setting.batch_size < self.settings[0].batch_size:
            reasons.append(f"One sequence at a time fits, {self.settings[0].batch_size} do not: accumulate gradients.")
        reasons.append(f"A step of {setting.batch_size} x {setting.sequence_length} tokens needs {left}, estimated for "
                       f"{self.subject.about}.")  # fmt: skip
        return reasons

    def _nothing(self, ranked: list[Candidate]) -> Recommendation:
        """Returns the recommendation where no method fits the card.

        The recommendation has the memory of the method that needs the least memory. The reasons name a larger card, a
        shorter sequence or a smaller model that would fit, where there is one. If no method works for the model, the
        first error of the estimates is raised.
        """
        setting = self.settings[-1]
        needs = [(candidate, self._memory(candidate, setting)) for candidate in ranked]
        needs = [(candidate, memory) for candidate, memory in needs if memory is not None]
        if not needs:
            raise next(error for error in self._known.values() if isinstance(error, Exception))
        least, memory = min(needs, key=lambda pair: pair[1].total)
        name = name_of(least.method, setting.quantization)
        usable = (1 - self.headroom) * self.gpu_memory_gb * 2**30
        wanted = memory.total / (1 - self.headroom) / 2**30
        card = next((size for size in _CARDS if size >= wanted), None)
        reasons = [
            f"Nothing fits: the least is {name} with gradient checkpointing and one sequence of "
            f"{setting.sequence_length} tokens, {gigabytes(memory.total)}, and {self.gpu_memory_gb:g} GB leave "
            f"{gigabytes(usable)} for tensors.",
            f"A card of {card} GB would do." if card else
            f"{name} takes {wanted:.0f} GB: more than one card (FSDP with QLoRA), or weights offloaded to the host.",
        ]  # fmt: skip
        length = setting.sequence_length // 2
        while length >= 64 and not self._has_room(self._memory(least, replace(setting, sequence_length=length))):
            length //= 2
        if length >= 64:
            reasons.append(f"Sequences of {length} tokens would fit.")
        held = memory.weights + memory.quantization
        smaller = self.subject.size_b * (usable - (memory.total - held)) / held if held else 0.0
        if smaller > 0:
            reasons.append(f"A model of about {parameters_text(smaller)} would fit.")
        return self._recommendation(None, "nothing fits", setting, memory, reasons, ranked)
