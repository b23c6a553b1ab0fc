"""The function ``recommend_peft_method``, the checks of its arguments, and the names of tasks."""

from __future__ import annotations

import sys
from typing import Any, Optional

import torch

from ..memory import check_arguments, check_positive
from ..weights.quantizers import PACKED_FORMATS
from .ranking import ranked
from .report import Recommendation
from .search import Search
from .subjects import Given, Synthetic

PREFERENCES = ("balanced", "quality")

# For each task type of PEFT, the names that ``recommend_peft_method`` accepts for the task.
_TASKS = {
    "CAUSAL_LM": ("causal-lm", "generation", "text-generation", "language-modeling", "chat", "instruction",
                  "instruction-tuning", "completion", "code", "qa", "summarization", "translation"),
    "SEQ_CLS": ("seq-cls", "classification", "text-classification", "sequence-classification", "sentiment", "nli"),
    "TOKEN_CLS": ("token-cls", "token-classification", "ner", "tagging"),
    "QUESTION_ANS": ("question-ans", "question-answering", "extractive-qa"),
    "SEQ_2_SEQ_LM": ("seq-2-seq-lm", "seq2seq", "seq2seq-lm", "text2text", "text2text-generation"),
    "FEATURE_EXTRACTION": ("feature-extraction", "embedding", "embeddings"),
}  # fmt: skip
_BY_NAME = {name: task for task, names in _TASKS.items() for name in names}


def recommend_peft_method(
    model_size_b: Any,
    gpu_memory_gb: float,
    task_type: str = "CAUSAL_LM",
    num_examples: Optional[int] = None,
    *,
    batch_size: int = 4,
    sequence_length: Optional[int] = None,
    prefer: str = "balanced",
    dtype: torch.dtype = torch.bfloat16,
    optimizer: str = "adamw",
    accelerated: bool = True,
    headroom: float = 0.1,
    quantization: str = "nf4",
) -> Recommendation:
    """Recommends the first method that fits the card, of the methods ranked for the task and the data.

    The recommended setting (quantization, gradient checkpointing and batch size) is the first in which the method fits.
    The number of examples, the task and the kind of model decide the method, unless ``prefer`` is "quality":

    - For fewer than 100 examples: IA3, which was designed for few examples and does better than in-context learning
      (arXiv 2205.05638).
    - For 100 to 999 examples: LoRA of rank 8.
    - For 1,000 to 49,999 examples, or an unknown number: LoRA of rank 16 on all linear layers, which matches full
      fine-tuning (QLoRA, arXiv 2305.14314, section 4).
    - For 50,000 examples or more: rsLoRA of rank 64, since LoRA lacks capacity on large data (arXiv 2405.09673) and a
      larger rank learns no more without rsLoRA's scale (arXiv 2312.03732).
    - For an encoder with biases and fewer than a billion parameters that classifies or marks spans, with 100 to 9,999
      examples or an unknown number: BitFit, which is competitive with full fine-tuning for small encoders (arXiv
      2106.10199).

    With ``prefer="quality"`` and at least 100 examples, or an unknown number, DoRA comes first (arXiv 2402.09353); its
    rank is 32 where LoRA's rank would be 16. Prompt tuning is competitive only from about 10 billion parameters
    on (arXiv 2104.08691). Prefix tuning suits generation (arXiv 2101.00190), AdaLoRA a tight budget of parameters
    (arXiv 2303.10512). Bottleneck adapters (arXiv 1902.00751) can't be merged.

    The memory of a training step decides the setting. With the default ``quantization``, the order of the settings is:
    dense weights; dense weights with gradient checkpointing (arXiv 1604.06174); NF4 weights with double quantization,
    with which QLoRA matched 16-bit fine-tuning (arXiv 2305.14314); NF4 weights with gradient checkpointing; and at last
    NF4 weights, gradient checkpointing and one sequence at a time.

    Args:
        model_size_b: billions of parameters; or a transformers configuration or model, whose training step is traced.
        gpu_memory_gb: memory of one card, in GiB.
        task_type: PEFT's task type ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS",
            "FEATURE_EXTRACTION") or a common name ("generation", "chat", "qa", "summarization", "classification",
            "ner", ...), in upper or lower case. "qa" and "summarization" mean models that generate text;
            "extractive-qa" means models that mark spans.
        num_examples: number of training examples; None: unknown.
        batch_size: number of sequences in one forward. The recommendation may lower ``batch_size`` to 1.
        sequence_length: number of tokens of a sequence. The default is 1024 tokens, or 512 for an encoder, but at most
            the number of positions of a given model.
        prefer: "balanced" or "quality"; "quality" accepts a method with a slower step.
        dtype: dtype of weights that are not quantized.
        optimizer, accelerated: see :func:`peft_ext.estimate_memory`.
        quantization: format to which weights are quantized: "nf4", "mxfp4", "nvfp4", "fp8" or "int4". This format
            replaces NF4 in the order of the settings.
        headroom: part of the card's memory that stays free of tensors, see :meth:`peft_ext.memory.MemoryEstimate.fits`.

    Returns: a Recommendation of a method that fits. Where no method fits, ``method`` is None, and ``reasons`` name a
    larger card, a shorter sequence or a smaller model that would fit, where there is one.

    Raises: TypeError or ValueError for a wrong argument; the message names the argument and the wanted values. If no
    method works for the given model, the first error of the estimates is raised.
    """
    _check_arguments(gpu_memory_gb, num_examples, sequence_length, prefer, headroom)
    check_arguments(
        None, batch_size, sequence_length or 1, dtype, optimizer, None, 64, None, None, op="recommend_peft_method"
    )
    if quantization not in ("nf4", *PACKED_FORMATS):
        wanted = ("nf4", *PACKED_FORMATS)
        raise ValueError(f"recommend_peft_method: quantization is {quantization!r}, wanted one of {wanted}")
    task = task_named(task_type)
    subject = (Synthetic if _is_number(model_size_b) else Given)(model_size_b, task, sequence_length)
    search = Search(subject, gpu_memory_gb, headroom, batch_size, subject.sequence_length, dtype, optimizer,
                    accelerated, quantization)  # fmt: skip
    return search.recommend(ranked(subject, num_examples, prefer))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_arguments(gpu_memory_gb: Any, num_examples: Any, sequence_length: Any, prefer: Any, headroom: Any) -> None:
    op = "recommend_peft_method"
    if not _is_number(gpu_memory_gb) or not 0 < gpu_memory_gb <= sys.float_info.max:
        raise ValueError(f"{op}: gpu_memory_gb is {gpu_memory_gb!r}, wanted a number above 0")
    for name, value in (("num_examples", num_examples), ("sequence_length", sequence_length)):
        if value is not None:
            check_positive(op, name, value)
    if prefer not in PREFERENCES:
        raise ValueError(f"{op}: prefer is {prefer!r}, wanted one of {PREFERENCES}")
    if not _is_number(headroom) or not 0 <= headroom < 1:
        raise ValueError(f"{op}: headroom is {headroom!r}, wanted 0 <= headroom < 1")


def task_named(task_type: Any) -> str:
    """Returns PEFT's task type for a task's name or task type. Raises ValueError for an unknown task."""
    name = str(getattr(task_type, "value", task_type)).strip().lower().replace("_", "-").replace(" ", "-")
    if name not in _BY_NAME:
        wanted = "; ".join(f"{task} ({', '.join(names[1:])})" for task, names in _TASKS.items())
        raise ValueError(f"recommend_peft_method: task_type is {task_type!r}, wanted one of {wanted}")
    return _BY_NAME[name]
