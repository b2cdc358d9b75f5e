# SPDX-License-Identifier: Apache-2.0
"""Observability: metrics, logs, the start-up banner, a Grafana dashboard and a Prometheus configuration."""
