"""What a device that nobody measured takes over from measured ones: operators, power, sustained clock.

The forms of operators are evaluated with the peaks of the device itself (FLOP/s, bytes/s, multiprocessors, L2), so
their coefficients (efficiencies, launch times, tile costs) and residuals carry over as they are. Every operator comes
from the nearest relative that has it, a fitted one before an estimated one. A collective keeps its latency, and what it
takes beyond that goes with the bandwidth of the links. Power keeps its shares of the limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from apexsim import __version__
from apexsim.costs.forms.hardware import COMPUTE_DTYPE
from apexsim.errors import nearest
from apexsim.fitting.power import Kin, scaled
from apexsim.fitting.problems import Operators
from apexsim.specs.cluster import DEVICES_PER_NODE
from apexsim.specs.device import Datasheet, DeviceProfile, FittedOperator, Points, Price, Provenance, SustainedClock
from apexsim.specs.power import PowerModel

Generation = Literal["ampere", "ada", "hopper", "blackwell", "blackwell_rtx", "other"]

# By compute capability: 8.0, 8.9, 9.0, 10.x and, with tensor cores driven as on Ada, 12.x.
GENERATIONS: dict[str, Generation] = {
    "a100-sxm": "ampere",
    "l40s": "ada",
    "rtx-4090": "ada",
    "h100-sxm": "hopper",
    "h200-sxm": "hopper",
    "b200-sxm": "blackwell",
    "b300-sxm": "blackwell",
    "gb200": "blackwell",
    "gb300": "blackwell",
    "rtx-pro-6000": "blackwell_rtx",
}
# Operators that cross links, and those among them that leave a node whatever their group.
_LINKED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "deepep", "trtllm")
_ACROSS = ("send_recv_across_nodes",)
_KEY = re.compile(r"(?P<dtype>[a-z0-9_]+?)(_d\d+|_sparse)?")


class Sheet(Datasheet):
    """A datasheet file: what a vendor says of a device, and what renting it costs.

    ``generation`` is that of its tensor cores; devices of the same one are nearer relatives. ``nccl_bytes`` are those
    of the nearest relative where not given.
    """

    generation: Generation = "other"
    nccl_bytes: dict[int, int] = Field(default_factory=dict)
    source: str = "datasheet"
    usd_per_hour: float = Field(ge=0)
    price_source: str = "as given with the datasheet"
    price_date: str = "not given"

    @model_validator(mode="after")
    def _knows_its_dtypes(self) -> Sheet:
        known = set(COMPUTE_DTYPE.values())
        if "bf16" not in self.flops_per_s:
            raise ValueError("flops_per_s needs bf16, the dense rate")
        if unknown := sorted(set(self.flops_per_s) - known):
            raise ValueError(f"flops_per_s: {unknown[0]} is no rate of tensor cores; {nearest(unknown[0], known)}")
        return self

    @classmethod
    def of(cls, profile: DeviceProfile) -> Sheet:
        """The datasheet of a measured device."""
        facts = {name: getattr(profile.datasheet, name) for name in Datasheet.model_fields}
        price = profile.price
        named = {"generation": generation(profile), "price_source": price.source, "price_date": price.date}
        return cls(**facts, **named, usd_per_hour=price.usd_per_hour)

    @property
    def datasheet(self) -> Datasheet:
        """The facts of the hardware alone."""
        return Datasheet(**{name: getattr(self, name) for name in Datasheet.model_fields})


def generation(profile: DeviceProfile) -> Generation:
    """Generation of a measured device; ``other`` for one that is not listed."""
    return GENERATIONS.get(profile.name, "other")


def distance(sheet: Sheet, profile: DeviceProfile) -> float:
    """How unlike two devices are: |ln| of the ratios of FLOPs a byte, bytes/s a multiprocessor and L2 a multiprocessor,
    + 1 for another generation, + the share of tensor-core dtypes that only one of them has."""
    other = profile.datasheet

    def features(of: Datasheet) -> tuple[float, float, float]:
        intensity = of.flops_per_s["bf16"] / of.memory_bytes_per_s
        return intensity, of.memory_bytes_per_s / of.sms, of.l2_bytes / of.sms

    apart = sum(abs(math.log(a / b)) for a, b in zip(features(sheet), features(other), strict=True))
    mine, theirs = set(sheet.flops_per_s), set(other.flops_per_s)
    return apart + (sheet.generation != generation(profile)) + len(mine ^ theirs) / len(mine | theirs)


def by_distance(sheet: Sheet, relatives: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The nearest relative first; equally near ones by name."""
    return sorted(relatives, key=lambda profile: (distance(sheet, profile), profile.name))


def carried(sheet: Sheet, name: str, relatives: Sequence[DeviceProfile]) -> DeviceProfile:
    """The profile of device ``name`` from its datasheet and what ``relatives`` (one or more) lend it.

    Every operator is ``estimated`` and says whose it was; how far that is off is for others to find out (``transfer``).
    """
    order = by_distance(sheet, relatives)
    closest = order[0]
    nccl_bytes = sheet.nccl_bytes or closest.datasheet.nccl_bytes
    return DeviceProfile(
        name=name,
        datasheet=sheet.datasheet.model_copy(update={"nccl_bytes": nccl_bytes}),
        price=Price(usd_per_hour=sheet.usd_per_hour, source=sheet.price_source, date=sheet.price_date),
        power=_power(sheet, closest),
        sustained=SustainedClock(
            tokens=closest.sustained.tokens,
            factors=closest.sustained.factors,
            evidence="estimated",
            source=f"as on {closest.name}",
        ),
        operators=_operators(sheet, order),
        provenance=Provenance(
            tool=f"apexsim device {__version__}",
            date=max(profile.provenance.date for profile in relatives),
            tables=tuple(profile.name for profile in order),
        ),
    )


class _Lent(NamedTuple):
    """An operator that a relative could lend."""

    profile: DeviceProfile
    kind: str
    key: str
    operator: FittedOperator


def _operators(sheet: Sheet, order: Sequence[DeviceProfile]) -> Operators:
    """Every operator that the device can run, from the first relative in ``order`` that lends it."""
    by_links = sorted(order, key=lambda profile: _link_distance(sheet, profile))
    found: Operators = {}
    for evidence in ("fitted", "estimated"):
        lent = [*_lent(order, linked=False), *_lent(by_links, linked=True)]
        for profile, kind, key, operator in lent:
            if operator.evidence == evidence and key not in found.get(kind, {}) and _runs(sheet, order[0], kind, key):
                found.setdefault(kind, {})[key] = _borrowed(sheet, profile, kind, (key, operator))
    return found


def _lent(order: Sequence[DeviceProfile], *, linked: bool) -> Iterator[_Lent]:
    for profile in order:
        for kind, by_key in profile.operators.items():
            if _is_linked(kind) == linked:
                yield from (_Lent(profile, kind, key, operator) for key, operator in by_key.items())


def _is_linked(kind: str) -> bool:
    return kind.startswith(_LINKED)


def _runs(sheet: Sheet, closest: DeviceProfile, kind: str, key: str) -> bool:
    """Whether the device has the tensor cores for an operator; one that lets chunks and decodes share a launch only
    where its nearest relative does."""
    if kind == "mixed_attention":
        return kind in closest.operators
    match = _KEY.fullmatch(key)
    dtype = match["dtype"] if match else key
    return dtype not in COMPUTE_DTYPE or COMPUTE_DTYPE[dtype] in sheet.flops_per_s


def _borrowed(sheet: Sheet, profile: DeviceProfile, kind: str, named: tuple[str, FittedOperator]) -> FittedOperator:
    key, operator = named
    points = operator.points
    if points and _is_linked(kind):
        points = scaled_points(points, _link_rate(profile.datasheet, kind, key) / _link_rate(sheet, kind, key))
    return FittedOperator(
        form=operator.form,
        coefficients=operator.coefficients,
        residual=operator.residual,
        shapes=operator.shapes,
        points=points,
        valid=operator.valid,
        evidence="estimated",
        source=f"as on {profile.name}",
    )


def scaled_points(points: Points, factor: float) -> Points:
    """A measured curve whose seconds beyond the latency (those of the smallest message) are multiplied."""
    latency_s = points.seconds[0]
    seconds = [latency_s + factor * (each - latency_s) for each in points.seconds]
    return Points(bytes=points.bytes, seconds=tuple(float(f"{each:.4g}") for each in seconds))


def _link_rate(sheet: Datasheet, kind: str, key: str) -> float:
    """Bytes/s of the links that a collective is bound by: of the network where its group is larger than a node."""
    group = re.search(r"_(\d+)$", key)
    across = kind in _ACROSS or "_over_" in key or (group is not None and int(group[1]) > DEVICES_PER_NODE)
    return sheet.inter_node_bytes_per_s if across else sheet.intra_node_bytes_per_s


def _link_distance(sheet: Sheet, profile: DeviceProfile) -> float:
    return abs(math.log(sheet.intra_node_bytes_per_s / profile.datasheet.intra_node_bytes_per_s))


def _power(sheet: Sheet, closest: DeviceProfile) -> PowerModel:
    """Power of the nearest relative at the same shares of the limit; no clock but the highest is known."""
    other = closest.datasheet
    kin = Kin(
        of=closest.name,
        watts=sheet.tdp_w / other.tdp_w,
        bytes_per_s=sheet.memory_bytes_per_s / other.memory_bytes_per_s,
        flops_per_s=sheet.flops_per_s["bf16"] / other.flops_per_s["bf16"],
    )
    return scaled(closest.power, kin).model_copy(update={"clock": None})
