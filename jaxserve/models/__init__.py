# SPDX-License-Identifier: Apache-2.0
"""One decoder for every architecture. Knows nothing of files, requests or schedules."""
