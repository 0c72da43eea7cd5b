"""`train.profile=START:STOP`: a trace of those steps for every rank, and a memory snapshot on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from deberta_xl.base.log import rank_zero

MEMORY_EVENTS = 100_000


class StepProfiler:
    """Profiles steps `steps` (as counted from 1) into `folder`; nothing happens for an empty range."""

    def __init__(self, steps: range, folder: Path, rank: int):
        self.steps, self.folder, self.rank = steps, folder, rank
        self.has_gpu = torch.cuda.is_available()
        self.running: profile | None = None

    def before_step(self, step: int) -> None:
        """Start with the first of the steps (or the first that this start of the run makes)."""
        if self.running is None and step in self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.has_gpu else [])]
            self.running = profile(activities=activities, record_shapes=True, profile_memory=True)
            self.running.start()
            if self.has_gpu:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)

    def after_step(self, step: int) -> None:
        """Stop and write with the last of the steps."""
        if step + 1 not in self.steps:
            self.finish()

    def finish(self) -> None:
        """Stop and write where it is running: a run may end, or be stopped, before the last of the steps."""
        if self.running is not None:
            self.running.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = self.folder / f"steps-{self.steps.start}-{self.steps.stop}-rank-{self.rank:05d}.json.gz"
            self.running.export_chrome_trace(str(trace))
            if self.has_gpu:
                torch.cuda.memory._dump_snapshot(str(trace.with_suffix("").with_suffix(".memory.pickle")))
                torch.cuda.memory._record_memory_history(enabled=None)
            self.running = None
            rank_zero("profile written to %s (open it at ui.perfetto.dev)", trace)
