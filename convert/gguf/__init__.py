# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files, llama.cpp's format, as the Hugging Face model folders that they were made from."""
