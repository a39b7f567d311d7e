"""``apexsim fit``: the whole profile of a device from the reference tables, one part after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from apexsim import __version__
from apexsim.errors import BadInput, nearest
from apexsim.fitting import attention_tables, estimates, facts, gemm, links, mixed, mla, moe, own_device, small
from apexsim.fitting.facts import Facts
from apexsim.fitting.own import OwnTables
from apexsim.fitting.power import fit_power
from apexsim.fitting.problems import Operators, Problem, solve
from apexsim.fitting.tables import data_root
from apexsim.specs.device import DeviceProfile, FittedOperator, Provenance

FIT_DATE = "2026-11-27"
Progress = Callable[[str], None]
Fitted = Callable[[Problem, FittedOperator], None]

# Parts of a profile that are fitted from a device's own tables or those of its nearest kin.
FITTED: dict[str, Callable[[Facts, Path], Iterator[Problem]]] = {
    "gemm": gemm.problems,
    "attention": attention_tables.problems,
    "moe": moe.problems,
}
# Parts kept as tables, carried from elsewhere, or with fits of their own kind.
COLLECTED: dict[str, Callable[[Facts, Path], Operators]] = {
    "mixed": mixed.operators,
    "links": links.operators,
    "small": small.operators,
}
# Parts that take the costs of the others as known, in this order.
PARTS = (*FITTED, *COLLECTED, "mla", "power")


def fit_device(
    name: str,
    root: str | Path | None = None,
    progress: Progress | None = None,
    *,
    only: Collection[str] = PARTS,
    base: DeviceProfile | None = None,
    fitted: Fitted | None = None,
) -> DeviceProfile:
    """Fit the operators of device ``name`` from the tables under ``root`` (default: where the reference data lie).

    ``only`` names the parts to fit; the rest comes from ``base``, an earlier profile. ``progress`` is told, in a few
    words, what is being fitted; ``fitted`` is handed each problem with the operator found for it. The same tables give
    the same profile, to the byte.
    """
    known = facts.devices()
    if name not in known:
        raise BadInput(f"no tables of it can be fitted; {nearest(name, known)}", where="--device", got=name)
    if unknown := sorted(set(only) - set(PARTS)):
        raise BadInput(f"parts are {', '.join(PARTS)}", where="--only", got=", ".join(unknown))
    device, kernels, tell = known[name], data_root(root) / "kernels", progress or (lambda _: None)
    operators = dict(base.operators) if base else {}
    seen = fitted or (lambda problem, found: None)
    operators |= _solved(device, kernels, only, lambda what: tell(f"{name}: {what}"), seen)
    profile = _profile(name, device, kernels, operators)
    if "mla" in only:
        # Measured modules of latent attention contain products.
        latent = mla.operators(profile, kernels, device.folder)
        profile = profile.model_copy(update={"operators": {**operators, **latent}})
    # Served runs are worked through with the operators' times.
    power = fit_power(profile, root) if "power" in only or base is None else base.power
    return profile.model_copy(update={"power": power})


def fit_measured(
    name: str, tables: OwnTables, progress: Progress | None = None, *, fitted: Fitted | None = None
) -> DeviceProfile:
    """Fit a device called ``name`` from tables of our own measuring; what they lack comes from its shipped profile."""
    tell, seen = progress or (lambda _: None), fitted or (lambda problem, found: None)
    operators: Operators = {}
    for problem in own_device.problems(tables):
        tell(f"{name}: {problem.kind} {problem.key}, {len(problem.frame)} rows")
        found = operators.setdefault(problem.kind, {})[problem.key] = solve(problem)
        seen(problem, found)
    operators |= own_device.operators(tables)
    if not any(operators.values()):
        raise BadInput("no table here has a measured row; measure it again", where=tables.folder)
    for kind, by_key in own_device.borrowed(tables, operators).items():
        operators[kind] = {**by_key, **operators.get(kind, {})}
    device = tables.device
    return DeviceProfile(
        name=name,
        datasheet=device.datasheet,
        price=device.price,
        power=own_device.power(tables),
        sustained=own_device.sustained(tables),
        operators=operators,
        provenance=Provenance(
            tool=f"apexsim fit {__version__}", date=device.date, tables=(f"{device.device}, {device.library}",)
        ),
    )


def _solved(device: Facts, kernels: Path, only: Collection[str], tell: Progress, fitted: Fitted) -> Operators:
    """Operators of the parts in ``only`` that need no other operator."""
    operators: Operators = {}
    for part, problems in FITTED.items():
        if part not in only:
            continue
        for problem in problems(device, kernels):
            tell(f"{problem.kind} {problem.key}, {len(problem.frame)} rows")
            found = operators.setdefault(problem.kind, {})[problem.key] = solve(problem)
            fitted(problem, found)
    for part, collect in COLLECTED.items():
        if part in only:
            tell(part)
            operators |= collect(device, kernels)
    return operators


def _profile(name: str, device: Facts, kernels: Path, operators: Operators) -> DeviceProfile:
    """The profile with the facts of the device, its power still a guess."""
    folders = (f"datacenter/{device.folder}", "datacenter/rtx_pro_6000_server", "vllm_layers", "a100_h100_2024")
    return DeviceProfile(
        name=name,
        datasheet=device.datasheet,
        price=device.price,
        power=device.power,
        sustained=estimates.sustained_clock(kernels, device.folder),
        operators=operators,
        provenance=Provenance(tool=f"apexsim fit {__version__}", date=FIT_DATE, tables=folders),
    )
