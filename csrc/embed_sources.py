"""Writes the C++ files of the build that hold the texts of the CUDA kernels' sources, and the digest of all sources.

    python csrc/embed_sources.py OUTPUT

The native library carries the sources, so that NVRTC can compile a kernel on the machine that runs it. The file OUTPUT
holds each header that defines a kernel, and the headers of csrc/ that those headers include, except the headers in
OF_THE_HOST.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
# Headers that device sources include only when g++ compiles them; NVRTC skips these #include lines.
OF_THE_HOST = ("emulator/device.h", "cuda/kernel_name.h")


def device_sources() -> dict[str, str]:
    """Returns the texts of the device sources by their paths in csrc/."""
    found: dict[str, str] = {}
    wanted = [path for path in CSRC.rglob("*.cuh") if "__global__" in path.read_text(encoding="utf-8")]
    while wanted:
        path = wanted.pop()
        name = path.relative_to(CSRC).as_posix()
        if name not in found and name not in OF_THE_HOST:
            found[name] = path.read_text(encoding="utf-8")
            wanted += [CSRC / included for included in _INCLUDE.findall(found[name])]
    return dict(sorted(found.items()))


def embedded() -> str:
    """Returns the text of the C++ file that holds the device sources."""
    rows = [f'    {{"{name}", R"source({text})source"}},\n' for name, text in device_sources().items()]
    return (
        '// The sources of the CUDA kernels. Written by csrc/embed_sources.py.\n#include "common/api.h"\n\n'
        "static const struct {\n  const char *path, *text;\n} kSources[] = {\n" + "".join(rows) + "};\n\n"
        "int peft_ext_source_count() { return sizeof(kSources) / sizeof(kSources[0]); }\n"
        "const char* peft_ext_source_path(int source) { return kSources[source].path; }\n"
        "const char* peft_ext_source_text(int source) { return kSources[source].text; }\n"
    )


def write(output: Path) -> Path:
    """Writes the C++ file with the sources of the CUDA kernels if its text changes. Returns the file's path."""
    return _write(output, embedded())


def write_digest(output: Path) -> Path:
    """Writes the C++ file with the digest of all sources if its text changes. Returns the file's path.

    The digest has its own file, so that after a change of a source only that source and this file are compiled.
    """
    script = CSRC.parent / "peft_ext/_source_digest.py"
    digest = runpy.run_path(str(script))["source_digest"](CSRC)
    text = (
        '// The digest of the sources in csrc/. Written by csrc/embed_sources.py.\n#include "common/api.h"\n\n'
        f'const char peft_ext::kSourceDigest[] = "{digest}";\n'
    )
    return _write(output, text)


def _write(output: Path, text: str) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists() or output.read_text(encoding="utf-8") != text:
        output.write_text(text, encoding="utf-8")
    return output


if __name__ == "__main__":
    write(Path(sys.argv[1]))
