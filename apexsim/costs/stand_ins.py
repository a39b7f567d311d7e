"""Estimates in place of operators that a device profile lacks, made from operators it has."""

from __future__ import annotations

import math
import re

from apexsim.costs.collectives import ACROSS_NODES, across_nodes
from apexsim.specs.device import DeviceProfile, FittedOperator

_ATTENTION = ("prefill_attention", "decode_attention")
_LATENT = ("mla_decode", "mla_prefill")
# Ends the keys of latent attention over picked keys only (see ``costs/mla.py``).
SPARSE = "_sparse"
_BY_HEAD = re.compile(r"(?P<dtype>\w+)_d(?P<head_dim>\d+)")


def stand_in(profile: DeviceProfile, kind: str, key: str) -> FittedOperator | None:
    """An operator marked ``estimated`` that may answer for a missing one; None where physics gives no licence.

    Attention of a head size that was not measured follows the nearest one that was, in the same dtype: its form counts
    bytes and FLOPs of the size asked for, only its coefficients are borrowed. Recurrent layers are made of the device's
    element-wise kernels (see ``costs/recurrent.py``), sparse latent attention of the dense one (see ``costs/mla.py``).
    Collectives over nodes are made of those inside a node and hand-overs between nodes (see ``costs/collectives.py``).
    """
    known = profile.operators.get(kind, {})
    found = None
    if ACROSS_NODES.fullmatch(key):
        found = across_nodes(profile, kind, key)
    elif kind == "recurrent":
        found = profile.operators.get("elementwise", {}).get("any")
    elif kind in _LATENT and key.endswith(SPARSE):
        found = known.get(key.removesuffix(SPARSE))
    elif kind in _ATTENTION and (asked := _BY_HEAD.fullmatch(key)):
        same = [match for match in map(_BY_HEAD.fullmatch, sorted(known)) if match and match["dtype"] == asked["dtype"]]
        nearest = min(same, key=lambda match: _distance(match["head_dim"], asked["head_dim"]), default=None)
        found = known[nearest[0]] if nearest else None
    return found and found.model_copy(update={"evidence": "estimated"})


def _distance(first: str, second: str) -> float:
    return abs(math.log(int(first) / int(second)))
