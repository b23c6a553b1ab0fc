"""Tests which data, prompts, models and options a run accepts, and which it refuses before it loads weights."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers as hf
from safetensors.torch import load_file
from tiny_run import used, write_gemma3

import peft_ext
from peft_ext.cli.main import main
from peft_ext.integrations.model_blocks.mlp import activation_name
from peft_ext.methods import make_config, method_config
from peft_ext.run import Options, RunError, dry_run, finetune, train
from peft_ext.run.data import Corpus, prompt_ids, read_corpus, tokenize
from peft_ext.run.plan import preview
from peft_ext.run.prepare import adapter_config, meta_base, prepare
from peft_ext.sources.model import beside_text, text_targets

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("a run chooses the device itself"),
]
SIZES = dict(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
             num_key_value_heads=2, bos_token_id=0, eos_token_id=1)  # fmt: skip


def options_of(tiny: Path, output: Path, **changes: Any) -> Options:
    return Options(**used({"model": str(tiny / "model"), "data": str(tiny / "pairs.jsonl"), "output": output, "rank": 4,
                           "batch_size": 2, "block_size": 64, "max_steps": 2, **changes}))  # fmt: skip


def model_folder(tiny: Path, folder: Path, model: Any) -> str:
    torch.manual_seed(0)
    model.to(torch.bfloat16).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
    return str(folder)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0c", "\x0b", "\x1c"], ids=ascii)
def test_csv_fields_hold_what_others_cut_lines_at(tmp_path: Path, character: str) -> None:
    rows = [f"line {i} a{character}b c" for i in range(6)]
    (tmp_path / "one.csv").write_text("text\n" + "\n".join(rows) + "\n")
    (tmp_path / "two.csv").write_text("question,answer\n" + "".join(f"{i},{row}\n" for i, row in enumerate(rows)))
    one, two = (read_corpus(str(tmp_path / name)) for name in ("one.csv", "two.csv"))
    assert sorted(one.train + one.held_out) == rows
    assert sorted(record[1]["content"] for record in two.train + two.held_out) == rows


def test_csv_of_long_fields_and_lines_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\r\n" + b"x" * 200_000 + b'\r\n"y\r\nz"\r\n')
    corpus = read_corpus(str(tmp_path / "a.csv"))
    assert sorted(corpus.train + corpus.held_out, key=len) == ["y\nz", "x" * 200_000]


@pytest.mark.parametrize("row", [{"text": "{}"}, {"prompt": "a", "completion": "{}"}], ids=["text", "chat"])
def test_records_without_a_text_are_counted(row: dict[str, str], tmp_path: Path) -> None:
    rows = [{name: value.format(text) for name, value in row.items()} for text in ("a", "", " \n", "b")]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    corpus = read_corpus(str(tmp_path / "a.jsonl"))
    assert len(corpus.train) == len(corpus.held_out) == 1 and corpus.empty == 2


def test_tokens_of_texts_that_fill_no_block(tiny: Path, tmp_path: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny / "model")
    found = tokenize(Corpus("text", ["a" * 30, "b" * 30], ["c" * 12], "here"), tokenizer, 20)
    assert [len(row["input_ids"]) for row in found.train] == [20] * 3 and len(found.held_out[0]["input_ids"]) == 13
    assert found.rest == 2  # an end token follows each text; the held-out text is the only held-out block
    tokenizer.eos_token = None
    with pytest.raises(RunError, match="--data here: the texts .* to hold out, have 1 token"):
        tokenize(Corpus("text", ["a" * 30], ["c"], "here"), tokenizer, 20)


def test_a_conversation_is_asked_by_its_user() -> None:
    record = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    assert Corpus("chat", [record], [record], "here").sample_prompt() == "u"
    assert Corpus("chat", [record], [record[:1] + record[2:]], "here").sample_prompt() == "s"


def test_conversations_that_a_template_does_not_take(tiny: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    user, said, system = ({"role": role, "content": "hi"} for role in ("user", "assistant", "system"))
    for record, message in (([system, user, said], r"conversation of system, user, assistant \(.*no system"),
                            ([said, user, said], "begins with the assistant's turn, 'hi'")):  # fmt: skip
        with pytest.raises(RunError, match=message):
            tokenize(Corpus("chat", [record], [record], "here"), tokenizer, 64)
    tokenizer.chat_template = None
    with pytest.raises(RunError, match="a conversation of assistant, user, wanted a turn of the assistant's after"):
        tokenize(Corpus("chat", [[said, user]], [[said, user]], "here"), tokenizer, 64)


def test_tools_are_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    data = tmp_path / "tools.jsonl"

    def write(tools: Any) -> None:
        data.write_text("\n".join(json.dumps({"messages": messages, "tools": each}) for each in (None, [], tools)))

    write([])
    assert read_corpus(str(data)).train == [messages] * 2
    write([{"type": "function"}])
    with pytest.raises(RunError, match="record 3 has tools, which are not rendered"):
        read_corpus(str(data))


def test_adalora_s_divisor_is_frozen_over_a_dense_base(tiny: Path, tmp_path: Path) -> None:
    run = prepare(options_of(tiny, tmp_path / "run", method="adalora", quant="none"))
    base = hf.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16)
    model = train.adapt(run, base)
    divisors = {name: p for name, p in model.named_parameters() if "ranknum" in name}
    assert divisors and not any(p.requires_grad for p in divisors.values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == run.trainable


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}|{% endfor %}"])
def test_a_prompt_is_rendered_as_the_data_is(tiny: Path, template: str | None) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = template
    record = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (example,) = tokenize(Corpus("chat", [record], [record], "here"), tokenizer, 64).train
    asked = prompt_ids(tokenizer, record[:1], "chat")
    assert example["input_ids"][: len(asked)] == asked and example["labels"][len(asked) - 1] == -100
    assert example["labels"][len(asked)] != -100


def tokenizer_of(kind: str) -> Any:
    """Returns a small BPE tokenizer of a kind: ``bytes`` puts no space before a text, the other kinds put one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<s>", "</s>", "<unk>"]
    said = [f"{a} {b}\n{a}: {b} {b}" for a in ("user", "assistant", "one", "two") for b in ("hi", "hello", "three")]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, made.decoder = pre_tokenizers.ByteLevel.alphabet(), decoders.ByteLevel()
        special = special[:2]
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = ["\n", ":", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
        made.decoder = decoders.Metaspace()
        if kind == "legacy":  # the normalizer of Llama 2, which has no pre-tokenizer
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    words = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([word for text in said for word in (text, *text.split())], words)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>",
                                      **({} if kind == "bytes" else {"unk_token": "<unk>"}))  # fmt: skip


TURNS = [{"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "hello two"),
                                                           ("user", "three"), ("assistant", "hi"))]  # fmt: skip
SPECIAL = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)  # the space after "assistant:" and the first word of the answer can be one token


def example_of(tokenizer: Any, record: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    (row,) = tokenize(Corpus("chat", [record], [record], "here"), tokenizer, 256).train
    return row["input_ids"], row["labels"]


KINDS = ["bytes", "first", "always", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_has_the_tokens_of_its_whole_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = SPECIAL
    ids, labels = example_of(tokenizer, TURNS)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    said = tokenizer.decode([label for label in labels if label != -100])
    assert said.replace(" ", "") == "hellotwo</s>\nhi</s>\n"
    for count in (1, 3):
        asked = prompt_ids(tokenizer, TURNS[:count], "chat")
        assert ids[: len(asked)] == asked and labels[len(asked) - 1] == -100 != labels[len(asked)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_begins_where_inference_begins_it(kind: str) -> None:
    """The template's last space and the answer's first word are one token of the whole text, but not at inference."""
    tokenizer = tokenizer_of(kind)
    tokenizer.chat_template = PLAIN
    record = TURNS[:2]
    ids, labels = example_of(tokenizer, record)
    asked = prompt_ids(tokenizer, record[:1], "chat")
    text = tokenizer.apply_chat_template(record, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"][: len(asked)] != asked
    assert ids[: len(asked)] == asked and labels == [-100] * len(asked) + ids[len(asked) :]
    assert tokenizer.convert_ids_to_tokens(ids[len(asked)])[0] == "h"  # no second space before the answer
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("template", [SPECIAL, PLAIN, None], ids=["special", "plain", "none"])
def test_tokens_without_a_prefix_are_those_of_the_pieces(template: str | None) -> None:
    tokenizer = tokenizer_of("bytes")
    tokenizer.chat_template = template
    record = TURNS if template else [TURNS[0], {"role": "assistant", "content": "\n\nhello"}]
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for count in (1, 3) if template else ():
        before = tokenizer.apply_chat_template(record[:count], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(record[: count + 1], tokenize=False)
        asked, said = (tokenizer(text)["input_ids"] for text in (before[len(done) :], after[len(before) :]))
        ids, labels, done = ids + asked + said, labels + [-100] * len(asked) + said, after
    if not template:
        asked, said = (tokenizer(text)["input_ids"] for text in ("one\n", "\n\nhello</s>"))
        ids, labels = asked + said, [-100] * len(asked) + said
    assert example_of(tokenizer, record) == (ids, labels)


def test_a_prompt_and_a_completion_are_tokenized_as_one_text() -> None:
    for kind in KINDS:
        tokenizer = tokenizer_of(kind)
        ids, labels = example_of(tokenizer, TURNS[:2])
        assert ids == tokenizer("one\nhello two</s>", add_special_tokens=False)["input_ids"]
        asked = prompt_ids(tokenizer, TURNS[:1], "chat")
        assert ids[: len(asked)] == asked and labels == [-100] * len(asked) + ids[len(asked) :]


class Pairs:
    """A tokenizer without positions, whose tokens are pairs of characters."""

    is_fast, chat_template, bos_token_id, eos_token_id = False, None, None, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [hash(text[i : i + 2]) for i in range(0, len(text), 2)]}


def test_a_tokenizer_without_positions_is_compared_with_the_whole() -> None:
    record = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    ids, labels = example_of(Pairs(), record)
    assert ids == Pairs()("one\ntwo")["input_ids"] and labels == [-100, -100, *ids[2:]]
    with pytest.raises(RunError, match="the tokenizer, a Pairs, does not tell the positions of its tokens"):
        example_of(Pairs(), [{"role": "user", "content": "four"}, record[1]])


def test_bos_stands_before_a_text_where_the_tokenizer_puts_it_there() -> None:
    from tokenizers import processors

    plain, tokenizer = tokenizer_of("legacy"), tokenizer_of("legacy")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    one, two = (plain(text)["input_ids"] for text in ("one", "two hello"))
    for made, first in ((plain, []), (tokenizer, bos)):
        (block,) = tokenize(Corpus("text", ["one", "two hello"], ["one"], "here"), made, 256).train
        assert block["input_ids"] == block["labels"] == first + one + eos + first + two + eos
        ids, labels = example_of(made, TURNS[:2])
        assert ids == first + plain("one\nhello two</s>")["input_ids"] and labels[: len(first) + 1][-1] == -100
        assert prompt_ids(made, TURNS[:1], "text") == first + one
        made.chat_template = SPECIAL
        assert example_of(made, TURNS)[0].count(bos[0]) == 4  # the template writes all four; the tokenizer adds none
        assert prompt_ids(made, TURNS[:1], "chat").count(bos[0]) == 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_records_it_began_with(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text((tiny / "pairs.jsonl").read_text())
    options = options_of(tiny, tmp_path / "run", data=str(data), save_steps=1)
    finetune(options)
    assert len(json.loads((tmp_path / "run/run.json").read_text())["examples"]["digest"]) == 64
    assert prepare(replace(options, resume=True, max_steps=3)).checkpoint is not None
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_text())
    wrong = "--resume: the tokens of --data .* differ from those of the run"
    path.write_text(json.dumps({**record, "examples": {**record["examples"], "tokens": "0" * 16}}))
    with pytest.raises(RunError, match=wrong):
        prepare(replace(options, resume=True, max_steps=3))
    path.write_text(json.dumps(record))
    data.write_text(data.read_text().replace("What is 3", "What was 3"))
    with pytest.raises(RunError, match="--resume: the records of --data .* differ from those of the run"):
        prepare(replace(options, resume=True, max_steps=3))


@pytest.mark.slow
def test_a_checkpoint_whose_optimizer_does_not_fit_is_refused_by_name(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    from transformers import Trainer

    options = options_of(tiny, tmp_path / "run", data=str(tiny / "pairs.jsonl"), save_steps=1)
    finetune(options)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise ValueError("loaded state dict contains a parameter group that doesn't match the size of another group")

    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", refused)
    with pytest.raises(RunError, match="--resume: the optimizer's state in .*checkpoint.* does not fit this run"):
        finetune(replace(options, resume=True, max_steps=options.max_steps + 1))


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": "8"}, "--rank: it is '8', a str, wanted int"),
        ({"lr": "1e-3"}, "--lr: it is '1e-3', a str, wanted float"),
        ({"max_steps": 2.0}, "--max-steps: it is 2.0, a float, wanted int"),
        ({"overwrite": 1}, "--overwrite: it is 1, a int, wanted bool"),
        ({"rank": True}, "--rank: it is True, a bool, wanted int"),
        ({"prompt": 5}, "--prompt: it is 5, a int, wanted str"),
        ({"prompt": " "}, "--prompt: it is empty"),
        ({"target_modules": [1]}, r"--target-modules: it is \[1\], a list, wanted str"),
    ],
)
def test_options_of_another_type(tiny: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        prepare(options_of(tiny, tmp_path / "run", **changes))


def test_options_take_lists_of_names(tiny: Path, tmp_path: Path) -> None:
    run = prepare(options_of(tiny, tmp_path / "run", target_modules=["q_proj", "v_proj"], lr=1))
    assert run.options.target_modules == "q_proj,v_proj"
    assert run.trainable == prepare(options_of(tiny, tmp_path / "run", target_modules="q_proj, v_proj")).trainable


# --- room -------------------------------------------------------------------------------------------------------------


def test_what_is_over_the_models_positions_is_refused(tiny: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"method": "prompt", "block_size": 250}, "--block-size 250, and 20 virtual tokens .* at most 256 tokens"),
        (
            {"prompt": "word " * 50},
            "--prompt: it has 251 tokens, which with 48 tokens of an answer is over",
        ),
    ):
        with pytest.raises(RunError, match=message):
            prepare(options_of(tiny, tmp_path / "run", **changes))


@pytest.mark.slow
def test_prompts_of_the_data_that_leave_no_room_are_answered_by_nothing(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 46 + str(i), "completion": "yes"} for i in range(12)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4, n_positions=234,
                                            bos_token_id=0, eos_token_id=1))  # fmt: skip
    model = model_folder(tiny, tmp_path / "gpt2", gpt2)
    result = finetune(
        options_of(tiny, tmp_path / "run", model=model, data=str(tmp_path / "long.jsonl"), block_size=234)
    )
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert result.finished and [len(sample["before"]) <= 5 for sample in record["samples"]] == [True]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_without_sdpa_trains(tiny: Path, tmp_path: Path) -> None:
    gemma = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=16))
    model = model_folder(tiny, tmp_path / "gemma2", gemma)
    assert finetune(options_of(tiny, tmp_path / "run", model=model)).check.ok


@pytest.fixture(scope="module")
def gemma3(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_gemma3(tiny, tmp_path_factory.mktemp("gemma3")))


def test_modules_beside_text_get_no_adapter_by_default(tiny: Path, gemma3: str, tmp_path: Path) -> None:
    beside = ["model.vision_tower", "model.multi_modal_projector"]
    for method in ("lora", "dora", "adalora", "bitfit", "diff-pruning"):
        run = prepare(options_of(tiny, tmp_path / "run", model=gemma3, method=method))
        base = meta_base(run)
        assert beside_text(base) == beside
        model = peft_ext.get_peft_model(base, adapter_config(run, base), accelerate=False)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained and not any(part in name for name in trained for part in beside), method
        assert not train._may_leave_unused(model)
    named = prepare(options_of(tiny, tmp_path / "run", model=gemma3, target_modules="q_proj"))
    base = meta_base(named)
    model = peft_ext.get_peft_model(base, adapter_config(named, base), accelerate=False)
    assert train._may_leave_unused(model) and any("vision_tower" in name for name in model.targeted_module_names)


@pytest.mark.slow
def test_estimates_and_recommendations_leave_out_the_modules_beside_text_too(gemma3: str) -> None:
    config = hf.AutoConfig.from_pretrained(gemma3)
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    config_class, fields = method_config("lora", "CAUSAL_LM")
    everywhere = make_config(config_class, fields)
    chosen = make_config(config_class, fields | text_targets(model, "lora"))
    step = {"batch_size": 1, "sequence_length": 16, "accelerated": False}
    trainable = [
        peft_ext.estimate_memory(copy.deepcopy(model), **step, **how).trainable
        for how in ({"method": "lora"}, {"config": chosen}, {"config": everywhere})
    ]
    assert trainable[0] == trainable[1] < trainable[2]
    recommended = peft_ext.recommend_peft_method(model, gpu_memory_gb=24)
    assert recommended.config_kwargs["exclude_modules"] == chosen.exclude_modules
    both = text_targets(model, "lora", "score|classifier")["exclude_modules"]
    names = ("score", "classifier", "model.vision_tower.layers.0", "model.multi_modal_projector", "lm_head", "scores")
    assert [bool(re.fullmatch(both, name)) for name in names] == [True, True, True, True, False, False]


def test_ddp_searches_where_a_part_of_the_decoder_is_for_images() -> None:
    with torch.device("meta"):
        sizes = {**SIZES, "num_hidden_layers": 2}
        llama = hf.MllamaForCausalLM(hf.MllamaTextConfig(**sizes, cross_attention_layers=[1], pad_token_id=1))
        git = hf.GitForCausalLM(hf.GitConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    assert beside_text(llama) == beside_text(git) == []
    assert train._may_leave_unused(llama) and train._may_leave_unused(git)


@pytest.mark.slow
def test_explain_adapts_the_modules_that_a_run_adapts(
    tiny: Path, gemma3: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()
    assert main(["explain", gemma3, "--json", "--rank", "4", "--sequence-length", "16"]) == 0
    (method,) = json.loads(capsys.readouterr().out)["methods"]
    assert method["trainable"] == prepare(options_of(tiny, tmp_path / "run", model=gemma3)).trainable


def test_models_of_text_alone_have_nothing_beside_text(tiny: Path, tmp_path: Path) -> None:
    run = prepare(options_of(tiny, tmp_path / "run"))
    base = meta_base(run)
    assert beside_text(base) == [] and getattr(adapter_config(run, base), "exclude_modules", None) is None
    assert not train._may_leave_unused(peft_ext.get_peft_model(base, adapter_config(run, base), accelerate=False))


@pytest.mark.slow
def test_a_model_for_images_trains_on_text(tiny: Path, gemma3: str, tmp_path: Path) -> None:
    assert finetune(options_of(tiny, tmp_path / "run", model=gemma3)).check.ok
    weights = load_file(tmp_path / "run/adapter_model.safetensors")
    assert len(weights) == 2 * 7 and not any("vision" in name for name in weights)


def test_an_encoder_is_no_causal_model(tiny: Path, tmp_path: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    model = model_folder(tiny, tmp_path / "bert", hf.BertForMaskedLM(hf.BertConfig(**sizes)))
    with pytest.raises(RunError, match="bert is an encoder, each of whose positions sees those after it"):
        prepare(options_of(tiny, tmp_path / "run", model=model))


def test_ia3_says_where_it_has_no_layers(tiny: Path, tmp_path: Path) -> None:
    phi = hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, pad_token_id=1))
    model = model_folder(tiny, tmp_path / "phi3", phi)
    with pytest.raises(RunError, match="--method ia3: PEFT knows no layers of a phi3 for it, name them with --target-"):
        prepare(options_of(tiny, tmp_path / "run", model=model, method="ia3"))
    run = prepare(options_of(tiny, tmp_path / "run", model=model, method="ia3", target_modules="qkv_proj"))
    assert run.trainable == 32 + 2 * 2 * 8


def test_float32_runs_compute_what_a_float32_load_does(tiny: Path, tmp_path: Path) -> None:
    """A float32 run must widen buffers too: Gemma 3 scales its embeddings by a buffer that no weight file contains."""
    gemma = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**SIZES, "hidden_size": 40}, head_dim=8, sliding_window=32))
    model = model_folder(tiny, tmp_path / "gemma3", gemma)
    for quant in ("none", "nf4"):
        base = train.load_base(prepare(options_of(tiny, tmp_path / "run", model=model, dtype="fp32", quant=quant)))
        plain = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert base.get_input_embeddings().embed_scale == plain.get_input_embeddings().embed_scale
        assert base.dtype is torch.float32
        if quant == "none":
            ids = torch.arange(3, 19).view(2, 8)
            assert torch.equal(base(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_heads_that_peft_trains_whole_are_no_targets() -> None:
    config = hf.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48, num_labels=3)
    for method in ("lora", "bitfit", "adalora"):
        estimate = peft_ext.estimate_memory(config, method=method, task_type="SEQ_CLS", batch_size=2, sequence_length=8)
        assert estimate.total > 0
        model = hf.DistilBertForSequenceClassification(copy.deepcopy(config))
        peft_ext.get_peft_model(model, make_config(*method_config(method, "SEQ_CLS")))


# --- activations ------------------------------------------------------------------------------------------------------


def test_an_activation_that_holds_a_function_is_known_in_a_copy_and_in_an_estimate() -> None:
    act = hf.activations.ACT2FN["gelu_pytorch_tanh"]
    assert activation_name(act) == activation_name(copy.deepcopy(act)) == "gelu_tanh"
    config = hf.LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh")
    found, plain = (peft_ext.estimate_memory(config, method="lora", batch_size=2, sequence_length=16, accelerated=how)
                    for how in (True, False))  # fmt: skip
    assert 0 < found.total <= plain.total


def test_no_record_is_on_both_sides(tmp_path):
    texts = [f"record {number}" for number in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = read_corpus(str(tmp_path / "data.jsonl"), eval_fraction=0.2)
    assert sorted(corpus.train + corpus.held_out) == sorted(texts) and 4 <= len(corpus.held_out) <= 12


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_memory_of_a_process_with_a_share_of_the_base(quant, tiny: Path, tmp_path: Path) -> None:
    """Tests the sums; tests/distributed/test_finetune_shards.py compares the numbers with those of a run."""
    plan = dry_run(options_of(tiny, tmp_path / "out", shard="fsdp2", quant=quant, dtype="fp32"))
    alone, memory = plan.adapter.sharded, plan.adapter.memory
    assert alone.shards == 1 and alone.gathered == 0
    assert alone.frozen == memory.weights + memory.quantization and alone.adapter == memory.adapters
    assert alone.other == memory.peak["activations"] + memory.peak["logits"] + memory.peak["temporary"]
    assert plan.step_bytes == alone.step and plan.load_bytes == alone.load and plan.check_bytes == alone.check
    base, given = meta_base(plan.run), {"dtype": torch.float32, "device": torch.device("cpu"), "blocksize": 64}
    given |= {"batch_size": 2, "sequence_length": plan.longest, "shards": 3, "quant": quant}
    third = preview(base, adapter_config(plan.run, base), **given).sharded
    assert alone.adapter / 3 <= third.adapter < alone.adapter / 2  # three processes hold 2, 2 and 0 of A's 4 rows
    scales = memory.quantization
    assert (alone.frozen - scales) / 3 < third.frozen - scales < 0.37 * (alone.frozen - scales)
    assert third.shards == 3 and third.gathered > 0 and third.other > 0


@pytest.mark.parametrize(("warmup", "told"), [(2.0, True), (1.0, False), (0.5, False)])
def test_a_warmup_of_the_whole_run(tiny: Path, tmp_path: Path, warmup: float, told: bool, caplog: Any) -> None:
    caplog.set_level("WARNING", "peft_ext.run")
    prepare(options_of(tiny, tmp_path / "run", warmup=warmup, quant="none"))
    assert ("--warmup 2: the run has 2 steps, so that the learning rate stays below 0.0002" in caplog.text) is told
