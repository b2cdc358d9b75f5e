# SPDX-License-Identifier: Apache-2.0
"""Commands that start jax in this process. All others answer without it."""
