"""The actions that the model fuzzer draws and applies to PEFT's model and to the accelerated model."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_pair import NO_FLOAT64, TIGHT, Failed, Pair, changed, distance
from model_probe import HOOKS, IN_PLACE, Probe, change_in_place, stir
from peft import PeftModel
from peft_models import tuners
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.adapter_layers.base import STOCK
from peft_ext.integrations.adapter_layers.linear import FusedLinear
from peft_ext.integrations.model_blocks.block import Block
from peft_ext.integrations.model_blocks.loss import LanguageModel
from peft_ext.model import register_layers
from peft_ext.nn import NF4Linear


class Case(Pair):
    """A case of the fuzzer: two models, and actions on both models, which ``live`` draws."""

    def live(self) -> None:
        self.draw()
        self.compare_state("accelerate")
        self.act_train()
        for _ in range(self.rng.randint(1, 5)):
            if self.ended:
                return
            action = self.pick(ACTIONS)
            self.tell(action)
            self.seen.counts[f"action {action}"] += 1
            getattr(self, f"act_{action}")()
        if not self.ended:
            self.probe(self.drawn_probe())
        if not self.ended and self.maybe(0.15):
            self.tell("leave")
            self.leave()

    def drawn_probe(self, **fixed: Any) -> Probe:
        backward = self.maybe(0.75)
        drawn = {
            "training": self.maybe(0.6), "backward": backward, "autocast": self.rounds and self.maybe(0.4),
            # A sequence of one token has no token to predict.
            "own_loss": self.maybe(0.7) and self.sizes.length > 1,
            "steps": self.rng.choice((1, 1, 1, 2)) if backward else 1,
            "disabled": self.maybe(0.1), "inference": self.maybe(0.3), "seed": self.new_seed(),
        }  # fmt: skip
        drawn |= fixed
        # While the adapters are disabled, nothing trains unless the base trains.
        drawn["backward"] &= not drawn["disabled"] or self.base_trains
        return Probe(**drawn)

    def act_train(self) -> None:
        self.probe(self.drawn_probe(training=True, backward=True, disabled=False))
        if self.maybe(0.6):
            seed = self.new_seed()
            self.both("a step of training", lambda model: _step(model, seed))

    def act_evaluate(self) -> None:
        self.probe(self.drawn_probe(training=False))

    def act_disable(self) -> None:
        self.probe(self.drawn_probe(disabled=True))

    def act_switch_off(self) -> None:
        self.both("disable_adapter_layers", lambda model: model.base_model.disable_adapter_layers())
        self.probe(self.drawn_probe(disabled=False, backward=self.base_trains))
        self.both("enable_adapter_layers", lambda model: model.base_model.enable_adapter_layers())

    def act_add(self) -> None:
        name = f"other{len(self.names)}"
        if self.nf4 and self.method in ("AdaLoRA", "IA3"):
            # Over an NF4 weight, PEFT makes other parameters of a second adapter trainable than over a dense weight.
            return self.act_train()
        # PEFT cannot start a DoRA over an NF4Linear that has no adapter yet.
        method = self.rng.choice(("LoRA",) if self.nf4 else ("LoRA", "LoRA", "DoRA"))
        method = self.method if self.method in ("IA3", "AdaLoRA") else method
        config = self.draw_config(method)
        config.bias = "none"
        if hasattr(config, "lora_dropout") and not self.drops:
            config.lora_dropout = 0.0
        config.inference_mode = method == "AdaLoRA"  # only one AdaLoRA adapter may train
        self.tell(f"  {method} {changed(config)}")
        seed = self.new_seed()

        def add(model: nn.Module) -> None:
            try:
                register_layers(mine := copy.deepcopy(config), model)
                model.add_adapter(name, mine, autocast_adapter_dtype=self.autocast_adapters)
            finally:
                if model is self.fused:  # new layers are stock until this call, also if PEFT raised before the end
                    peft_ext.accelerate(model)
            stir(model, name, torch.Generator().manual_seed(seed))

        if self.both("add_adapter", add):
            self.names.append(name)
            self.act_toggle()

    def act_toggle(self) -> None:
        several = len(self.names) > 1 and not self.drops and self.maybe(0.7)
        chosen = self.rng.sample(self.names, self.rng.randint(2, len(self.names)) if several else 1)
        self.tell(f"  {chosen} active")
        self.both("set_adapter", lambda model: model.base_model.set_adapter(chosen if len(chosen) > 1 else chosen[0]))
        self.probe(self.drawn_probe())

    def act_weigh(self) -> None:
        if self.method not in ("LoRA", "DoRA") or len(self.names) < 2:
            return self.act_add()
        name, chosen = f"mix{len(self.names)}", self.rng.sample(self.names, 2)
        kind = self.rng.choice(("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"))
        weights = [round(self.rng.uniform(-1, 2), 2) for _ in chosen]
        options = {"density": 0.5} if kind in ("ties", "dare_linear", "magnitude_prune") else {}
        options |= {"svd_rank": 3} if kind == "svd" else {}
        self.tell(f"  {kind} of {chosen}, {weights}")
        done = self.both("add_weighted_adapter", lambda model: model.add_weighted_adapter(
            chosen, weights, name, combination_type=kind, **options))  # fmt: skip
        if done:
            self.names.append(name)
            self.both("set_adapter", lambda model: model.set_adapter(name))
            self.probe(self.drawn_probe())

    def act_delete(self) -> None:
        if len(self.names) < 2:
            return self.act_add()
        name = self.rng.choice(self.names)
        self.tell(f"  {name}")
        if self.both("delete_adapter", lambda model: model.delete_adapter(name)):
            self.names.remove(name)
            self.probe(self.drawn_probe())

    def act_scale(self) -> None:
        scale = self.rng.choice((0.5, 2.0, -1.0, 0.0))

        def rescale(model: nn.Module) -> None:
            for layer in tuners(model).values():
                layer.scale_layer(scale)

        self.tell(f"  by {scale}")
        if self.method in ("LoRA", "DoRA"):
            self.both("scale_layer", rescale)
        self.probe(self.drawn_probe())

    def act_merge(self) -> None:
        if self.nf4 and self.method == "DoRA":
            return
        safe, some = self.maybe(), self.rng.sample(self.names, 1) if self.maybe(0.3) else None
        self.tell(f"  safe_merge={safe}, {some or 'the active ones'}")
        was, self.merged = self.merged, True
        if not self.both("merge_adapter", lambda model: model.merge_adapter(some, safe_merge=safe)):
            if self.nf4:  # PEFT changed a weight that it does not count as merged; the accelerated model changed none
                self.ended = True
                return
            self.merged = was or any(layer.merged for layer in tuners(self.stock).values())
        self.probe(self.drawn_probe())
        if self.maybe(0.8):
            self.act_unmerge()

    def act_unmerge(self) -> None:
        merged = self.merged
        self.both("unmerge_adapter", lambda model: model.unmerge_adapter(), compare_state=not merged)
        if merged and self.nf4:
            # The dense weight is restored up to rounding, and the NF4 weight exactly.
            stock = dict(self.stock.named_parameters())
            for name, module in self.fused.named_modules():
                if isinstance(module, NF4Linear):
                    want = stock[f"{name}.weight"]
                    if not distance(module.dequantize(), want) <= (
                        100 * torch.finfo(self.dtype).eps * want.double().norm().item()
                    ):
                        raise Failed(f"unmerge_adapter: {name} is not the weight from before merging")
                    want.data.copy_(module.dequantize())
                    if module.bias is not None:
                        stock[f"{name}.bias"].data.copy_(module.bias.data)
        self.merged = False
        self.compare_state("unmerge_adapter")
        self.probe(self.drawn_probe())

    def act_mix(self) -> None:
        if self.method in ("IA3", "AdaLoRA") and self.maybe(0.8):  # PEFT has mixed batches only for LoRA
            return self.act_toggle()
        size = next(len(value) for value in self.batch.values() if isinstance(value, Tensor))
        names = tuple(self.rng.choice([*self.names, "__base__"]) for _ in range(size))
        probe = self.drawn_probe(training=self.maybe(0.1), disabled=False, adapter_names=names, own_loss=False)
        if not self.probe(replace(probe, steps=1)):
            self.ended = True  # an error in a mixed batch leaves PEFT's hooks behind

    def act_hook(self) -> None:
        layers = list(tuners(self.stock))
        name = self.rng.choice(layers)
        inner = [f"{name}.{child}" for child, _ in dict(self.stock.named_modules())[name].named_modules()
                 if child and type(self.stock.get_submodule(f"{name}.{child}")) in (nn.Linear, nn.Dropout)]  # fmt: skip
        if inner and self.maybe():
            name = self.rng.choice(inner)
        kind = self.rng.choice(list(HOOKS))
        self.tell(f"  {name} {kind}")
        method, hook = HOOKS[kind]
        self.both("hook", lambda model: bool(getattr(model.get_submodule(name), method)(hook)))
        self.hooked.append(name)
        self.probe(self.drawn_probe())
        if self.maybe(0.7):
            self.act_unhook()

    def act_change_in_place(self) -> None:
        names = self.rng.sample(sorted(tuners(self.stock)), self.rng.randint(1, min(3, len(tuners(self.stock)))))
        how = self.rng.choice([how for how in IN_PLACE if not (self.rounds and how == "relu_")])
        self.tell(f"  {how} on {', '.join(names)}")
        for name in names:
            hook = functools.partial(change_in_place, how=how)
            self.both("hook", lambda model, name=name, hook=hook: bool(
                model.get_submodule(name).register_forward_hook(hook)))  # fmt: skip
            self.hooked.append(name)
        self.probe(self.drawn_probe(training=True, backward=True, disabled=False))
        self.probe(self.drawn_probe())
        if self.maybe(0.7):
            self.act_unhook()

    def act_unhook(self) -> None:
        def unhook(model: nn.Module) -> None:
            for name in self.hooked:
                with contextlib.suppress(AttributeError):  # raised where the hook's adapter was deleted
                    module = model.get_submodule(name)
                    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                        hooks.clear()

        self.both("unhook", unhook)
        self.hooked = []
        self.probe(self.drawn_probe())

    def act_checkpoint(self) -> None:
        reentrant = self.maybe()
        self.tell(f"  use_reentrant={reentrant}")

        def enable(model: nn.Module) -> None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant and self.architecture.task is not None:
                model.enable_input_require_grads()

        if self.both("gradient_checkpointing_enable", enable):
            self.probe(self.drawn_probe(training=True, backward=True))
            if self.maybe(0.7):
                self.both("gradient_checkpointing_disable", lambda model: model.gradient_checkpointing_disable())

    def act_train_base(self) -> None:
        chance, seed = self.rng.choice((0.1, 0.5, 1.0)), self.new_seed()
        wanted = self.maybe(0.8)

        def change(model: nn.Module) -> None:
            rng = random.Random(seed)
            for name, parameter in self.stock.named_parameters():
                mine = model.get_parameter(name)
                if rng.random() < chance and parameter.is_floating_point() and mine.is_floating_point():
                    mine.requires_grad_(wanted)

        self.base_trains = wanted and chance == 1.0
        self.tell(f"  {chance:.0%} of the parameters {'train' if wanted else 'are frozen'}")
        self.both("requires_grad_", change, compare_state=not self.nf4)
        if self.nf4:  # an NF4 weight cannot train, so the dense weight must not train
            for name, parameter in self.fused.named_parameters():
                if parameter.dtype is torch.uint8:
                    self.stock.get_parameter(name).requires_grad_(False)
        self.probe(self.drawn_probe())

    def act_copy(self) -> None:
        self.both("deepcopy", copy.deepcopy)
        self.probe(self.drawn_probe())

    def act_pickle(self) -> None:
        self.both("pickle", lambda model: pickle.loads(pickle.dumps(model)))
        self.probe(self.drawn_probe())

    def act_restore(self) -> None:
        before = {name: type(module) for name, module in self.fused.named_modules()}
        if self.nf4 and self.merged:
            return
        self.fused = peft_ext.restore(self.fused)
        wrong = [name for name, module in self.fused.named_modules() if type(module) in STOCK]
        if wrong:
            raise Failed(f"restore: {wrong} are still fused")
        if not (self.nf4 and self.method != "IA3"):  # PEFT's own code has no DoRA over an NF4Linear
            self.probe(self.drawn_probe())
        self.fused = peft_ext.accelerate(self.fused)
        after = {name: type(module) for name, module in self.fused.named_modules()}
        if after != before:
            raise Failed("accelerate after restore: other layers are fused than before")
        self.probe(self.drawn_probe())

    def act_state_dict(self) -> None:
        if self.nf4:
            return
        states = [model.state_dict() for model in (self.stock, self.fused)]
        # PEFT parametrizes an expert's stack in each call, which makes the stack the last parameter of its module.
        stacked = any(getattr(config, "target_parameters", None) for config in self.stock.peft_config.values())
        names = [sorted(state) if stacked else list(state) for state in states]
        if names[0] != names[1]:
            raise Failed(f"state_dict: keys differ: {sorted(states[0].keys() ^ states[1].keys())[:5]}")
        self.both("load_state_dict", lambda model: model.load_state_dict(copy.deepcopy(states[0])) and None)
        self.probe(self.drawn_probe())

    def act_save(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            places = iter(("stock", "fused"))
            saved = self.both("save_pretrained", lambda model: model.save_pretrained(
                f"{folder}/{next(places)}", save_embedding_layers=False))  # fmt: skip
            if not saved:
                return
            files = [{str(path.relative_to(f"{folder}/{side}")): path.read_bytes()
                      for path in Path(folder, side).rglob("*.*") if path.name != "README.md"}
                     for side in ("stock", "fused")]  # fmt: skip
            if files[0].keys() != files[1].keys():
                raise Failed(f"save_pretrained: files {sorted(files[1])}, PEFT's {sorted(files[0])}")
            for name, wanted in files[0].items():
                if contents(name, files[1][name]) != contents(name, wanted):
                    raise Failed(f"save_pretrained: {name} is not PEFT's")
            chosen = self.rng.choice(self.names)
            place = f"{folder}/{'stock' if self.maybe() else 'fused'}" + ("" if chosen == "default" else f"/{chosen}")
            if not Path(place).is_dir():
                return
            if self.maybe() and not self.nf4:
                self.tell(f"  {chosen} over a new base")
                self.load_anew(place)
            else:
                self.loads += 1
                name = f"loaded{self.loads}"
                self.tell(f"  {chosen} again as {name}")

                def load(model: nn.Module) -> None:
                    model.load_adapter(place, name, is_trainable=True)
                    if model is self.fused:
                        peft_ext.accelerate(model)

                if self.both("load_adapter", load):
                    self.names.append(name)
                    self.both("set_adapter", lambda model: model.set_adapter(name))
        self.probe(self.drawn_probe())

    def load_anew(self, place: str) -> None:
        def load(model: nn.Module) -> nn.Module:
            loaded = PeftModel.from_pretrained(
                self.fresh(), place, is_trainable=True, autocast_adapter_dtype=self.autocast_adapters
            )
            return peft_ext.accelerate(loaded) if model is self.fused else loaded

        if self.both("from_pretrained", load):
            self.names, self.merged, self.hooked = ["default"], False, []

    def act_generate(self) -> None:
        if not self.architecture.generates or self.rounds or self.hooked or self.merged:
            return self.act_evaluate()
        tokens = []

        def generate(model: nn.Module) -> None:
            model.eval()
            given = {key: value for key, value in self.architecture.inputs().items()}
            tokens.append(model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False))

        if self.both("generate", generate) and not torch.equal(*tokens):
            raise Failed(f"generate: {tokens[1].tolist()}, PEFT's {tokens[0].tolist()}")

    def act_allocate(self) -> None:
        if self.method != "AdaLoRA" or self.rounds or self.hooked or self.merged:
            return self.act_train()
        steps = [self.rng.randrange(2, 18) for _ in range(2)]
        for step in steps:
            if self.probe(self.drawn_probe(training=True, backward=True, disabled=False)) and not self.ended:
                self.both("update_and_allocate", lambda model, step=step: model.base_model.update_and_allocate(step))

    def act_widen(self) -> None:
        if self.base != "float32" or self.family in NO_FLOAT64:
            return self.act_train()
        self.both("double", lambda model: model.double())
        self.dtype = torch.float64
        probe = self.drawn_probe(autocast=False)
        for name, wanted in (found := self.call(probe) or [{}, {}])[0].items():
            # Some values have only float32 precision in a float64 model, because a model computes them in float32 in
            # every dtype, for example rotary positions.
            if wanted is not None and not wanted.isfinite().all():  # A mask of the model does not work in float64.
                self.seen.counts["not finite in PEFT"] += 1
            elif wanted is not None and not distance(found[1][name], wanted) <= TIGHT * wanted.norm().item() + 1e-9:
                raise Failed(f"{probe} in float64: {name} is {distance(found[1][name], wanted):.1e} off PEFT's")
        self.both("float", lambda model: model.float())
        self.dtype = torch.float32

    def leave(self) -> None:
        """Compares the models after the removal of PEFT's layers, merged or not."""
        if self.nf4 or self.hooked:
            return
        merge = self.maybe(0.7)
        self.tell("  merge_and_unload" if merge else "  unload")
        if self.both("leave", lambda model: model.merge_and_unload() if merge else model.unload()):
            # Parts without an adapter stay fused until restore: norms, and language models without whole logits. Where
            # the CPU has no products in the dtype, frozen linear layers also stay fused, including the bases of
            # adapters.
            kept = (Block, FusedLinear, LanguageModel)
            left = [name for name, module in self.fused.named_modules()
                    if type(module) in STOCK and not isinstance(module, kept)]  # fmt: skip
            if left and not self.base.startswith("bnb"):
                raise Failed(f"leave: {left} are still fused")
            self.drops = False
            self.probe(self.drawn_probe(disabled=False, training=False, backward=False))


ACTIONS = {
    "train": 3, "evaluate": 2, "disable": 1, "switch_off": 1, "add": 4, "toggle": 3, "weigh": 3, "delete": 2,
    "scale": 1, "merge": 3, "unmerge": 1, "mix": 2, "hook": 2, "change_in_place": 3, "unhook": 1, "checkpoint": 2,
    "train_base": 2, "copy": 1, "pickle": 1, "restore": 1, "state_dict": 1, "save": 2, "generate": 1, "allocate": 1,
    "widen": 1,
}  # fmt: skip


@torch.no_grad()
def _step(model: nn.Module, seed: int) -> None:
    """Changes every trained parameter in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * noise * parameter.float().abs().mean()).to(parameter.dtype))
    model.zero_grad()


def contents(name: str, data: bytes) -> Any:
    """Returns the bytes of a file; for a JSON file its values, with lists of texts sorted, because PEFT writes sets."""
    if not name.endswith(".json"):
        return data
    return {key: sorted(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else value
            for key, value in json.loads(data).items()}  # fmt: skip
