"""Several processes of one launch do what one does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from semantic_ids.quantizer import ResidualQuantizer
from tests.training.conftest import ROOT, Run, command, environment
from tests.training.tokenizer.test_command import FAST, codes_of, started
from training.processes import _launched_fsdp
from training.sft import CHECKPOINT
from training.stage import StageError

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
CONFIGURATIONS = ROOT / "training" / "configs" / "accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
FSDP = [*ACCELERATE, str(CONFIGURATIONS / "fsdp.yaml")]

COLLECTIVES = """
import torch
from training.processes import Processes
from training.stage import StageError, is_main_process
together = Processes.launched()
assert together.count == 2
assert together.device_for("auto") == together.device_for(together.device.type) == together.device
try:
    raise AssertionError(together.device_for("xpu"))
except StageError as error:
    assert "leave device out" in str(error)
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

SHARDS = """
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from training.processes import Processes
from training.sharding import as_held, gathered, whole
together = Processes.launched()
assert together.count == 2
torch.manual_seed(0)
alone = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
assert together.prepare(model, [model[0]]) is model
held = model[0].weight
assert isinstance(held, DTensor) and held.to_local().shape == (3, 4), held
x = torch.arange(8.0).reshape(2, 4)
torch.autograd.backward(alone(x).square().mean(dim=1).mean())
torch.autograd.backward(model(x[together.share(2)]).square().mean(dim=1).mean())
for name, of_alone in alone.named_parameters():
    gradient = model.get_parameter(name).grad.full_tensor()  # of the mean over both processes
    torch.testing.assert_close(gradient, of_alone.grad)
with gathered(model):
    assert model[1].weight.shape == (2, 6) and not isinstance(model[1].weight, DTensor)
joined = whole({"some": [model[0].weight]})["some"][0]
assert torch.equal(joined, alone[0].weight) if together.is_main else joined.numel() == 0
assert torch.equal(as_held(alone[0].weight.detach(), held).to_local(), held.to_local())
"""

LAST_TENSORS = """
import sys
import time
import torch
from training.processes import Processes
Processes.launched()
class Ends:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)  # in the end of the interpreter: lets the others run
ends = Ends()
sys.setswitchinterval(60)  # others run Python only while this thread waits
pieces, mine = [torch.zeros(1), torch.zeros(1)], torch.ones(1)
torch.distributed.all_gather(pieces, mine, async_op=True)
del pieces, mine  # now the group's threads alone have them
end = time.monotonic() + 1
while time.monotonic() < end:
    pass
"""


def launch(*arguments: str | Path, by: list[str] = LAUNCH) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*by, *map(str, arguments)],
        capture_output=True, text=True, env=environment(), timeout=120, check=False,
    )  # fmt: skip


def test_what_processes_exchange(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    done = launch(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["main", "other"]


def test_the_last_tensors_are_let_go_before_the_interpreter_ends(tmp_path: Path) -> None:
    """Else Gloo's thread, which then finds no interpreter, aborts a process that has done its work."""
    script = tmp_path / "last_tensors.py"
    script.write_text(LAST_TENSORS)
    done = launch(script)
    assert done.returncode == 0, done.stderr


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


TEACHERS = ["sft.batch_size=5", "sft.item_memory=true", "sft.distillation=0.5", "sft.continuations=30"]
STEPS = ["sft.batch_size=7", "sft.steps=[1,1,1]", "sft.step_clusters=4", "sft.moving_average=0.9"]


@pytest.mark.parametrize(
    ("by", "settings"),
    [
        (LAUNCH, TEACHERS),
        (LAUNCH, STEPS),
        (FSDP, [*TEACHERS, "sft.num_layers=2"]),
        (FSDP, [*STEPS, "sft.step_form=continuous", "sft.num_layers=2"]),  # a layer runs several times before gradients
    ],
    ids=["with teachers", "with steps", "in shards, with teachers", "in shards, with steps"],
)
def test_two_processes_train_the_generator_of_one(
    finished: Run, tmp_path: Path, by: list[str], settings: list[str]
) -> None:
    """Batches that they cannot share equally, some of one row; dropout is off, as each drops units of its own rows."""
    one, two = (finished.copy(tmp_path / name) for name in ("one", "two"))
    own = ["sft.dropout=0", "sft.max_epochs=2", *settings]
    alone = subprocess.run(
        command("sft", *one.args(*own, "--json")), env=environment(), timeout=120, capture_output=True, check=True
    )
    together = launch("-m", "training", "sft", *two.args(*own, "--json"), by=by)
    assert together.returncode == 0, together.stderr
    assert_same_model(one, alone.stdout, two, together.stdout)


def assert_same_model(one: Run, of_one: bytes, two: Run, of_two: str) -> None:
    summaries = [json.loads(text) for text in (of_one, of_two)]
    for name in ("train_log_likelihood", "validation_log_likelihood"):
        assert summaries[0][name] == pytest.approx(summaries[1][name], abs=1e-4)
    assert summaries[0]["num_parameters"] == summaries[1]["num_parameters"]
    folders = [run.out / "sft" for run in (one, two)]
    names = [sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) for folder in folders]
    assert names[0] == names[1]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-4, rtol=0)


def test_what_is_in_shards(tmp_path: Path) -> None:
    script = tmp_path / "shards.py"
    script.write_text(SHARDS)
    done = launch(script, by=FSDP)
    assert done.returncode == 0, done.stderr


def test_training_in_shards_that_was_stopped_goes_on_to_the_model_of_one_process(
    finished: Run, pretrained: dict[str, Path], tmp_path: Path
) -> None:
    """A base model whose tables are one; it has no dropout."""
    straight, stopped = (finished.copy(tmp_path / name) for name in ("straight", "stopped"))
    own = [f"sft.base_model={pretrained['llama']}", "sft.moving_average=0.9", "sft.max_epochs=4"]
    alone = subprocess.run(
        command("sft", *straight.args(*own, "--json")), env=environment(), timeout=120, capture_output=True, check=True
    )
    arguments = ["-m", "training", "sft", *map(str, stopped.args(*own, "--json"))]
    launched = subprocess.Popen(
        [*FSDP, *arguments], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (stopped.out / "sft" / CHECKPOINT).exists():
            assert launched.poll() is None, "training ended before its first checkpoint was seen"
            time.sleep(0.01)
    finally:
        launched.terminate()  # the launcher ends the others
        launched.wait()
    assert not (stopped.out / "sft" / "stage.json").exists()
    resumed = launch(*arguments, by=FSDP)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_model(straight, alone.stdout, stopped, resumed.stdout)


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("FSDP_VERSION", "1", "give fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params, which is not supported here: leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing, which is not supported here"),
    ],
)
def test_shards_of_another_kind_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, refusal: str
) -> None:
    """By the variables in which accelerate's launcher hands a configuration on."""
    assert _launched_fsdp() is None
    for variable, own in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", name: value}.items():
        monkeypatch.setenv(variable, own)
    with pytest.raises(StageError, match=refusal):
        _launched_fsdp()


def test_a_loss_over_a_whole_batch_is_refused_on_several_processes(finished: Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "run")
    done = launch("-m", "training", "sft", *run.args("sft.steps=[1,1,1]", "sft.global_interest=0.1"))
    assert done.returncode != 0
    assert "2 processes have a part each: launch one, or leave it out" in done.stderr
