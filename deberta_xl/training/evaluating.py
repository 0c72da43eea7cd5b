"""When a run's weights are measured, and what is made of it. All ranks do it together."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from functools import partial

import deepspeed

from deberta_xl.base.log import rank_zero
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.checkpoint.folders import verify_checkpoint
from deberta_xl.checkpoint.manifest import step_folder_name
from deberta_xl.checkpoint.store import load_checkpoint
from deberta_xl.checkpoint.together import on_rank_zero
from deberta_xl.objectives.evaluation import Evaluation, Evaluator
from deberta_xl.objectives.objective import KeepsBest, Objective
from deberta_xl.parallel.groups import Groups
from deberta_xl.run.figure_text import Picture, legend_lines, legend_table
from deberta_xl.run.heartbeat import Heartbeat
from deberta_xl.run.metrics import MetricsWriter, has_evaluation, save_curves
from deberta_xl.run.run_folder import RunFolder, write_text, writing
from deberta_xl.training.agreement import Agreement, StopRequested
from deberta_xl.training.pipelined import judge_in_pipeline
from deberta_xl.training.state import TrainState
from deberta_xl.weights.finetuned_folder import replace_best


class Evaluations:
    """The evaluations of a run, and what it concludes from its best weights."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        objective: Objective,
        groups: Groups,
        folder: RunFolder,
        state: TrainState,
        heartbeat: Heartbeat,
        agreement: Agreement,
        stop: StopRequest,
        writer: MetricsWriter | None,
    ):
        """Collective."""
        self.engine, self.objective, self.groups = engine, objective, groups
        self.folder, self.state, self.heartbeat = folder, state, heartbeat
        self.agreement, self.stop, self.writer = agreement, stop, writer
        self.is_owed = False
        """Whether this step's was left unfinished."""

    def is_due(self, *, is_last: bool) -> bool:
        """Whether this step's weights are to be measured."""
        objective, step = self.objective, self.state.step
        return step > 0 and objective.has_held_out and (is_last or objective.is_evaluation_due(step))

    def was_made(self) -> bool:
        """Whether this step's is known from the start before. Collective."""
        if isinstance(self.objective, KeepsBest):  # the checkpoint remembers
            return self.state.evaluated_step == self.state.step
        return on_rank_zero(lambda: has_evaluation(self.folder.metrics, self.state.step))

    def make(self) -> bool:
        """Measure the weights and tell what was found; whether they are the best so far. Collective.

        When asked to stop meanwhile, nothing is told, and the next start makes the evaluation anew.
        """
        self.is_owed = True
        try:
            with self.measuring() as run:
                found = self.objective.evaluate(run)
        except StopRequested:
            rank_zero("the evaluation of step %d is left unfinished; the next start makes it anew", self.state.step)
            return False
        self.is_owed = False
        keeper = self.objective if isinstance(self.objective, KeepsBest) else None
        is_best = keeper is not None and self.state.take(keeper.value_of(found.values), keeper.is_better)
        if self.writer is not None:
            self.tell(self.writer, found, is_best=is_best)
        return is_best

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Evaluator]:
        """The engine, in evaluation mode. Raises StopRequested, on all ranks alike, when a rank is asked to stop."""
        grid = self.groups.grid
        through_stages = partial(judge_in_pipeline, self.engine, self.objective, self.groups)
        self.heartbeat.mark(self.state.step, "evaluation")
        self.engine.eval()
        try:
            yield Evaluator(
                model=self.engine,
                device=self.engine.device,
                rank=grid.data_parallel_rank,
                size=grid.data_parallel_size,
                group=self.groups.data_group,
                is_first=self.writer is not None,
                guard=partial(self.agreement.until_stopped, stop=self.stop),
                through_stages=through_stages if grid.num_stages > 1 else None,
            )
        finally:
            self.engine.train()

    def tell(self, writer: MetricsWriter, found: Evaluation, *, is_best: bool) -> None:
        """One evaluation to console, metrics, TensorBoard and the run folder."""
        step = self.state.step
        writer.write(step, {f"valid_{name}": value for name, value in found.values.items()})
        for name, text in found.texts.items():
            writer.write_text(step, f"valid/{name}", text)
        for name, picture in found.pictures.items():
            self.write_picture(writer, name, picture)
        self.draw_curves()
        rank_zero("step %d  %s%s", step, found.line, "  (best so far)" if is_best else "")

    def write_picture(self, writer: MetricsWriter, name: str, picture: Picture) -> None:
        """A picture for TensorBoard, and what its names stand for; both in the run folder where they are kept there."""
        step, legend_file = self.state.step, self.folder.path / f"{name}.txt"
        writer.write_figure(step, f"valid/{name}", picture.figure)
        if picture.legend:
            writer.write_text(step, f"valid/{name}_names", legend_table(picture.legend))
        if not self.objective.keeps_pictures:
            return
        with writing(path := self.folder.path / f"{name}.png"):
            picture.figure.savefig(path, dpi=120)
        if picture.legend:
            if not legend_file.exists():
                rank_zero("%s.png has no room or no font for some names; %s has them", name, legend_file)
            write_text(legend_file, legend_lines(picture.legend))

    def draw_curves(self) -> None:
        """How the run went so far, where anything is logged."""
        if self.folder.metrics.exists():
            save_curves(self.folder.metrics, self.folder.path / self.objective.curves_file, self.objective.curves)

    def conclude(self) -> None:
        """The best weights, without the optimizer's state, and what the objective makes of them, into the run folder.

        For those that keep them. Raises StopRequested. Collective.
        """
        best = self.folder.checkpoints / step_folder_name(self.state.best_step)
        if self.state.best_step != self.state.step:
            verify_checkpoint(best, collective=True)  # an earlier start may have written it
            grid = self.groups.grid
            tensor_parallel = grid.tensor_parallel_size, grid.tensor_parallel_rank
            load_checkpoint(self.engine, best, tensor_parallel=tensor_parallel)
        with self.measuring() as run:
            files = self.objective.conclude(run, best_step=self.state.best_step, steps=self.state.step)
        on_rank_zero(lambda: self.write_files(files))
        self.heartbeat.mark(self.state.step, "best weights")
        on_rank_zero(lambda: replace_best(self.folder.path, self.state.best_step))

    def write_files(self, files: Mapping[str, str]) -> None:
        """Texts by their paths in the run folder, in place of what their own folders have held."""
        paths = {self.folder.path / name: text for name, text in files.items()}
        for folder in {path.parent for path in paths} - {self.folder.path}:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for path, text in paths.items():
            write_text(path, text)
