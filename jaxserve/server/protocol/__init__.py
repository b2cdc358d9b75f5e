# SPDX-License-Identifier: Apache-2.0
"""What clients may send: one pydantic model per request body, and the errors when they send something else."""
