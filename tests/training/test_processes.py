"""Several processes of one launch do what one does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from semantic_ids.quantizer import ResidualQuantizer
from tests.training.conftest import Run, command, environment
from tests.training.tokenizer.test_command import FAST, codes_of, started

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

COLLECTIVES = """
import torch
from training.processes import Processes
from training.stage import is_main_process
together = Processes.launched()
assert together.count == 2
mine = torch.tensor([[float(together.index + 1)]], requires_grad=True)  # 1 and 2
assert together.gather(mine.detach(), 2).tolist() == [[1.0], [2.0]]
uneven = torch.arange(10.0).reshape(5, 2)[together.share(5)]
assert len(uneven) == 2 + together.index
assert together.gather(uneven, 5).tolist() == torch.arange(10.0).reshape(5, 2).tolist()
assert together.sum(torch.tensor([together.index + 1.0])).item() == 3.0
everyones = together.gather_with_gradient(mine, 2)
(everyones.T @ torch.tensor([[10.0], [100.0]])).sum().backward()
assert mine.grad.item() == 2 * 10.0 ** (together.index + 1), mine.grad  # both processes' losses reach the owner
with together.main_first():
    assert is_main_process() == together.is_main
    print("main" if together.is_main else "other", flush=True)
"""


def launch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip


def test_what_processes_exchange(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    done = launch(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["main", "other"]


@pytest.mark.parametrize("method", ["letter-coba", "gr2"])
def test_two_processes_give_the_sids_of_one(finished: Run, tmp_path: Path, method: str) -> None:
    """From no stage at all: the first process makes what comes before. Sums differ in their last bits only."""
    one, two = started(finished, tmp_path / "one"), Run(finished.data, tmp_path / "two", finished.outcome)
    arguments: list[str | Path] = ["tokenizer", "--data", finished.data, *FAST, "--method", method, "--json", "--out"]
    alone = subprocess.run(
        command(*arguments, one.out), env=environment(), timeout=120, capture_output=True, check=True
    )
    together = launch("-m", "training", *arguments, two.out)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("\n") == alone.stdout.decode().count("\n") == 1, "one process reports"
    assert codes_of(one.out) == codes_of(two.out)
    quantizers = [ResidualQuantizer.load(run.out / "tokenizer" / "quantizer") for run in (one, two)]
    np.testing.assert_allclose(quantizers[0].codebooks, quantizers[1].codebooks, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        ["sft.batch_size=5", "sft.item_memory=true", "sft.distillation=0.5", "sft.continuations=30"],
        ["sft.batch_size=7", "sft.steps=[1,1,1]", "sft.step_clusters=4", "sft.moving_average=0.9"],
    ],
    ids=["with teachers", "with steps"],
)
def test_two_processes_train_the_generator_of_one(finished: Run, tmp_path: Path, settings: list[str]) -> None:
    """Batches that they cannot share equally, some of one row; dropout is off, as each drops units of its own rows."""
    one, two = (finished.copy(tmp_path / name) for name in ("one", "two"))
    own = ["sft.dropout=0", "sft.max_epochs=2", *settings]
    alone = subprocess.run(
        command("sft", *one.args(*own, "--json")), env=environment(), timeout=120, capture_output=True, check=True
    )
    together = launch("-m", "training", "sft", *two.args(*own, "--json"))
    assert together.returncode == 0, together.stderr
    summaries = [json.loads(text) for text in (alone.stdout, together.stdout)]
    for name in ("train_log_likelihood", "validation_log_likelihood"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], abs=1e-4)
    weights = [load_file(run.out / "sft" / "model" / "model.safetensors") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-4, rtol=0)


def test_a_loss_over_a_whole_batch_is_refused_on_several_processes(finished: Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "run")
    done = launch("-m", "training", "sft", *run.args("sft.steps=[1,1,1]", "sft.global_interest=0.1"))
    assert done.returncode != 0
    assert "2 processes have a part each: launch one, or leave it out" in done.stderr
