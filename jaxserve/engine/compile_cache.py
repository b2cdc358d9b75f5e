# SPDX-License-Identifier: Apache-2.0
"""Has jax keep compiled programs on disk for the next start. What lies there is run: nobody else may write it."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep(folder: str, report: Callable[[str], None]) -> None:
    """From now on, unless the program that we run in has decided on a folder itself. Empty: no change."""
    if not folder or jax.config.jax_compilation_cache_dir is not None:
        return
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        usable = os.access(place, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        report(f"compiled programs are not kept: {place} cannot be written (see compilation_cache_dir)")
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # jax looks at its settings once, at the first compile, which may have been
