"""Measures the memory of loading a packed checkpoint and of a training step, in peft_ext and in transformers + PEFT.

``python -m benchmarks.packed_memory``          measures, prints a table and writes a result file
``python -m benchmarks.packed_memory --table``  prints the newest result file as a table

The two checkpoints, a Llama with FP8 blocks and a gpt-oss with experts in MXFP4, have random weights. On a CPU
transformers dequantizes both checkpoints while it loads them. Each run is a process of its own, which first loads and
trains a tiny checkpoint of the same kind, so that the memory of imports does not count. The measured memory is the
resident memory of the process, which contains the resident pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")

import torch

from .command import command_parser, markdown, measured, run_alone
from .files import record
from .harness import machine
from .packed_training import reset_peak, status_mib

NAME = "run-packed-memory-avx512_bf16"
CASES = {"Llama, FP8 blocks": "fp8", "gpt-oss, MXFP4 experts": "mxfp4"}
LOADERS = ("peft_ext", "transformers + PEFT")
_ARCHITECTURES = {"fp8": "LlamaForCausalLM", "mxfp4": "GptOssForCausalLM"}
_BLOCK = 128


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _config(kind: str, width: int) -> Any:
    from transformers import GptOssConfig, LlamaConfig

    sizes = {"vocab_size": 512, "hidden_size": width, "num_attention_heads": 8, "num_key_value_heads": 4,
             "head_dim": width // 8, "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
    if kind == "mxfp4":
        layers = ["sliding_attention", "full_attention"] * 2
        return GptOssConfig(**sizes, intermediate_size=width, num_hidden_layers=4, num_local_experts=8,
                            num_experts_per_tok=2, layer_types=layers)  # fmt: skip
    return LlamaConfig(**sizes, intermediate_size=4 * width, num_hidden_layers=6)


def write_checkpoint(kind: str, width: int, path: Path) -> int:
    """Writes a checkpoint with random weights of the kind "fp8" or "mxfp4". Returns the bytes of its tensors."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config, held = _config(kind, width), {}
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    torch.manual_seed(0)
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if kind == "fp8" and name.endswith("_proj.weight"):
            held[name] = torch.randn(shape).clamp(-4, 4).to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = torch.full([-(-size // _BLOCK) for size in shape], 0.02)
        elif kind == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, k, n = shape
            held[f"{name}_blocks"] = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
            held[f"{name}_scales"] = torch.full((experts, n, k // 32), 121, dtype=torch.uint8)
        else:
            held[name] = (0.02 * torch.randn(shape)).bfloat16()
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}
    if kind == "fp8":
        quantization = {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK], "activation_scheme": "dynamic",
                        "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    path.mkdir(parents=True)
    save_file(held, path / "model.safetensors", {"format": "pt"})
    about = {**config.to_dict(), "architectures": [_ARCHITECTURES[kind]], "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(about))
    return sum(tensor.nbytes for tensor in held.values())


# --- one run ----------------------------------------------------------------------------------------------------------


def _load(kind: str, loader: str, path: Path) -> Any:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    import peft_ext

    stock = Mxfp4Config(dequantize=True) if kind == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    config = peft_ext.PackedConfig() if loader == LOADERS[0] else stock
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    model.config.use_cache = False
    return model


def _step(kind: str, loader: str, model: Any) -> None:
    """Adds LoRA to ``model``, accelerates the model if ``loader`` is peft_ext, and runs one forward and backward of 256
    tokens."""
    from peft import LoraConfig, get_peft_model

    import peft_ext

    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if kind == "mxfp4" else None
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    modules += [] if kind == "mxfp4" else ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, target_modules=modules, target_parameters=parameters))
    if loader == LOADERS[0]:
        peft_ext.accelerate(model)
    ids = torch.arange(256).view(1, 256)
    model.train()(input_ids=ids, labels=ids).loss.backward()


def measure(kind: str, loader: str, tiny: Path, path: Path) -> dict[str, float]:
    """Returns a dict with the peak memory of loading, the memory after loading, and the peak memory of a step. The
    figures are in MiB and leave out the memory before loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    _step(kind, loader, _load(kind, loader, tiny))
    before = status_mib("VmRSS")
    reset_peak()
    model = _load(kind, loader, path)
    loading, held = status_mib("VmHWM") - before, status_mib("VmRSS") - before
    reset_peak()
    _step(kind, loader, model)
    step = status_mib("VmHWM") - before
    return {"loading_mib": round(loading), "model_mib": round(held), "step_mib": round(step)}


# --- all runs ---------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Returns a result file as a Markdown table."""
    titles = ("| checkpoint | files, MiB | loaded and trained by | peak of loading, MiB | after loading, MiB | peak of "
              "a step of 256 tokens, MiB |")  # fmt: skip
    shown = ("case", "files_mib", "loader", "loading_mib", "model_mib", "step_mib")
    return markdown(titles, ((str(row[name]) for name in shown) for row in result["rows"]))


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = command_parser("benchmarks.packed_memory", __doc__)
    parser.add_argument("--table", action="store_true", help="print the newest result as a table; measure nothing")
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the models")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/run-packed-memory-...")
    parser.add_argument("--run", nargs=4, metavar=("KIND", "LOADER", "TINY", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run:
        kind, loader, tiny, path = options.run
        print(json.dumps(measure(kind, loader, Path(tiny), Path(path))))
        return
    if options.table:
        print(table(measured(parser, NAME, options.out)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, kind in CASES.items():
            tiny, path = Path(folder, f"{kind}-tiny"), Path(folder, kind)
            write_checkpoint(kind, 256, tiny)
            size = write_checkpoint(kind, options.width, path)
            for loader in LOADERS:
                row = {"case": case, "loader": loader, "files_mib": round(size / 2**20)}
                rows.append(row | run_alone("packed_memory", "--run", kind, loader, tiny, path))
                print(rows[-1], flush=True)
    record("run-packed-memory", {"machine": machine(), "width": options.width, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
