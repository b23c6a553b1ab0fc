"""Tests of the forms of attentions that hand an attribute of their configuration to the attention function."""

from __future__ import annotations

from typing import Any

import pytest
from test_forms import ATTENTION, OwnAttention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

import peft_ext
from peft_ext.integrations.forms import form_of
from peft_ext.verification import proof


class Windowed(OwnAttention):
    """Hands a number of the configuration to the attention function, None where the configuration lacks it."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.to_q(hidden_states).view(heads).transpose(1, 2)
        k = self.to_k(hidden_states).view(heads).transpose(1, 2)
        v = self.to_v(hidden_states).view(heads).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling,
                            window=self.window(), **kwargs)  # fmt: skip
        return self.to_out(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def window(self):
        return getattr(self.config, "window", None)


class OfEach(Windowed):
    def window(self):
        return self.config.window


class WithDefault(Windowed):
    def window(self):
        return getattr(self.config, "window", 3)


@pytest.mark.slow
def test_an_option_of_the_configuration() -> None:
    try:
        row = peft_ext.register_form(Windowed, "attention", **ATTENTION, options=["window:config.window"])
        assert row.names("options") == ("window:config.window",)
    finally:
        proof.REGISTERED.pop(form_of(Windowed).digest, None)


@pytest.mark.parametrize(
    ("cls", "more", "said"),
    [
        (Windowed, {}, "reads window of its configuration"),
        (Windowed, {"options": ["wide:config.window"]}, "the cache and attention are called with"),
        (OfEach, {"options": ["window:config.window"]}, "the class raises AttributeError"),
        (WithDefault, {"options": ["window:config.window"]}, "the cache and attention are called with"),
    ],
)
def test_another_option_is_disproved(cls: type, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        peft_ext.register_form(cls, "attention", **{**ATTENTION, **more})
