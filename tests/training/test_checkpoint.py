"""Checkpoints: resumed training equals training straight through, and a broken file says what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.stage import StageError


class Loop:
    """A small training loop that draws from torch's dropout and from a numpy generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.generator = np.random.default_rng(0)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.from_numpy(self.generator.random((16, 4), dtype=np.float32))
            self.optimizer.zero_grad()
            torch.autograd.backward(self.model(x).square().mean())
            self.optimizer.step()
            self.scheduler.step()

    def save(self, path: Path, step: int, **extra: object) -> None:
        save_checkpoint(path, **self._state, step=step, extra=extra)

    def load(self, path: Path) -> Checkpoint | None:
        return load_checkpoint(path, **self._state)

    @property
    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "generators": {"noise": self.generator},
        }


def test_resumed_training_equals_training_straight_through_bit_for_bit(tmp_path: Path) -> None:
    straight = Loop()
    straight.train(7)

    killed = Loop()
    killed.train(3)
    killed.save(tmp_path / "c", step=3, best={"w": torch.ones(2)}, losses=[0.5, 0.25])
    killed.train(2)
    resumed = Loop()
    torch.manual_seed(99)
    checkpoint = resumed.load(tmp_path / "c")
    assert checkpoint is not None
    assert checkpoint.step == 3
    assert checkpoint.extra["losses"] == [0.5, 0.25]
    assert checkpoint.extra["best"]["w"].tolist() == [1, 1]
    resumed.train(4)
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert Loop().load(tmp_path / "absent") is None


def test_saving_leaves_nothing_but_the_checkpoint(tmp_path: Path) -> None:
    loop = Loop()
    loop.save(tmp_path / "c", step=1)
    loop.save(tmp_path / "c", step=2)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    checkpoint = loop.load(tmp_path / "c")
    assert checkpoint is not None
    assert checkpoint.step == 2


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_file_names_itself_and_the_remedy(tmp_path: Path, kept: int | float) -> None:
    path = tmp_path / "c"
    Loop().save(path, step=1)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(StageError, match=r"/c is truncated or is not a checkpoint .*delete it to start afresh"):
        Loop().load(path)


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"PK\x03\x04 not ours")
    with pytest.raises(StageError, match="delete it"):
        Loop().load(path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(StageError, match="not a checkpoint of format"):
        Loop().load(path)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    other = Loop()
    other.model = nn.Sequential(nn.Linear(3, 3))
    other.save(tmp_path / "c", step=1)
    with pytest.raises(StageError, match="another training set-up"):
        Loop().load(tmp_path / "c")
