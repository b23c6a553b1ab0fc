"""Experts that are modules of their own run as one call, give what each gives alone, and never another result."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import expert_loops
import pytest
import torch
import transformers as hf
from expert_loops import EXPERTS, LOOPS, WHOLE, IndexAdd, K
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft_models import with_philox
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_ext
from peft_ext.integrations.model_blocks import expert_modules, split_loops

T = 40
NAMES = ["gate_proj", "up_proj", "down_proj"]


class Calls(TorchDispatchMode):
    """The rows of each call of lora_expert_linears."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.peft_ext.lora_expert_linears.default:
            self.rows.append(list(args[1]))
        return func(*args, **(kwargs or {}))


def build(kind: Any = IndexAdd, config: Any = None, dtype: torch.dtype = torch.float32, **held: Any) -> Any:
    torch.manual_seed(0)
    config = config or LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(kind(**held)).to(dtype), config)
    if isinstance(config, AdaLoraConfig):
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)
    return model


def block(model: Any) -> Any:
    return model.base_model.model[0]


def draw(dtype: torch.dtype = torch.float32, count: int = T) -> Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: Any, x: Tensor, run: Any = None) -> tuple[dict[str, Any], list[list[int]]]:
    """Output and gradients, and the calls."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with Calls() as calls:
        y = (model if run is None else run)(x)
        y.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}, calls.rows


def same(found: dict[str, Any], wanted: dict[str, Any], within: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] is None) == (value is None), name
        if value is not None and within > 1e-2:  # of 16 bits: an element's error may be all of it
            assert (found[name] - value).norm() <= within * value.norm() + 1e-6, name
        elif value is not None and value.numel():
            torch.testing.assert_close(found[name], value, rtol=within, atol=within * float(value.abs().max()) + 1e-12)


def experts_row(model: Any) -> Any:
    (row,) = [row for row in peft_ext.explain(model).blocks if row.kind == "experts"]
    return row


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", LOOPS)
def test_experts_run_together_as_they_run_alone(name: str, train: bool) -> None:
    if name == "Dropped" and train:
        pytest.skip("its dropout draws other numbers, see below")
    model = build(LOOPS[name]).train(train)
    wanted, none = step(model, draw())
    assert none == []
    peft_ext.accelerate(model)
    assert experts_row(model).fused
    found, calls = step(model, draw())
    assert len(calls) == 3 and all(rows == calls[0] for rows in calls)
    assert sum(calls[0]) == (EXPERTS if name == "Summed" else 2) * T and calls[0][0] > 0
    assert len(calls[0]) == (EXPERTS if name in ("All", "Enumerated", "Dropped", "Summed") else EXPERTS - 1)
    same(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(draw()), wanted["y"])
    peft_ext.restore(model)
    found, calls = step(model, draw())
    assert calls == []
    same(found, wanted, 0.0)


def test_a_dropout_behind_the_experts_acts_on_all_of_them() -> None:
    model = peft_ext.accelerate(build(LOOPS["Dropped"])).train()
    block(model).dropout.p = 0.0
    wanted, _ = step(build(LOOPS["Dropped"]).train().apply(lambda one: setattr(one, "p", 0.0)), draw())
    found, calls = step(model, draw())
    assert len(calls) == 3
    same(found, wanted)
    block(model).dropout.p = 0.9
    with torch.no_grad():
        assert 0.6 < (model(draw()) == 0).float().mean() < 1


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_a_loop_whose_turns_hang_together_stays_as_it_is(name: str, train: bool) -> None:
    model = build(WHOLE[name]).train(train)
    wanted, _ = step(model, draw(count=64))
    peft_ext.accelerate(model)
    found, calls = step(model, draw(count=64))
    assert calls == []
    same(found, wanted, 1e-3)  # a turn's rounding goes through all that follow
    if name == "Global":
        assert expert_loops.STEP % 2 == 0 and expert_loops.STEP > 0


def test_the_source_decides() -> None:
    taken = {
        name
        for name, kind in {**LOOPS, **WHOLE}.items()
        if split_loops.split(kind.forward, expert_modules.outputs) is not None
    }
    # Of these the source does not say it; what the names are does, and where they lie.
    assert split_loops.split(expert_loops.Gathers.forward, expert_modules.outputs) is None
    by_value = {"AddedTo", "Drawn", "Held", "InList", "InPlace", "Numpy", "OfBuffer", "OfList"}
    assert taken == {*LOOPS, *by_value} - {"OfNamed"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_as_near_to_float32_as_alone(dtype: torch.dtype) -> None:
    exact, _ = step(build(), draw(dtype).float())
    model = build(dtype=dtype)
    alone, _ = step(model, draw(dtype))
    found, calls = step(peft_ext.accelerate(model), draw(dtype))
    assert len(calls) == 3
    for name in ("y", "x"):
        errors = [(value[name].float() - exact[name]).norm() for value in (found, alone)]
        assert errors[0] <= 1.5 * errors[1], name


@pytest.mark.parametrize("where", ["experts", "input"])
def test_under_autocast(where: str) -> None:
    model = build()
    context = torch.autocast("cpu", torch.bfloat16)

    def run(x: Tensor) -> Tensor:
        with context:
            return model(x if where == "experts" else x.bfloat16().float())

    wanted, _ = step(model, draw(), run)
    peft_ext.accelerate(model)
    found, calls = step(model, draw(), run)
    assert len(calls) == 3
    same(found, wanted, 3e-2)


def test_biases_and_layers_without_an_adapter() -> None:
    config = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False, rank_pattern={"experts.1.up_proj": 7})
    model = build(config=config, bias=True)
    wanted, _ = step(model, draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert len(calls) == 3
    same(found, wanted)


def test_adalora() -> None:
    model = build(config=AdaLoraConfig(target_modules=NAMES, init_r=4, target_r=2, total_step=10))
    wanted, _ = step(model, draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert len(calls) == 3
    same(found, wanted)


def test_dora_runs_by_itself() -> None:
    model = build(config=LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False, use_dora=True))
    wanted, _ = step(model, draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert calls == []
    same(found, wanted, 1e-4)
    assert "by itself" in experts_row(model).reason


def test_several_adapters_run_by_themselves() -> None:
    model = build()
    model.add_adapter("other", LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    wanted, _ = step(model, draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert calls == []
    same(found, wanted)
    model.base_model.set_adapter("default")
    assert len(step(model, draw())[1]) == 3


@pytest.mark.parametrize("kind", ["NF4Linear", "Linear4bit"])
def test_4_bits(kind: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(IndexAdd()).to(torch.bfloat16)
    if kind == "Linear4bit":
        bnb = pytest.importorskip("bitsandbytes")
        for expert in base[0].experts:
            for name in NAMES:
                dense = getattr(expert, name)
                layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, quant_type="nf4",
                                          compute_dtype=torch.bfloat16)  # fmt: skip
                layer.load_state_dict(dense.state_dict())
                setattr(expert, name, layer.to("cpu"))
    else:
        peft_ext.quantize_nf4(base, blocksize=32, progress=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False))
    wanted, calls = step(peft_ext.accelerate(model, blocks=False), draw(torch.bfloat16))
    assert calls == []
    peft_ext.restore(model)
    found, calls = step(peft_ext.accelerate(model), draw(torch.bfloat16))
    assert len(calls) == 3
    same(found, wanted, 2e-2)


@pytest.mark.parametrize("name", ["IndexAdd", "All", "Sorted"])
def test_each_expert_has_the_mask_that_it_would_have_alone(name: str) -> None:
    config = LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False, lora_dropout=0.5)
    wanted, _ = step(with_philox(build(LOOPS[name], config)), draw())
    model = peft_ext.accelerate(build(LOOPS[name], config))
    found, calls = step(model, draw())
    assert len(calls) == 3
    same(found, wanted)
    plain, _ = step(build(LOOPS[name]), draw())
    assert not torch.allclose(found["y"], plain["y"], rtol=0.1)


def test_a_layer_alone_that_drops_draws_as_it_would_alone() -> None:
    model = build(config=LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False, lora_dropout=0.5))
    for expert in block(model).experts[::2]:
        expert.up_proj.lora_dropout["default"] = nn.Identity()
        expert.gate_proj.eval()
    wanted, _ = step(with_philox(copy.deepcopy(model)), draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert len(calls) == 3
    same(found, wanted)


def test_checkpointing_gives_the_same() -> None:
    config = LoraConfig(r=4, target_modules=NAMES, init_lora_weights=False, lora_dropout=0.5)
    model = peft_ext.accelerate(build(config=config))
    wanted, _ = step(model, draw())
    found, calls = step(model, draw(), lambda x: checkpoint(model, x, use_reentrant=False))
    assert len(calls) == 6
    same(found, wanted)
    found, calls = step(model, draw(), lambda x: checkpoint(model, x, use_reentrant=True))
    assert len(calls) == 6
    same(found, wanted)


@pytest.mark.parametrize("where", ["expert", "layer", "base", "activation", "global"])
def test_hooks_run(where: str) -> None:
    model = peft_ext.accelerate(build())
    expert = block(model).experts[0]
    module = {"expert": expert, "layer": expert.up_proj, "base": expert.up_proj.base_layer,
              "activation": expert.act_fn}.get(where)  # fmt: skip
    wanted, _ = step(model, draw())
    seen = []

    def hook(module: Any, args: Any, output: Any) -> None:
        seen.append(module)

    handle = (nn.modules.module.register_module_forward_hook(hook) if module is None
              else module.register_forward_hook(hook))  # fmt: skip
    try:
        found, _ = step(model, draw())
    finally:
        handle.remove()
    assert seen
    same(found, wanted)
    if where in ("expert", "global"):
        assert len(step(model, draw())[1]) == 3


class Scaled(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.rate


class DenseActDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(K, 24, bias=False), nn.Linear(24, K, bias=False)
        self.dropout, self.act = nn.Dropout(0.0), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(self.act(self.wi(x))))


class WithDropout(IndexAdd):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(DenseActDense() for _ in range(EXPERTS))


INTO_AND_OUT = LoraConfig(r=4, target_modules=["wi", "wo"], init_lora_weights=False)


@pytest.mark.parametrize("name", ["hooked", "another", "a setting"])
def test_a_dropout_with_more_to_it_runs_by_itself(name: str) -> None:
    """A hook on an expert's own dropout sees its rows; another class may have settings of its own."""
    model = build(WithDropout, copy.deepcopy(INTO_AND_OUT))
    seen: list[int] = []
    for i, expert in enumerate(block(model).experts):
        if name == "hooked":
            expert.dropout.register_forward_hook(lambda module, args, output, i=i: seen.append(i) or output * i)
        else:
            expert.dropout = Scaled(i / 10) if name == "a setting" else nn.AlphaDropout(0.0)
    wanted, _ = step(model, draw())
    before = list(seen)
    seen.clear()
    found, calls = step(peft_ext.accelerate(model), draw())
    assert calls == [] and seen == before
    same(found, wanted)


def test_a_dropout_between_the_layers() -> None:
    model = build(WithDropout, copy.deepcopy(INTO_AND_OUT))
    wanted, _ = step(model, draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert len(calls) == 2
    same(found, wanted)


def test_an_expert_that_is_called_in_a_way_of_its_own() -> None:
    class Half(expert_loops.Mlp):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 0.5

    class Halves(IndexAdd):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Half() for _ in range(EXPERTS))

    model = build(Halves)
    wanted, _ = step(model, draw())
    found, calls = step(peft_ext.accelerate(model), draw())
    assert calls == []
    same(found, wanted)


def test_under_a_transform_of_torch_func_it_is_pefts() -> None:
    model = build()

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    wanted = torch.func.grad(loss)(draw())
    peft_ext.accelerate(model)
    torch.testing.assert_close(torch.func.grad(loss)(draw()), wanted)


def test_under_autocast_of_the_other_16_bits() -> None:
    model = build(dtype=torch.float16)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    wanted, _ = step(model, draw(torch.float16), run)
    found, _ = step(peft_ext.accelerate(model), draw(torch.float16), run)
    same(found, wanted, 5e-2)


def test_what_the_forward_lets_go_is_freed() -> None:
    class Lets(IndexAdd):
        def forward(self, x: Tensor) -> Tensor:
            out, big = torch.zeros_like(x), torch.zeros(4)
            for expert in self.experts:
                result = expert(x)
                out = out + result * big.shape[0]
            held = weakref.ref(big)
            big = None
            self.freed = held() is None
            return out

    model = peft_ext.accelerate(build(Lets))
    _, calls = step(model, draw())
    assert len(calls) == 3 and block(model).freed


def test_a_forward_that_was_replaced_runs() -> None:
    model = peft_ext.accelerate(build())
    expert = block(model).experts[1]
    expert.forward = lambda x: x * 0.0
    found, calls = step(model, draw())
    assert calls == [] and found["base_model.model.0.experts.1.up_proj.lora_A.default.weight"] is None


def test_another_class_among_the_experts() -> None:
    model = build()
    block(model).experts[2] = nn.Identity()
    wanted, _ = step(model, draw())
    found, _ = step(peft_ext.accelerate(model), draw())
    same(found, wanted)


def test_an_error_in_an_expert_comes_through_and_leaves_nothing() -> None:
    model = peft_ext.accelerate(build())
    wanted, _ = step(model, draw())
    with pytest.raises(RuntimeError):
        model(torch.randn(T, K + 1))
    same(step(model, draw())[0], wanted, 0.0)


def test_one_expert_alone_and_no_rows_at_all() -> None:
    model = build(experts=2)
    wanted, _ = step(model, draw(count=1))
    peft_ext.accelerate(model)
    same(step(model, draw(count=1))[0], wanted)
    model = build(LOOPS["All"])
    wanted, _ = step(model, draw(count=0))
    found, calls = step(peft_ext.accelerate(model), draw(count=0))
    assert calls == [[0] * EXPERTS] * 3
    same(found, wanted)


def test_disabled_and_merged_adapters() -> None:
    model = peft_ext.accelerate(build())
    plain = build().unload()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(draw()), plain(draw()))
        assert "disabled" in experts_row(model).reason
    found, _ = step(model, draw())
    model.merge_adapter()
    torch.testing.assert_close(model(draw()), found["y"], rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(draw()), found["y"], rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_compute_the_same() -> None:
    model = peft_ext.accelerate(build())
    wanted, _ = step(model, draw())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, calls = step(other, draw())
        assert len(calls) == 3
        same(found, wanted, 0.0)


def test_without_blocks_each_runs_alone() -> None:
    model = peft_ext.accelerate(build(), blocks=False)
    assert step(model, draw())[1] == []
    assert "blocks=False" in experts_row(model).reason


def test_compiled_it_gives_the_same() -> None:
    model = peft_ext.accelerate(build(LOOPS["All"]))
    wanted, _ = step(model, draw())
    try:
        found, _ = step(model, draw(), torch.compile(model, backend="eager"))
    finally:
        torch._dynamo.reset()
    same(found, wanted)


@pytest.mark.parametrize("name", ["switch", "nllb"])
def test_models_of_transformers(name: str) -> None:
    """Whose MLPs have their dropout between, and whose experts are one module with a forward of its own."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "num_experts": 4, "router_jitter_noise": 0.0}
    if name == "switch":
        config = hf.SwitchTransformersConfig(**common, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=2,
                                             num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0,
                                             expert_capacity=64, decoder_start_token_id=0)  # fmt: skip
        model, names = hf.SwitchTransformersForConditionalGeneration(config), ["wi", "wo"]
    else:
        config = hf.NllbMoeConfig(**common, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                                  decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
                                  encoder_sparse_step=2, decoder_sparse_step=2, dropout=0.0, attention_dropout=0.0,
                                  activation_dropout=0.0, moe_token_dropout=0.0, expert_capacity=64,
                                  decoder_start_token_id=2, encoder_layerdrop=0.0, decoder_layerdrop=0.0)  # fmt: skip
        model, names = hf.NllbMoeForConditionalGeneration(config), ["fc1", "fc2"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False)).train()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))

    def run() -> tuple[dict[str, Any], int]:
        model.zero_grad(set_to_none=True)
        with Calls() as calls:
            found = model(input_ids=ids, labels=ids)
            found.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        return {"loss": found.loss.detach(), **grads}, len(calls.rows)

    wanted, _ = run()
    peft_ext.accelerate(model)
    rows = [row for row in peft_ext.explain(model).blocks if row.kind == "experts"]
    assert len(rows) == 2 and all(row.fused for row in rows), rows
    found, calls = run()
    assert calls == 4  # into and out of the experts of two layers
    same(found, wanted, 1e-4)
