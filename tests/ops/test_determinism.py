"""Tests that bits are equal over runs, processes and threads, and that no memory grows with steps or shapes."""

import ctypes
import functools
import json
import mmap
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
from faults import steps, trainings
from growth import WINDOWS, assert_flat
from op_db import CASES, Case
from op_params import TILES

from peft_ext import get_peft_model, quantize_nf4

pytestmark = [
    pytest.mark.cpu_only("it is about CPU threads and the C library's memory"),
    pytest.mark.filterwarnings("ignore"),  # PEFT warns about AdaLoRA's schedule
]
RUNS = 5
STEPS = int(os.environ.get("PEFT_EXT_TEST_STEPS", "2000"))  # steps of the search for leaks
SHAPES = int(os.environ.get("PEFT_EXT_TEST_SHAPES", "500"))

# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digests() -> list[dict[str, list[str]]]:
    """Returns, for two processes, the digests of each training."""
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tests / "support"), str(tests.parent)))}
    env |= {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }  # threads that spin while they wait would take seconds on a busy machine
    script = str(tests / "faults/trainings.py")
    started = [
        subprocess.Popen([sys.executable, script, str(runs)], stdout=subprocess.PIPE, text=True, env=env)
        for runs in (RUNS // 2, RUNS - RUNS // 2)
    ]
    outs = [process.communicate(timeout=800)[0] for process in started]
    assert not any(process.returncode for process in started)
    return [json.loads(out.splitlines()[-1]) for out in outs]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method, base", trainings.CASES, ids=map("-".join, trainings.CASES))
def test_a_training_has_the_same_bits_in_each_run_and_process(
    digests: list[dict[str, list[str]]], method: str, base: str, threads: int
) -> None:
    found = [digest for process in digests for digest in process[f"{threads} {method} {base}"]]
    assert len(found) == RUNS and len(set(found)) == 1


@pytest.mark.slow
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread of a pool would have its own arena of malloc
    yield
    torch.set_num_threads(before)


def test_steps_of_every_operator_leave_nothing_behind(one_thread: None) -> None:
    shape = ((5,), 64, 40, 4)
    made = [
        (case, dtype, case.make(dtype, case.fit(shape))) for case in CASES for dtype in (torch.float32, torch.bfloat16)
    ]

    def step(index: int) -> None:
        case, dtype, sample = made[index % len(made)]
        run(case.call, sample, None if case.exact else output_grad(case, dtype, case.fit(shape)))

    assert_flat(step, max(1, STEPS // WINDOWS // len(made)) * len(made), 3 * len(made))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_steps_of_a_training_leave_nothing_behind(one_thread: None, base: str) -> None:
    trained = [trainings.train(trainings.adapted(method, base), sys.maxsize) for method in ("LoRA", "DoRA", "IA3")]
    assert_flat(lambda index: next(trained[index % 3]) and None, 3 * max(8, STEPS // WINDOWS // 24), 60)


@pytest.fixture
def planted() -> Iterator[dict[str, Callable[[int], object]]]:
    """Yields functions that leak memory in each step, by the kind of memory; frees the memory at the end."""
    libc, kept, blocks = ctypes.CDLL(None), [], []
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    yield {
        "malloc": lambda index: blocks.append(libc.malloc(64)),  # 64 bytes, smaller than the data of any tensor
        "resident": lambda index: kept.append(_touched(mmap.mmap(-1, mmap.PAGESIZE))),
        "tensors": lambda index: kept.append(torch.zeros(1)),
        "objects": lambda index: kept.append({"step": [index]}),
    }
    for block in blocks:
        libc.free(block)


def _touched(pages: mmap.mmap) -> mmap.mmap:
    pages[0] = 1
    return pages


@pytest.mark.slow
@pytest.mark.parametrize("what", ["malloc", "resident", "tensors", "objects"])
def test_a_leak_is_found(one_thread: None, planted: dict[str, Callable[[int], object]], what: str) -> None:
    leaking = planted[what]

    def step(index: int) -> None:
        steps.step(index % 4)
        leaking(index)

    with pytest.raises(AssertionError, match=f"a step leaves .*: .*{what}"):
        assert_flat(step, 24, 60)


def test_what_is_allocated_once_is_no_leak(one_thread: None) -> None:
    kept = []

    def step(index: int) -> None:
        steps.step(index % 4)
        if index in (70, 71, 200):
            kept.append([bytes(37_000), torch.zeros(1 << 18), *map(str, range(2000))])

    assert_flat(step, 24, 60)
    assert len(kept) == 3


def containers() -> Iterator[tuple[str, int]]:
    """Yields the name and the size of each dict, list, set and cache in a module or class of peft_ext."""
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
    """Returns a case of each operator, and a case with an NF4 weight for each operator that accepts one."""
    found: dict[str, Case] = {}
    for case in CASES:
        found.setdefault(case.op if "nf4" not in case.name and "nested" not in case.name else f"{case.op} nf4", case)
    return found


@pytest.mark.slow
def test_changing_shapes_leave_nothing_behind(one_thread: None) -> None:
    cases = list(one_of_each_op().values())

    def step(index: int) -> None:
        tokens, k, n, r = 1 + index % 67, 1 + (13 * index) % 131, 1 + (29 * index) % 127, 1 + index % 17
        shape = ((tokens,), k, n, r)
        for case in cases:
            # In float32: for other dtypes PyTorch's products cache a kernel for each shape.
            run(case.call, case.make(torch.float32, shape),
                None if case.exact else output_grad(case, torch.float32, shape))  # fmt: skip

    for index in range(10):
        step(index)
    sizes = dict(containers())
    assert len(sizes) > 20
    assert_flat(step, max(24, SHAPES // WINDOWS), 100)
    assert dict(containers()) == sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(one_of_each_op()))
def test_changing_shapes_compile_once_more_and_no_more(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    case = one_of_each_op()[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.call, fullgraph=True, backend=counter)
    for tokens in (9, 12, 17, 31, 64, 65, 100):
        # The adapters of a mixed batch are constants of a graph, so the number of samples does not change.
        shape = ((4, tokens) if case.op == "grouped_lora" else (tokens,), 64, 96, 16)
        sample = case.make(torch.float32, shape)
        run(compiled, sample, None if case.exact else output_grad(case, torch.float32, shape))
    torch._dynamo.reset()
    assert counter.frame_count <= 2  # a graph for one size, then a graph for any size
