# SPDX-License-Identifier: Apache-2.0
"""What is seen of a server from outside: metrics, logs, its first lines; a Grafana dashboard and a Prometheus file."""
