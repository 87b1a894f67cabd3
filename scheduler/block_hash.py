"""Names of block contents: a SHA-256 chain over the tokens, so that equal hashes mean equal prefixes.

The hash of block i covers the root, every token before the block and the block's own tokens. It is a
function of (fingerprint, cache_salt, tokens) alone: two processes, or the same one after a restart,
name the same latents alike. SHA-256 and not a faster hash, because a collision would serve one
client's context to another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256


def root_hash(fingerprint: str, cache_salt: str) -> bytes:
    """The chain's start, 32 bytes. Requests can share blocks only under the same root."""
    model, salt = fingerprint.encode(), cache_salt.encode()
    # The length keeps ("a", "bc") and ("ab", "c") apart.
    return sha256(b"latentd.prefix.1" + len(model).to_bytes(8, "little") + model + salt).digest()


def chain_hashes(
    root: bytes, tokens: array[int] | memoryview, block_size: int, known: Sequence[bytes] = ()
) -> list[bytes]:
    """Hashes of the full blocks of `tokens` that come after the `known` ones, 32 bytes each.

    `tokens` are uint32 (`array('I')`, or a contiguous view of one) and always the whole sequence;
    they are hashed in memory order, little-endian on every machine that we run on. A partial last
    block has no hash.
    """
    data = memoryview(tokens).cast("B")
    width = 4 * block_size
    hashes = []
    parent = known[-1] if known else root
    for end in range((len(known) + 1) * width, len(data) + 1, width):
        parent = sha256(parent + data[end - width : end]).digest()
        hashes.append(parent)
    return hashes
