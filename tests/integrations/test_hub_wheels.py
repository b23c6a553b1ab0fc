"""Tests of the repository for the kernels hub that has the libraries of wheels, for each architecture."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from test_hub import LIBRARY, hub, kernels, resolved

pytestmark = pytest.mark.cpu_only("the variant for CPUs is loaded")

Digest, DigestAlgorithm, Metadata = (getattr(kernels._rust, name) for name in ("Digest", "DigestAlgorithm", "Metadata"))


def wheel_of(folder: Path, architecture: str, library: bytes, python: str = "cp311") -> None:
    folder.mkdir(exist_ok=True)
    name = f"peft_ext-0.1.0-{python}-{python}-manylinux_2_28_{architecture}.whl"
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr(f"peft_ext/{hub.LIBRARY}", library)


def test_the_wheels_libraries_make_variants_for_each_architecture(tmp_path):
    """The library for another machine stands for itself alone: a C function, cross-compiled."""
    machine = hub.platform.machine()
    other = next(name for name in hub.MACHINES if name != machine)
    if shutil.which(compiler := f"{other}-linux-gnu-gcc") is None:
        pytest.skip(f"{compiler} not found")
    (tmp_path / "exports.map").write_text("{ global: peft_ext_*; local: *; };")
    for name, source in {"good": "int peft_ext_isa(void) { return 1; }", "bad": "int peft_ext_isa(void), PyList_New();"
                         "int peft_ext_isa(void) { return PyList_New(); }"}.items():  # fmt: skip
        (tmp_path / "source.c").write_text(source)
        flags = ["-shared", "-fPIC", "-nostdlib", f"-Wl,--version-script={tmp_path / 'exports.map'}"]
        subprocess.run([compiler, tmp_path / "source.c", *flags, "-o", tmp_path / f"{name}.so"], check=True)
    good, bad = ((tmp_path / f"{name}.so").read_bytes() for name in ("good", "bad"))
    for python in ("cp310", "cp311"):
        wheel_of(tmp_path / "dist", machine, LIBRARY.read_bytes(), python)
        wheel_of(tmp_path / "dist", other, good, python)
    (tmp_path / "dist/peft_ext-0.1.0-py3-none-any.whl").write_bytes(b"not opened")
    libraries = hub.from_wheels(tmp_path / "dist", tmp_path / "libraries")
    assert libraries.keys() == {machine, other} and hub.abi_faults(libraries[other]) == []
    ids = hub.write_repository(tmp_path / "made", "owner/peft-ext", libraries)
    assert set(ids) == {
        name for backend in hub.BACKENDS for of in (machine, other) for name in hub.variant_names(backend, of)
    }
    assert resolved(tmp_path / "made", "cpu", "2.11", other) == hub.variant_names("cpu", other)
    assert resolved(tmp_path / "made", "cu130", "2.13", other) == hub.variant_names("cuda", other)[1:]
    for name, identifier in ids.items():
        folder = tmp_path / "made/build" / name
        Metadata.read_from_file(folder / "metadata.json").digest.validate(
            Digest.hash_variant(DigestAlgorithm.SHA256, folder)
        )
        assert identifier == json.loads((folder / "metadata.json").read_text())["id"]
        assert (folder / hub.LIBRARY).read_bytes() == (good if f"-{other}-" in name else LIBRARY.read_bytes())
    loaded = kernels.get_local_kernel(tmp_path / "made")
    assert loaded.__name__ == ids[hub.variant_names("cpu")[0]]
    # A library that needs functions of Python must not be published, and neither may wheels with different libraries.
    wheel_of(tmp_path / "bad", other, bad)
    (faulty,) = hub.from_wheels(tmp_path / "bad", tmp_path / "faulty").values()
    assert hub.abi_faults(faulty) == ["PyList_New: of Python"]
    wheel_of(tmp_path / "bad", other, good, "cp310")
    with pytest.raises(SystemExit, match="differs from that of another wheel"):
        hub.from_wheels(tmp_path / "bad", tmp_path / "faulty")
    wheel_of(tmp_path / "mixed", other, LIBRARY.read_bytes())
    with pytest.raises(SystemExit, match=f"is not of {other}"):
        hub.from_wheels(tmp_path / "mixed", tmp_path / "faulty")
    with pytest.raises(SystemExit, match="no manylinux wheel"):
        hub.from_wheels(tmp_path, tmp_path / "faulty")
