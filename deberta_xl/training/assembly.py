"""From checked inputs and an objective to a run that can be trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.objectives.objective import KeepsBest, Objective, Staged, Tally
from deberta_xl.parallel.pipeline import PipelinedModel
from deberta_xl.training.loop import Training
from deberta_xl.training.safeguard import Safeguard
from deberta_xl.training.start import RunInputs, start_engine, start_run


def assemble_training(
    inputs: RunInputs,
    objective: Objective,
    stop: StopRequest,
    *,
    describe: Callable[[], None],
) -> Training:
    """Process group, run folder, engine: everything the loop works with. Collective.

    `describe` tells what the run is going to be, once it has its folder.
    """
    config, split = inputs.config, inputs.split
    check_told(objective)
    start = start_run(inputs, objective.fingerprints)
    is_pipeline = split is not None and split.num_stages > 1
    wrap = (lambda divided: PipelinedModel(divided, split, start.groups)) if is_pipeline else None
    with start.undone_when_refused():
        describe()
        units = split.units(inputs.grid.stage) if is_pipeline else None
        model = build_model(objective, units, is_new=start.newest is None)
        engine, state = start_engine(inputs, start, model, objective.learners, wrap)
    return Training(
        config=config,
        objective=objective,
        total_steps=inputs.total_steps,
        schedule=inputs.schedule,
        launch=inputs.launch,
        groups=start.groups,
        engine=engine,
        folder=start.folder,
        state=state,
        heartbeat=start.heartbeat,
        ownership=start.ownership,
        safeguard=Safeguard(state, start.newest, start.folder.checkpoints, config.checkpoint.keep),
        stop=stop,
    )


def check_told(objective: Objective) -> None:
    """Refuse an objective that contradicts itself: it may be a user's. Raises ConfigError."""
    name = type(objective).__name__
    if "loss" not in objective.reports:
        raise ConfigError(f"{name}: reports has {', '.join(objective.reports)}, but no loss, which is differentiated")
    for figure, report in objective.reports.items():
        if not isinstance(report, Tally) and report.count not in objective.counts:
            raise ConfigError(
                f"{name}: reports divides {figure} by {report.count}, but counts has only {', '.join(objective.counts)}"
            )
    if isinstance(objective, KeepsBest) and not objective.has_held_out:
        raise ConfigError(
            f"{name} keeps the best weights (KeepsBest), which only an evaluation can tell: set data.valid, or let it "
            "not inherit from KeepsBest"
        )


def build_model(objective: Objective, units: range | None, *, is_new: bool) -> nn.Module:
    """The plain model, or the stage of it that has these units; drawn and initialised where the run is new. Collective.

    Where weights are about to be read from a checkpoint, none are drawn.
    """

    def build() -> nn.Module:
        if units is None:
            return objective.build()
        assert isinstance(objective, Staged), "check_objective has refused the stages of others"
        return objective.build_stage(units)

    if not is_new:
        with torch.device("meta"):
            model = build()
        if not holds_more(model):
            return model.to_empty(device="cpu")
    model = build()
    if is_new:
        objective.load_initial(model)
    return model


def holds_more(model: nn.Module) -> bool:
    """Whether there are tensors that no checkpoint has: buffers, and plain tensors among a module's attributes."""
    plain = (value for module in model.modules() for value in vars(module).values())
    return next(model.buffers(), None) is not None or any(isinstance(value, torch.Tensor) for value in plain)
