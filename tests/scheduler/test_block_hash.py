from __future__ import annotations

from array import array
from hashlib import sha256

import pytest

from scheduler.block_hash import chain_hashes, root_hash

TOKENS = array("I", range(1000, 1010))


def test_a_hash_is_the_sha256_of_its_parent_and_its_tokens_as_little_endian_uint32() -> None:
    root = root_hash("model", "salt")
    first = sha256(root + b"".join(token.to_bytes(4, "little") for token in TOKENS[:4])).digest()
    second = sha256(first + b"".join(token.to_bytes(4, "little") for token in TOKENS[4:8])).digest()
    assert chain_hashes(root, TOKENS, 4) == [first, second]


def test_hashes_are_the_same_in_every_process_and_release() -> None:
    """Blocks may outlive the process: a change of these constants empties every stored cache."""
    assert root_hash("model", "salt").hex() == "d1b92e76907b8c3c156d115e1f431348fd91dc418dfc07166955fb70afdaca82"
    assert (
        chain_hashes(root_hash("model", "salt"), TOKENS, 4)[1].hex()
        == "73ca888d2176017575e4beb1e53f8ccccaa31c44a4e10ba4f8128d7adda634ed"
    )


def test_a_root_tells_fingerprint_and_salt_apart() -> None:
    roots = {root_hash("a", "bc"), root_hash("ab", "c"), root_hash("abc", ""), root_hash("", "abc")}
    assert len(roots) == 4


@pytest.mark.parametrize("known", range(6))
def test_a_chain_can_be_continued_anywhere(known: int) -> None:
    root = root_hash("model", "")
    whole = chain_hashes(root, TOKENS, 2)
    assert chain_hashes(root, TOKENS, 2, known=whole[:known]) == whole[known:]


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_only_full_blocks_have_a_hash(length: int, blocks: int) -> None:
    root = root_hash("model", "")
    assert len(chain_hashes(root, TOKENS[:length], 4)) == blocks
    assert chain_hashes(root, memoryview(TOKENS)[:length], 4) == chain_hashes(root, TOKENS[:length], 4)


def test_a_changed_token_changes_its_block_and_all_that_follow() -> None:
    root = root_hash("model", "")
    changed = TOKENS[:]
    changed[4] += 1
    before, after = chain_hashes(root, TOKENS, 2), chain_hashes(root, changed, 2)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False, False]
