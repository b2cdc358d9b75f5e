# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights as GPUs compute them: the interpreted kernel, in whole models and for each scheme."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load
from jaxserve import LLM, SamplingParams
from jaxserve.models import decoder
from jaxserve.parallel import mesh
from jaxserve.quant import int8
from jaxserve.quant.kinds import KINDS
from jaxserve.quant.scheme import Scheme
from jaxserve.quant.tensor import QuantTensor
from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import MOST_ROWS
from tests.fast import programs
from tests.quant.test_formats import DATA, TOKENS
from tests.quant.test_groups import SCHEMES, made, tensor

TOLERANCE = 1e-2  # of the logits' spread, with activations in float16, which has 11 bits
FLOAT32 = jnp.dtype(jnp.float32)


def kernels(jaxpr: Any) -> Iterator[str]:
    """The names of all kernels that a program calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params["name"]
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "jaxpr"))
        for each in inner:
            if hasattr(each, "jaxpr") and hasattr(each.jaxpr, "eqns"):
                yield from kernels(each.jaxpr)


def computed(spec: Any, params: Any) -> tuple[np.ndarray, int]:
    """A model's logits as a GPU computes them, and how many products the kernel computes."""

    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return decoder.forward(spec, params, tokens)

    with dispatch.use("interpret"):
        traced = jax.jit(forward).trace(params, TOKENS)
    found = traced.lower().compile()(params, TOKENS)
    return np.asarray(found)[0], list(kernels(traced.jaxpr)).count("quant_matmul")


def agrees(found: np.ndarray, case: str) -> None:
    """With transformers', or those of the formula."""
    wanted = np.load(DATA / case / "logits.npy")
    assert np.abs(found - wanted).max() < TOLERANCE * wanted.std(), np.abs(found - wanted).max() / wanted.std()


CASES = {  # how many of qkv, out, gate_up and down
    "awq-32": 4,
    "awq-64": 4,
    "awq-rows": 4,
    "awq-symmetric": 4,
    "gptq-4": 4,
    "gptq-4-asymmetric": 4,
    "gptq-8": 4,
    "ct-w4a16": 4,
    "ct-w4a16-asymmetric": 4,
    "ct-w8a16": 4,
    "fp8-tensor": 4,
    # Columns in any order would need their codes in another one; they are decoded.
    "gptq-4-ordered": 0,
    "ct-w4a16-ordered": 0,
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint(case: str) -> None:
    spec, params = load.load_model(DATA / case, dtype="float16")
    found, count = computed(spec, params)
    assert count == CASES[case]
    agrees(found, case)


@pytest.mark.parametrize("case", ["awq-rows", "gptq-4-asymmetric", "ct-w8a16", "gptq-4-ordered"])
def test_a_checkpoint_on_two_devices(case: str) -> None:
    """Halves of columns that the kernel does not take, 32 in groups of 32, are decoded."""
    with jax.set_mesh(mesh.make_mesh(tensor=2)):
        spec, params = load.load_model(DATA / case, dtype="float16")
        found, count = computed(spec, params)
    assert count == {"awq-rows": 2, "gptq-4-asymmetric": 2, "ct-w8a16": 4, "gptq-4-ordered": 0}[case]
    agrees(found, case)


OPTIONS: dict[str, Any] = dict(
    max_num_seqs=2,
    max_num_batched_tokens=16,
    max_model_len=64,
    num_blocks=32,
    block_size=8,
    skip_tokenizer_init=True,
    warmup=False,
)


def test_an_engine() -> None:
    """Its tokens are those of the same checkpoint on a CPU."""
    prompts = [TOKENS[0].tolist(), [1, 2, 3]]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    def answers(**options: Any) -> list[list[int]]:
        llm = LLM(str(DATA / "awq-64"), **OPTIONS, **options)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, greedy)]

    wanted = answers(dtype="float32", compilation_cache_dir=programs())
    with dispatch.use("interpret"):
        assert answers(dtype="float16", compilation_cache_dir="") == wanted


# --- each scheme ------------------------------------------------------------------------------------------------

TAKEN = {"4 bits, zeros, bfloat16", "6 bits signed", "8 bits signed, rows", "float8", "float8 by row"}


def agrees_with(weight: np.ndarray, held: QuantTensor, *, tokens: int) -> bool:
    """Whether the kernel computes the product; it must have the weight's values either way."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, weight.shape[1])), jnp.bfloat16)
    with dispatch.use("interpret"):
        traced = jax.jit(lambda x: held.matmul(x, FLOAT32)).trace(x)
    found = np.asarray(traced.lower().compile()(x))
    wanted = np.asarray(x).astype(np.float64) @ weight.T
    assert np.linalg.norm(found - wanted) < 6e-3 * np.linalg.norm(wanted)
    return "quant_matmul" in kernels(traced.jaxpr)


@pytest.mark.parametrize("name", SCHEMES)
def test_each_scheme(name: str) -> None:
    bits, scheme = SCHEMES[name]
    arrays, weight = made(bits, scheme)
    assert agrees_with(weight, tensor(scheme, arrays), tokens=3) == (name in TAKEN)


@pytest.mark.parametrize("scheme", [int8.FUSED, int8.ALONE], ids=["fused", "alone"])
def test_int8(scheme: Scheme) -> None:
    weight = jnp.asarray(np.random.default_rng(2).standard_normal((24, 64)), jnp.float32)
    held = KINDS["int8"](int8.encode(scheme, weight), scheme)
    values = np.asarray(held.dense(FLOAT32)).astype(np.float64)
    assert agrees_with(values, held, tokens=3)
    assert not agrees_with(values, held, tokens=MOST_ROWS + 1)


@pytest.mark.parametrize("name", ["4 bits, zeros, bfloat16", "float8"])
def test_many_rows_are_multiplied_by_the_decoded_weight(name: str) -> None:
    bits, scheme = SCHEMES[name]
    arrays, weight = made(bits, scheme)
    assert not agrees_with(weight, tensor(scheme, arrays), tokens=MOST_ROWS + 1)
