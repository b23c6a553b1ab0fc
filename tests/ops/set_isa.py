"""Runs operators on several threads while another thread switches the CPU path. The program of test_set_isa.py.

Each result must have the bits of one path. The program prints the number of calls and the paths whose bits were seen,
or fails with the name of the operator whose result mixes paths.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict

import torch

from peft_ext import _native, ops

SECONDS = float(sys.argv[1])
CALLERS = 2
MODULE = _native.STATE.module
PATHS = MODULE.isas()


def calls():
    torch.manual_seed(0)
    x, weight = torch.randn(48, 192).bfloat16(), torch.randn(96, 192).bfloat16()
    lora_A, lora_B = torch.randn(8, 192), torch.randn(96, 8)
    nf4 = ops.nf4_quantize(weight)
    q, k, v = (torch.randn(1, 2, 40, 32).bfloat16() for _ in range(3))
    gate = torch.randn(64, 96).bfloat16()
    yield "lora_linear", lambda: ops.lora_linear(x, weight, lora_A, lora_B)
    yield "lora_linear of NF4", lambda: ops.lora_linear(x, nf4, lora_A, lora_B)
    yield "lora_linear of few tokens", lambda: ops.lora_linear(x[:3], nf4, lora_A, lora_B)
    yield "scaled_dot_product_attention", lambda: ops.scaled_dot_product_attention(q, k, v)
    yield "gated_activation", lambda: ops.gated_activation(gate, gate.flip(0), "silu")


def main() -> None:
    torch.set_num_threads(2)
    sys.setswitchinterval(1e-5)
    named = dict(calls())
    wanted: dict[str, dict[bytes, str]] = {}
    for name, call in named.items():
        wanted[name] = {}
        for path in PATHS:
            MODULE.set_isa(path)
            wanted[name].setdefault(call().view(torch.uint8).numpy().tobytes(), path)

    stop, wrong, seen, count = threading.Event(), [], defaultdict(set), [0] * CALLERS

    def switch() -> None:
        while not stop.is_set():
            for path in PATHS:
                MODULE.set_isa(path)

    def run(caller: int) -> None:
        while not stop.is_set():
            for name, call in named.items():
                bits = call().view(torch.uint8).numpy().tobytes()
                count[caller] += 1
                if bits not in wanted[name]:
                    wrong.append(name)
                    stop.set()
                else:
                    seen[name].add(wanted[name][bits])

    threads = [threading.Thread(target=switch)] + [threading.Thread(target=run, args=(i,)) for i in range(CALLERS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and not stop.is_set():
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    paths = {name: sorted(found) for name, found in seen.items()}
    print(json.dumps({"calls": sum(count), "wrong": wrong, "seen": paths}))


if __name__ == "__main__":
    main()
