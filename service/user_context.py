"""Whose taste a request is about: the stored or inline history, cut and resolved to what a prompt shows."""

from dataclasses import dataclass

import numpy as np

from semantic_ids.catalog import Catalog
from semantic_ids.prompt import History, PromptRenderer, window_start
from semantic_ids.trie import Ranks
from service.histories import Histories, HistoryUnavailableError
from service.metrics import Metrics
from service.schemas import UserRequest


@dataclass(frozen=True)
class UserContext:
    """What a recommendation knows of its user."""

    history: Ranks
    """Known items of the prompt's window, oldest first."""
    seen: frozenset[str]
    excluded: frozenset[str]
    """Disliked or hidden: never recommended, whatever `exclude_seen` says."""
    ignored_items: list[str]
    history_unavailable: bool
    num_events: int = 0
    """History events ever accepted; of an inline history, its length."""


class UserContexts:
    """Reads contexts from Redis and requests."""

    def __init__(self, histories: Histories, catalog: Catalog, renderer: PromptRenderer, metrics: Metrics) -> None:
        self._histories = histories
        self._catalog = catalog
        self._renderer = renderer
        self._metrics = metrics

    async def load(self, request: UserRequest, tenant: str, timeout_s: float) -> UserContext:
        """The context of one request about a user of the tenant's.

        Redis failing is an answer too: what is inline is used, what the user was last known to have seen or excluded
        stays hidden, and the flag is set. It is not waited for longer than `timeout_s`, what is left of the request's
        deadline.
        """
        seen: frozenset[str] = frozenset()
        excluded: frozenset[str] = frozenset()
        shown: list[str] = []
        total, unavailable = 0, False
        if request.user_id is not None:
            histories = self._histories.of(tenant)
            try:
                most = self._renderer.spec.max_history
                state = await histories.load(request.user_id, last=most, timeout_s=timeout_s)
            except HistoryUnavailableError:
                self._metrics.history_failures.inc()
                unavailable = True
                known = histories.last_known(request.user_id)
                seen, excluded = known.seen, known.excluded
            else:
                seen, excluded, total = state.seen, state.excluded, state.total
                shown = state.items
        inline = request.inline_history()
        if inline is not None:
            seen |= frozenset(inline)
            excluded |= frozenset(request.inline_exclusions())
            shown, total = inline, len(inline)
        first = window_start(total, self._renderer.spec.max_history) - (total - len(shown))
        ranks, unknown = self._catalog.ranks_of(shown[max(0, first) :])
        if inline is not None:  # what the caller named is accounted for, also where no prompt shows it
            _, unknown = self._catalog.ranks_of(dict.fromkeys(request.inline_items()))
        return UserContext(ranks, seen, excluded, list(dict.fromkeys(unknown)), unavailable, total)

    def prompt(self, context: UserContext, *, thinking: bool) -> np.ndarray:
        """The token ids of the prompt that asks for a SID, or with `thinking` for a thought before it."""
        history = History.of(self._catalog, context.history, shows_titles=self._renderer.shows_titles)
        return self._renderer.render(history, thinking=thinking).token_ids
