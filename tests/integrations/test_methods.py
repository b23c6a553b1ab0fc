"""Tests each method in each use that is a column of the table in docs/methods.md, and draws the results as this table.

    PEFT_EXT_REDRAW=1 python -m pytest tests/integrations/test_methods.py

The command above draws the table again. A test that is a column of the table runs once for each method and returns a
cell, which must be the document's. The docstring of such a test explains the column in the document.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("aenum")

import bitsandbytes as bnb
import peft
import transformers as hf
from method_rows import BATCH, INPUTS, LLAMA, METHODS, STEPS, moved_away
from methods_table import Cell, Table, cells_of, split
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import tuners
from tiny_models import HIDDEN, LAYERS, OperatorCalls, assert_close, error_of, logits, step

import peft_ext
from peft_ext.integrations.trainer import AdaLoraCallback, DiffPruningCallback
from peft_ext.nn import NF4Linear
from peft_ext.ops.library import has_kernel
from peft_ext.tuners.layer import ReplacingLayer

pytestmark = [
    pytest.mark.cpu_only("the table has a column for each device, and its steps run on the CPU"),
    pytest.mark.filterwarnings("ignore"),
]

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "methods.md"
REDRAW = "PEFT_EXT_REDRAW=1 python -m pytest tests/integrations/test_methods.py"

TABLE = Table(
    f"Each cell shows the result of one test of `tests/integrations/test_methods.py` on a Llama of {LAYERS} layers. A "
    "footnote gives the reason for each dash. The list below the table explains the columns. The tests fail if this "
    "page differs from their results. This command draws the page again:",
    REDRAW,
    tuple(METHODS),
)


def redraws() -> bool:
    return os.environ.get("PEFT_EXT_REDRAW", "") not in ("", "0")


def column(title: str, first: Iterable[str] = METHODS) -> Callable[[Callable[..., Cell]], Callable[..., None]]:
    """Registers a test as the column ``title``: its results are the cells, its docstring explains the column. The first
    tier of tests has the methods ``first``."""

    def wrap(test: Callable[..., Cell]) -> Callable[..., None]:
        TABLE.columns[title] = " ".join(inspect.getdoc(test).split())

        @pytest.mark.parametrize(
            "name", [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
        )
        @functools.wraps(test)
        def run(name: str, **fixtures: Any) -> None:
            TABLE[name, title] = test(name, **fixtures)
            if not redraws():
                TABLE.compare((name, title), DOCUMENT)

        return run

    return wrap


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves the Llama to disk, for tests that load it as users do."""
    folder = tmp_path_factory.mktemp("llama")
    LLAMA.build().save_pretrained(folder)
    return folder


def make_base(kind: str, llama: Optional[Path] = None, skip: tuple[str, ...] = ()) -> hf.PreTrainedModel:
    """Returns the Llama, "dense", in "nf4", or in "bitsandbytes" (except for the modules ``skip``), as transformers
    loads it.
    """
    if kind != "bitsandbytes":
        model = LLAMA.build()
        return peft_ext.quantize_nf4(model, progress=False) if kind == "nf4" else model
    config = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32",
        llm_int8_skip_modules=["lm_head", *skip],
    )  # fmt: skip
    return hf.LlamaForCausalLM.from_pretrained(llama, quantization_config=config, dtype=torch.float32).eval()


def adapted(
    name: str,
    base: Optional[hf.PreTrainedModel] = None,
    make: Callable[..., PeftModel] = peft_ext.get_peft_model,
    moved: bool = True,
) -> PeftModel:
    """Returns the method's model, by default over the method's own base, as after some training. The adapter has equal
    values for each ``make``."""
    base = make_base(METHODS[name].base) if base is None else base
    torch.manual_seed(3)
    model = make(base, METHODS[name].config())
    for key, parameter in model.named_parameters():
        if "ranknum" in key:  # over a base that is not float32, PEFT lets the optimizer train AdaLoRA's ranknum
            parameter.requires_grad_(False)
    return (moved_away(model) if moved else model).eval()


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the quantized linear layers, by their names in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kinds = (NF4Linear, bnb.nn.Linear4bit)
    found = {key: module for key, module in base.named_modules() if isinstance(module, kinds)}
    return {".".join(part for part in key.split(".") if part != "base_layer"): found[key] for key in found}


def dense_twin(name: str, model: PeftModel) -> PeftModel:
    """Returns the same adapter over a dense base with the dequantized weights of ``model``."""
    base = make_base("dense")
    for key, module in quantized(model).items():
        nf4 = module.nf4 if isinstance(module, NF4Linear) else peft_ext.NF4Weight.from_bitsandbytes(module.weight)
        base.get_submodule(key).weight.data = nf4.dequantize(torch.float32)
    twin = adapted(name, base)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(twin, {key: value.detach().clone() for key, value in state.items()})
    return twin


def unfused(model: nn.Module) -> tuple[str, ...]:
    """Returns explain's reasons for layers that are not fused, each once, or a sentence that nothing is adapted."""
    rows = peft_ext.explain(model).rows
    reasons = dict.fromkeys(row.reason for row in rows if not row.fused)
    return (
        tuple(f"{_capital(reason)}." for reason in reasons)
        if rows
        else ("The method adapts no layer, so all layers of the model run their own code.",)
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def said(error: Exception) -> str:
    return f"`{type(error).__name__}: {' '.join(str(error).split())}`"


# --- alone, adapted, trained ------------------------------------------------------------------------------------------


def run(module: nn.Module, inputs: tuple[Tensor, ...], call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Returns output and gradients of the inputs and of every trained parameter, for a fixed output gradient."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    y = call(module, *inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype))
    gradients = {key: p.grad for key, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), **{f"input {i}": x.grad for i, x in enumerate(inputs)}, **gradients}


@column("nn module")
def test_nn_module(name: str) -> Cell:
    """The test runs the module of `peft_ext.nn` alone, forward and backward. Output and gradients agree with
    `peft_ext.reference`, or with the formula in plain PyTorch, in float64.
    """
    kinds = []
    for make in METHODS[name].alone:
        alone = make()
        twin, doubled = copy.deepcopy(alone.module).double(), tuple(x.double() for x in alone.inputs)
        wanted = run(twin, doubled, alone.oracle)
        assert_close(run(alone.module, alone.inputs, alone.call), {key: value.float() for key, value in wanted.items()})
        kinds.append(type(alone.module).__name__)
    if kinds:
        (kind,) = set(kinds)
        assert kind in peft_ext.nn.__all__
        return Cell(f"`{kind}`")
    layers = tuners(adapted(name)).values()
    assert layers and all(isinstance(layer, ReplacingLayer) for layer in layers)
    return Cell.none(f"{_capital(name)} replaces the tensors of the base model's modules, and adds no module.")


def slope(model: PeftModel, gradients: dict[str, Tensor], reach: float = 2e-3) -> float:
    """Returns the central difference of the loss along ``gradients``, each scaled to length 1."""
    losses = []
    for sign in (1, -1):
        there = copy.deepcopy(model)
        for key, parameter in there.named_parameters():
            if key in gradients:
                parameter.data += sign * reach * gradients[key] / gradients[key].norm()
        losses.append(step(there, BATCH)["loss"].item())
    return (losses[0] - losses[1]) / (2 * reach)


@column("`get_peft_model`")
def test_get_peft_model(name: str) -> Cell:
    """The test runs a model of `peft_ext.get_peft_model`, forward and backward. Logits, loss and gradients agree with
    stock PEFT. For a method that PEFT does not have, the gradient agrees with a finite difference of the loss. A cell
    of this column shows the number of trained parameters.
    """
    model = adapted(name)
    found = step(model, BATCH)
    if METHODS[name].in_peft:
        assert_close(found, step(adapted(name, make=peft.get_peft_model), BATCH))
    else:
        gradients = {key: value for key, value in found.items() if key not in ("loss", "logits")}
        lengths = sum(value.norm().item() for value in gradients.values())
        assert lengths > 0 and all(value.norm() > 0 for value in gradients.values())
        assert slope(model, gradients) == pytest.approx(lengths, rel=1e-2)
    plain = logits(make_base(METHODS[name].base), INPUTS)
    assert error_of(logits(model, INPUTS)[:, -plain.shape[1] :], plain) > 1e-3  # the adapter has an effect
    return Cell(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained")


@column("Trainer", first=("LoRA", "AdaLoRA", "Diff Pruning"))
def test_trainer(name: str, tmp_path: Path) -> Cell:
    """transformers' `Trainer` runs four steps; AdaLoRA and Diff Pruning use their callbacks. The loss falls, trained
    parameters change, and all other parameters do not change.
    """
    method = METHODS[name]
    model, callback = adapted(name, moved=False), method.callback()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def loss() -> float:
        return model.eval()(**BATCH).loss.item()

    start = loss()
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=len(BATCH["labels"]), learning_rate=0.02,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    rows = [dict(zip(BATCH, row, strict=True)) for row in zip(*BATCH.values(), strict=True)]
    hf.Trainer(model=model.train(), args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert loss() < start
    after = dict(model.named_parameters())
    moved = {key for key in before if key not in after or not torch.equal(after[key], before[key])}
    assert moved == trained
    if isinstance(callback, AdaLoraCallback):
        ranks = [p for key, p in after.items() if "lora_E" in key]
        held, kept = sum(p.numel() for p in ranks), sum(int(p.count_nonzero()) for p in ranks)
        assert kept < held
        return Cell(f"loss falls, {kept} of {held} ranks kept")
    if isinstance(callback, DiffPruningCallback):
        held, kept = sum(before[key].numel() for key in before if key.endswith(".w")), sum(callback.kept.values())
        assert kept < held and kept == sum(p.numel() for key, p in after.items() if key.endswith(".values"))
        return Cell(f"loss falls, {kept:,} of {held:,} entries kept")
    return Cell("loss falls")


# --- files ------------------------------------------------------------------------------------------------------------

# The code of a process that reads the adapters with PEFT alone, then imports peft_ext and reads again the adapters that
# gave an error.
_READER = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from peft import PeftModel

llama, folder = sys.argv[1:]
job = torch.load(f"{folder}/job.pt")
config = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
              bnb_4bit_compute_dtype="float32", llm_int8_skip_modules=["lm_head"])

def read(name):
    own = dict(quantization_config=transformers.BitsAndBytesConfig(**config)) if name in job["4-bit"] else {}
    base = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32, **own)
    try:
        model = PeftModel.from_pretrained(base, f"{folder}/{name}")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    # In eval mode bitsandbytes may repack a weight and compute in bfloat16; there is no dropout in this model.
    model.train(name in job["4-bit"])
    with torch.no_grad():
        return model(**job["inputs"]).logits

alone = {name: read(name) for name in job["names"]}
assert "peft_ext" not in sys.modules
import peft_ext.tuners
beside = {name: read(name) for name, found in alone.items() if isinstance(found, str)}
torch.save((alone, beside), f"{folder}/read.pt")
"""


def exchange_base(name: str, llama: Path) -> hf.PreTrainedModel:
    """Returns a base model that stock PEFT supports too."""
    return make_base("dense" if METHODS[name].base == "dense" else "bitsandbytes", llama)


@dataclass
class StockReader:
    """A process of stock PEFT that reads adapters of accelerated models. ``wanted`` has the logits of the accelerated
    models, by method."""

    process: subprocess.Popen
    folder: Path
    wanted: dict[str, Tensor]

    @functools.cached_property
    def found(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns logits or an error by method, without peft_ext; and, for methods with an error, again with peft_ext
        imported.
        """
        self.process.wait(timeout=600)
        assert self.process.returncode == 0, (self.folder / "errors").read_text()
        return torch.load(self.folder / "read.pt")


@pytest.fixture(scope="module")
def stock_reader(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockReader]:
    """Saves an adapter of each method, and starts the process of stock PEFT that reads the adapters."""
    folder, wanted = tmp_path_factory.mktemp("read"), {}
    for name in METHODS:
        model = adapted(name, exchange_base(name, llama))
        model.save_pretrained(folder / name)
        wanted[name] = logits(model, INPUTS)
    four_bit = [name for name, method in METHODS.items() if method.base != "dense"]
    torch.save({"inputs": INPUTS, "names": list(METHODS), "4-bit": four_bit}, folder / "job.pt")
    command = [sys.executable, "-c", _READER, str(llama), str(folder)]
    with (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    yield StockReader(process, folder, wanted)
    process.kill()
    process.wait()


@column("save, load")
def test_save_and_load(name: str, tmp_path: Path) -> Cell:
    """`save_pretrained` saves the adapter, and `peft_ext.load_adapter` loads the adapter into a new base model. The
    logits are bitwise equal, and the same layers are fused.
    """
    model = adapted(name)
    model.save_pretrained(tmp_path)
    loaded = peft_ext.load_adapter(make_base(METHODS[name].base), tmp_path)
    assert torch.equal(logits(loaded, INPUTS), logits(model, INPUTS))
    assert peft_ext.explain(loaded).rows == peft_ext.explain(model).rows
    return Cell("same bits")


@column("PEFT reads ours", first=())
def test_peft_reads_ours(name: str, stock_reader: StockReader) -> Cell:
    """Stock `PeftModel.from_pretrained` loads an adapter that an accelerated model saved, in a process that has not
    imported peft_ext. The logits agree. QLoRA's base has bitsandbytes' 4-bit layers.
    """
    alone, beside = (found.get(name) for found in stock_reader.found)
    found = beside if isinstance(alone, str) else alone
    assert isinstance(found, Tensor), found
    assert_close(found, stock_reader.wanted[name])
    assert isinstance(alone, Tensor) is METHODS[name].in_peft
    if isinstance(alone, Tensor):
        return Cell("same logits")
    return Cell(
        "same logits, with `import peft_ext.tuners`",
        (f"Without the import of `peft_ext.tuners`, PEFT raises `{' '.join(alone.split())}`.",),
    )


@column("we read PEFT's", first=("LoRA", "AdaLoRA", "prefix tuning"))
def test_we_read_pefts(name: str, llama: Path, tmp_path: Path) -> Cell:
    """`peft_ext.load_adapter` loads an adapter that stock PEFT saved. The logits agree, and as many layers are fused as
    in a model of `peft_ext.get_peft_model`. QLoRA's base has bitsandbytes' 4-bit layers.
    """
    if not METHODS[name].in_peft:
        return Cell.none("PEFT does not have this method, so stock PEFT cannot save such an adapter.")
    stock = adapted(name, exchange_base(name, llama), make=peft.get_peft_model)
    stock.save_pretrained(tmp_path)
    loaded = peft_ext.load_adapter(exchange_base(name, llama), tmp_path)
    # In training mode bitsandbytes does not repack the stock model's 4-bit weights.
    with torch.no_grad():
        assert_close(logits(loaded, INPUTS), stock.train(METHODS[name].base != "dense")(**INPUTS).logits)
    made = peft_ext.explain(adapted(name, exchange_base(name, llama)))
    assert [(row.name, row.fused) for row in peft_ext.explain(loaded).rows] == [(r.name, r.fused) for r in made.rows]
    return Cell("same logits")


# --- merged, over 4 bits ----------------------------------------------------------------------------------------------


@column("merge")
def test_merge(name: str) -> Cell:
    """`merge_and_unload` returns a plain transformers model with the logits of the adapted model. Over NF4, the test
    compares the codes with those of the quantized merged weight.
    """
    model = adapted(name)
    wanted = logits(model, INPUTS)
    try:
        merged = copy.deepcopy(model).merge_and_unload()
    except ValueError as error:
        return Cell.none(f"`merge_and_unload` raises {said(error)}.")
    except AttributeError as error:
        assert model.active_peft_config.is_prompt_learning and not tuners(model)
        return Cell.none(f"{_capital(name)} adapts no layer, so there is nothing to merge: {said(error)}.")
    assert type(peft_ext.restore(merged)) is LLAMA.model
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    if not quantized(model):
        assert_close(logits(merged, INPUTS), wanted)
        return Cell("same logits")
    dense = dense_twin(name, model).merge_and_unload()
    assert quantized(merged).keys() == quantized(model).keys()
    for key, module in quantized(merged).items():
        weight = peft_ext.ops.nf4_quantize(dense.get_submodule(key).weight, double_quant=True)
        off = (module.dequantize(torch.float32) - weight.dequantize(torch.float32)).abs() > 1e-6
        # A sum that is rounded in another order may fall on the other side of a threshold.
        assert off.float().mean() < 1e-2, key
    return Cell(
        "requantized",
        ("The merge rounds the sum of base and adapter to NF4 again, and this rounding changes the logits.",),
    )


def over_4_bits(name: str, kind: str, llama: Path) -> tuple[PeftModel, tuple[str, ...]]:
    """Returns the method over a quantized base. If adapting a quantized base raises an error, the model is adapted
    before it is quantized (NF4), or the trained modules are left dense (bitsandbytes), and a note says so.
    """
    try:
        return adapted(name, make_base(kind, llama)), ()
    except (ValueError, RuntimeError) as error:
        refused = said(error)
    if kind == "nf4":
        model = peft_ext.quantize_nf4(adapted(name), progress=False)
        return peft_ext.accelerate(model), (
            "The model was adapted first, then quantized by `quantize_nf4`. Quantizing before the adapter is added "
            f"raises {refused}.",
        )
    layers = tuners(adapted(name)).items()
    skip = tuple(key.removeprefix("base_model.model.") for key, layer in layers if isinstance(layer, ReplacingLayer))
    note = f"`llm_int8_skip_modules` named the trained modules. Quantizing the trained modules raises {refused}."
    return adapted(name, make_base(kind, llama, skip)), (note,)


def base_cell(name: str, kind: str, llama: Path) -> Cell:
    model, notes = over_4_bits(name, kind, llama)
    twin = dense_twin(name, model)
    assert_close(step(model, BATCH), step(twin, BATCH))
    count = len(quantized(model))
    assert count > 0
    notes += tuple(reason for reason in unfused(model) if reason not in unfused(twin))
    return Cell(f"{count} of {len(quantized(make_base(kind, llama)))} linears", notes)


@column("NF4 base", first=("LoRA", "QLoRA", "DoRA", "IA3", "bottleneck, parallel"))
def test_nf4_base(name: str, llama: Path) -> Cell:
    """The test runs the method over a base of `peft_ext.quantize_nf4`, double-quantized, forward and backward. Logits,
    loss and gradients agree with those over the dequantized weights. A cell of this column shows how many linear layers
    of the model are in NF4.
    """
    return base_cell(name, "nf4", llama)


@column("bitsandbytes base", first=("LoRA", "QLoRA", "bottleneck, parallel", "partial fine-tuning"))
def test_bitsandbytes_base(name: str, llama: Path) -> Cell:
    """The test of the NF4 base runs over double-quantized `Linear4bit` layers as transformers loads them."""
    return base_cell(name, "bitsandbytes", llama)


# --- compiled, fused --------------------------------------------------------------------------------------------------


@column("compile", first=("LoRA", "IA3", "AdaLoRA"))
def test_compile(name: str) -> Cell:
    """`torch.compile(fullgraph=True)` compiles the adapted MLP of the last layer, forward and backward. If the method
    adapts decoder layers as a whole, the last decoder layer is compiled. For prefix and prompt tuning, the whole
    PeftModel is compiled. Outputs and gradients agree with those of eager mode.
    """
    model = adapted(name).train()
    if tuners(model):
        base = model.get_base_model().model
        module, inputs = base.layers[-1].mlp, {"x": torch.randn(5, HIDDEN)}
        if isinstance(base.layers[-1], BaseTunerLayer):
            module, hidden = base.layers[-1], torch.randn(1, 5, HIDDEN)
            positions = base.rotary_emb(hidden, torch.arange(5)[None])
            inputs = {"hidden_states": hidden, "position_embeddings": positions}
        assert any(isinstance(below, BaseTunerLayer) for below in module.modules())
    else:
        module, inputs = model, BATCH
    parameters = [p for p in module.parameters() if p.requires_grad]

    def outcome(call: Callable[..., Any]) -> dict[str, Tensor]:
        torch.manual_seed(4)
        y = call(**inputs)
        y = getattr(y, "logits", y)
        gradients = torch.autograd.grad(y.square().mean(), parameters)
        return {"y": y.detach(), **{str(i): value for i, value in enumerate(gradients)}}

    wanted = outcome(module)
    torch._dynamo.reset()
    try:
        found, cell = outcome(torch.compile(module, fullgraph=True, backend="aot_eager")), Cell("one graph")
    except torch._dynamo.exc.Unsupported:
        torch._dynamo.reset()
        explained = torch._dynamo.explain(module)(**inputs)
        reasons = dict.fromkeys(one.reason.splitlines()[0] for one in explained.break_reasons)
        torch._dynamo.reset()
        found = outcome(torch.compile(module, backend="aot_eager"))
        notes = tuple(f"torch.compile says: {reason}." for reason in reasons)
        cell = Cell(f"{explained.graph_break_count} graph breaks", notes)
    # In Diff Pruning, the gate of a whole tensor is fully open here, where its clamp has no gradient.
    flat = {key for key, value in wanted.items() if not value.any()}
    assert not any(found[key].any() for key in flat) and "y" not in flat
    assert_close(*({key: value for key, value in each.items() if key not in flat} for each in (found, wanted)))
    return cell


def operators(model: nn.Module) -> OperatorCalls:
    """Runs a training step and returns a counter of its calls of each operator of peft_ext."""
    with OperatorCalls() as seen:
        step(model, BATCH)
    return seen


OF_BLOCKS = {
    "activation", "cross_entropy_rows", "gated_activation", "layer_norm", "rms_norm", "rotary_embedding",
}  # fmt: skip


@column("fused on CPU")
def test_fused_on_cpu(name: str) -> Cell:
    """A cell of this column shows how many of the adapted layers are fused, as `explain` reports. In a training step,
    each fused layer calls its operator once, and every operator of the step, including those of the blocks, has a
    native kernel.
    """
    model = adapted(name)
    rows = peft_ext.explain(model).rows
    calls = operators(model).calls
    assert all(has_kernel(operator, "CPU") for operator in calls), calls
    fused = sum(row.fused for row in rows)
    layers = {operator: count for operator, count in calls.items()
              if f"{operator}_backward" in calls and operator not in OF_BLOCKS}  # fmt: skip
    assert sum(layers.values()) == sum(calls[f"{operator}_backward"] for operator in layers) == fused
    if not fused:
        assert set(calls) <= OF_BLOCKS | {f"{operator}_backward" for operator in OF_BLOCKS}
        return Cell.none(*unfused(model))
    return Cell(f"{fused} of {len(rows)} layers", unfused(model))


def cuda_operators() -> set[str]:
    """Returns the operators that csrc registers for CUDA."""
    found = set()
    for path in (ROOT / "csrc").rglob("*_cuda.cpp"):
        source = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for block in re.findall(r"PEFT_EXT_CUDA_LIBRARY\(\w+\)\s*\{(.*?)\}", source, flags=re.DOTALL):
            found.update(re.findall(r'\.impl\("(\w+)"', block))
    return found


@column("fused on CUDA")
def test_fused_on_cuda(name: str) -> Cell:
    """A cell of this column shows how many operators of a training step have a CUDA kernel in `csrc`. Other tests run
    these kernels under the emulator; no test of this table has run on a GPU.
    """
    model = adapted(name)
    calls = operators(model).calls
    if not calls:
        return Cell.none(*unfused(model))
    assert any(operator.endswith("_backward") for operator in calls)
    without = sorted(set(calls) - cuda_operators())
    notes = (
        (f"These operators have no CUDA kernel: {', '.join(f'`{operator}`' for operator in without)}.",)
        if without
        else ()
    )
    return Cell(f"{len(calls) - len(without)} of {len(calls)} operators", notes)


# --- the document -----------------------------------------------------------------------------------------------------


def test_docs_methods_md_is_drawn_from_its_cells() -> None:
    """Compares the text around the cells too. Each cell is compared by the cell's own test."""
    if redraws():
        DOCUMENT.write_text(TABLE.draw())
    text = DOCUMENT.read_text()
    body, drawn_with = split(text)
    table = dataclasses.replace(TABLE, cells=cells_of(text))
    assert split(table.draw())[0] == body, f"docs/methods.md is out of date; draw it: {REDRAW}"
    assert drawn_with.startswith("Drawn with torch ")
