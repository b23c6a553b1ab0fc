"""Runs merged GGUF files in llama.cpp itself, and compares logits with PEFT's unmerged model."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
from gguf_llama import VOCABULARY, adapted
from gguf_small import KINDS, small_model, write_model
from peft import LoraConfig
from tiny_gguf import tiny_model, write_tiny_gguf

from peft_ext import merge_to_gguf

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.llama_runner import Runner

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights.
# In llama.cpp, the inputs of a product with a quantized weight are rounded to 8 bits, which moves logits by up to 5%.
ROUNDING = 0.06
TOKENS = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(3)).tolist()


def ours(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def runs(file, tokens):
    with Runner(file) as runner:
        return runner.logits(tokens)


# transformers reads a file of lfm2 only with a tokenizer.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lfm2"])
def test_every_architecture(tmp_path, kind):
    model = small_model(kind)
    write_model(model, tmp_path / "base.gguf")
    before = ours(model, TOKENS)
    wrapped = adapted(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), size=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = ours(wrapped, TOKENS)
    assert np.abs(wanted - before).mean() > 0.05
    merge_to_gguf(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    # llama.cpp computes the approximation of GELU by tanh from a table in float16.
    atol = 3e-3 if kind.startswith(("gemma", "starcoder2")) else 2e-5
    np.testing.assert_allclose(runs(tmp_path / "out.gguf", TOKENS), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"]], ids=["head", "embedding"])
def test_a_tied_head_that_the_adapter_unties(tmp_path, targets):
    model, tokens = tiny_model(tie_word_embeddings=True), [token % 96 for token in TOKENS]
    values = write_tiny_gguf(tmp_path / "base.gguf", model, "Q8_0")
    model.load_state_dict(values)
    before = ours(model, tokens)
    wrapped = adapted(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"), size=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted = ours(wrapped, tokens)
    assert np.abs(wanted - before).mean() > 0.1 * np.abs(wanted).mean()
    done = merge_to_gguf(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf")
    assert done.added == ("output.weight",)
    found = runs(tmp_path / "out.gguf", tokens)
    assert np.linalg.norm(found - wanted) < ROUNDING * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "Q8_0", "MXFP4"])
def test_types(tmp_path, name):
    model, tokens = tiny_model(), [token % 96 for token in TOKENS]
    values = write_tiny_gguf(tmp_path / "base.gguf", model, "Q8_0")
    model.load_state_dict(values)
    wrapped = adapted(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), size=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    done = merge_to_gguf(tmp_path / "base.gguf", tmp_path / "adapter", tmp_path / "out.gguf", type=name)
    from peft_ext import load_gguf

    wanted = ours(load_gguf(tmp_path / "out.gguf", dtype=torch.float32), tokens)  # with the same rounded weights
    found = runs(tmp_path / "out.gguf", tokens)
    assert np.linalg.norm(found - wanted) < ROUNDING * np.linalg.norm(wanted)
    exact = ours(wrapped, tokens)
    assert np.linalg.norm(found - exact) < (ROUNDING + 4 * done.whole.error) * np.linalg.norm(exact)
