"""A training step on another device than the CPU: every tensor that meets another is where that one is."""

import json
import subprocess
import sys

import pytest
import torch

from tests.training.conftest import environment
from tests.training.fake_device import VARIANTS
from training.processes import Processes
from training.sft_config import SftConfig
from training.stage import StageError


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What went wrong in each variant; together, as loading transformers takes longer than all steps."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.fake_device", *VARIANTS],
        capture_output=True, text=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(VARIANTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_taken_where_the_model_is(outcomes: dict[str, str | None], variant: str) -> None:
    assert outcomes[variant] is None, outcomes[variant]


def test_a_device_is_the_machines_own_or_the_one_that_is_named() -> None:
    alone = Processes.alone()
    assert alone.device_for("cpu") == torch.device("cpu")
    assert alone.device_for("auto") == (
        torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    )


@pytest.mark.parametrize("device", ["xpu", "cuda:99", "no-such-thing"])
def test_a_device_that_is_not_here_is_named_with_the_remedy(device: str) -> None:
    with pytest.raises(StageError, match=rf"device={device} is not here .*: name another, or auto"):
        Processes.alone().device_for(device)


def test_a_run_may_go_on_on_another_device() -> None:
    assert SftConfig(device="cuda").identity() == SftConfig().identity()
