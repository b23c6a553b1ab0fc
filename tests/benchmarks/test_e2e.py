"""Tests the benchmarks of whole training steps on tiny models."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks", reason="benchmarks/ is not here: not a checkout")
compiled, e2e, mixture, parts = (
    importlib.import_module(f"benchmarks.{name}") for name in ("compiled", "e2e", "mixture", "parts")
)


@pytest.mark.parametrize("name", ["QLoRA, dropout 0.05", "AdaLoRA", "IA3"])
def test_a_method_trains(name, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    # The real keep_freed_memory would change malloc's settings in the process of the tests.
    monkeypatch.setattr("peft_ext.integrations.transformers.keep_freed_memory", lambda: True)
    sizes = {**e2e.SMOLLM2, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    runs = {kind: [e2e.train(e2e.METHODS[name], kind, 1, 2, 8, sizes)] for kind in e2e.KINDS}
    row = e2e.method_row(name, runs)
    assert row["layers"] == 7 and row["tokens_per_s"]["ours"][0] > 0 and row["over_frozen"] > 0
    ours, stock = row["losses"]["ours"], row["losses"]["stock"]
    assert len(ours) == 3 and abs(ours[0] - stock[0]) < 0.05


@pytest.mark.parametrize("kind", e2e.KINDS)
def test_each_operator_of_a_step_belongs_to_its_part(kind, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("peft_ext.integrations.transformers.keep_freed_memory", lambda: True)
    found = {}
    real = parts.part_of

    def noted(event, vocabulary):
        found[event.name] = found.get(event.name, set()) | {real(event, vocabulary)}
        return real(event, vocabulary)

    monkeypatch.setattr(parts, "part_of", noted)
    times = parts.train(kind, "tiny", 1, 2, 16)
    assert set(times) == {*parts.PARTS, "step"}
    assert times["step"] == pytest.approx(sum(times[part] for part in parts.PARTS), rel=0.01)
    assert (times[parts.OPTIMIZER] > 0) == (kind != "frozen")
    expected = {"ours": {"peft_ext::lora_linears": {parts.LINEAR}, "peft_ext::lora_linear_backward": {parts.LINEAR},
                         "peft_ext::gated_lora_linear": {parts.LINEAR}, "aten::mm": {parts.HEAD},
                         "peft_ext::rms_norm": {parts.ELEMENTWISE},
                         "peft_ext::scaled_dot_product_attention_backward": {parts.ATTENTION}},
                "stock": {"aten::mm": {parts.LINEAR, parts.HEAD}, "aten::_log_softmax": {parts.HEAD}},
                "frozen": {"aten::mm": {parts.LINEAR, parts.HEAD}, "aten::silu": {parts.ELEMENTWISE}}}  # fmt: skip
    assert {name: found.get(name) for name in expected[kind]} == expected[kind]


def test_a_mixture_trains(monkeypatch):
    monkeypatch.setattr("peft_ext.integrations.transformers.keep_freed_memory", lambda: True)
    sizes = {**mixture.MIXTURE, "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32, "head_dim": 16,
             "num_hidden_layers": 1, "num_experts": 8, "vocab_size": 96}  # fmt: skip
    runs = {kind: mixture.train(kind, 1, 2, 16, sizes) for kind in mixture.KINDS}
    assert all(run["step_ms"] > 0 for run in runs.values())
    assert abs(runs["ours"]["loss"] - runs["stock"]["loss"]) < 0.01
    assert runs["nf4"]["weights_mib"] <= runs["frozen"]["weights_mib"]


def test_a_run_that_fails_is_named_and_the_others_are_kept(monkeypatch, tmp_path):
    run = {"tokens_per_s": 10.0, "milliseconds": 5.0, "step_ms": [4.0, 6.0], "peak_mib": 7, "meter": {},
           "peak_before_training_mib": 6, "losses": [2.0, 1.0], "fused": 7, "layers": 7}  # fmt: skip
    asked = []

    def in_turn(commands, steps, limit):
        name = commands["ours"][4]
        asked.append([name, list(commands)])
        assert limit == 60 and steps == [2, 1, 1, 1, 1, 1]
        assert all(command[4:6] == [name, kind] for kind, command in commands.items())
        found = {kind: run for kind in commands}
        if name == "LoRA":
            del found["stock"]
            return found, {"stock": subprocess.TimeoutExpired("a command", 60)}
        if name == "DoRA":
            del found["ours"]
            return found, {"ours": subprocess.CalledProcessError(-11, "a command")}
        return {**found, "stock": {**run, "step_ms": [8.0, 18.0]}}, {}

    monkeypatch.setattr(e2e, "in_turn", in_turn)
    monkeypatch.setattr(sys, "argv", ["e2e", "methods", "--methods", "LoRA; IA3; DoRA", "--repeats", "1", "--shape",
                                      "tiny", "--limit", "60", "--out", str(tmp_path / "out.json")])  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        e2e.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert asked == [[name, list(e2e.KINDS)] for name in ("LoRA", "IA3", "DoRA")]
    assert [name.partition(":")[0] for name in result["failed"]] == ["LoRA, stock", "DoRA, ours"]
    assert "timed out after 60" in result["failed"][0] and "SIGSEGV" in result["failed"][1]
    rows = {row["method"]: row for row in result["rows"]}
    assert rows["LoRA"]["tokens_per_s"] == {"ours": [10.0], "stock": [], "frozen": [10.0]}
    assert "speedup" not in rows["LoRA"]
    assert rows["IA3"]["speedup"] == 2.5 and rows["IA3"]["max_loss_difference"] == 0.0
    assert rows["IA3"]["over_frozen"] == 1.0 and "over_frozen" not in rows["DoRA"]
    assert rows["DoRA"]["peak_mib"] == {"ours": [], "stock": [7], "frozen": [7]}


def test_without_bitsandbytes_our_quantized_layers_still_train(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("peft_ext.integrations.transformers.keep_freed_memory", lambda: True)
    monkeypatch.setattr(e2e.importlib.util, "find_spec", lambda name: None)
    run = e2e.train(e2e.METHODS["QLoRA, dropout 0.05"], "ours", 1, 2, 8, e2e.TINY)
    assert (run["fused"], run["layers"], len(run["losses"])) == (7, 7, 3)


def test_methods_are_named_by_their_beginnings():
    assert e2e._names("qlora; dora") == ["QLoRA, dropout 0.05", "DoRA"]
    assert e2e._names("LoRA") == ["LoRA"]
    with pytest.raises(Exception, match="no method 'prefix'"):
        e2e._names("prefix")


def test_a_results_name_says_what_was_run():
    def subject(command, **given):
        return e2e._subject(argparse.Namespace(**{"command": command, **given}))

    names = {command: subject(command) for command in ("speed", "intents", "experts", "parts", "compiled")}
    assert [*names.values()] == ["run-speed", "run-intents", "step-experts", "step-parts", "step-compiled"]
    assert subject("methods", shape="smollm2", checkpointing=False) == "step-methods"
    assert subject("methods", shape="smollm2", checkpointing=True) == "step-checkpointing"
    assert subject("methods", shape="1b", checkpointing=True) == "step-1b-checkpointing"


def test_compiled_steps_are_compared_with_eager_steps_of_the_same_turn():
    seconds = {"ours, eager": [1.0, 2.0, 8.0], "ours, compiled": [0.5, 1.5, 8.0],
               "stock, eager": [2.0, 2.0, 2.0], "stock, compiled": [2.0, 3.0, 1.0]}  # fmt: skip
    peaks = {"ours, eager": 100, "ours, compiled": 90, "stock, eager": 200, "stock, compiled": 300}
    grown = {False: (100, 97), True: (160, 96)}
    runs = {kind: {"peak_mib": peak, "peak_before_training_mib": before} for kind, (peak, before) in grown.items()}
    found = compiled.row("LoRA", seconds, peaks, {"ours": compiled.compiler_mib(runs), "stock": 70})
    assert found["time_over_eager"] == {"ours": 0.75, "stock": 1.0}
    assert found["memory_over_eager"] == {"ours": 0.9, "stock": 1.5}
    drawn = compiled.table({"what": "a model", "rows": [found]}).splitlines()
    assert drawn[-2:] == ["| LoRA | peft_ext | 2000 | 1500 | **0.75** | 100 | 90 | 61 |",
                          "| LoRA | PEFT | 2000 | 2000 | **1.00** | 200 | 300 | 70 |"]  # fmt: skip


@pytest.mark.slow
def test_steps_of_compiled_models_are_timed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("peft_ext.integrations.transformers.keep_freed_memory", lambda: True)
    monkeypatch.setattr(compiled, "sizes_of", lambda layers: e2e.TINY)
    monkeypatch.setattr(compiled, "WARMING", 1)
    found = compiled.times("LoRA", 1, 2, 2, 8)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(
        ("ours, eager", "ours, compiled", "stock, eager", "stock, compiled"), 2
    )
    assert compiled.peak("LoRA", "ours", True, 1, 2, 8)["peak_mib"] > 0
