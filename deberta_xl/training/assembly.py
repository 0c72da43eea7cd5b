"""From checked inputs and an objective to a run that can be trained."""

from __future__ import annotations

from collections.abc import Callable

from deberta_xl.objectives.objective import Objective
from deberta_xl.parallel.pipeline import PipelinedModel
from deberta_xl.stop_request import StopRequest
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
    start = start_run(inputs, objective.fingerprints)
    describe()
    is_pipeline = split is not None and split.num_stages > 1
    wrap = (lambda divided: PipelinedModel(divided, split, start.groups)) if is_pipeline else None
    with start.undone_when_refused():
        model = objective.build_stage(split.units(inputs.grid.stage)) if is_pipeline else objective.build()
        if start.newest is None:
            objective.load_initial(model)
        engine, state = start_engine(inputs, start, model, wrap)
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
