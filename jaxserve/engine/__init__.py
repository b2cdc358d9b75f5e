# SPDX-License-Identifier: Apache-2.0
"""The engine turns requests into tokens: schedule/ decides what each step computes, execute/ runs it on the devices."""
