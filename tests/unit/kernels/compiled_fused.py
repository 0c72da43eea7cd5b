"""Compiles the fused kernels ahead of time, as they are shipped, and prints what each takes as a line of JSON.

`test_fused.py` runs it in a process that does not interpret. No GPU is needed: Triton brings NVIDIA's assembler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deberta_xl.kernels.fused import forward, gradients, tables
from deberta_xl.kernels.fused.blocks import Backward, Form, Given, Outcome, Sizes
from deberta_xl.kernels.fused.draws import Draw
from deberta_xl.kernels.fused.plan import NARROW
from deberta_xl.kernels.fused.work_items import WorkItems

KERNELS = {
    "forward": forward.forward_kernel,
    "far_forward": forward.far_forward_kernel,
    "far_query": gradients.far_query_kernel,
    "far_key": gradients.far_key_kernel,
    "value": gradients.value_kernel,
    "key": gradients.key_kernel,
    "query": gradients.query_kernel,
    "tables": tables.table_gradients_kernel,
}
ROWS, NUMBERS, INTEGER, REAL = "*bf16", "*fp32", "i32", "fp32"
TYPES: dict[str, Any] = {
    "given": Given(*[ROWS] * 5, NUMBERS, NUMBERS),
    "outcome": Outcome(ROWS, *[NUMBERS] * 3),
    "backward": Backward(ROWS, NUMBERS, NUMBERS, ROWS, *[NUMBERS] * 5, *[ROWS] * 3),
    "items": WorkItems("*i64", "*i32", "*i32"),
    "sizes": Sizes(*[INTEGER] * 6, REAL, REAL),
    "draw": Draw(*[REAL] * 4, INTEGER, INTEGER, REAL),
    "form": "constexpr",
    "of_keys": "constexpr",
    "by_offset": NUMBERS,
}
"""Of a kernel's parameters; the others are rows of numbers in 16 bits."""
ALIGNED = [["tt.divisibility", 16]]


def compile_kernel(name: str, capability: int, has_dropout: bool, has_far: bool) -> dict[str, Any]:
    """Registers, bytes spilled and of shared memory, shuffles, and loads from memory of two bytes each."""
    kernel = KERNELS[name]
    form = Form(NARROW.block, 64, 64, True, True, has_far, False, False, has_dropout, tl.float16, "ieee")
    signature = {parameter: TYPES.get(parameter, ROWS) for parameter in kernel.arg_names}
    aligned = {}
    for position, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            aligned |= {(position, n): ALIGNED for n, inner in enumerate(kind) if inner.startswith("*")}
        elif kind.startswith("*"):
            aligned[(position,)] = ALIGNED
    constants = {"form": form} | ({"of_keys": True} if "of_keys" in signature else {})
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=NARROW.launches[name]._asdict())
    assembly = compiled.asm["ptx"]
    return {
        "kernel": name,
        **assembled(assembly, capability),
        "shared": compiled.metadata.shared,
        "shuffles": assembly.count("shfl.sync"),
        "narrow_loads": len(re.findall(r"ld\.global\S*\.[bu]16", assembly)),
    }


def assembled(assembly: str, capability: int) -> dict[str, int]:
    """What NVIDIA's assembler says of registers and spills."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = next(path for path in (folder / "ptxas-blackwell", folder / "ptxas") if path.exists())
    architecture = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly)
        file.flush()
        words = subprocess.run(
            [assembler, "-v", f"--gpu-name={architecture}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers, spilled = (re.findall(pattern, words) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
    return {"registers": int(registers[0]), "spilled": int(spilled[0])}


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        kernel_name, architecture_name, *options = asked.split(",")
        found = compile_kernel(kernel_name, int(architecture_name), "dropout" in options, "far" in options)
        print(json.dumps({"asked": asked} | found), flush=True)
