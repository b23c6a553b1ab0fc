"""Runs small GGUF files and exported adapters in llama.cpp itself, and compares logits with transformers and PEFT.

`make llama-cpp` builds llama.cpp and runs these tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_llama import VOCABULARY, adapted, small_llama, write_llama
from gguf_small import KINDS, small_model, write_model
from peft import AdaLoraConfig, LoraConfig

import peft_ext

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llama-cpp")
ROOT = Path(__file__).parents[2]

from benchmarks.llama_runner import LlamaError, Runner  # noqa: E402

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(3)).tolist()


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **changes})


def ours(model):
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def test_the_base_has_the_same_logits(made):
    made = made(lora())
    with Runner(made.gguf) as runner:
        wanted = ours(made.fresh())
        np.testing.assert_allclose(runner.logits(TOKENS), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_rslora=True, r=6),
        lora(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3, "down_proj": 16}),
        lora(target_modules=["embed_tokens", "lm_head", "k_proj"]),
        lora(target_modules=["lm_head"], lora_alpha=16),
        AdaLoraConfig(init_r=6, target_r=3, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM", total_step=9),
    ],
    ids=["lora", "rslora", "patterns", "embedding and head", "head", "adalora"],
)
def test_an_adapter_has_the_same_logits(made, config):
    made = made(config)
    peft_ext.write_gguf_adapter(made.adapter, made.file, base=made.gguf, dtype="f32")
    base, wanted = ours(made.fresh()), ours(made.model)
    moved, largest = np.abs(wanted - base).mean(), np.abs(wanted).max()
    assert moved > 1e-2 * largest, "the adapter changes nothing"
    with Runner(made.gguf, made.file) as runner:
        np.testing.assert_allclose(runner.logits(TOKENS), wanted, rtol=0, atol=1e-4 * largest)
    loaded = peft_ext.load_gguf_adapter(made.fresh(), made.file)
    np.testing.assert_allclose(ours(loaded), wanted, rtol=0, atol=1e-4 * largest)
    peft_ext.write_gguf_adapter(made.adapter, made.file, base=made.gguf, overwrite=True)  # in float16
    with Runner(made.gguf, made.file) as runner:
        np.testing.assert_allclose(runner.logits(TOKENS), wanted, rtol=0, atol=2e-2 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(tmp_path, kind):
    model = small_model(kind)
    write_model(model, tmp_path / "base.gguf")
    base = ours(model)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = adapted(model, config, size=0.05)
    wrapped.save_pretrained(tmp_path / "adapter")
    wanted, file = ours(wrapped), tmp_path / "adapter.gguf"
    assert np.abs(wanted - base).mean() > 0.05
    peft_ext.write_gguf_adapter(tmp_path / "adapter", file, base=tmp_path / "base.gguf", dtype="f32")
    # llama.cpp computes the approximation of GELU by tanh from a table in float16.
    atol = 3e-3 if kind.startswith(("gemma", "starcoder2")) else 2e-5
    with Runner(tmp_path / "base.gguf") as runner:
        np.testing.assert_allclose(runner.logits(TOKENS), base, rtol=0, atol=atol)
    with Runner(tmp_path / "base.gguf", file) as runner:
        np.testing.assert_allclose(runner.logits(TOKENS), wanted, rtol=0, atol=atol)


@pytest.mark.skipif("LLAMA_CPP_SOURCE" not in os.environ, reason="LLAMA_CPP_SOURCE names no folder: make llama-cpp")
@pytest.mark.parametrize("kind", [*KINDS, "embedding and head"])
def test_tensors_are_those_of_llama_cpp_s_converter_bit_for_bit(tmp_path, kind):
    """convert_lora_to_gguf.py takes lora_alpha alone: it leaves out rsLoRA's factor and alpha_pattern."""
    targets = ["embed_tokens", "lm_head"] if kind == "embedding and head" else "all-linear"
    model = small_llama() if kind == "embedding and head" else small_model(kind)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", rank_pattern={"o_proj": 2})
    adapted(model, config).save_pretrained(tmp_path / "adapter")
    script = Path(os.environ["LLAMA_CPP_SOURCE"]).resolve() / "convert_lora_to_gguf.py"
    for dtype in ("f32", "f16"):
        theirs, file = tmp_path / f"theirs-{dtype}.gguf", tmp_path / f"ours-{dtype}.gguf"
        given = ["--base", tmp_path / "base", "--outtype", dtype, "--outfile", theirs, tmp_path / "adapter"]
        subprocess.run([sys.executable, script, *given], check=True, capture_output=True)
        peft_ext.write_gguf_adapter(tmp_path / "adapter", file, base=tmp_path / "base", dtype=dtype)
        wanted, found = ({one.name: one for one in GGUFReader(path).tensors} for path in (theirs, file))
        assert wanted.keys() == found.keys() and len(wanted) > 3
        for name, tensor in wanted.items():
            assert found[name].tensor_type == tensor.tensor_type
            np.testing.assert_array_equal(found[name].data, tensor.data)
        keys = {"general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"}
        fields = [{key: GGUFReader(path).fields[key].contents() for key in keys} for path in (theirs, file)]
        assert fields[0] == fields[1]


def test_llama_cpp_refuses_an_adapter_of_another_model(made):
    made = made(lora())
    peft_ext.write_gguf_adapter(made.adapter, made.file)
    data = made.file.read_bytes().replace(b"blk.1.", b"blk.7.")
    made.file.write_bytes(data)
    with pytest.raises(LlamaError, match=r"blk\.7\..* does not exist in base model"):
        Runner(made.gguf, made.file)


def test_llama_cpp_can_not_adapt_a_tied_embedding(made):
    """The reason for which the export refuses such an adapter: llama.cpp ends the process."""
    made = made(lora(target_modules=["embed_tokens", "q_proj"]))
    peft_ext.write_gguf_adapter(made.adapter, made.file)
    tied = write_llama(small_llama(tied=True), made.gguf.with_name("tied.gguf"))
    with pytest.raises(peft_ext.ExportError, match="one weight"):
        peft_ext.write_gguf_adapter(made.adapter, made.file, base=tied, overwrite=True)
    script = f"from benchmarks.llama_runner import Runner; print(Runner({str(tied)!r}, {str(made.file)!r}).logits([5]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "ggml_can_mul_mat" in done.stderr
