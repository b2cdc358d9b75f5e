# SPDX-License-Identifier: Apache-2.0
"""One decoder for all architectures. Independent of files, requests and scheduling."""
