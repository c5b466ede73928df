"""Codec 3, "records" (16): makes a run of WAL of the transformed run, in which its records are taken apart."""
from __future__ import annotations

import collections
import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import Iterator

import google_crc32c

from checks import require, supported
from pages import Decoder as Pages

MAX_RUN, PAGE, PAGE_HEADER, LONG_REST, RECORD_HEADER = 4 << 20, 8192, 24, 16, 24
LAYOUT, MAX_CLASSES, GROUP, MIN_IMAGE = 1, 4096, 64, 1024
CONSTANT, DIFFERENCES = 0, 2
CONTINUES, LONG, OVERWRITES = 1, 2, 8
MODULUS = 1 << 64

def max_transformed(plain_len: int) -> int:
    """The longest that the transformed run may be."""
    return plain_len + plain_len // 8 + 4096

class Input:
    """Bytes that are read from their beginning to their end."""

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw, self.at, self.where = raw, 0, where

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        self.at += length
        self.require(self.at <= len(self.raw), "it ends early")
        return self.raw[self.at - length:self.at]

    def numbers(self, form: str) -> tuple[int, ...]:
        """The next numbers, in the notation of `struct`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def require(self, condition: bool, text: str) -> None:
        """Damaged, if not."""
        require(condition, f"{self.where}: the transformed run: {text}")

@dataclass
class Record:
    """A record as its class has it."""
    row: bytes
    head: bytes
    lead: bytes
    main: bytes
    tail: bytes
    images: list[tuple[int, int, int]]  # length, offset of the hole, bytes of the middle before it

class Class:
    """A class of the table, and later its records."""

    def __init__(self, source: Input) -> None:
        """Read it from the table."""
        self.head, self.lead, self.main, images, fields, self.tails = source.numbers("3HBBI")
        self.images = [source.numbers("HH") for _ in range(images)]
        self.fields = [source.numbers("HB") for _ in range(fields)]
        least = 0
        for header, before in self.images:
            source.require(header + 4 <= self.head and least <= before <= self.lead, "an image of a class")
            least = before
        for at, width in self.fields:
            source.require(width in (1, 2, 4) and at + width <= self.head, "a field of a class")
        self.head_at = 6 if self.fields else 10
        self.width = self.head_at + self.head + self.lead + self.main
        self.kinds = source.take(self.width)
        source.require(all(kind <= DIFFERENCES for kind in self.kinds), "a column of an unknown kind")
        self.constants = source.take(self.kinds.count(CONSTANT))
        self.rows = bytearray()
        self.records: Iterator[Record] = iter(())

    def read_columns(self, source: Input, count: int) -> None:
        """Put its rows together."""
        self.rows, constants = bytearray(count * self.width), iter(self.constants)
        for j, kind in enumerate(self.kinds):
            if kind == CONSTANT:
                column = bytes([next(constants)]) * count
            else:
                column = source.take(count)
                if kind == DIFFERENCES:
                    column = bytes(byte & 0xff for byte in accumulate(column))
            self.rows[j::self.width] = column

    def read_tails(self, source: Input) -> None:
        """Give each row its tail."""
        tails, records = Input(source.take(self.tails), source.where), []
        for start in range(0, len(self.rows), self.width):
            row = bytes(self.rows[start:start + self.width])
            head, rest = row[self.head_at:self.head_at + self.head], row[self.head_at + self.head:]
            if self.fields:
                length = sum(int.from_bytes(head[at:at + width], "little") for at, width in self.fields) - self.lead
            else:
                length = int.from_bytes(row[6:10], "little")
            tails.require(length >= 0, "a lead that is longer than the middle")
            images = [(*struct.unpack_from("<HH", head, header), before) for header, before in self.images]
            records.append(Record(row, head, rest[:self.lead], rest[self.lead:], tails.take(length), images))
        tails.require(tails.at == len(tails.raw), "something is left of tails")
        self.records = iter(records)

class Images:
    """The images, one after the other; they are all that is left."""

    def __init__(self, source: Input, count: int) -> None:
        """Read their kinds and the groups of pages."""
        self.source, kinds = source, source.take(count)
        source.require(all(kind <= 1 for kind in kinds), "an image of an unknown kind")
        lengths = source.numbers(f"{-(-sum(kinds) // GROUP)}I")
        groups = [source.take(length) for length in lengths]
        self.kinds, self.pages = iter(kinds), self._pages(groups, sum(kinds))

    def _pages(self, groups: list[bytes], left: int) -> Iterator[bytes]:
        for raw in groups:
            count = min(left, GROUP)
            left -= count
            chunk = Pages(raw, count * PAGE, self.source.where).decode()
            yield from (chunk[at:at + PAGE] for at in range(0, len(chunk), PAGE))

    def next(self, length: int, hole: int) -> bytes:
        """The next one."""
        if next(self.kinds) == 0:
            return self.source.take(length)
        self.source.require(MIN_IMAGE <= length <= PAGE and hole <= length, "an image that is no page")
        page = next(self.pages)
        return page[:hole] + page[hole + PAGE - length:]

class Run:
    """The run as far as it is put together."""

    def __init__(self, source: Input, start: int, headers: list[bytes], long: list[bytes]) -> None:
        self.out, self.source, self.start = bytearray(), source, start
        self.headers, self.long, self.header = iter(headers), iter(long), bytes(PAGE_HEADER)

    def lsn(self) -> int:
        """The LSN of what comes next."""
        return (self.start + len(self.out)) % MODULUS

    def begin_page(self, remaining: int) -> None:
        """Put the page header, if one belongs here."""
        if self.lsn() % PAGE:
            return
        stored = next(self.headers, None)
        self.source.require(stored is not None, "a page header is missing")
        flags = self.header[2] & ~(CONTINUES | LONG | OVERWRITES) | (CONTINUES if remaining else 0)
        expected = self.header[:2] + bytes([flags]) + self.header[3:8] + struct.pack("<QII", self.lsn(), remaining, 0)
        self.header = bytes(a ^ b for a, b in zip(expected, stored or b""))
        self.out += self.header
        if self.header[2] & LONG:
            self.out += next(self.long)

    def put(self, record: bytes) -> None:
        """Put a record, with page headers in it, and what aligns the next one."""
        while record:
            self.begin_page(len(record))
            room = PAGE - self.lsn() % PAGE
            self.out += record[:room]
            record = record[room:]
        self.out += bytes(-self.lsn() % 8)

def decode(raw: bytes, plain_len: int, where: str) -> bytes:
    """The run."""
    source = Input(raw, where)
    layout, *zeros, before, start, previous, stored, records, pages, count, zero = source.numbers("4BIQQ5I")
    supported(layout == LAYOUT, f"{where}: records in layout {layout}")
    source.require(not any(zeros) and zero == 0, "a byte that is always zero")
    source.require(count <= MAX_CLASSES and max(before, stored, records, pages) <= plain_len, "a number that cannot be")
    classes = [Class(source) for _ in range(count)]
    ids = [low | high << 8 for low, high in zip(source.take(records), source.take(records))]
    source.require(all(number < count for number in ids), "a record of no class")
    source.require(sum(classes[number].width for number in ids) <= plain_len, "more rows than records")
    head, behind, planes = source.take(before), source.take(stored), source.take(PAGE_HEADER * pages)
    headers = [planes[i::pages] for i in range(pages)]
    long = [source.take(LONG_REST) for header in headers if header[2] & LONG]
    counts = collections.Counter(ids)
    for number, kind in enumerate(classes):
        kind.read_columns(source, counts[number])
    for kind in classes:
        kind.read_tails(source)
    images = Images(source, sum(len(classes[number].images) for number in ids))
    run = Run(source, start, headers, long)
    run.out += head
    source.require(run.lsn() % 8 == 0, "a record at an odd place")
    for number in ids:
        record = next(classes[number].records)
        middle, used = b"", 0
        for length, hole, at in record.images:
            middle += record.lead[used:at] + images.next(length, hole)
            used = at
        body = record.head + middle + record.lead[used:] + record.tail + record.main
        run.begin_page(0)
        header = struct.pack("<I4sQ2sH", RECORD_HEADER + len(body), record.row[:4], previous, record.row[4:6], 0)
        previous = run.lsn()
        crc = google_crc32c.extend(google_crc32c.value(body), header)
        run.put(header + struct.pack("<I", crc) + body)
        source.require(len(run.out) <= plain_len, "it is longer than the run")
    left = plain_len - len(run.out) - stored
    source.require(left >= 0 and next(run.headers, None) is None and source.at == len(raw), "it does not fill the run")
    return bytes(run.out + behind) + bytes(left)
