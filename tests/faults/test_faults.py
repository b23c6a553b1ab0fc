"""Kills, full disks, no memory, signals, forks and threads: what was there stays, what failed is said, runs go on."""

import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

if not hasattr(os, "fork") or not sys.platform.startswith("linux"):
    pytest.skip("forks processes, mounts and limits them", allow_module_level=True)
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from faults import points  # noqa: E402
from faults.points import ended, forked, killed_at, start  # noqa: E402
from faults.steps import Steps, step  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_models import ARCHITECTURES  # noqa: E402

from peft_ext import accelerate, explain, ops, quantize_nf4  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.files import atomic_folder, not_whole, save_adapter, seal  # noqa: E402
from peft_ext.merge import merge_to_dense, writer  # noqa: E402
from peft_ext.nn import NF4Linear  # noqa: E402
from peft_ext.quantize import dequantize_nf4  # noqa: E402
from peft_ext.run import Options, RunError, checkpoints, errors, evaluate, train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Python's, that forking a process with threads may hang
WEIGHTS = "adapter_model.safetensors"
# "N:FIRST": every N-th of the moments of a run is tried, from FIRST on. "1:0" for all of them, which takes an hour.
EVERY, FIRST = map(int, os.environ.get("PEFT_EXT_TEST_KILLS", "149:63").split(":"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def hidden(folder: Path) -> list[str]:
    """What atomic writing has left, anywhere."""
    return sorted(str(p) for p in folder.rglob(".*") if p.suffix in (".part", ".old") or p.name == ".lock")


# --- finetune ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetune(tiny):
    """``finetune(output, *options)``: exit code and standard error of a run of 4 steps in a process of its own."""

    def run(output: Path, *options: str, before=None, stdout: int = -1):
        def work() -> int:
            evaluate.SAMPLES, evaluate.NEW_TOKENS = 0, 2
            if before is not None:
                before()
            return main(
                ["finetune", "--model", str(tiny / "model"), "--data", str(tiny / "pairs.jsonl"), "--output",
                 str(output), "--batch-size", "2", "--block-size", "32", "--threads", "1", "--rank", "4",
                 "--save-steps", "2", "--max-steps", "4", *options]
            )  # fmt: skip

        return forked(work, stdout) if stdout != -2 else start(work, -2)

    return run


@pytest.fixture(scope="module")
def runs(finetune, tmp_path_factory):
    """An earlier run, and the one that is not disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    assert finetune(folder / "old", "--rank", "2", "--seed", "1") == (0, "")
    assert finetune(folder / "unbroken") == (0, "")
    return folder / "old", folder / "unbroken"


def adapter(folder: Path):
    """The adapter's bytes, None where there is none; one that can't be read is an error."""
    if not ((folder / WEIGHTS).exists() and (folder / "adapter_config.json").exists()):
        return None
    json.loads((folder / "adapter_config.json").read_text())
    load_file(folder / WEIGHTS)
    return (folder / WEIGHTS).read_bytes()


def assert_readable(out: Path, *whole: Path) -> None:
    """Of the adapters of ``whole`` one is there, and what tells of a run is not half a file."""
    found = {bits for folder in (out, out / checkpoints.PREVIOUS) if (bits := adapter(folder)) is not None}
    assert found and found <= {adapter(folder) for folder in whole}
    if (out / "run.json").exists():
        assert json.loads((out / "run.json").read_text())["options"]
    if (out / "report.html").exists():
        assert (out / "report.html").read_text().endswith("</html>\n")


def assert_same_run(out: Path, unbroken: Path) -> None:
    found, wanted = (json.loads((folder / "run.json").read_text()) for folder in (out, unbroken))
    assert found["finished"] and found["losses"] == wanted["losses"] and len(found["losses"]) == 4
    assert found["perplexity"] == wanted["perplexity"] and adapter(out) == adapter(unbroken)
    assert not hidden(out.parent) and not (out / checkpoints.PREVIOUS).exists()


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
        if code == 2:  # before the first checkpoint was whole
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
    else:  # as many bytes, one of them another
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
        if name == "sealed.json" and how == "changed":  # which file's entry that was can't be told
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
    assert not_whole(tmp_path / "a") == "no sealed.json, it was not written to its end"
    seal(tmp_path / "a")
    assert not_whole(tmp_path / "a") is None
    (tmp_path / "a/b/c").write_text("texts")
    assert not_whole(tmp_path / "a") == "b/c has 5 bytes of 4"
    (tmp_path / "a/b/c").write_text("test")
    assert not_whole(tmp_path / "a") == "b/c is not what was written"
    for text in ("[]", "{", '{"b/c": 1}', "[" * 10**5):
        (tmp_path / "a/sealed.json").write_text(text)
        assert not_whole(tmp_path / "a") == "sealed.json can't be read"


# --- merge and save_adapter -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with ``base``, adapters ``one`` and ``two``, and the dense models ``from one`` and ``from two``."""
    folder = tmp_path_factory.mktemp("dense")
    model = ARCHITECTURES["Llama"].build()
    model.save_pretrained(folder / "base")
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                 init_lora_weights=False)  # fmt: skip
        adapted = peft.get_peft_model(type(model).from_pretrained(folder / "base"), config)
        adapted.save_pretrained(folder / name)
        merge_to_dense(folder / "base", folder / name, folder / f"from {name}", max_shard_size="100KB")
    return folder


def test_killed_at_any_moment_a_merge_leaves_the_old_model_or_the_new(dense, tmp_path):
    old, new = content(dense / "from one"), content(dense / "from two")
    assert old != new
    seen, out = [], tmp_path / "out"
    for at in range(0, 10**6, max(1, EVERY // 20)):
        shutil.copytree(dense / "from one", out)

        def killed(at: int = at) -> int:
            killed_at(at, tmp_path)
            merge_to_dense(dense / "base", dense / "two", out, max_shard_size="100KB", overwrite=True)
            return 0

        code, text = forked(killed)
        assert code in (0, -signal.SIGKILL), text
        found = content(out)
        assert found in (old, new), text
        seen.append(found == new)
        with atomic_folder(out, overwrite=True) as folder:  # the next writer of whatever kind clears up
            (folder / "a").write_text("")
        assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["a"]
        shutil.rmtree(out)
        if code == 0:
            break
    print(f"{len(seen) - 1} kills in {at} moments")
    assert at > 60 and seen == sorted(seen) and not seen[0] and seen[-1]


def test_killed_at_any_moment_an_adapter_is_the_old_or_the_new(dense, tmp_path):
    model = ARCHITECTURES["Llama"].model
    new = peft.PeftModel.from_pretrained(model.from_pretrained(dense / "base"), dense / "two")
    save_adapter(new, tmp_path / "new")
    wanted, old = content(tmp_path / "new"), content(dense / "one")
    seen = []
    for at in range(0, 10**6, max(1, EVERY // 48)):
        shutil.copytree(dense / "one", tmp_path / "out")
        (tmp_path / "out/mine").write_text("kept")

        def killed(at: int = at) -> int:
            killed_at(at, tmp_path)
            save_adapter(new, tmp_path / "out", overwrite=True)
            return 0

        code, text = forked(killed)
        assert code in (0, -signal.SIGKILL), text
        found = content(tmp_path / "out")
        assert found.pop("mine") == b"kept"
        assert {WEIGHTS, "adapter_config.json"} <= found.keys()
        assert all(found[name] == old[name] for name in old) or all(found[name] == wanted[name] for name in wanted)
        seen.append(found[WEIGHTS] == wanted[WEIGHTS])
        save_adapter(new, tmp_path / "out", overwrite=True)
        assert not hidden(tmp_path)
        shutil.rmtree(tmp_path / "out")
        if code == 0:
            break
    print(f"{len(seen) - 1} kills in {at} moments")
    assert at > 20 and seen == sorted(seen) and not seen[0] and seen[-1]


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """``small.path``, a file system of its own of 4 MiB; ``small.leave(n)`` fills it up to n bytes."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount a small file system: {done.stderr.strip()}")

    class Small:
        def __init__(self) -> None:
            self.path = path

        def leave(self, free: int) -> None:
            (path / "filler").unlink(missing_ok=True)
            usage = os.statvfs(path)
            (path / "filler").write_bytes(b"\1" * max(0, usage.f_bavail * usage.f_frsize - free))

    try:
        yield Small()
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def refused(code_and_text) -> str:
    """The one line of an error; a warning that a report could not be drawn may come before it."""
    code, text = code_and_text
    lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, text)
    return lines[0]


# Bytes that are free as the run begins: none, too few for a checkpoint, for the second one, for the adapter.
@pytest.mark.parametrize("free", [0, 65_536, 180_000, 420_000])
def test_a_run_on_a_full_disk_says_so_and_keeps_what_was_there(finetune, runs, small, free):
    out = small.path / "out"
    out.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copy(runs[0] / name, out / name)
    small.leave(free)
    code, text = finetune(out, "--overwrite")
    if code == 0:
        assert free > 300_000 and adapter(out) == adapter(runs[1])
        return
    line = refused((code, text))
    assert "No space left on device" in line or "is the disk full?" in line, line
    assert_readable(out, runs[0])
    assert not hidden(small.path)
    left = [path.name for path in checkpoints.saved_checkpoints(Options(output=out))]
    assert all(not_whole(out / "checkpoints" / name) is None for name in left)
    small.leave(3_000_000)
    code, text = finetune(out, "--resume" if left else "--overwrite")
    assert code == 0, text
    assert ("--resume goes on from" in line) == bool(left)
    assert_same_run(out, runs[1])


def limited(nbytes: int):
    """No file of this process larger than that: a full disk for who may not mount one."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return limit


@pytest.mark.parametrize("nbytes", [500, 20_000])
def test_a_run_whose_files_get_too_large_says_so(finetune, runs, tmp_path, nbytes):
    shutil.copytree(runs[0], tmp_path / "out")
    line = refused(finetune(tmp_path / "out", "--overwrite", before=limited(nbytes)))
    assert "File too large" in line or "is the disk full?" in line, line
    assert_readable(tmp_path / "out", runs[0])
    assert not hidden(tmp_path)


@pytest.mark.parametrize("free", [0, 40_000, 100_000, 250_000])
def test_a_merge_on_a_full_disk_keeps_the_old_model(dense, small, monkeypatch, capsys, free):
    shutil.copytree(dense / "from one", small.path / "out")
    before = content(small.path)
    small.leave(free)
    if free > 40_000:  # the disk fills up while it is written to
        usage = shutil.disk_usage(small.path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    arguments = ["--model", str(dense / "base"), "--adapter", str(dense / "two"), "--output", str(small.path / "out")]
    assert main(["merge", *arguments, "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {small.path}") and "No space left on device" in said and said.count("\n") == 1
    (small.path / "filler").unlink()
    assert content(small.path) == before and not hidden(small.path)


@pytest.mark.parametrize("free", [0, 4_096, 12_288])
def test_an_adapter_on_a_full_disk_stays_the_old_one(dense, small, free):
    from safetensors import SafetensorError

    model = ARCHITECTURES["Llama"].model
    new = peft.PeftModel.from_pretrained(model.from_pretrained(dense / "base"), dense / "two")
    shutil.copytree(dense / "one", small.path / "out")
    before = content(small.path)
    small.leave(free)
    with pytest.raises((OSError, SafetensorError), match="No space left on device"):
        save_adapter(new, small.path / "out", overwrite=True)
    (small.path / "filler").unlink()
    assert content(small.path) == before and not hidden(small.path)


# --- outputs that can't be written, and links -------------------------------------------------------------------------


def test_a_read_only_file_system(finetune, dense, runs, small, capsys):
    shutil.copytree(dense / "from one", small.path / "dense")
    subprocess.run(["mount", "-o", "remount,ro", small.path], check=True)
    arguments = ["--model", str(dense / "base"), "--adapter", str(dense / "two"), "--output", str(small.path / "dense")]
    assert main(["merge", *arguments, "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Read-only file system" in said and said.count("\n") == 1
    assert content(small.path / "dense") == content(dense / "from one")
    line = refused(finetune(small.path / "out"))
    assert "can't be written to" in line or "Read-only file system" in line, line


def test_a_folder_of_another_user(finetune, tiny, dense, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to give up its rights")

    def nobody() -> None:
        os.setuid(65534)

    # pytest's own folders are root's alone, which is a case of its own: what the run reads is out of reach.
    assert refused(finetune(tmp_path / "out", before=nobody)).endswith(": Permission denied")
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name)
        closed.chmod(0o755)
        for source, copy in ((tiny / "model", "model"), (dense / "base", "base"), (dense / "two", "two"),
                             (dense / "from one", "out")):  # fmt: skip
            shutil.copytree(source, closed / copy)
        shutil.copy(tiny / "pairs.jsonl", closed)
        for path in closed.rglob("*"):
            path.chmod(0o755)
        before = content(closed)
        readable = ("--model", str(closed / "model"), "--data", str(closed / "pairs.jsonl"))
        line = refused(finetune(closed / "new", *readable, before=nobody))
        assert line == f"error: --output {closed}/new: {closed} can't be written to"
        arguments = ["--model", str(closed / "base"), "--adapter", str(closed / "two"), "--output", str(closed / "out")]

        def merged() -> int:
            nobody()
            return main(["merge", *arguments, "--overwrite"])

        line = refused(forked(merged))
        assert line.startswith(f"error: {closed}/.out.") and line.endswith(": Permission denied")
        assert content(closed) == before and not hidden(closed)


def test_outputs_that_are_files_and_links(finetune, runs, dense, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert refused(finetune(tmp_path / "file")) == f"error: --output {tmp_path}/file: {tmp_path}/file is a file"
    (tmp_path / "dangling").symlink_to("made")
    assert finetune(tmp_path / "dangling") == (0, "")
    assert (tmp_path / "dangling").is_symlink() and adapter(tmp_path / "made") == adapter(runs[1])
    (tmp_path / "link").symlink_to("made")
    assert finetune(tmp_path / "link", "--overwrite", "--rank", "2", "--seed", "1") == (0, "")
    assert (tmp_path / "link").is_symlink() and adapter(tmp_path / "made") == adapter(runs[0])
    (tmp_path / "loop").symlink_to("loop")
    arguments = ["--model", str(dense / "base"), "--adapter", str(dense / "two")]
    for name, code in (("file", errno.ENOTDIR), ("loop", errno.ELOOP)):
        assert main(["merge", *arguments, "--output", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == f"error: {tmp_path}/{name}: {os.strerror(code)}\n"
    assert os.strerror(errno.ELOOP) in refused(finetune(tmp_path / "loop"))
    (tmp_path / "hanging").symlink_to("dense")
    assert main(["merge", *arguments, "--output", str(tmp_path / "hanging"), "--max-shard-size", "100KB"]) == 0
    assert (tmp_path / "hanging").is_symlink() and content(tmp_path / "dense") == content(dense / "from two")
    assert (tmp_path / "file").read_text() == "mine" and not hidden(tmp_path)


# --- two writers ------------------------------------------------------------------------------------------------------


def test_a_lock_on_a_file_that_its_holder_has_removed_is_none(tmp_path, monkeypatch):
    """The other process ends, and removes its lock file, between this one's opening of it and its lock."""
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
            assert lock.exists()  # made anew, and locked
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
            with atomic_folder(out, overwrite=True, keep=True) as folder:  # as the adapter is saved; the lock stays
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
    """The second to end finds a model that was not there when it began."""
    out, write = tmp_path / "out", writer.write_safetensors
    outcome = []

    def slow(stream, planned, take, advance):
        if not outcome:
            outcome.append(merge_to_dense(dense / "base", dense / "one", out, max_shard_size="100KB"))
        write(stream, planned, take, advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_safetensors", _once(slow, write))
        with pytest.raises(FileExistsError, match="another process has written it meanwhile") as caught:
            merge_to_dense(dense / "base", dense / "two", out, max_shard_size="100KB")
    assert caught.value.filename == str(out)
    assert content(out) == content(dense / "from one") and not hidden(tmp_path)


def _once(first, then):
    """``first`` on the first call, ``then`` on the others, those within the first one too."""
    calls = []

    def call(*args):
        calls.append(1)
        return (first if len(calls) == 1 else then)(*args)

    return call


# --- no memory --------------------------------------------------------------------------------------------------------


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


HELD: list[torch.Tensor] = []  # memory that the allocator had free


def limit_memory(room: int) -> None:
    """From now on this process gets ``room`` MiB of memory, in blocks of up to 1 MiB, and no more."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + (room << 20), resource.RLIM_INFINITY))
    for size in (256, 64, 16, 4, 1):
        with contextlib.suppress(RuntimeError):
            while True:
                HELD.append(torch.empty(size << 20, dtype=torch.uint8))
    del HELD[-room:]


def unlimit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    HELD.clear()


def test_a_weight_that_has_no_room_is_named_and_quantizing_goes_on_later():
    def work() -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1024), nn.Linear(1024, 49152, bias=False),
                              nn.Linear(64, 64)).to(torch.bfloat16)  # fmt: skip
        weights = [layer.weight.detach().clone() for layer in model]
        limit_memory(4)
        try:
            quantize_nf4(model, progress=False)
        except (RuntimeError, MemoryError) as error:
            said = str(error)
        unlimit_memory()
        assert said.startswith("quantize_nf4: 2: "), said
        assert "(2 of 4 weights are replaced, this one and the others are as they were; called again" in said
        assert [type(layer) for layer in model] == [NF4Linear, NF4Linear, nn.Linear, nn.Linear]
        assert all(torch.equal(model[i].weight, weights[i]) for i in (2, 3))
        assert model[:3](torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all()
        quantize_nf4(model, progress=False)
        for layer, weight in zip(model, weights, strict=True):
            assert torch.equal(layer.nf4.packed, ops.nf4_quantize(weight, 64, True).packed)

        limit_memory(4)
        try:
            dequantize_nf4(model, progress=False)
        except (RuntimeError, MemoryError) as error:
            said = str(error)
        unlimit_memory()
        assert said.startswith("dequantize_nf4: 2: ") and "(2 of 4 weights are replaced" in said, said
        assert [type(layer) for layer in model] == [nn.Linear, nn.Linear, NF4Linear, NF4Linear]
        dequantize_nf4(model, progress=False)
        assert all(type(layer) is nn.Linear for layer in model)
        return 0

    assert forked(work) == (0, "")


@pytest.mark.parametrize("fails", [0, 1])
def test_layers_that_share_a_weight_are_quantized_together_or_not_at_all(monkeypatch, fails):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[1].weight
    name = ("from_linear", "from_nf4")[fails]
    make, calls = getattr(NF4Linear, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2, 3)[fails]:  # the second call for its weight, or the third: from_linear makes one too
            raise MemoryError
        return make(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NF4Linear, name, failing)
        with pytest.raises(MemoryError, match=r"quantize_nf4: 1: MemoryError \(1 of 2 weights are replaced"):
            quantize_nf4(model, progress=False)
    assert [type(layer) for layer in model] == [NF4Linear, nn.Linear, nn.Linear]
    quantize_nf4(model, progress=False)
    assert model[1].weight.data_ptr() == model[2].weight.data_ptr()


def test_a_merge_without_memory_keeps_the_old_model(dense, tmp_path):
    config = ARCHITECTURES["Llama"].model.config_class(**{**ARCHITECTURES["Llama"].config.to_dict(),
                                                          "vocab_size": 1 << 17})  # fmt: skip
    torch.manual_seed(0)
    ARCHITECTURES["Llama"].model(config).save_pretrained(tmp_path / "base")
    shutil.copytree(dense / "from one", tmp_path / "out")
    before = content(tmp_path / "out")

    def work() -> int:
        write = writer.write_safetensors

        def limited(*args):
            limit_memory(4)
            write(*args)

        writer.write_safetensors = limited
        return main(["merge", "--model", str(tmp_path / "base"), "--adapter", str(dense / "two"), "--dtype", "bf16",
                     "--output", str(tmp_path / "out"), "--overwrite"])  # fmt: skip

    assert refused(forked(work)).startswith("error: out of memory: ")
    assert content(tmp_path / "out") == before and not hidden(tmp_path)


def test_a_run_without_memory_says_what_takes_less(finetune, runs, tmp_path):
    def before() -> None:
        fit = train.fit

        def limited(run, record, model):
            from peft_ext.integrations.transformers import AdaLoraCallback

            AdaLoraCallback  # noqa: B018  imported while there is memory for it
            run.options.__dict__["batch_size"] = 1 << 16
            run.examples.train[:] = run.examples.train * 4000
            limit_memory(256)  # enough for the batch, and not for its activations
            try:
                return fit(run, record, model)
            finally:
                unlimit_memory()

        train.fit = limited

    shutil.copytree(runs[0], tmp_path / "out")
    line = refused(finetune(tmp_path / "out", "--overwrite", before=before))
    assert line.startswith("error: out of memory: a smaller --batch-size or --block-size, or --gradient-checkpointing")
    assert_readable(tmp_path / "out", runs[0])


# --- signals and pipes ------------------------------------------------------------------------------------------------


def signalled(finetune, out: Path, *numbers: int, before=None) -> tuple[int, str]:
    """A long run that gets signals while it trains, the next one after something is said of the one before."""
    child, stream = finetune(out, "--max-steps", "100000", "--save-steps", "0", stdout=-2, before=before)
    text = ""
    with stream:
        pending = list(numbers)
        for line in stream:
            text += line
            if pending and (line.startswith("step ") or "stopping after" in line):
                os.kill(child, pending.pop(0))
    return ended(child), text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_a_run_saves_a_checkpoint(finetune, tmp_path, name):
    number = getattr(signal, name)
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  what runs the tests may ignore it, as nohup does
    code, text = signalled(finetune, tmp_path / "out", number, before=heard)
    assert code == 128 + number, text
    assert "stopping after this step, with a checkpoint; a second signal stops at once" in text
    assert "with --resume goes on" in text and "Traceback" not in text
    (checkpoint,) = (tmp_path / "out/checkpoints").iterdir()
    assert not_whole(checkpoint) is None and not hidden(tmp_path)


def test_a_second_signal_ends_a_run_at_once(finetune, tmp_path):
    def slow() -> None:
        import transformers

        step, done = transformers.Trainer.training_step, []

        def slow_after_the_first(*args, **kwargs):
            if done:  # until the second signal comes, however long that takes to send
                time.sleep(points.SECONDS)
            done.append(1)
            return step(*args, **kwargs)

        transformers.Trainer.training_step = slow_after_the_first

    code, text = signalled(finetune, tmp_path / "out", signal.SIGINT, signal.SIGINT, before=slow)
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
    def before() -> None:
        import transformers

        step, done = transformers.Trainer.training_step, []

        def signalled(*args, **kwargs):
            done.append(1)
            if len(done) in (3, 4):
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(*args, **kwargs)

        transformers.Trainer.training_step = signalled
        os.kill(os.getpid(), signal.SIGHUP)  # ignored, as under nohup

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
    """As in a program that embeds Python: signal.signal returns None then, and can't put that back."""
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
    step()  # with two threads, which a fork does not have
    loader = torch.utils.data.DataLoader(Steps(), batch_size=None, num_workers=2 if context == "fork" else 1,
                                         timeout=600, multiprocessing_context=context)  # fmt: skip
    torch.testing.assert_close(list(loader), [step(i, quantized=True) for i in range(4)], rtol=0, atol=0)


def test_a_fork_runs_kernels_on_one_thread(two_threads):
    wanted = step()

    def work() -> int:
        return 0 if torch.equal(step(), wanted) else 1

    assert forked(work) == (0, "")


def losses(seed: int, steps: int = 6) -> list[float]:
    """Of a model of its own, with random numbers of its own."""
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


def in_threads(*work) -> list:
    found, errors = [None] * len(work), []
    barrier = threading.Barrier(len(work))

    def run(index: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        try:
            found[index] = work[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    assert not errors, errors
    return found


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
