# SPDX-License-Identifier: Apache-2.0
"""What every client of an engine needs, in this process or another: requests, outputs, streams and the link. No jax.

These are the types from a request to its text. A request is a Request, with a Stream while a consumer in an event loop
waits for its outputs:

    Request            made by prepare.Preparer from a prompt and parameters, checked against the engine's limits
    Stream             opened by client.EngineClient; holds the outputs that its consumer has not taken
    wire.Add           the Request as bytes, if the engine is in another process
    Sequence, Slice    the scheduler's state of one sample; its part of one step
    StepPlan           the slices of a step, launched by the runner
    StepResult         what the step computed: tokens and log probabilities
    Update             what the step did for one sample, or the result of a beam search (host.beam_search)
    wire.Turn          the updates of a step as bytes, if the engine is in another process
    OutputBuilder      detokenizes, and finds stop strings
    RequestOutput, CompletionOutput     what users get: the request's output, and that of each sample
"""
