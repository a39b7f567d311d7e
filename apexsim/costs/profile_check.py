"""Whether a device profile can be priced with: its operators, their keys, and every coefficient of their forms.

A profile may come from anywhere. What is wrong with it is told when it is loaded, not by a time that makes no sense.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from apexsim.costs.forms import decode, gemm, mixed, mla, moe, prefill, small
from apexsim.costs.forms.hardware import COMPUTE_DTYPE, Coefficient
from apexsim.errors import BadInput, nearest
from apexsim.specs.device import DeviceProfile, FittedOperator
from apexsim.units import DTYPE_BYTES

# No kernel, and no launch, tile or pass of one, takes longer than this.
MAX_KERNEL_S = 1.0
# A fit stays within the bounds of a coefficient, which are looser for some devices. Other devices and engines may lie
# outside, a mistake of unit far so.
MARGIN = 10.0
# Above the peak that a device's datasheet states.
MAX_EFFICIENCY = 1.5
# exp(1000 / 100) is a factor of 22,000; the largest correction of a shipped profile is 130.
MAX_PERCENT = 1000

# Constants that are not fitted.
_CONSTANTS = {
    "query_tile": (1.0, 4096.0),
    "head_tile": (1.0, 4096.0),
    "causal_skip": (0.0, 1.0),
    "split_ungrouped": (0.0, 1.0),
    gemm.UNTILED: (0.0, 1.0),
}
_MEASURING_ONLY = "(measuring only)"


class _Form(NamedTuple):
    """What a form reads: its fitted coefficients, and what else it cannot do without."""

    known: tuple[Coefficient, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """Names without which there is no time; those that only measuring needs may be left out."""
        return [*(c.name for c in self.known if _MEASURING_ONLY not in c.meaning), *self.more]


_FORMS = {
    "gemm": _Form(gemm.COEFFICIENTS),
    "prefill": _Form(prefill.COEFFICIENTS, ("causal_skip", "query_tile")),
    "decode": _Form(decode.COEFFICIENTS, ("split_ungrouped",)),
    "mixed": _Form(mixed.COEFFICIENTS),
    "moe": _Form(moe.COEFFICIENTS),
    "mla_prefill": _Form(prefill.COEFFICIENTS, ("causal_skip", "query_tile", "hidden_passes")),
    "mla_decode": _Form(mla.COEFFICIENTS, ("launch_s", "head_tile")),
    "elementwise": _Form(small.ELEMENTWISE[:2]),
    "sampling": _Form(small.SAMPLING),
    "table": _Form(),
}
# DTYPE stands for any of them.
_DTYPES = "DTYPE"
_ATTENTION = r"DTYPE_d\d+"
_OVER_NODES = r"(?:_over_\d+)?"
_RANKS = rf"ranks_\d+{_OVER_NODES}"
_NCCL = rf"nccl_\d+{_OVER_NODES}"
# Kinds of operator: their form, and what their keys look like.
_KINDS = {
    "gemm": ("gemm", _DTYPES),
    "prefill_attention": ("prefill", _ATTENTION),
    "decode_attention": ("decode", _ATTENTION),
    "mixed_attention": ("mixed", "any"),
    "moe": ("moe", _DTYPES),
    "mla_prefill": ("mla_prefill", _DTYPES),
    "mla_decode": ("mla_decode", _DTYPES),
    "elementwise": ("elementwise", "any|norm|qk_norm|rope|activation|embedding"),
    "quantise": ("elementwise", _DTYPES),
    "sampling": ("sampling", "any"),
    "all_reduce": ("table", rf"custom_\d+|{_NCCL}"),
    "all_gather": ("table", _NCCL),
    "reduce_scatter": ("table", _NCCL),
    "all_to_all": ("table", _NCCL),
    "send_recv": ("table", "p2p"),
    "send_recv_across_nodes": ("table", "p2p"),
    "deepep_dispatch": ("table", _RANKS),
    "deepep_combine": ("table", _RANKS),
    "deepep_ll_dispatch": ("table", _RANKS),
    "deepep_ll_combine": ("table", _RANKS),
    "trtllm_dispatch": ("table", _RANKS),
    "trtllm_combine": ("table", _RANKS),
}


def check_profile(profile: DeviceProfile, where: object) -> None:
    """Raise BadInput at ``where`` for the first operator, key or coefficient that no form could use."""
    computes = profile.datasheet.flops_per_s
    if unknown := next((dtype for dtype in computes if dtype not in COMPUTE_DTYPE.values()), None):
        known = nearest(unknown, set(COMPUTE_DTYPE.values()))
        raise BadInput(known, where=where, key="datasheet.flops_per_s", got=unknown)
    for key, rates in (("datasheet.flops_per_s", computes), ("power.j_per_flop", profile.power.j_per_flop)):
        if "bf16" not in rates:
            raise BadInput("bf16 is missing; it stands for dtypes that are not there", where=where, key=key)
    dtypes = f"(?:{'|'.join(DTYPE_BYTES)})"
    for kind, operators in profile.operators.items():
        if kind not in _KINDS:
            raise BadInput(f"unknown operator; {nearest(kind, _KINDS)}", where=where, key="operators", got=kind)
        form, keys = _KINDS[kind]
        for key, operator in operators.items():
            at = f"operators.{kind}.{key}"
            if not re.fullmatch(keys.replace("DTYPE", dtypes), key):
                raise BadInput(f"give a key of the form {keys}", where=where, key=f"operators.{kind}", got=key)
            if operator.form != form:
                raise BadInput(f"give {form}", where=where, key=f"{at}.form", got=operator.form)
            _check_operator(operator, where, at)


def _check_operator(operator: FittedOperator, where: object, at: str) -> None:
    form, given = _FORMS[operator.form], operator.coefficients
    needed = gemm.OF_UNTILED if operator.form == "gemm" and gemm.UNTILED in given else form.needed
    if operator.form == "table" and operator.points is None:
        raise BadInput("is missing; give bytes and seconds", where=where, key=f"{at}.points")
    for name in needed:
        if name not in given:
            raise BadInput("is missing and has no default", where=where, key=f"{at}.coefficients.{name}")
    for name, value in given.items():
        low, high = _range(name, form)
        if not low <= value <= high:
            would_do = f"give a number from {low:.3g} to {high:.3g}"
            raise BadInput(would_do, where=where, key=f"{at}.coefficients.{name}", got=value)
    if any(abs(percent) > MAX_PERCENT for percent in _percents(operator)):
        raise BadInput(f"give percents from -{MAX_PERCENT} to {MAX_PERCENT}", where=where, key=f"{at}.residual")


def _range(name: str, form: _Form) -> tuple[float, float]:
    """What a coefficient may be."""
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name.endswith("_s"):
        return 0.0, MAX_KERNEL_S
    bounds = next((_bounds(c) for c in form.known if c.name == name), (0.0, 1e6))
    return (bounds[0], min(bounds[1], MAX_EFFICIENCY)) if name.endswith("_efficiency") else bounds


def _bounds(c: Coefficient) -> tuple[float, float]:
    return min(c.low / MARGIN, c.loosened.low), max(c.high * MARGIN, c.loosened.high)


def _percents(operator: FittedOperator) -> Iterator[int]:
    grids = [operator.residual] if operator.residual else []
    if operator.shapes:
        grids += [operator.shapes.grid(name) for name in operator.shapes.percent]
    for grid in grids:
        for row in grid.percent:
            yield from row
