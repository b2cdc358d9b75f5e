# SPDX-License-Identifier: Apache-2.0
"""Checks settings before jax is imported: port, certificates, model folder, tokenizer, and sizes that no device allows.

A Hub ID is only checked for its form. Every error here is one that the engine would raise half a minute later; what
depends on the device is left to the engine.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxserve import machine
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine import capacity
from jaxserve.engine.capacity import Capacity, Memory
from jaxserve.errors import CheckpointError, JaxserveError, UsageError, one_line
from jaxserve.models import mesh_fit, spec_json
from jaxserve.models.spec import ModelSpec
from jaxserve.server.config import ServerConfig
from jaxserve.server.http import listening
from jaxserve.text import missing

# The same as in the tokenizer's loader, which is slow to import.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Device files in /dev of the accelerators that jax supports on Linux: NVIDIA's, also under WSL, AMD's, TPUs.
_ACCELERATORS = ("nvidia*", "dxg", "kfd", "accel*", "vfio")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_HOST_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def check(engine: EngineConfig, server: ServerConfig) -> None:
    listening.tls(server)
    server.template()
    # Another process may still take the port before the server binds it.
    listening.close(server, listening.bind(server))
    check_machine(engine)
    check_model(engine)


def check_model(engine: EngineConfig) -> None:
    """Check that a folder has a supported config, weights with valid headers, and a tokenizer."""
    from convert.files import hub

    chosen = Path(engine.generation_config).expanduser()
    if engine.generation_config not in ("auto", "vllm") and not (chosen / "generation_config.json").is_file():
        problem = f"--generation-config is {one_line(engine.generation_config)!r}, not a folder with that file"
        raise UsageError(problem, "name a folder that has a generation_config.json, auto or vllm")
    folder = Path(engine.model).expanduser()
    if not (folder.exists() or _HUB_ID.fullmatch(engine.model)) or engine.model.startswith((".", "~")):
        hub.fetch(engine.model)  # raises what is wrong with the path
    if folder.exists():
        # No network: a local folder takes precedence over the Hub.
        folder = hub.fetch(engine.model, revision=engine.revision)
        check_weights(folder)
        check_sizes(engine, folder)
    check_tokenizer(engine, folder)


def check_weights(folder: Path) -> None:
    from convert.files import safetensors
    from jaxserve.models import hf, registry

    if (folder / "spec.json").exists():  # converted, and checked by its reader
        return
    registry.family_of(hf.read_json(folder / "config.json"))
    safetensors.read_checkpoint(folder)


def check_tokenizer(engine: EngineConfig, model: Path) -> None:
    if engine.skip_tokenizer_init:
        return
    folder = model if engine.tokenizer is None else Path(engine.tokenizer).expanduser()
    if not folder.is_dir():
        if engine.tokenizer is not None and not _HUB_ID.fullmatch(engine.tokenizer):
            raise CheckpointError(f"no such folder: {one_line(engine.tokenizer)}", "check --tokenizer")
        return
    missing.check(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        problem = f"{one_line(str(folder))} has no tokenizer: none of {', '.join(VOCABULARIES)}"
        raise ConfigError(problem, "set --tokenizer, or set --skip-tokenizer-init and send prompts as token ids")


# --- sizes ----------------------------------------------------------------------------------------------------------


def cpu_devices(environment: Mapping[str, str]) -> int | None:
    """How many devices jax will have if it is certain to run on the CPU; else None."""
    platforms = environment.get("JAX_PLATFORMS", "").strip().lower()
    if platforms not in ("cpu", ""):
        return None
    if not platforms and (sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)):
        return None
    asked = environment.get("JAX_NUM_CPU_DEVICES", "")
    forced = _HOST_DEVICES.findall(environment.get("XLA_FLAGS", ""))
    return max([1, *map(int, forced), *([int(asked)] if asked.isdecimal() else [])])


def check_machine(engine: EngineConfig) -> None:
    """Check what does not depend on the model."""
    _usage(lambda: capacity.step_sizes(engine, on_cpu=True))  # on other devices there are more sequences
    devices = cpu_devices(os.environ)
    if devices is None:
        return
    for option, size in _parallel(engine):
        if size > devices:
            problem = f"{option} is {size}, but JAX has only {devices} CPU device{'s' * (devices > 1)}"
            raise UsageError(problem, f"remove it, or set JAX_NUM_CPU_DEVICES={size} to try it on a CPU")
    memory, size = machine.total_memory(), engine.kv_cache_memory_bytes
    if size is not None and memory is not None and size > memory:
        problem = f"--kv-cache-memory-bytes is {size:,}, but this machine has {memory:,} bytes of memory for it"
        raise UsageError(problem, "lower it, or remove it")


def _parallel(engine: EngineConfig) -> Iterator[tuple[str, int]]:
    tensor, expert = engine.tensor_parallel_size, engine.expert_parallel_size
    yield "--tensor-parallel-size", tensor
    yield "--expert-parallel-size", expert
    yield "--tensor-parallel-size times --expert-parallel-size", tensor * expert


def check_sizes(engine: EngineConfig, folder: Path) -> None:
    """Check sizes against the model in a folder. Its config is read only if a setting depends on it, because importing
    transformers takes about a second."""
    longest = engine.max_model_len
    sized = engine.num_blocks is not None or engine.kv_cache_memory_bytes is not None
    parallel = engine.tensor_parallel_size > 1
    if not sized and not parallel and (longest is None or (longest >= 2 and _plainly_takes(folder, longest))):
        return
    spec = _spec(folder)
    if spec is None:
        return
    found = least(engine, spec)
    if sized and not found.fits:
        error = found.misfit()
        raise UsageError(error.problem, error.hint)


def least(engine: EngineConfig, spec: ModelSpec) -> Capacity:
    """The capacity on the device where a sequence needs the fewest bytes: with the defaults of a CPU, which are the
    lowest, and 16-bit numbers unless the device is certain to be a CPU."""
    auto = "bfloat16" if cpu_devices(os.environ) is None else machine.cpu_dtype("bfloat16")
    dtype = auto if engine.dtype == "auto" else engine.dtype

    def resolved() -> Capacity:
        fitted = mesh_fit.fit(spec, engine.tensor_parallel_size, engine.expert_parallel_size)
        return capacity.resolve(engine, spec, Memory(on_cpu=True, dtype=dtype, fitted=fitted))

    return _usage(resolved)


def _usage[T](make: Callable[[], T]) -> T:
    try:
        return make()
    except JaxserveError as error:
        raise UsageError(error.problem, error.hint) from None


def _plainly_takes(folder: Path, length: int) -> bool:
    """Whether the raw config allows this length even without RoPE scaling."""
    from jaxserve.models import hf

    raw = hf.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return any(isinstance(raw.get(name), int) and raw[name] >= length for name in _LENGTHS)


def _spec(folder: Path) -> ModelSpec | None:
    from jaxserve.models import hf, registry

    if not (folder / "spec.json").exists():
        return registry.read_config(folder)[0]
    try:
        stored: Any = spec_json.from_json(hf.read_json(folder / "spec.json").get("spec"))
    except (CheckpointError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError):
        return None  # its reader reports what is wrong with it
    return stored if isinstance(stored, ModelSpec) else None
