"""Repeats tests while another test run keeps the machine busy, and counts failures. Needs pytest-repeat.

    python tools/steady.py                                         runs the tests of SHORT 50 times, of LONG 5 times
    python tools/steady.py --times 200 tests/files/test_files.py   runs the tests with these pytest names alone

A test that depends on memory, time, processes, ports, signals or a terminal may pass on an idle machine and fail on a
busy one. Such a test must be added to SHORT or LONG. The program fails if a test fails, or if a process ends abnormally
or does not end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOAD = ("tests/ops/test_ops.py", "tests/ops/test_op_edges.py")

# SHORT has tests of some seconds. Several repetitions of a test run in one process, so that the process imports the
# packages only once.
SHORT = (
    "tests/ops/test_determinism.py::test_steps_of_every_operator_leave_nothing_behind",
    "tests/ops/test_determinism.py::test_steps_of_a_training_leave_nothing_behind",
    "tests/ops/test_determinism.py::test_changing_shapes_leave_nothing_behind",
    "tests/ops/test_determinism.py::test_a_leak_is_found",
    "tests/ops/test_determinism.py::test_what_is_allocated_once_is_no_leak",
    "tests/memory/test_scratch.py",
    "tests/ops/test_set_isa.py",
    "tests/files/test_files.py::test_killed_at_any_moment_the_folder_is_the_old_or_the_new",
    "tests/merge/test_merge_gguf.py::test_a_killed_merge_leaves_the_old_file",
    "tests/faults/test_signals.py::test_a_signal_that_ends_a_run_saves_a_checkpoint",
    "tests/faults/test_signals.py::test_a_second_signal_ends_a_run_at_once",
    "tests/files/test_untrusted_adapters.py::test_an_expression_that_does_not_end",
    "tests/files/test_untrusted_adapters.py::test_expressions_that_are_none_and_such_as_end",
    "tests/files/test_untrusted_commands.py::test_chat_refuses_tokenizers_templates_and_generation",
    "tests/files/test_untrusted_commands.py::test_the_commands_refuse_adapters",
    "tests/native/test_gpu.py::test_a_command_is_cut_off_with_all_that_it_started_and_its_output_kept",
    "tests/cli/test_cli.py::test_ctrl_c_saves_a_checkpoint",
)
LONG = (  # test files whose tests depend, for example, on memory, processes, a terminal, a browser or threads
    "tests/run/test_cli_config.py",
    "tests/faults/test_limits.py",
    "tests/run/test_report.py",
    "tests/fuzz/test_fuzz.py",
    "tests/faults/test_kills.py",
    "tests/faults/test_no_room.py",
    "tests/faults/test_signals.py",
    "tests/distributed/test_distributed.py",
    "tests/ops/test_threads.py",
    "tests/fuzz/test_sweep.py",
    "tests/memory/test_memory.py",
    "tests/memory/test_workspace.py",
    "tests/ops/test_determinism.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_cli_commands.py",
    "tests/integrations/test_methods.py",
    "tests/merge/test_merge.py",
    "tests/merge/test_merge_refusals.py",
    "tests/quantize/test_quantize.py",
    "tests/native/test_build.py",
    "tests/docs/test_examples.py",
)


@contextlib.contextmanager
def load(runs: int) -> Iterator[None]:
    """Runs the tests of LOAD again and again, in ``runs`` other processes, while the code in the context runs."""
    again = 'while :; do "$0" -m pytest -q -p no:cacheprovider "$@"; done'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    beside = [
        subprocess.Popen(["sh", "-c", again, sys.executable, *LOAD], cwd=ROOT, env=environment, start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(runs)
    ]  # fmt: skip
    try:
        yield
        assert all(process.poll() is None for process in beside), "the load ended by itself"
    finally:
        for process in beside:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


class Outcomes:
    """Counts how often each test passed and failed, and keeps the longest time of each test in seconds. A skipped run
    of a test is not counted."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: dict[str, int] = defaultdict(int)
        self.longest: dict[str, float] = defaultdict(float)

    def add(self, report: Path) -> None:
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if "skipped" in kinds:
                continue
            # The table has one row for all parameters of a test. pytest-repeat's number is one of the parameters.
            name = f"{case.get('classname')}.{case.get('name')}".partition("[")[0]
            self.longest[name] = max(self.longest[name], float(case.get("time", 0)))
            (self.failed if kinds & {"failure", "error"} else self.passed)[name] += 1

    def table(self) -> str:
        names = sorted(self.longest)
        rows = [f"{'runs':>6} {'failed':>6} {'longest s':>9}  test (over all its parameters)"]
        for name in names:
            passed, failed = self.passed[name], self.failed[name]
            rows.append(f"{passed + failed:>6} {failed:>6} {self.longest[name]:>9.1f}  {name}")
        return "\n".join(rows)


def run(tests: list[str], count: int, seconds: float, outcomes: Outcomes) -> str:
    """Runs each test of ``tests`` ``count`` times, all in one process. Returns "" if pytest ended normally, also with
    failed tests, and otherwise how the process ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--count", str(count),
                   f"--junitxml={report}", *tests]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=seconds)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            return f"did not end in {seconds:.0f} s\n{(error.stdout or b'').decode(errors='replace')[-4000:]}"
        if report.exists():
            outcomes.add(report)
        if done.returncode:
            print(done.stdout[-12000:], flush=True)
        # pytest's exit status 1 says that a test failed. The table shows the failure.
        return "" if done.returncode in (0, 1) and report.exists() else f"pytest ended with {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="pytest's names; without: the two lists")
    parser.add_argument("--times", type=int, help="how often each runs; default: 50 and 5")
    parser.add_argument("--a-process", type=int, default=10, help="how many of them in one process, at most")
    parser.add_argument("--load", type=int, default=1, help="how many other test runs beside")
    parser.add_argument("--minutes", type=float, default=1e9, help="begins no process after that")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a process is said to hang")
    options = parser.parse_args()
    work = [([test], options.times or 50, options.a_process) for test in options.tests or SHORT]
    work += [] if options.tests else [([test], options.times or 5, 1) for test in LONG]

    outcomes, broken, cut = Outcomes(), [], False
    until = time.monotonic() + 60 * options.minutes
    os.environ.setdefault("PEFT_EXT_REQUIRE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with load(options.load):
        for tests, times, in_process in work:
            left = times
            while left and not (cut := time.monotonic() > until):
                count = min(left, in_process)
                if why := run(tests, count, options.limit, outcomes):
                    broken.append(f"{' '.join(tests)}: {why}")
                left -= count
            print(f"{times - left} of {times} times: {' '.join(tests)}", flush=True)
    print(outcomes.table())
    for text in broken:
        print(f"steady: {text}")
    runs, failures = sum(outcomes.passed.values()), sum(outcomes.failed.values())
    print(f"steady: {runs + failures} runs of {len(outcomes.longest)} tests beside {options.load} other test runs: "
          f"{failures} failures, {len(broken)} processes that broke off"
          f"{', cut short by --minutes' if cut else ''}")  # fmt: skip
    return int(bool(failures or broken or not runs))


if __name__ == "__main__":
    sys.exit(main())
