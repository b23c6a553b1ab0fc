"""Tests kills at many moments, damaged checkpoints, and two writers.

Old content must stay, and a run must resume from a whole checkpoint.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.points import forked, killed_at
from faults.runs import (
    WEIGHTS,
    assert_readable,
    assert_same_run,
    content,
    hidden,
    refused,
    second_adapter,
)

from peft_ext.files import atomic_folder, not_whole, save_adapter, seal
from peft_ext.merge import merge_to_dense, writer
from peft_ext.run import Options, RunError, checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # Python warns that forking a process with threads may hang.
# The value "N:FIRST" kills a run at every N-th moment, from FIRST on. "1:0" kills at every moment and takes an hour.
EVERY, FIRST = map(int, os.environ.get("PEFT_EXT_TEST_KILLS", "149:63").split(":"))


# --- runs -------------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_a_run_goes_on_and_loses_nothing(finetune, runs, tmp_path):
    old, unbroken = runs
    tried = []
    for at in range(FIRST, 10**6, EVERY):
        out = tmp_path / f"at{at}"
        shutil.copytree(old, out)
        code, text = finetune(out, "--overwrite", before=lambda at=at: killed_at(at, tmp_path))
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        assert_readable(out, old, unbroken)
        code, text = finetune(out, "--resume")
        assert "Traceback" not in text
        tried.append(code)
        if code == 2:  # the run was killed before the first checkpoint was whole
            assert "error: --resume: " in text
            assert_readable(out, old)
            code, text = finetune(out, "--overwrite")
        assert code == 0, text
        assert_same_run(out, unbroken)
        shutil.rmtree(out)
    print(f"{len(tried)} kills, {tried.count(0)} of them resumed, in {at} moments")
    assert at > 300 and {0, 2} == set(tried)


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:  # flips a bit of the file
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_a_damaged_checkpoint_is_not_resumed_from(runs, tmp_path, caplog, how):
    names = sorted(path.name for path in (runs[1] / "checkpoints/checkpoint-4").iterdir())
    assert {WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sealed.json"} <= {*names}
    options = Options(**{**json.loads((runs[1] / "run.json").read_text())["options"], "resume": True})
    for name in names:
        out = tmp_path / name
        shutil.copytree(runs[1], out)
        options.__dict__["output"] = out
        last, before = out / "checkpoints/checkpoint-4", out / "checkpoints/checkpoint-2"
        assert checkpoints.check_output(options) == last and not caplog.messages
        damaged(last / name, how)
        if name == "sealed.json" and how == "changed":  # the changed entry may be that of any file
            continue
        assert checkpoints.check_output(options) == before
        (said,) = caplog.messages
        caplog.clear()
        assert said.startswith("--resume: not from checkpoint-4 (") and name in said
        assert "\n" not in said and said.endswith("; from checkpoint-2")
        damaged(before / name, how)
        with pytest.raises(RunError, match="no checkpoint in .* is whole: checkpoint-4 .*; checkpoint-2 "):
            checkpoints.check_output(options)


def test_a_run_resumes_past_a_damaged_checkpoint(finetune, runs, tmp_path):
    shutil.copytree(runs[1], tmp_path / "out")
    damaged(tmp_path / "out/checkpoints/checkpoint-4/optimizer.pt", "cut")
    code, text = finetune(tmp_path / "out", "--resume")
    assert code == 0 and "optimizer.pt has " in text
    assert_same_run(tmp_path / "out", runs[1])
    assert not_whole(tmp_path / "out/checkpoints/checkpoint-4") is None


def test_a_folder_is_whole_as_long_as_it_is_what_was_sealed(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_text("text")
    assert not_whole(tmp_path / "a") == "no sealed.json: the folder was not written to its end"
    seal(tmp_path / "a")
    assert not_whole(tmp_path / "a") is None
    (tmp_path / "a/b/c").write_text("texts")
    assert not_whole(tmp_path / "a") == "b/c has 5 bytes of 4"
    (tmp_path / "a/b/c").write_text("test")
    assert not_whole(tmp_path / "a") == "b/c has other content than was written"
    for text in ("[]", "{", '{"b/c": 1}', "[" * 10**5):
        (tmp_path / "a/sealed.json").write_text(text)
        assert not_whole(tmp_path / "a") == "sealed.json can't be read"


# --- merge and save_adapter -------------------------------------------------------------------------------------------


def kills(every: int, folder: Path, prepare: Callable[[], None], work: Callable[[], None]) -> Iterator[str]:
    """Yields the output of forks of ``work``, killed at moment 0, ``every``, 2 ``every`` ..., until one completes."""
    for at in range(0, 10**6, every):
        prepare()

        def killed(at: int = at) -> int:
            killed_at(at, folder)
            work()
            return 0

        code, text = forked(killed)
        assert code in (0, -signal.SIGKILL), text
        yield text
        if code == 0:
            return


def test_killed_at_any_moment_a_merge_leaves_the_old_model_or_the_new(dense, tmp_path):
    old, new = content(dense / "from one"), content(dense / "from two")
    assert old != new
    seen, out, every = [], tmp_path / "out", max(1, EVERY // 20)

    def merge() -> None:
        merge_to_dense(dense / "base", dense / "two", out, max_shard_size="100KB", overwrite=True)

    for text in kills(every, tmp_path, lambda: shutil.copytree(dense / "from one", out), merge):
        found = content(out)
        assert found in (old, new), text
        seen.append(found == new)
        with atomic_folder(out, overwrite=True) as folder:  # a later write of this folder removes leftovers
            (folder / "a").write_text("")
        assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["a"]
        shutil.rmtree(out)
    print(f"{len(seen) - 1} kills in {every * (len(seen) - 1)} moments")
    assert every * (len(seen) - 1) > 60 and seen == sorted(seen) and not seen[0] and seen[-1]


def test_killed_at_any_moment_an_adapter_is_the_old_or_the_new(dense, tmp_path):
    new, out = second_adapter(dense), tmp_path / "out"
    save_adapter(new, tmp_path / "new")
    wanted, old = content(tmp_path / "new"), content(dense / "one")
    seen, every = [], max(1, EVERY // 48)

    def prepare() -> None:
        shutil.copytree(dense / "one", out)
        (out / "mine").write_text("kept")

    for _ in kills(every, tmp_path, prepare, lambda: save_adapter(new, out, overwrite=True)):
        found = content(out)
        assert found.pop("mine") == b"kept"
        assert {WEIGHTS, "adapter_config.json"} <= found.keys()
        assert all(found[name] == old[name] for name in old) or all(found[name] == wanted[name] for name in wanted)
        seen.append(found[WEIGHTS] == wanted[WEIGHTS])
        save_adapter(new, out, overwrite=True)
        assert not hidden(tmp_path)
        shutil.rmtree(out)
    print(f"{len(seen) - 1} kills in {every * (len(seen) - 1)} moments")
    assert every * (len(seen) - 1) > 20 and seen == sorted(seen) and not seen[0] and seen[-1]


# --- two writers ------------------------------------------------------------------------------------------------------


def test_a_lock_on_a_file_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    """Another process removes the lock file after this process opened the file and before this process locks it."""
    fcntl = pytest.importorskip("fcntl")
    real, lock = fcntl.flock, tmp_path / ".lock"
    calls = []

    def flock(file, operation):
        if operation & fcntl.LOCK_EX and not calls:
            calls.append(operation)
            lock.unlink()
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    try:
        with checkpoints.sole_writer(tmp_path):
            assert lock.exists()  # a new file was locked
    except RunError as error:
        assert "another process is writing to it" in str(error)
    assert calls


def test_a_second_run_into_the_same_folder_is_refused(finetune, runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs[0], out)
    before = content(out)
    with checkpoints.sole_writer(out):
        for _ in range(2):
            line = refused(finetune(out, "--overwrite"))
            assert line == f"error: --output {out}: another process is writing to it"
            # The function save_adapter also writes with keep=True, which keeps the lock file.
            with atomic_folder(out, overwrite=True, keep=True) as folder:
                (folder / "new").write_text("")
            before["new"] = b""
        assert {name: data for name, data in content(out).items() if name != ".lock"} == before
    assert not hidden(tmp_path)

    def held() -> int:
        with checkpoints.sole_writer(out):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert forked(held)[0] == -signal.SIGKILL and (out / ".lock").exists()
    assert finetune(out, "--overwrite") == (0, "")
    assert_same_run(out, runs[1])


def test_of_two_merges_into_one_folder_each_is_whole_or_refused(dense, tmp_path):
    """The merge that ends second finds a model that did not exist when the second merge began."""
    out, write = tmp_path / "out", writer.write_safetensors
    outcome = []

    def slow(stream, planned, take, advance):
        if not outcome:
            outcome.append(merge_to_dense(dense / "base", dense / "one", out, max_shard_size="100KB"))
        write(stream, planned, take, advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_safetensors", _once(slow, write))
        with pytest.raises(FileExistsError, match="another process has written this folder meanwhile") as caught:
            merge_to_dense(dense / "base", dense / "two", out, max_shard_size="100KB")
    assert caught.value.filename == str(out)
    assert content(out) == content(dense / "from one") and not hidden(tmp_path)


def _once(first, then):
    """Returns a function that calls ``first`` on its first call and ``then`` on every other call."""
    calls = []

    def call(*args):
        calls.append(1)
        return (first if len(calls) == 1 else then)(*args)

    return call
