# SPDX-License-Identifier: Apache-2.0
"""The application of the routes' tests, for what clients send."""

from tests.server.routes.conftest import async_llm, served

__all__ = ("async_llm", "served")
