"""The HTTP endpoints of single items: `GET`, `PUT` and `DELETE /items/{item_id}`."""

from collections.abc import Awaitable
from typing import TypeVar

from fastapi import APIRouter, Depends, Request

import service.paths  # noqa: F401 - registers `any_text`
from semantic_ids.catalog import CatalogError
from semantic_ids.codes import SidError
from service.access import StrictRoute
from service.deployments import EpochNotServedError
from service.engine.base import EngineUnavailableError
from service.errors import BadRequestProblem, FieldError, NotFoundProblem, UnavailableProblem
from service.item_store import ItemStoreError
from service.items import UnknownItemError
from service.live_catalog import SidsUnavailableError
from service.routes import PROBLEMS, administers
from service.schemas import ItemBody, ItemDeletedResponse, ItemId, ItemResponse
from service.state import state_of

T = TypeVar("T")

router = APIRouter(
    route_class=StrictRoute,
    prefix="/items",
    tags=["items"],
    responses=PROBLEMS,  # type: ignore[arg-type]
)


@router.get("/{item_id:any_text}")
async def item(item_id: ItemId, request: Request) -> ItemResponse:
    """An item as it is recommended now."""
    state = state_of(request)
    try:
        found = state.items.get(item_id)
    except UnknownItemError as error:
        raise NotFoundProblem(str(error)) from error
    return ItemResponse.model_validate(found, from_attributes=True)


@router.put("/{item_id:any_text}", dependencies=[Depends(administers)], responses={403: PROBLEMS[404]})
async def put_item(item_id: ItemId, body: ItemBody, request: Request) -> ItemResponse:
    """Add an item, or replace it; the next request here sees it, other replicas follow within a second.

    Without a `sid` an item that is known keeps its own, and a new one gets a free one from the bundle's codebooks.
    """
    state = state_of(request)
    found = await _done(state.items.put(item_id, body.title, body.categories, body.sid))
    return ItemResponse.model_validate(found, from_attributes=True)


@router.delete("/{item_id:any_text}", dependencies=[Depends(administers)], responses={403: PROBLEMS[404]})
async def delete_item(item_id: ItemId, request: Request) -> ItemDeletedResponse:
    """Never recommend an item again, from now on. A second time it is a 404, as for any unknown item."""
    state = state_of(request)
    return ItemDeletedResponse(item_id=item_id, catalog_epoch=await _done(state.items.delete(item_id)))


async def _done(work: Awaitable[T]) -> T:
    try:
        return await work
    except UnknownItemError as error:
        raise NotFoundProblem(str(error)) from error
    except SidError as error:
        raise BadRequestProblem(str(error), errors=[FieldError(path="body.sid", message=str(error))]) from error
    except CatalogError as error:
        raise BadRequestProblem(str(error), errors=[FieldError(path="body", message=str(error))]) from error
    except SidsUnavailableError as error:
        raise UnavailableProblem(f"{error}; nothing was changed, send a `sid`", kind="sids-unavailable") from error
    except (ItemStoreError, EngineUnavailableError) as error:
        raise UnavailableProblem(
            f"the change cannot be stored ({error}); nothing was acknowledged, send the request again",
            kind="history-unavailable",
        ) from error
    except EpochNotServedError as error:
        raise UnavailableProblem(f"{error}; it will be, and the request may be sent again") from error
