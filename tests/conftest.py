"""Configures pytest: tests run offline and against the native library, and fail where the library is missing.

With ``--device cuda`` (or PEFT_EXT_TEST_DEVICE=cuda), the tests that use the fixture ``device`` give the operators CUDA
tensors. Inputs are drawn on the CPU, and expected results are computed on the CPU. ``--device emulated`` builds the
CUDA kernels for the emulator, which runs the kernels on CPU tensors and checks their memory accesses. ``--share 3``
runs a third of the tests; the commit that is checked out chooses the third, so that later commits run the other thirds.
``--share 2/3`` runs the second third. A test's share depends
only on the test's id, so that a new test does not change the share of another test. ``--products 3`` runs a third of
the cases of each test that has more than 20 cases, and all cases of the other tests, as CI does with the tests marked
slow.
"""

import argparse
import collections
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import zlib

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is tested
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not keep the cores of a busy machine

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_kernels import cuda_call, launches  # noqa: F401  fixtures
from tiny_run import tiny  # noqa: F401  a fixture of many folders' tests

from peft_ext import _native

DEVICES = ("cpu", "cuda", "emulated")
FEW_CASES = 20  # --products runs all cases of a test that has at most this number of cases.
# Folders and files that take longest. Several processes of pytest-xdist get these files first, so that no process is
# left with a long file at the end.
LONGEST = (
    "tests/distributed/", "tests/ops/test_cuda_", "tests/ops/test_ops.py", "tests/faults/",
    "tests/integrations/test_methods.py", "tests/memory/", "tests/integrations/test_loss.py", "tests/gguf/test_load.py",
    "tests/integrations/test_few_tokens", "tests/ops/test_covering.py", "tests/integrations/test_architectures.py",
    "tests/run/", "tests/cli/", "tests/merge/", "tests/native/", "tests/docs/", "tests/integrations/", "tests/fuzz/",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=DEVICES, default=os.environ.get("PEFT_EXT_TEST_DEVICE", "cpu"),
                     help="where the operators run; default: PEFT_EXT_TEST_DEVICE, or else cpu")  # fmt: skip
    parser.addoption("--share", type=share_of, default=(1, 1), metavar="[K/]N",
                     help="run the Kth of N parts of the tests; the commit chooses K by default")  # fmt: skip
    parser.addoption("--products", type=share_of, default=(1, 1), metavar="[K/]N",
                     help=f"run the Kth of N parts of the cases of each test that has more than {FEW_CASES} cases, and "
                     "all cases of the other tests; the commit chooses K by default")  # fmt: skip


def share_of(text: str) -> tuple[int, int]:
    """Returns (K, N) for the text "K/N" or "N". For "N" the commit that is checked out gives K, from 1 to N."""
    chosen, _, count = text.rpartition("/")
    total = int(count)
    if chosen:
        number = int(chosen)
    else:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        # A source distribution is no git repository, and gets the number 0.
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "0"
        number = int(commit, 16) % max(1, total) + 1
    if not 1 <= number <= total:
        raise argparse.ArgumentTypeError(f"--share is {text}, wanted K/N with 1 <= K <= N")
    return number, total


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: `make test` leaves it out, `make test-all` runs it")
    config.addinivalue_line("markers", "cpu_only(reason): says nothing of another --device, and is skipped there")
    device = config.getoption("--device")
    if device not in DEVICES:
        raise pytest.UsageError(f"PEFT_EXT_TEST_DEVICE is {device!r}, wanted one of {', '.join(DEVICES)}")
    if device == "cuda" and not (_native.STATE.cuda_loaded and torch.cuda.is_available()):
        why = _native.STATE.cuda_error or "no GPU is visible to torch, or torch is a CPU build"
        raise pytest.UsageError(f"--device cuda: the CUDA kernels can't run here: {why}")
    if device == "emulated":
        config.stash[EMULATED] = _emulated_kernels()


EMULATED = pytest.StashKey[torch.library.Library]()


def _emulated_kernels() -> torch.library.Library:
    """Makes peft_ext's operators on CPU tensors run the emulated CUDA kernels, as long as the returned Library
    lives.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    import emulated_cuda

    from peft_ext.ops.library import NAMESPACE, OPERATORS

    if why := emulated_cuda.missing():
        raise pytest.UsageError(f"--device emulated: {why}")
    emulated_cuda.load()
    kernels = torch.library.Library(NAMESPACE, "IMPL")
    for name, declared in OPERATORS.items():
        if declared.cuda:
            op = getattr(getattr(torch.ops, emulated_cuda.NAMESPACE), name).default
            kernels.impl(name, op, "CPU", allow_override=True)
        elif declared.composed:  # on a GPU, the CPU kernel of a composed operator does not run
            kernels.impl(name, declared.reference, "CPU", allow_override=True)
    return kernels


def pytest_report_header(config: pytest.Config) -> str:
    state = _native.STATE
    loaded = "loaded" if state.cuda_loaded else "not loaded"
    return f"peft_ext: CPU path {state.isa}, CUDA library {loaded}; operators on {config.getoption('--device')}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for option in ("--share", "--products"):
        number, total = config.getoption(option)
        if total > 1:
            terminalreporter.write_line(f"{option[2:]} {number} of {total}; {option} {number}/{total} repeats it")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    functions: dict[str, list[pytest.Function]] = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            functions[item.nodeid.partition("[")[0]].append(item)
    products = {item for cases in functions.values() if len(cases) > FEW_CASES for item in cases}
    for cases in functions.values():
        for item in _beyond_each_value([item for item in cases if not item.get_closest_marker("slow")]):
            item.add_marker(pytest.mark.slow)
    share, share_of_products = config.getoption("--share"), config.getoption("--products")
    drawn = [_is_in(share, item) and (item not in products or _is_in(share_of_products, item)) for item in items]
    config.hook.pytest_deselected(items=[item for item, inside in zip(items, drawn, strict=True) if not inside])
    items[:] = [item for item, inside in zip(items, drawn, strict=True) if inside]
    if hasattr(config, "workerinput"):  # in a process of pytest-xdist
        items.sort(key=_place_in_order)
    device = config.getoption("--device")
    for item in items:
        if device != "cpu" and (mark := item.get_closest_marker("cpu_only")):
            item.add_marker(pytest.mark.skip(reason=f"--device {device}: {mark.args[0]}"))


def _place_in_order(item: pytest.Item) -> int:
    return next((place for place, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))


def _is_in(share: tuple[int, int], item: pytest.Item) -> bool:
    number, total = share
    return zlib.crc32(item.nodeid.encode()) % total == number - 1


def _beyond_each_value(cases: list[pytest.Function]) -> list[pytest.Function]:
    """Returns the cases of one parametrized test that the first tier of tests can leave out.

    The cases that stay are chosen greedily, so that each value of each parameter is in at least one of these cases.
    """
    values = {item: {(name, id(value)) for name, value in item.callspec.params.items()} for item in cases}
    missing, left = set().union(*values.values()), list(cases)
    while missing:
        best = max(left, key=lambda item: len(values[item] & missing))
        missing -= values[best]
        left.remove(best)
    return left


_LOST = re.compile("illegal memory access|misaligned address|illegal instruction|unspecified launch failure")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> pytest.TestReport:
    """Stops the session where a kernel has lost the CUDA context, because all later tests on the GPU would fail.

    A process of pytest-xdist ends instead: pytest-xdist reports the test as failed, and a new process runs the rest.
    """
    report = yield
    if report.failed and _LOST.search(str(report.longrepr)):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os.write(2, f"{item.nodeid} lost the CUDA context:\n{report.longrepr}\n".encode())
            os._exit(1)
        item.session.shouldstop = f"{item.nodeid} lost the CUDA context"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Any:
    """Seeds each fixture that several tests share, and then restores the random state of the test that asked first.

    The numbers that a shared fixture draws therefore depend on no test.
    """
    if fixturedef.scope == "function":  # the fixture _seeded seeds each test
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Yields the device of the operators' tensors."""
    name = request.config.getoption("--device")
    if name == "cuda":  # the bounds of the tests are for products that sum in float32, as on the CPU
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    yield torch.device("cpu" if name == "emulated" else name)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variable COLUMNS, the width of a terminal that pytest's workers inherit, but do not write to."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Fails a file of tests that leaves logging disabled, because later tests of log messages would fail."""
    yield
    assert logging.root.manager.disable == 0, "logging.disable was called and not undone"


@pytest.fixture
def two_threads():
    """Runs the test with two threads on any machine, and then restores the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """Returns a Chromium browser that playwright drives."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs playwright (pip install playwright)")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield running
        running.close()
