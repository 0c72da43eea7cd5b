"""GPUs that are here and cannot be used are refused with the reason; devices are told by their names."""

from __future__ import annotations

import pytest
import torch

from deberta_xl.base.errors import ConfigError
from deberta_xl.commands import training_command
from deberta_xl.run import devices
from deberta_xl.run.devices import (
    describe_devices,
    driver_version,
    refuse_gpu_without_kernels,
    refuse_unusable_gpus,
)

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One with NVIDIA's driver, whose version is that of the file it gives, and a torch that can use no GPU."""
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", str(tmp_path))
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for variable in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "version"


def refusal() -> str:
    """Why a training command does not start."""
    with pytest.raises(ConfigError) as raised:
        training_command.choose_accelerator()
    assert "this machine has NVIDIA GPUs, and torch" in str(raised.value)
    assert "DS_ACCELERATOR=cpu" in str(raised.value)
    return str(raised.value)


def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(machine):
    machine.write_text(CLOSED)
    assert "the driver is 535.129.03, and this build's CUDA 13.0 needs 580 or newer" in refusal()


def test_a_build_for_cpus_is_named_with_what_to_install(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    release = torch.__version__.partition("+")[0]
    assert (
        f"it is a build for CPUs; PyPI's is for NVIDIA's: pip install --force-reinstall torch=={release}" in refusal()
    )


def test_where_driver_and_build_fit_what_cuda_says_is_told(machine, monkeypatch):
    machine.write_text(OPEN)

    def fails() -> None:
        raise RuntimeError("No CUDA GPUs are available.\nmore")

    monkeypatch.setattr(torch.cuda, "init", fails)
    assert "No CUDA GPUs are available (driver 580.65.06, CUDA 13.0); was the job given any" in refusal()
    machine.unlink()
    assert "(driver unknown, CUDA 13.0)" in refusal()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "none is shown to this process" in refusal()


@pytest.mark.parametrize(
    "asked", [{"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}]
)
def test_who_asks_for_the_cpu_gets_it(machine, asked):
    machine.write_text(CLOSED)
    refuse_unusable_gpus(asked)


def test_a_machine_without_the_driver_is_one_of_cpus(machine, monkeypatch):
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", "/dev/nothing")
    refuse_unusable_gpus({})
    assert driver_version() is None


def test_devices_are_counted_by_name_with_what_drives_them(machine):
    machine.write_text(OPEN)
    assert driver_version() == "580.65.06"
    names = ["NVIDIA H100 80GB HBM3"] * 3 + ["NVIDIA H200"]
    versions = {"driver": "580.65.06", "cuda": "13.0", "nccl": "2.29.7"}
    said = "3 x NVIDIA H100 80GB HBM3, 1 x NVIDIA H200, driver 580.65.06, CUDA 13.0, NCCL 2.29.7"
    assert describe_devices(names, versions) == said
    assert describe_devices(["x86_64"] * 2, dict.fromkeys(versions)) == "2 x x86_64"


def test_a_gpu_older_than_the_builds_kernels_is_refused_by_its_name(machine, monkeypatch):
    refuse_gpu_without_kernels()  # a CPU needs none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "sm_120", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(ConfigError, match=r"V100-SXM2-16GB has compute capability 7\.0, .* has kernels from 7\.5 on"):
        refuse_gpu_without_kernels()
    for enough in ((7, 5), (8, 9), (12, 1)):  # of the same generation as older kernels, or later ones
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda enough=enough: enough)
        refuse_gpu_without_kernels()
