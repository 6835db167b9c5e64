"""What runs in the local engine's process: torch, the model, the beam. One call after the other, over a pipe.

Between the tokens of a thought the pipe is looked at, so that a thought can be given up, and an epoch of the catalogue
taken, while it lasts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import structlog
import torch

from semantic_ids.bundle import Bundle
from semantic_ids.decoding.beam import BeamWork
from semantic_ids.decoding.prompt_cache import PromptCache
from semantic_ids.decoding.tree_decoder import TreeDecoder, TreeState
from semantic_ids.filters import ItemFilter
from service.engine.base import Think, ThoughtEnd
from service.engine.batching import run_isolated
from service.engine.local_process import (
    Call,
    Decode,
    Decoded,
    GiveUp,
    LocalEngineConfig,
    Ready,
    Reply,
    RetireCatalog,
    Token,
    UseCatalog,
)
from service.engine.search import Searched, search
from service.engine.store import CatalogSnapshot, SidStore
from service.engine.wire import BeamReport, BeamRequest, SidRequestError, pack_answer

log = structlog.get_logger(__name__)


class _GivenUpError(Exception):
    """The caller of a thinking request is gone."""


@dataclass(frozen=True)
class _Job:
    """One sound request of a batch."""

    prompt: Any
    request: BeamRequest
    item_filter: ItemFilter


@dataclass(frozen=True)
class _Thought:
    """A thought in the cache, and the state after its last token."""

    token_ids: tuple[int, ...]
    end: ThoughtEnd
    seconds: float
    state: TreeState


class LocalWorker:
    """A bundle's model and catalogue at the end of a pipe."""

    def __init__(self, connection: Connection, bundle_path: Path, config: LocalEngineConfig) -> None:
        torch.set_num_threads(config.threads)
        bundle = Bundle.load(bundle_path)
        self._connection = connection
        self._store = SidStore()
        self._decoder = TreeDecoder.load(
            bundle.model_folder,
            bundle.vocabulary,
            config.dtype,
            fed_back=bundle.renderer.fed_back,
            prompt_cache=PromptCache(config.prompt_cache_mb << 20) if config.prompt_cache_mb else None,
        )
        connection.send(Ready(self._store.add(bundle), self._decoder.max_positions))

    def serve(self) -> None:
        """Answer calls until the pipe ends (`EOFError`)."""
        while True:
            self._answer(*self._connection.recv())

    def _answer(self, number: int, message: Call | GiveUp) -> None:
        if isinstance(message, GiveUp):  # too late: it has been answered
            return
        try:
            reply = Reply(number, self._run(number, message))
        except _GivenUpError as error:
            reply = Reply(number, error=str(error))
        except BrokenPipeError:  # the service is gone; an EOFError may also be a file's
            raise
        except Exception as error:  # whatever else fails must not end the process
            log.exception("local_engine_call_failed", call=type(message).__name__)
            reply = Reply(number, error=f"{type(message).__name__}: {type(error).__name__}: {error}")
        self._connection.send(reply)

    def _run(self, number: int, message: Call) -> Decoded | None:
        if isinstance(message, Decode):
            return self._decode(number, message)
        if isinstance(message, UseCatalog):
            self._store.load_epoch(message.base_id, message.catalog_id, message.folder)
        elif isinstance(message, RetireCatalog):
            self._store.forget(message.catalog_id)
        else:
            self._store.put_bitmap(message.catalog_id, message.digest, message.packed)
        return None

    def _decode(self, number: int, batch: Decode) -> Decoded:
        """Every request is answered, perhaps with an error of its own."""
        started_at = time.monotonic()
        work, thoughts = BeamWork(), list[_Thought]()
        jobs: list[_Job | SidRequestError] = []
        for prompt, request in zip(batch.prompts, batch.requests, strict=True):
            try:
                snapshot = self._store.snapshot(batch.catalog_id)
                jobs.append(_Job(prompt, request, self._store.item_filter(snapshot, request.item_filter)))
            except SidRequestError as error:
                jobs.append(error)
        sound = [job for job in jobs if isinstance(job, _Job)]

        def run(together: Sequence[_Job]) -> list[Searched]:
            return self._beam(number, batch, self._store.snapshot(batch.catalog_id), together, work, thoughts)

        found = iter(run_isolated(run, sound))
        answers = [next(found) if isinstance(job, _Job) else job for job in jobs]
        if any(isinstance(answer, _GivenUpError) for answer in answers):
            raise _GivenUpError("the caller of a thinking request is gone")
        report = BeamReport(
            answers=[pack_answer(answer) for answer in answers],
            steps=work.steps,
            beams=work.beams,
            closed_beams=work.closed_beams,
            masked_share=work.masked_share,
            num_captures=0,
            seconds=time.monotonic() - started_at,
        )
        decoded = Decoded(report, work.prompt_tokens, work.known_prompt_tokens)
        if not thoughts:
            return decoded
        thought = thoughts[0]
        return replace(decoded, thought=thought.token_ids, thought_end=thought.end, think_s=thought.seconds)

    def _beam(
        self,
        number: int,
        batch: Decode,
        snapshot: CatalogSnapshot,
        jobs: Sequence[_Job],
        work: BeamWork,
        thoughts: list[_Thought],
    ) -> list[Searched]:
        state, forced = self._decoder.prefill([job.prompt for job in jobs]), batch.forced
        work.prompt_tokens += sum(len(job.prompt) for job in jobs)
        work.known_prompt_tokens += state.num_known
        if batch.think is not None:
            thought = self._think(number, state, batch.think)
            thoughts.append(thought)
            state, forced = thought.state, (batch.think.close + forced[0], *forced[1:])
        requests, filters = [job.request for job in jobs], [job.item_filter for job in jobs]
        return search(self._decoder, snapshot, state, requests, filters, forced, work)

    def _think(self, number: int, state: TreeState, think: Think) -> _Thought:
        """Write greedily on from the one prompt in `state`; `_GivenUpError` as soon as the caller is gone."""
        start = time.monotonic()
        token_ids: list[int] = []
        longest_step_s = elapsed_s = 0.0
        rows, hidden = state.root, state.last_hidden
        parents = torch.zeros((1, 1), dtype=torch.long, device=self._decoder.device)
        while True:
            token_id = int(self._decoder.token_logits(hidden[0]).argmax())
            end = _end(think, token_id, len(token_ids), elapsed_s + longest_step_s)
            if end is not None:
                return _Thought(tuple(token_ids), end, elapsed_s, TreeState(state.cache, rows, hidden))
            self._attend_to_others(number)
            token_ids.append(token_id)
            self._connection.send(Token(number, token_id))
            hidden, rows = self._decoder.extend(state, rows, parents, torch.full_like(parents, token_id))
            before_s, elapsed_s = elapsed_s, time.monotonic() - start
            longest_step_s = max(longest_step_s, elapsed_s - before_s)

    def _attend_to_others(self, thinking: int) -> None:
        """Whatever has been asked during the thought of this call, which is one batch: no other comes meanwhile."""
        while self._connection.poll():
            number, message = self._connection.recv()
            if isinstance(message, GiveUp) and message.number == thinking:
                raise _GivenUpError("the caller of a thinking request is gone")
            self._answer(number, message)


def _end(think: Think, next_token_id: int, num_tokens: int, seconds: float) -> ThoughtEnd | None:
    """Whether the thought ends before its next token, whose step would be over after `seconds`."""
    if next_token_id == think.close[0]:
        return "closed"
    if num_tokens >= think.max_tokens:
        return "token_budget"
    return "time_budget" if seconds >= think.max_seconds else None
