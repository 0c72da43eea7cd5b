"""How long a model takes from one layout to another, and how much memory: random weights of a preset, there and back.

python benchmarks/conversion.py --config xxlarge --folder /scratch/conversion

Each conversion runs in a process of its own, as a user starts it; its peak memory (resident set, pages of mapped files
included) is the system's account of that process. The folder needs four times the size of the weights, and is deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from pathlib import Path

import torch

if __name__ == "__main__":  # from any folder, also where the package is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deberta_xl.checkpoint.lazy import LazyTensor
from deberta_xl.checkpoint.manifest import FileFacts, read_manifest
from deberta_xl.checkpoint.tensor_writer import total_bytes
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.presets import load_run_config
from deberta_xl.weights.native import write_native
from deberta_xl.weights.native_config import native_config

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert.py"
VOCAB_SIZE = 128100
WAYS = [
    ("native", "huggingface", ["--to", "huggingface", "--verify"]),
    ("huggingface", "back", ["--to", "native", "--verify"]),
    ("huggingface", "microsoft", ["--to", "microsoft"]),
]


def random_tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
    """Values as a model in training has them: norms about 1, the rest N(0, 0.02), repeating after a million."""

    def read() -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        count = math.prod(shape)
        values = (0.02 * torch.randn(min(count, 2**20), generator=generator)).repeat(-(-count // 2**20))
        values = values[:count].view(shape)
        return values + 1 if "norm" in name and name.endswith("weight") else values

    return LazyTensor(shape, torch.float32, read, name)


def make_weights(folder: Path, preset: str) -> int:
    """A native folder with random weights; their bytes."""
    config = load_run_config(preset).model.architecture(VOCAB_SIZE)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MaskedLanguageModel(config).named_parameters()}
    tensors = {name: random_tensor(name, shape) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    write_native(folder, tensors, {"config.json": json.dumps(native_config(config)).encode()})
    return total_bytes(tensors)


def run(arguments: list[str]) -> tuple[float, float]:
    """Run the tool; its seconds, and its peak memory in GiB."""
    started = time.monotonic()
    process = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, str(TOOL), *arguments])
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"convert.py {' '.join(arguments)} failed")
    return time.monotonic() - started, usage.ru_maxrss / 2**20


def hashes(folder: Path) -> dict[str, FileFacts]:
    """What a native folder's manifest states of its files of weights."""
    return {name: facts for name, facts in read_manifest(folder).items() if name.endswith(".safetensors")}


def main() -> None:
    """Print a line per conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="xxlarge", help="preset (default: xxlarge, 1.5 billion parameters)")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder to work in")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    try:
        started = time.monotonic()
        size = make_weights(arguments.folder / "native", arguments.config)
        print(f"made {size / 1e9:.2f} GB of random weights in {time.monotonic() - started:.0f} s", flush=True)
        for source, target, options in WAYS:
            seconds, memory = run([*options, str(arguments.folder / source), str(arguments.folder / target)])
            print(f"{source} to {target} {' '.join(options[2:])}: {seconds:.0f} s, peak {memory:.2f} GiB", flush=True)
        before, after = (hashes(arguments.folder / name) for name in ("native", "back"))
        print(f"the weights of native and back are {'the same bytes' if before == after else 'DIFFERENT'}")
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
