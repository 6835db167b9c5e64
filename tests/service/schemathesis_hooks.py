"""What Schemathesis cannot read in the OpenAPI document."""

from typing import Any, TypeAlias

import schemathesis

AnyCase: TypeAlias = "schemathesis.Case[Any]"


@schemathesis.hook
def map_case(context: schemathesis.HookContext, case: AnyCase) -> AnyCase:
    """What is refused by rules between fields, or is an integer to JSON Schema but not to this service (10.0).

    What is meant to be refused stays as it is: the field that goes may be the one that is wrong.
    """
    case.body = _with_plain_integers(case.body)
    if not isinstance(case.body, dict) or (case.meta is not None and case.meta.generation.mode.is_negative):
        return case
    if "deadline_ms" in case.body and case.headers:
        case.headers.pop("x-deadline-ms", None)  # the same setting: to send both, and differently, is refused
    if case.body.get("diversity"):
        case.body.pop("exploration", None)  # not together
    if case.operation.path.startswith("/items/"):
        case.body.pop("sid", None)  # one that exists depends on the bundle
    return case


def _with_plain_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_plain_integers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_plain_integers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
