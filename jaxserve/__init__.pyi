# SPDX-License-Identifier: Apache-2.0
from jaxserve.async_llm import AsyncLLM as AsyncLLM
from jaxserve.config import EngineConfig as EngineConfig
from jaxserve.errors import EngineError as EngineError
from jaxserve.errors import JaxserveError as JaxserveError
from jaxserve.errors import OverloadedError as OverloadedError
from jaxserve.errors import RequestError as RequestError
from jaxserve.host.token_arrays import GeneratedArrays as GeneratedArrays
from jaxserve.llm import LLM as LLM
from jaxserve.types.metrics import EngineMetrics as EngineMetrics
from jaxserve.types.outputs import BeamSearchOutput as BeamSearchOutput
from jaxserve.types.outputs import BeamSearchSequence as BeamSearchSequence
from jaxserve.types.outputs import ClassificationOutput as ClassificationOutput
from jaxserve.types.outputs import CompletionOutput as CompletionOutput
from jaxserve.types.outputs import Logprob as Logprob
from jaxserve.types.outputs import RequestOutput as RequestOutput
from jaxserve.types.sampling_params import BeamSearchParams as BeamSearchParams
from jaxserve.types.sampling_params import RequestOutputKind as RequestOutputKind
from jaxserve.types.sampling_params import SamplingParams as SamplingParams

__version__: str
