"""Names what this system lacks to build peft_ext, with the commands that install what is missing.

    python tools/system_needs.py    checks Python, venv, Python's headers and the C++ compiler, before anything is built

setup.py calls :func:`build_faults`. The program needs only Python's standard library.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

OLDEST_PYTHON = (3, 10)
# GCC 11 is the first release of GCC that compiles AMX. clang 14 is the oldest clang with which `make clang-check` ran.
OLDEST_COMPILERS = {"GCC": 11, "clang": 14}
COMPILERS = " or ".join("{} {}".format(*pair) for pair in OLDEST_COMPILERS.items()) + " or newer"
# Debian 11 and Ubuntu 20.04 have no package of a new enough compiler. On RHEL, the default GCC is too old, and the GCC
# of the package gcc-toolset-13 is new enough.
INSTALL_COMPILER = """
  Debian 12, Ubuntu 22.04, or newer:  sudo apt install g++
  Fedora:                             sudo dnf install gcc-c++
  RHEL 8, 9:                          sudo dnf install gcc-toolset-13-gcc-c++ && scl enable gcc-toolset-13 bash
"""


def compiler_version(command):
    """Returns the name and the version of a C++ compiler, such as ("GCC", (12, 2)), or None if the command
    does not run or is neither GCC nor clang."""
    try:
        done = subprocess.run([*shlex.split(command), "-dM", "-E", "-x", "c++", os.devnull],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    except OSError:
        return None
    macros = dict(line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.count(" ") >= 2)
    for name, macro, minor in (("clang", "__clang_major__", "__clang_minor__"), ("GCC", "__GNUC__", "__GNUC_MINOR__")):
        if done.returncode == 0 and macro in macros:
            return name, (int(macros[macro]), int(macros[minor]))
    return None


def compiler_fault():
    """Returns why the C++ compiler can't build the library, with the commands that install another compiler; None if
    the compiler is GCC or clang and new enough."""
    command = os.environ.get("CXX", "").strip() or "c++"
    try:
        words = shlex.split(command)
    except ValueError as error:
        return f"the environment variable CXX is {command!r}, which is no command: {error}\n"
    if shutil.which(words[0]) is None:
        return f"no C++ compiler was found ({command}); wanted {COMPILERS}{INSTALL_COMPILER}"
    found = compiler_version(command)
    if found is None:
        return f"{command} is neither GCC nor clang, or does not run; wanted {COMPILERS}{INSTALL_COMPILER}"
    name, version = found
    if version[0] >= OLDEST_COMPILERS[name]:
        return None
    return (
        f"the C++ compiler {command} is {name} {version[0]}.{version[1]}; wanted {COMPILERS}, because the CPU kernels "
        "use newer instruction sets. The environment variable CXX names another compiler, for example CXX=g++-12"
        f"{INSTALL_COMPILER}"
    )


def headers_fault():
    """Returns a message that Python's headers are missing, with the commands that install the headers; None if the
    headers are there."""
    folder = sysconfig.get_path("include")
    if Path(folder, "Python.h").exists():
        return None
    version = "{}.{}".format(*sys.version_info)
    return (f"Python's headers are missing: no {folder}/Python.h\n"
            f"  Debian, Ubuntu:  sudo apt install python{version}-dev\n"
            "  Fedora, RHEL:    sudo dnf install python3-devel\n")  # fmt: skip


def venv_fault():
    """Returns a message that the running Python can't make a virtual environment, with the command that installs what
    is missing; None if the running Python has the modules venv and ensurepip."""
    if all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip")):
        return None
    version = "{}.{}".format(*sys.version_info)
    return (
        f"this Python makes no virtual environment with pip\n  Debian, Ubuntu:  sudo apt install python{version}-venv\n"
    )


def python_fault():
    """Returns a message if the running Python is older than OLDEST_PYTHON, and None otherwise."""
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return None
    have, wanted = ("{}.{}".format(*version) for version in (sys.version_info, OLDEST_PYTHON))
    return f"this Python is {have}; wanted {wanted} or newer, for make: PYTHON=python{wanted}\n"


def build_faults():
    """Returns the messages of the C++ compiler and of Python's headers; an empty list if a build can begin."""
    return [fault for fault in (compiler_fault(), headers_fault()) if fault]


def main():
    faults = [fault for fault in (python_fault(), venv_fault()) if fault] + build_faults()
    for fault in faults:
        print(f"peft_ext: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
