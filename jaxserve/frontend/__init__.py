# SPDX-License-Identifier: Apache-2.0
"""What any client of an engine needs, in this process or another: requests, outputs, streams and the link. No jax.

A request has two names on its way: it is a Request, and while somebody waits for it in an event loop, a Stream. These
are the types from a request to its text:

    Request            prepare.Preparer makes it of a prompt and parameters, checked against the engine's limits
    Stream             client.EngineClient opens it; holds the outputs that its consumer has not taken
    wire.Add           the Request as bytes, if the engine is in another process
    Sequence, Slice    the scheduler's state of one sample; its part of one step
    StepPlan           the slices of a step, launched by the runner
    StepResult         what the step computed: tokens and log-probabilities
    Update             what the step did for one sample; of a beam search, one result (host.beam_search)
    wire.Turn          the updates of a step as bytes, if the engine is in another process
    OutputBuilder      the text: detokenizes, finds stop strings
    RequestOutput, CompletionOutput     what users see: the request, each of its samples
"""
