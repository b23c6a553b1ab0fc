"""Tests of peft_ext.get_peft_model and load_adapter: results equal those of PEFT's functions and are accelerated;
AdaLoRA over bfloat16; files that are refused.
"""

import copy
import shutil
import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("aenum")
pytest.importorskip("bitsandbytes")

import peft
import transformers
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune, weight_norm
from tuner_models import assert_same, batch, logits, make_base

import peft_ext
from peft_ext.model import get_peft_model, load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


def test_get_peft_model_accelerates_what_peft_makes():
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    model = get_peft_model(make_base("llama"), config, "mine")
    assert model.active_adapters == ["mine"] and peft_ext.explain(model).fused_share == 1
    stock = get_peft_model(make_base("llama"), config, accelerate=False, autocast_adapter_dtype=False)
    assert peft_ext.explain(stock).fused_share == 0
    with pytest.raises(TypeError, match="config is dict, wanted a PeftConfig"):
        get_peft_model(make_base("llama"), {"r": 4})
    with pytest.raises(ValueError, match="dora_dropout is 'x'"):
        get_peft_model(make_base("llama"), config, dora_dropout="x")


def test_load_adapter(tmp_path):
    base = make_base("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    saved = get_peft_model(copy.deepcopy(base), config)
    saved.save_pretrained(tmp_path / "a")
    first = logits(saved.eval())
    model = load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert torch.equal(logits(model), first) and peft_ext.explain(model).fused_share == 1
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert load_adapter(model, str(tmp_path / "a"), "b", is_trainable=True) is model
    assert model.active_adapters == ["b"] and torch.equal(logits(model), first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    assert peft_ext.explain(model).fused_share == 1
    load_adapter(model, tmp_path / "a", "c")
    assert model.active_adapters == ["c"] and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has an adapter 'b' already"):
        load_adapter(model, tmp_path / "a", "b")
    with pytest.raises(TypeError, match="model is dict, wanted a model"):
        load_adapter({}, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_adapter(base, tmp_path / "nope")

    other = tmp_path / "pickled"
    saved.save_pretrained(other, safe_serialization=False)
    with pytest.raises(ValueError, match="has adapter_model.bin, a pickle, and no adapter_model.safetensors"):
        load_adapter(copy.deepcopy(base), other)
    (other / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors"):
        load_adapter(copy.deepcopy(base), other)
    save_file(load_file(tmp_path / "a" / "adapter_model.safetensors"), other / "adapter_model.safetensors")
    loaded = load_adapter(copy.deepcopy(base), tmp_path, subfolder="pickled", accelerate=False)
    assert peft_ext.explain(loaded).fused_share == 0
    torch.testing.assert_close(logits(loaded), first)


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
def test_what_is_within_a_saved_module_is_a_part_of_the_model(tmp_path, beside):
    """RoBERTa's head has layers of its own, which PEFT saves without listing them in modules_to_save."""
    config = transformers.RobertaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                        num_attention_heads=2, num_labels=3)  # fmt: skip
    base = transformers.RobertaForSequenceClassification(config)
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4, init_lora_weights=False)
    saved = get_peft_model(copy.deepcopy(base), lora)
    saved.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert "base_model.model.classifier.dense.bias" in load_file(file)
    fresh = get_peft_model(copy.deepcopy(base), lora, "first") if beside else base
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "load_adapter: ")
        loaded = load_adapter(fresh, tmp_path, "mine")
    assert_same(get_peft_model_state_dict(loaded, adapter_name="mine"), load_file(file))
    save_file(load_file(file) | {"base_model.model.classifier.other.bias": torch.ones(3)}, file)
    with pytest.warns(UserWarning, match="has base_model.model.classifier.other.bias, which is no part of Roberta"):
        load_adapter(loaded, tmp_path, "more")


def test_an_adapter_of_tied_embeddings_is_loaded_beside_another(tmp_path):
    """With tied embeddings, the head and the embedding share a tensor, for which the model has more names than the
    adapter's file."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                      num_attention_heads=2, tie_word_embeddings=True)  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    tokens = peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"])
    get_peft_model(copy.deepcopy(base), tokens).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: delta + 1 for name, delta in load_file(file).items()}, file)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    first = logits(loaded)
    assert load_adapter(loaded, tmp_path, "second").active_adapters == ["second"]
    assert torch.equal(logits(loaded), first) and not torch.allclose(first, logits(base.eval()))
    save_file({"base_model.model.model.norm.weight": torch.ones(32)}, file)
    with pytest.raises(ValueError, match="lacks . of the adapter's tensors"):
        load_adapter(loaded, tmp_path, "third")
    assert torch.equal(logits(loaded), first)


# --- AdaLoRA ----------------------------------------------------------------------------------------------------------


def ada_lora(**changes):
    return peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_r=6, target_r=3, tinit=2,
                              tfinal=4, total_step=16, **changes)  # fmt: skip


def ranknums(model):
    return {name: p for name, p in model.named_parameters() if ".ranknum." in name}


def ada_lora_s(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def train_ada_lora(model, steps=16):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(**batch(model.get_base_model())).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def without_loss(model):
    """Returns the model's logits without computing a loss: PEFT's loss raises for an AdaLoRA model without a trainable
    adapter."""
    with torch.no_grad():
        return model.eval()(input_ids=batch(model.get_base_model())["input_ids"]).logits


def without_lost_ranks(model):
    """Returns a copy whose tensors are cut to the remaining ranks, as in the adapter's file, so that sums over the rank
    have equally many terms."""
    model = copy.deepcopy(model)
    ranks = {name.removesuffix(".default"): kept for name, kept in model.peft_config["default"].rank_pattern.items()}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "ranknum"):
            kept = torch.tensor(ranks[f"{name}.lora_E"])
            lora_A, lora_B, lora_E = layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]
            lora_A.data, lora_B.data, lora_E.data = lora_A.data[kept], lora_B.data[:, kept], lora_E.data[kept]
    return model


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ada_lora_s_divisor_is_not_trained(dtype, autocast):
    model = get_peft_model(make_base("llama").to(dtype), ada_lora(), autocast_adapter_dtype=autocast)
    train_ada_lora(model)
    assert len(ranknums(model)) == 14
    assert all(p.item() == 6 and not p.requires_grad for p in ranknums(model).values())
    assert {p.dtype for p in ada_lora_s(model).values()} == {torch.float32 if autocast else dtype}


@pytest.mark.parametrize("beside", [False, True], ids=["fresh", "beside another"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_ada_lora_over_bfloat16_is_read_as_it_was_saved(tmp_path, is_trainable, beside):
    base = make_base("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(base), ada_lora())
    train_ada_lora(model)
    kept = [sum(ranks) for ranks in model.peft_config["default"].rank_pattern.values()]
    assert 0 < sum(kept) < 6 * len(kept)
    wanted = without_loss(without_lost_ranks(model))
    torch.testing.assert_close(without_loss(model), wanted)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}

    fresh = copy.deepcopy(base)
    if beside:
        fresh = get_peft_model(fresh, ada_lora(inference_mode=True), "first")
    loaded = load_adapter(fresh, tmp_path, "mine", is_trainable=is_trainable)
    assert torch.equal(without_loss(loaded), wanted)
    assert_same(get_peft_model_state_dict(loaded, adapter_name="mine"), saved)
    assert loaded.peft_config["mine"].rank_pattern is not None
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert bool(trained) is is_trainable and not any("ranknum" in name for name in trained)
    if is_trainable:
        assert {name.rpartition(".")[2] for name in trained} == {"mine"}


def test_ada_lora_without_autocast_stays_in_the_base_s_dtype(tmp_path):
    base = make_base("llama").bfloat16()
    model = get_peft_model(copy.deepcopy(base), ada_lora())
    train_ada_lora(model)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert {p.dtype for p in ada_lora_s(loaded).values()} == {torch.bfloat16}
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert_same(get_peft_model_state_dict(loaded), get_peft_model_state_dict(stock))


def test_what_is_not_to_train_is_frozen_over_bfloat16_too(tmp_path):
    base = make_base("llama").bfloat16()
    get_peft_model(copy.deepcopy(base), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    loaded = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert {name.split(".")[-2] for name, p in loaded.named_parameters() if p.requires_grad} == {"ia3_l"}


def _options(model):
    return [(name, module.__dict__.get("_peft_ext_dora_dropout"), module.training, type(module))
            for name, module in model.named_modules() if "two" not in name]  # fmt: skip


def test_a_load_keeps_what_the_layers_were_told(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, use_dora=True, lora_dropout=0.5)
    model = get_peft_model(make_base("llama"), config, dora_dropout="lora")
    model.save_pretrained(tmp_path)
    before = [kept for _, kept, *_ in _options(model)]
    assert "lora" in before
    load_adapter(model, tmp_path, "two", is_trainable=True)
    assert [kept for _, kept, *_ in _options(model)] == before
    load_adapter(model, tmp_path, "three", is_trainable=True, dora_dropout="peft")
    assert not any(kept for _, kept, *_ in _options(model))


@pytest.mark.parametrize("what", ["rank", "a tensor less", "a module that is not there"])
def test_a_load_that_fails_leaves_the_model_as_it_was(tmp_path, what):
    model = get_peft_model(make_base("llama"), peft.LoraConfig(target_modules=["q_proj"], r=4)).train()
    model.save_pretrained(tmp_path)
    before, config = _options(model), tmp_path / "adapter_config.json"
    assert any(row.fused for row in peft_ext.explain(model).blocks)
    if what == "a tensor less":
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors.popitem()
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    else:
        old, new = ('"r": 4', '"r": 9') if what == "rank" else ('"q_proj"', '"nobody"')
        config.write_text(config.read_text().replace(old, new))
    blocks = [(row.name, row.fused) for row in peft_ext.explain(model).blocks]
    with pytest.raises(ValueError, match="load_adapter: |not found in the base model"):
        load_adapter(model, tmp_path, "two")
    assert _options(model) == before and "two" not in model.peft_config
    assert [(row.name, row.fused) for row in peft_ext.explain(model).blocks] == blocks
    assert model.active_adapters == ["default"]


def _state_of(model):
    """Returns the class, mode, attributes and trained parameters of each module."""
    return {
        name: (type(module), module.training, sorted(module.__dict__), sorted(module._modules),
               sorted((key, id(p), p.requires_grad) for key, p in module._parameters.items() if p is not None))
        for name, module in model.named_modules()
    }  # fmt: skip


def _broken(folder, what):
    """Changes the files of an adapter of q_proj with modules_to_save, so that the adapter can't be loaded."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if what.startswith("lacks "):
        tensors = load_file(file)
        (key,) = (key for key in tensors if what.removeprefix("lacks ") in key)
        save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    elif what != "dora_dropout":
        old, new = ('"r": 4', '"r": 9') if what == "rank" else ('"q_proj"', '"nobody"')
        config.write_text(config.read_text().replace(old, new))


FAILURES = {
    "rank": r"load_adapter: [\s\S]*size mismatch",
    "module": "No modules were targeted",
    "lacks layers.1.self_attn.q_proj.lora_A": r"load_adapter: .*adapter_model.safetensors lacks .*1.self_attn.q_proj",
    "lacks lm_head.weight": r"load_adapter: .*adapter_model.safetensors lacks base_model.model.lm_head.weight",
    "dora_dropout": "dora_dropout is 'x'",
}


@pytest.mark.parametrize("beside", [False, True], ids=["base", "beside another"])
@pytest.mark.parametrize("what", FAILURES)
def test_a_failed_load_changes_no_module(tmp_path, what, beside):
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False, modules_to_save=["lm_head"])
    get_peft_model(make_base("llama"), config).save_pretrained(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "whole")
    model = make_base("llama").train()
    if beside:
        model = get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, use_dora=True))
    before, wanted = _state_of(model), logits(model)
    _broken(tmp_path, what)
    options = {"dora_dropout": "x"} if what == "dora_dropout" else {"dora_dropout": "lora", "experts_dropout": 0.1}
    with pytest.raises(ValueError, match=FAILURES[what]):
        load_adapter(model, tmp_path, "two", **options)
    assert _state_of(model) == before and torch.equal(logits(model), wanted)
    assert not any("_peft_ext_dora_dropout" in module.__dict__ for module in model.modules())
    assert hasattr(model, "peft_config") is beside and "two" not in getattr(model, "peft_config", {})
    loaded = load_adapter(model, tmp_path / "whole", "two")
    fresh = load_adapter(make_base("llama"), tmp_path / "whole", "two")
    torch.testing.assert_close(logits(loaded), logits(fresh))


def test_a_file_without_its_prompt_is_named(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(make_base("llama"), config).save_pretrained(tmp_path)
    save_file({"other": torch.ones(4)}, tmp_path / "adapter_model.safetensors")
    model = make_base("llama")
    with pytest.raises(ValueError, match=r"load_adapter: .*adapter_model.safetensors lacks prompt_embeddings"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("make", [weight_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.3)])
def test_a_layer_whose_weight_is_no_parameter_is_in_nobodys_way(make):
    base = make_base("llama")
    stock = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], r=4)).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=4)).eval()
    for either in (stock, model):
        make(either.get_base_model().model.layers[0].mlp.down_proj)
    peft_ext.accelerate(model)
    assert torch.allclose(logits(model), logits(stock), atol=1e-5)
    peft_ext.explain(model)
    make(model.get_base_model().model.layers[0].mlp.up_proj)
    peft_ext.explain(model)


def test_a_scripted_module_is_left_alone():
    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(8, 8)))
            self.proj = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(self.scripted(x))

    model = peft.get_peft_model(Scripted(), peft.LoraConfig(target_modules=["proj"], r=4, init_lora_weights=False))
    x = torch.randn(3, 8)
    wanted = model(x)
    torch.testing.assert_close(peft_ext.accelerate(model)(x), wanted)
    assert peft_ext.explain(model).fused_share == 1
