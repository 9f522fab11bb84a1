"""Random words from counters: a row's words are a hash of its number, so that nothing depends on the rows before it."""

import numpy as np

# The paper's constants; the keys step by the golden ratio and the square root of 3, less 1, as fractions of 2**32.
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
# With seven rounds it passes all of BigCrush's tests; ten are what the paper recommends, as a margin.
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: four random words for each counter.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, section 4.3.

    Args:
        counter: uint32 [n, 4].
        key: uint32 [2].

    Returns:
        uint32 [n, 4]; the same on every machine and with every version of NumPy.
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key.astype(np.uint64)
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> WORD_BITS) ^ c1 ^ k0, second & _LOW, (first >> WORD_BITS) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def random_words(seed: int, rows: np.ndarray, view: int, words: int = 4) -> np.ndarray:
    """Random words for each row of a view: int64 [n] -> uint32 [n, words].

    The counter is (row, its high half, view, block of four words), so asking for more words leaves the first as they
    are.
    """
    if words == 0:  # the rounds over nothing would cost as much as the gather of a batch
        return np.empty((len(rows), 0), dtype=np.uint32)
    blocks = -(-words // 4)
    counter = np.zeros((len(rows), blocks, 4), dtype=np.uint32)
    counter[:, :, 0] = (rows & 0xFFFFFFFF)[:, np.newaxis]
    counter[:, :, 1] = (rows >> 32)[:, np.newaxis]
    counter[:, :, 2] = view
    counter[:, :, 3] = np.arange(blocks)
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32)
    return philox4x32(counter.reshape(-1, 4), key).reshape(len(rows), blocks * 4)[:, :words]
