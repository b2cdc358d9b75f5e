# SPDX-License-Identifier: Apache-2.0
"""Commands that start jax in this process. No other command imports it."""
