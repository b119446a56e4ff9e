"""The one error type users see.

Everything this package refuses (a wrong base, a budget that cannot be met, a damaged file) is
reported as `DeltaMixError`: one line that names what was wrong and what to do about it. It derives
from `ValueError` so that callers who already guard `from_pretrained` keep working.
"""

from __future__ import annotations


class DeltaMixError(ValueError):
    """Bad input: the message says what was wrong and what to do."""
