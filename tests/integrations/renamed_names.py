"""Changes names in PEFT, transformers or bitsandbytes, and prints what peft_ext then fuses, warns and raises.

``python renamed_names.py peft_folder tmp_folder`` reads cases by name from stdin as JSON. A case has edits of a copy of
PEFT and names to delete from loaded modules. An edit is [file, pattern, replacement], where the file "*" means every
file, and a file without a pattern is renamed. A name to delete is [module, name]. Each case runs in a fork of this
process, which has loaded torch and transformers, but not PEFT. The findings are printed as JSON.
"""

import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import bitsandbytes
import torch
import transformers  # noqa: F401
from torch import nn

LAYERS = ("LoRA", "DoRA", "AdaLoRA", "IA3", "LoRA 4bit", "DoRA 4bit", "AdaLoRA 4bit", "IA3 4bit", "LoRA 8bit",
          "AdaLoRA 8bit", "LoRA Conv1D", "Linear4bit")  # fmt: skip


def _base(kind):
    """Returns a model of one linear layer; LAYERS has the names of the kinds."""
    model = nn.Sequential()
    if kind.endswith("4bit"):
        linear = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4", module=linear)
        linear.weight = weight.to("cpu")
    elif kind.endswith("8bit"):
        linear = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    elif kind.endswith("Conv1D"):
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(64, 64)
    else:
        linear = nn.Linear(64, 64)
    model.add_module("layer", linear)
    # PEFT reads from these two attributes whether a model is quantized by bitsandbytes.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind.endswith("4bit"), kind.endswith("8bit")
    return model


def _models():
    import peft

    made = {}
    for kind in LAYERS:
        method, model = kind.split()[0], _base(kind)
        if method in ("LoRA", "DoRA"):
            config = peft.LoraConfig(
                r=4, target_modules=["layer"], use_dora=method == "DoRA", fan_in_fan_out="Conv1D" in kind
            )
        elif method == "AdaLoRA":
            config = peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["layer"])
        elif method == "IA3":
            config = peft.IA3Config(target_modules=["layer"], feedforward_modules=[])
        made[kind] = model if method == "Linear4bit" else peft.get_peft_model(model, config)
    return made


def _found(folder, deleted):
    """Returns the results of accelerate, explain and other parts of peft_ext: fused layers, warnings, errors."""
    sys.path.insert(0, str(folder))
    import peft

    assert Path(peft.__file__).is_relative_to(folder), peft.__file__
    models, fused, errors = _models(), {}, {}
    for module, name in deleted:
        delattr(sys.modules[module], name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import peft_ext

        for kind, model in models.items():
            try:
                explained = peft_ext.explain(peft_ext.accelerate(model))
                fused[kind] = [row.fused for row in explained.rows]
                if "8bit" not in kind:  # the kernels of the 8-bit layers need a GPU
                    model(torch.ones(2, 64)).sum().backward() if kind != "Linear4bit" else model(torch.ones(2, 64))
            except Exception as error:
                errors[kind] = f"{type(error).__name__}: {error}"
        for part in ("get_peft_model", "load_adapter", "BottleneckConfig", "merge_to_dense"):
            try:
                getattr(peft_ext, part)
            except Exception as error:
                errors[part] = f"{type(error).__name__}: {error}"
        shown = str(peft_ext.explain(models["LoRA"])) if "LoRA" in fused else ""
    said = [str(warning.message) for warning in caught if str(warning.message).startswith("peft_ext: ")]
    return {"fused": fused, "errors": errors, "said": said, "shown": shown}


def main():
    installed, tmp = Path(sys.argv[1]), Path(sys.argv[2])
    assert "peft" not in sys.modules and "peft_ext" not in sys.modules
    found = {}
    for number, (name, case) in enumerate(json.load(sys.stdin).items()):
        folder = tmp / str(number)
        # copytree also copies compiled files, and keeps the modification times by which they refer to their sources.
        shutil.copytree(installed, folder / "peft")
        for file, pattern, replacement in case["edits"]:
            if pattern is None:
                (folder / "peft" / file).rename(folder / "peft" / replacement)
                continue
            files = (folder / "peft").rglob("*.py") if file == "*" else [folder / "peft" / file]
            changed = 0
            for path in files:
                text, count = re.subn(pattern, replacement, path.read_text())
                changed += count
                if count:
                    path.write_text(text)
            assert changed, (name, pattern)
        out = folder / "found.json"
        if (child := os.fork()) == 0:
            try:
                out.write_text(json.dumps(_found(folder, case["deleted"])))
            except BaseException as error:
                out.write_text(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
            os._exit(0)
        os.waitpid(child, 0)
        found[name] = json.loads(out.read_text())
        shutil.rmtree(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
