from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photograph() -> Callable[..., np.ndarray]:
    """Return a function that draws a picture from a seed.

    The picture is a uint8 array (side, side, 3) with smooth colours, edges and texture.
    """

    def draw(side: int = 96, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:side, :side] / side
        planes = []
        for _ in range(3):
            a, b, c, d = rng.uniform(1, 6, 4)
            wave = np.sin(a * np.pi * x + c) * np.cos(b * np.pi * y + d)
            edge = (x + y > rng.uniform(0.6, 1.4)) * rng.uniform(0.3, 0.6)
            planes.append(0.5 + 0.25 * wave + edge - 0.15)
        texture = 0.04 * rng.standard_normal((side, side, 1))
        return np.clip(255 * (np.stack(planes, -1) + texture), 0, 255).astype(np.uint8)

    return draw


@pytest.fixture
def copies() -> Callable[..., None]:
    """Return a function that stores one tiny picture in a folder under many names, as hard links to one file."""

    def link(folder: Path, names: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / names[0]
        pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3)
        Image.fromarray(pixels).save(first)
        for name in names[1:]:
            os.link(first, folder / name)

    return link


@pytest.fixture
def tid(tmp_path, copies) -> Callable[..., Path]:
    """Return a function that creates a small dataset in TID2013's layout, with one distortion type and two levels."""

    def lay_out(references: int = 5, lines: list[str] | None = None) -> Path:
        root = tmp_path / "tid"
        names = [f"i{ref:02}_01_{level}.bmp" for ref in range(1, references + 1) for level in (1, 2)]
        copies(root / "distorted_images", names)
        if lines is None:
            lines = [f"{0.5 + 0.5 * i:.5f} {name}" for i, name in enumerate(names)]
        (root / "mos_with_names.txt").write_text("\r\n".join(lines) + "\r\n", newline="")
        return root

    return lay_out
