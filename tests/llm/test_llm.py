# SPDX-License-Identifier: Apache-2.0
"""LLM: its outputs against a dense forward pass, rejected prompts and parameters, interruptions and faults."""

import json
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import CheckpointError, EngineError, JaxserveError, RequestError
from jaxserve.llm import LLM
from jaxserve.types.sampling_params import RequestOutputKind, SamplingParams
from tests import tiny_llm
from tests.llm.checks import GREEDY, LONG, TOKENIZER, assert_empty, tokens
from tests.tiny_llm import END, Reference

# --- generate -------------------------------------------------------------------------------------------------------


def test_greedy_outputs_are_the_models_in_the_order_of_the_prompts(llm: LLM, reference: Reference) -> None:
    prompts = [LONG, [5], [425, 1, 2], *([i, i + 1] for i in range(100, 106))]
    outputs = llm.generate(prompts, GREEDY)
    assert tokens(outputs) == [reference.greedy(prompt, 6) for prompt in prompts]
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output in outputs:
        assert output.finished and output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == TOKENIZER.decode(output.outputs[0].token_ids)
    assert len({output.request_id for output in outputs}) == len(prompts)


def test_prompts_of_every_type(llm: LLM) -> None:
    ids = TOKENIZER.encode("The server")
    forms: list[Any] = [
        "The server",
        ids,
        tuple(ids),
        np.array(ids),
        jnp.asarray(ids, jnp.int32),
        {"prompt": "The server"},
        {"prompt_token_ids": ids, "cache_salt": "mine"},
        {"prompt": "The server", "prompt_token_ids": np.array(ids, np.int16)},
    ]
    alone = [llm.generate(form, GREEDY) for form in forms]
    assert all(len(outputs) == 1 for outputs in alone)
    together = llm.generate(forms, GREEDY)
    for output in (*together, *(outputs[0] for outputs in alone)):
        assert output.prompt_token_ids == ids and type(output.prompt_token_ids[0]) is int
        assert output.outputs[0].token_ids == together[0].outputs[0].token_ids
    assert [output.prompt for output in together] == ["The server", *[None] * 4, "The server", None, "The server"]
    assert tokens(llm.generate(np.array([ids, ids]), GREEDY)) == tokens(together[:2])
    assert llm.generate([], GREEDY) == []


def test_each_prompt_has_its_own_parameters(llm: LLM, reference: Reference) -> None:
    params = [replace(GREEDY, max_tokens=2), SamplingParams(n=3, seed=7, max_tokens=5), GREEDY]
    first, second, third = llm.generate([[5], [6], [7]], params)
    assert tokens([first]) == [reference.greedy([5], 2)]
    assert [len(sample.token_ids) for sample in second.outputs] == [5, 5, 5]
    assert [sample.index for sample in second.outputs] == [0, 1, 2]
    assert tokens([third]) == [reference.greedy([7], 6)]
    assert tokens(llm.generate([6], params[1])) == tokens([second])
    delta = replace(GREEDY, output_kind=RequestOutputKind.DELTA)
    assert tokens(llm.generate([7], delta)) == tokens([third])
    assert delta.output_kind is RequestOutputKind.DELTA


def test_texts_end_at_stop_strings_and_at_the_end_of_text(llm: LLM, reference: Reference) -> None:
    prompt = next([i] for i in range(420) if len(set(reference.greedy([i], 8))) == 8)
    answer = reference.greedy(prompt, 8)
    stop = TOKENIZER.token_text(answer[3])
    before = llm.metrics()
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=50, stop=stop))
    after = llm.metrics()
    assert after.generated_tokens - before.generated_tokens <= 5  # the engine is stopped at once
    assert after.finished["stop"] == before.finished["stop"] + 1 and after.finished["abort"] == before.finished["abort"]
    [sample] = output.outputs
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.text == TOKENIZER.decode(answer).split(stop)[0]
    biased = SamplingParams(temperature=0, max_tokens=8, logit_bias={END: 100}, min_tokens=3)
    [output] = llm.generate([prompt], biased)
    assert output.outputs[0].token_ids[3:] == [END]  # known from the tokenizer alone
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_generate_takes_more_prompts_than_the_queue_holds(reference: Reference) -> None:
    llm = tiny_llm.make(max_num_queued_reqs=1, max_num_queued_tokens=8)
    prompts = [[i, i + 1] for i in range(20)]
    assert tokens(llm.generate(prompts, replace(GREEDY, max_tokens=2))) == [reference.greedy(p, 2) for p in prompts]
    assert_empty(llm)


def test_requests_with_lower_priority_values_are_served_first(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm.make(scheduling_policy="priority")
    calls: list[Any] = []
    monkeypatch.setattr(llm._engine, "add", tiny_llm.counted(llm._engine.add, calls))
    outputs = llm.generate([[1], [2], [3]], GREEDY, priority=[5, -1, 5])
    assert [output.prompt_token_ids for output in outputs] == [[1], [2], [3]]
    assert [call[0].prompt_token_ids for call in calls] == [[2], [1], [3]]


def test_generate_keeps_the_queue_short(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[int] = []
    step = llm._engine.step
    monkeypatch.setattr(llm._engine, "step", lambda: (queued.append(llm._engine.scheduler.queued), step())[1])
    llm.generate([[i] for i in range(50)], replace(GREEDY, max_tokens=1))
    assert 0 < max(queued) <= 4


def test_default_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "top_p": 0.5, "eos_token_id": 7}))
    params = tiny_llm.params()
    llm = LLM(str(tmp_path), **{**tiny_llm.OPTIONS, "params": params, "skip_tokenizer_init": True})
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0, top_p=0.5)
    assert tokens(llm.generate([5])) == [Reference(params).greedy([5], 16, {7})]
    [output] = llm.generate([5], SamplingParams(temperature=0, logit_bias={7: 100}))
    assert output.outputs[0].token_ids == [7] and output.outputs[0].text == ""
    refused: list[tuple[Any, dict[str, Any]]] = [("text", {}), ([5], {"stop": "x"}), ([5], {"bad_words": ["x"]})]
    for prompt, options in refused:
        with pytest.raises(RequestError, match="is loaded"):
            llm.generate(prompt, SamplingParams(**options))
    with pytest.raises(JaxserveError, match="no tokenizer"):
        llm.get_tokenizer()
    with pytest.raises(CheckpointError, match="skip_tokenizer_init"):
        LLM(str(tmp_path), **{**tiny_llm.OPTIONS, "params": params})


def test_default_parameters_of_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for where, given in (
        (tmp_path, {"temperature": 0.0, "eos_token_id": 7}),
        (folder, {"top_k": 3, "eos_token_id": 9}),
    ):
        (where / "config.json").write_text("{}")
        (where / "generation_config.json").write_text(json.dumps(given))
    options = {**tiny_llm.OPTIONS, "params": tiny_llm.params(), "skip_tokenizer_init": True}
    biased = SamplingParams(temperature=0, max_tokens=4)
    for setting, params, end in (("vllm", SamplingParams(), 7), (str(folder), SamplingParams(top_k=3), 9)):
        llm = LLM(str(tmp_path), generation_config=setting, **options)
        assert llm.get_default_sampling_params() == params
        [output] = llm.generate([5], replace(biased, logit_bias={end: 100}))
        assert output.outputs[0].token_ids == [end]  # whichever the setting, answers end
    with pytest.raises(JaxserveError, match="generation_config"):
        LLM(str(tmp_path), generation_config=str(tmp_path / "absent"), **options)


# --- chat -----------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]


def test_chat_renders_the_template(llm: LLM) -> None:
    [output] = llm.chat(HELLO, GREEDY)
    text = TOKENIZER.chat_text(HELLO)
    assert output.prompt == text and output.prompt_token_ids == TOKENIZER.encode(text, add_special_tokens=False)
    assert tokens([output]) == tokens(llm.generate(output.prompt_token_ids, GREEDY))
    both = llm.chat([HELLO, TALK], [GREEDY, replace(GREEDY, max_tokens=1)])
    assert tokens(both)[0] == tokens([output])[0] and len(tokens(both)[1]) == 1
    [going_on] = llm.chat(TALK, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert going_on.prompt is not None and going_on.prompt.endswith("Well")
    [own] = llm.chat(HELLO, GREEDY, chat_template="{{ word }}", chat_template_kwargs={"word": "Then"})
    assert own.prompt == "Then"


def test_errors_name_the_bad_conversation(llm: LLM) -> None:
    with pytest.raises(RequestError, match="conversation 1: messages is empty"):
        llm.chat([HELLO, []], GREEDY)
    with pytest.raises(RequestError, match=r"^messages is empty"):
        llm.chat([], GREEDY)


# --- what is refused ------------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, str]] = [
    ([], "the prompt is empty"),
    ({"prompt_token_ids": []}, "the prompt is empty"),
    ([1, 426], "426.*0 to 425"),
    ([-1], "-1.*0 to 425"),
    ([1.5], "1.5"),
    ([1, "a"], "'a'"),
    ([2**70], "1180591620717411303424|64 bits"),
    (["a"], "'a'"),
    (None, "NoneType"),
    (7, "int"),
    (b"bytes", "bytes"),
    (np.zeros((2, 2, 2), np.int32), "shape"),
    (list(range(128)), "128 tokens.*127"),
    ({"prompt": "x", "multi_modal_data": {}}, "multi_modal_data"),
    ({"cache_salt": "x"}, "neither"),
    ({"prompt": 5}, "int"),
    ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
    ("\ud800", "Unicode"),
]


@pytest.mark.parametrize(("prompt", "words"), BAD_PROMPTS)
def test_bad_prompts_are_rejected_before_any_request_runs(llm: LLM, prompt: Any, words: str) -> None:
    before = llm.metrics().requests
    with pytest.raises(RequestError, match=rf"^prompt 1: .*{words}") as caught:
        llm.generate([[1, 2], prompt, [3]], GREEDY)
    assert caught.value.field in ("prompt", "cache_salt")
    assert llm.metrics().requests == before


BAD_PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"n": 5}, "^n is 5.* 4 "),
    ({"logprobs": 9}, "logprobs is 9.* 8"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1.* 8"),
    ({"min_tokens": 200, "max_tokens": 300}, "min_tokens is 200.* 126"),
    ({"stop_token_ids": [426]}, "stop_token_ids.*426"),
    ({"allowed_token_ids": [5000]}, "allowed_token_ids.*5000"),
    ({"logit_bias": {999: 1.0}}, "logit_bias.*999"),
]


@pytest.mark.parametrize(("options", "words"), BAD_PARAMS)
def test_bad_parameters_are_rejected_before_any_request_runs(llm: LLM, options: dict[str, Any], words: str) -> None:
    before = llm.metrics().requests
    with pytest.raises(RequestError, match=words):
        llm.generate([1, 2], SamplingParams(**options))
    with pytest.raises(RequestError, match=r"^prompt 1: "):
        llm.generate([[1, 2], [1, 2]], [GREEDY, SamplingParams(**options)])
    assert llm.metrics().requests == before


def test_lists_of_parameters_match_the_prompts_in_length(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="1 priorities for 2 prompts"):
        llm.generate([[1], [2]], GREEDY, priority=[0])
    with pytest.raises(RequestError, match=r"prompt 1: priority is 3.*scheduling_policy"):
        llm.generate([[1], [2]], GREEDY, priority=[0, 3])
    with pytest.raises(RequestError, match="type dict"):
        llm.generate([1], {"temperature": 0})  # pyright: ignore[reportArgumentType]


def test_errors_name_unknown_settings() -> None:
    with pytest.raises(RequestError, match=r"EngineConfig has no field 'max_sequences'.*max_num_seqs"):
        LLM("tiny", max_sequences=3)


# --- interruptions --------------------------------------------------------------------------------------------------


def test_the_engine_still_works_after_ctrl_c(llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = llm._engine._turn, 0

    def interrupted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step()

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(llm._engine, "_turn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([LONG, [1], [2], [3], [4], [5]], replace(GREEDY, max_tokens=40))
    assert signal.getsignal(signal.SIGINT) is before
    assert_empty(llm)
    assert llm.metrics().finished["abort"] >= 4
    assert tokens(llm.generate([LONG], GREEDY)) == [reference.greedy(LONG, 6)]


def test_a_second_ctrl_c_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm.make()

    def interrupted() -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(llm._engine, "_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([1], GREEDY)
    assert_empty(llm)
    with pytest.raises(EngineError, match="KeyboardInterrupt"):
        llm.generate([1], GREEDY)


def test_after_a_fault_every_call_raises_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm.make()
    calls: list[Any] = []

    def broken(packed: Any) -> Any:
        calls.append(packed)
        raise ValueError("of the device")

    monkeypatch.setattr(llm._engine.runner, "launch", broken)
    for _ in range(2):
        with pytest.raises(EngineError, match="of the device"):
            llm.generate([[1], [2]], GREEDY)
        assert_empty(llm)
    assert len(calls) == 1


def test_only_one_thread_may_use_an_llm_at_a_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, refused = llm._engine.step, list[JaxserveError]()

    def other() -> None:
        try:
            llm.generate([1], GREEDY)
        except JaxserveError as error:
            refused.append(error)

    def stepping() -> Any:
        if not refused:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return step()

    monkeypatch.setattr(llm._engine, "step", stepping)
    assert len(tokens(llm.generate([1], GREEDY))) == 1
    assert "AsyncLLM" in str(refused[0])


def test_a_trace_is_written(llm: LLM, tmp_path: Path) -> None:
    llm.start_profile(tmp_path / "trace")
    llm.generate([1], replace(GREEDY, max_tokens=2))
    assert llm.stop_profile() == tmp_path / "trace"
    assert any(path.is_file() for path in (tmp_path / "trace").rglob("*"))
    with pytest.raises(JaxserveError, match="no trace"):
        llm.stop_profile()
