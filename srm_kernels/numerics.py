"""The numerics rule: the largest error that the result of a kernel may have.

The exact result is computed in fp64 from the definition in docs/METHOD.md. The magnitude of a tensor is one number that
says how large the values of the tensor are; it is defined below. The error of a result is the magnitude of its
difference from the exact result. A unit of a dtype is the machine epsilon of the dtype times the magnitude of the exact
result. The error of a kernel must be at most the sum of three terms:

- twice the error that plain PyTorch has with the same dtype and with intermediate results in fp32;
- half a unit of the dtype;
- 8 units of fp32, because kernels sum in another order than plain PyTorch.

The magnitude has two definitions: the largest absolute value of the tensor, and the mean absolute value of
the tensor. The rule must hold with each definition.

If the result is a single number, such as the gradient of α, the error of plain PyTorch can be small by chance. The
bound, which is the sum of the three terms above, would then be too small. If the error of plain PyTorch for a single
number is below half a unit of the dtype, the rule therefore uses half a unit in place of this error.

Some gradients have few elements, and each element is a sum Σ tᵢ over many positions. The error of the sum is Σ tᵢ δᵢ,
where the δᵢ are random rounding errors. This error is of the order of ε √Σ tᵢ², where ε is the machine
epsilon. The terms can cancel, so the sum itself can be much smaller than √Σ tᵢ². The error can then be large
relative to the sum. One loss gives only one random sample of the error of plain PyTorch, and this sample can be
small by chance. Therefore, the error of plain PyTorch is measured for several random losses, and the rule uses
the largest of these errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FP32_UNITS = 8
DRAWS = 8  # losses over which the error of a gradient of few numbers is measured
FEW = 16  # largest number of elements of a result of "few numbers"


def error_ratio(
    found: Tensor,
    plain: Tensor,
    exact: Tensor,
    together: Sequence[Tensor] | None = None,
    draws: Sequence[tuple[Tensor, Tensor]] = (),
) -> float:
    """Return the error of a result divided by its bound: a ratio of at most 1 satisfies the numerics rule.

    Args:
        found: The result of the kernels, any shape, floating point.
        plain: The same result by plain PyTorch in the dtype of `found`.
        exact: The same result in fp64.
        together: All exact results of the call, for instance all gradients. If `together` is given, the 8
            units of fp32 in the bound are computed from the largest magnitude of these results. Otherwise,
            they are computed from the magnitude of `exact`.
        draws: Pairs (plain, exact) of the same result for other losses or other inputs. The bound then uses
            the largest error of plain PyTorch over `plain` and all pairs. Let m be the root mean square of
            the magnitudes of the exact results in `draws`. If m is larger than the magnitude of `exact`, the
            bound uses m instead of the magnitude of `exact`.

    Returns:
        The larger of two ratios: one with the largest absolute value as the magnitude, and one with the mean
        absolute value. Elements that overflow in `plain` but not in `exact` are ignored, so they may overflow in
        `found` too. At all other positions, NaN and ±infinity must be the same in `found` and `exact`; otherwise, the
        ratio is infinity.

    Raises:
        ValueError: The shapes differ.
    """
    if not found.shape == plain.shape == exact.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (found, plain, exact))
        raise ValueError(f"results have shapes {shapes}; expected three results of the same shape")
    found, plain, exact = (x.detach().to(found.device) for x in (found, plain, exact))
    infinite = exact.isinf()
    if not torch.equal(found.isnan(), exact.isnan()):
        return math.inf
    if not torch.equal(found[infinite].double(), exact[infinite].double()):
        return math.inf
    bounded = plain.isfinite() & exact.isfinite()
    single = exact.numel() == 1
    found, plain, exact = found[bounded], plain[bounded], exact[bounded]
    if not exact.numel():
        return 0.0
    if not found.isfinite().all():
        return math.inf
    unit, wide_unit = torch.finfo(found.dtype).eps / 2, torch.finfo(torch.float32).eps
    worst = 0.0
    for measure in (torch.amax, torch.mean):
        size, error, reference = (
            float(measure(x.abs())) for x in (exact, found.double() - exact, plain.double() - exact)
        )
        if single:
            reference = max(reference, unit * size)
        if draws:
            reference = max(reference, *(float(measure((p.double() - e).abs())) for p, e in draws))
            size = max(size, float(torch.stack([measure(e.abs()) for _, e in draws]).square().mean().sqrt()))
        others = [x.detach()[x.isfinite()].abs() for x in together or ()]
        largest = max((float(measure(x)) for x in others if x.numel()), default=size)
        bound = 2 * reference + unit * size + FP32_UNITS * wide_unit * largest
        worst = max(worst, 0.0 if error == 0 else error / bound if bound else math.inf)
    return worst
