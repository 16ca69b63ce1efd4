"""Measure the conditioning of landmark systems and the error of attention in a trained neck (article, table 1).

The measurements use the queries, keys and values that the neck's links compute from images. There is one landmark
matrix for each combination of link, image and head. Each matrix is measured separately.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from srm_kernels import LandmarkSolution, Solver, full_attention
from srm_kernels.attention.reference import landmark_system
from srm_kernels.landmarks import LANDMARK_METHODS
from srm_model.config import SRMConfig
from srm_model.model import IQAModel
from srm_model.modules import evaluating, unwrapped
from srm_model.neck import Link, SRMNeck
from srm_model.neck.diagnosis import attending, quantiles

MEASURED_METHODS = tuple(name for name, method in LANDMARK_METHODS.items() if method.evaluated is None)
QUERIES = 1024  # largest number of queries, evenly spaced, on which the error of the attention is measured
FIGURES = ("kappa", "residual", "gain", "error")
QUANTILES = {"median": 0.5, "p90": 0.9, "max": 1.0}
STEPS = (1.0, 0.1, 0.01)  # changes of the pixels, in units of 1/255, to test whether landmarks change


def table_rows(config: SRMConfig) -> dict[str, dict[str, Any]]:
    """Return the rows of table 1: a dict from row name to the config fields that the row changes.

    The default solver needs a ridge, so the row without a ridge uses the solver "auto".
    """
    rows: dict[str, dict[str, Any]] = {
        "full": {},
        **{
            f"{LANDMARK_METHODS[name].title} landmarks": {"landmarks": name}
            for name in MEASURED_METHODS
            if name != config.landmarks
        },
        "no ridge": {"ridge": 0.0, "solver": "auto"},
        "no fp32": {"solve_dtype": "model"},
        "equilibrated": {"equilibrate": True},
    }
    if config.qk_norm is not None:
        rows["keys as they are"] = {"qk_norm": None}
    return rows


@torch.no_grad()
def diagnose(model: IQAModel, batches: Iterable[Tensor], *, pictured: int = 2) -> dict[str, Any]:
    """Measure every link of a model with the neck "srm".

    There is one set of landmarks and one landmark matrix for each combination of link, image and head. In the result, a
    summary of several matrices contains the number of matrices and the share of matrices that each solver solved. The
    summary also contains quantiles of κ, ρ, the gain (see `LandmarkSolution` for these three), and the error of Nyström
    attention against exact attention.

    Args:
        model: The model, which may be in a wrapper that `unwrapped` removes.
        batches: Batches of images, (B, 3, H, W) in [0, 1] each.
        pictured: Number of images of the first batch whose landmark positions are returned.

    Returns:
        A dictionary of JSON values with these entries:

        - "rank": r of the config;
        - "table": for each row of table 1, a summary of all matrices;
        - "links": for each link, values that are measured with the settings of the checkpoint. "rank" is the number of
          landmarks. "all" is a summary of all matrices of the link. "heads" has a summary for each head, and "batches"
          has a summary for each batch. "kappas" has all values of κ. "spectrum" has quantiles of the singular values;
        - "errors": for each landmark method and number of landmarks, quantiles of the error against exact attention;
        - "changes": for each landmark method and step, the share of landmark sets that change when each pixel value
          of the first batch changes by step/255 with a random sign;
        - "landmarks": for each link, each landmark method that is not random, and each of the first `pictured` images,
          the number of heads that have a landmark at each position of the source map.

    Raises:
        ValueError: The model has no Nyström attention or no link into a fused stage, or `batches` is empty.
    """
    model = cast(IQAModel, unwrapped(model))
    neck = model.neck
    if not isinstance(neck, SRMNeck) or model.neck_name != "srm":
        raise ValueError(
            f"the neck {model.neck_name!r} has no landmark system; expected a checkpoint with the neck 'srm'"
        )
    config = model.config
    device = next(model.parameters()).device
    tables: dict[str, list[dict[str, Tensor]]] = {name: [] for name in table_rows(config)}
    links: dict[str, list[dict[str, Tensor]]] = {}
    used: dict[str, int] = {}
    errors: dict[tuple[str, int], list[Tensor]] = {}
    landmarks: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    with evaluating(model):
        for number, images in enumerate(batches):
            images = images.to(device)
            aligned = neck.aligned(model.pyramid(images))
            if number == 0:
                changed = _changes(model, images)
            for (source, target), (link, q, k, v) in attending(neck, aligned):
                name = f"{source}→{target}"
                used[name] = min(config.rank, k.shape[2])
                q = q[:, :, :: max(1, math.ceil(q.shape[2] / QUERIES))]
                exact = full_attention(q, k, v, qk_norm=config.qk_norm)
                for row, changes in table_rows(config).items():
                    measured = _measured(link, q, k, v, exact, **changes)
                    tables[row].append(measured)
                    if row == "full":
                        spectrum = _spectrum(link, k, v)
                        links.setdefault(name, []).append({**measured, "spectrum": spectrum})
                for method, rank in _sizes(config, k.shape[2]):
                    y, _ = _attend(link, q, k, v, landmarks=method, rank=rank)
                    errors.setdefault((method, rank), []).append(_error(y, exact).flatten())
                if number == 0:
                    landmarks += _positions(link, name, k, aligned[source].shape[-2:], pictured)
    if not links:
        raise ValueError("nothing to diagnose; expected at least one batch and one link into a fused stage")
    return {
        "rank": config.rank,
        "table": {row: _summary(_joined(measured)) for row, measured in tables.items()},
        "links": {name: {"rank": used[name], **_by_link(measured)} for name, measured in links.items()},
        "errors": [
            {"method": method, "rank": rank, **quantiles(torch.cat(found), QUANTILES)}
            for (method, rank), found in sorted(errors.items())
        ],
        "changes": changed,
        "landmarks": landmarks,
    }


def _changes(model: IQAModel, images: Tensor) -> list[dict[str, Any]]:
    """Return the share of landmark sets that change when the pixels change by a small step.

    The result has an entry for each landmark method and each step of `STEPS`. There is one landmark set for each
    combination of link, image and head.
    """
    neck = cast(SRMNeck, model.neck)

    def chosen(images: Tensor) -> dict[str, list[Tensor]]:
        sets: dict[str, list[Tensor]] = {method: [] for method in MEASURED_METHODS}
        for _, (link, _, k, _) in attending(neck, neck.aligned(model.pyramid(images))):
            for method, found in sets.items():
                index = link.landmarks(k, landmarks=method)
                found.append(index.sort(-1).values.flatten(0, 1))
        return sets

    signs = 2.0 * torch.randint(2, images.shape, generator=torch.Generator().manual_seed(0)) - 1
    own = chosen(images)
    found = []
    for step in STEPS:
        moved = chosen(images + step / 255 * signs.to(images))
        for method in MEASURED_METHODS:
            pairs = zip(own[method], moved[method], strict=True)
            others = torch.cat([(a != b).any(-1) for a, b in pairs])
            found.append({"method": method, "step": step, "share": float(others.double().mean())})
    return found


def _attend(link: Link, q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> tuple[Tensor, LandmarkSolution]:
    if changes.get("solve_dtype", link.config.solve_dtype) == "model" and q.dtype == torch.float32:
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
    return link.diagnosed(q, k, v, **changes)


def _measured(
    link: Link, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, **changes: Any
) -> dict[str, Tensor]:
    """Return κ, ρ, the gain, the solver and the error of Y, (B, H) each. `exact` is the Y of exact attention."""
    y, solution = _attend(link, q, k, v, **changes)
    if changes.get("qk_norm", link.config.qk_norm) != link.config.qk_norm:
        exact = full_attention(q, k, v, qk_norm=changes["qk_norm"])
    found = {name: getattr(solution, name).cpu() for name in ("kappa", "residual", "gain", "solver")}
    return {**found, "error": _error(y, exact)}


def _error(y: Tensor, exact: Tensor) -> Tensor:
    """Return ‖Y − Y*‖_F / ‖Y*‖_F, (B, H)."""
    y, exact = y.double(), exact.double()
    norm = torch.linalg.vector_norm(exact, dim=(-2, -1))
    return (torch.linalg.vector_norm(y - exact, dim=(-2, -1)) / norm).cpu()


def _spectrum(link: Link, k: Tensor, v: Tensor) -> Tensor:
    """Return the singular values of W_λ, computed without equilibration, (B, H, r), in descending order."""
    c = link.config
    logits, _ = landmark_system(k, v, link.landmarks(k), 1 / math.sqrt(k.shape[-1]), c.qk_norm, "fp32")
    W = logits.double().softmax(-1)
    r = W.shape[-1]
    lam = c.ridge * W.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.svdvals(W + lam * torch.eye(r, dtype=W.dtype, device=W.device)).cpu()


def _sizes(config: SRMConfig, keys: int) -> list[tuple[str, int]]:
    """Return all pairs (landmark method, number of landmarks); the numbers are r/4, r/2, r and 2r, up to `keys`."""
    ranks = {max(1, config.rank * factor // 4) for factor in (1, 2, 4, 8)}
    return [(method, rank) for method in MEASURED_METHODS for rank in sorted(ranks) if rank <= keys]


def _positions(
    link: Link, name: str, k: Tensor, grid: tuple[int, ...], pictured: int
) -> list[dict[str, Any]]:
    """For each position of a link's source map, count the heads that have a landmark there.

    The result has an entry for each landmark method and each of the first `pictured` images. Methods that sample at
    random are left out.
    """
    height, width = grid
    found = []
    for method in MEASURED_METHODS:
        if LANDMARK_METHODS[method].draws(link.config.rank, k.shape[2]):
            continue
        index = link.landmarks(k, landmarks=method).cpu()
        for image in range(min(pictured, len(index))):
            counts = torch.bincount(index[image].flatten(), minlength=height * width)
            found.append(
                {
                    "image": image,
                    "link": name,
                    "method": method,
                    "heads": index.shape[1],
                    "counts": counts.view(height, width).tolist(),
                }
            )
    return found


def _joined(measured: list[dict[str, Tensor]], head: slice | int = slice(None)) -> dict[str, Tensor]:
    """Concatenate the measured values of several batches, for all heads or for one head."""
    names = (*FIGURES, "solver")
    return {name: torch.cat([batch[name][:, head].flatten() for batch in measured]) for name in names}


def _summary(values: dict[str, Tensor]) -> dict[str, Any]:
    """Return quantiles of the values, the number of matrices, and the share of matrices that each solver solved."""
    served = values["solver"]
    shares = {solver.name.lower(): float((served == solver).double().mean()) for solver in Solver}
    return {
        **{name: quantiles(values[name], QUANTILES) for name in FIGURES},
        "matrices": len(served),
        "solvers": {name: share for name, share in shares.items() if share},
    }


def _by_link(measured: list[dict[str, Tensor]]) -> dict[str, Any]:
    joined = _joined(measured)
    spectra = torch.cat([batch["spectrum"].flatten(0, 1) for batch in measured])
    return {
        "all": _summary(joined),
        "heads": [_summary(_joined(measured, head)) for head in range(measured[0]["kappa"].shape[1])],
        "batches": [_summary(_joined([batch])) for batch in measured],
        "kappas": sorted(joined["kappa"].tolist()),
        "spectrum": {
            name: spectra.quantile(share, dim=0).tolist()
            for name, share in (("low", 0.1), ("median", 0.5), ("high", 0.9))
        },
    }
