"""Tests that recommend, explain, chat and bench print the results of the library, and print errors in one line."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from commands import refused, said  # noqa: E402
from tiny_run import TEMPLATE, needs_bnb  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.bench import layer  # noqa: E402
from peft_ext.cli import chat  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.methods import METHODS, make_config, method_config  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("the commands choose the device themselves")]
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("recommend", "explain", "chat", "bench")


def document(capsys, *arguments: object):
    return json.loads(said(capsys, *arguments, "--json"))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """Returns the folder of a random Llama with large weights, because with small weights a model repeats tokens.

    The model is float32, so that the likeliest token is unique, with a KV cache and without.
    """
    folder = tmp_path_factory.mktemp("base")
    config = transformers.AutoConfig.from_pretrained(tiny / "model")
    config.update({"initializer_range": 0.3, "tie_word_embeddings": False, "dtype": torch.float32})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
    return folder


def base_of(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Returns a function from a method to the folder of a saved adapter with large weights, as after long training."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(method: str) -> Path:
        if not (folder / method).is_dir():
            path, fields = method_config(method, "CAUSAL_LM")
            if method in ("lora", "dora", "rslora"):
                fields |= {"r": 4}
            torch.manual_seed(1)
            model = peft.get_peft_model(base_of(base), make_config(path, fields))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 2 * torch.randn_like(parameter)
            model.save_pretrained(folder / method)
        return folder / method

    return make


# --- recommend --------------------------------------------------------------------------------------------------------


_GIVEN = {"batch_size": 2, "sequence_length": 64, "prefer": "quality", "quantization": "nf4"}


@pytest.fixture(scope="module")
def recommended(base):
    return peft_ext.recommend_peft_method(
        transformers.AutoConfig.from_pretrained(base), 8.0, "generation", 5000, **_GIVEN
    )


@pytest.mark.slow
def test_recommend_says_what_the_function_says(capsys, base, recommended, monkeypatch):
    def function(config, *args, **kwargs):
        assert type(config) is transformers.LlamaConfig and args == (8.0, "generation", 5000) and kwargs == _GIVEN
        return recommended

    monkeypatch.setattr("peft_ext.recommend.recommend_peft_method", function)
    asked = ("recommend", "--model", base, "--memory", 8, "--examples", 5000, "--batch-size", 2,
             "--sequence-length", 64, "--prefer", "quality")  # fmt: skip
    found, wanted = document(capsys, *asked), recommended
    assert found["fits"] and found["method"] == wanted.method == "dora"
    assert found["config_kwargs"] == dict(wanted.config_kwargs) and tuple(found["reasons"]) == wanted.reasons
    assert found["memory"]["total"] == wanted.memory.total and found["memory"]["peak"] == dict(wanted.memory.peak)
    assert [other["method"] for other in found["alternatives"]] == [other.method for other in wanted.alternatives]
    out = said(capsys, *asked)
    flat = " ".join(out.split())
    assert all(reason[:60] in flat for reason in wanted.reasons)
    assert all(other.name in out for other in wanted.alternatives)
    assert "LoraConfig(task_type='CAUSAL_LM'" in flat and "\x1b" not in out


def test_recommend_ends_with_1_where_nothing_fits(capsys, recommended, monkeypatch):
    reasons = ("Nothing fits: the least is IA3.", "A card of 80 GB would do.")
    nothing = replace(recommended, method=None, name="nothing fits", config_class="", config_kwargs={}, reasons=reasons)
    monkeypatch.setattr("peft_ext.recommend.recommend_peft_method", lambda *args, **kwargs: nothing)
    assert main(["recommend", "--model-size", "70", "--memory", "4"]) == 1
    out, err = capsys.readouterr()
    assert "nothing fits" in out and all(reason in out for reason in reasons) and "config" not in out and err == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--model-size (billions of parameters) or --model (a folder): wanted one of them"),
        (("--model-size", "7", "--model", "x"),
         "--model-size (billions of parameters) or --model (a folder): wanted one of them"),
        (("--model-size", "7", "--memory", "0"), "--memory 0.0: wanted a number above 0"),
        (("--model-size", "-7", "--memory", "8"), "--model-size -7.0: wanted a number above 0"),
        (("--model-size", "7", "--memory", "8", "--examples", "0"), "--examples 0: wanted a positive integer"),
        (("--model-size", "7", "--memory", "8", "--batch-size", "0"), "--batch-size 0: wanted a positive integer"),
        (("--model-size", "7", "--memory", "8", "--prefer", "speed"),
         "--prefer speed: wanted one of ('balanced', 'quality')"),
        (("--model", "./nowhere", "--memory", "8"), "model is ./nowhere, no such folder"),
    ],
)  # fmt: skip
def test_recommend_refuses(capsys, arguments, message):
    assert refused(capsys, "recommend", *arguments) == message


def test_recommend_refuses_tasks_and_takes_memory_from_a_gpu_alone(capsys, monkeypatch):
    found = refused(capsys, "recommend", "--model-size", "7", "--memory", "8", "--task", "dancing")
    assert found.startswith("--task dancing: wanted one of CAUSAL_LM (generation, ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(capsys, "recommend", "--model-size", "7") == (
        "--memory: wanted the memory of the card in GB, since this machine has no GPU"
    )


# --- explain ----------------------------------------------------------------------------------------------------------

EXPLAINED = ("lora", "rslora", "dora", "adalora", "ia3", "prefix", "prompt", "bottleneck")


@pytest.fixture(scope="module")
def explained(base):
    """Returns the output of ``explain --json`` with all methods."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        chosen = [part for name in (*EXPLAINED, "bitfit") for part in ("--method", name)]
        code = main(["explain", str(base), "--rank", "4", "--batch-size", "2", "--sequence-length", "32",
                     "--dtype", "fp32", "--json", *chosen])  # fmt: skip
    assert code == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize("method", EXPLAINED)
def test_explain_is_what_the_live_model_is(base, tmp_path, explained, method):
    found = next(one for one in explained["methods"] if one["method"] == method)
    path, fields = method_config(method, "CAUSAL_LM")
    if "r" in fields:
        fields["r"] = 4
    elif "init_r" in fields:
        fields |= {"init_r": 6, "target_r": 4}
    model = peft_ext.get_peft_model(base_of(base), make_config(path, fields)).train()
    assert found["rows"] == [vars(row) for row in peft_ext.explain(model).rows]
    assert found["fused"] == found["layers"] == len(found["rows"])
    assert (found["layers"] == 0) == (method in ("prefix", "prompt"))
    assert found["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - found["adapter_bytes"]
    assert 0 < header < 20_000  # the header has names and shapes of the tensors
    memory = peft_ext.estimate_memory(model, batch_size=2, sequence_length=32)
    assert found["memory"]["total"] == pytest.approx(memory.total, rel=0.01)
    assert explained["parameters"] == base_of(base).num_parameters()


def test_explain_goes_on_where_one_method_of_several_does_not_fit(capsys, base, explained):
    assert list(explained["refused"]) == ["bitfit"] and "no bias" in explained["refused"]["bitfit"]
    assert refused(capsys, "explain", base, "--method", "bitfit").startswith("bitfit: BitFitConfig: no bias")


def test_explain_says_which_names_are_missing(capsys, base):
    from peft_ext._imports import MISSING

    assert document(capsys, "explain", base, "--method", "lora")["missing"] == []
    text = "peft 9.0 is not as peft_ext knows it: cannot import name 'Linear'; LoRA is not fused"
    MISSING.append(text)
    try:
        assert document(capsys, "explain", base, "--method", "lora")["missing"] == [text]
        assert text in said(capsys, "explain", base, "--method", "lora").splitlines()
    finally:
        MISSING.remove(text)


def test_explain_prints_tables_of_a_quantized_model(capsys, base):
    out = said(capsys, "explain", base, "--quant", "nf4", "--blocksize", 128, "--method", "ia3")
    assert "quantization: nf4, double quantization, blocks of 128, as asked for\n" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["ia3", "6", "IA3", "over", "NF4Linear", "yes", "k_proj,", "v_proj,", "down_proj"] in lines
    assert ["ia3", "8", "NF4Linear", "yes", "q_proj,", "o_proj,", "gate_proj,", "up_proj"] in lines
    assert next(line for line in lines if line[:1] == ["ia3"])[1:4] == ["14", "of", "14"]
    assert "memory of a training step, 4 x 256 tokens, adamw, on cpu:" in out and "\x1b" not in out


def test_explain_reads_no_weight(capsys, base, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32768, intermediate_size=131072, num_hidden_layers=4, num_attention_heads=64, vocab_size=65536,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)  # without a weight file
    found = document(capsys, "explain", tmp_path, "--rank", 8, "--quant", "nf4", "--batch-size", 1)
    (lora,) = found["methods"]
    dense, layers = (2 * 65536 + 9) * 32768, 4 * 16 * 32768**2
    assert found["parameters"] == dense + layers and lora["fused"] == lora["layers"] == 28
    assert lora["memory"]["weights"] == pytest.approx(2 * dense + layers / 2, rel=1e-3)


def test_explain_an_adapter_as_its_run_has_it(capsys, base, adapters, tmp_path):
    folder = adapters("dora")
    found = document(capsys, "explain", folder)
    (one,) = found["methods"]
    assert one["method"] == "LORA" and one["rows"][0]["kind"] == "DoRA over Linear"
    assert one["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert found["model"] == str(base) and found["dtype"] == "float32"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    run = {"options": {"model": str(base), "quant": "nf4", "blocksize": 128}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    found = document(capsys, "explain", tmp_path)
    assert found["quantization"] == "nf4" and found["blocksize"] == 128 and found["dtype"] == "bfloat16"
    assert {row["kind"] for row in found["methods"][0]["rows"]} == {"DoRA over NF4Linear"}
    assert document(capsys, "explain", tmp_path, "--quant", "none")["quantization"] == "none"


def test_explain_an_adapter_that_brings_its_head(capsys, tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    kind = transformers.BertForSequenceClassification
    model = kind.from_pretrained(tmp_path / "base", num_labels=7)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    found = document(capsys, "explain", tmp_path / "adapter", "--sequence-length", 8)
    assert found["model_class"] == kind.__name__
    assert found["methods"][0]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_explain_says_why_not(capsys, base, monkeypatch):
    from peft_ext.integrations.adapter_layers import reasons

    monkeypatch.setitem(reasons.KERNELS["lora_linear"], "cpu", False)
    out = said(capsys, "explain", base)
    assert "0 of 14" in out and "no native kernels of lora_linear" in out


def test_explain_refuses(capsys, base, adapters, tmp_path):
    model, lora = base, adapters("lora")

    def message(*arguments: object) -> str:
        return refused(capsys, "explain", *arguments)

    assert message("./nowhere") == "model is ./nowhere, no such folder"
    assert message(tmp_path) == f"no config.json in {tmp_path}, wanted a model in transformers' format"
    assert message(model, "--method", "full") == f"--method full: wanted one of {', '.join(METHODS)}"
    assert message(model, "--rank", 0) == "--rank 0: wanted 1 to 2147483647"
    assert message(model, "--rank", 4, "--method", "ia3") == (
        "--rank 4: wanted with --method lora, rslora, qlora, dora, adalora"
    )
    assert message(model, "--quant", "int3").startswith("--quant int3: wanted one of nf4, mxfp4, ")
    assert message(model, "--dtype", "fp8") == "--dtype fp8: wanted one of bf16, fp16, fp32, keep"
    assert message(model, "--sequence-length", 512) == "--sequence-length 512: the model takes at most 256 tokens"
    assert message(model, "--model", model) == ("--model: wanted with an adapter alone, whose base it names")
    assert message(lora, "--method", "ia3") == f"--method: {lora} is an adapter, which has its own method"
    (tmp_path / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    assert message(tmp_path) == f"{tmp_path} has no adapter_model.safetensors"


# --- chat -------------------------------------------------------------------------------------------------------------


def parts(out: str) -> list[tuple[str, str, str]]:
    """Returns prompts, the base's answers and the adapted model's answers from the output of chat without a
    terminal.
    """
    found = []
    for block in out.split("prompt: ")[1:]:
        prompt, rest = block.split("\nbase: ", 1)
        base, adapted = rest.split("\nadapted: ", 1)
        found.append((prompt, base, adapted.removesuffix("\n")))
    return found


@torch.no_grad()
def answer(model, tokenizer, prompt: str, count: int = 10) -> str:
    """Returns the text of ``count`` likeliest tokens, computed token by token with the model's forward."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(count):
        token = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == tokenizer.eos_token_id:
            break
    return chat._printable(tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip())


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "prefix", "prompt", "bottleneck"])
def test_chat_answers_for_base_and_adapter(capsys, base, adapters, method):
    folder, prompt = adapters(method), "Hello there"
    ((asked, plain, adapted),) = parts(
        said(capsys, "chat", "--adapter", folder, "--model", base, "--prompt", prompt, "--max-new-tokens", 10)
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert asked == prompt and plain == answer(base_of(base).eval(), tokenizer, prompt)
    stock = peft.PeftModel.from_pretrained(base_of(base), folder).eval()
    assert adapted == answer(stock, tokenizer, prompt) != plain


# (options of LoRA, whether the base has biases, reason why the model with the adapter disabled differs from the base)
@pytest.mark.parametrize(
    "options, biases, reason",
    [
        ({"init_lora_weights": "pissa"}, False, "init_lora_weights is 'pissa', which changes the base's weights"),
        ({"init_lora_weights": "olora"}, False, "init_lora_weights is 'olora', which changes the base's weights"),
        ({"layer_replication": [[0, 2], [0, 2]]}, False, "layer_replication gives the adapted model other layers"),
        ({"bias": "all"}, True, "bias is 'all', so the adapter's biases replace those of the base"),
        ({"bias": "all"}, False, None),
    ],
)
def test_chat_says_where_a_disabled_adapter_leaves_no_base(capsys, base, tmp_path, options, biases, reason):
    AutoModelForCausalLM.from_pretrained(base, attention_bias=biases).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "base")
    base, folder, prompt = tmp_path / "base", tmp_path / "adapter", "Hello there"
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)
    model = peft.get_peft_model(base_of(base), config)
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad * torch.randn_like(parameter)
    model.save_pretrained(folder)
    asked = ("chat", "--adapter", folder, "--model", base, "--prompt", prompt, "--max-new-tokens", 10)
    ((_, plain, adapted),) = parts(said(capsys, *asked))
    stock = peft.PeftModel.from_pretrained(base_of(base), folder).eval()
    assert adapted == answer(stock, tokenizer, prompt)
    its_own = answer(base_of(base).eval(), tokenizer, prompt)
    assert plain == its_own if reason is None else plain.startswith(f"not shown, since {reason}")
    with stock.disable_adapter():
        assert (answer(stock, tokenizer, prompt) == its_own) == (reason is None)


def test_chat_asks_as_the_run_was_trained(capsys, base, adapters, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapters("lora") / name).read_bytes())
    tokenizer, model = AutoTokenizer.from_pretrained(base), base_of(base).eval()
    for kind, asked in (("chat", "Hello there\n"), ("text", "Hello there")):
        run = {"options": {"model": str(base), "quant": "none"}, "examples": {"kind": kind}}
        (tmp_path / "run.json").write_text(json.dumps(run))
        out = said(capsys, "chat", "--adapter", tmp_path, "--prompt", "Hello there", "--max-new-tokens", 10)
        ((_, plain, _),) = parts(out)
        assert plain == answer(model, tokenizer, asked)


@pytest.mark.parametrize("option", ["--seed", "--threads"])
def test_chat_refuses_numbers_that_are_none(capsys, base, adapters, option):
    found = refused(capsys, "chat", "--adapter", adapters("lora"), "--model", base, "--prompt", "Hi", option, 2**70)
    assert found.startswith(f"{option} {2**70}: wanted ")


def test_chat_computes_the_norm_of_dora_once(capsys, base, adapters, monkeypatch):
    from peft_ext import ops

    right, layers = ops.dora_weight_norm, []
    monkeypatch.setattr(ops, "dora_weight_norm", lambda *args, **kwargs: layers.append(0) or right(*args, **kwargs))
    asked = ("chat", "--adapter", adapters("dora"), "--model", base, "--max-new-tokens", 6)
    said(capsys, *asked, "--prompt", "Hello there")
    model = peft.PeftModel.from_pretrained(base_of(base), adapters("dora"))
    assert len(layers) == sum(bool(getattr(module, "lora_A", None)) for module in model.modules()) > 0


def test_chat_takes_base_and_quantization_from_the_run(capsys, base, adapters, tmp_path, monkeypatch):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapters("lora") / name).read_bytes())
    run = {"options": {"model": str(base), "quant": "nf4", "blocksize": 128}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    made = []
    quantize = peft_ext.quantize.quantize_nf4
    monkeypatch.setattr(
        "peft_ext.quantize.quantize_nf4", lambda model, **given: made.append(given) or quantize(model, **given)
    )
    asked = ("chat", "--adapter", tmp_path, "--prompt", "Hi", "--max-new-tokens", 4)
    ((_, plain, _),) = parts(said(capsys, *asked))
    assert made == [{"blocksize": 128, "progress": False}]
    model = quantize(base_of(base, torch.bfloat16), blocksize=128).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    made_by = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert plain == chat._printable(tokenizer.decode(made_by[0, 2:], skip_special_tokens=True).strip())
    said(capsys, *asked, "--base-quant", "none")
    assert len(made) == 1
    said(capsys, *asked, "--base-quant", "nf4", "--blocksize", 64)
    assert made[1]["blocksize"] == 64


def test_chat_reads_lines_and_goes_on_after_one_that_is_too_long(capsys, adapters, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one\n\n{'long ' * 60}\ntwo\n"))
    assert main(["chat", "--adapter", str(adapters("lora")), "--max-new-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert [asked for asked, _, _ in parts(out)] == ["one", "two"]
    assert err == ("error: the prompt is 300 tokens, which with 2 more (--max-new-tokens) is over the model's 256\n")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_chat_samples_by_seed(capsys, adapters, method):
    asked = ("chat", "--adapter", adapters(method), "--prompt", "Hi", "--max-new-tokens", 8, "--temperature", 5)
    first, again, other = (said(capsys, *asked, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_chat_uses_the_chat_template(capsys, base, adapters, tmp_path):
    folder = tmp_path / "model"
    base_of(base).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    ((_, plain, _),) = parts(
        said(capsys, "chat", "--adapter", adapters("lora"), "--model", folder, "--prompt", "Hi", "--max-new-tokens", 6)
    )
    assert plain == answer(base_of(base).eval(), tokenizer, "<user>Hi</s><assistant>", 6)


def test_chat_shows_columns_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    chat._show("asked", "of the base\x1b[2J", "[bold]of the adapter[/bold]")
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "of the base" in line)
    assert "of the base\N{REPLACEMENT CHARACTER}[2J" in line and "[bold]of the adapter[/bold]" in line
    assert "\x1b[2J" not in out and len(line) <= 60


def test_chat_refuses(capsys, base, adapters, tmp_path):
    lora = adapters("lora")

    def message(*arguments: object, adapter: Path = lora) -> str:
        return refused(capsys, "chat", "--adapter", adapter, "--prompt", "Hi", *arguments)

    assert message("--max-new-tokens", 0) == "--max-new-tokens 0: wanted 1 to 2147483647"
    assert message("--prompt", " ") == "--prompt: the prompt is empty"
    assert message("--temperature", -1) == "--temperature -1.0: wanted 0 (the likeliest token) or more"
    assert message("--base-quant", "int3").startswith("--base-quant int3: wanted one of nf4, mxfp4, ")
    assert message(adapter=tmp_path / "no") == f"--adapter {tmp_path}/no: no such folder"
    assert message(adapter=tmp_path) == (f"no adapter_config.json in {tmp_path}, wanted an adapter in PEFT's format")
    assert message("--model", "./nowhere") == "model is ./nowhere, no such folder"
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    found = message("--model", tmp_path / "other")
    assert found.startswith("the adapter does not fit LlamaForCausalLM: size mismatch")
    (tmp_path / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    assert message(adapter=tmp_path) == (
        f"the adapter does not fit LlamaForCausalLM: {tmp_path} has no adapter_model.safetensors"
    )


# --- bench ------------------------------------------------------------------------------------------------------------

SMALL = ("bench", "--hidden", 64, "--tokens", 8, "--rank", 4, "--seconds", 0.01, "--threads", 1)


@needs_bnb
def test_bench_verifies_and_times_every_layer(capsys):
    before = torch.get_num_threads()
    found = document(capsys, *SMALL)
    assert torch.get_num_threads() == before
    assert [(row["method"], row["base"]) for row in found["results"]] == [
        (method, base) for method in layer.METHODS for base in layer.BASES
    ]
    for row in found["results"]:
        stock = "PEFT" if row["base"] == "bf16" else "PEFT + bitsandbytes"
        assert set(row["milliseconds"]) == {"ours", stock, "frozen layer"} and row["rounds"] >= 3
        assert all(value > 0 for value in (*row["milliseconds"].values(), *row["ratio"].values()))
        assert set(row["error"]) == {"ours", stock} and all(1e-4 < error < 1e-2 for error in row["error"].values())
        assert row["absent"] == {} and row["quartiles"].keys() == row["ratio"].keys()
        assert all(low <= row["ratio"][name] <= high for name, (low, high) in row["quartiles"].items())
    assert found["machine"]["isa"] == peft_ext._native.STATE.isa and found["machine"]["threads"] == 1
    assert found["machine"]["versions"]["torch"] == torch.__version__


def test_bench_prints_a_table(capsys):
    out = said(capsys, *SMALL, "--method", "lora", "--base", "bf16")
    assert "layer: 64 x 64, 8 tokens, rank 4; forward and backward\n" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["LoRA"])
    assert row[1] == "PEFT" and row[4].endswith("x") and "\x1b" not in out
    low, dash, high = row[5:8]
    assert dash == "-" and float(low) <= float(row[4][:-1]) <= float(high)


def test_bench_says_when_the_machine_is_too_busy_to_judge(capsys, monkeypatch):
    for apart, told in ((0.1, False), (0.6, True)):
        ends = lambda times, apart=apart: {name: (1.0 - apart, 1.0) for name in (*times,)[1:]}  # noqa: E731
        monkeypatch.setattr(layer, "quartile_ratios", ends)
        monkeypatch.setattr(layer, "median_ratios", lambda times: dict.fromkeys((*times,)[1:], 1.0))
        out = said(capsys, *SMALL, "--method", "lora", "--method", "ia3", "--base", "bf16")
        assert ("the machine is too busy to judge LoRA, IA3: the quartiles are more than 25% apart" in out) == told


@needs_bnb
def test_bench_takes_the_names_of_quantized_methods(capsys):
    found = document(capsys, *SMALL, "--method", "qlora", "--method", "lora", "--base", "nf4")
    assert [(row["method"], row["base"]) for row in found["results"]] == [("lora", "nf4")]


def test_bench_goes_without_bitsandbytes(capsys, monkeypatch):
    there = layer.find_spec
    monkeypatch.setattr(layer, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    (row,) = document(capsys, *SMALL, "--method", "qdora")["results"]
    assert row["absent"] == {"PEFT + bitsandbytes": "bitsandbytes is not installed"} and row["error"].keys() == {"ours"}
    out = said(capsys, *SMALL, "--method", "qdora")
    assert "not compared: PEFT + bitsandbytes: bitsandbytes is not installed" in out


def test_bench_times_nothing_that_is_wrong_or_not_fused(capsys, monkeypatch):
    from peft_ext.integrations.adapter_layers import lora, reasons

    asked = [str(part) for part in (*SMALL, "--method", "lora", "--base", "bf16", "--json")]
    right = lora.checked_lora_linear
    assert main(asked) == 0  # From its second call on, a layer calls checked_lora_linear.
    with monkeypatch.context() as patch:  # The value y is wrong by 2%, and the gradients are right.
        patch.setattr(lora, "checked_lora_linear", lambda *args: 1.02 * right(*args))
        assert main(asked) == 2
        assert "bench: lora over bf16 is off from float64 by 0.02" in capsys.readouterr().err
    monkeypatch.setitem(reasons.KERNELS["lora_linear"], "cpu", False)
    assert main(asked) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: bench: lora over bf16 would not run fused here: no native kernels of lora_linear")


def test_bench_draws_a_chart(capsys, tmp_path):
    path = tmp_path / "chart.svg"
    out = said(capsys, *SMALL, "--method", "ia3", "--base", "bf16", "--chart", path)
    assert out.endswith(f"chart: {path}\n")
    assert path.read_bytes().startswith(b"<svg")


def test_bench_refuses(capsys, tmp_path):
    def message(*arguments: object) -> str:
        return refused(capsys, *SMALL, *arguments)

    assert message("--method", "qia4") == (
        "--method qia4: wanted one of lora, dora, ia3, or qlora, qdora: those over nf4"
    )
    assert message("--base", "int3") == "--base int3: wanted one of bf16, nf4"
    assert message("--hidden", 8) == "--hidden 8: wanted 16 to 2147483647"
    assert message("--tokens", 0) == "--tokens 0: wanted 1 to 2147483647"
    assert message("--threads", 0) == "--threads 0: wanted 1 to 2147483647"
    assert message("--seconds", 0) == "--seconds 0: wanted more than 0 and at most 3600"
    assert message("--chart", "a.gif") == "--chart a.gif: wanted a name that ends in .svg"
    assert message("--chart", tmp_path / "no/a.svg") == f"--chart {tmp_path}/no/a.svg: {tmp_path}/no is no folder"


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_hugging_face_they_say_what_is_missing():
    code = (
        "import importlib.util as util, sys\n"
        "there = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('peft', 'transformers') else there(name, *rest)\n"
        "from peft_ext.cli.main import main\n"
        "for command in ('recommend --model-size 7', 'explain x', 'chat --adapter x', 'bench'):\n"
        "    assert main(command.split()) == 2\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {name} needs transformers, peft: pip install 'peft_ext[hf]'" for name in COMMANDS
    ]


def test_ctrl_c_is_130(capsys, adapters, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["chat", "--adapter", str(adapters("lora"))]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
