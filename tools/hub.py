"""Writes peft_ext's operators and layers as a repository of Hugging Face's kernels hub.

    python tools/hub.py [--output build/hub/peft-ext] [--repo-id OWNER/peft-ext] [--wheels dist]

The repository has a folder for each variant, ``build/torch-stable-abi211-<backend>-<arch>-linux``, and ``build.toml``,
``README.md`` and ``LICENSE``. A variant is a Python package: ``tools/hub_repository/package.py`` as its ``__init__``,
``layers.py``, ``_C.py``, the modules of peft_ext that these files import directly or indirectly, the native library,
which needs no Python ABI, and files that this program writes, such as ``metadata.json``. All variants of an
architecture hold the same library; a GPU's machine code is compiled on the GPU's machine.

With ``--wheels`` the libraries are those of the wheels in a folder, and the repository has variants for each
architecture of the wheels. With ``--wheels`` the program fails if a library breaks one of the hub's rules; if the
program succeeds, the repository may be published. Without ``--wheels`` the repository has variants for this machine's
architecture alone, with the library of ``--library``, by default the checkout's. Broken rules are then only printed,
because the checkout's library may need a newer C++ runtime than the hub allows.

The operators' namespace in ``torch.ops`` is the variant's id, which ends with a digest of the native library and of the
copied Python files. ``metadata.json`` holds the SHA-256 of each other file of the variant.

The format of the repository is described in docs/source/kernel-requirements.md of huggingface/kernels.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import platform
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import stable_abi
import wheels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_ext"
SOURCES = Path(__file__).with_name("hub_repository")
LIBRARY = "_kernels.so"

NAME = "peft-ext"
MODULE = NAME.replace("-", "_")
# The version on the hub is the major version of peft_ext, which is 0 as long as peft_ext's interface may change.
VERSION = int(re.search(r'__version__ = "(\d+)', (PACKAGE / "_version.py").read_text())[1])
# The oldest release of torch that the library loads on, and the first release of `kernels` that can load the variants.
TORCH, KERNELS = "2.11", "0.15.1"
# For each backend: the words for the backend in the variants' names, and the GPU architectures in ``metadata.json``.
# With torch for CUDA a.b, the package ``kernels`` loads a variant for CUDA a.c with c <= b. torch 2.11 and later are
# built for CUDA 12.6 and later.
BACKENDS = {"cpu": (("cpu",), None), "cuda": (("cu126", "cu130"), ["8.0+PTX"])}

# The newest versions of the runtimes' symbols in manylinux_2_28, which the hub asks for.
NEWEST = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "7.0.0"}

# For each architecture, the value of the field e_machine of an ELF file.
MACHINES = {"x86_64": 62, "aarch64": 183}

# The text of <variant>/peft_ext/__init__.py. A release of `kernels` that imports this file gets the functions of
# <variant>/__init__.py.
OLD_IMPORT = '''"""The kernel, for a loader that imports this folder instead of the folder above."""

import importlib.util
import sys
from pathlib import Path

NAME = "{id}"
if NAME not in sys.modules:
    spec = importlib.util.spec_from_file_location(NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
__all__ = sys.modules[NAME].__all__
globals().update({{name: getattr(sys.modules[NAME], name) for name in __all__}})
'''

OPS = '''"""The namespace of the operators in ``torch.ops``: a name of this build alone."""

NAMESPACE = "{id}"
'''

BUILD = """# Read by `kernel-builder upload`. `make hub` of peft_ext builds the variants.
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch]
src = []

[torch.stable-abi]
{stable_abi}
"""


# --- files ------------------------------------------------------------------------------------------------------------


def imported(file: Path, folder: Path) -> Iterator[Path]:
    """Yields the modules that the relative imports of ``file`` may name, as if ``file`` were in ``folder``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = [folder, *folder.parents][node.level - 1]
        module = above.joinpath(*(node.module or "").split("."))
        for path in (module, *(module / alias.name for alias in node.names)):
            yield from (path.with_suffix(".py"), path / "__init__.py")


def modules() -> list[Path]:
    """Returns the files of peft_ext that the hub's package needs, relative to peft_ext's folder, without ``_ops.py``,
    because each variant has its own ``_ops.py``."""
    found: set[Path] = set()
    left = [path for file in sorted(SOURCES.glob("*.py")) for path in imported(file, PACKAGE)]
    while left:
        file = left.pop()
        if file in found or not file.is_file() or file == PACKAGE / "__init__.py":
            continue
        found.add(file)
        left += imported(file, file.parent)
    found.discard(PACKAGE / "_ops.py")
    return sorted(file.relative_to(PACKAGE) for file in found)


def sha256(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


def digest(folder: Path) -> dict[str, str]:
    """Returns the SHA-256, in base64, of each file of a variant except ``metadata.json``, which holds these digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "metadata.json")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


# --- the library ------------------------------------------------------------------------------------------------------


def abi_faults(library: Path, newest: Mapping[str, str] = NEWEST) -> list[str]:
    """Returns a line for each fact by which a library breaks a rule of ``kernel-builder check-abi`` or of peft_ext.

    A library must need no symbol of Python, only symbols of torch that are in the stable ABI of the release ``TORCH``,
    and no symbol of a C or C++ runtime newer than ``newest``. A library may export only functions ``peft_ext_*``. The
    symbols of torch are checked only if torch is installed.
    """
    symbols = stable_abi.undefined_symbols(library)
    found = [f"{symbol}: of Python" for symbol in symbols if re.match(r"_?Py[A-Z_]", symbol)]
    include = stable_abi.torch_include()
    if include is not None:
        found += stable_abi.violations(symbols, include)
    found += [f"exports {name}" for name in wheels.exports(library) if not name.startswith("peft_ext_")]
    for runtime, version in wheels.newest_versions(library).items():
        limit = newest.get(runtime)
        if limit is not None and _numbers(version) > _numbers(limit):
            found.append(f"needs {runtime}_{version}, wanted {runtime}_{limit} at most (manylinux_2_28)")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def from_wheels(wheels_folder: Path, output: Path) -> dict[str, Path]:
    """Copies the native libraries of the manylinux wheels in a folder to ``output``. Returns a dict from each
    architecture to the path of its library.

    Exits if the folder has no manylinux wheel, if two wheels of an architecture hold different libraries, or if a
    library is of another architecture than its wheel.
    """
    found: dict[str, Path] = {}
    for wheel in sorted(wheels_folder.glob("*.whl")):
        tag = re.search(r"-manylinux_\d+_\d+_(\w+)\.whl$", wheel.name)
        if tag is None:
            continue
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"peft_ext/{LIBRARY}")
        if int.from_bytes(content[18:20], "little") != MACHINES[tag[1]]:
            sys.exit(f"hub: {wheel.name}: {LIBRARY} is not of {tag[1]}")
        path = output / tag[1] / LIBRARY
        if tag[1] in found and path.read_bytes() != content:
            sys.exit(f"hub: {wheel.name}: {LIBRARY} differs from that of another wheel for {tag[1]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        found[tag[1]] = path
    if not found:
        sys.exit(f"hub: {wheels_folder} has no manylinux wheel (make wheels)")
    return found


# --- the repository ---------------------------------------------------------------------------------------------------


def variant_names(backend: str, architecture: str = platform.machine()) -> list[str]:
    abi = TORCH.replace(".", "")
    return [f"torch-stable-abi{abi}-{name}-{architecture}-linux" for name in BACKENDS[backend][0]]


def write_variant(folder: Path, backend: str, library: Path) -> str:
    """Writes a variant into ``folder`` and returns the variant's id, which is also the namespace of its operators."""
    folder.mkdir(parents=True)
    for file in modules():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PACKAGE / file, folder / file)
    shutil.copyfile(SOURCES / "package.py", folder / "__init__.py")
    for file in ("layers.py", "_C.py"):
        shutil.copyfile(SOURCES / file, folder / file)
    shutil.copyfile(library, folder / LIBRARY)
    content = hashlib.sha256(json.dumps(digest(folder)).encode()).hexdigest()
    name = f"_{MODULE}_{backend}_{content[:12]}"
    (folder / "_ops.py").write_text(OPS.format(id=name))
    (folder / MODULE).mkdir()
    (folder / MODULE / "__init__.py").write_text(OLD_IMPORT.format(id=name))
    archs = BACKENDS[backend][1]
    about = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "kernels-minver": KERNELS,
        "license": "Apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend} | ({"archs": archs} if archs else {}),
        "digest": {"algorithm": "sha256", "files": digest(folder)},
    }
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    return name


def write_repository(output: Path, repo_id: str, libraries: Mapping[str, Path]) -> dict[str, str]:
    """Writes the repository, which replaces the folder ``output``. Returns a dict from the name of each variant to the
    variant's id.

    ``libraries``: the native library by architecture, such as ``{"x86_64": path}``.
    """
    for library in libraries.values():
        if not library.is_file():
            sys.exit(f"hub: {library} is missing: build peft_ext first (make setup)")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as made:
        folder, ids = Path(made) / NAME, {}
        for backend in BACKENDS:
            for architecture, library in libraries.items():
                for name in variant_names(backend, architecture):
                    ids[name] = write_variant(folder / "build" / name, backend, library)
        card = (SOURCES / "CARD.md").read_text()
        for key, value in {"repo_id": repo_id, "version": str(VERSION), "kernels": KERNELS, "torch": TORCH}.items():
            card = card.replace(f"<{key}>", value)
        (folder / "README.md").write_text(card)
        (folder / "build" / "CARD.md").write_text(card)  # the card that `kernel-builder upload` reads
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
        (folder / "build.toml").write_text(
            BUILD.format(
                name=NAME,
                version=VERSION,
                repo_id=repo_id,
                backends=", ".join(f'"{backend}"' for backend in BACKENDS),
                stable_abi="\n".join(f'{backend} = "{TORCH}"' for backend in BACKENDS),
            )
        )
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build/hub" / NAME, help="default: build/hub/peft-ext")
    parser.add_argument("--repo-id", default=f"{NAME}/{NAME}", help="OWNER/NAME on the hub; default: %(default)s")
    parser.add_argument("--library", type=Path, default=PACKAGE / LIBRARY, help="default: the library of the checkout")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, whose libraries are taken instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        libraries = {platform.machine(): args.library}
        if args.wheels is not None:
            libraries = from_wheels(args.wheels, Path(folder))
        for name, identifier in write_repository(args.output, args.repo_id, libraries).items():
            print(f"{args.output}/build/{name}: torch.ops.{identifier}")
        faults = [f"{arch}: {LIBRARY} {fault}" for arch, path in libraries.items() for fault in abi_faults(path)]
    for fault in faults:
        print(f"not to be published: {fault}", file=sys.stderr)
    if faults and args.wheels is not None:
        sys.exit(1)


if __name__ == "__main__":
    main()
