"""Fixtures with runs and models for the tests of faults. The test files skip where a package is missing."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finetune(tiny):
    """Returns a function ``finetune(output, *options)``, which forks a run of 4 steps.

    The function returns the run's exit code and standard error.
    """
    from faults.points import forked, start

    from peft_ext.cli.main import main
    from peft_ext.run import evaluate

    def run(output: Path, *options: str, before=None, stdout: int = -1):
        def work() -> int:
            evaluate.SAMPLES, evaluate.NEW_TOKENS = 0, 2
            if before is not None:
                before()
            return main(
                ["finetune", "--model", str(tiny / "model"), "--data", str(tiny / "pairs.jsonl"), "--output",
                 str(output), "--batch-size", "2", "--block-size", "32", "--threads", "1", "--rank", "4",
                 "--save-steps", "2", "--max-steps", "4", *options]
            )  # fmt: skip

        return forked(work, stdout) if stdout != -2 else start(work, -2)

    return run


@pytest.fixture(scope="session")
def runs(finetune, tmp_path_factory):
    """Returns the folders of an earlier run, and of a run without a fault."""
    folder = tmp_path_factory.mktemp("runs")
    assert finetune(folder / "old", "--rank", "2", "--seed", "1") == (0, "")
    assert finetune(folder / "unbroken") == (0, "")
    return folder / "old", folder / "unbroken"


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Returns a folder with ``base``, adapters ``one`` and ``two``, and merged models ``from one``, ``from two``."""
    import peft
    from tiny_models import ARCHITECTURES

    from peft_ext.merge import merge_to_dense

    folder = tmp_path_factory.mktemp("dense")
    model = ARCHITECTURES["Llama"].build()
    model.save_pretrained(folder / "base")
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                 init_lora_weights=False)  # fmt: skip
        adapted = peft.get_peft_model(type(model).from_pretrained(folder / "base"), config)
        adapted.save_pretrained(folder / name)
        merge_to_dense(folder / "base", folder / name, folder / f"from {name}", max_shard_size="100KB")
    return folder
