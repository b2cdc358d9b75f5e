# SPDX-License-Identifier: Apache-2.0
"""`jaxserve replay`: runs the steps that an engine with --record-steps wrote to a file after a fault."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.setting import Setting

if TYPE_CHECKING:  # both import jax, which would slow down --help
    from jaxserve.engine.engine import Engine
    from jaxserve.engine.execute.recorder import Recording


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Run recorded steps again and compare their results."""

    dump: Annotated[Path, Setting("File that an engine with --record-steps wrote after a fault.", given_as="word")]
    model: Annotated[str | None, Setting("Model to run them on (default: the recorded one).")] = None

    def run(self) -> int:
        from jaxserve.config import EngineConfig
        from jaxserve.engine.engine import Engine
        from jaxserve.engine.execute import recorder

        found = recorder.load(self.dump)
        if found.policy_version:
            problem = f"the weights were version {found.policy_version}, set by update_weights"
            raise JaxserveError(problem, "a recording holds no weights: record an engine whose weights are not updated")
        if not found.has_folder and self.model is None:
            raise UsageError("the weights came from a program, not from a folder", "set --model")
        print(f"fault         {found.fault}")
        print(f"recorded on   {found.device}, {', '.join(map(' '.join, found.versions.items()))}")
        config = EngineConfig(**found.config)
        if self.model is not None:
            config = replace(config, model=self.model)
        if found.xla_flags != (flags := recorder.xla_flags()):
            print(f"XLA_FLAGS     were {found.xla_flags!r}, are {flags!r}: results may differ")
        engine = Engine(replace(config, warmup=False, record_steps=0))
        if recorder.model_of(engine.model.spec) != found.model:
            engine.close()
            raise JaxserveError("the steps are of another model", "set --model to the one that they were recorded on")
        return _run(engine, found)


def _run(engine: "Engine", found: "Recording") -> int:
    from jaxserve.engine.execute import recorder

    complete = found.first == 0
    if not complete:
        print(
            f"{found.first} steps before these were not recorded: the KV cache starts as zeros, so results will differ"
        )
    differ = 0
    try:
        for number, difference in enumerate(recorder.replay(engine.runner, found.steps), found.first + 1):
            if difference is not None:
                differ += 1
                print(f"step {number}: {difference}")
    finally:
        engine.close()
    compared = sum(step.tokens is not None for step in found.steps)
    print(f"{len(found.steps)} steps replayed; {compared - differ} of {compared} results are equal bit for bit")
    return 1 if differ and complete else 0
