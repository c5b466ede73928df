"""Codec 2, "pages" (15): makes a chunk of the transformed chunk, in which its pages are taken apart into columns.

All positions are byte offsets in the chunk that is being made; what is read is put where it belongs at once.
"""
from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import Sequence

from checks import require, supported

PAGE, PAGE_SIZE_AND_VERSION, HEADER, TUPLE_HEADER, SPECIAL = 8192, 8196, 24, 24, 32
LAYOUT, MAX_COLUMNS = 1, 16
PLAIN, ZERO, HEAP, HEAP_AND_HOLE, ITEMS, ITEMS_AND_HOLE = range(6)

def max_transformed(plain_len: int) -> int:
    """The longest that the transformed chunk may be."""
    return plain_len + 48 + 5 * (plain_len // PAGE)

@dataclass
class Item:
    """A tuple or a plain item; `body` is where the words begin that are columns of bodies or of plain items."""
    start: int
    body: int
    end: int
    pointer: int  # the number of its line pointer, from 1

class Page:
    """What the header and the line pointers say of a page of kind 2 to 5."""

    def __init__(self, out: bytearray, base: int, kind: int, where: str) -> None:
        """Check the page header, which is already in `out`."""
        lower, upper, special, size = struct.unpack_from("<4H", out, base + 12)
        require(size == PAGE_SIZE_AND_VERSION and HEADER <= lower <= upper <= special and lower % 4 == 0
                and PAGE - SPECIAL <= special <= PAGE and upper % 8 == special % 8 == 0, f"{where}: a wrong page header")
        self.heap, self.hole = kind in (HEAP, HEAP_AND_HOLE), kind in (HEAP_AND_HOLE, ITEMS_AND_HOLE)
        require(special == PAGE or not self.heap, f"{where}: a heap page with a special area")
        self.base, self.end, self.pointers = base, base + PAGE, (lower - HEADER) // 4
        self.lower, self.upper, self.special = base + lower, base + upper, base + special
        self.items: list[Item] = []
        self.gaps: list[tuple[int, int]] = []

    def resolve(self, stored: Sequence[int], where: str) -> list[int]:
        """The line pointers, from what the column has for them; finds the items and the gaps."""
        pointers, expected, at = list(stored), self.special - self.base, self.upper
        for i, pointer in enumerate(stored):
            if length := ((pointer >> 17) + 7) // 8 * 8:
                expected = (expected - length - pointer) % (1 << 15)
                pointers[i] = pointer >> 15 << 15 | expected
                start = self.base + expected
                require(start % 8 == 0 and (length >= TUPLE_HEADER or not self.heap)
                        and self.upper <= start and start + length <= self.special, f"{where}: an item that cannot be")
                self.items.append(Item(start, start, start + length, i + 1))
        for item in sorted(self.items, key=lambda item: item.start):
            require(at <= item.start, f"{where}: items overlap")
            self.gaps.append((at, item.start))
            at = item.end
        self.gaps.append((at, self.special))
        return pointers

class Decoder:
    """Reads a transformed chunk from its beginning to its end."""

    def __init__(self, raw: bytes, plain_len: int, where: str) -> None:
        """Read what comes before the kinds of the pages."""
        self.raw, self.at, self.out, self.where = raw, 0, bytearray(plain_len), where
        layout, self.bodies, self.plains, zero = self.take(4)
        supported(layout == LAYOUT, f"{where}: pages in layout {layout}")
        require(max(self.bodies, self.plains) <= MAX_COLUMNS and zero == 0, f"{where}: a wrong beginning")
        self.masks = iter(self.take(12 + self.bodies + self.plains))  # in the order of the columns

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        self.at += length
        require(self.at <= len(self.raw), f"{self.where}: the transformed chunk ends early")
        return self.raw[self.at - length:self.at]

    def put(self, start: int, end: int) -> None:
        """The next bytes belong between `start` and `end`; none if these do not lie in this order."""
        if start < end:
            self.out[start:end] = self.take(end - start)

    def column(self, count: int, width: int = 8) -> bytearray:
        """The next column: `count` words, put together from their planes."""
        mask, column = next(self.masks), bytearray(count * width)
        for p in range(width):
            plane = self.take(count)
            column[p::width] = bytes(byte & 0xff for byte in accumulate(plane)) if mask >> p & 1 else plane
        return column

    def words(self, places: Sequence[int]) -> None:
        """The next column; its words belong at `places`."""
        column = self.column(len(places))
        for i, at in enumerate(places):
            self.out[at:at + 8] = column[8 * i:8 * i + 8]

    def decode(self) -> bytes:
        """The chunk."""
        kinds = self.take(len(self.out) // PAGE)
        require(all(kind <= ITEMS_AND_HOLE for kind in kinds), f"{self.where}: a page of an unknown kind")
        heaps = sum(kind in (HEAP, HEAP_AND_HOLE) for kind in kinds)
        blocks = struct.unpack(f"<{heaps}I", self.take(4 * heaps))
        pages = self.headers([(i * PAGE, kind) for i, kind in enumerate(kinds) if kind >= HEAP])
        tuples = self.tuple_headers([page for page in pages if page.heap], blocks)
        items = [item for page in pages if not page.heap for item in page.items]
        for columns, owners in ((self.bodies, tuples), (self.plains, items)):
            for k in range(columns):
                self.words([item.body + 8 * k for item in owners if item.body + 8 * k < item.end])
        apart = iter(pages)
        for i, kind in enumerate(kinds):
            if kind == PLAIN:
                self.put(i * PAGE, (i + 1) * PAGE)
            elif kind != ZERO:
                self.rest(next(apart))
        self.put(len(kinds) * PAGE, len(self.out))
        require(self.at == len(self.raw), f"{self.where}: something is left of the transformed chunk")
        return bytes(self.out)

    def headers(self, kinds: list[tuple[int, int]]) -> list[Page]:
        """Page headers, special areas and line pointers, of pages of which begin and kind are given."""
        for k in range(HEADER // 8):
            self.words([base + 8 * k for base, _ in kinds])
        pages = [Page(self.out, base, kind, self.where) for base, kind in kinds]
        for k in range(SPECIAL // 8):
            self.words([page.special + 8 * k for page in pages if page.special + 8 * k < page.end])
        count, at = sum(page.pointers for page in pages), 0
        stored = struct.unpack(f"<{count}I", self.column(count, 4))
        for page in pages:
            pointers = page.resolve(stored[at:at + page.pointers], self.where)
            struct.pack_into(f"<{page.pointers}I", self.out, page.base + HEADER, *pointers)
            at += page.pointers
        return pages

    def tuple_headers(self, pages: list[Page], blocks: Sequence[int]) -> list[Item]:
        """Tuple headers and null bitmaps' first words; returns the tuples, whose bodies are now known."""
        tuples, block = [item for page in pages for item in page.items], -1
        for k in range(TUPLE_HEADER // 8):
            self.words([item.start + 8 * k for item in tuples])
        for page, difference in zip(pages, blocks):
            block = (block + 1 + difference) % (1 << 32)
            for item in page.items:
                ctid = struct.unpack_from("<3H", self.out, item.start + 12)
                expected = (block >> 16, block & 0xffff, item.pointer & 0xffff)
                struct.pack_into("<3H", self.out, item.start + 12, *(a ^ b for a, b in zip(ctid, expected)))
                item.body = item.start + self.out[item.start + 22]
                require(item.body % 8 == 0 and item.start + TUPLE_HEADER <= item.body <= item.end,
                        f"{self.where}: a tuple that cannot be")
        self.words([item.start + TUPLE_HEADER for item in tuples if item.body > item.start + TUPLE_HEADER])
        return tuples

    def rest(self, page: Page) -> None:
        """What no column has of a page."""
        columns = self.bodies if page.heap else self.plains
        for item in page.items:
            self.put(item.start + TUPLE_HEADER + 8, item.body)  # null bitmap; a plain item has none
            self.put(item.body + 8 * columns, item.end)
        for start, end in page.gaps:
            self.put(start, end)
        if page.hole:
            self.put(page.lower, page.upper)
