"""Test `bench.diagram`, which draws the picture of the README."""

from __future__ import annotations

from pathlib import Path

from bench import diagram


def test_the_picture_names_every_part(tmp_path: Path):
    texts = {text.get_text() for text in diagram.draw().axes[0].texts}
    assert {*diagram.STAGES, "SRM neck", "head", "score", "keys and values", "queries"} <= texts


def test_the_same_picture_every_time(tmp_path: Path):
    for name in ("one.svg", "two.svg"):
        assert diagram.main([str(tmp_path / name)]) == 0
    one, two = ((tmp_path / name).read_bytes() for name in ("one.svg", "two.svg"))
    assert one == two
    assert b"<svg" in one
