"""Times inference by peft_ext and by llama.cpp on the same GGUF files, and training by peft_ext and by PEFT.

``python -m benchmarks.llama_speed``                every file type; writes a result file
``python -m benchmarks.llama_speed --types Q4_K_M Q8_0 --rounds 1``
``python -m benchmarks.llama_speed --table``        prints the newest result file as a table

The files have the weights of SmolLM2-135M-Instruct; llama.cpp's own quantizer makes each file except F16 from F16. Each
measurement is a process of its own, and the processes of a round run in turn:

theirs      llama.cpp: a prompt of 512 tokens, and then 128 tokens, each time the most likely token; the cache is
            float16, and llama.cpp chooses whether attention is fused
ours        peft_ext over the same file, in bfloat16, accelerated: a prompt of 512 tokens by one forward, and 128
            tokens by transformers' ``generate``, without the time of the prompt
lora        as ``ours``, with a LoRA adapter of rank 16 on all linear layers
train       a forward and a backward of LoRA with dropout over the same file: 4 x 256 tokens
nf4, stock  as ``train``, in peft_ext over the model in NF4, and in PEFT alone over the bfloat16 weights

A process returns the median of its repetitions, and a row of the result file has the medians over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # a missing kernel is an error, so that no reference is timed

from .command import command_parser, markdown, measured
from .files import result_path, write

NAME = "run-llama_speed-avx512_bf16"  # without its date, the name of the result file that the documents show
TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q6_K", "Q8_0", "F16")
PROMPT, ANSWER, REPEATS, STEPS = 512, 128, 3, 6
WORKERS = ("theirs", "ours", "lora", "train")


def _median_rate(count: int, run: Callable[[], float], repeats: int) -> float:
    """Returns tokens per second: ``count`` tokens divided by the median of the seconds that ``repeats`` calls of
    ``run`` return, after one call that warms up."""
    run()
    return count / statistics.median(run() for _ in range(repeats))


# --- the processes ----------------------------------------------------------------------------------------------------


def theirs(file: Path, threads: int) -> dict[str, float]:
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_backend_init()
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 1024
    settings.n_ubatch = PROMPT
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    words = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    tokens = (llama.llama_token * PROMPT)(*((7 * i + 11) % (words - 100) + 50 for i in range(PROMPT)))
    one = (llama.llama_token * 1)()
    sampler = llama.llama_sampler_init_greedy()

    def prompt() -> float:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        start = time.perf_counter()
        assert not llama.llama_decode(context, llama.llama_batch_get_one(tokens, PROMPT))
        one[0] = llama.llama_sampler_sample(sampler, context, -1)
        return time.perf_counter() - start

    def answer() -> float:
        prompt()
        start = time.perf_counter()
        for _ in range(ANSWER):
            assert not llama.llama_decode(context, llama.llama_batch_get_one(one, 1))
            one[0] = llama.llama_sampler_sample(sampler, context, -1)
        return time.perf_counter() - start

    return {"prompt": _median_rate(PROMPT, prompt, REPEATS), "answer": _median_rate(ANSWER, answer, REPEATS)}


def _generating(model: Any) -> dict[str, float]:
    import torch

    words = model.config.vocab_size
    ids = torch.tensor([[(7 * i + 11) % (words - 100) + 50 for i in range(PROMPT)]])

    @torch.no_grad()
    def prompt() -> float:
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
        return time.perf_counter() - start

    @torch.no_grad()
    def whole() -> float:
        start = time.perf_counter()
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=ANSWER + 1,
                               max_new_tokens=ANSWER + 1, do_sample=False, pad_token_id=0)  # fmt: skip
        assert found.shape[1] == PROMPT + ANSWER + 1
        return time.perf_counter() - start

    prompts = _median_rate(PROMPT, prompt, REPEATS)
    whole()
    answer = statistics.median(whole() for _ in range(REPEATS)) - PROMPT / prompts
    return {"prompt": prompts, "answer": ANSWER / answer}


def ours(file: Path, threads: int) -> dict[str, float]:
    import peft_ext

    model = peft_ext.load_gguf(file).eval().requires_grad_(False)
    peft_ext.accelerate(model)
    return _generating(model)


def _with_lora(model: Any, dropout: float, accelerated: bool = True) -> Any:
    import peft
    import torch

    import peft_ext

    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear",
                             task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(model.requires_grad_(False), config)
    if accelerated:
        peft_ext.accelerate(model)
    return model


def lora(file: Path, threads: int) -> dict[str, float]:
    import peft_ext

    return _generating(_with_lora(peft_ext.load_gguf(file), 0.0).eval())


def _training(model: Any) -> dict[str, float]:
    import torch

    model = model.train()
    ids = torch.randint(50, model.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        return time.perf_counter() - start

    step()
    return {"train": _median_rate(ids.numel(), step, STEPS)}


def train(file: Path, threads: int) -> dict[str, float]:
    import peft_ext

    return _training(_with_lora(peft_ext.load_gguf(file), 0.05))


def _decoded(file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )


def nf4(file: Path, threads: int) -> dict[str, float]:
    import peft_ext

    model = _decoded(file)
    peft_ext.quantize_nf4(model, progress=False)
    return _training(_with_lora(model, 0.05))


def stock(file: Path, threads: int) -> dict[str, float]:
    return _training(_with_lora(_decoded(file), 0.05, accelerated=False))


# --- the rounds -------------------------------------------------------------------------------------------------------


def _run(worker: str, file: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.llama_speed", "--worker", worker, "--file", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{worker} over {file.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(types: Sequence[str], rounds: int, threads: int, out: Optional[Path]) -> Path:
    from peft_ext.run.demo_model import packed_model

    from .harness import machine
    from .llama_cpp import float_file
    from .llama_runner import quantize_file

    about = {**machine(), "threads": threads}
    result: dict[str, Any] = {"machine": about, "rounds": rounds, "rows": []}
    path = result_path("run-llama_speed", about, out)
    with tempfile.TemporaryDirectory() as name:
        dense = Path(name) / "F16.gguf"
        float_file(packed_model(), dense)
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for worker in ("nf4", "stock"):
                found[worker].append(_run(worker, dense, threads)["train"])
        result |= {worker: round(statistics.median(rates), 1) for worker, rates in found.items()}
        for kind in types:
            file = Path(name) / f"{kind}.gguf"
            if not file.exists():
                quantize_file(dense, file, kind)
            found = defaultdict(list)
            for _ in range(rounds):
                for worker in WORKERS:
                    for figure, rate in _run(worker, file, threads).items():
                        found[f"{worker}_{figure}"].append(rate)
            row = {"type": kind, "bytes": file.stat().st_size}
            result["rows"].append(row | {key: round(statistics.median(rates), 1) for key, rates in found.items()})
            print(json.dumps(result["rows"][-1]), flush=True)
            write(path, result)
    return path


def table(result: dict[str, Any]) -> str:
    """Returns a result file as a Markdown table. The table has tokens per second, the ratios of peft_ext's to
    llama.cpp's tokens per second, and the ratios of peft_ext's training over the file to that over NF4 and to
    PEFT's."""
    titles = ("| file | prompt: llama.cpp | peft_ext | ratio | with LoRA | answer: llama.cpp | peft_ext | ratio | with "
              "LoRA | training | over NF4's | over PEFT's |")  # fmt: skip
    rows = []
    for row in result["rows"]:
        cells = [row["type"]]
        for figure in ("prompt", "answer"):
            one, other, adapted = (row[f"{worker}_{figure}"] for worker in ("theirs", "ours", "lora"))
            cells += [f"{one:.0f}", f"{other:.0f}", f"{other / one:.2f}", f"{adapted:.0f}"]
        rate = row["train_train"]
        cells += [f"{rate:.0f}", f"{rate / result['nf4']:.2f}", f"{rate / result['stock']:.2f}"]
        rows.append(cells)
    return markdown(titles, rows)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = command_parser("benchmarks.llama_speed", __doc__)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), metavar="TYPE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--table", action="store_true", help="print the newest result as a table; measure nothing")
    parser.add_argument("--out", type=Path, help="result file, or folder for it")
    parser.add_argument("--worker", choices=[*WORKERS, "nf4", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(globals()[options.worker](options.file, options.threads)))
    elif options.table:
        print(table(measured(parser, NAME)))
    else:
        print(f"written: {measure(options.types, options.rounds, options.threads, options.out)}")


if __name__ == "__main__":
    main()
