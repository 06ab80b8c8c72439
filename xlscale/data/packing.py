"""Documents to blocks of one length, closed inside a chunk: a block depends on its own chunk alone.

N blocks, T tokens of a block
"""

from collections.abc import Sequence

import numpy as np


def pack_documents(
    documents: Sequence[np.ndarray], sequence_length: int, bos_id: int, eos_id: int, pad_id: int
) -> np.ndarray:
    """Blocks [N, T] int64 of a chunk's documents: <s>, then T - 1 tokens of them; </s> ends a document.

    Documents run on from block to block, as RoBERTa's full sentences do; the last block is filled with
    padding. A document without tokens leaves no trace.
    """
    stream = np.concatenate([np.append(ids, eos_id) for ids in documents if len(ids)] or [np.empty(0, dtype=np.int64)])
    width = sequence_length - 1
    blocks = -(-len(stream) // width)
    packed = np.full((blocks, width), pad_id, dtype=np.int64)
    packed.reshape(-1)[: len(stream)] = stream
    return np.concatenate([np.full((blocks, 1), bos_id, dtype=np.int64), packed], axis=1)
