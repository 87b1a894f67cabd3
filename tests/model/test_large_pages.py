"""Where weights lie."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest

from model.large_pages import PAGE_BYTES, LargePages


def test_pieces_are_apart_and_keep_their_contents() -> None:
    pages = LargePages()
    shapes = [(3, 100), (1,), (0, 7), (65 << 20,), (64,), (2, PAGE_BYTES)]
    pieces = [pages.empty(*shape) for shape in shapes]
    del pages
    gc.collect()
    for i, piece in enumerate(pieces):
        assert piece.shape == shapes[i]
        assert piece.is_contiguous()
        assert piece.data_ptr() % 64 == 0 or not piece.numel()
        assert not piece.any()
        piece.fill_(i + 1)
    assert all((piece == i + 1).all() for i, piece in enumerate(pieces))


def test_a_page_that_a_small_piece_has_begun_is_filled_up_by_those_behind_a_large_one() -> None:
    pages = LargePages()
    before, _, behind = (pages.empty(size) for size in (1000, 65 << 20, 1000))
    assert behind.data_ptr() // PAGE_BYTES == before.data_ptr() // PAGE_BYTES


def test_small_pieces_share_pages_that_the_system_is_asked_to_make_large() -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the system has no such pages")
    pages = LargePages()
    pieces = [pages.empty(1000) for _ in range(3)]
    assert len({piece.data_ptr() // PAGE_BYTES for piece in pieces}) == 1
    page = pieces[0].data_ptr() // PAGE_BYTES * PAGE_BYTES
    asked = None
    for line in smaps.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(end, 16) for end in found.groups())
        elif line.startswith("VmFlags:") and start <= page and page + PAGE_BYTES <= stop:
            asked = "hg" in line.split()
    assert asked
