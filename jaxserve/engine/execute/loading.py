# SPDX-License-Identifier: Apache-2.0
"""Loads the configured model onto its devices: finds its files and end-of-text tokens, and reads its parameters.

`open_folder` collects everything that is known without reading weights, which is enough to compile. `read` reads them;
for an accelerator, `reading` does so in a thread.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import jax
from jax.sharding import SingleDeviceSharding

from convert import load
from convert.files import hub, progress
from convert.gguf import folder as gguf
from convert.load import LoadPlan
from jaxserve.config import ConfigError, EngineConfig
from jaxserve.engine.execute import weights
from jaxserve.models import hf, online, param_layout, registry
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.parallel import mesh
from jaxserve.types.sampling_params import FIELDS

GENERATION_CONFIG = "generation_config.json"

type OnProgress = Callable[[str, int, int], object]  # progress: phase, amount done, total


@dataclass(frozen=True)
class Opened:
    """A model without its parameters: it holds no reference to them, so replaced ones are freed."""

    spec: ModelSpec
    shapes: Params  # of the parameters in engine layout, with shardings
    mesh: Any
    folder: Path | None = None
    eos_token_ids: frozenset[int] = frozenset()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])  # from generation_config.json
    plan: LoadPlan | None = None  # how to read the parameters; None if the program already holds them


def on_mesh(config: EngineConfig, given: Any) -> Any:
    """The mesh to run on: the given one, or that of the configured sizes; None for a single device."""
    tensor, expert = config.tensor_parallel_size, config.expert_parallel_size
    if given is not None:
        if tensor * expert > 1:
            raise ConfigError("both a mesh and parallel sizes are set", "set only one of them")
        _check_model_parallel(given)
        return given
    return mesh.make_mesh(tensor=tensor, expert=expert) if tensor * expert > 1 else None


def _check_model_parallel(on: Any) -> None:
    """Nothing that an engine holds is sharded over other axes: all would be replicated, for no more speed."""
    for name, size in on.shape.items():
        if name not in ("tensor", "expert") and size > 1:
            problem = f"mesh axis {name!r} has size {size}: data parallelism is not supported"
            raise ConfigError(problem, "run one engine per replica, each on its own mesh")


def open_folder(config: EngineConfig, on: Any) -> Opened:
    """The configured model, downloaded if necessary."""
    cache = Path(config.download_dir).expanduser() if config.download_dir else None
    folder = hub.fetch(config.model, revision=config.revision, cache_dir=cache, check=load.open_spec)
    plan = load.open_model(folder)
    plan = plan.in_dtype(load.param_dtype(plan, None if config.dtype == "auto" else config.dtype))
    if config.quantization is not None:
        chosen = online.to_apply(config.quantization, plan.spec, registry.method_of(folder))
        plan = plan if chosen is None else plan.quantized(chosen)
    [device] = jax.device_put(0).devices()  # jax's default
    with _on(on, device):
        shapes = param_layout.abstract_params(plan.spec)
    if on is None:
        shapes = jax.tree.map(lambda leaf: leaf.update(sharding=SingleDeviceSharding(device)), shapes)
    return Opened(plan.spec, shapes, on, folder, *_generation(config, folder), plan)


def read(opened: Opened, on_progress: OnProgress | None = None) -> Params:
    """Read a folder's parameters into their shardings."""
    plan, so_far = opened.plan, 0
    assert plan is not None
    total = plan.bytes
    with _on(opened.mesh, _device(opened)), progress.bar("loading", total) as shown:

        def count(size: int) -> None:
            nonlocal so_far
            so_far += size
            shown(size)
            if on_progress is not None:
                on_progress("loading", so_far, total)

        return load.read(plan, count)


@contextlib.contextmanager
def reading(
    opened: Opened, params: Params | None = None, on_progress: OnProgress | None = None
) -> Generator[Future[Params]]:
    """`read` in a thread that ends with the block: after an error or Ctrl-C the rest is not read.

    If `params` are given, they are the result, and nothing is read.
    """
    if params is not None or not reads_beside(opened):
        yield done(read(opened, on_progress) if params is None else params)
        return
    given_up = threading.Event()

    def counted(what: str, done: int, total: int) -> None:
        if given_up.is_set():
            raise CancelledError
        if on_progress is not None:
            on_progress(what, done, total)

    with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread:
        try:
            yield thread.submit(read, opened, counted)
        finally:
            given_up.set()


def reads_beside(opened: Opened) -> bool:
    """Whether to compile programs while weights are read. Not on a CPU, where both compete for cores and memory: on two
    cores a 1.2-billion-parameter model took 16 to 22 seconds to start instead of 15 to 18."""
    return _device(opened).platform != "cpu"


def done(params: Params) -> Future[Params]:
    """A completed future with these parameters."""
    future: Future[Params] = Future()
    future.set_result(params)
    return future


def _device(opened: Opened) -> Any:
    return weights.device_of(opened.shapes)


def _on(mesh: Any, device: Any) -> Any:
    """The context that selects the mesh or device, for this thread only."""
    return jax.set_mesh(mesh) if mesh is not None else jax.default_device(device)


def open_params(config: EngineConfig, spec: ModelSpec | None, params: Params, on: Any) -> tuple[Opened, Params]:
    """Parameters that a program already holds, in engine or public layout. The rest comes from the folder, if any."""
    folder = gguf.resolved(Path(config.model).expanduser())
    known = folder if (folder / "config.json").is_file() else None
    if spec is None:
        if known is None:
            raise ConfigError("params is set without spec", "set spec, or name a model folder with a config.json")
        spec = load.open_spec(known)
    if spec.tied and "head" in params:
        spec = replace(spec, tied=False)
    if config.dtype == "auto":
        spec = param_layout.with_dtype_of(spec, weights.leaves_of(spec, params))
    else:
        spec = replace(spec, dtype=config.dtype)
    if config.quantization is not None:
        chosen = online.to_apply(config.quantization, spec, None if known is None else registry.method_of(known))
        spec = spec if chosen is None else online.quantized(spec, chosen)
    engine = weights.as_engine(spec, params, on, device=None if on is not None else _only_device(params))
    shapes = weights.shapes_of(engine)
    if known is None:
        return Opened(spec, shapes, on), engine
    return Opened(spec, shapes, on, known, *_generation(config, known)), engine


def _only_device(params: Params) -> Any:
    """The device that holds them; None if they are on the host."""
    devices = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    if len(devices) > 1:
        raise ConfigError(f"the parameters are on {len(devices)} devices, but mesh is not set", "set mesh")
    return next(iter(devices), None)


def _generation(config: EngineConfig, folder: Path) -> tuple[frozenset[int], dict[str, Any]]:
    """The tokens that end a text, and the defaults of sampling parameters, from the configured generation config."""
    named = config.generation_config in ("auto", "vllm")
    file = (folder if named else Path(config.generation_config).expanduser()) / GENERATION_CONFIG
    if not named and not file.is_file():
        raise ConfigError(f"generation_config: there is no {file}", "name a folder that has one, auto or vllm")
    # Without its stop tokens, the answers of a chat model would not end.
    ends = _eos_token_ids(file, folder / "config.json")
    return ends, {} if config.generation_config == "vllm" else _sampling_defaults(file)


def _eos_token_ids(*files: Path) -> frozenset[int]:
    """All tokens that end a text, from the generation config and the model's config."""
    found: set[int] = set()
    for file in files:
        if file.is_file():
            raw = hf.read_json(file)
            for part in (raw, raw.get("text_config")):
                if isinstance(part, Mapping):
                    found |= _ids(cast("Mapping[str, object]", part).get("eos_token_id"))
    return frozenset(found)


def _ids(value: object) -> set[int]:
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    return {item for item in items if isinstance(item, int) and not isinstance(item, bool)}


def _sampling_defaults(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    raw = hf.read_json(file)
    given = {each.name: raw.get(each.name) for each in FIELDS if each.from_model}
    return {name: value for name, value in given.items() if value is not None}
