# SPDX-License-Identifier: Apache-2.0
"""`jaxserve tune`: measures the rules by which engines compute products on this machine's CPU."""

from dataclasses import asdict, dataclass
from typing import Annotated

from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError
from jaxserve.flags.setting import Setting


@dataclass(frozen=True)
class Tune:
    """Measure how this machine's CPU computes products fastest, for engines that start from now on.

    The first engine on a machine does so for its data types. Do it again, on an idle machine, if it was busy then.
    """

    compilation_cache_dir: Annotated[
        str, Setting("Folder of the engines' compiled programs, where they look for the result.")
    ] = EngineConfig.compilation_cache_dir
    cpu_threads: Annotated[
        int | None, Setting("The --cpu-threads of the engines, if they set it.", low=1, high=4096)
    ] = None

    def run(self) -> None:
        import jax

        from jaxserve.engine.execute import cpu_forms, jax_start, program_store

        jax_start.start(EngineConfig(model="none is loaded", cpu_threads=self.cpu_threads))
        problems: list[str] = []
        with jax.default_device("cpu"):
            store = program_store.open_store(self.compilation_cache_dir, problems.append)
            if store is None:
                problem = problems[0] if problems else "compiled programs are not stored"
                raise JaxserveError(problem, "set compilation_cache_dir to a folder that you can write to")
            found = asdict(cpu_forms.tune(store.folder, print))
        print(f"float32: the weight comes first in products of 2 to {found.pop('float32')} rows")
        for name, rows in found.items():
            print(f"{name}: products of fewer than {rows} rows are padded")
