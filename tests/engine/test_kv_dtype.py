# SPDX-License-Identifier: Apache-2.0
"""A KV cache in another dtype than the weights: what it holds, what it takes, and how little it changes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import capacity
from jaxserve.engine.capacity import Memory, resolve
from jaxserve.models.mesh_fit import Fit
from jaxserve.types.request import Request
from jaxserve.types.sampling_params import SamplingParams
from tests.engine.driver import FULL, LONGEST, MIXED, Driver, Streams, alone, public_of
from tests.engine.workloads import random_jobs, run
from tests.models import tiny

# How far log probabilities of prompts may be from those with float32 KV. A value of int8 is off by 0.4 % of the head's
# largest at most, of float8 by 3.1 or 6.3 % of itself; the tiny model's log probabilities are spread over about 5.
NEAR = {"bfloat16": 0.05, "float16": 0.01, "int8": 0.05, "fp8": 0.3, "fp8_e4m3": 0.3, "fp8_e5m2": 0.6}
POOLS = {"bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
ONE_BYTE = ("int8", "fp8", "fp8_e5m2")


def prompts(count: int) -> list[Request]:
    random = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=0, ignore_eos=True)
    return [
        Request(id=str(i), prompt_token_ids=random.integers(FULL.vocab_size, size=LONGEST - 8).tolist(), params=params)
        for i in range(count)
    ]


def of_prompts(streams: Streams) -> np.ndarray:
    return np.array([[entry.logprob for entry in stream.prompt_logprobs] for stream in streams.values()])


@pytest.mark.parametrize("name", NEAR)
def test_log_probabilities_change_little(name: str) -> None:
    asked = prompts(3)
    wanted = of_prompts(Driver(eos=False).finish(*asked))
    driver = Driver(eos=False, kv_cache_dtype=name)
    got = of_prompts(driver.finish(*asked))
    difference = np.abs(got - wanted).max()
    assert 0 < difference < NEAR[name]
    assert np.abs(got - wanted).mean() < NEAR[name] / 4


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    driver = Driver(kv_cache_dtype=name)
    for layer in driver.runner.cache:
        blocks, size, heads, _ = layer["k"].shape
        assert layer["k"].dtype == layer["v"].dtype == jnp.dtype(POOLS[name])
        if name in ONE_BYTE:
            assert layer["k_scale"].shape == layer["v_scale"].shape == (blocks, size, heads)
            assert layer["k_scale"].dtype == jnp.float32
        else:
            assert {*layer} == {"k", "v"}
    driver.finish(*prompts(1))
    assert (np.asarray(driver.runner.cache[0]["k"]).astype(np.float32) != 0).any()


@pytest.mark.parametrize("spec", [FULL, MIXED], ids=["full", "mixed"])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_results_hardly_depend_on_the_road(name: str, spec: Any) -> None:
    """Chunks, cached prefixes, copied blocks and preemptions keep a token's codes and scales together. Programs of
    other shapes sum in another order, so that a value may be stored as the next code; nothing more may change."""
    always = {"logprobs": 0, "prompt_logprobs": None}
    jobs = [job for seed in (1, 2) for job in random_jobs(seed, count=9, always=always)]
    wanted = alone(
        Driver(spec, async_scheduling=False, enable_prefix_caching=False, kv_cache_dtype=name),
        [job.request for job in jobs],
    )
    ways: list[dict[str, Any]] = [{}, {"budget": 5}, {"spare": LONGEST // 8, "budget": 16}]
    for options in ways:
        driver = Driver(spec, kv_cache_dtype=name, **options)
        for _ in range(2):
            got = run(driver, jobs)
            near = compared = 0
            for key, stream in got.items():
                pairs = zip(stream.tokens, wanted[key].tokens, stream.logprobs, wanted[key].logprobs, strict=False)
                for mine, other, logprob, right in pairs:
                    if mine != other:  # a tie that rounding decided: what follows differs
                        break
                    assert abs(logprob.logprob - right.logprob) < NEAR[name] / 2
                    near += abs(logprob.logprob - right.logprob) < 1e-4
                    compared += 1
            assert compared > 0.8 * sum(len(stream.tokens) for stream in got.values())
            assert near > 0.8 * compared
    assert driver.copied


def test_tensor_parallel() -> None:
    asked = prompts(2)
    wanted = of_prompts(Driver(eos=False, kv_cache_dtype="int8").finish(*asked))
    sharded = Driver(params=public_of(FULL), eos=False, kv_cache_dtype="int8", tensor_parallel_size=4)
    scales = sharded.runner.cache[0]["k_scale"]
    assert scales.sharding.shard_shape(scales.shape)[2] * 4 == scales.shape[2]
    np.testing.assert_allclose(of_prompts(sharded.finish(*asked)), wanted, atol=NEAR["int8"] / 2)


# --- sizes ----------------------------------------------------------------------------------------------------------


def sizes(dtype: Any = "bfloat16", *, shards: Any = 1, **config: Any) -> capacity.Capacity:
    memory = Memory(on_cpu=False, dtype=dtype, fitted=Fit(shards))
    return resolve(EngineConfig(model="x", max_num_seqs=4, **config), FULL, memory)


def test_bytes() -> None:
    """Two layers, two KV heads of dimension 8: 64 values per token, and 8 scales of four bytes."""
    assert sizes().token_bytes == 128
    assert sizes("float32", kv_cache_dtype="bfloat16").token_bytes == 128
    assert sizes(kv_cache_dtype="float32").token_bytes == 256
    assert sizes(kv_cache_dtype="int8").token_bytes == 64 + 32
    assert sizes(kv_cache_dtype="fp8", shards=2).token_bytes == 32 + 16
    fixed = {"kv_cache_memory_bytes": 96_000 * 16}
    assert sizes(kv_cache_dtype="fp8", **fixed).limits.num_blocks == 1000
    assert sizes(**fixed).limits.num_blocks == 750


def test_pools_that_kernels_cannot_address_are_avoided() -> None:
    per_block = 16 * 2 * 8  # values in a pool, one byte each
    most = (2**31 - 1) // per_block
    given = {"kv_cache_memory_bytes": 3 * 2**30 * 6}  # four pools, and half as much for scales
    assert sizes(kv_cache_dtype="int8", **given).limits.num_blocks == most
    assert sizes(**given).limits.num_blocks > most
    with pytest.raises(ConfigError, match=f"at most {most} or at least 16777217"):
        sizes(kv_cache_dtype="int8", num_blocks=most + 2)
    assert sizes(kv_cache_dtype="int8", num_blocks=2**24 + 1).limits.num_blocks == 2**24 + 1


def test_latents() -> None:
    """MLA has one latent for all heads, whose parts have different sizes: one scale would not do."""
    spec = tiny.model(tiny.block(tiny.MLA, tiny.MLP))
    memory = Memory(on_cpu=True, dtype="bfloat16")
    with pytest.raises(ConfigError, match="kv_cache_dtype is fp8, but this model caches latents"):
        resolve(EngineConfig(model="x", kv_cache_dtype="fp8"), spec, memory)
    assert resolve(EngineConfig(model="x", kv_cache_dtype="float16"), spec, memory).kv_dtype == "float16"
