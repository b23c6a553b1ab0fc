from types import SimpleNamespace

import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")


@pytest.fixture
def made(tmp_path):
    """Returns ``made(config)``: saves a small Llama as a folder and as a GGUF file, and an adapter of the Llama."""
    from gguf_llama import adapted, small_llama, write_llama
    from transformers import LlamaForCausalLM

    def make(config, tied=False, **kwargs):
        model = small_llama(tied)
        model.save_pretrained(tmp_path / "base")
        write_llama(model, tmp_path / "base.gguf")
        wrapped = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config, **kwargs)
        wrapped.save_pretrained(tmp_path / "adapter")
        return SimpleNamespace(
            base=tmp_path / "base", gguf=tmp_path / "base.gguf", adapter=tmp_path / "adapter", model=wrapped,
            file=tmp_path / "adapter.gguf", fresh=lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base").eval(),
        )  # fmt: skip

    return make
