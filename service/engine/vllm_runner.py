"""Tree-shaped continuations on a model that vLLM runs. The only module that reads vLLM's private state (0.32).

vLLM prefills a prompt as it does any other, with its prefix cache and its scheduling. When the last token of the prompt
has been run, its keys, values and last hidden state are copied out of the paged cache (`Capture`). From there the
project's own beam goes on (`PagedTreeDecoder`), through vLLM's own modules and weights: for the time of one forward
pass every attention layer reads and writes the captured keys under a tree mask (`TreeAttention`) instead of the pages.

    prompt ──vLLM prefill──► pages ──KvReader──► Capture ──PagedState──► constrained_beam
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from semantic_ids.codes import SidVocabulary
from semantic_ids.decoding.tree_decoder import TreeRows

MAX_MASK_PATTERN = 63
"""Numbers up to this are exact in every dtype that a cache may have."""


class UnsupportedModelError(Exception):
    """A model, or a way of running it, that the tree-shaped continuation does not cover. Said at start."""


@dataclass(frozen=True)
class Capture:
    """One prompt's keys and values, with room behind them for its continuations."""

    keys: Tensor  # (layers, heads, T + room, D)
    values: Tensor  # (layers, heads, T + room, D)
    hidden: Tensor  # (D,)
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Of the keys and values."""
        return self.keys.nbytes + self.values.nbytes


class KvReader:
    """Reads keys and values out of one layer kind's paged cache, whatever the attention kernel's order inside a block.

    The order is learned once, by letting the layer's own kernel write numbers into an empty block: where number n
    comes to lie is where element n is read.
    """

    def __init__(self, layer: Attention, block_size: int) -> None:
        cache = layer.kv_cache
        if cache.ndim != 4 or cache.shape[1] != layer.num_kv_heads or layer.head_size != layer.head_size_v:
            raise UnsupportedModelError(
                f"a KV cache of shape {tuple(cache.shape)} for {layer.num_kv_heads} heads of {layer.head_size}: "
                "expected (blocks, heads, block, keys and values)"
            )
        self._kernel_block = cache.shape[2]
        self._head_size = layer.head_size
        self._kernel_blocks_per_block = block_size // self._kernel_block
        self._key_places = self._learn(layer, is_key=True)
        self._value_places = self._learn(layer, is_key=False)

    def read(self, layer: Attention, block_ids: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Copy the first T tokens of these blocks into `keys` and `values`, both (heads, T, D)."""
        cache = layer.kv_cache
        num_tokens = keys.shape[1]
        ratio = self._kernel_blocks_per_block
        blocks = torch.tensor(block_ids, device=cache.device)
        if ratio > 1:
            blocks = (blocks[:, None] * ratio + torch.arange(ratio, device=cache.device)).flatten()
        pages = cache[blocks[: -(-num_tokens // self._kernel_block)]].flatten(2)  # (blocks, heads, 2 · block · D)
        for places, out in ((self._key_places, keys), (self._value_places, values)):
            out.copy_(places.of(pages).transpose(0, 1).flatten(1, 2)[:, :num_tokens])

    def _learn(self, layer: Attention, *, is_key: bool) -> "_Places":
        cache = layer.kv_cache
        block, size = self._kernel_block, self._head_size
        numbers = torch.arange(block * size, device=cache.device)
        place_of = torch.zeros(2 * block * size, dtype=torch.long, device=cache.device)
        written = torch.zeros(2 * block * size, dtype=torch.bool, device=cache.device)
        dtype = cache.dtype
        for shift in range(0, max(1, (block * size - 1).bit_length()), 6):
            digits = ((numbers >> shift) & MAX_MASK_PATTERN) + 1
            pattern = digits.view(block, 1, size).expand(block, layer.num_kv_heads, size).to(dtype).contiguous()
            nothing = torch.zeros_like(pattern)
            page = torch.zeros_like(cache[:1])
            slots = torch.arange(block, device=cache.device)
            layer.impl.do_kv_cache_update(
                layer, pattern if is_key else nothing, nothing if is_key else pattern, page, slots
            )
            raw = page[0, 0].flatten().float().round().long()
            written |= raw > 0
            place_of += torch.where(raw > 0, (raw - 1) << shift, 0)
        places = torch.full((block * size,), -1, device=cache.device)
        where = written.nonzero()[:, 0]
        places[place_of[where]] = where
        if len(where) != block * size or bool((places < 0).any()):
            raise UnsupportedModelError(
                f"the attention kernel's KV layout cannot be read: {len(where)} of {block * size} places were found"
            )
        return _Places.of_indices(places.view(block, size))


@dataclass(frozen=True)
class _Places:
    """Where the (block, D) elements of a block lie: as strides where they are regular, else one by one."""

    shape: tuple[int, int]
    start: int
    strides: tuple[int, int] | None
    indices: Tensor  # (block · D,)

    @classmethod
    def of_indices(cls, indices: Tensor) -> "_Places":
        block, size = indices.shape
        start = int(indices[0, 0])
        by_token = int(indices[1, 0]) - start if block > 1 else 0
        by_dimension = int(indices[0, 1]) - start if size > 1 else 0
        regular = (
            start
            + by_token * torch.arange(block, device=indices.device)[:, None]
            + by_dimension * torch.arange(size, device=indices.device)
        )
        strides = (by_token, by_dimension) if bool((regular == indices).all()) else None
        return cls((block, size), start, strides, indices.flatten())

    def of(self, pages: Tensor) -> Tensor:
        """(blocks, heads, 2 · block · D) → (blocks, heads, block, D)."""
        blocks, heads, width = pages.shape
        if self.strides is None:
            return pages.index_select(2, self.indices).view(blocks, heads, *self.shape)
        return pages.as_strided(
            (blocks, heads, *self.shape), (heads * width, width, *self.strides), pages.storage_offset() + self.start
        )


class PagedState:
    """A group of captured prompts side by side: one tensor that their continuations are written behind."""

    def __init__(self, captures: Sequence[Capture], room: int) -> None:
        lengths = torch.tensor([capture.num_tokens for capture in captures], device=captures[0].keys.device)
        self.num_slots = int(lengths.max())
        if len(captures) == 1 and captures[0].keys.shape[2] >= self.num_slots + room:
            self.keys, self.values = captures[0].keys[:, None], captures[0].values[:, None]
        else:
            self.keys = _side_by_side([capture.keys for capture in captures], lengths, self.num_slots + room)
            self.values = _side_by_side([capture.values for capture in captures], lengths, self.num_slots + room)
        visible = torch.arange(self.num_slots, device=lengths.device) < lengths[:, None, None]
        self.root = TreeRows(visible, lengths[:, None])
        self.last_hidden = torch.stack([capture.hidden for capture in captures])[:, None]

    def make_room(self, num_new: int) -> None:
        """Widen the tensors where the room that was foreseen does not do."""
        missing = self.num_slots + num_new - self.keys.shape[3]
        if missing > 0:
            self.keys = functional.pad(self.keys, (0, 0, 0, missing))
            self.values = functional.pad(self.values, (0, 0, 0, missing))


def _side_by_side(parts: Sequence[Tensor], lengths: Tensor, num_slots: int) -> Tensor:
    """Captured tensors (layers, heads, ≥ T, D) as one (layers, B, heads, num_slots, D), zero behind each."""
    layers, heads, _, size = parts[0].shape
    together = parts[0].new_zeros((layers, len(parts), heads, num_slots, size))
    for place, (part, length) in enumerate(zip(parts, lengths.tolist(), strict=True)):
        together[:, place, :, :length] = part[:, :, :length]
    return together


@dataclass
class _Step:
    """One tree-shaped forward pass, as the attention layers need it."""

    state: PagedState
    mask: Tensor  # (B, 1, group · R, slots) additive
    num_new: int  # R


class TreeAttention:
    """Takes an attention layer's place for one forward pass: appends the new keys, attends under the tree mask."""

    def __init__(self, place: int, scale: float, num_kv_heads: int) -> None:
        self._place = place
        self._scale = scale
        self._num_kv_heads = num_kv_heads

    def forward(  # vLLM's own signature
        self,
        _layer: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _kv_cache: Tensor,
        step: _Step,
        output: Tensor,
        **_scales: Any,  # noqa: ANN401
    ) -> Tensor:
        """Query (B · R, heads, D), key and value (B · R, kv heads, D) → output (B · R, heads, D), in place."""
        state, num_new = step.state, step.num_new
        batch = query.shape[0] // num_new
        heads, size = self._num_kv_heads, query.shape[-1]
        group = query.shape[1] // heads
        end = state.num_slots + num_new
        keys, values = state.keys[self._place], state.values[self._place]  # (B, heads, slots, D)
        keys[:, :, state.num_slots : end] = key.view(batch, num_new, heads, size).transpose(1, 2)
        values[:, :, state.num_slots : end] = value.view(batch, num_new, heads, size).transpose(1, 2)
        # The query heads that share a key head are further rows of it: no key is repeated.
        rows = query.view(batch, num_new, heads, group, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        attended = functional.scaled_dot_product_attention(
            rows, keys[:, :, :end], values[:, :, :end], attn_mask=step.mask, scale=self._scale
        )
        attended = attended.view(batch, heads, group, num_new, size).permute(0, 3, 1, 2, 4)
        output.view(batch, num_new, heads, group, size).copy_(attended)
        return output


class PagedTreeDecoder:
    """`semantic_ids.decoding`'s decoder on vLLM's model. Runs between two engine steps, on the worker's thread."""

    def __init__(self, model: Any, vllm_config: VllmConfig, vocabulary: SidVocabulary) -> None:  # noqa: ANN401
        _refuse_unsupported(vllm_config)
        self._model = model
        self._vllm_config = vllm_config
        self._vocabulary = vocabulary
        self._layers = _attention_layers(vllm_config)
        first = next(iter(self._layers.values()))
        self._reader = KvReader(first, vllm_config.cache_config.block_size)
        self._attentions = [
            TreeAttention(place, layer.impl.scale, layer.num_kv_heads)
            for place, layer in enumerate(self._layers.values())
        ]
        self._group = first.num_heads // first.num_kv_heads
        self._kv_shape = (len(self._layers), first.num_kv_heads)
        self._head_size = first.head_size
        self._device: torch.device = first.kv_cache.device
        head = model.lm_head
        if vllm_config.parallel_config.tensor_parallel_size == 1 and head.weight.shape[0] < vocabulary.vocab_size:
            raise UnsupportedModelError(
                f"an output layer of {head.weight.shape[0]} rows for a vocabulary of {vocabulary.vocab_size}"
            )

    @property
    def vocabulary(self) -> SidVocabulary:
        """Where the SID tokens are."""
        return self._vocabulary

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @torch.inference_mode()
    def capture(self, block_ids: Sequence[int], num_tokens: int, hidden: Tensor, room: int) -> Capture:
        """Copy a prompt of `num_tokens` out of its blocks, with room for so many further slots."""
        layers, heads = self._kv_shape
        dtype = next(iter(self._layers.values())).kv_cache.dtype
        shape = (layers, heads, num_tokens + room, self._head_size)
        keys = torch.empty(shape, dtype=dtype, device=self._device)
        values = torch.empty(shape, dtype=dtype, device=self._device)
        for place, layer in enumerate(self._layers.values()):
            self._reader.read(layer, block_ids, keys[place, :, :num_tokens], values[place, :, :num_tokens])
        return Capture(keys, values, hidden.clone(), num_tokens)

    @torch.inference_mode()
    def extend(self, state: PagedState, rows: TreeRows, parents: Tensor, token_ids: Tensor) -> tuple[Tensor, TreeRows]:
        """Append a token to each chosen row: parents (B, R'), token_ids (B, R') → hidden (B, R', D), the new rows."""
        num_prompts, num_new = token_ids.shape
        position = rows.next_position.gather(1, parents)
        new_rows = rows.continued(parents, state.num_slots)
        state.make_room(num_new)
        mask = torch.zeros(new_rows.visible.shape, dtype=state.keys.dtype, device=self._device)
        mask.masked_fill_(~new_rows.visible, float("-inf"))
        step = _Step(state, mask[:, None].repeat(1, 1, self._group, 1), num_new)
        with self._tree_attention(step, token_ids.numel()):
            hidden = self._model(token_ids.flatten(), position.flatten(), None, None)
        state.num_slots += num_new
        return hidden.view(num_prompts, num_new, -1), new_rows

    @torch.inference_mode()
    def level_logits(self, hidden: Tensor, level: int) -> Tensor:
        """The K logits of one level, (M, D) → (M, K): only that block of the head is read."""
        block = self._vocabulary.block(level)
        if self._vllm_config.parallel_config.tensor_parallel_size > 1:  # the vocabulary is sharded
            logits: Tensor = self._model.compute_logits(hidden)
            return logits[:, block]
        head = self._model.lm_head
        bias = head.bias[block] if getattr(head, "bias", None) is not None else None
        return functional.linear(hidden, head.weight[block], bias)

    @contextmanager
    def _tree_attention(self, step: _Step, num_tokens: int) -> Iterator[None]:
        """Every attention layer reads the captured prompts, until the end of the block, whatever happens in it."""
        own = [layer.impl for layer in self._layers.values()]
        try:
            for layer, attention in zip(self._layers.values(), self._attentions, strict=True):
                layer.impl = attention
            # A slot mapping that names no layer: vLLM leaves its own pages alone.
            with set_forward_context(
                dict.fromkeys(self._layers, step), self._vllm_config, num_tokens=num_tokens, slot_mapping={}
            ):
                yield
        finally:
            for layer, impl in zip(self._layers.values(), own, strict=True):
                layer.impl = impl


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """The attention layers by name, in the order of the model."""
    context = vllm_config.compilation_config.static_forward_context
    layers = {name: layer for name, layer in context.items() if isinstance(layer, Attention)}
    if not layers or len(layers) != len(context):
        others = sorted({type(layer).__name__ for layer in context.values()} - {"Attention"})
        raise UnsupportedModelError(f"only plain attention layers can be continued as a tree; this model has {others}")
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in layers.values()}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"the attention layers differ in shape: {sorted(shapes)}")
    for name, layer in layers.items():
        for attribute, plain in (
            ("sliding_window", None),
            ("alibi_slopes", None),
            ("logits_soft_cap", 0),
            ("sinks", None),
        ):
            value = getattr(layer.impl, attribute, None)
            if value not in (plain, None, 0, -1, (-1, -1)):
                raise UnsupportedModelError(f"{name} has {attribute} {value}: it cannot be continued as a tree")
        if layer.kv_sharing_target_layer_name is not None:
            raise UnsupportedModelError(f"{name} shares the keys of {layer.kv_sharing_target_layer_name}")
    return layers


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedModelError("pipeline parallelism: use tensor parallelism or replicas")
    if vllm_config.speculative_config is not None:
        raise UnsupportedModelError("speculative decoding has nothing to speculate on in a beam: turn it off")
    if vllm_config.lora_config is not None:
        raise UnsupportedModelError("LoRA adapters: merge them into the checkpoint")
    if str(vllm_config.cache_config.cache_dtype) not in ("auto", "float32", "bfloat16", "float16"):
        raise UnsupportedModelError(f"a quantised KV cache ({vllm_config.cache_config.cache_dtype})")
