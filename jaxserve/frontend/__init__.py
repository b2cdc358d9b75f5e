# SPDX-License-Identifier: Apache-2.0
"""What any client of an engine needs, in this process or another: requests, outputs, streams and the link. No jax."""
