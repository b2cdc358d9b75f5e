# SPDX-License-Identifier: Apache-2.0
"""Renders a conversation to one text with the model's or the caller's chat template."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxserve.errors import RequestError, message_of, one_line


def chat_text(
    loaded: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    template_kwargs: Mapping[str, Any] | None,
) -> str:
    """Render messages with the chat template; `loaded` is a transformers tokenizer."""
    _check_messages(messages)
    if tools is not None and not all(isinstance(tool, Mapping) for tool in _listed("tools", tools)):
        raise RequestError("tools", "a tool is not an object", "describe each tool as a JSON object")
    if continue_final_message and add_generation_prompt:
        problem = "continue_final_message and add_generation_prompt are both set, but exclude each other"
        raise RequestError("continue_final_message", problem, "set add_generation_prompt to false")
    extra = dict(template_kwargs or {})
    for name in extra:
        if name in _reserved_names():
            problem = f"chat_template_kwargs sets {one_line(name)!r}, which is reserved"
            raise RequestError("chat_template_kwargs", problem, "leave it out")
    if chat_template is None and loaded.chat_template is None:
        problem = "the model's tokenizer has no chat template"
        raise RequestError("chat_template", problem, "set chat_template, or send the whole prompt as a completion")
    try:
        return loaded.apply_chat_template(
            [_plain(message, index) for index, message in enumerate(messages)],
            chat_template=chat_template,
            tools=None if tools is None else [dict(tool) for tool in tools],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **extra,
        )
    except RequestError:
        raise
    except Exception as error:  # a template can fail in any way
        problem = f"the chat template rejects these messages: {message_of(error)}"
        raise RequestError("messages", problem, "send messages in the format that the model was trained on") from None


def _listed(field: str, value: object) -> Sequence[object]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError(field, f"{field} is of type {type(value).__name__}", "send a list of objects")
    return cast("Sequence[object]", value)


def _check_messages(messages: object) -> None:
    listed = _listed("messages", messages)
    if not listed:
        raise RequestError("messages", "messages is empty", "send at least one message")
    for index, message in enumerate(listed):
        if not isinstance(message, Mapping) or not isinstance(cast("Mapping[str, object]", message).get("role"), str):
            raise RequestError("messages", f"messages[{index}] is not an object with a role", 'send {"role": …, …}')


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its content as one string; templates would print a list of parts as a Python repr."""
    content: object = message.get("content")
    if isinstance(content, str) or (content is None and message["role"] == "assistant"):
        return dict(message)
    texts: list[str] = []
    for part in _listed(f"messages[{index}].content", content):
        fields = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else dict[str, object]()
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            kind = one_line(str(fields.get("type", "unknown")))
            problem = f"messages[{index}] has a part of type {kind!r}, but only text is supported"
            raise RequestError("messages", problem, 'send parts as {"type": "text", "text": …}')
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


@functools.cache
def _reserved_names() -> frozenset[str]:
    """Names that apply_chat_template uses as its own parameters or passes to the template itself."""
    from transformers import tokenization_utils_base
    from transformers.utils import chat_template_utils

    takers = (
        cast(Any, tokenization_utils_base).PreTrainedTokenizerBase.apply_chat_template,
        cast(Any, chat_template_utils).render_jinja_template,
    )
    return frozenset({"messages"}.union(*(inspect.signature(taker).parameters for taker in takers)))
