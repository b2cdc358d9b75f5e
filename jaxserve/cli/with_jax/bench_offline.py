# SPDX-License-Identifier: Apache-2.0
"""`jaxserve bench throughput` and `jaxserve bench latency`: an engine in this process with random prompts."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Self

from jaxserve import demo
from jaxserve.cli import results_file
from jaxserve.config import EngineConfig
from jaxserve.flags.parser import Parser
from jaxserve.flags.setting import Setting, build

GROUP = "Benchmark"


def random_prompts(count: int, length: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def opened(engine: EngineConfig) -> Any:
    """The engine in this process, without a tokenizer: prompts are token ids."""
    from jaxserve.llm import LLM

    values: dict[str, Any] = {field.name: getattr(engine, field.name) for field in fields(engine)}
    values["skip_tokenizer_init"] = True
    return LLM(values.pop("model"), **values)


@dataclass(frozen=True, kw_only=True)
class Offline:
    engine: EngineConfig
    json: Annotated[
        Path | None, Setting("Also write the results as JSON to this file; - for standard output.", GROUP)
    ] = None

    @classmethod
    def of(cls, parser: Parser, given: Mapping[str, Any]) -> Self:
        return build(cls, {"model": str(demo.FOLDER), **given})

    def __post_init__(self) -> None:
        results_file.check(self.json)

    def write(self, results: Mapping[str, Any]) -> None:
        if self.json is not None:
            results_file.write(self.json, results_file.text_of(results))


@dataclass(frozen=True, kw_only=True)
class BenchThroughput(Offline):
    """Measure offline throughput."""

    num_prompts: Annotated[int, Setting("Number of prompts.", GROUP, low=1)] = 1000
    input_len: Annotated[int, Setting("Tokens per prompt.", GROUP, low=1)] = 1024
    output_len: Annotated[int, Setting("Tokens to generate per prompt.", GROUP, low=1)] = 128

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
    """Measure offline batch latency."""

    batch_size: Annotated[int, Setting("Number of prompts in the batch.", GROUP, low=1)] = 8
    input_len: Annotated[int, Setting("Tokens per prompt.", GROUP, low=1)] = 32
    output_len: Annotated[int, Setting("Tokens to generate per prompt.", GROUP, low=1)] = 128
    num_iters_warmup: Annotated[int, Setting("Number of warmup runs, which are not measured.", GROUP, low=0)] = 10
    num_iters: Annotated[int, Setting("Number of measured runs.", GROUP, low=1)] = 30

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
        print(f"Avg latency: {mean:.6g} seconds")
        for share, value in shares.items():
            print(f"{share}% percentile latency: {value:.6g} seconds")
        self.write({"avg_latency": mean, "latencies": times, "percentiles": {str(k): v for k, v in shares.items()}})
