"""Devices: datasheet facts, price, power, and the operator costs fitted from measured kernels."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_serializer, model_validator

from apexsim.errors import Unsupported
from apexsim.specs.base import Name, Spec
from apexsim.specs.power import PowerModel

Evidence = Literal["fitted", "estimated"]


class Datasheet(Spec):
    """Facts of the hardware. Rates are peaks of one device; links are one way.

    ``memory_bytes`` is what CUDA tells a process, less than is on the board. ``nccl_bytes`` is the device memory that
    one communicator of the collective library takes, by group size. Figures a thousand times beyond any accelerator of
    2026 are mistakes of unit and refused.
    """

    memory_bytes: int = Field(ge=10**8, le=10**15)
    memory_bytes_per_s: float = Field(ge=1e9, le=1e16)
    flops_per_s: dict[str, Annotated[float, Field(ge=1e9, le=1e19)]]
    l2_bytes: int = Field(ge=2**10, le=10**12)
    sms: int = Field(ge=1, le=10**6)
    tdp_w: float = Field(ge=1, le=1e5)
    intra_node_bytes_per_s: float = Field(ge=1e6, le=1e16)
    inter_node_bytes_per_s: float = Field(ge=1e6, le=1e16)
    pcie_bytes_per_s: float = Field(ge=1e6, le=1e16)
    nccl_bytes: dict[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0, le=10**12)]]
    source: str


class Price(Spec):
    """What one device costs to rent; a default with its date, not a constant of nature."""

    usd_per_hour: float = Field(ge=0, le=1e5)
    source: str
    date: str


def short_axes(axes: dict[str, tuple[float, ...]]) -> dict[str, list[int | float]]:
    """Knots with whole numbers without their ``.0``: files have thousands of them."""
    return {name: [int(x) if x == int(x) else x for x in knots] for name, knots in axes.items()}


class ResidualGrid(Spec):
    """A smooth correction, multiplied in: exp(percent / 100), multilinear in the logarithms of the coordinates.

    ``axes`` name the coordinates with their knots (ascending); ``percent`` holds one row per combination of knots of
    all axes but the last, in row-major order; in files they are one text of numbers. Outside the knots the nearest edge
    holds.
    """

    axes: dict[str, tuple[float, ...]]
    percent: tuple[tuple[int, ...], ...]

    @model_validator(mode="before")
    @classmethod
    def _rows_of_text(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("percent"), str | int) or not data.get("axes"):
            return data
        width = max(1, len([*data["axes"].values()][-1]))
        try:
            numbers = [int(number) for number in str(data["percent"]).split()]
        except ValueError as error:
            raise ValueError(f"percent must be whole numbers: {error}") from None
        return {**data, "percent": [numbers[at : at + width] for at in range(0, len(numbers), width)]}

    @field_serializer("axes", when_used="json")
    def _short(self, axes: dict[str, tuple[float, ...]]) -> dict[str, list[int | float]]:
        return short_axes(axes)

    @field_serializer("percent", when_used="json")
    def _as_text(self, rows: tuple[tuple[int, ...], ...]) -> str:
        return " ".join(str(value) for row in rows for value in row)

    @model_validator(mode="after")
    def _shape_fits(self) -> ResidualGrid:
        sizes = [len(knots) for knots in self.axes.values()]
        if not sizes or any(not knots or sorted(set(knots)) != list(knots) for knots in self.axes.values()):
            raise ValueError("knots of every axis must ascend")
        if any(knots[0] <= 0 for knots in self.axes.values()):
            raise ValueError("knots must be above 0: they are read in logarithms")
        rows = math.prod(sizes[:-1])
        if len(self.percent) != rows or any(len(row) != sizes[-1] for row in self.percent):
            raise ValueError(f"percent must be {rows} rows of {sizes[-1]}")
        return self


class ShapeResiduals(Spec):
    """Corrections of single shapes that were measured, multiplied in after the residual of all shapes.

    ``percent`` has one grid over ``axes`` for each shape by name (see the form), its numbers row by row in one text.
    """

    axes: dict[str, tuple[float, ...]]
    percent: dict[str, str]

    def grid(self, name: str) -> ResidualGrid:
        """The correction of one shape."""
        return ResidualGrid.model_validate({"axes": self.axes, "percent": self.percent[name]})

    @field_serializer("axes", when_used="json")
    def _short(self, axes: dict[str, tuple[float, ...]]) -> dict[str, list[int | float]]:
        return short_axes(axes)

    @model_validator(mode="after")
    def _shapes_fit(self) -> ShapeResiduals:
        for name in self.percent:
            self.grid(name)
        return self


class HoldOut(NamedTuple):
    """Absolute relative error on rows kept out of a fit, as fractions; ``rows`` = rows scored. One line in YAML."""

    median: Annotated[float, Field(ge=0)]
    p90: Annotated[float, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)]


class Points(Spec):
    """A measured curve: ``seconds`` at message sizes ``bytes``, both ascending."""

    bytes: tuple[Annotated[int, Field(ge=1)], ...]
    seconds: tuple[Annotated[float, Field(gt=0, le=3600)], ...]

    @model_validator(mode="after")
    def _ascends(self) -> Points:
        if len(self.bytes) != len(self.seconds) or len(self.bytes) < 2:
            raise ValueError("bytes and seconds must pair up, two or more")
        if sorted(set(self.bytes)) != list(self.bytes) or sorted(self.seconds) != list(self.seconds):
            raise ValueError("bytes must ascend and seconds must not fall")
        return self


class FittedOperator(Spec):
    """One operator of one kind: a form of ``costs/forms``, its coefficients, and how good they are.

    ``valid`` are the measured ranges by size name: outside them an answer counts as extrapolated. ``points``
    are those of operators kept as a table. ``quality`` maps a hold-out (``random``, ``largest``,
    ``served_shapes``, and others that say what they restrict) to its errors; ``rows_dropped`` maps a cleaning rule
    to the rows it removed.
    """

    form: str
    coefficients: dict[str, float] = Field(default_factory=dict)
    residual: ResidualGrid | None = None
    shapes: ShapeResiduals | None = None
    points: Points | None = None
    valid: dict[str, tuple[float, float]] = Field(default_factory=dict)
    evidence: Evidence
    source: str
    rows_used: int = 0
    rows_dropped: dict[str, int] = Field(default_factory=dict)
    quality: dict[str, HoldOut] = Field(default_factory=dict)


class SustainedClock(Spec):
    """How much slower compute-bound kernels run under sustained load than in short bursts.

    ``factors`` at ``tokens`` (the rows of the matrix product), linear in log tokens, constant outside. ``unaffected``
    are dtypes whose kernels stay below the power limit.
    """

    tokens: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    factors: tuple[Annotated[float, Field(ge=1, le=100)], ...] = (1.0,)
    unaffected: tuple[str, ...] = ()
    evidence: Evidence
    source: str

    @model_validator(mode="after")
    def _knots_pair_up(self) -> SustainedClock:
        if len(self.tokens) != len(self.factors) or sorted(set(self.tokens)) != list(self.tokens) or not self.tokens:
            raise ValueError("tokens must ascend and pair with factors")
        return self


class Provenance(Spec):
    """Who made the profile, with what and when."""

    tool: str
    date: str
    tables: tuple[str, ...]


class DeviceProfile(Spec):
    """One device: what it is, what it costs, what it draws, and how long every operator takes on it.

    ``operators`` maps a kind (gemm, prefill_attention, decode_attention, moe, all_reduce, ...) to its fitted operators
    by key, which names the dtype and, where it matters, the head size, group or kernel. ``clock_mhz`` is None at the
    clock at which all was measured.
    """

    name: Name
    datasheet: Datasheet
    price: Price
    power: PowerModel
    clock_mhz: float | None = Field(None, gt=0)
    sustained: SustainedClock
    operators: dict[str, dict[str, FittedOperator]]
    provenance: Provenance

    def __repr__(self) -> str:
        """Its name: the whole has tens of thousands of characters, and ``model_dump`` gives it."""
        return f"<DeviceProfile {self.name}>"

    def at_clock(self, mhz: float) -> DeviceProfile:
        """The device with its multiprocessors held at a lower clock: an extrapolation, nothing was measured there.

        Compute rates fall with the clock, memory and links keep theirs. Under sustained load a device slows by itself
        to keep its power limit; a lower clock takes that slowness' place instead of adding to it.
        """
        self.power.at(mhz)  # refuses what is not known
        if self.clock_mhz is not None or self.power.clock is None:
            raise Unsupported(f"{self.name} is at {self.clock_mhz} MHz already")
        share = mhz / self.power.clock.nominal_mhz
        rates = {dtype: rate * share for dtype, rate in self.datasheet.flops_per_s.items()}
        slower = tuple(max(1.0, factor * share) for factor in self.sustained.factors)
        return self.model_copy(
            update={
                "datasheet": self.datasheet.model_copy(update={"flops_per_s": rates}),
                "sustained": self.sustained.model_copy(update={"factors": slower}),
                "clock_mhz": mhz,
            }
        )
