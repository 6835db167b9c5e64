"""Tiny data with a known structure, one finished run of the pipeline on it, and the command line to call."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedTokenizerFast, Qwen3Config

from semantic_ids.catalog import Catalog
from semantic_ids.codes import SidSpace
from training.cli import main

ROOT = Path(__file__).parents[2]
NUM_USERS, NUM_GENRES, ITEMS_PER_GENRE = 60, 6, 8
NUM_ITEMS = NUM_GENRES * ITEMS_PER_GENRE
TWINS = ("g1/3", "g4/6")
"""Two items with one text: they have one vector."""

SMALL = (
    "vectors.threads=1",
    "collaborative.threads=1",
    "collaborative.max_epochs=2",
    "collaborative.embedding_width=16",
    "collaborative.num_layers=1",
    "tokenizer.method=residual-kmeans",
    "tokenizer.threads=1",
    "sft.threads=1",
    "sft.hidden_size=32",
    "sft.num_layers=1",
    "sft.num_heads=2",
    "sft.intermediate_size=64",
    "sft.max_epochs=3",
    "sft.max_history=8",
    "evaluate.threads=1",
    "evaluate.bootstrap_samples=200",
)
"""Overrides that make every stage take a second or so."""

_GENRES = ("Sea voyages", "Old castles", "Garden birds", "Night trains", "Robot kitchens", "Mountain goats")
_NOUNS = ("lantern", "letter", "storm", "orchard", "violin", "compass", "winter", "harvest")


def write_data(folder: Path, seed: int = 0) -> Path:
    """60 users walk along the items of a genre, from each mostly to the next one, and now and then change genre."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "title", "categories", "description"])
        names = [(genre, number) for genre in range(NUM_GENRES) for number in range(ITEMS_PER_GENRE)]
        rng.shuffle(names)
        for genre, number in names:
            item_id = f"g{genre}/{number}"
            if item_id in TWINS:
                rows.writerow([item_id, "The twin", "Drama > Twins", ""])
            else:
                title = f"The {_NOUNS[number]}, a tale of {_GENRES[genre].lower()}"
                rows.writerow([item_id, title, f"{_GENRES[genre]} > {_NOUNS[number]}", f"Told in {number + 1} parts."])
    with (folder / "interactions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id", "timestamp", "event_type"])
        for user in range(NUM_USERS):
            genre, number = rng.randrange(NUM_GENRES), rng.randrange(ITEMS_PER_GENRE)
            for time in range(rng.randint(8, 15)):
                kind = rng.choices(["click", "like", "impression"], [8, 2, 1])[0]
                rows.writerow([f"user {user}", f"g{genre}/{number}", 1_700_000_000 + 60 * time + user, kind])
                number = (number + 1) % ITEMS_PER_GENRE
                if rng.random() < 0.15:
                    genre, number = rng.randrange(NUM_GENRES), rng.randrange(ITEMS_PER_GENRE)
    return folder


def command(*args: str | Path) -> list[str]:
    """`python -m training …`, as a process."""
    return [sys.executable, "-m", "training", *map(str, args)]


def environment() -> dict[str, str]:
    """One thread, no network, and wide output."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def run_command(*args: str | Path) -> "Outcome":
    """Run `python -m training …` to its end."""
    done = subprocess.run(command(*args), capture_output=True, text=True, env=environment(), timeout=300, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @cached_property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout; nothing else may be there."""
        assert self.code == 0, self.stderr
        assert self.stdout.count("\n") == 1, self.stdout
        content = json.loads(self.stdout)
        assert isinstance(content, dict)
        return content

    def refusal(self) -> str:
        """The message of a command that stopped as it should: exit code 1, one plain message, no traceback."""
        assert self.code == 1, self.stdout + self.stderr
        assert self.stdout == ""
        assert "Traceback" not in self.stderr
        assert self.stderr.count("error:") == 1
        return self.stderr.partition("error:")[2]


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`sidrec-train …` in this process, through its entry point."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["sidrec-train", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        written = capsys.readouterr()
        return Outcome(int(end.value.code or 0), written.out, written.err)

    return call


@dataclass(frozen=True)
class Run:
    """A run folder, its data, and what the command said."""

    data: Path
    out: Path
    outcome: Outcome

    def args(self, *overrides: str) -> list[str | Path]:
        """The arguments that made it; of two overrides of one key the later holds."""
        return ["--data", self.data, "--out", self.out, *SMALL, *overrides]

    def copy(self, out: Path) -> "Run":
        """The same in another folder, to be changed at will."""
        shutil.copytree(self.out, out)
        return Run(self.data, out, self.outcome)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `write_data`."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`python -m training pipeline --json`, run once; copy its folder before changing anything in it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    outcome = run_command("pipeline", "--data", tiny_data, "--out", out, *SMALL, "--json")
    assert outcome.code == 0, outcome.stderr
    return Run(tiny_data, out, outcome)


def make_catalog(
    codes: Sequence[Sequence[int]], codebook_size: int, popularity: Sequence[int] | None = None
) -> Catalog:
    """A catalogue of items "item 0", "item 1", … with these SIDs; rank and row agree where the rows are in order."""
    numbers = range(len(codes))
    return Catalog.build(
        SidSpace(len(codes[0]), codebook_size),
        [f"item {number}" for number in numbers],
        np.array(codes),
        np.array(popularity if popularity is not None else [0] * len(codes)),
        [f"Title {number}" for number in numbers],
        [[] for _ in numbers],
    )


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each architecture with a byte-level tokenizer, as if somebody had trained it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    sizes = {"vocab_size": len(fast), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024}
    configs = {
        "llama": LlamaConfig(**sizes, **heads, tie_word_embeddings=True),
        "qwen3": Qwen3Config(**sizes, **heads, head_dim=16, tie_word_embeddings=False),
        "phi": PhiConfig(**sizes, **heads),  # its output layer has a bias
    }
    root = tmp_path_factory.mktemp("pretrained")
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return {name: root / name for name in configs}
