"""Tests of Diff Pruning: the paper's gates and penalty, which entries are kept, and its callback with Trainer."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("aenum")
pytest.importorskip("bitsandbytes")

import peft
from peft import PeftModel, get_model_status
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerState
from tuner_models import (
    HIDDEN,
    adapter_parameters,
    assert_same,
    batch,
    config_of,
    gradients,
    logits,
    make,
    make_base,
    make_spread,
    spread,
    state_bits,
    train,
)

from peft_ext.integrations.trainer import DiffPruningCallback
from peft_ext.tuners import DiffPruningConfig
from peft_ext.tuners.diff_pruning import U_MIN, DenseDiff, SparseDiff

pytestmark = pytest.mark.filterwarnings("ignore")


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 4, bias=False).double()

    def forward(self, x):
        return self.lin(x)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_difference_is_the_papers_formula_in_float64(structured, train):
    model = peft.get_peft_model(One(), DiffPruningConfig(structured=structured, stretch_low=-0.5, stretch_high=1.25))
    spread(model).train(train)
    layer = model.base_model.model.lin
    ((_, diff),) = layer.diffs("default")
    diff.alpha.data -= 5  # some gates are open, some closed, some in between
    if structured:
        diff.group.data -= 5
    w, alpha = (p.detach().clone().requires_grad_() for p in (diff.w, diff.alpha))
    group = diff.group.detach().clone().requires_grad_() if structured else None
    x, g = torch.randn(6, 5).double(), torch.randn(6, 4).double()

    torch.manual_seed(11)
    model(x).backward(g)

    def gate(a):
        s = a
        if train:
            u = torch.empty(a.shape, dtype=torch.float64).uniform_(U_MIN, 1 - U_MIN)
            s = torch.log(u) - torch.log(1 - u) + a
        return torch.clamp(1 / (1 + torch.exp(-s)) * (1.25 + 0.5) - 0.5, 0, 1)

    torch.manual_seed(11)
    z = gate(alpha)
    theta = layer.base_layer.weight + (z if group is None else gate(group) * z) * w
    (x @ theta.T).backward(g)
    assert 0 < ((z == 0) | (z == 1)).sum() < z.numel()
    for actual, wanted in ((diff.w, w), (diff.alpha, alpha), (diff.group, group)):
        if wanted is not None:
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-12, atol=1e-12)
            assert wanted.grad.abs().sum() > 0


def test_gates_are_drawn_anew_while_training_and_fixed_in_eval():
    model, _ = make_spread("diff", "bert")
    assert torch.equal(logits(model.eval()), logits(model))
    model.train()
    torch.manual_seed(5)
    first = logits(model)
    assert not torch.equal(logits(model), first)
    torch.manual_seed(5)
    assert torch.equal(logits(model), first)
    draws = DenseDiff(torch.zeros(10_000), DiffPruningConfig()).gate(torch.zeros(10_000), True)
    # At α = 0 the gate is closed for u ≤ ½, and open where 3σ − 1.5 ≥ 1, that is u ≥ 5/6.
    assert abs((draws == 0).float().mean() - 1 / 2) < 0.02 and abs((draws == 1).float().mean() - 1 / 6) < 0.02


def expected_penalty(model, weight, low=-1.5, high=1.5):
    alphas = [p for n, p in model.named_parameters() if n.endswith((".alpha", ".group"))]
    return weight * sum(torch.sigmoid(a.double() - torch.log(torch.tensor(-low / high))).sum() for a in alphas)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_the_penalty_is_in_the_loss_while_training_whatever_way_in(task_type):
    model, _ = make_spread("diff", "bert", task_type=task_type, stretch_low=-0.3, stretch_high=1.2)
    wanted = expected_penalty(model, 1e-3, -0.3, 1.2)
    torch.testing.assert_close(model.penalty().double(), wanted)
    inputs = batch(model.get_base_model())

    def losses():
        torch.manual_seed(5)
        outputs = model(**inputs)
        data = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        torch.manual_seed(5)
        assert torch.equal(model.base_model(**inputs).loss, outputs.loss)
        return outputs, (outputs.loss - data).double()

    outputs, added = losses()  # the losses in eval mode
    assert added.abs() < 1e-6
    model.train()
    outputs, added = losses()
    torch.testing.assert_close(added, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs["loss"], outputs.loss)
    torch.manual_seed(5)
    assert torch.equal(model(**inputs, return_dict=False)[0], outputs.loss)
    handle = model.get_base_model().register_forward_hook(lambda module, args, output: dict(output), prepend=True)
    torch.manual_seed(5)
    assert torch.equal(model(**inputs)["loss"], outputs.loss)
    handle.remove()
    with torch.no_grad():
        assert losses()[1].abs() < 1e-6
    with model.disable_adapter():
        assert losses()[1].abs() < 1e-6
    model.zero_grad()
    model.penalty().backward()
    for name, parameter in model.named_parameters():
        if name.endswith(".alpha"):
            s = torch.sigmoid(parameter - torch.log(torch.tensor(0.3 / 1.2)))
            torch.testing.assert_close(parameter.grad, 1e-3 * s * (1 - s))


@pytest.mark.parametrize("name", ["llama", "t5"])  # Trainer counts all labels but the first, or all labels
def test_a_step_of_several_batches_has_the_penalty_once(name):
    model, base = make_spread("diff", name, task_type="CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM")
    model.train()
    inputs = batch(base)
    halves = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(3)]
    halves[2]["labels"] = halves[2]["labels"].clone()
    halves[2]["labels"][:, 2:] = -100
    start = 1 if name == "llama" else 0
    items = sum(half["labels"][..., start:].ne(-100).sum() for half in halves)

    def total(weight):
        model.peft_config["default"].sparsity_penalty = weight
        torch.manual_seed(5)
        return sum(model(**half, num_items_in_batch=items).loss for half in halves)

    torch.testing.assert_close((total(1e-3) - total(0.0)).double(), expected_penalty(model, 1e-3), rtol=1e-4, atol=1e-5)


# --- pruning ----------------------------------------------------------------------------------------------------------


def dense_differences(model):
    return {name: diff.difference(sample=False).detach() for name, diff in model.base_model._diffs("default")}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_pruning_keeps_the_largest_over_all_tensors(name, tmp_path):
    config = config_of("diff", name)
    base = make_base(name)
    model = spread(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    differences = dense_differences(model)
    flat = torch.cat([d.flatten() for d in differences.values()])
    count = int(0.05 * flat.numel())
    threshold = flat.abs().sort(descending=True).values[count - 1]
    wanted = {n: torch.where(d.abs() >= threshold, d, 0) for n, d in differences.items()}
    sizes = {n: int((d != 0).sum()) for n, d in wanted.items() if (d != 0).any()}
    assert sum(sizes.values()) == count

    kept = model.prune(target=0.05)
    assert kept == sizes == model.peft_config["default"].kept and config.kept is None
    plain = copy.deepcopy(base)
    for n, d in wanted.items():
        plain.get_parameter(n).data += d
    assert torch.equal(logits(model), logits(plain))
    for n, diff in model.base_model._diffs("default"):
        assert isinstance(diff, SparseDiff) and diff.indices.dtype is torch.int32
        assert torch.equal(diff.indices.long(), wanted[n].flatten().nonzero().flatten())
        assert torch.equal(diff.values.detach(), wanted[n].flatten()[diff.indices.long()])
    assert model.get_nb_trainable_parameters()[0] == count

    # After pruning only the kept entries train, with the gradient of a dense model, and there is no penalty.
    plain.requires_grad_(False)
    for n in wanted:
        plain.get_parameter(n).requires_grad_(True)
    model.train()
    actual, dense = gradients(model), gradients(plain.train())
    assert set(actual) == set(adapter_parameters(model)) and len(actual) == len(sizes)
    for n, diff in model.base_model._diffs("default"):
        assert torch.equal(diff.values.grad, dense[n].flatten()[diff.indices.long()])
    assert model.penalty() == 0

    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} == {"indices", "values"} and len(saved) == 2 * len(sizes)
    assert sum(t.numel() for k, t in saved.items() if k.endswith("values")) == count
    for low in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert loaded.peft_config["default"].kept == sizes
        assert torch.equal(logits(loaded), logits(model))
    loaded.add_adapter("dense", config_of("diff", name))
    loaded.set_adapter("dense")
    assert torch.equal(logits(loaded), logits(base))

    before, bits = logits(model), state_bits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    assert_same(state_bits(model), bits)
    assert torch.equal(logits(pickle.loads(pickle.dumps(copy.deepcopy(model)))), before)
    assert get_model_status(model).requires_grad == {"default": True}
    assert torch.equal(logits(model.merge_and_unload()), before)


def test_what_is_read_decides_whether_an_adapter_is_pruned(tmp_path):
    """A checkpoint from before the pruning is loaded into a pruned model, and the reverse."""
    model, base = make_spread("diff", "bert")
    model.save_pretrained(tmp_path / "before")
    dense = logits(model)
    model.prune(0.1)
    model.save_pretrained(tmp_path / "after")
    sparse = logits(model)
    other = peft.get_peft_model(copy.deepcopy(base), config_of("diff"))
    for folder, wanted in (("after", sparse), ("before", dense), ("after", sparse)):
        other.load_adapter(tmp_path / folder, "default", is_trainable=True)
        assert torch.equal(logits(other), wanted)
        assert (other.peft_config["default"].kept is None) == (folder == "before")
        assert all(p.requires_grad for p in adapter_parameters(other).values())


def test_entries_that_are_zero_are_not_kept():
    model, _ = make("diff", "bert", target_modules=["query"])
    with pytest.raises(ValueError, match="is 0 everywhere"):
        model.prune(0.5)
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    query.diff_pruning_tensors["default"].weight.w.data[2, 3] = 0.5
    query.diff_pruning_tensors["default"].weight.alpha.data[2, 3] = 0.1
    query.diff_pruning_tensors["default"].bias.w.data[1] = 0.5
    query.diff_pruning_tensors["default"].bias.alpha.data[1] = -0.1  # this gate is closed in eval mode
    assert model.prune(0.5) == {"bert.encoder.layer.0.attention.self.query.weight": 1}
    assert query.diff_pruning_tensors["default"].weight.indices.tolist() == [2 * HIDDEN + 3]


@pytest.mark.parametrize("in_groups", [False, True])
def test_the_optimizer_goes_on_with_what_is_kept(in_groups):
    model, base = make_spread("diff", "bert", task_type="SEQ_CLS")
    if in_groups:
        groups = model.parameter_groups(0.01, gate_lr=0.2, weight_decay=0.3)
        named = {id(p): n for n, p in model.named_parameters()}
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.3), (0.2, 0.0)]
        assert all(named[id(p)].endswith((".alpha", ".group")) for p in groups[1]["params"])
        everything = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for g in groups for p in g["params"]} == everything
    else:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": [p for n, p in trained if "bias" not in n], "weight_decay": 0.1, "lr": 0.01},
                  {"params": [p for n, p in trained if "bias" in n], "weight_decay": 0.0, "lr": 0.02}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    model.train()(**batch(base)).loss.backward()
    optimizer.step()
    model.prune(0.05, optimizer=optimizer)
    trained = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    held = [[trained[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert sorted(n for names in held for n in names) == sorted(trained.values())
    assert not in_groups or held[1] == []
    assert in_groups or all("bias" in n for n in held[1]) and not any("bias" in n for n in held[0])
    assert set(optimizer.state) <= {p for g in optimizer.param_groups for p in g["params"]}
    head = next(p for n, p in model.named_parameters() if n.endswith("modules_to_save.default.weight"))
    assert optimizer.state[head]["step"] == 1
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    model(**batch(base)).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # A key's bias adds one number to a query's scores, which softmax does not see: its gradient is 0 except for
    # rounding.
    key_biases = {n for n in trained.values() if ".key." in n and "bias" in n}
    assert moved | key_biases == set(trained.values())
    with pytest.raises(ValueError, match="pruned already"):
        model.prune(0.05)
    fresh, _ = make_spread("diff", "bert")
    with pytest.raises(ValueError, match="does not train bert"):
        fresh.prune(0.05, optimizer=optimizer)
    assert fresh.peft_config["default"].kept is None


def test_a_refused_merge_leaves_the_penalty():
    model = peft.get_peft_model(make_base("llama"), DiffPruningConfig(task_type="CAUSAL_LM")).train()
    ids = torch.arange(12).view(2, 6)
    torch.manual_seed(0)
    before = model(input_ids=ids, labels=ids).loss
    with pytest.raises(TypeError):
        model.merge_and_unload(adapter_names="default")
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, before)


def test_prune_errors():
    model, _ = make_spread("diff", "bert")
    for arguments, match in (
        ({"target": 0}, "target is 0, wanted a fraction"),
        ({"target": 1.5}, "target is 1.5"),
        ({"target": 1e-9}, "keeps no entry"),
        ({"adapter_name": "nope"}, "adapter_name is 'nope', wanted one of"),
    ):
        with pytest.raises(ValueError, match=match):
            model.prune(**arguments)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into bert"):
        model.prune()
    model.unmerge_adapter()
    adapter_parameters(model).popitem()[1].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


# --- the callback -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_callback_prunes_under_trainer_and_a_run_is_resumed(tmp_path):
    def run(folder, resume=None, **arguments):
        model, base = make("diff", "bert", task_type="SEQ_CLS")
        callback = DiffPruningCallback(target=0.02, at=0.5)
        arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **arguments}
        trainer, losses = train(model, str(tmp_path / folder), base, resume, [callback], **arguments)
        return model, trainer, losses, callback

    model, trainer, losses, callback = run("whole")
    assert callback.kept == model.peft_config["default"].kept and sum(callback.kept.values()) > 0
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == trained
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "adapter_model.safetensors")
    last = get_peft_model_state_dict(model)
    values = [key for key in last if key.endswith(".values")]
    assert values and any(not torch.equal(last[key], saved[key]) for key in values)
    assert all(torch.equal(last[key], saved[key]) for key in last if key.endswith(".indices"))
    for step in (1, 3):  # checkpoints from before and after the pruning at step 2
        other, _, _, again = run(f"resumed-{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert (again.kept is None) == (step == 3)
        assert_same(get_peft_model_state_dict(other), last)


def test_callback_errors():
    for arguments, match in (({"target": 0}, "target is 0"), ({"at": 0}, "at is 0"), ({"at": 1.5}, "at is 1.5")):
        with pytest.raises(ValueError, match=match):
            DiffPruningCallback(**arguments)
    state = TrainerState(max_steps=2)
    with pytest.raises(ValueError, match="at is 7, the run has 2 steps"):
        DiffPruningCallback(at=7).on_train_begin(None, state, None, model=make("diff")[0])
    with pytest.raises(TypeError, match="model is PeftModel, wanted a PeftModel with Diff Pruning"):
        DiffPruningCallback().on_train_begin(None, state, None, model=make("BitFit")[0])
    several = SimpleNamespace(world_size=2, deepspeed=None, fsdp=None)
    with pytest.raises(ValueError, match="under DDP, DeepSpeed or FSDP"):
        DiffPruningCallback().on_train_begin(several, state, None, model=make("diff")[0])
