"""Atomic writes: after an error, or after the process was killed, a path holds its whole old or its whole new content.

The docstring of :func:`atomic_folder` lists the cases in which a folder is not replaced atomically.

::

    with atomic_file("run.json") as file:
        file.write(text)
    with atomic_folder("model", overwrite=True) as folder:
        ...                              # write into folder, which replaces "model" as the block ends
    save_adapter(model, "adapter")       # PEFT's save_pretrained in an atomic folder

New content is written into a hidden folder beside the path, flushed to the disk (fsync), then renamed. After an error,
such as a full disk, the old content is still at the path, and the hidden folder is removed. If a process is killed, its
hidden folder stays until the next write to the path, which removes the hidden folder.

transformers' Trainer writes its checkpoints in place, not atomically. ``seal`` therefore writes a list of the files of
a finished checkpoint folder, with their sizes and SHA-256, and ``not_whole`` compares the folder with that list later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Optional, Union

from ._imports import required

try:
    from filelock import lock_descriptor
except ImportError:
    # filelock before 3.30 has no lock_descriptor. peft_ext as a kernel from Hugging Face's hub can't install a newer
    # filelock.
    import fcntl

    def lock_descriptor(handle: int, blocking: bool = True) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if blocking else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


__all__ = ["atomic_file", "atomic_folder", "save_adapter"]

# Endings of hidden folders: _PART for a folder that is being written, _OLD for an old folder that was moved aside.
_PART, _OLD = ".part", ".old"
_SEAL = "sealed.json"
# Error numbers with which the system refuses to rename a folder or to make a folder beside it, although the entries of
# the folder can be replaced: the folder is a mount point or in a lower layer of overlayfs, or the process may not write
# to the folder's parent.
_FIXED = {errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def cache_folder() -> Path:
    """Returns the folder in which peft_ext keeps files, such as compiled kernels, for later runs:
    ``$XDG_CACHE_HOME/peft_ext``, or ``~/.cache/peft_ext``.

    For a user without a home folder, returns a path below ``/dev/null``, to which nothing can be written.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named, "peft_ext")
    try:
        return Path.home() / ".cache/peft_ext"
    except RuntimeError:
        return Path(os.devnull, "peft_ext")


@contextlib.contextmanager
def atomic_file(path: Union[str, Path], mode: str = "w", *, overwrite: bool = True, **kwargs: Any) -> Iterator[IO[Any]]:
    """Yields an open file, which replaces ``path`` as the block ends. If the block raises, ``path`` does not change.

    Args:
        path: the file, which need not exist; its folder must exist. If ``path`` is a symbolic link, the file that the
            link names is replaced, and the link stays.
        mode: "w" for text, "wb" for bytes.
        overwrite: whether a file at ``path`` may be replaced, also a file that another process has written since the
            block began.
        kwargs: further arguments of ``open``: ``encoding`` (default: utf-8), ``newline`` and the like.

    Raises: ValueError for another mode; FileExistsError where ``path`` exists, before the block or as the block ends,
    and overwrite is False; OSError as ``open``, ``write`` and ``os.replace`` raise it.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_file: mode is {mode!r}, wanted 'w' or 'wb'")
    if mode == "w":
        kwargs.setdefault("encoding", "utf-8")
    target = Path(os.path.realpath(path))
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    _remove_leftovers(target)
    with _hidden_folder(target) as folder:
        part = folder / target.name
        with open(part, mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, part)
            os.replace(part, target)
        else:
            _put_new(part, target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: Union[str, Path], *, overwrite: bool = False, keep: bool = False) -> Iterator[Path]:
    """Yields a new folder, which replaces ``path`` as the block ends; if the block raises, ``path`` does not change.

    One system call (Linux ``renameat2``) exchanges an existing folder for the new one, so that ``path`` always exists.
    On a file system that can't exchange two folders, the old folder is first moved aside: a process killed between the
    two renames leaves the old folder under a hidden name, and the next write to ``path`` puts the old folder back. A
    folder that can't be renamed is not replaced atomically: the new files are written to a hidden folder inside the
    folder, then moved into the folder one by one, oldest first. These folders can't be renamed: a mount point, the
    working folder of this process, a folder whose parent this process may not write to, and a folder in a lower layer
    of overlayfs.

    Args:
        path: the folder, which need not exist; its parent folders are made. If ``path`` is a symbolic link, the folder
            that the link names is replaced, and the link stays.
        overwrite: whether a folder that is not empty may be replaced. Without ``keep``, no file of the old folder
            stays.
        keep: with overwrite, whether files of the old folder that are not in the new folder stay, as hard links if the
            file system has hard links. With keep, the contents of a subfolder that is in the old and in the new folder
            are merged.

    Yields: an empty folder to write into, on the file system of ``path``.

    Raises: FileExistsError where ``path`` is a folder that is not empty and overwrite is False; NotADirectoryError
    where ``path`` is a file; OSError as the system raises it.
    """
    with _replacing(path, overwrite, keep, lambda old: None) as folder:
        yield folder


@contextlib.contextmanager
def _replacing(path: Union[str, Path], overwrite: bool, keep: bool, check: Callable[[Path], None]) -> Iterator[Path]:
    """Does what :func:`atomic_folder` does, and calls ``check(old)`` with the old folder, if there is one, before the
    block and once more as the folder is replaced. If ``check`` raises, the old folder stays."""
    target = Path(os.path.realpath(path))
    check_free(target, overwrite)
    if target.is_dir():
        check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    stays = target.is_dir() and (target.is_mount() or Path.cwd().is_relative_to(target))
    inside = target / target.name
    with contextlib.ExitStack() as stack:
        # The hidden folder is inside of target if target can't be renamed, else beside target.
        try:
            part = stack.enter_context(_hidden_folder(inside if stays else target))
        except OSError as error:
            if stays or not target.is_dir() or error.errno not in _FIXED:
                raise
            stays, part = True, stack.enter_context(_hidden_folder(inside))
        yield part
        carried = _carry_over(target, part) if keep and target.is_dir() and not stays else []
        _sync_tree(part)
        if not stays and not _put(part, target, overwrite, keep, check):
            for file in carried:
                file.unlink()
            beside, stays, part = part, True, stack.enter_context(_hidden_folder(inside))
            _move_all(beside, part)
        if stays:
            check_free(target, overwrite)
            check(target)
            _move_into(part, target, keep)
        _sync_folder(target if stays else target.parent)


def save_adapter(model: Any, path: Union[str, Path], *, overwrite: bool = False, **kwargs: Any) -> None:
    """Calls ``model.save_pretrained`` so that the configuration and the weights at ``path`` are both old or both new.

    The function ``peft_ext.files.atomic_folder`` replaces the folder; the docstring of ``atomic_folder`` lists the
    cases in which a replacement is not atomic.

    ``save_adapter`` saves adapters of PEFT's methods and of peft_ext's methods, with weights in safetensors. Other
    files in the folder ``path`` (checkpoints, logs, adapters of other names) stay. The lists of names in the
    configuration are sorted, because the order in which ``save_pretrained`` alone writes a list of names differs
    between processes.

    Args:
        model: a PeftModel.
        path: folder of the saved adapter.
        overwrite: whether an adapter that is in the folder may be replaced.
        kwargs: further arguments of ``save_pretrained``: ``selected_adapters``, ``save_embedding_layers`` and the like.
            With ``is_main_process=False``, ``save_adapter`` takes part in the communication of ``save_pretrained`` and
            writes nothing to ``path``.

    Raises: TypeError where ``model`` is no PeftModel; ValueError where ``safe_serialization`` is False; FileExistsError
    where the folder has an adapter and overwrite is False; OSError as the system raises it.
    """
    with required("peft", "peft_ext.save_adapter"):
        from peft import PeftModel
        from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

    if not isinstance(model, PeftModel):
        raise TypeError(f"save_adapter: model is {type(model).__name__}, wanted a PeftModel")
    if not kwargs.setdefault("safe_serialization", True):
        raise ValueError("save_adapter: safe_serialization is False, wanted True: a pickle runs code as it is read")
    if not kwargs.get("is_main_process", True):
        # PEFT's save_pretrained makes its folder also in a process that is not the main process.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, **kwargs)
        return
    target = Path(os.path.realpath(path))

    def check(old: Path) -> None:
        for name in [] if overwrite else model.peft_config:
            below = "" if name == "default" else name
            for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
                if (old / below / file).exists():
                    text = "save_adapter: the folder has an adapter, give overwrite=True"
                    raise FileExistsError(errno.EEXIST, text, str(target / below))

    with _replacing(target, True, True, check) as folder:
        card = target / "README.md"
        if card.is_file():
            # save_pretrained updates the copy of the model card in ``folder``.
            shutil.copy(card, folder)
        model.save_pretrained(str(folder), **kwargs)
        sort_names(model, folder)


def sort_names(model: Any, folder: Path) -> None:
    """Sorts the lists of names in the configurations that ``model.save_pretrained(folder)`` wrote.

    Without the sorting, two equal runs may write different files: PEFT stores fields such as ``target_modules`` as
    sets, and the order of a set of strings differs between processes.
    """
    for name, config in model.peft_config.items():
        path = (folder if name == "default" else folder / name) / "adapter_config.json"
        sets = [key for key, value in vars(config).items() if isinstance(value, set)]
        if sets and path.is_file():
            written = json.loads(path.read_text(encoding="utf-8"))
            written |= {key: sorted(written[key]) for key in sets}
            path.write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


def seal(folder: Path) -> None:
    """Flushes ``folder`` to the disk, then writes a list of its files, with sizes and SHA-256, into ``folder``.

    Raises OSError where a file can't be read or the list can't be written.
    """
    (folder / _SEAL).unlink(missing_ok=True)
    _sync_tree(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    with atomic_file(folder / _SEAL) as file:
        file.write(json.dumps(files, indent=2) + "\n")
    _sync_folder(folder.parent)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def is_sealed(folder: Path) -> bool:
    """Returns whether :func:`seal` wrote its list into ``folder``, without checking the files."""
    return (folder / _SEAL).is_file()


def not_whole(folder: Path) -> Optional[str]:
    """Returns in words the first difference between a folder's files and the list that :func:`seal` wrote; None if
    there is no difference.

    Files that are not in the list are ignored.
    """
    try:
        files = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {_SEAL}: the folder was not written to its end"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{_SEAL} can't be read"
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"no {name}"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _digest(path) != digest:
            return f"{name} has other content than was written"
    return None


# --- hidden folders: a process locks the hidden folder that it writes; the system unlocks folders of dead processes ---


def _hidden(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}{ending}")


def _is_hidden(entry: Path) -> bool:
    """Returns whether the entry has a name that :func:`_hidden` makes."""
    return re.fullmatch(r"\..+\.[0-9a-f]{12}", entry.stem, re.DOTALL) is not None and entry.suffix in (_PART, _OLD)


@contextlib.contextmanager
def _hidden_folder(target: Path) -> Iterator[Path]:
    """Yields a new hidden folder beside ``target``, and removes the hidden folder as the block ends.

    The hidden folder is locked where the file system has locks.
    """
    while True:
        part = _hidden(target, _PART)
        part.mkdir()
        handle = None
        # os.open raises OSError on Windows, where a folder can't be opened; lock_descriptor raises OSError on a file
        # system without locks.
        with contextlib.suppress(OSError):
            handle = os.open(part, os.O_RDONLY)
            lock_descriptor(handle)
        # Between mkdir and the lock, another process may have removed the hidden folder as a leftover.
        if part.exists():
            break
        if handle is not None:
            os.close(handle)
    try:
        yield part
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(part, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Removes the hidden folders that killed processes left beside ``target`` or in ``target``.

    If nothing exists at ``target``, an old folder that a killed process moved aside from ``target`` is moved back.
    """
    hidden = f".{glob.escape(target.name)}.{'[0-9a-f]' * 12}"
    for folder in (target.parent, target):
        with contextlib.suppress(OSError):
            for entry in [*folder.glob(hidden + _PART), *folder.glob(hidden + _OLD)]:
                if entry.suffix == _OLD and not target.exists():
                    entry.rename(target)
                    continue
                handle = os.open(entry, os.O_RDONLY)
                try:
                    if lock_descriptor(handle, blocking=False):
                        shutil.rmtree(entry, ignore_errors=True)
                finally:
                    os.close(handle)


def check_free(target: Path, overwrite: bool) -> None:
    """Raises OSError where ``target`` is a file, a loop of links, or, without overwrite, a folder that is not empty.

    A folder that holds only hidden folders of this module counts as empty.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    if target.is_symlink():  # realpath returns a link only where the links form a loop
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if not overwrite and target.is_dir() and not all(map(_is_hidden, target.iterdir())):
        raise FileExistsError(errno.EEXIST, "the folder exists and is not empty", str(target))


# --- putting ----------------------------------------------------------------------------------------------------------


def _put_new(part: Path, target: Path) -> None:
    """Gives the file ``part`` the name ``target``. Raises FileExistsError where ``target`` exists."""
    try:
        os.link(part, target)
    except FileExistsError:
        text = "another process has written this file meanwhile"
        raise FileExistsError(errno.EEXIST, text, str(target)) from None
    # The file system has no hard links: an empty file reserves the name until the written file replaces the empty file.
    except OSError:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            part.replace(target)
        except OSError:
            target.unlink(missing_ok=True)
            raise


def _put(part: Path, target: Path, overwrite: bool, keep: bool, check: Callable[[Path], None]) -> bool:
    """Gives the folder ``part`` the name ``target``; returns False where a folder at ``target`` can't be renamed.

    With ``keep``, files that another process has written into the old folder since :func:`_carry_over` stay, too.
    """
    there = target.is_dir()
    old = None
    try:
        if there:
            shutil.copymode(target, part)
        if not (there and overwrite):
            os.rename(part, target)  # rename replaces an empty folder, and raises OSError for a folder with entries
        elif _exchange(part, target):
            old = part
            try:
                check(part)
            except BaseException:
                _exchange(part, target)
                raise
        else:
            old = _move_aside(part, target, check)
    except OSError as error:
        if there and target.is_dir() and error.errno in _FIXED:
            return False
        if (there and overwrite) or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if overwrite:  # another process has made a folder at target since ``there`` was computed
            return _put(part, target, overwrite, keep, check)
        raise FileExistsError(errno.EEXIST, "another process has written this folder meanwhile", str(target)) from None
    if keep and old is not None:
        _carry_over(old, target)
    if old is not None and old != part:
        shutil.rmtree(old, ignore_errors=True)
    return True


def _move_aside(part: Path, target: Path, check: Callable[[Path], None]) -> Path:
    """Gives the folder ``target`` a hidden name, which is returned, and ``part`` the name ``target``."""
    old = _hidden(target, _OLD)
    os.rename(target, old)
    try:
        check(old)
        os.rename(part, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one system call; returns False if the system or the file system lacks or
    refuses the call."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _move_into(part: Path, target: Path, keep: bool) -> None:
    """Moves the entries of ``part`` into ``target``, the oldest entry first, because the file that completes a folder
    was written last.

    Without ``keep``, removes the other entries of ``target`` afterwards, except the folder ``part``.
    """
    entries = sorted(part.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
    names = {entry.name for entry in entries}
    for entry in entries:
        place = target / entry.name
        if place.is_dir() and not place.is_symlink():
            if keep and entry.is_dir():
                _move_into(entry, place, keep)
                continue
            shutil.rmtree(place)
        os.replace(entry, place)
    for entry in [] if keep else target.iterdir():
        if entry.name not in names and entry != part:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _move_all(old: Path, new: Path) -> None:
    """Moves the entries of ``old`` into the empty folder ``new``, or copies the entries to another mount."""
    for entry in list(old.iterdir()):
        shutil.move(entry, new)
    _sync_tree(new)


def _carry_over(old: Path, new: Path) -> list[Path]:
    """Makes hard links in ``new`` to the files of ``old`` that ``new`` lacks, or copies if links are impossible.

    Returns the paths of the links and copies that it made in ``new``.
    """
    made = []
    for entry in old.iterdir():
        place, there = new / entry.name, os.path.lexists(new / entry.name)
        if _is_hidden(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not there:
                place.mkdir()
                shutil.copystat(entry, place)
            if place.is_dir():
                made += _carry_over(entry, place)
        elif not there:
            try:
                os.link(entry, place, follow_symlinks=False)
            except (OSError, NotImplementedError):
                shutil.copy2(entry, place, follow_symlinks=False)
            made.append(place)
    return made


# --- fsync ------------------------------------------------------------------------------------------------------------


def _sync_tree(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink():
            continue
        if entry.is_dir():
            _sync_tree(entry)
        elif entry.is_file():
            _sync(entry)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems refuse fsync of a folder
        _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
