# SPDX-License-Identifier: Apache-2.0
"""LLM: a model in this process, called from one thread at a time. Its methods return when their work is complete.

The API follows vLLM's. frontend/prepare.py checks the arguments, the engine computes, and frontend/outputs.py makes the
text.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxserve.errors import JaxserveError, OverloadedError, RequestError
from jaxserve.frontend import pooled_calls
from jaxserve.frontend.beam_search import beam_search_output
from jaxserve.frontend.outputs import OutputBuilder
from jaxserve.frontend.pooled_calls import PooledCall
from jaxserve.frontend.pooling import paired
from jaxserve.frontend.prepare import Prompt, by_prompt, each_named, is_one, listed
from jaxserve.host import token_arrays
from jaxserve.host.driver import Driver
from jaxserve.host.interrupts import Deferred
from jaxserve.host.open import open_engine, pooling_for
from jaxserve.host.token_arrays import GeneratedArrays
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.outputs import BeamSearchOutput, ClassificationOutput, RequestOutput, Update
from jaxserve.types.request import Abort, Pool, Request
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

type MessageDict = Mapping[str, Any]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        params: Params | None = None,
        spec: ModelSpec | None = None,
        mesh: Any = None,
        classifier_from_token: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        """`settings` are the fields of EngineConfig: max_model_len, max_num_seqs, dtype, tensor_parallel_size, ...

        `params`: parameters that the program already holds, in public or engine layout, with their spec and mesh. Do
        not donate or delete them while this LLM uses them. `classifier_from_token`: two tokens; `score` returns the
        probability of the second against the first.
        """
        with _usual_jax():
            self._engine, self._preparer = open_engine(model, settings, params=params, spec=spec, mesh=mesh)
        self._pooling = pooling_for(self._engine, self._preparer, classifier_from_token)
        self._driver = Driver(self._engine)
        self._lock = threading.Lock()

    @contextmanager
    def _alone(self) -> Generator[Deferred]:
        """Allow one caller at a time, outside the caller's jax contexts, and defer Ctrl-C to a safe point."""
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
        """Continue each prompt; the outputs are in the order of the prompts.

        All requests are checked before any runs; an invalid one raises a RequestError with the position of its prompt.
        A list of numbers is one prompt. `sampling_params` default to those of the model's generation_config.json.
        """
        with self._alone() as interrupts:
            requests = self._prepared(listed(prompts), sampling_params, priority=priority)
            return self._outputs(requests, use_tqdm, interrupts)

    def chat(
        self,
        messages: Sequence[MessageDict] | Sequence[Sequence[MessageDict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list, formatted with the model's chat template."""
        tokenizer = self.get_tokenizer()

        def prompt(conversation: Sequence[MessageDict]) -> Prompt:
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
            return self._outputs(self._prepared(prompts, sampling_params), use_tqdm, interrupts)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The `beam_width` most likely continuations of each prompt that a beam search finds, best first.

        A sequence's tokens and text begin with the prompt. The tokens include the end of text; the text includes it
        only with include_stop_str_in_output.
        """
        with self._alone() as interrupts:
            requests = each_named(lambda prompt: self._preparer.prepare_beams(prompt, params), listed(prompts))
            outputs = self._outputs(requests, use_tqdm, interrupts)
            return [beam_search_output(output, params, self._preparer.tokenizer) for output in outputs]

    def _prepared(self, prompts: Sequence[Prompt], params: Any, **more: Any) -> list[Request]:
        final: dict[int, Any] = {}
        given = by_prompt(params, len(prompts), self._preparer.default_params)
        for each in given:
            if isinstance(each, SamplingParams) and id(each) not in final:
                final[id(each)] = replace(each, output_kind=RequestOutputKind.FINAL_ONLY)
        return self._preparer.prepare_all(prompts, [final.get(id(each), each) for each in given], **more)

    def _outputs(self, requests: list[Request], use_tqdm: bool, interrupts: Deferred) -> list[RequestOutput]:
        tokenizer = self._preparer.tokenizer
        builders = {request.id: OutputBuilder(tokenizer, request) for request in requests}
        outputs: dict[str, RequestOutput] = {}

        def take(update: Update) -> Iterable[Abort]:
            builder = builders.get(update.request_id)
            if builder is None:
                return ()  # it has ended at a stop string
            output = builder.add(update)
            if output is not None:
                outputs[update.request_id] = output
                del builders[update.request_id]
                bar.add(output)
            return builder.take_aborts(update.request_id)

        with _ProgressBar(len(requests), use_tqdm) as bar:
            self._run(requests, take, interrupts)
        return [outputs[request.id] for request in requests]

    def _run(
        self, requests: Sequence[Request], take: Callable[[Update], Iterable[Abort]], interrupts: Deferred
    ) -> None:
        """Run all requests to their end. After an error, none are left in the engine."""
        self._engine.check_alive()
        try:
            self._driver.run(_Batch(self._driver, requests, take, interrupts))
        except BaseException:
            self._driver.end_all()
            raise

    # --- numbers ----------------------------------------------------------------------------------------------------

    def logprobs(self, tokens: Any) -> list[np.ndarray]:
        """The log probability of each token given those before it: one value fewer than tokens, for each sequence.

        `tokens` is a list of ids or a list of such lists.
        """
        with self._alone() as interrupts:
            sequences = listed(tokens)
            params = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
            requests = self._prepared(sequences, params, score_only=True)
            scores = {
                request.id: np.full(len(request.prompt_token_ids) - 1, np.nan, np.float32) for request in requests
            }
            filled = dict.fromkeys(scores, 0)
            errors: dict[str, str] = {}

            def take(update: Update) -> Iterable[Abort]:
                if update.error is not None:
                    errors[update.request_id] = update.error
                if found := update.prompt_logprobs:
                    at = filled[update.request_id]
                    filled[update.request_id] = at + len(found)
                    scores[update.request_id][at : at + len(found)] = [entry.logprob for entry in found]
                return ()

            self._run([request for request in requests if len(request.prompt_token_ids) > 1], take, interrupts)
            _check_all("sequence", [errors.get(request.id) for request in requests])
            return list(scores.values())

    def generate_arrays(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        pad_id: int = 0,
    ) -> GeneratedArrays:
        """Like `generate`, for programs that compute with tokens: takes ids, returns arrays on the engine's devices.

        `prompts` is a list of lists or arrays of ids, or (tokens [B, S], lengths [B]). n must be equal for all prompts.
        """
        rows = token_arrays.prompt_rows(prompts)
        if not isinstance(pad_id, int) or isinstance(pad_id, bool) or not -(2**31) <= pad_id < 2**31:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("pad_id", f"pad_id is {pad_id!r}", "use a whole number of at most 32 bits")
        with self._alone() as interrupts:
            given = by_prompt(sampling_params, len(rows), self._preparer.default_params)
            slim: dict[int, Any] = {
                id(each): replace(each, logprobs=0, detokenize=bool(each.stops))
                for each in given
                if isinstance(each, SamplingParams)
            }
            requests = self._prepared(rows, [slim.get(id(each), each) for each in given])
            samples = {request.params.n for request in requests} or {1}
            if len(samples) > 1:
                raise RequestError(
                    "n", f"n varies from {min(samples)} to {max(samples)}", "use the same n for all prompts"
                )
            longest = self._engine.limits.max_model_len - 1
            room = (each.params.max_tokens or longest - len(each.prompt_token_ids) + 1 for each in requests)
            width = min(max(room, default=0), longest)
            outputs = self._outputs(requests, False, interrupts)
            return token_arrays.as_arrays(
                outputs, samples=samples.pop(), width=width, pad_id=pad_id, place=self._place()
            )

    def _place(self) -> Any:
        runner = self._engine.runner
        return NamedSharding(runner.mesh, P()) if runner.mesh is not None else runner.device

    # --- embeddings, classes and scores -----------------------------------------------------------------------------

    def encode(
        self, prompts: Prompt | Sequence[Prompt], *, pool: Pool | None = None, use_tqdm: bool = True
    ) -> list[np.ndarray]:
        """The hidden state of each prompt, in order: float32 [hidden], the output of the model's last norm.

        `pool`: of the "last" token, which is the only one that attends to all others, of the "first", or the "mean" or
        "weighted_mean" of all; default: what embeddings of this model are made of. A prompt may be as long as
        max_model_len.
        """
        pool = self._pooling.pool if pool is None else pool
        with self._alone() as interrupts:
            requests = self._prepared(listed(prompts), SamplingParams(detokenize=False), embed=True, pool=pool)
            outputs = self._outputs(requests, use_tqdm, interrupts)
            _check_all("prompt", [output.outputs[0].error for output in outputs])
            return [output.embedding for output in outputs if output.embedding is not None]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, dimensions: int | None = None, use_tqdm: bool = True
    ) -> list[np.ndarray]:
        """The embedding of each prompt, in order, as the model's folder says; without modules.json it is the last
        token's hidden state, scaled to length 1. `dimensions` shortens embeddings of models that allow it."""
        hidden = self._engine.limits.hidden_size
        return self._pooled(pooled_calls.embedding(self._pooling, listed(prompts), dimensions, hidden), use_tqdm)

    def classify(self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[ClassificationOutput]:
        """The probabilities of a sequence-classification model's labels for each prompt."""
        return self._pooled(pooled_calls.classification(self._pooling, listed(prompts)), use_tqdm)

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        chat_template: str | None = None,
        use_tqdm: bool = True,
    ) -> list[float]:
        """How well texts belong together: one text with each of many, or as many with as many.

        A model with one score reads both texts in one prompt; any other embeds them, and the score is the cosine.
        """
        pairs = paired(*([text] if isinstance(text, str) else list(text) for text in (text_1, text_2)))
        tokenizer = self.get_tokenizer()
        return self._pooled(pooled_calls.score(self._pooling, pairs, tokenizer, chat_template=chat_template), use_tqdm)

    def _pooled[Result](self, call: PooledCall[Result], use_tqdm: bool) -> list[Result]:
        return call.results(self.encode(call.prompts, pool=call.pool, use_tqdm=use_tqdm))

    # --- weights and state ------------------------------------------------------------------------------------------

    def update_weights(self, params: Params, version: int | None = None) -> None:
        """Replace the parameters, given in public or engine layout. Raises, and keeps the old ones, if they are of
        another model. Outputs have the version as policy_version; default: the last version plus one.

        Arrays that are already as the engine needs them are used without a copy: do not donate what was given. All
        others are converted one tensor at a time, and each old one is freed before the next is converted.
        """
        with self._alone():
            self._engine.update_weights(params, version=version)

    def sleep(self, level: int = 1) -> None:
        """Free the devices' memory. Level 1 keeps the weights on the host, level 2 drops them.

        On a GPU, other processes can use the memory only with enable_sleep_mode; this one always can.
        """
        with self._alone():
            self._engine.sleep(level)

    def wake(self) -> None:
        """Restore the engine. After level 2 it uses the weights from `update_weights`, if called since, else the
        checkpoint's, as version 0."""
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
        """The engine's own arrays, in engine layout, on the devices: do not donate them. Empty while asleep."""
        return jax.tree.map(lambda leaf: leaf, self._engine.runner.params)

    def public_params(self, *, copy: bool = True) -> Params:
        """A copy of the parameters in public layout, with one entry per matrix of the architecture.

        With copy=False, arrays that are equal in both layouts are the engine's own, and only the others take memory:
        do not donate or delete them.
        """
        with self._alone():
            engine = self._engine
            return engine.public_params(engine.weights(), copy=copy)

    # --- the rest ---------------------------------------------------------------------------------------------------

    def get_default_sampling_params(self) -> SamplingParams:
        """The defaults of the model's generation_config.json."""
        return self._preparer.default_params()

    def get_tokenizer(self) -> Tokenizer:
        if self._preparer.tokenizer is None:
            raise JaxserveError("no tokenizer is loaded", "set tokenizer")
        return self._preparer.tokenizer

    def metrics(self) -> EngineMetrics:
        return self._engine.metrics()

    def start_profile(self, folder: str | Path) -> None:
        """Record a trace for XProf or Perfetto, until `stop_profile`."""
        with self._alone():
            self._engine.profiler.start(folder)

    def stop_profile(self) -> Path:
        with self._alone():
            return self._engine.profiler.stop()


@contextmanager
def _usual_jax() -> Generator[None]:
    """Shield the engine from the caller's jax contexts, which would break it."""
    with jax.set_mesh(None), jax.transfer_guard("allow"), jax.disable_jit(False):
        yield


def _check_all(what: str, errors: Sequence[str | None]) -> None:
    """Raise the first error: a failed request has no result."""
    for place, error in enumerate(errors):
        if error is not None:
            raise JaxserveError(
                f"{what} {place}: {error}", "check the model's weights: other requests may be unaffected"
            )


class _Batch:
    """The Host for one call: adds its requests, a few more than the engine can run, and passes on each update."""

    def __init__(
        self,
        driver: Driver,
        requests: Iterable[Request],
        take: Callable[[Update], Iterable[Abort]],
        interrupts: Deferred,
    ) -> None:
        self._driver, self._take, self._interrupts = driver, take, interrupts
        self._todo = deque(sorted(requests, key=lambda request: request.priority))

    def calls(self, *, idle: bool) -> bool:
        self._interrupts.allow()
        engine, todo = self._driver.engine, self._todo
        if idle and not todo:
            return False
        while todo and engine.queued < engine.limits.max_num_seqs:
            try:
                self._driver.add(todo[0])
            except OverloadedError:  # the configured queue is full
                break
            todo.popleft()
        return True

    def take(self, updates: list[Update]) -> Iterable[Abort]:
        return [abort for update in updates for abort in self._take(update)]


class _ProgressBar:
    """Shows the finished prompts and tokens per second; only on a terminal, and only after a second."""

    def __init__(self, count: int, wanted: bool) -> None:
        shown = wanted and sys.stderr.isatty()
        self._bar = tqdm(total=count, desc="Processed prompts", delay=1, dynamic_ncols=True) if shown else None
        self._read = self._written = 0

    def __enter__(self) -> "_ProgressBar":
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
