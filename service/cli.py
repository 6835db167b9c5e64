"""`sidrec-serve`: run the service, and the few things around it."""

import asyncio
import hashlib
import json
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import Progress

from semantic_ids.bundle import MANIFEST, Bundle, BundleError, activate, current_id
from service.export import ExportError, Wanted, export
from service.histories import EventType, Histories, HistoryEntry, HistoryUnavailableError, connect
from service.item_store import ItemStoreError
from service.logs import configure
from service.redis_keys import DEFAULT_NAMESPACE, import_marker
from service.redis_server import EmbeddedRedis, EmbeddedRedisError
from service.security import hash_key
from service.settings import Settings, is_tenant

console = Console(stderr=True)

_IMPORT_TIMEOUT_S = 10.0  # a batch of an import is many events, each synced to disk

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Serve a bundle over HTTP.

    Settings come from the environment, all with defaults: SIDREC_BUNDLES (folder of bundles), SIDREC_HOST, SIDREC_PORT,
    SIDREC_REDIS_URL (absent: an embedded Redis in SIDREC_DATA_DIR), SIDREC_API_KEY_HASHES, SIDREC_BEAM_WIDTH,
    SIDREC_LOG_LEVEL, SIDREC_LOG_FORMAT (json or console) and more: see docs/settings.md.
    """,
)


class ServeError(Exception):
    """The command cannot go on; the message is for the user."""


@app.command()
def run(
    examples: Annotated[
        Path | None, typer.Option(help="A histories file: when ready, print calls for one of its users.")
    ] = None,
) -> None:
    """Serve until Ctrl-C."""
    from service import tracing
    from service.app import create_app
    from service.routes import service_version
    from service.server import Server

    settings = _settings()
    configure(settings.log_level, settings.log_format)
    if settings.otlp_endpoint is not None:
        tracing.configure(settings.otlp_endpoint, service_version())
    listener = _listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    example = _first_history(examples) if examples is not None else None

    def announce() -> None:
        bundle_id = web.state.sidrec.bundle.bundle_id
        console.print(f"\nServing bundle [bold]{bundle_id}[/] on [bold]{address}[/]  (Ctrl-C stops it)", soft_wrap=True)
        console.print(f"To try it out in a browser: [bold]{address}/console[/]", soft_wrap=True)
        if example is not None:
            _print_examples(address, *example)

    web = create_app(settings)
    try:
        with suppress(KeyboardInterrupt):
            Server(web, announce).run(sockets=[listener])
    except SystemExit as gave_up:  # uvicorn's way when the application does not start, or the socket cannot listen
        error = web.state.startup_error or f"{address} was taken meanwhile, set SIDREC_PORT to a free port"
        raise ServeError(f"the service could not start: {error}") from gave_up


@app.command("import-histories")
def import_histories(
    file: Annotated[Path, typer.Argument(help="JSON lines: {user_id, events: [[item_id, timestamp, event_type], …]}")],
    tenant: Annotated[str, typer.Option(help="Whose users they are: the tenant of the keys that ask for them.")] = (
        DEFAULT_NAMESPACE
    ),
) -> None:
    """Load users' histories into Redis. To import the same file again does nothing."""
    _check_exists(file)
    if not is_tenant(tenant):
        raise ServeError(f"the tenant {tenant!r} must be 1 to 32 of a-z, 0-9 and -")
    settings = _settings()
    configure("warning", "console")
    asyncio.run(_import(settings, file, tenant))


@app.command("export")
def export_served(
    out: Annotated[Path, typer.Option(help="A new folder; `sidrec-train pipeline --data` reads it.")],
    tenant: Annotated[str, typer.Option(help="Whose users are exported.")] = DEFAULT_NAMESPACE,
    all_tenants: Annotated[
        bool, typer.Option("--all-tenants", help="Those of all tenants, each called TENANT/USER.")
    ] = False,
    since: Annotated[
        datetime | None,
        typer.Option(help="Nothing before this (UTC).", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    ] = None,
) -> None:
    """Write the stored histories and the catalogue as it is now: the next training set. The service may run on."""
    if not is_tenant(tenant):
        raise ServeError(f"the tenant {tenant!r} must be 1 to 32 of a-z, 0-9 and -")
    settings = _settings()
    configure("warning", "console")
    earliest = None if since is None else since.replace(tzinfo=UTC).timestamp()
    asyncio.run(_export(settings, out, Wanted(None if all_tenants else tenant, earliest)))


@app.command("activate")
def activate_bundle(
    bundle_id: Annotated[str | None, typer.Argument(help="The bundle; absent: list the published ones.")] = None,
) -> None:
    """Make a published bundle current, after checking it: a switch or a rollback, in force from the next start."""
    bundles = _settings().bundles
    try:
        if bundle_id is not None:
            activate(bundles, bundle_id)
        current = current_id(bundles)
    except BundleError as error:
        raise ServeError(str(error)) from error
    for manifest in sorted(bundles.glob(f"*/{MANIFEST}")):
        name = manifest.parent.name
        console.print(f"{'→' if name == current else ' '} {name}", highlight=False)


@app.command("hash-key")
def hash_key_command(
    key: Annotated[str | None, typer.Argument(help="The key; absent: a new random one is made and shown.")] = None,
) -> None:
    """Print the hash of an API key, for SIDREC_API_KEY_HASHES."""
    if key is None:
        key = secrets.token_urlsafe(32)
        console.print(f"key  (give it to the caller; it is not stored): {key}", highlight=False)
    sys.stdout.write(hash_key(key) + "\n")


def main() -> None:
    """Run a command; a `ServeError` is a message for the user, not a traceback."""
    try:
        app()
    except ServeError as error:
        console.print("[bold red]error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _settings() -> Settings:
    known = {f"SIDREC_{name.upper()}" for name in Settings.model_fields}
    for name in sorted(set(os.environ) - known):
        if name.startswith("SIDREC_"):
            console.print(
                f"[yellow]warning:[/] {name} is no setting of this service and has no effect", highlight=False
            )
    try:
        return Settings()
    except ValidationError as error:
        problems = []
        for one in error.errors():
            name = f"SIDREC_{one['loc'][0]}".upper() if one["loc"] else "settings"
            problems.append(f"{name}: {one['msg'].removeprefix('Value error, ')}")
        raise ServeError("; ".join(problems)) from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServeError(f"{host}:{port} cannot be used ({error.strerror}): set SIDREC_PORT to a free port") from error
    return listener


def _print_examples(address: str, user_id: str, entries: list[HistoryEntry]) -> None:
    candidates = json.dumps(list(dict.fromkeys(entry.item_id for entry in entries))[:5])
    for path, body in (
        ("recommend", f'{{"user_id": {json.dumps(user_id)}, "num_items": 10}}'),
        ("rerank", f'{{"user_id": {json.dumps(user_id)}, "candidates": {candidates}}}'),
    ):
        command = f"curl -s {address}/{path} -H 'content-type: application/json' -d {shlex.quote(body)}"
        console.print(command, markup=False, highlight=False, soft_wrap=True)


def _check_exists(histories: Path) -> None:
    if not histories.is_file():
        raise ServeError(f"{histories} does not exist: `sidrec-train pipeline` writes RUN/publish/histories.jsonl")


def _first_history(file: Path) -> tuple[str, list[HistoryEntry]]:
    _check_exists(file)
    for history in _read_histories(file):
        return history
    raise ServeError(f"{file} holds no history: make it with `sidrec-train publish`")


async def _import(settings: Settings, file: Path, tenant: str) -> None:
    async with AsyncExitStack() as stack:
        url = settings.redis_url
        try:
            if url is None:
                server = EmbeddedRedis(settings.data_dir)
                url = await server.start()
                stack.push_async_callback(server.stop)
            redis = connect(url, timeout_s=_IMPORT_TIMEOUT_S, max_connections=4)
            stack.push_async_callback(redis.aclose)
            content = await asyncio.to_thread(file.read_bytes)
            marker = import_marker(hashlib.sha256(content).hexdigest(), tenant)
            if await redis.exists(marker):
                console.print(f"{file}: imported before, nothing to do", highlight=False)
                return
            histories = Histories(
                redis, namespace=tenant, max_stored=settings.history_max_stored, ttl_s=settings.history_ttl_s
            )
            users = list(_read_histories(file))
            with Progress(console=console) as progress:
                task = progress.add_task("import histories", total=sum(len(entries) for _, entries in users))
                await histories.import_histories(users, lambda count: progress.advance(task, count))
            await redis.set(marker, 1)
        except (EmbeddedRedisError, HistoryUnavailableError, RedisError, OSError) as error:
            raise ServeError(
                f"{file} was not imported whole ({error}): import it again, nothing is kept twice"
            ) from error


async def _export(settings: Settings, out: Path, wanted: Wanted) -> None:
    async with AsyncExitStack() as stack:
        try:
            bundle = await asyncio.to_thread(Bundle.load_current, settings.bundles)
            url = settings.redis_url
            if url is None:
                server = EmbeddedRedis(settings.data_dir)
                url = await server.start()
                stack.push_async_callback(server.stop)
            redis = connect(url, timeout_s=_IMPORT_TIMEOUT_S, max_connections=4)
            stack.push_async_callback(redis.aclose)
            num_keys = await redis.dbsize()
            with Progress(console=console) as progress:
                task = progress.add_task("export", total=num_keys)
                exported = await export(redis, bundle, out, wanted, lambda keys: progress.advance(task, keys))
                progress.update(task, completed=num_keys)
        except ExportError as error:
            raise ServeError(str(error)) from error
        except (
            *(BundleError, EmbeddedRedisError, HistoryUnavailableError, ItemStoreError, RedisError, OSError),
        ) as error:
            raise ServeError(f"nothing was written to {out} ({error}): try again") from error
    told = [f"{out}: {exported.users:,} users, {exported.events:,} events, {exported.items:,} items"]
    if exported.answers:
        told.append(f"served.csv: {exported.answers:,} answers, {exported.shown_items:,} items shown")
    told += [f"left out: {number:,} {what}" for what, number in exported.left_out.items()]
    for line in told:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _read_histories(file: Path) -> Iterator[tuple[str, list[HistoryEntry]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _history_of(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ServeError(f"{file}, line {number}: {error}; make it with `sidrec-train publish`") from error


def _history_of(line: bytes) -> tuple[str, list[HistoryEntry]]:
    content = json.loads(line)
    entries = [
        HistoryEntry(str(item_id), float(timestamp), EventType(event_type))
        for item_id, timestamp, event_type in content["events"]
    ]
    if not all(isfinite(entry.timestamp) for entry in entries):
        raise ValueError("a timestamp is not a finite number")
    return str(content["user_id"]), entries
