"""Draw a quality map: the image (left), the map on top of a grey copy of the image (right), and a colour bar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from srm_model.files import atomic_path
from srm_model.reports.drawing import STYLE
from srm_model.reports.text import fixed

_LEAST = 1e-6  # smallest end of the colour bar


def draw_map(
    path: str | Path,
    image: npt.NDArray[np.floating],
    change: npt.NDArray[np.float64],
    *,
    score: float,
    caption: str,
    model: str,
    lower_is_better: bool = False,
) -> None:
    """Write the picture of a quality map as PNG. Calls that differ only in `path` write identical files.

    Args:
        path: File to write.
        image: The scored image, (H, W, 3) in [0, 1].
        change: (H, W), for each pixel the change of the score after a window is replaced, averaged over all windows
            with the pixel.
        score: Score of the image.
        caption: Text that says how the map was computed.
        model: Name of the model.
        lower_is_better: Whether low scores mean high quality. The colours are then reversed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The colours show at least ± 1 % of the score. Otherwise, an undamaged image would look damaged.
    end = max(float(np.abs(change).max()), 0.01 * abs(score), _LEAST)
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(9, 4.6))
        left, right = figure.subplots(1, 2)
        left.imshow(image, vmin=0, vmax=1)
        left.set_title(f"score {fixed(score, 4)}")
        right.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
        shown = right.imshow(
            change, cmap="RdBu" if lower_is_better else "RdBu_r", vmin=-end, vmax=end, alpha=0.6
        )
        right.set_title("where the model sees a loss of quality (red)")
        figure.colorbar(shown, ax=right, label="change of score if the window is replaced", shrink=0.85)
        for axes in (left, right):
            axes.set(xticks=[], yticks=[])
        figure.supxlabel(f"{caption}\n{model}", fontsize=8)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
