"""Tests the errors of write_gguf_adapter and load_gguf_adapter: each is one line and has the given value."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf_llama import small_llama, write_llama
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from untrusted_files import EVIL, changed_tensors, edited, one_line

import peft_ext
from peft_ext.gguf.header import GgufError

LINEARS = ["q_proj", "k_proj", "up_proj"]


def lora(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **changes})


def small_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50))


def refused(made, within, adapter=None, **kwargs):
    with one_line("write_gguf_adapter: ", within, peft_ext.ExportError, most=500):
        peft_ext.write_gguf_adapter(adapter or made.adapter, made.file, **kwargs)
    assert not made.file.exists()


# --- what an adapter file can't hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, within",
    [
        (lora(use_dora=True), "use_dora True: DoRA scales the rows of the whole weight"),
        (lora(lora_bias=True), "lora_bias True: an adapter file of llama.cpp holds no biases"),
        (lora(bias="lora_only"), "bias 'lora_only': an adapter file of llama.cpp holds no biases"),
        (
            lora(modules_to_save=["embed_tokens"]),
            "modules_to_save ['embed_tokens']: an adapter file of llama.cpp holds no",
        ),
        (lora(trainable_token_indices=[1, 2]), "trainable_token_indices [1, 2]: an adapter file"),
        (lora(target_parameters=["mlp.down_proj.weight"]), "target_parameters ['mlp.down_proj.weight']: LoRA on param"),
        (lora(layer_replication=[(0, 2), (1, 2)]), "layer_replication"),
        (
            lora(alora_invocation_tokens=[5]),
            "alora_invocation_tokens [5]: an adapter file of llama.cpp has no such setting",
        ),
        (lora(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which changed the base's own weights"),
        (lora(init_lora_weights="olora"), "init_lora_weights is 'olora', which changed the base's own weights"),
        (IA3Config(target_modules=LINEARS, feedforward_modules=["up_proj"], task_type="CAUSAL_LM"), "method is IA3"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "method is PROMPT_TUNING"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "method is PREFIX_TUNING"),
        (peft_ext.BitFitConfig(task_type="CAUSAL_LM", add_bias=LINEARS), "method is BITFIT"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_methods_and_options_are_refused_by_name(made, config, within):
    refused(made(config), within)


def test_another_task_is_refused(made):
    made = made(lora())
    refused(made, "task_type is SEQ_CLS", edited(made.adapter, made.file.with_name("other"), task_type="SEQ_CLS"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("base", ["base", "gguf"])
def test_a_tied_embedding_and_a_tied_head_are_refused(made, target, base):
    made = made(lora(target_modules=["q_proj", target]), tied=True)
    refused(made, "the embedding and the head of", base=getattr(made, base))


def test_a_module_that_llama_cpp_does_not_have(made):
    made = made(lora())

    def move(tensors, _):
        for name in [name for name in tensors if "layers.1.mlp.up_proj" in name]:
            tensors[name.replace("mlp.up_proj", "mlp.side_proj")] = tensors.pop(name)

    other = changed_tensors(made.adapter, made.file.with_name("other"), move)
    refused(made, "the adapter changes model.layers.1.mlp.side_proj, for which llama.cpp's llama has no tensor", other)


@pytest.mark.parametrize("base", ["base", "gguf"])
def test_a_base_with_fewer_layers(made, base):
    made = made(lora())
    fewer = made.base.with_name("fewer")
    edited(made.base, fewer, "config.json", num_hidden_layers=1)
    if base == "gguf":
        model = small_llama()
        del model.model.layers[1]
        model.config.num_hidden_layers = 1
        fewer = write_llama(model, made.file.with_name("fewer.gguf"))
    refused(made, "the adapter changes model.layers.1.", base=fewer)


@pytest.mark.parametrize("base", ["base", "gguf"])
def test_a_base_of_other_sizes(made, base):
    made = made(lora())
    other = edited(made.base, made.base.with_name("other"), "config.json", intermediate_size=128)
    if base == "gguf":
        model = small_llama()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(128, 64))
        other = write_llama(model, made.file.with_name("other.gguf"))
    refused(made, "fit a weight of (96, 64), but blk.0.ffn_up.weight of", base=other)
    refused(made, "is (128, 64)", base=other)


def test_a_base_with_another_architecture(made):
    made = made(lora())
    small_gpt2().save_pretrained(made.file.with_name("gpt2"))
    refused(made, "the model type is 'gpt2', wanted one of llama, mistral", base=made.file.with_name("gpt2"))


def test_bases_that_are_not_there_or_no_models(made):
    made = made(lora())
    refused(made, "no such file", base=made.file.with_name("none.gguf"))
    refused(made, "no such folder", base=made.file.with_name("none"))
    refused(made, "no config.json", base=made.adapter)
    made.gguf.write_bytes(made.gguf.read_bytes()[:4000])
    refused(made, "base.gguf: ", base=made.gguf)
    nameless = edited(made.adapter, made.file.with_name("other"), base_model_name_or_path=None)
    refused(made, "names no base model, give base", nameless)


def test_an_adapter_file_is_no_base(made):
    made = made(lora())
    peft_ext.write_gguf_adapter(made.adapter, made.file)
    other = made.file.rename(made.file.with_name("other.gguf"))
    refused(made, "general.type is 'adapter', wanted a model", base=other)


# --- damaged adapters -------------------------------------------------------------------------------------------------

A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    "change, within",
    [
        (lambda tensors, _: tensors.pop(A), "but no lora_A of 'model.layers.0.mlp.up_proj'"),
        (lambda tensors, _: tensors.pop(B), "but no lora_B of 'model.layers.0.mlp.up_proj'"),
        (lambda tensors, _: tensors.update({A: torch.ones(3, 64)}), "lora_A is (3, 64) and lora_B is (96, 4)"),
        (lambda tensors, _: tensors.update({A: torch.ones(4)}), "lora_A is (4,) and lora_B is (96, 4)"),
        (
            lambda tensors, _: tensors.update({A: torch.ones(2, 64), B: torch.ones(96, 2)}),
            "rank 4, lora_A has the rank 2",
        ),
        (lambda tensors, _: tensors.update({A: torch.full((4, 64), torch.nan)}), "values that are not finite"),
        (lambda tensors, _: tensors.update({A: torch.ones(4, 64, dtype=torch.int32)}), "is I32, wanted floats"),
        (lambda tensors, _: tensors.update({"other": torch.ones(2)}), "has 'other', a tensor that llama.cpp's"),
        (
            lambda tensors, _: tensors.update({"a\nb": torch.ones(2)}),
            "has 'a\\nb', which is no name",
        ),
        (lambda tensors, _: tensors.update({A.replace("lora_A", "norm"): torch.ones(2)}), "a tensor that llama.cpp's"),
        (
            lambda tensors, _: tensors.update({B.replace("weight", "bias"): torch.ones(96)}),
            "lora_bias that llama.cpp's",
        ),
        (
            lambda tensors, _: tensors.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(96)}),
            "DoRA that llama.cpp's adapters can't hold",
        ),
        (
            lambda tensors, _: tensors.update({A.replace("up_proj.lora_A", "down_proj.base_layer"): torch.ones(3)}),
            "a weight of a module without lora_A and lora_B",
        ),
        (lambda tensors, _: tensors.clear(), "r is 4, wanted at most 0"),
    ],
)
def test_damaged_tensors(made, change, within):
    made = made(lora())
    refused(made, within, changed_tensors(made.adapter, made.file.with_name("other"), change))


@pytest.mark.parametrize(
    "changes, within",
    [
        ({"peft_type": "NONE"}, "peft_type is 'NONE'"),
        ({"r": "4"}, "r is '4'"),
        ({"monteclora_config": {"q_proj": 3}}, "recursion"),
        ({"alpha_pattern": {"up_proj": "8"}}, "the alpha is '8', wanted a number"),
        ({"alpha_pattern": {"up_proj": True}}, "the alpha is True, wanted a number"),
        ({"rank_pattern": {"up_proj": 2}}, "the configuration has the rank 2, lora_A has the rank 4"),
        pytest.param(
            {"alpha_pattern": {EVIL: 4}},
            "alpha_pattern has the expression",
            marks=pytest.mark.slow,  # the expression is searched until the time limit
        ),
        ({"lora_alpha": 3e38, "use_rslora": True}, "float32 does not hold"),
    ],
)
def test_damaged_configurations(made, changes, within):
    made = made(lora())
    refused(made, within, edited(made.adapter, made.file.with_name("other"), **changes))


def test_a_field_of_a_newer_peft(made, monkeypatch):
    """A field of PEFT's configuration that the export does not know is refused if it is set."""
    from peft_ext.export import adapter

    made = made(lora())
    monkeypatch.setattr(adapter, "_HARMLESS", adapter._HARMLESS - {"lora_alpha"})
    other = edited(made.adapter, made.file.with_name("other"), lora_alpha=16)
    refused(made, "lora_alpha 16: an adapter file of llama.cpp has no such setting", other)


def test_adapters_that_are_no_adapters(made):
    made = made(lora())
    refused(made, "no such folder", made.file.with_name("none"))
    refused(made, "has no adapter_config.json", made.base)
    shutil.copytree(made.adapter, other := made.file.with_name("other"))
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    refused(made, "adapter_model.bin, a pickle", other)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_a_wrong_dtype_and_a_wrong_file(made):
    made = made(lora())
    refused(made, "dtype is 'bf16', wanted one of f16, f32", dtype="bf16")
    with one_line("write_gguf_adapter: ", "a folder, wanted the path of a file", peft_ext.ExportError):
        peft_ext.write_gguf_adapter(made.adapter, made.base)
    with one_line("write_gguf_adapter: ", "which is the base", peft_ext.ExportError):
        peft_ext.write_gguf_adapter(made.adapter, made.gguf, base=made.gguf, overwrite=True)
    (text := made.file.with_name("text")).write_text("a text")
    with one_line("write_gguf_adapter: ", "exists and is no GGUF file", peft_ext.ExportError):
        peft_ext.write_gguf_adapter(made.adapter, text, overwrite=True)
    assert text.read_text() == "a text"
    with pytest.raises(FileExistsError):
        peft_ext.write_gguf_adapter(made.adapter, text)


# --- the way back -----------------------------------------------------------------------------------------------------


def write(path, tensors, arch="llama", **fields):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0, **fields}.items():
        if value is not None:
            {str: writer.add_string, float: writer.add_float32, int: writer.add_int32, list: writer.add_array}[
                type(value)
            ](key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(name="blk.0.ffn_up.weight", rank=2, inputs=64, outputs=96, dtype=np.float32):
    return {f"{name}.lora_a": np.ones((rank, inputs), dtype), f"{name}.lora_b": np.ones((outputs, rank), dtype)}


@pytest.mark.parametrize(
    "tensors, fields, within",
    [
        (pair(), {"general.type": "model"}, "general.type is 'model', wanted 'adapter'"),
        (pair(), {"general.type": None}, "general.type is missing"),
        (pair(), {"adapter.type": "control"}, "adapter.type is 'control', wanted 'lora'"),
        (pair(), {"arch": "qwen2"}, "general.architecture is 'qwen2', the model's architecture is 'llama'"),
        (pair(), {"adapter.lora.alpha": 8}, "adapter.lora.alpha is 8, wanted a finite float32"),
        (pair(), {"adapter.lora.alpha": np.inf}, "adapter.lora.alpha is inf"),
        (pair(), {"adapter.alora.invocation_tokens": [1, 2]}, "adapter.alora.invocation_tokens"),
        ({}, {}, "no tensors"),
        ({"blk.0.attn_norm.weight": np.ones(64, np.float32)}, {}, "'blk.0.attn_norm.weight' is no lora_a or lora_b"),
        ({"blk.0.ffn_up.weight.lora_a": np.ones((2, 64), np.float32)}, {}, "has lora_a alone"),
        (pair("blk.7.ffn_up.weight"), {}, "changes blk.7.ffn_up.weight, which LlamaForCausalLM does not have"),
        (pair("blk.0.ffn_up.bias"), {}, "changes blk.0.ffn_up.bias, which"),
        (pair("blk.0.attn_norm.weight"), {}, "model.layers.0.input_layernorm of the model has None and None"),
        (pair(inputs=32), {}, "has 32 inputs and 96 outputs, model.layers.0.mlp.up_proj of the model has 64 and 96"),
        (pair(outputs=32), {}, "has 64 inputs and 32 outputs"),
        ({**pair(), "blk.0.ffn_up.weight.lora_a": np.ones((3, 64), np.float32)}, {}, "rank 3, lora_b has the rank 2"),
        ({**pair(), "blk.0.ffn_up.weight.lora_a": np.ones(64, np.float32)}, {}, "has the sizes (64,), wanted a matrix"),
        (pair(dtype=np.int32), {}, "is I32, wanted floats"),
        ({**pair(), "blk.0.ffn_up.weight.lora_a": np.full((2, 64), np.nan, np.float32)}, {}, "are not finite"),
    ],
)
def test_bad_files_of_adapters(tmp_path, tensors, fields, within):
    file = tmp_path / "adapter.gguf"
    fields = dict(fields)
    write(file, tensors, fields.pop("arch", "llama"), **fields)
    model = small_llama()
    before = {name: id(module) for name, module in model.named_modules()}
    with one_line(f"{file}: ", within, GgufError, most=500):
        peft_ext.load_gguf_adapter(model, file)
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name, size", [("token_embd.weight", 64), ("output.weight", 300)])
def test_a_file_that_adapts_a_tied_weight(tmp_path, name, size):
    tensors = pair(name, outputs=size)
    if size == 64:
        tensors[f"{name}.lora_a"] = np.ones((300, 2), np.float32)
    write(tmp_path / "adapter.gguf", tensors)
    peft_ext.load_gguf_adapter(small_llama(), tmp_path / "adapter.gguf")
    with one_line(f"{tmp_path / 'adapter.gguf'}: ", "embedding and head are one weight", GgufError):
        peft_ext.load_gguf_adapter(small_llama(tied=True), tmp_path / "adapter.gguf")


def test_truncated_files_and_wrong_models(made):
    made = made(lora())
    peft_ext.write_gguf_adapter(made.adapter, made.file)
    data = made.file.read_bytes()
    for size in (0, 3, 100, len(data) - 1):
        made.file.write_bytes(data[:size])
        with one_line(f"{made.file}: ", kind=GgufError):
            peft_ext.load_gguf_adapter(small_llama(), made.file)
    with pytest.raises(TypeError, match="model is str, wanted a transformers model"):
        peft_ext.load_gguf_adapter("model", made.file)
    with pytest.raises(TypeError, match="model is Linear, wanted a transformers model"):
        peft_ext.load_gguf_adapter(nn.Linear(2, 2), made.file)
    with pytest.raises(ValueError, match="the model type is 'gpt2'"):
        peft_ext.load_gguf_adapter(small_gpt2(), made.file)
    with pytest.raises(FileNotFoundError):
        peft_ext.load_gguf_adapter(small_llama(), made.file.with_name("none.gguf"))


def test_a_file_without_alpha_and_with_quantized_matrices(tmp_path):
    """llama.cpp reads a file without alpha as a scale of 1; its converter also writes adapters in Q8_0."""
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (96, 2)))
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    packed = gguf.quants.quantize(first, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.1.ffn_up.weight.lora_a", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.1.ffn_up.weight.lora_b", second.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = peft_ext.load_gguf_adapter(small_llama(), tmp_path / "adapter.gguf", accelerate=False)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    assert layer.scaling == {"default": 1.0}
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(layer.lora_A["default"].weight.detach().numpy(), wanted)
    np.testing.assert_array_equal(layer.lora_B["default"].weight.detach().numpy(), second.astype(np.float16))
