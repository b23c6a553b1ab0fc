"""The output folder of a run: its lock, its checkpoints, and the checkpoint that a resumed run starts from.

The Trainer writes a checkpoint, and :func:`peft_ext.files.seal` then adds a list of the checkpoint's files with their
SHA-256. A run does not resume from a checkpoint without this list, because a killed run may have left the checkpoint
half written, and not from a checkpoint whose listed files have changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from ..files import atomic_folder, is_sealed, not_whole, seal, sort_names
from ..methods import METHODS
from .config import FILE as CONFIG_FILE
from .config import config_text
from .data import Examples
from .errors import RunError, Stop
from .options import SAME_ON_RESUME, Options, check_options
from .progress import log
from .ranks import PROBE, Ranks

PREVIOUS = ".previous"  # folder in which --overwrite keeps the old adapter until the new adapter is saved
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
EXPORTED_FILE = "adapter.gguf"  # name of the file of llama.cpp to which a run exports the adapter
_LOCK = ".lock"
# Error numbers by which a file system says that it has no locks. On a file system without locks a run works without a
# lock.
_NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "EOPNOTSUPP", "ENOTSUP") if hasattr(errno, name)}


def _is_ours(entry: Path) -> bool:
    """Returns whether an entry of the output folder is the lock file, or one of the files and folders that a run writes
    and removes to test the output folder."""
    return entry.name == _LOCK or entry.name.startswith(PROBE)


def checkpoints_folder(o: Options) -> Path:
    return o.output / "checkpoints"


def step_of(checkpoint: Path) -> int:
    """Returns the number of training steps after which the checkpoint was written, from the folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def saved_checkpoints(o: Options) -> list[Path]:
    """Returns the folders of the run's checkpoints, the latest first, also of checkpoints that are half written."""
    there = checkpoints_folder(o).glob("checkpoint-*")
    return sorted((p for p in there if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()), key=step_of,
                  reverse=True)  # fmt: skip


def read_record(o: Options) -> dict[str, Any]:
    """Returns the content of run.json in the output folder; {} where run.json can't be read or is no JSON object."""
    try:
        found = json.loads((o.output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _options_of_run(o: Options) -> Optional[dict[str, Any]]:
    """Returns the options in the output folder's run.json; None where run.json can't be read or has no options."""
    options = read_record(o).get("options")
    return options if isinstance(options, dict) else None


def check_output(o: Options, ranks: Optional[Ranks] = None) -> Optional[Path]:
    """Checks the output folder and returns the checkpoint to resume from; None without --resume.

    Raises RunError where the path or a parent of it is a file, where the path is a loop of symbolic links, where the
    folder can't be written to, and where the folder is not empty and neither --resume nor --overwrite is given. With
    --resume, raises RunError where the folder has no checkpoint except half written or changed ones, where run.json is
    no record of a run, or where the number of examples of a step or an option in SAME_ON_RESUME differs from the
    earlier run. With --overwrite, raises RunError where the folder has no run.json of an earlier run, but another
    run.json, a report.html, a checkpoint or, with --export, an adapter.gguf.
    """
    existing = next((path for path in (o.output, *o.output.parents) if path.exists()), o.output)
    if not existing.is_dir():
        raise RunError(f"--output {o.output}: {existing} is a file")
    if Path(os.path.realpath(o.output)).is_symlink():
        raise RunError(f"--output {o.output}: {os.strerror(errno.ELOOP)}")
    try:
        tempfile.TemporaryDirectory(prefix=PROBE, dir=existing).cleanup()
    except OSError as error:
        raise RunError(f"--output {o.output}: {existing} can't be written to: {error.strerror}") from None
    if o.resume:
        return _checkpoint_to_resume(o, ranks or Ranks())
    _check_empty(o)
    if o.overwrite and _options_of_run(o) is None:
        names = ("run.json", "report.html", *[EXPORTED_FILE] * (o.export is not None))
        foreign = [*(path for name in names if os.path.lexists(path := o.output / name)), *saved_checkpoints(o)]
        if foreign:
            raise RunError(f"--overwrite: {foreign[0]} is not of an earlier run, because {o.output} has no run.json of "
                           "a run: move the file or folder away, or choose another --output")  # fmt: skip
    return None


def _check_empty(o: Options) -> None:
    """Raises RunError where the output folder has other entries than the lock file and a run's tests of the folder,
    unless the options have --resume or --overwrite."""
    if o.resume or o.overwrite or not o.output.is_dir() or all(map(_is_ours, o.output.iterdir())):
        return
    resume = "--resume continues it, " if saved_checkpoints(o) else ""
    raise RunError(f"--output {o.output}: not empty; {resume}--overwrite starts over, keeping other files")


def after_restart(options: Options, ranks: Ranks) -> Options:
    """Returns the options of the run, with --resume or --overwrite where torchrun has restarted the run's processes.

    The returned options are the resolved ``options``, except that ``quant`` is not resolved, because the default of
    ``quant`` depends on the model's files. If this launch has begun the run in the output folder before, the options
    get --resume where the method can resume and the run has a whole checkpoint; otherwise the options get --overwrite,
    unless ``options`` has --resume. This launch has begun the run before if run.json has the launch's name, and if also
    either torchrun has restarted a process, or the run is not finished and no other launch can have the name. Raises
    RunError for a wrong option.
    """

    def chosen() -> Options:
        check_options(options)
        o = options.resolved()
        record = read_record(o) if ranks.speaks else {}
        before = record.get("processes")
        if not isinstance(before, dict) or before.get("launch") != ranks.identity:
            return o
        # If torchrun has restarted the processes, the run may even be finished, because a process may end with an error
        # after the run has finished.
        if ranks.restarts == 0 and (record.get("finished", True) or not ranks.has_own_name):
            return o
        found = METHODS[o.method].can_resume and any(not_whole(path) is None for path in saved_checkpoints(o))
        if o.resume and not found:
            return o
        goes_on = "continues from its last checkpoint" if found else "begins anew, without a checkpoint"
        log.info(f"restart: the run in {o.output} {goes_on}")
        return dataclasses.replace(o, resume=found, overwrite=not found)

    mine = ranks.together(chosen)
    resume, overwrite = ranks.gather((mine.resume, mine.overwrite))[0]
    return dataclasses.replace(mine, quant=options.quant, resume=resume, overwrite=overwrite)


def _digest_of_run(o: Options, name: str) -> Any:
    examples = read_record(o).get("examples")
    return examples.get(name) if isinstance(examples, dict) else None


def check_same_data(o: Options, digest: str) -> None:
    """Raises RunError where ``digest``, the digest of the data's records, differs from the digest that the run.json of
    the earlier run has."""
    before = _digest_of_run(o, "digest")
    if before not in (None, digest):
        raise RunError(f"--resume: the records of --data {o.data} differ from those of the run in {o.output}")


def check_same_tokens(o: Options, examples: Examples) -> None:
    """Raises RunError where the tokens of ``examples`` differ from those of the earlier run."""
    if _digest_of_run(o, "tokens") not in (None, examples.digest):
        raise RunError(f"--resume: the tokens of --data {o.data} differ from those of the run in {o.output}: the "
                       "tokenizer of --model, or peft_ext's reading of it, has changed; start the run anew with "
                       "--overwrite, or choose another --output")  # fmt: skip


def _checkpoint_to_resume(o: Options, ranks: Ranks) -> Path:
    found = saved_checkpoints(o)
    if not found:
        raise RunError(f"--resume: no checkpoint in {o.output} (they are written with --save-steps, and on Ctrl-C)")
    record, before = read_record(o), _options_of_run(o)
    if before is None:
        raise RunError(f"--resume: {o.output / 'run.json'} is missing or no record of a run, so options and data can't "
                       "be compared with those of the run: restore the file, or choose another --output")  # fmt: skip
    now = o.batch_size * o.grad_accum * ranks.world
    if (was := record.get("step_examples", now)) != now:
        product = f"--batch-size {o.batch_size} x --grad-accum {o.grad_accum} x {ranks.world} processes"
        raise RunError(f"--resume: a step has {now} examples ({product}), in the run in {o.output} it has {was}")
    for name in SAME_ON_RESUME:
        now = getattr(o, name)
        if name in before and before[name] != now:
            raise RunError(f"--resume: --{name.replace('_', '-')} is {now}, the run in {o.output} has {before[name]}")
    for name in ("max_steps", "epochs"):
        if name in before and before[name] != getattr(o, name):
            log.info(f"resume: --{name.replace('_', '-')} is {getattr(o, name)}, the run in {o.output} has "
                     f"{before[name]}: the learning rate follows another schedule from here")  # fmt: skip
    reasons = []
    for checkpoint in found:
        if (reason := not_whole(checkpoint)) is None:
            if reasons:
                log.warning(f"--resume: not from {'; '.join(reasons)}; from {checkpoint.name}")
            return checkpoint
        reasons.append(f"{checkpoint.name} ({reason})")
    raise RunError(f"--resume: no checkpoint in {o.output} is whole: {'; '.join(reasons)}")


def trainer_history(checkpoint: Optional[Path]) -> list[dict[str, Any]]:
    """Returns the Trainer's log history that is stored in ``checkpoint``; [] where ``checkpoint`` is None."""
    if checkpoint is None:
        return []
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def how_to_go_on(o: Options) -> str:
    """Returns the end of an error message, which says from which finished checkpoint --resume continues; "" without a
    finished checkpoint."""
    checkpoint = None
    with contextlib.suppress(OSError):
        checkpoint = next(filter(is_sealed, saved_checkpoints(o)), None)
    return "" if checkpoint is None else f"; --resume continues from {checkpoint.name}"


def remove_unsealed(o: Options) -> None:
    """Removes the checkpoints without the list of :func:`peft_ext.files.seal`, because they may be half written."""
    for checkpoint in saved_checkpoints(o):
        if not is_sealed(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def saving_callback(stop: Stop, ranks: Ranks) -> Any:
    """Returns a Trainer callback that calls :func:`peft_ext.files.seal` for each saved checkpoint.

    If a signal has asked one of the ranks for a checkpoint or for the end of the run, the callback makes the Trainer
    save a checkpoint after the current step. If a signal has asked for the end of the run, the callback also stops the
    training.
    """
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ranks.at(f"step {state.global_step}")
            # A signal that comes while the ranks exchange the signals so far stays in ``stop`` for the next step.
            number, save = ranks.largest(stop.signal, int(stop.save))
            if number:
                stop.signal = number
                control.should_save = control.should_training_stop = True
            if save:
                stop.save, control.should_save = False, True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            ranks.wait()  # waits until each rank has written its random state into the checkpoint
            if ranks.speaks:
                sort_names(kwargs["model"], checkpoint)
                seal(checkpoint)

    return Saver()


# --- writing into the folder ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_output(o: Options, checkpoint: Optional[Path], ranks: Ranks) -> Iterator[None]:
    """Creates the output folder on rank 0, and locks the folder until the block ends.

    The other ranks wait until rank 0 has locked the folder.

    With --overwrite removes files of the earlier run, see :func:`_set_aside`; with --resume removes the checkpoints
    that are later than ``checkpoint``. Raises RunError where another process holds the lock, where the folder is no
    longer empty (without --resume and --overwrite), where another run has changed which checkpoint is the last whole
    one (with --resume), and where a rank does not see the files that rank 0 writes into the folder.
    """
    with contextlib.ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(_owned(o, checkpoint, ranks)) if ranks.speaks else None)
        ranks.check_shared(o.output)
        yield


@contextlib.contextmanager
def _owned(o: Options, checkpoint: Optional[Path], ranks: Ranks) -> Iterator[None]:
    Path(os.path.realpath(o.output)).mkdir(parents=True, exist_ok=True)
    with sole_writer(o.output, 30.0 if ranks.restarts else 0.0):
        # Another run may have written into the folder, and ended, since check_output looked at the folder.
        _check_empty(o)
        if checkpoint is not None and not ranks.restarts:
            last = next((found for found in saved_checkpoints(o) if not_whole(found) is None), None)
            if last != checkpoint:
                raise RunError(f"--resume: another run has written into {o.output} since this run began: its last "
                               f"checkpoint is no longer {checkpoint.name}; start the command again")  # fmt: skip
        if o.overwrite:
            _set_aside(o)
        if checkpoint is not None:  # later checkpoints of a killed run must not mix with checkpoints of this run
            for later in itertools.takewhile(lambda p: p != checkpoint, saved_checkpoints(o)):
                shutil.rmtree(later)
        yield


@contextlib.contextmanager
def sole_writer(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Locks ``folder``, which must exist, against other runs until the block ends; waits up to ``seconds`` for the
    lock.

    The lock is on a file in the folder. :func:`peft_ext.files.save_adapter`, which replaces the folder, links the lock
    file into the new folder. When the process ends, for any reason, the system releases the lock.

    Raises RunError where another process holds the lock. On a file system without locks the folder is not locked.
    """
    from filelock import FileLock, Timeout

    path = folder / _LOCK
    lock = FileLock(path, timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"--output {folder}: another process is writing to it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            # The lock file is removed while this process holds the lock: a FileLock of another process that waits, and
            # then locks the removed file, tries again.
            path.unlink()
        lock.release()


def old_export(o: Options) -> Optional[Path]:
    """Returns the path of EXPORTED_FILE in the output folder; None where the file is missing or is the run's model."""
    file = o.output / EXPORTED_FILE
    is_model = os.path.realpath(file) == os.path.realpath(os.path.expanduser(o.model))
    return file if file.is_file() and not is_model else None


def _set_aside(o: Options) -> None:
    """Removes the files and checkpoints of an earlier run from the output folder; other files stay.

    Files count as those of an earlier run only if the folder has the run.json of a run; in a folder without such a
    run.json, only a whole adapter is removed. README.md stays, because saving an adapter updates README.md;
    finetune.yaml stays where the user has edited the file.

    Where the folder has a whole adapter, README.md and the files to be removed (the adapter, run.json and others) are
    first copied to the folder PREVIOUS, which stays until this run has saved its own adapter.
    """
    of_run = _options_of_run(o) is not None
    whole = all((o.output / name).is_file() for name in ADAPTER_FILES)
    names = list(ADAPTER_FILES) if of_run or whole else []
    if of_run:
        names += ["report.html", *[CONFIG_FILE] * may_write_config(o), *[EXPORTED_FILE] * (old_export(o) is not None)]
        found = read_record(o).get("tokenizer_files")
        found = found if isinstance(found, list) else []
        names += [name for name in found if isinstance(name, str) and Path(name).name == name]
        # run.json is removed last, because only run.json shows that the other files are those of a run.
        names.append("run.json")
    there = [name for name in names if (o.output / name).is_file()]
    if whole:
        with atomic_folder(o.output / PREVIOUS, overwrite=True) as folder:
            for name in (*there, *(["README.md"] if (o.output / "README.md").is_file() else [])):
                shutil.copy2(o.output / name, folder / name)
        log.info(f"the old adapter is kept in {o.output / PREVIOUS} until this run has saved its own adapter")
    if of_run:
        for checkpoint in saved_checkpoints(o):
            shutil.rmtree(checkpoint, ignore_errors=True)
        with contextlib.suppress(OSError):
            checkpoints_folder(o).rmdir()  # rmdir raises OSError where the folder has other files than checkpoints
    for name in there:
        (o.output / name).unlink(missing_ok=True)


def may_write_config(o: Options) -> bool:
    """Returns whether a run may write finetune.yaml: the file does not exist, or the user has not changed the file that
    the earlier run wrote."""
    path, options = o.output / CONFIG_FILE, _options_of_run(o)
    if not os.path.lexists(path):
        return True
    try:
        return options is not None and path.read_text(encoding="utf-8") == config_text(options)
    except (OSError, ValueError):
        return False
