# SPDX-License-Identifier: Apache-2.0
"""`jaxserve version`: versions for bug reports, read from package metadata without importing the packages."""

import json as json_module
import platform
from dataclasses import dataclass
from typing import Annotated

from jaxserve import __version__
from jaxserve.flags.setting import Setting

PACKAGES = (
    *("jax", "jaxlib", "flax", "transformers", "safetensors", "orbax-checkpoint", "numpy"),
    *("aiohttp", "pydantic", "msgspec", "llguidance", "prometheus-client", "pyyaml", "jinja2"),
    *("huggingface-hub", "tqdm"),
)


@dataclass(frozen=True)
class Version:
    """Print the versions of jaxserve, its dependencies and Python."""

    json: Annotated[bool, Setting("Print one JSON object instead of a table.")] = False

    def run(self) -> None:
        versions = {"jaxserve": __version__, "python": platform.python_version()}
        versions |= {name: _installed(name) for name in PACKAGES}
        if self.json:
            print(json_module.dumps(versions))
            return
        for name, version in versions.items():
            print(f"{name:18} {version or 'not installed'}")


def _installed(name: str) -> str | None:
    from importlib import metadata  # takes 20 ms, which would slow down --help

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
