"""Tests the loss curves of the methods and of their twins on a tiny model with made-up text, and the page of curves."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from tiers import first

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from benchmarks import convergence as c  # noqa: E402
from peft_ext.integrations.adapter_layers import lora  # noqa: E402

STEPS, BATCH = 12, 8
END, PAD, VOCAB = 256, 257, 258  # token ids: 0 to 255 are bytes, then the end token and the padding token
NOTHING_TO_FUSE = ("prefix", "prompt", "BitFit", "Diff Pruning", "partial")


def make_base():
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, max_position_embeddings=256, initializer_range=0.125, use_cache=False, pad_token_id=PAD,
        eos_token_id=END,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def encode(text):
    return list(text.encode())


def made_up(count, start=0):
    """Returns prompts and completions: a number, and whether the number is even."""
    numbers = range(start, start + count)
    return [(f"The number {n}{'!' * (n % 3)} is", " even" if n % 2 == 0 else " odd") for n in numbers]


def prepared(pairs):
    return c.batches(c.tokenize(pairs, encode, END), BATCH, PAD)


def row_of(name, dtype="bfloat16", steps=None):
    return c.compare(name, make_base, prepared(made_up(STEPS * BATCH)), prepared(made_up(16, 500)),
                     dtype=dtype, steps=steps)  # fmt: skip


def falls(row):
    """Returns whether the held-out losses of both runs fall, and their training losses up to a pruning."""
    end = None if row["pruned"] is None else row["pruned"] + 1
    curves = [losses[:end] for losses in row["losses"].values()]
    return all(statistics.mean(curve[-3:]) < statistics.mean(curve[:3]) - 0.02 for curve in curves) and all(
        held_out["after"] < held_out["before"] - 0.02 for held_out in row["held_out"].values()
    )


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", c.METHODS)
def test_every_method_learns_and_is_read_again(name):
    row = row_of(name)
    assert falls(row), row
    assert row["steps"] == STEPS and row["trainable"] > 0
    assert (row["fused"], bool(row["twin"])) == (
        0 if name in NOTHING_TO_FUSE else row["layers"],
        c.METHODS[name].has_twin("bfloat16"),
    )
    assert row["layers"] > 0 or name in ("prefix", "prompt")
    difference = row["reload_difference"]
    # PEFT saves AdaLoRA without its pruned ranks, so that sums have another order, and loads AdaLoRA in bfloat16.
    assert difference["max"] <= (2**-5 * difference["largest"] if name == "AdaLoRA" else 0.0)
    if row["twin"]:
        assert c.max_difference(row) <= 0.05  # the losses are about 5, from bfloat16 logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", first(c.FLOAT32, ("LoRA", "QLoRA", "bottleneck")))
def test_float32_curves_are_those_of_the_twin(name):
    row = row_of(name, "float32", steps=6)
    assert row["twin"] == c.METHODS[name].twin
    assert c.max_difference(row) <= 2e-5, row["losses"]
    assert row["reload_difference"]["max"] <= (1e-5 if name == "AdaLoRA" else 0.0)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_gradient_is_seen(monkeypatch):
    class Flipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, grad):
            return -grad

    right = lora.checked_lora_linear
    flipped = lambda x, w, bias, a, *rest: right(x, w, bias, Flipped.apply(a), *rest)  # noqa: E731
    monkeypatch.setattr(lora, "checked_lora_linear", flipped)
    assert c.max_difference(row_of("LoRA", "float32", steps=6)) > 1e-3


def test_bad_input_is_named():
    batches = prepared(made_up(8))
    with pytest.raises(ValueError, match="method is 'LoHa', wanted one of LoRA, "):
        c.compare("LoHa", make_base, batches, batches)
    with pytest.raises(ValueError, match="dtype is 'float16', wanted one of bfloat16, float32"):
        c.compare("LoRA", make_base, batches, batches, dtype="float16")
    with pytest.raises(ValueError, match="steps is 2, wanted 1 to 1"):
        c.compare("LoRA", make_base, batches, batches, steps=2)
    with pytest.raises(ValueError, match="make_base gives torch.float32, wanted a model of torch.bfloat16"):
        c.compare("LoRA", lambda: make_base().float(), batches, batches)


# --- data -------------------------------------------------------------------------------------------------------------


def test_batches_are_padded_and_only_the_completion_has_a_loss():
    (batch,) = prepared([("ab", "c"), ("a", "bcd")])
    assert batch["input_ids"].tolist() == [[97, 98, 99, END, PAD], [97, 98, 99, 100, END]]
    assert batch["labels"].tolist() == [[-100, -100, 99, END, -100], [-100, 98, 99, 100, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert [len(part["input_ids"]) for part in prepared(made_up(19))] == [8, 8, 3]


def test_label_loss_leaves_out_virtual_tokens_and_what_has_no_label():
    torch.manual_seed(0)
    (batch,) = prepared(made_up(3))
    labels = batch["labels"]
    logits = torch.randn(*labels.shape, VOCAB)
    loss, count = c.label_loss(logits, labels)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert count == int((labels != -100).sum())
    torch.testing.assert_close(loss, wanted)
    virtual = torch.cat([torch.randn(3, 5, VOCAB), logits], dim=1)
    torch.testing.assert_close(c.label_loss(virtual, labels)[0], wanted)


def test_intents_are_read_and_refused(tmp_path):
    rows = ["text,category", "Where is my card?,card_arrival", f"{'long ' * 40},card_arrival", "Why?,top_up_failed"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    found = sorted(c.intents(tmp_path, 2))
    assert [label for _, label in found] == [" card arrival", " top up failed"]
    assert "Where is my card?" in found[0][0] and found[0][0].endswith("Intent:")
    with pytest.raises(ValueError, match="count is 3, train.csv has 2 short questions"):
        c.intents(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="test.csv is not there"):
        c.intents(tmp_path, 1, "test")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not c.DATA.is_dir(), reason="BANKING77 is not in ../shared/data/banking77")
def test_banking77():
    train, held_out = prepared(c.intents(c.DATA, 8 * BATCH)), prepared(c.intents(c.DATA, 8, "test"))
    row = c.compare("QLoRA", make_base, train, held_out, dtype="float32")
    assert falls(row), row
    assert c.max_difference(row) <= 2e-5


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_document_is_what_the_result_file_gives():
    result = c.newest(c.NAME)
    if result is None:
        pytest.skip("the result files are not here: not a checkout")
    wanted = c.draw(result)
    assert c.DOCUMENT.read_text(encoding="utf-8") == wanted, "run python -m benchmarks.convergence --draw"


def result_of(curves, reloaded=0.0):
    """Returns a convergence result with the given loss curves of accelerated runs.

    Every loss of the twins, which are the runs without peft_ext, is 3.0.
    """
    rows = [
        {
            "method": name, "dtype": dtype, "twin": "PEFT", "steps": 2, "lr": 1e-3, "pruned": None, "trainable": 4,
            "fused": 1, "layers": 2, "losses": {"ours": losses, "twin": [3.0, 3.0]},
            "held_out": {kind: {"before": 4.0, "after": 2.5} for kind in ("ours", "twin")},
            "reload_difference": {"max": reloaded, "largest": 30.0},
        }
        for dtype in c.DTYPES
        for name, losses in curves.items()
    ]  # fmt: skip
    machine = {"cpu": "a CPU", "threads": 1, "isa": "avx2", "date": "2026-01-01", "versions": {"torch": "2.13"}}
    settings = {"steps": 2, "steps_float32": 2, "batch": 8, "held_out": 64}
    return {"machine": machine, "settings": settings, "rows": rows}


def text_of(result):
    return " ".join(c.draw(result).split())


def test_the_document_says_what_differs():
    text = text_of(result_of({"LoRA": [3.0, 3.25], "prefix": [3.0, 3.0], "LoRA, dropout 0.1": [3.5, 3.0]}, 0.5))
    assert text.count("the two curves of prefix are equal to the last recorded digit; the two curves of LoRA differ by "
                      "0.2500 at most (LoRA)") == 2  # fmt: skip
    assert "| LoRA | PEFT | 1 of 2 | 3.125 → 3.125 | 3.000 → 3.000 |" in text
    assert "| LoRA | 0.1250 (0.2500) | 0 (0) |" in text  # the distances from the float32 run
    assert ("curves differ by 0.5000 at most, by the masks and by rounding together, and end at held-out losses of "
            "2.500 and 2.500.") in text  # fmt: skip
    assert "except (largest difference of a logit, and largest logit): LoRA in bfloat16 0.5000 of 30," in text
    text = text_of(result_of({"LoRA": [3.0, 3.25]}))
    assert "gives the same logits, bit for bit. Pruning: no method was pruned." in text
    assert "are equal to the last" not in text and "Dropout: no curves were compared." in text


def test_the_document_says_what_pruning_costs():
    result = result_of({"Diff Pruning": [8.0, 2.0, 6.0, 5.0]})
    for row in result["rows"]:
        row["pruned"] = 1
    wanted = "keeps 5% of the entries after step 2. The pruning takes the loss from 2.00 to 6.00;"
    assert wanted in text_of(result)


def test_the_command_refuses_what_it_cant_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        c.main(["--draw", "--out", str(tmp_path / "none.json")])
    assert "nothing was measured yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        c.main(["--steps", "0"])
    assert "--steps is 0, wanted 1 or more" in capsys.readouterr().err
    out = tmp_path / "other.json"
    out.write_text(json.dumps(result_of({"LoRA": [3.0, 3.25]})))
    with pytest.raises(SystemExit, match="name another"):
        c.main(["--out", str(out)])


def test_what_is_in_the_result_file_is_not_trained_again(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    out.write_text(json.dumps(result_of({"LoRA": [3.0, 3.25]})))
    monkeypatch.setattr(c, "compare", lambda *args, **kwargs: pytest.fail("it was trained"))
    before = out.read_text()
    c.main(["--out", str(out), "--steps", "2", "--steps-float32", "2", "--methods", "LoRA"])
    assert out.read_text() == before
