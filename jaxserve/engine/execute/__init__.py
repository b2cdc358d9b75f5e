# SPDX-License-Identifier: Apache-2.0
"""Device work: the parameters, the KV cache, and the programs that use them."""
