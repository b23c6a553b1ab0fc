"""Prompt tuning: trained embeddings that are put before the token embeddings of a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..ops.checks import check_dtype, check_float


class VirtualTokens(nn.Module):
    """Base class of trained virtual tokens: ``embedding [num_virtual_tokens, width]``, put before each sequence.

    A subclass defines ``reset_parameters`` and the meaning of the embedding's width. PEFT's modules of virtual tokens
    have the same state dict key, ``embedding.weight``.
    """

    def _hold(self, num_virtual_tokens: int, width: int, device: Any, dtype: torch.dtype) -> None:
        check_dtype(type(self).__name__, dtype)
        self.num_virtual_tokens = num_virtual_tokens
        self.embedding = nn.Embedding(num_virtual_tokens, width, device=device, dtype=dtype)

    @classmethod
    def _check_count(cls, argument: str, value: object) -> None:
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{cls.__name__}: {argument} is {value!r}, wanted an integer of at least 1")

    def _for_each(self, rows: Tensor, dim: int, batch_size: int, dtype: Optional[torch.dtype]) -> Tensor:
        """Returns ``rows`` in ``dtype``, expanded to ``batch_size`` at a new dimension ``dim``. The result is a view of
        ``rows`` unless ``dtype`` needs a cast."""
        self._check_count("batch_size", batch_size)
        if dtype is not None:
            check_dtype(type(self).__name__, dtype)
        sizes = list(rows.shape)
        sizes.insert(dim, batch_size)
        if rows.requires_grad and torch.is_grad_enabled():
            # The cast is last, so that the backward sums the gradient over the batch in the parameters' dtype.
            return rows.unsqueeze(dim).expand(sizes).to(dtype or rows.dtype)
        return rows.to(dtype or rows.dtype).unsqueeze(dim).expand(sizes)

    def _extend(self, argument: str, value: object, fill: int, shape: Optional[tuple[int, int]] = None) -> Tensor:
        """Returns ``value [B, T]`` with ``num_virtual_tokens`` more columns of ``fill`` at the front, in ``value``'s
        dtype."""
        name = type(self).__name__
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {argument} is {type(value).__name__}, wanted a Tensor")
        if value.dim() != 2 or shape not in (None, tuple(value.shape)):
            raise ValueError(f"{name}: {argument} has shape {tuple(value.shape)}, wanted {shape or '[B, T]'}")
        return nn.functional.pad(value, (self.num_virtual_tokens, 0), value=fill)

    def extend_mask(self, attention_mask: Tensor) -> Tensor:
        """Returns a mask ``[B, num_virtual_tokens + T]``: ones before ``attention_mask [B, T]``, in the same dtype."""
        return self._extend("attention_mask", attention_mask, 1)

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Copies ``prompt_embeddings``, the tensor of this name in PEFT's adapter file, into ``embedding.weight``.

        Raises TypeError if ``prompt_embeddings`` is no float tensor, and ValueError if its shape is not the shape of
        ``embedding.weight``. For prompt tuning of an encoder-decoder model PEFT saves twice as many rows and uses the
        first half of the rows: pass only the first half.
        """
        name, weight = type(self).__name__, self.embedding.weight
        check_float(name, "prompt_embeddings", prompt_embeddings)
        if prompt_embeddings.shape != weight.shape:
            raise ValueError(
                f"{name}: prompt_embeddings has shape {tuple(prompt_embeddings.shape)}, wanted {tuple(weight.shape)}"
            )
        weight.copy_(prompt_embeddings)


class PromptEmbedding(VirtualTokens):
    """``Y = [P; X]``: trained embeddings P before the embeddings X of each sequence (prompt tuning, arXiv 2104.08691).

    X ``[B, T, token_dim]``, P ``[num_virtual_tokens, token_dim]``, Y ``[B, num_virtual_tokens + T, token_dim]`` in X's
    dtype. Use the prompt with a frozen model as follows::

        model(**prompt.prepend(model.get_input_embeddings()(input_ids), attention_mask, labels))

    The first ``num_virtual_tokens`` positions of the model's output are those of the prompt: drop them. The forward
    saves no tensor for the backward.

    Args:
        num_virtual_tokens: number of rows of P. token_dim: width of the model's token embeddings.
        device, dtype: device and dtype of the parameter; default dtype float32 for every dtype of the model.

    ``embedding.weight`` starts with normal random numbers, as in ``nn.Embedding`` and by default in PEFT.
    :meth:`from_vocab` and :meth:`from_text` start from the model's own embeddings. The state dict has the key and row
    layout of ``peft.tuners.PromptEmbedding``. Raises ValueError for a size below 1, TypeError for a dtype that is not a
    float dtype.
    """

    def __init__(
        self, num_virtual_tokens: int, token_dim: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self._check_count("num_virtual_tokens", num_virtual_tokens)
        self._check_count("token_dim", token_dim)
        self.token_dim = token_dim
        self._hold(num_virtual_tokens, token_dim, device, dtype)

    @classmethod
    def from_vocab(
        cls,
        embedding: nn.Module,
        num_virtual_tokens: int,
        generator: Optional[torch.Generator] = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> PromptEmbedding:
        """Returns a prompt that starts as the embeddings of random tokens, as PEFT's SAMPLE_VOCAB does.

        Tokens are drawn uniformly from the vocabulary, with repetition. ``generator`` draws the tokens on its device;
        by default the CPU's default generator draws the tokens. ``embedding`` is ``model.get_input_embeddings()``. The
        rows come from a call of ``embedding``, so that an embedding that scales its rows gives the model's actual
        inputs. The prompt keeps no reference to ``embedding``.
        """
        cls._check_count("num_virtual_tokens", num_virtual_tokens)
        device = "cpu" if generator is None else generator.device
        ids = torch.randint(_vocabulary(cls, embedding), (num_virtual_tokens,), generator=generator, device=device)
        return cls._from_tokens(embedding, ids, dtype)

    @classmethod
    def from_text(
        cls,
        text: str,
        tokenizer: Callable[[str], Any],
        embedding: nn.Module,
        num_virtual_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> PromptEmbedding:
        """Returns a prompt that starts as the embeddings of ``text``'s tokens, as PEFT's TEXT does.

        The tokens of the text are cut off or repeated, so that the prompt has ``num_virtual_tokens`` tokens.
        ``tokenizer(text)["input_ids"]`` gives the tokens, special tokens included, as with a Transformers tokenizer.
        :meth:`from_vocab` explains ``embedding``. Raises ValueError for a text without tokens, for a text with a token
        for which ``embedding`` has no row, and for a size below 1; TypeError for a text that is no str, an
        ``embedding`` without a weight, or a dtype that is no float dtype.
        """
        cls._check_count("num_virtual_tokens", num_virtual_tokens)
        if not isinstance(text, str):
            raise TypeError(f"{cls.__name__}: text is {type(text).__name__}, wanted str")
        vocabulary, tokens = _vocabulary(cls, embedding), list(tokenizer(text)["input_ids"])
        if not tokens:
            raise ValueError(f"{cls.__name__}: text is {text!r}, which has no tokens; wanted at least one")
        if max(tokens) >= vocabulary:
            raise ValueError(f"{cls.__name__}: text has token {max(tokens)}, embedding has {vocabulary} rows")
        ids = list(itertools.islice(itertools.cycle(tokens), num_virtual_tokens))
        return cls._from_tokens(embedding, torch.tensor(ids, dtype=torch.int64), dtype)

    @classmethod
    @torch.no_grad()
    def _from_tokens(cls, embedding: nn.Module, ids: Tensor, dtype: torch.dtype) -> PromptEmbedding:
        check_dtype(cls.__name__, dtype)
        rows = embedding(ids.to(embedding.weight.device))
        module = cls(*rows.shape, device="meta", dtype=dtype)
        module.embedding.weight = nn.Parameter(rows.to(dtype))
        return module

    def reset_parameters(self) -> None:
        """Initializes the embedding again, from the normal distribution."""
        self.embedding.reset_parameters()

    def prompt(self, batch_size: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        """Returns P for each sequence of a batch, ``[batch_size, num_virtual_tokens, token_dim]``.

        The result is a view of P unless ``dtype`` needs a cast.
        """
        return self._for_each(self.embedding.weight, 0, batch_size, dtype)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        name, weight = type(self).__name__, self.embedding.weight
        check_float(name, "inputs_embeds", inputs_embeds)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.token_dim:
            raise ValueError(
                f"{name}: inputs_embeds has shape {tuple(inputs_embeds.shape)}, wanted [B, T, {self.token_dim}]"
            )
        if inputs_embeds.device != weight.device:
            raise ValueError(f"{name}: inputs_embeds is on {inputs_embeds.device}, embedding is on {weight.device}")
        return torch.cat((self.prompt(inputs_embeds.shape[0], inputs_embeds.dtype), inputs_embeds), dim=1)

    def extend_labels(self, labels: Tensor) -> Tensor:
        """Returns labels ``[B, num_virtual_tokens + T]``: -100, which the loss ignores, before ``labels [B, T]``."""
        return self._extend_labels(labels)

    def _extend_labels(self, labels: Tensor, shape: Optional[tuple[int, int]] = None) -> Tensor:
        if isinstance(labels, Tensor) and labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{type(self).__name__}: labels is {labels.dtype}, wanted torch.int64 or torch.int32")
        return self._extend("labels", labels, -100, shape)

    def prepend(
        self,
        inputs_embeds: Tensor,
        attention_mask: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        token_type_ids: Optional[Tensor] = None,
    ) -> dict[str, Tensor]:
        """Returns the keyword arguments for a model: every given argument extended by the prompt, under its own name.

        ``attention_mask``, ``labels`` and ``token_type_ids`` are ``[B, T]``; the prompt's token type is 0. An argument
        that is None is not in the returned dict. A model that gets no ``attention_mask`` attends to all positions, the
        prompt included. Pass ``labels`` only if there is one label for each token.
        """
        extended = {"inputs_embeds": self(inputs_embeds)}
        shape = tuple(inputs_embeds.shape[:2])
        if attention_mask is not None:
            extended["attention_mask"] = self._extend("attention_mask", attention_mask, 1, shape)
        if labels is not None:
            extended["labels"] = self._extend_labels(labels, shape)
        if token_type_ids is not None:
            extended["token_type_ids"] = self._extend("token_type_ids", token_type_ids, 0, shape)
        return extended

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, token_dim={self.token_dim}"


def _vocabulary(cls: type, embedding: object) -> int:
    """Returns the number of tokens in the vocabulary of ``embedding``."""
    if not isinstance(embedding, nn.Module) or not isinstance(getattr(embedding, "weight", None), Tensor):
        raise TypeError(
            f"{cls.__name__}: embedding is {type(embedding).__name__}, wanted a module of token embeddings with a "
            "weight [vocabulary, token_dim]"
        )
    return getattr(embedding, "num_embeddings", embedding.weight.shape[0])
