# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench throughput` and `jaxserve bench latency`: the engine in this process, no server, random prompts."""

import json as json_module
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from jaxserve.cli import settings
from jaxserve.config import EngineConfig
from jaxserve.errors import UsageError
from jaxserve.flags.parsing import Parser


def random_prompts(count: int, length: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def opened(engine: EngineConfig) -> Any:
    """The engine in this process, without tokenizer: prompts are ids."""
    from jaxserve.llm import LLM

    values: dict[str, Any] = {field.name: getattr(engine, field.name) for field in fields(engine)}
    values["skip_tokenizer_init"] = True
    return LLM(values.pop("model"), **values)


@dataclass(frozen=True, kw_only=True)
class Offline:
    engine: EngineConfig
    json: Path | None = None
    """Write the figures into this file too; - for standard output."""

    @classmethod
    def parser(cls, prog: str, about: str) -> Parser:
        return settings.parser_beside_engine(cls, "Benchmark", prog, about)

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> Self:
        given = settings.named_model(given)
        if not settings.names_model(given):
            from jaxserve import demo

            given["model"] = str(demo.FOLDER)
        names = {field.name for field in fields(cls)}
        engine = settings.made(parser, lambda: settings.split(EngineConfig, given))
        made = cls(engine=engine, **{name: value for name, value in given.items() if name in names})
        settings.check_place(made.json)
        for name, low in made.least().items():
            if getattr(made, name) < low:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(made, name)}", f"give {low} or more")
        return made

    def least(self) -> dict[str, int]:
        """The smallest values of the numbers."""
        return {}

    def write(self, figures: Mapping[str, Any]) -> None:
        if self.json is not None:
            settings.write(self.json, json_module.dumps(figures))


@dataclass(frozen=True, kw_only=True)
class BenchThroughput(Offline):
    """Tokens per second of many prompts."""

    num_prompts: int = 1000
    """How many prompts."""
    input_len: int = 1024
    """Tokens in a prompt."""
    output_len: int = 128
    """Tokens in an answer."""

    def least(self) -> dict[str, int]:
        return dict.fromkeys(("num_prompts", "input_len", "output_len"), 1)

    def run(self) -> None:
        llm = opened(self.engine)
        from jaxserve.types.sampling_params import SamplingParams

        params = SamplingParams(temperature=1.0, seed=0, ignore_eos=True, max_tokens=self.output_len, detokenize=False)
        prompts = random_prompts(self.num_prompts, self.input_len, llm.spec.vocab_size, seed=self.engine.seed)
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        read = sum(len(prompt) for prompt in prompts)
        written = sum(len(output.outputs[0].token_ids) for output in outputs)
        total = (read + written) / seconds
        requests = len(prompts) / seconds
        rates = f"{total:.2f} total tokens/s, {written / seconds:.2f} output tokens/s"
        print(f"Throughput: {requests:.2f} requests/s, {rates}")
        print(f"Total num prompt tokens:  {read}\nTotal num output tokens:  {written}")
        self.write(
            {
                "elapsed_time": seconds,
                "num_requests": len(prompts),
                "total_num_tokens": read + written,
                "requests_per_second": requests,
                "tokens_per_second": total,
                "output_tokens_per_second": written / seconds,
            }
        )


@dataclass(frozen=True, kw_only=True)
class BenchLatency(Offline):
    """Seconds that one batch takes."""

    batch_size: int = 8
    """Prompts that run together."""
    input_len: int = 32
    """Tokens in a prompt."""
    output_len: int = 128
    """Tokens in an answer."""
    num_iters_warmup: int = 10
    """Runs before those that count."""
    num_iters: int = 30
    """Runs that count."""

    def least(self) -> dict[str, int]:
        return {**dict.fromkeys(("batch_size", "input_len", "output_len", "num_iters"), 1), "num_iters_warmup": 0}

    def run(self) -> None:
        llm = opened(self.engine)
        from jaxserve.cli.load import percentile
        from jaxserve.types.sampling_params import SamplingParams

        params = SamplingParams(temperature=1.0, seed=0, ignore_eos=True, max_tokens=self.output_len, detokenize=False)
        prompts = random_prompts(self.batch_size, self.input_len, llm.spec.vocab_size, seed=self.engine.seed)

        def once() -> float:
            llm.reset_prefix_cache()  # else only the first run computes the prompts
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - began

        for _ in range(self.num_iters_warmup):
            once()
        times = [once() for _ in range(self.num_iters)]
        ordered, mean = sorted(times), sum(times) / len(times)
        shares = {share: percentile(ordered, share) for share in (10, 25, 50, 75, 90, 99)}
        print(f"Avg latency: {mean} seconds")
        for share, value in shares.items():
            print(f"{share}% percentile latency: {value} seconds")
        self.write({"avg_latency": mean, "latencies": times, "percentiles": {str(k): v for k, v in shares.items()}})
