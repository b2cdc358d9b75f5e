# SPDX-License-Identifier: Apache-2.0
"""Holds all device arrays: parameters, KV cache, block tables, each row's last token and length, sampling controls.
Nothing else does.

    warm(progress)        compiles every program that a step can need, or a covering set of them
    adopt(key, program)   lets steps use one that was compiled later
    launch(message)       dispatches one step to the devices and returns without waiting
    read(handle)          waits for its result

State is donated to each program and returned by it, so that after `warm` only small results are allocated.
"""

import atexit
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Self
from weakref import WeakSet

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxserve import machine
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.buckets import SMALLEST_MIXED, Available, Kind
from jaxserve.engine.capacity import Capacity
from jaxserve.engine.execute import compiler, layerwise, programs
from jaxserve.engine.execute.background import Background
from jaxserve.engine.execute.layerwise import Layerwise
from jaxserve.engine.execute.loading import Opened
from jaxserve.engine.execute.model_programs import StepSpec
from jaxserve.engine.execute.program_store import Store
from jaxserve.engine.execute.programs import Program
from jaxserve.engine.execute.weights import device_of, shapes_of
from jaxserve.engine.schedule import masks, need, packing
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import Ints, Layout, StepMessage
from jaxserve.engine.schedule.plan import StepResult
from jaxserve.models import decoder, kv_cache
from jaxserve.models.decoder import Params
from jaxserve.models.linear import activations
from jaxserve.models.spec import ModelSpec
from jaxserve.sampling import control_row, controls

type OnCompiled = Callable[[int, int, float], None]  # programs compiled, of how many, seconds


@dataclass(slots=True)
class Handle:
    """A step that was launched."""

    message: StepMessage
    hidden: Any  # until the head is launched; if there is nothing else to read, to wait for
    entries: Any
    result: Any = None  # being copied to the host, as are embeddings; None if the step needs no logits
    embeddings: Any = None


SETTLING = 0.02  # seconds

# Identifies a program: a bucket of `model`, `head` or `embed`, or the name of another program.
type ProgramKey = Layout | tuple[int, Variant] | tuple[str, int] | str


def bucket_of(key: ProgramKey) -> tuple[Kind, int]:
    """What kind of program it is, and its size. A program of a kind can stand in for smaller ones of that kind."""
    match key:
        case Layout():
            return ("decode", key.rows) if key.decode else ("mixed", key.tokens)
        case ("embed", int(size)):
            return "embed", size
        case (int(size), Variant() as head):
            return head, size
        case _:
            return key, 1


def _common(kind: Kind) -> bool:
    """Whether ordinary requests use this kind of program."""
    return kind in ("decode", "mixed") or (isinstance(kind, Variant) and kind.top_n is None and not kind.controlled)


def _rank(key: ProgramKey) -> tuple[bool, int]:
    """The order in which programs are compiled in the background: those that replace the most padding first."""
    kind, size = bucket_of(key)
    return not _common(kind), size // SMALLEST_MIXED if kind == "mixed" else size


_RUNNERS: "WeakSet[Runner]" = WeakSet()


@atexit.register
def settle() -> None:
    """Wait for steps in flight, and release the GIL once, before the process exits: jax's threads take the GIL after
    copying a result to the host, which aborts an exiting process."""
    for runner in _RUNNERS:
        with suppress(Exception):  # its arrays are freed, or its device has failed
            jax.block_until_ready(runner.last)
    time.sleep(SETTLING)


class Runner:
    """Runs steps on the mesh, or without one on the device that holds the parameters."""

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        capacity: Capacity,
        *,
        processed: bool = False,
        mesh: Any = None,
        store: Store | None = None,
    ) -> None:
        """`processed`: log probabilities are those of the distribution that is sampled from, not of the raw one."""
        self.spec, self.limits, self.buckets, self.mesh = spec, capacity.limits, capacity.buckets, mesh
        self.groups, self._processed, self._store = capacity.groups, processed, store
        self._variants = need.variants(capacity.limits.max_logprobs)  # of the head, by the need that each covers
        self.params: Params = params  # only their shapes until `warm`, if they are still being read
        # A program gets what it reads and no more: every call passes over all arguments.
        self._body_names, self._head_names = (decoder.names(part, spec) for part in (decoder.Body, decoder.Head))
        self._body_shapes, self._head_shapes = shapes_of((self._body, self._head))
        self.dtype, self.kv_dtype = jnp.dtype(spec.dtype), jnp.dtype(capacity.kv_dtype)
        self.device = None if mesh is not None else device_of(params)
        self._everywhere = SingleDeviceSharding(self.device) if mesh is None else NamedSharding(mesh, P())
        self._executables: dict[ProgramKey, Any] = {}
        self.available = Available(map(bucket_of, self.every_key()))
        _RUNNERS.add(self)
        self.compiled_late = 0
        # Only shapes until `allocate`: compilers autotune, in memory that the KV cache would take.
        self._state = self._abstract_state()
        self.cache, self.tables, self.last, self.controls = self._state

    @classmethod
    def of(cls, config: EngineConfig, model: Opened, capacity: Capacity, store: Store | None) -> Self:
        """For a model with parameters that may still be unread."""
        processed = config.logprobs_mode == "processed_logprobs"
        return cls(model.spec, model.shapes, capacity, processed=processed, mesh=model.mesh, store=store)

    @property
    def _body(self) -> Params:
        return {name: self.params[name] for name in self._body_names}

    @property
    def _head(self) -> Params:
        return {name: self.params[name] for name in self._head_names}

    # --- memory -----------------------------------------------------------------------------------------------------

    def allocate(self) -> None:
        """Allocate all device state except the parameters, as zeros."""
        with self.on_mesh():
            try:
                self.cache, self.tables, self.last, self.controls = self._executable("fresh")()
                jax.block_until_ready(self.cache)
            except jax.errors.JaxRuntimeError as error:
                problem = f"the devices do not have enough memory for {self.limits.num_blocks} KV blocks: {error}"
                raise ConfigError(
                    problem, "lower num_blocks, kv_cache_memory_bytes or gpu_memory_utilization"
                ) from None

    def _abstract_state(self) -> tuple[Any, Any, Any, Any]:
        limits, rows = self.limits, self.buckets.rows
        with self.on_mesh():
            pools = kv_cache.abstract_cache(
                self.spec,
                blocks=limits.num_blocks,
                block_size=limits.block_size,
                dtype=self.kv_dtype,
                groups=self.groups,
                rows=rows,
            )
        cache = [
            {name: pool.update(sharding=pool.sharding or self._everywhere) for name, pool in layer.items()}
            for layer in pools
        ]
        tables = self._abstract((limits.groups, rows, limits.width), jnp.int32)
        last = self._abstract((rows, 2), jnp.int32)
        return cache, tables, last, controls.abstract(rows, self.spec.vocab_size, self._everywhere)

    def free(self) -> None:
        """Free all device state except the parameters."""
        for array in jax.tree.leaves((self.cache, self.tables, self.last, self.controls)):
            array.delete()

    def forget_programs(self) -> None:
        """Run no more steps: executables go with the last engine that has them."""
        self._executables.clear()

    def largest_step(self) -> int:
        """Bytes per device of the temporaries and results of the largest programs, which it compiles."""
        buckets = self.buckets
        tokens = self.mixed_layout(buckets.tokens)
        return max(
            compiler.EXECUTABLES.extra(self._executable(key)) for key in (tokens, (buckets.entries, self.heads[-1]))
        )

    def on_mesh(self) -> Any:
        return jax.set_mesh(self.mesh) if self.mesh is not None else jax.default_device(self.device)

    # --- programs ---------------------------------------------------------------------------------------------------

    def every_key(self) -> list[ProgramKey]:
        """All programs that a step can need, the largest first, since they take longest to compile."""
        buckets = self.buckets
        return [
            *map(self.mixed_layout, reversed(buckets.mixed)),
            *map(self.decode_layout, reversed(buckets.decode)),
            *((rows, head) for head in reversed(self.heads) for rows in reversed(self._ladder(head))),
            *(("embed", rows) for rows in reversed(buckets.scoring_heads)),
            "edit",
            *(["copy_states"] if self.groups.states else []),
            *(("set_rows", rows) for rows in control_row.ROWS_AT_ONCE),
            "add_counts",
            "set_masks",
        ]

    def decode_layout(self, rows: int) -> Layout:
        return packing.decode_layout(rows, self.limits.groups)

    def mixed_layout(self, tokens: int) -> Layout:
        return packing.mixed_layout(tokens, self.buckets, self.limits.block_size, self.limits.groups)

    def covering(self) -> list[ProgramKey]:
        """The programs that an engine must have to serve every request, padded: the largest size of each kind. Of the
        heads the last, which stands in for all others, and the first, which is cheap to compile and to run."""
        largest: dict[Kind, int] = {}
        for kind, size in map(bucket_of, self.every_key()):
            largest[kind] = max(size, largest.get(kind, 0))
        for head in self.heads[1:-1]:
            del largest[head]
        return [key for key in self.every_key() if bucket_of(key) in largest.items()]

    def missing(self, report: Callable[[str], None]) -> Background[ProgramKey]:
        """Compiles the missing programs: those for common requests first, and of these the smallest."""
        keys = [key for key in self.every_key() if key not in self._whole]
        with self.on_mesh():
            wanted = [(key, self.program(key)) for key in sorted(keys, key=_rank)]
            return Background(wanted, where=compiler.current(), store=self._store, report=report)

    @property
    def _whole(self) -> set[ProgramKey]:
        """The programs that it has, except those in pieces."""
        return {key for key, executable in self._executables.items() if not isinstance(executable, Layerwise)}

    @property
    def num_compiled(self) -> int:
        return len(self._whole - {"fresh"})

    @property
    def compiles_by_layers(self) -> bool:
        """Whether programs of layers compile faster in pieces. On a GPU the whole ones must be known, for their memory;
        of a mesh, pieces are not built."""
        return self.mesh is None and self.on_cpu and layerwise.worth_it(self.spec)

    def _layerwise(self, layout: Layout) -> Layerwise:
        arguments = self._body_shapes, *self._state[:3], self._vector(layout.size)
        return Layerwise(self._step(layout), arguments, self._everywhere)

    def _step(self, layout: Layout) -> StepSpec:
        limits = self.limits
        return StepSpec(self.spec, self.groups, layout, self.buckets.entries, limits.rope_length, limits.block_size)

    def warm(
        self,
        progress: OnCompiled | None = None,
        weights: Future[Params] | None = None,
        *,
        keys: list[ProgramKey] | None = None,
        by_layers: bool = False,
    ) -> None:
        """Compile all programs while `weights`, if given, are read; then allocate the state. Programs that are compiled
        later, during a step, are counted in `compiled_late`. `keys`: only these, and steps use no others. `by_layers`:
        those of layers in pieces, until the whole programs, which stay `missing`, are adopted."""
        if keys is not None:
            self.available = Available(map(bucket_of, keys))
        keys = [*(self.every_key() if keys is None else keys), "fresh"]
        keys = [key for key in keys if key not in self._executables]
        with self.on_mesh():
            pieces = {key: self._layerwise(key) for key in keys if by_layers and isinstance(key, Layout)}
            whole = [key for key in keys if key not in pieces]  # they take longer, so come first
            wanted = {key: [self.program(key)] for key in whole} | {key: pieces[key].programs for key in pieces}
            compiled = compiler.compile_all(
                list(chain.from_iterable(wanted.values())),
                workers=min(16, machine.cpus()),
                store=self._store,
                progress=progress,
                beside=weights,
            )
        made = iter(compiled)
        for key, parts in wanted.items():
            executables = list(islice(made, len(parts)))
            if isinstance(key, Layout) and key in pieces:
                pieces[key].executables = executables
                self._executables[key] = pieces[key]
            else:
                self._executables[key] = executables[0]
        if weights is not None:
            self.params = weights.result()
        if self.last is self._state[2]:
            self.allocate()
        if not self.on_cpu:
            self.exercise(keys)
            jax.block_until_ready((self.cache, self.last))

    @property
    def on_cpu(self) -> bool:
        return next(iter(self._everywhere.device_set)).platform == "cpu"

    def adopt(self, key: ProgramKey, executable: Any) -> None:
        """Let steps use this program from the next one on."""
        self._executables[key] = executable
        if not self.on_cpu:
            self.exercise([key])
        self.available.add(*bucket_of(key))

    def exercise(self, keys: Iterable[ProgramKey] | None = None) -> None:
        """Run every program once, or these, on padding: a device loads code and captures graphs at the first run."""
        keys = self.every_key() if keys is None else keys
        smallest = self.decode_layout(self.available.fitting("decode", 1))
        models = [key for key in keys if isinstance(key, Layout)] or [smallest]  # the others need their results
        hidden = entries = None
        for key in (*models, *(key for key in keys if not isinstance(key, Layout))):
            match key:
                case Layout():
                    vector = self._put(packing.padding(key, self.buckets))
                    hidden, entries, self.cache, self.tables = self._executable(key)(
                        self._body, self.cache, self.tables, self.last, vector
                    )
                case ("embed", _):
                    self._executable(key)(self._head, hidden)
                case (int(), Variant() as head):
                    kept = self.controls if head.controlled else None
                    self.last, kept, _ = self._executable(key)(self._head, self.last, kept, hidden, entries)
                    self.controls = kept or self.controls
                case "edit":
                    nothing = self._put(np.full(packing.EDIT_SIZE, -1, np.int32))
                    self.cache, self.tables = self._executable(key)(self.cache, self.tables, nothing)
                case "copy_states":
                    nothing = self._put(np.full((2, packing.STATES_AT_ONCE), -1, np.int32))
                    self.cache = self._executable(key)(self.cache, nothing)
                case _:
                    pass

    @property
    def heads(self) -> list[Variant]:
        """The variants of the head, the cheapest first."""
        return list(self._variants.values())

    def _ladder(self, head: Variant) -> tuple[int, ...]:
        return packing.head_sizes(self.buckets, head)

    def _executable(self, key: ProgramKey) -> Any:
        found = self._executables.get(key)
        if found is None:
            self.compiled_late += key != "fresh"
            with self.on_mesh():
                found = self._executables[key] = compiler.compiled(self.program(key), self._store)
        return found

    def program(self, key: ProgramKey) -> Program:
        spec, most = self.spec, self.buckets.entries
        cache, tables, last, controlled = self._state
        match key:
            case Layout():
                given = (self._body_shapes, cache, tables, last, self._vector(key.size))
                return self._with_shapes(programs.model, (self._step(key),), *given)
            case ("embed", int(rows)):
                return self._with_shapes(programs.embed, (spec, rows), self._head_shapes, self._hidden())
            case (int(rows), Variant() as head):
                entries = self._abstract((most, len(packing.ENTRY)), jnp.int32)
                kept = controlled if head.controlled else None
                given = (self._head_shapes, last, kept, self._hidden(), entries)
                return self._with_shapes(programs.head, (spec, rows, head, self._processed), *given)
            case ("set_rows", int(rows)):
                vectors = self._abstract((rows, control_row.row_size(spec.vocab_size)), jnp.int32)
                return self._with_shapes(controls.set_rows, (), controlled, vectors)
            case "fresh":
                leaves, tree = jax.tree.flatten(self._state)
                return Program(programs.fresh, (tree, tuple(leaves)), ())
            case "edit":
                return self._with_shapes(programs.edit, (), cache, tables, self._vector(packing.EDIT_SIZE))
            case "copy_states":
                vectors = self._abstract((2, packing.STATES_AT_ONCE), jnp.int32)
                return self._with_shapes(programs.copy_states, (), cache, vectors)
            case "set_masks":
                width = 1 + control_row.mask_words(spec.vocab_size)
                vectors = self._abstract((masks.ROWS_AT_ONCE, width), jnp.int32)
                return self._with_shapes(controls.set_masks, (), controlled, vectors)
            case "add_counts":
                return self._with_shapes(
                    controls.add_counts, (), controlled, self._abstract(control_row.COUNT_SHAPE, jnp.int32)
                )
            case _:
                raise ValueError(f"there is no program {key!r}")

    def _with_shapes(self, function: Any, static: tuple[Any, ...], *given: Any) -> Program:
        return Program(function, static, shapes_of(given))

    def _abstract(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere)

    def _hidden(self) -> jax.ShapeDtypeStruct:
        with jax.set_mesh(self.mesh):
            dtype = activations(self.dtype)
        return self._abstract((self.buckets.entries, self.spec.hidden), dtype)

    def _vector(self, size: int) -> jax.ShapeDtypeStruct:
        return self._abstract((size,), jnp.int32)

    # --- steps ------------------------------------------------------------------------------------------------------

    def launch(self, message: StepMessage) -> Handle:
        handle = self.launch_model(message)
        self.launch_head(handle, message.masks)
        return handle

    def launch_model(self, message: StepMessage) -> Handle:
        """The first part of `launch`, which needs nothing that earlier steps sample."""
        before = [*message.edits, *message.states, *message.controls, *message.counts]
        vector, *arrays = self._put([message.vector, *before]) if before else (self._put(message.vector),)
        if arrays:
            self._prepare(message, arrays)
        run = self._executable(message.layout)
        hidden, entries, self.cache, self.tables = run(self._body, self.cache, self.tables, self.last, vector)
        return Handle(message, hidden, entries)

    def launch_head(self, handle: Handle, vectors: Sequence[Ints] = ()) -> None:
        """The second part, with the masks of rows whose next token depends on the last one."""
        message, hidden = handle.message, handle.hidden
        for each in vectors:
            self.controls = self._executable("set_masks")(self.controls, self._put(each))
        if message.embeds:
            embed = self._executable(("embed", message.embed_rows))
            handle.embeddings = embed(self._head, hidden)
            handle.embeddings.copy_to_host_async()
        if message.logits:
            handle.result = self._pick(message, hidden, handle.entries)
            handle.result.copy_to_host_async()
        if message.entries:
            handle.hidden = handle.entries = None

    def _prepare(self, message: StepMessage, arrays: list[jax.Array]) -> None:
        """Run the programs that come before the step, each on its array."""
        given = iter(arrays)
        for _ in message.edits:
            self.cache, self.tables = self._executable("edit")(self.cache, self.tables, next(given))
        for _ in message.states:
            self.cache = self._executable("copy_states")(self.cache, next(given))
        for vectors in message.controls:
            self.controls = self._executable(("set_rows", len(vectors)))(self.controls, next(given))
        for _ in message.counts:
            self.controls = self._executable("add_counts")(self.controls, next(given))

    def _pick(self, message: StepMessage, hidden: Any, entries: Any) -> Any:
        variant = message.head
        head = self._executable((message.head_rows, variant))
        kept = self.controls if variant.controlled else None
        self.last, kept, result = head(self._head, self.last, kept, hidden, entries)
        if kept is not None:
            self.controls = kept
        return result

    def read(self, handle: Handle) -> StepResult:
        if handle.hidden is not None:
            jax.block_until_ready(handle.hidden)  # so that the host does not run ahead
        result = StepResult([], []) if handle.result is None else self._read_table(handle)
        if handle.embeddings is not None:
            result.embeddings = np.asarray(handle.embeddings)[: handle.message.entries]
            result.valid += np.isfinite(result.embeddings[handle.message.logits :]).all(axis=1).tolist()
        return result

    def _read_table(self, handle: Handle) -> StepResult:
        table = np.asarray(handle.result)[: handle.message.logits]
        result = StepResult(table[:, 0].tolist(), table[:, 1].astype(bool).tolist())
        if table.shape[1] > 2:
            count = (table.shape[1] - 4) // 2
            result.logprobs = np.ascontiguousarray(table[:, 2]).view(np.float32)
            result.ranks = table[:, 3]
            result.top_tokens = table[:, 4 : 4 + count]
            result.top_logprobs = np.ascontiguousarray(table[:, 4 + count :]).view(np.float32)
        return result

    def _put(self, arrays: Any) -> Any:
        return jax.device_put(arrays, self._everywhere)
