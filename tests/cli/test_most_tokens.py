"""Tests the most tokens that the command line lets a model take, by the text decoder's configuration."""

from __future__ import annotations

import pytest

hf = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")

from peft_ext.cli.explain import _length  # noqa: E402
from peft_ext.run import RunError  # noqa: E402


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (lambda: hf.LlamaConfig(max_position_embeddings=64), 64),
        (lambda: hf.MptConfig(max_seq_len=64), 64),
        (lambda: hf.Gemma3Config(text_config={"max_position_embeddings": 64}), 64),
        (lambda: hf.XLNetConfig(), None),  # XLNet's max_position_embeddings is -1, which stands for no limit
    ],
)
def test_the_limit_of_the_text_decoder_is_read(config, most) -> None:
    made = config()
    assert _length(made, None, 512) == (most or 512) and _length(made, 64, 512) == 64
    if most is None:
        assert _length(made, 4096, 512) == 4096
    else:
        with pytest.raises(RunError, match="the model takes at most 64 tokens"):
            _length(made, 65, 512)
