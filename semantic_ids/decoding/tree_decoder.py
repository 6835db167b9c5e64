"""A transformers causal LM over many continuations of one prompt, with the prompt's keys and values held once.

All beams of a request are one sequence to the model. A new token is appended to the cache like any other, and a mask
says which cache slots it sees: its prompt and its own ancestors. So choosing beams moves no cache: a beam is a row of
the mask.

    slots     p p p p p | a1 a2 a3 | b1 b2           b1 continues a3, b2 continues a1
    a2 sees   x x x x x |    x     |
    b1 sees   x x x x x |       x  | x
    b2 sees   x x x x x | x        |    x

Some tokens may be *fed back*: their input is their row plus what the model made of the token before them, so a branch
goes on from its own output (S²GR's continuous steps, `PromptRenderer.fed_back`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from semantic_ids.codes import SidError, SidVocabulary, TokenIds

if TYPE_CHECKING:  # transformers takes seconds to load, and what only names these types needs none of it
    from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class TreeRows:
    """R open continuations of each of B prompts."""

    visible: Tensor  # (B, R, slots so far) bool
    next_position: Tensor  # (B, R)
    output: Tensor | None = None  # (B, R, D) of each one's last token, where a decoder feeds some tokens back

    def continued(self, parents: Tensor, num_slots: int) -> "TreeRows":
        """The rows after one more token each: parents (B, R'); the cache held `num_slots` slots before them.

        Every new token sees what its parent saw, and itself; its siblings, in the slots beside it, it does not see.
        """
        num_prompts, num_new = parents.shape
        visible = functional.pad(self.visible, (0, num_slots - self.visible.shape[-1]))
        visible = visible.gather(1, parents[..., None].expand(-1, -1, num_slots))
        itself = torch.eye(num_new, dtype=torch.bool, device=parents.device).expand(num_prompts, -1, -1)
        return TreeRows(torch.cat((visible, itself), dim=-1), self.next_position.gather(1, parents) + 1)


class PromptState(Protocol):
    """Prompts that were run, ready to be continued."""

    @property
    def root(self) -> TreeRows:
        """R = 1: each prompt itself."""
        ...

    @property
    def last_hidden(self) -> Tensor:
        """What the model makes of each prompt's last token, (B, 1, D)."""
        ...


StateT = TypeVar("StateT", bound=PromptState)
StateT_contra = TypeVar("StateT_contra", bound=PromptState, contravariant=True)


class Decoder(Protocol[StateT_contra]):
    """A model that runs tree-shaped continuations of prompts: what the beam needs of one."""

    @property
    def vocabulary(self) -> SidVocabulary:
        """Where the SID tokens are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def extend(
        self, state: StateT_contra, rows: TreeRows, parents: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, TreeRows]:
        """Append a token to each chosen row: parents (B, R'), token_ids (B, R') → hidden (B, R', D), the new rows."""
        ...

    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """The K logits of one level, (M, D) → (M, K)."""
        ...


class TreeState:
    """The cache that a batch of prompts and all their continuations share."""

    def __init__(self, cache: "DynamicCache", root: TreeRows, last_hidden: Tensor) -> None:
        self.cache = cache
        self.root = root  # R = 1: each prompt itself
        self.last_hidden = last_hidden  # (B, 1, D)


class TreeDecoder:
    """Runs prompts and tree-shaped continuations of one model. Not thread-safe; no gradient."""

    def __init__(
        self,
        model: "PreTrainedModel",
        vocabulary: SidVocabulary,
        pad_token_id: int = 0,
        *,
        fed_back: Sequence[int] = (),
    ) -> None:
        """`fed_back` as the prompts have it; a prompt itself has no such token. The model stays where it is."""
        size = model.config.get_text_config().vocab_size
        if size != vocabulary.vocab_size:
            raise SidError(f"the model's vocabulary of {size} is not the SID vocabulary's {vocabulary.vocab_size}")
        attention = model.config._attn_implementation
        if attention != "sdpa":  # another one reads the tree mask differently, and answers wrongly without a word
            raise ValueError(f"the tree mask needs attention implementation 'sdpa', and this model has {attention!r}")
        self.model = model.train(False)
        self._device: torch.device = model.device  # here: transformers looks for it anew each time
        self._vocabulary = vocabulary
        self._pad_token_id = pad_token_id
        self._fed_back = torch.tensor(fed_back, device=self.device)

    @classmethod
    def load(
        cls,
        model_folder: Path,
        vocabulary: SidVocabulary,
        dtype: Literal["float32", "bfloat16"] = "float32",
        *,
        fed_back: Sequence[int] = (),
    ) -> "TreeDecoder":
        """The decoder of a transformers checkpoint."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a loaded model is a detail of something larger, which shows its own progress
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
        return cls(model, vocabulary, fed_back=fed_back)

    @property
    def vocabulary(self) -> SidVocabulary:
        """Where the SID tokens are."""
        return self._vocabulary

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @property
    def max_positions(self) -> int | None:
        """Most tokens of one sequence; None where the architecture sets no limit."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[TokenIds]) -> TreeState:
        """Run B prompts of any lengths."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(lengths.max())
        token_ids = torch.full((len(prompts), longest), self._pad_token_id)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = torch.from_numpy(prompt)
        # Padding is on the right, behind every real token, so the plain causal mask is already right.
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        output = self.model.base_model(input_ids=token_ids.to(self.device), past_key_values=cache, use_cache=True)
        rows = torch.arange(len(prompts), device=self.device)
        last_hidden = output.last_hidden_state[rows, lengths - 1][:, None]  # (B, 1, D)
        visible = torch.arange(longest, device=self.device)[None, None] < lengths[:, None, None]
        return TreeState(cache, self._with_output(TreeRows(visible, lengths[:, None]), last_hidden), last_hidden)

    @torch.inference_mode()
    def extend(self, state: TreeState, rows: TreeRows, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, TreeRows]:
        """Append a token to each chosen row: parents (B, R'), token_ids (B, R') → hidden (B, R', D), the new rows."""
        position = rows.next_position.gather(1, parents)
        new_rows = rows.continued(parents, state.cache.get_seq_length())
        output = self.model.base_model(
            inputs_embeds=self._inputs(rows, parents, token_ids),
            attention_mask=new_rows.visible[:, None],
            position_ids=position,
            past_key_values=state.cache,
            use_cache=True,
        )
        return output.last_hidden_state, self._with_output(new_rows, output.last_hidden_state)

    def _inputs(self, rows: TreeRows, parents: Tensor, token_ids: Tensor) -> Tensor:
        """The tokens' rows, with the output of the parent added where it is fed back, (B, R', D)."""
        inputs: Tensor = self.model.get_input_embeddings()(token_ids)
        if rows.output is None:
            return inputs
        is_fed_back = torch.isin(token_ids, self._fed_back)[..., None]
        return inputs + rows.output.take_along_dim(parents[..., None], dim=1) * is_fed_back

    def _with_output(self, rows: TreeRows, output: Tensor) -> TreeRows:
        return replace(rows, output=output) if len(self._fed_back) else rows

    @torch.inference_mode()
    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """The K logits of one level, (M, D) → (M, K)."""
        return functional.linear(hidden, *level_head(self.model, self.vocabulary, level))

    @torch.inference_mode()
    def token_logits(self, hidden: Tensor) -> Tensor:
        """The logits of every token, for free text, (M, D) → (M, V)."""
        return functional.linear(hidden, *_head(self.model, slice(self.vocabulary.vocab_size)))


def level_head(model: "PreTrainedModel", vocabulary: SidVocabulary, level: int) -> tuple[Tensor, Tensor | None]:
    """The output rows of one level's codes, (K, D), and their bias, (K,) or None."""
    return _head(model, vocabulary.block(level))


def _head(model: "PreTrainedModel", block: slice) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    bias = head.bias[block] if getattr(head, "bias", None) is not None else None
    return head.weight[block], bias
