"""Tests the benchmark of generation on a tiny model."""

import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
pytest.importorskip("benchmarks", reason="benchmarks/ is not here: not a checkout")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
e2e, generation = (importlib.import_module(f"benchmarks.{name}") for name in ("e2e", "generation"))


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**e2e.TINY)).to(torch.bfloat16).requires_grad_(False)


def test_the_questions_are_different():
    assert len(set(generation.prompts(200))) == 200


def test_each_contender_generates_the_tokens_that_are_timed(monkeypatch: pytest.MonkeyPatch):
    ids = torch.arange(8)[None]
    # The clock advances by a second for each token.
    counts: list[int] = []
    own = generation.generated
    monkeypatch.setattr(generation, "generated", lambda *args: counts.append(args[2]) or own(*args))
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: float(sum(counts))))
    for name in ("LoRA", "NF4, LoRA"):
        for kind in ("ours", "stock"):
            one = generation.Generation(generation.contender(name, kind, tiny), ids, 3)
            assert len(generation.generated(one.model, ids, 5)) == 5
            one.run(1)
            one.run(2)
            assert one.rates == [1.0] * 3 and one.figures() == {"rate": 1.0}  # a second for each token


def test_contenders_generate_in_turn(monkeypatch):
    def in_turn(commands, turns, limit):
        assert list(commands) == ["ours: NF4", "stock: NF4", "ours: NF4, compiled"] and turns == [1, 1, 1]
        assert commands["stock: NF4"][3:6] == ["--contender", "NF4", "stock"]
        return {"ours: NF4": {"rate": 60.04}, "stock: NF4": {"rate": 30.0}}, {"ours: NF4, compiled": OSError("no")}

    monkeypatch.setattr(generation, "in_turn", in_turn)
    args = argparse.Namespace(contenders=["NF4", "NF4, compiled"], tokens=8, rounds=2)
    assert generation.rates(args) == [{"model": "NF4", "ours": 60.0, "stock": 30.0},
                                      {"model": "NF4, compiled", "ours": None, "stock": None}]  # fmt: skip


def test_prompts_are_counted_by_where_their_tokens_differ(monkeypatch):
    found = generation.compared(tiny, lambda text: torch.arange(len(text) % 5 + 3)[None], 4, 6)
    assert found["equal"] + found["tie"] == found["prompts"] == 4 and found["different"] == 0
    # Two tokens are no tie if their logits, computed layer by layer, are far apart.
    stock = generation.generated
    calls = iter(range(8))
    monkeypatch.setattr(generation, "generated", lambda *args: stock(*args).add(next(calls) < 4).remainder(96))
    found = generation.compared(tiny, lambda text: torch.arange(len(text) % 5 + 3)[None], 4, 6)
    assert found["different"] > 0 and found["equal"] == 0


def test_the_table_has_a_row_for_each_model():
    result = {"what": "a model", "rows": [{"model": "NF4", "ours": 60.0, "stock": 30.0},
                                          {"model": "NF4, compiled", "ours": 50.0, "stock": None}]}  # fmt: skip
    lines = generation.table(result).splitlines()
    assert "| NF4 | 60.0 | 30.0 | 2.00 |" in lines and "| NF4, compiled | 50.0 |  |  |" in lines
    counts = {"prompts": 3, "tokens": 8, "equal": 2, "tie": 1, "different": 0}
    assert "the same 8 tokens for 2, first differ at a tie for 1," in generation.same_text(counts)
