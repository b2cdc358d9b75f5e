# SPDX-License-Identifier: Apache-2.0
"""HTTP connections: access control, resource limits, and listening sockets."""
