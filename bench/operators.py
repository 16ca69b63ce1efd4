"""Make inputs of several sizes for every operator, so that it can be timed, and check its results on these inputs.

`bench.worker` uses this module with the `srm_kernels` of another checkout, to time its operators. Therefore this module
imports only torch and `srm_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import srm_kernels as ops

DIRECTIONS = ("forward", "backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Family(NamedTuple):
    """Sizes of one link: B, H, N_q, N_k, r and d."""

    batch: int
    heads: int
    queries: int
    keys: int
    rank: int
    d: int


FAMILIES = {
    "tiny": Family(1, 2, 64, 16, 4, 8),  # for tests
    "stage 3": Family(1, 8, 1_024, 256, 64, 32),  # stages of a 512² image
    "stage 2": Family(1, 8, 4_096, 256, 64, 32),
    "stage 1": Family(1, 8, 16_384, 256, 64, 32),
    "stage 1, batch 8": Family(8, 8, 16_384, 256, 64, 32),
    "many keys": Family(1, 8, 16_384, 4_096, 64, 32),
    "wide heads": Family(1, 4, 4_096, 1_024, 64, 64),
    "few landmarks": Family(1, 8, 16_384, 256, 16, 32),
}


class NumericsError(AssertionError):
    """An operator is not timed, because the error of a result is larger than `Timed.verify` accepts.

    `bench.compare` also raises this error if an operator cannot run.
    """


class Operator(NamedTuple):
    """How an operator is called.

    Attributes:
        inputs: Function (family, generator) → inputs in float64 on the CPU.
        run: Function (inputs, backend, family) → results. They are floating-point tensors, except for
            `select_landmarks`, which returns indices.
        gradients: Indices of the inputs that are differentiated; empty for an operator without a derivative.
    """

    inputs: Callable[[Family, torch.Generator], list[Tensor]]
    run: Callable[[Sequence[Tensor], str, Family], Sequence[Tensor]]
    gradients: tuple[int, ...]


def _normal(make: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes]


def _tokens(family: Family, make: torch.Generator, *counts: int) -> list[Tensor]:
    return _normal(make, *((family.batch, family.heads, count, family.d) for count in counts))


def _attention_inputs(family: Family, make: torch.Generator) -> list[Tensor]:
    return _tokens(family, make, family.queries, family.keys, family.keys)


def _unit(key: Tensor) -> Tensor:
    return key * key.shape[-1] ** 0.5 / (key.norm(dim=-1, keepdim=True) + 1e-6)


def _systems(family: Family, make: torch.Generator) -> list[Tensor]:
    keys, rhs = _tokens(family, make, family.rank, family.rank)
    keys = _unit(keys)
    return [keys @ keys.mT / family.d**0.5, rhs]


def _maps(family: Family, make: torch.Generator) -> list[Tensor]:
    """Return random maps of three stages, pooled to 8 × 8, and random logits of the gate."""
    return _normal(make, (family.batch, 3, family.heads * family.d, 8, 8), (family.batch, 3))


def _gate_inputs(family: Family, make: torch.Generator) -> list[Tensor]:
    """Return random inputs of `biased_gelu` and `gate_logits`.

    They are the output and the bias of a convolution, and the weight and the bias of the stage's linear layer.
    """
    C = max(family.heads * family.d // 4, 1)
    return _normal(make, (family.batch, C, 8, 8), (C,), (1, C), (1,))


def _dyt_inputs(family: Family, make: torch.Generator) -> list[Tensor]:
    C = family.heads * family.d
    return _normal(make, (family.batch, family.queries, C), (1,), (C,), (C,))


def _first_keys(key: Tensor, rank: int) -> Tensor:
    """Return the indices of the first keys. Unlike a choice by scores, these indices do not depend on rounding."""
    rank = min(rank, key.shape[2])
    return torch.arange(rank, device=key.device).expand(*key.shape[:2], rank)


def _link_inputs(family: Family, make: torch.Generator) -> list[Tensor]:
    """Return random values for F, A, a (the bias of A), W_Q and X of one link."""
    C, width, side = family.heads * family.d, 64, round(family.queries**0.5)
    made = _normal(make, (family.batch, width, side, side), (C, width), (C,), (C, C))
    made[1] /= width**0.5
    made[3] /= C**0.5
    return [*made, _unit(_tokens(family, make, family.rank)[0])]


def _source_inputs(family: Family, make: torch.Generator) -> list[Tensor]:
    """Return random values for T of a source, then W_K of two links, then W_V of the same two links."""
    C = family.heads * family.d
    tokens, *weights = _normal(make, (family.batch, family.keys, C), *[(C, C)] * 4)
    return [tokens, *(weight / C**0.5 for weight in weights)]


def _merge_inputs(family: Family, make: torch.Generator) -> list[Tensor]:
    """Return random values for P̄, pool(F), X, A, a (the bias of A), W_O, β and θ of one link."""
    B, H, r, d = family.batch, family.heads, family.rank, family.d
    C, width, cells = H * d, 64, 64
    weights = ((C, width), (C,), (C, C), (1,), (H,))
    made = _normal(make, (1, B, H, cells, r), (B, cells, width), (B, H, r, d), *weights)
    made[0] = made[0].softmax(-1)
    made[3] /= width**0.5
    made[5] /= C**0.5
    return made


def _merge(x: Sequence[Tensor], backend: str, family: Family) -> list[Tensor]:
    links, xs = ops.PooledLinks(_wide(x[0]), x[1], None), [_wide(x[2])]
    return [ops.merge_links(links, xs, [(x[3], x[4])], [x[5]], [0], [x[6]], thetas=[x[7]], backend=backend)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


OPERATORS = {
    "nystrom_attention": Operator(
        _attention_inputs,
        lambda x, backend, family: [ops.nystrom_attention(*x, family.rank, qk_norm="keys", backend=backend)],
        (0, 1, 2),
    ),
    "full_attention": Operator(
        _attention_inputs,
        lambda x, backend, family: [ops.full_attention(*x, qk_norm="keys", backend=backend)],
        (0, 1, 2),
    ),
    "select_landmarks": Operator(
        lambda family, make: [_unit(_tokens(family, make, family.keys)[0])],
        lambda x, backend, family: [ops.select_landmarks(x[0], family.rank, backend=backend)],
        (),
    ),
    "ridge_leverage_scores": Operator(
        lambda family, make: _tokens(family, make, family.keys),
        lambda x, backend, family: [ops.ridge_leverage_scores(x[0], backend=backend)],
        (0,),
    ),
    "landmark_solve": Operator(
        _systems,
        lambda x, backend, family: [ops.landmark_solve(*x, backend=backend).x],
        (0, 1),
    ),
    "landmark_side": Operator(
        lambda family, make: _tokens(family, make, family.keys, family.keys),
        lambda x, backend, family: list(
            ops.landmark_side(
                *x,
                min(family.rank, family.keys),
                landmarks=_first_keys(x[0], family.rank),
                qk_norm="keys",
                backend=backend,
            )
        ),
        (0, 1),
    ),
    "project_sources": Operator(
        _source_inputs,
        lambda x, backend, family: list(ops.project_sources(x[0], x[1:3], x[3:5], backend=backend)),
        (0, 1, 2, 3, 4),
    ),
    "pooled_links": Operator(
        _link_inputs,
        lambda x, backend, family: list(
            ops.pooled_links(
                [x[0]], [(x[1], x[2])], [x[3]], [_wide(x[4])], [0], size=8, qk_norm="keys", backend=backend
            )[:2]
        ),
        (0, 1, 2, 3, 4),
    ),
    "merge_links": Operator(
        _merge_inputs,
        _merge,
        (0, 1, 2, 3, 4, 5, 6, 7),
    ),
    "tau_loss": Operator(
        lambda family, make: [
            torch.rand(family.heads, generator=make, dtype=torch.float64) + 0.5 for _ in range(2)
        ],
        lambda x, backend, family: [ops.tau_loss([x[0]], [x[1]], reference=family.d**0.5, backend=backend)],
        (0,),
    ),
    "adaptive_pool": Operator(
        lambda family, make: [_link_inputs(family, make)[0]],
        lambda x, backend, family: [ops.adaptive_pool(x[0], 8, backend=backend)],
        (0,),
    ),
    "rms_scale": Operator(
        lambda family, make: _tokens(family, make, family.queries),
        lambda x, backend, family: list(ops.rms_scale(x[0], backend=backend)),
        (0,),
    ),
    "dyt": Operator(
        _dyt_inputs,
        lambda x, backend, family: [ops.dyt(*x, backend=backend)],
        (0, 1, 2, 3),
    ),
    "biased_gelu": Operator(
        _gate_inputs,
        lambda x, backend, family: [ops.biased_gelu([x[0]] * 3, [x[1]] * 3, backend=backend)],
        (0, 1),
    ),
    "gate_logits": Operator(
        _gate_inputs,
        lambda x, backend, family: [
            ops.gate_logits([x[0]] * 3, [x[1]] * 3, [(x[2], x[3])] * 3, backend=backend)
        ],
        (0, 1, 2, 3),
    ),
    "gated_fusion": Operator(
        _maps,
        lambda x, backend, family: list(ops.gated_fusion(*x, cap=10.0, backend=backend)),
        (0, 1),
    ),
    "gate_losses": Operator(
        lambda family, make: [_maps(family, make)[1].softmax(-1)],
        lambda x, backend, family: list(ops.gate_losses(x[0], entropy_floor=1.0, backend=backend)),
        (0,),
    ),
}


class Timed:
    """An operator with inputs, ready to be timed and verified.

    Args:
        operator: A name of `OPERATORS`.
        family: Sizes of the inputs.
        backend: Implementation to time.
        direction: "forward" times the forward pass, "backward" times forward and backward passes together.
        dtype: A name of `DTYPES`.
        device: Device of the inputs.

    Raises:
        NotImplementedError: The operator has no derivative, and the direction is "backward".
    """

    def __init__(
        self, operator: str, family: Family, backend: str, direction: str, dtype: str, device: str
    ) -> None:
        self.name, self.operator, self.family = operator, OPERATORS[operator], family
        self.backend, self.direction = backend, direction
        made = self.operator.inputs(family, torch.Generator().manual_seed(0))
        self.inputs = [x.to(device, DTYPES[dtype]) for x in made]
        if direction != "forward" and not self.operator.gradients:
            raise NotImplementedError(f"{operator} has no derivative")

    def call(self) -> Sequence[Tensor]:
        """Run the operator once; return its results ("forward") or the gradients of inputs ("backward")."""
        return self._by(self.backend, self.inputs)

    def _by(self, backend: str, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.direction == "forward":
            with torch.no_grad():
                return self.operator.run(inputs, backend, self.family)
        wanted = self.operator.gradients
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        results = self.operator.run(leaves, backend, self.family)
        total = sum((r.double() if r.dtype == torch.float64 else r.float()).square().sum() for r in results)
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, [leaves[i] for i in wanted])

    def verify(self) -> float:
        """Check the results of `call`, and return their largest relative error.

        Each result is compared with the result of the backend "reference" in float64. The relative error is the norm of
        the difference, divided by the norm of the float64 result. The largest accepted error is twice the error of the
        backend "reference" in the dtype of the inputs, plus 8 eps of the dtype of the result. The second term is needed
        because the error of the backend "reference" can be zero by chance. The result of `select_landmarks` has no
        relative error, because it consists of indices. `_verify_landmarks` therefore checks the scores of the chosen
        keys instead.

        Raises:
            NumericsError: An error is larger than accepted.
        """
        found = self.call()
        if self.name == "select_landmarks":
            return self._verify_landmarks(found[0])
        plain = self._by("reference", self.inputs)
        truth = self._by("reference", [x.double() for x in self.inputs])
        worst = 0.0
        for index, (one, two, true) in enumerate(zip(found, plain, truth, strict=True)):
            size = float(true.norm()) + 1e-300
            error, usual = (float((x.double() - true).norm()) / size for x in (one, two))
            allowed = 2 * usual + 8 * torch.finfo(one.dtype).eps
            if not error <= allowed:
                raise NumericsError(
                    f"{self.name} by {self.backend}, {self.direction}, result {index}: relative error {error:.2g} "
                    f"where at most {allowed:.2g} is accepted; it is not timed"
                )
            worst = max(worst, error)
        return worst

    def _verify_landmarks(self, chosen: Tensor) -> float:
        """Check that the r chosen keys are distinct and have the r best scores, up to rounding.

        The scores are the ridge leverage scores that the backend "reference" computes in float64. For each head of each
        batch element, the lowest score of the chosen keys is subtracted from the r-th best score of all keys. Return
        the largest difference, or 0 if it is negative.
        """
        key = self.inputs[0]
        truth = ops.ridge_leverage_scores(key.double(), backend="reference")
        rounding = (ops.ridge_leverage_scores(key, backend="reference").double() - truth).abs().max()
        least = truth.topk(chosen.shape[-1]).values[..., -1:]
        short = float((least - truth.gather(-1, chosen)).max())
        distinct = bool((chosen.sort(-1).values.diff(dim=-1) > 0).all())
        if not distinct or not short <= 2 * float(rounding):
            raise NumericsError(
                f"{self.name} by {self.backend}: a landmark is {short:.2g} short of the r-th best score where "
                f"at most {2 * float(rounding):.2g} is accepted, or chosen twice; it is not timed"
            )
        return max(short, 0.0)
