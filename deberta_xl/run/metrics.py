"""What a run tells: console lines or a progress bar, metrics.jsonl, TensorBoard. Rank 0 only."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from deberta_xl.base.durable import replace_file
from deberta_xl.base.durations import duration
from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import logger
from deberta_xl.base.screen import Pace, screen
from deberta_xl.run.ownership import Ownership
from deberta_xl.run.run_folder import writing

#: TensorBoard tag of each metric; those not named here stand under `train/`.
TAGS = {
    "tokens_per_second": "throughput/tokens_per_second",
    "samples_per_second": "throughput/samples_per_second",
    "model_flops_per_second": "throughput/model_flops_per_second",
    "model_flops_utilization": "throughput/model_flops_utilization",
    "step_seconds": "time/step_seconds",
    "data_seconds": "time/data_seconds",
    "forward_backward_seconds": "time/forward_backward_seconds",
    "optimizer_seconds": "time/optimizer_seconds",
    "slowest_node_seconds": "nodes/slowest_forward_seconds",
    "median_node_seconds": "nodes/median_forward_seconds",
    "fastest_node_seconds": "nodes/fastest_forward_seconds",
    "memory_gib": "memory/peak_gib",
    "reserved_memory_gib": "memory/peak_reserved_gib",
    "consumed_samples": "progress/consumed_samples",
    "consumed_tokens": "progress/consumed_tokens",
    "epoch": "progress/epoch",
}


def tag_of(name: str) -> str:
    """TensorBoard's tag of a metric: held-out ones stand under `valid/`, all others under `train/` unless named."""
    return TAGS.get(name) or (f"valid/{name[6:]}" if name.startswith("valid_") else f"train/{name}")


class MetricsWriter:
    """Writes one line per logged step, continuing after step `first_step` of an earlier start.

    Writing raises ConfigError once the folder is another start's by `ownership` (None: nobody else's), whose metrics
    they are by then.
    """

    def __init__(
        self,
        metrics_file: Path,
        tensorboard: Path,
        *,
        first_step: int,
        total_steps: int,
        ownership: Ownership | None = None,
    ):
        self.metrics_file = metrics_file
        self.folder = tensorboard
        self.ownership = ownership
        self.check_owner()
        with writing(metrics_file):
            drop_lines_after(metrics_file, first_step)
        # TensorBoard hides what an interrupted start wrote after its last checkpoint.
        self.tensorboard = SummaryWriter(str(tensorboard), purge_step=first_step + 1)
        self.line = TrainingLine(first_step, total_steps)
        if screen.is_there():
            screen.show(self.line)

    def check_owner(self) -> None:
        """Raise ConfigError when the folder is another start's."""
        if self.ownership is not None:
            self.ownership.check()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append the values of a step; None (not known here) is left out, and so is what is not a number."""
        for name in [name for name, value in values.items() if value is not None and not math.isfinite(value)]:
            logger.warning("step %d: %s is %s", step, name, values[name])
        values = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self.check_owner()
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        with writing(self.folder):
            for name, value in values.items():
                self.tensorboard.add_scalar(tag_of(name), value, step)
            self.tensorboard.flush()

    def finish_step(self, step: int) -> None:
        """A step is made, whether it is logged or not."""
        self.line.reach(step)

    def show_step(self, step: int, values: Mapping[str, float | None]) -> None:
        """One console line for a logged training step; on a terminal the line that is there already."""
        self.line.values = described(values)
        if self.line not in screen.lines:
            logger.info("step %d/%d  %s  %s", step, self.line.total, "  ".join(self.line.values), self.line.left())

    def write_text(self, step: int, tag: str, text: str) -> None:
        """A text for TensorBoard."""
        with writing(self.folder):
            self.tensorboard.add_text(tag, text, step)

    def write_figure(self, step: int, tag: str, figure: Figure) -> None:
        """A figure for TensorBoard."""
        with writing(self.folder):
            self.tensorboard.add_figure(tag, figure, step)

    def close(self) -> None:
        """Finish the files and the line on the terminal."""
        screen.hide(self.line, is_kept=True)
        with writing(self.folder):
            self.tensorboard.close()


class TrainingLine:
    """Where training is, for a terminal: step and time left, then the last logged values."""

    def __init__(self, first_step: int, total_steps: int):
        self.step, self.total = first_step, total_steps
        self.begin, self.pace = time.monotonic(), Pace(first_step)
        self.values: Sequence[str] = ()

    def reach(self, step: int) -> None:
        """A step is made."""
        self.step = step
        self.pace.reach(step)

    @property
    def share(self) -> float:
        """How much of the run is done, 0 … 1."""
        return self.step / max(1, self.total)

    def left(self) -> str:
        """The time left at the pace of this start's own steps, with the evaluations and checkpoints between them."""
        return self.pace.left(self.total)

    def first(self) -> Sequence[str]:
        """What must be known."""
        return f"step {self.step:,}/{self.total:,}", self.left()

    def further(self) -> Sequence[str]:
        """What is shown as far as there is room."""
        return [*self.values, f"{duration(time.monotonic() - self.begin)} gone"]


def described(values: Mapping[str, float | None]) -> list[str]:
    """The values of a training step that people look at, the most important first."""
    shown = [
        ("loss", "loss {:.4f}"),
        ("skipped_steps", "{} skipped"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("accuracy", "accuracy {:.1%}"),
        ("generator_loss", "generator {:.4f}"),
        ("discriminator_loss", "discriminator {:.4f}"),
        ("f1", "F1 {:.1%}"),
        ("masked_loss", "masked {:.4f}"),
        ("causal_loss", "causal {:.4f}"),
        ("prefix_loss", "prefix {:.4f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad norm {:.3f}"),
        ("generator_grad_norm", "grad norms {:.3f}"),
        ("discriminator_grad_norm", "and {:.3f}"),
    ]
    hidden = () if values.get("skipped_steps") else ("skipped_steps",)
    return [form.format(values[name]) for name, form in shown if values.get(name) is not None and name not in hidden]


def drop_lines_after(metrics_file: Path, step: int) -> None:
    """Remove what an interrupted start logged after the checkpoint that the run now continues from."""
    if not metrics_file.exists():
        return
    if not metrics_file.is_file():
        raise ConfigError(f"{metrics_file} is a folder, a pipe or a device, and should be a file: remove it")
    text = metrics_file.read_text(encoding="utf-8", errors="replace")  # a crash may have left any bytes
    kept = [line for line in text.splitlines() if is_up_to(line, step)]
    replace_file(metrics_file, "".join(f"{line}\n" for line in kept))


def save_curves(metrics_file: Path, picture: Path, draw: Callable[[list[dict[str, float]]], Figure]) -> None:
    """Draw a picture of the lines of metrics.jsonl."""
    figure = draw([json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()])
    with writing(picture):
        figure.savefig(picture, dpi=120)


def has_evaluation(metrics_file: Path, step: int) -> bool:
    """Whether an evaluation of a step is on record."""
    if not metrics_file.is_file():
        return False
    lines = metrics_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return any('"valid_' in line and is_up_to(line, step) and not is_up_to(line, step - 1) for line in lines)


def is_up_to(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and belongs to a step up to `step`."""
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False
