# SPDX-License-Identifier: Apache-2.0
"""How to run the server for good: a systemd unit, a Kubernetes manifest, a container file. Copy them and adapt."""
