"""Stage `publish`: everything trained → one bundle, reloaded and tried before it is made current; and the histories."""

import json
from pathlib import Path

import numpy as np
from pydantic import Field

from semantic_ids.bundle import MANIFEST, Bundle, BundleError, BundleParts, current_id, publish
from semantic_ids.decoding.beam import constrained_beam
from semantic_ids.decoding.tree_decoder import TreeDecoder
from semantic_ids.filters import ItemFilter
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import History
from training.collaborative import ItemKnn
from training.interactions import EVENT_TYPES, Dataset
from training.stage import StageConfig, StageError, StageFolder, Summary, progress_bar, write_atomically
from training.tokenizer.stage import TokenizedCatalog

HISTORIES = "histories.jsonl"


class PublishConfig(StageConfig):
    """What publication does besides writing."""

    activate: bool = Field(True, description="make the new bundle the current one")


class PublishSummary(Summary):
    """Where the bundle is."""

    bundle_id: str
    bundles: str
    histories: str
    num_bytes: int


def run(
    config: PublishConfig, parts: BundleParts, dataset: Dataset, bundles: Path, folder: StageFolder
) -> PublishSummary:
    """Write the bundle into `bundles/`, and every user's history as JSON lines for `sidrec-serve import-histories`."""
    with progress_bar("publish", 2) as bar:
        try:
            bundle = publish(bundles, parts, try_out, activate_it=config.activate)
        except BundleError as error:
            raise StageError(f"the new bundle was not made current: {error}") from error
        bar.advance()
        write_atomically(folder.path / HISTORIES, histories_as_json_lines(dataset))
        bar.advance()
    summary = PublishSummary(
        bundle_id=bundle.bundle_id,
        bundles=str(bundles),
        histories=str(folder.path / HISTORIES),
        num_bytes=sum(record.num_bytes for record in bundle.manifest.files.values()),
    )
    folder.finish(summary)
    return summary


def is_still_there(config: PublishConfig, summary: PublishSummary, bundles: Path) -> bool:
    """Whether a finished publication still holds: its bundle exists and, if it was to be active, some bundle is."""
    try:
        return (bundles / summary.bundle_id / MANIFEST).exists() and (not config.activate or bool(current_id(bundles)))
    except BundleError:
        return False


def try_out(bundle: Bundle) -> None:
    """Answer one request from the reloaded bundle; `BundleError` if the answer is not ten legal, unseen items."""
    decoder = TreeDecoder.load(bundle.model_folder, bundle.vocabulary, fed_back=bundle.renderer.fed_back)
    history = bundle.catalog.by_popularity[: min(3, len(bundle.catalog) - 1)]
    unseen = ItemFilter.of(len(bundle.catalog), deny=history)
    state = decoder.prefill([bundle.renderer.render(History.of(bundle.catalog, history)).token_ids])
    answer = constrained_beam(decoder, bundle.catalog.trie, state, [unseen], [10], forced=bundle.renderer.forced)[0]
    expected = min(10, unseen.num_eligible)
    if len(answer.ranks) < expected or np.isin(answer.ranks, history).any() or not np.isfinite(answer.scores).all():
        raise BundleError(f"bundle {bundle.bundle_id} answered its first request with {answer}: it is not served")


def neighbours_by_rank(knn: ItemKnn, tokenized: TokenizedCatalog) -> Neighbours:
    """The kNN's table with catalogue ranks for item indices, each row's strongest first."""
    table = knn.table.tocoo()
    rows = tokenized.rank_of_item[table.coords[0]]
    columns = tokenized.rank_of_item[table.coords[1]]
    order = np.lexsort((-table.data, rows))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(tokenized.catalog))))).astype(np.int64)
    return Neighbours(offsets, columns[order].astype(np.uint32), table.data[order].astype(np.float32))


def histories_as_json_lines(dataset: Dataset) -> bytes:
    """One user a line: `{"user_id": …, "events": [[item_id, timestamp, event_type], …]}`, oldest first."""
    lines = []
    for user, user_id in enumerate(dataset.user_ids):
        where = slice(int(dataset.sequences.offsets[user]), int(dataset.sequences.offsets[user + 1]))
        events = [
            [dataset.item_ids[item], float(timestamp), EVENT_TYPES[kind]]
            for item, timestamp, kind in zip(
                dataset.sequences.items[where], dataset.timestamps[where], dataset.event_types[where], strict=True
            )
        ]
        lines.append(json.dumps({"user_id": user_id, "events": events}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()
