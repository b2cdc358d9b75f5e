# SPDX-License-Identifier: Apache-2.0
"""Records where a result comes from: date, commit, device and versions, and nothing that identifies the machine."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

_ROOT = Path(__file__).parents[1]
_SMI_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "ecc.mode.current",
    "mig.mode.current",
    "clocks_event_reasons.active",
)


def _output(*command: str) -> str | None:
    """The output of a command; None if it is not installed or fails."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def git() -> dict[str, Any]:
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain")
    return {"commit": commit or "unknown", "dirty": None if changes is None else bool(changes)}


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "backend": jax.default_backend(),
        "platform_version": device.client.platform_version.strip(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "python": platform.python_version(),
    }


def nvidia_smi() -> dict[str, str]:
    """The GPU's state as the driver reports it; empty if nvidia-smi is not installed."""
    found = {}
    for field in _SMI_FIELDS:  # one by one: an unknown field fails the whole query
        answer = _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
        if answer:
            found[field] = answer.splitlines()[0]
    return found


def processor() -> str:
    """The CPU's model and its number of cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{model[1] if model else platform.processor()}, {os.cpu_count()} cores"


def collect() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {"date": now.isoformat(timespec="seconds"), "git": git(), "machine": machine()}


def default_out(*, tiny: bool) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    name = f"{datetime.date.today().isoformat()}-{slug}" + ("-tiny" if tiny else "")
    return _ROOT / "benchmarks" / "results" / name
