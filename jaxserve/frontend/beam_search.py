# SPDX-License-Identifier: Apache-2.0
"""Beam search for its callers: the sampling parameters of the request, and the result as sequences with text."""

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, RequestOutput
from jaxserve.types.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


def sampling_params(beams: BeamSearchParams, *, logprobs: int | None, detokenize: bool = True) -> SamplingParams:
    """Parameters that return a sample for each beam, all at the end."""
    return SamplingParams(
        n=beams.beam_width,
        max_tokens=beams.max_tokens,
        ignore_eos=beams.ignore_eos,
        include_stop_str_in_output=beams.include_stop_str_in_output,
        output_kind=RequestOutputKind.FINAL_ONLY,
        logprobs=logprobs,
        detokenize=detokenize,
    )


def beam_search_output(output: RequestOutput, beams: BeamSearchParams, tokenizer: Tokenizer | None) -> BeamSearchOutput:
    """The final output of a request as sequences, each with its prompt."""
    found = [sample for sample in output.outputs if sample.token_ids] or output.outputs[:1]
    return BeamSearchOutput([_sequence(output.prompt_token_ids, sample, beams, tokenizer) for sample in found])


def _sequence(
    prompt: list[int], sample: CompletionOutput, beams: BeamSearchParams, tokenizer: Tokenizer | None
) -> BeamSearchSequence:
    tokens = [*prompt, *sample.token_ids]
    text = None
    if tokenizer is not None and sample.token_ids:
        hides_end = sample.finish_reason == "stop" and not beams.include_stop_str_in_output
        text = tokenizer.decode(tokens[:-1] if hides_end else tokens, skip_special_tokens=False)
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=sample.logprobs or [],
        cum_logprob=sample.cumulative_logprob or 0.0,
        text=text,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )
