# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong before jax is imported: port, certificates, model folder, tokenizer, and sizes that no
device would make right.

Of a model on the hub nothing is known here but whether its name is one. Where only the device could tell, the engine
decides: what is refused here it would refuse too, half a minute later.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.config import ConfigError, EngineConfig, held_blocks
from jaxserve.errors import CheckpointError, UsageError, one_line
from jaxserve.server.config import ServerConfig
from jaxserve.server.http import listening

if TYPE_CHECKING:
    from jaxserve.models.spec import ModelSpec

# As the tokenizer's loader has them, which is not imported for it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# As EngineConfig says of a CPU; on other devices both are more.
ROWS, TOKENS = 32, 512
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a Linux machine with an accelerator that jax knows has in /dev: NVIDIA's, under WSL, AMD's, TPUs.
_ACCELERATORS = ("nvidia*", "dxg", "kfd", "accel*", "vfio")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_HOST_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def check(engine: EngineConfig, server: ServerConfig) -> None:
    listening.tls(server)
    server.template()
    # Free now: between this and the server's own try another process may take it.
    for opened in listening.bind(server):
        opened.close()
    check_machine(engine)
    check_model(engine)


def check_model(engine: EngineConfig) -> None:
    """Of a folder: that it has a config of a known architecture, weights with sound headers, and a tokenizer."""
    from convert.files import hub

    folder = Path(engine.model).expanduser()
    if not (folder.exists() or _HUB_ID.fullmatch(engine.model)) or engine.model.startswith((".", "~")):
        hub.fetch(engine.model)  # which says what is wrong with a path
    if folder.exists():
        hub.fetch(engine.model, revision=engine.revision)  # touches no network: a folder goes before the hub
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
            raise CheckpointError(f"there is no folder {one_line(engine.tokenizer)}", "check --tokenizer")
        return
    if not any((folder / name).is_file() for name in VOCABULARIES):
        problem = f"{one_line(str(folder))} has no tokenizer: none of {', '.join(VOCABULARIES)}"
        raise ConfigError(problem, "give --tokenizer, or --skip-tokenizer-init and send prompts as token ids")


# --- sizes ----------------------------------------------------------------------------------------------------------


def cpu_devices(environment: Mapping[str, str]) -> int | None:
    """How many devices jax will have, where that is a CPU for certain; else None."""
    platforms = environment.get("JAX_PLATFORMS", "").strip().lower()
    if platforms not in ("cpu", ""):
        return None
    if not platforms and (sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)):
        return None
    asked = environment.get("JAX_NUM_CPU_DEVICES", "")
    forced = _HOST_DEVICES.findall(environment.get("XLA_FLAGS", ""))
    return max([1, *map(int, forced), *([int(asked)] if asked.isdecimal() else [])])


def check_machine(engine: EngineConfig) -> None:
    """What the model has no part in."""
    rows = engine.max_num_seqs or ROWS
    tokens = engine.max_num_batched_tokens
    if tokens is not None and tokens < rows:
        problem = f"--max-num-batched-tokens is {tokens}, below --max-num-seqs, {rows} or more if not given"
        raise UsageError(problem, f"every running sequence needs a token in each step: give --max-num-seqs {tokens}")
    devices = cpu_devices(os.environ)
    if devices is None:
        return
    for option, size in _parallel(engine):
        if size > devices:
            problem = f"{option} is {size}, and jax has {devices} device{'s' * (devices > 1)} here, its CPU"
            raise UsageError(problem, f"leave it out, or set JAX_NUM_CPU_DEVICES={size} to try it out on a CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = engine.kv_cache_memory_bytes
    if size is not None and size > memory:
        problem = f"--kv-cache-memory-bytes is {size:,}, and this machine has {memory:,} bytes of memory"
        raise UsageError(problem, "give less, or leave it out")


def _parallel(engine: EngineConfig) -> Iterator[tuple[str, int]]:
    tensor, expert = engine.tensor_parallel_size, engine.expert_parallel_size
    yield "--tensor-parallel-size", tensor
    yield "--expert-parallel-size", expert
    yield "--tensor-parallel-size times --expert-parallel-size", tensor * expert


def check_sizes(engine: EngineConfig, folder: Path) -> None:
    """Against the model in a folder. Its config is read as a whole only where a setting calls for it: that takes
    transformers, about a second."""
    longest, shards = engine.max_model_len, engine.tensor_parallel_size
    sized = engine.num_blocks is not None or engine.kv_cache_memory_bytes is not None
    if longest is not None and longest < 2:
        raise UsageError(f"--max-model-len is {longest}", "a prompt and an answer need 2 at least")
    if not sized and shards == 1 and (longest is None or _plainly_takes(folder, longest)):
        return
    spec = _spec(folder)
    if spec is None:
        return
    if longest is not None and longest > spec.max_positions:
        problem = f"--max-model-len is {longest}, and the model takes {spec.max_positions}"
        raise UsageError(problem, f"give at most {spec.max_positions}")
    for layer in spec.layers:
        if layer.attention.heads % shards:
            problem = f"--tensor-parallel-size {shards} does not divide {layer.attention.heads} attention heads"
            raise UsageError(problem, "give a number that does")
    if sized:
        check_cache(engine, spec)


def _plainly_takes(folder: Path, length: int) -> bool:
    """Whether the config says so in a word, before anything stretches it."""
    from jaxserve.models import hf

    raw = hf.read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return any(isinstance(raw.get(name), int) and raw[name] >= length for name in _LENGTHS)


def _spec(folder: Path) -> "ModelSpec | None":
    from jaxserve.models import hf, registry, spec

    if not (folder / "spec.json").exists():
        return registry.read_config(folder)[0]
    try:
        stored: Any = spec.from_json(hf.read_json(folder / "spec.json").get("spec"))
    except (CheckpointError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError):
        return None  # its reader says what is wrong with it
    return stored if isinstance(stored, spec.ModelSpec) else None


def check_cache(engine: EngineConfig, spec: "ModelSpec") -> None:
    """That the KV cache that is asked for holds the longest sequence that is asked for, or else any at all."""
    per_block = block_bytes(engine, spec)
    if engine.num_blocks is not None:
        option, given, unit, blocks = "--num-blocks", engine.num_blocks, 1, engine.num_blocks
    else:
        option, given, unit = "--kv-cache-memory-bytes", engine.kv_cache_memory_bytes or 0, per_block
        blocks = given // per_block
    tokens = engine.max_num_batched_tokens or max(engine.max_num_seqs or 0, TOKENS)
    longest = engine.max_model_len or 2
    held = held_blocks(longest, engine.block_size, window=_window(spec), step=tokens)
    if blocks > held:  # one is the null block
        return
    slots = max(blocks - 1, 0) * engine.block_size
    problem = f"{option} is {given}: a KV cache of {slots} tokens, too small for a sequence of {longest}"
    hint = f"give {_shown((held + 1) * unit)} or more"
    if engine.max_model_len is not None and slots >= 2:
        hint += f", or --max-model-len {slots} or less"
    raise UsageError(problem, hint)


def block_bytes(engine: EngineConfig, spec: "ModelSpec") -> int:
    """Bytes of a KV block on each device; where the dtype is not known, the least that it can be."""
    from jaxserve.models.spec import Attention

    shards = engine.tensor_parallel_size
    auto = 2 if cpu_devices(os.environ) is None else 4  # on a CPU float32
    heads = [layer.attention.kv_heads for layer in spec.layers if isinstance(layer.attention, Attention)]
    repeat = max((shards // count for count in heads), default=1) or 1  # each KV head is stored so many times
    values = 0
    for attention in (layer.attention for layer in spec.layers):
        if isinstance(attention, Attention):
            values += 2 * attention.kv_heads * repeat // shards * attention.head_dim
        else:
            values += attention.kv_rank + attention.rope_dim
    return values * engine.block_size * _ITEM_BYTES.get(engine.dtype, auto)


def _window(spec: "ModelSpec") -> int | None:
    """How far back the layer sees that sees furthest; None if one sees everything."""
    windows: list[int | None] = [getattr(layer.attention, "window", None) for layer in spec.layers]
    return None if None in windows else max(window for window in windows if window is not None)


def _shown(count: int) -> str:
    """In whole MiB where it is that much, so that it can be given as it is read."""
    return f"{-(-count // 2**20)}MiB" if count >= 2**20 else str(count)
