# SPDX-License-Identifier: Apache-2.0
"""How arrays and work are spread over devices."""
