"""How a rank takes its device, without one: what DeepSpeed is told, asked and spared."""

from __future__ import annotations

from contextlib import nullcontext

import deepspeed
import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.launch import Launch
from deberta_xl.training import engine

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class PretendedGPU:
    """As much of DeepSpeed's accelerator as a start asks for."""

    def __init__(self, num_visible: int):
        self.num_visible = num_visible
        self.devices: list[int] = []
        """Those that were made current."""

    def device_name(self) -> str:
        """Of its kind."""
        return "cuda"

    def device_count(self) -> int:
        """What this process sees."""
        return self.num_visible

    def set_device(self, number: int) -> None:
        """Notes it."""
        self.devices.append(number)

    def communication_backend_name(self) -> str:
        """NVIDIA's."""
        return "nccl"

    def is_fp16_supported(self) -> bool:
        """Since Volta."""
        return True


@pytest.fixture
def start(monkeypatch):
    """Starts a rank that sees so many devices; the device it takes, and where DeepSpeed joins the ranks with it."""
    monkeypatch.setattr(engine, "quieten_engine", lambda: None)
    monkeypatch.setattr(engine, "all_ranks_here", lambda launch: nullcontext())

    def started(num_visible: int, **variables: str) -> tuple[list[int], dict[str, str]]:
        seen: dict[str, str] = {}
        accelerator = PretendedGPU(num_visible)
        monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
        monkeypatch.setattr(
            deepspeed, "init_distributed",
            lambda *_, **__: seen.update({name: engine.os.environ.get(name) for name in engine.LOCAL_RANKS}),
        )  # fmt: skip
        for name, value in {**LAUNCHED, **variables}.items():
            monkeypatch.setenv(name, value)
        engine.start_engine_runtime(Launch(3, 8, 3), "fp32", deterministic=False)
        return accelerator.devices, seen

    return started


def test_a_rank_that_is_shown_its_own_device_alone_tells_deepspeed_so(start, monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    assert start(1) == ([0], {"LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": None})
    # DeepSpeed refuses to start where MPI's own variable is another.
    assert start(1, OMPI_COMM_WORLD_LOCAL_RANK="3") == ([0], dict.fromkeys(engine.LOCAL_RANKS, "0"))


def test_a_rank_that_is_shown_all_devices_takes_the_one_of_its_place(start, monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_LOCAL_RANK", raising=False)
    assert start(8) == ([3], {"LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": None})
    with pytest.raises(ConfigError, match="rank 3 of this node has no device: only 2 are visible"):
        start(2)


def test_on_a_gpu_no_operator_is_probed(start, monkeypatch):
    class Probed(dict):
        def __setitem__(self, name: str, value: object) -> None:
            raise AssertionError(f"asked for {name}: each would look for CUDA's toolkit and say that there is none")

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", Probed(), raising=False)
    start(8)


def test_bfloat16_that_is_only_emulated_is_refused_by_the_devices_name(monkeypatch):
    monkeypatch.setattr(engine, "get_accelerator", lambda: PretendedGPU(1))
    monkeypatch.setattr(engine, "device_name", lambda: "Tesla T4")
    has_it = False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_it)
    with pytest.raises(ConfigError, match=r"bf16 is not supported on this device \(Tesla T4\); it has: fp32, fp16"):
        engine.check_precision("bf16")
    engine.check_precision("fp16")
    has_it = True
    engine.check_precision("bf16")
