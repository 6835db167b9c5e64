"""The invariants of ARCHITECTURE.md that a reader of the source can check."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("semantic_ids", "service", "training")
HEAVY = ("torch", "transformers", "tokenizers", "sentence_transformers", "sklearn", "scipy", "polars")

PROMPT_TEXT = re.compile(r"<\|\w*|\|>|\[/?INST\]|<</?SYS>>|</?think>")
SID_TOKEN = re.compile(r"<([a-h]|\{\w*\}|%[a-z])_(\d|\{|%[a-z])|<\(?\[a-\w\]\)?_")


def modules_without_torch() -> list[str]:
    paths = [
        path.relative_to(ROOT).with_suffix("")
        for package in ("semantic_ids", "service")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    with_torch = (Path("semantic_ids/decoding"), Path("service/engine"))
    return [
        ".".join(path.parts)
        for path in paths
        if path.name not in {"__init__", "__main__"} and path.parent not in with_torch
    ] + ["semantic_ids", "service", "service.engine.base", "service.engine.local"]


def imported(modules: list[str]) -> set[str]:
    """The top-level packages that are loaded once `modules` are, in a process of their own."""
    program = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_contract_and_the_service_without_its_engines_import_no_torch():
    modules = modules_without_torch()
    assert {"semantic_ids.bundle", "service.app", "service.routes", "service.recommender", "service.tasks"} <= {
        *modules
    }
    assert imported(modules) & set(HEAVY) == set()


def test_the_contract_needs_only_numpy_and_pydantic():
    modules = [module for module in modules_without_torch() if module.startswith("semantic_ids")]
    contract = imported(modules)
    assert {"numpy", "pydantic"} <= contract
    assert contract & {*HEAVY, "service", "training", "fastapi", "redis", "celery", "structlog"} == set()


def test_the_check_would_see_torch():
    assert {"torch", "transformers"} <= imported(["semantic_ids.decoding.tree_decoder", "transformers"])


def test_the_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def strings_in(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string but docstrings; what an f-string fills in stands as `{}`."""
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            pieces = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(pieces)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docstrings | parts):
            yield node.lineno, node.value


def findings(pattern: re.Pattern[str], owner: str) -> list[str]:
    """Where `pattern` stands in the source outside the module that owns it."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / owner
        for line, text in strings_in(ast.parse(path.read_text(encoding="utf-8")))
        if pattern.search(text)
    ]


def test_only_prompt_writes_prompt_text():
    assert findings(PROMPT_TEXT, "semantic_ids/prompt.py") == []


def test_only_codes_makes_sid_tokens():
    assert findings(SID_TOKEN, "semantic_ids/codes.py") == []


@pytest.mark.parametrize(
    ("pattern", "source"),
    [
        (SID_TOKEN, 'token = "<a_12>"'),
        (SID_TOKEN, 'token = f"<{letter}_{code}>"'),
        (SID_TOKEN, 'token = f"<b_{code}>"'),
        (SID_TOKEN, 'token = "<%s_%d>" % (letter, code)'),
        (SID_TOKEN, 'token = "<{}_{}>".format(letter, code)'),
        (SID_TOKEN, 'pattern = r"<([a-h])_(.+)>"'),
        (PROMPT_TEXT, 'text = "<|im_start|>user"'),
        (PROMPT_TEXT, 'text = f"<|{role}|>"'),
        (PROMPT_TEXT, 'text = "</think>"'),
    ],
)
def test_the_lint_sees_what_it_is_for(pattern: re.Pattern[str], source: str):
    assert any(pattern.search(text) for _, text in strings_in(ast.parse(source)))
    assert not list(strings_in(ast.parse(f'"""A docstring: {source} """  # {source}')))


def test_each_owner_does_write_what_is_its_own():
    for pattern, owner in ((PROMPT_TEXT, "semantic_ids/prompt.py"), (SID_TOKEN, "semantic_ids/codes.py")):
        assert any(finding.startswith(owner) for finding in findings(pattern, "nobody"))
