# SPDX-License-Identifier: Apache-2.0
"""How each server of a comparison is started, with each of its settings. Starts nothing (servers.py does)."""

import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = 32  # concurrent sequences per server
JAXSERVE = {"float32": "--dtype=float32", "bfloat16": "--dtype=bfloat16", "int8": "--quantization=int8"}
DTYPES = ("float32", "bfloat16")
LLAMACPP = ("f32", "f16", "bf16", "q8_0", "q4_0")
# The weights, as optimum-cli names them, and the precision of the products, if not OpenVINO's choice. bfloat16 weights
# are exported as float16: optimum-cli has no name for them.
OPENVINO = {"f32": ("fp32", "f32"), "bf16": ("fp16", "bf16"), "int8": ("int8", None)}
# The settings of each server. Without one, a server runs in what its own program chooses.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "jaxserve": tuple(JAXSERVE),
    "jaxserve-uncached": tuple(JAXSERVE),
    "vllm": DTYPES,
    "transformers": DTYPES,
    "llamacpp": LLAMACPP,
    "openvino": tuple(OPENVINO),
}
NAMES = tuple(SETTINGS)
_ROOT = Path(__file__).parents[2]
_PEERS = Path(__file__).parent
_OUTSIDE = Path(tempfile.gettempdir())  # peers run outside the checkout, so that they do not import our packages
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class PrepareStep:
    """A command that writes a file or a folder before the server is started."""

    command: list[str]
    makes: Path  # skipped where this exists


@dataclass(frozen=True, kw_only=True)
class StartCommand:
    """How a server is started."""

    command: list[str]
    ready: str  # a route that returns 200 once the server is ready
    runs: str  # what its setting means, in words
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    cwd: Path = _OUTSIDE
    prepare: tuple[PrepareStep, ...] = ()
    keep_alive: bool = True  # False: it closes the connection after a stream, and the next request on it would be lost
    full_length: tuple[tuple[str, Any], ...] = (("ignore_eos", True),)  # fields of requests that must not end early
    prompt_logprobs: bool = False  # whether its completions route has them
    perplexity: tuple[str, ...] = ()  # the command that computes the perplexity of a text, if its routes cannot


@dataclass(frozen=True, kw_only=True)
class _Asked:
    model: Path
    port: int
    longest: int
    setting: str | None
    venv: Path | None
    place: Path  # for files that only this comparison needs

    @property
    def address(self) -> list[str]:
        return ["--host", "127.0.0.1", "--port", str(self.port)]

    def program(self, name: str) -> str:
        return str(_program(self.venv, name))


def split(name: str) -> tuple[str, str | None]:
    """The server's name and its setting: `vllm:float32` is ("vllm", "float32")."""
    server, _, setting = name.partition(":")
    return server, setting or None


def start_command(
    name: str, model: Path, port: int, *, longest: int, venv: Path | None, place: Path | None = None
) -> StartCommand:
    """`place`: a folder for the files that the server needs and that are written for it."""
    server, setting = split(name)
    asked = _Asked(
        model=model, port=port, longest=longest, setting=setting, venv=venv, place=_OUTSIDE if place is None else place
    )
    starts: Mapping[str, Callable[[_Asked], StartCommand]] = {
        "jaxserve": _jaxserve,
        "jaxserve-uncached": lambda asked: _jaxserve(asked, "--no-enable-prefix-caching"),
        "vllm": _vllm,
        "transformers": _transformers,
        "llamacpp": _llamacpp,
        "openvino": _openvino,
    }
    if server not in starts or (setting is not None and setting not in SETTINGS[server]):
        raise ValueError(f"unknown server {name!r}")
    return starts[server](asked)


def missing(name: str, venv: Path | None) -> str | None:
    """Why this server cannot be started, as far as is known in advance; None if nothing is wrong."""
    server, setting = split(name)
    if server not in NAMES:
        return f"unknown server {server!r}; choose from {', '.join(NAMES)}"
    if setting is not None and setting not in SETTINGS[server]:
        return f"{server} has no setting {setting!r}; choose from {', '.join(SETTINGS[server])}"
    if server.startswith("jaxserve"):
        return None if venv is None else f"{server} runs from this checkout; write {name} without an environment"
    if venv is None:
        return f"{server} needs an environment, {name}=FOLDER; see benchmarks/peers/servers.py for its contents"
    if not _program(venv, "python").exists():
        return f"there is no virtual environment in {venv}"
    quantized = server == "llamacpp" and setting != "f32"
    if quantized and not _program(venv, "llama-quantize").exists():
        return f"{name} needs llama-quantize beside llama-server in {venv}; see benchmarks/peers/servers.py"
    return None


def _program(venv: Path | None, name: str) -> Path:
    if venv is None:
        raise ValueError(f"{name} needs an environment")
    return venv / "bin" / name


def _jaxserve(asked: _Asked, *more: str) -> StartCommand:
    flags = [f"--max-model-len={asked.longest}", f"--max-num-seqs={ROWS}", "--log-level=warning"]
    flags += ["--disable-log-stats", "--warmup=all", "--served-model-name", str(asked.model), *more]
    flags += [JAXSERVE[asked.setting]] if asked.setting else []
    return StartCommand(
        command=[str(Path(sysconfig.get_path("scripts"), "jaxserve")), "run", str(asked.model), *asked.address, *flags],
        ready="/health",
        runs=JAXSERVE[asked.setting] if asked.setting else "its default: --dtype=auto",
        cwd=_ROOT,
        prompt_logprobs=True,
    )


def _vllm(asked: _Asked) -> StartCommand:
    # As a module: the `vllm` command looks up a package name that this wheel's metadata lack.
    start = [asked.program("python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(asked.model)]
    flags = ["--max-model-len", str(asked.longest), "--max-num-seqs", str(ROWS)]
    dtype = ["--dtype", asked.setting] if asked.setting else []
    return StartCommand(
        command=[*start, *asked.address, *flags, *dtype],
        ready="/health",
        runs=" ".join(dtype) or "its default: the checkpoint's dtype",
        environment=_OFFLINE | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"},
        prompt_logprobs=True,
    )


def _transformers(asked: _Asked) -> StartCommand:
    flags = ["--dtype", asked.setting] if asked.setting else []
    start = [asked.program("transformers"), "serve", str(asked.model), *asked.address, "--device", "cpu"]
    # Its KV cache would fill the memory that the other servers need too.
    batching = ["--continuous-batching", "--cb-max-memory-percent", "0.1"]
    return StartCommand(
        command=[*start, *batching, *flags],
        ready="/v1/models",
        runs=" ".join(flags) or "its default: the checkpoint's dtype",
        environment=_OFFLINE | {"HF_HUB_CACHE": tempfile.gettempdir()},  # it must exist
        full_length=(("generation_config", '{"eos_token_id": -1}'),),  # it has no `ignore_eos`
    )


def _llamacpp(asked: _Asked) -> StartCommand:
    setting = asked.setting or "f16"
    whole, file = asked.place / "model-f32.gguf", asked.place / f"model-{setting}.gguf"
    write = [asked.program("python"), str(_PEERS / "write_gguf.py"), str(asked.model), str(whole)]
    prepare = [PrepareStep(command=write, makes=whole)]
    cache = ["--cache-type-k", "f32", "--cache-type-v", "f32"] if setting == "f32" else []
    if file != whole:
        quantize = [asked.program("llama-quantize"), str(whole), str(file), setting.upper()]
        prepare.append(PrepareStep(command=quantize, makes=file))
    flags = ["--model", str(file), "--alias", str(asked.model), "--ctx-size", str(ROWS * asked.longest)]
    scorer = asked.program("llama-perplexity")
    return StartCommand(
        command=[asked.program("llama-server"), *asked.address, *flags, "--parallel", str(ROWS), *cache],
        ready="/health",
        runs=f"weights {setting}, KV cache {'f32' if cache else 'f16'}",
        prepare=tuple(prepare),
        keep_alive=False,
        perplexity=(scorer, "--model", str(file), *cache) if Path(scorer).exists() else (),
    )


def _openvino(asked: _Asked) -> StartCommand:
    weights, precision = OPENVINO[asked.setting] if asked.setting else (None, None)
    folder = asked.place / f"openvino-{asked.setting or 'default'}"
    export = [asked.program("optimum-cli"), "export", "openvino", "--model", str(asked.model)]
    export += ["--task", "text-generation-with-past", *(["--weight-format", weights] if weights else [])]
    server = [asked.program("python"), str(_PEERS / "openvino_server.py"), str(folder)]
    flags = ["--model-name", str(asked.model), "--rows", str(ROWS)]
    flags += ["--precision", precision] if precision else []
    return StartCommand(
        command=[*server, *flags, *asked.address],
        ready="/health",
        runs=f"weights {weights or 'as optimum-cli chooses'}, products {precision or 'as OpenVINO chooses'}",
        environment=_OFFLINE,
        prepare=(PrepareStep(command=[*export, str(folder)], makes=folder),),
        prompt_logprobs=True,
    )
