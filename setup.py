"""Builds the native library ``peft_ext/_kernels.so`` and the pybind11 module ``peft_ext._C``.

The library has the CPU kernels, the host functions of the CUDA operators, and the sources of the CUDA kernels, which
are compiled on the machine that runs them (``peft_ext/device_code.py``). The build needs a C++ compiler, Python's
headers and any build of torch, but no CUDA toolkit (``tools/system_needs.py``). The library calls torch through torch's
stable ABI, so that one build runs on torch TORCH_TARGET and later; the module ``_C`` makes the functions of
``csrc/common/api.h`` callable from one release of Python. On Windows nothing is built, and the operators run the slow
reference. Environment variables:
    CXX                 the C++ compiler that is checked, compiles and links, also with words before the compiler or
                        with options (``ccache g++``, ``g++-12 -pipe``); default: ``c++``
    MAX_JOBS            number of parallel compilations
    PEFT_EXT_KERNELS    a native library that was built before and is taken instead of building the library; the build
                        of the module then needs no torch
    PEFT_EXT_PURE=1     neither the library nor the module is built: every operator runs the slow reference. An editable
                        install also removes the library and the modules of an earlier build from ``peft_ext/``
"""

import contextlib
import hashlib
import os
import re
import runpy
import shlex
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = os.environ.get("PEFT_EXT_KERNELS")
BINDINGS = Path("csrc/bindings.cpp")
TORCH_TARGET = (2, 11)
GENERATED = ROOT / "build"  # files that setup.py writes: C++ sources, version scripts, and a script that calls CXX


class BuildPython(build_py):
    """Empties the build folder before the Python files are copied into it, because the folder may hold modules of an
    earlier build that are no longer in the checkout.
    """

    def run(self):
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(Path(self.build_lib, "peft_ext"), ignore_errors=True)
        super().run()


# The licence is not in pyproject.toml, because setuptools before 77 refuses a licence expression in pyproject.toml.
# Such an old setuptools may be installed, because torch limits setuptools' version.
METADATA = {"license": "Apache-2.0", "license_files": ["LICENSE"], "zip_safe": False}
COMMANDS = {"build_py": BuildPython}
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "peft_ext/_version.py").read_text()).group(1)


def find_torch():
    """Returns the torch that this process can import. In pip's isolated build, returns the torch of the environment
    that peft_ext is installed into. Returns None if there is no torch in either place.
    """
    try:
        import torch
    except ModuleNotFoundError:
        places = folders_of_packages()
        if not any(Path(place, "torch", "version.py").exists() for place in places):
            return None
        # All folders are added, because torch's requirements may be in another folder than torch.
        sys.path += places
        import torch
    return torch


def folders_of_packages():
    """Returns the folders of packages of the environment that peft_ext is installed into, in the order of sys.path.

    pip's isolated build hides the folders of this environment from Python. In a virtual environment without
    ``--system-site-packages``, the result has only the folders of the virtual environment. Otherwise the result also
    has the user's folder and the folders of the system.
    """
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    settings = Path(sys.prefix, "pyvenv.cfg")
    if not settings.exists() or re.search(r"(?im)^include-system-site-packages\s*=\s*true", settings.read_text()):
        places += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])]
    return list(dict.fromkeys(places))


def linker_flags(exported):
    """Returns linker flags, with which only the symbols of the pattern ``exported`` are exported, symbols are bound at
    load and then read-only, and the stack is not executable. Returns no flags except on Linux.
    """
    if sys.platform != "linux":
        return []
    # Instances of templates of namespace std stay visible with -fvisibility=hidden; a version script hides them.
    script = GENERATED / f"{exported.rstrip('*_')}.map"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"{{ global: {exported}; local: *; }};\n")
    # -Xlinker, because the compiler would divide an argument of -Wl at each comma of the path.
    return ["-Wl,--as-needed", "-Xlinker", f"--version-script={script}", "-Wl,-z,relro,-z,now,-z,noexecstack"]


def check_system():
    """Ends the build before the compilation if the system lacks a compiler or Python's headers."""
    faults = runpy.run_path(str(ROOT / "tools/system_needs.py"))["build_faults"]()
    if faults:
        sys.exit("\n".join(f"peft_ext: {fault}" for fault in faults))


def compiler():
    """Returns the path or name of a program that is the C++ compiler CXX. If CXX has several words, such as
    ``ccache g++`` or ``g++-12 -pipe``, writes a script that calls CXX, because torch takes CXX for a single name.
    """
    words = shlex.split(os.environ["CXX"])
    if len(words) == 1:
        return words[0]
    # A digest of the words is part of the script's name, so that ninja compiles all files again if CXX changes.
    script = GENERATED / f"compiler-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"
    script.parent.mkdir(exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o755)
    os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"  # torch would put ccache before the script, which may call ccache
    return str(script)


def options_of(command):
    """Returns the options of a command, without the words before the first option: ``["-pthread"]`` for ``ccache gcc
    -pthread``."""
    first = next((at for at, word in enumerate(command) if word.startswith("-")), len(command))
    return command[first:]


def compiler_flags(*folders):
    # -ffp-contract=off, because NF4's codes depend on a product and a sum that are rounded separately. No -march,
    # because the kernels choose their instruction set when they run. -ffile-prefix-map keeps the folders of the build
    # out of error messages that name the source file. -Wno-unknown-pragmas, because g++ does not know CUDA's pragmas.
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-g0"]
    return [*flags, *(f"-ffile-prefix-map={folder}/=" for folder in (ROOT, *folders))]


def generated_sources(*functions):
    """Calls the named functions of csrc/embed_sources.py. Returns the paths, relative to ROOT, of the C++ files that
    these functions wrote."""
    of_functions = {"write": "embedded_sources.cpp", "write_digest": "source_digest.cpp"}
    script = runpy.run_path(str(ROOT / "csrc/embed_sources.py"))
    return [str(script[name](GENERATED / of_functions[name]).relative_to(ROOT)) for name in functions]


def library(torch):
    from torch.utils.cpp_extension import include_paths, library_paths

    written = generated_sources("write", "write_digest")
    target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
    sources = [path for path in Path("csrc").rglob("*.cpp") if path.parent.name != "emulator" and path != BINDINGS]
    return Extension(
        "peft_ext._kernels",
        sources=sorted(map(str, sources)) + written,
        depends=sorted(str(path) for kind in ("h", "cuh") for path in Path("csrc").rglob(f"*.{kind}")),
        include_dirs=[str(ROOT / "csrc"), *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", f"0x{target:016x}"),
            ("PEFT_EXT_VERSION", f'"{VERSION}"'),
            ("PEFT_EXT_TORCH", f'"{torch.__version__}"'),
            ("PEFT_EXT_TORCH_TARGET", f'"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"'),
        ],
        extra_compile_args=compiler_flags(Path(torch.__file__).parents[1]),
        extra_link_args=linker_flags("peft_ext_*"),
        language="c++",
    )


def module():
    import pybind11

    return Extension(
        "peft_ext._C",
        sources=[str(BINDINGS), *generated_sources("write_digest")],
        depends=["csrc/common/api.h"],
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        extra_compile_args=compiler_flags(Path(pybind11.__file__).parents[1]),
        extra_link_args=linker_flags("PyInit_*"),
        language="c++",
    )


def build_command(base):
    class Build(base):
        def get_ext_filename(self, name):
            found = Path(super().get_ext_filename(name))
            # The native library does not use Python's API, so that one file works with every release of Python.
            return str(found.with_name("_kernels.so") if name.endswith("_kernels") else found)

        def build_extensions(self):
            check_system()
            # The compiler that check_system has checked also compiles and links. torch reads the variable CXX, and
            # setuptools reads commands of self.compiler, which may name the compiler of Python's own build.
            os.environ["CXX"] = compiler()
            for name in ("compiler_so", "compiler_so_cxx", "compiler_cxx"):
                if command := getattr(self.compiler, name, None):
                    setattr(self.compiler, name, [os.environ["CXX"], *options_of(command)])
            # Some interpreters (pyenv's, shared) add the folder of their own library to the search path of every
            # extension.
            for linker in ("linker_so", "linker_so_cxx"):
                command = getattr(self.compiler, linker, None) or []
                setattr(self.compiler, linker, [word for word in command if not word.startswith("-Wl,-rpath")])
            super().build_extensions()
            if KERNELS:
                place = Path(self.get_ext_fullpath("peft_ext._kernels"))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(KERNELS, place)

        # setuptools calls this method in a build in place, such as an editable install.
        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            if KERNELS and Path(KERNELS).resolve() != ROOT / "peft_ext/_kernels.so":
                shutil.copy(KERNELS, ROOT / "peft_ext/_kernels.so")

    return Build


def remove_libraries():
    """Removes the native library and the modules that an earlier build has put into the checkout."""
    for path in [*(ROOT / "peft_ext").glob("_C.*.so"), ROOT / "peft_ext/_kernels.so"]:
        if path.exists():
            print(f"peft_ext: PEFT_EXT_PURE is set: removed {path}")
            path.unlink()


def main():
    if os.environ.get("PEFT_EXT_PURE", "") not in ("", "0"):
        if {"develop", "editable_wheel"} & set(sys.argv):
            remove_libraries()
        setup(cmdclass=COMMANDS, **METADATA)
        return
    if sys.platform == "win32":
        # pip hides the output of a build that succeeds; `import peft_ext` prints the same message again.
        print("peft_ext: the native library is not built on Windows. Operators run the slow reference.")
        setup(cmdclass=COMMANDS, **METADATA)
        return
    os.environ["CXX"] = os.environ.get("CXX", "").strip() or "c++"
    if KERNELS:
        if not Path(KERNELS).is_file():
            sys.exit(f"peft_ext: PEFT_EXT_KERNELS is {KERNELS}, wanted a file")
        setup(ext_modules=[module()], cmdclass=COMMANDS | {"build_ext": build_command(build_ext)}, **METADATA)
        return
    torch = find_torch()
    if torch is not None:
        have = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if have < TORCH_TARGET:
            sys.exit(f"peft_ext: torch is {torch.__version__}, wanted >= {TORCH_TARGET[0]}.{TORCH_TARGET[1]}")
        from torch.utils.cpp_extension import BuildExtension

        with contextlib.suppress(ImportError):  # torch finds ninja only on PATH, and without ninja compiles serially
            import ninja

            os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
        command = build_command(BuildExtension)
        setup(ext_modules=[library(torch), module()], cmdclass=COMMANDS | {"build_ext": command}, **METADATA)
    elif {"build_ext", "bdist_wheel", "install", "develop", "editable_wheel"} & set(sys.argv):
        sys.exit("peft_ext: torch is needed to build, and was not found: pip install torch")
    else:
        # Metadata and a source distribution can be made without torch. setup_requires tells a build frontend to install
        # torch for the wheel; setuptools then asks for torch for a source distribution as well.
        setup(setup_requires=["torch>=2.11"], cmdclass=COMMANDS, **METADATA)


if __name__ == "__main__":
    main()
