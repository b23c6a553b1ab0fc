"""Builds the native libraries: ``peft_ext._C`` (CPU kernels, pybind11) and, if wanted, ``peft_ext._C_cuda``.

The two libraries call torch through its stable ABI, so that one build runs on torch TORCH_TARGET and later.
Environment variables:
    FORCE_CUDA=1            CUDA kernels are built, or the build fails; =0: only the CPU library is built; unset: CUDA
                            kernels are built if nvcc, a CUDA torch of nvcc's release and libcudart.so are found
    TORCH_CUDA_ARCH_LIST    GPU architectures; default: DEFAULT_ARCHS (ARCHS_BEFORE_12_8 with an older nvcc)
    MAX_JOBS                number of parallel compilations
    PEFT_EXT_PURE=1         no native library is built: every operator runs the slow reference
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARCHS_BEFORE_12_8 = "8.0;8.6;8.9;9.0+PTX"  # the architectures that an nvcc before 12.8 knows
# Names of architectures before 8.0 in TORCH_CUDA_ARCH_LIST.
NAMED_BEFORE_8_0 = ("Maxwell", "Pascal", "Volta", "Turing")
# The licence is not in pyproject.toml, because setuptools before 77 refuses this form of a licence there. torch's
# requirement on setuptools may leave an old setuptools installed.
METADATA = {"license": "Apache-2.0", "license_files": ["LICENSE"], "zip_safe": False}
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "peft_ext/_version.py").read_text()).group(1)


def find_torch():
    """Returns the torch that this process can import. In pip's isolated build, returns the torch of the environment
    that peft_ext is installed into. Returns None if neither exists.
    """
    try:
        import torch
    except ModuleNotFoundError:
        for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            if Path(place, "torch", "version.py").exists():
                sys.path.append(place)
                import torch

                break
        else:
            return None
    return torch


def say(message):
    print(f"peft_ext: {message}", file=sys.stderr, flush=True)


def find_cudart(torch, nvcc):
    """Returns the CUDA runtime library that pip installed with torch, or else the toolkit's; None if neither exists."""
    from torch.utils.cpp_extension import CUDA_HOME

    found = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libcudart.so*"))
    major = (torch.version.cuda or "").split(".")[0]  # libraries of two CUDA releases may be side by side
    found.sort(key=lambda path: path.suffix != f".{major}")
    for home in (CUDA_HOME, nvcc and Path(nvcc).resolve().parents[1]):
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            found += [path for path in [Path(home or "", folder, "libcudart.so")] if home and path.exists()]
    return found[0] if found else None


def nvcc_release(nvcc):
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def kernel_archs(asked, release):
    """Returns those of the requested (or default) architectures that the kernels compile for; "" if there is none."""
    if not asked:
        return DEFAULT_ARCHS if release >= (12, 8) else ARCHS_BEFORE_12_8
    archs = asked.replace(" ", ";").split(";")
    too_old = [arch for arch in archs if arch in NAMED_BEFORE_8_0 or re.match(r"[1-7]\.", arch)]
    if too_old:
        say(f"no kernels for {', '.join(too_old)}: they need bfloat16 (8.0 and more)")
    return ";".join(arch for arch in archs if arch and arch not in too_old)


def cuda_runtime(torch):
    """Returns the CUDA runtime library to link with, or None if no CUDA library is to be built. FORCE_CUDA decides, as
    the module's docstring says. Prints the decision.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    asked = os.environ.get("FORCE_CUDA", "")
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")))
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is not a CUDA build")
    if not nvcc:
        missing.append("nvcc was not found (PATH, CUDA_HOME)")
    elif torch.version.cuda and find_cudart(torch, nvcc) is None:
        missing.append(f"{nvcc} has no libcudart.so beside it (CUDA_HOME)")
    if asked == "0":
        say("CPU library only: FORCE_CUDA=0")
        return None
    release = nvcc_release(nvcc) if nvcc else (0, 0)
    if torch.version.cuda and release[0] and release[0] != int(torch.version.cuda.split(".")[0]):
        missing.append(f"{nvcc} is of CUDA {release[0]}.{release[1]}, and torch of {torch.version.cuda}")
    archs = kernel_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), release)
    if not archs:
        named = os.environ["TORCH_CUDA_ARCH_LIST"]
        missing.append(f"TORCH_CUDA_ARCH_LIST is {named}, of which no GPU has bfloat16 (8.0 and more)")
    if missing and asked == "1":
        sys.exit(f"peft_ext: FORCE_CUDA=1, but {' and '.join(missing)}")
    if missing:
        say(f"CPU library only: {' and '.join(missing)}")
        return None
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    say(f"CPU and CUDA libraries: torch {torch.__version__}, {nvcc}, archs {archs}")
    return find_cudart(torch, nvcc)


def linker_flags():
    """Returns linker flags: only the module's init function is exported, symbols are bound at load and then read-only,
    and the stack is not executable.
    """
    # -fvisibility=hidden leaves the templates of namespace std visible; a version script hides these templates.
    script = ROOT / "build/exports.map"
    script.parent.mkdir(exist_ok=True)
    script.write_text("{ global: PyInit_*; local: *; };\n")
    return [f"-Wl,--version-script={script}", "-Wl,-z,relro,-z,now,-z,noexecstack"]


def extensions(torch):
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    cudart = cuda_runtime(torch)
    target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
    macros = [
        ("TORCH_TARGET_VERSION", f"0x{target:016x}"),
        ("PEFT_EXT_VERSION", f'"{VERSION}"'),
        ("PEFT_EXT_TORCH", f'"{torch.__version__}"'),
        ("PEFT_EXT_TORCH_TARGET", f'"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"'),
        ("PEFT_EXT_CUDA", "true" if cudart else "false"),
    ]
    # Contraction is off because NF4's codes depend on a product and a sum that are rounded separately. -march is absent
    # because the kernels choose their instruction set when they run. The prefix maps keep the folders of the build out
    # of error messages that name the source file.
    prefix_maps = [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, Path(torch.__file__).parents[1])]
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-g0", *prefix_maps]
    link_flags = linker_flags() if sys.platform == "linux" else []
    headers = sorted(str(path) for kind in ("h", "cuh") for path in Path("csrc").rglob(f"*.{kind}"))
    found = [
        Extension(
            "peft_ext._C",
            sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.parent.name != "emulator"),
            depends=headers,
            include_dirs=[pybind11.get_include(), str(ROOT / "csrc"), *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=macros,
            extra_compile_args={"cxx": flags} if cudart else flags,
            extra_link_args=["-Wl,--as-needed", *link_flags] if link_flags else [],
            language="c++",
        )
    ]
    if cudart:
        found.append(
            Extension(
                "peft_ext._C_cuda",
                sources=sorted(str(path) for path in Path("csrc").rglob("*_cuda.cu")),
                depends=headers,
                include_dirs=[str(ROOT / "csrc"), *include_paths("cuda")],
                library_dirs=library_paths("cuda"),
                libraries=["torch_cuda", "torch_cpu"],
                extra_objects=[str(cudart)],
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={
                    "cxx": flags,
                    "nvcc": ["-O3", "-std=c++17", "-Xcompiler", ",".join(["-fvisibility=hidden", *prefix_maps])],
                },
                extra_link_args=link_flags,
                language="c++",
            )
        )
    return found


def main():
    if os.environ.get("PEFT_EXT_PURE", "") not in ("", "0"):
        setup(**METADATA)
        return
    torch = find_torch()
    if torch is not None:
        have = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if have < TORCH_TARGET:
            sys.exit(f"peft_ext: torch is {torch.__version__}, wanted >= {TORCH_TARGET[0]}.{TORCH_TARGET[1]}")
        from torch.utils.cpp_extension import BuildExtension

        class Build(BuildExtension):
            def build_extensions(self):
                # Some interpreters (pyenv's, shared) add the folder of their own library to the search path of every
                # extension.
                for linker in ("linker_so", "linker_so_cxx"):
                    command = getattr(self.compiler, linker, None) or []
                    setattr(self.compiler, linker, [word for word in command if not word.startswith("-Wl,-rpath")])
                super().build_extensions()

        setup(ext_modules=extensions(torch), cmdclass={"build_ext": Build}, **METADATA)
    elif {"build_ext", "bdist_wheel", "install", "develop", "editable_wheel"} & set(sys.argv):
        sys.exit("peft_ext: torch is needed to build, and was not found: pip install torch")
    else:
        # Metadata and a source distribution can be made without torch. setup_requires tells a build frontend to install
        # torch for the wheel; setuptools then asks for torch for a source distribution as well.
        setup(setup_requires=["torch>=2.11"], **METADATA)


if __name__ == "__main__":
    main()
