"""The benchmarks on toy layers: what is refused, what a row says, and that the documents show the result files."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks", reason="benchmarks/ is not here: not a checkout")
command, e2e, grid, harness, peers, tables = (
    importlib.import_module(f"benchmarks.{name}") for name in ("__main__", "e2e", "grid", "harness", "peers", "tables")
)

CEILINGS = {"copy_gb_s": 10.0, "matmul_bf16_tflop_s": 0.1, "matmul_f32_tflop_s": 0.05}


@pytest.fixture
def small(monkeypatch):
    """A few rotating weights and rounds; pools and float64 results of other sizes are not kept."""
    monkeypatch.setattr(peers, "ROTATING_BYTES", 4 * 32 * 64 * 2)
    monkeypatch.setattr(harness, "MAX_ROUNDS", 5)
    monkeypatch.setattr(grid, "SHAPES", {grid.MAIN: ((64, 32),)})
    yield
    for cached in (peers._first, peers._first_nf4, peers._dense_pool, peers._nf4_pool, peers._adapter_pool):
        cached.cache_clear()
    peers._exact_products.cache_clear()


def case(**changes):
    fields = {"op": "toy", "case": "toy", "tokens": 4, "k": 64, "n": 32, "weights": "hot", "build": lambda: None}
    return harness.Case(**{**fields, **changes})


def contender(value, exact=None):
    return harness.Contender(lambda: value, lambda y: {"y": y}, exact or (lambda: {"y": torch.ones(4)}))


# --- harness ----------------------------------------------------------------------------------------------------------


def test_a_row_has_times_ratios_errors_and_roofline():
    comparison = harness.Comparison(
        {"ours": contender(torch.ones(4)), "peer": contender(torch.full((4,), 1.5))}, bytes_moved=1000, flops=100
    )
    row = harness.compare(case(), comparison, CEILINGS, budget_s=0.01)
    assert row.errors == {"ours": {"y": 0.0}, "peer": {"y": 0.5}}
    assert set(row.milliseconds) == set(row.roofline) == {"ours", "peer"} and set(row.speedup) == {"peer"}
    assert harness.MIN_ROUNDS <= row.rounds <= harness.MAX_ROUNDS


def test_a_wrong_result_is_refused():
    comparison = harness.Comparison({"ours": contender(torch.full((4,), 1.02))}, bytes_moved=1)
    with pytest.raises(AssertionError, match=r"toy: ours is off from float64 by \{'y': 0.02\}, tolerance 0.01"):
        harness.compare(case(), comparison, CEILINGS)
    comparison = harness.Comparison({"ours": contender(torch.full((4,), float("nan")))}, bytes_moved=1)
    with pytest.raises(AssertionError, match="off from float64"):
        harness.compare(case(), comparison, CEILINGS)


def test_ours_cannot_go_unverified():
    with pytest.raises(ValueError, match="ours has no float64 result"):
        harness.verify("toy", harness.Comparison({"ours": contender(torch.ones(4), "no reason")}, bytes_moved=1))
    other = harness.Comparison({"ours": contender(torch.ones(4), lambda: {"grad": torch.ones(4)})}, bytes_moved=1)
    with pytest.raises(ValueError, match="computes"):
        harness.verify("toy", other)


def test_a_peer_that_fails_is_named_and_not_timed():
    def fails():
        raise RuntimeError("no compiler here\nand more")

    peer = harness.Contender(fails, lambda y: {"y": y}, lambda: {"y": torch.ones(4)})
    comparison = harness.Comparison(
        {"ours": contender(torch.ones(4)), "torch.compile": peer}, bytes_moved=1, absent={"PEFT": "not installed"}
    )
    row = harness.compare(case(), comparison, CEILINGS, budget_s=0.01)
    assert row.absent == {"PEFT": "not installed", "torch.compile": "RuntimeError: no compiler here"}
    assert set(row.milliseconds) == {"ours"}


def test_floor_is_the_longer_of_bytes_and_products():
    assert harness.floor_ms(10**7, 0, CEILINGS) == pytest.approx(1.0)
    assert harness.floor_ms(10**7, 10**9, CEILINGS) == pytest.approx(10.0)


def test_a_run_keeps_its_limit_and_names_what_it_left_out(monkeypatch):
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "0")
    comparison = harness.Comparison({"ours": contender(torch.ones(4))}, bytes_moved=1)
    long = harness.Comparison({"ours": contender(torch.ones(4))}, bytes_moved=1, flops=10**15)
    cases = [case(build=lambda: comparison), case(case="too long", build=lambda: long)]
    rows, left_out = harness.run(cases, CEILINGS, limit_s=5.0, row_s=0.01)
    assert len(rows) == 1 and left_out == ["toy: too long, hot"]
    assert harness.run(cases, CEILINGS, limit_s=0.0, row_s=0.01) == ([], ["toy: toy, hot", "toy: too long, hot"])


def test_the_reference_is_not_timed_as_a_kernel(monkeypatch):
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "1")
    monkeypatch.setattr(harness, "has_kernel", lambda op, key: op != "toy")
    harness.check_kernels({"lora_linear"})
    with pytest.raises(SystemExit, match="no native CPU kernel of toy"):
        harness.check_kernels({"toy", "lora_linear"})


# --- layers -----------------------------------------------------------------------------------------------------------


def test_rotation_takes_every_weight_and_leaves_none_to_the_next_contender(small):
    problem = peers.Problem(2, 64, 32, rotating=True)
    seen = []

    def forward(x, weight, lora_A):
        seen.append((weight.data_ptr(), lora_A.data_ptr()))
        return F.linear(x, weight) + 0 * lora_A.sum()

    contenders = [peers.functional(problem, "bf16", forward, ("lora_A",), "not verified") for _ in range(2)]
    for _ in range(4):
        for one in contenders:
            one.take()
            one.run()
    assert len(problem.weights("bf16").items) == 4
    assert len(set(seen[:4])) == 4 and seen[:4] == seen[4:]
    assert len(peers.Problem(2, 64, 32).weights("bf16").items) == 1
    first, *others = problem.weights("nf4").items
    assert len({nf4.packed.data_ptr() for nf4 in others} | {first.packed.data_ptr()}) == 1 + len(others) > 4
    assert all(torch.equal(nf4.dequantize(), first.dequantize()) for nf4 in others)


@pytest.mark.parametrize("name", ["nf4", "lora", "dora", "ia3"])
def test_every_comparison_runs_and_agrees_with_float64(small, name):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    variants = importlib.import_module(f"benchmarks.bench_{name}").VARIANTS
    options = grid.Options((4,), (1,), (4,), (), ("rotating", "hot"), ())
    cases = list(grid.cases(variants, options))
    assert {one.op for one in cases} == {variant.op for variant in variants}
    for one in cases:
        comparison = one.build()
        errors, absent = harness.verify(one.op, comparison)
        assert set(absent) <= {"bitsandbytes, repacked"}
        # Peers within a few roundings of bf16: the float64 result is theirs too, their dropout's mask included.
        # bitsandbytes finds some nested scales by a coarser table.
        for peer, found in errors.items():
            limit = 0.1 if one.op == "nf4_quantize" or peer == "bitsandbytes, repacked" else 0.015
            assert max(found.values()) < limit, (one.op, one.case, peer, found)


def test_the_command_writes_a_result_file_that_draws(small, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "0")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(command, "measured_ceilings", lambda: CEILINGS)
    out = tmp_path / "result.json"
    command.main(["lora", "--quick", "--tokens", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["machine"]["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert {row["op"] for row in result["rows"]} == {"lora_linear"} and result["left_out"] == []
    for row in result["rows"]:
        assert {"ours", "frozen", "torch eager"} < set(row["milliseconds"]), row
        assert row["tokens"] == 2 and row["weights"] == "rotating"
    table = tables.kernel_table(result, lambda row: True)
    assert table.count("\n") == 1 + len(result["rows"])


def test_the_command_refuses_unknown_names():
    with pytest.raises(SystemExit, match="no benchmark nf5; there are"):
        command.main(["nf5"])
    with pytest.raises(SystemExit, match="no shape 70b; there are"):
        command.main(["--shapes", "70b"])


# --- whole steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["QLoRA, dropout 0.05", "AdaLoRA", "IA3"])
def test_a_method_trains(name, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    # It would change the allocator of the tests' own process.
    monkeypatch.setattr("peft_ext.integrations.transformers.keep_freed_memory", lambda: True)
    sizes = {**e2e.SMOLLM2, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    runs = {kind: [e2e.train(e2e.METHODS[name], kind, 1, 2, 8, sizes)] for kind in e2e.KINDS}
    row = e2e.method_row(name, runs)
    assert row["layers"] == 7 and row["tokens_per_s"]["ours"][0] > 0
    ours, stock = row["losses"]["ours"], row["losses"]["stock"]
    assert len(ours) == 2 and abs(ours[0] - stock[0]) < 0.05


def test_methods_are_named_by_their_beginnings():
    assert e2e._names("qlora; dora") == ["QLoRA, dropout 0.05", "DoRA"]
    with pytest.raises(Exception, match="no method 'prefix'"):
        e2e._names("prefix")


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_result_files(path):
    text = path.read_text()
    assert tables.draw(text, path.name) == text, "run python -m benchmarks.tables"


def test_drawing_refuses_a_document_it_does_not_know():
    with pytest.raises(SystemExit, match="has no place marked"):
        tables.draw("nothing here")
    with pytest.raises(SystemExit, match="marks a place 'prefix', wanted one of"):
        tables.draw("<!-- measured prefix: python -m benchmarks.tables --><!-- /measured -->")


def test_forced_paths_have_tables_of_their_own(monkeypatch, tmp_path):
    row = {"op": "lora_linear", "case": "T=2 64->32, bf16 base", "weights": "rotating", "summary": True,
           "milliseconds": {"ours": 1.0, "PEFT": 1.2}, "speedup": {"PEFT": 1.2}, "bytes_moved": 10**6, "flops": 0,
           "absent": {}, "errors": {"ours": {"y": 0.001}}}  # fmt: skip
    for isa, environment in (("avx512", {}), ("avx2", {"PEFT_EXT_CPU_ISA": "avx2"})):
        machine = {"cpu": "CPU", "threads": 2, "isa": isa, "environment": environment, "date": "2026-01-01",
                   "versions": {}}  # fmt: skip
        result = {"machine": machine, "ceilings": CEILINGS, "rows": [row]}
        (tmp_path / f"{isa}-2026-01-01.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "path avx512;" in tables.summary() and "avx2" not in tables.summary()
    paths = tables.isa_tables()
    assert "### avx2" in paths and "avx512" not in paths and "the least is 1.20x" in paths
    assert "| `lora_linear` | T=2 64->32, bf16 base | rotating | PEFT 1.20x | 10 |" in paths
    assert "| `lora_linear` | 1.0e-03 |" in tables.error_table()
