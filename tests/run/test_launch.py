"""Tests which launcher's variables make a process a rank, and the exchanges and checks of the ranks."""

import json
import os
import re
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peft_ext.files import seal
from peft_ext.run import Options, RunError, checkpoints, ranks
from peft_ext.run.errors import Elsewhere, Stop
from peft_ext.run.launch import ALONE, Launch, address, check_settings, read_launch, without_settings

pytestmark = pytest.mark.cpu_only("no tensor is computed")

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
    "MASTER_PORT": "4567", "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04,9],big1",
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "8",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch("RANK and WORLD_SIZE")),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, Launch("torchrun", 0, 1, 1, 2, "job", 2)),
        ({"WORLD_SIZE": "1"}, ALONE),
        (BATCH_SCRIPT, ALONE),
        (TORCHRUN, Launch("torchrun", 3, 8, 1, 2, "job", 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Launch("RANK and WORLD_SIZE", 1, 2)),
        (OPEN_MPI, Launch("mpirun (Open MPI)", 1, 4, 1, 4)),
        (MPICH, Launch("mpirun (MPICH)", 1, 4, 1, 2)),
        (SRUN, Launch("srun", 5, 8, 1, identity="123456.2")),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, Launch("srun", 5, 8, 1, identity="123456.2")),
        ({**SRUN, "WORLD_SIZE": "8"}, Launch("srun", 5, 8, 1, identity="123456.2")),
        ({**SRUN, **MPICH, "SLURM_STEP_NUM_TASKS": "2"}, Launch("mpirun (MPICH)", 1, 4, 1, 2)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", **OPEN_MPI}, Launch("mpirun (Open MPI)", 1, 4, 1, 4)),
        ({**BATCH_SCRIPT, **TORCHRUN}, Launch("torchrun", 3, 8, 1, 2, "job", 2)),
    ],
)  # fmt: skip
def test_the_launch(environment, wanted):
    assert read_launch(environment) == wanted


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, wanted less than WORLD_SIZE, which is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', wanted a count"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', wanted a count"),
    ],
)
def test_wrong_variables(environment, message):
    with pytest.raises(RunError, match=f"^{message}"):
        read_launch(environment)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        (TORCHRUN, ("node1", 4567)),
        (SRUN, ("gpu03", 20000 + (123456 + 2 * 7919) % 20000)),
        ({**SRUN, "SLURM_STEP_NODELIST": "n7"}, ("n7", 20000 + (123456 + 2 * 7919) % 20000)),
        ({**SRUN, "SLURM_STEP_NODELIST": "rack[1-2]-x,n7"}, ("rack1-x", 20000 + (123456 + 2 * 7919) % 20000)),
        ({**SRUN, "SLURM_STEP_NODELIST": "a1,a2", "MASTER_PORT": "99"}, ("a1", 99)),
        (OPEN_MPI, ("127.0.0.1", 29500)),
        ({**MPICH, "MASTER_ADDR": "head"}, ("head", 29500)),
    ],
)
def test_the_address_of_rank_0(environment, wanted):
    assert address(read_launch(environment), environment) == wanted


def test_an_unknown_address_is_asked_for():
    with pytest.raises(RunError, match=r"^mpirun \(MPICH\) over several machines: set MASTER_ADDR"):
        address(read_launch(MPICH), MPICH)


# What `accelerate launch` sets for a configuration without an engine of its own.
ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "False",
}  # fmt: skip


def test_a_configuration_of_accelerate_that_changes_nothing():
    for plain in ({}, ACCELERATE, {**ACCELERATE, "ACCELERATE_USE_FSDP": "false"}):
        assert check_settings(True, plain) == ""
    assert check_settings(False, {**ACCELERATE, "ACCELERATE_USE_CPU": "True"}) == ""
    note = check_settings(True, {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert note == "mixed_precision bf16 of accelerate's configuration has no effect: --dtype decides"


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("ACCELERATE_USE_FSDP", "true", "a configuration without FSDP: --shard fsdp2 and hsdp shard a base"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "a configuration without DeepSpeed: --shard fsdp2 and hsdp shard "),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "a configuration without Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a configuration without parallelism: --shard "),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "no or bf16: --dtype has no other"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "no or bf16: --dtype has no other"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "no: the command does not compile the model"),
        ("ACCELERATE_USE_CPU", "True", "false: an empty CUDA_VISIBLE_DEVICES makes a run use the CPU"),
    ],
)
def test_what_a_run_does_not_take_from_accelerate_is_refused_by_name(name, value, wanted):
    with pytest.raises(RunError) as error:
        check_settings(True, {**ACCELERATE, name: value})
    assert str(error.value).startswith(f"accelerate's configuration: {name} is {value}, wanted {wanted}")


def test_accelerates_variables_are_hidden_and_set_again(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**ACCELERATE, "FSDP_VERSION": "2", "ACCELERATE_CPU_AFFINITY": "1"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with pytest.raises(KeyError), without_settings():
        assert [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP"))] == ["ACCELERATE_CPU_AFFINITY"]
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "fp16"}  # as accelerate does
        raise KeyError
    assert dict(os.environ) == before


def test_a_process_alone_exchanges_with_itself(tmp_path: Path):
    alone = ranks.Ranks()
    assert alone.speaks and alone.gather(3) == [3] and alone.largest(2, 5) == [2, 5]
    assert list(alone.mine(3)) == [0, 1, 2] and alone.merged({2: "b", 0: "a"}) == {0: "a", 2: "b"}
    assert alone.together(lambda: 4) == 4 and alone.first_of_node(lambda: 5) == 5
    alone.check_alike({"a": 1})
    alone.check_shared(tmp_path)
    with pytest.raises(RunError, match="^no$"), alone.reported(Stop(), str):
        alone.together(lambda: (_ for _ in ()).throw(RunError("no")))


SECONDS = 300  # a thread that waits longer for another thread is an error


class Threads:
    """Ranks whose exchanges run between threads of this process."""

    def __init__(self, world: int) -> None:
        self.barrier, self.values = threading.Barrier(world), [None] * world
        self.ranks = [ranks.Ranks(Launch("threads", rank, world)) for rank in range(world)]
        for each in self.ranks:
            each.gather = lambda value, rank=each.rank: self.gather(rank, value)
            each._hosts = [f"host{rank}" for rank in range(world)]

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait(SECONDS)
        found = list(self.values)
        self.barrier.wait(SECONDS)
        return found

    def run(self, work):
        """Returns what ``work(ranks)`` returned or raised, for each rank."""
        found = [None] * len(self.ranks)

        def one(each):
            try:
                found[each.rank] = work(each)
            except Exception as error:
                found[each.rank] = error

        threads = [threading.Thread(target=one, args=(each,)) for each in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_the_lowest_failed_rank_raises_its_error_and_the_others_raise_elsewhere():
    def work(each):
        def fails():
            if each.rank:
                raise RunError(f"no room on {each.rank}")
            return "fine"

        return each.together(fails)

    first, second, third = Threads(3).run(work)
    assert type(first) is type(third) is Elsewhere and str(first) == str(third) == "no room on 1"
    assert type(second) is RunError and str(second) == "no room on 1" and not second.of_all_ranks
    same = Threads(2).run(lambda each: each.together(lambda: 1 // 0))
    assert type(same[0]) is ZeroDivisionError and same[0].of_all_ranks and type(same[1]) is Elsewhere


@pytest.mark.parametrize(
    ("waiting", "named"),
    [((0, 2), "rank 1"), ((1, 2), "rank 0"), ((0,), "rank 1 or rank 2"), ((0, 1, 2), "rank . or rank .")],
)
def test_a_late_exchange_names_the_ranks_that_wait_in_no_exchange(waiting, named, monkeypatch: pytest.MonkeyPatch):
    """All ranks are alive and have come to the same step. The ranks ``waiting`` wait for another rank's gradients.

    In place of the time _SETTLE, a rank waits until all ranks of ``waiting`` have written that they waited.
    """
    monkeypatch.setattr(ranks, "_SETTLE", 0.001)
    store = torch.distributed.HashStore()
    several = Threads(3)

    def told_after_all(each):
        told, keys = each._told, [f"{each._key}/waited/{rank}" for rank in waiting]

        def wait(seconds=0.0):
            if seconds:
                store.wait(keys, timedelta(seconds=SECONDS))
            return told()

        return wait

    for each in several.ranks:
        each._store, each._gone = store, list
        each._told = told_after_all(each)
        each.at("step 5")

    def work(each):
        if each.rank in waiting:
            with each.reported(Stop(), lambda: "; go on"):
                raise RuntimeError("Timed out waiting 8000ms for recv operation to complete")

    found = [error for error in several.run(work) if error is not None]
    (said,) = [str(error) for error in found if type(error) is RunError]
    assert re.fullmatch(f"{named} has come no further than step 5 within 1800 s; go on", said), said
    assert sum(type(error) is Elsewhere for error in found) == len(waiting) - 1


def test_the_ranks_share_the_work_without_overlap():
    shares = [list(each.mine(7)) for each in Threads(3).ranks]
    assert sorted(index for share in shares for index in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) == 1
    found = Threads(3).run(lambda each: each.merged({index: f"item {index}" for index in each.mine(7)}))
    assert found == [{index: f"item {index}" for index in range(7)}] * 3


def test_a_signal_to_one_process_reaches_all_processes():
    """The ranks exchange the number of the signal over gloo."""
    store, several = torch.distributed.HashStore(), Threads(2)

    def work(each):
        each._group = torch.distributed.ProcessGroupGloo(store, each.rank, 2, timedelta(seconds=SECONDS))
        return each.largest(15 * each.rank, 0), each.largest(0, 1 - each.rank)

    assert several.run(work) == [([15, 0], [0, 1])] * 2


def test_each_start_of_the_processes_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """torchrun's store stays as it is when torchrun restarts the processes."""
    monkeypatch.setenv("PEFT_EXT_RANK_SECONDS", "10")
    store = torch.distributed.HashStore()
    starts = [Threads(3).run(lambda each: ranks._name_of_start(store, each.launch)) for _ in range(2)]
    names = [set(start) for start in starts]
    assert [len(each) for each in names] == [1, 1] and names[0] != names[1]


def test_a_difference_names_the_fact_and_both_values():
    def work(each):
        return each.check_alike({"torch": "2.13" if each.rank < 2 else "2.12", "--lr": 1e-4})

    first, second, third = Threads(3).run(work)
    assert type(first) is type(second) is Elsewhere
    assert str(third) == "torch is 2.12, on rank 0 it is 2.13"
    assert Threads(3).run(lambda each: each.check_alike({"torch": "2.13"})) == [None] * 3


def test_the_processes_compare_tokens_and_labels():
    from peft_ext.run.data import Examples

    row = {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    others = [{**row, "input_ids": [3, 4, 6]}, {**row, "labels": [-100, -100, 5]}]
    digests = [Examples([each], [row]).digest for each in (row, *others)] + [Examples([row], [others[0]]).digest]
    assert len(set(digests)) == 4 and digests[0] == Examples([dict(row)], [dict(row)]).digest


def test_the_processes_compare_the_versions_of_packages(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("peft")
    from peft_ext.run import prepare

    options = Options(model=str(tiny / "model"), data=str(tiny / "pairs.jsonl"), output=tmp_path / "run", block_size=64)
    run = prepare.prepare(options)
    found = []
    for version in ("2.12", "2.13"):
        monkeypatch.setattr(prepare, "versions", lambda version=version: {"torch": version})
        found.append(prepare.facts_of(run))
    assert dict(found[0].items() - found[1].items()) == {"torch": "2.12"}


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_named(tmp_path: Path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    first, second = Threads(2).run(lambda each: each.check_shared(tmp_path / str(each.rank)))
    assert type(first) is Elsewhere and "rank 0 writes into another folder of this name" in str(second)
    assert Threads(2).run(lambda each: each.check_shared(tmp_path / "0")) == [None, None]
    assert list((tmp_path / "0").iterdir()) == []


@pytest.mark.parametrize("value", ["0", "-3", "soon", "nan"])
def test_the_time_limit_is_checked(value, monkeypatch):
    monkeypatch.setenv("PEFT_EXT_RANK_SECONDS", value)
    with pytest.raises(RunError, match=f"^PEFT_EXT_RANK_SECONDS is '{value}', wanted a positive number of seconds"):
        ranks.wait_seconds()


def test_the_order_does_not_depend_on_how_a_step_is_shared():
    from peft_ext.run.data import Order

    order = list(Order(5, 13, 3))
    assert len(Order(5, 13, 3)) == len(order) == 13 and order == list(Order(5, 13, 3))
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    assert order != list(Order(5, 13, 4)) and list(Order(5, 20, 3))[:13] == order
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(Order(5, 13, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_a_restart_goes_on_with_its_own_run_alone(tmp_path: Path):
    def chosen(launch: str = "job", restarts: int = 1, finished: bool = False, **options) -> tuple[bool, bool]:
        record = {"processes": {"launch": launch}, "finished": finished}
        (tmp_path / "run.json").write_text(json.dumps(record))
        here = ranks.Ranks(Launch("torchrun", 0, 1, 0, 1, "job", restarts))
        found = checkpoints.after_restart(Options(output=tmp_path, **options), here)
        return found.resume, found.overwrite

    asked = {"overwrite": True}
    assert chosen() == chosen(**asked) == (False, True)  # Without a checkpoint, the run begins anew.
    assert chosen(resume=True) == (True, False)  # The missing checkpoint is an error later, as without a restart.
    checkpoint = tmp_path / "checkpoints/checkpoint-4"
    checkpoint.mkdir(parents=True)
    assert chosen() == (False, True)  # the checkpoint is not whole
    (checkpoint / "trainer_state.json").write_text("{}")
    seal(checkpoint)
    assert chosen() == chosen(**asked) == chosen(resume=True) == (True, False)
    assert chosen(method="adalora") == (False, True)
    assert chosen(finished=True) == (True, False)  # a process ended after the run had finished
    for other in ({"launch": "another"}, {"restarts": 0}, {"finished": True, "restarts": 0}):
        assert chosen(**other) == (False, False) and chosen(**other, **asked) == (False, True)
    with pytest.raises(RunError, match="^--method none: unknown method"):
        chosen(method="none")


def test_a_signal_that_comes_during_the_exchange_of_a_step_stops_after_the_next(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    stop, here = Stop(), ranks.Ranks()
    saver = checkpoints.saving_callback(stop, here)
    state, control = SimpleNamespace(global_step=1), SimpleNamespace(should_save=False, should_training_stop=False)

    def largest(*values):
        stop.signal = 15  # as if the signal's handler ran during the call of `largest`
        return list(values)

    monkeypatch.setattr(here, "largest", largest)
    saver.on_step_end(None, state, control)
    assert stop.signal == 15 and not control.should_training_stop
    saver.on_step_end(None, state, control)
    assert control.should_training_stop and control.should_save


def test_the_end_of_a_run_waits_for_the_last_sign_of_life(monkeypatch: pytest.MonkeyPatch):
    """Python aborts a process that ends while another thread is in a call of PyTorch's store."""
    within, done = threading.Event(), []

    class SlowStore:
        def add(self, _key, _value):
            within.set()
            threading.Event().wait(0.3)
            done.append(True)

    monkeypatch.setattr(ranks, "_BEAT", 0.01)
    here = ranks.Ranks(store=SlowStore())
    here.start_beats()
    assert within.wait(SECONDS)
    here.end_beats()
    assert done and not any(thread.name == "peft_ext signs of life" for thread in threading.enumerate())
