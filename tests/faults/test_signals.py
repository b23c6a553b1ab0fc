"""Tests signals and closed pipes, which end a run that can then be resumed, and kernels in forks and threads."""

import functools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from faults import points
from faults.points import ended, forked
from faults.runs import assert_readable, assert_same_run, hidden, peft
from faults.steps import Steps, step
from torch import nn

from peft_ext import accelerate, explain, quantize_nf4
from peft_ext.cli.main import main
from peft_ext.files import not_whole
from peft_ext.run import errors, train

# Python warns that forking a process with threads may hang.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# --- signals and pipes ------------------------------------------------------------------------------------------------


def signalled(finetune, out: Path, *numbers: int, before=None) -> tuple[int, str]:
    """Runs a long training, and sends the next signal after each line about a step or about the end of the run."""
    child, stream = finetune(out, "--max-steps", "100000", "--save-steps", "0", stdout=-2, before=before)
    text = ""
    with stream:
        pending = list(numbers)
        for line in stream:
            text += line
            if pending and (line.startswith("step ") or "stopping after" in line):
                os.kill(child, pending.pop(0))
    return ended(child), text


def at_steps(do: Callable[[int], None]) -> None:
    """Makes every training of this process call ``do`` with the number of each step (from 1) before the step."""
    import transformers

    step, done = transformers.Trainer.training_step, []

    def counted(*args, **kwargs):
        done.append(1)
        do(len(done))
        return step(*args, **kwargs)

    transformers.Trainer.training_step = counted


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_a_run_saves_a_checkpoint(finetune, tmp_path, name):
    number = getattr(signal, name)
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  the tests may run under nohup, which ignores SIGHUP
    code, text = signalled(finetune, tmp_path / "out", number, before=heard)
    assert code == 128 + number, text
    assert "stopping after this step, with a checkpoint; a second signal stops at once" in text
    assert "with --resume continues" in text and "Traceback" not in text
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    assert not_whole(checkpoint) is None and not hidden(tmp_path)


def test_a_second_signal_ends_a_run_at_once(finetune, tmp_path):
    def slow(number: int) -> None:
        if number > 1:  # from the second step on, waits for the second signal
            time.sleep(points.SECONDS)

    code, text = signalled(finetune, tmp_path / "out", signal.SIGINT, signal.SIGINT, before=lambda: at_steps(slow))
    assert code == 130 and text.rstrip().endswith("error: interrupted") and "Traceback" not in text, text
    assert json.loads((tmp_path / "out/run.json").read_text())["finished"] is False
    assert not hidden(tmp_path)


def test_a_signal_outside_of_training_ends_a_run_with_its_number(finetune, runs, tmp_path):
    def before() -> None:
        train.adapt = lambda run, model: os.kill(os.getpid(), signal.SIGTERM)

    shutil.copytree(runs[0], tmp_path / "out")
    assert finetune(tmp_path / "out", "--overwrite", before=before) == (143, "error: ended by SIGTERM\n")
    assert_readable(tmp_path / "out", runs[0])
    assert not hidden(tmp_path)


def test_sigusr1_saves_a_checkpoint_and_the_run_goes_on(finetune, runs, tmp_path):
    def asks(number: int) -> None:
        if number in (3, 4):
            os.kill(os.getpid(), signal.SIGUSR1)

    def before() -> None:
        at_steps(asks)
        os.kill(os.getpid(), signal.SIGHUP)  # the run ignores SIGHUP, as under nohup

    signal_before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert finetune(tmp_path / "out", "--save-steps", "0", before=before) == (0, "")
    finally:
        signal.signal(signal.SIGHUP, signal_before)
    assert_same_run(tmp_path / "out", runs[1])
    saved = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
    assert saved == ["checkpoint-3", "checkpoint-4"]
    assert all(not_whole(tmp_path / "out/checkpoints" / name) is None for name in saved)


def test_a_handler_that_is_not_pythons_stays(monkeypatch):
    """A program that embeds Python may have signal handlers in C, which signal.signal could not restore."""
    from peft_ext.cli import chat

    foreign, real = {signal.SIGTERM, signal.SIGALRM}, (signal.signal, signal.getsignal)

    def install(number, handler):
        assert number not in foreign
        return real[0](number, handler)

    monkeypatch.setattr(signal, "signal", install)
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number in foreign else real[1](number))
    before = {number: real[1](number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    with errors.caught_signals(errors.Stop()), chat._at_most(5.0):
        assert real[1](signal.SIGINT) is not before[signal.SIGINT]
        assert real[1](signal.SIGTERM) is before[signal.SIGTERM]
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert before == {number: real[1](number) for number in before}


def closed_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def test_nobody_reads_what_is_printed(finetune, runs, tmp_path):
    for arguments in (["doctor"], ["recommend", "--model-size", "1", "--memory", "24"], ["--help"]):
        assert forked(lambda arguments=arguments: main(arguments), closed_pipe()) == (1, ""), arguments
    assert finetune(tmp_path / "out", stdout=closed_pipe()) == (0, "")
    assert_same_run(tmp_path / "out", runs[1])


# --- forks and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_dataloader_run_kernels(two_threads, context):
    step()  # the call starts two threads, which a fork does not inherit
    loader = torch.utils.data.DataLoader(Steps(), batch_size=None, num_workers=2 if context == "fork" else 1,
                                         timeout=600, multiprocessing_context=context)  # fmt: skip
    torch.testing.assert_close(list(loader), [step(i, quantized=True) for i in range(4)], rtol=0, atol=0)


def test_a_fork_runs_kernels_on_one_thread(two_threads):
    wanted = step()

    def work() -> int:
        return 0 if torch.equal(step(), wanted) else 1

    assert forked(work) == (0, "")


def losses(seed: int, steps: int = 6) -> list[float]:
    """Returns the losses of a training of the model with seed ``seed``, which draws its own random numbers."""
    adapted = models[seed]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    found = []
    for _ in range(steps):
        loss = (adapted(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


models: dict[int, nn.Module] = {}


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    if seed % 2:
        quantize_nf4(base, progress=False)
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=seed % 2 == 0)
    return accelerate(peft.get_peft_model(base, config))


def in_threads(*work: Callable[[], object]) -> list:
    """Runs the functions in threads that start at the same moment, and returns their results."""
    barrier = threading.Barrier(len(work))

    def run(call: Callable[[], object]) -> object:
        torch.set_num_threads(1)
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(work)) as pool:
        return list(pool.map(run, work, timeout=600))


def test_models_that_train_in_threads_have_the_losses_they_have_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        models.update({seed: model(seed) for seed in range(4)})
        alone = [losses(seed) for seed in range(4)]
        models.update({seed: model(seed) for seed in range(4)})
        assert in_threads(*(lambda seed=seed: losses(seed) for seed in range(4))) == alone
        assert all(found[-1] < found[0] for found in alone)
    finally:
        models.clear()
        torch.set_num_threads(before)


def test_threads_accelerate_and_explain_one_model():
    for _ in range(10):
        torch.manual_seed(1)
        base = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[str(i) for i in range(8)]))
        x = torch.randn(4, 64)
        wanted = adapted(x)
        work = (lambda m: accelerate(m), lambda m: accelerate(m), lambda m: len(explain(m).rows),
                lambda m: len(explain(m).rows), lambda m, x=x: m(x))  # fmt: skip
        found = in_threads(*(functools.partial(call, adapted) for call in work))
        assert found[:2] == [adapted, adapted] and found[2:4] == [8, 8]
        torch.testing.assert_close(found[4], wanted)
        assert all(row.fused for row in explain(adapted).rows)
        torch.testing.assert_close(adapted(x), wanted)
