"""What torch is told of a GPU's memory, before it is imported."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from deberta_xl.base.allocator import let_segments_grow
from deberta_xl.base.errors import ConfigError
from deberta_xl.commands import training_command
from deberta_xl.training import engine


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},) * 2,
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"},) * 2,
    ],
    ids=str,
)
def test_segments_grow_unless_the_user_has_said_something_of_the_allocator(given, expected):
    environment = dict(given)
    let_segments_grow(environment)
    assert environment == expected


def test_a_training_command_says_so_before_it_reads_its_inputs(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    for name in ("configure_logging", "StopRequest", "meeting_point"):
        monkeypatch.setattr(training_command, name, lambda *_: None)
    seen = []

    def read_inputs(_arguments: object) -> None:
        seen.append(os.environ.get("PYTORCH_ALLOC_CONF"))
        raise ConfigError("that is all")

    arguments = SimpleNamespace(print_config=False, ranks=None, check=True)
    with pytest.raises(SystemExit):
        training_command.run_command(SimpleNamespace(parse_arguments=lambda: arguments, read_inputs=read_inputs))
    assert seen == ["expandable_segments:True"]


def test_of_a_gpu_allocated_and_reserved_memory_are_told(monkeypatch):
    peaks = {"max_memory_allocated": 3 * 2**30, "max_memory_reserved": 4 * 2**30, "reset_peak_memory_stats": None}
    gpu = SimpleNamespace(device_name=lambda: "cuda", **{name: lambda v=value: v for name, value in peaks.items()})
    monkeypatch.setattr(engine, "get_accelerator", lambda: gpu)
    monkeypatch.setattr(engine.dist, "all_reduce", lambda *_: None)
    told = engine.highest_memory(torch.device("cpu"))
    assert told == {"memory_gib": 3.0, "reserved_memory_gib": 4.0}
