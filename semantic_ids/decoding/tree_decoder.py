"""A transformers causal LM over many continuations of one prompt, with the prompt's keys and values held once.

All beams of a request are one sequence to the model. A new token is appended to the cache like any other, and a mask
says which cache slots it sees: its prompt and its own ancestors. So choosing beams moves no cache: a beam is a row of
the mask.

    slots     p p p p p | a1 a2 a3 | b1 b2           b1 continues a3, b2 continues a1
    a2 sees   x x x x x |    x     |
    b1 sees   x x x x x |       x  | x
    b2 sees   x x x x x | x        |    x

What a prompt has in common with one that was run before need not be run again (`prompt_cache`).

Some tokens may be *fed back*: their input is their row plus what the model made of the token before them, so a branch
goes on from its own output (S²GR's continuous steps, `PromptRenderer.fed_back`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from semantic_ids.codes import SidError, SidVocabulary, TokenIds
from semantic_ids.decoding.prompt_cache import KeptPrompt, Known, PromptCache

if TYPE_CHECKING:  # transformers takes seconds to load, and what only names these types needs none of it
    from transformers import DynamicCache, PreTrainedModel


_MOST_FILLED = 4  # a row that is run for 4 new tokens, beside one with 300, would be run for 300


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

    def __init__(self, cache: "DynamicCache", root: TreeRows, last_hidden: Tensor, num_known: int = 0) -> None:
        self.cache = cache
        self.root = root  # R = 1: each prompt itself
        self.last_hidden = last_hidden  # (B, 1, D)
        self.num_known = num_known  # tokens of the prompts that were not run: they were known


class TreeDecoder:
    """Runs prompts and tree-shaped continuations of one model. Not thread-safe; no gradient."""

    def __init__(
        self,
        model: "PreTrainedModel",
        vocabulary: SidVocabulary,
        pad_token_id: int = 0,
        *,
        fed_back: Sequence[int] = (),
        prompt_cache: PromptCache | None = None,
    ) -> None:
        """`fed_back` as the prompts have it; a prompt itself has no such token. The model stays where it is.

        `prompt_cache` is this model's alone; a model whose layers keep different states does without it.
        """
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
        self._prompt_cache = prompt_cache if prompt_cache is not None and _has_like_layers(model) else None

    @classmethod
    def load(
        cls,
        model_folder: Path,
        vocabulary: SidVocabulary,
        dtype: Literal["float32", "bfloat16"] = "float32",
        *,
        fed_back: Sequence[int] = (),
        prompt_cache: PromptCache | None = None,
    ) -> "TreeDecoder":
        """The decoder of a transformers checkpoint."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a loaded model is a detail of something larger, which shows its own progress
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
        return cls(model, vocabulary, fed_back=fed_back, prompt_cache=prompt_cache)

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
        """Run B prompts of any lengths, less what the prompt cache has of them."""
        lengths = self._tensor([len(prompt) for prompt in prompts])
        if self._prompt_cache is None:
            cache, last_hidden = self._run(prompts)
            num_known = 0
        else:
            kept, num_known = self._kept(prompts, self._prompt_cache)
            cache = self._cache_of([(one.states, len(one.token_ids)) for one in kept])
            last_hidden = torch.stack([one.last_hidden for one in kept])
        visible = torch.arange(cache.get_seq_length(), device=self.device)[None, None] < lengths[:, None, None]
        root = self._with_output(TreeRows(visible, lengths[:, None]), last_hidden[:, None])
        return TreeState(cache, root, last_hidden[:, None], num_known)

    def _kept(self, prompts: Sequence[TokenIds], prompt_cache: PromptCache) -> tuple[list[KeptPrompt], int]:
        """Each prompt as the model leaves it, and how many tokens of them were known; all are kept."""
        known = [prompt_cache.find(prompt) for prompt in prompts]
        kept: list[KeptPrompt | None] = [one.kept if one is not None and one.is_same else None for one in known]
        rest = {row: len(prompts[row]) - one.num_tokens for row, one in enumerate(known) if one and not one.is_same}
        new = [row for row, one in enumerate(known) if one is None]  # together: their mask is the plain causal one
        for rows in [*_of_like_length(rest), *([new] if new else [])]:
            made = self._kept_after([prompts[row] for row in rows], [known[row] for row in rows])
            for row, one in zip(rows, made, strict=True):
                kept[row] = one
                prompt_cache.put(one)
        return [one for one in kept if one is not None], sum(one.num_tokens for one in known if one is not None)

    def _kept_after(self, prompts: Sequence[TokenIds], known: Sequence[Known | None]) -> list[KeptPrompt]:
        """Run what is not known of G prompts: of some of each, or of all of none."""
        begun = [one for one in known if one is not None]
        rest = [prompt[one.num_tokens :] for prompt, one in zip(prompts, begun, strict=True)] if begun else prompts
        cache, last_hidden = self._run(rest, begun)
        states = torch.stack([state for layer in cache.layers for state in (layer.keys, layer.values)])
        first = states.shape[3] - max(map(len, rest))  # the slot of the first token that was run
        made = []
        for row, prompt in enumerate(prompts):
            parts = [begun[row].kept.states[:, :, : begun[row].num_tokens]] if begun else []
            parts.append(states[:, row, :, first : first + len(rest[row])])
            made.append(KeptPrompt(prompt, torch.cat(parts, dim=2), last_hidden[row].clone()))
        return made

    def _run(self, tokens: Sequence[TokenIds], begun: Sequence[Known] = ()) -> tuple["DynamicCache", Tensor]:
        """Run G rows of tokens, each behind its own beginning where there are any: the cache, each row's output (G, D).

        The cache has the beginnings, filled up to the longest, and then the tokens, filled up to the longest.
        """
        from transformers import DynamicCache

        lengths = self._tensor([len(row) for row in tokens])
        longest = max(map(len, tokens))
        token_ids = torch.full((len(tokens), longest), self._pad_token_id)
        for row, own in enumerate(tokens):
            token_ids[row, : len(own)] = torch.from_numpy(own)
        # Padding is on the right, behind every real token, so without a beginning the plain causal mask is right.
        cache, mask, position = DynamicCache(config=self.model.config), None, None
        if begun:
            before = self._tensor([one.num_tokens for one in begun])[:, None]  # (G, 1)
            cache = self._cache_of([(one.kept.states, one.num_tokens) for one in begun])
            place = torch.arange(longest, device=self.device)
            is_before = torch.arange(cache.get_seq_length(), device=self.device) < before  # (G, slots before)
            causal = (place[None] <= place[:, None]).expand(len(tokens), -1, -1)
            mask = torch.cat((is_before[:, None].expand(-1, longest, -1), causal), dim=-1)[:, None]
            position = before + place
        output = self.model.base_model(
            input_ids=token_ids.to(self.device),
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        rows = torch.arange(len(tokens), device=self.device)
        return cache, output.last_hidden_state[rows, lengths - 1]

    def _cache_of(self, beginnings: Sequence[tuple[Tensor, int]]) -> "DynamicCache":
        """A cache of the first so many tokens of each states (2E, H, P, D_h), filled up to the longest."""
        from transformers import DynamicCache

        num_states, num_heads, _, width = beginnings[0][0].shape
        longest = max(length for _, length in beginnings)
        joined = beginnings[0][0].new_zeros((num_states, len(beginnings), num_heads, longest, width))
        for row, (states, length) in enumerate(beginnings):
            joined[:, row, :, :length] = states[:, :, :length]
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(zip(joined[0::2], joined[1::2], strict=True)):
            cache.update(keys, values, layer)
        return cache

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

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


def _of_like_length(lengths: Mapping[int, int]) -> list[list[int]]:
    """Rows in groups, so that none is filled up to more than `_MOST_FILLED` times its length."""
    groups: list[list[int]] = []
    for row in sorted(lengths, key=lengths.__getitem__):
        if groups and lengths[row] <= _MOST_FILLED * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _has_like_layers(model: "PreTrainedModel") -> bool:
    """Whether every layer keeps keys and values of the whole sequence, all of one shape."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model.base_model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache)
    return len({state.shape for layer in cache.layers for state in (layer.keys, layer.values)}) == 1 and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def level_head(model: "PreTrainedModel", vocabulary: SidVocabulary, level: int) -> tuple[Tensor, Tensor | None]:
    """The output rows of one level's codes, (K, D), and their bias, (K,) or None."""
    return _head(model, vocabulary.block(level))


def _head(model: "PreTrainedModel", block: slice) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    bias = head.bias[block] if getattr(head, "bias", None) is not None else None
    return head.weight[block], bias
