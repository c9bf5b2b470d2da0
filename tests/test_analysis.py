"""scripts/measure_analysis.py: its made-up runs are runs, and its page is made from the file."""

from __future__ import annotations

import pandas as pd
import pytest

import fedsim
import measure_analysis
from measure_analysis import Measured


def test_made_up_runs_are_read_like_others(tmp_path):
    path = measure_analysis._made_up(tmp_path, rounds=6, clients=3, rounds_a_part=2)
    run = fedsim.load_run(path)
    assert run.rounds["round"].tolist() == list(range(7))
    assert len(run.clients) == 18
    assert len(list((path / "rounds.parquet").glob("part-0*"))) == 4  # round 0, and three of two rounds


def test_the_page_keeps_what_was_measured_before(tmp_path, monkeypatch, capsys):
    def first(folder):
        """The first."""
        yield Measured("how long", 1.0, "s", at_most=1)

    def second(folder):
        """The second."""
        yield Measured("how much", 2.5)
        yield Measured("how often", 2.0, at_least=2.5)

    monkeypatch.setattr(measure_analysis, "MEASURES", {"first": first, "second": second})
    measure_analysis.main(["--output", str(tmp_path)])
    measure_analysis.main(["second", "--output", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert text.count("| how long | 1.00 s | at most 1 |") == text.count("| how much | 2.50 |  |") == 1
    assert text.count("| how often | 2.00 | at least 2.5: **not reached** |") == 1
    assert pd.read_parquet(tmp_path / "analysis.parquet")["name"].tolist() == ["first", "second", "second"]
    with pytest.raises(SystemExit) as ended:
        measure_analysis.main(["third"])
    assert ended.value.code == 2
    assert "no third; there are first, second" in capsys.readouterr().err
