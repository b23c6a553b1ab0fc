"""Makes stand-ins for the C and C++ runtime libraries, so that a library linked on a new system runs on old systems.

    python tools/old_runtime.py FOLDER [COMPILER]

A linker takes the newest version of each symbol that the libraries of its system have, and the linked library then
needs a system that is as new as the linker's. A stand-in exports the symbols of a library of the system in the versions
that a manylinux_2_28 system has, and has no code. With the flags of ``linker_flags``, a compiler links to
the stand-ins. The code of the C++ runtime's functions that are newer than manylinux_2_28 is taken from the compiler's
libstdc++.a. With ``-Wl,-z,defs``, the linker fails if a library needs a C function that is newer than manylinux_2_28.

All other functions of the C++ runtime come from the shared libstdc++.so.6, because exceptions pass between the linked
library and torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TAG = "manylinux_2_28"
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}

LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1")
# Functions that are in libc.so.6 since glibc 2.34, and were in libraries of their own before.
MOVED = {
    "libdl.so.2": re.compile(r"dl(open|sym|vsym|close|error|addr1?|info|mopen)"),
    "libpthread.so.0": re.compile(r"(pthread|sem)_\w+|__pthread_(key_create|mutex_\w+|rwlock_\w+)"),
}
SCRIPTS = {
    "libc.so": "GROUP ( libc.so.6 AS_NEEDED ( libdl.so.2 libpthread.so.0 ) libnewer.a "
    "-l:libc_nonshared.a AS_NEEDED ( -l:{loader} ) )",
    "libm.so": "INPUT ( libm.so.6 )",
    "libgcc_s.so": "GROUP ( libgcc_s.so.1 -lgcc )",
    "libstdc++.so": "INPUT ( libstdc++.so.6 libnewer.a libnewer++.a )",
    "libdl.so": "INPUT ( AS_NEEDED ( libdl.so.2 ) )",
    "libpthread.so": "INPUT ( AS_NEEDED ( libpthread.so.0 ) )",
}
# NEWER defines two symbols that headers use and that are newer than manylinux_2_28. __libc_single_threaded is 0, which
# says that the process may have several threads. std::ios_base_library_init does nothing, because peft_ext does not use
# the C++ streams that newer versions of libstdc++ initialize in this function.
NEWER = """.text
.globl _ZSt21ios_base_library_initv
.hidden _ZSt21ios_base_library_initv
.type _ZSt21ios_base_library_initv, %function
_ZSt21ios_base_library_initv: ret
.data
.globl __libc_single_threaded
.hidden __libc_single_threaded
.type __libc_single_threaded, %object
.size __libc_single_threaded, 1
__libc_single_threaded: .byte 0
.section .note.GNU-stack,"",%progbits
"""
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}

_SYMBOL = re.compile(r"\s*\d+: \w+\s+(\w+) +(\w+) +(GLOBAL|WEAK|UNIQUE) +DEFAULT +(?!UND)\w+ +([^@\s]+)@@?(\w[\w.]*)$")


def _numbers(version: str) -> tuple[int, ...] | None:
    """Returns the numbers of a symbol's version, such as "GLIBC_2.17", if manylinux_2_28 has this version; None for a
    newer or a private version."""
    family, _, text = version.partition("_")
    if version in ("CXXABI_TM_1", "CXXABI_FLOAT128"):
        return (0,)
    if family not in NEWEST or not re.fullmatch(r"\d+(\.\d+)*", text):
        return None
    numbers = tuple(map(int, text.split(".")))
    return numbers if numbers <= NEWEST[family] else None


def symbols(library: Path) -> dict[str, tuple[str, str, int]]:
    """Returns a dict from each symbol that a shared library exports with a version that manylinux_2_28 has to the
    newest such version, the symbol's type and the symbol's size."""
    listing = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, tuple[str, str, int]] = {}
    for line in listing.splitlines():
        if match := _SYMBOL.match(line):
            size, kind, _, name, version = match.groups()
            numbers = _numbers(version)
            if numbers and (name not in found or numbers > _numbers(found[name][0])):
                found[name] = (version, kind, int(size, 0))
    return found


def _stand_in(compiler: str, path: Path, found: dict[str, tuple[str, str, int]]) -> None:
    """Makes the shared library ``path``, which exports the functions and objects of ``found`` and has no code."""
    lines = []
    for number, (name, (version, kind, size)) in enumerate(sorted(found.items())):
        if kind in ("FUNC", "IFUNC", "OBJECT"):
            stub = f"__stand_in_{number}"
            sort = "%object" if kind == "OBJECT" else "%function"
            lines += [f'.section {".data" if kind == "OBJECT" else ".text"}', f".globl {stub}",
                      f".type {stub}, {sort}", f".size {stub}, {size}", f"{stub}:",
                      f".symver {stub}, {name}@@{version}"]  # fmt: skip
    source, script = path.with_suffix(".s"), path.with_suffix(".map")
    source.write_text("\n".join([*lines, '.section .note.GNU-stack,"",%progbits', ""]))
    versions = sorted({version for version, _, _ in found.values()})
    hidden = " local: __stand_in_*;"
    script.write_text(
        "".join(f"{version} {{{hidden if number == 0 else ''} }};\n" for number, version in enumerate(versions))
    )
    subprocess.run([compiler, "-shared", "-nostdlib", f"-Wl,-soname,{path.name}", f"-Wl,--version-script,{script}",
                    source, "-o", path], check=True)  # fmt: skip


def torch_stand_in(folder: Path, compiler: str, torch: Path) -> None:
    """Makes a stand-in for this machine's libtorch_cpu.so (``torch``), to which a compiler for another architecture can
    link. The stand-in exports torch's C functions, which have the same names on every architecture.
    """
    listing = subprocess.run(["nm", "-D", "--defined-only", torch], check=True, capture_output=True, text=True).stdout
    names = sorted(set(re.findall(r" ((?:aoti_torch|torch)_\w+)$", listing, re.MULTILINE)))
    source = folder / f"{torch.name}.s"
    source.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names))
    subprocess.run([compiler, "-shared", "-nostdlib", f"-Wl,-soname,{torch.name}", source, "-o", folder / torch.name],
                   check=True)  # fmt: skip


def make(folder: Path, compiler: str = "g++") -> Path:
    """Makes the stand-ins for the runtime libraries that ``compiler`` links to in ``folder``, and returns
    ``folder``."""

    def ask(*options: str) -> str:
        return subprocess.run([compiler, *options], check=True, capture_output=True, text=True).stdout.strip()

    folder.mkdir(parents=True, exist_ok=True)
    moved: dict[str, dict[str, tuple[str, str, int]]] = {name: {} for name in MOVED}
    for name in LIBRARIES:
        found = symbols(Path(ask(f"-print-file-name={name}")))
        if name == "libc.so.6":
            for library, names in MOVED.items():
                moved[library] = {symbol: found.pop(symbol) for symbol in list(found) if names.fullmatch(symbol)}
        _stand_in(compiler, folder / name, found)
    for name, found in moved.items():
        _stand_in(compiler, folder / name, found)
    # libnewer++.a provides the functions that the stand-in of libstdc++.so.6 lacks. libnewer++.a is libstdc++.a with
    # the symbols of the stand-in made local, so that the linker takes these symbols from the shared library. The
    # section groups (COMDAT) are removed: the linker would keep only one object's sections of a group, and the local
    # symbols of the other objects would have no section.
    names = folder / "libstdc++.names"
    names.write_text("\n".join(symbols(folder / "libstdc++.so.6")) + "\n")
    subprocess.run([ask("-print-prog-name=objcopy"), f"--localize-symbols={names}", "--remove-section=.group",
                    ask("-print-file-name=libstdc++.a"), folder / "libnewer++.a"], check=True)  # fmt: skip
    (folder / "newer.s").write_text(NEWER)
    subprocess.run([compiler, "-c", folder / "newer.s", "-o", folder / "newer.o"], check=True)
    subprocess.run([ask("-print-prog-name=ar"), "rcs", folder / "libnewer.a", folder / "newer.o"], check=True)
    loader = LOADERS[ask("-dumpmachine").partition("-")[0]]
    for name, text in SCRIPTS.items():
        (folder / name).write_text(text.format(loader=loader) + "\n")
    return folder


def linker_flags(folder: Path) -> list[str]:
    """Returns linker flags that link to the stand-ins in ``folder`` and remove the symbol table."""
    return [f"-L{folder}", "-Wl,-s"]


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:3])
