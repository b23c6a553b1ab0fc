"""The output folder of a run: its lock, its checkpoints, and the checkpoint that a resumed run starts from.

The Trainer writes a checkpoint, and :func:`peft_ext.files.seal` then adds a list of the checkpoint's files with their
SHA-256. A run resumes neither from a checkpoint without a list, which a killed run left half written, nor from a
checkpoint whose listed files have changed.
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
    """Returns whether an entry of the output folder is the lock file, or a file by which a process tested the
    folder."""
    return entry.name == _LOCK or entry.name.startswith(PROBE)


def checkpoints_folder(o: Options) -> Path:
    return o.output / "checkpoints"


def step_of(checkpoint: Path) -> int:
    """Returns the number of training steps after which the checkpoint was written, from the folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def saved_checkpoints(o: Options) -> list[Path]:
    """Returns the folders of the run's checkpoints, sealed or not, the latest checkpoint first."""
    there = checkpoints_folder(o).glob("checkpoint-*")
    return sorted((p for p in there if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()), key=step_of,
                  reverse=True)  # fmt: skip


def read_record(o: Options) -> dict[str, Any]:
    """Returns the content of run.json in the output folder; {} where run.json can't be read."""
    try:
        return json.loads((o.output / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def check_output(o: Options, ranks: Optional[Ranks] = None) -> Optional[Path]:
    """Checks the output folder and returns the checkpoint to resume from; None without --resume.

    Raises RunError where the folder can't be written to, and where it is not empty and neither --resume nor --overwrite
    is given. With --resume, raises RunError where no checkpoint is whole, or where the number of examples of a step or
    an option in SAME_ON_RESUME differs from the earlier run.
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
    if o.output.is_dir() and not all(map(_is_ours, o.output.iterdir())) and not o.overwrite:
        resume = "--resume continues it, " if saved_checkpoints(o) else ""
        raise RunError(f"--output {o.output}: not empty; {resume}--overwrite starts over, keeping other files")
    return None


def after_restart(options: Options, ranks: Ranks) -> Options:
    """Returns the options with which processes that torchrun has started again continue the run.

    The options are the resolved ``options``, except that ``quant`` is not resolved, because the default of ``quant``
    depends on the model's files. If this launch has begun the run in the output folder before, the options also have
    --resume where the run has a whole checkpoint, else --overwrite. Raises RunError for a wrong option.
    """

    def chosen() -> Options:
        check_options(options)
        o = options.resolved()
        record = read_record(o) if ranks.speaks else {}
        before = record.get("processes")
        if not isinstance(before, dict) or before.get("launch") != ranks.identity:
            return o
        # A process may end after the run has finished, and the launcher then starts all processes again.
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


def check_same_data(o: Options, digest: str) -> None:
    """Raises RunError where ``digest``, the digest of the data's records, differs from the digest in the earlier
    run.json."""
    examples = read_record(o).get("examples")
    before = examples.get("digest") if isinstance(examples, dict) else None
    if before not in (None, digest):
        raise RunError(f"--resume: the records of --data {o.data} differ from those of the run in {o.output}")


def _checkpoint_to_resume(o: Options, ranks: Ranks) -> Path:
    found = saved_checkpoints(o)
    if not found:
        raise RunError(f"--resume: no checkpoint in {o.output} (they are written with --save-steps, and on Ctrl-C)")
    record = read_record(o)
    before = record.get("options", {})
    now = o.batch_size * o.grad_accum * ranks.world
    was = record.get("step_examples", before.get("batch_size", now) * before.get("grad_accum", 1))
    if was != now:
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
    if record and "step_examples" not in record:
        log.warning("--resume: a former version took the examples in another order; some examples come twice or never")
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
    """Returns the end of an error message, naming the checkpoint to resume from; "" without a sealed checkpoint."""
    checkpoint = None
    with contextlib.suppress(OSError):
        checkpoint = next(filter(is_sealed, saved_checkpoints(o)), None)
    return "" if checkpoint is None else f"; --resume continues from {checkpoint.name}"


def remove_unsealed(o: Options) -> None:
    """Removes the checkpoints that are not sealed, because the Trainer has not finished writing these checkpoints."""
    for checkpoint in saved_checkpoints(o):
        if not is_sealed(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def saving_callback(stop: Stop, ranks: Ranks) -> Any:
    """Returns a Trainer callback that seals each saved checkpoint.

    If a signal has asked one of the ranks for a checkpoint or for the end of the run, the callback lets the Trainer
    save a checkpoint after the current step. If a signal has asked for the end of the run, the callback also stops the
    training.
    """
    from transformers import TrainerCallback

    class Saver(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ranks.at(f"step {state.global_step}")
            # A signal that comes during the exchange stays in ``stop`` for the next step.
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

    The other ranks wait until rank 0 has the folder.

    With --overwrite removes the files of the earlier run; with --resume removes the checkpoints that are later than
    ``checkpoint``. Raises RunError where another process holds the lock.
    """
    with contextlib.ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(_owned(o, checkpoint, ranks)) if ranks.speaks else None)
        ranks.check_shared(o.output)
        yield


@contextlib.contextmanager
def _owned(o: Options, checkpoint: Optional[Path], ranks: Ranks) -> Iterator[None]:
    Path(os.path.realpath(o.output)).mkdir(parents=True, exist_ok=True)
    with sole_writer(o.output, 30.0 if ranks.restarts else 0.0):
        if o.overwrite:
            _set_aside(o)
        if checkpoint is not None:  # later checkpoints of a killed run must not mix with checkpoints of this run
            for later in itertools.takewhile(lambda p: p != checkpoint, saved_checkpoints(o)):
                shutil.rmtree(later)
        yield


@contextlib.contextmanager
def sole_writer(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Locks ``folder``, which must exist, against other runs until the block ends; waits ``seconds`` for the lock.

    The lock is on a file in the folder. :func:`peft_ext.files.atomic_folder` keeps the lock file in a folder that
    it replaces. The system releases the lock when the process ends for any reason.

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
            path.unlink()  # removed while locked: a waiting FileLock that then locks the removed file tries again
        lock.release()


def old_export(o: Options) -> Optional[Path]:
    """Returns the path of EXPORTED_FILE in the output folder; None where the file is missing or is the run's model."""
    file = o.output / EXPORTED_FILE
    is_model = os.path.realpath(file) == os.path.realpath(os.path.expanduser(o.model))
    return file if file.is_file() and not is_model else None


def _set_aside(o: Options) -> None:
    """Removes the files and checkpoints of an earlier run from the output folder, and no other files.

    Where the earlier run has saved a whole adapter, the adapter, its run.json, its report and its options are first
    copied to the folder PREVIOUS. The folder PREVIOUS stays until this run has saved its own adapter.
    """
    exported = [] if old_export(o) is None else [EXPORTED_FILE]
    there = [name for name in (*ADAPTER_FILES, "README.md", "run.json", "report.html", CONFIG_FILE)
             if (o.output / name).is_file()] + exported  # fmt: skip
    if there[: len(ADAPTER_FILES)] == list(ADAPTER_FILES):
        with atomic_folder(o.output / PREVIOUS, overwrite=True) as folder:
            for name in there:
                shutil.copy2(o.output / name, folder / name)
        log.info(f"the old adapter is kept in {o.output / PREVIOUS} until this run has saved its own adapter")
    shutil.rmtree(checkpoints_folder(o), ignore_errors=True)
    for name in there:
        (o.output / name).unlink(missing_ok=True)
