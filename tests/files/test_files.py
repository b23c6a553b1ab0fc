"""Tests atomic files and folders: errors, kills at every step, and saved adapters."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.points import folder_of_nobody, without_rights

from peft_ext import files
from peft_ext.files import atomic_file, atomic_folder, save_adapter

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft_ext[hf]")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def content(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in names(folder) if (folder / name).is_file()}


def write(path: Path, generation: int, **options) -> None:
    with atomic_folder(path, **options) as folder:
        for name in ("a", "b", "sub/c"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{generation}\n" * 500)


# --- one file ---------------------------------------------------------------------------------------------------------


def test_a_file_appears_as_the_block_ends(tmp_path):
    path = tmp_path / "run.json"
    with atomic_file(path) as file:
        file.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    path.chmod(0o640)
    with atomic_file(path, "wb") as file:
        file.write(b"new")
        assert path.read_bytes() == "é".encode()
    assert path.read_bytes() == b"new" and names(tmp_path) == ["run.json"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_stays_as_it_was_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="mine"), atomic_file(path) as file:
        file.write("half")
        raise RuntimeError("mine")
    assert content(tmp_path) == {"run.json": "old"}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_file(path) as file:
        file.write("half")
    assert content(tmp_path) == {"run.json": "old"}


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_file(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_file_refuses_other_modes(tmp_path):
    with (
        pytest.raises(ValueError, match="atomic_file: mode is 'a', wanted 'w' or 'wb'"),
        atomic_file(tmp_path / "a", "a"),
    ):
        pass


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_is_not_replaced_unasked(tmp_path, monkeypatch, links):
    def link(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", link)
    path = tmp_path / "run.json"
    with atomic_file(path, overwrite=False) as file:
        file.write("mine")
        assert not path.exists()
    assert content(tmp_path) == {"run.json": "mine"}
    with pytest.raises(FileExistsError), atomic_file(path, overwrite=False):
        pytest.fail("the block must not begin")
    path.unlink()
    with pytest.raises(FileExistsError, match="run.json"), atomic_file(path, overwrite=False) as file:
        file.write("mine")
        path.write_text("theirs")  # another process writes the file first
    assert content(tmp_path) == {"run.json": "theirs"}


def test_a_name_that_was_reserved_without_links_is_free_again_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refused)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError), atomic_file(tmp_path / "run.json", overwrite=False) as file:
        file.write("mine")
    assert content(tmp_path) == {}


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def test_a_folder_is_replaced_whole(tmp_path, renaming):
    path = tmp_path / "deep/model"
    write(path, 1)
    (path / "mine").write_text("old")
    write(path, 2, overwrite=True)
    assert names(path) == ["a", "b", "sub", "sub/c"] and (path / "sub/c").read_text().startswith("2\n")
    assert names(path.parent)[0] == "model" and len(names(path.parent)) == 5  # no leftovers beside the folder


def test_what_the_new_folder_has_not_is_kept_where_asked(tmp_path, renaming):
    path = tmp_path / "model"
    write(path, 1)
    for name in ("mine", "sub/mine", "other/mine"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("kept")
    (path / "link").symlink_to("mine")
    inode = (path / "mine").stat().st_ino
    write(path, 2, overwrite=True, keep=True)
    found = content(path)
    assert {name for name, text in found.items() if text == "kept"} == {"mine", "link", "sub/mine", "other/mine"}
    assert (path / "link").is_symlink() and (path / "mine").stat().st_ino == inode  # the kept file is not a copy
    assert all(found[name].startswith("2\n") for name in ("a", "b", "sub/c"))


def test_files_that_another_process_writes_meanwhile_are_kept_where_asked(tmp_path, renaming, monkeypatch):
    path, sync = tmp_path / "model", files._sync_tree
    write(path, 1)

    def slow(folder):
        sync(folder)
        (path / "sub/late").write_text("late")  # after the files of the old folder were carried over

    monkeypatch.setattr(files, "_sync_tree", slow)
    with atomic_folder(path, overwrite=True, keep=True) as folder:
        (folder / "a").write_text("new")
        (path / "early").write_text("early")
    found = content(path)
    assert (found["a"], found["early"], found["sub/late"]) == ("new", "early", "late")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_another_process_makes_meanwhile_is_replaced_where_asked(tmp_path, renaming, monkeypatch):
    path, rename = tmp_path / "model", os.rename

    def late(source, target):
        if not path.exists() and Path(source).suffix == ".part":
            path.mkdir()
            (path / "theirs").write_text("theirs")
            monkeypatch.setattr(files.os, "rename", rename)
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", late)
    write(path, 1, overwrite=True, keep=True)
    assert names(path) == ["a", "b", "sub", "sub/c", "theirs"]


def test_a_folder_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    write(path, 1)  # an existing empty folder is replaced without overwrite
    with pytest.raises(FileExistsError, match="not empty"):
        write(path, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "file", 1, overwrite=True)
    assert (path / "a").read_text().startswith("1\n")
    with pytest.raises(OSError), atomic_folder(tmp_path / "race") as folder:  # another process writes the folder first
        (folder / "a").write_text("mine")
        (tmp_path / "race").mkdir()
        (tmp_path / "race/a").write_text("theirs")
    assert (tmp_path / "race/a").read_text() == "theirs"


def test_a_folder_stays_as_it_was_where_writing_fails(tmp_path, renaming, monkeypatch):
    path = tmp_path / "model"
    write(path, 1)
    before = content(tmp_path)
    with pytest.raises(RuntimeError, match="mine"), atomic_folder(path, overwrite=True) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("mine")
    assert content(tmp_path) == before

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ("fsync", "link", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, step, full)
            patch.setattr(files.shutil, "copy2", full)
            if step == "rename":
                patch.setattr(files, "_exchange", lambda one, other: False)
            (path / "mine").write_text("old")
            with pytest.raises(OSError, match="No space"):
                write(path, 2, overwrite=True, keep=True)
        (path / "mine").unlink()
        assert content(tmp_path) == before, step


def test_the_old_folder_is_back_where_the_second_rename_fails(tmp_path, monkeypatch):
    write(tmp_path / "model", 1)
    before, rename = content(tmp_path), os.rename

    def fail(source, target):
        if Path(source).suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "model", 2, overwrite=True)
    assert content(tmp_path) == before


@needs_fork
def test_a_folder_that_cannot_be_written_is_left_alone():
    with folder_of_nobody() as root:
        path = root / "closed/model"

        def work():
            write(path, 1)
            path.parent.chmod(0o500)
            try:
                # No new folder can be made in the parent, but new files can be made in the folder itself.
                write(path, 2, overwrite=True)
                path.chmod(0o500)
                with pytest.raises(PermissionError):
                    write(path, 3, overwrite=True)
            finally:
                path.chmod(0o700)
                path.parent.chmod(0o700)

        without_rights(work)
        assert names(path) == ["a", "b", "sub", "sub/c"] and content(path) == dict.fromkeys(content(path), "2\n" * 500)


@pytest.mark.parametrize("step, code", [
    ("mkdir", errno.EACCES), ("mkdir", errno.EROFS), ("rename", errno.EACCES), ("rename", errno.EPERM),
    ("rename", errno.EBUSY), ("rename", errno.EXDEV),
])  # fmt: skip
def test_a_folder_that_cannot_be_renamed_is_written_file_by_file(tmp_path, monkeypatch, step, code):
    path = tmp_path / "model"
    write(path, 1)
    for name in ("mine", "sub/mine"):
        (path / name).write_text("kept")
    inodes = [entry.stat().st_ino for entry in (path, path / "mine", path / "sub/mine")]
    mkdir, rename = Path.mkdir, os.rename

    def refuse(entry: Path, refused: bool) -> None:
        if refused:
            raise OSError(code, os.strerror(code), str(entry))

    def make(self, *args, **kwargs):
        refuse(self, step == "mkdir" and self.parent == tmp_path and self.suffix == ".part")
        mkdir(self, *args, **kwargs)

    def move(source, to):  # between two mounts no entry can be renamed
        refuse(to, step == "rename" and (Path(source).parent == tmp_path or code == errno.EXDEV))
        rename(source, to)

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(files.os, "rename", move)
    monkeypatch.setattr(files, "_exchange", lambda one, other: step == "rename" and refuse(other, code != errno.EPERM))
    write(path, 2, overwrite=True, keep=True)
    assert [entry.stat().st_ino for entry in (path, path / "mine", path / "sub/mine")] == inodes
    assert {name: text[:2] for name, text in content(path).items()} == {
        "a": "2\n", "b": "2\n", "sub/c": "2\n", "mine": "ke", "sub/mine": "ke"
    }  # fmt: skip
    with pytest.raises(FileExistsError, match="not empty"):
        write(path, 3)
    write(path, 3, overwrite=True)
    assert names(path) == ["a", "b", "sub", "sub/c"] and (path / "sub/c").read_text().startswith("3\n")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 4)
    assert names(tmp_path / "empty") == ["a", "b", "sub", "sub/c"] and path.stat().st_ino == inodes[0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "model"]


def test_a_folder_in_which_nothing_can_be_made_is_refused_before_the_files_are_written(tmp_path, monkeypatch):
    write(tmp_path / "model", 1)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "mkdir", refuse)
        with atomic_folder(tmp_path / "model", overwrite=True):
            pytest.fail("the block began")
    assert (tmp_path / "model/a").read_text().startswith("1\n")


def test_the_working_folder_is_written_file_by_file(tmp_path, monkeypatch):
    path = tmp_path / "model"
    write(path, 1)
    (path / "mine").write_text("kept")
    monkeypatch.chdir(path)
    inode = path.stat().st_ino
    write(Path("."), 2, overwrite=True, keep=True)
    assert path.stat().st_ino == inode and Path("a").read_text().startswith("2\n")
    assert names(path) == ["a", "b", "mine", "sub", "sub/c"]
    write(Path("."), 3, overwrite=True)
    assert names(path) == ["a", "b", "sub", "sub/c"] and Path("sub/c").read_text().startswith("3\n")
    assert names(tmp_path)[0] == "model" and len(names(tmp_path)) == 5


def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    for name in ("model.0123456789ab.part", "model.0123456789ab.old", "other.0123456789ab.part", "model.mine.part"):
        (tmp_path / f".{name}").mkdir()
    with atomic_folder(tmp_path / "model") as first:
        # This second write of "model", as if by another process, begins while the first write locks its hidden folder.
        write(tmp_path / "model", 2)
        assert first.is_dir()
        found = {path.name for path in tmp_path.iterdir()} - {first.name}
        # The leftovers of killed writes of "model" are gone; the two other hidden folders have other names.
        assert found == {"model", ".other.0123456789ab.part", ".model.mine.part"}
        files._remove_leftovers(tmp_path / "model")
        assert first.is_dir()
        files.shutil.rmtree(tmp_path / "model")


# --- kills ------------------------------------------------------------------------------------------------------------

# The script does not import torch, so that it forks quickly. Forked processes write one generation after another, and
# each is killed at another call that changes the disk. The script prints the state of the path after each kill.
_KILLED = """
import errno, importlib, json, os, random, signal, sys, time, types
from pathlib import Path
package = sys.modules["peft_ext"] = types.ModuleType("peft_ext")  # itself imports torch
package.__path__ = [str(Path(sys.argv[1]).parent)]
files = importlib.import_module("peft_ext.files")
path, exchange, keep = Path(sys.argv[2]), sys.argv[3] == "exchange", sys.argv[4] == "keep"
single, by_file = path.with_name("run.json"), sys.argv[3] == "file by file"

def no_exchange(one, other):
    if by_file:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return False

if not exchange:
    files._exchange = no_exchange

def write(generation):
    with files.atomic_folder(path, overwrite=True, keep=keep) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(f"{generation}\\n" * 2000)
        os.utime(folder / "a", (0, 0))  # a is the oldest file, which is moved first
    with files.atomic_file(single) as file:
        file.write(f"{generation}\\n" * 2000)

def state():
    missing = not path.exists()
    if missing:
        files._remove_leftovers(path)
    found = {name: (path / name).read_text() for name in ("a", "b", *(["mine"] if keep else []))}
    mine = found.pop("mine", "kept")
    a, b, lines = (text.split() for text in (found["a"], found["b"], single.read_text()))
    whole = all(len(set(words)) == 1 and len(words) == 2000 for words in (a, b, lines)) and mine == "kept"
    return {"whole": whole and (a == b or by_file and int(a[0]) > int(b[0])), "missing": missing, "mixed": a != b,
            "generation": int(a[0])}

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child

def failing(at):
    def work():
        calls = 0
        def counted(function):
            def call(*args, **kwargs):
                nonlocal calls
                for moment in ("before", "after"):
                    if calls == at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    calls += 1
                    if moment == "before":
                        result = function(*args, **kwargs)
                return result
            return call
        for name in ("rename", "replace", "fsync", "mkdir", "link", "unlink", "remove", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        files._exchange = counted(files._exchange)
        files.shutil.rmtree = counted(files.shutil.rmtree)
        write(at + 2)
    return work

write(1)
if keep:
    (path / "mine").write_text("kept")
found = []
for at in range(10**6):
    _, status = os.waitpid(forked(failing(at)), 0)
    found.append(state())
    if not os.WIFSIGNALED(status):
        break
points = len(found)
random.seed(0)
def loop(first):
    for generation in range(first, first + 10**5):
        write(generation)
for turn in range(15):
    # The generations of a child are greater than those of the children before.
    child = forked(lambda: loop(10**6 + turn * 10**5))
    until = time.monotonic() + random.uniform(0.002, 0.02)
    while time.monotonic() < until:
        if not path.is_dir() and (exchange or by_file):
            found.append({"whole": False, "missing": True, "mixed": False, "generation": 0})
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found.append(state())
write(10**7)
left = sorted(str(entry.relative_to(path.parent)) for entry in path.parent.rglob("*"))
print(json.dumps({"points": points, "found": found, "left": left, "last": state()}))
"""


@needs_fork
@pytest.mark.parametrize("keep", ["keep", "whole"])
@pytest.mark.parametrize("renaming", ["exchange", "two renames", pytest.param("file by file", marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_folder_is_the_old_or_the_new(tmp_path, renaming, keep):
    if renaming == "exchange" and not sys.platform.startswith("linux"):
        pytest.skip("no call that exchanges folders")
    command = [sys.executable, "-c", _KILLED, files.__file__, str(tmp_path / "model"), renaming, keep]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["points"] > 20 and all(state["whole"] for state in report["found"])
    if renaming != "two renames":
        assert not any(state["missing"] for state in report["found"])
    # Only where a folder is written file by file, a kill may leave one new file beside one old file, each whole.
    assert any(state["mixed"] for state in report["found"]) == (renaming == "file by file")
    mine = ["model/mine"] if keep == "keep" else []
    assert report["left"] == ["model", "model/a", "model/b", *mine, "run.json"]
    assert report["last"]["generation"] == 10**7
    generations = [state["generation"] for state in report["found"][: report["points"]]]
    assert generations == sorted(generations) and generations[0] == 1 and generations[-1] == report["points"] + 1


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    peft = pytest.importorskip("peft")
    from torch import nn

    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["1"]))
    return model


@needs_peft
def test_an_adapter_is_saved_as_peft_saves_it_beside_what_is_there(tmp_path, model):
    model.save_pretrained(str(tmp_path / "stock"))
    path = tmp_path / "ours"
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints/state").write_text("kept")
    # Only hidden folders with the names that atomic_folder gives are leftovers of atomic_folder.
    for name in (".notes.old", ".draft.part", ".ours.mine.old", ".x.0123456789ab"):
        (path / name).write_text("kept")
    (path / ".ours.0123456789ab.old").mkdir()
    (path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    card = path / "README.md"
    save_adapter(model, path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "second/adapter_model.safetensors"):
        assert (path / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    assert (path / "checkpoints/state").read_text() == "kept" and "Mine." in card.read_text()
    hidden = {entry.name: entry.read_text() for entry in path.glob(".*")}
    assert hidden == dict.fromkeys((".notes.old", ".draft.part", ".ours.mine.old", ".x.0123456789ab"), "kept")
    with pytest.raises(FileExistsError, match="give overwrite=True"):
        save_adapter(model, path)
    save_adapter(model, path, overwrite=True, selected_adapters=["default"])
    assert (path / "second/adapter_config.json").exists() and (path / "checkpoints/state").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ours", "stock"]


@needs_peft
def test_an_adapter_of_this_project_is_saved_and_read(tmp_path):
    import peft
    import torch
    from torch import nn

    from peft_ext import BitFitConfig

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    model = peft.get_peft_model(base(), BitFitConfig())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    save_adapter(model, tmp_path / "adapter")
    x = torch.randn(3, 8)
    assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")(x), model(x))


@needs_peft
def test_an_adapter_stays_as_it_was_where_saving_fails(tmp_path, model, monkeypatch):
    save_adapter(model, tmp_path / "adapter")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if (tmp_path / name).is_file()}

    def half(folder, **kwargs):
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", half)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, tmp_path / "adapter", overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if (tmp_path / name).is_file()} == before


@needs_peft
def test_save_adapter_refuses_what_it_does_not_save(tmp_path, model):
    with pytest.raises(TypeError, match="save_adapter: model is Sequential, wanted a PeftModel"):
        save_adapter(model.base_model.model, tmp_path / "a")
    with pytest.raises(ValueError, match="safe_serialization is False"):
        save_adapter(model, tmp_path / "a", safe_serialization=False)
    assert names(tmp_path) == []


@needs_peft
@pytest.mark.parametrize("before", [True, False], ids=["beside other files", "no folder"])
def test_an_adapter_of_another_process_is_not_replaced_unasked(tmp_path, model, renaming, monkeypatch, before):
    path, save = tmp_path / "adapter", model.save_pretrained
    if before:
        path.mkdir()
        (path / "log").write_text("kept")

    def slow(folder, **kwargs):
        save(folder, **kwargs)
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text("theirs")

    monkeypatch.setattr(model, "save_pretrained", slow)
    with pytest.raises(FileExistsError, match=r"has an adapter, give overwrite=True: '.*/adapter'"):
        save_adapter(model, path)
    assert content(path) == {"adapter_config.json": "theirs"} | ({"log": "kept"} if before else {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@needs_peft
def test_a_process_that_is_not_the_main_process_writes_nothing(tmp_path, model, monkeypatch):
    called, save = [], model.save_pretrained
    monkeypatch.setattr(
        model, "save_pretrained", lambda folder, **kwargs: (called.append(kwargs), save(folder, **kwargs))
    )
    save_adapter(model, tmp_path / "new", is_main_process=False)
    assert called == [{"safe_serialization": True, "is_main_process": False}] and names(tmp_path) == []
    save_adapter(model, tmp_path / "new")
    before = {entry: entry.stat() for entry in (tmp_path / "new").rglob("*")}
    save_adapter(model, tmp_path / "new", is_main_process=False)
    assert {entry: entry.stat() for entry in (tmp_path / "new").rglob("*")} == before
