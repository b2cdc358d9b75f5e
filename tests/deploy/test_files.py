# SPDX-License-Identifier: Apache-2.0
"""The deployment files use flags, routes and paths that exist, and let a server drain before it is killed."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxserve.cli import parser_of
from jaxserve.cli.run import Run
from jaxserve.config import ConfigError
from jaxserve.server.routes.table import all_routes
from tests.server.shell import Shell

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
    # SIGHUP ends a server without files to reload.
    assert given["api_key_file"] and "-HUP" in unit["ExecReload"]


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


def test_the_manifest_gives_a_key_file_and_names_its_port() -> None:
    given = flags_of(container()["args"])
    pod = manifests()[0]["spec"]["template"]["spec"]
    [volume] = [each for each in pod["volumes"] if each["name"] == "keys"]
    [mount] = [each for each in container()["volumeMounts"] if each["name"] == "keys"]
    [item] = volume["secret"]["items"]
    assert given["api_key_file"] == f"{mount['mountPath']}/{item['path']}"
    assert given["host"] == "0.0.0.0"
    assert container()["ports"] == [{"name": "http", "containerPort": given["port"]}]
    [service] = [each for each in manifests() if each["kind"] == "Service"]
    assert service["spec"]["selector"] == manifests()[0]["spec"]["template"]["metadata"]["labels"]


def test_the_manifest_lets_the_image_s_user_write_to_its_volume() -> None:
    pod, given = manifests()[0]["spec"]["template"]["spec"], flags_of(container()["args"])
    user = int(dict(instructions())["USER"])
    assert pod["securityContext"]["fsGroup"] == user
    [cache] = [each["mountPath"] for each in container()["volumeMounts"] if each["name"] == "cache"]
    assert all(str(given[name]).startswith(f"{cache}/") for name in ("download_dir", "compilation_cache_dir"))


def test_scrapes_carry_a_key(tmp_path: Path) -> None:
    """The key that the manifest's instructions make may read metrics, and nothing else."""
    text = (DEPLOY / "kubernetes.yaml").read_text()
    lines = re.findall(r"# +printf '%s\\n' (.*) > keys", text)
    [words] = [shlex.split(line.replace("$METRICS_KEY", "sk-metrics").replace("$KEY", "sk-client")) for line in lines]
    (tmp_path / "keys").write_text("\n".join(words))
    monitor = yaml.safe_load((DEPLOY / "servicemonitor.yaml").read_text())["spec"]
    [service] = [each for each in manifests() if each["kind"] == "Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    secret = endpoint["authorization"]["credentials"]
    assert f"kubectl create secret generic {secret['name']} " in text
    assert f'--from-literal={secret["key"]}="$METRICS_KEY"' in text
    with Shell(api_key_file=str(tmp_path / "keys")) as server:
        sent = dict(Authorization=f"{endpoint['authorization']['type']} sk-metrics")
        assert server.get(endpoint["path"], **sent).status == 200
        assert server.get("/v1/models", **sent).status == 403
        assert server.get("/v1/models", Authorization="Bearer sk-client").status == 200


def environment() -> dict[str, str]:
    """The variables that the image sets."""
    found = [rest for word, rest in instructions() if word == "ENV"]
    return dict(pair.split("=", 1) for rest in found for pair in rest.split())


def test_the_image_s_folders_do_not_depend_on_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    [volume] = [rest for word, rest in instructions() if word == "VOLUME"]
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    script = (
        "from huggingface_hub import constants; from jaxserve.config import EngineConfig\n"
        "from jaxserve.engine.execute import program_store\n"
        "print(constants.HF_HUB_CACHE, program_store.place_of(EngineConfig(model='x').compilation_cache_dir))"
    )
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, env={**os.environ, **environment()}, check=True, capture_output=True, text=True)
    assert said.stdout.split() == [f"{volume}/huggingface/hub", f"{volume}/jaxserve/xla"]


@pytest.mark.parametrize("words", [[], ["--model", "m"]], ids=["CMD", "arguments of docker run"])
def test_the_image_asks_for_a_key(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    given = flags_of([*json.loads(dict(instructions())["CMD"]), *words])
    with pytest.raises(ConfigError, match=r"no API key is set.*0\.0\.0\.0.*JAXSERVE_ALLOW_NO_KEY=1"):
        Run.of(parser_of("run"), given)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="no API key is set"):
        patch.setenv("JAXSERVE_ALLOW_NO_KEY", "")  # as Compose passes an unset variable
        Run.of(parser_of("run"), given)
    for name, value in (("JAXSERVE_ALLOW_NO_KEY", "1"), ("JAXSERVE_API_KEY", "sk-1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert Run.of(parser_of("run"), given).server.host == "0.0.0.0"
    assert Run.of(parser_of("run"), {**given, "host": "127.0.0.1"}).server.host == "127.0.0.1"


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
            assert flags_of(json.loads(rest[word])) == {}
        case "STOPSIGNAL":
            assert rest[word] == "SIGTERM"  # what the server drains on
        case _:
            assert rest[word] not in ("0", "root")
