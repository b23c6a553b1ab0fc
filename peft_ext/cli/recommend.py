"""``peft-ext recommend``: prints :func:`peft_ext.recommend_peft_method`'s answer as text or as JSON."""

from __future__ import annotations

import re
from typing import Annotated, Optional

import torch
import typer

from ..run.errors import RunError, need
from ..run.progress import quiet, status
from ..sources.json_file import first_line
from ..weights.quantizers import PACKED_FORMATS
from ._common import dense_config, model_config, print_json

_OPTIONS = {
    "model_size_b": "model-size", "gpu_memory_gb": "memory", "task_type": "task", "num_examples": "examples",
    "batch_size": "batch-size", "sequence_length": "sequence-length", "prefer": "prefer", "headroom": "headroom",
    "quantization": "quant",
}  # fmt: skip


def recommend(
    model_size: Annotated[Optional[float], typer.Option(help="Billions of parameters.")] = None,
    model: Annotated[Optional[str], typer.Option(help='Or a model: folder, hub name, "smollm2".')] = None,
    memory: Annotated[
        Optional[float],
        typer.Option(help="Memory of the card in GB. Default: this machine's GPU."),
    ] = None,
    task: Annotated[str, typer.Option(help="generation, classification, ner, qa, summarization, ...")] = "generation",
    examples: Annotated[Optional[int], typer.Option(help="Number of training examples. Default: unknown.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of one forward; may be lowered to 1.")] = 4,
    sequence_length: Annotated[Optional[int], typer.Option(help="Tokens. Default: 1024; encoders: 512.")] = None,
    prefer: Annotated[str, typer.Option(help="balanced, or quality, which allows a slower step.")] = "balanced",
    quant: Annotated[str, typer.Option(help=f"If quantized: nf4, {', '.join(PACKED_FORMATS)}.")] = "nf4",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Recommend a method and its setting for a model, a card, a task and an amount of data, with reasons."""
    if (model_size is None) == (model is None):
        raise RunError("--model-size (billions of parameters) or --model (a folder): wanted one of them")
    need("recommend", "transformers", "peft")
    quiet()
    from ..recommend import recommend_peft_method

    subject = model_size if model is None else dense_config(model_config(model)[1])
    if memory is None:
        if not torch.cuda.is_available():
            raise RunError("--memory: wanted the memory of the card in GB, since this machine has no GPU")
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    try:
        with status("tracing training steps"):
            found = recommend_peft_method(
                subject, memory, task, examples, batch_size=batch_size, sequence_length=sequence_length, prefer=prefer,
                quantization=quant,
            )  # fmt: skip
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(_in_options(first_line(error))) from None
    if as_json:
        print_json({"fits": found.fits, **vars(found)})
    else:
        print(found)
    return 0 if found.fits else 1


def _in_options(text: str) -> str:
    """Returns the text of an error of ``recommend_peft_method``, with options in place of the arguments' names.

    An example of the result is ``--memory 0: wanted ...``.
    """
    text = text.partition(": ")[2] if text.startswith("recommend_peft_method: ") else text
    match = re.match(r"(\w+) is (.+?), (.*)", text)
    if match is None or match[1] not in _OPTIONS:
        return text
    return f"--{_OPTIONS[match[1]]} {match[2].strip(chr(39))}: {match[3]}"
