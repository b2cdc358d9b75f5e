# SPDX-License-Identifier: Apache-2.0
"""Model families, one module each: `spec(config)`, and WEIGHTS, which maps the checkpoints' tensor names."""
