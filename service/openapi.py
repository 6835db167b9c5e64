"""The OpenAPI document: FastAPI's, and what FastAPI does not say of itself.

Examples of every parameter, body and answer are generated from the schemas with the values of one small world, so a
new route has them without a word here. Errors get their media type and an example each, answers their headers, and
operations the links by which what one returns is asked for with another.
"""

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import FastAPI

from semantic_ids.codes import SidSpace
from service.problems import MEDIA_TYPE, FieldError, ProblemDocument

Json: TypeAlias = dict[str, Any]

_REQUEST_ID = "01KAN3E3M0Q4X2S7V9T1B5C8D6"
_BUNDLE = "20261122T100000Z-3f9a1c"
_BODILESS = frozenset({"204"})
_BEFORE_ROUTES = (400, 429, 431)
_BEFORE_BODIES = (408, 413, 415)

_WORLD: Mapping[str, Any] = {
    "user_id": "u42",
    "item_id": "B009",
    "candidates": ["B004", "B009"],
    "history": ["B001", {"item_id": "B002", "timestamp": 1763760000.0, "event_type": "purchase"}],
    "filter": {"any_categories": ["Beauty"], "none_categories": ["Beauty > Nail Care"]},
    "categories": ["Beauty > Hair Care"],
    "title": "Argan oil shampoo",
    "sid": SidSpace(num_levels=3, codebook_size=256).format((2, 7, 12)),
    "score": -2.31,
    "rank": 1,
    "propensity": 1.0,
    "known": True,
    "event_id": "e1",
    "timestamp": 1763760000.0,
    "recommendation_id": "01KAN3E3KZ8R5W0Y6P4H2N7J9F",
    "ignored_items": [],
    "rejected": [],
    "accepted": 1,
    "duplicates": 0,
    "rationale": None,
    "trace": None,
    "reason": None,
    "degraded": False,
    "experiment": {"name": "rationale", "variant": "control"},
    "bundle": _BUNDLE,
    "bundle_id": _BUNDLE,
    "catalog_epoch": 3,
    "prompt": 1,
    "num_items": 10,
    "timings_ms": {"history": 0.4, "reasoning": 0.0, "decode": 21.0, "total": 23.1},
    "metrics": {"recall@10": 0.0812},
    "service": "0.1.0",
    "engine": "local",
    "x-deadline-ms": 1_000,
    "name": "wide-beam",
    "traffic": [0.0, 0.2],
    "variants": [
        {"name": "control", "weight": 1.0, "control": True, "overrides": {}},
        {"name": "wide", "weight": 1.0, "control": False, "overrides": {"beam_width": 50}},
    ],
}
"""Values by the name of their property or parameter; used where they are of the type that the schema asks for."""

_TEXTS = {
    "text/plain": "# TYPE sidrec_requests_total counter\n"
    'sidrec_requests_total{method="POST",route="/recommend",status="200"} 12.0\n',
    "text/html": "<!doctype html>\n<title>sidrec</title>\n",
}
_PROBLEMS = {
    400: ("bad-request", "POST /recommend: There was an error parsing the body", ()),
    401: ("unauthorized", "this service needs an API key in the header x-api-key", ()),
    403: ("forbidden", "this needs an administrator's key in the header x-api-key", ()),
    404: ("not-found", "there is no such thing here", ()),
    409: ("conflict", "nothing was current before: name the bundle to activate", ()),
    422: (
        "invalid-request",
        "1 field of the request cannot be accepted; see errors",
        (FieldError(path="body.num_items", message="Input should be less than or equal to 500"),),
    ),
    429: ("rate-limited", "too many requests with this key; try again later", ()),
    503: ("overloaded", "256 requests are being answered, which is the limit; try again later", ()),
}
_HEADERS: Json = {
    "x-request-id": {
        "description": "the caller's, or one of the service's own",
        "schema": {"type": "string", "minLength": 1, "maxLength": 128},
        "example": _REQUEST_ID,
    },
    "server-timing": {
        "description": "milliseconds by stage",
        "schema": {"type": "string"},
        "example": "history;dur=0.40, decode;dur=21.00, total;dur=23.10",
    },
}
_RETRY_AFTER: Json = {
    "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 0}, "example": 1}
}
_API_KEY = "x-api-key"
_NO_NUL = r"^[^\u0000]*$"

_FIRST_EVENT = "$request.body#/events/0"
_LINKS: tuple[tuple[tuple[str, str], str, tuple[str, str], Json], ...] = (
    # What one operation returns or was given → parameters of another.
    (("post", "/events"), "200", ("get", "/users/{user_id}/history"), {"user_id": f"{_FIRST_EVENT}/user_id"}),
    (("post", "/events"), "200", ("get", "/recommend"), {"user_id": f"{_FIRST_EVENT}/user_id"}),
    (("post", "/events"), "200", ("delete", "/users/{user_id}"), {"user_id": f"{_FIRST_EVENT}/user_id"}),
    (("delete", "/users/{user_id}"), "204", ("get", "/recommend"), {"user_id": "$request.path.user_id"}),
    (("post", "/recommend"), "200", ("get", "/items/{item_id}"), {"item_id": "$response.body#/items/0/item_id"}),
    (("get", "/recommend"), "200", ("get", "/items/{item_id}"), {"item_id": "$response.body#/items/0/item_id"}),
    (("put", "/items/{item_id}"), "200", ("get", "/items/{item_id}"), {"item_id": "$request.path.item_id"}),
    (("put", "/items/{item_id}"), "200", ("delete", "/items/{item_id}"), {"item_id": "$request.path.item_id"}),
    (
        ("get", "/versions"),
        "200",
        ("post", "/admin/bundles/{bundle_id}/activate"),
        {"bundle_id": "$response.body#/bundle"},
    ),
)


def install(app: FastAPI) -> None:
    """Make `app` publish the completed document."""
    plain = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = completed(plain())
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def completed(document: Json) -> Json:
    """The same document with all that this module adds, in place."""
    schemas = document.get("components", {}).get("schemas", {})
    for _, _, operation in operations(document):
        _summarise(operation)
        _forbid_nul(operation, schemas)
        _complete_parameters(operation, schemas)
        _add_common_problems(operation)
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            _exemplify(media_type, content, schemas)
        for status, response in operation["responses"].items():
            _complete_response(status, response, schemas)
    _link(document)
    document.setdefault("components", {})["securitySchemes"] = {
        "ApiKey": {"type": "apiKey", "in": "header", "name": _API_KEY}
    }
    return document


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Method, path and operation, of all."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def example_of(schema: Json, schemas: Json, name: str = "") -> object:  # noqa: PLR0911 - one return for each kind
    """A value that the schema accepts, as the world has it for `name`."""
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas, name)
    if name in _WORLD and _fits(_WORLD[name], schema, schemas):
        return _WORLD[name]
    for key in ("const", "example", "default"):
        if key in schema:
            return schema[key]
    for key in ("examples", "enum"):
        if key in schema:
            return schema[key][0]
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            return example_of(schema[key][0], schemas, name)
    kind = schema.get("type")
    if kind == "object":
        return _example_object(schema, schemas)
    if kind == "array":
        return [example_of(schema.get("items", {}), schemas, name.removesuffix("s"))] * schema.get("minItems", 1)
    if kind == "string":
        return "2026-11-22T10:00:00Z" if schema.get("format") == "date-time" else (name or "text")
    if kind in ("integer", "number"):
        return schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    return True if kind == "boolean" else None


def _example_object(schema: Json, schemas: Json) -> Json:
    found = {name: example_of(part, schemas, name) for name, part in schema.get("properties", {}).items()}
    if not found and isinstance(values := schema.get("additionalProperties"), dict):
        found["name"] = example_of(values, schemas)
    return found


_PYTHON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}  # fmt: skip


def _fits(value: object, schema: Json, schemas: Json) -> bool:
    """Whether a value is of the schema's JSON type: names are not unique among all bodies."""
    if "$ref" in schema:
        return _fits(value, schemas[schema["$ref"].rpartition("/")[2]], schemas)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return any(_fits(value, one, schemas) for one in schema[key])
    kind = schema.get("type")
    if kind != "boolean" and isinstance(value, bool):
        return False
    if kind == "object" and isinstance(value, dict) and "properties" in schema:
        return set(value) <= set(schema["properties"])
    if kind == "array" and isinstance(value, list) and value and "items" in schema:
        return _fits(value[0], schema["items"], schemas)
    return isinstance(value, _PYTHON_TYPES.get(str(kind), ()))


def _summarise(operation: Json) -> None:
    """The first sentence of what it does, instead of the function's name."""
    if description := operation.get("description"):
        operation["summary"] = " ".join(description.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def _complete_parameters(operation: Json, schemas: Json) -> None:
    """A parameter may be absent, never null."""
    for parameter in operation.get("parameters", []):
        schema = parameter["schema"]
        if "anyOf" in schema:
            given = [one for one in schema.pop("anyOf") if one != {"type": "null"}]
            schema |= given[0] if len(given) == 1 else {"anyOf": given}
        parameter["example"] = example_of(schema, schemas, parameter["name"])


def _forbid_nul(operation: Json, schemas: Json) -> None:
    """Texts that are sent hold no NUL: it is refused before a route is asked."""
    contents = operation.get("requestBody", {}).get("content", {}).values()
    waiting = [content["schema"] for content in contents]
    waiting += [one["schema"] for one in operation.get("parameters", []) if one["in"] in ("path", "query")]
    known: set[str] = set()
    while waiting:
        schema = waiting.pop()
        if (name := schema.get("$ref", "").rpartition("/")[2]) and name not in known:
            known.add(name)
            waiting.append(schemas[name])
        if schema.get("type") == "string" and not {"enum", "const", "pattern", "format"} & set(schema):
            schema["pattern"] = _NO_NUL
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                waiting.append(schema[key])
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            waiting += schema.get(key, [])
        waiting += schema.get("properties", {}).values()


def _add_common_problems(operation: Json) -> None:
    """What is answered before a route is asked."""
    responses = operation["responses"]
    if "security" in operation:
        statuses = (*_BEFORE_ROUTES, *(_BEFORE_BODIES if "requestBody" in operation else ()))
        for status in statuses:
            responses.setdefault(str(status), {**responses["401"], "content": dict(responses["401"]["content"])})
    operation["responses"] = dict(sorted(responses.items()))


def _complete_response(status: str, response: Json, schemas: Json) -> None:
    response["headers"] = response.get("headers", {}) | _HEADERS
    if status in ("429", "503"):
        response["headers"] |= _RETRY_AFTER
    content = response.get("content", {})
    if status in _BODILESS:
        response.pop("content", None)
    elif _is_problem(content):
        response["content"] = {MEDIA_TYPE: {**content["application/json"], "example": _problem(int(status))}}
    else:
        for media_type, body in content.items():
            _exemplify(media_type, body, schemas)
        if "text/event-stream" in content and "application/json" in content:
            content["text/event-stream"]["example"] = _events(content["application/json"]["example"])


def _exemplify(media_type: str, content: Json, schemas: Json) -> None:
    if media_type == "application/json":
        content["example"] = example_of(content["schema"], schemas)
    elif media_type in _TEXTS:
        content["example"] = _TEXTS[media_type]


def _is_problem(content: Json) -> bool:
    reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    return bool(reference.endswith(f"/{ProblemDocument.__name__}"))


def _problem(status: int) -> Json:
    kind, detail, bad_fields = _PROBLEMS.get(status) or (
        HTTPStatus(status).phrase.lower().replace(" ", "-"), HTTPStatus(status).description, (),
    )  # fmt: skip
    return ProblemDocument(
        type=f"urn:sidrec:{kind}",
        title=HTTPStatus(status).phrase if kind != "invalid-request" else "Invalid request",
        status=status,
        detail=detail,
        request_id=_REQUEST_ID,
        errors=list(bad_fields),
    ).model_dump()


def _events(answer: Json) -> str:
    thought = json.dumps({"text": "You bought a kettle"})
    return f"event: thought\ndata: {thought}\n\nevent: answer\ndata: {json.dumps(answer)}\n\n"


def _link(document: Json) -> None:
    """The links between operations that are both there."""
    by_place = {(method, path): operation for method, path, operation in operations(document)}
    for source, status, target, parameters in _LINKS:
        if source in by_place and target in by_place and status in by_place[source]["responses"]:
            target_id = by_place[target]["operationId"]
            links = by_place[source]["responses"][status].setdefault("links", {})
            links[target_id] = {"operationId": target_id, "parameters": parameters}
