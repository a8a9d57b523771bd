# SPDX-License-Identifier: Apache-2.0
"""Public functions: check, choose an implementation, differentiate."""
