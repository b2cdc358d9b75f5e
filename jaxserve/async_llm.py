# SPDX-License-Identifier: Apache-2.0
"""AsyncLLM: a model in this process, for programs with an event loop. Requests can be added and ended at any time.

The engine runs in a thread (host/thread.py); callers may be in any number of event loops (frontend/client.py).
"""

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.errors import JaxserveError
from jaxserve.frontend import pooled_calls
from jaxserve.frontend.beam_search import beam_search_output
from jaxserve.frontend.client import EngineClient
from jaxserve.frontend.pooled_calls import PooledCall
from jaxserve.frontend.prepare import Prompt
from jaxserve.host.open import open_engine, pooling_for
from jaxserve.host.thread import EngineThread
from jaxserve.models.decoder import Params
from jaxserve.models.spec import ModelSpec
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.checks import Number
from jaxserve.types.metrics import EngineMetrics
from jaxserve.types.outputs import BeamSearchOutput, ClassificationOutput, RequestOutput
from jaxserve.types.request import Pool
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


class AsyncLLM:
    """Takes the arguments of LLM. Use it as a context manager, or await `shutdown`."""

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
        self._engine, self._preparer = open_engine(model, settings, params=params, spec=spec, mesh=mesh)
        self._pooling = pooling_for(self._engine, self._preparer, classifier_from_token)
        self._thread = EngineThread(self._engine)
        self._client = EngineClient(self._thread, self._preparer)
        self._end = weakref.finalize(self, self._thread.stop)  # on garbage collection, or when Python exits

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Yield outputs of `sampling_params.output_kind` as they arrive.

        A request that takes longer than `timeout` seconds, including the time in the queue, ends with finish_reason
        "abort". Outputs that arrive while the consumer is busy are merged. Leaving the loop early aborts the request.
        """
        self._thread.check_alive()
        request = self._preparer.prepare(
            prompt, sampling_params, request_id=request_id, priority=priority, deadline=_deadline(timeout)
        )
        async with aclosing(self._client.outputs(request)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer a conversation, formatted with the model's chat template. Otherwise like `generate`."""
        text = self.get_tokenizer().chat_text(
            messages,
            chat_template=chat_template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )
        prompt = {"prompt": text, "prompt_token_ids": self._preparer.encode(text, add_special_tokens=False)}
        answer = self.generate(prompt, sampling_params, request_id, priority=priority, timeout=timeout)
        async with aclosing(answer) as outputs:
            async for output in outputs:
                yield output

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> BeamSearchOutput:
        """Like LLM.beam_search, for one prompt. Searches and other requests run concurrently.

        Cancelling the call aborts the search. After `abort`, or `timeout` seconds, the result is the best sequences so
        far, with finish_reason "abort".
        """
        self._thread.check_alive()
        request = self._preparer.prepare_beams(
            prompt, params, request_id=request_id, priority=priority, deadline=_deadline(timeout)
        )
        async with aclosing(self._client.outputs(request)) as outputs:
            return beam_search_output(await anext(outputs), params, self._preparer.tokenizer)

    async def abort(self, request_id: str) -> None:
        """End a request; its consumer gets a last output. Unknown ids are ignored."""
        await self._client.abort(request_id)

    # --- embeddings, classes and scores -----------------------------------------------------------------------------

    async def encode(
        self,
        prompt: Prompt,
        request_id: str | None = None,
        *,
        pool: Pool | None = None,
        priority: int = 0,
        timeout: float | None = None,
    ) -> np.ndarray:
        """Like LLM.encode, for one prompt. Cancelling the call aborts the request; one that is aborted raises."""
        self._thread.check_alive()
        request = self._preparer.prepare(
            prompt,
            SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY),
            request_id=request_id,
            priority=priority,
            deadline=_deadline(timeout),
            embed=True,
            pool=self._pooling.pool if pool is None else pool,
        )
        async with aclosing(self._client.outputs(request)) as outputs:
            output = await anext(outputs)
        if output.embedding is None:
            raise JaxserveError(output.outputs[0].error or "the request was aborted", "send it again")
        return output.embedding

    async def embed(self, prompt: Prompt, *, dimensions: int | None = None, **options: Any) -> np.ndarray:
        """Like LLM.embed, for one prompt. `options`: request_id, priority, timeout."""
        hidden = self._preparer.limits.hidden_size
        [found] = await self._pooled(pooled_calls.embedding(self._pooling, [prompt], dimensions, hidden), options)
        return found

    async def classify(self, prompt: Prompt, **options: Any) -> ClassificationOutput:
        """Like LLM.classify, for one prompt."""
        [found] = await self._pooled(pooled_calls.classification(self._pooling, [prompt]), options)
        return found

    async def score(self, text_1: str, text_2: str, *, chat_template: str | None = None, **options: Any) -> float:
        """Like LLM.score, for one pair of texts."""
        pairs, tokenizer = [(text_1, text_2)], self.get_tokenizer()
        call = pooled_calls.score(self._pooling, pairs, tokenizer, chat_template=chat_template)
        [found] = await self._pooled(call, options)
        return found

    async def _pooled[Result](self, call: PooledCall[Result], options: Mapping[str, Any]) -> list[Result]:
        states = [self.encode(prompt, pool=call.pool, **options) for prompt in call.prompts]
        return call.results(await asyncio.gather(*states))

    # --- between steps ----------------------------------------------------------------------------------------------

    async def update_weights(self, params: Params, version: int | None = None) -> None:
        """Like LLM.update_weights. Requests in flight use the new parameters from their next token.

        What the conversion needs is compiled in another thread meanwhile: they do not wait for it.
        """
        self._thread.check_alive()
        found = await asyncio.to_thread(self._engine.conversions, params)
        await self._client.call("replace_weights", found=found, version=version)

    async def public_params(self, *, copy: bool = True) -> Params:
        """Like LLM.public_params. Requests in flight continue meanwhile."""
        params = await self._client.call("weights")
        return await asyncio.to_thread(self._engine.public_params, params, copy=copy)

    async def sleep(self, level: int = 1) -> None:
        """Like LLM.sleep. Raises while requests are in flight."""
        await self._client.call("sleep", level=level)

    async def wake(self) -> None:
        await self._client.call("wake")

    wake_up = wake

    async def reset_prefix_cache(self) -> None:
        await self._client.call("reset_prefix_cache")

    async def metrics(self) -> EngineMetrics:
        return await self._client.call("metrics")

    async def start_profile(self, folder: str | Path) -> None:
        await self._client.call("start_profile", folder=folder)

    async def stop_profile(self) -> Path:
        return await self._client.call("stop_profile")

    # --- the rest ---------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        return self._engine.runner.spec

    def get_default_sampling_params(self) -> SamplingParams:
        return self._preparer.default_params()

    def get_tokenizer(self) -> Tokenizer:
        if self._preparer.tokenizer is None:
            raise JaxserveError("no tokenizer is loaded", "set tokenizer")
        return self._preparer.tokenizer

    def check_health(self) -> None:
        """Raise an EngineError if the engine has failed or was shut down."""
        self._thread.check_alive()

    async def shutdown(self) -> None:
        """End the engine's thread; requests in flight end with an EngineError."""
        await asyncio.get_running_loop().run_in_executor(None, self._end)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + Number(above=0)("timeout", timeout)
