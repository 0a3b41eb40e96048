"""Make the embeddings of new tokens from those of old ones. Pure.

V and W are the sizes of the new and the old vocabulary; H is a model's width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Method = Callable[[Tensor, Sequence[Sequence[int]], Tensor | None], Tensor]

ATOMS = 32  # of omp: the embeddings that a new one is a sum of
BATCH = 256  # of omp: bounds its memory, BATCH * W numbers


def mean(old: Tensor, sources: Sequence[Sequence[int]], donor: Tensor | None = None) -> Tensor:
    """Return the mean of each new token's sources, [V, H]: fast vocabulary transfer (arXiv 2402.09977).

    ``old`` is [W, H]; ``sources`` are ids of ``old`` for each of the V new ones. A token without sources gets
    the mean of all of ``old``.
    """
    counts = torch.tensor([len(ids) for ids in sources])
    flat = torch.tensor([index for ids in sources for index in ids], dtype=torch.long)
    offsets = counts.cumsum(0) - counts
    made = nn.functional.embedding_bag(flat, old.float(), offsets, mode="mean")
    made[counts == 0] = old.float().mean(0)
    return made.to(old.dtype)


def omp(old: Tensor, sources: Sequence[Sequence[int]], donor: Tensor | None = None) -> Tensor:
    """Return ``mean``, but for new tokens what their ``donor`` embeddings say, [V, H].

    Orthogonal matching pursuit (arXiv 2506.06607): a new token's donor embedding, [V, D], is approximated by
    a sum over ``ATOMS`` tokens that both sides have; the same sum over the old embeddings is its own.
    """
    assert donor is not None
    made = mean(old, sources)
    is_shared = torch.tensor([len(ids) == 1 for ids in sources])
    atoms, atoms_old = donor[: len(sources)][is_shared].float(), made[is_shared].float()
    for rows in torch.split(torch.nonzero(~is_shared).flatten(), BATCH):
        chosen, factors = pursue(donor[rows].float(), atoms, min(ATOMS, *atoms.shape))
        made[rows] = torch.einsum("nk,nkh->nh", factors, atoms_old[chosen]).to(old.dtype)
    return made


def pursue(targets: Tensor, atoms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the atoms whose weighted sum is closest to each target, and the weights: [N, count] each.

    ``targets`` is [N, D], ``atoms`` [A, D]. Greedy: each step adds the atom most aligned with what is left,
    and fits all weights again by least squares.
    """
    directions = nn.functional.normalize(atoms, dim=1)
    chosen = torch.empty(len(targets), 0, dtype=torch.long)
    left = targets
    factors = targets.new_empty(len(targets), 0)
    for _ in range(count):
        alignment = (left @ directions.T).abs().scatter(1, chosen, -1.0)
        chosen = torch.cat([chosen, alignment.argmax(1, keepdim=True)], dim=1)
        basis = atoms[chosen].mT  # [N, D, k]
        factors = torch.linalg.lstsq(basis, targets[..., None]).solution[..., 0]
        left = targets - torch.einsum("ndk,nk->nd", basis, factors)
    return chosen, factors


METHODS: dict[str, Method] = {"mean": mean, "omp": omp}
