"""vLLM's worker with the beam inside: made by name in the engine's process (`worker_cls`).

A request flagged with `extra_args={"sid_capture": {"key", "room"}}` is an ordinary one to vLLM. When its whole prompt
has been run, its keys, values and last hidden state are kept under `key`. `sid_beam`, called between two engine steps,
runs the project's beam over any number of them at once. A request that cannot be answered gets an error of its own. An
exception that leaves `execute_model` would be the engine's death, so capturing raises none.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu_worker import Worker

from semantic_ids.decoding.beam import BeamWork
from semantic_ids.filters import ItemFilter
from service.engine.batching import run_isolated
from service.engine.search import Searched, search
from service.engine.store import STORE
from service.engine.vllm_runner import Capture, PagedState, PagedTreeDecoder
from service.engine.wire import (
    CAPTURE_ARG,
    BeamReport,
    BeamRequest,
    SidRequestError,
    pack_answer,
    room_for,
)
from service.logs import configure

log = structlog.get_logger(__name__)

MAX_CAPTURE_AGE_S = 120.0
"""A capture that nobody asked for in this time is dropped: its caller has died."""


@dataclass
class _Prefill:
    """A flagged request whose prompt is being run."""

    key: str
    room: int
    num_tokens: int
    block_ids: list[int]


@dataclass(frozen=True)
class _Kept:
    capture: Capture
    kept_at: float


class SidWorkerMixin:
    """What a worker needs to capture prompts and to run the beam over them."""

    model_runner: Any
    vllm_config: Any
    use_v2_model_runner: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        configure("info", "json")  # this process has no settings, and its stdout is the service's
        self._prefills: dict[str, _Prefill] = {}
        self._captures: dict[str, _Kept] = {}
        self._decoder: PagedTreeDecoder | None = None

    def sid_load(self, bundle_path: str) -> str:
        """Map a bundle's catalogue and get the loaded model ready for its beams; the catalogue's id."""
        catalog_id = STORE.load(Path(bundle_path))
        STORE.keep_only(catalog_id)
        self._prefills.clear()
        self._captures.clear()
        vocabulary = STORE.snapshot(catalog_id).vocabulary
        self._decoder = PagedTreeDecoder(self.model_runner.model, self.vllm_config, vocabulary)
        return catalog_id

    def sid_swap(self, bundle_path: str) -> str:
        """Take another bundle's weights and catalogue, both or neither, between two steps; the new catalogue's id."""
        STORE.load(Path(bundle_path))  # what can fail for the bundle's sake fails before the weights are touched
        self.reload_weights(weights_path=str(Path(bundle_path) / "model"))  # type: ignore[attr-defined]
        return self.sid_load(bundle_path)

    def sid_epoch(self, base_id: str, catalog_id: str, folder: str) -> None:
        """Map the trie of a live epoch of the catalogue `base_id` for the requests that are pinned to it."""
        STORE.load_epoch(base_id, catalog_id, Path(folder))

    def sid_retire(self, catalog_id: str) -> None:
        """Forget an epoch that no request is pinned to any more."""
        STORE.forget(catalog_id)

    def sid_bitmap(self, catalog_id: str, digest: str, packed: bytes) -> None:
        """Keep a category bitmap for the requests that will name it."""
        STORE.put_bitmap(catalog_id, digest, packed)

    def sid_check(self, key: str, extended_key: str, token_ids: Sequence[int]) -> float:
        """How far the tree's continuation of a prompt is from vLLM's own run of prompt and `token_ids` in one piece.

        Relative error of the last hidden state; both prompts were captured before.
        """
        decoder = self._ready_decoder()
        start, expected = self._captures.pop(key).capture, self._captures.pop(extended_key).capture.hidden.float()
        state = PagedState([start], len(token_ids))
        rows, hidden = state.root, state.last_hidden
        for token_id in token_ids:
            parents = torch.zeros((1, 1), dtype=torch.long, device=decoder.device)
            hidden, rows = decoder.extend(state, rows, parents, torch.full_like(parents, token_id))
        return float((hidden.flatten().float() - expected).norm() / expected.norm())

    def sid_drop(self, key: str) -> None:
        """Forget a prompt whose caller gave up."""
        self._captures.pop(key, None)
        self._prefills = {req_id: prefill for req_id, prefill in self._prefills.items() if prefill.key != key}

    def sid_error(self, name: str) -> dict[str, str] | None:
        """Why the sampled row of this name was ended before its SID (`vllm_processors`), once; None if it was not."""
        error = STORE.take_error(name)
        return None if error is None else error.as_wire()

    def sid_beam(
        self, catalog_id: str, forced: Sequence[Sequence[int]], requests: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The best items of each captured prompt; every request is answered, perhaps with an error of its own."""
        started_at = time.perf_counter()
        work = BeamWork()
        answers = self._answers(catalog_id, forced, [BeamRequest.parse(request) for request in requests], work)
        return BeamReport(
            answers=[pack_answer(answer) for answer in answers],
            steps=work.steps,
            beams=work.beams,
            closed_beams=work.closed_beams,
            masked_share=work.masked_share,
            num_captures=len(self._captures),
            seconds=time.perf_counter() - started_at,
        ).as_wire()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:  # noqa: ANN401
        """One engine step, as vLLM runs it; then the prompts that it completed are captured."""
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        try:
            self._capture_completed(scheduler_output)
        except Exception:  # must not leave: vLLM would end the engine for everybody
            log.exception("capture_failed")
        return output

    def _answers(
        self, catalog_id: str, forced: Sequence[Sequence[int]], requests: Sequence[BeamRequest], work: BeamWork
    ) -> list[Searched | Exception]:
        jobs: list[_Job | Exception] = []
        for request in requests:
            try:
                jobs.append(self._job(catalog_id, request))
            except SidRequestError as error:
                jobs.append(error)
        sound = [job for job in jobs if isinstance(job, _Job)]
        found = iter(run_isolated(lambda together: self._beam(catalog_id, forced, together, work), sound))
        return [next(found) if isinstance(job, _Job) else job for job in jobs]

    def _job(self, catalog_id: str, request: BeamRequest) -> "_Job":
        kept = self._captures.get(request.key)
        if kept is None:
            raise SidRequestError("unknown_capture", f"no prompt was captured under {request.key!r}")
        try:
            item_filter = STORE.item_filter(STORE.snapshot(catalog_id), request.item_filter)
        except SidRequestError as error:
            if error.kind != "unknown_bitmap":  # the bitmap is sent, and the same prompt asked for again
                del self._captures[request.key]
            raise
        del self._captures[request.key]
        return _Job(kept.capture, item_filter, request)

    def _beam(
        self, catalog_id: str, forced: Sequence[Sequence[int]], jobs: Sequence["_Job"], work: BeamWork
    ) -> list[Searched]:
        state = PagedState([job.capture for job in jobs], room_for(forced, max(job.request.num_beams for job in jobs)))
        requests, filters = [job.request for job in jobs], [job.item_filter for job in jobs]
        return search(self._ready_decoder(), STORE.snapshot(catalog_id), state, requests, filters, forced, work)

    def _ready_decoder(self) -> PagedTreeDecoder:
        if self._decoder is None:
            raise SidRequestError("internal", "the worker has no bundle yet")
        return self._decoder

    def _capture_completed(self, step: SchedulerOutput) -> None:
        """Follow the flagged requests through a step; keep those whose last prompt token it ran."""
        for req_id in step.finished_req_ids:
            self._prefills.pop(req_id, None)
        computed = self._follow(step)
        now = time.monotonic()
        for req_id, before in computed.items():
            prefill = self._prefills[req_id]
            if before + step.num_scheduled_tokens[req_id] >= prefill.num_tokens:
                del self._prefills[req_id]
                hidden = self._last_hidden(req_id)
                capture = self._ready_decoder().capture(prefill.block_ids, prefill.num_tokens, hidden, prefill.room)
                self._captures[prefill.key] = _Kept(capture, now)
        if computed:
            self._captures = {k: one for k, one in self._captures.items() if one.kept_at > now - MAX_CAPTURE_AGE_S}

    def _follow(self, step: SchedulerOutput) -> dict[str, int]:
        """Note the new and the further blocks of flagged requests; how many tokens each had before this step."""
        computed: dict[str, int] = {}
        for new in step.scheduled_new_reqs:
            extra = new.sampling_params.extra_args if new.sampling_params else None
            if extra and CAPTURE_ARG in extra:
                arg = extra[CAPTURE_ARG]
                self._prefills[new.req_id] = _Prefill(arg["key"], arg["room"], new.prompt_len, [*new.block_ids[0]])
                computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for place, req_id in enumerate(cached.req_ids):
            prefill = self._prefills.get(req_id)
            if prefill is None:
                continue
            blocks = cached.new_block_ids[place]
            if req_id in cached.resumed_req_ids:  # it was preempted, and starts on other blocks
                prefill.block_ids = []
            prefill.block_ids += blocks[0] if blocks else []
            computed[req_id] = cached.num_computed_tokens[place]
        return computed

    def _last_hidden(self, req_id: str) -> torch.Tensor:
        """What the model made of the last token that this step ran for the request, (D,)."""
        state = self.model_runner.execute_model_state
        if self.use_v2_model_runner:
            batch = state.input_batch
            row: torch.Tensor = state.hidden_states[batch.logits_indices[batch.req_ids.index(req_id)]]
            return row
        row = state.sample_hidden_states[self.model_runner.input_batch.req_id_to_index[req_id]]
        return row


@dataclass(frozen=True)
class _Job:
    capture: Capture
    item_filter: ItemFilter
    request: BeamRequest


class SidGPUWorker(SidWorkerMixin, Worker):  # type: ignore[misc]
    """On GPUs."""
