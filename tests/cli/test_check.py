# SPDX-License-Identifier: Apache-2.0
"""`jaxserve check` against what an engine really takes, and against published sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
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


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Its config alone."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--max-num-seqs", "3", "--block-size", "8"], ["--num-blocks", "20"]])
def test_the_plan_is_what_the_engine_does(command: Command, tmp_path: Path, words: list[str]) -> None:
    model = golden.write_checkpoint("mistral-full", tmp_path / "tiny")
    said = command("check", model, "--json", *words)
    assert (said.code, said.err) == (0, "")
    plan = json.loads(said.out)["plan"]
    options: dict[str, Any] = {
        name[2:].replace("-", "_"): int(value) for name, value in zip(words[::2], words[1::2], strict=True)
    }
    engine = Engine(
        EngineConfig(model=str(model), warmup=False, compilation_cache_dir="", skip_tokenizer_init=True, **options)
    )
    limits = engine.limits
    assert plan["blocks"] == limits.num_blocks - 1
    assert plan["served_len"] == limits.max_model_len
    assert (plan["max_num_seqs"], plan["max_num_batched_tokens"]) == (
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
    )
    assert plan["state"] == engine.runner.state_bytes()
    assert plan["dtype"] == "float32"
    engine.runner.free()


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


def test_what_does_not_fit(command: Command, llama: Path) -> None:
    said = command("check", llama, "--memory", "16GiB")
    assert said.code == 1 and "weights" in said.out
    assert said.err.startswith("error: it does not fit: ") and "--tensor-parallel-size 2 would do" in said.err
    said = command("check", llama, "--memory", "24GiB", "--max-model-len", "128K")
    assert said.code == 1 and "131,072 tokens does not fit into 4" in said.err
    said = command("check", llama, "--memory", "24GiB")
    assert said.code == 0 and "not the model's 131,072" in said.out
    one_error(command("check", llama, "--memory", "24GiB", "--max-model-len", "1M"), 2, "the model takes 131072")
    one_error(command("check", llama, "-tp", "3"), 1, "32 attention heads")
    one_error(command("check", llama / "absent"), 1, "no folder")
    one_error(command("check", llama, "--memory", "much"), 2, "--memory is 'much'")


def test_the_table(command: Command, llama: Path) -> None:
    out = command("check", llama, "--memory", "80GiB").out
    for change in ("max-model-len 65536", "max-num-seqs 512", "gpu-memory-utilization 0.45", "tensor-parallel-size 2"):
        assert f"  --{change} " in out
    assert "8,030,261,248 in bfloat16" in out and "2.00 MiB per block of 16" in out and "with one flag changed" in out


def test_what_each_flag_changes_is_what_it_gives(command: Command, tmp_path: Path) -> None:
    model = golden.write_checkpoint("mistral-full", tmp_path / "tiny")
    found = json.loads(command("check", model, "--json").out)["alternatives"]
    flags = {name.split()[0] for name in found}
    assert flags == {"--max-model-len", "--max-num-seqs", "--kv-cache-memory-bytes", "--dtype"}
    for name, change in found.items():
        assert json.loads(command("check", model, "--json", *name.split()).out)["plan"] == {
            **change,
            "insisted": "--max-model-len" in name,
        }
