# SPDX-License-Identifier: Apache-2.0
"""Files for running the server in production: a systemd unit, a Kubernetes manifest, a Dockerfile. Copy and adapt."""
