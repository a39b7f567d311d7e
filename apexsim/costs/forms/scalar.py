"""A numpy look-alike for single numbers: a form written once over ``xp`` runs on arrays and, far cheaper, on floats."""

from __future__ import annotations

import math
from typing import Any


class ScalarMath:
    """The few numpy functions that the forms use, on plain floats."""

    maximum = staticmethod(max)
    minimum = staticmethod(min)
    ceil = staticmethod(math.ceil)
    floor = staticmethod(math.floor)
    log = staticmethod(math.log)

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        return yes if condition else no


SCALAR = ScalarMath()
