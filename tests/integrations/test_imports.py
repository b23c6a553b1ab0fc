"""Tests of peft_ext beside releases of PEFT, bitsandbytes or transformers that lack a name: only layers that need the
name are not fused, and a warning names the missing name.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("aenum")

from renamed_names import LAYERS  # noqa: E402

import peft_ext  # noqa: E402

PACKAGE = Path(peft_ext.__file__).parent
OUTSIDE = ("peft", "transformers", "bitsandbytes")


def word(name):
    """Returns the edit that renames ``name`` in all files of PEFT."""
    return [["*", rf"\b{name}\b", f"{name}Renamed"]]


def of(method, *bases):
    return {kind for kind in LAYERS if kind.split()[0] == method and (not bases or kind.split()[-1] in bases)}


_DENSE = ("LoRA", "DoRA", "AdaLoRA", "IA3", "Conv1D")
_DORA = of("DoRA")
# Names of PEFT, bitsandbytes and transformers without which peft_ext still works. For each name: the edits of PEFT's
# files and the deletions from loaded modules that remove the name, and the kinds of layers that are then not fused.
OPTIONAL = {
    "peft.tuners.tuners_utils.check_adapters_to_merge": (word("check_adapters_to_merge"), [], set()),
    "peft.tuners.lora.Embedding": (
        [["tuners/lora/__init__.py", "Embedding, Linear, ", "Embedding as Renamed, Linear, "]], [], set(),
    ),
    "peft.tuners.lora.Linear": (
        [["tuners/lora/__init__.py", "Embedding, Linear, ", "Embedding, Linear as Renamed, "]],
        [], {"LoRA", "DoRA", "LoRA Conv1D"},
    ),
    "peft.tuners.lora.Linear4bit": (
        [["tuners/lora/__init__.py", '"Linear4bit"', '"Renamed"']], [], {"LoRA 4bit", "DoRA 4bit"},
    ),
    "peft.tuners.lora.Linear8bitLt": (
        [["tuners/lora/__init__.py", '"Linear8bitLt"', '"Renamed"']], [], {"LoRA 8bit"},
    ),
    "peft.tuners.lora.gptq.GPTQLoraLinear": (word("GPTQLoraLinear"), [], set()),
    "peft.tuners.lora.awq.AwqLoraLinear": (word("AwqLoraLinear"), [], set()),
    "peft.tuners.lora.hqq": (
        [["*", r"\.hqq import", ".renamed import"], ["tuners/lora/hqq.py", None, "tuners/lora/renamed.py"]], [], set(),
    ),
    "peft.tuners.lora.dora": (
        [["*", r"\.dora import", ".renamed import"], ["helpers.py", "LoraModel, dora", "LoraModel, renamed as dora"],
         ["tuners/lora/dora.py", None, "tuners/lora/renamed.py"]], [], _DORA,
    ),
    "peft.tuners.lora.dora.ENABLE_DORA_CACHING": (word("ENABLE_DORA_CACHING"), [], _DORA),
    "peft.tuners.lora.dora.DoraLinearLayer": (word("DoraLinearLayer"), [], _DORA),
    "peft.tuners.lora.variants.DoraLinearVariant": (word("DoraLinearVariant"), [], _DORA),
    "peft.tuners.lora.layer.ParamWrapper": (word("ParamWrapper"), [], set()),
    "peft.tuners.adalora.SVDLinear": (word("SVDLinear"), [], {"AdaLoRA"}),
    "peft.tuners.adalora.SVDLinear4bit": (word("SVDLinear4bit"), [], {"AdaLoRA 4bit"}),
    "peft.tuners.adalora.SVDLinear8bitLt": (word("SVDLinear8bitLt"), [], {"AdaLoRA 8bit"}),
    "peft.tuners.ia3.Linear": (
        [["tuners/ia3/__init__.py", "IA3Layer, Linear\n", "IA3Layer, Linear as Renamed\n"]], [], {"IA3"},
    ),
    "peft.tuners.ia3.Linear4bit": ([["tuners/ia3/__init__.py", '"Linear4bit"', '"Renamed"']], [], {"IA3 4bit"}),
    "bitsandbytes.nn.Linear8bitLt": ([], [["bitsandbytes.nn", "Linear8bitLt"]], of("LoRA", "8bit") | {"AdaLoRA 8bit"}),
    "bitsandbytes.nn.Linear4bit": (
        [], [["bitsandbytes.nn", "Linear4bit"]], {kind for kind in LAYERS if kind.endswith("4bit")},
    ),
    "bitsandbytes.nn.Params4bit": (
        [], [["bitsandbytes.nn", "Params4bit"]], {kind for kind in LAYERS if kind.endswith("4bit")},
    ),
    "transformers.pytorch_utils.Conv1D": ([], [["transformers.pytorch_utils", "Conv1D"]], set()),
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": (
        [], [["transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"]], set(),
    ),
    "transformers.masking_utils.AttentionMaskInterface": (
        [], [["transformers.masking_utils", "AttentionMaskInterface"]], set(),
    ),
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": (
        [], [["transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"]], set(),
    ),
    "transformers.modeling_utils.AttentionInterface": (
        [], [["transformers.modeling_utils", "AttentionInterface"]], set(),
    ),
    "transformers.utils.ModelOutput": ([], [["transformers.utils", "ModelOutput"]], set()),
    "peft.PeftModel": ([], [["peft", "PeftModel"]], set()),
    "peft.tuners.tuners_utils.BaseTunerLayer": (
        # Without BaseTunerLayer, explain has no rows for adapters.
        [], [["peft.tuners.tuners_utils", "BaseTunerLayer"]], None,
    ),
}  # fmt: skip
# Attributes of stock layers that the fused layers read.
READ = {
    "cast_input_dtype_enabled": (word("cast_input_dtype_enabled"), {k for k in LAYERS if "LoRA" in k or "DoRA" in k}),
    "lora_variant": (word("lora_variant"), {k for k in LAYERS if "LoRA" in k or "DoRA" in k}),
    "lora_bias": (word("lora_bias"), of("LoRA") | of("DoRA")),
    "ranknum": (word("ranknum"), of("AdaLoRA")),
    "is_feedforward": (word("is_feedforward"), of("IA3")),
    "_cache_get": (word("_cache_get"), _DORA),
}
# Names that single functions of peft_ext need; the acceleration of a live model does not need these names.
REQUIRED = {
    "register_peft_method": word("register_peft_method"),
    "_remove_adapter_name_from_key": word("_remove_adapter_name_from_key"),
    "_enable_peft_forward_hooks": word("_enable_peft_forward_hooks"),
    "_move_adapter_to_device_of_base_layer": word("_move_adapter_to_device_of_base_layer"),
    "SEQ_CLS_HEAD_NAMES": word("SEQ_CLS_HEAD_NAMES"),
    "AuxiliaryTrainingWrapper": word("AuxiliaryTrainingWrapper"),
    "load_peft_weights": word("load_peft_weights"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    cases = {name: {"edits": edits, "deleted": deleted} for name, (edits, deleted, _) in OPTIONAL.items()}
    cases |= {name: {"edits": edits, "deleted": []} for name, (edits, _) in READ.items()}
    cases |= {name: {"edits": edits, "deleted": []} for name, edits in REQUIRED.items()}
    cases["nothing"] = {"edits": [], "deleted": []}
    script, installed = Path(__file__).with_name("renamed_names.py"), Path(peft.__file__).parent
    run = subprocess.run(
        [sys.executable, str(script), str(installed), str(tmp_path_factory.mktemp("peft"))], input=json.dumps(cases),
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def unfused(case):
    return {kind for kind, rows in case["fused"].items() if not rows or not all(rows)}


def test_nothing_is_said_where_nothing_is_renamed(found):
    case = found["nothing"]
    assert case == {"fused": {kind: [True] for kind in LAYERS}, "errors": {}, "said": [], "shown": case["shown"]}


@pytest.mark.parametrize("name", [*OPTIONAL, *READ])
def test_a_missing_name_is_said_and_costs_no_more_than_it_must(found, name):
    case, lost = found[name], OPTIONAL[name][2] if name in OPTIONAL else READ[name][1]
    assert "failed" not in case, case
    short = name.rpartition(".")[2]
    said = [text for text in case["said"] if re.search(rf"\b{short}\b", text)]
    assert said and all("is not as peft_ext knows it" in text for text in said), case["said"]
    assert all(text.removeprefix("peft_ext: ") in case["shown"] for text in said if case["shown"])
    assert set(case["errors"]) <= {"get_peft_model", "load_adapter", "BottleneckConfig", "merge_to_dense"}, case
    if lost is not None:
        assert unfused(case) == lost


@pytest.mark.parametrize("name", list(REQUIRED))
def test_what_can_not_be_used_without_a_name_says_so(found, name):
    case = found[name]
    assert case["said"] == [] and unfused(case) == set()
    raised = {part: text for part, text in case["errors"].items() if part in ("get_peft_model", "load_adapter")}
    assert set(raised) == {"get_peft_model", "load_adapter"}
    for text in raised.values():
        assert re.match(
            r"ImportError: peft_ext\.\w.* can't be used: peft [\d.]+\w* is not as peft_ext knows it: ", text
        )
        assert name in text


def imports(kind):
    """Returns the modules and names that peft_ext imports from other packages within ``with kind(...)`` blocks.

    If ``kind`` is None, returns all imports from other packages.
    """
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        inside = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
                inside |= {id(below): getattr(call.func, "id", None) for below in ast.walk(node)}
            if isinstance(node, ast.Try):
                inside |= {id(below): "try" for below in ast.walk(node)}
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside |= {id(below): "function" for below in ast.walk(node) if id(below) not in inside}
            if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
                inside |= {id(below): "types" for below in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in OUTSIDE:
                if inside.get(id(node), "bare") == kind:
                    yield file.relative_to(PACKAGE), node.module, [alias.name for alias in node.names]


def test_every_name_is_taken_by_the_one_helper():
    assert list(imports("bare")) == [] and list(imports("try")) == []
    taken = {f"{module}.{name}" for _, module, names in imports("optional") for name in names}
    assert taken == set(OPTIONAL)


def test_a_package_that_is_not_installed_is_not_said(tmp_path):
    code = (
        "import sys, warnings\n"
        "sys.modules.update(peft=None, bitsandbytes=None, transformers=None)\n"
        "warnings.simplefilter('error')\n"
        "import peft_ext, torch\n"
        "from peft_ext.integrations.peft import MISSING, accelerate\n"
        "assert MISSING == []\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_tuners_name_all_that_they_override():
    import torch
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from peft_ext.tuners import bitfit, bottleneck, diff_pruning, layer, partial, register, tuner

    for base, hooks in ((BaseTuner, register.MODEL_HOOKS), (BaseTunerLayer, register.LAYER_HOOKS)):
        own = set(dir(base)) - set(dir(torch.nn.Module)) - {"__abstractmethods__", "_abc_impl", "weight", "bias"}
        overridden = {
            name
            for module in (tuner, layer, bitfit, bottleneck, diff_pruning, partial)
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, base) and kind.__module__.startswith("peft_ext")
            for name in vars(kind)
        }
        assert overridden & own == set(hooks)


def test_a_peft_that_is_too_old_is_said(monkeypatch):
    from peft_ext.tuners import register

    monkeypatch.setattr(register.peft, "__version__", "0.20.1")
    with pytest.raises(ImportError, match=r"peft_ext.tuners needs peft >= 0\.21, found 0\.20\.1"):
        register._check_peft()
    monkeypatch.setattr(register.peft, "__version__", "0.21.0.dev0")
    register._check_peft()
