# SPDX-License-Identifier: Apache-2.0
"""POST /v1/completions: continues prompts, in one answer or in chunks. Choices go by prompt, then by sample."""

from dataclasses import replace
from typing import Any

from aiohttp import web

from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params
from jaxserve.server.answers import generation
from jaxserve.server.answers.generation import Answer
from jaxserve.server.answers.logprobs import CompletionLogprobs, prompt_logprobs
from jaxserve.server.answers.replies import Usage, encode, encode_long, finish
from jaxserve.server.errors import bad_request
from jaxserve.server.params import Order
from jaxserve.server.protocol.completion import MAX_CHOICES, CompletionRequest, as_list
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING
from jaxserve.types.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from jaxserve.types.request import Request

DEFAULT_MAX_TOKENS = 16


async def create(request: web.Request) -> web.StreamResponse:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, CompletionRequest)
    order = params.order(request, body, kind="cmpl", add_special_tokens=True)
    prepared = await serving.workers.prepare(request[RECORD].body_size, prepared_completions, preparer, body, order)
    answer = Answer(request, body, prepared, id=order.name, object="text_completion")
    choices = _CompletionChoices(answer)
    if body.stream:
        return await generation.stream(answer, choices.events)
    return await generation.whole(answer, choices.reply)


def prepared_completions(preparer: Preparer, body: CompletionRequest, order: Order) -> list[Request]:
    prompts = as_list(body.prompt)
    if not prompts:
        raise bad_request("prompt", "the prompt is an empty list", "send at least one prompt")
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        problem = f"n is {body.n or 1}, which makes {len(prompts) * (body.n or 1)} choices in all"
        raise bad_request("n", problem, f"ask for at most {MAX_CHOICES}")
    scores = body.max_tokens == 0
    wanted = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.use_beam_search:
        if scores:
            raise bad_request("max_tokens", "max_tokens is 0, which leaves nothing to search", "raise it")
        if body.echo and body.logprobs is not None:
            problem = "echo with logprobs requires prompt log probabilities, which a beam search does not compute"
            raise bad_request("echo", problem, "remove echo or logprobs")
        return params.prepare_beams(
            preparer, prompts, body, order, max_tokens=wanted, logprobs=body.logprobs, field="prompt"
        )
    asked = [each for each in (body.prompt_logprobs, body.logprobs if body.echo else None) if each is not None]
    sampling = params.sampling_params(
        body,
        preparer,
        max_tokens=max(wanted, 1),
        logprobs=None if scores else body.logprobs,
        prompt_logprobs=-1 if -1 in asked else max(asked, default=None),
    )
    return params.prepare(preparer, prompts, sampling, replace(order, score_only=scores), field="prompt")


class _CompletionChoices:
    """All choices of an answer, as they come."""

    def __init__(self, answer: Answer[CompletionRequest]) -> None:
        self._answer, self._body, self._names = answer, answer.body, answer.names
        self._begun: dict[tuple[int, int], CompletionLogprobs | None] = {}
        self._prompts: dict[
            int, list[PositionLogprobs | None]
        ] = {}  # their log probabilities, which come once for all n
        body = answer.body
        only_text = not (body.echo or body.return_token_ids or body.logprobs is not None or answer.continuous_usage)
        self._around: dict[tuple[int, int], tuple[bytes, bytes]] | None = {} if only_text else None

    def _news(self, place: int, output: RequestOutput, sample: CompletionOutput) -> tuple[str, dict[str, Any] | None]:
        """The text and log probabilities that this output adds, with the prompt's before them if it is echoed."""
        body, key = self._body, (place, sample.index)
        text, first = sample.text, key not in self._begun
        if first:
            self._begun[key] = self._shape(output)
        ids: list[int] = []
        positions: list[PositionLogprobs | None] = []
        if first and body.echo:
            text = self._prompt(place, output) + text
            positions += self._prompts.setdefault(place, output.prompt_logprobs or [])
            ids += output.prompt_token_ids if positions else []
        shape = self._begun[key]
        if shape is None:
            return text, None
        return text, shape.add(ids + sample.token_ids, positions + list(sample.logprobs or []))

    def _shape(self, output: RequestOutput) -> CompletionLogprobs | None:
        body = self._body
        if body.logprobs is None:
            return None
        skip, spaces = body.skip_special_tokens is not False, body.spaces_between_special_tokens is not False
        after = () if body.echo else output.prompt_token_ids
        return CompletionLogprobs(self._names, body.logprobs, after=after, skip_special_tokens=skip, spaces=spaces)

    def _prompt(self, place: int, output: RequestOutput) -> str:
        text, tokenizer = self._answer.prepared[place].prompt, self._names.tokenizer
        if text is not None or tokenizer is None:
            return text or ""
        skip = self._body.skip_special_tokens is not False
        return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=skip)

    def _index(self, place: int, sample: CompletionOutput) -> int:
        return place * (self._body.n or 1) + sample.index

    def reply(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        body = self._body
        for place, output in enumerate(outputs):
            of_prompt = prompt_logprobs(
                self._names, output.prompt_logprobs if body.prompt_logprobs is not None else None
            )
            for sample in output.outputs:
                text, logprobs = self._news(place, output, sample)
                shape: dict[str, Any] = {"index": self._index(place, sample), "text": text, "logprobs": logprobs}
                shape |= {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}
                shape["prompt_logprobs"] = of_prompt
                if body.return_token_ids:
                    shape |= {"token_ids": sample.token_ids, "prompt_token_ids": output.prompt_token_ids}
                choices.append(shape)
        return self._answer.envelope.whole(choices, Usage.of(outputs))

    def events(self, place: int, output: RequestOutput, usage: Usage) -> bytes:
        """The chunks of one output."""
        if self._around is not None and len(output.outputs) == 1 and output.outputs[0].finish_reason is None:
            return self._text(self._around, place, output.outputs[0])
        body, answer = self._body, self._answer
        always = body.return_token_ids or body.logprobs is not None or answer.continuous_usage
        made: list[bytes] = []
        for sample in output.outputs:
            first = (place, sample.index) not in self._begun
            text, logprobs = self._news(place, output, sample)
            if not (text or always or sample.finished):
                continue
            shape = b'{"index":%d,"text":%b,"logprobs":' % (self._index(place, sample), encode(text))
            shape += b"null" if logprobs is None else encode_long(logprobs)
            if body.return_token_ids:
                shape += b',"token_ids":' + encode(sample.token_ids)
                if first:
                    shape += b',"prompt_token_ids":' + encode(output.prompt_token_ids)
            made.append(answer.chunks.chunk(shape + finish(sample), usage))
        return b"".join(made)

    def _text(self, around: dict[tuple[int, int], tuple[bytes, bytes]], place: int, sample: CompletionOutput) -> bytes:
        """The chunk of text alone, which almost all chunks are."""
        if not sample.text:
            return b""
        found = around.get((place, sample.index))
        if found is None:
            before = b'{"index":%d,"text":' % self._index(place, sample)
            after = b',"logprobs":null' + finish(sample)
            found = around[place, sample.index] = self._answer.chunks.around(before, after)
        return b"%b%b%b" % (found[0], encode(sample.text), found[1])


ROUTES = (Route("POST", "/v1/completions", create, body=CompletionRequest, summary="Create a completion."),)
