"""Tests of the known forms: code is compared by digests, rows pass the proof for classes that have the form, and a
changed helper, value or method gives another form.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from form_proofs import METHODS, disproof
from peft import LoraConfig, get_peft_model
from reached import another, reached
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, modeling_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import can_return_tuple

import peft_ext
from peft_ext.integrations.forms import HEADER, KINDS, TABLE, Row, Unknown, form_of, read_rows, row_of
from peft_ext.integrations.forms.activations import activation_name, refresh
from peft_ext.verification import proof

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import forms as tool

ROWS = read_rows(TABLE.read_text())


@functools.cache
def classes_by_digest() -> dict[str, list[Any]]:
    """Returns a dict from digest to the classes of the installed transformers that have this form."""
    found: dict[str, list[Any]] = {}
    for cls in tool.classes():
        for method in ("forward", METHODS["gate"]):
            if hasattr(cls, method) and not isinstance(row := row_of(cls, method), str):
                found.setdefault(row[0].digest, []).append(cls)
    return found


# --- the digest -------------------------------------------------------------------------------------------------------


def scaled(x: Tensor) -> Tensor:
    return x * 2


FACTOR = 3


class Plain(nn.Module):
    def forward(self, x):
        y = scaled(x) + FACTOR
        return self.shifted(y) * torch.rsqrt(self.eps + y)

    def shifted(self, y):
        return y + 1


class Annotated(nn.Module):
    """A class with another name, other comments and other annotations."""

    @torch.jit.unused if False else (lambda forward: forward)
    def forward(self, x: Tensor) -> Tensor:
        """A docstring."""
        y: Tensor = scaled(x) + FACTOR  # a comment
        return self.shifted(y) * torch.rsqrt(
            self.eps + y,
        )

    def shifted(self, y: Tensor) -> Tensor:
        "Words."
        return y + 1


class Inherits(Plain):
    pass


def test_words_types_and_names_of_classes_are_no_part_of_a_form() -> None:
    assert form_of(Plain) == form_of(Annotated) == form_of(Inherits)
    assert form_of(Plain).reads == ("eps",) and form_of(Plain).of_class == ("shifted",)


class OtherConstant(Plain):
    def shifted(self, y):
        return y + 2


class OtherOperator(Plain):
    def forward(self, x):
        y = scaled(x) - FACTOR
        return self.shifted(y) * torch.rsqrt(self.eps + y)


class OtherDefault(Plain):
    def shifted(self, y, more=1):
        return y + 1


class Calls(Plain):
    def __call__(self, x):
        return x


class Answers(Plain):
    def __getattr__(self, name):
        return super().__getattr__(name)


@pytest.mark.parametrize("kind", [OtherConstant, OtherOperator, OtherDefault])
def test_other_code_is_another_form(kind: type) -> None:
    assert form_of(kind).digest != form_of(Plain).digest


def test_a_decorator_that_names_a_function_that_it_does_not_call() -> None:
    """A wrapper counts as its ``__wrapped__`` function only if the function is also in the wrapper's closure, because
    any code can set ``__wrapped__``."""
    honest, forged = can_return_tuple(Plain.forward), can_return_tuple(OtherOperator.forward)
    forged.__wrapped__ = Plain.forward
    known = form_of(type("Honest", (Plain,), {"forward": honest})).digest
    try:
        found = form_of(type("Forged", (Plain,), {"forward": forged})).digest
    except Unknown:
        found = None
    assert found != known


@pytest.mark.parametrize("kind", [Calls, Answers])
def test_a_class_with_calls_or_attributes_of_its_own_has_no_form(kind: type) -> None:
    with pytest.raises(Unknown, match="of its own"):
        form_of(kind)


def test_a_registry_of_attentions_with_an_entry_of_its_own_has_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    before, registry = form_of(LlamaAttention), modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(registry._local_mapping, "sdpa", lambda *args, **kwargs: None)
    with pytest.raises(Unknown, match="ALL_ATTENTION_FUNCTIONS"):
        form_of(LlamaAttention)
    monkeypatch.undo()
    assert form_of(LlamaAttention) == before


class SetsGlobal(Plain):
    def forward(self, x):
        global LAST
        LAST = x
        return x


class Imports(Plain):
    def forward(self, x):
        import json

        return json.loads(x)


class ReadsItsDict(Plain):
    def forward(self, x):
        return x * self.__dict__["eps"]


class Rebinds(Plain):
    def forward(self, x):
        self = x
        return self


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (SetsGlobal, "it sets LAST"),
        (Imports, "it imports json"),
        (ReadsItsDict, "it reads __dict__ of itself"),
        (Rebinds, "it gives self another value"),
    ],
)
def test_code_whose_effects_are_not_in_its_text_has_no_form(kind: type, why: str) -> None:
    with pytest.raises(Unknown, match=why):
        form_of(kind)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (sys.modules[__name__], "scaled", lambda x: x * 3),
        (sys.modules[__name__], "scaled", functools.wraps(scaled)(lambda x: x * 3)),
        (sys.modules[__name__], "FACTOR", 4),
        (torch, "rsqrt", torch.sqrt),
        (torch, "rsqrt", functools.wraps(torch.rsqrt)(lambda x: torch.sqrt(x))),
        (Plain, "shifted", lambda self, y: y),
        (Plain, "shifted", property(lambda self: lambda y: y)),
        (Plain, "eps", 7.0),
    ],
    ids=[
        "helper",
        "helper of the same name",
        "number",
        "PyTorch's function",
        "wrapper of it",
        "method",
        "property",
        "class attribute",
    ],
)
def test_what_code_reaches_is_a_part_of_it(
    owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    before = form_of(Plain).digest
    monkeypatch.setattr(owner, name, value, raising=False)
    try:
        assert form_of(Plain).digest != before
    except Unknown:
        pass
    monkeypatch.undo()
    assert form_of(Plain).digest == before


def test_source_that_is_not_the_code_that_runs_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a_module_of_a_test.py"
    text = "from torch import nn\nclass A(nn.Module):\n    def forward(self, x):\n        return x * 2\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    kind = importlib.import_module("a_module_of_a_test").A
    before = form_of(kind)
    file.write_text(text.replace("* 2", "* 3"))
    linecache.checkcache()
    with pytest.raises(Unknown, match="not the code that runs"):
        form_of(kind)
    file.write_text(text)
    linecache.checkcache()
    assert form_of(kind) == before
    kind.forward = eval("lambda self, x: x * 2")
    with pytest.raises(Unknown, match="source"):
        form_of(kind)


@pytest.mark.parametrize("other", [lambda x, power: x, functools.wraps(Tensor.pow)(lambda x, power: x), Tensor.mul])
def test_a_method_of_tensors_that_was_replaced(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert not isinstance(row_of(LlamaRMSNorm), str)
    monkeypatch.setattr(Tensor, "pow", other)
    assert "torch.Tensor.pow was replaced" in row_of(LlamaRMSNorm)


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_is_well_formed() -> None:
    first, *lines = TABLE.read_text().splitlines()
    assert first.split("\t") == list(HEADER) and len(ROWS) == len(lines) > 300
    assert lines == sorted(lines, key=lambda line: _order(ROWS[line.split("\t")[0]]))
    for row in ROWS.values():
        assert row.kind in KINDS and {name for name, _ in row.formula} <= set(KINDS[row.kind]), row


def _order(row: Row) -> tuple:
    return row.kind, -row.classes, row.example, row.digest


@pytest.mark.slow
def test_no_kind_is_missing_and_most_classes_are_known() -> None:
    found = {ROWS[digest].kind for digest in classes_by_digest()}
    assert found >= {"rms_norm", "mlp", "attention", "activation", "layer_norm", "dropout"}
    share = tool.share()
    assert all(int(part.split("(")[1].split("%")[0]) >= 45 for part in share.split(": ")[1].split(", ")), share


KINDS_PROVED = ("rms_norm", "float_layer_norm", "layer_norm", "mlp", "activation", "gate", "decoder_layer")
PROVED = sorted(digest for digest, row in ROWS.items() if row.kind in KINDS_PROVED or row.get("forward"))


@pytest.mark.slow
@pytest.mark.parametrize("digest", PROVED, ids=lambda digest: f"{ROWS[digest].kind}-{ROWS[digest].example}")
def test_a_row_is_true_of_the_classes_that_have_it(digest: str) -> None:
    if not (classes := classes_by_digest().get(digest)):
        pytest.skip("no class of the installed transformers has this form")
    refresh()
    method = METHODS.get(ROWS[digest].kind, "forward")
    for cls in {classes[0], classes[-1]}:
        assert disproof(cls, ROWS[digest], form_of(cls, method)) is None


def test_rows_of_functions() -> None:
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.loss.loss_utils import ForCausalLMLoss

    for function, method, kind in (
        (sdpa_attention_forward, "forward", "sdpa"),
        (ForCausalLMLoss, "forward", "causal_loss"),
        (Cache, "update", "cache"),
        (DynamicLayer, "update", "cache_layer"),
        (DynamicSlidingWindowLayer, "update", "sliding_cache_layer"),
    ):
        row, form = row_of(function, method)
        assert row.kind == kind and disproof(function, row, form) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offset", "rounds", "eps", "act", "inner", "gated", "norms", "cache", "options"])
def test_a_wrong_formula_is_disproved(name: str) -> None:
    """Tests that the proof fails if the value ``name`` of a row's formula is changed, for up to four rows."""
    others = {"offset": {"0": "1", "1": "0"}, "rounds": {"yes": "no", "no": "yes"}, "gated": {"yes": "no", "no": "yes"},
              "norms": {"head": "flat", "flat": "head"}, "cache": {"cache:kwargs": "cache:plain"}}  # fmt: skip
    tried = 0
    for digest, classes in classes_by_digest().items():
        row = ROWS[digest]
        if digest not in PROVED or not row.get(name) or row.kind == "decoder_layer":
            continue
        formula = dict(row.formula)
        if name == "inner":
            formula[name] = ",".join(reversed(row.names(name)))
            if formula[name] == row.get(name) or row.kind != "mlp":
                continue
        elif name == "options":
            formula.pop(name)
        elif name in ("eps", "act"):
            formula[name] = "another_name"
        else:
            formula[name] = others[name].get(row.get(name), "")
        wrong = Row(digest, row.kind, tuple(formula.items()))
        assert disproof(classes[0], wrong, form_of(classes[0], METHODS.get(row.kind, "forward"))) is not None, row
        tried += 1
        if tried == 4:
            break
    assert tried


@pytest.mark.slow
def test_the_norms_of_a_decoder_layer_in_another_order_are_disproved() -> None:
    layers = {
        digest: classes for digest, classes in classes_by_digest().items() if ROWS[digest].kind == "decoder_layer"
    }
    assert layers
    for digest, (cls, *_) in layers.items():
        norms, posts = (ROWS[digest].names(name) for name in ("norms", "posts"))
        for wrong in ((norms[::-1], posts), (norms, posts[::-1]), (posts, norms)):
            if wrong == (norms, posts):
                continue
            formula = dict(ROWS[digest].formula) | {"norms": ",".join(wrong[0]), "posts": ",".join(wrong[1])}
            assert disproof(cls, Row(digest, "decoder_layer", tuple(formula.items())), form_of(cls)) is not None


# --- what a forward reaches, replaced ---------------------------------------------------------------------------------


BLOCKS = [digest for digest, row in ROWS.items() if row.kind in ("rms_norm", "float_layer_norm", "mlp", "attention")]


@pytest.mark.slow
def test_whatever_a_known_forward_reaches_makes_another_form_when_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Covers one class of the installed transformers for each known form of an RMSNorm, MLP or attention, and each name
    that its forward looks up and for which the test has a replacement."""
    counted, held = 0, []
    for digest in BLOCKS:
        for cls in classes_by_digest().get(digest, ())[:1]:
            for place in reached(cls):
                if (other := another(place.value)) is None or place.value is sys.modules["os"].environ:
                    continue
                with monkeypatch.context() as patch:
                    if isinstance(place.owner, dict):
                        patch.setitem(place.owner, place.name, other)
                    else:
                        patch.setattr(place.owner, place.name, other)
                    found = row_of(cls)
                if not isinstance(found, str):
                    held.append(f"{cls.__name__}: {place}")
                counted += 1
            assert not isinstance(row_of(cls), str)
    assert not held and counted > 1500, (counted, held[:20])


# --- activations ------------------------------------------------------------------------------------------------------


def test_activations_by_their_form() -> None:
    from transformers.activations import ACT2FN

    refresh()
    names = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2",
             "gelu_new": "gelu_tanh", "gelu_python": None, "quick_gelu": None, "gelu_10": None, "mish": None,
             "tanh": None, "linear": None, "gelu_accurate": None}  # fmt: skip
    assert {name: activation_name(ACT2FN[name]) for name in names} == names
    assert activation_name(ACT2FN["gelu_new"], torch.float16) is None  # the cube in gelu_new overflows float16
    assert activation_name(F.silu) == "silu" and activation_name(torch.tanh) is None
    assert (
        activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh" and activation_name(nn.SiLU(inplace=True)) is None
    )
    assert activation_name(lambda x: F.silu(x)) is None and activation_name(functools.partial(F.gelu, 1)) is None


# --- register_form, the command ---------------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.scale, self.epsilon = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x):
        inverse = (x.float().square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return (x.float() * inverse * self.scale.float()).type_as(x)


class Capped(Own):
    def forward(self, x):
        inverse = (x.float().square().mean(-1, keepdim=True).clamp(max=50.0) + self.epsilon).rsqrt()
        return (x.float() * inverse * self.scale.float()).type_as(x)


def test_register_form() -> None:
    formula = {"weight": "scale", "eps": "epsilon", "offset": 0, "rounds": False}
    model = nn.Sequential(nn.Linear(16, 16), Own())
    assert "none of the known forms" in row_of(Own)
    try:
        row = peft_ext.register_form(Own, "rms_norm", **formula)
        assert row_of(Own)[0] == row
        with pytest.warns(UserWarning, match="nothing to accelerate"):
            peft_ext.accelerate(model)
        assert [(part.kind, part.fused) for part in peft_ext.explain(model).blocks] == [("RMSNorm", True)]
        peft_ext.restore(model)
        assert type(model[1]) is Own
    finally:
        proof.REGISTERED.pop(form_of(Own).digest, None)
    for kind, given, said in (
        ("rms_norm", {**formula, "offset": 1}, "is not rms_norm with this formula"),
        ("rms_norm", {**formula, "rounds": True}, "rounded at another place"),
        ("rms_norm", {"eps": "epsilon", "offset": 0}, "is not rms_norm"),
        ("dropout", {}, "wanted one of rms_norm, float_layer_norm, mlp, attention"),
        ("attention", {}, "has to have inputs"),
        ("attention", {"inputs": "q+k+v", "o": "o", "forward": ""}, "cannot be proved"),
        ("rms_norm", {**formula, "bias": "b"}, "has no bias"),
        ("float_layer_norm", {"weight": "w", "eps": "e", "mixed": False}, "mixed is False, wanted True"),
    ):
        with pytest.raises(ValueError, match=said):
            peft_ext.register_form(Own, kind, **given)
    with pytest.raises(ValueError, match="differ"):
        peft_ext.register_form(Capped, "rms_norm", **formula)


class OwnSiLU(nn.Module):
    """Computes SiLU with functions that no class of transformers calls."""

    def forward(self, x):
        return x * x.sigmoid()


class OwnLayer(nn.Module):
    """A decoder layer whose parts have names that no class of transformers uses."""

    def forward(self, x, past_key_values=None, **kwargs):
        y, _ = self.attn(hidden_states=self.norm_1(x), past_key_values=past_key_values, **kwargs)
        x = x + y
        return x + self.mlp(self.norm_2(x))


@pytest.mark.parametrize("cls", [OwnSiLU, OwnLayer])
def test_the_command_proposes_no_kind_that_register_form_refuses(cls: type) -> None:
    assert proof.proposed(cls) == (None, "no kind's formula fits what its forward reads")


class OwnAttention(nn.Module):
    """An attention with rotary positions whose layers have names that no class of transformers has."""

    def forward(self, hidden_states, position_embeddings, attention_mask, cache=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.to_q(hidden_states).view(heads).transpose(1, 2)
        k = self.to_k(hidden_states).view(heads).transpose(1, 2)
        v = self.to_v(hidden_states).view(heads).transpose(1, 2)
        q, k = self.positioned(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.to_out(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def positioned(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


class OwnModel(LlamaForCausalLM):
    """A Llama whose attentions are of the class OwnAttention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.__class__ = OwnAttention
            for ours, its in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "o_proj")):
                attention._modules[ours] = attention._modules.pop(its)


class Tempered(OwnAttention):
    def positioned(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q * getattr(self, "temperature", 1.0), k, cos, sin)


class OfConfig(OwnAttention):
    def positioned(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q * getattr(self.config, "temperature", 1.0), k, cos, sin)


class Unturned(OwnAttention):
    """Turns no layer but each fourth."""

    def positioned(self, q, k, cos, sin):
        return (q, k) if self.layer_idx % 4 else apply_rotary_pos_emb(q, k, cos, sin)


class Sixth(OwnAttention):
    def positioned(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin) if (self.layer_idx + 1) % 6 else (q, k)


class Limited(OwnAttention):
    def positioned(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q.clamp(-500, 500), k, cos, sin)


ATTENTION = {"inputs": ["to_q", "to_k", "to_v"], "o": "to_out", "cache": "cache:plain"}


@pytest.mark.slow
def test_an_attention_of_a_class_of_ones_own() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    ids = torch.arange(3, 83).view(2, 40)
    losses = []
    try:
        peft_ext.register_form(OwnAttention, "attention", **ATTENTION)
        for accelerated in (False, True):
            torch.manual_seed(0)
            model = get_peft_model(OwnModel(config), LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out"]))
            if accelerated:
                peft_ext.accelerate(model)
                parts = [part for part in peft_ext.explain(model).blocks if "self_attn" in part.name]
                assert [part.kind for part in parts if part.fused] == [
                    "projections of one input", "rotary positions", "attention"] * 2  # fmt: skip
            losses.append(model(ids, labels=ids).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)
    finally:
        proof.REGISTERED.pop(form_of(OwnAttention).digest, None)


@pytest.mark.parametrize(
    ("cls", "more", "said"),
    [
        (OwnAttention, {"cache": "cache:kwargs"}, "the cache and attention are called with"),
        (OwnAttention, {"inputs": ["to_k", "to_q", "to_v"]}, "with this formula"),
        (Tempered, {}, "reads temperature, which is not in the formula"),
        (OfConfig, {}, "reads temperature of its configuration"),
        (Unturned, {}, "it computes with its layer_idx, which is not in the formula"),
        (Sixth, {}, "it computes with its layer_idx, which is not in the formula"),
        (OwnAttention, {"cache": "past_key_values:plain"}, "its forward takes cache, which is not in the formula"),
        (Limited, {}, "the values differ"),
    ],
)
def test_another_attention_is_disproved(cls: type, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        peft_ext.register_form(cls, "attention", **{**ATTENTION, **more})


class Louder(nn.Module):
    """Computes an MLP's output, enlarged by one hundredth."""

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x)) * 1.01


def test_a_small_difference_is_a_difference() -> None:
    formula = {"inner": ["gate", "up"], "out": "down", "act": "act", "gated": True}
    with pytest.raises(ValueError, match="the values differ: by .* times the tolerance"):
        peft_ext.register_form(Louder, "mlp", **formula)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("Own", 0, "register_form(Own"), ("Capped", 1, "no formula passes"), ("OwnSiLU", 1, "no formula passes")],
)
def test_the_command_that_explain_names(name: str, code: int, said: str) -> None:
    command = [sys.executable, "-m", "peft_ext.verification", f"{Path(__file__).stem}:{name}"]
    paths = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
                          env={**__import__("os").environ, "PYTHONPATH": ":".join(paths)})  # fmt: skip
    assert done.returncode == code and said in done.stdout, done.stdout + done.stderr
