"""`train.profile` writes a trace of the steps it names."""

from __future__ import annotations

import gzip
import json

import torch

from deberta_xl.run.profiling import StepProfiler


def run_steps(profiler: StepProfiler, steps: range) -> None:
    """Some steps with work in them."""
    for step in steps:
        profiler.before_step(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.after_step(step)


def test_a_trace_of_the_named_steps_is_written(tmp_path):
    run_steps(StepProfiler(range(2, 4), tmp_path, rank=0), range(1, 6))
    (trace,) = tmp_path.iterdir()
    assert trace.name == "steps-2-4-rank-00000.json.gz"
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("aten::matmul") == 2


def test_a_run_that_resumes_among_the_steps_profiles_the_rest(tmp_path):
    run_steps(StepProfiler(range(2, 5), tmp_path, rank=1), range(4, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["steps-2-5-rank-00001.json.gz"]


def test_a_run_that_ends_among_the_steps_has_a_trace_of_those_it_made(tmp_path):
    profiler = StepProfiler(range(2, 50), tmp_path, rank=0)
    run_steps(profiler, range(1, 4))
    assert not list(tmp_path.iterdir())
    profiler.finish()
    profiler.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["steps-2-50-rank-00000.json.gz"]


def test_nothing_is_written_without_steps(tmp_path):
    run_steps(StepProfiler(range(0), tmp_path, rank=0), range(1, 3))
    assert not list(tmp_path.iterdir())
