"""What is learned, as one object: the loop (training/loop.py) asks it for everything that is not the same in every run.

An objective knows a model, micro-batches and losses. It does not know ranks beyond two numbers, nor engines: what it
needs of the run is handed in. `Pretraining` (pretraining.py) is where an objective on packed rows of text begins. What
not every objective can do is a type below it: `Staged`, `KeepsBest`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from deberta_xl.model.dropout import DropoutKey
from deberta_xl.objectives.evaluation import Evaluation, Evaluator, Model, Sums
from deberta_xl.objectives.micro_batch import MicroBatch, on_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deberta_xl.parallel.pipeline import StageInput


Losses = Callable[[Model, Any, Mapping[str, float], DropoutKey | None], Sums]
"""`Objective.losses`, or another of that form."""


class Mean(NamedTuple):
    """A loss. `losses` divides the micro-batch's sum by the share of `count`; told is the mean over the steps that have
    any of it."""

    count: str


class Ratio(NamedTuple):
    """Something counted, such as right guesses. `losses` gives the micro-batch's sum; told is the sum of all steps
    divided by all of `count`."""

    count: str


class Tally(NamedTuple):
    """Something counted on the device that is not told itself: `Objective.derived` makes figures of its sum."""


Report = Mean | Ratio | Tally
Reports = Mapping[str, Report]
"""Name of a figure -> what is told of it."""


class Update(Protocol):
    """How an objective makes an optimizer update."""

    def __call__(
        self,
        losses: Losses,
        batches: Sequence[MicroBatch],
        shares: Mapping[str, float],
        keys: Sequence[DropoutKey],
        *,
        learner: str | None = None,
        reports: Reports | None = None,
    ) -> Sums:
        """Forward and backward of such losses over all micro-batches, then one update; the figures of this rank.

        `learner` is the one of `Objective.learners` whose parameters are updated; all are when absent. The losses then
        send gradients to no other's: norm and clipping are of all that come. `reports` has the figures that these
        losses give; those of the objective when absent.
        """


class Guessing(NamedTuple):
    """What a model scores that knows nothing."""

    figure: str
    """Name of the loss."""
    loss: float
    """Nats."""


class Objective(ABC):
    """What a run learns. Every method is called on every rank, in the same order, with the same outcome, or says so."""

    counts: ClassVar[tuple[str, ...]]
    """Names of what a step counts over the global batch, such as labelled tokens: the denominators of its losses."""
    tokens_per_sample: int | None = None
    """Where every sample has as many; otherwise `counts` has `tokens`."""
    nothing_to_learn: ClassVar[str] = "give more data, or larger batches"
    """What to change where no step has any of what its loss is divided by."""
    curves_file: ClassVar[str] = "loss.png"
    """Where `curves` are kept in the run folder."""
    keeps_pictures: ClassVar[bool] = False
    """Whether pictures of an evaluation are kept in the run folder, too, not only in TensorBoard."""

    # What is built.

    @abstractmethod
    def build(self) -> nn.Module:
        """The plain model with fresh weights, the same on every rank. Its forward is called once per micro-batch."""

    @abstractmethod
    def load_initial(self, model: nn.Module) -> None:
        """At the start of a new run: put other weights into what was built, where the run has any. Collective."""

    @property
    @abstractmethod
    def fingerprints(self) -> Mapping[str, Any]:
        """What a checkpoint must agree with to be continued; JSON values."""

    def checkpoint_files(self, step: int) -> Mapping[str, bytes]:
        """What rides along in the checkpoint of a step: path -> content."""
        return {}

    # A step.

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples of an epoch."""

    @abstractmethod
    def batches(self, first_step: int, first_sample: int, *, rank: int, size: int) -> Iterator[Sequence[MicroBatch]]:
        """For every step from `first_step` (counted from 1) on, before which `first_sample` samples were consumed: the
        micro-batches of data-parallel rank `rank` of `size`, on the host. Endless, and a function of its arguments."""

    @abstractmethod
    def losses(self, model: Model, batch: Any, shares: Mapping[str, float], key: DropoutKey | None) -> Sums:
        """The figures of one micro-batch on the device, by the names of `reports`. `loss` is differentiated.

        `model` is called exactly once. A loss is a sum over the micro-batch, divided by the share of its count: what an
        even share of the global batch's count would be. So its mean over micro-batches and ranks is the mean over the
        global batch, however unevenly that is spread. `key` names the dropout masks (None in evaluation).
        """

    @property
    def reports(self) -> Reports:
        """What is told of the figures of a step; `loss` comes first."""
        return {"loss": Mean(self.counts[0])}

    def derived(self, totals: Mapping[str, float]) -> Mapping[str, float | None]:
        """Figures that follow from what is counted: `totals` has the sum of each `Ratio` and `Tally` by its name."""
        return {}

    @property
    def learners(self) -> Mapping[str, float]:
        """Submodules of the model that can be updated apart -> the share of the schedule's rate at which they learn.

        Every parameter belongs to one of them. By default there is one, the model.
        """
        return {"": 1.0}

    def step(
        self,
        update: Update,
        batches: Sequence[MicroBatch],
        shares: Mapping[str, float],
        keys: Sequence[DropoutKey],
    ) -> Sums:
        """One step of this rank: its figures, as `reports` has them.

        An objective that makes several updates in one step, or updates of only some learners, overrides this.
        """
        return update(self.losses, batches, shares, keys)

    def step_flops(self, step: int, counts: Mapping[str, float]) -> float | None:
        """Operations of a step over all ranks that counts so much; None where it is not known."""
        return None

    @property
    def guessing(self) -> Guessing | None:
        """The loss of knowing nothing, for the warning of a loss that explodes; None where there is none."""
        return None

    # Held-out data.

    @property
    def has_held_out(self) -> bool:
        """Whether there is anything to evaluate on."""
        return False

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the weights are evaluated after this step; after the last one they are anyway."""
        return False

    def held_out(self, *, rank: int, size: int) -> Iterator[MicroBatch]:
        """The held-out micro-batches of data-parallel rank `rank` of `size`, which all have equally many."""
        return iter(())

    @torch.no_grad()
    def evaluate(self, run: Evaluator) -> Evaluation:
        """The figures of `losses` over the held-out micro-batches. Collective."""
        whole = dict.fromkeys(self.counts, 1.0)
        sums = torch.zeros(len(self.reports), dtype=torch.float64, device=run.device)
        counts = torch.zeros(len(self.counts), dtype=torch.float64)
        for batch in run.batches(self.held_out(rank=run.rank, size=run.size), does="evaluating"):
            found = self.losses(run.model, on_device(batch, run.device), whole, None)
            sums += torch.stack([found[name].double() for name in self.reports])
            counts += torch.tensor(batch.counts)
        of_counts, of_reports = run.totals(counts, sums)
        count_of = dict(zip(self.counts, of_counts.tolist(), strict=True))
        totals = dict(zip(self.reports, of_reports.tolist(), strict=True))
        counted = {name: report.count for name, report in self.reports.items() if not isinstance(report, Tally)}
        values = {name: totals[name] / count_of[count] for name, count in counted.items() if count_of[count]}
        values |= {name: value for name, value in self.derived(totals).items() if value is not None}
        return Evaluation(values, "  ".join(f"validation {name} {value:.4f}" for name, value in values.items()))

    def curves(self, lines: Sequence[Mapping[str, float]]) -> Figure:
        """How the run went, from the lines of metrics.jsonl."""
        from deberta_xl.run.figures import loss_curves

        return loss_curves(lines)


class Staged(Objective):
    """An objective whose model can be a pipeline: its `losses` once more, as a stage has them."""

    @abstractmethod
    def build_stage(self, units: range) -> nn.Module:
        """As much of the model as these units of it need."""

    @abstractmethod
    def stage_input(self, batch: Any, shares: Mapping[str, float], key: DropoutKey | None) -> StageInput:
        """What a stage needs of a micro-batch besides the states that it receives."""

    @abstractmethod
    def stage_guesses(self, batch: Any) -> Tensor:
        """Where a stage that has none receives the last stage's guesses for a micro-batch."""

    @abstractmethod
    def stage_sums(self, batch: Any, shares: Mapping[str, float], loss: Tensor, guesses: Tensor) -> Sums:
        """What the last stage's loss and guesses say of a micro-batch: all that `reports` has but `loss`."""


class KeepsBest(Objective):
    """An objective of which the best weights are kept. An evaluation comes before the checkpoint, which remembers its
    outcome; with others it comes after it, since it may take long."""

    patience: int = 0
    """Evaluations without a better one after which the run ends; 0 trains to the end."""

    @abstractmethod
    def value_of(self, values: Mapping[str, float | None]) -> float | None:
        """What evaluations are compared by."""

    @abstractmethod
    def is_better(self, value: float | None, best: float | None) -> bool:
        """Whether an evaluation's value is better than the best one so far."""

    def conclude(self, run: Evaluator, *, best_step: int, steps: int) -> Mapping[str, str]:
        """At the end of a run, with the best weights in the model: what it leaves. Collective.

        Path in the run folder -> content; each folder among them is replaced as a whole.
        """
        return {}
