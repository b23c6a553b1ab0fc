"""The shape sweep's part of every test run: 2,000 cases of fixed seeds, on all CPU paths in turn; see ``sweep.py``."""

import os

import pytest
import sweep

CHUNKS, CHUNK = 20, 100
SMALL_CHUNK = 50  # under the emulator or a sanitizer


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_calls_agree_with_float64(chunk: int, pytestconfig: pytest.Config) -> None:
    device = pytestconfig.getoption("--device")
    if device == "cuda":
        pytest.skip("the sweep draws for the CPU and for the emulator")
    small = device == "emulated" or bool(os.environ.get("PEFT_EXT_SANITIZER"))
    count = SMALL_CHUNK if small else CHUNK
    isa = sweep.EMULATED if device == "emulated" else None
    counts, failures = sweep.sweep(range(chunk * CHUNK, chunk * CHUNK + count), isa=isa, small=small)
    assert counts["cases"] == count
    assert not failures, "\n".join(failures)


def test_the_sweep_draws_every_operator_and_path() -> None:
    drawn = [sweep.draw(seed) for seed in range(CHUNKS * CHUNK)]
    assert {case.case.op for case in drawn} == {"nf4", "lora", "grouped_lora", "dora", "ia3", "bottleneck"}
    assert {case.isa for case in drawn} == set(sweep._native.STATE.module.isas())
    assert {case.threads for case in drawn} == {1, 2, 3, 4}
    sizes = [size for case in drawn for size in (*case.shape[0], *case.shape[1:])]
    assert min(sizes) == 0 and max(sizes) > 50_000
    assert {layout for case in drawn for layout in case.layouts} == set(sweep.LAYOUTS)


def test_a_failure_is_reported_with_the_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "check", lambda drawn: (_ for _ in ()).throw(AssertionError("wrong")))
    counts, failures = sweep.sweep(range(3, 4))
    assert len(failures) == 1 and failures[0].endswith(f"python tests/sweep.py --seed 3 --isa {sweep.draw(3).isa}")
    assert sweep.main(["--seed", "3"]) == 1
    assert "1 failed" in capsys.readouterr().out
