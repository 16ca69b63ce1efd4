"""The cases to verify: every operator with kernels, at several shapes.

Inputs are computed from standard normal numbers in float64, and rounded to the dtype of the case. A "shape"
means the sizes of one link of a neck and of the maps that this link reads. A shape also contains the options
for normalisation and DyT, because these options select different kernels. The options differ between shapes,
so that all kernels are checked.

An operator can be called in several ways, for instance with different options. One row of a verdict covers
several calls: the call that is timed, the call in training, and the calls in `Operator.forms`. All these
calls are checked at every shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import srm_kernels as ops

from ..attention import _landmark_side, _select, attention_with_scale
from ..choice import named
from ..conditioning import SOLVERS_OF_KERNELS
from ..landmarks import METHODS_OF_KERNELS
from ..options import AttentionOptions, LandmarkOptions, SolveOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Call = Callable[..., Any]  # (*tensors, backend=…) → a tensor or several


class Shape(NamedTuple):
    """Sizes of a link and its maps, and the options for normalisation and DyT.

    The target map has `height` × `width` positions, and the source map has `keys` positions. Pooling averages the
    target map over a grid of `size` × `size` cells.
    """

    batch: int
    heads: int
    d: int
    height: int
    width: int
    keys: int
    rank: int
    size: int
    qk_norm: str | None = "keys"
    dyt: bool = True

    @property
    def channels(self) -> int:
        """Return C = H·d."""
        return self.heads * self.d

    @property
    def queries(self) -> int:
        """Return N_q, the number of positions of the target map."""
        return self.height * self.width


SHAPES = {
    "tiny": Shape(2, 2, 8, 5, 4, 12, 4, 2),  # for emulated devices
    "odd": Shape(2, 3, 40, 37, 29, 257, 33, 7, qk_norm=None, dyt=False),
    "article": Shape(2, 8, 32, 128, 128, 256, 64, 8),
    "small": Shape(2, 4, 32, 14, 14, 49, 32, 8, qk_norm="both"),
    "large": Shape(2, 8, 32, 192, 192, 2304, 64, 8),
    "wide": Shape(2, 2, 64, 24, 20, 300, 128, 8),  # more landmarks than a program holds at once
}
QUICK = ("odd", "article")
FAMILY = (*QUICK, "small", "large", "wide")
WIDTH = 64  # channels of a backbone's map
SCALE_OF_ATTENTION = 1e-3  # γ and the ridge of attention


@dataclass(frozen=True)
class Operator:
    """How an operator is called and checked.

    Attributes:
        name: Name of the public function.
        make: (shape, draw) → inputs, where draw(*sizes) returns random numbers.
        call: shape → the call, (*inputs, backend=…) → results.
        trained: shape → the call in training. None means that training uses `call`. The call in training is checked,
            and is timed together with its backward pass.
        forms: shape → further calls that the same verdict covers. They are checked, but not timed.
        inputs: The batch axis of each input, or None for an input without a batch axis.
        outputs: The batch axis of each result of `Case.judged`, or None for a result that mixes the samples of a batch.
            If `outputs` itself is None, `verify` does not check that a sample gives the same bits alone and
            in a batch.
        wide: Indices of the inputs that are fp32 for every dtype of the case.
        variant: Name of the variant of the operator, for example a method or a solver. The variants of an
            operator are measured separately. `explain` shows the name in parentheses. The name is empty if
            the operator has no variants.
        dtypes: The dtypes to measure.
        backends: The backends to check against the reference.
        shares_size: Whether the 8 units of fp32 in the bound (see `together` in `error_ratio`) are computed from the
            largest magnitude of all results and gradients of the call. If False, they are computed from the magnitude
            of the result or gradient that is checked.
        reference: (shape, inputs, backend) → the call that computes the results for comparison. `verify` runs this call
            with the backend "reference", in the dtype of the case (results of plain PyTorch) and in fp64 (exact
            results). `backend` is the backend that is checked. The call uses the landmarks that this backend chooses
            for `inputs`, because results with other landmarks are not comparable. None means that `Case.judged` is
            the call for comparison.
        ratio: (shape, inputs, results) → error divided by its bound, for an operator whose results are not
            floating point. None means that the numerics rule gives the ratio.
    """

    name: str
    make: Callable[[Shape, Callable[..., Tensor]], list[Tensor]]
    call: Callable[[Shape], Call]
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...] | None
    trained: Callable[[Shape], Call] | None = None
    forms: Callable[[Shape], tuple[Call, ...]] = lambda shape: ()
    wide: tuple[int, ...] = ()
    variant: str = ""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    backends: tuple[str, ...] = ("triton",)
    shares_size: bool = False
    reference: Callable[[Shape, Sequence[Tensor], str], Call] | None = None
    ratio: Callable[[Shape, Sequence[Tensor], Sequence[Tensor]], float] | None = None

    @property
    def label(self) -> str:
        """Return the name that the rows of a verdict use for the operator and its variant."""
        return named(self.name, self.variant)


class Case(NamedTuple):
    """An operator in one dtype at one shape."""

    operator: Operator
    dtype: str
    shape: str

    @property
    def sizes(self) -> Shape:
        """Return the sizes of the shape."""
        return SHAPES[self.shape]

    @property
    def call(self) -> Call:
        """Return the call that is timed in the forward direction.

        Each row of a verdict contains the sizes that decide which backend this call uses by default.
        """
        return self.operator.call(self.sizes)

    @property
    def trained(self) -> Call:
        """Return the call in training, which is timed together with its backward pass."""
        return (self.operator.trained or self.operator.call)(self.sizes)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Return all calls that one verdict covers."""
        operator = self.operator
        trained = () if operator.trained is None else (self.trained,)
        return self.call, *trained, *operator.forms(self.sizes)

    @property
    def judged(self) -> Call:
        """Return the function that is checked: it runs all of `calls` and returns all their results."""
        return _together(self.calls)

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> list[Tensor]:
        """Return the inputs on a device; on the meta device without values."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            if torch.device(device).type == "meta":
                return torch.empty(sizes, dtype=torch.float64, device=device)
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        made = self.operator.make(self.sizes, draw)
        kinds = [torch.float32 if i in self.operator.wide else DTYPES[self.dtype] for i in range(len(made))]
        return [x.to(kind).to(device) for x, kind in zip(made, kinds, strict=True)]


def _together(calls: Sequence[Call]) -> Call:
    if len(calls) == 1:
        return calls[0]
    return lambda *tensors, backend: tuple(call(*tensors, backend=backend) for call in calls)


def unit(key: Tensor) -> Tensor:
    """Normalise keys to a root mean square of 1."""
    return key * key.shape[-1] ** 0.5 / (key.norm(dim=-1, keepdim=True) + 1e-6)


def _tokens(*counts: str) -> Callable[[Shape, Callable[..., Tensor]], list[Tensor]]:
    return lambda s, draw: [draw(s.batch, s.heads, getattr(s, count), s.d) for count in counts]


def _attend(s: Shape, **more: Any) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, *, backend: str | None) -> Any:
        return ops.nystrom_attention(q, k, v, s.rank, qk_norm=s.qk_norm, tau=tau, backend=backend, **more)

    return call


def _attend_otherwise(s: Shape, landmarks: Tensor | None = None) -> tuple[Call, ...]:
    """Return three further calls of Nyström attention, for `Operator.forms`.

    The first call uses the first r keys as landmarks and has no τ; its queries, keys and values are not contiguous in
    memory. The second call computes the attention and the scale statistic. It uses the landmarks in the argument
    `landmarks`; if the argument is None, the landmarks are chosen by leverage. The third call uses uniform landmarks.
    """

    def given(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, *, backend: str | None) -> Any:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        index = _first_keys(k, s.rank)
        return ops.nystrom_attention(q, k, v, s.rank, landmarks=index, qk_norm=s.qk_norm, backend=backend)

    def with_scale(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, *, backend: str | None) -> Any:
        return attention_with_scale(
            q, k, v, s.rank, landmarks=landmarks, qk_norm=s.qk_norm, tau=tau, backend=backend
        )

    def uniform(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, *, backend: str | None) -> Any:
        return ops.nystrom_attention(
            q, k, v, s.rank, method="uniform", qk_norm=s.qk_norm, tau=tau, backend=backend
        )

    return given, with_scale, uniform


def _chosen(s: Shape, key: Tensor, value: Tensor, backend: str) -> Tensor:
    """Return the landmarks that a backend chooses by leverage.

    The choice can depend on the backend, because backends can break ties differently.
    """
    choice, solve = LandmarkOptions(s.rank, gamma=SCALE_OF_ATTENTION), SolveOptions(SCALE_OF_ATTENTION)
    options = AttentionOptions(choice, solve, s.d**-0.5, s.qk_norm)
    with torch.no_grad():
        if backend == "triton":
            return _landmark_side(key, value, None, options, "triton")[2]
        return _select(key, options, backend)


def _attend_as_chosen(s: Shape, inputs: Sequence[Tensor], backend: str) -> Call:
    index = _chosen(s, inputs[1], inputs[2], backend)
    return _together((_attend(s, landmarks=index), *_attend_otherwise(s, index)))


def _side(s: Shape, choose: Callable[[Tensor], Tensor | None], method: str = "leverage") -> Call:
    def call(k: Tensor, v: Tensor, *, backend: str | None) -> Any:
        return ops.landmark_side(
            k, v, s.rank, landmarks=choose(k), method=method, qk_norm=s.qk_norm, backend=backend
        )

    return call


def _sides(s: Shape, index: Tensor | None = None) -> tuple[Call, ...]:
    """Return three calls of the key side with different landmarks.

    The first call uses the first r keys as landmarks, the second call uses `index`, and the third call uses
    uniform landmarks. If `index` is None, the landmarks of the second call are chosen by leverage.
    """
    given = _side(s, lambda k: _first_keys(k, s.rank))
    return given, _side(s, lambda k: index), _side(s, lambda k: None, "uniform")


def _first_keys(key: Tensor, rank: int) -> Tensor:
    """Return the indices 0 to rank − 1 as the landmarks of every head, (B, H, rank).

    Unlike landmarks that are chosen from the values of the keys, these landmarks do not depend on rounding.
    """
    return torch.arange(rank, device=key.device).expand(*key.shape[:2], rank)


def _landmark_ratio(method: str) -> Callable[[Shape, Sequence[Tensor], Sequence[Tensor]], float]:
    """Return a function that computes the error ratio of chosen landmarks.

    The ratio is the error divided by the bound. The error is the number of landmarks that differ from the choice of the
    reference in fp64. The bound is the largest of three numbers: 1 landmark, 1/16 of all landmarks, and twice the error
    of the reference in the dtype of the keys. If a head has the same landmark twice, or a landmark is not the index of
    a key, the ratio is infinite.

    The bound is never 0, because even a correct implementation can choose other landmarks than the reference. It can
    break a tie differently, and one different landmark can change all landmarks that are chosen after it.
    """

    def ratio(s: Shape, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> float:
        found = results[0].flatten(0, 1).tolist()
        plain, exact = (
            ops.select_landmarks(key, s.rank, method=method, backend="reference").flatten(0, 1).tolist()
            for key in (inputs[0], inputs[0].double())
        )
        if not all(len({*one}) == s.rank and 0 <= min(one) <= max(one) < s.keys for one in found):
            return float("inf")
        others, usual = (
            sum(len({*one} - {*other}) for one, other in zip(chosen, exact, strict=True))
            for chosen in (found, plain)
        )
        return others / max(1, results[0].numel() // 16, 2 * usual)

    return ratio


def _solve(solver: str) -> Callable[[Shape], Call]:
    def call(logits: Tensor, rhs: Tensor, *, backend: str | None) -> Any:
        return ops.landmark_solve(logits, rhs, solver=solver, backend=backend).x

    return lambda s: call


def _systems(s: Shape, draw: Callable[..., Tensor]) -> list[Tensor]:
    keys = unit(draw(s.batch, s.heads, s.rank, s.d))
    return [keys @ keys.mT / s.d**0.5, draw(s.batch, s.heads, s.rank, s.d)]


def _pyramid(s: Shape, draw: Callable[..., Tensor]) -> list[Tensor]:
    """Draw F, A, a, W_Q, K̃, X and, with DyT, α, w and b."""
    C = s.channels
    made = [
        draw(s.batch, WIDTH, s.height, s.width), draw(C, WIDTH) / WIDTH**0.5, draw(C), draw(C, C) / C**0.5,
        unit(draw(s.batch, s.heads, s.rank, s.d)), draw(s.batch, s.heads, s.rank, s.d),
    ]  # fmt: skip
    return [*made, draw(1) * 0.1 + 0.5, draw(C), draw(C)] if s.dyt else made


def _pool_links(s: Shape, *, statistics: bool = False) -> Call:
    """Return a call with one link.

    If `statistics` is True, as in training, the call also computes the scale statistic of Y.
    """

    def call(m: Tensor, *weights: Tensor, backend: str | None) -> Any:
        align, shift, query, keys, x, *dyt = weights
        return ops.pooled_links(
            [m], [(align, shift)], [query], [keys], [0], size=s.size, qk_norm=s.qk_norm or "keys",
            dyt=[(dyt[0], dyt[1], dyt[2])] if dyt else None, xs=[x] if statistics else None, backend=backend,
        )  # fmt: skip

    return call


def _pool_several_links(s: Shape) -> tuple[Call]:
    """Return a call of `pooled_links` with two links of different r.

    Each of the two links reads its own map, and the first map is channels-last. The call also computes the scale
    statistics of both links.
    """

    def call(m: Tensor, *weights: Tensor, backend: str | None) -> Any:
        align, shift, query, keys, x, *dyt = weights
        part, r = WIDTH // 2, max(1, s.rank // 2)
        half = m[:, :part, : s.height // 2 + 1].contiguous()
        return ops.pooled_links(
            [m.contiguous(memory_format=torch.channels_last), half], [(align, shift), (align[:, :part], shift)],
            [query, query.mT], [keys, keys[:, :, :r]], [0, 1], size=s.size, qk_norm=s.qk_norm,
            dyt=[(dyt[0], dyt[1], dyt[2])] * 2 if dyt else None, xs=[x, x[:, :, :r]], backend=backend,
        )  # fmt: skip

    return (call,)


def _merge(s: Shape, draw: Callable[..., Tensor]) -> list[Tensor]:
    """Draw P̄, pool(F), X, A, a, W_O, β and θ of one link."""
    C, cells = s.channels, s.size**2
    return [
        draw(1, s.batch, s.heads, cells, s.rank).softmax(-1), draw(s.batch, cells, WIDTH),
        draw(s.batch, s.heads, s.rank, s.d), draw(C, WIDTH) / WIDTH**0.5, draw(C), draw(C, C) / C**0.5,
        draw(1), draw(s.heads),
    ]  # fmt: skip


def _merge_links(s: Shape) -> Call:
    def call(p: Tensor, maps: Tensor, x: Tensor, *weights: Tensor, backend: str | None) -> Any:
        align, shift, output, beta, theta = weights
        pooled = ops.PooledLinks(p, maps, None)
        return ops.merge_links(
            pooled, [x], [(align, shift)], [output], [0], [beta], thetas=[theta], backend=backend
        )

    return call


def _merge_several_links(s: Shape) -> tuple[Call]:
    """Return a call of `merge_links` with two links of different r, without τ.

    There are two maps, and each link updates a different map.
    """

    def call(p: Tensor, maps: Tensor, x: Tensor, *weights: Tensor, backend: str | None) -> Any:
        align, shift, output, beta, _ = weights
        part, r = WIDTH // 2, max(1, s.rank // 2)
        fewer = torch.cat([p[..., :r], torch.zeros_like(p[..., r:])], -1)
        return ops.merge_links(
            ops.PooledLinks(torch.cat([p, fewer]), maps, None), [x, x[:, :, :r]],
            [(align[:, :part], shift), (align[:, part:], shift)], [output, output.mT], [1, 0], [beta, -beta],
            backend=backend,
        )  # fmt: skip

    return (call,)


def _sources(s: Shape, draw: Callable[..., Tensor]) -> list[Tensor]:
    """Draw T, W_K and W_V of two links; with DyT also a, α, w and b."""
    C = s.channels
    made = [draw(s.batch, s.keys, C), *(draw(C, C) / C**0.5 for _ in range(4))]
    return [*made, draw(C), draw(1) * 0.1 + 0.5, draw(C), draw(C)] if s.dyt else made


def _project(s: Shape) -> Call:
    def call(t: Tensor, *weights: Tensor, backend: str | None) -> Any:
        shift, *dyt = weights[4:] if s.dyt else (None,)
        return ops.project_sources(
            t, weights[:2], weights[2:4], shift=shift, dyt=[(dyt[0], dyt[1], dyt[2])] * 2 if dyt else None,
            backend=backend,
        )  # fmt: skip

    return call


def _project_alone(s: Shape) -> tuple[Call]:
    """Return a call of `project_sources` with one link, with a shift a and without DyT.

    With a shift, the input of the call is A F, and the call adds a: T = A F + a.
    """

    def call(t: Tensor, *weights: Tensor, backend: str | None) -> Any:
        return ops.project_sources(t, weights[:1], weights[2:3], shift=weights[0][0], backend=backend)

    return (call,)


def _stages(s: Shape, draw: Callable[..., Tensor]) -> list[Tensor]:
    """Draw m, b, w and v of two stages of the gate (see `gate_logits`).

    m is the output of a convolution, b is its bias, and w and v are the readout.
    """
    C, P = max(s.channels // 4, 1), s.size
    return [
        *(draw(s.batch, C, P, P) for _ in range(2)), *(draw(C) for _ in range(2)),
        *(draw(1, C) / C**0.5 for _ in range(2)), *(draw(1) for _ in range(2)),
    ]  # fmt: skip


def _several_taus(s: Shape) -> tuple[Call]:
    def call(theta: Tensor, rms: Tensor, *, backend: str | None) -> Any:
        sigma = rms.detach().abs() + 0.5
        return ops.tau_loss([theta, -theta, theta / 2], [sigma] * 3, reference=1.0, backend=backend)

    return (call,)


def _fuse(s: Shape) -> Call:
    def call(maps: Tensor, logits: Tensor, *, backend: str | None) -> Any:
        cap = torch.tensor(3.0, device=maps.device) if s.dyt else None
        return ops.gated_fusion(maps, logits, cap=cap, backend=backend)

    return call


_EVERY = (0, 0)
_POOLED = (1, 0, None, None)  # batch axes of P̄ and pool(F); the statistic of a link mixes the batch
OPERATORS = (
    Operator(
        "nystrom_attention",
        lambda s, draw: [*_tokens("queries", "keys", "keys")(s, draw), draw(s.heads) * 0.1 + 1],
        _attend, (0, 0, 0, None), (0, 0, 0, None, None, 0), wide=(3,), backends=("torch", "triton"),
        shares_size=True, forms=_attend_otherwise, reference=_attend_as_chosen,
    ),
    Operator(
        "landmark_side", _tokens("keys", "keys"), lambda s: _sides(s)[0], _EVERY, (0,) * 6,
        shares_size=True, forms=lambda s: _sides(s)[1:],
        reference=lambda s, inputs, backend: _together(_sides(s, _chosen(s, inputs[0], inputs[1], backend))),
    ),
    *(
        Operator(
            "select_landmarks", lambda s, draw: [unit(draw(s.batch, s.heads, s.keys, s.d))],
            lambda s, method=method: lambda key, backend: ops.select_landmarks(  # type: ignore[misc]
                key.detach(), s.rank, method=method, backend=backend
            ),
            (0,), (0,), variant=method, ratio=_landmark_ratio(method),
        )
        for method in METHODS_OF_KERNELS
    ),
    Operator(
        "ridge_leverage_scores", _tokens("keys"),
        lambda s: lambda key, backend: ops.ridge_leverage_scores(key, backend=backend), (0,), (0,),
    ),
    *(
        Operator("landmark_solve", _systems, _solve(solver), _EVERY, (0,), variant=solver, dtypes=("fp32",))
        for solver in SOLVERS_OF_KERNELS
    ),
    Operator(
        "project_sources", _sources, _project, (0, *[None] * 8), (1, 1, 1, 1), forms=_project_alone,
        wide=(1, 2, 3, 4, 5, 6, 7, 8),
    ),
    Operator(
        "pooled_links", _pyramid, _pool_links, (0, None, None, None, 0, 0, None, None, None),
        (1, 0, *_POOLED, *_POOLED, None, None), trained=partial(_pool_links, statistics=True),
        forms=_pool_several_links, wide=(1, 2, 3, 4, 5, 6, 7, 8), backends=("torch", "triton"),
    ),
    Operator(
        "merge_links", _merge, _merge_links, (1, 0, 0, *[None] * 5), (0, 0),
        forms=_merge_several_links, wide=(0, 2, 3, 4, 5, 6, 7),
    ),
    Operator(
        "rms_scale", _tokens("queries"),
        lambda s: lambda y, backend: tuple(ops.rms_scale(y + 1, backend=backend)), (0,), None,
    ),
    Operator(
        "dyt", lambda s, draw: [draw(s.batch, s.queries, s.channels), draw(1), draw(s.channels), draw(s.channels)],
        lambda s: lambda x, alpha, w, b, backend: ops.dyt(x, alpha, w, b, backend=backend),
        (0, None, None, None), (0,), wide=(1, 2, 3),
    ),
    Operator(
        "tau_loss", lambda s, draw: [draw(s.heads), draw(s.heads)],
        lambda s: lambda theta, rms, backend: ops.tau_loss(
            [theta], [rms.detach().abs() + 0.5], reference=1.0, backend=backend
        ),
        (None, None), None, dtypes=("fp32",), forms=_several_taus,
    ),
    Operator(
        "adaptive_pool", lambda s, draw: [draw(s.batch, WIDTH, s.height, s.width)],
        lambda s: lambda x, backend: ops.adaptive_pool(x, s.size, backend=backend), (0,), (0,),
    ),
    Operator(
        "biased_gelu", lambda s, draw: _stages(s, draw)[:4],
        lambda s: lambda m, n, a, b, backend: ops.biased_gelu([m, n], [a, b], backend=backend),
        (0, 0, None, None), (1,), wide=(2, 3),
    ),
    Operator(
        "gate_logits", _stages,
        lambda s: lambda m, n, a, b, v, w, c, e, backend: ops.gate_logits(
            [m, n], [a, b], [(v, c), (w, e)], backend=backend
        ),
        (0, 0, *[None] * 6), (0,), wide=(2, 3, 4, 5, 6, 7),
    ),
    Operator(
        "gated_fusion", lambda s, draw: [draw(s.batch, 3, s.channels, s.size, s.size), draw(s.batch, 3)],
        _fuse, _EVERY, (0, 0, 0, 0), wide=(1,),
    ),
    Operator(
        "gate_losses", lambda s, draw: [draw(s.batch, 3)],
        lambda s: lambda x, backend: tuple(
            ops.gate_losses(x.softmax(-1), entropy_floor=0.7, backend=backend)
        ),
        (0,), None,
    ),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(operator.name for operator in OPERATORS))


def cases(
    names: Sequence[str] = NAMES, dtypes: Sequence[str] = tuple(DTYPES), shapes: Sequence[str] = FAMILY
) -> Iterator[Case]:
    """Yield the cases of some operators (names or labels), dtypes and shapes, operator by operator."""
    for operator, dtype, shape in product(OPERATORS, dtypes, shapes):
        if (operator.name in names or operator.label in names) and dtype in operator.dtypes:
            yield Case(operator, dtype, shape)


def case_of(label: str, dtype: str, shape: str) -> Case:
    """Return the case of a row."""
    return next(cases((label,), (dtype,), (shape,)))
