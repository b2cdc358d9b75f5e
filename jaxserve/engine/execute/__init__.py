# SPDX-License-Identifier: Apache-2.0
"""What holds devices: parameters, the KV cache, and the programs that use them."""
