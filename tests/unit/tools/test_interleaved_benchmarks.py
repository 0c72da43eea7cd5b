"""The benchmarks that measure several ways by turns: what is wrong is not timed, and what cannot is a line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import anchors, attention, interleaved, step
from benchmarks.interleaved import Case, Unable, Way


def result_of(value: float) -> Way:
    """A way whose result is that number."""
    return Way(f"gives {value:g}", lambda: lambda: (torch.full((3,), value),))


def failing(name: str, error: Exception) -> Way:
    """A way that cannot be built."""

    def make() -> interleaved.Run:
        raise error

    return Way(name, make)


def options_for(path: Path) -> argparse.Namespace:
    """One case."""
    return interleaved.parse_arguments(
        "", f"--lengths 8 --tokens 8 --dropout 0 --rows dense --turns 1 --json {path}".split()
    )


def compare(path: Path, ways: list[Way]) -> tuple[int, dict[str, dict[str, object]]]:
    """The exit status, and the one case of the JSON file."""

    def check(_case: Case, _options: argparse.Namespace) -> dict[str, Exception]:
        return interleaved.disagreements(ways, (torch.ones(3),), tolerance=0.1)

    status = interleaved.compare(options_for(path), lambda _case, _options: ways, check)
    return status, json.loads(path.read_text(encoding="utf-8"))["cases"][0]


def test_what_cannot_be_measured_is_a_line_beside_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = ModuleNotFoundError("No module named 'x'", name="x")
    ways = [failing("a", missing), failing("b", Unable("no dropout")), failing("c", torch.OutOfMemoryError("CUDA …"))]
    status, case = compare(tmp_path / "figures.json", [*ways, result_of(1)])
    assert status == 0
    assert list(case["ways"]) == ["gives 1"]
    assert case["not_measured"] == {"a": "not installed (x)", "b": "no dropout", "c": "out of memory"}
    assert "not measured: no dropout" in capsys.readouterr().out


def test_a_way_with_another_result_is_not_timed_and_fails_the_benchmark(tmp_path: Path):
    status, case = compare(tmp_path / "figures.json", [result_of(1), result_of(1.05), result_of(1.2)])
    assert status == 1
    assert list(case["ways"]) == ["gives 1", "gives 1.05"]
    assert list(case["not_measured"]) == ["gives 1.2"]


def test_a_way_that_breaks_fails_the_benchmark_and_leaves_the_others_measured(tmp_path: Path):
    status, case = compare(
        tmp_path / "figures.json", [failing("broken", RuntimeError("at once\nand more")), result_of(1)]
    )
    assert status == 1
    assert list(case["ways"]) == ["gives 1"]
    assert case["not_measured"] == {"broken": "RuntimeError: at once"}


@pytest.mark.parametrize("benchmark", [attention, step])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_the_check_finds_a_wrong_anchor(benchmark: object, is_packed: bool, monkeypatch: pytest.MonkeyPatch):
    """Offsets of the other sign are found; what is right, is not."""
    arguments = ["--anchors", "transformers", "compiled", "--kernels", "reference", "strided"]
    options = interleaved.parse_arguments("", arguments)
    case = Case(interleaved.segments_of(2, 12, is_packed=is_packed), is_packed, 0.0)

    def mirrored(config: object, case: Case) -> anchors.Attention:
        right = anchors.plain_attention(config, case)
        return lambda states, table: right(states, table.flip(0))

    def mirrored_model(config: object, case: Case) -> torch.nn.Module:
        model = anchors.plain_model(config, case)
        rows = model.deberta.encoder.get_rel_embedding
        model.deberta.encoder.get_rel_embedding = lambda: rows().flip(0)
        return model

    monkeypatch.setattr(step, "SMALL", [*step.SMALL, "model.num_layers=2", "model.vocab_size=64"])
    monkeypatch.setitem(anchors.ATTENTIONS, "compiled", mirrored)
    monkeypatch.setitem(anchors.MODELS, "compiled", mirrored_model)
    assert list(benchmark.check(case, options)) == ["compiled"]


def test_bounds_of_documents_are_those_of_the_rows():
    segments: Tensor = interleaved.segments_of(2, 10, is_packed=True)
    assert anchors.boundaries(segments) == [0, 4, 7, 9, 10, 14, 17, 19, 20]
    assert anchors.longest(anchors.boundaries(segments)) == 4
