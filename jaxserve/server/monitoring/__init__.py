# SPDX-License-Identifier: Apache-2.0
"""A Grafana dashboard and a Prometheus scrape configuration, as files."""
