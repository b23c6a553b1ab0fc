"""Tests full disks, outputs that can't be written, and full memory: a one-line error, and old content stays."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.points import forked
from faults.runs import (
    WEIGHTS,
    adapter,
    assert_readable,
    assert_same_run,
    content,
    hidden,
    merge_command,
    refused,
    second_adapter,
)
from tiny_models import ARCHITECTURES
from torch import nn

from peft_ext import ops, quantize_nf4
from peft_ext.cli.main import main
from peft_ext.files import not_whole, save_adapter
from peft_ext.merge import writer
from peft_ext.nn import NF4Linear
from peft_ext.quantize import dequantize_nf4
from peft_ext.run import Options, checkpoints, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # Python warns that forking a process with threads may hang

# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Yields ``small``: ``small.path`` is a file system of 4 MiB, and ``small.leave(n)`` fills the file system
    until n bytes are free.
    """
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


# Free bytes at the start of the run: none, or too few for the first checkpoint, the second checkpoint, or the adapter.
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
    assert ("--resume continues from" in line) == bool(left)
    assert_same_run(out, runs[1])


def limited(nbytes: int):
    """Returns a function that limits the size of this process's files, like a full disk, without root's rights."""

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
    if free > 40_000:  # the disk fills up during the run
        usage = shutil.disk_usage(small.path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    assert main(merge_command(dense, small.path / "out", "--overwrite")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {small.path}") and "No space left on device" in said and said.count("\n") == 1
    (small.path / "filler").unlink()
    assert content(small.path) == before and not hidden(small.path)


@pytest.mark.parametrize("free", [0, 4_096, 12_288])
def test_an_adapter_on_a_full_disk_stays_the_old_one(dense, small, free):
    from safetensors import SafetensorError

    new = second_adapter(dense)
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
    assert main(merge_command(dense, small.path / "dense", "--overwrite")) == 2
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

    # Another user can't read pytest's folders, so that the run can't read the model and the data.
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
        assert line == f"error: --output {closed}/new: {closed} can't be written to: Permission denied"

        def merged() -> int:
            nobody()
            return main(merge_command(closed, closed / "out", "--overwrite"))

        line = refused(forked(merged))
        assert line.startswith(f"error: {closed}/out/.out.") and line.endswith(": Permission denied")
        assert content(closed) == before and not hidden(closed)
        # The merge writes into the folder "out", which can be written, although no folder can be made beside "out".
        for path in (closed / "out", *(closed / "out").rglob("*")):
            os.chown(path, 65534, -1)
        assert forked(merged) == (0, "")
        found, old = content(closed / "out"), content(dense / "from one")
        assert "model.safetensors" in found and not found.keys() & {name for name in old if "-of-" in name}
        assert not hidden(closed)


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
    for name, code in (("file", errno.ENOTDIR), ("loop", errno.ELOOP)):
        assert main(merge_command(dense, tmp_path / name)) == 2
        assert capsys.readouterr().err == f"error: {tmp_path}/{name}: {os.strerror(code)}\n"
    assert os.strerror(errno.ELOOP) in refused(finetune(tmp_path / "loop"))
    (tmp_path / "hanging").symlink_to("dense")
    assert main(merge_command(dense, tmp_path / "hanging", "--max-shard-size", "100KB")) == 0
    assert (tmp_path / "hanging").is_symlink() and content(tmp_path / "dense") == content(dense / "from two")
    assert (tmp_path / "file").read_text() == "mine" and not hidden(tmp_path)


@pytest.mark.parametrize("kind", ["bind", "overlay"])
def test_an_output_that_can_be_written_but_not_replaced_gets_the_adapter(finetune, runs, tmp_path, kind):
    """Tests a mount of the same file system, which no comparison of device numbers shows, and a lower layer."""
    out = tmp_path / "seen/out"
    below = {name: tmp_path / name for name in ("lower", "upper", "work")}
    for folder in (out, *below.values(), below["lower"] / "out"):
        folder.mkdir(parents=True)
    (below["lower"] / ("out/mine" if kind == "overlay" else "mine")).write_text("kept")
    layers = "lowerdir={lower},upperdir={upper},workdir={work}".format(**below)
    mount = {"bind": ["--bind", below["lower"], out], "overlay": ["-t", "overlay", "-o", layers, "overlay", out.parent]}
    done = subprocess.run(["mount", *mount[kind]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"can't mount: {done.stderr.strip()}")
    try:
        assert finetune(out, "--overwrite") == (0, "")
        assert_same_run(out, runs[1])
        assert finetune(out, "--overwrite", "--rank", "2", "--seed", "1") == (0, "")
        assert adapter(out) == adapter(runs[0]) and (out / "mine").read_text() == "kept" and not hidden(out.parent)
    finally:
        subprocess.run(["umount", "-l", mount[kind][-1]], check=True)


# --- no memory --------------------------------------------------------------------------------------------------------


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


HELD: list[torch.Tensor] = []  # tensors that take the free memory of the allocator


def limit_memory(room: int) -> None:
    """Lets this process allocate only about ``room`` more MiB of memory, in blocks of up to 1 MiB."""
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + (room << 20), resource.RLIM_INFINITY))
    for size in (256, 64, 16, 4, 1):
        with contextlib.suppress(RuntimeError):
            while True:
                HELD.append(torch.empty(size << 20, dtype=torch.uint8))
    del HELD[-room:]


def unlimit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    HELD.clear()


def said_without_memory(function: Callable, model: nn.Module) -> str:
    """Returns the error of ``function`` on the model with 4 MiB of free memory."""
    limit_memory(4)
    try:
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            function(model, progress=False)
    finally:
        unlimit_memory()
    return str(caught.value)


def test_a_weight_that_has_no_room_is_named_and_quantizing_goes_on_later():
    def work() -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1024), nn.Linear(1024, 49152, bias=False),
                              nn.Linear(64, 64)).to(torch.bfloat16)  # fmt: skip
        weights = [layer.weight.detach().clone() for layer in model]
        said = said_without_memory(quantize_nf4, model)
        assert said.startswith("quantize_nf4: 2: "), said
        assert "(2 of 4 weights are replaced, this weight and the others are unchanged; another call" in said
        assert [type(layer) for layer in model] == [NF4Linear, NF4Linear, nn.Linear, nn.Linear]
        assert all(torch.equal(model[i].weight, weights[i]) for i in (2, 3))
        assert model[:3](torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all()
        quantize_nf4(model, progress=False)
        for layer, weight in zip(model, weights, strict=True):
            assert torch.equal(layer.nf4.packed, ops.nf4_quantize(weight, 64, True).packed)

        said = said_without_memory(dequantize_nf4, model)
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
    make, calls = NF4Linear.from_nf4, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2, 3)[fails]:  # true in the call for the second weight
            raise MemoryError
        return make(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NF4Linear, "from_nf4", failing)
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
        return main(merge_command(dense, tmp_path / "out", "--dtype", "bf16", "--overwrite", base=tmp_path / "base"))

    assert refused(forked(work)).startswith("error: out of memory: ")
    assert content(tmp_path / "out") == before and not hidden(tmp_path)


def test_a_run_without_memory_says_what_takes_less(finetune, runs, tmp_path):
    def before() -> None:
        fit = train.fit

        def limited(run, record, model):
            from peft_ext.integrations.trainer import AdaLoraCallback

            AdaLoraCallback  # noqa: B018  imported before the memory is limited
            run.options.__dict__["batch_size"] = 1 << 16
            run.examples.train[:] = run.examples.train * 4000
            limit_memory(256)  # enough for the batch, but not for its activations
            try:
                return fit(run, record, model)
            finally:
                unlimit_memory()

        train.fit = limited

    shutil.copytree(runs[0], tmp_path / "out")
    line = refused(finetune(tmp_path / "out", "--overwrite", before=before))
    assert line.startswith("error: out of memory: a smaller --batch-size or --block-size, or --gradient-checkpointing")
    assert_readable(tmp_path / "out", runs[0])


def test_an_operator_without_memory_says_it_as_pytorch_does():
    """An operator that gets no memory raises an error after which auto_find_batch_size retries with a smaller batch."""
    accelerate_memory = pytest.importorskip("accelerate.utils.memory")

    def work() -> int:
        x, weight = torch.zeros(4096, 64), torch.zeros(4096, 64)
        lora_A, lora_B = torch.zeros(8, 64), torch.zeros(4096, 8)
        limit_memory(16)  # the result takes 64 MiB
        try:
            with pytest.raises(RuntimeError) as caught:
                ops.lora_linear(x, weight, lora_A, lora_B)
        finally:
            unlimit_memory()
        assert "can't allocate memory: peft_ext wanted 67108864 bytes" in str(caught.value), caught.value
        assert accelerate_memory.should_reduce_batch_size(caught.value)
        return 0

    assert forked(work) == (0, "")
