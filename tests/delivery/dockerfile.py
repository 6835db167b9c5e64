"""A Dockerfile read into stages. Knows continuation lines, comments, flags and the JSON form; not heredocs."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    name: str
    """In capitals: `RUN`, `COPY` …"""
    flags: tuple[str, ...]
    """The leading `--…` words."""
    value: str
    """What follows the flags, continuation lines joined."""

    @property
    def is_exec_form(self) -> bool:
        return self.value.startswith("[")

    @property
    def words(self) -> list[str]:
        return json.loads(self.value) if self.is_exec_form else shlex.split(self.value)


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    """An earlier stage, or an image."""
    instructions: tuple[Instruction, ...]


class Dockerfile:
    """The stages of one file by name, in order."""

    def __init__(self, path: Path) -> None:
        self.arguments: dict[str, str] = {}
        self.stages: dict[str, Stage] = {}
        name, base, instructions = "", "", list[Instruction]()
        for instruction in _instructions(path.read_text()):
            if instruction.name == "FROM":
                self._close(name, base, instructions)
                base, _, name = instruction.words
                base = re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], base)
                instructions = []
            elif not name:
                key, _, default = instruction.value.partition("=")
                self.arguments[key] = default
            else:
                instructions.append(instruction)
        self._close(name, base, instructions)

    def _close(self, name: str, base: str, instructions: list[Instruction]) -> None:
        if name:
            self.stages[name] = Stage(name, base, tuple(instructions))

    def image(self, target: str) -> tuple[str, list[Instruction]]:
        """The image that `target` starts from, and every instruction from there to the target, in order."""
        stage = self.stages[target]
        if stage.base not in self.stages:
            return stage.base, list(stage.instructions)
        image, inherited = self.image(stage.base)
        return image, [*inherited, *stage.instructions]

    def environment(self, target: str) -> dict[str, str]:
        _, instructions = self.image(target)
        assignments = [word for each in instructions if each.name == "ENV" for word in each.words]
        return dict(assignment.split("=", 1) for assignment in assignments)


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [_instruction(line) for line in logical if line.strip()]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" ")
    flags = []
    while match := re.match(r"(--\S+)\s+(.*)", rest.strip()):
        flags.append(match[1])
        rest = match[2]
    return Instruction(name.upper(), tuple(flags), rest.strip())
