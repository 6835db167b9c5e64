"""Turns: a few pieces of work in each round of the event loop, first those on their way to the engine."""

import asyncio

import pytest

from service.turns import Turns


async def rounds_of(turns: Turns, began_at: list[float]) -> list[list[float]]:
    """Who had a turn in each round of the event loop, when all ask at once."""
    rounds: list[list[float]] = [[]]
    tasks = [asyncio.create_task(_worker(turns, at, rounds)) for at in began_at]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        rounds.append([])
    return [one for one in rounds if one]


async def _worker(turns: Turns, began_at: float, rounds: list[list[float]]) -> None:
    await turns.take(began_at)
    rounds[-1].append(began_at)


async def test_nobody_waits_where_there_is_little_to_do():
    turns = Turns(per_round=2)
    for _ in range(3):
        for began_at in (5.0, 4.0):
            waiting = turns.take(began_at)
            with pytest.raises(StopIteration):  # it ends without having waited for anything
                waiting.send(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_a_crowd_goes_on_in_small_groups_the_oldest_first():
    began_at = [7.0, 3.0, 9.0, 1.0, 8.0, 2.0, 6.0]
    rounds = await rounds_of(Turns(per_round=2), began_at)
    assert rounds[0] == [7.0, 3.0], "whoever finds nobody waiting goes on"
    assert [one for group in rounds[1:] for one in group] == [1.0, 2.0, 6.0, 8.0, 9.0]
    assert max(map(len, rounds)) == 2


async def test_requests_of_one_time_keep_their_order():
    order: list[int] = []
    turns = Turns(per_round=1)

    async def work(number: int) -> None:
        await turns.take(1.0)
        order.append(number)

    await asyncio.gather(*map(work, range(20)))
    assert order == list(range(20))


async def test_what_goes_to_the_engine_goes_first_and_among_itself_by_age():
    order: list[tuple[bool, float]] = []
    turns = Turns(per_round=1)

    async def work(began_at: float, to_engine: bool) -> None:
        await turns.take(began_at, to_engine=to_engine)
        order.append((to_engine, began_at))

    first = (9.0, False)  # finds nobody waiting
    crowd = [(1.0, False), (5.0, True), (2.0, False), (3.0, True), (4.0, True)]
    await asyncio.gather(*(work(*one) for one in (first, *crowd)))
    assert order == [(False, 9.0), (True, 3.0), (True, 4.0), (True, 5.0), (False, 1.0), (False, 2.0)]


async def test_who_gives_up_takes_nobodys_turn():
    turns = Turns(per_round=1)
    rounds: list[list[float]] = [[]]
    _first, gone, waiting = (asyncio.create_task(_worker(turns, began_at, rounds)) for began_at in (0.0, 1.0, 2.0))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait_for(waiting, 1.0)
    assert rounds == [[0.0, 2.0]]


async def test_between_two_groups_the_event_loop_does_other_things():
    turns = Turns(per_round=4)
    done_at: list[int] = []
    seen: list[int] = []

    async def work() -> None:
        await turns.take(0.0)
        done_at.append(len(done_at))

    async def bystander() -> None:
        while len(done_at) < 40:
            seen.append(len(done_at))
            await asyncio.sleep(0)

    await asyncio.gather(*(work() for _ in range(40)), bystander())
    assert sorted(set(seen)) == list(range(4, 40, 4))
