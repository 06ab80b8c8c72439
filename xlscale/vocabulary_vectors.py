"""Which old pieces a new one is like, and how much: its row of the model's embedding is their mixture.

As FOCUS does (Dobler and de Melo 2023): all pieces get static vectors from the language's text, cut with the new
tokenizer, and a new piece is the sparsemax over its similarities to the pieces that both tokenizers have. FOCUS trains
fastText for the vectors; here they are the leading singular vectors of positive pointwise mutual information, which
skip-gram factorises too (Levy and Goldberg 2014): no dependency, no learning rate, the same at every call.

P pieces that have a vector, D dimensions of it, N pairs
"""

from collections.abc import Sequence

import numpy as np
import torch

DIMENSIONS = 100
WINDOW = 5  # tokens to either side; one that is d away counts 1 / d
LEAST_COUNT = 3
"""Of a piece with a vector: of rarer ones the text says too little."""
_CONTEXT_POWER = 0.75  # as skip-gram draws its negatives: rare contexts would else look too telling
_SPARE = 10  # columns beyond DIMENSIONS, and
_ROUNDS = 4  # rounds, of the randomised range finder (Halko et al. 2011)


class Vectors:
    """Unit vectors of the pieces that some texts hold often enough."""

    def __init__(self, texts: Sequence[np.ndarray], pieces: range, vocab_size: int):
        """texts: ids of each; pieces: the ids that are no special token."""
        counts = np.zeros(vocab_size, np.int64)
        for ids in texts:
            counts += np.bincount(ids, minlength=vocab_size)
        often = np.zeros(vocab_size, bool)
        often[pieces.start : pieces.stop] = counts[pieces.start : pieces.stop] >= LEAST_COUNT
        self.ids_P = np.flatnonzero(often)
        self.vectors_PD = _vectors(_pairs(texts, self.ids_P, vocab_size), len(self.ids_P))

    def mixtures(self, wanted: np.ndarray, known: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Of each wanted id that has a vector the known ids that make it up and their weights, which sum to 1.

        known: ids of pieces to mix. An id is left out where none of these is like it.
        """
        place = {token_id: i for i, token_id in enumerate(self.ids_P.tolist())}
        known = np.array([i for i in known.tolist() if i in place], np.int64)
        basis_KD = self.vectors_PD[[place[i] for i in known.tolist()]]
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for token_id in wanted.tolist():
            if token_id not in place or not len(known):
                continue
            likeness_K = basis_KD @ self.vectors_PD[place[token_id]]
            if likeness_K.max() > 0:
                weights_K = sparsemax(likeness_K)
                some = weights_K > 0
                found[token_id] = (known[some], weights_K[some])
        return found


def sparsemax(scores: np.ndarray) -> np.ndarray:
    """The point of the simplex nearest to `scores` (Martins and Astudillo 2016): weights that sum to 1, most are 0."""
    ordered = np.sort(scores)[::-1]
    excess = np.cumsum(ordered) - 1
    size = np.arange(1, len(scores) + 1)
    last = np.flatnonzero(ordered * size > excess)[-1]
    weights: np.ndarray = np.maximum(scores - excess[last] / size[last], 0)
    return weights


def _pairs(texts: Sequence[np.ndarray], ids_P: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring pieces, both ways: [N] places of both in ids_P as one number (first * P + second), and weights."""
    P = len(ids_P)
    place_V = np.full(vocab_size, -1, np.int64)
    place_V[ids_P] = np.arange(P)
    often_V = place_V >= 0
    # Texts on one line with room between, so that no window reaches across; rare pieces are passed over.
    gap = np.full(WINDOW, -1, np.int64)
    line = np.concatenate([part for ids in texts for part in (place_V[ids[often_V[ids]]], gap)] or [gap])
    keys: np.ndarray = np.zeros(0, np.int64)
    weights: np.ndarray = np.zeros(0)
    for distance in range(1, WINDOW + 1):
        left, right = line[:-distance], line[distance:]
        both = (left >= 0) & (right >= 0)
        new, counts = np.unique(left[both] * P + right[both], return_counts=True)
        merged, at = np.unique(np.concatenate([keys, new, new % max(P, 1) * P + new // max(P, 1)]), return_inverse=True)
        added = np.concatenate([weights, counts / distance, counts / distance])
        keys, weights = merged, np.bincount(at, added, minlength=len(merged))
    return keys, weights


def _vectors(pairs: tuple[np.ndarray, np.ndarray], pieces: int) -> np.ndarray:
    """Unit rows [P, D] float64 of the truncated factorisation of positive pointwise mutual information."""
    keys_N, weights_N = pairs
    dimensions = min(DIMENSIONS, pieces)
    if not len(keys_N):
        return np.zeros((pieces, dimensions))
    first_N, second_N = keys_N // pieces, keys_N % pieces
    of_piece = np.bincount(first_N, weights_N, minlength=pieces)
    of_context = of_piece**_CONTEXT_POWER
    expected_N = of_piece[first_N] * of_context[second_N] / of_context.sum()
    information_N = np.log(weights_N / expected_N)
    some = information_N > 0
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([first_N[some], second_N[some]])),
        torch.from_numpy(information_N[some]),
        (pieces, pieces),
        is_coalesced=True,
        check_invariants=True,
    )
    drawn = np.random.Generator(np.random.Philox(key=0)).standard_normal((pieces, min(dimensions + _SPARE, pieces)))
    basis_PD = torch.from_numpy(drawn)
    transposed = matrix.t().coalesce()
    for _ in range(_ROUNDS):
        basis_PD = torch.linalg.qr(torch.sparse.mm(matrix, torch.sparse.mm(transposed, basis_PD))).Q
    left, values, _ = torch.linalg.svd(torch.sparse.mm(transposed, basis_PD).t(), full_matrices=False)
    # Square roots: the full values would leave little but the first few directions.
    vectors_PD = ((basis_PD @ left) * values.sqrt())[:, :dimensions].numpy()
    lengths = np.linalg.norm(vectors_PD, axis=1, keepdims=True)
    unit: np.ndarray = vectors_PD / np.where(lengths > 0, lengths, 1.0)
    return unit
