"""Where Ray is looked for. Kept apart from tests that have a Ray already: fedsim would use that one."""

from __future__ import annotations

import pytest

import fedsim
from fedsim.errors import PlanError

pytestmark = pytest.mark.ray

TINY = fedsim.Config().override({"data.dataset": "synthetic", "placement.mode": "packed"})


def test_nobody_answers_at_the_address(tmp_path):
    with pytest.raises(PlanError, match=r"no Ray answers at '127\.0\.0\.1:9'.*ray start --head"):
        list(fedsim.rounds(TINY.override({"placement.mode": "packed", "placement.address": "127.0.0.1:9"})))
    with pytest.raises(PlanError, match="no Ray answers at 'nonsense'"):
        fedsim.run(TINY.override({"placement.mode": "packed", "placement.address": "nonsense"}), results=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_address_is_the_keys_then_rays_variable_then_local(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(PlanError, match=r"no Ray answers at '127\.0\.0\.1:9'"):
        list(fedsim.rounds(TINY.override({"placement.mode": "packed"})))
    with pytest.raises(PlanError, match="no Ray answers at 'elsewhere'"):
        list(fedsim.rounds(TINY.override({"placement.mode": "packed", "placement.address": "elsewhere"})))
