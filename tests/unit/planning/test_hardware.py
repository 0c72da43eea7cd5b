"""Devices by their names, and by what a user says of them."""

from __future__ import annotations

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.planning.hardware import device_gibibytes, peak_flops, planned_device, read_gibibytes


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("AMD Ryzen", None),
    ],
)
def test_a_devices_peak_is_found_by_its_whole_name(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize("text", ["", "80GB", "nan", "inf", "-1", "0"])
def test_a_device_without_a_size_is_refused(text):
    with pytest.raises(ConfigError, match="GPU_MEMORY_GIB"):
        read_gibibytes(text)


def test_what_nobody_has_said_of_a_device_is_not_known(monkeypatch):
    monkeypatch.setenv("GPU_MEMORY_GIB", "")
    assert device_gibibytes() is None
    monkeypatch.setenv("GPU_MEMORY_GIB", "80")
    assert device_gibibytes() == 80


def test_what_a_run_will_compute_on_is_what_is_said_or_here_or_what_it_is_planned_for(monkeypatch, tmp_path):
    for name in ("DS_ACCELERATOR", "GPU_MEMORY_GIB", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("deberta_xl.planning.hardware.DRIVERS", [str(tmp_path / "driver")])
    assert (planned_device("fp32"), planned_device("bf16")) == ("cpu", "cuda")
    monkeypatch.setenv("GPU_MEMORY_GIB", "80")
    assert planned_device("fp32") == "cuda"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert planned_device("bf16") == "cpu"
    monkeypatch.setenv("GPU_MEMORY_GIB", "")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert planned_device("fp32") == "cuda"
    monkeypatch.delenv("DS_ACCELERATOR")
    (tmp_path / "driver").touch()
    assert planned_device("fp32") == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert planned_device("fp32") == "cpu"
