"""A link: projections, attention, and the rescaler τ with its statistic σ̄ (docs/METHOD.md §1.2, §1.3 and §3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from srm_kernels import (
    LandmarkSolution,
    diagnosed_attention,
    dyt,
    full_attention,
    nystrom_attention,
    select_landmarks,
)
from srm_kernels.attention.reference import normalised_key
from srm_kernels.landmarks import LANDMARK_METHODS, METHODS_OF_KERNELS
from srm_model.config import SRMConfig


class DyT(nn.Module):
    """Dynamic tanh of x (…, C): w ⊙ tanh(αx) + b, elementwise (docs/METHOD.md §3.4)."""

    def __init__(self, channels: int, alpha: float, backend: str | None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.backend = backend

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters α, w and b."""
        return self.alpha, self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return dyt(x, self.alpha, self.weight, self.bias, backend=self.backend)


class Link(nn.Module):
    """Cross-attention of a target stage's queries to a source stage's keys (docs/METHOD.md §1.2, §1.3 and §3)."""

    sigma: Tensor
    sigma_started: Tensor

    def __init__(self, config: SRMConfig, attention: str) -> None:
        super().__init__()
        self.config, self.attention = config, attention
        C = config.channels
        if config.dyt:
            self.dyt_query = DyT(C, config.dyt_alpha, config.backend)
            self.dyt_key = DyT(C, config.dyt_alpha, config.backend)
        self.query, self.key, self.value, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        if config.tau:
            self.theta = nn.Parameter(torch.zeros(config.heads))
        self.register_buffer("sigma", torch.zeros(config.heads))  # σ̄, the EMA of σ
        # 0 before σ̄ is initialised, then 1. The buffer is not a bool, because a moving average of the model averages
        # buffers too. If the moving average starts before σ̄ is initialised, its `sigma_started` is between 0 and 1.
        self.register_buffer("sigma_started", torch.zeros(()))

    @property
    def reference_scale(self) -> float:
        """σ_ref = √d."""
        return math.sqrt(self.config.head_dim)

    def project(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project maps (B, C, h, w) to Q (B, H, N_q, d) and K, V (B, H, N_k, d)."""
        tokens_t, tokens_s = target.flatten(2).mT, source.flatten(2).mT  # (B, N, C)
        if self.config.dyt:
            tokens_t, tokens_s = self.dyt_query(tokens_t), self.dyt_key(tokens_s)
        projected = self.query(tokens_t), self.key(tokens_s), self.value(tokens_s)
        q, k, v = (
            t.unflatten(-1, (self.config.heads, self.config.head_dim)).transpose(1, 2) for t in projected
        )
        return q, k, v

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Compute Y (B, H, N_q, d) from the maps (B, C, h, w) of the two stages."""
        return self.attend(*self.project(target, source))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute Y (B, H, N_q, d) from Q, K and V."""
        c = self.config
        if self.attention == "full":
            return full_attention(q, k, v, qk_norm=c.qk_norm)
        return nystrom_attention(q, k, v, c.rank, solve_dtype=c.solve_dtype, **self.key_options())

    def diagnosed(self, q: Tensor, k: Tensor, v: Tensor, **changes: Any) -> tuple[Tensor, LandmarkSolution]:
        """Return Y of Nyström attention, and diagnostics of its landmark systems. `changes` overrides config fields."""
        c = self.config.replace(**changes) if changes else self.config
        return diagnosed_attention(q, k, v, c.rank, solve_dtype=c.solve_dtype, **self.key_options(c))

    def key_options(self, config: SRMConfig | None = None) -> dict[str, Any]:
        """Return the operators' keyword arguments for landmarks, solver, normalisation and backend."""
        c = config or self.config
        return {
            **self._choice(c),
            "ridge": c.ridge,
            "solver": c.solver,
            "equilibrate": c.equilibrate,
            "kappa_max": c.kappa_max,
            "neumann_order": c.neumann_order,
            "neumann_gate": c.neumann_gate,
            "qk_norm": c.qk_norm,
            "backend": c.backend,
        }

    def landmarks(self, k: Tensor, **changes: Any) -> Tensor:
        """Return indices (B, H, r) of the landmarks among keys K (B, H, N_k, d). `changes` overrides config fields."""
        c = self.config.replace(**changes) if changes else self.config
        options, backend = self._choice(c), c.backend
        if backend == "triton" and options["method"] not in METHODS_OF_KERNELS:
            backend = "reference"  # as `nystrom_attention` does
        return select_landmarks(normalised_key(k, c.qk_norm), c.rank, backend=backend, **options)

    def _choice(self, c: SRMConfig) -> dict[str, Any]:
        """Return the operators' keyword arguments for landmarks.

        In evaluation mode, a method that is meant for training only is replaced by its `LandmarkMethod.evaluated`. For
        example, "leverage" replaces "leverage_sample".
        """
        method, evaluated, generator = c.landmarks, LANDMARK_METHODS[c.landmarks].evaluated, None
        if evaluated is not None:
            if self.training:
                generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
            else:
                method = evaluated
        return {"method": method, "gamma": c.gamma, "generator": generator}

    def attended(self, k: Tensor) -> Tensor:
        """Return the normalised keys that queries attend to: the landmarks K̃, or all keys for exact attention."""
        K = normalised_key(k, self.config.qk_norm)
        if self.attention == "full":
            return K
        index = self.landmarks(k)
        return K.gather(-2, index[..., None].expand(*index.shape, K.shape[-1]))

    def merge(self, y: Tensor) -> Tensor:
        """Compute U (B, N, C) from Y (B, H, N, d): Ŷ = τY, concatenate the heads, multiply by W_O. Y may be pooled."""
        if self.config.tau:
            y = (y * self.tau()[:, None, None]).to(y.dtype)
        return self.output(y.transpose(1, 2).flatten(2))

    def tau(self) -> Tensor:
        """Return τ_h = exp(θ_h), (H,), or ones if the rescaler is disabled."""
        return self.theta.exp() if self.config.tau else torch.ones_like(self.sigma)

    @torch.no_grad()
    def tracked(self, sigma: Tensor) -> Tensor:
        """Return the updated σ̄, given a batch's σ (H,). Values of σ that are not finite are ignored."""
        sigma = sigma.to(self.sigma.dtype)
        averaged = self.sigma.lerp(sigma, 1 - self.config.ema * self.sigma_started)
        return torch.where(sigma.isfinite(), averaged, self.sigma)

    @torch.no_grad()
    def track(self, sigma: Tensor) -> None:
        """Update σ̄ with a batch's σ (H,)."""
        self.sigma.copy_(self.tracked(sigma))
        self.sigma_started.logical_or_(sigma.isfinite().all())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(started := state_dict.get(f"{prefix}sigma_started"), Tensor):
            state_dict[f"{prefix}sigma_started"] = started.to(self.sigma_started.dtype)  # earlier: a bool
        super()._load_from_state_dict(state_dict, prefix, *args)


def logits(Q: Tensor, K: Tensor) -> Tensor:
    """Return the logits Q Kᵀ s of queries and keys that are already normalised.

    K is either the r landmarks or all N_k keys, so the result is (B, H, N_q, r) or (B, H, N_q, N_k).
    """
    return Q @ K.mT / math.sqrt(Q.shape[-1])


def link_name(source: int, target: int) -> str:
    """Return the name of a link in the neck's state dict."""
    return f"{source}to{target}"
