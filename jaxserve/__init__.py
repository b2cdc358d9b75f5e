# SPDX-License-Identifier: Apache-2.0
"""A server for language models, in JAX. Importing this package must not import jax, to keep `jaxserve --help` fast.

So the names below are resolved on first use; __init__.pyi declares them for type checkers.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "GeneratedArrays": "host.token_arrays",
    "EngineConfig": "config",
    "EngineMetrics": "types.metrics",
    **dict.fromkeys(("EngineError", "JaxserveError", "OverloadedError", "RequestError"), "errors"),
    **dict.fromkeys(("BeamSearchOutput", "BeamSearchSequence", "CompletionOutput"), "types.outputs"),
    **dict.fromkeys(("ClassificationOutput", "Logprob", "RequestOutput"), "types.outputs"),
    **dict.fromkeys(("BeamSearchParams", "RequestOutputKind", "SamplingParams"), "types.sampling_params"),
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
