"""The models that a recommendation traces: the user's model, or a model of a given size with the proportions of a
family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from torch import nn

from ..memory import Profile, profile_step
from ..memory.stand_ins import build_model
from ..methods import METHODS
from ..nn.experts import adapter_fields
from ..sources.model import text_targets

_LARGEST_B = 1_000_000


def parameters_text(size_b: float) -> str:
    """Returns a number of parameters, given in billions, as text, such as "7 billion parameters"."""
    units = ((1.0, "billion"), (1e3, "million"), (1e6, "thousand"))
    size, unit = next(((size_b * n, unit) for n, unit in units if size_b * n >= 1), (size_b * 1e6, "thousand"))
    return f"{size:.0f} {unit} parameters" if size >= 10 else f"{size:.2g} {unit} parameters"


class Given:
    """A model or a transformers configuration that the user gave."""

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
        built = self._built = model if isinstance(model, nn.Module) else build_model(model, self.task)[0]
        self.size_b = sum(p.numel() for p in built.parameters()) / 1e9
        self.has_biases = any(name.rpartition(".")[2] == "bias" for name, _ in built.named_parameters())
        is_causal = any(getattr(module, "is_causal", False) is True for module in built.modules())
        self.is_encoder = not encodes_decodes and not is_causal
        positions = getattr(config, "max_position_embeddings", None)
        usual = 512 if self.is_encoder else 1024
        self.sequence_length = sequence_length or min(positions or usual, usual)
        if positions and self.sequence_length > positions:
            raise ValueError(f"recommend_peft_method: sequence_length is {sequence_length}, {type(built).__name__} has "
                             f"{positions} positions")  # fmt: skip
        self.about = f"{type(built).__name__}, {parameters_text(self.size_b)}"

    def fields(self, method: str, excluded: Optional[str]) -> dict[str, Any]:
        """Returns the fields with which a method's configuration adapts the model's experts, and those that keep the
        adapter out of the modules beside the text decoder, such as a vision tower.

        ``excluded``: expression that matches the names of the modules that the configuration excludes so far.
        """
        if method not in METHODS:  # full fine-tuning has no configuration
            return {}
        return adapter_fields(self._built, method) | text_targets(self._built, method, excluded)

    def profile(self, **kwargs: Any) -> Profile:
        return profile_step(self.model, device="cuda", task_type=self.task, **kwargs)[0]


class Synthetic:
    """A model of a given size with the proportions of BERT, of T5 or of Llama.

    Models of less than a billion parameters for classification, question answering or features are like BERT, models
    for "SEQ_2_SEQ_LM" are like T5, and all other models are like Llama. A model's width h is proportional to its number
    of layers L. In models like Llama, h = 128 L from a billion parameters on (in Llama 7B to 405B, h is 102 L to 130
    L), and h = 64 L below a billion parameters (as in the smallest GPT-2). In models like BERT h = 64 L, in models like
    T5 h = 85 L. L and h are rounded; the width of the feed-forward layers is then chosen so that the model has about
    the given size. For a model with more than three layers, the steps of models of equal width with two and with three
    layers are traced, and the memory is extrapolated (see :meth:`peft_ext.memory.Profile.extrapolate`).
    """

    def __init__(self, size_b: float, task: str, sequence_length: Optional[int]) -> None:
        if not 0 < size_b <= _LARGEST_B:
            wanted = "a number above 0" if not size_b > _LARGEST_B else f"at most {_LARGEST_B} billion parameters"
            raise ValueError(f"recommend_peft_method: model_size_b is {size_b!r:.60}, wanted {wanted}")
        self.size_b, self.task = float(size_b), task
        self.is_encoder = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION") and size_b < 1
        self.has_biases = self.is_encoder
        self.sequence_length = sequence_length or (512 if self.is_encoder else 1024)
        self.layers, self.make = _family(size_b * 1e9, task, self.sequence_length, self.is_encoder)
        config = self.make(self.layers)
        self.about = f"a model like {config.model_type} with {self.layers} layers of width {config.hidden_size}"

    def fields(self, method: str, excluded: Optional[str]) -> dict[str, Any]:
        return {}

    def profile(self, **kwargs: Any) -> Profile:
        def of(layers: int) -> Profile:
            return profile_step(self.make(layers), device="cuda", task_type=self.task, **kwargs)[0]

        return of(self.layers) if self.layers <= 3 else of(2).extrapolate(of(3), self.layers - 2)


def _shape(size: float, per_layer: float, ratio: float, head: int, step: int, embeddings: int) -> tuple[int, int]:
    """Returns the numbers of layers and of attention heads of a model with about ``size`` parameters.

    The number of layers L and the width h solve ``size = per_layer · L · h² + embeddings · h`` with ``h = ratio · L``.
    Then h is rounded to ``heads · head``, where the number of heads is a multiple of ``step``.
    """
    low, high = 0.5, 1e3
    for _ in range(60):
        layers = (low + high) / 2
        h = ratio * layers
        low, high = (layers, high) if per_layer * layers * h * h + embeddings * h < size else (low, layers)
    heads = max(step, round(ratio * low / head / step) * step)
    h = heads * head
    return max(1, round((size - embeddings * h) / (per_layer * h * h))), heads


def _family(size: float, task: str, positions: int, is_encoder: bool) -> tuple[int, Callable[[int], Any]]:
    """Returns the number of layers for ``size`` parameters, and a function that makes a configuration with a given
    number of layers."""
    import transformers as hf

    small, tied = size < 1e9, size < 4e9

    def shaped(per_layer: float, ratio: float, head: int, step: int, vocab: int, times: int = 1) -> tuple[int, ...]:
        # A very small model gets a small vocabulary. With the usual vocabulary, nearly all parameters would be
        # embeddings.
        vocab = max(256, min(vocab, int(size / 640)))
        return vocab, *_shape(size, per_layer, ratio, head, step, vocab * times), vocab * times

    def wide(others: float, per_width: float) -> int:
        """Returns the width of the feed-forward layers with which the model has about ``size`` parameters."""
        return max(64, round((size - others) / (layers * per_width) / 64) * 64)

    if is_encoder:
        vocab, layers, heads, _ = shaped(12, 64, 64, 1, 30_522)
        h = heads * 64
        ffn = wide(layers * 4 * h * h + vocab * h, 2 * h)
        return layers, lambda n: hf.BertConfig(
            hidden_size=h, intermediate_size=ffn, num_hidden_layers=n, num_attention_heads=heads, vocab_size=vocab,
            max_position_embeddings=max(512, positions),
        )  # fmt: skip
    if task == "SEQ_2_SEQ_LM":
        vocab, layers, heads, _ = shaped(27, 85, 64, 1, 32_128)
        h = heads * 64
        ffn = wide(layers * 12 * h * h + vocab * h, 6 * h)
        return layers, lambda n: hf.T5Config(
            d_model=h, d_kv=64, d_ff=ffn, num_layers=n, num_decoder_layers=n, num_heads=heads, vocab_size=vocab,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )  # fmt: skip
    head = 64 if small else 128
    vocab, layers, heads, embeddings = shaped(
        13, head, head, 4, 49_152 if small else 128_256, 1 if tied or task != "CAUSAL_LM" else 2
    )
    h = heads * head
    ffn = wide(layers * 2.5 * h * h + embeddings * h, 3 * h)
    return layers, lambda n: hf.LlamaConfig(
        hidden_size=h, intermediate_size=ffn, num_hidden_layers=n, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip
