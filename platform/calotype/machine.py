"""Figures of this machine, as MLflow's own monitors take them: CPU, memory, disk, network, NVIDIA GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any


def monitors() -> list[Any]:
    import psutil
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # no NVIDIA driver or no NVML bindings: many kinds of error, one meaning
        found.append(GPUMonitor())
    psutil.cpu_percent()  # it tells of the time since it was asked last, and the first time 0
    return found


def measured(monitors: Sequence[Any]) -> dict[str, float]:
    """One reading, under MLflow's names."""
    found: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        found |= monitor.aggregate_metrics()
        monitor.clear_metrics()
    return found
