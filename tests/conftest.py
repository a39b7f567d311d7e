"""What several tests share: the reference data, if it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does; a build that checks others looks at the same ones.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("local", _PATIENT)
settings.register_profile("ci", _PATIENT, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def find_data() -> Path | None:
    """The reference data: $APEXSIM_DATA, else ``../shared/data`` beside the checkout; None where absent."""
    named = os.environ.get("APEXSIM_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data() -> Path:
    """The reference data; the test is skipped where it is absent."""
    folder = find_data()
    if folder is None:
        pytest.skip("reference data not found: set APEXSIM_DATA")
    return folder
