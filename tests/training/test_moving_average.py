"""The average of the weights: what it is, that it stands in for them and steps aside, that it survives a restart."""

import pytest
import torch
from torch import nn

from training.moving_average import MovingAverage


def set_to(parameter: nn.Parameter, value: float) -> None:
    with torch.no_grad():
        parameter.fill_(value)


def test_it_follows_the_weights_fast_at_first_and_then_by_its_decay():
    weight = nn.Parameter(torch.zeros(2))
    average = MovingAverage([weight], decay=0.5)
    expected = 0.0
    for step in range(1, 20):
        set_to(weight, float(step))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.in_place():
        assert weight.tolist() == pytest.approx([expected] * 2)
    assert weight.tolist() == [19.0, 19.0]


def test_the_weights_come_back_after_a_failure_too():
    weight = nn.Parameter(torch.zeros(1))
    average = MovingAverage([weight], decay=0.9)
    set_to(weight, 3.0)
    with pytest.raises(RuntimeError, match="on purpose"), average.in_place():
        assert weight.tolist() == [0.0]
        raise RuntimeError("on purpose")
    assert weight.tolist() == [3.0]


def test_it_goes_on_from_its_state():
    weight = nn.Parameter(torch.zeros(1))
    whole, first = MovingAverage([weight], decay=0.9), MovingAverage([weight], decay=0.9)
    second = MovingAverage([weight], decay=0.9)
    for step in range(6):
        set_to(weight, float(step))
        whole.update()
        (first if step < 3 else second).update()
        if step == 2:
            second.load_state(first.state())
    with whole.in_place():
        expected = weight.tolist()
    with second.in_place():
        assert weight.tolist() == expected
