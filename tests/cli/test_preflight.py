# SPDX-License-Identifier: Apache-2.0
"""Sizes that cannot work are found before anything is loaded, by arithmetic that agrees with the engine's."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.cli import preflight
from jaxserve.cli.with_jax import memory_plan
from jaxserve.config import EngineConfig
from jaxserve.errors import UsageError
from jaxserve.models import registry
from jaxserve.models.spec_json import to_json
from tests.cli.conftest import Command, Served, one_error
from tests.golden import load as golden


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--max-model-len", "129"], ("--max-model-len is 129", "128 or less")),
        (["--max-model-len", "1"], ("--max-model-len is 1", "at least 2")),
        (["--kv-cache-memory-bytes", "1KiB"], ("--kv-cache-memory-bytes is 1024", "or more")),
        (["--kv-cache-memory-bytes", "900TiB"], ("--kv-cache-memory-bytes is", "this machine has")),
        (
            ["--num-blocks", "3", "--max-model-len", "64"],
            ("--num-blocks is 3", "raise it to 5 or more", "--max-model-len to 32"),
        ),
        (["--max-num-batched-tokens", "16"], ("--max-num-batched-tokens is 16", "--max-num-seqs")),
        (["-tp", "2"], ("--tensor-parallel-size is 2, but JAX has only 1 CPU device",)),
    ],
)
def test_impossible_sizes(
    command: Command, served: Served, model: Path, words: list[str], parts: tuple[str, ...]
) -> None:
    one_error(command("run", model, "--port", "0", *words), 2, *parts)
    assert served.engine is None


def test_heads_that_do_not_divide(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--a=b --xla_force_host_platform_device_count=8")
    one_error(
        command("run", model, "--port", "0", "-tp", "3"), 2, "--tensor-parallel-size", "4 attention heads", "3 tensor"
    )


def test_sizes_of_a_converted_model(command: Command, served: Served, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "converted")
    content = {"format": 1, "spec": to_json(registry.read_config(model)[0])}
    (folder / "spec.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({}))
    one_error(command("run", folder, "--port", "0", "--max-model-len", "129"), 2, "--max-model-len is 129")
    (folder / "spec.json").write_text(json.dumps({"spec": {"is": "Norm"}}))
    assert command("run", folder, "--port", "0", "--max-model-len", "129").code == 7  # its reader will tell


@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral-window", "gemma2", "deepseek-v3"])
@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_does_not_fit_is_rejected(tmp_path: Path, name: str, shards: int) -> None:
    folder = golden.write_checkpoint(name, tmp_path / "tiny")
    spec = registry.read_config(folder)[0]
    config = EngineConfig(model=str(folder), tensor_parallel_size=shards, block_size=8, max_model_len=100)
    config = replace(config, max_num_batched_tokens=32, dtype="bfloat16")
    described = memory_plan.read(config, memory_plan.fetch(config))
    per_block = memory_plan.planned(config, described, None).block_bytes
    assert preflight.least(config, spec).block_bytes == per_block
    refused: set[bool] = set()
    for blocks in range(1, 30):
        sized = replace(config, kv_cache_memory_bytes=blocks * per_block)
        fits = memory_plan.planned(sized, described, None).fits
        refused.add(not fits)
        try:
            preflight.check_sizes(sized, folder)
        except UsageError as error:
            assert not fits, error
            wanted = int(re.findall(r"\d+", error.hint)[0])
            assert memory_plan.planned(replace(sized, kv_cache_memory_bytes=wanted), described, None).fits
        else:
            assert fits
    assert refused == {True, False}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, 1),
        ({"JAX_PLATFORMS": "CPU", "JAX_NUM_CPU_DEVICES": "4"}, 4),
        ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --x=1"}, 8),
        ({"JAX_PLATFORMS": "cuda,cpu"}, None),
        ({"JAX_PLATFORMS": "tpu"}, None),
    ],
)
def test_devices_are_counted_where_they_are_certain(environment: dict[str, str], expected: int | None) -> None:
    assert preflight.cpu_devices(environment) == expected
