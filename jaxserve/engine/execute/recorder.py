# SPDX-License-Identifier: Apache-2.0
"""Keeps the last step messages and results of an engine, writes them to a file after a fault, and runs them again.

A step is a function of its message and the devices' state, which starts as zeros. So a recording that begins with the
first step replays bit for bit, on any machine with an equal device and model. A later one replays the same programs on
the same inputs, but not on the same KV cache: its results differ from the recorded ones.

A file has the token ids of prompts. Only its owner can read it.
"""

import dataclasses
import hashlib
import os
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import msgspec
import numpy as np

from jaxserve import __version__
from jaxserve.config import EngineConfig
from jaxserve.engine.capacity import Limits
from jaxserve.engine.execute.runner import Runner
from jaxserve.engine.schedule.need import Variant
from jaxserve.engine.schedule.packing import Ints, Layout, StepMessage
from jaxserve.engine.schedule.plan import StepResult
from jaxserve.errors import JaxserveError
from jaxserve.models.spec import ModelSpec

SUFFIX = ".steps"
_FORM = 3  # version of the file format


class ArrayData(msgspec.Struct, array_like=True):
    shape: tuple[int, ...]
    data: bytes  # int32, compressed: rows of controls are long and nearly constant

    @classmethod
    def of(cls, array: Ints) -> "ArrayData":
        return cls(array.shape, zlib.compress(np.ascontiguousarray(array, "<i4").tobytes(), level=1))

    def array(self) -> Ints:
        return np.frombuffer(zlib.decompress(self.data), "<i4").reshape(self.shape)


class Step(msgspec.Struct):
    """A StepMessage, and its result once it was read."""

    layout: dict[str, Any]
    entries: int
    embeds: int
    head: Variant
    head_rows: int
    embed_rows: int
    vector: ArrayData
    edits: list[ArrayData]
    controls: list[ArrayData]
    counts: list[ArrayData]
    masks: list[ArrayData]
    states: list[ArrayData]
    tokens: list[int] | None = None
    valid: list[bool] | None = None
    numbers: list[bytes] = []  # log probabilities, ranks and embeddings

    @classmethod
    def of(cls, message: StepMessage) -> "Step":
        return cls(
            layout=dataclasses.asdict(message.layout),
            entries=message.entries,
            embeds=message.embeds,
            head=message.head,
            head_rows=message.head_rows,
            embed_rows=message.embed_rows,
            vector=ArrayData.of(message.vector),
            edits=list(map(ArrayData.of, message.edits)),
            controls=list(map(ArrayData.of, message.controls)),
            counts=list(map(ArrayData.of, message.counts)),
            masks=list(map(ArrayData.of, message.masks)),
            states=list(map(ArrayData.of, message.states)),
        )

    def message(self) -> StepMessage:
        return StepMessage(
            Layout(**self.layout),
            self.entries,
            self.embeds,
            self.head,
            self.head_rows,
            self.embed_rows,
            self.vector.array(),
            *(
                [each.array() for each in arrays]
                for arrays in (self.edits, self.controls, self.counts, self.masks, self.states)
            ),
        )

    def put(self, result: StepResult) -> None:
        self.tokens, self.valid, self.numbers = result.tokens, result.valid, _numbers(result)

    def difference(self, result: StepResult) -> str | None:
        """How a result differs from the recorded one; None if no bit does, or if none was recorded."""
        if self.tokens is None:
            return None
        for entry, (old, new) in enumerate(zip(self.tokens, result.tokens, strict=False)):
            if old != new:
                return f"entry {entry} has token {new}, recorded {old}"
        if self.valid != result.valid:
            return "different entries are not finite"
        return None if self.numbers == _numbers(result) else "log probabilities or embeddings differ"


def _numbers(result: StepResult) -> list[bytes]:
    arrays = (result.logprobs, result.ranks, result.top_tokens, result.top_logprobs, result.embeddings)
    return [array.tobytes() for array in arrays if array is not None]


class Recording(msgspec.Struct):
    form: int
    versions: dict[str, str]
    device: str
    xla_flags: str
    model: str  # a digest of its spec
    fault: str
    config: dict[str, Any]  # of an engine of the same sizes
    has_folder: bool  # whether the weights are those of the config's model
    policy_version: int
    first: int  # the number of steps before the first one here, since the state was zeros
    steps: list[Step]


class Recorder:
    def __init__(self, config: EngineConfig, limits: Limits, spec: ModelSpec, *, has_folder: bool) -> None:
        self._config, self._limits, self._has_folder = config, limits, has_folder
        self._model = model_of(spec)
        self._kept: deque[Step] = deque(maxlen=config.record_steps)
        self._unread: deque[Step] = deque()
        self._count = 0

    def restart(self) -> None:
        """The state is zeros again."""
        self._kept.clear()
        self._unread.clear()
        self._count = 0

    def launched(self, message: StepMessage) -> None:
        step = Step.of(message)
        self._kept.append(step)
        self._unread.append(step)
        self._count += 1

    def masked(self, vectors: Sequence[Ints]) -> None:
        """The masks of the step that was launched last."""
        self._kept[-1].masks = list(map(ArrayData.of, vectors))

    def read(self, result: StepResult) -> None:
        self._unread.popleft().put(result)

    def dump(self, fault: str, policy_version: int) -> Path:
        config = sized(self._config, self._limits)
        recording = Recording(
            form=_FORM,
            versions=versions(),
            device=_device(),
            xla_flags=xla_flags(),
            model=self._model,
            fault=fault,
            config={field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
            has_folder=self._has_folder,
            policy_version=policy_version,
            first=self._count - len(self._kept),
            steps=list(self._kept),
        )
        name = f"jaxserve-{time.strftime('%Y%m%d-%H%M%S')}-"
        handle, path = tempfile.mkstemp(prefix=name, suffix=SUFFIX)  # readable by its owner only
        with os.fdopen(handle, "wb") as opened:
            opened.write(msgspec.msgpack.encode(recording))
        return Path(path)


def sized(config: EngineConfig, limits: Limits) -> EngineConfig:
    """The settings of an engine of the same sizes, whatever memory it finds."""
    return replace(
        config,
        num_blocks=limits.num_blocks,
        kv_cache_memory_bytes=None,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        prefix_hash_seed="",  # a secret, and no step depends on it
    )


def versions() -> dict[str, str]:
    return {"jaxserve": __version__, "jax": jax.__version__, "jaxlib": jaxlib.version.__version__}


def xla_flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def model_of(spec: ModelSpec) -> str:
    """A digest of the model's architecture; its weights and their dtype are not part of it."""
    return hashlib.blake2b(repr(replace(spec, dtype="float32")).encode(), digest_size=16).hexdigest()


def _device() -> str:
    first = jax.devices()[0]
    return f"{first.platform} {first.device_kind}"


def load(file: Path) -> Recording:
    try:
        found = msgspec.msgpack.decode(file.read_bytes(), type=Recording)
    except OSError as error:
        raise JaxserveError(f"cannot read {file}: {error.strerror}", "pass a file written by --record-steps") from None
    except msgspec.MsgspecError:
        raise JaxserveError(f"{file} is not a recording of steps", "pass a file written by --record-steps") from None
    if found.form != _FORM:
        raise JaxserveError(
            f"{file} has format {found.form}, expected {_FORM}", "replay it with the jaxserve version that wrote it"
        )
    return found


def replay(runner: Runner, steps: Sequence[Step]) -> Iterator[str | None]:
    """Run the steps; for each how its result differs from the recorded one."""
    for step in steps:
        yield step.difference(runner.read(runner.launch(step.message())))
