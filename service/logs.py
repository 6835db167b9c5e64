"""Logging: structured lines on stderr, for people (`console`) or machines (`json`)."""

import logging
import re
import sys
from collections.abc import Mapping

import structlog

_HIDDEN = "[redacted]"
_SECRETS = frozenset({"x-api-key", "api-key", "authorization", "proxy-authorization", "cookie"})
_SECRET_IN_TEXT = re.compile(
    r"""((?:x[-_]api[-_]key|authorization)["']?\s*[:=,]\s*(?:b(?=["']))?["']?(?:bearer\s+|basic\s+)?)[^\s"',;)\]}]+""",
    re.IGNORECASE,
)


def configure(level: str, log_format: str) -> None:
    """Set up structlog for the process; stdout stays free for answers and tables."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if log_format == "console":
        # The default formatter prints every frame's variables, API keys among them, and takes seconds over it.
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if log_format == "json" else _unchanged,
            redacted,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def redacted(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The event without API keys, should one ever come to be logged: in a header, a mapping or a text."""
    return {name: _HIDDEN if _is_secret(name) else _without_secrets(value) for name, value in event.items()}


def _without_secrets(value: object) -> object:
    if isinstance(value, str):
        return _SECRET_IN_TEXT.sub(rf"\1{_HIDDEN}", value)
    if isinstance(value, Mapping):
        return {name: _HIDDEN if _is_secret(name) else _without_secrets(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        if len(value) == 2 and _is_secret(value[0]):  # a header as ASGI has it
            return [value[0], _HIDDEN]
        return [_without_secrets(one) for one in value]
    return value


def _is_secret(name: object) -> bool:
    text = name.decode("latin-1") if isinstance(name, bytes) else name
    return isinstance(text, str) and text.lower().replace("_", "-") in _SECRETS


def _unchanged(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return event
