"""Tests of the CUDA emulator: planted faults are found, correct kernels are accepted, instructions behave as in PTX.

The CUDA operators must also run under the emulator.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from peft_ext.ops import prove
from peft_ext.reference import nf4 as reference
from peft_ext.weights.nf4 import BLOCKSIZES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
emulated_cuda = pytest.importorskip("emulated_cuda", reason="tools/ is not here: not a checkout")
if reason := emulated_cuda.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated_cuda.build("emulator_tests", [ROOT / "tests/native/emulator/kernels.cu"])))


@pytest.fixture
def run(library):
    """Launches a kernel of tests/native/emulator/kernels.cu, and returns a copy of ``out`` after the launch."""

    def launch(name, words, out=(), grid=(2, 1, 1), threads=64, dynamic_shared=0, scratch=False) -> list[int]:
        memory = torch.zeros(4, 256, dtype=torch.int64)
        memory[0] = torch.tensor(words)
        memory[2, : len(out)] = torch.tensor(out)
        memory = memory.to(torch.int32)  # in and out are rows 0 and 2; no tensor owns the row between them
        message = ctypes.create_string_buffer(2048)
        failed = library.run_kernel(
            name.encode(), (ctypes.c_int64 * 3)(*grid), threads, ctypes.c_int64(dynamic_shared),
            ctypes.c_void_p(memory[0].data_ptr()), ctypes.c_void_p(memory[2].data_ptr()), int(scratch), message, 2048,
        )  # fmt: skip
        if failed:
            raise RuntimeError(message.value.decode())
        return [word & 0xFFFFFFFF for word in memory[2].tolist()]

    return launch


WORDS = [(i * 2654435761 + 12345) % 2**32 for i in range(256)]
SMALL = list(range(256))

# Kernel, expected message, and the block and thread that the message names. For a fault of many threads, the message
# names the first thread with the fault; for a barrier that some threads never reach, the first thread that waits.
FAULTS = [
    ("read_past_end", "reads 4 bytes out of bounds of global memory; the nearest is byte 1024 of a", 1, 37),
    ("write_before_begin", "writes 4 bytes out of bounds of global memory; the nearest is byte -4 of", 1, 37),
    ("write_input", "writes 4 bytes of global memory that is read only, at byte 404 of", 1, 37),
    ("null_pointer", "null", 1, 37),
    ("trapped", "trap", 1, 37),
    ("misaligned_load", "misaligned access: 'const struct uint4' at an address that is not a multiple of 16", 1, 37),
    ("misaligned_copy", "cp_async_16 with an address that is not aligned to 16 bytes", 1, 37),
    ("static_shared_bounds", "out of bounds of shared memory, at `first` + 256, which has 256 bytes", 1, 37),
    ("dynamic_shared_bounds", r"out of bounds of shared memory, at `dynamic_shared\(\)` + 256", 1, 37),
    ("member_bounds", r"index 4 out of bounds of 'unsigned int \[4\]'", 1, 37),
    ("local_bounds", r"index 8 out of bounds of 'unsigned int \[8\]'", 1, 37),
    ("never_written", "reads shared `tile` + 150, which no thread has written so far", 1, 37),
    ("never_written_by_this_block", "reads shared `tile` + 148, which no thread has written so far", 1, 37),
    ("in_flight", "reads shared `tile` + 148, where a cp.async of thread 37 is in flight", 1, 37),
    ("wrong_group", "where a cp.async of thread 37 is in flight", 1, 37),
    ("not_committed", "where a cp.async of thread 37 is in flight", 1, 37),
    ("copy_of_another_thread", "race: reads shared `tile` + 0, which thread 0 wrote with no barrier", 0, 1),
    ("copy_over_what_others_read", "race: writes shared `tile` + 4, which thread 0 read with no barrier", 0, 1),
    ("barrier_after_exit", "sync_threads reached by 63 threads of 64; thread 37 has exited", 1, 0),
    ("collective_after_exit", "shuffle_xor reached by 31 lanes of 32; thread 37 has exited", 1, 32),
    ("collective_in_branch", "shuffle reached by 16 lanes of 32; thread 16 waits at sync_threads", 0, 0),
    ("different_collectives", "different collectives: ballot or any_lane here, and thread 32 at shuffle", 1, 37),
    ("read_without_barrier", "race: reads shared `tile` + 0, which thread 0 wrote with no barrier", 0, 1),
    ("write_without_barrier", "race: writes shared `tile` + 4, which thread 0 read with no barrier", 0, 1),
    ("two_writers", "race: writes shared `total` + 0, which thread 0 wrote with no barrier", 1, 37),
    ("neighbour_bytes", "race: writes shared `tile` + 36, which thread 36 wrote with no barrier", 1, 37),
    ("warp_without_barrier", "race: reads shared `tile` + 0, which thread 0 wrote", 0, 1),
    ("warp_barrier_for_two_warps", "race: reads shared `tile` + 124, which thread 31 wrote", 0, 63),
    ("shuffle_is_no_barrier", "race: reads shared `tile` + 120, which thread 30 wrote", 0, 31),
    ("blocks_write_the_same", r"race of blocks: writes byte 0 of a tensor, which block \(0, 0, 0\) wrote", 1, 0),
    ("block_reads_another_s", r"race of blocks: reads byte 0 of a tensor, which block \(0, 0, 0\) wrote", 1, 37),
    ("block_writes_what_another_read", r"race of blocks: writes byte 400 of .*block \(0, 0, 0\) read", 1, 36),
    ("last_block_sums", "race of blocks: reads byte 0 of a tensor", 1, 0),
    ("scratch_never_written", "reads byte 404 of scratch memory, which was never written", 1, 37),
    ("too_much_shared", "with `more` a block has 491..", 0, 0),
    ("copied_struct", "out of bounds of global memory", 1, 37),
]  # fmt: skip


def arguments(name: str) -> dict:
    return {"scratch": name.startswith("scratch"), "dynamic_shared": 256 if name.startswith("dynamic") else 0}


@pytest.mark.parametrize("name,says,block,thread", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_fault_is_found_and_its_right_twin_passes(run, name, says, block, thread):
    want = run(name, SMALL, **arguments(name))
    place = rf"{name}<true>, block \({block}, 0, 0\), thread {thread}, kernels\.cu:[\d?]+"
    says = says.replace(" + ", r" \+ ")
    for _ in range(2):  # the second launch runs on the memory that the abandoned launch left
        with pytest.raises(RuntimeError, match=f"emulator: {place}: .*{says}"):
            run(name + "_broken", SMALL, **arguments(name))
        assert run(name, SMALL, **arguments(name)) == want


def test_collective_of_a_part_of_a_warp(run):
    with pytest.raises(RuntimeError, match="thread 32, .*shuffle_xor in a warp of 8 lanes, wanted 32"):
        run("collective_after_exit", SMALL, threads=40)
    run("barrier_after_exit", SMALL, threads=40)


def test_more_shared_memory_than_a_block_may_have(run):
    with pytest.raises(
        RuntimeError, match="dynamic_shared_bounds<false>: 102400 bytes of dynamic shared memory, wanted"
    ):
        run("dynamic_shared_bounds", SMALL, dynamic_shared=100 * 1024)
    run("dynamic_shared_bounds", SMALL, dynamic_shared=99 * 1024)


def test_shuffles_and_votes(run):
    out = run("shuffles", WORDS, grid=(1, 1, 1), threads=32)
    for lane in range(32):
        assert out[lane] == WORDS[(lane + 5) % 32] ^ WORDS[lane // 8 * 8 + lane * 3 % 8]
        assert out[32 + lane] == WORDS[lane ^ 16]
        assert out[64 + lane] == WORDS[31 - lane]
        assert out[96 + lane] == WORDS[lane // 4 * 4 + 2]
        assert out[128 + lane] == sum((word % 3 == 0) << i for i, word in enumerate(WORDS[:32]))
        assert out[160 + lane] == 2
        assert out[192 + lane] == WORDS[lane ^ 1]
        product = WORDS[lane] * 0x9E3779B9
        product = (product >> 32) ^ (product & 0xFFFFFFFF)
        high, low = WORDS[lane] >> 31, WORDS[lane] >> 15 & 1
        spread = high * 0xFFFF0000 + low * 0xFFFF
        assert out[224 + lane] == product ^ spread ^ (low * 0xFFFFFFFF) ^ (high * 0xFFFFFFFF) >> 1


def test_atomics(run):
    out = run("atomics", SMALL)
    assert out[:3] == [128, torch.tensor(64.0).view(torch.int32).item(), 2**32 - sum(SMALL[:128])]


def test_barriers(run):
    out = run("reduction", SMALL)
    assert out[:2] == [sum(SMALL[:64]) + 16 * 9, sum(SMALL[64:128]) + 16 * 9]


def test_last_block(run):
    assert run("last_block_sums", SMALL)[200:202] == [2, sum(SMALL[:128])]


def test_grid(run):
    out = run("coordinates", SMALL, grid=(3, 4, 2), threads=32)
    assert out[:24] == [x + 10 * y + 100 * z + 32000 for z in range(2) for y in range(4) for x in range(3)]


def test_asynchronous_copies(run):
    out = run("pipeline", SMALL, grid=(1, 1, 1))
    for thread in range(64):
        place = thread ^ 33
        taken = [SMALL[64 * step + place] << step for step in range(4) if step == 0 or place // 4 % 2 == 0]
        assert out[thread] == sum(taken)
        assert out[64 + thread] == (2**32 - 1 if thread < 32 else 0)


# --- PTX ISA, 9.7.15: fragments of mma.m16n8k16 with 16-bit types, and ldmatrix ---------------------------------------


def a_place(lane: int, i: int) -> tuple[int, int]:
    """Returns row and column of A's element a_i, i = 0..7."""
    row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int) -> tuple[int, int]:
    """Returns row and column of B's element b_i, i = 0..3."""
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def c_place(lane: int, i: int) -> tuple[int, int]:
    """Returns row and column of C's and D's element c_i, i = 0..3."""
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def registers(matrix: torch.Tensor, place, count: int) -> list[int]:
    """Returns each lane's registers of two 16-bit elements, with the first in the low half."""
    bits = matrix.view(torch.int16).int() & 0xFFFF
    halves = [[bits[place(lane, i)].item() for i in range(count)] for lane in range(32)]
    return [row[i] | row[i + 1] << 16 for row in halves for i in range(0, count, 2)]


@pytest.mark.parametrize("dtype,name", [(torch.bfloat16, "mma_bf16"), (torch.float16, "mma_f16")])
def test_mma_fragments(run, dtype, name):
    # Distinct integers, whose sums of products are exact in float32, so that a value at a wrong place shows.
    a = (torch.arange(256) * 37 % 256).view(16, 16).to(dtype)
    b = (torch.arange(128) * 53 % 128 - 64).view(16, 8).to(dtype)
    c = (torch.arange(128) * 1001.0).view(16, 8)
    assert a.unique().numel() == 256 and b.unique().numel() == 128
    words = registers(a, a_place, 8) + registers(b, b_place, 4)
    start = [c[c_place(lane, i)].view(torch.int32).item() for lane in range(32) for i in range(4)]
    out = run(name, words + [0] * 64, start, grid=(1, 1, 1), threads=32)
    want = (c.double() + a.double() @ b.double()).float()
    for lane in range(32):
        for i in range(4):
            assert out[4 * lane + i] == want[c_place(lane, i)].view(torch.int32).item() & 0xFFFFFFFF


def truncated_product(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns c + a b as the mode "truncated" of the emulator adds, in exact integers of Python."""
    out = torch.empty_like(c)
    for row, column in itertools.product(range(c.shape[0]), range(c.shape[1])):
        total = Fraction(c[row, column].item())
        for start in range(0, a.shape[1], 8):
            pairs = [(a[row, k].item(), b[k, column].item()) for k in range(start, start + 8)]
            exponents = [math.frexp(x)[1] + math.frexp(y)[1] - 2 for x, y in pairs if x and y]
            exponents += [math.frexp(float(total))[1] - 1] if total else []
            if not exponents:
                continue
            last = Fraction(2) ** (max(exponents) - 24)
            total = sum(int(term / last) for term in (total, *(Fraction(x) * Fraction(y) for x, y in pairs))) * last
            if total:
                last = Fraction(2) ** (max(math.frexp(float(total))[1] - 1, -126) - 23)
                total = int(total / last) * last
        out[row, column] = float(total)
    return out


@pytest.mark.parametrize("dtype,name", [(torch.bfloat16, "mma_bf16"), (torch.float16, "mma_f16")])
def test_sums_that_are_truncated(run, dtype, name, request):
    mode = os.environ.get("PEFT_EXT_EMULATED_SUMS")
    if mode != "truncated":  # the mode belongs to the process
        environment = {**os.environ, "PEFT_EXT_EMULATED_SUMS": "truncated"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", request.node.nodeid]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    draw = torch.Generator().manual_seed(0)
    # The inputs have widely spread exponents, so that the alignment of the terms cuts bits off; some inputs are zeros;
    # and one sum cancels to less than the bits that are cut off.
    a = (torch.randn(16, 16, generator=draw) * 2.0 ** torch.randint(-9, 9, (16, 16), generator=draw)).to(dtype)
    b = (torch.randn(16, 8, generator=draw) * 2.0 ** torch.randint(-5, 5, (16, 8), generator=draw)).to(dtype)
    c = torch.randn(16, 8, generator=draw) * 2.0 ** torch.randint(-20, 20, (16, 8), generator=draw)
    a[3] = 0
    c[3, :4] = 0
    a[5, 8:], b[8:, 2], c[5, 2] = a[5, :8], -b[:8, 2], 1e-30
    words = registers(a, a_place, 8) + registers(b, b_place, 4)
    start = [c[c_place(lane, i)].view(torch.int32).item() for lane in range(32) for i in range(4)]
    out = run(name, words + [0] * 64, start, grid=(1, 1, 1), threads=32)
    want = truncated_product(c, a.float(), b.float())
    rounded = (c.double() + a.double() @ b.double()).float()
    assert (want != rounded).float().mean() > 0.3  # else this test could not tell the modes apart
    for lane in range(32):
        for i in range(4):
            assert out[4 * lane + i] == want[c_place(lane, i)].view(torch.int32).item() & 0xFFFFFFFF


@pytest.mark.parametrize("name", ["ldmatrix", "ldmatrix_trans"])
def test_ldmatrix(run, name):
    words = [2 * i | (2 * i + 1) << 16 for i in range(128)]  # the 16-bit values 0 to 255: 4 matrices of 8 x 8
    out = run(name, words + [0] * 128, grid=(1, 1, 1), threads=32)
    for lane in range(32):
        for matrix in range(4):
            row, column = lane // 4, lane % 4 * 2
            if name == "ldmatrix":
                want = [64 * matrix + 8 * row + column, 64 * matrix + 8 * row + column + 1]
            else:
                want = [64 * matrix + 8 * column + row, 64 * matrix + 8 * (column + 1) + row]
            assert out[4 * lane + matrix] == want[0] | want[1] << 16


@pytest.mark.parametrize("dtype,name", [(torch.bfloat16, "pairs_bf16"), (torch.float16, "pairs_f16")])
def test_pairs(run, dtype, name):
    values = torch.cat([torch.randn(240), torch.tensor([0.0, -0.0, torch.inf, -torch.inf] * 4)]).to(dtype)
    words = [word & 0xFFFFFFFF for word in values.view(torch.int32).tolist()]
    out = run(name, words + [0] * 128)
    assert out[:128] == words
    low, high = values[0::2].double(), values[1::2].double()
    inner = (low.float() + high.float() * 3.0).double()
    want = (low * high + inner).float()
    got = torch.tensor(out[128:]).to(torch.int32).view(torch.float32)
    torch.testing.assert_close(got, want, rtol=2**-23, atol=0, equal_nan=True)


def test_each_torch_has_its_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """ninja does not check torch's headers, and a process may have loaded the library that another torch would
    replace."""
    found = []
    monkeypatch.setattr(emulated_cuda.native_build, "build", lambda library, *_: found.append(library))
    for release in ("2.11.0+cpu", "2.13.0+cpu"):
        monkeypatch.setattr(emulated_cuda, "version", lambda name, release=release: release)
        emulated_cuda.build_ops()
    one, two = found
    assert one.name == two.name == "libpeft_ext_emulated.so" and one.parent != two.parent
    assert {one.parents[1], two.parents[1]} == {ROOT / "build/emulated"}


# --- the CUDA ops -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ops():
    emulated_cuda.load()
    return torch.ops.peft_ext_emulated


def dequantize_args(numel: int, blocksize: int, nested: bool) -> tuple:
    """Returns an NF4 weight with every code, as the operator's arguments, with a flat shape."""
    weight = torch.randn(numel) * torch.rand(numel).mul(-8).exp()
    _, absmax, *rest = reference.nf4_quantize(weight, blocksize, nested).op_args()
    packed = torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8)
    return (packed, absmax, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nf4_dequantize_has_the_reference_s_bits(ops, blocksize, nested, dtype):
    for numel in (1, 2, 7, 8, 9, 31, 32, 33, 1023, 1024, 1025, 8191, 8192, 8193, 333 * 77, 1024 * 128 + 5):
        args = dequantize_args(numel, blocksize, nested)
        got, want = ops.nf4_dequantize(*args, dtype), reference.dequantize(*args, dtype)
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[want.element_size()]
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.view(bits), want.view(bits))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_packed_bytes_at_any_address(ops, offset):
    packed, *rest = dequantize_args(4096, 64, True)
    shifted = torch.empty(packed.numel() + offset, dtype=torch.uint8)[offset:].view(-1, 1)
    shifted.copy_(packed)
    want = reference.dequantize(packed, *rest, torch.bfloat16)
    assert torch.equal(ops.nf4_dequantize(shifted, *rest, torch.bfloat16), want)


def test_glue_s_errors_and_empty_tensors(ops):
    packed, absmax, *rest = dequantize_args(512, 64, False)
    with pytest.raises(RuntimeError, match="absmax is Float with 7 elements, wanted Float with 8"):
        ops.nf4_dequantize(packed, absmax[:7], *rest, torch.bfloat16)
    empty = ops.nf4_dequantize(packed[:0], absmax[:0], None, None, None, 64, [0, 64], torch.bfloat16)
    assert empty.shape == (0, 64)


def test_an_error_in_a_call_of_pytorch_has_pytorch_s_reason(ops):
    """The stable ABI's own errors name only the failed call, which does not show that memory was lacking."""
    numel = 2**51
    expanded = torch.zeros(1, 1, dtype=torch.uint8).expand(numel // 2, 1), torch.ones(1).expand(numel // 64)
    lacking = [
        lambda: ops.nf4_dequantize(*expanded, None, None, None, 64, [numel], torch.float32),  # copies the codes
        lambda: ops.nf4_quantize(torch.ones(1).expand(2**55), 64),
        lambda: ops.rms_norm(torch.ones(1, 64).expand(2**50, 64), None, 1e-5, 0.0, False),
    ]
    for call in lacking:
        with pytest.raises(RuntimeError, match=r"CUDA out of memory\. ") as raised:
            call()
        assert any(text in str(raised.value) for text in prove._NO_MEMORY)
        assert " out of memory." in str(raised.value)  # what accelerate's find_executable_batch_size searches
    packed, absmax = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
    says = "integer multiplication overflow" if tells_reasons() else "API call failed"
    with pytest.raises(RuntimeError, match=says) as raised:
        ops.nf4_dequantize(packed, absmax, None, None, None, 64, [-1, -64], torch.float32)
    assert "memory" not in str(raised.value)


def test_a_label_out_of_range_stops_the_cross_entropy(ops):
    def losses(*labels):
        rows = torch.zeros(len(labels), 7)
        return ops.cross_entropy_rows(rows, torch.tensor(labels), None, 1.0, 0.0, 0.0, -100, True)

    for label in (7, -1, 2**40):
        with pytest.raises(RuntimeError, match=r"cross_entropy_kernel<.*, block \(1, 0, 0\), .*: trap"):
            losses(0, label, -100)
    assert losses(0, 6, -100).tolist() == pytest.approx([math.log(7), math.log(7), 0])


def tells_reasons() -> bool:
    """Returns whether torch has the function for the message of its last error."""
    return hasattr(ctypes.CDLL("libtorch_cpu.so"), "torch_exception_get_what_without_backtrace")


def test_another_thread_has_a_machine_of_its_own(ops):
    from concurrent.futures import ThreadPoolExecutor

    args = dequantize_args(8192, 64, True)
    want = reference.dequantize(*args, torch.bfloat16)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda _: ops.nf4_dequantize(*args, torch.bfloat16), range(8)):
            assert torch.equal(got, want)
