# SPDX-License-Identifier: Apache-2.0
"""Reads the commands and examples of READMEs, and writes their generated parts: `python -m tests.readmes`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. The performance tables are not among
them: `python -m benchmarks.report` writes those.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxserve import unsupported
from jaxserve.cli import parser_of
from jaxserve.config import EngineConfig
from jaxserve.flags import reference
from jaxserve.server.protocol.sampling import SENT
from jaxserve.server.routes.table import all_routes
from jaxserve.types import parameters
from jaxserve.types.sampling_params import FIELDS

ROOT = Path(__file__).parents[1]
READMES = (
    *("README.md", "jaxserve/README.md", "jaxserve/server/README.md", "jaxserve/deploy/README.md"),
    *("convert/README.md", "pallas_kernels/README.md", "benchmarks/README.md", "tests/README.md"),
)
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def examples(name: str) -> list[str]:
    """The README's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", read(name), re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[str]:
    """The lines of its shell blocks, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", read(name), re.DOTALL | re.MULTILINE)
    lines = [re.split(r"\s+# ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def routes() -> str:
    """A table of the API's routes, without the files of the page."""
    lines = ["| route | | key |", "|---|---|---|"]
    for route in all_routes(ui=False):
        lines.append(f"| `{route.method} {route.path}` | {route.summary} | {'no' if route.public else route.scope} |")
    return "\n".join(lines) + "\n"


def refused_fields() -> str:
    """A table with every list of request fields in unsupported.py."""
    lists: dict[str, Mapping[str, object]] = {
        name.removesuffix("_FIELDS").lower(): fields
        for name, fields in vars(unsupported).items()
        if name.endswith("_FIELDS")
    }
    rows = [f"| {kind} | {', '.join(f'`{name}`' for name in fields)} |" for kind, fields in lists.items()]
    return "\n".join(["| in | fields |", "|---|---|", *rows]) + "\n"


GENERATED: dict[str, Callable[[], str]] = {
    "routes": routes,
    "sampling": lambda: parameters.markdown_table(each for each in FIELDS if each.name in SENT),
    "unsupported": refused_fields,
    "flags": lambda: reference.markdown(parser_of("run")),
    "settings": lambda: reference.settings(EngineConfig),
}


def renewed(text: str) -> str:
    """The README with its generated parts up to date."""
    return PART.sub(lambda part: f"{part[1]}\n{GENERATED[part[2]]()}\n{part[3]}", text)


if __name__ == "__main__":
    for name in READMES:
        (ROOT / name).write_text(renewed(read(name)))
