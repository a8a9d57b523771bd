# SPDX-License-Identifier: Apache-2.0
"""Importing it registers the raw operators, csrc/torch/library.cpp; it exports nothing."""
