"""Tests of the analysis of the CUDA kernels' machine code, and of the computed tables in the documents."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
sass = pytest.importorskip("sass", reason="tools/ is not here: not a checkout")

import cuda_measured  # noqa: E402
import cuda_model  # noqa: E402
import slots  # noqa: E402

from peft_ext import device_code  # noqa: E402

LISTING = """
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R9, RZ ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDGSTS.E.BYPASS.128.ZFILL [R10], desc[UR4][R12.64], P1 ;
        /*0040*/                   LOP3.LUT R8, R9, 0x7f80, R0, 0xf8, !PT ;
.L_x_2:
        /*0050*/                   LDS R16, [R8+UR5] ;
        /*0060*/                   HMMA.16816.F32.BF16 R20, R16, R4, R20 ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R20 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3) ;
        /*00d0*/                   NOP ;
	.section	.text.second,"ax",@progbits
.text.second:
        /*0000*/                   IMAD.WIDE.U32 R2, R0, 0x4, R4 ;
        /*0010*/                   FFMA R6, R2, R3, R6 ;
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   BRA `(.L_x_1) ;
        /*0040*/                   NOP ;
"""


@pytest.fixture
def kernels(tmp_path: Path) -> dict[str, list[sass.Instruction]]:
    (tmp_path / "listing").write_text(LISTING)
    program = tmp_path / "nvdisasm"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/listing\n")
    program.chmod(0o755)
    return sass.disassemble(tmp_path / "cubin", str(program))


def test_a_loop_counts_with_the_loops_in_it_as_often_as_they_run(kernels: dict) -> None:
    names = [i.name.split(".")[0] for i in sass.hot_loop(kernels["first"]).instructions]
    assert names == ["LDG", "LDGSTS", "LOP3", "LDS", "HMMA", "BRA", "IADD3", "BRA"]
    twice = sass.hot_loop(kernels["first"], trips=2)
    assert len(twice.instructions) == 11
    counts = {pipe: twice.count(pipe) for pipe in ("mma", "memory", "alu", "fma", "control", "uniform")}
    assert counts == {"mma": 2, "memory": 4, "alu": 2, "fma": 0, "control": 3, "uniform": 0}
    assert twice.transactions == 4 + 4 + 1 + 1


def test_inner_loops_without_products_count_as_often_as_they_run() -> None:
    code = [sass.Instruction(16 * i, name, "", target) for i, (name, target) in enumerate([
        ("IADD3", None), ("LDGSTS.E", None), ("BRA", 16), ("HMMA.16816", None), ("STS", None), ("BRA", 64), ("BRA", 0),
    ])]  # fmt: skip
    names = [i.name.split(".")[0] for i in sass.hot_loop(code, others=(3, 2)).instructions]
    assert names == ["IADD3", *["LDGSTS", "BRA"] * 3, "HMMA", *["STS", "BRA"] * 2, "BRA"]
    assert len(sass.hot_loop(code).instructions) == 7
    with pytest.raises(ValueError, match="2 inner loops without products, wanted 1"):
        sass.hot_loop(code, others=(3,))


def test_a_load_s_first_use_is_a_product_s_operand(kernels: dict) -> None:
    loop = sass.hot_loop(kernels["first"])
    load, product = loop.instructions[0], loop.instructions[4]
    assert load.writes == {4, 5, 6, 7} and load.reads == {2, 3}
    assert product.writes == {20, 21, 22, 23} and product.reads == {16, 17, 18, 19, 4, 5, 20, 21, 22, 23}
    assert loop.load_to_use() == 4
    # The product waits for the load. The instructions before the product run during the wait.
    assert sass.LATENCY["global"] < loop.cycles_alone() < sass.LATENCY["global"] + 20


def test_a_kernel_without_products_is_counted_whole(kernels: dict) -> None:
    loop = sass.hot_loop(kernels["second"])
    assert [i.name for i in loop.instructions] == ["IMAD.WIDE.U32", "FFMA", "EXIT"]
    assert loop.instructions[0].writes == {2, 3} and loop.load_to_use() is None


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [("90", 128, 128, 32768, 4), ("86", 128, 64, 32768, 3), ("80", 128, 128, 32768, 4), ("90", 256, 40, 0, 6),
     ("89", 256, 32, 0, 6), ("90", 128, 168, 1024, 3)],
)  # fmt: skip
def test_resident_blocks(arch: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert slots.resident_blocks(arch, threads, registers, shared) == blocks


def test_the_table_has_every_hot_loop_on_every_architecture() -> None:
    rows = slots.read()
    assert [(row["loop"], row["arch"]) for row in rows] == list(
        itertools.product((hot.name for hot in slots.HOT), slots.ARCHS)
    )
    assert all(row["stack"] == "0" for row in rows)


# Upper limits for the slots of each loop on sm_90, per tile or per weight.
GOALS = {
    "S": 140, "S, dropout": 380, "Y0": 350, "P and dB": 450, "dA, dropout": 390, "dX0, dropout": 500,
    "NF4, T <= 8": 3.5, "NF4, T <= 16": 3.5,
}  # fmt: skip


@pytest.mark.parametrize("loop", GOALS)
def test_the_loops_are_as_short_as_they_were_meant_to_be(loop: str) -> None:
    (found,) = [float(row["slots"]) for row in slots.read() if (row["loop"], row["arch"]) == (loop, "90")]
    assert found <= GOALS[loop]


@pytest.mark.parametrize("base", ["bf16", "NF4"])
@pytest.mark.parametrize("card", cuda_model.CARDS)
def test_eight_adapters_cost_at_most_a_tenth_more_than_one(card: str, base: str) -> None:
    for tokens in (512, 2048, 8192):
        eight, one = (cuda_model.mixed(cuda_model.CARDS[card], tokens, count, base) for count in (8, 1))
        assert one < eight <= 1.1 * one
    text = (ROOT / "csrc/linear/cuda/shrink_few.cuh").read_text()
    assert f"constexpr int kGroupedFewTokens = {cuda_model.FEW};" in text


def test_layers_of_one_input_cost_little_more_than_one_read_of_it() -> None:
    card = cuda_model.CARDS["H100"]
    layer = cuda_model.parts(card, 8192)
    for part, columns in (("S, dropout", False), ("dA, dropout", True)):
        # Each tile reads the terms of each layer from L2. The L2 of the second card is so fast that the reads take no
        # time.
        for held, two, three in ((card, 1.35, 1.8), (replace(card, l2=1e20), 1.2, 1.6)):
            assert cuda_model.siblings(held, 8192, 4096, 2, columns, True) < two * layer[part]
            assert cuda_model.siblings(held, 8192, 4096, 3, columns, True) < three * layer[part]
    assert cuda_model.llama_layer(card, 8192, "LoRA, dropout", True) < 1.08


@pytest.mark.parametrize("name", cuda_model.CARDS)
def test_the_passes_of_a_gated_activation_cost_little_more_than_the_activation(name: str) -> None:
    card = cuda_model.CARDS[name]
    layer = cuda_model.parts(card, 8192, 4096, 14336)
    for part, columns in (("S, dropout", False), ("dA, dropout", True)):
        assert cuda_model.gated(card, 8192, 14336, columns, True) < 0.1 * layer[part]


@pytest.mark.slow
def test_no_row_of_the_model_is_below_its_limit() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in cuda_model.tables().splitlines()]
    held = {row[0]: row[1:] for row in rows}
    limits = {name: values for name, values in held.items() if name.endswith(": limit")}
    kinds = ("NF4, T", "LoRA", "DoRA", "QDoRA", "LoRA over NF4", "over bf16", "frozen")
    assert all(any(name.startswith(kind) for name in limits) for kind in kinds)
    for above, row in itertools.pairwise(rows):
        if row[0] in limits:
            assert row[0] == f"{above[0]}: limit"
            for value, bound in zip(above[1:], row[1:], strict=True):
                assert float(value.split()[0]) >= float(bound.split()[0]), row[0]
    missing = {name for name in held if re.match(r"(Q?LoRA|Q?DoRA|IA3|NF4, T|MXFP4, T|over )", name)} - set(limits)
    assert {f"{name}: limit" for name in missing} <= set(limits)


def test_an_ideal_card_computes_the_bytes_alone() -> None:
    card = cuda_model.CARDS["H100"]
    ideal = cuda_model.ideal(card)
    x, w, rate = 2.0 * 8192 * 4096, 2.0 * 4096**2, 0.92 * 3.35e12
    found = cuda_model.parts(ideal, 8192)
    assert found["S"] == found["Y0"] == found["P and dB"] == pytest.approx(x / rate)
    assert found["dA, dropout"] == pytest.approx(x * 17 / 16 / rate)
    assert found["norm"] == pytest.approx(w / rate) and found["launch"] == found["launch by PyTorch"] == 0.0
    assert found["product"] == cuda_model.parts(card, 8192)["product"]
    assert cuda_model.siblings(ideal, 8192, 4096, 3, True, True) == pytest.approx(x * 19 / 16 / rate)
    assert cuda_model.decode(ideal, 4096, 4096, 1) == pytest.approx((0.516 * 4096**2 + 4 * 4096) / rate)


@pytest.mark.slow
def test_the_page_has_what_is_computed() -> None:
    text = cuda_model.PAGE.read_text()
    assert cuda_model.page(text) == text, "python tools/cuda_model.py --write"


def test_the_model_knows_how_a_pass_is_cut() -> None:
    """The cost model must have the partial sums of csrc/linear/cuda/rank_plan.cuh; the test reads its constants."""
    plan = (ROOT / "csrc/linear/cuda/rank_plan.cuh").read_text() + (ROOT / "csrc/linear/cuda/rank_pass.cuh").read_text()
    number = {name: int(value) for name, value in re.findall(r"constexpr int(?:64_t)? (\w+) = (\d+);", plan)}
    assert number["kRankBlocksWanted"] == 768 and number["kRankBlocksOfBoth"] == 384
    assert number["kRankTilesAtLeast"] == 2 and number["kRankTilesOfBoth"] == 4
    # 8192 x 4096, rank 16: 128 row tiles share 768 blocks, six each; for "both", 32 chunks of rows and 11 of columns.
    assert cuda_model.partial_sums(8192, 4096, 16, "rows") == 2 * 4 * 16 * 6 * 8192
    assert cuda_model.partial_sums(8192, 4096, 16, "columns") == 2 * 4 * 16 * 12 * 4096
    assert cuda_model.partial_sums(8192, 4096, 16, "both") == 2 * 4 * 16 * (11 * 8192 + 32 * 4096)


def test_a_pass_is_cut_by_its_shape_alone_and_each_tile_is_in_one_block(tmp_path: Path) -> None:
    """Runs tests/native/rank_plan.cpp, which enumerates the plans of rank passes; no GPU is needed."""
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    command = [compiler, "-std=c++17", "-O1", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", "-DPEFT_EXT_EMULATE_CUDA",
               "-include", "emulator/device.h", str(ROOT / "tests/native/rank_plan.cpp"), "-o",
               str(tmp_path / "plan")]  # fmt: skip
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "plan"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout
    assert "plans" in found.stdout
    sources = [path for kind in ("*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(kind)]
    asks = re.compile(r"MultiProcessorCount|multiprocessors\(\)|cudaGetDeviceProperties")
    assert not [path for path in sources if asks.search(path.read_text())]


def test_rows_of_a_result_stand_beside_the_model() -> None:
    row = {"op": "lora_linear", "case": "T=8192 4096->4096, bf16 base", "tokens": 8192, "k": 4096, "n": 4096,
           "weights": "rotating", "speedup": {"frozen": 0.8}}  # fmt: skip
    wide = row | {"case": "T=8192 4096->14336, NF4 base, dropout 0.05", "n": 14336}
    goal = cuda_model.ratio("LoRA", cuda_model.CARDS["H100"], 8192)
    text = cuda_measured.beside({"rows": [row, wide]}, "NVIDIA H100 80GB HBM3")
    assert f"| LoRA | 4096 -> 4096 | 8192 | 1.25 | {goal:.2f} | {1.25 / goal:.2f} |" in text
    assert "| QLoRA, dropout | 4096 -> 14336 | 8192 | 1.25 | 1.1" in text
    assert "| LoRA | 4096 -> 4096 | 8192 | 1.25 | no such card | - |" in cuda_measured.beside(
        {"rows": [row]}, "NVIDIA T4"
    )


def test_the_kernels_of_a_part_are_kernels_of_the_library() -> None:
    names = [slots.kernel_name(name) for name, _ in device_code.kernels()]
    for part, kernel in cuda_measured.KERNELS.items():
        found = [name for name in names if re.search(kernel, name)]
        assert bool(found) == (part not in ("product", "launch by PyTorch")), (part, found)
    # The hot loop that the model computes a part from is in a kernel of this part.
    for hot in slots.HOT:
        if hot.name in cuda_measured.KERNELS:
            assert re.search(cuda_measured.KERNELS[hot.name], hot.kernel), hot
    assert re.search(cuda_measured.KERNELS["norm"], next(h.kernel for h in slots.HOT if h.name == "W A and the norm"))


@pytest.mark.parametrize("method", cuda_model.LAYERS)
def test_the_parts_of_a_layer_add_up_to_the_time_of_the_layer(method: str) -> None:
    card = cuda_model.CARDS["H100"]
    total = sum(seconds for _, seconds in cuda_measured.kernel_seconds(card, method, 2048).values())
    frozen = 2 * cuda_model.parts(card, 2048)["product"]
    assert total / frozen == pytest.approx(cuda_model.ratio(method, card, 2048))
    assert method in cuda_measured.MEASURED


def test_names_of_the_profiler_are_the_names_of_the_table() -> None:
    pass_name = (
        "_ZN8peft_ext16rank_pass_kernelINS_4bf16ELb0ELb1ELi2ELi3ELNS_8RankWorkE0ELNS_8RankMaskE1EEEvNS_8RankPassE"
    )
    name = slots.kernel_name(torch._C._demangle(pass_name))
    assert name == "rank_pass_kernel<bf16, false, true, 2, 3, kRows, kDrawn>"
    assert name in {hot.kernel for hot in slots.HOT if hot.name == "S, dropout"}
    assert slots.kernel_name("void at::native::kernel<float>(int)") == "at::native::kernel<float>"
    assert slots.kernel_name("peft_ext::split_kernel(peft_ext::Splits)") == "split_kernel"


@pytest.mark.skipif(device_code.missing() is not None, reason=f"no NVRTC: {device_code.missing()}")
def test_the_symbols_of_compiled_kernels_have_the_names_of_the_table() -> None:
    wanted = {hot.kernel for hot in slots.HOT if hot.name in ("S, dropout", "Y0")}
    kernels = {slots.kernel_name(kernel): (kernel, file) for kernel, file in device_code.kernels()}
    for name in wanted:
        image, _ = device_code.compile_kernel(*kernels[name], "sm_90")
        assert slots.kernel_name(torch._C._demangle(image.symbol.decode())) == name


def test_measured_kernels_stand_beside_the_model() -> None:
    import kernel_times

    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    prefix = "void peft_ext::rank_pass_kernel<peft_ext::bf16, false, true, 2, 3, (peft_ext::RankWork)"
    times = kernel_times.by_kernel(
        SimpleNamespace(key=key, device_type=device, count=count, self_device_time_total=total)
        for key, device, count, total in [
            (f"{prefix}0, (peft_ext::RankMask)0>(peft_ext::RankPass)", cuda, 10, 496.0),
            ("_ZN8peft_ext12split_kernelENS_6SplitsE", cuda, 20, 50.0),
            ("nvjet_hsh_128x256_64x4_1x2_h_bz_TNT", cuda, 20, 9000.0),
            ("void at::native::fill<float>(int)", cuda, 10, 30.0), ("cudaLaunchKernel", cpu, 99, 0.0),
        ]
    )  # fmt: skip
    computed = cuda_measured.kernel_seconds(cuda_model.CARDS["H100"], "LoRA", 8192)
    rows = {row["part"]: row for row in kernel_times.rows_of(times, computed, calls=10)}
    assert list(rows) == [*computed, "other"]
    assert rows["S"]["kernels"] == ["rank_pass_kernel<bf16, false, true, 2, 3, kRows, kNone>"]
    assert (rows["S"]["launches"], rows["S"]["microseconds"]) == (1.0, 49.6)
    of_model = 49.6e-6 / cuda_model.parts(cuda_model.CARDS["H100"], 8192)["S"]
    assert 1.5 < of_model < 2.5 and rows["S"]["measured_over_computed"] == pytest.approx(of_model, abs=0.01)
    assert (rows["product"]["launches"], rows["product"]["microseconds"]) == (2.0, 900.0)
    assert rows["launch"]["launches"] == 2.0 and rows["launch"]["computed"] == 12.5
    assert rows["P and dB"]["kernels"] == [] and rows["P and dB"]["measured_over_computed"] is None
    assert rows["other"]["kernels"] == ["at::native::fill<float>"] and rows["other"]["computed"] is None
    assert "other: at::native::fill<float>" in kernel_times.table("LoRA", 8192, rows.values())


def test_a_layer_that_fails_leaves_the_rows_of_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import kernel_times

    def ours(op: str, case: str, tokens: int) -> str:
        if op == "dora_linear":
            raise RuntimeError("CUDA error")
        return op

    def profiled(contender: str) -> dict:
        return {} if contender == "ia3_linear" else {"nf4_few_tokens_kernel<bf16, 1, true>": (10, 100.0)}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_times.cuda, "about_gpu", lambda: {"name": "NVIDIA H100 80GB HBM3"})
    monkeypatch.setattr(kernel_times.cuda, "uuid", lambda: None)
    monkeypatch.setattr(kernel_times, "ours", ours)
    monkeypatch.setattr(kernel_times, "profiled", profiled)
    assert kernel_times.main(["--tokens", "2048", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("kernel-layers-nvidia-h100-80gb-hbm3-")
    result = json.loads(path.read_text())
    assert result["failed"] == ["DoRA, T=2048: RuntimeError: CUDA error",
                                "IA3, T=2048: RuntimeError: torch.profiler recorded no kernel"]  # fmt: skip
    assert {row["method"] for row in result["rows"]} == {"LoRA", "LoRA, dropout", "QLoRA, dropout", "NF4, T <= 8",
                                                         "NF4, T <= 16"}  # fmt: skip
    (few,) = [row for row in result["rows"] if row["method"] == "NF4, T <= 8"]
    computed = round(1e6 * cuda_model.decode(cuda_model.CARDS["H100"], 4096, 4096, 1), 2)
    assert (few["part"], few["microseconds"], few["computed"]) == ("NF4, T <= 8", 10.0, computed)
    assert few["meter"] == {}


def test_each_profiled_layer_is_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds the contenders of all profiled layers on the CPU with small sizes, and calls each once."""
    import kernel_times

    monkeypatch.setenv("PEFT_EXT_REQUIRE", "0")
    for method, tokens, op, case in kernel_times.layers([32]):
        contender = kernel_times.ours(op, case, tokens, device="cpu", size=64)
        contender.take()
        assert contender.run().shape == (tokens, 64), method


def test_a_table_of_some_architectures() -> None:
    import cuda_check

    ptxas = "file\tkernel\tshared bytes\tsm_80\tsm_90\na.cu\tk\t0\t1\t2\n"
    assert cuda_check.of_archs(ptxas, ["90"]) == "file\tkernel\tshared bytes\tsm_90\na.cu\tk\t0\t2\n"
    of_slots = "loop\tarch\tslots\nS\t80\t1\nS\t90\t2\n"
    assert cuda_check.of_archs(of_slots, ["80"]) == "loop\tarch\tslots\nS\t80\t1\n"
    assert cuda_check.of_archs(of_slots, list(slots.ARCHS)) == of_slots
