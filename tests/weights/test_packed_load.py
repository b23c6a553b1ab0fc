"""Tests PackedConfig: checkpoints of quantization libraries load packed, train with PEFT and are saved unchanged."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import packed_checkpoints as pc
import pytest
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from tiers import first
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, Trainer, TrainingArguments

import peft_ext
from peft_ext.nn import PackedEmbedding, PackedExperts, PackedLinear
from peft_ext.reference.formats import decoded
from peft_ext.weights import fp8, int_groups, mx

TOKENS = torch.arange(18).reshape(2, 9) * 5 % pc.VOCAB


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=peft_ext.PackedConfig(), **options)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype is other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def dense(model: nn.Module) -> nn.Module:
    """Replaces the packed layers and experts of a model by dense ones, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False, dtype=child.compute_dtype)
                linear.weight = nn.Parameter(child.dequantize(), requires_grad=False)
                linear.bias = child.bias
                setattr(parent, name, linear)
            elif isinstance(child, PackedExperts):
                weights = {one: decoded(child.frozen(one), child.compute_dtype) for one in child.packed_names}
                buffers = list(child._buffers)
                child.__class__ = child.stock_class
                for one, weight in weights.items():
                    weight = weight.transpose(1, 2).contiguous() if child.is_transposed else weight
                    child._parameters[one] = nn.Parameter(weight, requires_grad=False)
                for buffer in buffers:
                    del child._buffers[buffer]
    return model


def close(one: Tensor, other: Tensor) -> bool:
    """Returns whether float32 results differ by the order of sums alone."""
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def quantization_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("case", pc.CASES)
def test_loads_packed_without_a_warning_and_saves_the_same_bytes(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pc.write(tmp_path / "model", case)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = load(path)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == 14 and type(model.lm_head) is nn.Linear
    assert not any(parameter.requires_grad for module in packed.values() for parameter in module.parameters())
    assert model.is_quantized and model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    logits = model(TOKENS).logits
    assert torch.equal(logits, dense(copy.deepcopy(model))(TOKENS).logits) and logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(pc.stored(path), pc.stored(tmp_path / "again"))
    assert quantization_of(tmp_path / "again") == quantization_of(path)
    assert torch.equal(load(tmp_path / "again")(TOKENS).logits, logits)


def layer_weight(path: Path, case: str, name: str, shape: tuple[int, int]) -> Tensor:
    """Returns the decoded weight of one linear layer of a checkpoint, from the tensors of this layer alone."""
    held = {key.removeprefix(f"{name}."): one for key, one in pc.stored(path).items() if key.startswith(f"{name}.")}
    if case == "fp8":
        weight = fp8.fp8(held["weight"], held["weight_scale_inv"], (32, 32))
    elif case == "float8":
        weight = fp8.fp8(held["weight"], held["weight_scale"], (1, 0))
    elif case == "mxfp4":
        weight = mx.mxfp4(held["weight_packed"], held["weight_scale"])
    elif case == "nvfp4":
        parts = (held[f"weight_{part}"] for part in ("packed", "scale", "global_scale"))
        weight = mx.nvfp4(*parts, reciprocal=True)
    else:
        settings = quantization_of(path)
        if case == "hqq":
            settings = {**settings, **settings["quant_config"]["weight_quant_params"]}
            held |= {name: settings[name] for name in ("group_size", "axis")}
        weight = int_groups.from_state(settings, held, shape)
    return decoded(weight, torch.float32)


@pytest.mark.parametrize("case", pc.CASES)
def test_experts_that_transformers_merges_stay_packed(case: str, tmp_path: Path) -> None:
    path = pc.write_mixture(tmp_path / "model", case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(path)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, PackedExperts)
    stored, prefix = pc.stored(path), "model.layers.1.mlp.experts"
    for index in range(4):
        shape = (pc.HIDDEN, pc.HIDDEN)
        gate, up, down = (
            layer_weight(path, case, f"{prefix}.{index}.{name}_proj", shape) for name in ("gate", "up", "down")
        )
        first, second = (
            decoded(experts.frozen(name).expert(index), torch.float32) for name in ("gate_up_proj", "down_proj")
        )
        assert torch.equal(first, torch.cat((gate, up))) and torch.equal(second, down)
    of_files = sum(one.nbytes for name, one in stored.items() if prefix in name)
    assert sum(one.nbytes for one in experts.state_dict().values()) <= of_files
    assert close(load(path, dtype=torch.float32)(TOKENS).logits, dense(load(path, dtype=torch.float32))(TOKENS).logits)
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(stored, pc.stored(tmp_path / "again"))
    assert torch.equal(load(tmp_path / "again")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("case", ["gptq act-order", "int8"])
def test_mixtures_with_dense_experts_in_a_layer_and_shards_are_saved_as_they_were(case: str, tmp_path: Path) -> None:
    path = pc.write(tmp_path / "model", case, "qwen3_moe", shards=True,
                    packs=lambda name: pc.is_packed(name) and "layers.1.mlp" not in name)  # fmt: skip
    model = load(path)
    packed, other = (layer.mlp.experts for layer in model.model.layers)
    assert isinstance(packed, PackedExperts) and other.gate_up_proj.dtype is torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(pc.stored(path), pc.stored(tmp_path / "again"))


def test_packed_experts_beside_dense_ones_are_not_offloaded_to_the_disk(tmp_path: Path) -> None:
    path = pc.write(tmp_path / "model", "int8", "qwen3_moe",
                    packs=lambda name: pc.is_packed(name) and "layers.1.mlp" not in name)  # fmt: skip
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    with pytest.raises(ValueError, match="PackedConfig: model.layers.0.mlp.experts is packed and other layers have de"):
        load(path, device_map=places | {"model.layers.0": "disk", "model.layers.1": "cpu"}, offload_folder=tmp_path)
    other = load(path, device_map=places | {"model.layers.0": "cpu", "model.layers.1": "disk"}, offload_folder=tmp_path)
    assert torch.equal(other(TOKENS).logits, load(path)(TOKENS).logits)


def test_a_loaded_mixture_is_pickled_and_offloaded(tmp_path: Path) -> None:
    path = pc.write_mixture(tmp_path / "model", "gptq act-order")
    model = load(path)
    logits = model(TOKENS).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS).logits, logits)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    other = load(path, device_map=places, offload_folder=tmp_path / "disk")
    assert other.model.layers[1].mlp.experts.gate_up_proj.is_meta
    assert torch.equal(other(TOKENS).logits, logits)


def changed(path: Path, key: str, change: Any) -> Path:
    """Replaces the tensor ``key`` of a checkpoint by ``change(tensor)``, or removes the tensor."""
    held = load_file(path / "model.safetensors")
    tensor = held.pop(key)
    if change is not None:
        held[key] = change(tensor)
    pc.finish(path, held, quantization_of(path))
    return path


@pytest.mark.parametrize(
    ("case", "name", "change", "text"),
    [
        (
            "gptq act-order",
            "up_proj.g_idx",
            lambda t: t.flip(0),
            "gate_up_proj_g_idx: the gate and the up of an expert",
        ),
        ("awq", "up_proj.scales", None, "experts.gate_up_proj: the experts differ in scales"),
        ("nvfp4", "up_proj.weight_scale", lambda t: t[:, :2].contiguous(), "the experts differ in weight_scale"),
    ],
)
def test_experts_that_cannot_be_merged_are_named(case: str, name: str, change: Any, text: str, tmp_path: Path) -> None:
    path = pc.write_mixture(tmp_path / "model", case)
    changed(path, f"model.layers.1.mlp.experts.2.{name}", change)
    with pytest.raises(ValueError, match="PackedConfig: model.layers.1.mlp.experts") as caught:
        load(path)
    assert text in str(caught.value)


def test_experts_of_hqq_along_axis_0_are_refused_by_name(tmp_path: Path) -> None:
    path = pc.write_mixture(tmp_path / "model", "hqq")
    quantization = quantization_of(path)
    quantization["quant_config"]["weight_quant_params"]["axis"] = 0
    rewrite(path, **quantization)
    with pytest.raises(ValueError, match="mlp.experts.gate_up_proj: experts can't stay packed: groups along axis 0"):
        load(path)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt_oss"])
def test_logits_are_those_of_the_dequantized_model_of_transformers(kind: str, tmp_path: Path) -> None:
    if kind == "gpt_oss":
        path, config = pc.write_gpt_oss(tmp_path), Mxfp4Config(dequantize=True)
    else:
        write = pc.write if kind == "llama" else pc.write_mixture
        path, config = write(tmp_path, "fp8"), FineGrainedFP8Config(dequantize=True)
    options = {"dtype": torch.float32}  # stock experts sum in another order
    model, stock = (
        load(path, **options),
        AutoModelForCausalLM.from_pretrained(path, quantization_config=config, **options),
    )
    assert close(model(TOKENS).logits, stock(TOKENS).logits)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < sum(
        tensor.nbytes for tensor in stock.state_dict().values()
    )


def test_gpt_oss_saves_the_same_bytes(tmp_path: Path) -> None:
    path = pc.write_gpt_oss(tmp_path / "model")
    model = load(path)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts) and experts.gate_up_proj is experts.gate_up_proj_blocks
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(pc.stored(path), pc.stored(tmp_path / "again"))
    state = copy.deepcopy(model.state_dict())
    other = load(path)
    other.load_state_dict(state)
    assert same_tensors(state, other.state_dict())


# --- which layers -----------------------------------------------------------------------------------------------------


def test_layers_that_the_checkpoint_leaves_dense_stay_dense(tmp_path: Path) -> None:
    path = pc.write(tmp_path, "fp8", packs=lambda name: pc.is_packed(name) and "layers.1.mlp" not in name)
    model = load(path)
    assert all(type(child) is nn.Linear for child in (model.model.layers[1].mlp.up_proj, model.lm_head))
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    assert torch.equal(model(TOKENS).logits, dense(copy.deepcopy(model))(TOKENS).logits)


def rewrite(path: Path, **fields: Any) -> Path:
    about = json.loads((path / "config.json").read_text())
    about["quantization_config"] |= fields
    (path / "config.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("fp8", {"modules_to_not_convert": ["model.layers.1.mlp", "lm_head"]}),  # The beginning of a module's name.
        ("fp8", {"modules_to_not_convert": ["up_proj", "lm_head"]}),  # The end of modules' names.
        ("int4", {"ignore": ["re:.*up_proj", "lm_head"]}),  # A regular expression.
        ("int4", {"ignore": ["model.layers.1.mlp.up_proj"]}),  # A name.
        ("int4", {"ignore": ["LlamaMLP", "Linear"]}),  # A class.
    ],
)
def test_a_packed_layer_that_the_config_leaves_dense_is_an_error(
    case: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = rewrite(pc.write(tmp_path, case), **fields)
    with pytest.raises(ValueError, match=r"PackedConfig: the quantization_config leaves model.layers.\S+ dense"):
        load(path)


def test_groups_of_compressed_tensors_have_their_own_scheme(tmp_path: Path) -> None:
    path = pc.write(tmp_path, "int4", packs=lambda name: pc.is_packed(name) and "mlp" not in name)
    torch.manual_seed(1)
    held = load_file(path / "model.safetensors")
    for name in [name for name in held if ".mlp." in name]:
        tensor = held.pop(name)
        held |= {name.removesuffix("weight") + part: one for part, one in pc.int8(tensor).items()}
    quantization = quantization_of(path)
    eight = pc.CASES["int8"][0]["config_groups"]["group_0"]
    quantization["config_groups"]["group_1"] = {**eight, "targets": ["re:.*mlp.*"], "format": "int-quantized"}
    quantization["format"] = "mixed-precision"
    quantization["config_groups"]["group_0"]["format"] = "pack-quantized"
    pc.finish(path, held, quantization)
    layer = load(path).model.layers[0]
    # An expression that matches a module's name has precedence over a target that names the module's class.
    assert layer.mlp.up_proj.names[0] == "weight" and layer.self_attn.q_proj.names[0] == "weight_packed"


def test_layers_of_gptq_have_their_own_settings(tmp_path: Path) -> None:
    path = pc.write(tmp_path, "gptq", packs=lambda name: pc.is_packed(name) and "mlp" not in name)
    held = load_file(path / "model.safetensors")
    for name in [name for name in held if ".mlp." in name and "layers.1" not in name]:
        tensors = pc.gptq(held.pop(name), group=64, bits=8)
        held |= {name.removesuffix("weight") + part: one for part, one in tensors.items()}
    other = {"-:.*layers\\.1\\.mlp": {}, "+:.*\\.mlp\\.": {"bits": 8, "group_size": 64}}
    pc.finish(path, held, {**quantization_of(path), "dynamic": other})
    first_layer, second = load(path).model.layers
    eight, four = first_layer.mlp.up_proj.packed, first_layer.self_attn.q_proj.packed
    assert (eight.option >> 4 & 15, eight.group, four.option >> 4 & 15, four.group) == (8, 0, 4, 32)
    assert type(second.mlp.up_proj) is nn.Linear and type(second.self_attn.q_proj) is PackedLinear
    rewrite(path, dynamic={"-:.*mlp": {}})
    with pytest.raises(ValueError, match=r"quantization_config leaves model.layers.0.mlp\S+ dense"):
        load(path)


def test_packed_embeddings(tmp_path: Path) -> None:
    path = pc.write(tmp_path, "int4", packs=lambda name: pc.is_packed(name) or "embed_tokens" in name)
    quantization = quantization_of(path)
    quantization["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    rewrite(path, **quantization)
    model = load(path)
    table = model.model.embed_tokens
    assert type(table) is PackedEmbedding
    rows = decoded(table.packed, torch.bfloat16)[TOKENS]
    assert torch.equal(table(TOKENS), rows) and model(TOKENS).logits.isfinite().all()
    adapted = get_peft_model(model, LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    peft_ext.accelerate(adapted)
    adapted(TOKENS, labels=TOKENS).loss.backward()
    row = next(row for row in peft_ext.explain(adapted).rows if "embed_tokens" in row.name)
    assert row.fused and row.kind == "LoRA over PackedEmbedding"


def test_shards_and_device_map(tmp_path: Path) -> None:
    path = pc.write(tmp_path, "int4", shards=True)
    assert len(list(path.glob("*.safetensors"))) == 2
    logits = load(path)(TOKENS).logits
    assert torch.equal(load(path, device_map={"": "cpu"})(TOKENS).logits, logits)
    assert torch.equal(load(path, device_map="auto")(TOKENS).logits, logits)
    assert load(path, dtype=torch.float32)(TOKENS).logits.dtype is torch.float32


def test_layers_on_the_disk(tmp_path: Path) -> None:
    path = pc.write(tmp_path / "model", "int4 zeros")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(path, device_map=places, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(model(TOKENS).logits, load(path)(TOKENS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("case", first(["int4", "fp8"], ["fp8"]))
def test_compiled_models_compute_the_same(case: str, tmp_path: Path) -> None:
    model = load(pc.write(tmp_path, case))
    assert torch.equal(torch.compile(model, backend="aot_eager")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_bitsandbytes_loads_into_its_own_layers(kind: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    AutoModelForCausalLM.from_config(pc.config("llama")).save_pretrained(tmp_path / "dense")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    stock.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path / "model")
    assert type(model.model.layers[0].mlp.up_proj) is bitsandbytes.nn.Linear4bit
    assert same_tensors(model.state_dict(), stock.state_dict())
    model = peft_ext.accelerate(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    assert peft_ext.explain(model).fused_share == 1


# --- errors -----------------------------------------------------------------------------------------------------------

_GROUP = pc.CASES["int4"][0]["config_groups"]["group_0"]


def _group(**fields: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**_GROUP, **fields}}}


@pytest.mark.parametrize(
    ("case", "fields", "text"),
    [
        ("fp8", {"quant_method": "quanto"}, "quant_method is 'quanto', wanted one of fp8, mxfp4, compressed-tensors"),
        ("fp8", {"activation_scheme": "static"}, "activation_scheme of fp8 is 'static', wanted 'dynamic'"),
        (
            "fp8",
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "quant_method is 'bitsandbytes', wanted one of",
        ),
        ("fp8", {"fmt": "e5m2"}, "fmt of fp8 is 'e5m2', wanted 'e4m3'"),
        ("fp8", {"expert_dtype": "fp4"}, "expert_dtype of fp8 is 'fp4'"),
        ("gptq", {"bits": 3}, "bits of gptq is 3, wanted 2, 4, 8"),
        ("gptq", {"dynamic": {"-:lm_head": {}, "+:.*mlp": {"bits": 3}}}, "bits of gptq is 3, wanted 2, 4, 8"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format of gptq is 'marlin', wanted 'gptq', 'gptq_v2'"),
        ("awq", {"bits": 8}, "bits of awq is 8, wanted 4"),
        ("awq", {"version": "gemv"}, "version of awq is 'gemv', wanted 'gemm'"),
        ("int4", {"format": "marlin-24"}, "format 'marlin-24' with int weights of 4 bits"),
        ("int4", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not supported"),
        ("int4", {"config_groups": {}}, "config_groups of compressed-tensors is {}"),
        ("int4", _group(weights=None), "config_groups.group_0 of compressed-tensors has no weights"),
        ("int4", _group(weights={**_GROUP["weights"], "num_bits": 3}), "int weights of 3 bits"),
        (
            "int4",
            _group(input_activations={"num_bits": 8, "dynamic": False}),
            "are quantized (int of 8 bits, dynamic False)",
        ),
        (
            "int4",
            _group(input_activations={"num_bits": 4, "type": "float", "dynamic": True}),
            "(float of 4 bits, dynamic True)",
        ),
        ("int4", _group(output_activations={"num_bits": 8, "dynamic": True}), "output_activations of"),
    ],
)
def test_what_is_not_supported_is_named_before_a_weight_is_read(
    case: str, fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = rewrite(pc.write(tmp_path, case), **fields)
    for file in path.glob("*.safetensors"):
        file.write_bytes(b"no safetensors file")
    with pytest.raises(ValueError) as caught:
        load(path)
    assert text in str(caught.value) and str(caught.value).startswith("PackedConfig: ")


def test_a_checkpoint_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(pc.config("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json has no quantization_config"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("case", "name", "change", "text"),
    [
        ("fp8", "weight_scale_inv", None, "has weight without weight_scale_inv"),
        ("fp8", "weight_scale_inv", lambda t: t[:1], r"scales of fp8 has shape (1, 2), wanted (2, 2)"),
        ("int4", "weight_scale", None, "has weight_packed without weight_scale"),
        ("int4", "weight_packed", lambda t: t[:, :1].contiguous(), "codes of int is torch.int32 with 64 elements"),
        ("gptq act-order", "g_idx", lambda t: t + 7, "g_idx of gptq is from 7 to 8, wanted groups from 0 to 1"),
    ],
)
def test_tensors_that_do_not_fit_are_named(case: str, name: str, change: Any, text: str, tmp_path: Path) -> None:
    path = changed(pc.write(tmp_path, case), f"model.layers.1.self_attn.q_proj.{name}", change)
    with pytest.raises(ValueError, match="PackedConfig: model.layers.1.self_attn.q_proj") as caught:
        load(path)
    assert text in str(caught.value)


def test_other_quantization_configs_go_to_transformers(tmp_path: Path) -> None:
    path = pc.write(tmp_path, "fp8")
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config but you are passing a Mxfp4Config"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=Mxfp4Config())


# --- training ---------------------------------------------------------------------------------------------------------

METHODS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=8, target_modules="all-linear"),
    "dora": LoraConfig(r=8, target_modules=["q_proj", "down_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": AdaLoraConfig(target_modules=["q_proj", "v_proj"], total_step=10),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["fp8", "int4 zeros", "gptq act-order"])
def test_adapters_are_fused_with_the_numbers_of_the_dense_model(case: str, method: str, tmp_path: Path) -> None:
    base = load(pc.write(tmp_path, case))
    models = []
    for model in (base, dense(copy.deepcopy(base))):
        torch.manual_seed(1)
        model = get_peft_model(model, copy.deepcopy(METHODS[method]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        models.append(model)
    trained = [{name: p for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert all(torch.equal(one, trained[1][name]) for name, one in trained[0].items())
    stock = [model(TOKENS).logits for model in models]
    assert torch.equal(*stock)
    for model in models:
        peft_ext.accelerate(model)
        model(TOKENS, labels=TOKENS).loss.backward()
    assert torch.equal(*(model(TOKENS).logits for model in models))
    assert all(torch.equal(one.grad, trained[1][name].grad) for name, one in trained[0].items())
    rows = peft_ext.explain(models[0]).rows
    adapted = [row for row in rows if " over " in row.kind]
    assert adapted and all(row.fused for row in rows)
    assert all(f"over PackedLinear ({case.split()[0].replace('int4', 'int')})" in row.kind for row in adapted)
    assert all(("input is not quantized" in row.reason) == (case == "fp8") for row in adapted)


@pytest.mark.parametrize("case", ["gpt-oss", *pc.CASES])
def test_lora_on_packed_experts_is_fused(case: str, tmp_path: Path) -> None:
    """The logits, losses and gradients are those of LoRA over the decoded experts."""
    path = pc.write_gpt_oss(tmp_path) if case == "gpt-oss" else pc.write_mixture(tmp_path, case)
    base = load(path, dtype=torch.float32)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters)
    models = []
    for model in (base, dense(copy.deepcopy(base))):
        torch.manual_seed(1)
        model = get_peft_model(model, copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn_like(parameter)
        models.append(peft_ext.accelerate(model))
    results = [model(TOKENS, labels=TOKENS) for model in models]
    assert close(*(one.logits for one in results)) and close(*(one.loss for one in results))
    for one in results:
        (one.logits.square().sum() + one.loss).backward()
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert any("experts" in name and grad.abs().max() > 0 for name, grad in gradients[0].items())
    assert all(close(grad, gradients[1][name]) for name, grad in gradients[0].items())
    kind = type(models[0].get_base_model().model.layers[0].mlp.experts.get_base_layer()).__name__
    row = next(row for row in peft_ext.explain(models[0]).rows if "experts" in row.name)
    assert row.fused and row.kind == f"LoRA over {kind}.down_proj"
    with pytest.raises(RuntimeError, match="merge: .* is packed"):
        models[0].merge_adapter()


@pytest.mark.slow
def test_trainer_trains_adapters_over_packed_weights(tmp_path: Path) -> None:
    path = pc.write(tmp_path / "model", "int4")
    model = get_peft_model(load(path), LoraConfig(r=8, target_modules="all-linear"))
    peft_ext.accelerate(model)
    data = [{"input_ids": row, "labels": row} for row in TOKENS.repeat(4, 1)]
    options = TrainingArguments(tmp_path / "run", max_steps=2, per_device_train_batch_size=2, report_to=[],
                                learning_rate=1e-2, save_strategy="steps", save_steps=2, use_cpu=True)  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = Trainer(model, options, train_dataset=data).train()
    assert result.global_step == 2 and result.training_loss < 10
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert len(saved) == 28 and all("lora_" in name for name in saved)


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, threading, time
import torch, transformers
from transformers.models.llama import modeling_llama
import peft_ext
from peft_ext.integrations.packed import PackedConfig

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=PackedConfig())

load(sys.argv[1])  # imports what a load imports
before, most, done = anonymous(), [0], []
def watch():
    while not done:
        most[0] = max(most[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2])
done.append(True)
thread.join()
print(max(most[0], anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
def test_loading_needs_no_more_memory_than_the_files(tmp_path: Path) -> None:
    small = pc.write(tmp_path / "small", "int4")
    path = pc.write(tmp_path / "large", "int4", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    command = [sys.executable, "-c", _MEASURE, str(small), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert size > 12e6 and int(run.stdout.split()[-1]) <= 1.15 * size


def test_transformers_is_as_the_tests_know_it() -> None:
    assert hasattr(transformers.quantizers.auto.AutoHfQuantizer, "merge_quantization_configs")
