# SPDX-License-Identifier: Apache-2.0
"""The deployment files use flags, routes and paths that exist, and let a server drain before it is killed."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxserve.cli import parser_of
from jaxserve.server.routes.table import all_routes

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "jaxserve" / "deploy"


def service() -> dict[str, str]:
    """The settings of the unit, with continued lines joined."""
    text = (DEPLOY / "jaxserve.service").read_text().replace("\\\n", " ")
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def container() -> dict[str, Any]:
    return manifests()[0]["spec"]["template"]["spec"]["containers"][0]


def instructions() -> Iterator[tuple[str, str]]:
    for line in (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            word, rest = line.split(" ", 1)
            yield word, rest


def flags_of(words: list[str]) -> dict[str, Any]:
    """Parse flags as `jaxserve run` does; an unknown flag is an error."""
    assert words[0] == "run"
    return parser_of("run").parse(words[1:])


def test_the_unit_lets_the_server_drain() -> None:
    unit = service()
    command = shlex.split(unit["ExecStart"])
    given = flags_of(command[1:])
    assert given["model"] and given["shutdown_timeout"] < int(unit["TimeoutStopSec"])
    # The server ends the engine's process; systemd must not signal both.
    assert unit["KillMode"] == "mixed"
    assert unit["Restart"] == "on-failure"


def test_the_unit_writes_only_where_it_may() -> None:
    unit = service()
    given = flags_of(shlex.split(unit["ExecStart"])[1:])
    assert unit["ProtectSystem"] == "strict"
    for name in ("download_dir", "compilation_cache_dir"):
        assert str(given[name]).startswith(f"/var/cache/{unit['CacheDirectory']}/")


def test_the_manifest_drains_before_it_is_killed() -> None:
    pod = manifests()[0]["spec"]["template"]["spec"]
    before = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    given = flags_of(container()["args"])
    assert before + given["shutdown_timeout"] < pod["terminationGracePeriodSeconds"]


def test_the_manifest_probes_routes_that_need_no_key() -> None:
    public = {route.path for route in all_routes(ui=False) if route.public and route.method == "GET"}
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/health", "readiness": "/health", "liveness": "/live"}
    assert set(paths.values()) <= public
    # A probe that restarts a pod must not treat a long start as a failure.
    assert probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"] >= 1800


def test_the_manifest_gives_a_key_and_names_its_port() -> None:
    given = flags_of(container()["args"])
    assert given["host"] == "0.0.0.0" and container()["env"][0]["name"] == "JAXSERVE_API_KEY"
    assert container()["ports"] == [{"name": "http", "containerPort": given["port"]}]
    [service] = [each for each in manifests() if each["kind"] == "Service"]
    assert service["spec"]["selector"] == manifests()[0]["spec"]["template"]["metadata"]["labels"]


def test_the_image_copies_existing_paths_and_all_that_the_wheel_needs() -> None:
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text()
    wheel = re.search(r"\[tool\.hatch\.build\.targets\.wheel\]\s+packages = (\[.*?\])", project, re.DOTALL)
    assert wheel is not None and set(json.loads(wheel[1])) <= set(copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= set(copied)


@pytest.mark.parametrize("word", ["ENTRYPOINT", "CMD", "STOPSIGNAL", "USER"])
def test_the_image_runs_the_server(word: str) -> None:
    rest = dict(instructions())
    match word:
        case "ENTRYPOINT":
            assert json.loads(rest[word]) == ["jaxserve"]
        case "CMD":
            assert flags_of(json.loads(rest[word]))["host"] == "0.0.0.0"
        case "STOPSIGNAL":
            assert rest[word] == "SIGTERM"  # what the server drains on
        case _:
            assert rest[word] not in ("0", "root")
