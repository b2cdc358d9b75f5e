# SPDX-License-Identifier: Apache-2.0
"""`jaxserve check` against an engine's memory, and against published sizes."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve import machine
from jaxserve.cli.with_jax import memory_plan
from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import Capacity
from jaxserve.engine.engine import Engine
from jaxserve.engine.execute import jax_start, loading, memory
from jaxserve.engine.execute.loading import Opened
from jaxserve.engine.execute.runner import Runner
from jaxserve.flags.sizes import shown_size
from jaxserve.models import kv_cache
from tests.cli.conftest import Command, one_error
from tests.golden import load as golden

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}

GEMMA3_27B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "dtype": "bfloat16",
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Write only the config."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


# Families, layouts and flags, on a CPU and on accelerators of so many GiB.
SAME: list[tuple[str, int | None, dict[str, Any]]] = [
    ("llama-gqa-tied", None, {}),
    ("llama-rope-dynamic", None, dict(max_model_len=40, dtype="bfloat16")),
    ("mistral-window", None, dict(num_blocks=9, max_num_batched_tokens=32, block_size=8)),
    ("gemma2", None, dict(kv_cache_memory_bytes=2**18, max_num_seqs=5, max_logprobs=-1)),
    ("deepseek-v3", None, dict(tensor_parallel_size=2, max_num_seqs=3)),
    ("qwen3-moe", None, dict(expert_parallel_size=2, logprobs_mode="processed_logprobs")),
    ("mistral-window", 1, dict(max_num_seqs=8, max_num_batched_tokens=16)),
    ("deepseek-v3", 2, dict(tensor_parallel_size=4, block_size=32)),
    ("qwen2-moe", 4, dict(tensor_parallel_size=2, expert_parallel_size=2, dtype="float16")),
    ("llama-gqa-tied", 8, dict(num_blocks=100, max_model_len=64)),
    ("qwen2-moe", None, dict(tensor_parallel_size=2, quantization="int4")),
]


class Probe:
    """A fake runner whose compiler reports what `check` estimates."""

    def __init__(self, plan: Capacity) -> None:
        self.plan = plan

    @classmethod
    def of(cls, config: EngineConfig, model: Opened, capacity: Capacity, store: object) -> "Probe":
        return cls(capacity)

    def largest_step(self) -> int:
        return self.plan.step


@pytest.mark.parametrize(("case", "gib", "flags"), SAME)
def test_check_and_engine_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str, gib: int | None, flags: dict[str, Any]
) -> None:
    """Both reach the same numbers: check from described devices, the engine from devices that it queries."""
    folder = golden.write_checkpoint(case, tmp_path / "tiny")
    config = EngineConfig(model=str(folder), gpu_memory_utilization=0.5, **flags)
    monkeypatch.setattr(memory, "free_on_cpu", lambda coming=0: 10**7)
    if gib is not None:
        device = type("Gpu", (), {"platform": "gpu", "memory_stats": lambda self: {"bytes_limit": gib * 2**29}})()
        monkeypatch.setenv(jax_start.MEMORY_SHARE, "0.5")
        monkeypatch.setattr(memory, "devices_of", lambda model: [device])
        monkeypatch.setattr(memory, "Runner", Probe)
    model = loading.open_folder(config, loading.on_mesh(config, None))
    engine = memory.sized(config, model, memory.available(config, model))
    check = memory_plan.planned(
        config, memory_plan.read(config, memory_plan.fetch(config)), None if gib is None else gib * 2**30
    )
    assert check.fits and check.block_bytes == sum(map(memory.shard_bytes, pools_of(model, engine)))
    assert plain(check) == plain(engine)
    assert check.cache_lines() == engine.cache_lines()
    if check.fixed is None or gib is None:
        assert [size for _, size, _ in check.parts()] == [size for _, size, _ in engine.parts()]


def plain(found: Capacity) -> Capacity:
    """Drop what only one of the two knows: EOS tokens, and what a compiler or a device reports."""
    limits = replace(found.limits, eos_token_ids=frozenset())
    same = dict(usable=None, used=0) if found.fixed is not None else {}
    return replace(found, limits=limits, memory=replace(found.memory, step=None, **same))


def pools_of(model: Opened, sizes: Capacity) -> list[Any]:
    with jax.set_mesh(model.mesh) if model.mesh is not None else nullcontext():
        dtype = jnp.dtype(model.spec.dtype)
        size = sizes.limits.block_size
        cache = kv_cache.abstract_cache(model.spec, blocks=1, block_size=size, dtype=dtype, groups=sizes.groups)
        return jax.tree.leaves(cache)


@pytest.mark.parametrize("words", [[], ["--max-num-seqs", "3", "--block-size", "8"], ["--num-blocks", "20"]])
def test_the_plan_is_what_the_engine_does(command: Command, tmp_path: Path, words: list[str]) -> None:
    model = golden.write_checkpoint("mistral-full", tmp_path / "tiny")
    said = command("check", model, "--json", *words)
    assert (said.code, said.err) == (0, "")
    plan, table = json.loads(said.out)["plan"], command("check", model, *words).out
    options: dict[str, Any] = {
        name[2:].replace("-", "_"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)
    }
    logged: list[str] = []
    config = EngineConfig(model=str(model), warmup=False, compilation_cache_dir="", skip_tokenizer_init=True, **options)
    engine = Engine(config, report=logged.append)
    limits = engine.limits
    assert plan["blocks"] == limits.num_blocks - 1
    assert plan["served_len"] == limits.max_model_len
    assert (plan["max_num_seqs"], plan["max_num_batched_tokens"]) == (
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
    )
    assert plan["state"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state_of(engine.runner)))
    assert logged == engine.capacity.lines()
    for line in engine.capacity.cache_lines():
        assert f"  {line}\n" in table
    for name, count, _ in engine.capacity.parts():
        assert re.search(rf"^  {name} +{re.escape(shown_size(count))}$", table, re.MULTILINE)
    assert plan["dtype"] == "float32"
    engine.runner.free()


def state_of(runner: Runner) -> tuple[Any, ...]:
    return runner.tables, runner.last, runner.controls


def test_a_published_model(command: Command, llama: Path) -> None:
    found = json.loads(command("check", llama, "--memory", "80GiB", "--json").out)
    assert found["parameters"] == 8_030_261_248
    assert found["kv_bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    plan = found["plan"]
    assert plan["weights"] == pytest.approx(2 * 8_030_261_248, rel=0.01) and plan["dtype"] == "bfloat16"
    assert plan["fits"] and plan["memory"] == int(80 * 2**30 * 0.9)
    taken = (
        sum(plan[part] for part in ("weights", "state", "step", "slack")) + (plan["blocks"] + 1) * plan["block_bytes"]
    )
    assert plan["memory"] - plan["block_bytes"] < taken <= plan["memory"]
    half = found["alternatives"]["--tensor-parallel-size 2"]
    assert half["weights"] == pytest.approx(plan["weights"] / 2, rel=0.01)
    assert half["block_bytes"] * 2 == plan["block_bytes"]
    assert found["alternatives"]["--max-model-len 8192"]["concurrency"] > 50
    tables, layers = 2 * 128256 * 4096, 8_030_261_248 - 2 * 128256 * 4096  # layers with few values besides weights
    for name, size in {"int4": tables + layers * 67 / 128, "int8": 8.03e9, "fp8": 2 * tables + layers}.items():
        assert found["alternatives"][f"--quantization {name}"]["weights"] == pytest.approx(size, rel=0.003), name


def test_layers_with_a_window_keep_no_more_than_it(command: Command, tmp_path: Path) -> None:
    """Five of six layers attend to 1,024 tokens: at 32k the model takes a quarter of the KV of one without windows."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3_27B))
    said = json.loads(command("check", tmp_path, "--memory", "141GiB", "--max-model-len", "32768", "--json").out)
    token = 2 * 16 * 128 * 2  # bytes in a layer
    assert said["kv_bytes_per_token"] == 62 * token
    plan = said["plan"]
    assert plan["cache_groups"] == 7 and plan["block_bytes"] == 10 * token * 16
    # 10 layers keep all tokens, and 6 groups of 10 layers their window and a partial block at either end.
    assert plan["sequence_bytes"] == 10 * token * 32768 + 60 * token * (1024 + 2 * 16)
    assert plan["kept_share"] == plan["sequence_bytes"] / (62 * token * 32768) < 0.25
    assert plan["tokens"] == int(plan["concurrency"] * 32768)
    room = plan["blocks"] * plan["block_bytes"]
    assert plan["concurrency"] == pytest.approx(room / plan["sequence_bytes"], rel=0.02)
    table = command("check", tmp_path, "--memory", "141GiB", "--max-model-len", "32768").out
    assert "52 of 62 layers keep only a window of 1,024 tokens:" in table
    assert "a sequence of 32,768 takes 2.98 GiB, 19% of what it would take if every layer kept all tokens" in table
    short = json.loads(command("check", tmp_path, "--memory", "141GiB", "--max-model-len", "1024", "--json").out)
    assert short["plan"]["cache_groups"] == 1 and short["plan"]["kept_share"] == 1


def test_models_that_do_not_fit(command: Command, llama: Path) -> None:
    said = command("check", llama, "--memory", "16GiB")
    assert said.code == 1 and "weights" in said.out
    assert (
        said.err.startswith("error: no memory is left for the KV cache: of 14.40 GiB usable per device, ")
        and "set --tensor-parallel-size 2" in said.err
    )
    said = command("check", llama, "--memory", "24GiB", "--max-model-len", "128K")
    assert said.code == 1 and re.search(
        r"the KV cache holds 4\d,\d+ tokens, too few for a sequence of 131,072", said.err
    )
    said = command("check", llama, "--memory", "24GiB")
    assert said.code == 0 and "not the model's 131,072" in said.out
    one_error(
        command("check", llama, "--memory", "24GiB", "--max-model-len", "1M"), 2, "above the model's limit of 131072"
    )
    one_error(command("check", llama, "-tp", "3"), 1, "32 attention heads")
    one_error(command("check", llama / "absent"), 1, "does not exist")
    one_error(command("check", llama, "--memory", "much"), 2, "--memory is 'much'")


def test_weights_that_exceed_the_memory_of_this_machine(
    command: Command, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 8 * 2**30)
    said = command("check", llama)
    assert said.code == 1 and "sequences" not in said.out
    assert "the weights need 29.92 GiB, but only 8.00 GiB of this machine's memory is free" in said.err


def test_the_table(command: Command, llama: Path) -> None:
    out = command("check", llama, "--memory", "80GiB").out
    for change in ("max-model-len 65536", "max-num-seqs 512", "gpu-memory-utilization 0.45", "tensor-parallel-size 2"):
        assert f"  --{change} " in out
    assert "8,030,261,248 in bfloat16" in out and "2.00 MiB per block of 16" in out and "with one flag changed" in out


def test_the_effect_of_each_flag_is_as_predicted(command: Command, tmp_path: Path) -> None:
    model = golden.write_checkpoint("mistral-full", tmp_path / "tiny")
    found = json.loads(command("check", model, "--json").out)["alternatives"]
    flags = {name.split()[0] for name in found}
    sizes = {"--max-model-len", "--max-num-seqs", "--kv-cache-memory-bytes"}
    assert flags == {*sizes, "--kv-cache-dtype", "--dtype", "--quantization"}
    for name, change in found.items():
        assert json.loads(command("check", model, "--json", *name.split()).out)["plan"] == {
            **change,
            "insisted": "--max-model-len" in name,
        }
