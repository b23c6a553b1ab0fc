"""Tests of the repository for Hugging Face's kernels hub: the format, the rules for libraries and Python code, and
kernelized models, which train as the stock models do. Nothing is read from the hub.
"""

from __future__ import annotations

import ast
import copy
import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType

import pytest
import torch
from torch import nn

pytest.importorskip("kernels", reason="needs kernels: pip install kernels")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import kernels
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from kernels._rust import Build, Digest, DigestAlgorithm, DigestValidationError, Metadata
from kernels.backends import parse_backend
from kernels.layer.layer import _validate_layer
from kernels.variants import _resolve_variant_for_system, parse_variant
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import (
    activate,
    assert_as_good,
    assert_identical,
    in_float64,
    inputs,
    llama,
    make,
    make_method,
    make_several,
    run,
    tuners,
    with_philox,
)
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import peft_ext

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
hub = pytest.importorskip("hub", reason="tools/ is not here: not a checkout")
import wheels  # noqa: E402

pytestmark = [
    pytest.mark.cpu_only("the variant for CPUs is loaded"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LIBRARY = ROOT / "peft_ext" / hub.LIBRARY
MARKED = {LlamaRMSNorm: "RMSNorm", LlamaMLP: "MLP", lora.Linear: "LoRALinear"}
if hasattr(lora, "Linear4bit"):
    from bitsandbytes.nn import Linear4bit

    MARKED |= {lora.Linear4bit: "LoRALinear", Linear4bit: "NF4Linear"}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("hub") / "peft-ext"
    hub.write_repository(output, "owner/peft-ext", {hub.platform.machine(): LIBRARY})
    return output


@pytest.fixture(scope="module")
def kernel(repository) -> ModuleType:
    return kernels.get_local_kernel(repository)


@pytest.fixture
def marked(monkeypatch):
    """Gives the classes of MARKED their names for kernelize, as replace_kernel_forward_from_hub does."""
    for kind in MARKED:
        monkeypatch.setattr(kind, "kernel_layer_name", None, raising=False)
        monkeypatch.setattr(kind, "kernel_condition", None, raising=False)
    for kind, name in MARKED.items():
        kernels.replace_kernel_forward_from_hub(kind, name)


@pytest.fixture
def kernelized(repository, marked):
    """Returns a function that returns a kernelized copy of a model."""

    def made(model: nn.Module, mode: Mode = Mode.TRAINING, names: tuple[str, ...] = tuple(MARKED.values())):
        mapping = {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in names}
        with use_kernel_mapping(mapping, inherit_mapping=False):
            return kernelize(copy.deepcopy(model), mode=mode)

    return made


def variant(repository: Path, backend: str = "cpu") -> Path:
    return repository / "build" / hub.variant_names(backend)[0]


# --- the format -------------------------------------------------------------------------------------------------------


def resolved(repository: Path, backend: str, torch_version: str, cpu: str) -> list[str]:
    variants = [parse_variant(path.name) for path in (repository / "build").iterdir() if path.is_dir()]
    found, _ = _resolve_variant_for_system(variants, parse_backend(backend), cpu, "linux", Version(torch_version), True,
                                           None)  # fmt: skip
    return [one.variant_str for one in found]


@pytest.mark.parametrize(
    ("backend", "torch_version", "wanted"),
    [
        ("cpu", "2.11", ["cpu"]),
        ("cpu", "2.13", ["cpu"]),
        ("cpu", "2.10", []),
        ("cu126", "2.11", ["cu126"]),
        ("cu129", "2.12", ["cu126"]),
        ("cu130", "2.13", ["cu130"]),
        ("cu132", "2.13", ["cu130"]),
        ("cu124", "2.11", []),
        ("rocm71", "2.12", []),
    ],
)
def test_the_variant_that_a_machine_takes(repository, backend, torch_version, wanted):
    machine = hub.platform.machine()
    names = [f"torch-stable-abi211-{name}-{machine}-linux" for name in wanted]
    assert resolved(repository, backend, torch_version, machine) == names
    assert resolved(repository, backend, torch_version, "riscv64") == []


def test_the_metadata_names_the_namespace_and_the_digests(repository):
    ids = {}
    for backend in hub.BACKENDS:
        for name in hub.variant_names(backend):
            folder = repository / "build" / name
            about = Metadata.read_from_file(folder / "metadata.json")
            assert (str(about.name), about.version, about.license) == ("peft-ext", hub.VERSION, "Apache-2.0")
            assert str(about.backend.backend_type).lower() == backend and not about.python_depends
            about.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
            ids.setdefault(backend, set()).add(about.id)
            assert f'NAMESPACE = "{about.id}"' in (folder / "_ops.py").read_text() and about.id.isidentifier()
    assert all(len(of_backend) == 1 for of_backend in ids.values()) and ids["cpu"] != ids["cuda"]


@pytest.mark.parametrize("change", ["library", "module", "removed", "added"])
def test_the_digests_show_a_changed_file(repository, tmp_path, change):
    """kernels' verify_variant compares the digests; get_kernel compares nothing."""
    folder = tmp_path / "variant"
    shutil.copytree(variant(repository), folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / {"library": hub.LIBRARY, "module": "layers.py", "removed": "text.py", "added": "more.py"}[change]
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n#")
    digest = Metadata.read_from_file(folder / "metadata.json").digest
    with pytest.raises(DigestValidationError) as raised:
        digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    assert [violation.path for violation in raised.value.violations] == [path.name]


def test_the_build_file_is_the_builders(repository):
    build = Build.open(repository)
    assert [str(backend).lower() for backend in build.general.backends] == list(hub.BACKENDS)
    assert {path.name for path in repository.iterdir()} == {"build", "build.toml", "README.md", "LICENSE"}


def test_the_python_code_imports_itself_relatively_and_torch_alone(repository):
    """The hub allows the standard library and torch. filelock comes with torch, cuda.bindings with a CUDA torch."""
    allowed = {*sys.stdlib_module_names, "torch", "filelock", "cuda"}
    only_where_present = {"bitsandbytes", "peft", "transformers", "gguf"}  # in functions that convert their objects
    files = sorted(variant(repository).rglob("*.py"))
    assert len(files) > 40
    for file in files:
        tree = ast.parse(file.read_text())
        local = {node for of in ast.walk(tree) if isinstance(of, ast.FunctionDef) for node in ast.walk(of)}
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                taken = name.partition(".")[0]
                assert taken in allowed or (node in local and taken in only_where_present), f"{file.name}: {name}"


# --- the library ------------------------------------------------------------------------------------------------------


def test_the_library_needs_no_python_and_torchs_stable_abi_alone(repository):
    library = variant(repository) / hub.LIBRARY
    assert hub.abi_faults(library, newest={}) == []
    assert wheels.exports(library) and all(name.startswith("peft_ext_") for name in wheels.exports(library))


def test_faults_of_a_library_are_found(tmp_path):
    source = tmp_path / "bad.c"
    source.write_text(
        "int PyObject_Repr(void *); int torch_library_def_with_tags(void); extern int _ZN3c105ErrorE;"
        "int wrong(void) { return PyObject_Repr(0) + torch_library_def_with_tags() + _ZN3c105ErrorE; }"
        "int gnu_get_libc_version(void); int peft_ext_isa(void) { return gnu_get_libc_version(); }"
    )
    library = tmp_path / "bad.so"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    found = "\n".join(hub.abi_faults(library, newest={"GLIBC": "2.1"}))
    for fault in (
        "PyObject_Repr: of Python",
        "torch_library_def_with_tags",
        "c10::Error",
        "exports wrong",
        "needs GLIBC_2.",
    ):
        assert fault in found, found


# --- operators --------------------------------------------------------------------------------------------------------


def test_every_operator_has_a_kernel_in_a_namespace_of_its_own(kernel, repository):
    name = Metadata.read_from_file(variant(repository) / "metadata.json").id
    assert kernel.__name__ == name and kernel.ops.library.NAMESPACE == name
    assert set(kernel.__all__) == {*peft_ext.ops.__all__, "NF4Weight", "NestedAbsmax", "layers"}
    here, there = peft_ext.ops.library, kernel.ops.library
    assert here.OPERATORS.keys() == there.OPERATORS.keys()
    for operator in here.OPERATORS:
        assert here.has_kernel(operator, "CPU") == there.has_kernel(operator, "CPU")
    assert there.has_kernel("lora_linear", "CPU")
    assert kernel._native.STATE.isa == peft_ext._native.STATE.isa
    assert kernel._native.STATE.build == peft_ext._native.STATE.build


def test_two_builds_and_peft_ext_give_the_same_bits_in_one_process(kernel, repository, tmp_path):
    library = tmp_path / hub.LIBRARY
    library.write_bytes(LIBRARY.read_bytes() + b"another build")
    hub.write_repository(tmp_path / "other", "owner/peft-ext", {hub.platform.machine(): library})
    other = kernels.get_local_kernel(tmp_path / "other")
    assert other.__name__ != kernel.__name__
    x, w, a, b = torch.randn(5, 64), torch.randn(32, 64), torch.randn(4, 64), torch.randn(32, 4)
    found = []
    for module in (peft_ext.ops, kernel, other):
        leaf = a.clone().requires_grad_()
        y = module.lora_linear(x, w, leaf, b, scaling=2.0)
        y.sum().backward()
        found.append({"y": y.detach(), "grad": leaf.grad})
    assert_identical(found[1], found[0])
    assert_identical(found[2], found[0])
    before = kernel._native.STATE.isa
    other._native.STATE.module.set_isa("scalar")
    assert (kernel._native.STATE.isa, other._native.STATE.isa) == (before, "scalar")


def test_the_kernel_needs_no_installed_peft_ext(repository):
    code = f"""
import sys, torch
sys.modules["peft_ext"] = None  # an import of peft_ext fails
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path({str(repository)!r}))
x, w, a, b = torch.randn(5, 64), torch.randn(32, 64), torch.randn(4, 64).requires_grad_(), torch.randn(32, 4)
torch.testing.assert_close(kernel.lora_linear(x, w, a, b), x @ w.T + x @ a.T @ b.T, atol=1e-4, rtol=1e-4)
kernel.lora_linear(x, w, a, b).sum().backward()
print(kernel._native.STATE.isa, a.grad.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.split(maxsplit=1)[0] != "reference"


def test_the_functions_of_the_library_are_those_of_the_pybind11_module(kernel):
    ours, theirs = kernel._native.STATE.module, peft_ext._native.STATE.module
    names = {name for name in dir(theirs) if not name.startswith("_")}
    # The library of the Hub's kernel repository lacks `Facts`, which compares Python objects for peft_ext.integrations;
    # the kernel repository does not contain this package.
    assert names - {"Facts"} <= set(dir(ours))
    ours.forget_plan(2**62)
    for name in ("build_info", "isa", "isas", "kernels", "sources"):
        assert getattr(ours, name)() == getattr(theirs, name)()
    assert len(ours.kernels()) > 100 and any("norm.cuh" in path for path in ours.sources())
    with pytest.raises(ValueError, match="mmx"):
        ours.set_isa("mmx")


def test_the_library_gets_machine_code_from_python(kernel):
    module = kernel._native.STATE.module

    def image(name: str, file: str, capability: int) -> tuple[bytes, bytes]:
        if capability < 80:
            raise RuntimeError(f"{name} of {file}: no")
        return f"symbol of {name}".encode(), b"co\0de"

    module.set_image_source(image)
    found = module._Image()
    module._callback(b"kernel", b"file", 90, ctypes.byref(found))
    assert (found.symbol, found.error) == (b"symbol of kernel", None)
    assert ctypes.string_at(found.data, 5) == b"co\0de"
    failed = module._Image()
    module._callback(b"kernel", b"file", 75, ctypes.byref(failed))
    assert (failed.symbol, failed.error) == (None, b"kernel of file: no")


def test_an_older_loader_finds_the_same_module(kernel, repository):
    folder = variant(repository) / hub.MODULE
    spec = kernels.importer.importlib.util.spec_from_file_location("older", folder / "__init__.py")
    module = kernels.importer.importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.lora_linear is kernel.lora_linear and module.layers is kernel.layers


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MARKED, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_a_layer_has_a_forward_alone(kernel, kind):
    layer = getattr(kernel.layers, MARKED[kind])
    _validate_layer(check_cls=kind, cls=layer, repo="peft-ext")
    assert layer.has_backward and set(kernel.layers.__all__) == set(MARKED.values())


class calls_of:
    """Collects the names of a kernel's operators that run within the context."""

    def __init__(self, kernel: ModuleType) -> None:
        self.namespace, self.operators = kernel.ops.library.NAMESPACE, kernel.ops.library.OPERATORS
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.names: set[str] = set()

    def __enter__(self) -> set[str]:
        self.profile.__enter__()
        return self.names

    def __exit__(self, *error) -> None:
        self.profile.__exit__(*error)
        prefix = f"{self.namespace}::"
        found = {event.name.removeprefix(prefix) for event in self.profile.events() if event.name.startswith(prefix)}
        self.names.update(found & set(self.operators))


def trained(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the loss and every gradient of a step, and the loss after the step."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = model(input_ids=ids, labels=ids).loss
    return {**found, "loss": loss.detach(), "after": after}


def assert_as_good_on_the_whole(steps: Iterator[tuple[nn.Module, nn.Module]]) -> None:
    """Asserts that losses and gradients of a step are as near to float64's as the stock model's, for some models.

    ``steps`` yields pairs of a stock model and its kernelized copy. The errors of all tensors are added, because the
    error of a single tensor depends on chance: an early rounding changes all later ones.
    """
    ours = theirs = 0.0
    for model, kernelized in steps:
        ids = torch.randint(0, 97, (3, 21))
        truth = trained(copy.deepcopy(model).double(), ids)
        here, there = trained(kernelized, ids), trained(model, ids)
        assert here.keys() == truth.keys() and here["after"] < here["loss"]
        for name, wanted in truth.items():
            assert here[name].dtype is there[name].dtype and wanted.norm() > 0, name
            ours += float((here[name].double() - wanted).norm() / wanted.norm())
            theirs += float((there[name].double() - wanted).norm() / wanted.norm())
    assert ours <= 1.5 * theirs, (ours, theirs)


def tiny_llama(seed: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=97)
    )  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_kernelized_llama_trains_as_the_stock_model(kernelized, kernel, dtype, adapted):
    def pairs():
        for seed in range(3):
            model = tiny_llama(seed).to(dtype)
            if adapted:
                config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
                model = get_peft_model(model, config, autocast_adapter_dtype=False)
            ours = kernelized(model)
            bound = [m.forward.__func__ for m in ours.modules() if "forward" in vars(m)]
            wanted = {kernel.layers.RMSNorm: 5, kernel.layers.MLP: 2, kernel.layers.LoRALinear: 14 * adapted}
            assert {layer: bound.count(layer.forward) for layer in wanted} == wanted
            yield model, ours

    with calls_of(kernel) as called:
        assert_as_good_on_the_whole(pairs())
    operators = {"rms_norm", "rms_norm_backward", "gated_activation", "gated_activation_backward"}
    if adapted:  # gate and up are one call
        operators |= {"lora_linear", "lora_linear_backward", "lora_linears", "lora_linears_backward"}
    assert operators <= called


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "bnb", "bnb nested", "bnb bfloat16"])
def test_a_lora_layer_is_as_good_as_pefts(kernelized, kernel, base, p):
    model = make(base, lora_dropout=p).train()
    ours, x = kernelized(model), inputs(base, (21,))
    with calls_of(kernel) as called:
        found = run(ours, x)
    assert called >= {"lora_linear", "lora_linear_backward"}
    assert_as_good(found, run(with_philox(copy.deepcopy(model)), x), run(with_philox(in_float64(model)), x.double()))


@pytest.mark.parametrize("base", ["bnb", "bnb nested", "bnb bfloat16"])
def test_an_nf4_layer_is_as_good_as_bitsandbytes(kernelized, kernel, base):
    model = make(base).train()
    model.disable_adapter_layers()
    ours, x = kernelized(model, names=("NF4Linear",)), inputs(base, (21,))
    with calls_of(kernel) as called:
        found = run(ours, x)
    assert called >= {"nf4_linear", "nf4_linear_backward"}
    found, stock, exact = (
        {name: value for name, value in of.items() if value is not None}
        for of in (found, run(model, x), run(in_float64(model), x.double()))
    )
    assert_as_good(found, stock, exact)


def merged():
    model = make()
    model.merge_adapter()
    return model


def disabled():
    model = make()
    model.disable_adapter_layers()
    return model


def hooked():
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, y: y * 2)
    return model


def replaced():
    model = make()
    for layer in tuners(model).values():
        lora_A = layer.lora_A["default"]
        lora_A.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), lora_A)
    return model


STOCK = {
    "merged": merged,
    "disabled": disabled,
    "DoRA": lambda: make_method("DoRA"),
    "two adapters": make_several,
    "no adapter": lambda: (model := make(), activate(model, []))[0],
    "hooks": hooked,
    "another forward": replaced,
    "a bias of lora_B": lambda: make(lora_bias=True),
    "fp4": lambda: quantize_fp4(make("bnb")),
}


def quantize_fp4(model):
    for module in model.modules():
        if type(module) is nn.Linear or getattr(module, "quant_state", None) is None:
            continue
        module.quant_state.quant_type = module.weight.quant_state.quant_type = "fp4"
    return model


@pytest.mark.parametrize("case", STOCK)
def test_what_the_operators_do_not_compute_runs_the_stock_forward(kernelized, kernel, case):
    model = STOCK[case]()
    ours, x = kernelized(model), inputs("float32", (5,))
    with calls_of(kernel) as called:
        found = run(ours, x)
    wanted = run(model, x)
    if case == "fp4":  # bitsandbytes computes the base layer, and the operator adds the low-rank term
        assert called == {"lora_residual", "lora_residual_backward"}
        torch.testing.assert_close(found, wanted)
    else:
        assert not called
        assert_identical(found, wanted)


def test_global_hooks_run(kernelized):
    ours, x, seen = kernelized(make()), inputs("float32", (5,)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        ours(x)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 6  # base, lora_A and lora_B of two layers


def test_a_mixed_batch_is_pefts(kernelized):
    model = make_several().eval()
    x, names = inputs("float32", (4, 5)), ["default", "other", "__base__", "default"]
    assert torch.equal(kernelized(model)(x, adapter_names=names), model(x, adapter_names=names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_pefts_dtype(kernelized, dtype):
    model = make().train()
    x = inputs("float32", (7,))
    with torch.autocast("cpu", dtype):
        found, wanted = kernelized(model)(x), model(x)
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)


def test_another_activation_is_called(kernelized):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Softplus()
    assert_as_good_on_the_whole(iter([(model, kernelized(model))]))


def test_layers_compile_without_a_break(kernelized):
    model = llama()
    ours = kernelized(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
    assert sum("forward" in vars(module) for module in ours.modules()) >= 21
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    ids = torch.randint(0, 97, (2, 9))
    loss, wanted = (of(input_ids=ids, labels=ids).loss for of in (compiled, model))
    loss.backward(), wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for (name, ours_), (_, theirs) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours_.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_cards_code_runs(repository, monkeypatch, marked):
    card = (repository / "README.md").read_text()
    assert not re.findall(r"<\w+>", card)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setenv("LOCAL_KERNELS", f"owner/peft-ext={repository}")
    monkeypatch.setattr(
        kernels, "LayerRepository",
        lambda repo_id, layer_name, version, trust_remote_code: LocalLayerRepository(repository, layer_name=layer_name),
    )  # fmt: skip
    names = {"x": torch.randn(3, 8), "weight": torch.randn(5, 8), "lora_A": torch.randn(2, 8),
             "lora_B": torch.randn(5, 2), "model": llama()}  # fmt: skip
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (3, 5)
    assert sum("forward" in vars(module) for module in names["model"].modules()) == 21


def test_the_tool_names_each_variants_namespace(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hub.py", "--output", str(tmp_path / "made"), "--library", str(LIBRARY)])
    hub.main()
    told = capsys.readouterr().out
    for path in (tmp_path / "made/build").iterdir():
        if path.is_dir():
            assert f"{path.name}: torch.ops.{json.loads((path / 'metadata.json').read_text())['id']}" in told
