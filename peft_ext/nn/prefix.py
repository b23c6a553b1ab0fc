"""Prefix tuning: trained keys and values that each attention layer puts before the keys and values of a sequence."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .._imports import required
from .prompt import VirtualTokens


class PrefixEncoder(VirtualTokens):
    """``K_l = [P_k,l; K_l]``, ``V_l = [P_v,l; V_l]``: trained keys and values before the keys and values of each
    attention layer l (prefix tuning, arXiv 2101.00190).

    The prefix P is the embedding E, or with ``projection`` ``P = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂``. P has shape
    ``[num_virtual_tokens, num_layers·2·kv_dim]`` with kv_dim = num_kv_heads·head_dim. A row of P holds, for each layer,
    the keys of all heads and then the values of all heads. Use the prefix with a frozen Transformers model as follows,
    or call ``model.generate`` with the same arguments::

        model(input_ids, attention_mask=prefix.extend_mask(attention_mask),
              past_key_values=prefix.past_key_values(batch_size, model.config))

    In Transformers 5.24 the new name of the argument ``past_key_values`` is ``cache``, and both names are accepted. The
    prefix does not change the length of logits and labels.

    Args:
        num_layers, num_kv_heads, head_dim: sizes of the model's attention; num_kv_heads counts the heads of the keys.
        num_virtual_tokens: number of positions in the prefix.
        projection: whether an MLP computes the prefix P from the embedding E. The MLP is needed in training only, see
            :meth:`bake`.
        hidden_size: hidden width of the MLP; default token_dim.
        token_dim: width of the embedding E if the MLP is used; default kv_dim, as in PEFT.
        init_weights: "zero": P starts as zeros, which still take part in the attention; None: the parameters start as
            ``nn.Embedding`` and ``nn.Linear`` initialize them.
        device, dtype: device and dtype of the parameters; default dtype float32 for every dtype of the model.

    The state dict has the keys and row layout of ``peft.tuners.PrefixEncoder``: ``embedding.weight`` and, with
    ``projection``, ``transform.0.*`` and ``transform.2.*``. Raises ValueError for a size below 1, for hidden_size or
    token_dim without ``projection``, and for an unknown init_weights. Raises TypeError for a dtype that is not a float
    dtype.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_virtual_tokens: int,
        *,
        projection: bool = False,
        hidden_size: Optional[int] = None,
        token_dim: Optional[int] = None,
        init_weights: Optional[str] = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for argument, value in {**sizes, "num_virtual_tokens": num_virtual_tokens}.items():
            self._check_count(argument, value)
        for argument, value in {"hidden_size": hidden_size, "token_dim": token_dim}.items():
            if value is not None:
                self._check_count(argument, value)
                if not projection:
                    raise ValueError(f"PrefixEncoder: {argument} is {value}, wanted None without projection")
        if init_weights not in (None, "zero"):
            raise ValueError(f"PrefixEncoder: init_weights is {init_weights!r}, wanted None or 'zero'")
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.projection, self.init_weights = projection, init_weights
        self.token_dim = token_dim or num_kv_heads * head_dim
        self.hidden_size = hidden_size or self.token_dim
        width = num_layers * 2 * num_kv_heads * head_dim
        self._hold(num_virtual_tokens, self.token_dim if projection else width, device, dtype)
        self.transform: Optional[nn.Sequential] = None
        if projection:
            self.transform = nn.Sequential(
                nn.Linear(self.token_dim, self.hidden_size, device=device, dtype=dtype),
                nn.Tanh(),
                nn.Linear(self.hidden_size, width, device=device, dtype=dtype),
            )
        self._zero()

    @classmethod
    def from_config(
        cls,
        model_config: Any,
        num_virtual_tokens: int,
        *,
        projection: bool = False,
        hidden_size: Optional[int] = None,
        token_dim: Optional[int] = None,
        init_weights: Optional[str] = None,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> PrefixEncoder:
        """Returns a prefix whose num_layers, num_kv_heads and head_dim come from a Transformers configuration.

        All other arguments of ``from_config`` are passed to the constructor of PrefixEncoder. The sizes num_layers,
        num_kv_heads and head_dim are those of the decoder in an encoder-decoder model, and those of the text model in a
        multimodal model. If layers differ in head_dim (Gemma 4), the widest head_dim is used, and a layer with a
        smaller head_dim reads the first numbers of each head. A layer with more key heads than num_kv_heads gets no
        prefix, with a warning. Raises ValueError if the configuration lacks a size, if its hidden_size gives no whole
        head_dim, or if keys and values have different widths (multi-head latent attention), and the errors of
        PrefixEncoder.
        """
        layers = _layers(model_config)
        sizes = _widest(layers)
        if left_out := [i for i, (heads, _) in enumerate(layers) if heads > sizes[1]]:
            warnings.warn(
                f"PrefixEncoder: layers {left_out} have more than {sizes[1]} key heads and get no prefix", stacklevel=2
            )
        return cls(
            *sizes, num_virtual_tokens, projection=projection, hidden_size=hidden_size, token_dim=token_dim,
            init_weights=init_weights, device=device, dtype=dtype,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Initializes the parameters again, as the constructor does."""
        self.embedding.reset_parameters()
        if self.transform is not None:
            self.transform[0].reset_parameters()
            self.transform[2].reset_parameters()
        self._zero()

    def _zero(self) -> None:
        if self.init_weights == "zero":
            last = self.embedding if self.transform is None else self.transform[2]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def flattened(self) -> Tensor:
        """Returns P ``[num_virtual_tokens, num_layers·2·kv_dim]``, the tensor that PEFT saves as ``prompt_embeddings``.

        Without the MLP, P is the parameter ``embedding.weight`` itself.
        """
        weight = self.embedding.weight
        return weight if self.transform is None else self.transform(weight)

    @torch.no_grad()
    def bake(self) -> PrefixEncoder:
        """Returns a PrefixEncoder without MLP, whose embedding is this module's prefix P, so that keys and values do
        not change."""
        weight = self.embedding.weight
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim, self.num_virtual_tokens)
        module = PrefixEncoder(*sizes, device="meta", dtype=weight.dtype)
        rows = self.flattened().to(weight.dtype, copy=True)
        module.embedding.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
        return module.train(self.training)

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Copies ``prompt_embeddings`` into the embedding; see :meth:`PromptEmbedding.load_prompt_embeddings`, whose
        errors this method raises too.

        Raises ValueError with ``projection``, because the MLP's parameters can't be computed from P.
        """
        if self.projection:
            raise ValueError("PrefixEncoder: projection is True, wanted False to load prompt_embeddings")
        super().load_prompt_embeddings(prompt_embeddings)

    def forward(self, batch_size: int, dtype: Optional[torch.dtype] = None) -> Tensor:
        """Returns the keys ``[:, 0]`` and values ``[:, 1]`` of each layer, repeated for each sequence of the batch.

        The result has shape ``[num_layers, 2, batch_size, num_kv_heads, num_virtual_tokens, head_dim]`` and dtype
        ``dtype``, default the parameters' dtype. One call runs the MLP once, for any batch size. The result is a view
        of :meth:`flattened` unless ``dtype`` needs a cast.
        """
        shape = (self.num_virtual_tokens, self.num_layers, 2, self.num_kv_heads, self.head_dim)
        return self._for_each(self.flattened().view(shape).permute(1, 2, 3, 0, 4), 2, batch_size, dtype)

    def past_key_values(
        self,
        batch_size: int,
        config: Any = None,
        *,
        dtype: Optional[torch.dtype] = None,
        peft_order: bool = True,
    ) -> Any:
        """Returns a cache that holds the prefix. Call ``past_key_values`` before each forward, because a model appends
        the keys and values of the forward to the cache.

        Args:
            config: the model's configuration. With ``config``, a sliding-window layer drops positions outside of the
                window, a layer that stores no keys or has more key heads than the prefix gets no prefix, and an
                encoder-decoder model gets an EncoderDecoderCache with the prefix in the decoder's self-attention.
                Without ``config``, the cache is a plain DynamicCache.
            dtype: dtype that the model computes in; default config's dtype, or else the parameters' dtype. If the model
                was cast to another dtype after it was made, pass ``dtype=model.dtype``.
            peft_order: in an encoder-decoder model, whether layer i gets the prefix ``2i mod num_layers``, as in PEFT,
                so that an adapter from PEFT gives the same results as in PEFT. With an even number of layers PEFT's
                order uses half of the prefixes twice and the other half never. With peft_order False, layer i gets the
                prefix i.

        Activation checkpointing turns the cache off, and so the prefix is not used. Raises ValueError if the number of
        layers, key heads or head_dim of config differ from the sizes of this prefix.
        """
        with required("transformers", "PrefixEncoder.cache"):
            from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

        if config is None:
            return DynamicCache(list(self(batch_size, dtype)))
        layers = _layers(config)
        if (wanted := _widest(layers)) != (own := (self.num_layers, self.num_kv_heads, self.head_dim)):
            raise ValueError(
                f"PrefixEncoder: num_layers, num_kv_heads, head_dim are {own}, wanted {wanted} as config has them"
            )
        if dtype is None and isinstance(getattr(config, "dtype", None), torch.dtype):
            dtype = config.dtype
        prefix = self(batch_size, dtype)
        if getattr(config, "is_encoder_decoder", False):
            order = [2 * i % self.num_layers if peft_order else i for i in range(self.num_layers)]
            # The cache of the cross-attention starts empty, and the first forward fills it from the encoder's output.
            return EncoderDecoderCache(DynamicCache([tuple(prefix[i]) for i in order]), DynamicCache())
        cache = DynamicCache(config=config)
        for i, (layer, (heads, width)) in enumerate(zip(cache.layers, layers, strict=False)):
            if isinstance(layer, DynamicLayer) and heads <= self.num_kv_heads and width <= self.head_dim:
                keys, values = prefix[i, :, :, :heads, :, :width]
                cache.update(keys, values, i)
        return cache

    def extra_repr(self) -> str:
        text = f"num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{text}, num_virtual_tokens={self.num_virtual_tokens}, projection={self.projection}"


def _layers(config: Any) -> list[tuple[int, int]]:
    """Returns ``(key heads, head_dim)`` of the cached keys and values of each decoder layer.

    ``config`` is a Transformers configuration. For a multimodal model the layers are those of the text decoder.
    """
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    # T5's num_layers counts the encoder's layers. get_text_config(decoder=True) of BART's configuration gives
    # decoder_layers as num_hidden_layers.
    num_layers = _read(config, "num_decoder_layers", "num_hidden_layers")
    if getattr(config, "is_heterogeneous", False):
        return [_heads(config.per_layer_config[i]) for i in range(num_layers)]
    return [_heads(config)] * num_layers


def _heads(config: Any) -> tuple[int, int]:
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"PrefixEncoder: model_config is {type(config).__name__} with latent attention, wanted keys and values of "
            "one width"
        )
    queries = _read(config, "num_attention_heads")
    # Falcon's multi_query means one key head, except in Falcon's newer architecture, which repeats the keys for every
    # query head.
    multi_query = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    heads = getattr(config, "num_key_value_heads", None) or (1 if multi_query else queries)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        hidden_size = _read(config, "hidden_size")
        if hidden_size % queries:
            raise ValueError(
                f"PrefixEncoder: model_config has hidden_size {hidden_size}, wanted a multiple of its {queries} heads"
            )
        head_dim = hidden_size // queries
    return heads, head_dim


def _read(config: Any, *names: str) -> int:
    """Returns the value of the first attribute among ``names`` that is an integer in config; raises ValueError if there
    is none. GPT-2's configuration gives its n_layer also as num_hidden_layers."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise ValueError(f"PrefixEncoder: model_config is {type(config).__name__}, which has no {' or '.join(names)}")


def _widest(layers: list[tuple[int, int]]) -> tuple[int, int, int]:
    """Returns the sizes of the prefix that PEFT makes for ``layers``: the number of layers, and the key heads and the
    head_dim of the layer with the largest head_dim."""
    return (len(layers), *max(layers, key=lambda layer: layer[1]))
