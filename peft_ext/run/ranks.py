"""The processes of a run: the exchanges between the ranks, and how an error of one rank ends all ranks.

A launcher such as torchrun starts the command once for each rank. Rank 0 writes the run's files and its log; the other
ranks compute, but write no such file and no log. The ranks exchange small objects over gloo, beside the process group
of the training.

An error on one rank ends the run: the rank writes its error into the store of the process group, raises the error, and
ends. After an error of one rank, the other ranks fail in their next exchange or all-reduce, find the error in the
store, and raise :class:`peft_ext.run.errors.Elsewhere`, which the command line does not print.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch

from ..sources.json_file import first_line
from .errors import Elsewhere, Interrupted, RunError, Stop
from .launch import ALONE, Launch, address, read_launch
from .progress import log

_Result = TypeVar("_Result")

PROBE = ".peft_ext-"  # prefix of the names of hidden files and folders with which a run tests its output folder
SECONDS = 1800.0  # seconds that a rank waits for another rank; PEFT_EXT_RANK_SECONDS replaces the value
_SETTLE = 3.0  # seconds that a rank waits for another rank's error, or sign of life, in the store
_BEAT = 0.7  # seconds between two signs of life of a rank
_LAST_BEAT = 10.0  # seconds that the end of a run waits for the last sign of life
# _LOST and _LATE: parts of the messages of errors that an exchange raises when another rank has ended, or is late.
_LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "recvValueWithTimeout failed",
         "Socket is not connected", "gloo", "NCCL")  # fmt: skip
_kept: list[Any] = []  # stores of the process groups that this process has started
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
_LATE = ("Timed out", "timed out", "wait timeout")


class Ranks:
    """The rank of this process in a run, the number of processes and so on, with methods for exchanges between the
    processes.

    ``Ranks()`` describes the only process of a run.

    Attributes:
        rank, world: rank of this process, and number of processes.
        local_rank, local_world: rank among the processes of this machine, and their number.
        node, nodes: index of this machine among the machines of the run, and number of machines.
        identity: the name of the launch, which a restart by torchrun keeps; "" without a name.
        has_own_name: whether no other launch can have the same ``identity``.
        restarts: the largest number of restarts of a process of the run by the launcher.
        gpu: index of this process's GPU among the GPUs that the process sees; None without a GPU.
        launch: the numbers and names that the launcher gave to this process.
    """

    def __init__(self, launch: Launch = ALONE, store: Any = None, group: Any = None) -> None:
        self.launch, self._store, self._group, self._key = launch, store, group, ""
        self.rank, self.world = launch.rank, launch.world
        self.local_rank, self.local_world, self.node, self.nodes = 0, 1, 0, 1
        self.gpu: Optional[int] = None
        self.identity, self.has_own_name, self.restarts = launch.identity, False, launch.restarts
        self._count, self._firsts = 0, 0
        self._hosts, self._nodes = [socket.gethostname()], [0]
        self._ended = threading.Event()
        self._beating: Optional[threading.Thread] = None

    @property
    def speaks(self) -> bool:
        """Whether this rank writes the run's files and its log."""
        return self.rank == 0

    def described(self) -> str:
        """Returns the number of processes and of machines and the launcher, in words."""
        machines = f" on {self.nodes} machines" if self.nodes > 1 else ""
        return f"{self.world}{machines}, by {self.launch.launcher}"

    @property
    def in_equal_blocks(self) -> bool:
        """Whether the run has several machines, each with an equal number of consecutive ranks, at least two."""
        return self.nodes > 1 and self.local_world > 1 and self._nodes == [
            node for node in range(self.nodes) for _ in range(self.local_world)
        ]  # fmt: skip

    # --- exchanges ----------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Returns a list of the values of all ranks, in the order of the ranks. All ranks have to call ``gather``."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def wait(self) -> None:
        """Returns when all ranks have called ``wait``."""
        self.gather(None)

    def largest(self, *values: int) -> list[int]:
        """Returns for each value the largest value of all ranks."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def mine(self, count: int) -> range:
        """Returns the indices below ``count`` that are this rank's share of the work."""
        return range(self.rank, count, self.world)

    def merged(self, found: dict[int, _Result]) -> dict[int, _Result]:
        """Returns the entries of the dicts of all ranks, sorted by key."""
        return dict(sorted(entry for part in self.gather(found) for entry in part.items()))

    def together(self, work: Callable[[], _Result]) -> _Result:
        """Returns ``work()``, which all ranks run. Raises an error where the work failed on any rank.

        The lowest rank whose work failed raises the error of its work; the other ranks raise Elsewhere.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as failure:
            if self.world == 1:
                raise
            error = failure
            if self._store is not None:
                self._store.set(f"{self._key}/failed", "")  # the other ranks then end their wait in first_of_node
        texts = self.gather(None if error is None else str(error) or type(error).__name__)
        first = next((rank for rank, text in enumerate(texts) if text is not None), None)
        if first is None:
            return result  # type: ignore[return-value]
        if error is None or self.rank != first:
            raise Elsewhere(texts[first])
        error.of_all_ranks = None not in texts  # type: ignore[attr-defined]
        raise error

    def first_of_node(self, work: Callable[[], _Result]) -> _Result:
        """Returns ``work()``. On each machine, the rank whose ``local_rank`` is 0 runs ``work`` before the other ranks
        do."""
        self._firsts += 1
        if self.local_world == 1:
            return work()
        name = f"{self._key}/first/{self.node}/{self._firsts}"
        if self.local_rank == 0:
            try:
                return work()
            finally:
                self._store.set(name, "")
        end = time.monotonic() + wait_seconds()
        while not (self._store.check([name]) or self._store.check([f"{self._key}/failed"])):
            if time.monotonic() > end:
                raise RunError(f"the first process of this machine is not ready within {wait_seconds():g} s")
            time.sleep(0.1)
        return work()

    def at(self, place: str) -> None:
        """Notes in the store that this rank has reached the point ``place`` of the program, so that an error message
        can name the last point that a rank has reached.

        All ranks must call ``at`` with the same places in the same order.
        """
        if self.world > 1:
            self._count += 1
            with contextlib.suppress(RuntimeError):
                self._store.set(f"{self._key}/at/{self.rank}", f"{self._count} {place}")

    # --- checks -------------------------------------------------------------------------------------------------------

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Raises RunError on the lowest rank whose ``facts`` differ from those of rank 0, and Elsewhere on the other
        ranks; returns if the facts of all ranks are equal."""
        if self.world == 1:
            return
        found = self.gather(facts)

        def check() -> None:
            for name in {**found[0], **found[self.rank]}:
                here, wanted = found[self.rank].get(name, "missing"), found[0].get(name, "missing")
                if here != wanted:
                    raise RunError(f"{name} is {here}, on rank 0 it is {wanted}")

        self.together(check)

    def check_shared(self, folder: Path) -> None:
        """Raises RunError on the lowest rank that does not see a file that rank 0 writes into ``folder``, and Elsewhere
        on the other ranks; returns if all ranks see the file."""
        if self.world == 1:
            return
        name = self.gather(f"{PROBE}{secrets.token_hex(8)}")[0]
        if self.speaks:
            (folder / name).write_text("")
        self.wait()

        def check() -> None:
            for _ in range(20):  # a network file system shows a new file after some seconds
                if (folder / name).exists():
                    return
                time.sleep(0.25)
            raise RunError(
                f"--output {folder}: rank 0 writes into another folder of this name, wanted a folder that all machines "
                "share"
            )

        try:
            self.together(check)
        finally:
            if self.speaks:
                (folder / name).unlink(missing_ok=True)

    # --- errors -------------------------------------------------------------------------------------------------------

    def who(self, rank: int) -> str:
        """Returns words for a rank: its number and, where the run has several machines, its host."""
        return f"rank {rank} on {self._hosts[rank]}" if self.nodes > 1 else f"rank {rank}"

    @contextlib.contextmanager
    def reported(self, stop: Stop, hint: Callable[[], str]) -> Iterator[None]:
        """If several ranks raise errors in the block, the first of these ranks raises its error, and the others raise
        Elsewhere. A rank that is not the first and whose own error is an Interrupted raises this Interrupted, with
        ``silent`` True, unless its SIGTERM came because another rank had ended.

        The message of a RunError gets the number of the rank, unless the work of all ranks has failed. ``hint`` returns
        the end of a message, which says how to continue the run.
        """
        try:
            yield
        except BaseException as error:
            if self.world == 1:
                raise
            # When one rank has ended, the launcher sends SIGTERM to the others. With ``ending``, this process ignores
            # SIGTERM, which would interrupt its error message.
            stop.ending = True
            self._report(error, hint)
            raise

    def _report(self, error: BaseException, hint: Callable[[], str]) -> None:
        """Writes ``error`` into the store, unless another rank has written its error first.

        Raises Elsewhere where another rank was first, and RunError where ``error`` is a RunError or follows from the
        end of another rank; otherwise returns, and the caller raises ``error``.
        """
        if isinstance(error, (Elsewhere, SystemExit)):
            self._let_speak()
            raise error
        lost = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST + _LATE)
        if lost:
            with contextlib.suppress(RuntimeError):  # the process that holds the store may have ended
                self._store.set(f"{self._key}/waited/{self.rank}", "")
        if lost and (told := self._told(_SETTLE)):
            self._let_speak()
            raise Elsewhere(told["text"]) from error
        if lost:
            text = self._why_lost(error, hint)
        elif isinstance(error, Interrupted) and error.signal == signal.SIGTERM and (gone := self._gone()):
            lost, text = True, self._without(gone, hint)  # if a rank ends, the launcher ends the other ranks by SIGTERM
        else:
            text = str(error)
        if isinstance(error, RunError) and not getattr(error, "of_all_ranks", False):
            text = f"{self.who(self.rank)}: {text}"
        told = self._tell(text)
        if isinstance(error, Interrupted) and not lost:
            error.silent = told["rank"] != self.rank
            if error.silent:
                self._let_speak()
        elif told["rank"] != self.rank:
            self._let_speak()
            raise Elsewhere(told["text"]) from error
        elif lost or isinstance(error, RunError):
            raise RunError(text) from error

    def _told(self, seconds: float = 0.0) -> Optional[dict[str, Any]]:
        """Returns the error that a rank has written into the store, and waits for an error up to ``seconds``; returns
        None without an error."""
        end = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the process that holds the store may have ended
            while True:
                if self._store.check([f"{self._key}/error"]):
                    return json.loads(self._store.get(f"{self._key}/error"))
                if time.monotonic() >= end:
                    break
                time.sleep(0.05)
        return None

    def _tell(self, text: str) -> dict[str, Any]:
        """Writes an error of this rank into the store, unless another rank has written one; returns the error in the
        store."""
        mine = {"rank": self.rank, "text": text}
        try:
            return json.loads(self._store.compare_set(f"{self._key}/error", "", json.dumps(mine)))
        except RuntimeError:  # the process that holds the store may have ended
            return mine

    def _let_speak(self) -> None:
        """Waits, so that the rank that prints the error ends before this rank: the launcher reports the first rank that
        ends and kills the others."""
        self.end_beats()
        time.sleep(_SETTLE)

    def _why_lost(self, error: BaseException, hint: Callable[[], str]) -> str:
        """Returns the message for an exchange that failed because another rank ended or came too late."""
        gone = self._gone()
        if any(text in str(error) for text in _LATE):
            behind = self._behind(gone)
            named, place = " or ".join(map(self.who, behind)), self._place(behind[0])[1]
            return f"{named} has come no further than {place} within {wait_seconds():g} s{hint()}"
        return self._without(gone, hint) if gone else f"{self.who(self.rank)}: {first_line(error)}{hint()}"

    def _behind(self, gone: list[int]) -> list[int]:
        """Returns the ranks for which this rank may have waited: ``gone``, or, if ``gone`` is empty, the ranks that did
        not fail in an exchange.

        Of the ranks for which this rank may have waited (of all other ranks, if there are none), ``_behind`` returns
        those whose last noted point of the program is the earliest. ``_behind`` never returns this rank, because this
        rank waited for others.
        """
        others = [rank for rank in range(self.world) if rank != self.rank]
        with contextlib.suppress(RuntimeError):  # the process that holds the store may have ended
            waited = [rank for rank in others if self._store.check([f"{self._key}/waited/{rank}"])]
            gone = gone or [rank for rank in others if rank not in waited]
        places = {rank: self._place(rank)[0] for rank in gone or others}
        return [rank for rank, place in places.items() if place == min(places.values())]

    def _without(self, gone: list[int], hint: Callable[[], str]) -> str:
        named = ", ".join(map(self.who, gone))
        return (f"{named} ended without an error message, after {self._place(gone[0])[1]}: a signal ended the process, "
                f"or the system for lack of memory{hint()}")  # fmt: skip

    def _gone(self) -> list[int]:
        """Returns the other ranks that give no sign of life within _SETTLE seconds."""
        with contextlib.suppress(RuntimeError):  # the process that holds the store may have ended
            before = self._beats()
            time.sleep(_SETTLE)
            after = self._beats()
            return [rank for rank in range(self.world) if before[rank] == after[rank] and rank != self.rank]
        return []

    def _beats(self) -> list[int]:
        return [self._store.add(f"{self._key}/beat/{rank}", 0) for rank in range(self.world)]

    def start_beats(self) -> None:
        """Starts a thread that gives a sign of life each _BEAT seconds, also while the rank waits for another rank."""

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the process that holds the store may have ended
                while not self._ended.wait(_BEAT):
                    self._store.add(f"{self._key}/beat/{self.rank}", 1)

        self._beating = threading.Thread(target=beat, name="peft_ext signs of life", daemon=True)
        self._beating.start()

    def end_beats(self) -> None:
        """Ends the thread that gives the signs of life, and waits for the thread's last call of the store.

        If Python ended while the thread was in a call of the store, the process would be aborted. The wait has a limit,
        because a store whose process is stopped does not answer.
        """
        self._ended.set()
        if self._beating is not None:
            self._beating.join(_LAST_BEAT)

    def _place(self, rank: int) -> tuple[int, str]:
        """Returns the number and the name of the last point of the program that a rank has noted with :meth:`at`."""
        name = f"{self._key}/at/{rank}"
        with contextlib.suppress(RuntimeError):
            if self._store.check([name]):
                count, _, place = self._store.get(name).decode().partition(" ")
                return int(count), place
        return 0, "the start"


def wait_seconds() -> float:
    """Returns the seconds that a rank waits for another rank. Raises RunError for a wrong PEFT_EXT_RANK_SECONDS."""
    value = os.environ.get("PEFT_EXT_RANK_SECONDS") or str(SECONDS)
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**7:
        raise RunError(f"PEFT_EXT_RANK_SECONDS is {value!r}, wanted a positive number of seconds")
    return seconds


@contextlib.contextmanager
def joined(of_one: bool = False) -> Iterator[Ranks]:
    """Joins the process group that the launcher's variables describe, and yields this process's :class:`Ranks`.

    ``of_one``: whether the only process of a run makes a process group of itself, too.

    A process group that exists already is used, and is not destroyed at the end. On ranks other than rank 0 the block
    logs nothing and warns of nothing. Raises RunError where the launcher's variables are wrong or the other ranks can't
    be reached.
    """
    distributed = torch.distributed
    exists = distributed.is_available() and distributed.is_initialized()
    launch = read_launch()
    if exists:
        launch = Launch(launch.launcher or "a process group", distributed.get_rank(), distributed.get_world_size(),
                        launch.local_rank, launch.local_world, launch.identity, launch.restarts)  # fmt: skip
    if launch.world == 1 and (exists or not of_one):
        yield Ranks(launch)
        return
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        store, name = (None, "") if exists else _start_group(launch)
        ranks = _of_group(launch, store, name)
    except Elsewhere:
        time.sleep(_SETTLE)  # waits, so that the rank with the error prints the error first
        raise
    except (RuntimeError, ValueError) as error:
        raise RunError(f"rank {launch.rank}: no connection to the other ranks ({first_line(error)})") from None
    if ranks.world > 1:
        ranks.start_beats()
    try:
        with contextlib.nullcontext() if ranks.speaks else _silent():
            yield ranks
        ranks.wait()  # waits for all ranks, because the store ends with the rank that holds it
        ended_well = True
    except BaseException:
        ended_well = ranks.world == 1
        raise
    finally:
        ranks.end_beats()
        if ended_well:  # after an error the process group stays: its destruction would wait for the other ranks
            if not exists:
                distributed.destroy_process_group()
            _forget(before)


def had_group() -> bool:
    """Returns whether :func:`joined` has started a process group in this process."""
    return bool(_kept)


def _forget(before: dict[str, Optional[str]]) -> None:
    """Restores the environment variables in ``before`` and resets the state of the accelerate library, so that a later
    run in this process does not join this process group."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _start_group(launch: Launch) -> tuple[Any, str]:
    """Makes the default process group, and returns its store and the name of the launch.

    If torchrun restarts the processes, the restarted processes get a store with another prefix. The name of the launch
    is kept over restarts, in the store of torchrun's agent; the name is "" without an agent of torchrun.
    """
    if not torch.distributed.is_available():
        raise RunError(f"{launch.launcher} started {launch.world} processes, and this PyTorch has no torch.distributed")
    from torch.distributed import PrefixStore  # the import would fail in a PyTorch without torch.distributed
    from torch.distributed.rendezvous import rendezvous

    os.environ |= {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.world)}
    seconds, name = timedelta(seconds=wait_seconds()), ""
    if launch.world == 1:
        store = torch.distributed.HashStore()
    else:
        host, port = address(launch)
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        store, _, _ = next(rendezvous("env://", launch.rank, launch.world, timeout=seconds))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            name = store.compare_set("peft_ext/launch", "", secrets.token_hex(8)).decode()
        store = PrefixStore(_name_of_start(store, launch), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world, timeout=seconds
    )  # fmt: skip
    # The store is kept, because the next process group of this process finds rank 0's store at the same port.
    _kept.append(store)
    return store, name


def _name_of_start(store: Any, launch: Launch) -> str:
    """Returns a new name for this start, or restart, of the processes; all ranks get an equal name.

    When torchrun restarts the processes, torchrun's store still has the addresses of the ended processes (PyTorch
    2.13). Each rank except rank 0 therefore asks for the name of the start by a request in the store. Rank 0 draws the
    name and answers each request, also the requests of ended processes, until each other rank has confirmed that it has
    the name.
    """
    calls, seconds = f"peft_ext/calls/{launch.identity}/{launch.world}", timedelta(seconds=wait_seconds())
    if launch.rank > 0:
        me = secrets.token_hex(8)
        store.set(f"{calls}/{store.add(calls, 1)}", me)
        store.wait([f"{calls}/{me}"], seconds)
        name = store.get(f"{calls}/{me}").decode()
        store.add(f"{name}/confirmed", 1)
        return name
    name, answered, end = f"peft_ext/{secrets.token_hex(8)}", set(), time.monotonic() + wait_seconds()
    while (count := store.add(f"{name}/confirmed", 0)) < launch.world - 1:
        for number in set(range(1, store.add(calls, 0) + 1)) - answered:
            if store.check([f"{calls}/{number}"]):  # a process may take a number, and end before it writes its request
                store.set(f"{calls}/{store.get(f'{calls}/{number}').decode()}", name)
                answered.add(number)
        if time.monotonic() > end:
            raise RunError(f"only {count + 1} of {launch.world} processes have come within {wait_seconds():g} s")
        time.sleep(0.02)
    return name


def _of_group(launch: Launch, store: Any, name: str) -> Ranks:
    """Returns this process's :class:`Ranks` in the default process group.

    Sets the GPU of this process, and the variables LOCAL_RANK and LOCAL_WORLD_SIZE, which the accelerate library reads.
    If OMP_NUM_THREADS is not set, also sets OMP_NUM_THREADS and PyTorch's number of threads.
    """
    distributed = torch.distributed
    group = None
    if distributed.get_backend() != "gloo":
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=wait_seconds()))
    store = store or distributed.PrefixStore("peft_ext", distributed.distributed_c10d._get_default_store())
    ranks = Ranks(launch, store, group)
    host = socket.gethostname()
    node = os.environ.get("GROUP_RANK", host) if launch.launcher == "torchrun" else host
    found = ranks.gather((secrets.token_hex(8), node, host, launch.restarts))
    ranks._key, ranks._hosts, ranks.restarts = found[0][0], [one[2] for one in found], max(one[3] for one in found)
    ranks.identity, ranks.has_own_name = name or launch.identity, bool(name)
    nodes = [one[1] for one in found]
    there = [rank for rank, other in enumerate(nodes) if other == node]
    ranks.local_rank, ranks.local_world = there.index(launch.rank), len(there)
    order = list(dict.fromkeys(nodes))
    ranks.node, ranks.nodes, ranks._nodes = order.index(node), len(order), [order.index(other) for other in nodes]
    if torch.cuda.is_available():
        ranks.gpu = _gpu_of(ranks, node)
        torch.cuda.set_device(ranks.gpu)
    local = ranks.local_rank if ranks.gpu is None else ranks.gpu  # the accelerate library uses GPU number LOCAL_RANK
    os.environ |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(ranks.local_world)}
    if "OMP_NUM_THREADS" not in os.environ:  # the accelerate library would warn, and choose a number of threads
        threads = max(1, torch.get_num_threads() // ranks.local_world)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    return ranks


def _gpu_of(ranks: Ranks, node: str) -> int:
    """Returns the index of this process's GPU: the process's rank among the processes of its machine, or 0 where the
    process sees one GPU only.

    Raises RunError where two processes of a machine would share a GPU, or where a process would have no GPU.
    """
    count = torch.cuda.device_count()
    index = 0 if count == 1 else ranks.local_rank
    mine = (node, str(torch.cuda.get_device_properties(index).uuid)) if index < count else None
    found = ranks.gather(mine)

    def check() -> None:
        if mine is None:
            raise RunError(f"{ranks.local_world} processes on a machine that shows {count} GPUs")
        if found.index(mine) < ranks.rank:
            raise RunError(f"its GPU is that of rank {found.index(mine)}; start one process for each GPU")

    ranks.together(check)
    return index


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before
