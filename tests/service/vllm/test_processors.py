"""Sampling under both of vLLM's processor interfaces, by fake runners that keep to the documented batch rules.

What may come next is said again here with sets of code tuples, from whole outputs, so that it can disagree with the
processors, which follow tokens through the trie.
"""

import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.legal import legal_log_softmax
from semantic_ids.filters import ItemFilter, RankBitmap
from service.engine.store import MAX_ERRORS, STORE, CatalogSnapshot, SidStore
from service.engine.vllm_processors import (
    SID_ARG,
    SidArgs,
    SidCore,
    SidLogitsProcessorV1,
    SidLogitsProcessorV2,
    SidRowState,
    processor_path,
)
from service.engine.wire import SidRequestError, WireFilter, pack_bitmap, pack_ranks
from tests.service.world import SPACE, VOCABULARY

V = VOCABULARY.vocab_size
L = SPACE.num_levels
EOS = 2
CLOSE = (5, 6)
FORCED = ((7, 8), (), (9,))
MAX_ROWS, MAX_LEN = 12, 64
NO_FILTER = WireFilter(None, b"", None)

Codes = tuple[int, ...]


def vllm_config(bundle: Bundle, **changed: Any) -> VllmConfig:
    """The fields that the processors read."""
    fields = {
        "model_config": SimpleNamespace(get_vocab_size=lambda: V),
        "additional_config": {"sidrec_bundle": str(bundle.path)},
        "speculative_config": None,
    }
    return cast(VllmConfig, SimpleNamespace(**fields | changed))


@dataclass(eq=False)
class Request:
    """One request in a fake runner."""

    params: SamplingParams
    prompt_len: int = 4
    output: list[int] = field(default_factory=list)
    num_chunks_left: int = 0
    """Steps in which only a part of the prompt is run: the row is there, and its token is thrown away."""


class V1Runner:
    """As `gpu_input_batch` tells V1 processors about rows, with vLLM's own builder."""

    def __init__(self, bundle: Bundle) -> None:
        self.processor = SidLogitsProcessorV1(vllm_config(bundle), torch.device("cpu"), False)
        self.rows: list[Request | None] = []

    def rebatch(self, leaving: Collection[Request], joining: Iterable[Request], rng: random.Random) -> None:
        """Remove, add into the lowest gaps, close the rest of them by moves, and swap a few rows."""
        builder = BatchUpdateBuilder()
        for request in leaving:
            row = self.rows.index(request)
            self.rows[row] = None
            builder.removed_append(row)
        for request in joining:
            gap = builder.pop_removed()
            row = len(self.rows) if gap is None else gap
            self.rows[row : row + 1] = [request]
            builder.added.append((row, request.params, None, request.output))
        while None in self.rows:
            if self.rows[-1] is None:
                self.rows.pop()
                continue
            gap = builder.pop_removed()
            assert gap is not None
            builder.moved.append((len(self.rows) - 1, gap, MoveDirectionality.UNIDIRECTIONAL))
            self.rows[gap] = self.rows.pop()
        for _ in range(rng.randrange(3) if len(self.rows) > 1 else 0):
            one, other = rng.sample(range(len(self.rows)), 2)
            self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
            builder.moved.append((one, other, MoveDirectionality.SWAP))
        self.processor.update_state(builder.get_and_reset(len(self.rows)))

    def apply(self, logits: dict[Request, Tensor]) -> dict[Request, Tensor]:
        """One step: the logits of each row, as the processor leaves them."""
        order = [request for request in self.rows if request is not None]
        written = self.processor.apply(torch.stack([logits[request] for request in order]))
        return dict(zip(order, written, strict=True))


class V2Runner:
    """As `model_runner` tells V2 processors: slots that are used again without a word, rows in any order."""

    def __init__(self, bundle: Bundle) -> None:
        self.tokens = torch.randint(0, V, (MAX_ROWS, MAX_LEN), dtype=torch.int32)  # what earlier requests left
        self.prompt_len = np.zeros(MAX_ROWS, np.int32)
        self.total_len = torch.zeros(MAX_ROWS, dtype=torch.int32)
        state = LogitsProcRequestState(
            device=torch.device("cpu"),
            max_num_reqs=MAX_ROWS,
            vocab_size=V,
            all_token_ids=cast(Any, SimpleNamespace(gpu=self.tokens)),
            prompt_len=cast(Any, SimpleNamespace(np=self.prompt_len)),
            prefill_len=cast(Any, SimpleNamespace(np=self.prompt_len)),
            total_len=cast(Any, SimpleNamespace(gpu=self.total_len)),
        )
        self.processor = SidLogitsProcessorV2(vllm_config(bundle), state)
        self.slots: dict[Request, int] = {}
        self.free = list(range(MAX_ROWS))
        self.rng = random.Random(0)

    def rebatch(self, leaving: Collection[Request], joining: Iterable[Request], rng: random.Random) -> None:
        """Give slots back and out; the last one given back is the first to be used again."""
        self.rng = rng
        for request in leaving:
            self.free.append(self.slots.pop(request))
        for request in joining:
            slot = self.slots[request] = self.free.pop()
            self.prompt_len[slot] = request.prompt_len
            changes = self.processor.add_request(slot, request.params)
            assert changes == (SID_ARG in (request.params.extra_args or {}))
        self.processor.apply_staged_writes()

    def apply(self, logits: dict[Request, Tensor]) -> dict[Request, Tensor]:
        """One step: the logits of each row, as the processor leaves them."""
        order = self.rng.sample(list(self.slots), len(self.slots))
        for request, slot in self.slots.items():
            end = request.prompt_len + len(request.output)
            self.tokens[slot, request.prompt_len : end] = torch.tensor(request.output, dtype=torch.int32)
            self.total_len[slot] = end
        slots = np.array([self.slots[request] for request in order])
        seq_lens = np.array(
            [request.prompt_len + len(request.output) - request.num_chunks_left for request in order], np.int32
        )
        mapping = torch.from_numpy(slots)
        ctx = LogitsContext(
            expanded_idx_mapping=mapping,
            idx_mapping=mapping,
            idx_mapping_np=slots,
            expanded_local_pos=torch.zeros_like(mapping),
            input_ids=self.tokens[mapping, torch.from_numpy(seq_lens) - 1],
            pos=torch.from_numpy(seq_lens) - 1,
            seq_lens_upper_bound_np=np.append(seq_lens, 0),  # padded for a graph
        )
        written = self.processor.apply(torch.stack([logits[request] for request in order]), ctx)
        return dict(zip(order, written, strict=True))


Runner = V1Runner | V2Runner
RUNNERS = pytest.mark.parametrize("runner_type", [V1Runner, V2Runner])


def sid_params(bundle: Bundle, name: str = "r", **fields: Any) -> SamplingParams:
    """Sampling parameters of a SID request; `fields` as in `SidArgs`."""
    args = {"item_filter": NO_FILTER} | fields
    return SamplingParams(extra_args={SID_ARG: SidArgs(bundle.catalog_id, name, EOS, **args).as_wire()})


def wire_of(params: SamplingParams) -> dict[str, Any]:
    """What a request says about its SID."""
    wire: dict[str, Any] = (params.extra_args or {})[SID_ARG]
    return wire


def all_sids(bundle: Bundle) -> list[Codes]:
    """The SID of every item, by rank."""
    return [tuple(codes) for codes in bundle.catalog.codes.tolist()]


def token(level: int, code: int) -> int:
    """The token of one code."""
    return VOCABULARY.first_token_id + level * SPACE.codebook_size + code


def tokens_of(sid: Sequence[int]) -> list[int]:
    """The tokens of a SID or the beginning of one."""
    return [token(level, code) for level, code in enumerate(sid)]


def only(token_id: int) -> Tensor:
    """The row in which one token is forced."""
    row = torch.full((V,), -torch.inf)
    row[token_id] = 0.0
    return row


def code_row(logits: Tensor, prefix: Codes, sids: Collection[Codes], eligible: Collection[Codes]) -> Tensor:
    """The row of a code after `prefix`: `legal_log_softmax` over what the catalogue has, less what is not eligible."""
    level = len(prefix)

    def next_codes(among: Collection[Codes]) -> list[int]:
        return sorted({sid[level] for sid in among if sid[:level] == prefix})

    mask = torch.zeros(1, SPACE.codebook_size, dtype=torch.bool)
    mask[0, next_codes(sids)] = True
    scores = legal_log_softmax(logits[VOCABULARY.block(level)][None], mask)[0]
    row = torch.full((V,), -torch.inf)
    for code in next_codes(eligible):
        row[token(level, code)] = scores[code]
    return row


@dataclass(frozen=True)
class Truth:
    """What one request may do, by sets."""

    sids: frozenset[Codes]
    eligible: frozenset[Codes]
    max_think_tokens: int | None
    forced: tuple[tuple[int, ...], ...]

    def row(self, logits: Tensor, output: list[int]) -> Tensor:
        """What the processor should leave of `logits` after `output`."""
        rest = list(output)
        if self.max_think_tokens is not None:
            if CLOSE[0] not in rest:
                return without_end(logits) if len(rest) < self.max_think_tokens else only(CLOSE[0])
            rest = rest[rest.index(CLOSE[0]) + 1 :]
            if len(rest) < len(CLOSE) - 1:
                return only(CLOSE[len(rest) + 1])
            rest = rest[len(CLOSE) - 1 :]
        prefix: Codes = ()
        for level, forced in enumerate(self.forced):
            if len(rest) < len(forced):
                return only(forced[len(rest)])
            rest = rest[len(forced) :]
            if not rest:
                return code_row(logits, prefix, self.sids, self.eligible)
            prefix += (rest.pop(0) - VOCABULARY.block(level).start,)
        return only(EOS)


def without_end(logits: Tensor) -> Tensor:
    """What a thought may hold: anything but the end."""
    logits = logits.clone()
    logits[EOS] = -torch.inf
    return logits


def random_request(bundle: Bundle, rng: random.Random, name: str) -> tuple[Request, Truth | None]:
    """A request of any kind, and what it may do; None for one that is not ours."""
    prompt_len, num_chunks = rng.randint(3, 6), rng.choice([0, 0, 1, 2])
    if rng.random() < 0.2:
        return Request(SamplingParams(), prompt_len, [], num_chunks), None
    sids = all_sids(bundle)
    ranks = np.arange(len(sids))
    allow = rng.sample(range(len(sids)), rng.choice([1, 3, 40])) if rng.random() < 0.4 else None
    deny = rng.sample(range(len(sids)), rng.choice([0, 1, 30, 120]))
    bitmap = RankBitmap.of(np.array([rng.random() < 0.5 for _ in ranks])) if rng.random() < 0.4 else None
    item_filter = ItemFilter.of(
        len(sids), bitmap=bitmap, allow=None if allow is None else np.array(allow), deny=np.array(deny, np.int64)
    )
    if item_filter.num_eligible == 0:
        return random_request(bundle, rng, name)
    if bitmap is not None:
        STORE.put_bitmap(bundle.catalog_id, bitmap.digest, pack_bitmap(bitmap))
    budget = rng.randint(0, 5) if rng.random() < 0.4 else None
    forced = FORCED if rng.random() < 0.3 else ()
    fields: dict[str, Any] = {} if budget is None else {"close": CLOSE, "max_think_tokens": budget}
    params = sid_params(bundle, name, item_filter=WireFilter.of(item_filter), forced=forced, **fields)
    eligible = frozenset(sids[rank] for rank in ranks[item_filter.contains(ranks)])
    return (
        Request(params, prompt_len, [], num_chunks),
        Truth(frozenset(sids), eligible, budget, forced or ((),) * L),
    )


def fresh_logits(requests: Iterable[Request], generator: torch.Generator) -> dict[Request, Tensor]:
    """Some logits for every row."""
    return {request: torch.randn(V, generator=generator) * 3 for request in requests}


def sample(row: Tensor, generator: torch.Generator) -> int:
    """One token at temperature 1."""
    return int(torch.multinomial(row.softmax(0), 1, generator=generator).item())


@RUNNERS
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_rows_that_join_leave_and_move_hold_their_scores_and_end_in_eligible_sids(
    bundle: Bundle, runner_type: type[Runner], seed: int
) -> None:
    """Every logit of every step is the one that the sets say; a row leaves with a whole SID, or is aborted."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    runner = runner_type(bundle)
    waiting = [random_request(bundle, rng, f"r{number}") for number in range(rng.randint(1, 2 * MAX_ROWS))]
    running: dict[Request, Truth | None] = {}
    leaving: list[Request] = []
    num_finished = 0
    while waiting or running:
        room = MAX_ROWS - len(running)
        joining = [waiting.pop() for _ in range(min(len(waiting), rng.randint(0 if running else 1, room)))]
        runner.rebatch(leaving, [request for request, _ in joining], rng)
        running |= dict(joining)
        logits = fresh_logits(running, generator)
        written = runner.apply({request: row.clone() for request, row in logits.items()})
        leaving = []
        for request, truth in running.items():
            if request.num_chunks_left:
                request.num_chunks_left -= 1  # whatever was written: its token is thrown away
                continue
            expected = logits[request] if truth is None else truth.row(logits[request], request.output)
            torch.testing.assert_close(written[request], expected, atol=1e-5, rtol=0)
            chosen = sample(written[request], generator)
            is_at_end = bool(torch.equal(expected, only(EOS)))
            request.output.append(chosen)
            if is_at_end and truth is not None:
                codes = [one - VOCABULARY.first_token_id for one in request.output[:-1]]
                sid = tuple(code % SPACE.codebook_size for code in codes if code >= 0)[-L:]
                assert chosen == EOS
                assert sid in truth.eligible
                num_finished += 1
            if is_at_end or (truth is None and len(request.output) > 3) or rng.random() < 0.02:
                leaving.append(request)
        for request in leaving:
            del running[request]
        if not running and not waiting:
            break
    assert not any(STORE.take_error(f"r{number}") for number in range(2 * MAX_ROWS))


@RUNNERS
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_filter_changes_no_score(bundle: Bundle, runner_type: type[Runner], seed: int) -> None:
    """Two requests on the same logits, one of them filtered: where both are finite they are equal to the bit."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    allowed = sorted(rng.sample(range(len(bundle.catalog)), 5))
    prefix = tokens_of(all_sids(bundle)[allowed[0]][: rng.randrange(L)])
    free = Request(sid_params(bundle, "free"))
    held = Request(sid_params(bundle, "held", item_filter=WireFilter(pack_ranks(np.array(allowed)), b"", None)))
    runner = runner_type(bundle)
    runner.rebatch([], [free, held], rng)
    for request in (free, held):
        request.output.extend(prefix)
    row = fresh_logits([free], generator)[free]
    written = runner.apply({free: row.clone(), held: row.clone()})
    kept = written[held].isfinite()
    assert kept.any()
    assert torch.equal(written[held][kept], written[free][kept])
    torch.testing.assert_close(written[free].exp().sum(), torch.tensor(1.0))


def only_request(runner_type: type[Runner], bundle: Bundle, **fields: Any) -> tuple[Runner, Request]:
    """A runner with one request."""
    runner, request = runner_type(bundle), Request(sid_params(bundle, **fields))
    runner.rebatch([], [request], random.Random(0))
    return runner, request


def next_row(runner: Runner, request: Request) -> Tensor:
    """What the processor leaves of all-zero logits."""
    return runner.apply({request: torch.zeros(V)})[request]


def forced_token(row: Tensor) -> int | None:
    """The token of a row in which nothing else is possible."""
    finite = row.isfinite().nonzero().flatten().tolist()
    return finite[0] if len(finite) == 1 and row[finite[0]] == 0.0 else None


@RUNNERS
def test_a_thought_is_free_until_its_close(bundle: Bundle, runner_type: type[Runner]) -> None:
    """Within the budget the model closes it; the rest of the close is forced, then comes a code."""
    runner, request = only_request(runner_type, bundle, close=CLOSE, max_think_tokens=4)
    for thought in (10, CLOSE[1], token(0, 3)):  # SID tokens and the rest of the close mean nothing in a thought
        assert torch.equal(next_row(runner, request), without_end(torch.zeros(V)))
        request.output.append(thought)
    assert torch.equal(next_row(runner, request), without_end(torch.zeros(V)))
    request.output.append(CLOSE[0])
    assert forced_token(next_row(runner, request)) == CLOSE[1]
    request.output.append(CLOSE[1])
    sids = all_sids(bundle)
    torch.testing.assert_close(next_row(runner, request), code_row(torch.zeros(V), (), sids, sids))


@RUNNERS
@pytest.mark.parametrize("budget", [0, 2])
def test_a_thought_that_reaches_its_budget_is_closed(bundle: Bundle, runner_type: type[Runner], budget: int) -> None:
    """The close and the program's tokens are forced, and the SID after them is legal."""
    runner, request = only_request(runner_type, bundle, close=CLOSE, max_think_tokens=budget, forced=FORCED)
    generator = torch.Generator().manual_seed(1)
    for _ in range(budget):
        assert torch.equal(next_row(runner, request), without_end(torch.zeros(V)))
        request.output.append(10)
    while (forced := forced_token(next_row(runner, request))) != EOS:
        request.output.append(sample(next_row(runner, request), generator) if forced is None else forced)
    fixed = request.output[budget:]
    first, second, third = (fixed[place] for place in (4, 5, 7))
    assert fixed == [*CLOSE, 7, 8, first, second, 9, third]
    assert tuple(int(code) for code in VOCABULARY.codes(np.array([first, second, third]))) in all_sids(bundle)


@RUNNERS
def test_computing_a_row_twice_changes_nothing(bundle: Bundle, runner_type: type[Runner]) -> None:
    """Only output tokens move a row: a part of a prompt has none, and its sampled token is thrown away."""
    runner, request = only_request(runner_type, bundle)
    request.num_chunks_left = 2
    first = next_row(runner, request)
    assert torch.equal(next_row(runner, request), first)
    request.num_chunks_left = 0
    assert torch.equal(next_row(runner, request), first)


@RUNNERS
def test_a_resumed_request_starts_from_what_it_has_written(bundle: Bundle, runner_type: type[Runner]) -> None:
    """After a preemption a request joins again with output tokens."""
    sids = all_sids(bundle)
    runner, request = runner_type(bundle), Request(sid_params(bundle), output=tokens_of(sids[7][:2]))
    runner.rebatch([], [request], random.Random(0))
    torch.testing.assert_close(next_row(runner, request), code_row(torch.zeros(V), sids[7][:2], sids, sids))


def test_tokens_that_vllm_takes_back_are_taken_back(bundle: Bundle) -> None:
    """V1 shortens the live list when a KV transfer fails."""
    sids = all_sids(bundle)
    runner, request = only_request(V1Runner, bundle)
    request.output.extend(tokens_of(sids[0][:2]))
    next_row(runner, request)
    request.output[:] = tokens_of(sids[-1][:1])
    torch.testing.assert_close(next_row(runner, request), code_row(torch.zeros(V), sids[-1][:1], sids, sids))


@RUNNERS
def test_a_recycled_row_knows_nothing_of_the_last_request(bundle: Bundle, runner_type: type[Runner]) -> None:
    """Neither its place nor its filter, and a plain request in its place is left alone."""
    sids = all_sids(bundle)
    one_item = WireFilter(pack_ranks(np.array([3])), b"", None)
    runner, first = only_request(runner_type, bundle, item_filter=one_item)
    first.output.extend(tokens_of(sids[3][:2]))
    next_row(runner, first)
    second, third = Request(sid_params(bundle)), Request(SamplingParams())
    runner.rebatch([first], [second], random.Random(0))
    torch.testing.assert_close(next_row(runner, second), code_row(torch.zeros(V), (), sids, sids))
    runner.rebatch([second], [third], random.Random(0))
    assert torch.equal(next_row(runner, third), torch.zeros(V))


def _missing_pair(sids: Collection[Codes]) -> tuple[int, int]:
    """Two codes that exist, and not one after the other."""
    known = {sid[:2] for sid in sids}
    return next((a, b) for a, _ in sorted(known) for b in range(SPACE.codebook_size) if (a, b) not in known)


def _ineligible_code(sids: Sequence[Codes]) -> int:
    """A first code that the item of rank 0 does not have."""
    return next(sid[0] for sid in sids if sid[0] != sids[0][0])


def _broken(bundle: Bundle, case: str) -> tuple[dict[str, Any], list[int]]:
    """Arguments and output tokens of a row that cannot go on."""
    sids = all_sids(bundle)
    plain = wire_of(sid_params(bundle, "bad"))
    first_item = {"allow": pack_ranks(np.array([0]))}
    cases: dict[str, tuple[dict[str, Any], list[int]]] = {
        "a prefix that no item has": (plain, tokens_of(_missing_pair(sids))),
        "a code of another level": (plain, [token(1, 0)]),
        "another token than the forced one": (plain | {"forced": FORCED}, [FORCED[0][1]]),
        "a thought beyond its budget": (plain | {"close": CLOSE, "max_think_tokens": 1}, [10, 10]),
        "an ineligible prefix": (plain | first_item, [token(0, _ineligible_code(sids))]),
        "a token that is not yet known": (plain, [-1]),
        "a filter that leaves nothing": (plain | {"allow": b""}, []),
        "an unknown catalogue": (plain | {"catalog": "no-such"}, []),
        "an unknown bitmap": (plain | {"bitmap": "no-such"}, []),
        "broken ranks": (plain | {"deny": b"123"}, []),
        "forced tokens for another number of codes": (plain | {"forced": FORCED[:1]}, []),
        "a forced token beyond the vocabulary": (plain | {"forced": ((V,), (), ())}, []),
        "a field that is not known": (plain | {"alow": b""}, []),
    }
    return cases[case]


@RUNNERS
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("a prefix that no item has", "unknown_prefix"),
        ("a code of another level", "unknown_prefix"),
        ("another token than the forced one", "unknown_prefix"),
        ("a thought beyond its budget", "unknown_prefix"),
        ("an ineligible prefix", "empty_allowed_set"),
        ("a token that is not yet known", "placeholder"),
        ("a filter that leaves nothing", "empty_allowed_set"),
        ("an unknown catalogue", "unknown_catalog"),
        ("an unknown bitmap", "unknown_bitmap"),
        ("broken ranks", "bad_request"),
        ("forced tokens for another number of codes", "bad_request"),
        ("a forced token beyond the vocabulary", "bad_request"),
        ("a field that is not known", "bad_request"),
    ],
)
def test_a_row_that_cannot_go_on_fails_alone(bundle: Bundle, runner_type: type[Runner], case: str, kind: str) -> None:
    """It is given its end token from then on, its error can be taken once, and the rows beside it see nothing."""
    wire, output = _broken(bundle, case)
    sids = all_sids(bundle)
    bad = Request(SamplingParams(extra_args={SID_ARG: wire}))
    good, plain = Request(sid_params(bundle, "good")), Request(SamplingParams())
    runner = runner_type(bundle)
    runner.rebatch([], [good, bad, plain], random.Random(0))
    bad.output.extend(output)
    good.output.extend(tokens_of(sids[0][: len(output)]))
    logits = fresh_logits([good, bad, plain], torch.Generator().manual_seed(0))
    end = EOS if kind != "bad_request" or "alow" not in wire else 0  # unreadable arguments name no end token
    for _ in range(2):
        written = runner.apply({request: row.clone() for request, row in logits.items()})
        assert forced_token(written[bad]) == end
        torch.testing.assert_close(
            written[good], code_row(logits[good], sids[0][: len(output)], sids, sids), atol=1e-5, rtol=0
        )
        assert torch.equal(written[plain], logits[plain])
        bad.output.append(end)
    error = STORE.take_error("bad" if end == EOS else "")
    assert error is not None
    assert error.kind == kind
    assert STORE.take_error("bad") is None
    assert STORE.take_error("good") is None


@RUNNERS
def test_a_step_in_which_every_row_fails_is_one_of_end_tokens(bundle: Bundle, runner_type: type[Runner]) -> None:
    """There is no score to be written."""
    wire, output = _broken(bundle, "an ineligible prefix")
    runner, request = runner_type(bundle), Request(SamplingParams(extra_args={SID_ARG: wire}), output=output)
    runner.rebatch([], [request], random.Random(0))
    assert forced_token(next_row(runner, request)) == EOS
    assert STORE.take_error("bad") is not None


class FaultyStore(SidStore):
    """Hands out filters that break when they are used."""

    class _Filter(ItemFilter):
        def count(self, low: Any, high: Any) -> Any:
            raise ZeroDivisionError("a fault of our own")

    def item_filter(self, snapshot: CatalogSnapshot, wire: WireFilter) -> ItemFilter:
        """One that cannot count."""
        return self._Filter(len(snapshot.catalog))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_fault_of_our_own_ends_the_rows_and_not_the_engine(bundle: Bundle, is_known: bool) -> None:
    """Whatever is raised, it does not leave."""
    store = FaultyStore()
    core = SidCore(vllm_config(bundle), store)
    row = core.start(wire_of(sid_params(bundle)) if is_known else 5)
    logits = torch.zeros(2, V)
    core.write(logits, {1: row})
    assert torch.equal(logits[0], torch.zeros(V))
    assert forced_token(logits[1]) == (EOS if is_known else 0)
    error = store.take_error("r" if is_known else "")
    assert error is not None
    assert error.kind == ("internal" if is_known else "bad_request")


def test_errors_that_nobody_asks_for_are_forgotten() -> None:
    """The oldest first."""
    store = SidStore()
    for number in range(MAX_ERRORS + 1):
        store.put_error(str(number), SidRequestError("placeholder", "…"))
    assert store.take_error("0") is None
    assert store.take_error("1") is not None


@pytest.mark.parametrize("adapter", [SidLogitsProcessorV1, SidLogitsProcessorV2])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"catalog": 3}, "catalog and id are strings"),
        ({"id": None}, "must"),
        ({"eos": -1}, "eos: -1"),
        ({"eos": True}, "eos: True"),
        ({"mode": "sid"}, "'mode'"),
        ({"close": [5]}, "both close"),
        ({"max_think_tokens": 5}, "both close"),
        ({"close": [], "max_think_tokens": 5}, "both close"),
        ({"close": 5, "max_think_tokens": 5}, "close is a list"),
        ({"close": [5], "max_think_tokens": 1.5}, "max_think_tokens: 1.5"),
        ({"forced": [1, 2]}, "forced is a list"),
        ({"forced": "ab"}, "forced is a list"),
        ({"forced": [["a"]]}, "forced: 'a'"),
        ({"allow": 7}, "allow is int"),
        ({"deny": [-1]}, "ranks: -1"),
        ({"bitmap": b"x"}, "bitmap is bytes"),
    ],
)
def test_malformed_arguments_are_refused_in_the_front_end(
    bundle: Bundle, adapter: type[SidLogitsProcessorV1 | SidLogitsProcessorV2], change: dict[str, Any], said: str
) -> None:
    """With a `ValueError` that says which field and what it should be."""
    wire = wire_of(sid_params(bundle))
    adapter.validate_params(SamplingParams(extra_args={SID_ARG: wire}))
    with pytest.raises(ValueError, match="extra_args") as raised:
        adapter.validate_params(SamplingParams(extra_args={SID_ARG: wire | change}))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    "other",
    [
        {"allowed_token_ids": [1]},
        {"bad_words": ["a"]},
        {"logit_bias": {1: 1.0}},
        {"structured_outputs": StructuredOutputsParams(regex="a")},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"thinking_token_budget": 3},
    ],
)
def test_what_would_change_a_score_is_refused_beside_sids(bundle: Bundle, other: dict[str, Any]) -> None:
    """And is nobody's business in other requests."""
    SidLogitsProcessorV1.validate_params(SamplingParams(**other))
    with pytest.raises(ValueError, match=next(iter(other))):
        SidLogitsProcessorV1.validate_params(SamplingParams(extra_args={SID_ARG: wire_of(sid_params(bundle))}, **other))


@pytest.mark.parametrize("text", ["{", "[1]", "5", '"x"'])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    """As is any other kind of value."""
    with pytest.raises(ValueError, match="extra_args"):
        SidLogitsProcessorV1.validate_params(SamplingParams(extra_args={SID_ARG: text}))


def test_arguments_survive_the_wire() -> None:
    """As natives, and as the JSON text to which `vllm serve` restricts its callers: with ranks as lists."""
    args = SidArgs("c", "r", EOS, WireFilter(pack_ranks(np.array([1, 4])), b"", "b"), CLOSE, 7, FORCED)
    assert SidArgs.parse(args.as_wire()) == args
    assert SidArgs.parse(json.dumps(args.as_wire() | {"allow": [4, 1, 4], "deny": []})) == args
    least = SidArgs("c", "r", EOS, NO_FILTER)
    assert SidArgs.parse({"catalog": "c", "id": "r", "eos": EOS}) == least


def test_the_adapter_is_that_of_the_model_runner(bundle: Bundle) -> None:
    """vLLM loads it as module:class; the other runner refuses it."""
    for is_v2, adapter in ((False, SidLogitsProcessorV1), (True, SidLogitsProcessorV2)):
        path = processor_path(vllm_config(bundle, use_v2_model_runner=is_v2))
        assert path == f"service.engine.vllm_processors:{adapter.__name__}"


def test_speculative_decoding_is_refused_at_start(bundle: Bundle) -> None:
    """V1 does so by itself."""
    with pytest.raises(ValueError, match="speculative"):
        SidLogitsProcessorV2(vllm_config(bundle, speculative_config=object()), cast(Any, None))


def test_greedy_sampling_is_held_to_the_catalogue_too(bundle: Bundle) -> None:
    """So V1 must run the processor before it looks for the best token."""
    assert not V1Runner(bundle).processor.is_argmax_invariant()


def test_a_row_without_a_program_ends_at_once() -> None:
    """Whatever its tokens are."""
    row = SidRowState("r", EOS, None)
    row.advance([1, -1, 3])
    assert (row.next_step, row.num_seen) == (EOS, 3)
