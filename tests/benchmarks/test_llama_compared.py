"""Tests the parts of the comparison with llama.cpp that need no llama.cpp: figures, decoded files and the table."""

import numpy as np
import pytest

pytest.importorskip("peft")
gguf = pytest.importorskip("gguf")

from benchmarks import llama_cpp  # noqa: E402


def test_figures_of_two_lists_of_logits():
    logits = [np.array([[1.0, 2.0, 3.0], [0.0, 5.0, 1.0]], np.float32), np.zeros((1, 3), np.float32)]
    assert llama_cpp.compared(logits, logits) == {"mean": 0, "max": 0, "kl": 0, "kl_max": 0, "top1": 1}
    found = llama_cpp.compared([one + 2 for one in logits], logits)
    assert (found["mean"], found["max"], found["top1"]) == (2, 2, 1) and abs(found["kl"]) < 1e-12
    found = llama_cpp.compared([logits[0][:, ::-1], logits[1]], logits)
    assert found["top1"] == pytest.approx(2 / 3) and found["max"] == 2
    p, q = (np.exp(one) / np.exp(one).sum(-1, keepdims=True) for one in (logits[0].astype(float), logits[0][:, ::-1]))
    divergence = (p * np.log(p / q)).sum(-1)
    assert found["kl"] == pytest.approx(divergence.sum() / 3) and found["kl_max"] == pytest.approx(divergence.max())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_decoded_file_has_the_weights_and_the_metadata(tmp_path, dtype):
    from gguf_llama import small_llama, write_llama

    source = write_llama(small_llama(), tmp_path / "source.gguf", "Q4_1")
    llama_cpp.float_file(source, tmp_path / "decoded.gguf", dtype)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "decoded.gguf")
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for packed, dense in zip(before.tensors, after.tensors, strict=True):
        wanted = gguf.quants.dequantize(packed.data, packed.tensor_type)
        np.testing.assert_array_equal(dense.data, wanted.astype(dtype if wanted.ndim > 1 else np.float32))
    fields = [{name: field.contents() for name, field in one.fields.items()} for one in (before, after)]
    kinds = [one.pop("general.file_type") for one in fields]
    assert fields[0] == fields[1] and kinds[1] == (1 if dtype is np.float16 else 0)


def test_equal_tokens_before_the_first_difference():
    assert [llama_cpp._same([1, 2, 3], other) for other in ([1, 2, 3], [1, 5, 3], [1, 2], [], [4])] == [3, 1, 2, 0, 0]


def test_the_table():
    row = {"type": "Q4_0", "adapter": "none", "mean": 0.25, "max": 1.5, "kl": 0.001, "top1": 0.975, "moved": 0.0,
           "decoded": 1e-5, "same_tokens": 7, "tokens": 9, "same_answers": 1, "answers": 2}  # fmt: skip
    lines = llama_cpp.table([row, {**row, "adapter": "f16", "moved": 2.5}]).splitlines()
    assert lines[2] == "| Q4_0 | none |  | 0.25 | 1.5 | 0.001 | 97.5% | 7 of 9 | 1 of 2 | 1e-05 |"
    assert lines[3].startswith("| Q4_0 | f16 | 2.500 |") and len({line.count("|") for line in lines}) == 1
