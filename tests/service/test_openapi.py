"""The OpenAPI document: every example in it is accepted by its schema, and by the service where it is a request."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from jsonschema import Draft202012Validator

from service.app import create_app
from service.openapi import operations
from service.settings import Settings
from tests.service.running import Service

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENT = create_app(Settings()).openapi()
OPERATIONS = [pytest.param(one, id=f"{method} {path}") for method, path, one in operations(DOCUMENT)]


def examples(operation: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Where, the example, its schema."""
    for parameter in operation.get("parameters", []):
        yield f"parameter {parameter['name']}", parameter.get("example"), parameter["schema"]
    contents = [("request", operation.get("requestBody", {}))]
    contents += [(f"answer {status}", response) for status, response in operation["responses"].items()]
    for where, holder in contents:
        for media_type, content in holder.get("content", {}).items():
            yield f"{where} {media_type}", content.get("example"), content["schema"]
        for name, header in holder.get("headers", {}).items():
            yield f"{where} {name}", header.get("example"), header["schema"]


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_every_example_is_there_and_fits_its_schema(operation: dict[str, Any]):
    for where, example, schema in examples(operation):
        assert example is not None, where
        root = {**schema, "components": DOCUMENT["components"]}
        found = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(root).iter_errors(example)]
        assert not found, where


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_every_operation_says_what_it_does(operation: dict[str, Any]):
    assert operation["summary"].strip()
    assert operation["description"].strip()
    assert operation["responses"]


async def test_errors_have_the_media_type_they_are_sent_with():
    for method, path, operation in operations(DOCUMENT):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert set(response["content"]) == {"application/problem+json"}, (method, path, status)


async def test_operation_ids_are_unique_and_links_lead_to_one():
    ids = [operation["operationId"] for _, _, operation in operations(DOCUMENT)]
    assert len(ids) == len(set(ids))
    for _, _, operation in operations(DOCUMENT):
        for response in operation["responses"].values():
            for link in response.get("links", {}).values():
                assert link["operationId"] in ids


async def test_the_service_takes_every_request_of_the_document(instant_service: Service):
    for method, path, operation in operations(DOCUMENT):
        if path.startswith(("/admin", "/experiments")):
            continue  # what is activated there must exist
        given = {parameter["name"]: parameter for parameter in operation.get("parameters", [])}
        url = path
        for name, parameter in given.items():
            if parameter["in"] == "path":
                url = url.replace(f"{{{name}}}", quote(str(parameter["example"]), safe=""))
        response = await instant_service.http.request(
            method,
            url,
            params={name: one["example"] for name, one in given.items() if one["in"] == "query"},
            json=operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example"),
        )
        assert response.status_code in {200, 204} or (path.startswith("/items") and response.status_code == 404), (
            method, path, response.text,
        )  # fmt: skip
