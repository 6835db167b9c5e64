"""The rationale of one request: what its thought may say, told as far as it is checked, whole with the answer.

It hears the tokens of a thought, in whatever pieces they come, and tells whole sentences: those that name only items of
the history, or none, at once; from the first other one on, what passes once the answer is known. The pieces together
are the rationale of the answer.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import structlog

from semantic_ids.bundle import Bundle
from semantic_ids.trie import Ranks
from service.catalog_titles import CatalogTitles
from service.metrics import Metrics
from service.rationale_check import NamedItems, RationaleCheck

log = structlog.get_logger(__name__)

TextListener: TypeAlias = Callable[[str], None]
"""Called on the event loop with the checked text of a thought, as it comes."""


class Rationale:
    """One request's; made when its history is known, so that the titles are at hand when its thought is over."""

    def __init__(
        self, bundle: Bundle, titles: CatalogTitles, history: Ranks, metrics: Metrics, on_text: TextListener | None
    ) -> None:
        self._bundle = bundle
        self._titles = titles
        self._metrics = metrics
        self._on_text = on_text
        self._token_ids: list[int] = []
        self._check = RationaleCheck(bundle.catalog.space, titles, NamedItems.of(bundle.catalog, history))
        self._is_whole = False
        self._loop = asyncio.get_running_loop()
        titles.prepare(None if titles.is_ready or on_text is None else self._titles_came)

    def __call__(self, token_ids: Sequence[int]) -> None:
        """Hear more tokens of the thought."""
        self._token_ids += token_ids
        self._tell_checked()

    async def finished(self, thought: Sequence[int], answer: Ranks, within_s: float) -> str | None:
        """The rationale, now that its thought is whole and the items of the answer are known; None if nothing is left.

        None also where the titles are not at hand within so many seconds: what cannot be checked is not shown.
        """
        try:
            async with asyncio.timeout(within_s):
                await self._titles.ready()
            self._is_whole = True
            self._token_ids = list(thought)
            rest = await asyncio.to_thread(self._finish, answer)
        except Exception as error:  # the items are there, and do not wait for what explains them
            log.warning("rationale_not_checked", error=type(error).__name__, told=len(self._check.text))
            return self._check.text or None
        for kind, number in self._check.cuts.items():
            self._metrics.rationale_cuts.labels(kind).inc(number)
        self._tell(rest)
        return self._check.text or None

    def _titles_came(self) -> None:
        with suppress(RuntimeError):  # the service has stopped meanwhile
            self._loop.call_soon_threadsafe(self._tell_checked)

    def _tell_checked(self) -> None:
        if self._on_text is not None and self._titles.is_ready and not self._is_whole:
            self._tell(self._check.grow(self._text()))

    def _finish(self, answer: Ranks) -> str:
        return self._check.finish(self._text(), NamedItems.of(self._bundle.catalog, answer))

    def _text(self) -> str:
        return self._bundle.renderer.thought_text(self._token_ids)

    def _tell(self, text: str) -> None:
        if text and self._on_text is not None:
            self._on_text(text)
