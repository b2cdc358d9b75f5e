# SPDX-License-Identifier: Apache-2.0
"""Flags from dataclasses: how they are parsed and how help is printed. No command is known here."""
