"""Tests that the writer of merged GGUF files writes the bytes of the package gguf."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from tiny_gguf import write_and_close  # noqa: E402

from peft_ext.gguf import read_header  # noqa: E402
from peft_ext.merge.gguf_writer import PlannedTensor, file_size, write_gguf  # noqa: E402


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_the_writer_makes_the_file_of_the_package_gguf(tmp_path, alignment):
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(alignment)
    writer.add_array("names", ["a", "ä", ""])
    writer.add_file_type(3)
    for index, sizes in enumerate([(3,), (2, 5), (1, 1, 7), (2, 3, 4, 5)]):
        writer.add_tensor(f"t{index}", torch.rand(sizes).numpy())
    write_and_close(writer)
    header = read_header(path)
    tensors = {name: PlannedTensor(one.shape, one.type, one.nbytes) for name, one in header.tensors.items()}
    with (tmp_path / "two.gguf").open("wb") as file:
        write_gguf(file, header, tensors, header.data)
    assert (tmp_path / "two.gguf").read_bytes() == path.read_bytes()
    assert file_size(header, tensors) == path.stat().st_size
    with (tmp_path / "three.gguf").open("wb") as file:
        write_gguf(file, header, tensors, header.data, file_type=77)
    assert read_header(tmp_path / "three.gguf").get("general.file_type") == 77
