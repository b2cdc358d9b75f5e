# SPDX-License-Identifier: Apache-2.0
"""`jaxserve profile`: traces a running server or an offline run, for Perfetto and XProf."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jaxserve.cli.client import DEFAULT_URL, KEY_FILE_HELP, KEY_HELP, URL_HELP, Client, key_for
from jaxserve.cli.with_jax.bench_offline import opened, random_prompts
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Setting, build

GROUP = "Profile"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Trace a running server, or, with a model, an offline run."""

    out: Annotated[
        Path,
        Setting(
            "Folder for the trace. For a server, its --profile-dir, which this machine must be able to read.", GROUP
        ),
    ]
    url: Annotated[str | None, Setting(f"{URL_HELP.rstrip('.')} (default without a model: {DEFAULT_URL}).", GROUP)] = (
        None
    )
    api_key: Annotated[str | None, Setting(KEY_HELP, GROUP)] = field(default=None, repr=False)
    api_key_file: Annotated[str | None, Setting(KEY_FILE_HELP, GROUP, metavar="FILE")] = None
    seconds: Annotated[float, Setting("How long to trace a server.", GROUP, above=0, high=10**6, unit="seconds")] = 5.0
    num_prompts: Annotated[int, Setting("Number of prompts of an offline run.", GROUP, low=1, high=10**6)] = 8
    input_len: Annotated[int, Setting("Tokens per prompt of an offline run.", GROUP, low=1, high=10**6)] = 128
    output_len: Annotated[
        int, Setting("Tokens to generate per prompt of an offline run.", GROUP, low=1, high=10**6)
    ] = 32
    engine: EngineConfig | None

    def __post_init__(self) -> None:
        if self.engine is not None and self.url is not None:
            raise UsageError("--url and a model are both set", "set only one of them")

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> "Profile":
        if "model" in given:
            return build(cls, given)
        own = {flag.name for flag in parser.flags if flag.own}
        if extra := [name for name in given if name not in own]:
            flag = parser.in_flags_words(extra[0])
            raise UsageError(f"{flag} requires a model", "set --model, or remove it")
        return cls(engine=None, **given)

    def run(self) -> None:
        folder = self._offline(self.engine, self.out) if self.engine else self._server(self.out)
        traces = sorted(folder.rglob("*.trace.json.gz"))
        if not traces:
            raise JaxserveError(f"no trace appeared in {folder}", "set --out to the server's --profile-dir")
        print(f"Perfetto: open https://ui.perfetto.dev and load {traces[-1]}")
        print(f"XProf:    pip install xprof, then xprof --logdir {folder}")

    def _server(self, out: Path) -> Path:
        url = self.url or DEFAULT_URL
        client = Client(url, api_key=key_for(url, key=self.api_key, file=self.api_key_file))
        name = time.strftime("%Y%m%d-%H%M%S")
        client.post("/start_profile", {"folder": name})
        try:
            time.sleep(self.seconds)
        finally:  # also on Ctrl-C: a trace that is not stopped keeps growing
            client.post("/stop_profile")
        return out.expanduser() / name

    def _offline(self, engine: EngineConfig, out: Path) -> Path:
        from jaxserve.types.sampling_params import SamplingParams

        llm = opened(engine)
        params = SamplingParams(temperature=1.0, seed=0, ignore_eos=True, max_tokens=self.output_len, detokenize=False)
        prompts = random_prompts(self.num_prompts, self.input_len, llm.spec.vocab_size)
        llm.generate(prompts[:1], params)  # keeps one-time work out of the trace
        llm.reset_prefix_cache()
        llm.start_profile(out)
        try:
            llm.generate(prompts, params)
        finally:
            folder = llm.stop_profile()
        return folder
