# SPDX-License-Identifier: Apache-2.0
"""Serving language models from JAX. Importing this must not import jax: `jaxserve --help` waits."""

__version__ = "0.1.0"
