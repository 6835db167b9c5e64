"""What a model from scratch knows of its items before it is trained, and one memory of each for reading and writing.

A code's input row and output row are the same vector up to a scale, and that vector is its own part plus a projection,
the same for all codes, of the texts of the items beneath it: rare items so share what is learned of like ones. The own
part starts at the items' SASRec vectors; a projection of those would go on remembering the events that made them
(docs/experiments.md). All of it is training's: `bake` writes plain rows, and that is what a checkpoint holds.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary
from semantic_ids.quantizer import Vectors
from training.directions import strongest_directions
from training.legal_softmax import temperature_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_WIDTH = 128
"""Of the text vectors' strongest directions; the projection of all of them would cost more than the model."""

_INPUT_SCALE = 8.0
_ROW_STD = 0.02


@dataclass(frozen=True)
class KnownItems:
    """What is known of N items; both parts have 1 as the mean square of their numbers."""

    text: Vectors  # (N, F)
    collaborative: Vectors  # (N, C)

    @classmethod
    def of(cls, text: Vectors, collaborative: Vectors) -> "KnownItems":
        """From any vectors: of the text the strongest directions, centred."""
        return cls(_scaled(strongest_directions(text, TEXT_WIDTH)), _scaled(np.asarray(collaborative, np.float32)))

    def select(self, items: npt.NDArray[np.integer]) -> "KnownItems":
        """Of these items, in this order."""
        return KnownItems(self.text[items], self.collaborative[items])


class ItemMemory(nn.Module):
    """The parameters behind a model's two tables: a row for each of U tokens in use; the others have zeros."""

    used: Tensor  # (U,) token ids: the special ones, and those of codes that some item has
    place: Tensor  # (V,) of each token among them; U, which is none, for the others
    text: Tensor  # (U, F)

    def __init__(self, catalog: Catalog, vocabulary: SidVocabulary, known: KnownItems, width: int) -> None:
        """`known` by catalogue rank."""
        super().__init__()
        self._num_tokens = vocabulary.vocab_size
        special = np.arange(vocabulary.first_token_id)
        used = np.concatenate([special, np.unique(vocabulary.token_ids(catalog.codes))])
        text = torch.from_numpy(_mean_by_token(catalog, vocabulary, known.text)[used])
        place = np.full(vocabulary.vocab_size, len(used))
        place[used] = np.arange(len(used))
        self.register_buffer("used", torch.from_numpy(used), persistent=False)
        self.register_buffer("place", torch.from_numpy(place), persistent=False)
        self.register_buffer("text", text, persistent=False)
        start = torch.from_numpy(_mean_by_token(catalog, vocabulary, known.collaborative)[used])
        self.own = nn.Parameter(torch.randn(len(used), width) * _ROW_STD + _placed(start, width))
        self.projection = nn.Linear(text.shape[1], width, bias=False)
        nn.init.normal_(self.projection.weight, std=_ROW_STD / text.shape[1] ** 0.5)
        self.input_scale = nn.Parameter(torch.tensor([_INPUT_SCALE]))  # (1,): a bare number cannot be in shards

    def rows(self) -> Tensor:
        """Output rows of the tokens in use, (U, D); an input row is `input_scale` times as long."""
        return torch.addmm(self.own, self.text, self.projection.weight.T)

    def tables(self) -> tuple[Tensor, Tensor]:
        """What a plain model has: input rows and output rows of all tokens, (V, D) each."""
        rows = self.rows()
        table = rows.new_zeros(len(self.place), rows.shape[1]).index_copy(0, self.used, rows)
        return table * self.input_scale, table

    def install(self, model: "PreTrainedModel") -> None:
        """Become the source of the model's tables: they are parameters no longer, and `bake` sets them."""
        embeddings = model.get_input_embeddings()
        for module in (embeddings, model.get_output_embeddings()):
            del module.weight
        embeddings.memory = self
        # What is read is scaled, not the table: a few thousand rows in place of all.
        embeddings.register_forward_hook(lambda _module, _inputs, read: read * self.input_scale)
        self.bake(model)

    def bake(self, model: "PreTrainedModel") -> None:
        """Set both tables to what the parameters are now, of tokens in use alone: `rows_of` says which row is whose.

        A gradient of the tables reaches the parameters.
        """
        model.get_input_embeddings().weight = model.get_output_embeddings().weight = self.rows()


def memory_of(model: "PreTrainedModel") -> ItemMemory | None:
    """What `install` put into a model; None for one with tables of its own."""
    memory: ItemMemory | None = getattr(model.get_input_embeddings(), "memory", None)
    return memory


def rows_of(model: "PreTrainedModel", token_ids: Tensor) -> Tensor:
    """Where tokens stand in the model's tables: at their ids, unless there is a memory, which has fewer rows."""
    memory = memory_of(model)
    return token_ids if memory is None else memory.place[token_ids]


def plain_state(model: "PreTrainedModel") -> dict[str, Tensor]:
    """The weights of a plain checkpoint: without any memory, with both tables, and with its temperature in the head."""
    memory, temperature = memory_of(model), temperature_of(model)
    with torch.no_grad():
        tables = () if memory is None else memory.tables()
    state: dict[str, Tensor] = model.state_dict()  # which parts a model in shards, so that nobody computes after it
    names = {module: name for name, module in model.named_modules()}
    head = f"{names[model.get_output_embeddings()]}.weight"
    if memory is not None:
        state = {name: tensor for name, tensor in state.items() if ".memory." not in name}
        state[f"{names[model.get_input_embeddings()]}.weight"], state[head] = (table.contiguous() for table in tables)
    return state if temperature == 1 else state | {head: state[head] / temperature}


def _scaled(vectors: Vectors) -> Vectors:
    scaled: Vectors = vectors / np.float32(max(float(np.sqrt((vectors**2).mean())), 1e-12))
    return scaled


def _placed(vectors: Tensor, width: int) -> Tensor:
    """Vectors (V, C) in random orthogonal directions of `width`, (V, width), as long on average as a row's noise."""
    directions = torch.linalg.qr(torch.randn(max(width, vectors.shape[1]), min(width, vectors.shape[1])))[0]
    placed: Tensor = vectors @ (directions.T if width >= vectors.shape[1] else directions)
    placed *= _ROW_STD * (width / min(width, vectors.shape[1])) ** 0.5
    return placed


def _mean_by_token(catalog: Catalog, vocabulary: SidVocabulary, features: Vectors) -> Vectors:
    """The mean of the features (N, F) of the items that have a token, (V, F)."""
    tokens = vocabulary.token_ids(catalog.codes)  # (N, L)
    sums = np.zeros((vocabulary.vocab_size, features.shape[1]), np.float32)
    for level in range(tokens.shape[1]):
        np.add.at(sums, tokens[:, level], features)
    counts = np.maximum(np.bincount(tokens.ravel(), minlength=vocabulary.vocab_size), 1)
    means: Vectors = sums / counts.astype(np.float32)[:, None]
    return means
