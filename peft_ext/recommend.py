"""Which PEFT method for a model, a card, a task and an amount of data.

    first the method that fits task and data, then the first setting of it that fits the card:
    16-bit weights  >  with checkpointing  >  NF4 weights  >  NF4 with checkpointing  >  that, one sequence at a time

What fits is not guessed: :func:`peft_ext.estimate_memory` traces the training step, of the given model or of one with
the proportions of the Llama family (BERT's, T5's) and the wanted number of parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Optional

import torch
from torch import nn

from ._meta import build_model, make_config, method_config
from .memory import MemoryEstimate, Profile, check_arguments, check_positive, profile_step

__all__ = ["Alternative", "Recommendation", "recommend_peft_method"]

PREFERENCES = ("balanced", "quality")

# What a task is called, by PEFT's name for it.
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

_NAMES = {
    "lora": ("LoRA", "QLoRA"),
    "rslora": ("rsLoRA", "QLoRA with rsLoRA's scale"),
    "dora": ("DoRA", "QDoRA"),
    "adalora": ("AdaLoRA", "AdaLoRA over NF4"),
    "ia3": ("IA3", "IA3 over NF4"),
    "bitfit": ("BitFit", "BitFit over NF4"),
    "bottleneck": ("bottleneck adapters", "bottleneck adapters over NF4"),
    "prefix": ("prefix tuning", "prefix tuning over NF4"),
    "prompt": ("prompt tuning", "prompt tuning over NF4"),
    "full": ("full fine-tuning", "full fine-tuning"),
}

# Examples below which data is few, small, medium; from the last on it is large.
_FEW, _SMALL, _LARGE = 100, 1_000, 50_000
_BITFIT_EXAMPLES = 10_000
_LARGEST_B = 1_000_000

_CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)

# Quantization and checkpointing, in the order in which they are tried: checkpointing costs a second forward, a third of
# the step, and no accuracy; NF4 costs the time to dequantize and, at times, accuracy.
_SETTINGS = ((None, False), (None, True), ("nf4", False), ("nf4", True))


@dataclass(frozen=True)
class Alternative:
    """A method that was not taken: why, and what its step needs in the recommended setting (None: it can't run so)."""

    method: str
    name: str
    why_not: str
    memory: Optional[MemoryEstimate]
    fits: bool


@dataclass(frozen=True)
class Recommendation:
    """What :func:`peft_ext.recommend_peft_method` found; prints as a text.

    Attributes:
        method: one of ``peft_ext.memory.METHODS``; None where nothing fits.
        name: as people call it: "LoRA", "QLoRA", "IA3"; "nothing fits".
        quantization: "nf4" or None. gradient_checkpointing, batch_size, sequence_length: the rest of the setting.
        config_class: full name of the configuration's class; empty where nothing fits.
        config_kwargs: the arguments to make it with.
        memory: of a training step: see :class:`peft_ext.memory.MemoryEstimate`; where nothing fits, the smallest.
        gpu_memory_gb, headroom: what it was held against.
        reasons: sentences.
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
        """Whether anything fits."""
        return self.method is not None

    def config(self) -> Any:
        """The PEFT configuration, made now. Raises RuntimeError where nothing fits."""
        if self.method is None:
            raise RuntimeError("Recommendation: nothing fits, so there is no configuration; see reasons")
        return make_config(self.config_class, self.config_kwargs)

    def __str__(self) -> str:
        setting = [f"{self.batch_size} x {self.sequence_length} tokens", self.quantization or "dense weights"]
        setting += ["gradient checkpointing"] * self.gradient_checkpointing
        lines = [f"{self.name}: {', '.join(setting)}; {_gb(self.memory)} of {self.gpu_memory_gb:g} GB"]
        if self.method is not None:
            given = ", ".join(f"{name}={value!r}" for name, value in self.config_kwargs.items())
            lines.append(f"{self.config_class.rpartition('.')[2]}({given})")
        lines += [f"- {reason}" for reason in self.reasons]
        if self.alternatives:
            lines.append("not taken:")
        for other in self.alternatives:
            too_much = ", does not fit" if self.fits and not other.fits else ""
            needs = "" if other.memory is None else f" ({_gb(other.memory)}{too_much})"
            lines.append(f"- {other.name}{needs}: {other.why_not}")
        return "\n".join(lines)


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
) -> Recommendation:
    """The method for the task and the data, in the first setting that fits the card.

    By data: fewer than 100 examples: IA3, which was made for them and beats in-context learning (arXiv 2205.05638).
    Fewer than 1,000: LoRA of a small rank. Up to 50,000, or unknown: LoRA of rank 16 on all linear layers, which is
    what it takes to match full fine-tuning (QLoRA, arXiv 2305.14314, section 4). More: rank 64, with rsLoRA's scale,
    without which a larger rank does not learn more (arXiv 2312.03732), since capacity is what LoRA lacks on large data
    (arXiv 2405.09673). A small encoder with up to 10,000 examples to classify, or an unknown number: BitFit, there
    competitive with full fine-tuning (arXiv 2106.10199). ``prefer="quality"``: DoRA for LoRA (arXiv 2402.09353), of
    twice the rank between 1,000 and 50,000 examples. Prompt tuning catches up only at 10 billion parameters (arXiv
    2104.08691), prefix tuning suits generation (arXiv 2101.00190), AdaLoRA a tight budget of parameters (arXiv
    2303.10512); bottleneck adapters (arXiv 1902.00751) can't be merged.

    By memory: 16-bit weights, then with gradient checkpointing (arXiv 1604.06174), then NF4 with double quantization,
    with which QLoRA matched 16-bit fine-tuning (arXiv 2305.14314), then both, then both with one sequence at a time.

    Args:
        model_size_b: billions of parameters; or a transformers configuration or model, which is then traced itself.
        gpu_memory_gb: of one card, GiB.
        task_type: PEFT's ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION") or
            a common name ("generation", "chat", "qa", "summarization", "classification", "ner", ...), in any case.
            "qa" and "summarization" are generated; spans are "extractive-qa".
        num_examples: to train on; None: unknown.
        batch_size, sequence_length: of one forward; more by accumulating gradients. The batch may be lowered to 1.
            Default: 1024 tokens, 512 of an encoder, or as many as a given model has positions for.
        prefer: "balanced" or "quality", which allows a slower step.
        dtype: of weights that are not quantized. optimizer, accelerated: see :func:`peft_ext.estimate_memory`.
        headroom: part of the card that tensors don't get; see :meth:`peft_ext.memory.MemoryEstimate.fits`.

    Returns: a Recommendation. It never recommends what does not fit: where nothing does, ``method`` is None and
    ``reasons`` say what would fit.

    Raises: TypeError or ValueError that names the argument, what came and what was wanted.
    """
    _check(gpu_memory_gb, num_examples, sequence_length, prefer, headroom)
    check_arguments(
        None, batch_size, sequence_length or 1, dtype, optimizer, None, 64, None, None, op="recommend_peft_method"
    )
    task = _task(task_type)
    given = not _is_number(model_size_b)
    subject = (_Given if given else _Synthetic)(model_size_b, task, sequence_length)
    length = subject.sequence_length
    search = _Search(subject, gpu_memory_gb, headroom, batch_size, length, dtype, optimizer, accelerated)
    return search.recommend(_ranked(subject, num_examples, prefer))


# --- arguments --------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(gpu_memory_gb: Any, num_examples: Any, sequence_length: Any, prefer: Any, headroom: Any) -> None:
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


def _task(task_type: Any) -> str:
    name = str(getattr(task_type, "value", task_type)).strip().lower().replace("_", "-").replace(" ", "-")
    if name not in _BY_NAME:
        wanted = "; ".join(f"{task} ({', '.join(names[1:])})" for task, names in _TASKS.items())
        raise ValueError(f"recommend_peft_method: task_type is {task_type!r}, wanted one of {wanted}")
    return _BY_NAME[name]


# --- the model --------------------------------------------------------------------------------------------------------


def _parameters(size_b: float) -> str:
    units = ((1.0, "billion"), (1e3, "million"), (1e6, "thousand"))
    size, unit = next(((size_b * n, unit) for n, unit in units if size_b * n >= 1), (size_b * 1e6, "thousand"))
    return f"{size:.0f} {unit} parameters" if size >= 10 else f"{size:.2g} {unit} parameters"


class _Given:
    """A model, or a configuration, of the user's."""

    def __init__(self, model: Any, task: str, sequence_length: Optional[int]) -> None:
        import transformers

        if not isinstance(model, (nn.Module, transformers.PretrainedConfig)):
            raise TypeError(f"recommend_peft_method: model_size_b is {type(model).__name__}, wanted billions of "
                            "parameters, a transformers configuration or a model")  # fmt: skip
        config = model if isinstance(model, transformers.PretrainedConfig) else getattr(model, "config", None)
        if not isinstance(config, transformers.PretrainedConfig) or hasattr(model, "peft_config"):
            what = "has adapters already" if hasattr(model, "peft_config") else "has no transformers configuration"
            raise TypeError(f"recommend_peft_method: model_size_b is a {type(model).__name__} that {what}, wanted a "
                            "model of transformers without any")  # fmt: skip
        encodes_decodes = bool(getattr(config, "is_encoder_decoder", False))
        self.task = "SEQ_2_SEQ_LM" if encodes_decodes and task == "CAUSAL_LM" else task
        self.model = model
        built = self._built()
        self.size_b = sum(p.numel() for p in built.parameters()) / 1e9
        self.has_biases = any(name.rpartition(".")[2] == "bias" for name, _ in built.named_parameters())
        self.is_encoder = not encodes_decodes and not _is_causal(built)
        positions = getattr(config, "max_position_embeddings", None)
        usual = 512 if self.is_encoder else 1024
        self.sequence_length = sequence_length or min(positions or usual, usual)
        if positions and self.sequence_length > positions:
            raise ValueError(f"recommend_peft_method: sequence_length is {sequence_length}, {type(built).__name__} has "
                             f"{positions} positions")  # fmt: skip
        self.about = f"{type(built).__name__}, {_parameters(self.size_b)}"

    def _built(self) -> nn.Module:
        return self.model if isinstance(self.model, nn.Module) else build_model(self.model, self.task)[0]

    def profile(self, **kwargs: Any) -> Profile:
        return profile_step(self.model, device="cuda", task_type=self.task, **kwargs)[0]


def _is_causal(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


class _Synthetic:
    """A model of a given size with the proportions of Llama, of BERT (a small one that classifies), or of T5.

    Layers L and width h grow together, h = 128 L from a billion parameters on and 64 L below (Llama 7B to 405B: 102 to
    130; GPT-2, BERT: 64), T5 85 L; the feed-forward layer takes up what rounding leaves. What a step needs grows
    linearly with L: it is traced for two and for three layers.
    """

    def __init__(self, size_b: float, task: str, sequence_length: Optional[int]) -> None:
        if not 0 < size_b <= _LARGEST_B:
            wanted = "a number above 0" if not size_b > _LARGEST_B else f"at most {_LARGEST_B} billion parameters"
            raise ValueError(f"recommend_peft_method: model_size_b is {size_b!r:.60}, wanted {wanted}")
        self.size_b, self.task = float(size_b), task
        self.is_encoder = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION") and size_b < 1
        self.has_biases = self.is_encoder
        self.sequence_length = sequence_length or (512 if self.is_encoder else 1024)
        family = "bert" if self.is_encoder else "t5" if task == "SEQ_2_SEQ_LM" else "llama"
        self.layers, self.make = _FAMILIES[family](size_b * 1e9, task, self.sequence_length)
        config = self.make(self.layers)
        self.about = f"a model like {config.model_type} with {self.layers} layers of width {config.hidden_size}"

    def profile(self, **kwargs: Any) -> Profile:
        def of(layers: int) -> Profile:
            return profile_step(self.make(layers), device="cuda", task_type=self.task, **kwargs)[0]

        return of(self.layers) if self.layers <= 3 else of(2).extrapolate(of(3), self.layers - 2)


_Family = tuple[int, Callable[[int], Any]]


def _shape(size: float, per_layer: float, ratio: float, head: int, step: int, embeddings: int) -> tuple[int, int]:
    """Layers and heads: ``size = per_layer · L · h² + embeddings · h`` with ``h = ratio · L``, heads in steps."""
    low, high = 0.5, 1e3
    for _ in range(60):
        layers = (low + high) / 2
        h = ratio * layers
        low, high = (layers, high) if per_layer * layers * h * h + embeddings * h < size else (low, layers)
    heads = max(step, round(ratio * low / head / step) * step)
    h = heads * head
    return max(1, round((size - embeddings * h) / (per_layer * h * h))), heads


def _wide(size: float, others: float, per_width: float, layers: int) -> int:
    """The width of the feed-forward layer that makes up the size."""
    return max(64, round((size - others) / (layers * per_width) / 64) * 64)


def _vocabulary(size: float, usual: int) -> int:
    """Not so large that a very small model would be embeddings alone."""
    return max(256, min(usual, int(size / 640)))


def _llama(size: float, task: str, _positions: int) -> _Family:
    from transformers import LlamaConfig

    small, tied = size < 1e9, size < 4e9
    head = 64 if small else 128
    vocab = _vocabulary(size, 49_152 if small else 128_256)
    embeddings = vocab * (1 if tied or task != "CAUSAL_LM" else 2)
    layers, heads = _shape(size, 13, 64 if small else 128, head, 4, embeddings)
    h = heads * head
    ffn = _wide(size, layers * 2.5 * h * h + embeddings * h, 3 * h, layers)
    return layers, lambda n: LlamaConfig(
        hidden_size=h, intermediate_size=ffn, num_hidden_layers=n, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip


def _bert(size: float, _task: str, positions: int) -> _Family:
    from transformers import BertConfig

    vocab = _vocabulary(size, 30_522)
    layers, heads = _shape(size, 12, 64, 64, 1, vocab)
    h = heads * 64
    ffn = _wide(size, layers * 4 * h * h + vocab * h, 2 * h, layers)
    return layers, lambda n: BertConfig(
        hidden_size=h, intermediate_size=ffn, num_hidden_layers=n, num_attention_heads=heads, vocab_size=vocab,
        max_position_embeddings=max(512, positions),
    )  # fmt: skip


def _t5(size: float, _task: str, _positions: int) -> _Family:
    from transformers import T5Config

    vocab = _vocabulary(size, 32_128)
    layers, heads = _shape(size, 27, 85, 64, 1, vocab)
    h = heads * 64
    ffn = _wide(size, layers * 12 * h * h + vocab * h, 6 * h, layers)
    return layers, lambda n: T5Config(
        d_model=h, d_kv=64, d_ff=ffn, num_layers=n, num_decoder_layers=n, num_heads=heads, vocab_size=vocab,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip


_FAMILIES: dict[str, Callable[[float, str, int], _Family]] = {"llama": _llama, "bert": _bert, "t5": _t5}


# --- the order of methods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A method, why it is not taken, what changes in its configuration, and why it comes first where it does."""

    method: str
    why_not: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


def _ranked(subject: Any, num_examples: Optional[int], prefer: str) -> list[_Candidate]:
    """The methods that the task allows, best first."""
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
    lora = _Candidate(
        "lora", not_lora, low_rank, f"{examples}: LoRA on all linear layers, as it takes to match full fine-tuning "
        f"(arXiv 2305.14314), of rank {rank}{enough}.",
    )  # fmt: skip
    rslora = _Candidate(
        "rslora", f"its scale matters at large ranks; at rank {rank} it is LoRA with another learning rate",
        {**low_rank, "lora_alpha": 16},
        f"{examples} need capacity: rank {rank} on all linear layers (arXiv 2405.09673), scaled by alpha/sqrt(r), so "
        "that the rank counts (arXiv 2312.03732).",
    )  # fmt: skip
    dora = _Candidate(
        "dora", "a little better than LoRA of the same rank (arXiv 2402.09353), for a slower step; prefer='quality' "
        "takes it", low_rank,
        f"{examples}, and quality is preferred: DoRA of rank {rank}, which learns magnitudes apart from directions and "
        "does better than LoRA of the same rank (arXiv 2402.09353).",
    )  # fmt: skip
    adalora = _Candidate(
        "adalora",
        "its gain is at very small budgets of parameters (arXiv 2303.10512); it needs total_step and a callback",
        {"init_r": rank * 3 // 2, "target_r": rank, "total_step": _steps(n), "lora_dropout": low_rank["lora_dropout"]},
    )  # fmt: skip
    ia3 = _Candidate(
        "ia3", "one vector a layer is for some tens of examples (arXiv 2205.05638)",
        why=f"{examples} are few: IA3 learns one vector a layer, was made for few-shot training and beats in-context "
        "learning (arXiv 2205.05638).",
    )  # fmt: skip
    bitfit = _Candidate(
        "bitfit", "competitive with full fine-tuning for small encoders and up to medium data alone (arXiv 2106.10199)",
        why=f"{examples} for a small encoder: BitFit trains the biases and the head, there competitive with full "
        "fine-tuning (arXiv 2106.10199).",
    )  # fmt: skip
    bottleneck = _Candidate(
        "bottleneck", "near full fine-tuning (arXiv 1902.00751), but it can't be merged: every layer stays slower"
    )
    prefix = _Candidate(
        "prefix", "good for generation from little data (arXiv 2101.00190), but it can't be merged, takes context, and "
        "does not work with gradient checkpointing",
    )  # fmt: skip
    prompt = _Candidate(
        "prompt", "slow to converge, can't be merged and takes context" if subject.size_b >= 10 else
        "catches up with other methods only from about 10 billion parameters on (arXiv 2104.08691)",
    )  # fmt: skip
    full = _Candidate(
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
    """Three epochs of batches of 16."""
    return 1000 if num_examples is None else max(100, 3 * num_examples // 16)


# --- the search -------------------------------------------------------------------------------------------------------


def _gb(memory: MemoryEstimate) -> str:
    return f"{memory.total / 2**30:.1f} GB"


@dataclass(frozen=True)
class _Setting:
    quantization: Optional[str]
    gradient_checkpointing: bool
    batch_size: int
    sequence_length: int


class _Search:
    def __init__(
        self, subject: Any, gpu_memory_gb: float, headroom: float, batch_size: int, sequence_length: int,
        dtype: torch.dtype, optimizer: str, accelerated: bool,
    ) -> None:  # fmt: skip
        self.subject, self.gpu_memory_gb, self.headroom = subject, gpu_memory_gb, headroom
        self.dense = str(dtype).removeprefix("torch.")
        self.fixed = {"dtype": dtype, "optimizer": optimizer, "accelerated": accelerated}
        settings = [_Setting(*setting, batch_size, sequence_length) for setting in _SETTINGS]
        settings += [_Setting(*_SETTINGS[-1], 1, sequence_length)] * (batch_size > 1)
        self.settings = settings
        self._known: dict[tuple[str, _Setting], Optional[MemoryEstimate]] = {}
        self._refused: dict[str, Exception] = {}

    def _fits(self, memory: MemoryEstimate) -> bool:
        return memory.fits(self.gpu_memory_gb, headroom=self.headroom)

    def _fields(self, candidate: _Candidate) -> tuple[str, dict[str, Any]]:
        path, fields = method_config(candidate.method, self.subject.task)
        return path, fields | dict(candidate.changes)

    def _memory(self, candidate: _Candidate, setting: _Setting) -> Optional[MemoryEstimate]:
        """None where the method does not work in this setting."""
        key = (candidate.method, setting)
        if key not in self._known:
            try:
                self._known[key] = self._estimate(candidate, setting)
            except (ValueError, RuntimeError) as error:
                if not isinstance(self.subject, _Given):
                    raise
                self._known[key] = None  # PEFT, or the model, refuses the method
                self._refused.setdefault(candidate.method, error)
        return self._known[key]

    def _estimate(self, candidate: _Candidate, setting: _Setting) -> Optional[MemoryEstimate]:
        if candidate.method == "full":
            if setting.quantization is not None:
                return None
            adapted: dict[str, Any] = {"method": "full"}
        elif candidate.method == "prefix" and setting.gradient_checkpointing:
            return None
        else:
            adapted = {"config": make_config(*self._fields(candidate))}
        profile = self.subject.profile(**adapted, **self.fixed, **vars(setting))
        name = _NAMES[candidate.method][setting.quantization is not None]
        return profile.estimate(f"{name} for {self.subject.about}")

    def recommend(self, ranked: list[_Candidate]) -> Recommendation:
        for candidate in ranked:
            if candidate.method == "full":
                continue
            least = self._memory(candidate, self.settings[-1])
            if least is not None and not self._fits(least):
                continue
            for setting in self.settings:
                memory = self._memory(candidate, setting)
                if memory is not None and self._fits(memory):
                    return self._found(candidate, setting, memory, ranked)
        return self._nothing(ranked)

    def _found(
        self, chosen: _Candidate, setting: _Setting, memory: MemoryEstimate, ranked: list[_Candidate]
    ) -> Recommendation:
        name = _NAMES[chosen.method][setting.quantization is not None]
        why = chosen.why if chosen is ranked[0] else f"{name} is the first that fits; {chosen.why_not}."
        reasons = [why[0].upper() + why[1:], *self._setting_reasons(setting, memory)]
        reasons += [f"{_NAMES[other.method][0]} would come before it, but {self._refusal(other) or 'does not fit'}."
                    for other in ranked[: ranked.index(chosen)]]  # fmt: skip
        path, fields = self._fields(chosen)
        return Recommendation(
            method=chosen.method, name=name, **vars(setting),
            config_class=path, config_kwargs=MappingProxyType(fields), memory=memory,
            gpu_memory_gb=self.gpu_memory_gb, headroom=self.headroom, reasons=tuple(reasons),
            alternatives=self._alternatives(ranked, setting, chosen),
        )  # fmt: skip

    def _refusal(self, candidate: _Candidate) -> Optional[str]:
        error = self._refused.get(candidate.method)
        return None if error is None else f"it can't adapt this model ({str(error).strip().splitlines()[0]})"

    def _alternatives(
        self, ranked: list[_Candidate], setting: _Setting, chosen: Optional[_Candidate]
    ) -> tuple[Alternative, ...]:
        found = []
        for other in ranked:
            if other is chosen:
                continue
            # Full fine-tuning has no quantized weights: it is shown as it would have to run.
            at = setting if other.method != "full" else replace(setting, quantization=None)
            memory = self._memory(other, at)
            fits = memory is not None and self._fits(memory)
            name = _NAMES[other.method][at.quantization is not None]
            why_not = self._refusal(other) or ("it does not fit" if chosen is None else other.why_not)
            found.append(Alternative(other.method, name, why_not, memory, fits))
        return tuple(found)

    def _setting_reasons(self, setting: _Setting, memory: MemoryEstimate) -> list[str]:
        left = f"{memory.total / 2**30:.1f} of {self.gpu_memory_gb:g} GB"
        reasons = []
        if setting.quantization is not None:
            reasons.append(f"{self.dense} weights do not fit: they are quantized to NF4, {memory.weights / 2**30:.1f} "
                           "GB, with which QLoRA matched 16-bit fine-tuning (arXiv 2305.14314).")  # fmt: skip
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

    def _nothing(self, ranked: list[_Candidate]) -> Recommendation:
        """The least that a method needs, and what would fit."""
        setting = self.settings[-1]
        needs = [(candidate, self._memory(candidate, setting)) for candidate in ranked]
        needs = [(candidate, memory) for candidate, memory in needs if memory is not None]
        if not needs:
            raise next(iter(self._refused.values()))
        least, memory = min(needs, key=lambda pair: pair[1].total)
        name = _NAMES[least.method][True]
        usable = (1 - self.headroom) * self.gpu_memory_gb * 2**30
        wanted = memory.total / (1 - self.headroom) / 2**30
        card = next((size for size in _CARDS if size >= wanted), None)
        reasons = [
            f"Nothing fits: the least is {name} with gradient checkpointing and one sequence of "
            f"{setting.sequence_length} tokens, {_gb(memory)}, and {self.gpu_memory_gb:g} GB leave "
            f"{usable / 2**30:.1f} GB for tensors.",
            f"A card of {card} GB would do." if card else
            f"It takes {wanted:.0f} GB: more than one card (FSDP with QLoRA), or weights offloaded to the host.",
        ]  # fmt: skip
        if (shorter := self._shorter(least, setting)) is not None:
            reasons.append(f"Sequences of {shorter} tokens would fit.")
        held = memory.weights + memory.quantization
        smaller = self.subject.size_b * (usable - (memory.total - held)) / held if held else 0.0
        if smaller > 0:
            reasons.append(f"A model of about {_parameters(smaller)} would fit.")
        return Recommendation(
            method=None, name="nothing fits", **vars(setting), config_class="", config_kwargs=MappingProxyType({}),
            memory=memory, gpu_memory_gb=self.gpu_memory_gb, headroom=self.headroom, reasons=tuple(reasons),
            alternatives=self._alternatives(ranked, setting, None),
        )  # fmt: skip

    def _shorter(self, candidate: _Candidate, setting: _Setting) -> Optional[int]:
        """The longest power-of-two part of the sequence, of at least 64 tokens, that fits."""
        length = setting.sequence_length // 2
        while length >= 64:
            memory = self._memory(candidate, _Setting(setting.quantization, True, 1, length))
            if memory is not None and self._fits(memory):
                return length
            length //= 2
        return None
