"""Compares the logits of a merged GGUF file with the logits of its base with the unmerged adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from ..gguf import GgufError, read_header
from ..model import load_adapter
from ..quantize import dequantize_packed
from ..sources.model import hushed, load_tokenizer
from .errors import as_merge_error

TEXT = (
    "The harbour of the old town freezes in January. Fishermen then mend their nets, and children skate between the "
    "boats. In March the ice breaks in one night, with a noise like thunder. How many boats can leave the harbour on "
    "the next morning? Seven large boats and twelve small ones lie at the pier; two of the large boats are too heavy."
)
_TOKENS = 256  # the logits of at most this many tokens are compared, the first of the text


@dataclass(frozen=True)
class LogitsError:
    """Differences of the merged model's logits from the logits of the base with the unmerged adapter.

    Attributes:
        tokens: number of tokens whose logits were compared.
        error: ‖L' − L‖ / ‖L‖ of the merged model's logits L' and the logits L of the base with the unmerged adapter.
            The mean over the vocabulary is subtracted from the logits of each token.
        change: ‖L' − L‖ / ‖L‖ where L' are the logits of the base without the adapter, for comparison.
        divergence: mean over the tokens of the Kullback-Leibler divergence KL(P ‖ P') in nats, where P and P' are the
            distributions of the next token in the unmerged and in the merged model.
        same_token: part of the tokens after which both models have the same most probable next token.
    """

    tokens: int
    error: float
    change: float
    divergence: float
    same_token: float


def compare_logits(
    base: Union[str, Path], adapter: Union[str, Path], merged: Union[str, Path], text: str = TEXT
) -> LogitsError:
    """Compares the logits of ``merged`` and of ``base`` with ``adapter`` on ``text``. The base and the merged model are
    loaded one after the other, in float32.

    If the base's file has no tokenizer, 64 random tokens take the place of ``text``.

    Raises: MergeError where a model can't be loaded; OSError where a file can't be read.
    """
    with hushed(), torch.no_grad(), as_merge_error(GgufError, ValueError, TypeError, about="comparing logits: "):
        model = _load(base)
        tokens = _tokens(Path(base), text, model.config.vocab_size)
        without = _logits(model, tokens)
        with_adapter = _logits(_adapted(base, model, adapter), tokens)
        del model
        found = _logits(_load(merged), tokens)
    wanted = with_adapter.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean()
    same = (with_adapter.argmax(-1) == found.argmax(-1)).double().mean()
    return LogitsError(tokens.shape[1], _difference(found, with_adapter), _difference(without, with_adapter),
                       divergence.item(), same.item())  # fmt: skip


def _load(file: Union[str, Path]) -> Any:
    # gguf.load is imported here and not at the top, because it needs a version of transformers that reads GGUF.
    from ..gguf.load import load_gguf

    return load_gguf(file, dtype=torch.float32)


def _tokens(base: Path, text: str, vocabulary: int) -> Tensor:
    if "tokenizer.ggml.tokens" not in read_header(base):
        return torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0))
    return load_tokenizer(str(base))(text, return_tensors="pt").input_ids[:, :_TOKENS]


def _adapted(base: Union[str, Path], model: Any, adapter: Union[str, Path]) -> Any:
    try:
        return load_adapter(model, adapter)
    except (TypeError, ValueError, RuntimeError):  # adapters that replace whole weights need dense layers
        return load_adapter(dequantize_packed(_load(base)), adapter)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model.eval()(tokens, use_cache=False).logits[0].double()


def _difference(one: Tensor, other: Tensor) -> float:
    one, other = (t - t.mean(-1, keepdim=True) for t in (one, other))
    return (torch.dist(one, other) / other.norm()).item()
