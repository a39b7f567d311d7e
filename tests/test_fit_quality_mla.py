"""How well latent attention is fitted, read from the shipped profiles: no worse than these bars."""

from __future__ import annotations

import pytest

from apexsim import catalog
from apexsim.costs.forms import mla, prefill
from apexsim.fitting.mla import DOUBLING, HIDDEN_PASSES, LAUNCH, operators
from apexsim.specs.device import FittedOperator

KINDS = ("mla_decode", "mla_prefill")
PROFILES = {name: catalog.load("device", name) for name in catalog.names("device")}
FITTED = [(name, kind, key) for name, p in PROFILES.items() for kind in KINDS for key in p.operators.get(kind, {})]
# Median and 90th percentile of absolute errors on whole modules.
RANDOM = {"mla_prefill": (0.025, 0.08), "mla_decode": (0.03, 0.09)}
LARGEST = {"mla_prefill": (0.05, 0.17), "mla_decode": (0.13, 0.28)}
# Where the bar is missed, and by how much. Prompts on Blackwell: other engines' products stand in for the modules' own.
# Decodes there are fitted to the kernel's own table, whose key splits jump; the bar is one of whole modules, in which
# such jumps drown. L40S and RTX PRO: Triton kernels have steps that no form here knows.
BLACKWELL = ("b200-sxm", "b300-sxm", "gb200", "gb300")
MISSED = {
    **{(name, "mla_decode"): (0.045, 0.17) for name in BLACKWELL},
    ("b200-sxm", "mla_prefill"): (0.03, 0.08),
    ("b300-sxm", "mla_prefill"): (0.045, 0.085),
    ("gb300", "mla_prefill"): (0.045, 0.085),
    ("l40s", "mla_decode"): (0.07, 0.22),
    ("l40s", "mla_prefill"): (0.10, 0.25),
    ("rtx-pro-6000", "mla_decode"): (0.05, 0.18),
    ("rtx-pro-6000", "mla_prefill"): (0.045, 0.11),
}


def fitted(name: str, kind: str, key: str) -> FittedOperator:
    return PROFILES[name].operators[kind][key]


def test_hopper_has_latent_attention() -> None:
    assert {("h200-sxm", kind, key) for kind in KINDS for key in ("bf16", "fp8")} <= set(FITTED)


@pytest.mark.parametrize(("name", "kind", "key"), FITTED)
def test_what_simulations_use_is_as_good_as_said(name: str, kind: str, key: str) -> None:
    found = fitted(name, kind, key).quality["random"]
    median, p90 = MISSED.get((name, kind), RANDOM[kind])
    assert found.median <= median
    assert found.p90 <= p90


@pytest.mark.parametrize(("name", "kind", "key"), FITTED)
def test_the_largest_sizes_are_foreseen(name: str, kind: str, key: str) -> None:
    found = fitted(name, kind, key).quality["largest"]
    worse = 2.0 if name == "l40s" else 1.0
    assert found.median <= worse * LARGEST[kind][0]
    assert found.p90 <= worse * LARGEST[kind][1]


@pytest.mark.parametrize(("name", "kind", "key"), FITTED)
def test_modules_add_up_of_projections_and_attention(name: str, kind: str, key: str) -> None:
    """On Blackwell too, by a fit of the modules that stands beside the kernel's and that no simulation uses."""
    quality = fitted(name, kind, key).quality
    if kind == "mla_decode" and name in BLACKWELL:
        assert quality["module_random"].median <= RANDOM[kind][0]
        assert quality["module_random"].p90 <= RANDOM[kind][1]
    else:
        assert "module_random" not in quality


@pytest.mark.parametrize(("name", "kind", "key"), FITTED)
def test_coefficients_stay_inside_their_bounds(name: str, kind: str, key: str) -> None:
    known = {"mla_decode": [*mla.COEFFICIENTS, DOUBLING, LAUNCH], "mla_prefill": [*prefill.COEFFICIENTS, HIDDEN_PASSES]}
    values = fitted(name, kind, key).coefficients
    for coefficient in known[kind]:
        if coefficient.name in values:
            assert coefficient.low * 0.999 <= values[coefficient.name] <= coefficient.high * 1.001
    modules = [value for at, value in values.items() if at.startswith("module_") and at != DOUBLING.name]
    assert all(1e-6 <= value <= 200e-6 for value in modules)


def test_nothing_is_made_up_where_no_table_is(tmp_path) -> None:
    assert operators(PROFILES["h200-sxm"], tmp_path, "h200_sxm") == {}
    assert not set(KINDS) & set(PROFILES["a100-sxm"].operators)
