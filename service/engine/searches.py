"""Searches that another process runs: asked for together; a bitmap that it lacks is sent, once."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from semantic_ids.filters import RankBitmap
from semantic_ids.trie import Ranks
from service.engine.base import EngineError, EngineUnavailableError, StepTrace
from service.engine.wire import PROPENSITY_DTYPE, RANK_DTYPE, SCORE_DTYPE, BeamRequest, pack_bitmap, unpack_trace
from service.metrics import Metrics


@dataclass(frozen=True)
class Search:
    """One request's search, and the bitmap that its filter names."""

    request: BeamRequest
    catalog_id: str
    forced: tuple[tuple[int, ...], ...]
    bitmap: RankBitmap | None


@dataclass(frozen=True)
class Found:
    """The answer to one search."""

    ranks: Ranks
    scores: npt.NDArray[np.float32]
    propensity: npt.NDArray[np.float64] | None
    trace: StepTrace | None


Ask: TypeAlias = Callable[[Sequence[int]], Awaitable[list[dict[str, Any]]]]
"""Run the searches at these places; their answers as `wire.pack_answer` made them."""
SendBitmap: TypeAlias = Callable[[str, str, bytes], Awaitable[Any]]
"""Catalogue id, digest, packed bitmap."""


async def answered(
    searches: Sequence[Search], ask: Ask, send_bitmap: SendBitmap, metrics: Metrics
) -> list[Found | Exception]:
    """The answers of all; those that lacked a bitmap are asked once more, with it."""
    answers = await ask(range(len(searches)))
    unknown = [place for place, answer in enumerate(answers) if answer.get("error") == "unknown_bitmap"]
    if unknown:
        bitmaps = (searches[place].bitmap for place in unknown)
        for bitmap in {one.digest: one for one in bitmaps if one is not None}.values():
            with suppress(EngineError):  # then the answer stays that the bitmap is not known
                await send_bitmap(searches[0].catalog_id, bitmap.digest, pack_bitmap(bitmap))
        for place, answer in zip(unknown, await ask(unknown), strict=True):
            answers[place] = answer
    for answer in answers:
        if "error" in answer:
            metrics.engine_request_errors.labels(answer["error"]).inc()
    return [_found(answer) for answer in answers]


def _found(answer: dict[str, Any]) -> Found | Exception:
    if "error" not in answer:
        propensity = answer["propensity"]
        return Found(
            np.frombuffer(answer["ranks"], RANK_DTYPE).astype(np.int64),
            np.frombuffer(answer["scores"], SCORE_DTYPE),
            None if propensity is None else np.frombuffer(propensity, PROPENSITY_DTYPE),
            unpack_trace(answer["trace"]),
        )
    text = f"{answer['error']}: {answer['message']}"
    is_ours = answer["error"] in ("internal", "unknown_capture", "unknown_catalog", "unknown_bitmap")
    return EngineUnavailableError(text) if is_ours else EngineError(text)
