# SPDX-License-Identifier: Apache-2.0
"""LLM: a model in this process, called from one thread at a time. Its methods return when all of their work is done.

Names and shapes are those of vLLM. frontend/prepare.py checks what users give; the engine computes; frontend/outputs.py
makes the text.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxserve.errors import EngineError, JaxserveError, OverloadedError, RequestError
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.frontend.prepare import Prompt, Ready, by_prompt, each_named, is_one, listed
from jaxserve.host import beam_search, token_arrays
from jaxserve.host.interrupts import Deferred
from jaxserve.host.open import opened
from jaxserve.host.token_arrays import GeneratedArrays
from jaxserve.models import param_layout
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.outputs import BeamSearchOutput, RequestOutput, Update
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

type Message = Mapping[str, Any]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        params: Params | None = None,
        spec: ModelSpec | None = None,
        mesh: Any = None,
        **settings: Any,
    ) -> None:
        """`settings` are the fields of EngineConfig: max_model_len, max_num_seqs, dtype, tensor_parallel_size, ...

        A program that holds the parameters already gives them, in public or engine layout, with their spec and the
        mesh that they lie on. It must not donate or delete them while they are in use here.
        """
        with _usual_jax():
            self._engine, self._intake = opened(model, settings, params=params, spec=spec, mesh=mesh)
        self._lock = threading.Lock()

    @contextmanager
    def _alone(self) -> Generator[Deferred]:
        """One caller at a time, in no context of the caller's; Ctrl-C waits until nothing is half done."""
        if not self._lock.acquire(blocking=False):
            raise JaxserveError("this LLM is in use by another call", "call it from one thread, or use AsyncLLM")
        try:
            with _usual_jax(), Deferred() as interrupts:
                yield interrupts
        finally:
            self._lock.release()

    # --- text -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; the outputs are in the order of the prompts.

        All requests are checked before any runs, and a bad one is a RequestError that says which prompt it is. A list
        of numbers is one prompt. Without `sampling_params` those of the model's generation_config.json hold.
        """
        with self._alone() as interrupts:
            jobs = self._ready(listed(prompts), sampling_params, priority=priority)
            return self._outputs(jobs, use_tqdm, interrupts)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or each of a list of them, put into the words of the model's chat template."""
        tokenizer = self.get_tokenizer()

        def prompt(conversation: Sequence[Message]) -> Prompt:
            text = tokenizer.chat_text(
                conversation,
                chat_template=chat_template,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=chat_template_kwargs,
            )
            return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

        one = is_one(messages) or not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if one else list(messages)
        with self._alone() as interrupts:
            prompts = each_named(prompt, conversations, what="conversation")
            return self._outputs(self._ready(prompts, sampling_params), use_tqdm, interrupts)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` likeliest continuations of each prompt that a beam search finds, best first.

        Tokens and text of a sequence begin with the prompt. Its end of text is one of its tokens, and in its text
        where include_stop_str_in_output is set.
        """
        with self._alone() as interrupts:
            beam_search.check(params, self._engine.limits)
            jobs = self._ready(listed(prompts), beam_search.BeamSearch.sampling_params(params))
            tokenizer, searches = self._intake.tokenizer, list[beam_search.BeamSearch]()
            with self._clean(), _Bar(len(jobs), use_tqdm) as bar:
                requests = [job.request for job in jobs]
                for searches in beam_search.search(self._engine, requests, params, tokenizer):
                    bar.so_far(sum(one.output is not None for one in searches))
                    interrupts.allow()
            return [one.output for one in searches if one.output is not None]

    def _ready(self, prompts: Sequence[Prompt], params: Any, **more: Any) -> list[Ready]:
        final: dict[int, Any] = {}
        given = by_prompt(params, len(prompts), self._intake.default_params)
        for each in given:
            if isinstance(each, SamplingParams) and id(each) not in final:
                final[id(each)] = replace(each, output_kind=RequestOutputKind.FINAL_ONLY)
        return self._intake.all_ready(prompts, [final.get(id(each), each) for each in given], **more)

    def _outputs(self, jobs: list[Ready], use_tqdm: bool, interrupts: Deferred) -> list[RequestOutput]:
        engine, tokenizer = self._engine, self._intake.tokenizer
        builders = {job.request.id: OutputBuilder(tokenizer, job.request, prompt=job.prompt) for job in jobs}
        outputs: dict[str, RequestOutput] = {}

        def take(update: Update) -> None:
            builder = builders.get(update.request_id)
            if builder is None:
                return  # a stop string ended it
            output = builder.add(update)
            for index in builder.take_stopped():
                engine.abort(update.request_id, index=index, reason="stop")
            if output is not None:
                outputs[update.request_id] = output
                del builders[update.request_id]
                bar.add(output)

        with _Bar(len(jobs), use_tqdm) as bar:
            self._run(jobs, take, interrupts)
        return [outputs[job.request.id] for job in jobs]

    def _run(self, jobs: Sequence[Ready], take: Callable[[Update], None], interrupts: Deferred) -> None:
        """Gives the engine all requests, some ahead of what it can run, and each update to `take`."""
        engine = self._engine
        engine.check_alive()
        todo = deque(job.request for job in sorted(jobs, key=lambda job: job.request.priority))
        with self._clean():
            while todo or engine.unfinished:
                while todo and engine.scheduler.queued < engine.limits.max_num_seqs:
                    try:
                        engine.add(todo[0])
                    except OverloadedError:  # more than the configuration lets wait
                        break
                    todo.popleft()
                for update in engine.step():
                    take(update)
                interrupts.allow()

    @contextmanager
    def _clean(self) -> Generator[None]:
        """Whatever happens inside, nothing is left in the engine."""
        try:
            yield
        except BaseException:
            engine = self._engine
            with suppress(EngineError):
                engine.check_alive()
                for request_id in list(engine.scheduler.requests):
                    engine.abort(request_id)
                while engine.unfinished:
                    engine.step()
            if engine.error is not None:
                engine.fail_all()
            raise

    # --- numbers ----------------------------------------------------------------------------------------------------

    def score(self, tokens: Any) -> list[np.ndarray]:
        """The log-probability of each token of a sequence given those before it: one value less than tokens.

        `tokens` is a list of ids or a list of such lists.
        """
        with self._alone() as interrupts:
            sequences = listed(tokens)
            params = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
            jobs = self._ready(sequences, params, score_only=True)
            scores = {
                job.request.id: np.full(len(job.request.prompt_token_ids) - 1, np.nan, np.float32) for job in jobs
            }
            told = dict.fromkeys(scores, 0)
            errors: dict[str, str] = {}

            def take(update: Update) -> None:
                if update.error is not None:
                    errors[update.request_id] = update.error
                if found := update.prompt_logprobs:
                    at = told[update.request_id]
                    told[update.request_id] = at + len(found)
                    scores[update.request_id][at : at + len(found)] = [entry.logprob for entry in found]

            self._run([job for job in jobs if len(job.request.prompt_token_ids) > 1], take, interrupts)
            _check_all("sequence", [errors.get(job.request.id) for job in jobs])
            return list(scores.values())

    def embed(self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[np.ndarray]:
        """The embedding of each prompt, in their order: float32 [hidden], what the model's last norm gives for the last
        token, which alone has seen all others.

        A prompt may be as long as max_model_len. Embeddings are as long as they come; `e / np.linalg.norm(e)` has
        length 1.
        """
        with self._alone() as interrupts:
            jobs = self._ready(listed(prompts), SamplingParams(detokenize=False), embed=True)
            outputs = self._outputs(jobs, use_tqdm, interrupts)
            _check_all("prompt", [output.outputs[0].error for output in outputs])
            return [output.embedding for output in outputs if output.embedding is not None]

    def generate_arrays(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        pad_id: int = 0,
    ) -> GeneratedArrays:
        """Like `generate`, for programs that compute on with the tokens: ids in, arrays on the engine's devices out.

        `prompts` is a list of lists or arrays of ids, or (tokens [B, S], lengths [B]). All prompts take the same n.
        """
        rows = token_arrays.prompt_rows(prompts)
        if not isinstance(pad_id, int) or isinstance(pad_id, bool) or not -(2**31) <= pad_id < 2**31:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("pad_id", f"pad_id is {pad_id!r}", "give a whole number of at most 32 bits")
        with self._alone() as interrupts:
            given = by_prompt(sampling_params, len(rows), self._intake.default_params)
            slim: dict[int, Any] = {
                id(each): replace(each, logprobs=0, detokenize=bool(each.stops))
                for each in given
                if isinstance(each, SamplingParams)
            }
            jobs = self._ready(rows, [slim.get(id(each), each) for each in given])
            samples = {job.request.params.n for job in jobs} or {1}
            if len(samples) > 1:
                raise RequestError("n", f"n is {min(samples)} and {max(samples)}", "give the same n for all prompts")
            longest = self._engine.limits.max_model_len - 1
            room = (job.request.params.max_tokens or longest - len(job.request.prompt_token_ids) + 1 for job in jobs)
            width = min(max(room, default=0), longest)
            outputs = self._outputs(jobs, False, interrupts)
            return token_arrays.as_arrays(
                outputs, samples=samples.pop(), width=width, pad_id=pad_id, place=self._place()
            )

    def _place(self) -> Any:
        runner = self._engine.runner
        return NamedSharding(runner.mesh, P()) if runner.mesh is not None else runner.device

    # --- weights and state ------------------------------------------------------------------------------------------

    def update_weights(self, params: Params, version: int | None = None) -> None:
        """These parameters from now on, in public or engine layout; a tree of another model is refused, and the old
        ones stay. Outputs tell the version as policy_version; not given, it is one more than the last.

        Engine layout with equal shapes, dtype and shardings is taken without a copy: do not donate it elsewhere.
        """
        with self._alone():
            self._engine.update_weights(params, version=version)

    def sleep(self, level: int = 1) -> None:
        """Gives the devices' memory back; level 1 keeps the weights on the host, level 2 forgets them."""
        with self._alone():
            self._engine.sleep(level)

    def wake(self) -> None:
        """After level 2 with the weights that `update_weights` has given since, else the checkpoint's: version 0."""
        with self._alone():
            self._engine.wake()

    wake_up = wake

    def reset_prefix_cache(self) -> None:
        with self._alone():
            self._engine.reset_prefix_cache()

    @property
    def spec(self) -> ModelSpec:
        return self._engine.runner.spec

    @property
    def params(self) -> Params:
        """In engine layout, as they are on the devices; empty while asleep."""
        return self._engine.runner.params

    def public_params(self) -> Params:
        """In public layout, one entry per matrix of the architecture: copies."""
        with self._alone(), self._engine.runner.on_mesh():
            return param_layout.to_public_layout(self.spec, self.params)

    # --- the rest ---------------------------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for."""
        return self._intake.default_params()

    def get_tokenizer(self) -> Tokenizer:
        if self._intake.tokenizer is None:
            raise JaxserveError("there is no tokenizer", "name one with tokenizer=")
        return self._intake.tokenizer

    def metrics(self) -> EngineMetrics:
        return self._engine.metrics()

    def start_profile(self, folder: str | Path) -> None:
        """Takes a trace of what is done until `stop_profile`, for XProf or Perfetto."""
        with self._alone():
            self._engine.profiler.start(folder)

    def stop_profile(self) -> Path:
        with self._alone():
            return self._engine.profiler.stop()


@contextmanager
def _usual_jax() -> Generator[None]:
    """What the caller's context says of its own computing is not meant for the engine's, and would break it."""
    with jax.set_mesh(None), jax.transfer_guard("allow"), jax.disable_jit(False):
        yield


def _check_all(what: str, errors: Sequence[str | None]) -> None:
    """Of a request that failed there is no number to give."""
    for place, error in enumerate(errors):
        if error is not None:
            raise JaxserveError(f"{what} {place}: {error}", "check the model's weights; the other ones may be well")


class _Bar:
    """How many prompts are done, and tokens per second; on a terminal alone, and only when it takes long."""

    def __init__(self, count: int, wanted: bool) -> None:
        shown = wanted and sys.stderr.isatty()
        self._bar = tqdm(total=count, desc="Processed prompts", delay=1, dynamic_ncols=True) if shown else None
        self._read = self._written = 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, output: RequestOutput) -> None:
        if self._bar is None:
            return
        self._read += len(output.prompt_token_ids)
        self._written += sum(len(sample.token_ids) for sample in output.outputs)
        seconds = max(self._bar.format_dict["elapsed"], 1e-3)
        rates = f"input: {self._read / seconds:.0f} tokens/s, output: {self._written / seconds:.0f} tokens/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(1)

    def so_far(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count - self._bar.n)
