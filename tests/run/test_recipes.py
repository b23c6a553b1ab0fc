"""Tests the functions of peft_ext.recipes on a tiny model."""

import json
import warnings
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_run import write_gemma3  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext import recipes  # noqa: E402
from peft_ext.methods import METHODS  # noqa: E402
from peft_ext.run import RunError  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("recipes choose the device themselves")]
IDS = torch.arange(3, 35)[None]


@pytest.fixture
def model(tiny) -> Path:
    return tiny / "model"


def test_lora_on_a_model(model):
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = recipes.apply_lora_to_model(base, rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
    rows = peft_ext.explain(adapted).rows
    assert len(rows) == 4 and all(row.fused for row in rows)
    assert adapted.get_nb_trainable_parameters()[0] == 2 * 4 * ((64 + 64) + (64 + 32))
    assert adapted.active_peft_config.lora_alpha == 8.0
    with pytest.raises(ValueError, match="Target modules"):
        recipes.apply_lora_to_model(AutoModelForCausalLM.from_pretrained(model), target_modules=["nothing"])


def test_qlora(model, capsys):
    adapted = recipes.setup_qlora(model, rank=4)
    assert "trainable params: 8,192" in capsys.readouterr().out
    rows = peft_ext.explain(adapted).rows
    assert len(rows) == 14 and all(row.fused and row.kind == "LoRA over NF4Linear" for row in rows)
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_and_its_tokenizer(model, method):
    fields = {"add_bias": "all-linear"} if method == "bitfit" else {}  # Llama has no bias
    adapted, tokenizer = recipes.setup_peft_training(model, method, **fields)
    assert isinstance(adapted, peft.PeftModel) and tokenizer.pad_token_id is not None
    assert any(p.requires_grad for p in adapted.parameters())
    loss = adapted.train()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
    loss.backward()
    assert loss.isfinite()


def test_the_vision_tower_is_adapted_only_where_the_layers_are_named(tiny, tmp_path):
    model = write_gemma3(tiny, tmp_path)
    for named, is_adapted in (({}, False), ({"target_modules": ["q_proj"]}, True)):
        adapted, _ = recipes.setup_peft_training(model, "lora", **named)
        trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert trained and any("vision_tower" in name for name in trained) is is_adapted


def test_a_prompt_that_starts_from_a_text(model):
    adapted, tokenizer = recipes.setup_peft_training(model, "prompt", "./output", prompt_text="Is it good? ",
                                                     num_virtual_tokens=4)  # fmt: skip
    ids = tokenizer("Is it good? ", add_special_tokens=False)["input_ids"][:4]
    start = adapted.get_input_embeddings().weight[ids].float()
    torch.testing.assert_close(adapted.prompt_encoder["default"].embedding.weight.float(), start)


def test_a_method_that_is_none(model):
    with pytest.raises(ValueError, match="setup_peft_training: method is 'full', wanted one of"):
        recipes.setup_peft_training(model, "full")
    with pytest.raises(ValueError, match="setup_peft_training: prompt_text is given with method 'lora'"):
        recipes.setup_peft_training(model, "lora", prompt_text="Is it good?")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adalora", "diff-pruning"])
def test_train_then_merge(model, tiny, tmp_path, method):
    fields = {"total_step": 4, "tinit": 1, "tfinal": 1} if method == "adalora" else {}
    adapted, tokenizer = recipes.setup_peft_training(model, method, **fields)
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    done = recipes.train_with_peft(
        adapted, tokenizer, rows, output_dir=tmp_path / "out", adapter_dir=tmp_path / "adapter", max_steps=4,
        gradient_accumulation_steps=1, warmup_steps=0, learning_rate=1e-3, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    assert done.global_step == 4 and done.metrics["tokens_per_s"] > 0
    merged = recipes.load_and_merge_adapter(model, tmp_path / "adapter")
    for model in (adapted.eval(), merged):
        peft_ext.restore(model)
    assert type(merged) is transformers.LlamaForCausalLM and not hasattr(merged, "peft_config")
    with torch.no_grad():
        wanted, found = adapted(input_ids=IDS).logits.float(), merged.eval()(input_ids=IDS).logits.float()
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())


def test_rows_of_tokens_and_rows_of_nothing(model, tmp_path):
    adapted, tokenizer = recipes.setup_peft_training(model, "ia3")
    rows = [{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7], "labels": [-100, 7]}]
    arguments = {"output_dir": tmp_path / "out", "adapter_dir": tmp_path / "adapter", "use_cpu": True}
    assert recipes.train_with_peft(adapted, tokenizer, rows, max_steps=1, **arguments).global_step == 1
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()
    with pytest.raises(RunError, match="train_dataset: no column text"):
        recipes.train_with_peft(adapted, tokenizer, [{"body": "a"}], **arguments)
    with pytest.raises(TypeError, match="train_with_peft: model is Linear, wanted a PeftModel"):
        recipes.train_with_peft(torch.nn.Linear(2, 2), tokenizer, rows)


def test_columns_of_tokenized_rows(model):
    """A mask keeps padding out of the labels, and the columns of a batch are padded to one length."""
    _, tokenizer = recipes.setup_peft_training(model, "ia3")
    rows = [
        {"input_ids": torch.tensor([0, 0, 3, 4]), "attention_mask": [0, 0, 1, 1], "position_ids": [0, 0, 0, 1]},
        {"input_ids": [5, 6], "labels": [-100, 6], "position_ids": [3, 4], "attention_mask": None,
         "text": "a text", "label": 1, "messages": [{"role": "user", "content": "a text"}], "names": ["a", "b"]},
    ]  # fmt: skip
    found = recipes._tokenized(rows, tokenizer)
    assert found[0] == {"input_ids": [0, 0, 3, 4], "labels": [-100, -100, 3, 4], "attention_mask": [0, 0, 1, 1],
                        "position_ids": [0, 0, 0, 1]}  # fmt: skip
    assert found[1] == {"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [1, 1], "position_ids": [3, 4]}
    for side in ("right", "left"):
        tokenizer.padding_side = side
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        batch = recipes._collate(collator, found)
        assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]]
        assert batch["labels"][0].tolist() == [-100, -100, 3, 4] and batch["labels"].shape == (2, 4)
        assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [3, 4, 0, 0] if side == "right" else [0, 0, 3, 4]]
    for wrong, why in (
        ([{"input_ids": [3], "loss_mask": [1]}], "rows of input_ids have numbers in the column 'loss_mask'"),
        ([{"input_ids": [3]}, {"labels": [3]}], "record 2 has nothing in column 'input_ids'"),
        (
            [{"input_ids": [3], "position_ids": [0]}, {"input_ids": [3]}],
            "record 2 has nothing in column 'position_ids'",
        ),
        ([{"input_ids": [3, 4], "labels": [3]}], "record 1 has 1 numbers in column 'labels', wanted 2"),
        ([{"input_ids": [3, 4]}, {"input_ids": "ab"}], "record 2 has str in column 'input_ids'"),
    ):
        with pytest.raises(RunError, match=why):
            recipes._tokenized(wrong, tokenizer)


def test_records_that_are_too_long_are_counted(model):
    """A first record without a completion within the block is left out, and does not end the function."""
    _, tokenizer = recipes.setup_peft_training(model, "ia3")
    rows = [{"prompt": "a" * left, "completion": "b" * right} for left, right in ((600, 3), (3, 600), (3, 9), (3, 3))]
    with pytest.warns(UserWarning, match="of 4 records, 1 were cut at block_size=512 tokens, and 1 were left out"):
        assert [len(row["input_ids"]) for row in recipes._tokenized(rows, tokenizer)] == [512, 14, 8]
    with pytest.warns(UserWarning, match="of 4 records, 2 were cut at block_size=10 tokens, and 1 were left out"):
        assert [len(row["input_ids"]) for row in recipes._tokenized(rows, tokenizer, 10)] == [10, 10, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(recipes._tokenized(rows, tokenizer, 1000)) == 4
        texts = recipes._tokenized([{"text": "a" * 30}, {"text": "b" * 30}], tokenizer, 20)
    assert [len(row["input_ids"]) for row in texts] == [20, 20, 20]  # 62 tokens: an end token follows each text
    with pytest.raises(RunError, match="no completion begins within 4 tokens"):
        recipes._tokenized(rows[:1], tokenizer, 4)
    with pytest.warns(UserWarning, match="22 tokens at the end of the texts, which do not fill a block of 40 tokens"):
        assert len(recipes._tokenized([{"text": "a" * 61}], tokenizer, 40)) == 1


def test_examples_that_the_model_does_not_take(model, tmp_path):
    """The tiny model takes 256 tokens, virtual tokens counted."""
    folders = {"output_dir": tmp_path / "out", "adapter_dir": tmp_path / "adapter", "use_cpu": True}
    adapted, tokenizer = recipes.setup_peft_training(model, "prompt", num_virtual_tokens=4)
    for rows, block_size, why in (
        ([{"text": "a" * 300}], 254,
         "an example has 254 tokens, and the adapter adds 4 virtual tokens, the model takes at most 256"),
        ([{"input_ids": [3] * 253}], 8, "an example has 253 tokens"),
        ([{"input_ids": [3, 4], "labels": [-100, -100]}], 8, "all labels are -100, which the loss ignores"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=f"train_dataset: {why}"):
            recipes.train_with_peft(adapted, tokenizer, rows, block_size=block_size, **folders)
    assert not (tmp_path / "adapter").exists()


def test_a_step_without_labels(model, tmp_path):
    """The loss of such a step is 0, and the adapter stays finite."""
    adapted, tokenizer = recipes.setup_peft_training(model, "lora", r=4)
    rows = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}, {"input_ids": [3, 4, 5]}]
    done = recipes.train_with_peft(
        adapted, tokenizer, rows, output_dir=tmp_path / "out", adapter_dir=tmp_path / "adapter", max_steps=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, warmup_steps=0, save_strategy="no", use_cpu=True,
        logging_nan_inf_filter=False,
    )  # fmt: skip
    assert 0 < done.training_loss < 10
    assert all(p.isfinite().all() for p in adapted.parameters())
    assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("block_size", [0, 1])
def test_a_block_too_small_for_a_label(model, block_size):
    adapted, tokenizer = recipes.setup_peft_training(model, "ia3")
    with pytest.raises(ValueError, match=f"train_with_peft: block_size is {block_size}, wanted at least 2"):
        recipes.train_with_peft(adapted, tokenizer, [{"text": "a"}], block_size=block_size)


def test_batches_are_padded_on_the_right(model, tmp_path, monkeypatch):
    """On the left, the padding would lie between the virtual tokens of a prompt and the text."""
    adapted, tokenizer = recipes.setup_peft_training(model, "prompt", num_virtual_tokens=4)
    tokenizer.padding_side = "left"
    seen = []
    monkeypatch.setattr(adapted, "forward", lambda run=adapted.forward, **given: (seen.append(given), run(**given))[1])
    rows = [{"prompt": "one", "completion": "two"}, {"prompt": "three", "completion": "and a longer one"}]
    recipes.train_with_peft(adapted, tokenizer, rows, output_dir=tmp_path / "out", adapter_dir=tmp_path / "adapter",
                            max_steps=1, gradient_accumulation_steps=1, save_strategy="no", use_cpu=True)  # fmt: skip
    (given,) = seen
    mask = given["attention_mask"]
    assert mask[:, 0].all() and not mask[:, -1].all() and tokenizer.padding_side == "left"


def test_one_of_several_gpus_is_used_with_a_warning(model, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 1 if self.__dict__.get("_n_gpu") == 1 else 2))
    adapted, tokenizer = recipes.setup_peft_training(str(model), method="lora", r=4)
    with pytest.warns(UserWarning, match="train_with_peft: trains on one of 2 GPUs"):
        recipes.train_with_peft(adapted, tokenizer, [{"text": "Question: what is 3?"}] * 4, block_size=8,
                                output_dir=tmp_path / "out", adapter_dir=tmp_path / "adapter", max_steps=1,
                                save_strategy="no", use_cpu=True)  # fmt: skip


@pytest.mark.slow
def test_rows_with_a_mask_train_as_rows_without_padding(model, tmp_path):
    """Rows that are padded beforehand give the loss of the same rows without padding."""
    padded = {"input_ids": [3, 4, 5, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "position_ids": [0, 1, 2, 0, 0]}
    losses = []
    for row in (padded, {"input_ids": [3, 4, 5]}):
        torch.manual_seed(0)
        adapted, tokenizer = recipes.setup_peft_training(model, "ia3")
        done = recipes.train_with_peft(
            adapted, tokenizer, [row], output_dir=tmp_path / "out", adapter_dir=tmp_path / "adapter", max_steps=1,
            gradient_accumulation_steps=1, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        losses.append(done.training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_what_can_not_be_merged(model, tmp_path):
    adapted, _ = recipes.setup_peft_training(model, "prompt")
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_and_merge_adapter: an adapter of PROMPT_TUNING has no layers"):
        recipes.load_and_merge_adapter(model, tmp_path)


def test_which_method_is_the_packages_own():
    assert recipes.recommend_peft_method is peft_ext.recommend_peft_method
