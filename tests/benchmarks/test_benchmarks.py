"""Tests the benchmarks on small layers: errors, rows and result files, and the documents that show result files.

The benchmarks for a GPU run on the CPU in these tests, with replaced clocks.
"""

import ast
import importlib
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks", reason="benchmarks/ is not here: not a checkout")
command, cuda, files, grid, harness, layers, peers, tables = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("__main__", "cuda", "files", "grid", "harness", "layers", "peers", "tables")
)
timer = importlib.import_module("peft_ext.bench.timer")

CEILINGS = {"copy_gb_s": 10.0, "matmul_bf16_tflop_s": 0.1, "matmul_f32_tflop_s": 0.05}


@pytest.fixture
def small(monkeypatch):
    """Sets small numbers of rotating weights and of rounds, and later drops cached weights and float64 results."""
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


def test_a_wrong_result_is_refused_by_python_with_the_option_O_too():
    tree = ast.parse(Path(timer.__file__).read_text())
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "python -O leaves the check out"


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


def test_a_peer_that_takes_long_is_timed_once(monkeypatch):
    monkeypatch.setattr(timer, "LONGEST_CALL_S", 0.01)
    calls = []
    slow = harness.Contender(
        lambda: time.sleep(0.02) or calls.append(0) or torch.ones(4),
        lambda y: {"y": y}, lambda: {"y": torch.ones(4)},
    )  # fmt: skip
    comparison = harness.Comparison({"ours": contender(torch.ones(4)), "slow": slow}, bytes_moved=1000, flops=100)
    row = harness.compare(case(), comparison, CEILINGS, budget_s=0.01)
    assert len(calls) == 2  # one call verifies, one call is timed
    assert row.milliseconds["slow"] >= 20 and row.speedup["slow"] > 1 and row.rounds >= harness.MIN_ROUNDS


def test_a_short_call_is_timed_as_one_of_several(monkeypatch):
    now, takes = [0.0], iter([4e-3, 1e-3, 2e-3, 30e-3, 6e-3])

    def runs():
        now[0] += next(takes)

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    taken = []
    sample = timer.host_clock(timer.Contender(runs, lambda y: {}, "no reason", lambda: taken.append(0)))
    assert sample() == pytest.approx(33e-3 / 3) and len(taken) == 4  # The first call is not counted.
    assert sample() == pytest.approx(6e-3) and len(taken) == 5  # A longer call is timed by itself.


def test_quartiles_are_of_the_rounds_ratios():
    times = {"ours": [1.0, 2.0, 1.0, 4.0, 1.0], "peer": [2.0, 2.0, 3.0, 16.0, 5.0], "slow": [7.0]}
    assert timer.median_ratios(times) == {"peer": 3.0, "slow": 7.0}
    assert timer.quartile_ratios(times) == {"peer": (2.0, 4.0), "slow": (7.0, 7.0)}
    assert harness.ratio_text({"peer": 3.0, "slow": 7.0, "old": 1.0}, timer.quartile_ratios(times)) == (
        "peer 3.00x (2.00 to 4.00), slow 7.00x, old 1.00x"
    )


def test_a_clock_is_asked_in_turn_and_a_peer_that_it_cannot_time_is_absent():
    asked = []

    def clock(contender):
        if contender is others["uncaptured"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        name = next(name for name, one in others.items() if one is contender)
        return lambda: asked.append(name) or {"ours": 1e-3, "peer": 3e-3}[name]

    others = {name: contender(torch.ones(4)) for name in ("ours", "peer", "uncaptured")}
    row = harness.compare(case(), harness.Comparison(others, bytes_moved=1000), CEILINGS, 0.0, clock)
    assert row.milliseconds == {"ours": 1.0, "peer": 3.0} and row.speedup == {"peer": 3.0}
    assert row.absent == {"uncaptured": "RuntimeError: operation not permitted when stream is capturing"}
    assert asked[2:6] == ["ours", "peer", "peer", "ours"] and len(asked) == 2 + 2 * row.rounds


def test_a_rate_is_of_the_ceiling_that_bounds():
    assert harness.rate(10**6, 10**6, 1.0, CEILINGS) == "1 GB/s"
    assert harness.rate(10**3, 5 * 10**9, 100.0, CEILINGS) == "0.05 TFLOP/s"


def test_a_row_that_fails_ends_a_run_or_is_named(monkeypatch):
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "0")
    wrong = harness.Comparison({"ours": contender(torch.zeros(4))}, bytes_moved=1)
    right = harness.Comparison({"ours": contender(torch.ones(4))}, bytes_moved=1)
    cases = [case(case="wrong", build=lambda: wrong), case(build=lambda: right)]
    with pytest.raises(AssertionError, match="off from float64"):
        harness.run(cases, CEILINGS, limit_s=5.0, row_s=0.01)
    failed = []
    rows, left_out = harness.run(cases, CEILINGS, limit_s=5.0, row_s=0.01, failed=failed)
    assert [row.case for row in rows] == ["toy"] and left_out == []
    assert len(failed) == 1 and failed[0].startswith("toy: wrong, hot: AssertionError: toy: ours is off from float64")


def test_floor_is_the_longer_of_bytes_and_products():
    assert harness.floor_ms(10**7, 0, CEILINGS) == pytest.approx(1.0)
    assert harness.floor_ms(10**7, 10**9, CEILINGS) == pytest.approx(10.0)
    read = {**CEILINGS, "read_gb_s": 20.0}
    assert harness.floor_ms(10**7, 0, read) == pytest.approx(1.0)
    assert harness.floor_ms(10**7, 0, read, reads=True) == pytest.approx(0.5)
    assert harness.floor_ms(10**7, 0, CEILINGS, reads=True) == pytest.approx(1.0)  # CEILINGS has no read_gb_s
    assert harness.rate(10**6, 10**6, 1.0, read, reads=True) == "1 GB/s"


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
    monkeypatch.setattr(harness, "has_kernel", lambda op, key: key == "CPU" or op == "lora_linear")
    harness.check_kernels({"lora_linear"})
    with pytest.raises(SystemExit, match="no native CUDA kernel of lora_linear_backward;"):
        harness.check_kernels({"lora_linear"}, "cuda")


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


@pytest.mark.parametrize("name", ["nf4", "lora", "dora", "ia3", "siblings", "gated_lora", "experts"])
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
        # PyTorch's grouped product raises an error for experts as small as in this test.
        assert set(absent) <= ({"PEFT", "frozen"} if name == "experts" else {"bitsandbytes, repacked"})
        # A peer is compared with a float64 result with the peer's own dropout mask; the errors are a few bf16
        # roundings. bitsandbytes does not quantize every nested scale to the nearest code.
        for peer, found in errors.items():
            limit = 0.1 if one.op == "nf4_quantize" or peer == "bitsandbytes, repacked" else 0.015
            known = isinstance(found, dict) or peer.startswith("torch")  # else the peer is not verified
            assert known and (isinstance(found, str) or max(found.values()) < limit), (one.op, one.case, peer, found)


def test_every_variant_is_a_case_of_a_full_run():
    for device, settings in (("cpu", command.FULL), ("cuda", command.CUDA)):
        options = grid.Options(*settings[:6], device, command.FORWARD[device])
        for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
            variants = importlib.import_module(f"benchmarks.{path.stem}").VARIANTS
            wanted = {(variant.op, variant.case) for variant in variants if device in variant.devices}
            assert {(one.op, one.case.partition(", ")[2]) for one in grid.cases(variants, options)} == wanted


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
    assert tables.cases_table(result["rows"]).count("\n") == 1 + len(result["rows"])


def test_the_command_refuses_unknown_names():
    with pytest.raises(SystemExit, match="no benchmark nf5; there are"):
        command.main(["nf5"])
    with pytest.raises(SystemExit, match="no shape 70b; there are"):
        command.main(["--shapes", "70b"])


# --- a GPU ------------------------------------------------------------------------------------------------------------

GPU = {"name": "NVIDIA Toy 80GB", "capability": "9.0", "multiprocessors": 4, "memory_gib": 1.0, "cuda": "13.0",
       "driver": "1.2.3", "sm_mhz": "100", "max_sm_mhz": "200"}  # fmt: skip


@pytest.fixture
def device_log(monkeypatch):
    """Returns a list of the calls of torch.cuda in order. Each event is one millisecond after the previous event."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.turn = log.count("event")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return float(end.turn - self.turn)

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def capture(graph):
        log.append("capture")
        yield
        log.append("captured")

    for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    return log


def logging(log):
    return harness.Contender(lambda: log.append("run"), None, "not verified", lambda: log.append("take"))


def test_calls_are_timed_between_events_and_waited_for_at_the_end_alone(device_log):
    sample = cuda.event_clock(logging(device_log))
    device_log.clear()
    assert sample() == 1e-3
    assert device_log == ["take", "event", "run", "event"] * cuda.CALLS + ["synchronize"]


def test_a_graph_holds_many_calls_and_its_second_replay_is_timed(device_log):
    sample = cuda.graph_clock(logging(device_log))
    at, to = device_log.index("capture"), device_log.index("captured")
    assert device_log[at + 1 : to] == ["take", "run"] * cuda.GRAPH_CALLS
    device_log.clear()
    assert sample() == 1e-3 / cuda.GRAPH_CALLS
    assert device_log == ["replay", "event", "replay", "event", "synchronize"]


def cuda_cases(ops):
    variants = [v for op in ops for v in importlib.import_module(f"benchmarks.bench_{op}").VARIANTS]
    tokens, hot, shape_tokens, shapes, weights, compiled = command.CUDA[:6]
    options = grid.Options(tokens, hot, shape_tokens, shapes, weights, compiled, "cuda", command.FORWARD["cuda"])
    return list(grid.cases(variants, options))


def test_what_is_compared_on_a_gpu():
    cases = cuda_cases(["nf4", "lora", "dora", "ia3"])
    linear = [one for one in cases if one.case.endswith("4096->4096, forward")]
    for weights in ("rotating", "graph"):
        assert {one.tokens for one in linear if one.weights == weights} == {1, 4, 8, 16, 32, 64, 512, 2048, 8192}
    trained = {one.tokens for one in cases if one.op in ("lora_linear", "dora_linear", "ia3_linear")}
    assert trained == {512, 2048, 8192}
    for op, dtypes in (("nf4_quantize", ("bf16", "fp16", "fp32")), ("nf4_dequantize", ("bfloat16", "float16"))):
        for n in (4096, 14336):
            found = {one.case for one in cases if one.op == op and one.n == n}
            assert {case for dtype in dtypes for case in found if dtype in case} and len(found) == 6
    captured = {one.op for one in cases if one.weights == "graph"}
    assert captured == {"nf4_dequantize", "nf4_linear", "dora_weight_norm"}
    assert not [one for one in linear if one.weights == "graph" and "backward" in one.case]


@pytest.mark.slow
def test_the_command_on_a_gpu_writes_each_row(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "about_gpu", lambda: GPU)
    monkeypatch.setattr(cuda, "uuid", lambda: None)
    monkeypatch.setattr(cuda.Meter, "lap", lambda meter: {"power_w": 7.5, "sm_mhz": 200.0})
    monkeypatch.setattr(cuda, "measured_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(cuda, "event_clock", harness.host_clock)
    monkeypatch.setattr(cuda, "graph_clock", harness.host_clock)
    monkeypatch.setattr(grid, "Problem", lambda *args, device, **kwargs: peers.Problem(*args, **kwargs))
    saved = []
    save = command.save
    monkeypatch.setattr(command, "save", lambda *args, **more: saved.append(len(args[2])) or save(*args, **more))
    command.main(["dora", "nf4", "--device", "cuda", "--tokens", "2", "--shapes", "", "--compile-tokens", "",
                  "--out", str(tmp_path)])  # fmt: skip
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("layer-dora_nf4-nvidia-toy-80gb-") and path.suffix == ".json"
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"] == GPU and result["failed"] == []
    assert saved == [*range(1, len(result["rows"]) + 1), len(result["rows"])]
    assert {"ours", "dense"} == set(next(r for r in result["rows"] if r["op"] == "dora_weight_norm")["milliseconds"])
    for row in result["rows"]:
        assert row["meter"] == {"power_w": 7.5, "sm_mhz": 200.0}
        peer = {"nf4_dequantize": "bitsandbytes", "dora_linear": "PEFT"}.get(row["op"], "ours")
        assert any(name.startswith(peer) for name in row["milliseconds"]), row
        assert (row["weights"] == "graph") <= ("torch eager" not in row["milliseconds"]), row
    assert capsys.readouterr().out.endswith(f"written: {path}\n")


def gpu_result():
    def row(op, case, tokens, weights, speedup):
        return {"op": op, "case": case, "tokens": tokens, "weights": weights, "milliseconds": {"ours": 0.5},
                "speedup": speedup, "quartiles": {name: (ratio, ratio) for name, ratio in speedup.items()},
                "absent": {}}  # fmt: skip

    rows = [
        row("nf4_dequantize", "4096->4096, to bfloat16, plain", None, "graph", {"bitsandbytes": 1.25}),
        row("nf4_dequantize", "4096->4096, to bfloat16, plain", None, "rotating", {"bitsandbytes": 9.0}),
        row("nf4_linear", "T=8 4096->4096, forward", 8, "graph", {}),
        row("nf4_linear", "T=4 4096->4096, forward", 4, "graph", {"bitsandbytes": 9.0}),
        row("lora_linear", "T=8192 4096->4096, bf16 base, dropout 0.05", 8192, "rotating", {"frozen": 0.8}),
    ]
    rows[0]["meter"] = {"power_w": 612.5, "sm_mhz": 1755.0, "temperature_c": 60.0}
    rows[2]["absent"] = {"bitsandbytes": "ModuleNotFoundError: No module named 'bitsandbytes'"}
    machine = {"cpu": "CPU", "threads": 2, "isa": "avx512", "environment": {}, "date": "2026-01-02",
               "versions": {"torch": "2.11.0"}, "gpu": GPU}  # fmt: skip
    return {"machine": machine, "ceilings": CEILINGS, "left_out": ["ia3_scale: T=1, rotating"], "failed": [],
            "rows": rows}  # fmt: skip


def test_a_gpu_has_tables_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    assert tables.gpu_tables() == "No GPU has been measured."
    result = gpu_result()
    path = files.result_path("layer-all", result["machine"])
    assert path == tmp_path / "layer-all-nvidia-toy-80gb-2026-01-02.json"
    files.write(path, result)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    text = tables.gpu_tables()
    assert "### NVIDIA Toy 80GB" in text and "SM clock 100 of 200 MHz; CUDA 13.0, driver 1.2.3; 2026-01-02" in text
    assert (
        "| `nf4_dequantize` | 4096->4096, to bfloat16, plain | graph | 0.500 | bitsandbytes 1.25x | 612.5; 1755.0 |"
        in text
    )
    assert "rotating | 0.500 | bitsandbytes 9.00x | -; - |" in text
    assert "Not measured: bitsandbytes (ModuleNotFoundError" in text and "; ia3_scale: T=1, rotating." in text
    assert tables.DRAWN["lora"]() == tables.NOTHING  # there is no result file of a CPU


def test_without_a_gpu_the_commands_say_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: torch sees no GPU"):
        command.main(["--device", "cuda"])
    with pytest.raises(SystemExit, match="no kind of weights graph; there are rotating, hot$"):
        command.main(["--weights", "graph"])


def test_a_meter_samples_power_and_clock(monkeypatch, tmp_path):
    assert cuda.sample_of("123.45, 1980, 51") == {"power_w": 123.45, "sm_mhz": 1980.0, "temperature_c": 51.0}
    assert cuda.sample_of("[N/A], 1980, [Not Supported]") == {"sm_mhz": 1980.0}
    assert cuda.sample_of("") == {}
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport sys, time\n"
                       f"open({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
                       "for clock in (100, 300, 200): print(f'7.5, {clock}, [N/A]')\n"
                       "time.sleep(600)\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with cuda.Meter("toy") as meter:
        end = time.monotonic() + 60
        while len(meter._samples) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert meter.lap() == {"power_w": 7.5, "sm_mhz": 200.0}
        assert meter.lap() == {"power_w": 7.5, "sm_mhz": 200.0}  # the last result, without a new sample
    assert meter._process.returncode == -9
    assert (tmp_path / "asked").read_text() == ("--id=GPU-toy --query-gpu=power.draw,clocks.sm,temperature.gpu "
                                                "--format=csv,noheader,nounits --loop-ms=100")  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for uuid in ("toy", None):
        with cuda.Meter(uuid) as meter:
            assert meter.lap() == {}


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not files.RESULTS.is_dir(), reason="the result files are not here: not a checkout")
@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_result_files(path):
    text = path.read_text()
    assert tables.draw(text, path.name) == text, "run python -m benchmarks.tables"


def test_drawing_refuses_a_document_it_does_not_know():
    with pytest.raises(SystemExit, match="has no place marked"):
        tables.draw("nothing here")
    with pytest.raises(SystemExit, match="marks a place 'prefix', wanted one of"):
        tables.draw("<!-- measured prefix: python -m benchmarks.tables --><!-- /measured -->")


def few_layers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, methods: tuple[str, ...]) -> None:
    """Lets ``benchmarks.layers`` measure two layers of each of two small shapes."""
    monkeypatch.setitem(layers.PLANS, dtype, layers.Plan(((64, 128), (128, 64)), (12,), methods))
    monkeypatch.setattr(layers, "MOST_LAYERS", 2)
    monkeypatch.setattr(layers, "measured_ceilings", lambda: CEILINGS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_are_compared_and_drawn(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    methods = layers.PLANS[dtype].methods
    few_layers(monkeypatch, dtype, methods)
    result = {"machine": harness.machine(), **layers.measure(dtype, 3)}
    assert len(result["rows"]) == 2 * len(methods)
    for row in result["rows"]:
        assert all(row[ratio]["median"] > 0 for ratio in ("of_frozen", "stock_of_frozen", "over_stock"))
    first = result["rows"][0]
    cell = f"{first['of_frozen']['median']:.2f}; {first['over_stock']['median']:.2f}"
    if dtype is torch.float32:
        drawn = tables.float32_table(result).splitlines()
        assert drawn[0] == "| method | 64->128 | 128->64 |" and len(drawn) == 2 + len(methods)
        assert drawn[2].startswith(f"| LoRA | {cell} |")
    else:
        drawn = tables.shapes_table(result).splitlines()
        assert drawn[:2] == ["| method | layer | T=12 |", "|---|---|---|"] and len(drawn) == 2 + 2 * len(methods)
        assert drawn[2] == f"| LoRA | 64->128 | {cell} |"


@pytest.mark.parametrize("dtype, rank, name", [
    ("bfloat16", 16, "layer-shapes"), ("bfloat16", 8, "layer-shapes_rank8"), ("float32", 8, "layer-float32_rank8"),
])  # fmt: skip
def test_layers_are_measured_with_the_rank_that_the_result_file_names(
    dtype: str, rank: int, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    few_layers(monkeypatch, getattr(torch, dtype), ("LoRA", "DoRA", "IA3"))
    ranks, made = {}, layers.Contender.__init__

    def noting(self, kind, make, config, *args, **kwargs):
        made(self, kind, make, config, *args, **kwargs)
        shapes = {key: value.shape for layer in self.layers for key, value in layer.named_parameters()}
        found = {min(shape) for key, shape in shapes.items() if "lora_A" in key or "lora_B" in key}
        ranks.setdefault(kind, []).append(found)

    monkeypatch.setattr(layers.Contender, "__init__", noting)
    arguments = ["--dtype", dtype, "--rounds", "2", "--out", str(tmp_path)]
    layers.main(arguments + (["--rank", str(rank)] if rank != 16 else []))
    assert ranks == {"frozen": [set()] * 2, "stock": [{rank}, {rank}, set()] * 2, "ours": [{rank}, {rank}, set()] * 2}
    (path,) = tmp_path.iterdir()
    machine = harness.machine()
    assert path.name == f"{name}-{machine['isa']}-{machine['date']}.json"
    result = json.loads(path.read_text())
    assert result["rank"] == rank and len(result["rows"]) == 6


def test_layers_have_a_rank_of_at_least_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        layers.main(["--rank", "0"])
    assert "--rank is 0, expected at least 1" in capsys.readouterr().err


def test_the_newest_file_of_exactly_that_name_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    assert files.newest("layer-nf4-avx2") is None
    names = ("layer-nf4-avx2-2026-01-02", "layer-nf4-avx2-2026-01-03", "layer-nf4-avx2_x-2026-01-09",
             "layer-nf4-avx2-other-2026-01-09", "a-layer-nf4-avx2-2026-01-09")  # fmt: skip
    for turn, name in enumerate(names):
        files.write(tmp_path / f"{name}.json", {"turn": turn})
    assert files.newest("layer-nf4-avx2") == {"turn": 1}


def test_every_result_file_is_read_by_a_program_that_draws_it():
    programs = "".join(path.read_text() for path in Path(files.__file__).parent.glob("*.py"))
    names = {path.stem[: -len("-2026-01-02")] for path in files.RESULTS.glob("*.json")}
    unread = {name for name in names if f'"{name}"' not in programs}
    assert not {name for name in unread if not name.startswith("layer-all-")}  # newest_by_gpu reads these files


def test_ratios_stand_by_case_peer_and_tokens():
    def row(case, tokens, **speedup):
        return {"op": "lora_linear", "case": f"T={tokens} 8->8, {case}", "tokens": tokens, "speedup": speedup,
                "quartiles": {name: (ratio - 0.1, ratio) for name, ratio in speedup.items()}}  # fmt: skip

    rows = [row("bf16 base", 16, PEFT=1.2, frozen=0.9, other=3.0), row("bf16 base", 1, PEFT=1.5),
            row("AdaLoRA, bf16 base", 1, PEFT=2.0), {**row("bf16 base", 1, PEFT=9.0), "op": "ia3_linear"}]  # fmt: skip
    assert tables.peers_table({"rows": rows}, "lora_linear", ("PEFT", "frozen")).splitlines() == [
        "| layer | compared with | T=1 | T=16 |",
        "|---|---|---|---|",
        "| LoRA, bf16 base | PEFT | 1.50 (1.40 to 1.50) | 1.20 (1.10 to 1.20) |",
        "| LoRA, bf16 base | frozen |  | 0.90 (0.80 to 0.90) |",
        "| AdaLoRA, bf16 base | PEFT | 2.00 (1.90 to 2.00) |  |",
    ]


def test_the_table_of_packed_formats_has_the_medians_of_the_ratios():
    common = {"k": 64, "n": 32, "roofline": {"ours": 50.0}, "bytes_moved": 4e6}
    common["milliseconds"] = {"ours": 2.0, "frozen": 2.0, "PyTorch decode": 2.0}  # medians, whose ratios are all 1
    speedup = {"frozen": 0.9, "PyTorch decode": 1.4}
    step = {"op": "lora_linear", "case": "T=512 64->32, FP4 base, dropout 0.05", "tokens": 512, "speedup": speedup}
    one = {"op": "nf4_linear", "case": "T=1 64->32, FP4, few tokens", "tokens": 1, "speedup": {**speedup, "frozen": 3}}
    assert tables.packed_table({"rows": [{**one, **common}, {**step, **common}]}).splitlines() == [
        "| format | T = 1: GB/s | T = 1: frozen, PyTorch decode | LoRA, 64 -> 32, T = 512: frozen, PyTorch decode |",
        "|---|---|---|---|",
        "| FP4 | 2.0 (50%) | 3.00, 1 | 0.90, 1.40 |",
    ]
