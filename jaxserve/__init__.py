# SPDX-License-Identifier: Apache-2.0
"""Serving language models from JAX. Importing this must not import jax: `jaxserve --help` waits.

So the names below are looked up when they are first used; __init__.pyi tells them to type checkers.
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
    **dict.fromkeys(("Logprob", "RequestOutput"), "types.outputs"),
    **dict.fromkeys(("BeamSearchParams", "RequestOutputKind", "SamplingParams"), "types.sampling_params"),
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
