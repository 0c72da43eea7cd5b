"""What `gpu.py` found, in one file of JSON and one of Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree


class Outcome(NamedTuple):
    """What became of a part."""

    name: str
    words: str
    """What it is about."""
    outcome: str
    """done, failed, skipped or out of time."""
    reason: str
    seconds: float

    def __str__(self) -> str:
        """`skipped in 0 s: there is one GPU`."""
        return f"{self.outcome} in {self.seconds:.0f} s" + (f": {self.reason}" if self.reason else "")


def read_results(output: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the parts that ran have left in the folder, by name; also of those that did not come to their end."""
    found = {}
    for part in outcomes:
        figures, tests = output / f"{part.name}.json", output / f"{part.name}.xml"
        if part.outcome == "skipped":
            continue
        if figures.exists():
            found[part.name] = json.loads(figures.read_text(encoding="utf-8"))
        elif tests.exists():
            found[part.name] = read_tests(tests)
    return found


def read_tests(path: Path) -> list[dict[str, Any]]:
    """Name, outcome and seconds of every test, and the first line of what went wrong, or why it was skipped."""
    found = []
    for case in ElementTree.parse(path).iter("testcase"):
        said = {child.tag: child.get("message", "") for child in case}
        kind = next((name for name in ("failure", "error", "skipped") if name in said), "passed")
        why = said.get(kind, "").strip().split("\n")[0]
        found.append({"test": case.get("name"), "outcome": kind, "why": why, "seconds": float(case.get("time", 0))})
    return found


def write_report(
    output: Path, about: Mapping[str, Any], outcomes: Sequence[Outcome], results: Mapping[str, Any]
) -> str:
    """report.json and report.md; the text of the latter."""
    content = {**about, "parts": [part._asdict() for part in outcomes], "results": results}
    (output / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    devices = results.get("facts", {}).get("devices") or []
    where = f"{len(devices)} x {devices[0]['name']}" if devices else "CPU, a rehearsal with small sizes"
    parts = [[part.name, part.words, part.outcome, f"{part.seconds:.0f}", part.reason] for part in outcomes]
    sections = [
        f"# {where}",
        f"{about['date']}, revision {about['revision']}",
        table(["part", "about", "outcome", "seconds", ""], parts),
        *(f"## {name}\n\n{rendered(name, found)}" for name, found in results.items()),
    ]
    text = "\n\n".join(sections) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    return text


def rendered(name: str, found: Any) -> str:
    """A part's section."""
    return FORMS.get(name, comparison)(found)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def number(value: Any) -> str:
    """Four digits of a float; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def facts(found: Mapping[str, Any]) -> str:
    """One row for each, one for each device."""
    rows = [[name, number(value)] for name, value in found.items() if name != "devices" and value is not None]
    for device in found["devices"]:
        rows.append(["device", ", ".join(f"{name} {number(value)}" for name, value in device.items())])
    return table(["", ""], rows)


def tests(found: Sequence[Mapping[str, Any]]) -> str:
    """How many of each outcome; those that did not pass, by reason."""
    counts = Counter(test["outcome"] for test in found)
    lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.items())]
    others = Counter((test["outcome"], test["why"]) for test in found if test["outcome"] == "skipped")
    others |= Counter((test["outcome"], f"{test['test']}: {test['why']}") for test in found
                      if test["outcome"] in ("failure", "error"))  # fmt: skip
    return "\n".join([*lines, "", *(f"* {count} {outcome}: {why}" for (outcome, why), count in others.items())])


def training(found: Mapping[str, Any]) -> str:
    """Figures, and the longest operations of a step."""
    rows = [[name, number(value)] for name, value in found.items() if name not in ("busiest", "all_step_seconds")]
    busiest = [[name[:90], f"{milliseconds:.2f}", calls] for name, milliseconds, calls in found["busiest"]]
    return f"{table(['', ''], rows)}\n\n{table(['operation of one step', 'ms', 'calls'], busiest)}"


def comparison(found: Mapping[str, Any]) -> str:
    """A row for each way of each case."""
    rows = []
    for case in found["cases"]:
        for way, figures in case["ways"].items():
            share = figures.get("utilization")
            rows.append([
                case["case"], way, f"{figures['milliseconds']:.2f}", f"{figures['speed']:.2f}",
                f"{figures['peak_mib']:.0f}", f"{share:.1%}" if share else "",
            ])  # fmt: skip
        rows += [[case["case"], way, f"not measured: {why}", "", "", ""] for way, why in case["not_measured"].items()]
    return table(["case", "way", "ms", "speed", "peak MiB", "of peak"], rows)


def collectives(found: Mapping[str, Any]) -> str:
    """A row for each size."""
    rows = [[line["collective"], line["mib"], f"{line['gb_per_second']:.2f}"] for line in found["figures"]]
    return f"{found['ranks']} ranks, {found['backend']}\n\n{table(['', 'MiB', 'GB/s'], rows)}"


FORMS: dict[str, Callable[[Any], str]] = {
    "facts": facts, "tests": tests, "training": training, "collectives": collectives,
}  # fmt: skip
"""Of parts that do not compare."""
