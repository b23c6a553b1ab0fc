"""Finds the launcher that started this process by environment variables: torchrun, accelerate launch, srun or mpirun.

A process of torchrun and of ``accelerate launch`` finds its rank and the number of processes in ``RANK`` and
``WORLD_SIZE``. Processes of srun, of Open MPI's mpirun and of MPICH's mpirun have variables of other names.

``accelerate launch`` passes its configuration on in further variables, which the accelerate library reads. Only the
options of a run decide what the run does, so the training hides the variables of the configuration from the accelerate
library. A configuration of ``accelerate launch`` that asks for something that a run does not do is an error.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Optional

from .errors import RunError

# For each launcher: the variables that hold the rank, the number of processes, the rank on the machine and the number
# of processes on the machine. The first launcher whose first two variables are set has started the process, except
# where srun sets MPICH's variables too (see ``read_launch``). A batch script of Slurm has SLURM_NTASKS and SLURM_PROCID
# too, so srun is known by SLURM_STEP_NUM_TASKS, which only a job step has. mpirun inside of a Slurm job has the
# variables of a job step too, so srun comes last.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun (Open MPI)": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    "mpirun (MPICH)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
}  # fmt: skip
_PORT = 29500  # port of rank 0 where neither MASTER_PORT nor Slurm gives one: the default of torchrun

# For each variable of accelerate launch's configuration: the engine that the configuration asks for if the variable is
# true, and, if a run has any, the options of a run in place of the engine. A run takes no engine from the
# configuration.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP: --shard fsdp2 and hsdp shard a base",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: --shard fsdp2 and hsdp shard a base",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism: --shard fsdp2 and hsdp shard a base",
}
_TRUE = ("y", "yes", "t", "true", "on", "1")  # the values that the accelerate library reads as true
# Variables of the accelerate library that a run does not hide from the library, because they change no result of a run.
_KEPT = ("ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment variables say about this process of a run: its rank, the number of processes and
    so on.

    Attributes:
        launcher: name of the launcher; "" for a process that no launcher started.
        rank, world: rank of this process, and number of processes of the launch.
        local_rank, local_world: rank among the processes of the machine, and their number; None where the launcher does
            not tell.
        identity: the launch's name, equal in all processes and after a restart by torchrun: the argument of --rdzv-id,
            Slurm's job and step, or Open MPI's namespace; "" without a name.
        restarts: how often torchrun has started the processes again.
    """

    launcher: str = ""
    rank: int = 0
    world: int = 1
    local_rank: Optional[int] = None
    local_world: Optional[int] = None
    identity: str = ""
    restarts: int = 0


ALONE = Launch()  # a process that no launcher started


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns the launch that the environment variables describe; ``ALONE`` where no launcher has set its variables.

    Raises RunError where WORLD_SIZE is above 1 and no launcher has set a rank, where a value is no count, and where the
    rank is not less than the number of processes.
    """
    launchers = {name: names for name, names in _LAUNCHERS.items() if set(names[:2]) <= environment.keys()}
    if "srun" in launchers and "mpirun (MPICH)" in launchers:  # srun may set MPICH's variables too
        keys = (("SLURM_PROCID", "PMI_RANK"), ("SLURM_STEP_NUM_TASKS", "PMI_SIZE"))
        same = all(environment[one] == environment[other] for one, other in keys)
        launchers.pop("mpirun (MPICH)" if same else "srun")
    if not launchers and _count(environment, "WORLD_SIZE", 1) > 1:
        raise RunError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but RANK is not set: a launcher sets both variables"
        )
    if not launchers:
        return ALONE
    launcher, names = next(iter(launchers.items()))
    rank, world = (_count(environment, name, 0) for name in names[:2])
    if rank >= max(world, 1):
        raise RunError(f"{names[0]} is {rank}, wanted less than {names[1]}, which is {world}")
    local = [_count(environment, name, 0) if name in environment else None for name in names[2:]]
    identity = environment.get("TORCHELASTIC_RUN_ID", "")
    if launcher == "srun":
        identity = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    elif launcher != "torchrun":
        identity = environment.get("PMIX_NAMESPACE", "")
    elif "TORCHELASTIC_RUN_ID" not in environment:
        launcher = "RANK and WORLD_SIZE"
    restarts = _count(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    return Launch(launcher, rank, max(world, 1), local[0], local[1], identity, restarts)


def check_settings(has_gpu: bool, environment: Mapping[str, str] = os.environ) -> str:
    """Returns a line for the log where the configuration of ``accelerate launch`` asks for bf16, which has no effect;
    else "".

    Raises RunError where the configuration asks for an engine such as DeepSpeed, for a mixed precision other than bf16,
    for a compiler, or for the CPU on a machine with a GPU.
    """

    def asks(name: str, default: str = "no") -> str:
        return environment.get(name, default).strip().lower()

    def refuse(name: str, wanted: str) -> None:
        raise RunError(f"accelerate's configuration: {name} is {environment[name]}, wanted {wanted}")

    for name, engine in _ENGINES.items():
        if asks(name) in _TRUE:
            refuse(name, f"a configuration without {engine}")
    if (precision := asks("ACCELERATE_MIXED_PRECISION")) not in ("", "no", "bf16"):
        refuse("ACCELERATE_MIXED_PRECISION", "no or bf16: --dtype has no other")
    if asks("ACCELERATE_DYNAMO_BACKEND") not in ("", "no"):
        refuse("ACCELERATE_DYNAMO_BACKEND", "no: the command does not compile the model")
    if has_gpu and asks("ACCELERATE_USE_CPU") in _TRUE:
        refuse("ACCELERATE_USE_CPU", "false: an empty CUDA_VISIBLE_DEVICES makes a run use the CPU")
    if precision == "bf16":
        return "mixed_precision bf16 of accelerate's configuration has no effect: --dtype decides"
    return ""


@contextlib.contextmanager
def without_settings() -> Iterator[None]:
    """Hides the environment variables of the accelerate library, except _KEPT, from the block, and restores the
    variables after the block.

    ``accelerate launch`` passes its configuration in environment variables of the accelerate library, and Trainer and
    the accelerate library set some of these variables too.
    """

    def take() -> dict[str, str]:
        names = [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]
        return {name: os.environ.pop(name) for name in names if name not in _KEPT}

    before = take()
    try:
        yield
    finally:
        take()
        os.environ.update(before)


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    if not re.fullmatch(r"\d+", value.strip()):
        raise RunError(f"{name} is {value!r}, wanted a count, which the launcher of several processes sets")
    return int(value)


def address(launch: Launch, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Returns host and port at which rank 0 waits for the other ranks.

    MASTER_ADDR and MASTER_PORT give host and port. Without MASTER_ADDR, the host is the first host of the job step if
    srun is the launcher, or this machine if all processes run on this machine. Without MASTER_PORT, the port is
    computed from the numbers of Slurm's job and step (20000 to 39999) if srun is the launcher, else the port is 29500.
    Raises RunError where the host is unknown, and where MASTER_PORT is no count.
    """
    host = environment.get("MASTER_ADDR", "")
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if not host and launch.launcher == "srun" and nodes:
        host = _first_host(nodes)
    elif not host and launch.local_world == launch.world:
        host = "127.0.0.1"
    if not host:
        raise RunError(f"{launch.launcher} over several machines: set MASTER_ADDR to the host of rank 0")
    job, _, step = launch.identity.partition(".")
    port = _PORT
    if launch.launcher == "srun" and job.isdigit():
        port = 20000 + (int(job) + 7919 * int(step if step.isdigit() else 0)) % 20000
    return host, _count(environment, "MASTER_PORT", port)


def _first_host(nodes: str) -> str:
    """Returns the first host of Slurm's list of hosts: "gpu03" for "gpu[03-05,9],big1", "big1" for "big1,big2"."""
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "" if first is None else "".join(part or "" for part in first.groups())
