"""Legal SIDs in vLLM's *sampling* mode: thinking, rollouts, candidates. Loaded by name in the engine's process.

A request with `SamplingParams.extra_args["sid"]` (`SidArgs`) writes, token by token,

    [thought, close]   [forced tokens, code] x L   end

and every other request is left alone. There are no modes: a request thinks iff it has `close`, is held to candidates
iff it has `allow`, and follows a step program iff it has `forced`; any of them together.

The logits of a code are replaced by its score (`decoding/legal.py`): the log-probability among the *trie's* children.
Then whatever leads to no eligible item is -inf, and so is every other token, so a filter changes no score. With vLLM's
`logprobs_mode="processed_logits"`, at temperature 1, a caller gets the scores back as they are. A forced token has 0.
A thought may hold any token but `eos`, by which vLLM would end the request before its SID.

    SidCore  rows → logits; knows no vLLM        SidLogitsProcessorV1, V2  vLLM's two model runners → rows

An exception that leaves a processor ends the engine for everybody, so none does: a row that cannot go on is given its
`eos` and nothing else, and its error waits in `STORE.take_error(id)`.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import interface as v1
from vllm.v1.worker.gpu.sample.logits_processor import interface as v2

from semantic_ids.decoding.legal import LegalCodes, legal_log_softmax
from semantic_ids.filters import ItemFilter
from semantic_ids.trie import ROOT, Children, SidTrie, UnknownPrefixError
from service.engine.store import STORE, CatalogSnapshot, SidStore
from service.engine.wire import SidRequestError, WireFilter, pack_ranks

log = structlog.get_logger(__name__)

Mask: TypeAlias = npt.NDArray[np.bool_]

SID_ARG = "sid"
"""The key in `SamplingParams.extra_args`."""

BUNDLE_CONFIG = "sidrec_bundle"
"""The key in vLLM's `additional_config`: a bundle whose catalogue is loaded with the processor."""

_REQUIRED = frozenset({"catalog", "id", "eos"})
_FILTER = frozenset({"allow", "deny", "bitmap"})
_FIELDS = _REQUIRED | _FILTER | {"close", "max_think_tokens", "forced"}
_MAX_NATURAL = 2**32 - 1

# Each would change a row's logits before the score is taken, or the score after it was.
_UNCOMBINABLE: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "logit_bias": (None, {}),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
}


@dataclass(frozen=True)
class SidArgs:
    """What a request says in `extra_args["sid"]`, checked as far as it can be without a catalogue."""

    catalog: str
    """The catalogue's id in the store."""
    id: str
    """The caller's name for the row, by which its error is found."""
    eos: int
    """Forced after the last code, and on an error."""
    item_filter: WireFilter
    close: tuple[int, ...] = ()
    """Between a thought and what follows; the first of them ends the thought. Empty: no thought."""
    max_think_tokens: int = 0
    """A thought of so many tokens, not counting the close, is closed for the model."""
    forced: tuple[tuple[int, ...], ...] = ()
    """The fixed tokens before each code, L entries, or nothing at all."""

    @classmethod
    def parse(cls, wire: object) -> "SidArgs":
        """From a mapping of natives, or its JSON text with ranks as lists; a bad request says which field is wrong.

        Fields that are absent or None mean "not so"; a field that is not known is refused, so that no restriction is
        lost to a slip of the pen.
        """
        given = _mapping(wire)
        if given.keys() - _FIELDS or _REQUIRED - given.keys():
            raise _bad(f"it has the fields {sorted(given)}; {sorted(_REQUIRED)} must and {sorted(_FIELDS)} may be")
        if not isinstance(given["catalog"], str) or not isinstance(given["id"], str):
            raise _bad(f"catalog and id are strings, not {given['catalog']!r} and {given['id']!r}")
        if ("close" in given) != ("max_think_tokens" in given) or given.get("close") in ([], ()):
            raise _bad("a request that thinks has both close, one token or more, and max_think_tokens")
        forced = given.get("forced", ())
        if not isinstance(forced, list | tuple):
            raise _bad(f"forced is a list of token lists, not {forced!r}")
        return cls(
            given["catalog"],
            given["id"],
            _natural("eos", given["eos"]),
            WireFilter.parse({name: _listed_ranks(given[name]) for name in given.keys() & _FILTER}),
            _naturals("close", given.get("close", ())),
            _natural("max_think_tokens", given.get("max_think_tokens", 0)),
            tuple(_naturals("forced", tokens) for tokens in forced),
        )

    def as_wire(self) -> dict[str, Any]:
        """Natives only; `parse` gives the same arguments back."""
        wire = {"catalog": self.catalog, "id": self.id, "eos": self.eos, **self.item_filter.as_wire()}
        if self.close:
            wire |= {"close": list(self.close), "max_think_tokens": self.max_think_tokens}
        if self.forced:
            wire["forced"] = [list(tokens) for tokens in self.forced]
        return wire


@dataclass(frozen=True)
class SidProgram:
    """What one request is to write, and under which filter."""

    snapshot: CatalogSnapshot
    item_filter: ItemFilter
    close: int | None
    """The token that ends the thought; None: there is no thought."""
    max_think_tokens: int
    script: tuple[int, ...]
    """What follows the thought (and the first token of its close): a token id to force, or -1 - l for the code of l."""

    @classmethod
    def of(cls, args: SidArgs, store: SidStore, vocab_size: int) -> "SidProgram":
        """The program of a request, or a typed error: what it names must be in the store and in the vocabulary."""
        snapshot = store.snapshot(args.catalog)
        levels = range(snapshot.vocabulary.space.num_levels)
        if snapshot.vocabulary.block(levels[-1]).stop > vocab_size:
            raise _bad(f"the SIDs of catalogue {args.catalog!r} do not fit a vocabulary of {vocab_size} tokens")
        if len(args.forced) not in (0, len(levels)):
            raise _bad(f"forced has {len(args.forced)} entries; there are {len(levels)} codes")
        forced = args.forced or ((),) * len(levels)
        script = [*args.close[1:]]
        for level in levels:
            script += [*forced[level], -1 - level]
        if max(args.eos, *args.close[:1], *script) >= vocab_size:
            raise _bad(f"there are tokens beyond the vocabulary of {vocab_size}: {args}")
        item_filter = store.item_filter(snapshot, args.item_filter)
        return cls(snapshot, item_filter, args.close[0] if args.close else None, args.max_think_tokens, tuple(script))


class SidRowState:
    """How far one request is in its program; without one it is at its end.

    A state follows the output tokens and nothing else, so computing a row twice, or computing one whose token is then
    thrown away (a part of a prompt), does it no harm.
    """

    def __init__(self, name: str, eos: int, program: SidProgram | None) -> None:
        self.name = name
        self.eos = eos
        self.program = program
        self.restart()

    def restart(self) -> None:
        """As if no token had been seen."""
        self.num_seen = 0
        self.node = ROOT
        self._num_thought = 0
        self._place = -1 if self.program is not None and self.program.close is not None else 0

    @property
    def next_step(self) -> int | None:
        """The token id to force, or -1 - l for the code of level l, or None within a thought: anything goes."""
        if self.program is None:
            return self.eos
        if self._place < 0:
            return self.program.close if self._num_thought >= self.program.max_think_tokens else None
        return self.program.script[self._place] if self._place < len(self.program.script) else self.eos

    def advance(self, tokens: Sequence[int]) -> None:
        """Follow the next output tokens; a typed error at the first that the program does not allow."""
        if self.program is None:
            self.num_seen += len(tokens)
            return
        for token in tokens:
            if token < 0:
                raise SidRequestError("placeholder", f"output token {self.num_seen} is {token}: it is not yet known")
            self._follow(self.program, token)
            self.num_seen += 1

    def _follow(self, program: SidProgram, token: int) -> None:
        step = self.next_step
        if self._place >= len(program.script):
            return
        if step is None and token != program.close:
            self._num_thought += 1
            return
        if step is not None and step < 0:
            self.node = _child(program.snapshot, self.node, -1 - step, token)
        elif step is not None and token != step:
            raise SidRequestError("unknown_prefix", f"output token {self.num_seen} is {token}; {step} was forced")
        self._place += 1


class SidCore:
    """What both adapters share. Nothing here raises for a row's sake."""

    def __init__(self, vllm_config: VllmConfig, store: SidStore = STORE) -> None:
        """Load the bundle that `additional_config` names, if it does; `BundleError` if that fails."""
        self._store = store
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        config = vllm_config.additional_config
        if isinstance(config, dict) and BUNDLE_CONFIG in config:
            store.load(Path(config[BUNDLE_CONFIG]))

    def start(self, wire: object) -> SidRowState:
        """The state of a new row; a row that cannot start is at its end."""
        name, eos = "", 0  # of arguments that cannot be read: any token is better than an illegal SID
        try:
            args = SidArgs.parse(wire)
            name = args.id
            eos = args.eos if args.eos < self._vocab_size else 0
            return SidRowState(name, eos, SidProgram.of(args, self._store, self._vocab_size))
        except Exception as error:  # must not leave: vLLM would end the engine for everybody
            ended = SidRowState(name, eos, None)
            self._end(ended, error)
            return ended

    def follow(self, state: SidRowState, tokens: Sequence[int]) -> None:
        """Take the row's new output tokens."""
        try:
            state.advance(tokens)
        except Exception as error:  # as above
            self._end(state, error)

    def write(self, logits: Tensor, rows: Mapping[int, SidRowState]) -> None:
        """Overwrite the logits (rows, V) of `rows`, by their place in it, with what may come next."""
        forced: dict[int, int] = {}
        barred: dict[int, int] = {}
        coded: dict[tuple[str, int], list[_CodeRow]] = defaultdict(list)
        for row, state in rows.items():
            step, program = state.next_step, state.program
            if step is None and program is not None and program.close != state.eos:
                barred[row] = state.eos
            elif step is not None and step >= 0:
                forced[row] = step
            elif step is not None and program is not None:
                coded[program.snapshot.catalog_id, -1 - step].append(_CodeRow(row, state, program))
        scored = [self._score(logits, level, group) for (_, level), group in coded.items()]
        forced |= {one.row: one.state.eos for group in coded.values() for one in group if one.state.program is None}
        touched = [*forced, *(row for scores in scored for row in scores.rows)]
        if len(touched) == len(logits):
            logits.fill_(-torch.inf)  # the largest part of a step's cost, and by index it would be more
        elif touched:
            logits.index_fill_(0, torch.tensor(touched, device=logits.device), -torch.inf)
        for scores in scored:
            if scores.rows:
                logits[torch.tensor(scores.rows, device=logits.device), scores.block] = scores.values.to(logits.dtype)
        for tokens, value in ((forced, 0.0), (barred, -torch.inf)):
            if tokens:
                places = torch.tensor([[*tokens], [*tokens.values()]], device=logits.device)
                logits[places[0], places[1]] = value

    def _score(self, logits: Tensor, level: int, group: "Sequence[_CodeRow]") -> "_Scores":
        """The scores of one catalogue's rows at one level; those that have no eligible child are ended instead."""
        try:
            scores, empty = _scores(logits, level, group)
        except Exception as error:  # as above
            for one in group:
                self._end(one.state, error)
            return _Scores([], slice(0), logits[:0, :0])
        for one in empty:
            self._end(
                one.state, SidRequestError("empty_allowed_set", f"nothing eligible follows node {one.state.node}")
            )
        return scores

    def _end(self, state: SidRowState, error: Exception) -> None:
        if not isinstance(error, SidRequestError):
            log.error("sid_row_failed", row=state.name, exc_info=error)
            error = SidRequestError("internal", f"{type(error).__name__}: {error}")
        state.program = None
        self._store.put_error(state.name, error)


class SidLogitsProcessorV1(v1.LogitsProcessor):  # type: ignore[misc]  # mypy skips vllm
    """For vLLM's V1 model runner: rows are moved about, and each has a live list of its output tokens."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._core = SidCore(vllm_config)
        self._rows: dict[int, tuple[SidRowState, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """`ValueError` for malformed arguments; runs in the front end, where there is no catalogue."""
        check_params(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: greedy sampling is held to the catalogue as well."""
        return False

    def update_state(self, batch_update: v1.BatchUpdate | None) -> None:
        """Follow the rows: removed, then added, then moved. Tokens are read in `apply`, when all of them are known."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, params, _, output_ids in batch_update.added:
            self._rows.pop(row, None)
            if (wire := _wire_of(params)) is not None:
                self._rows[row] = self._core.start(wire), output_ids
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction is v1.MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (rows, V), those of SID rows overwritten in place."""
        for state, output_ids in self._rows.values():
            if len(output_ids) < state.num_seen:  # vLLM takes tokens back when a KV transfer fails
                state.restart()
            self._core.follow(state, output_ids[state.num_seen :])
        self._core.write(logits, {row: state for row, (state, _) in self._rows.items()})
        return logits


class SidLogitsProcessorV2(v2.LogitsProcessor):  # type: ignore[misc]
    """For vLLM's V2 model runner: requests keep a slot, rows change every step, tokens are on the device."""

    def __init__(self, vllm_config: VllmConfig, req_states: v2.LogitsProcRequestState) -> None:
        """`ValueError` with speculative decoding, where a request has several rows (V1 refuses it by itself)."""
        if vllm_config.speculative_config is not None:
            raise ValueError("SIDs cannot be sampled with speculative decoding: leave speculative_config out")
        self._core = SidCore(vllm_config)
        self._req_states = req_states
        self._slots: dict[int, SidRowState] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """`ValueError` for malformed arguments; runs in the front end, where there is no catalogue."""
        check_params(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take the slot over from whoever had it; whether its logits will be written."""
        self._slots.pop(req_idx, None)
        if (wire := _wire_of(sampling_params)) is not None:
            self._slots[req_idx] = self._core.start(wire)
        return wire is not None

    def apply(self, logits: Tensor, ctx: v2.LogitsContext) -> Tensor:
        """Logits (rows, V), those of SID rows overwritten in place. One synchronisation with the device."""
        slots = {row: slot for row, slot in enumerate(ctx.idx_mapping_np.tolist()) if slot in self._slots}
        if slots:
            self._follow(slots, ctx.seq_lens_upper_bound_np)
            self._core.write(logits, {row: self._slots[slot] for row, slot in slots.items()})
        return logits

    def _follow(self, slots: Mapping[int, int], seq_lens: npt.NDArray[np.integer]) -> None:
        """Fetch what each row has written since the last step: usually one token."""
        states = [self._slots[slot] for slot in slots.values()]
        slot = np.fromiter(slots.values(), np.int64)
        start = self._req_states.prompt_len.np[slot] + [state.num_seen for state in states]
        # Exact without speculative decoding; below `start` while the prompt is still being run.
        num_new = seq_lens[list(slots)] - start
        if num_new.max() <= 0:
            return
        tokens = self._req_states.all_token_ids.gpu
        column = (start[:, None] + np.arange(num_new.max())).clip(max=tokens.shape[1] - 1)
        index = torch.from_numpy(np.stack(np.broadcast_arrays(slot[:, None], column))).to(tokens.device)
        fetched = tokens[index[0], index[1]].cpu().numpy()
        for state, new, count in zip(states, fetched, num_new, strict=True):
            self._core.follow(state, new[: max(count, 0)].tolist())


def processor_path(vllm_config: VllmConfig) -> str:
    """What to give vLLM as `logits_processors`: the adapter of the model runner that this configuration gets."""
    adapter = SidLogitsProcessorV2 if vllm_config.use_v2_model_runner else SidLogitsProcessorV1
    return f"{adapter.__module__}:{adapter.__name__}"


def check_params(params: SamplingParams) -> None:
    """`ValueError` if a request's SID arguments are malformed, or go with what would change its scores."""
    wire = _wire_of(params)
    if wire is None:
        return
    try:
        SidArgs.parse(wire)
    except SidRequestError as error:
        raise ValueError(f"extra_args[{SID_ARG!r}]: {error}") from error
    refused = [name for name, neutral in _UNCOMBINABLE.items() if getattr(params, name) not in neutral]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not with extra_args[{SID_ARG!r}], whose scores must stay exact")


class _CodeRow(NamedTuple):
    """A row whose next token is a code."""

    row: int
    state: SidRowState
    program: SidProgram


@dataclass(frozen=True)
class _Scores:
    """What is written into `block` of some rows; everything outside it is -inf."""

    rows: list[int]  # (M,)
    block: slice
    values: Tensor  # (M, K)


def _scores(logits: Tensor, level: int, group: Sequence[_CodeRow]) -> tuple[_Scores, list[_CodeRow]]:
    """What to write at a code of `level`, and the rows that have no eligible child."""
    snapshot = group[0].program.snapshot
    block = snapshot.vocabulary.block(level)
    legal = LegalCodes.of(snapshot.catalog.trie, np.array([one.state.node for one in group]), logits.device)
    found = _has_eligible(snapshot.catalog.trie, level, legal.children, [one.program.item_filter for one in group])
    eligible = np.zeros(legal.mask.shape, np.bool_)
    eligible[legal.children.parent[found], legal.children.code[found]] = True
    is_open: Mask = np.any(eligible, axis=1)
    kept = [one for one, has_child in zip(group, is_open, strict=True) if has_child]
    rows = torch.tensor([one.row for one in group], device=logits.device)
    values = legal_log_softmax(logits[rows, block], legal.mask)
    values.masked_fill_(torch.from_numpy(~eligible).to(logits.device), -torch.inf)
    if len(kept) < len(group):
        values = values[torch.from_numpy(is_open).to(logits.device)]
    return _Scores([one.row for one in kept], block, values), [group[place] for place in np.flatnonzero(~is_open)]


def _has_eligible(trie: SidTrie, level: int, children: Children, filters: Sequence[ItemFilter]) -> Mask:
    """Which children (C,) of M nodes of one level have an item that their node's filter leaves."""
    low, high = trie.rank_range(children.node, level)
    first = np.searchsorted(children.parent, np.arange(len(filters) + 1))
    node_low, node_high = low[first[:-1]], high[first[1:] - 1]
    num_eligible = np.array(
        [int(one.count(node_low[i : i + 1], node_high[i : i + 1])[0]) for i, one in enumerate(filters)]
    )
    num_excluded = node_high - node_low - num_eligible
    found: Mask = (
        high - low > num_excluded[children.parent]
    )  # more items than its siblings and it lack: no need to count
    rest = np.flatnonzero(~found)
    for node in np.unique(children.parent[rest]).tolist():
        part = rest[children.parent[rest] == node]
        found[part] = filters[node].count(low[part], high[part]) > 0
    return found


def _child(snapshot: CatalogSnapshot, node: int, level: int, token: int) -> int:
    block = snapshot.vocabulary.block(level)
    if not block.start <= token < block.stop:
        raise SidRequestError("unknown_prefix", f"output token {token} is no code of level {level}")
    try:
        return snapshot.catalog.trie.step(node, token - block.start)
    except UnknownPrefixError as error:
        raise SidRequestError("unknown_prefix", str(error)) from error


def _wire_of(params: SamplingParams) -> object:
    return (params.extra_args or {}).get(SID_ARG)


def _mapping(wire: object) -> dict[str, Any]:
    """The fields that are given, by name."""
    if isinstance(wire, str):
        try:
            wire = json.loads(wire)
        except json.JSONDecodeError as error:
            raise _bad(f"it is no JSON ({error})") from error
    if not isinstance(wire, Mapping) or not all(isinstance(name, str) for name in wire):
        raise _bad(f"it is a mapping by field, not {type(wire).__name__}")
    return {name: value for name, value in wire.items() if value is not None}


def _listed_ranks(value: object) -> object:
    """JSON has no bytes: there, ranks are a list in any order."""
    return pack_ranks(np.unique(np.array(_naturals("ranks", value), np.int64))) if isinstance(value, list) else value


def _naturals(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _bad(f"{name} is a list of whole numbers, not {value!r}")
    return tuple(_natural(name, one) for one in value)


def _natural(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_NATURAL:
        raise _bad(f"{name}: {value!r} is no whole number from 0 to {_MAX_NATURAL}")
    return value


def _bad(message: str) -> SidRequestError:
    return SidRequestError("bad_request", message)
