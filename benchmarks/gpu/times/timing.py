# SPDX-License-Identifier: Apache-2.0
"""Times an op on the device, without the host.

One jitted function makes N calls of the op, each depending on the one before, so that none can be dropped, merged or
run in parallel. The inputs rotate through sets that together are several times larger than the L2 cache. The time per
call is the slope between two values of N: dispatch, launch and synchronization are the same in both and cancel out.
"""

import contextvars
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.book import Page, Row, describe, read_rows

# XLA makes a CUDA graph of five or more kernels. Both values of N are well above, so both programs run as a graph.
FEWEST_CALLS = 8
_TIMED_US = 1500.0  # the time that the extra calls of the larger N should take
BEYOND_CACHE = 300e6  # bytes of all input sets together; the L2 cache of an H200 has 60 MB


class Arrays(NamedTuple):
    """The arguments of a chain of calls."""

    carry: Any  # passed from each call to the next
    fixed: Any  # the same in every call
    sets: Sequence[Any]  # call i takes set i, cyclically


type ChainStep = Callable[[Any, Any, Any], Any]  # step(carry, fixed, one of the sets) -> carry


@dataclass(frozen=True)
class Aim:
    """A target for one H200. copy_pct is a percentage of the measured copy bandwidth."""

    quantity: str  # a key of the row
    value: float
    at_most: bool = False

    def met(self, row: Row) -> bool | None:
        found = row.get(self.quantity)
        if found is None or row.get("us") is None:
            return None
        return bool(found <= self.value if self.at_most else found >= self.value)

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='}{self.value:g} {self.quantity}"


@dataclass(frozen=True)
class Timed:
    """One op at one shape."""

    name: str
    pool: tuple[jax.ShapeDtypeStruct, ...]  # the large arrays that it works on, filled with random numbers
    arrays: Callable[[tuple[jax.Array, ...]], Arrays]  # from the pool
    step: ChainStep
    bytes: float = 0.0  # the least that one call must move
    flops: float = 0.0
    donate: bool = False  # the carry is updated in place
    target: Aim | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def on_device(self, pool: tuple[jax.Array, ...]) -> Arrays:
        """The arrays on the device: otherwise every call would include a copy from the host."""
        return jax.tree.map(jnp.asarray, self.arrays(pool))

    def abstract(self) -> Arrays:
        """The shapes of the arrays, without making them."""
        return Arrays(*jax.eval_shape(lambda pool: tuple(self.arrays(pool)), self.pool))

    def chain(self, calls: int) -> Callable[[Any, Any, Any], Any]:
        # Jitted separately, so that the op is traced once and not once per call.
        step = jax.jit(self.step)

        def run(carry: Any, fixed: Any, sets: Sequence[Any]) -> Any:
            for i in range(calls):
                carry = step(carry, fixed, sets[i % len(sets)])
            return carry

        return jax.jit(run, donate_argnums=0 if self.donate else ())

    def compile(self, calls: int, **options: Any) -> Any:
        return self.chain(calls).lower(*self.abstract()).compile(compiler_options=options or None)


def sets_needed(bytes_per_set: float) -> int:
    return int(min(max(-(-BEYOND_CACHE // max(bytes_per_set, 1)), 2), 16))


def random_pool(spec: jax.ShapeDtypeStruct, seed: int = 0) -> jax.Array:
    """Random numbers that repeat after a few million, which is fast to create and does not affect the time."""

    def make() -> jax.Array:
        size = int(np.prod(spec.shape[1:]))
        base = max(1, min(spec.shape[0], 2**24 // size))
        some = jax.random.normal(jax.random.key(seed), (base, *spec.shape[1:]), jnp.float32)
        some = (some * 40).astype(spec.dtype) if spec.dtype == jnp.int8 else some.astype(spec.dtype)
        return jnp.tile(some, (-(-spec.shape[0] // base), *(1,) * (len(spec.shape) - 1)))[: spec.shape[0]]

    return jax.jit(make)()


class Pools:
    """Keeps the last case's pools for the next case with the same shapes."""

    def __init__(self) -> None:
        self._specs: Any = None
        self._arrays: tuple[jax.Array, ...] = ()

    def get(self, specs: tuple[jax.ShapeDtypeStruct, ...]) -> tuple[jax.Array, ...]:
        if specs != self._specs:
            self.drop()
            self._arrays, self._specs = tuple(random_pool(spec, i) for i, spec in enumerate(specs)), specs
        return self._arrays

    def drop(self) -> None:
        for array in self._arrays:
            if not array.is_deleted():
                array.delete()
        self._specs, self._arrays = None, ()


class Timing(NamedTuple):
    us: float  # per call
    spread: float  # interquartile range, relative
    fixed_us: float  # the part that does not grow with the number of calls


def run_once(compiled: Any, arrays: Arrays) -> tuple[float, Any]:
    """Seconds, and the final carry."""
    started = time.perf_counter()
    carry = compiled(*arrays)
    jax.block_until_ready(carry)
    return time.perf_counter() - started, carry


def slope(programs: dict[int, Any], arrays: Arrays, *, donate: bool, repeats: int = 11) -> Timing:
    """The time per call, from two programs with different numbers of calls that run alternately."""
    (few, small), (many, large) = sorted(programs.items())

    def once(program: Any) -> float:
        nonlocal arrays
        seconds, carry = run_once(program, arrays)
        if donate:  # the old carry is gone
            arrays = arrays._replace(carry=carry)
        return seconds

    for program in (small, large) * 2:
        once(program)
    pairs = [(once(small), once(large)) for _ in range(repeats)]
    per_call = sorted(1e6 * (b - a) / (many - few) for a, b in pairs)
    us = float(np.median(per_call))
    low, high = np.quantile(per_call, (0.25, 0.75))
    fixed = float(np.median([1e6 * a for a, _ in pairs])) - few * us
    return Timing(us, float((high - low) / us) if us > 0 else float("inf"), fixed)


def calls_for(estimate_us: float, *, tiny: bool) -> tuple[int, int]:
    if tiny:
        return 1, 2
    return FEWEST_CALLS, FEWEST_CALLS + int(min(max(_TIMED_US / estimate_us, 8), 40))


class Ceilings(NamedTuple):
    """The rates that the `machine` section measured; None if it did not."""

    copy: float | None  # GB/s, bytes read plus bytes written
    matmul: float | None  # TFLOP/s, bfloat16

    @classmethod
    def load(cls, page: Page) -> "Ceilings":
        rows = read_rows(page.settings.out / "machine.json")
        return cls(rows.get("copy", {}).get("gbps"), rows.get("matmul bfloat16", {}).get("tflops"))


def achieved(case: Timed, timing: Timing, ceilings: Ceilings) -> Row:
    """The row of a timing: rates, shares of the ceilings, and the target if there is one."""
    row: Row = {**case.facts, "us": timing.us, "spread": timing.spread, "fixed_us": timing.fixed_us}
    row |= {"bytes": case.bytes, "flops": case.flops}
    if timing.us <= 0:  # the noise exceeded the time of the calls: report no time
        row |= {"us": None, "noise_us": timing.us}
    else:
        row["gbps"] = case.bytes / timing.us / 1e3
        row["tflops"] = case.flops / timing.us / 1e6
        row["copy_pct"] = 100 * row["gbps"] / ceilings.copy if ceilings.copy else None
        row["matmul_pct"] = 100 * row["tflops"] / ceilings.matmul if ceilings.matmul else None
    row["target"] = None if case.target is None else str(case.target)
    row["met"] = None if case.target is None else case.target.met(row)
    return row


COLUMNS = ("us", "spread", "gbps", "copy_pct", "tflops", "matmul_pct", "target", "met")


def in_threads[C, R](function: Callable[[C], R], cases: Sequence[C], *, threads: int = 12) -> list[R | Exception]:
    """Applies `function` to the cases in parallel: compilation releases the GIL. Exceptions are results."""

    def caught(case: C) -> R | Exception:
        try:
            return function(case)
        except Exception as error:
            return error

    # Threads do not inherit the context, which holds the forced implementation of the ops.
    contexts = [contextvars.copy_context() for _ in cases]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda pair: pair[0].run(caught, pair[1]), zip(contexts, cases, strict=True)))


def run(page: Page, cases: Sequence[Timed], *, at_once: int = 12) -> None:
    """Times the cases: compiles a few in parallel, then measures them one after the other."""
    tiny = page.settings.tiny
    ceilings = Ceilings.load(page)
    pools = Pools()

    def compile_pair(case: Timed) -> dict[int, Any]:
        floor_us = max(case.bytes / 4e6, case.flops / 7e8)
        return {n: case.compile(n) for n in calls_for(1.5 * floor_us + 3, tiny=tiny)}

    def measure(pair: tuple[Timed, Any]) -> Row:
        case, programs = pair
        if isinstance(programs, Exception):
            return {"ok": False, "error": describe(programs)}
        arrays = case.on_device(pools.get(case.pool))
        try:
            return achieved(case, slope(programs, arrays, donate=case.donate), ceilings)
        finally:
            if case.donate:
                pools.drop()  # the pool was donated

    try:
        for start in range(0, len(cases), at_once):
            some = cases[start : start + at_once]
            programs = in_threads(compile_pair, some) if page.time_left() > 0 else [None] * len(some)
            page.each(zip(some, programs, strict=True), measure, name=lambda pair: pair[0].name)
    finally:
        pools.drop()
