# SPDX-License-Identifier: Apache-2.0
from jaxserve.arrays import GeneratedArrays as GeneratedArrays
from jaxserve.async_llm import AsyncLLM as AsyncLLM
from jaxserve.config import EngineConfig as EngineConfig
from jaxserve.errors import EngineError as EngineError
from jaxserve.errors import JaxserveError as JaxserveError
from jaxserve.errors import OverloadedError as OverloadedError
from jaxserve.errors import RequestError as RequestError
from jaxserve.llm import LLM as LLM
from jaxserve.metrics import EngineMetrics as EngineMetrics
from jaxserve.types import BeamSearchOutput as BeamSearchOutput
from jaxserve.types import BeamSearchParams as BeamSearchParams
from jaxserve.types import BeamSearchSequence as BeamSearchSequence
from jaxserve.types import CompletionOutput as CompletionOutput
from jaxserve.types import Logprob as Logprob
from jaxserve.types import RequestOutput as RequestOutput
from jaxserve.types import RequestOutputKind as RequestOutputKind
from jaxserve.types import SamplingParams as SamplingParams

__version__: str
