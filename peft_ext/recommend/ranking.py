"""The order of the methods for a task and an amount of data, and the reasons for the order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

# Fewer than _FEW examples count as few, fewer than _SMALL examples as small data, and _LARGE or more as large data.
_FEW, _SMALL, _LARGE = 100, 1_000, 50_000
_BITFIT_EXAMPLES = 10_000


@dataclass(frozen=True)
class Candidate:
    """One method of a ranking. :func:`ranked` returns the methods of the ranking for a task, best first.

    Attributes:
        why_not: the reason against the method. The reason is shown where another method is chosen, and where the
            method is chosen although it is not the first of the ranking.
        changes: values for fields of the method's configuration, in place of the values in the table ``METHODS``.
        why: the reason for the method. The reason is shown where the method is chosen and is the first of the ranking.
    """

    method: str
    why_not: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


def ranked(subject: Any, num_examples: Optional[int], prefer: str) -> list[Candidate]:
    """Returns the methods that the task and the model allow, best first, and full fine-tuning at the end."""
    n = num_examples
    few, small, large = (n is not None and n < _FEW), (n is not None and n < _SMALL), (n is not None and n >= _LARGE)
    examples = "an unknown number of examples" if n is None else f"{n:,} examples"
    rank = 8 if small else 64 if large else 32 if prefer == "quality" else 16
    low_rank = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.1 if small else 0.05}
    generates = subject.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    classifies = subject.task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    bitfit_first = classifies and subject.is_encoder and subject.size_b < 1 and (n is None or n < _BITFIT_EXAMPLES)

    if few:
        not_lora = "many times IA3's parameters, for few examples to learn them from"
    elif large:
        not_lora = f"scaled by alpha/r, rank {rank} learns little more than a small one (arXiv 2312.03732)"
    elif prefer == "quality":
        not_lora = "a faster step, but DoRA does better at the same rank (arXiv 2402.09353)"
    else:
        not_lora = f"more parameters than a small encoder needs for {examples}"
    enough = ", enough for little data (arXiv 2106.09685, section 7.2)" if small else ""
    lora = Candidate(
        "lora", not_lora, low_rank, f"{examples}: LoRA on all linear layers, as it takes to match full fine-tuning "
        f"(arXiv 2305.14314), of rank {rank}{enough}.",
    )  # fmt: skip
    rslora = Candidate(
        "rslora", f"its scale matters at large ranks; at rank {rank} it is LoRA with another learning rate",
        {**low_rank, "lora_alpha": 16},
        f"{examples} need capacity: rank {rank} on all linear layers (arXiv 2405.09673), scaled by alpha/sqrt(r), so "
        "that the rank counts (arXiv 2312.03732).",
    )  # fmt: skip
    dora = Candidate(
        "dora", "a little better than LoRA of the same rank (arXiv 2402.09353), for a slower step; prefer='quality' "
        "takes it", low_rank,
        f"{examples}, and quality is preferred: DoRA of rank {rank}, which learns magnitudes apart from directions and "
        "does better than LoRA of the same rank (arXiv 2402.09353).",
    )  # fmt: skip
    adalora = Candidate(
        "adalora",
        "its gain is at very small budgets of parameters (arXiv 2303.10512); it needs total_step and a callback",
        {"init_r": rank * 3 // 2, "target_r": rank, "total_step": _steps(n), "lora_dropout": low_rank["lora_dropout"]},
    )  # fmt: skip
    ia3 = Candidate(
        "ia3", "one vector a layer is for some tens of examples (arXiv 2205.05638)",
        why=f"{examples} are few: IA3 learns one vector a layer, was made for few-shot training and beats in-context "
        "learning (arXiv 2205.05638).",
    )  # fmt: skip
    bitfit = Candidate(
        "bitfit", "competitive with full fine-tuning for small encoders and up to medium data alone (arXiv 2106.10199)",
        why=f"{examples} for a small encoder: BitFit trains the biases and the head, there competitive with full "
        "fine-tuning (arXiv 2106.10199).",
    )  # fmt: skip
    bottleneck = Candidate(
        "bottleneck", "near full fine-tuning (arXiv 1902.00751), but it can't be merged: every layer stays slower"
    )
    prefix = Candidate(
        "prefix", "good for generation from little data (arXiv 2101.00190), but it can't be merged, takes context, and "
        "does not work with gradient checkpointing",
    )  # fmt: skip
    prompt = Candidate(
        "prompt", "slow to converge, can't be merged and takes context" if subject.size_b >= 10 else
        "catches up with other methods only from about 10 billion parameters on (arXiv 2104.08691)",
    )  # fmt: skip
    full = Candidate(
        "full", "learns more from large data, and forgets more of what the model knew (arXiv 2405.09673); each task is "
        "a whole model" if large else "no better than LoRA on all layers here, and each task is a whole model",
    )  # fmt: skip

    if few:
        order = [ia3, lora, dora, prompt, prefix, bitfit, adalora, bottleneck, rslora]
    elif large:
        order = [rslora, lora, dora, bottleneck, adalora, ia3, bitfit, prefix, prompt]
    else:
        order = [lora, dora, rslora, adalora, bottleneck, ia3, bitfit, prefix, prompt]
    if few and subject.size_b >= 10:
        order.insert(1, order.pop(order.index(prompt)))
    if bitfit_first and not few:
        order.insert(0, order.pop(order.index(bitfit)))
    if prefer == "quality" and not few:
        order.insert(0, order.pop(order.index(dora)))
    left_out = {"prefix"} if not generates else set()
    left_out |= {"bitfit"} if not subject.has_biases else set()
    left_out |= {"prompt"} if subject.is_encoder or subject.task in ("TOKEN_CLS", "QUESTION_ANS") else set()
    return [candidate for candidate in [*order, full] if candidate.method not in left_out]


def _steps(num_examples: Optional[int]) -> int:
    """Returns the number of training steps of three epochs with batches of 16, but at least 100; 1000 if
    ``num_examples`` is unknown."""
    return 1000 if num_examples is None else max(100, 3 * num_examples // 16)
