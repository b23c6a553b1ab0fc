"""The same bits again: over runs, processes and threads; and nothing that grows with steps or with shapes."""

import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from battery import output_grad, run
from faults import trainings
from op_db import CASES, Case
from test_ops import TILES

from peft_ext import get_peft_model, quantize_nf4

pytestmark = [
    pytest.mark.cpu_only("it is about CPU threads and the C library's memory"),
    pytest.mark.filterwarnings("ignore"),  # PEFT's, on AdaLoRA's schedule
]
RUNS = 5
STEPS = int(os.environ.get("PEFT_EXT_TEST_STEPS", "2000"))  # of the search for leaks
SHAPES = int(os.environ.get("PEFT_EXT_TEST_SHAPES", "500"))

# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digests() -> list[dict[str, list[str]]]:
    """Of two processes, each training's digests."""
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent)))}
    env |= {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }  # on a machine with other work, spinning takes seconds
    script = str(tests / "faults/trainings.py")
    started = [
        subprocess.Popen([sys.executable, script, str(runs)], stdout=subprocess.PIPE, text=True, env=env)
        for runs in (RUNS // 2, RUNS - RUNS // 2)
    ]
    outs = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started)
    return [json.loads(out.splitlines()[-1]) for out in outs]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method, base", trainings.CASES, ids=map("-".join, trainings.CASES))
def test_a_training_has_the_same_bits_in_each_run_and_process(
    digests: list[dict[str, list[str]]], method: str, base: str, threads: int
) -> None:
    found = [digest for process in digests for digest in process[f"{threads} {method} {base}"]]
    assert len(found) == RUNS and len(set(found)) == 1


def test_another_training_has_other_bits(digests: list[dict[str, list[str]]]) -> None:
    assert len({found[0] for name, found in digests[0].items() if name.startswith("1 ")}) == len(trainings.CASES)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "AdaLoRA", "IA3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_adapted_layers_train_to_the_same_bits_on_one_and_two_threads(
    method: str, dtype: torch.dtype, nf4: bool
) -> None:
    if not TILES:
        pytest.skip("without tiles a dense product is PyTorch's, whose bits may depend on its threads")
    if method == "IA3":
        config = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    else:
        options = {"target_modules": ["0", "1"], "lora_dropout": 0.1}
        kind = peft.AdaLoraConfig if method == "AdaLoRA" else peft.LoraConfig
        options |= {"init_r": 4, "total_step": 9} if method == "AdaLoRA" else {"r": 4, "use_dora": method == "DoRA"}
        config = kind(**options)

    def parameters(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(192, 320), nn.Linear(320, 192)).to(dtype)
        if nf4:
            quantize_nf4(base, progress=False)
        model = get_peft_model(base, config).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-2)
        x, grad = torch.randn(2, 2, 150, 192, dtype=dtype)
        for _ in range(3):
            y = model(x)
            y.backward(grad)
            optimizer.step()
            optimizer.zero_grad()
        return [y.detach(), *(p.detach() for p in trained)]

    before = torch.get_num_threads()
    try:
        one, two = parameters(1), parameters(2)
    finally:
        torch.set_num_threads(before)
    assert all(tensor.isfinite().all() for tensor in one)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("method, base", trainings.CASES, ids=map("-".join, trainings.CASES))
def test_checkpointing_trains_to_the_same_bits(method: str, base: str, reentrant: bool) -> None:
    plain = list(trainings.train(trainings.adapted(method, base), 2))
    model = trainings.adapted(method, base)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = list(trainings.train(model, 2))
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


# --- nothing grows ----------------------------------------------------------------------------------------------------


class Allocated(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                 "keepcost")]  # fmt: skip


def memory() -> tuple[int, int]:
    """Bytes that malloc has given out, and that are resident once it has returned what is free."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library does not tell what it has given out")
    libc.mallinfo2.restype = Allocated
    libc.malloc_trim(0)
    given = libc.mallinfo2()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return given.uordblks + given.hblkhd, resident


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def assert_flat(step: Callable[[int], None], count: int, warm: int) -> None:
    """After ``warm`` steps, the others leave nothing: no tensor, 4 bytes a step at most, and 1% of resident memory."""
    for index in range(warm):
        step(index)
    held, (given, resident) = tensors(), memory()
    for index in range(warm, count):
        step(index)
    left, (given_after, resident_after) = tensors(), memory()
    print(f"{count - warm} steps: {given_after - given:+} bytes given out, {resident_after - resident:+} resident")
    assert left <= held
    assert given_after - given < 4 * (count - warm) + 4_096
    assert resident_after < 1.01 * resident


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread of a pool has an arena of its own
    yield
    torch.set_num_threads(before)


def assert_operators_are_flat(cases: list[Case], count: int) -> None:
    shape = ((5,), 64, 40, 4)
    made = [(case, dtype, case.make(dtype, shape)) for case in cases for dtype in (torch.float32, torch.bfloat16)]

    def step(index: int) -> None:
        case, dtype, sample = made[index % len(made)]
        run(case.call, sample, None if case.exact else output_grad(case, dtype, shape))

    warm = 2 * len(made)
    assert_flat(step, warm + (count - warm) // len(made) * len(made), warm)


def test_steps_of_every_operator_leave_nothing_behind(one_thread: None) -> None:
    assert_operators_are_flat(list(CASES), STEPS)


@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_steps_of_a_training_leave_nothing_behind(one_thread: None, base: str) -> None:
    losses = [trainings.train(trainings.adapted(method, base), STEPS) for method in ("LoRA", "DoRA", "IA3")]
    assert_flat(lambda index: next(losses[index % 3]) and None, max(150, STEPS // 16), 60)


def containers() -> Iterator[tuple[str, int]]:
    """Name and size of every dict, list, set and cache that a module of peft_ext, or a class in it, holds."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "peft_ext" or not isinstance(module, types.ModuleType):
            continue
        places = [(module_name, vars(module))]
        places += [(f"{module_name}.{name}", vars(value)) for name, value in vars(module).items()
                   if isinstance(value, type) and value.__module__ == module_name]  # fmt: skip
        for place, names in places:
            for name, value in list(names.items()):
                if isinstance(value, functools._lru_cache_wrapper):
                    yield f"{place}.{name}", value.cache_info().currsize
                elif isinstance(value, (dict, list, set, WeakKeyDictionary, WeakValueDictionary, WeakSet)):
                    yield f"{place}.{name}", len(value)


def one_of_each_op() -> dict[str, Case]:
    """A case of each operator, and one over an NF4 weight where it takes one."""
    found: dict[str, Case] = {}
    for case in CASES:
        found.setdefault(case.op if "nf4" not in case.name and "nested" not in case.name else f"{case.op} nf4", case)
    return found


def test_changing_shapes_leave_nothing_behind(one_thread: None) -> None:
    cases = list(one_of_each_op().values())

    def step(index: int) -> None:
        tokens, k, n, r = 1 + index % 67, 1 + (13 * index) % 131, 1 + (29 * index) % 127, 1 + index % 17
        shape = ((tokens,), k, n, r)
        for case in cases:
            # float32: of other types PyTorch's own products keep a kernel for each shape.
            run(case.call, case.make(torch.float32, shape),
                None if case.exact else output_grad(case, torch.float32, shape))  # fmt: skip

    for index in range(10):
        step(index)
    sizes = dict(containers())
    assert len(sizes) > 20
    assert_flat(step, SHAPES, SHAPES // 5)
    assert dict(containers()) == sizes


@pytest.mark.parametrize("name", sorted(one_of_each_op()))
def test_changing_shapes_compile_once_more_and_no_more(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    case = one_of_each_op()[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, fullgraph=True, backend=counter)
    for tokens in (9, 12, 17, 31, 64, 65, 100):
        # The adapters of a batch are constants of a graph, one for each sample: the samples stay as many.
        shape = ((4, tokens) if case.op == "grouped_lora" else (tokens,), 64, 96, 16)
        sample = case.make(torch.float32, shape)
        run(compiled, sample, None if case.exact else output_grad(case, torch.float32, shape))
    torch._dynamo.reset()
    assert counter.frame_count <= 2  # of one size, then of any
