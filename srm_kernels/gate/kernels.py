"""Triton kernels of the gate: GELU, logits, gain-capped fusion and losses.

`biased_gelu` processes all stages in one launch, and so does `gate_logits`. Their backward passes have no kernels and
use the derivative of the reference, because the maps are small.

`gated_fusion` computes γM for each image, where M is the mixture of the stage maps and the gain γ limits the norm of M.
The forward pass has two launches. The first launch computes partial sums of ‖M‖² of every image. The second launch
computes γ and γM. It computes M again from the stage maps, which are small and in the cache.

The backward pass of `gated_fusion` has two launches. The first launch computes inner products, from which the second
launch derives the gradients of γ and of the stage weights. The second launch then computes the gradients of the stage
maps and of the logits.

The forward and the backward pass of `gated_fusion` split each image into parts of `BLOCK` elements, and add the sums of
the parts in a fixed order. The number of parts depends only on C, h and w. The result of an image therefore does not
depend on the other images of the batch.

One program computes the losses, whatever the batch size is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..parts import INFINITY, contiguous, empty, on_device, power_of_two, readable, strides, strides_of

BLOCK = 1024  # elements of an image that a program holds
IMAGES = 32  # images of a tile of the losses
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
SQRT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def softmax_weights(logits_ptr, stride, temperature, S: tl.constexpr, STAGES: tl.constexpr):
    """Return the stage weights a = softmax(g / T), [STAGES]. Entries beyond S are zero."""
    s = tl.arange(0, STAGES)
    logits = tl.load(logits_ptr + s * stride, mask=s < S, other=-INFINITY).to(tl.float32) / temperature
    weights = tl.exp(logits - tl.max(logits, 0))
    return weights / tl.sum(weights, 0)


@triton.jit
def pick(vector, index, STAGES: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, STAGES) == index, vector, 0.0), 0)


@triton.jit
def element_offsets(element, h, w, stride_c, stride_h, stride_w):
    """Return the 64-bit memory offset of each element of a map for the flat indices `element` in (C, h, w)."""
    c, y, x = element // (h * w), element // w % h, element % w
    return c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def activated(map_ptr, bias_ptr, element, inside, h, w, stride_c, stride_h, stride_w):
    """Return GELU(m + b), [BLOCK], at the given elements of an image's map m. The bias b is rounded to m's dtype."""
    offsets = element_offsets(element, h, w, stride_c, stride_h, stride_w)
    bias = tl.load(bias_ptr + element // (h * w), mask=inside, other=0.0).to(map_ptr.dtype.element_ty)
    x = tl.load(map_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias.to(tl.float32)
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit(do_not_specialize=["batch"])
def _gelu_kernel(
    map_ptrs, bias_ptrs, out_ptr, batch, elements, h, w, parts, strides_b, strides_c, strides_h, strides_w,
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute GELU(m + b) for one part of one map m: the map of one stage and one image. `out` is (S, B, C, h, w)."""
    program = tl.program_id(0).to(tl.int64)
    image, part = program // parts, (program % parts).to(tl.int32)
    stage, b = image // batch, image % batch
    element = part * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    for s in tl.static_range(S):
        if stage == s:
            out = activated(
                map_ptrs[s] + b * strides_b[s], bias_ptrs[s], element, inside, h, w, strides_c[s],
                strides_h[s], strides_w[s],
            )  # fmt: skip
            tl.store(out_ptr + image * elements + element, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _logits_kernel(
    map_ptrs, bias_ptrs, weight_ptrs, offset_ptrs, out_ptr, elements, h, w, strides_b, strides_c, strides_h,
    strides_w, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute g_s of one image and stage."""
    b, stage = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(S):
        if stage == s:
            for first in range(0, elements, BLOCK):
                element = first + tl.arange(0, BLOCK)
                inside = element < elements
                values = activated(
                    map_ptrs[s] + b * strides_b[s], bias_ptrs[s], element, inside, h, w, strides_c[s],
                    strides_h[s], strides_w[s],
                )  # fmt: skip
                weight = tl.load(weight_ptrs[s] + element // (h * w), mask=inside, other=0.0)
                total += tl.where(inside, values * weight.to(tl.float32), 0.0)
            offset = tl.load(offset_ptrs[s]).to(tl.float32)
            tl.store(out_ptr + b * S + s, tl.sum(total, 0) / (h * w) + offset)


@triton.jit
def mixture(
    maps_ptr, offsets, inside, weights, stride_s, S: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr
):
    """Return M = Σ_s a_s P_s at the elements with the given offsets, [BLOCK]."""
    mixed = tl.zeros([BLOCK], tl.float32)
    for s in range(S):
        stage = tl.load(maps_ptr + s * stride_s + offsets, mask=inside, other=0.0).to(tl.float32)
        mixed += pick(weights, s, STAGES) * stage
    return mixed


@triton.jit
def _norm_kernel(
    maps_ptr, logits_ptr, parts_ptr, elements, h, w, parts, stride_b, stride_s, stride_c, stride_h, stride_w,
    logits_stride_b, logits_stride_s, temperature, S: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute Σ M² of one part of an image."""
    program = tl.program_id(0).to(tl.int64)
    b, part = program // parts, (program % parts).to(tl.int32)
    weights = softmax_weights(logits_ptr + b * logits_stride_b, logits_stride_s, temperature, S, STAGES)
    element = part * BLOCK + tl.arange(0, BLOCK)
    offsets = element_offsets(element, h, w, stride_c, stride_h, stride_w)
    mixed = mixture(maps_ptr + b * stride_b, offsets, element < elements, weights, stride_s, S, STAGES, BLOCK)
    tl.store(parts_ptr + program, tl.sum(mixed * mixed, 0))


@triton.jit
def _fuse_kernel(
    maps_ptr, logits_ptr, parts_ptr, cap_ptr, fused_ptr, weights_ptr, gain_ptr, norm_ptr, elements, h, w,
    parts, stride_b, stride_s, stride_c, stride_h, stride_w, logits_stride_b, logits_stride_s, temperature,
    eps, margin, CAPPED: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one part of the fused map γM of an image.

    The program of the first part also writes the stage weights a, the gain γ and the norm ‖M‖ of the image.
    """
    program = tl.program_id(0).to(tl.int64)
    b, part = program // parts, (program % parts).to(tl.int32)
    weights = softmax_weights(logits_ptr + b * logits_stride_b, logits_stride_s, temperature, S, STAGES)
    others = tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(parts_ptr + b * parts + others, mask=others < parts, other=0.0), 0))
    if CAPPED:
        limit, length = tl.load(cap_ptr).to(tl.float32) * margin, norm + eps
        gain = tl.where(length <= limit, 1.0, limit / length)  # NaN stays NaN
    else:
        gain = tl.where(norm == norm, 1.0, norm)
    element = part * BLOCK + tl.arange(0, BLOCK)
    offsets = element_offsets(element, h, w, stride_c, stride_h, stride_w)
    mixed = mixture(maps_ptr + b * stride_b, offsets, element < elements, weights, stride_s, S, STAGES, BLOCK)
    fused = (gain * mixed).to(fused_ptr.dtype.element_ty)
    tl.store(fused_ptr + b * elements + element, fused, mask=element < elements)
    if part == 0:
        s = tl.arange(0, STAGES)
        tl.store(weights_ptr + b * S + s, weights, mask=s < S)
        tl.store(gain_ptr + b, gain)
        tl.store(norm_ptr + b, norm)


@triton.jit
def _products_kernel(
    maps_ptr, weights_ptr, dfused_ptr, parts_ptr, elements, h, w, parts, stride_b, stride_s, stride_c,
    stride_h, stride_w, dfused_stride_b, dfused_stride_c, dfused_stride_h, dfused_stride_w, S: tl.constexpr,
    STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the inner products ⟨dF, P_s⟩ and ⟨M, P_s⟩ of all S stages over one part of an image, [2, S].

    P_s is the map of stage s, M = Σ_s a_s P_s is the mixture, and dF is the gradient of the fused map F = γM.
    """
    program = tl.program_id(0).to(tl.int64)
    b, part = program // parts, (program % parts).to(tl.int32)
    s = tl.arange(0, STAGES)
    weights = tl.load(weights_ptr + b * S + s, mask=s < S, other=0.0)
    element = part * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    offsets = element_offsets(element, h, w, stride_c, stride_h, stride_w)
    upstream = element_offsets(element, h, w, dfused_stride_c, dfused_stride_h, dfused_stride_w)
    dfused = tl.load(dfused_ptr + b * dfused_stride_b + upstream, mask=inside, other=0.0).to(tl.float32)
    maps_ptr += b * stride_b
    mixed = mixture(maps_ptr, offsets, inside, weights, stride_s, S, STAGES, BLOCK)
    for stage in range(S):
        values = tl.load(maps_ptr + stage * stride_s + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(parts_ptr + (program * 2) * S + stage, tl.sum(dfused * values, 0))
        tl.store(parts_ptr + (program * 2 + 1) * S + stage, tl.sum(mixed * values, 0))


@triton.jit
def _fusion_backward_kernel(
    maps_ptr, weights_ptr, gain_ptr, norm_ptr, cap_ptr, dfused_ptr, dweights_ptr, dgain_ptr, dnorm_ptr,
    parts_ptr, dmaps_ptr, dlogits_ptr, elements, h, w, parts, stride_b, stride_s, stride_c, stride_h,
    stride_w, dfused_stride_b, dfused_stride_c, dfused_stride_h, dfused_stride_w, temperature, eps, margin,
    CAPPED: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dP_s = a_s dM, the gradient of each stage map P_s, for one part of an image.

    M = Σ_s a_s P_s is the mixture, and F = γM is the fused map. dM, dF and d‖M‖ are the gradients of the loss with
    respect to M, F and ‖M‖, and dM = γ dF + (d‖M‖ / ‖M‖) M. γ depends on ‖M‖, so d‖M‖ includes the gradient through γ.

    The program of the first part also writes the gradient of the logits.
    """
    program = tl.program_id(0).to(tl.int64)
    b, part = program // parts, (program % parts).to(tl.int32)
    s = tl.arange(0, STAGES)
    others = tl.arange(0, PARTS)
    known = (others < parts)[:, None] & (s < S)[None, :]
    base = parts_ptr + (b * parts + others[:, None]) * 2 * S + s[None, :]
    upstream_products = tl.sum(tl.load(base, mask=known, other=0.0), 0)  # ⟨dF, P_s⟩ [STAGES]
    own_products = tl.sum(tl.load(base + S, mask=known, other=0.0), 0)  # ⟨M, P_s⟩
    weights = tl.load(weights_ptr + b * S + s, mask=s < S, other=0.0)
    gain, norm = tl.load(gain_ptr + b), tl.load(norm_ptr + b)
    dgain = tl.load(dgain_ptr + b) + tl.sum(weights * upstream_products, 0)
    dnorm = tl.load(dnorm_ptr + b)
    if CAPPED:
        limit, length = tl.load(cap_ptr).to(tl.float32) * margin, norm + eps
        dnorm -= tl.where(length <= limit, 0.0, dgain * gain / length)
    # The derivative of the norm at 0 is 0, as in torch.
    along = tl.where(norm == 0.0, 0.0, dnorm / norm)
    if part == 0:
        dweights = tl.load(dweights_ptr + b * S + s, mask=s < S, other=0.0)
        dweights += gain * upstream_products + along * own_products
        dlogits = weights * (dweights - tl.sum(weights * dweights, 0)) / temperature
        tl.store(dlogits_ptr + b * S + s, dlogits.to(dlogits_ptr.dtype.element_ty), mask=s < S)
    element = part * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    offsets = element_offsets(element, h, w, stride_c, stride_h, stride_w)
    upstream = element_offsets(element, h, w, dfused_stride_c, dfused_stride_h, dfused_stride_w)
    dfused = tl.load(dfused_ptr + b * dfused_stride_b + upstream, mask=inside, other=0.0).to(tl.float32)
    mixed = mixture(maps_ptr + b * stride_b, offsets, inside, weights, stride_s, S, STAGES, BLOCK)
    dmixed = gain * dfused + along * mixed
    for stage in range(S):
        dmap = (pick(weights, stage, STAGES) * dmixed).to(dmaps_ptr.dtype.element_ty)
        tl.store(dmaps_ptr + (b * S + stage) * elements + element, dmap, mask=inside)


@triton.jit
def load_images(
    weights_ptr, first, batch, stride_b, stride_s, S: tl.constexpr, STAGES: tl.constexpr, IMAGES: tl.constexpr
):
    """Load the stage weights of a tile of images, [IMAGES, STAGES]. Entries beyond the batch or beyond S are zero."""
    b, s = first + tl.arange(0, IMAGES), tl.arange(0, STAGES)
    inside = (b < batch)[:, None] & (s < S)[None, :]
    offsets = b.to(tl.int64)[:, None] * stride_b + s[None, :] * stride_s
    return tl.load(weights_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def shortfall(weights, floor, inside):
    """Return H_min − H(a_b), [IMAGES], and log(max(a, TINY)), which is finite even for a = 0."""
    logs = tl.log(tl.maximum(weights, TINY, propagate_nan=tl.PropagateNan.ALL))
    return tl.where(inside, floor + tl.sum(weights * logs, 1), 0.0), logs


@triton.jit(do_not_specialize=["batch"])
def _losses_kernel(
    weights_ptr, entropy_ptr, balance_ptr, batch, stride_b, stride_s, floor, S: tl.constexpr,
    STAGES: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    s = tl.arange(0, STAGES)
    total = tl.zeros([STAGES], tl.float32)
    entropy = 0.0
    for first in range(0, batch, IMAGES):
        weights = load_images(weights_ptr, first, batch, stride_b, stride_s, S, STAGES, IMAGES)
        below, _ = shortfall(weights, floor, first + tl.arange(0, IMAGES) < batch)
        entropy += tl.sum(tl.where(below < 0.0, 0.0, below), 0)  # NaN stays NaN
        total += tl.sum(weights, 0)
    count = batch.to(tl.float32)
    excess = tl.where(s < S, total / count - 1.0 / S, 0.0)
    tl.store(entropy_ptr, entropy / count)
    tl.store(balance_ptr, tl.sum(excess * excess, 0))


@triton.jit(do_not_specialize=["batch"])
def _losses_backward_kernel(
    weights_ptr, dentropy_ptr, dbalance_ptr, dweights_ptr, batch, stride_b, stride_s, floor, S: tl.constexpr,
    STAGES: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    s = tl.arange(0, STAGES)
    total = tl.zeros([STAGES], tl.float32)
    for first in range(0, batch, IMAGES):
        total += tl.sum(load_images(weights_ptr, first, batch, stride_b, stride_s, S, STAGES, IMAGES), 0)
    count = batch.to(tl.float32)
    dentropy = tl.load(dentropy_ptr) / count
    dbalance = tl.load(dbalance_ptr) * 2.0 / count * (total / count - 1.0 / S)  # [STAGES]
    for first in range(0, batch, IMAGES):
        b = first + tl.arange(0, IMAGES)
        weights = load_images(weights_ptr, first, batch, stride_b, stride_s, S, STAGES, IMAGES)
        below, logs = shortfall(weights, floor, b < batch)
        slope = logs + tl.where(weights >= TINY, 1.0, 0.0)
        dweights = tl.where((below < 0.0)[:, None], 0.0, dentropy * slope) + dbalance[None, :]
        inside = (b < batch)[:, None] & (s < S)[None, :]
        offsets = b.to(tl.int64)[:, None] * S + s[None, :]
        tl.store(dweights_ptr + offsets, dweights.to(dweights_ptr.dtype.element_ty), mask=inside)


def biased_gelu(maps: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Return the result of `reference.biased_gelu`."""
    dtype, maps = maps[0].dtype, [readable(m) for m in maps]
    S, (B, C, h, w) = len(maps), maps[0].shape
    out = empty((S, B, C, h, w), maps[0], maps[0].dtype)
    parts = -(-C * h * w // BLOCK)
    with on_device(out):
        _gelu_kernel[(S * B * parts,)](
            map_ptrs=tuple(maps), bias_ptrs=contiguous(biases), out_ptr=out, batch=B, elements=C * h * w, h=h, w=w,
            parts=parts, **strides_of(maps), S=S, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out.to(dtype)


def gate_logits(
    maps: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    offsets: Sequence[Tensor],
) -> Tensor:
    """Return the result of `reference.gate_logits`."""
    maps = [readable(m) for m in maps]
    S, (B, C, h, w) = len(maps), maps[0].shape
    out = empty((B, S), maps[0], torch.float32)
    with on_device(out):
        _logits_kernel[(B, S)](
            map_ptrs=tuple(maps), bias_ptrs=contiguous(biases), weight_ptrs=contiguous(weights),
            offset_ptrs=contiguous(offsets), out_ptr=out, elements=C * h * w, h=h, w=w, **strides_of(maps), S=S,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def gated_fusion(
    maps: Tensor, logits: Tensor, cap: Tensor | None, cap_factor: float, temperature: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of `reference.gated_fusion`."""
    dtype, maps, logits = maps.dtype, readable(maps), readable(logits)
    B, S, C, h, w = maps.shape
    parts = -(-C * h * w // BLOCK)
    squares = empty((B, parts), maps, torch.float32)
    fused = empty((B, C, h, w), maps, maps.dtype)
    weights, gain, norm = (empty(size, maps, torch.float32) for size in ((B, S), (B,), (B,)))
    shape = _shape(maps) | {"logits_ptr": logits, "parts_ptr": squares, "temperature": temperature}
    shape |= strides(axes="bs", logits=logits)
    with on_device(maps):
        _norm_kernel[(B * parts,)](**shape)
        _fuse_kernel[(B * parts,)](
            **shape, cap_ptr=squares if cap is None else cap, fused_ptr=fused, weights_ptr=weights, gain_ptr=gain,
            norm_ptr=norm, eps=eps, margin=cap_factor * _margin(dtype), CAPPED=cap is not None,
            PARTS=power_of_two(parts),
        )  # fmt: skip
    return fused.to(dtype), weights, gain, norm


def gated_fusion_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    maps: Tensor,
    logits: Tensor,
    cap: Tensor | None,
    cap_factor: float,
    temperature: float,
    eps: float,
) -> list[Tensor]:
    """Return [dP, dg], the gradients of the stage maps P and of the logits g.

    `grads` contains the gradients of the results of `gated_fusion`.
    """
    _, weights, gain, norm = results
    dtype, maps = maps.dtype, readable(maps)
    dfused, dweights, dgain, dnorm = readable(grads[0]), *(grad.contiguous() for grad in grads[1:])
    B, S, C, h, w = maps.shape
    parts = -(-C * h * w // BLOCK)
    products = empty((B, parts, 2, S), maps, torch.float32)
    dmaps = empty(tuple(maps.shape), maps, maps.dtype)
    dlogits = empty((B, S), maps, torch.float32)
    shape = _shape(maps) | {"weights_ptr": weights, "dfused_ptr": dfused, "parts_ptr": products}
    shape |= strides(axes="bchw", dfused=dfused)
    with on_device(maps):
        _products_kernel[(B * parts,)](**shape)
        _fusion_backward_kernel[(B * parts,)](
            **shape, gain_ptr=gain, norm_ptr=norm, cap_ptr=norm if cap is None else cap, dweights_ptr=dweights,
            dgain_ptr=dgain, dnorm_ptr=dnorm, dmaps_ptr=dmaps, dlogits_ptr=dlogits, temperature=temperature, eps=eps,
            margin=cap_factor * _margin(dtype), CAPPED=cap is not None, PARTS=power_of_two(parts),
        )  # fmt: skip
    return [dmaps.to(dtype), dlogits.to(logits.dtype)]


def gate_losses(weights: Tensor, entropy_floor: float) -> tuple[Tensor, Tensor]:
    """Return the results of `reference.gate_losses`."""
    weights = readable(weights)
    B, S = weights.shape
    entropy, balance = empty((), weights, torch.float32), empty((), weights, torch.float32)
    with on_device(weights):
        _losses_kernel[(1,)](
            weights, entropy, balance, B, *weights.stride(), entropy_floor, S=S, STAGES=power_of_two(S),
            IMAGES=IMAGES, num_warps=1,
        )  # fmt: skip
    return entropy, balance


def gate_losses_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor], weights: Tensor, entropy_floor: float
) -> list[Tensor]:
    """Return [da], the gradient of the weights, from the gradients of both losses."""
    dtype, weights = weights.dtype, readable(weights)
    B, S = weights.shape
    dweights = empty((B, S), weights, weights.dtype)
    with on_device(weights):
        _losses_backward_kernel[(1,)](
            weights, *(grad.contiguous() for grad in grads), dweights, B, *weights.stride(), entropy_floor,
            S=S, STAGES=power_of_two(S), IMAGES=IMAGES, num_warps=1,
        )  # fmt: skip
    return [dweights.to(dtype)]


def _shape(maps: Tensor) -> dict[str, Any]:
    _, S, C, h, w = maps.shape
    elements = {"elements": C * h * w, "h": h, "w": w, "parts": -(-C * h * w // BLOCK)}
    tile = {"S": S, "STAGES": power_of_two(S), "BLOCK": BLOCK, "num_warps": 4}
    return {"maps_ptr": maps, **elements, **strides(maps, axes="bschw"), **tile}


def _margin(dtype: torch.dtype) -> float:
    """Return the factor by which the kernels multiply the gain cap c for maps of `dtype`.

    For bf16 and fp16, the factor is 1 − 2u, where u is the unit roundoff of `dtype`. For other dtypes, the factor is 1.
    Rounding γM to bf16 or fp16 can increase the norm of γM. Because of the factor 1 − 2u, ‖γM‖_F ≤ c also holds after
    rounding.
    """
    return 1 - torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1.0
