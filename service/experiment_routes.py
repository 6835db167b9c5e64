"""The experiments over HTTP: what runs, what it shows, and its administration; with an administrator's key."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from service.access import StrictRoute
from service.errors import BadRequestProblem, ConflictProblem, FieldError, NotFoundProblem, UnavailableProblem
from service.experiments.config import Experiment, ExperimentsConfigError
from service.experiments.exposures import ExposuresUnavailableError
from service.experiments.report import ExperimentReport
from service.experiments.runtime import ExperimentsFileError, UnknownExperimentError
from service.routes import PROBLEMS, administers
from service.state import State, state_of

router = APIRouter(
    route_class=StrictRoute,
    prefix="/experiments",
    tags=["experiments"],
    dependencies=[Depends(administers)],
    responses=PROBLEMS | dict.fromkeys((403, 409), PROBLEMS[404]),  # type: ignore[arg-type]
)


class ExperimentResponse(Experiment):
    """An experiment, and whether it is in force on the replica that answers."""

    waiting_for: str | None = Field(
        None, description="why nobody is assigned to it here, though it runs; null where it is in force, or stopped"
    )


class LayerResponse(BaseModel):
    """A layer and its experiments."""

    name: str
    experiments: list[ExperimentResponse]


class ExperimentsResponse(BaseModel):
    """Every layer."""

    layers: list[LayerResponse]


@router.get("")
async def experiments(request: Request) -> ExperimentsResponse:
    """Every layer and experiment, and what those wait for that run and are not in force here."""
    state = state_of(request)
    return _as_they_are(state)


@router.get("/{name}/report")
async def report(name: str, request: Request) -> ExperimentReport:
    """What an experiment shows so far; its always-valid p-values may be read at any time."""
    state = state_of(request)
    try:
        return await state.experiments.report(name)
    except UnknownExperimentError as error:
        raise NotFoundProblem(str(error)) from error
    except ExposuresUnavailableError as error:
        raise UnavailableProblem(f"experiments cannot be read ({error})") from error


@router.put("/{name}")
async def put_experiment(
    name: str, body: Experiment, request: Request, layer: Annotated[str, Query(min_length=1, max_length=64)] = "default"
) -> ExperimentsResponse:
    """Add an experiment to a layer, or change it so far as nobody in it leaves it or changes variant."""
    state = state_of(request)
    if body.name != name:
        raise BadRequestProblem(
            f"the path names {name!r} and the body {body.name!r}",
            errors=[FieldError(path="body.name", message="must be the name in the path")],
        )
    try:
        await state.experiments.put(layer, body)
    except ExperimentsConfigError as error:
        errors = [FieldError(path=problem.field, message=problem.rule) for problem in error.problems]
        raise BadRequestProblem("the experiment breaks a rule; see errors", errors=errors) from error
    except ExperimentsFileError as error:
        raise ConflictProblem(str(error)) from error
    except ExposuresUnavailableError as error:
        raise UnavailableProblem(f"experiments cannot be changed ({error}); nothing was") from error
    return _as_they_are(state)


@router.delete("/{name}", status_code=204)
async def remove_experiment(name: str, request: Request) -> None:
    """Remove an experiment: its users are assigned no more. What was counted stays until it expires."""
    state = state_of(request)
    try:
        await state.experiments.remove(name)
    except ExperimentsConfigError as error:
        raise NotFoundProblem(str(error)) from error
    except ExperimentsFileError as error:
        raise ConflictProblem(str(error)) from error
    except ExposuresUnavailableError as error:
        raise UnavailableProblem(f"experiments cannot be changed ({error}); nothing was") from error


def _as_they_are(state: State) -> ExperimentsResponse:
    waiting = state.experiments.waiting
    return ExperimentsResponse(
        layers=[
            LayerResponse(
                name=layer.name,
                experiments=[
                    ExperimentResponse(**dict(one), waiting_for=waiting.get(one.name)) for one in layer.experiments
                ],
            )
            for layer in state.experiments.config.layers
        ]
    )
