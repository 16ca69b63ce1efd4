"""Operators of the Spectral Robustness Mixer: landmarks, conditioning, attention, scale, pooling, gate, neck.

Every operator takes CPU or CUDA tensors and `backend=None`. `backends()` says which implementations can run;
`python -m srm_kernels verify` measures them on a GPU, and from then on `backend=None` takes the fastest right one.
Importing needs neither a GPU, nor Triton, nor a compiler.
"""

from . import flops
from .attention import full_attention, landmark_side, nystrom_attention
from .choice import Explanation, explain
from .conditioning import LandmarkSolution, Solver, landmark_solve
from .gate import GatedFusion, GateLosses, biased_gelu, gate_logits, gate_losses, gated_fusion
from .landmarks import ridge_leverage_scores, select_landmarks
from .neck import PooledLinks, merge_links, pooled_links, project_sources, serves_pooled_links
from .pool import adaptive_pool
from .runtime import BackendStatus, backends
from .scale import RMSScale, dyt, rms_scale, tau_loss

__all__ = [
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
