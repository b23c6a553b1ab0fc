"""Compares the logits of llama.cpp and peft_ext on SmolLM2-135M-Instruct, without an adapter and with an adapter.

``python -m benchmarks.llama_cpp``                 every file type; writes a result file
``python -m benchmarks.llama_cpp --types Q4_0 F16``

llama.cpp's own quantizer makes each file of the base except F16 from F16, the float16 file of the model of ``make
demo``. LoRA of rank 8 on all linear layers is trained for a few steps on Python's language reference, saved by PEFT,
and exported by ``write_gguf_adapter``. llama.cpp then computes the logits of all tokens of 20 prompts, without and with
the adapter; peft_ext computes the logits of the same tokens in float32 over the same file (``load_gguf``), with PEFT's
adapter, accelerated.

The logits of the base in llama.cpp and in peft_ext differ because llama.cpp rounds the inputs of products with weights
that are not float32, see :mod:`.llama_runner`. If an exported adapter is right, the logits with the adapter differ
about as much as the logits without an adapter.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

# A missing kernel is an error, so that llama.cpp is not compared with the reference.
os.environ.setdefault("PEFT_EXT_REQUIRE", "1")

from peft_ext.machine import versions

from .command import command_parser, markdown, measured
from .files import result_path, write
from .harness import machine
from .llama_runner import FILE_TYPES, Runner, quantize_file

NAME = "run-llama_cpp-avx512_bf16"  # Without its date, the name of the result file that the documents show.
ANSWERS, LENGTH = 5, 24  # Number of prompts for which an answer is generated, and largest number of its tokens.
PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "In Python, a list comprehension is",
    "The with statement is used to", "Once upon a time, in a small village,", "The derivative of x squared is",
    "def fibonacci(n):\n    ", "The largest planet of the solar system is", "A generator function is a function that",
    "To bake bread, you need flour, water,", "The try statement specifies exception handlers for",
    "Photosynthesis is the process by which", "import numpy as np\n\nx = np.", "The opposite of hot is",
    "An iterator is an object that implements", "Shakespeare wrote", "The global statement causes the listed",
    "Three primary colors are red,", "A class definition defines a class object", "If it rains tomorrow, we will",
)  # fmt: skip
# A file type is measured without an adapter, with the exported adapter in float16, and with the exported adapter in
# float32.
KINDS = ("none", "f16", "f32")


def float_file(source: Path, target: Path, dtype: Any = np.float16) -> None:
    """Writes the GGUF file ``target`` with the metadata of the file ``source`` and its tensors, decoded: vectors to
    float32, and other tensors to ``dtype``."""
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=element)
    kind = gguf.LlamaFileType.MOSTLY_F16 if dtype is np.float16 else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(kind)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(dtype if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def train(folder: Path, steps: int) -> dict[str, Any]:
    """Trains a LoRA adapter in float32 and saves the adapter in ``folder``. Returns the number of steps, and the first
    and the last loss."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_ext
    from peft_ext.run.data import read_corpus, tokenize
    from peft_ext.run.demo_model import demo_model

    base = demo_model()
    rows = tokenize(read_corpus("python-docs"), AutoTokenizer.from_pretrained(base), 128).train
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft_ext.get_peft_model(model, config).train()
    blocks = torch.tensor([row["input_ids"] for row in rows])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for rows_of in torch.randperm(len(blocks))[: 2 * steps].view(steps, 2):
        loss = model(input_ids=blocks[rows_of], labels=blocks[rows_of]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return {"steps": steps, "first_loss": losses[0], "last_loss": losses[-1]}


def compared(theirs: list[np.ndarray], ours: list[np.ndarray]) -> dict[str, float]:
    """Compares the logits of llama.cpp (``theirs``) and of peft_ext (``ours``): two lists with an array [tokens,
    vocabulary] for each prompt.

    ``mean`` and ``max``: mean and largest absolute difference of a logit. ``kl`` and ``kl_max``: mean and largest
    value, over the tokens, of KL(ours ‖ theirs) in nats. ``top1``: fraction of the tokens with the same most probable
    token.
    """
    one, other = (torch.from_numpy(np.concatenate(found)).double() for found in (theirs, ours))
    apart = (one - other).abs()
    p, q = other.log_softmax(-1), one.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    return {
        "mean": apart.mean().item(), "max": apart.max().item(), "kl": divergence.mean().item(),
        "kl_max": divergence.max().item(), "top1": (one.argmax(-1) == other.argmax(-1)).double().mean().item(),
    }  # fmt: skip


class Ours:
    """A model that peft_ext loads from a GGUF file, in float32."""

    def __init__(self, file: Path) -> None:
        import peft_ext

        self.model = peft_ext.load_gguf(file, dtype=torch.float32).eval()

    def adapt(self, folder: Path) -> None:
        """Adds PEFT's adapter in ``folder`` and accelerates the model."""
        import peft_ext

        self.model = peft_ext.load_adapter(self.model, folder)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self.model(torch.tensor([tokens])).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, tokens: Sequence[int], count: int, stop: int) -> list[int]:
        given = torch.tensor([tokens])
        found = self.model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False,
            eos_token_id=stop, pad_token_id=stop,
        )  # fmt: skip
        return found[0, len(tokens) :].tolist()


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the number of tokens that two lists of tokens have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def measure_type(kind: str, base: Path, adapter: Path, exported: dict[str, Path], prompts: Any, stop: int) -> Any:
    """Yields a row for each adapter of ``KINDS`` over the file ``base``.

    The field ``decoded`` of a row is the largest difference of a logit between peft_ext over ``base`` and llama.cpp
    over a file in which the package gguf has decoded the weights of ``base`` to float32. With float32 weights,
    llama.cpp does not round the inputs of products.
    """
    ours, decoded = Ours(base), base
    if kind != "F32":
        decoded = base.with_suffix(".decoded")
        float_file(base, decoded, np.float32)
    without = None
    for dtype in KINDS:
        if dtype != KINDS[2]:  # both exported adapters are compared with the same logits of peft_ext
            if dtype == KINDS[1]:
                ours.adapt(adapter)
            wanted = [ours.logits(tokens) for tokens in prompts]
            texts = [ours.greedy(tokens, LENGTH, stop) for tokens in prompts[:ANSWERS]]
            without = wanted if without is None else without
        with Runner(base, exported.get(dtype)) as runner:
            found = [runner.logits(tokens) for tokens in prompts]
            answers = [(runner.greedy(t, LENGTH, stop), text) for t, text in zip(prompts, texts, strict=False)]
        with Runner(decoded, exported.get(dtype)) as runner:
            exact = compared([runner.logits(tokens) for tokens in prompts], wanted)
        yield {
            "type": kind, "adapter": dtype, **compared(found, wanted), "moved": compared(wanted, without)["mean"],
            "decoded": exact["max"], "same_tokens": sum(_same(*pair) for pair in answers),
            "tokens": sum(len(text) for text in texts), "same_answers": sum(one == other for one, other in answers),
            "answers": len(answers),
        }  # fmt: skip
    if decoded != base:
        decoded.unlink()


def measure(types: Sequence[str], steps: int, out: Path) -> None:
    import peft_ext
    from peft_ext.run.demo_model import demo_model, packed_model

    from transformers import AutoTokenizer  # isort: skip

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        float_file(packed_model(), folder / "F16.gguf")
        adapter = folder / "adapter"
        result: dict[str, Any] = {"machine": machine(), "training": train(adapter, steps), "prompts": len(prompts)}
        result |= {"tokens": sum(map(len, prompts)), "rows": []}
        result["machine"]["versions"] |= versions("llama-cpp-python")
        for kind in types:
            base = folder / f"{kind}.gguf"
            if not base.exists():
                quantize_file(folder / "F16.gguf", base, kind)
            exported = {}
            for dtype in KINDS[1:]:
                exported[dtype] = folder / f"adapter-{dtype}.gguf"
                peft_ext.write_gguf_adapter(adapter, exported[dtype], base=base, dtype=dtype, overwrite=True)
            for row in measure_type(kind, base, adapter, exported, prompts, tokenizer.eos_token_id):
                row["bytes"] = base.stat().st_size
                result["rows"].append(row)
                print(table([row]).splitlines()[-1], flush=True)
            write(out, result)
            if kind != "F16":
                base.unlink()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of a result file as a Markdown table."""
    titles = ("| file of the base | adapter | the adapter moves a logit by | difference of the logits: mean | largest "
              "| KL, nats | same first token | equal greedy tokens | equal answers "
              "| largest difference, weights decoded |")  # fmt: skip
    return markdown(titles, [(
        row["type"], row["adapter"], "" if row["adapter"] == "none" else f"{row['moved']:.3f}",
        f"{row['mean']:.2g}", f"{row['max']:.2g}", f"{row['kl']:.2g}", f"{100 * row['top1']:.1f}%",
        f"{row['same_tokens']} of {row['tokens']}", f"{row['same_answers']} of {row['answers']}",
        f"{row['decoded']:.2g}",
    ) for row in rows])  # fmt: skip


def result_text(result: dict[str, Any]) -> str:
    """Returns the settings and the rows of a result file as Markdown."""
    trained = result["training"]
    return (f"SmolLM2-135M-Instruct, {result['tokens']} tokens of {result['prompts']} prompts; LoRA r=8 on all linear "
            f"layers, trained for {trained['steps']} steps, whose loss fell from {trained['first_loss']:.2f} to "
            f"{trained['last_loss']:.2f}.\n\n{table(result['rows'])}")  # fmt: skip


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = command_parser("benchmarks.llama_cpp", __doc__)
    parser.add_argument("--types", nargs="+", choices=FILE_TYPES, metavar="TYPE", help=f"of {', '.join(FILE_TYPES)}")
    parser.add_argument("--steps", type=int, default=24, help="training steps of the adapter")
    parser.add_argument("--table", action="store_true", help="print the newest result as a table; measure nothing")
    parser.add_argument(
        "--out", type=Path, help="result file; default: benchmarks/results/run-llama_cpp-<isa>-<date>.json"
    )
    options = parser.parse_args(argv)
    if options.table:
        print(table(measured(parser, NAME)["rows"]))
        return
    out = result_path("run-llama_cpp", machine(), options.out)
    measure(options.types or list(FILE_TYPES), options.steps, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
