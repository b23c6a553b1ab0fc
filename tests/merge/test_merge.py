"""Tests merge_to_dense: the written model, loaded by transformers alone, has the adapted model's logits."""

import copy
import importlib.util
import json
import os

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from merged_models import CAUSAL, MODELS, dequantized, lora, same_as_on, trained  # noqa: E402
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from peft_ext import (  # noqa: E402
    BitFitConfig,
    DiffPruningConfig,
    NF4Weight,
    PartialConfig,
    merge,
    quantize_nf4,
)
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.merge import MergeError, merge_to_dense, writer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights and new heads
needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def inputs(name):
    batch = MODELS[name].batch()
    if MODELS[name].config.is_encoder_decoder:
        return {**MODELS[name].inputs(), "decoder_input_ids": batch["labels"]}
    return MODELS[name].inputs()


@torch.no_grad()
def logits(model, name):
    return model.eval()(**inputs(name)).logits


def assert_merged(name, base, adapter, out, *, dtype=torch.float32, tight=2e-5, bits=True):
    """Asserts that the folder has the adapted model's logits and, with ``bits``, the tensors of PEFT's own merge."""
    kind = MODELS[name].model
    reference = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), adapter)
    model, about = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(about.values()), about
    assert model.dtype == dtype and type(model) is kind
    wanted, plain = logits(reference, name), logits(kind.from_pretrained(base, dtype=torch.float32), name)
    scale = wanted.abs().max()
    assert (wanted - plain).abs().max() > 0.02 * scale  # the adapter must change the logits
    torch.testing.assert_close(logits(model, name).float(), wanted, rtol=0, atol=float(tight * scale))
    if bits:
        for key, tensor in reference.merge_and_unload().state_dict().items():
            torch.testing.assert_close(
                model.state_dict()[key], tensor, rtol=0, atol=0, msg=lambda t, k=key: f"{k}: {t}"
            )
    return model


# --- methods and architectures ----------------------------------------------------------------------------------------

TARGETS = {
    "Llama": ("q_proj", "down_proj"),
    "GPT-2": ("c_attn", "c_proj"),
    "BERT": ("query", "dense"),
    "T5": ("q", "wo"),
}
LAYERS = {
    "LoRA": lambda name, task: lora(*TARGETS[name], task_type=task),
    "rsLoRA, patterns": lambda name, task: lora(
        *TARGETS[name], task_type=task, use_rslora=True, rank_pattern={TARGETS[name][0]: 2},
        alpha_pattern={TARGETS[name][1]: 24},
    ),
    "DoRA": lambda name, task: lora(*TARGETS[name], task_type=task, use_dora=True),
    "AdaLoRA": lambda name, task: AdaLoraConfig(
        task_type=task, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1, target_modules=list(TARGETS[name])
    ),
    "IA3": lambda name, task: IA3Config(
        task_type=task, init_ia3_weights=False, target_modules=list(TARGETS[name]),
        feedforward_modules=[TARGETS[name][1]],
    ),
    "Partial": lambda name, task: PartialConfig(task_type=task, num_last_layers=1),
    "Diff Pruning": lambda name, task: DiffPruningConfig(task_type=task, target_modules=list(TARGETS[name])),
}  # fmt: skip


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("name", TARGETS)
def test_merged_it_is_the_adapted_model(made, tmp_path, name, method):
    base, adapter = made(name, LAYERS[method](name, MODELS[name].task))
    done = merge_to_dense(base, adapter, tmp_path / "out")
    assert_merged(name, base, adapter, tmp_path / "out")
    assert done.files == ("model.safetensors",) and done.merged > 0 and done.untied == () and done.dtype is None
    assert done.largest_change[1] > 1e-3 and done.model_class == MODELS[name].model.__name__
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [done.model_class]


MORE = {
    "LoRA of biases too": ("GPT-2", lora("c_attn", bias="all", lora_bias=True)),
    "a bias tied to a layer's": ("BERT", lora("query", task_type="SEQ_CLS", bias="all")),
    "modules_to_save": ("Llama", lora("q_proj", modules_to_save=["lm_head", "norm"])),
    "modules_to_save, tied on": (
        "Llama, tied", lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "tokens of a tied embedding": ("Llama, tied", lora("q_proj", trainable_token_indices=[3, 5, 9])),
    "all of a tied model": ("Llama, tied", DiffPruningConfig(**CAUSAL)),
    "an embedding": ("Llama", lora("embed_tokens", "q_proj")),
    "experts": (
        "Mixtral", lora("q_proj", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    ),
    "BitFit": ("GPT-2", BitFitConfig(**CAUSAL)),
    "LoHa": ("Llama", peft.LoHaConfig(**CAUSAL, init_weights=False, target_modules=["q_proj"])),
    "OFT": ("Llama", peft.OFTConfig(**CAUSAL, r=0, oft_block_size=4, init_weights=False, target_modules=["q_proj"])),
    "norms": ("Llama", peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm"])),
}  # fmt: skip


@pytest.mark.parametrize("case", MORE)
def test_merged_it_is_the_adapted_model_in_other_ways(made, tmp_path, case):
    name, config = MORE[case]
    base, adapter = made(name, config)
    assert merge_to_dense(base, adapter, tmp_path / "out").untied == ()
    assert_merged(name, base, adapter, tmp_path / "out")


def test_a_pruned_difference(tmp_path):
    model = MODELS["Llama"].build()
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, DiffPruningConfig(**CAUSAL, target_modules=["q_proj", "lm_head"]))
    kept = adapted.prune(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_to_dense(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    model = assert_merged("Llama", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    changed = {name: int((tensor != before[name]).sum()) for name, tensor in model.state_dict().items()}
    assert {name: count for name, count in changed.items() if count} == kept


# Adapters after whose merge two tied weights differ. PEFT's own merge would change both weights.
UNTIED = {
    "embedding": ("Llama, tied", lora("embed_tokens"), ("lm_head.weight",)),
    "embedding, Conv1D": ("GPT-2", lora("wte", "c_attn"), ("lm_head.weight",)),
    "head": ("Llama, tied", lora("lm_head"), ("lm_head.weight",)),
    "both": ("Llama, tied", lora("lm_head", "embed_tokens"), ("lm_head.weight",)),
    "one saved": ("Llama, tied", lora("q_proj", modules_to_save=["lm_head"]), ("lm_head.weight",)),
    # T5's flag tie_word_embeddings has a second meaning, so the config does not change.
    "head of T5": ("T5", lora("lm_head", "q", task_type="SEQ_2_SEQ_LM"), ("lm_head.weight",)),
}


@pytest.mark.parametrize("case", UNTIED)
def test_an_adapted_half_of_a_tie_is_a_weight_of_its_own(made, tmp_path, case):
    name, config, untied = UNTIED[case]
    base, adapter = made(name, config)
    assert merge_to_dense(base, adapter, tmp_path / "out").untied == untied
    model = assert_merged(name, base, adapter, tmp_path / "out", bits=False)
    assert model.config.tie_word_embeddings == (name == "T5")
    assert "scale_decoder_outputs" not in model.config.to_dict() or model.config.scale_decoder_outputs


def test_added_biases_are_asked_for_by_the_config(made, tmp_path):
    base, adapter = made("Llama", BitFitConfig(**CAUSAL, add_bias=["q_proj", "down_proj"]))
    merge_to_dense(base, adapter, tmp_path / "out")
    model = assert_merged("Llama", base, adapter, tmp_path / "out", bits=False)
    assert model.config.attention_bias and model.config.mlp_bias
    assert not model.model.layers[0].self_attn.k_proj.bias.any() and model.model.layers[0].self_attn.q_proj.bias.any()


def test_the_experts_are_written_as_their_checkpoints_have_them(made, tmp_path):
    base, adapter = made(*MORE["experts"])
    merge_to_dense(base, adapter, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_a_classifier_on_a_language_model(tmp_path):
    MODELS["Llama"].build().save_pretrained(tmp_path / "base")
    kind = transformers.LlamaForSequenceClassification
    adapted = trained(kind.from_pretrained(tmp_path / "base", num_labels=5), lora("q_proj", task_type="SEQ_CLS"))
    adapted.save_pretrained(tmp_path / "adapter")
    done = merge_to_dense(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert done.model_class == "LlamaForSequenceClassification"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    adapted.config.pad_token_id = model.config.pad_token_id
    batch = {"input_ids": MODELS["Llama"].inputs()["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, adapted(**batch).logits, rtol=1e-5, atol=1e-5)


# --- dtypes and bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tight", [("bf16", 0.05), ("fp16", 0.01), ("fp32", 2e-5), ("keep", 0.05)])
def test_the_sum_is_rounded_once(made, tmp_path, dtype, tight):
    base, adapter = made("Llama", lora("q_proj", "up_proj"), torch.bfloat16)
    done = merge_to_dense(base, adapter, tmp_path / "out", dtype=dtype)
    wanted = merge.DTYPES[dtype] or torch.bfloat16
    model = assert_merged("Llama", base, adapter, tmp_path / "out", dtype=wanted, tight=tight, bits=False)
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    exact = exact.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, exact[key].to(wanted)) for key, tensor in model.state_dict().items())
    assert done.dtype is merge.DTYPES[dtype] and done.nbytes == sum(p.nbytes for p in model.parameters())


def test_an_adapter_in_16_bits_is_merged_in_float32(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"), torch.bfloat16)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    merge_to_dense(base, adapter, tmp_path / "out", dtype="fp32")
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    exact = exact.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in found.items())


def test_what_a_model_keeps_in_float32_stays_so(made, tmp_path):
    base, adapter = made("T5", lora("q", "wo", task_type="SEQ_2_SEQ_LM"))
    merge_to_dense(base, adapter, tmp_path / "out", dtype="fp16")
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "out/model.safetensors").items()}
    assert {name.split(".")[-2] for name, dtype in dtypes.items() if dtype == torch.float32} == {"wo"}


def test_a_base_to_be_quantized_is_taken_as_quantize_nf4_makes_it(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj", "up_proj"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    done = merge_to_dense(
        base, adapter, tmp_path / "out", base_quant="nf4", blocksize=128, double_quant=False, dtype=torch.float32
    )
    assert done.base_quant == "nf4" and done.base_quant_text == "nf4, blocks of 128, as asked for"
    assert not same_as_on(dequantized(model, 128, False), adapter, tmp_path / "out")
    assert same_as_on(model, adapter, tmp_path / "out")


def test_a_base_in_memory_quantized_or_not_is_left_as_it_is(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj", "up_proj", bias="all", modules_to_save=["norm"]))
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, model in (("dense", dense), ("nf4", quantize_nf4(copy.deepcopy(dense), progress=False))):
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        modules = [type(module) for module in model.modules()]
        done = merge_to_dense(model, adapter, tmp_path / name, dtype="fp32")
        assert done.base_quant == ("nf4" if name == "nf4" else "none")
        assert [type(module) for module in model.modules()] == modules
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        twin = dequantized(dense) if name == "nf4" else copy.deepcopy(dense)
        assert not same_as_on(twin, adapter, tmp_path / name)
    with pytest.raises(MergeError, match="base_quant is 'none', but the base itself is held in NF4"):
        merge_to_dense(model, adapter, tmp_path / "no", base_quant="none")
    wanted = logits(PeftModel.from_pretrained(model, adapter), "Llama")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"), "Llama")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@needs_bnb
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_folder_that_bitsandbytes_quantized(made, tmp_path, dora):
    base, adapter = made("Llama", lora("q_proj", "up_proj", use_dora=dora), torch.bfloat16)
    asked = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    load(base, quantization_config=asked, device_map="cpu", dtype=torch.bfloat16).save_pretrained(tmp_path / "4bit")
    done = merge_to_dense(tmp_path / "4bit", adapter, tmp_path / "out")
    assert done.base_quant == "nf4" and "as the base is held (14 layers)" in done.base_quant_text
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    dense = load(base, dtype=torch.float32)
    for name, module in load(tmp_path / "4bit", device_map="cpu", dtype="auto").named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = NF4Weight.from_bitsandbytes(module.weight).dequantize(torch.float32)
            dense.get_submodule(name).weight.data = weight
    assert not same_as_on(dense, adapter, tmp_path / "out", torch.bfloat16)


# --- files and memory -------------------------------------------------------------------------------------------------


def test_shards(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj", "embed_tokens"))
    done = merge_to_dense(base, adapter, tmp_path / "out", max_shard_size="60KB")
    assert len(done.files) > 3 and not (tmp_path / "out/model.safetensors").exists()
    assert_merged("Llama", base, adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes and set(index["weight_map"].values()) == set(done.files)
    for file in done.files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {n for n, f in index["weight_map"].items() if f == file} == set(opened.keys())
            assert len(opened.keys()) == 1 or os.path.getsize(tmp_path / "out" / file) < 62_000


def test_dtypes_of_several_widths_are_aligned_in_a_file(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.tensor(1.5), "c": torch.ones(5, dtype=torch.bfloat16),
        "d": torch.zeros(0, 4), "e": torch.tensor([True, False]), "f": torch.arange(2),
    }  # fmt: skip
    with open(tmp_path / "x", "wb") as stream:
        writer.write_safetensors(stream, {n: t.to("meta") for n, t in tensors.items()}, tensors.get, lambda done: None)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())


def test_what_is_used_beside_the_weights_comes_along(made, tmp_path):
    base, adapter = made("Llama", lora("q_proj"))
    (base / "tokenizer.json").write_text("{}")
    (base / "notes.txt").write_text("mine")
    merge_to_dense(base, adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "about", "files"), [
    ("WhisperTokenizer", "tokenizer", ["vocab.json", "merges.txt", "normalizer.json"]),
    ("DebertaV2TokenizerFast", "tokenizer", ["spm.model"]),
    ("PhobertTokenizer", "model", ["vocab.txt", "bpe.codes"]),
    ("MistralCommonBackend", "tokenizer", ["tekken.json"]),
    ("NoSuchTokenizer", "tokenizer", ["vocab.json"]),
    (["not a name"], "tokenizer", ["vocab.json"]),
])  # fmt: skip
def test_files_that_the_tokenizers_class_names_come_along(made, tmp_path, kind, about, files):
    base, adapter = made("Llama", lora("q_proj"))
    if about == "model":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "tokenizer_class": kind}))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} if about == "tokenizer" else {}))
    for name in (*files, "notes.txt", "notes.json"):
        (base / name).write_text("{}")
    merge_to_dense(base, adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json", *files,
    }  # fmt: skip


def test_files_that_the_tokenizer_lists_come_along(made, tmp_path):
    """Only names such as tokenizer.4.0.json, which transformers reads, so that no list replaces another file."""
    base, adapter = made("Llama", lora("q_proj"))
    listed = ["tokenizer.json", "tokenizer.4.0.json", "tokenizer.5.json", "notes.json", "model.safetensors",
              "../tokenizer.x.json", 5]  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": listed}))
    for name in ("tokenizer.json", "tokenizer.4.0.json", "notes.json"):
        (base / name).write_text("{}")
    merge_to_dense(base, adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {
        "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.4.0.json",
    }  # fmt: skip
    assert (tmp_path / "out/model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_the_adapters_tokenizer_is_written_where_it_has_one(made, tiny, tmp_path, capsys):
    base, adapter = made("Llama", lora("q_proj"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = "the base's"
    tokenizer.save_pretrained(base)
    (base / "processor_config.json").write_text("{}")
    done = merge_to_dense(base, adapter, tmp_path / "base's")
    read = transformers.AutoTokenizer.from_pretrained
    assert done.tokenizer == base and read(tmp_path / "base's").chat_template == "the base's"
    tokenizer.add_tokens(["<added>"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(adapter)
    done = merge_to_dense(base, adapter, tmp_path / "adapter's")
    found = read(tmp_path / "adapter's")
    assert done.tokenizer == adapter and found.chat_template is None and len(found("<added>")["input_ids"]) == 1
    assert (tmp_path / "adapter's/processor_config.json").is_file()
    for whose in ("adapter", "base"):
        out = tmp_path / f"command, {whose}"
        assert main(["merge", "--adapter", str(adapter), "--model", str(base), "--output", str(out)]) == 0
        assert f"\ntokenizer: the {whose}'s\n" in capsys.readouterr().out
        (adapter / "tokenizer_config.json").unlink(missing_ok=True)


class Allocations(TorchDispatchMode):
    """Measures the largest storage that an operator allocated, and the peak of the bytes of all storages alive."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not func.is_view:
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # skips results that share storage with an input
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return out


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_memory_is_that_of_a_layer(tmp_path, quant):
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=12,
                                      num_attention_heads=4)  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    trained(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    with Allocations() as seen:
        merge_to_dense(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", base_quant=quant)
    assert seen.largest == 4 * 64 * 256  # the bytes of the largest weight in float32
    assert 4 * 64 * 256 < seen.peak < 2 * layer < 4 * sum(p.numel() for p in model.parameters()) / 5
