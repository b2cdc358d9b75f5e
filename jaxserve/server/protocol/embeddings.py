# SPDX-License-Identifier: Apache-2.0
"""The body of /v1/embeddings: texts or token ids, and the form of the vectors."""

from typing import Annotated, Literal

from pydantic import Field

from jaxserve.server.protocol.base import AS_WHOLE, Expected
from jaxserve.server.protocol.completion import Ids, one_or_many
from jaxserve.server.protocol.generated import with_unsupported
from jaxserve.server.protocol.long_lists import LONG_IDS
from jaxserve.server.protocol.sampling import Ordered
from jaxserve.unsupported import EMBEDDING_FIELDS

MAX_INPUTS = 2048  # OpenAI's limit

Inputs = (
    str
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_INPUTS)]
    | Ids
    | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_INPUTS)]
)


class EmbeddingRequest(with_unsupported(Ordered, EMBEDDING_FIELDS)):
    input: Annotated[Inputs, one_or_many(MAX_INPUTS, "inputs"), LONG_IDS]
    encoding_format: Annotated[Literal["float", "base64"] | None, Expected('"float" or "base64"')] = None
    dimensions: Annotated[
        int | None,
        Field(ge=1, le=2**31 - 1, description="Must be the model's own number of dimensions."),
        AS_WHOLE,
    ] = None
