"""What is hidden from the model and what it is to say: BERT's masking, drawn anew each time."""

import numpy as np

from xlscale.config_sections import MaskingConfig

IGNORE = -100  # label of a token that is not predicted, as torch's cross entropy has it


def mask_tokens(
    ids_T: np.ndarray, rng: np.random.Generator, masking: MaskingConfig, pieces: range, mask_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and labels [T] int64 of one sample; each ordinary token is predicted with `mlm_probability`.

    Only ids in `pieces` are predicted or put in place of others: special tokens, <unk> and padding never are.
    The label is the token before the change, IGNORE where nothing is predicted.
    """
    ordinary_T = (ids_T >= pieces.start) & (ids_T < pieces.stop)
    (predicted_M,) = np.nonzero(ordinary_T & (rng.random(len(ids_T)) < masking.mlm_probability))
    input_ids_T, labels_T = ids_T.astype(np.int64), np.full(len(ids_T), IGNORE, dtype=np.int64)
    labels_T[predicted_M] = ids_T[predicted_M]
    fate_M = rng.random(len(predicted_M))
    masked_M = fate_M < masking.mask_fraction
    replaced_M = ~masked_M & (fate_M < masking.mask_fraction + masking.random_fraction)
    input_ids_T[predicted_M[masked_M]] = mask_id
    drawn = pieces.start + (rng.random(int(replaced_M.sum())) * len(pieces)).astype(np.int64)
    input_ids_T[predicted_M[replaced_M]] = drawn
    return input_ids_T, labels_T
