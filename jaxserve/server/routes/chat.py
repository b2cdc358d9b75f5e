# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions: renders messages with the chat template and returns what the model generates."""

from dataclasses import replace
from typing import Any

from aiohttp import web

from jaxserve.frontend.prepare import Preparer
from jaxserve.server import params
from jaxserve.server.answers import generation
from jaxserve.server.answers.generation import Answer
from jaxserve.server.answers.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.answers.replies import Usage, encode, encode_long, finish
from jaxserve.server.errors import bad_request
from jaxserve.server.params import Order
from jaxserve.server.protocol.chat import ChatRequest, Conversation
from jaxserve.server.routes.table import Route
from jaxserve.server.state import RECORD, SERVING, Serving
from jaxserve.types.outputs import CompletionOutput, RequestOutput
from jaxserve.types.request import Request

# Fields of OpenAI's message that this server does not fill in.
EMPTY = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "reasoning": None}


async def create(request: web.Request) -> web.StreamResponse:
    serving = request.app[SERVING]
    preparer = serving.check_ready().preparer
    body = await params.read(request, ChatRequest)
    order = params.order(request, body, kind="chatcmpl", add_special_tokens=False)
    size = request[RECORD].body_size
    # A template of a client may run for long.
    prepares = serving.workers.prepare if body.chat_template is None else serving.workers.run
    prepared = await prepares(size, prepared_chat, serving, preparer, body, order)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    answer = Answer(request, body, prepared, id=order.name, object=kind)
    choices = _ChatChoices(answer)
    if body.stream:
        return await generation.stream(answer, choices.events)
    return await generation.whole(answer, choices.reply)


def prompt_text(serving: Serving, body: Conversation) -> str:
    """Render the messages with the chat template."""
    tokenizer = serving.tokenizer
    if tokenizer is None:
        raise bad_request("messages", "this server has no tokenizer", "send token ids to /v1/completions")
    if body.chat_template is not None and not serving.config.trust_request_chat_template:
        problem = "chat_template in requests is disabled"
        raise bad_request("chat_template", problem, "start the server with --trust-request-chat-template")
    return tokenizer.chat_text(
        [message.plain() for message in body.messages],
        chat_template=body.chat_template or serving.chat_template,
        add_generation_prompt=body.generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
    )


def prepared_chat(serving: Serving, preparer: Preparer, body: ChatRequest, order: Order) -> list[Request]:
    text = prompt_text(serving, body)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted: int | None = getattr(body, field)
    order = replace(order, max_tokens_field=field)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.use_beam_search:
        most = preparer.limits.max_model_len if wanted is None else wanted
        return params.prepare_beams(preparer, [text], body, order, max_tokens=most, logprobs=logprobs, field="messages")
    sampling = params.sampling_params(
        body,
        preparer,
        max_tokens=wanted,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    return params.prepare(preparer, [text], sampling, order, field="messages")


class _ChatChoices:
    """Builds the choices of a response, whole or as stream events."""

    def __init__(self, answer: Answer[ChatRequest]) -> None:
        self._answer, self._body = answer, answer.body
        last = answer.body.messages[-1]
        self._role = answer.serving.config.response_role if answer.body.generation_prompt else last.role
        self._begun = False
        only_text = not (self._body.return_token_ids or self._body.logprobs or answer.continuous_usage)
        self._around: dict[int, tuple[bytes, bytes]] | None = {} if only_text else None
        self._before = ""  # with echo: the final message, which the response repeats and continues
        if answer.body.echo and last.role == self._role:
            plain = last.content or ""
            self._before = plain if isinstance(plain, str) else "\n".join(part.text or "" for part in plain)

    def _logprobs(self, sample: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        wanted = self._body.top_logprobs or 0
        return chat_logprobs(self._answer.names, wanted, sample.token_ids, sample.logprobs or ())

    def reply(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        [output], body = outputs, self._body
        choices: list[dict[str, Any]] = []
        for sample in output.outputs:
            message = {"role": self._role, "content": self._before + sample.text, **EMPTY}
            shape: dict[str, Any] = {"index": sample.index, "message": message, "logprobs": self._logprobs(sample)}
            shape |= {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}
            if body.return_token_ids:
                shape["token_ids"] = sample.token_ids
            choices.append(shape)
        more: dict[str, Any] = {"prompt_logprobs": prompt_logprobs(self._answer.names, output.prompt_logprobs)}
        if body.return_token_ids:
            more["prompt_token_ids"] = output.prompt_token_ids
        if body.return_prompt_text:
            more["prompt_text"] = output.prompt
        return self._answer.envelope.whole(choices, Usage.of(outputs), **more)

    def events(self, place: int, output: RequestOutput, usage: Usage) -> bytes:
        """The chunks of one output. The first call puts a role chunk for each choice before them."""
        if self._around is not None and self._begun and len(output.outputs) == 1 and not output.outputs[0].finished:
            return self._text(self._around, output.outputs[0])
        body, chunks = self._body, self._answer.chunks
        always = body.return_token_ids or body.logprobs or self._answer.continuous_usage
        made: list[bytes] = []
        if not self._begun:
            self._begun = True
            made = self._openings(output, usage)
        for sample in output.outputs:
            if not (sample.text or always or sample.finished):
                continue
            delta = b'{"content":%b}' % encode(sample.text) if sample.text else b"{}"
            logprobs = self._logprobs(sample)
            shape = b'{"index":%d,"delta":%b,"logprobs":' % (sample.index, delta)
            shape += b"null" if logprobs is None else encode_long(logprobs)
            if body.return_token_ids:
                shape += b',"token_ids":' + encode(sample.token_ids)
            made.append(chunks.chunk(shape + finish(sample), usage))
        return b"".join(made)

    def _text(self, around: dict[int, tuple[bytes, bytes]], sample: CompletionOutput) -> bytes:
        """The chunk of text alone, which almost all chunks are."""
        if not sample.text:
            return b""
        found = around.get(sample.index)
        if found is None:
            before, after = b'{"index":%d,"delta":{"content":' % sample.index, b'},"logprobs":null' + finish(sample)
            found = around[sample.index] = self._answer.chunks.around(before, after)
        return b"%b%b%b" % (found[0], encode(sample.text), found[1])

    def _openings(self, output: RequestOutput, usage: Usage) -> list[bytes]:
        body, chunks, role = self._body, self._answer.chunks, encode(self._role)
        prompt = Usage(prompt=usage.prompt, cached=usage.cached)
        more = b""
        if body.return_token_ids:
            more += b',"prompt_token_ids":' + encode(output.prompt_token_ids)
        if body.return_prompt_text:
            more += b',"prompt_text":' + encode(output.prompt)
        rest = b',"logprobs":null,"finish_reason":null}'
        made: list[bytes] = []
        for index in range(body.n or 1):
            delta = b'{"index":%d,"delta":{"role":%b,"content":""}%b' % (index, role, rest)
            made.append(chunks.chunk(delta, prompt, more))
        if self._before:
            delta = b'"delta":{"content":%b}%b' % (encode(self._before), rest)
            made += [chunks.chunk(b'{"index":%d,%b' % (index, delta), prompt) for index in range(body.n or 1)]
        return made


ROUTES = (Route("POST", "/v1/chat/completions", create, body=ChatRequest, summary="Create a chat completion."),)
