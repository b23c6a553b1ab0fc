"""Tests the scaling of rotary positions that a GGUF file describes, which transformers does not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files as gf
import pytest
import torch
from gguf_files import F32, STRING, U32

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from peft_ext.gguf import GgufError, read_header  # noqa: E402
from peft_ext.gguf.metadata import read_config  # noqa: E402

pytestmark = pytest.mark.cpu_only("files are read on the CPU")


def read(path: Path, architecture: str, **changes: Any) -> Any:
    def edit(keys: dict[str, Any]) -> None:
        keys.update({f"{architecture}.rope.{name.replace('__', '.')}": value for name, value in changes.items()})

    (path / "a.gguf").write_bytes(gf.model_file(architecture, edit).out)
    return read_config(read_header(path / "a.gguf"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_linear(architecture: str, tmp_path: Path) -> None:
    plain = read(tmp_path, architecture)
    for changes in (
        {"scaling__type": (STRING, "linear"), "scaling__factor": (F32, 4.0)},
        {"scaling__factor": (F32, 4.0)},
        {"scale_linear": (F32, 4.0)},
    ):
        found = read(tmp_path, architecture, **changes)
        assert found.rope_parameters == {**plain.rope_parameters, "rope_type": "linear", "factor": 4.0}
        with torch.device("cpu"):
            models = [transformers.AutoModelForCausalLM.from_config(one) for one in (plain, found)]
        first, second = (model.model.rotary_emb.inv_freq for model in models)
        assert torch.equal(first / 4, second)


def test_yarn(tmp_path: Path) -> None:
    changes = {"scaling__type": (STRING, "yarn"), "scaling__factor": (F32, 4.0)}
    for original, wanted in ((None, 64), ((U32, 16), 16)):
        more = {} if original is None else {"scaling__original_context_length": original}
        found = read(tmp_path, "llama", **changes, **more).rope_parameters
        assert found["rope_type"] == "yarn" and found["factor"] == 4.0
        assert found["original_max_position_embeddings"] == wanted


def test_gemma3_scales_full_attention_alone(tmp_path: Path) -> None:
    plain = read(tmp_path, "gemma3").rope_parameters
    found = read(tmp_path, "gemma3", scaling__type=(STRING, "linear"), scaling__factor=(F32, 8.0)).rope_parameters
    assert found["sliding_attention"] == plain["sliding_attention"]
    assert found["full_attention"] == {**plain["full_attention"], "rope_type": "linear", "factor": 8.0}


def test_no_scaling(tmp_path: Path) -> None:
    plain = read(tmp_path, "llama").rope_parameters
    for changes in (
        {"scaling__type": (STRING, "none")},
        {"scaling__type": (STRING, "none"), "scaling__factor": (F32, 4.0)},
        {"scaling__type": (STRING, "linear")},
        {"scaling__type": (STRING, "linear"), "scaling__factor": (F32, 1.0)},
        {"scaling__factor": (F32, 0.0)},
    ):
        assert read(tmp_path, "llama", **changes).rope_parameters == plain


@pytest.mark.parametrize(("kind", "factor"), [("longrope", 4.0), ("nope", None), ("yarn", None), ("default", 2.0)])
def test_kinds_that_are_not_known(kind: str, factor: Any, tmp_path: Path) -> None:
    changes = {"scaling__type": (STRING, kind)} | ({} if factor is None else {"scaling__factor": (F32, factor)})
    with pytest.raises(GgufError) as caught:
        read(tmp_path, "llama", **changes)
    message = f"llama.rope.scaling.type is {kind!r} with the factor {factor}, wanted linear or yarn"
    assert str(caught.value) == f"{tmp_path / 'a.gguf'}: {message}"
