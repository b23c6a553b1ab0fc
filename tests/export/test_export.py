"""Tests llama.cpp's adapter files: contents as the package gguf reads them, scales, orders of rows, ways back."""

import math

import numpy as np
import pytest
import torch
from commands import refused, said
from gguf import GGUFReader
from gguf_llama import VOCABULARY, adapted, interleaved, llama_names, small_llama, write_llama
from gguf_small import KINDS, small_model, write_model
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file
from untrusted_files import one_line

import peft_ext

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **changes})


def read(file):
    """Returns the metadata and the tensors, rows first, as the package gguf reads the file."""
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}


def deltas(file, model):
    """Returns by module the change of the weight that llama.cpp computes, with the rows in transformers' order."""
    fields, tensors = read(file)
    found = {}
    for module, name in llama_names(model).items():
        if f"{name}.lora_a" not in tensors:
            continue
        first, second = (tensors.pop(f"{name}.lora_{part}").astype(np.float64) for part in "ab")
        scale = fields["adapter.lora.alpha"] / second.shape[1]  # As llama_adapter_lora_weight::get_scale.
        if name == "token_embd.weight":  # As llm_graph_context::build_inp_embd.
            found[module] = first @ second.T * scale
            continue
        delta = second @ first * scale
        heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
        for kind, count in heads.items():
            if kind in name:
                order = interleaved(np.arange(delta.shape[0]), count)  # the file's row i is the module's row order[i]
                delta = np.empty_like(delta)
                delta[order] = second @ first * scale
        found[module] = delta
    assert not tensors
    return found


def check_deltas(made, rtol=1e-6):
    """Compares each change of a weight with that of PEFT's own layer."""
    base = made.model.get_base_model()
    found = deltas(made.file, base)
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        if "default" not in layer.lora_A and "default" not in layer.lora_embedding_A:
            continue
        wanted = layer.get_delta_weight("default").detach().double().numpy()
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=rtol * np.abs(wanted).max(), err_msg=name)


def test_the_file_has_what_llama_cpp_reads(made):
    made = made(lora())
    done = peft_ext.write_gguf_adapter(made.adapter, made.file, base=made.gguf)
    fields, tensors = read(made.file)
    assert fields["general.architecture"] == "llama" and fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora" and fields["adapter.lora.alpha"] == 8.0
    assert fields["general.name"] == "adapter" and fields["general.base_model.0.name"] == "small llama"
    assert len(tensors) == 28 and all(tensor.dtype == np.float16 for tensor in tensors.values())
    assert tensors["blk.0.ffn_down.weight.lora_a"].shape == (4, 96)
    assert tensors["blk.0.ffn_down.weight.lora_b"].shape == (64, 4)
    assert (done.pairs, done.alpha, done.method, done.architecture) == (14, 8.0, "LORA", "llama")
    assert done.nbytes == made.file.stat().st_size and done.base_is_gguf and done.folded == ()
    assert done.parameters == sum(tensor.size for tensor in tensors.values())


@pytest.mark.parametrize(
    "changes, alpha, folded",
    [
        ({}, 8.0, 0),
        ({"use_rslora": True}, 16.0, 0),
        ({"use_rslora": True, "r": 6}, 8 * math.sqrt(6), 0),
        ({"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}}, 8.0, 0),
        ({"alpha_pattern": {"k_proj": 4, "layers.0.mlp.down_proj": 3}}, 8.0, 3),
        ({"rank_pattern": {"v_proj": 9}, "use_rslora": True}, 16.0, 2),
        ({"lora_alpha": 0.5}, 0.5, 0),
        ({"lora_alpha": -3}, -3.0, 0),
        ({"lora_alpha": 0}, 1.0, 14),
    ],
)
def test_changes_of_weights_are_those_of_peft(made, changes, alpha, folded):
    made = made(lora(**changes))
    done = peft_ext.write_gguf_adapter(made.adapter, made.file, dtype="f32")
    assert done.alpha == pytest.approx(alpha, rel=1e-7) and len(done.folded) == folded
    check_deltas(made)


def test_float16_holds_each_matrix_to_half_a_unit(made):
    made = made(lora())
    peft_ext.write_gguf_adapter(made.adapter, made.file)
    saved = load_file(made.adapter / "adapter_model.safetensors")
    wanted = saved["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].half().numpy()
    np.testing.assert_array_equal(read(made.file)[1]["blk.1.ffn_up.weight.lora_a"], wanted)


@pytest.mark.parametrize("base", ["base", "gguf"])
def test_embeddings_and_a_head_of_its_own(made, base):
    made = made(lora(target_modules=["embed_tokens", "lm_head", "q_proj"]))
    peft_ext.write_gguf_adapter(made.adapter, made.file, base=getattr(made, base), dtype="f32")
    _, tensors = read(made.file)
    assert tensors["token_embd.weight.lora_a"].shape == (VOCABULARY, 4)
    assert tensors["token_embd.weight.lora_b"].shape == (64, 4)
    assert tensors["output.weight.lora_a"].shape == (4, 64)
    check_deltas(made)


@pytest.mark.parametrize("alpha", [8, 0])
def test_adalora_becomes_lora_of_the_ranks_that_are_left(made, alpha):
    config = AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=alpha, target_modules=LINEARS, task_type="CAUSAL_LM", total_step=10
    )
    made = made(config)
    peft_ext.write_gguf_adapter(made.adapter, made.file, dtype="f32")
    check_deltas(made)

    base = made.model.get_base_model()
    kept = {name: [bool(i % (2 + n % 3)) for i in range(6)] for n, name in enumerate(base_layers(base))}
    none = next(iter(kept))
    kept[none] = 6 * [False]
    made.model.peft_config["default"].rank_pattern = {f"{name}.lora_E": mask for name, mask in kept.items()}
    made.model.save_pretrained(made.adapter)
    peft_ext.write_gguf_adapter(made.adapter, made.file, dtype="f32", overwrite=True)
    found = deltas(made.file, base)
    loaded = peft_ext.load_adapter(made.fresh(), made.adapter, accelerate=False).get_base_model()
    assert found.keys() == kept.keys() - {none}
    for name in found:
        wanted = loaded.get_submodule(name).get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def base_layers(model):
    return [name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"k_proj": 2, "v_proj": 32}},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj", "down_proj"]},
        {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    ],
)
def test_the_way_back_gives_the_same_logits_bit_for_bit(made, changes):
    made = made(lora(**changes))
    peft_ext.write_gguf_adapter(made.adapter, made.file, base=made.gguf, dtype="f32")
    loaded = peft_ext.load_gguf_adapter(made.fresh(), made.file, accelerate=False)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, made.model(TOKENS).logits)
    if "alpha_pattern" not in changes:
        back, saved = loaded.state_dict(), made.model.state_dict()
        assert all(torch.equal(back[name], saved[name]) for name in saved if "lora_" in name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of_file", [False, True])
def test_every_architecture_goes_both_ways(tmp_path, kind, of_file):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = small_model(kind)
    base = tmp_path / "base"
    if of_file:
        base = write_model(model, tmp_path / "base.gguf")
    else:
        model.save_pretrained(base)
    wrapped = adapted(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    done = peft_ext.write_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", base=base, dtype="f32")
    loaded = peft_ext.load_gguf_adapter(small_model(kind), tmp_path / "a.gguf", accelerate=False)
    back, saved = loaded.state_dict(), wrapped.state_dict()
    names = [name for name in saved if "lora_" in name]
    assert len(names) == 2 * done.pairs and all(torch.equal(back[name], saved[name]) for name in names)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, wrapped(TOKENS).logits)


def test_the_way_back_is_accelerated_and_goes_beside_other_adapters(made):
    made = made(lora(), size=0.02)
    peft_ext.write_gguf_adapter(made.adapter, made.file, dtype="f16")
    with torch.no_grad():
        wanted = made.model(TOKENS).logits
        loaded = peft_ext.load_gguf_adapter(made.fresh(), made.file)
        assert all(row.fused for row in peft_ext.explain(loaded).rows)
        torch.testing.assert_close(loaded(TOKENS).logits, wanted, rtol=0, atol=2e-2)
        other = peft_ext.load_gguf_adapter(loaded, made.file, "other", is_trainable=True)
        assert other is loaded and set(loaded.peft_config) == {"default", "other"}
        assert loaded.active_adapter == "other"
        assert any(p.requires_grad for n, p in loaded.named_parameters() if ".other." in n)


def test_the_command(made, capsys):
    made = made(lora(alpha_pattern={"k_proj": 2}))
    text = said(capsys, "export", "--gguf", made.file, made.adapter, "--model", made.gguf)
    assert f"base: {made.gguf}, architecture llama; names and sizes compared with the file" in text
    assert "LORA, 14 weights" in text and "alpha 8" in text and "and 1 more" in text
    assert text.endswith(
        f"llama.cpp: llama-cli -m {made.gguf} --lora {made.file}\n"
        f"Ollama, in a Modelfile:\nFROM {made.gguf}\nADAPTER {made.file}\n"
    )
    assert "the file exists" in refused(capsys, "export", "--gguf", made.file, made.adapter)
    text = said(capsys, "export", "--gguf", made.file, made.adapter, "--dtype", "f32", "--overwrite")
    assert "FROM model.gguf" in text and "f32" in text
    assert "dtype is 'q8'" in refused(capsys, "export", "--gguf", made.file, made.adapter, "--dtype", "q8")


def test_a_failed_export_leaves_the_old_file(made):
    made = made(lora())
    peft_ext.write_gguf_adapter(made.adapter, made.file)
    before = made.file.read_bytes()
    saved = load_file(made.adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    saved[name][0, 0] = 1e5
    from safetensors.torch import save_file

    save_file(saved, made.adapter / "adapter_model.safetensors", {"format": "pt"})
    with one_line("write_gguf_adapter: ", f"{name} has the magnitude 1e+05, which f16 does not hold"):
        peft_ext.write_gguf_adapter(made.adapter, made.file, overwrite=True)
    assert made.file.read_bytes() == before
    assert sorted(path.name for path in made.file.parent.iterdir()) == ["adapter", "adapter.gguf", "base", "base.gguf"]
    peft_ext.write_gguf_adapter(made.adapter, made.file, overwrite=True, dtype="f32")


def test_an_adapter_over_a_packed_gguf_file(tmp_path, capsys):
    """The adapter's configuration names the GGUF file, which gives the names; the way back is over packed weights."""
    write_llama(small_llama(), tmp_path / "base.gguf", "Q4_1")
    model = peft_ext.load_gguf(tmp_path / "base.gguf", dtype=torch.float32)
    wrapped = peft_ext.accelerate(adapted(model, lora(target_modules=[*LINEARS, "lm_head"]), size=0.03))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert "names and sizes compared" in said(capsys, "export", "--gguf", tmp_path / "a.gguf", tmp_path / "adapter")
    done = peft_ext.write_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", dtype="f32", overwrite=True)
    assert (done.base, done.base_is_gguf, done.pairs) == (str(tmp_path / "base.gguf"), True, 15)
    loaded = peft_ext.load_gguf_adapter(
        peft_ext.load_gguf(tmp_path / "base.gguf", dtype=torch.float32), tmp_path / "a.gguf"
    )
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, wrapped(TOKENS).logits)
