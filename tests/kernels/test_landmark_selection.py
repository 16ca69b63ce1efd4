"""Test the ridge leverage scores and the methods of `select_landmarks`.

Scores are compared with the definition by the rule of `oracle.agree`. In fp64, the selected indices must be equal to
those of the definition.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import ridge_leverage_scores, select_landmarks
from srm_kernels.landmarks import LANDMARK_METHODS, methods

HALF = (torch.bfloat16, torch.float16)


def test_every_method_is_described():
    for name in LANDMARK_METHODS:
        assert f'\n- "{name}": ' in (methods.__doc__ or "")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_scores(key: Tensor, gamma: float) -> Tensor:
    key = key.float()
    gram = key.mT @ key + gamma * torch.eye(key.shape[-1])
    return (key * torch.linalg.solve(gram, key.mT).mT).sum(-1)


@pytest.mark.parametrize("gamma", [1e-3, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 50, 24), (1, 2, 17, 40), (2, 1, 9, 59)])
def test_leverage_scores_in_fp64(shape, gamma):
    key = tokens(0, *shape)
    scores = ridge_leverage_scores(key, gamma=gamma)
    assert scores.dtype == torch.float64
    oracle.agree(scores, oracle.leverage(key, gamma))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_leverage_scores_are_fp32_for_lower_dtypes(dtype):
    key = tokens(1, 2, 2, 60, 24, dtype=dtype)
    scores = ridge_leverage_scores(key)
    assert scores.dtype == torch.float32
    oracle.agree(scores, oracle.leverage(key), plain_scores(key, 1e-3))


def test_leverage_scores_lie_in_the_unit_interval_and_sum_to_the_effective_dimension():
    key = tokens(2, 2, 2, 40, 8)
    scores = ridge_leverage_scores(key, gamma=0.5)
    eigenvalues = torch.linalg.eigvalsh(key.mT @ key)
    assert bool(((scores > 0) & (scores < 1)).all())
    torch.testing.assert_close(
        scores.sum(-1), (eigenvalues / (eigenvalues + 0.5)).sum(-1), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("rank", [1, 7, 33])
def test_leverage_takes_the_largest_scores_in_descending_order(rank):
    key = tokens(3, 2, 3, 33, 12)
    expected = oracle.top(oracle.leverage(key), rank)
    assert torch.equal(select_landmarks(key, rank), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_leverage_in_lower_dtypes_takes_a_top_set_up_to_the_rounding_of_scores(dtype):
    key = tokens(4, 2, 3, 200, 24, dtype=dtype)
    picks = select_landmarks(key, 16)
    scores = oracle.leverage(key).gather(-1, picks)
    rest = oracle.leverage(key).scatter(-1, picks, -1.0).amax(-1)
    slack = 1e-5  # more than the fp32 rounding error of a score; scores are below 1
    assert bool((scores[..., :-1] >= scores[..., 1:] - slack).all())
    assert bool((scores[..., -1] >= rest - slack).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_leverage_ties_go_to_the_lower_index(dtype):
    """Keys with equal scores are selected in the order of their indices.

    Three equal keys lie on each coordinate axis. The Gram matrix is therefore diagonal, and equal keys have exactly
    equal scores. The lengths of the keys are powers of two, so dividing a key by a pivot of the Gram matrix gives the
    same bits as multiplying it by the reciprocal of the pivot.
    """
    d = 8
    key = torch.zeros(1, 1, 3 * d, d, dtype=dtype)
    for i in range(3 * d):
        key[0, 0, i, i % d] = 2.0 ** (i % d)
    scores = ridge_leverage_scores(key)
    assert torch.equal(scores[..., :d], scores[..., d : 2 * d])
    expected = oracle.top(scores.double(), 20)
    assert torch.equal(select_landmarks(key, 20), expected)


@pytest.mark.parametrize("method", ["leverage", "pivoted_cholesky"])
def test_all_keys_equal_to_zero_gives_the_first_indices(method):
    picks = select_landmarks(torch.zeros(1, 2, 100, 8), 70, method=method)
    assert torch.equal(picks, torch.arange(70).expand(1, 2, 70))


@pytest.mark.parametrize(("n", "rank"), [(10, 3), (256, 64), (7, 7), (9, 2), (1, 1), (1000, 999)])
def test_uniform_is_the_midpoint_rule(n, rank):
    picks = select_landmarks(torch.zeros(2, 1, n, 4), rank, method="uniform")
    assert torch.equal(picks, oracle.uniform(n, rank).expand(2, 1, rank))


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_pivoted_cholesky_is_greedy_on_the_residual_kernel(rank, scale):
    key = tokens(5, 2, 2, 20, 6, scale=scale)
    assert torch.equal(
        select_landmarks(key, rank, method="pivoted_cholesky"), oracle.pivoted_cholesky(key, rank)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_pivoted_cholesky_survives_kernels_beyond_the_range_of_exp(dtype):
    """The landmarks are correct although exp(‖k‖² s) overflows in fp32: s is 1/4, and some ‖k‖² exceed 400.

    Dividing all kernel values by a common factor prevents the overflow and does not change the choice.
    """
    key = tokens(6, 1, 2, 40, 16, dtype=dtype, scale=6.0)
    picks = select_landmarks(key, 5, method="pivoted_cholesky")
    assert torch.equal(picks, oracle.pivoted_cholesky(key, 5))
    everything = select_landmarks(key, 40, method="pivoted_cholesky")
    assert torch.equal(everything.sort(-1).values, torch.arange(40).expand(1, 2, 40))


def test_pivoted_cholesky_takes_each_duplicate_only_after_every_other_key():
    key = tokens(7, 1, 1, 6, 5).repeat(1, 1, 3, 1)
    picks = select_landmarks(key, 6, method="pivoted_cholesky")
    assert sorted((picks % 6).flatten().tolist()) == list(range(6))


@pytest.mark.parametrize("seed", range(6))
def test_kmeans_finds_every_cluster(seed):
    """`kmeans++` selects a landmark from each of eight clusters; `uniform` misses at least one cluster.

    Two clusters have five keys each, and six clusters have one key each. All clusters are far apart. There are 16 keys,
    and with r = 8 the Lloyd steps use the 2r = 16 keys with the largest leverage, so they use all keys.
    """
    centres = 20 * torch.eye(8, 12, dtype=torch.float64)
    cluster = torch.tensor([0] * 5 + [1] * 5 + [2, 3, 4, 5, 6, 7])
    key = (centres[cluster] + 0.1 * tokens(seed, 16, 12))[None, None]

    def found(method: str) -> int:
        return len(set(cluster[select_landmarks(key, 8, method=method).flatten()].tolist()))

    assert found("kmeans++") == 8
    assert found("uniform") < 8


@pytest.mark.parametrize("seed", range(6))
def test_kmeans_moves_its_centres_to_the_middle_of_their_cluster(seed):
    """Of three keys in a line, the middle one becomes a landmark, whichever key is drawn as the first centre.

    A fourth key is far from the line and is a cluster of its own.
    """
    key = torch.tensor(
        [[9.0, 0.0, 1.0], [9.0, 0.0, 0.0], [9.0, 0.0, -1.1], [0.0, 30.0, 0.0]], dtype=torch.float64
    )
    picks = select_landmarks(key[None, None], 2, method="kmeans++", generator=seeded(seed))
    assert sorted(picks.flatten().tolist()) == [1, 3]


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_kmeans_landmarks_are_distinct_and_all_keys_at_full_rank(rank):
    key = tokens(10, 2, 2, 12, 4)
    picks = select_landmarks(key, rank, method="kmeans++")
    assert picks.sort(-1).values.diff(dim=-1).gt(0).all()
    if rank == 12:
        assert torch.equal(picks.sort(-1).values, torch.arange(12).expand(2, 2, 12))


def test_leverage_sample_frequencies_follow_the_scores():
    """In 3000 draws of one of eight keys, the frequencies of the keys agree with the scores (Pearson's χ² test).

    The bound of the test, 30, is the 99.99 % quantile for 7 degrees of freedom.
    """
    key = tokens(11, 1, 1, 8, 3) * torch.linspace(0.1, 2, 8, dtype=torch.float64)[:, None]
    scores = oracle.leverage(key, 0.5)[0, 0]
    draws, generator = 3000, seeded(3)
    counts = torch.zeros(8, dtype=torch.float64)
    for _ in range(draws):
        counts[select_landmarks(key, 1, method="leverage_sample", gamma=0.5, generator=generator).item()] += 1
    expected = draws * scores / scores.sum()
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 30


def test_leverage_sample_draws_without_replacement():
    """In 2000 draws of two of three keys, the frequencies of the pairs agree with draws without replacement.

    In such draws, an ordered pair (i, j) has the probability p_i p_j / (1 − p_i). The bound of Pearson's χ² test, 18.5,
    is the 99.99 % quantile for 2 degrees of freedom.
    """
    key = torch.diag_embed(torch.tensor([0.3, 0.6, 1.5], dtype=torch.float64))[None, None]
    scores = oracle.leverage(key, 0.5)[0, 0]
    p = (scores / scores.sum()).tolist()
    missing = [
        sum(p[i] * p[j] / (1 - p[i]) for i in range(3) for j in range(3) if len({i, j, k}) == 3)
        for k in range(3)
    ]
    draws, generator = 2000, seeded(5)
    counts = [0, 0, 0]
    for _ in range(draws):
        pair = select_landmarks(key, 2, method="leverage_sample", gamma=0.5, generator=generator)
        assert pair[0, 0, 0] != pair[0, 0, 1]
        counts[3 - int(pair.sum())] += 1
    assert sum((c - draws * m) ** 2 / (draws * m) for c, m in zip(counts, missing, strict=True)) < 18.5


def test_leverage_sample_can_take_keys_of_no_leverage_when_nothing_else_is_left():
    key = tokens(12, 1, 2, 10, 4)
    key[:, :, 3:] = 0
    picks = select_landmarks(key, 10, method="leverage_sample")
    assert torch.equal(picks.sort(-1).values, torch.arange(10).expand(1, 2, 10))
    few = select_landmarks(key, 3, method="leverage_sample")
    assert torch.equal(few.sort(-1).values, torch.arange(3).expand(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_indices_are_distinct_int64_and_in_range(method, dtype):
    key = tokens(13, 2, 3, 30, 7, dtype=dtype)
    for rank in (1, 9, 30):
        picks = select_landmarks(key, rank, method=method)
        assert picks.dtype == torch.int64
        assert picks.shape == (2, 3, rank)
        assert int(picks.min()) >= 0
        assert int(picks.max()) < 30
        assert bool(picks.sort(-1).values.diff(dim=-1).gt(0).all())


@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_rank_over_the_number_of_keys_is_clamped(method):
    key = tokens(14, 1, 2, 6, 4)
    assert torch.equal(select_landmarks(key, 50, method=method), select_landmarks(key, 6, method=method))


@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_duplicated_keys_still_give_distinct_indices(method):
    key = tokens(15, 1, 2, 4, 6, dtype=torch.float32).repeat(1, 1, 5, 1)
    picks = select_landmarks(key, 15, method=method)
    assert bool(picks.sort(-1).values.diff(dim=-1).gt(0).all())


@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_no_generator_means_seed_zero_and_leaves_the_global_generator_alone(method):
    key = tokens(16, 2, 2, 40, 6)
    before = torch.get_rng_state()
    first = select_landmarks(key, 8, method=method)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, select_landmarks(key, 8, method=method))
    assert torch.equal(first, select_landmarks(key, 8, method=method, generator=seeded(0)))


@pytest.mark.parametrize("method", ["leverage_sample", "kmeans++"])
def test_seeds_matter_where_there_is_chance(method):
    key = tokens(17, 1, 1, 60, 6)
    sets = {
        tuple(select_landmarks(key, 8, method=method, generator=seeded(s)).flatten().tolist())
        for s in range(8)
    }
    assert len(sets) > 1


def test_a_generator_advances_from_draw_to_draw():
    key, generator = tokens(18, 1, 1, 60, 6), seeded(0)
    first = select_landmarks(key, 8, method="leverage_sample", generator=generator)
    second = select_landmarks(key, 8, method="leverage_sample", generator=generator)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_every_head_and_sample_sees_the_same_random_numbers(method):
    key = tokens(19, 1, 1, 40, 6).expand(3, 2, 40, 6)
    picks = select_landmarks(key, 9, method=method)
    assert torch.equal(picks, picks[:1, :1].expand_as(picks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_a_sample_chooses_the_same_landmarks_alone_and_in_a_batch(method, dtype):
    key = tokens(20, 4, 2, 50, 16, dtype=dtype)
    together = select_landmarks(key, 12, method=method)
    for i in range(4):
        assert torch.equal(select_landmarks(key[i : i + 1], 12, method=method)[0], together[i])


@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_strides_do_not_matter(method):
    key = tokens(21, 2, 3, 30, 8)
    picks = select_landmarks(key, 7, method=method)
    transposed = key.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.stack([key, key * 0], -1).flatten(-2)[..., ::2]
    assert torch.equal(select_landmarks(transposed, 7, method=method), picks)
    assert torch.equal(select_landmarks(sliced, 7, method=method), picks)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_a_non_finite_key_leaves_valid_indices_and_the_other_matrices_alone(method, bad):
    key = tokens(22, 2, 2, 24, 6, dtype=torch.float32)
    expected = select_landmarks(key, 8, method=method)
    key[0, 1, 5, 2] = bad
    picks = select_landmarks(key, 8, method=method)
    assert torch.equal(picks[0, 0], expected[0, 0])
    assert torch.equal(picks[1], expected[1])
    assert int(picks.min()) >= 0
    assert int(picks.max()) < 24


def test_gamma_reaches_the_choice():
    """With a small γ, a short key is selected before four equal long keys that are orthogonal to it.

    With a large γ, a long key is selected first.
    """
    key = torch.zeros(1, 1, 5, 2, dtype=torch.float64)
    key[0, 0, :4, 0] = 3.0
    key[0, 0, 4, 1] = 0.5
    assert select_landmarks(key, 1, gamma=1e-3).item() == 4
    assert select_landmarks(key, 1, gamma=10.0).item() == 0


def test_pivoted_cholesky_leaves_equal_diagonals_to_the_index_not_to_rounding():
    # The keys are normalised, so all residual diagonals are equal in the first step. Among equal diagonals, the lowest
    # index is selected, so the first landmark must be key 0.
    key = torch.randn(3, 4, 60, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    key = key / key.norm(dim=-1, keepdim=True) * 24**0.5
    for dtype in (torch.float64, torch.float32):
        assert not select_landmarks(key.to(dtype), 4, method="pivoted_cholesky")[..., 0].any()
