"""Embeddings of new tokens from those of old ones."""

import torch

from ddk_train.transplant.embeddings import mean, omp, pursue


def test_mean_copies_one_source_averages_several_and_takes_all_for_none() -> None:
    old = torch.randn(5, 3)
    made = mean(old, [[3], [0, 1], [], [4, 4, 2]])
    expected = torch.stack([old[3], (old[0] + old[1]) / 2, old.mean(0), (2 * old[4] + old[2]) / 3])
    torch.testing.assert_close(made, expected)
    assert mean(old.bfloat16(), [[3]]).dtype is torch.bfloat16


def test_pursuit_finds_a_sparse_sum_again() -> None:
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)
    weights = torch.zeros(7, 40)
    for row in range(7):
        weights[row, torch.randperm(40)[:3]] = torch.tensor([2.0, -1.5, 1.0])
    chosen, factors = pursue(weights @ atoms, atoms, 3)
    torch.testing.assert_close(torch.zeros(7, 40).scatter(1, chosen, factors), weights, atol=1e-4, rtol=0)


def test_omp_does_to_old_embeddings_what_the_donor_does_to_its_own() -> None:
    """If the old embeddings are a linear map of the donor's, the new ones are that map of the donor's too."""
    torch.manual_seed(0)
    donor, linear = torch.randn(60, 6), torch.randn(6, 4)
    sources = [[index] for index in range(50)] + [[0, 1]] * 10
    old = donor[:50] @ linear
    made = omp(old, sources, donor)
    torch.testing.assert_close(made[:50], old)
    torch.testing.assert_close(made[50:], donor[50:] @ linear, atol=1e-3, rtol=1e-3)
