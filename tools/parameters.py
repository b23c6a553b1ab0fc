"""Compares the parameters of CUDA kernels in NVRTC's machine code with those that the host functions pass.

A launch passes the addresses of parameters whose layout g++ chose, and the driver copies as many bytes of each
parameter as the machine code states. ``in_code`` reads the offset and size of each parameter from the machine code, and
``on_host`` gets the offsets and sizes from g++.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# In a kernel's section .nv.info, the entry for a parameter has the format EIFMT_SVAL (4) and the attribute
# EIATTR_KPARAM_INFO (0x17).
_WITH_SIZE, _PARAMETER = 4, 0x17
_HAS_VALUE = (1, 2, 3)  # formats of the entries that have no size field and take four bytes

Layout = list[tuple[int, int]]  # for each parameter of a kernel: its offset and its size in bytes

PROGRAM = """
#include <stdio.h>
#include "cuda/kernel_name.h"
peft_ext::Kernel::Kernel(const char* local_class, const char* file) : local_class(local_class), file(file) {{}}
template <class... P>
void show(void (*)(P...)) {{
  size_t at = 0;
  ((at = (at + alignof(P) - 1) / alignof(P) * alignof(P), printf("%zu %zu ", at, sizeof(P)), at += sizeof(P)), ...);
  printf("\\n");
}}
#include "{file}"
int main() {{
{calls}
}}
"""


def _sections(code: bytes) -> dict[str, bytes]:
    """Returns a dict from the name of each section of a 64-bit ELF file to the section."""
    (table,), (size, count, names) = struct.unpack_from("<Q", code, 0x28), struct.unpack_from("<HHH", code, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", code, table + at * size) for at in range(count)]
    text = headers[names][4]
    return {
        code[text + name : code.index(b"\0", text + name)].decode(): code[offset : offset + length]
        for name, _, _, _, offset, length in headers
    }


def in_code(code: bytes, symbol: str) -> Layout:
    """Returns the offsets and sizes of a kernel's parameters from the kernel's machine code (a cubin file)."""
    info, at, found = _sections(code)[f".nv.info.{symbol}"], 0, {}
    while at < len(info):
        format, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if format in _HAS_VALUE:
            continue
        if (format, attribute) == (_WITH_SIZE, _PARAMETER):
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at)
            found[ordinal] = (offset, flags >> 18)
        at += size
    return [found[ordinal] for ordinal in sorted(found)]


def on_host(kernels: Iterable[tuple[str, str]], compiler: str = "g++") -> dict[str, Layout]:
    """Returns a dict from each kernel to the offsets and sizes that g++ gives the kernel's parameters. ``kernels``: for
    each kernel, the C++ expression that names the kernel, which is the key of the result, and the kernel's source
    file."""
    by_file: dict[str, list[str]] = {}
    for name, file in kernels:
        by_file.setdefault(file.rpartition("csrc/")[2], []).append(name)
    found: dict[str, Layout] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "layouts")
        for file, names in by_file.items():
            calls = "\n".join(f"  show(static_cast<decltype(&{name})>(nullptr));" for name in names)
            program.with_suffix(".cpp").write_text(PROGRAM.format(file=file, calls=calls))
            command = [compiler, "-std=c++17", "-w", f"-I{ROOT / 'csrc'}", program.with_suffix(".cpp"), "-o", program]
            subprocess.run(command, check=True)
            lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
            for name, line in zip(names, lines, strict=True):
                numbers = list(map(int, line.split()))
                found[name] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def differences(kernel: str, code: bytes, symbol: str, host: Layout) -> list[str]:
    """Returns a list with one line if the parameters in the machine code differ from those on the host, and otherwise
    an empty list."""
    found = in_code(code, symbol)
    return [] if found == host else [f"{kernel}: parameters (offset, size) {found} in the code, {host} on the host"]
