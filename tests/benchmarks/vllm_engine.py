"""The vLLM engine against vLLM's own beam search, after the local engine against a naive one: `make bench-engine`.

SmolLM2-135M with its SID tokens, a catalogue of 12,101 items with Beauty-like SIDs (L 4), prompts of 300 tokens, one
thread a process, eager on both sides. The reference is `LLM.beam_search` of the same width with vLLM's defaults, in
this process; ours is `VllmEngine.decode`, whose model is in another one. Runs alternate; every figure is a median.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import typer

from semantic_ids.bundle import Bundle, BundleParts, publish
from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidVocabulary, TokenIds
from semantic_ids.filters import ItemFilter
from semantic_ids.neighbours import Neighbours
from semantic_ids.prompt import THINKING_VERSION, PromptSpec
from semantic_ids.quantizer import ResidualQuantizer
from semantic_ids.text_encoder import TextEncoderIdentity
from service.engine.base import DecodeRequest, Think, sid_program
from service.engine.vllm_engine import VllmEngine, VllmEngineConfig
from service.logs import configure
from service.metrics import Metrics
from tests.benchmarks import engine as local
from tests.benchmarks import vllm_processor
from tests.benchmarks.engine import NUM_ITEMS, SPACE, beauty_like_sids
from tests.benchmarks.report import report
from training.base_model import SID_VOCABULARY, SMOLLM2, SidVocabularyRecord, prepare

PROMPT_TOKENS, RUNS = 300, 7
BASELINE_BLOCK = 128  # vLLM's default on CPUs
Dtype = Literal["float32", "bfloat16"]


def smollm2_bundle(folder: Path) -> Bundle:
    """A bundle of SmolLM2-135M with untrained SID tokens."""
    prepare(SMOLLM2, folder / "model", SPACE)
    record = SidVocabularyRecord.model_validate_json((folder / "model" / SID_VOCABULARY).read_text())
    rng = np.random.default_rng(0)
    parts = BundleParts(
        catalog=Catalog.build(
            SPACE,
            [f"item-{item}" for item in range(NUM_ITEMS)],
            beauty_like_sids(NUM_ITEMS, seed=0),
            rng.zipf(1.5, NUM_ITEMS).clip(max=10_000),
            [f"Item {item}" for item in range(NUM_ITEMS)],
            [[] for _ in range(NUM_ITEMS)],
        ),
        quantizer=ResidualQuantizer(
            np.zeros(8, np.float32), np.ones(8, np.float32), np.zeros((*_codebooks(), 8), np.float32)
        ),
        neighbours=Neighbours(np.zeros(NUM_ITEMS + 1, np.int64), np.empty(0, np.uint32), np.empty(0, np.float32)),
        vocabulary=SidVocabulary(SPACE, record.first_token_id, record.vocab_size),
        prompt=PromptSpec(version=THINKING_VERSION, max_history=100),
        text_encoder=TextEncoderIdentity(name="none", revision="none", dimension=8),
        model_folder=folder / "model",
        config_hash="benchmark",
        metrics={},
    )
    return publish(folder / "bundles", parts, lambda _bundle: None)


def _codebooks() -> tuple[int, int]:
    return SPACE.num_levels, SPACE.codebook_size


class _Prompts:
    """Prompts that no run has seen: SIDs of random items, behind one token that starts them all."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._rng = np.random.default_rng(1)

    def new(self) -> TokenIds:
        """`PROMPT_TOKENS` ids."""
        items = self._rng.integers(0, NUM_ITEMS, -(-PROMPT_TOKENS // SPACE.num_levels))
        return self._bundle.vocabulary.token_ids(self._bundle.catalog.codes[items]).ravel()[:PROMPT_TOKENS]

    def with_one_more_item(self, prompt: TokenIds) -> TokenIds:
        """The same user after a new event."""
        item = int(self._rng.integers(0, NUM_ITEMS))
        return np.append(prompt, self._bundle.vocabulary.token_ids(self._bundle.catalog.codes[item]))


class _Engine:
    """`VllmEngine` with the requests that are measured."""

    def __init__(self, bundle: Bundle, dtype: Dtype, replicas: int) -> None:
        self.bundle = bundle
        self.engine = VllmEngine(bundle, VllmEngineConfig(replicas=replicas, dtype=dtype), Metrics())

    def request(self, prompt: TokenIds, width: int) -> DecodeRequest:
        """No filter but the whole catalogue's."""
        everything = ItemFilter.of(NUM_ITEMS)
        return DecodeRequest(prompt, everything, width, sid_program(SPACE), self.bundle.catalog_id)

    async def decode(self, prompt: TokenIds, width: int) -> None:
        """One request for the best `width` items."""
        result = await self.engine.decode(self.request(prompt, width))
        assert len(result.ranks) >= width

    async def prefill(self, prompt: TokenIds) -> None:
        """What any engine must do for a prompt: an ordinary vLLM request of one token."""
        replica = self.engine._replicas[0]
        async for _ in replica._generate(prompt.tolist(), max_tokens=1):
            pass

    async def first_token_s(self, prompt: TokenIds) -> float:
        """From the request to the first token of its thought."""
        heard: list[float] = []
        started_at = time.perf_counter()
        think = Think(8, 60.0, (self.bundle.vocabulary.first_token_id,))
        request = replace(self.request(prompt, 20), program=(think, *sid_program(SPACE)))
        await self.engine.decode(request, lambda _tokens: heard.append(time.perf_counter()))
        return heard[0] - started_at


def _baseline(bundle: Bundle, dtype: Dtype, block_size: int) -> Callable[[TokenIds, int], None]:
    """vLLM's own beam search, in this process."""
    from vllm import LLM
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import BeamSearchParams

    llm = LLM(
        str(bundle.model_folder), dtype=dtype, enforce_eager=True, max_logprobs=200, block_size=block_size,
        kv_cache_memory_bytes=1 << 30, max_model_len=1024, seed=0,
    )  # fmt: skip

    def search(prompt: TokenIds, width: int) -> None:
        params = BeamSearchParams(beam_width=width, max_tokens=SPACE.num_levels, ignore_eos=True)
        llm.beam_search([TokensPrompt(prompt_token_ids=prompt.tolist())], params)

    return search


async def _seconds(work: Awaitable[Any]) -> float:
    started_at = time.perf_counter()
    await work
    return time.perf_counter() - started_at


async def measure(dtype: Dtype = "float32", replicas: int = 1) -> dict[str, float | int | str]:
    """Every figure of the vLLM engine, in one run."""
    # In process: the reference pays for no message between processes.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory() as folder:
        bundle = smollm2_bundle(Path(folder))
        prompts = _Prompts(bundle)
        ours = _Engine(bundle, dtype, replicas)
        await ours.engine.start()
        try:
            return await _measure(ours, prompts, dtype)
        finally:
            await ours.engine.stop()


async def _measure(ours: _Engine, prompts: _Prompts, dtype: Dtype) -> dict[str, float | int | str]:
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    vllm_beam = _baseline(ours.bundle, dtype, BASELINE_BLOCK)
    same_block = _baseline(ours.bundle, dtype, 32)
    for run in range(RUNS + 1):  # the first is the warm-up
        for width in (20, 50):
            prompt = prompts.new()
            note(f"cold_b{width}", await _seconds(ours.decode(prompt, width)))
            note(f"warm_b{width}", await _seconds(ours.decode(prompts.with_one_more_item(prompt), width)))
            for name, search in (("vllm", vllm_beam), ("vllm_same_block", same_block)):
                prompt, started_at = prompts.new(), time.perf_counter()
                search(prompt, width)
                note(f"{name}_b{width}", time.perf_counter() - started_at)
        note("prefill", await _seconds(ours.prefill(prompts.new())))
        note("first_token", await ours.first_token_s(prompts.new()))
        eight = [prompts.new() for _ in range(8)]
        note("eight_at_once", await _seconds(asyncio.gather(*(ours.decode(prompt, 20) for prompt in eight))))
        started_at = time.perf_counter()
        for prompt in [prompts.new() for _ in range(8)]:
            await ours.decode(prompt, 20)
        note("eight_one_by_one", time.perf_counter() - started_at)
        if run == 0:
            times.clear()
    steps = await _decode_step_s(ours, prompts)
    processor = vllm_processor.measure()
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "dtype": dtype,
        "replicas": len(ours.engine._replicas),
        **{f"{name}_ms": 1000 * seconds for name, seconds in median.items()},
        "decode_step_64_rows_ms": 1000 * steps,
        **processor,
        "ratio_vs_vllm_beam_b20": median["vllm_b20"] / median["cold_b20"],
        "ratio_vs_vllm_beam_b50": median["vllm_b50"] / median["cold_b50"],
        "ratio_vs_vllm_same_block_b20": median["vllm_same_block_b20"] / median["cold_b20"],
        "ratio_vs_vllm_same_block_b50": median["vllm_same_block_b50"] / median["cold_b50"],
        "cold_over_prefill_b20": median["cold_b20"] / median["prefill"],
        "warm_over_cold": median["warm_b20"] / median["cold_b20"],
        "batch8_throughput_gain": median["eight_one_by_one"] / median["eight_at_once"],
        "first_token_over_prefill": median["first_token"] / median["prefill"],
        "processor_share": processor["processor_apply_ms"] / (1000 * steps),
    }


async def _decode_step_s(ours: _Engine, prompts: _Prompts) -> float:
    """One decode step of 64 rows: how much longer 64 sampled requests take for eight more tokens each."""
    replica = ours.engine._replicas[0]
    heads = [prompts.new()[:32].tolist() for _ in range(64)]

    async def sample(prompt: list[int], num_tokens: int) -> None:
        async for _ in replica._generate(prompt, max_tokens=num_tokens):
            pass

    took = {}
    for num_tokens in (2, 10):
        took[num_tokens] = await _seconds(asyncio.gather(*(sample(prompt, num_tokens) for prompt in heads)))
    return (took[10] - took[2]) / 8


BARS = {
    "ratio_vs_vllm_beam_b20": "≥ 2.5",
    "ratio_vs_vllm_beam_b50": "≥ 5",
    "cold_over_prefill_b20": "≤ 2",
    "warm_over_cold": "≤ 0.5",
    "batch8_throughput_gain": "≥ 1.3",
    "first_token_over_prefill": "≤ 2",
    "processor_share": "< 0.02",
    "processor_new_request_ms": "< 0.2",
}


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    replicas: Annotated[int, typer.Option(help="Processes of the vLLM engine, a core each.")] = 2,
) -> None:
    """Measure both engines; some ten minutes, most of them vLLM's own beam search."""
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"dtype is float32 or bfloat16, not {dtype}")
    configure("warning", "console")
    results = local.measure()
    vllm = asyncio.run(measure(cast(Dtype, dtype), replicas))
    if os.environ.get("JSON") == "1":
        report("", results | vllm)
        return
    report(local.TITLE, results, local.BARS)
    report(f"vLLM engine: SmolLM2-135M, L {SPACE.num_levels}, {PROMPT_TOKENS} prompt tokens", vllm, BARS)


if __name__ == "__main__":
    typer.run(main)
