"""Tests merge_to_dense: errors in the middle of writing, wrong arguments, and the messages of the command."""

import errno
import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from merged_models import CAUSAL, MODELS, dequantized, lora, refusal, same_as_on, trained  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from peft_ext import BottleneckConfig  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.merge import MergeError, merge_to_dense  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights and new heads

# --- nothing half-written ---------------------------------------------------------------------------------------------


def test_an_error_in_the_middle_leaves_the_old_folder(made, tmp_path, monkeypatch):
    base, adapter = made("Llama", lora("q_proj"))
    merge_to_dense(base, adapter, tmp_path / "out")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    weights = load_file(adapter / "adapter_model.safetensors")
    # The products of these finite factors are infinite in float32.
    huge = {key: tensor.sign() * 3e38 if "layers.1" in key else tensor for key, tensor in weights.items()}
    shutil.copytree(adapter, tmp_path / "huge")
    save_file(huge, tmp_path / "huge/adapter_model.safetensors", {"format": "pt"})
    for overwrite, out in ((True, tmp_path / "out"), (False, tmp_path / "new")):
        with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.q_proj: NaNs detected"):
            merge_to_dense(base, tmp_path / "huge", out, overwrite=overwrite)
    shutil.rmtree(tmp_path / "huge")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="No space left on device: [0-9]+ KB to write, 1.00 KB free") as caught:
        merge_to_dense(base, adapter, tmp_path / "out", overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


# --- refusals ---------------------------------------------------------------------------------------------------------


def edited(adapter: Path, out: Path, edit) -> Path:
    """Copies the adapter to ``out``, applies ``edit`` to its tensors, and returns ``out``."""
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    edit(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / "adapter_model.safetensors",
              {"format": "pt"})  # fmt: skip
    return out


refused = partial(refusal, merge_to_dense)


def test_refuses_adapters_that_do_not_fit(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj", modules_to_save=["norm"]))
    out = tmp_path / "out"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    less = edited(adapter, tmp_path / "less", lambda t: t.pop(key))
    assert refused(base, less, out) == f"the adapter's file has no {key}"
    less = edited(adapter, tmp_path / "head", lambda t: t.pop("base_model.model.model.norm.weight"))
    assert refused(base, less, out) == "the adapter's file has no base_model.model.model.norm.weight"
    more = edited(adapter, tmp_path / "more", lambda t: t.update({key.replace("q_proj", "x_proj"): t[key].clone()}))
    assert "layers.0.self_attn.x_proj.lora_A" in refused(base, more, out)
    assert "which is no part of LlamaForCausalLM with LORA" in refused(base, more, out)
    narrow = edited(adapter, tmp_path / "narrow", lambda t: t.update({key: t[key][:, :16]}))
    found = refused(base, narrow, out)
    assert "does not fit LlamaForCausalLM: size mismatch for" in found and "[4, 16]" in found and "[4, 64]" in found
    other = MODELS["GPT-2"].build()
    assert "Target modules" in refused(other, adapter, out) and "q_proj" in refused(other, adapter, out)
    (narrow / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    assert "adapter_model.safetensors: " in refused(base, narrow, out)
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "has adapter_model.bin, a pickle, and no adapter_model.safetensors" in refused(base, adapter, out)
    (adapter / "adapter_config.json").unlink()
    assert refused(base, adapter, out) == f"no adapter_config.json in {adapter}, wanted an adapter in PEFT's format"
    assert not out.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_values_that_are_not_finite(made, tmp_path, value):
    base, adapter = made("Llama", lora("q_proj", modules_to_save=["norm"]))
    key = "base_model.model.model.norm.weight"
    bad = edited(adapter, tmp_path / "bad", lambda t: t.update({key: t[key].index_fill(0, torch.tensor(3), value)}))
    for dtype in ("keep", "fp32"):
        found = refused(base, bad, tmp_path / "out", dtype=dtype)
        assert found == f"{bad}/adapter_model.safetensors: {key} has values that are not finite"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.norm", "model.layers.0.mlp.up_proj"])
def test_refuses_a_dtype_that_cannot_hold_a_weight(made, tmp_path, name):
    """Tests a merged weight, a weight of modules_to_save, and a weight of the base."""
    base, adapter = made("Llama", lora("q_proj", modules_to_save=["norm"]))
    large = -65520.0  # rounds to minus infinity in float16
    if name.endswith("q_proj"):
        key = f"base_model.model.{name}.lora_B.weight"
        edited(adapter, tmp_path / "large", lambda t: t.update({key: t[key] * 1e9}))
    elif name.endswith("norm"):
        key = f"base_model.model.{name}.weight"
        edited(adapter, tmp_path / "large", lambda t: t.update({key: t[key].index_fill(0, torch.tensor(3), large)}))
    else:
        shutil.copytree(adapter, tmp_path / "large")
        weights = load_file(base / "model.safetensors")
        weights[f"{name}.weight"][2, 3] = large
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    found = refused(base, tmp_path / "large", tmp_path / "out", dtype="fp16")
    assert found == f"{name}.weight: a value is too large for float16, wanted another dtype"
    assert not (tmp_path / "out").exists()
    merge_to_dense(base, tmp_path / "large", tmp_path / "out", dtype="bf16")


def test_an_infinity_of_the_base_stays(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = -torch.inf
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    merge_to_dense(base, adapter, tmp_path / "out", dtype="fp16")
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].isinf().nonzero().tolist() == [[3]]


METHODS = {
    "PREFIX_TUNING": peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "PROMPT_TUNING": peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "BOTTLENECK": BottleneckConfig(**CAUSAL),
    "VBLORA": peft.VBLoRAConfig(**CAUSAL, r=4, vector_length=16, num_vectors=60, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_refuses_methods_that_no_weight_can_hold(made, tmp_path, method):
    base, adapter = made("Llama", METHODS[method])
    assert refused(base, adapter, tmp_path / "out").startswith(f"{method} ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_refuses_layers_that_share_a_weight(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj", layer_replication=[(0, 2), (1, 2)]))
    assert refused(base, adapter, tmp_path / "out").startswith("layer_replication has several layers share one weight")


def test_refuses_an_adapter_to_a_base_that_is_nowhere(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    assert "init_lora_weights is 'pissa_niter_4', which changed the base" in refused(base, adapter, tmp_path / "out")


def test_refuses_bases(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"))
    out = tmp_path / "out"
    assert refused("./nowhere", adapter, out) == "model is ./nowhere, no such folder"
    assert "no config.json" in refused(tmp_path, adapter, out)
    with pytest.raises(TypeError, match="model is Linear, wanted a transformers model or its folder"):
        merge_to_dense(torch.nn.Linear(2, 2), adapter, out)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert "model is a PeftModel, wanted its base" in refused(model, adapter, out)
    assert "has adapter layers already" in refused(model.base_model.model, adapter, out)
    with torch.device("meta"):
        empty = MODELS["Llama"].model(MODELS["Llama"].config)
    assert "on the meta device" in refused(empty, adapter, out)
    config = json.loads((base / "config.json").read_text())
    for about, text in (
        ({"quant_method": "gptq", "bits": 4}, "quant_method is gptq, and no layer of its files is stored as gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is quantized by bitsandbytes: "),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes, fp4"),
        ({"quant_method": "aqlm"}, "is quantized by aqlm: quant_method is 'aqlm', wanted one of "),
    ):
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
        assert text in refused(base, adapter, out)
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "has pytorch_model.bin, a pickle, and no safetensors" in refused(base, adapter, out)
    assert not out.exists()


def test_refuses_a_head_that_would_be_random(tmp_path):
    MODELS["Llama"].build().save_pretrained(tmp_path / "base")
    model = transformers.LlamaModel.from_pretrained(tmp_path / "base")
    trained(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config.update(task_type="CAUSAL_LM", auto_mapping=None)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    moved = {k.replace("model.layers", "model.model.layers"): t
             for k, t in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}  # fmt: skip
    save_file(moved, tmp_path / "adapter/adapter_model.safetensors", {"format": "pt"})
    found = refused(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert found == "lm_head.weight is in neither the base's files nor the adapter, so it would be random"


def test_refuses_options_and_outputs(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"))
    out = tmp_path / "out"
    assert refused(base, adapter, out, dtype="int8") == "dtype is int8, wanted one of bf16, fp16, fp32, keep"
    assert refused(base, adapter, out, base_quant="fp4") == (
        "base_quant is 'fp4', wanted one of nf4, mxfp4, nvfp4, fp8, int4, checkpoint, none, or None"
    )
    assert "blocksize is 48, wanted one of 32, 64" in refused(base, adapter, out, blocksize=48)
    assert "max_shard_size is 'much'" in refused(base, adapter, out, max_shard_size="much")
    for path in (base, adapter, tmp_path):
        assert f"output is {path}, which is or holds" in refused(base, adapter, path, overwrite=True)
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not empty"):
        merge_to_dense(base, adapter, out)
    assert "not empty and no model's folder, so it is not replaced" in refused(base, adapter, out, overwrite=True)
    assert (out / "mine").read_text() == "kept"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did(made, tmp_path, capsys):
    base, adapter = made("Llama, tied", lora("embed_tokens", "q_proj"))
    out = tmp_path / "out"
    arguments = ["merge", "--adapter", str(adapter), "--output", str(out)]
    capsys.readouterr()
    assert main([*arguments, "--dtype", "bf16", "--max-shard-size", "60KB"]) == 0
    said, complaints = capsys.readouterr()
    assert complaints == ""
    lines = said.splitlines()
    assert lines[0] == f"base: {base}, LlamaForCausalLM; quantization none, as the adapter's folder has no run.json"
    assert lines[1] == f"adapter: {adapter}, LORA, merged into 3 modules"
    assert lines[2].startswith("largest relative change of a weight: ") and lines[2].endswith(
        "model.embed_tokens.weight"
    )
    assert lines[3] == "no longer tied, since the adapter changed one of the tied weights: lm_head.weight"
    assert lines[4].startswith("written: ") and lines[4].endswith(" files, bfloat16")
    assert lines[5] == "tokenizer: none" and lines[6].startswith(f"saved: {out} in ")
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {out}: the folder exists and is not empty\n")
    assert main([*arguments, "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--overwrite", "--model", "./nowhere"]) == 2
    assert capsys.readouterr() == ("", "error: model is ./nowhere, no such folder\n")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


def test_the_command_takes_the_base_that_a_run_trained_on(made, tmp_path, capsys):
    base, adapter = made("Llama", lora("q_proj", "up_proj"))
    run = {"options": {"model": str(base), "quant": "nf4", "blocksize": 128}}
    (adapter / "run.json").write_text(json.dumps(run))
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "quantization nf4, double quantization, blocks of 128, as the adapter's run.json has it" in said
    trained_on = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)  # finetune trains on a bfloat16 base
    assert not same_as_on(dequantized(trained_on, 128), adapter, tmp_path / "out")
    checkpoint = adapter / "checkpoints/checkpoint-3"
    checkpoint.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, checkpoint)
    assert merge_to_dense(None, checkpoint, tmp_path / "early").base_quant == "nf4"
    assert merge_to_dense(None, checkpoint, tmp_path / "plain", base_quant="none").base_quant == "none"
    # Another program may have written the options in this run.json.
    (adapter / "run.json").write_text(json.dumps({"options": {"quant": "int3"}}))
    with pytest.raises(MergeError, match="options have the quant 'int3', wanted one of nf4, mxfp4, nvfp4"):
        merge_to_dense(None, adapter, tmp_path / "other")


def test_warnings_and_bars_are_given_back(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"))
    level = transformers.utils.logging.get_verbosity()
    # A command that another test of this process ran may have disabled the progress bar.
    transformers.utils.logging.enable_progress_bar()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merge_to_dense(base, adapter, tmp_path / "out")
    assert not caught and transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled()
