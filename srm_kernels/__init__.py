"""Operators of the Spectral Robustness Mixer: landmarks, conditioning, attention, scale, pooling, gate, neck.

Every operator accepts CPU and CUDA tensors, and has an argument `backend`. `backends()` returns which backends can run
on this machine. `python -m srm_kernels verify` checks and times the operators on a GPU. After this command,
`backend=None` uses the fastest implementation that gives correct results on this GPU. `import srm_kernels` needs no
GPU, no Triton and no compiler.
"""

from . import flops
from .attention import (
    AttentionKeywords,
    diagnosed_attention,
    full_attention,
    landmark_side,
    nystrom_attention,
)
from .choice import Explanation, explain
from .conditioning import LandmarkSolution, Solver, landmark_solve
from .dispatch import BackendStatus, backends
from .gate import GatedFusion, GateLosses, biased_gelu, gate_logits, gate_losses, gated_fusion
from .landmarks import ridge_leverage_scores, select_landmarks
from .neck import PooledLinks, merge_links, pooled_links, project_sources, serves_pooled_links
from .pool import adaptive_pool
from .scale import RMSScale, dyt, rms_scale, tau_loss

__all__ = [
    "AttentionKeywords",
    "BackendStatus",
    "Explanation",
    "GateLosses",
    "GatedFusion",
    "LandmarkSolution",
    "PooledLinks",
    "RMSScale",
    "Solver",
    "adaptive_pool",
    "backends",
    "biased_gelu",
    "diagnosed_attention",
    "dyt",
    "explain",
    "flops",
    "full_attention",
    "gate_logits",
    "gate_losses",
    "gated_fusion",
    "landmark_side",
    "landmark_solve",
    "merge_links",
    "nystrom_attention",
    "pooled_links",
    "project_sources",
    "ridge_leverage_scores",
    "rms_scale",
    "select_landmarks",
    "serves_pooled_links",
    "tau_loss",
]
