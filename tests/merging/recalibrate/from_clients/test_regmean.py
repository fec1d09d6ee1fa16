"""Regression mean: the least-squares solution on all networks' own inputs."""

from __future__ import annotations

import torch

from c2m3_fl.merging.recalibrate.from_clients.regmean import regression_mean, shrunk


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_least_squares_solution_on_all_networks_own_inputs():
    shares = [0.2, 0.5, 0.3]
    inputs, matrices = [drawn(seed, 40, 6) for seed in range(3)], [drawn(10 + seed, 1, 6, 4) for seed in range(3)]
    origin = sum(share * matrix for share, matrix in zip(shares, matrices, strict=True))
    grams = [(x.T @ x)[None] for x in inputs]
    rows = torch.cat([share**0.5 * x for share, x in zip(shares, inputs, strict=True)])
    goals = torch.cat([share**0.5 * x @ m[0] for share, x, m in zip(shares, inputs, matrices, strict=True)])
    expected = torch.linalg.lstsq(rows, goals).solution
    torch.testing.assert_close(regression_mean(grams, matrices, shares, origin)[0], expected, rtol=1e-4, atol=1e-4)


def test_identical_matrices_and_directions_without_inputs_stay_what_they_are():
    matrix, gram = drawn(0, 2, 5, 3), torch.zeros(2, 5, 5, dtype=torch.float64)
    assert torch.equal(regression_mean([gram, gram], [matrix, matrix], [0.5, 0.5], matrix), matrix)
    gram[:, 0, 0] = 1
    found = regression_mean([gram, gram], [matrix, matrix + 1], [0.5, 0.5], matrix)
    torch.testing.assert_close(found[:, 1:], matrix[:, 1:])
    torch.testing.assert_close(found[:, 0], matrix[:, 0] + 0.5, rtol=1e-4, atol=1e-4)


def test_shrinking_keeps_the_diagonal():
    gram = drawn(0, 2, 4, 4)
    found = shrunk(gram, 0.9)
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), gram.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(found.tril(-1), 0.9 * gram.tril(-1))
