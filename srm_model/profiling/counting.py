"""Count parameters and multiply-accumulates (MACs) of necks and models.

MACs are counted in three ways: by a formula, by torch and by fvcore. Tests check that the three counts agree. One
multiply-add is one MAC. Only matrix products and convolutions are counted. Counts are for the forward pass of one
image, unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from srm_kernels import flops
from srm_kernels.landmarks import LANDMARK_METHODS
from srm_model.backbones import STRIDES
from srm_model.config import STAGES, SRMConfig
from srm_model.necks import NECKS

CONVENTION = (
    "MAC = 1 multiply-add (2 FLOPs), of matrix products and convolutions only, one image, forward; "
    "normalisations, pooling and element-wise work are not counted"
)
# Operators that fvcore counts although they are not matrix products or convolutions.
_NOT_PRODUCTS = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d batch_norm group_norm instance_norm layer_norm "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d "
    "upsample_bicubic2d upsample_trilinear3d grid_sampler"
).split()


def parameters(module: nn.Module) -> int:
    """Count all parameters of a module, trainable and frozen. Buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def map_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Return the height and width of a backbone's four maps: the image's size divided by each stride, rounded up."""
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]


def neck_macs(
    config: SRMConfig, neck: str, channels: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> dict[str, int]:
    """Compute the MACs of each part of a neck by a closed formula (docs/METHOD.md §2.2).

    - "align": the alignment. In the pooled form, each source map is aligned once. In addition, each link into a fused
      stage aligns its target map, and the P×P map of each fused stage is aligned once. In the unpooled form, each map
      that a link or the gate reads is aligned once.
    - "projections": the products with W_Q, W_K, W_V and W_O of the links into fused stages. The product with W_O is
      computed on the P×P grid.
    - "links": the attention of the links into fused stages, over all heads. In the pooled form, the product with X, the
      solution of the landmark system, is computed on the P×P grid.
    - "gate": the convolutions and the linear layers of the gate.
    """
    C, P2 = config.channels, config.pool_size**2
    tokens = dict(zip(STAGES, (height * width for height, width in sizes), strict=True))
    if NECKS[neck].attention is None:
        return {"align": tokens[STAGES[-1]] * channels[-1] * C, "projections": 0, "links": 0, "gate": 0}
    acting = [(s, t) for s, t in config.links if t in config.fused_stages]
    used = {*config.fused_stages, *(stage for link in config.links for stage in link)}
    hidden = max(C // 4, 1)
    pooled = NECKS[neck].attention == "nystrom" and config.solve_dtype == "fp32" and acting
    if pooled:
        places = [(tokens[s], s) for s in {source for source, _ in config.links}]
        places += [*((tokens[t], t) for _, t in acting), *((P2, stage) for stage in config.fused_stages)]
    else:
        places = [(tokens[stage], stage) for stage in used]
    return {
        "align": sum(count * channels[stage - 1] * C for count, stage in places),
        "projections": sum((tokens[t] + 2 * tokens[s] + P2) * C * C for s, t in acting),
        "links": sum(
            link_macs(config, neck, tokens[t], tokens[s], P2 if pooled else None) for s, t in acting
        ),
        "gate": len(config.fused_stages) * (9 * P2 * hidden * (C + hidden) + hidden),
    }


def link_macs(config: SRMConfig, neck: str, queries: int, keys: int, cells: int | None = None) -> int:
    """Compute the MACs of the attention of one link over all heads, without projections.

    If the link runs in the pooled form (docs/METHOD.md §1.5), `cells` is the number of cells of the P×P grid. Otherwise
    it is None.
    """
    d, H = config.head_dim, config.heads
    if neck == "quadratic":
        return H * 2 * queries * keys * d
    rank = min(config.rank, keys)
    choice = LANDMARK_METHODS[config.landmarks].macs(rank, keys, d)
    saved = 0 if cells is None else (queries - cells) * rank * d
    return H * (flops.attention_macs(queries, keys, rank, d) - saved + choice)


def torch_macs(module: nn.Module, inputs: Sequence[Any], *, backward: bool = False) -> int:
    """Count MACs with torch's FlopCounterMode. Module and inputs may be on the meta device.

    With `backward`, the count includes a backward pass. Its loss is the sum of all elements of the results that require
    a gradient.
    """
    with FlopCounterMode(display=False) as counter:
        result = module(*inputs)
        if backward:
            _total(result).backward()
    return counter.get_total_flops() // 2


def fvcore_macs(module: nn.Module, inputs: Sequence[Any]) -> int | None:
    """Count MACs with fvcore, which traces the module; return None if fvcore is not installed."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        return None
    analysis = FlopCountAnalysis(module, tuple(inputs))
    for name, handle in flops.fvcore_handles().items():
        analysis.set_op_handle(name, handle)
    for name in _NOT_PRODUCTS:
        analysis.set_op_handle(f"aten::{name}", lambda inputs, outputs: 0)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_handle)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        return int(analysis.total())


def _attention_handle(inputs: list[Any], outputs: list[Any]) -> int:
    *lead, queries, d = inputs[0].type().sizes()
    keys, width = inputs[2].type().sizes()[-2:]
    heads = 1
    for size in lead:
        heads *= size
    return heads * queries * keys * (d + width)


def _total(result: Any) -> Tensor:
    """Return the sum over all elements of the tensors in `result` that require a gradient."""
    if isinstance(result, Tensor):
        return result.float().sum() if result.requires_grad else result.new_zeros(())
    values = result.values() if isinstance(result, dict) else result or ()
    total: Any = 0
    for value in values:
        if value is not None:
            total = total + _total(value)
    return total
