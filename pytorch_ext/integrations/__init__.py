# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for packages that people call already. Each imports its package only when it is itself imported."""
