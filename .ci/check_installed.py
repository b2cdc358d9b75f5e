# SPDX-License-Identifier: Apache-2.0
"""Checks the installed package. Run it with the Python of a venv that has the wheel and nothing of the checkout."""

import importlib
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

LIMIT = 0.3  # seconds

home = Path(sysconfig.get_path("purelib"))
for name in ("jaxserve", "pallas_kernels", "convert"):
    file = importlib.import_module(name).__file__
    assert file and Path(file).is_relative_to(home), f"{name} was imported from {file}"
    print(f"import {name}: {file}")
json.loads((home / "pallas_kernels" / "tuning.json").read_text())
for name in ("demo/model/model.safetensors", "demo/draft/model.safetensors", "server/static/index.html"):
    assert (home / "jaxserve" / name).is_file(), f"the wheel lacks jaxserve/{name}"

command = str(Path(sysconfig.get_path("scripts")) / "jaxserve")
print(subprocess.run([command, "version"], check=True, capture_output=True, text=True).stdout)


def seconds() -> float:
    began = time.perf_counter()
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


best = min(seconds() for _ in range(5))
print(f"jaxserve --help: {best:.3f} s, limit {LIMIT} s")

listing = [sys.executable, "-X", "importtime", command, "--help"]
log = subprocess.run(listing, check=True, capture_output=True, text=True).stderr
imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in log.splitlines()}
assert "jaxserve" in imported, "unexpected format of the import log"
heavy = imported & {"jax", "jaxlib", "flax", "transformers", "numpy", "aiohttp", "pydantic"}
assert not heavy, f"jaxserve --help imports {sorted(heavy)}"
assert best < LIMIT, f"jaxserve --help took {best:.3f} s, the limit is {LIMIT} s"
