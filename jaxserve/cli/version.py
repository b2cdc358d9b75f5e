# SPDX-License-Identifier: Apache-2.0
"""`jaxserve version`: what a bug report needs, read from package metadata without importing any."""

import json as json_module
import platform
from dataclasses import dataclass

from jaxserve import __version__

PACKAGES = (
    *("jax", "jaxlib", "flax", "transformers", "safetensors", "orbax-checkpoint", "numpy"),
    *("aiohttp", "pydantic", "msgspec", "llguidance", "prometheus-client", "pyyaml", "jinja2"),
    *("huggingface-hub", "tqdm"),
)


@dataclass(frozen=True)
class Version:
    """Print the versions of jaxserve, Python and the packages underneath."""

    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        versions = {"jaxserve": __version__, "python": platform.python_version()}
        versions |= {name: _installed(name) for name in PACKAGES}
        if self.json:
            print(json_module.dumps(versions))
            return
        for name, version in versions.items():
            print(f"{name:18} {version or 'not installed'}")


def _installed(name: str) -> str | None:
    from importlib import metadata  # 20 ms that --help need not wait for

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
