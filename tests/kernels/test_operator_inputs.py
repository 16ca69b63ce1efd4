"""Test the argument checks of the operators.

Invalid values and shapes raise ValueError, and invalid types raise TypeError. The message is one sentence that says
what was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import (
    adaptive_pool,
    biased_gelu,
    dyt,
    full_attention,
    gate_logits,
    gate_losses,
    gated_fusion,
    landmark_solve,
    nystrom_attention,
    ridge_leverage_scores,
    rms_scale,
    select_landmarks,
)


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tokens(0, *shape, dtype=dtype)


Q, K = t(2, 3, 5, 8), t(2, 3, 4, 8)
LOGITS, RHS = torch.eye(4).expand(2, 4, 4), t(2, 4, 3)
MAPS, GATE = t(2, 3, 4, 2, 2), t(2, 3)
ONE, CH = torch.tensor(1.0), torch.ones(8)
STAGES, READOUTS = ([MAPS[0]] * 2, [CH[:4]] * 2), [(t(1, 4), t(1))] * 2


def nystrom(q: Any = Q, k: Any = K, v: Any = K, rank: Any = 2, **kw: Any) -> object:
    return nystrom_attention(q, k, v, rank, **kw)


BAD: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    # attention
    "query of 3 dimensions": (ValueError, lambda: nystrom(q=Q[0])),
    "key of 3 dimensions": (ValueError, lambda: nystrom(k=K[0])),
    "value of 5 dimensions": (ValueError, lambda: nystrom(v=K[None])),
    "another batch": (ValueError, lambda: nystrom(q=Q[:1])),
    "other heads": (ValueError, lambda: nystrom(q=Q[:, :2])),
    "another width": (ValueError, lambda: nystrom(q=Q[..., :4])),
    "value of another width": (ValueError, lambda: nystrom(v=K[..., :4])),
    "value of another length": (ValueError, lambda: nystrom(v=K[:, :, :3])),
    "integer query": (TypeError, lambda: nystrom(q=Q.int())),
    "mixed dtypes": (TypeError, lambda: nystrom(q=Q.half())),
    "mixed value dtype": (TypeError, lambda: nystrom(v=K.double())),
    "complex": (TypeError, lambda: nystrom(q=Q.cfloat(), k=K.cfloat(), v=K.cfloat())),
    "no tensor": (TypeError, lambda: nystrom(q=Q.tolist())),
    "mixed devices": ((ValueError, TypeError), lambda: nystrom(q=Q.to("meta"))),  # type: ignore[dict-item]
    "rank 0": (ValueError, lambda: nystrom(rank=0)),
    "negative rank": (ValueError, lambda: nystrom(rank=-3)),
    "fractional rank": (TypeError, lambda: nystrom(rank=2.5)),
    "empty batch": (ValueError, lambda: nystrom(q=Q[:0], k=K[:0], v=K[:0])),
    "no keys": (ValueError, lambda: nystrom(k=K[:, :, :0], v=K[:, :, :0])),
    "no queries": (ValueError, lambda: nystrom(q=Q[:, :, :0])),
    "no heads": (ValueError, lambda: nystrom(q=Q[:, :0], k=K[:, :0], v=K[:, :0])),
    "no width": (ValueError, lambda: nystrom(q=Q[..., :0], k=K[..., :0], v=K[..., :0])),
    "unknown method": (ValueError, lambda: nystrom(method="random")),
    "unknown solver": (ValueError, lambda: nystrom(solver="qr")),
    "unknown qk_norm": (ValueError, lambda: nystrom(qk_norm="queries")),
    "unknown solve_dtype": (ValueError, lambda: nystrom(solve_dtype="fp8")),
    "negative ridge": (ValueError, lambda: nystrom(ridge=-1e-3)),
    "no ridge for cholesky": (ValueError, lambda: nystrom(ridge=0.0)),
    "nan ridge": (ValueError, lambda: nystrom(ridge=float("nan"))),
    "gamma 0": (ValueError, lambda: nystrom(gamma=0.0)),
    "landmarks of another rank": (
        ValueError,
        lambda: nystrom(landmarks=torch.zeros(2, 3, 3, dtype=torch.int64)),
    ),
    "landmarks of another batch": (
        ValueError,
        lambda: nystrom(landmarks=torch.zeros(1, 3, 2, dtype=torch.int64)),
    ),
    "landmarks of 2 dimensions": (
        ValueError,
        lambda: nystrom(landmarks=torch.zeros(3, 2, dtype=torch.int64)),
    ),
    "landmarks that are no indices": (TypeError, lambda: nystrom(landmarks=torch.zeros(2, 3, 2))),
    "full: mixed dtypes": (TypeError, lambda: full_attention(Q, K.half(), K)),
    "full: integers": (TypeError, lambda: full_attention(Q.int(), K.int(), K.int())),
    "full: 3 dimensions": (ValueError, lambda: full_attention(Q[0], K[0], K[0])),
    "full: lengths differ": (ValueError, lambda: full_attention(Q, K, K[:, :, :2])),
    "full: heads differ": (ValueError, lambda: full_attention(Q, K[:, :1], K[:, :1])),
    "full: empty batch": (ValueError, lambda: full_attention(Q[:0], K[:0], K[:0])),
    "full: unknown qk_norm": (ValueError, lambda: full_attention(Q, K, K, qk_norm="l2")),
    "nan scale": (ValueError, lambda: nystrom(scale=float("nan"))),
    "landmarks out of range": (ValueError, lambda: nystrom(landmarks=torch.full((2, 3, 2), 4))),
    "full: nan scale": (ValueError, lambda: full_attention(Q, K, K, scale=float("nan"))),
    # landmarks
    "select: 3 dimensions": (ValueError, lambda: select_landmarks(K[0], 2)),
    "select: integers": (TypeError, lambda: select_landmarks(K.long(), 2)),
    "select: rank 0": (ValueError, lambda: select_landmarks(K, 0)),
    "select: unknown method": (ValueError, lambda: select_landmarks(K, 2, method="top")),
    "select: empty batch": (ValueError, lambda: select_landmarks(K[:0], 2)),
    "select: negative gamma": (ValueError, lambda: select_landmarks(K, 2, gamma=-1.0)),
    "select: a seed for a generator": (
        TypeError,
        lambda: select_landmarks(K, 2, method="kmeans++", generator=3),
    ),  # type: ignore[arg-type]
    "scores: 2 dimensions": (ValueError, lambda: ridge_leverage_scores(K[0, 0])),
    "scores: booleans": (TypeError, lambda: ridge_leverage_scores(K > 0)),
    "scores: gamma 0": (ValueError, lambda: ridge_leverage_scores(K, gamma=0.0)),
    "scores: empty": (ValueError, lambda: ridge_leverage_scores(K[:, :, :0])),
    # solve
    "solve: not square": (ValueError, lambda: landmark_solve(LOGITS[:, :3], RHS)),
    "solve: another rank": (ValueError, lambda: landmark_solve(LOGITS, RHS[:, :3])),
    "solve: another batch": (ValueError, lambda: landmark_solve(LOGITS, RHS[:1])),
    "solve: one dimension": (ValueError, lambda: landmark_solve(LOGITS[0, 0], RHS[0, 0])),
    "solve: mixed dtypes": (TypeError, lambda: landmark_solve(LOGITS, RHS.double())),
    "solve: integers": (TypeError, lambda: landmark_solve(LOGITS.int(), RHS.int())),
    "solve: unknown solver": (ValueError, lambda: landmark_solve(LOGITS, RHS, solver="inverse")),
    "solve: no ridge": (ValueError, lambda: landmark_solve(LOGITS, RHS, ridge=0.0)),
    "solve: kappa_max 0": (ValueError, lambda: landmark_solve(LOGITS, RHS, solver="auto", kappa_max=0.0)),
    "solve: neumann order": (
        ValueError,
        lambda: landmark_solve(LOGITS, RHS, solver="neumann", neumann_order=-1),
    ),
    "solve: fractional order": (
        TypeError,
        lambda: landmark_solve(LOGITS, RHS, solver="neumann", neumann_order=2.5),  # type: ignore[arg-type]
    ),
    "solve: a word for a switch": (TypeError, lambda: landmark_solve(LOGITS, RHS, equilibrate="no")),  # type: ignore[arg-type]
    "solve: empty": (ValueError, lambda: landmark_solve(LOGITS[:0], RHS[:0])),
    # scale
    "rms: 3 dimensions": (ValueError, lambda: rms_scale(Q[0])),
    "rms: integers": (TypeError, lambda: rms_scale(Q.int())),
    "rms: empty": (ValueError, lambda: rms_scale(Q[:0])),
    "dyt: integers": (TypeError, lambda: dyt(Q.int(), ONE, CH, CH)),
    "dyt: weight of another width": (ValueError, lambda: dyt(Q, ONE, CH[:4], CH)),
    "dyt: bias of another width": (ValueError, lambda: dyt(Q, ONE, CH, CH[:4])),
    "dyt: weight for a width of one": (ValueError, lambda: dyt(Q, ONE, CH[:1], CH[:1])),
    "dyt: alpha per channel": (ValueError, lambda: dyt(Q, CH, CH, CH)),
    # gate
    "gelu: no stage": (ValueError, lambda: biased_gelu([], [])),
    "gelu: 3 dimensions": (ValueError, lambda: biased_gelu([MAPS[0, 0]], [CH[:4]])),
    "gelu: maps of two shapes": (ValueError, lambda: biased_gelu([MAPS[0], MAPS[0, :1]], [CH[:4]] * 2)),
    "gelu: a bias for two maps": (ValueError, lambda: biased_gelu([MAPS[0]] * 2, [CH[:4]])),
    "gelu: bias of another width": (ValueError, lambda: biased_gelu([MAPS[0]], [CH[:1]])),
    "gelu: a narrower bias": (TypeError, lambda: biased_gelu([MAPS[0]], [CH[:4].half()])),
    "logits: a readout for two maps": (ValueError, lambda: gate_logits(*STAGES, READOUTS[:1])),
    "logits: a readout of two rows": (
        ValueError,
        lambda: gate_logits(*STAGES, [(READOUTS[0][0].expand(2, -1), READOUTS[0][1])] * 2),
    ),
    "logits: two offsets": (
        ValueError,
        lambda: gate_logits(*STAGES, [(READOUTS[0][0], READOUTS[0][1].expand(2))] * 2),
    ),
    "fusion: cap factor 0": (ValueError, lambda: gated_fusion(MAPS, GATE, cap=1.0, cap_factor=0.0)),
    "fusion: 4 dimensions": (ValueError, lambda: gated_fusion(MAPS[0], GATE, cap=1.0)),
    "fusion: other stages": (ValueError, lambda: gated_fusion(MAPS, GATE[:, :2], cap=1.0)),
    "fusion: another batch": (ValueError, lambda: gated_fusion(MAPS, GATE[:1], cap=1.0)),
    "fusion: integers": (TypeError, lambda: gated_fusion(MAPS.int(), GATE, cap=1.0)),
    "fusion: negative cap": (ValueError, lambda: gated_fusion(MAPS, GATE, cap=-1.0)),
    "fusion: nan cap": (ValueError, lambda: gated_fusion(MAPS, GATE, cap=float("nan"))),
    "fusion: temperature 0": (ValueError, lambda: gated_fusion(MAPS, GATE, cap=1.0, temperature=0.0)),
    "fusion: empty batch": (ValueError, lambda: gated_fusion(MAPS[:0], GATE[:0], cap=1.0)),
    "losses: one dimension": (ValueError, lambda: gate_losses(GATE[0], entropy_floor=0.5)),
    "losses: integers": (TypeError, lambda: gate_losses(GATE.int(), entropy_floor=0.5)),
    "losses: empty batch": (ValueError, lambda: gate_losses(GATE[:0], entropy_floor=0.5)),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(name):
    kind, call = BAD[name]
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert 15 < len(message) < 300
    assert "\n" not in message


def test_the_sentence_says_what_was_given_and_what_is_accepted():
    for call, words in (
        (lambda: nystrom(method="random"), ("random", "leverage", "uniform")),
        (lambda: nystrom(solver="qr"), ("qr", "cholesky", "svd")),
        (lambda: nystrom(qk_norm="queries"), ("queries", "keys", "both")),
        (lambda: nystrom(q=Q[0]), ("query", "(3, 5, 8)")),
        (lambda: nystrom(q=Q.half()), ("float16", "float32")),
        (lambda: nystrom(rank=0), ("rank", "0")),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        for word in words:
            assert word in str(caught.value), (word, str(caught.value))


@pytest.mark.parametrize("name", ["rank 0", "mixed dtypes", "another width", "unknown solver"])
def test_errors_survive_compile_time_checks(name):
    """Meta tensors are checked too, so torch.export and torch.compile raise the same errors as an eager call."""
    meta = {"q": Q.to("meta"), "k": K.to("meta"), "v": K.to("meta")}
    change: dict[str, Any] = {
        "rank 0": {"rank": 0},
        "mixed dtypes": {"q": Q.half().to("meta")},
        "another width": {"q": Q[..., :4].to("meta")},
        "unknown solver": {"solver": "qr"},
    }[name]
    with pytest.raises(BAD[name][0]):
        nystrom(**(meta | change))


def test_numpys_numbers_are_numbers():
    q, k, v = (torch.randn(1, 2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (6, 8, 8))
    given = {
        "rank": np.int64(3),
        "gamma": np.float32(0.5),
        "ridge": np.float32(0.25),
        "scale": np.float32(0.5),
    }
    plain = {"rank": 3, "gamma": 0.5, "ridge": 0.25, "scale": 0.5}
    for order, options in ((np.int16(2), given), (2, plain)):
        options |= {"neumann_order": order, "solver": "neumann"}
    assert torch.equal(nystrom_attention(q, k, v, **given), nystrom_attention(q, k, v, **plain))
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(adaptive_pool(x, np.uint8(2)), adaptive_pool(x, 2))
    with pytest.raises(TypeError, match="expected an integer"):
        adaptive_pool(x, np.float32(2))
    with pytest.raises(TypeError, match="expected an integer"):
        adaptive_pool(x, np.bool_(True))
