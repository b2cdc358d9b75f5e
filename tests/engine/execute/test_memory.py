# SPDX-License-Identifier: Apache-2.0
"""The capacity of an engine: its arithmetic against numbers worked out by hand, on described devices."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve import machine
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import capacity
from jaxserve.engine.capacity import GIB, SLACK, Capacity, Memory
from jaxserve.engine.execute import cuda_driver, jax_start, loading, memory
from jaxserve.engine.execute.cuda_driver import DriverMemory
from jaxserve.engine.execute.loading import Opened
from jaxserve.engine.execute.runner import Runner
from jaxserve.engine.execute.weights import shapes_of
from jaxserve.flags.sizes import shown_size
from jaxserve.models.spec import Dynamic, ModelSpec, Rope, Yarn
from tests.engine.driver import BLOCK, FULL, WINDOWED, params_of
from tests.golden import load as golden

# Two layers of 2 KV heads of 8 numbers, keys and values, in float32.
BLOCK_BYTES = BLOCK * 2 * 2 * 2 * 8 * 4


def sized(spec: ModelSpec = FULL, **config: Any) -> tuple[Capacity, list[str]]:
    given: dict[str, Any] = dict(model="tiny", block_size=BLOCK)
    settings, model = EngineConfig(**given | config), Opened(spec, shapes_of(params_of(spec)), None)
    found = memory.sized(settings, model, memory.available(settings, model))
    return found, found.lines()


# --- on a CPU -------------------------------------------------------------------------------------------------------


def pretend_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    answers = {"SC_AVPHYS_PAGES": free // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", answers.__getitem__)
    monkeypatch.setattr(machine, "CGROUPS", machine.Cgroups(listed=Path("/none")))


def test_a_cpu_holds_all_rows_where_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_memory(monkeypatch, 64 * GIB)
    got, lines = sized()
    assert (got.limits.max_num_seqs, got.limits.max_num_batched_tokens) == (32, 512)
    assert got.limits.max_model_len == FULL.max_positions == 64
    assert got.limits.num_blocks == 1 + 32 * 64 // BLOCK
    assert got.limits.width == 8 and got.buckets.score_rows == 64
    weights, cache = shown_size(got.memory.weights), shown_size(257 * BLOCK_BYTES)
    assert lines == [
        f"memory per device, on a CPU: weights {weights}, KV cache {cache}",
        "KV cache: 256 blocks of 8 = 2,048 tokens: 32.0 sequences of 64 tokens at once",
    ]


def test_a_cpu_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the free memory, in whole blocks."""
    pretend_memory(monkeypatch, 10 * 4096)
    blocks = 10 * 4096 // 4 // BLOCK_BYTES
    assert blocks == 5
    got, lines = sized()
    assert got.limits.num_blocks == blocks and got.limits.max_model_len == 4 * BLOCK and got.limits.width == 4
    assert lines[-1] == "max_model_len is 32, not the model's 64: the KV cache is too small"


def test_no_cpu_cache_is_above_4_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_memory(monkeypatch, 1024 * GIB)
    got, _ = sized(max_num_seqs=16384, max_num_batched_tokens=2**20, spec=replace(FULL, max_positions=2**20))
    assert got.limits.num_blocks == 4 * GIB // BLOCK_BYTES


# --- what was asked for ---------------------------------------------------------------------------------------------


def test_blocks_and_bytes_that_are_given() -> None:
    assert sized(num_blocks=40)[0].limits.num_blocks == 40
    assert sized(kv_cache_memory_bytes=40 * BLOCK_BYTES + 7)[0].limits.num_blocks == 40


def test_a_length_that_is_not_configured_is_fitted_and_logged() -> None:
    got, lines = sized(num_blocks=6)
    assert got.limits.max_model_len == 5 * BLOCK and got.limits.width == 5
    assert any("max_model_len is 40, not the model's 64" in line for line in lines)


@pytest.mark.parametrize(
    "config, match",
    [
        (dict(max_model_len=65), "max_model_len is 65, above the model's limit of 64"),
        (dict(max_model_len=1), "use at least 2"),
        (
            dict(max_model_len=41, num_blocks=6),
            "num_blocks is 6: the KV cache holds 40 tokens, too few for a sequence of 41",
        ),
        (dict(kv_cache_memory_bytes=BLOCK_BYTES), "holds 0 tokens, too few"),
        (dict(kv_cache_memory_bytes=1), "holds 0 tokens, too few"),
        (dict(max_num_seqs=8, max_num_batched_tokens=7), "max_num_batched_tokens is 7, below max_num_seqs 8"),
    ],
)
def test_models_that_do_not_fit_are_rejected(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        sized(**config)


def test_a_length_that_just_fits() -> None:
    assert sized(max_model_len=40, num_blocks=6)[0].limits.max_model_len == 40


def test_rows_alone_raise_the_tokens_of_a_step() -> None:
    assert sized(max_num_seqs=600, num_blocks=9)[0].limits.max_num_batched_tokens == 600


def test_every_log_probability() -> None:
    assert sized(max_logprobs=-1, num_blocks=9)[0].limits.max_logprobs == FULL.vocab_size
    assert sized(max_logprobs=10**6, num_blocks=9)[0].limits.max_logprobs == FULL.vocab_size


# --- on GPUs --------------------------------------------------------------------------------------------------------


@dataclass
class FakeDevice:
    total: int
    used: int
    preallocated: float = 0.75
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": int(self.total * self.preallocated), "bytes_in_use": self.used}


@pytest.mark.parametrize(
    "fraction, utilization, usable",
    [
        (None, 0.5, 40),  # of the whole memory, not of jax's share of it
        (None, 0.9, 60),  # jax has three quarters
        ("0.95", 0.9, 72),
        ("0.95", 1.0, 76),
    ],
)
def test_the_budget(monkeypatch: pytest.MonkeyPatch, fraction: str | None, utilization: float, usable: int) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    if fraction:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    devices = [FakeDevice(80 * GIB, used * GIB, float(fraction or 0.75)) for used in (3, 16, 5)]
    most, used = memory.budget(devices, utilization)
    assert (most / GIB, used) == (pytest.approx(usable), 16 * GIB)  # of the one that has least left


def test_a_running_jax_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer started it, with three quarters of the memory, and holds arrays: it keeps the rest of its pool."""
    for name in (jax_start.MEMORY_SHARE, jax_start.DEPRECATED_SHARE):
        monkeypatch.delenv(name, raising=False)
    jax_start.start(EngineConfig(model="any", gpu_memory_utilization=0.5))
    assert jax_start.MEMORY_SHARE not in os.environ and jax_start.DEPRECATED_SHARE not in os.environ
    assert memory.budget([FakeDevice(80 * GIB, 20 * GIB)], 0.5) == (40 * GIB, 20 * GIB)


def test_the_driver_knows_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever share jax has of it, and where jax reports nothing, as with its allocator `platform`."""
    monkeypatch.setenv(jax_start.MEMORY_SHARE, "0.9")  # changed since jax started
    monkeypatch.setattr(cuda_driver, "memory", lambda device: DriverMemory(total=80 * GIB, free=15 * GIB))
    device = FakeDevice(80 * GIB, 3 * GIB)
    assert memory.budget([device], 0.5) == (40 * GIB, 3 * GIB)
    assert memory.budget([device], 0.9) == (60 * GIB, 3 * GIB)
    monkeypatch.setattr(FakeDevice, "memory_stats", lambda self: {"bytes_limit": 0, "bytes_in_use": 0})
    assert memory.budget([device], 0.9) == (72 * GIB, 65 * GIB)

    def refused(self: FakeDevice) -> dict[str, int]:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: GetAllocatorStats")

    monkeypatch.setattr(FakeDevice, "memory_stats", refused)
    assert memory.budget([device], 0.9) == (72 * GIB, 65 * GIB)


def test_only_gpus_have_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"bytes_limit": 16 * GIB, "bytes_reservable_limit": 15 * GIB, "bytes_in_use": GIB}
    monkeypatch.setattr(FakeDevice, "memory_stats", lambda self: stats)
    device = FakeDevice(0, 0, platform="tpu")
    assert memory.budget([device], 0.5) == (15 * GIB // 2, GIB)
    assert memory.budget([device], 1.0) == (15 * GIB, GIB)


@dataclass
class FakeRunner:
    """Of a model whose largest step takes 1 GiB."""

    capacity: Capacity

    @classmethod
    def of(cls, config: EngineConfig, model: Opened, capacity: Capacity, store: Any) -> "FakeRunner":
        return cls(capacity)

    def largest_step(self) -> int:
        assert (self.capacity.limits.num_blocks, self.capacity.limits.width) == (2, 8)
        return GIB


def on_gpu(monkeypatch: pytest.MonkeyPatch, device: FakeDevice, **config: Any) -> tuple[Capacity, list[str]]:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setattr(memory, "Runner", FakeRunner)
    monkeypatch.setattr(memory, "devices_of", lambda model: [device])
    return sized(**config)


def test_a_gpu_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    got, lines = on_gpu(monkeypatch, FakeDevice(16 * GIB, 3 * GIB), gpu_memory_utilization=0.5)
    assert got.state == sum(memory.shard_bytes(leaf) for leaf in state_of(got))
    left = 8 * GIB - 3 * GIB - GIB - got.state - SLACK
    assert got.limits.num_blocks == left // BLOCK_BYTES
    assert (got.limits.max_num_seqs, got.limits.max_num_batched_tokens) == (256, 2048)
    weights, other, state = (
        shown_size(count) for count in (got.memory.weights, 3 * GIB - got.memory.weights, got.state)
    )
    assert lines[0] == (
        f"memory per device, 8.00 GiB usable: weights {weights}, already in use {other}, state {state}, "
        f"largest step 1.00 GiB, slack 256.00 MiB, KV cache {shown_size(got.limits.num_blocks * BLOCK_BYTES)}"
    )


def state_of(sizes: Capacity) -> list[Any]:
    """The memory that a runner of this capacity allocates in addition to the KV cache."""
    runner = Runner(FULL, shapes_of(params_of(FULL)), sizes)
    return jax.tree.leaves((runner.tables, runner.last, runner.controls))


def test_an_update_has_room_for_its_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that the program brought will be replaced: fused ones are converted beside the old ones."""
    monkeypatch.setattr(FakeRunner, "largest_step", lambda self: 100)
    got, _ = on_gpu(monkeypatch, FakeDevice(16 * GIB, 3 * GIB), gpu_memory_utilization=0.5)
    layers = params_of(FULL)["layers"].values()
    fused = [layer["attention"]["qkv"]["kernel"].nbytes for layer in layers]
    fused += [layer["mlp"]["gate_up"]["kernel"].nbytes for layer in layers]
    assert got.step == max(fused) > 100


def test_a_device_that_does_not_report_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(16 * GIB, 3 * GIB)
    monkeypatch.setattr(FakeDevice, "memory_stats", lambda self: None)
    with pytest.raises(ConfigError, match="does not report how much memory"):
        on_gpu(monkeypatch, device)


def test_a_gpu_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no memory is left for the KV cache: of 3\.00 GiB usable per device, all else needs 3\.2\d GiB",
    ):
        on_gpu(monkeypatch, FakeDevice(4 * GIB, 2 * GIB))


# --- what a spec says -----------------------------------------------------------------------------------------------


def test_blocks_that_left_the_window_are_not_needed() -> None:
    """A window of 20, a step of 4 and what lies beside them in blocks: 5 blocks hold any length."""
    got, lines = sized(WINDOWED, num_blocks=6, max_model_len=60, max_num_seqs=1, max_num_batched_tokens=4)
    assert got.limits.max_model_len == 60 and not any("max_model_len" in line for line in lines)
    with pytest.raises(ConfigError, match=r"num_blocks is 5: .*; raise it to 6 or more"):
        sized(WINDOWED, num_blocks=5, max_model_len=60, max_num_seqs=1, max_num_batched_tokens=4)


def with_scaling(scaling: Any) -> ModelSpec:
    rope = Rope(dim=8, base=10_000.0, scaling=scaling)
    layers = tuple(replace(layer, attention=replace(layer.attention, rope=rope)) for layer in FULL.layers)
    return replace(FULL, layers=layers)


@pytest.mark.parametrize("scaling", [None, Yarn(factor=4.0, original=16), Dynamic(factor=4.0, original=16)], ids=repr)
def test_the_length_that_rope_assumes(scaling: Any) -> None:
    """It is a setting's, or the model's: never what is left of it where memory is short."""
    spec = with_scaling(scaling)
    needed = spec.needs_rope_length
    config = EngineConfig(model="none", num_blocks=3, block_size=8, max_num_seqs=2, max_num_batched_tokens=8)
    for given, length in ((config, spec.max_positions), (replace(config, max_model_len=24), 24)):
        found = capacity.resolve(given, spec, Memory(on_cpu=True, dtype="float32"))
        assert found.limits.rope_length == (length if needed else 0)


# --- what a folder says ---------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(golden.read("llama-gqa-tied").config | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def opened(folder: Path) -> Opened:
    config = EngineConfig(model=str(folder), num_blocks=9)
    return loading.open_params(config, FULL, params_of(FULL), None)[0]


@pytest.mark.parametrize(
    "config, generation, wanted",
    [
        (dict(eos_token_id=5), None, {5}),
        (dict(eos_token_id=5), dict(eos_token_id=[6, 7]), {5, 6, 7}),
        (dict(eos_token_id=None), dict(eos_token_id=8), {8}),
        (dict(eos_token_id=None, text_config=dict(eos_token_id=[9])), dict(), {9}),
        (dict(eos_token_id=[True, "x", 4]), dict(eos_token_id=None), {4}),
    ],
)
def test_eos_tokens(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, wanted: set[int]
) -> None:
    assert opened(folder_of(tmp_path, config, generation)).eos_token_ids == wanted


def test_eos_ids_outside_the_vocabulary_are_ignored(tmp_path: Path) -> None:
    known = opened(folder_of(tmp_path, dict(eos_token_id=[3, FULL.vocab_size, -1]), None))
    config = EngineConfig(model="tiny", num_blocks=9)
    got = memory.sized(config, known, memory.available(config, known))
    assert got.limits.eos_token_ids == {3}


def test_defaults_of_sampling(tmp_path: Path) -> None:
    given = dict(temperature=0.6, top_p=None, top_k=20, do_sample=True)
    assert opened(folder_of(tmp_path, dict(), given)).sampling_defaults == dict(temperature=0.6, top_k=20)
