# SPDX-License-Identifier: Apache-2.0
"""`jaxserve profile`: a trace of a running server, or of a run of its own, in a folder for Perfetto and XProf."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxserve.cli import settings
from jaxserve.cli.client import DEFAULT_URL, Client, key_of_environment
from jaxserve.cli.with_jax.bench_offline import opened, random_prompts
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError, UsageError
from jaxserve.flags.parsing import Parser


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Trace a running server, or with a model a run in this process."""

    engine: EngineConfig | None
    out: Path | None = None
    """Where the trace goes. Of a server: its --profile-dir, which must be a folder of this machine."""
    url: str | None = None
    """The server, with /v1 or without; http://127.0.0.1:8000/v1 if neither it nor a model is given."""
    api_key: str | None = field(default=None, repr=False)
    """The server's key; JAXSERVE_API_KEY or OPENAI_API_KEY if not given."""
    seconds: float = 5.0
    """How long to trace a server."""
    num_prompts: int = 8
    """In a run of its own: how many prompts."""
    input_len: int = 128
    """In a run of its own: tokens in a prompt."""
    output_len: int = 32
    """In a run of its own: tokens in an answer."""

    @classmethod
    def parser(cls, prog: str, about: str) -> Parser:
        return settings.parser_beside_engine(cls, "Profile", prog, about)

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> "Profile":
        given = settings.named_model(given)
        names = {one.name for one in fields(cls)}
        own = {name: value for name, value in given.items() if name in names}
        engine = None
        if settings.names_model(given):
            engine = settings.made(parser, lambda: settings.split(EngineConfig, given))
            if "url" in given:
                raise UsageError("--url and a model are both given", "name the server or the model")
        elif extra := [name for name in given if name not in names]:
            flag = parser.in_flags_words(extra[0])
            raise UsageError(f"{flag} is of a run with a model, and none is named", "give --model, or leave it out")
        made = cls(engine=engine, **own)
        if made.out is None:
            raise UsageError("--out is missing", "give the folder for the trace")
        for name in ("seconds", "num_prompts", "input_len", "output_len"):
            if not 0 < getattr(made, name) < 10**6:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(made, name)}", "give a number above 0")
        return made

    def run(self) -> None:
        assert self.out is not None
        folder = self._offline(self.engine, self.out) if self.engine else self._server(self.out)
        traces = sorted(folder.rglob("*.trace.json.gz"))
        if not traces:
            raise JaxserveError(f"no trace has come into {folder}", "give the server's --profile-dir as --out")
        print(f"Perfetto: open https://ui.perfetto.dev and load {traces[-1]}")
        print(f"XProf:    pip install xprof, then xprof --logdir {folder}")

    def _server(self, out: Path) -> Path:
        client = Client(self.url or DEFAULT_URL, api_key=self.api_key or key_of_environment())
        name = time.strftime("%Y%m%d-%H%M%S")
        client.post("/start_profile", {"folder": name})
        try:
            time.sleep(self.seconds)
        finally:  # also on Ctrl-C: a trace that nobody stops grows
            client.post("/stop_profile")
        return out.expanduser() / name

    def _offline(self, engine: EngineConfig, out: Path) -> Path:
        from jaxserve.types.sampling_params import SamplingParams

        llm = opened(engine)
        params = SamplingParams(temperature=1.0, seed=0, ignore_eos=True, max_tokens=self.output_len, detokenize=False)
        prompts = random_prompts(self.num_prompts, self.input_len, llm.spec.vocab_size)
        llm.generate(prompts[:1], params)  # what happens once only is no part of the trace
        llm.reset_prefix_cache()
        llm.start_profile(out)
        try:
            llm.generate(prompts, params)
        finally:
            folder = llm.stop_profile()
        return folder
