from importlib.util import find_spec
from types import SimpleNamespace

import pytest

# The tests of this folder import these packages at their beginnings.
collect_ignore_glob = [] if find_spec("peft") and find_spec("gguf") else ["test_*.py"]


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
