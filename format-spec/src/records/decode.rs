//! Columns back into a run of WAL.

use super::classes::Reading;
use super::images::{Buffers, Reading as Images};
use super::{
    CLASSES, FIXED, LAYOUT, LONG_PAGE_HEADER, PAGE, PAGE_HEADER, RECORD_HEADER, expected_header, header_len, in_page,
    record_crc, u16_at, u32_at, u64_at, xor,
};
use crate::columns::Input;
use crate::error::{FormatError, Result};

/// Puts runs together; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Decoder {
    rows: Vec<u8>,
    record: Vec<u8>,
    counts: Vec<usize>,
    images: Buffers,
}

/// The run as far as it is.
struct Output<'a> {
    run: &'a mut [u8],
    at: usize,
    start: u64,
    /// Page headers, as planes of what differs from what is expected.
    headers: &'a [u8],
    headers_used: usize,
    /// What long page headers have besides.
    long: &'a [[u8; LONG_PAGE_HEADER - PAGE_HEADER]],
    header: [u8; PAGE_HEADER],
}

impl Output<'_> {
    fn lsn(&self) -> u64 {
        self.start.wrapping_add(self.at as u64)
    }

    /// Bytes to the end of the page.
    fn room(&self) -> usize {
        PAGE - in_page(self.lsn())
    }

    /// Writes the page header, if one belongs here.
    fn begin_page(&mut self, remaining: usize) -> Option<()> {
        if in_page(self.lsn()) > 0 {
            return Some(());
        }
        let count = self.headers.len() / PAGE_HEADER;
        if self.headers_used == count {
            return None;
        }
        let stored = std::array::from_fn(|plane| self.headers[plane * count + self.headers_used]);
        self.headers_used += 1;
        self.header = xor(&expected_header(&self.header, self.lsn(), remaining as u32), &stored);
        let header = self.header;
        self.put(&header)?;
        if header_len(&header) == LONG_PAGE_HEADER {
            let (first, rest) = self.long.split_first()?;
            self.long = rest;
            self.put(first)?;
        }
        Some(())
    }

    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        self.run.get_mut(self.at..self.at + bytes.len())?.copy_from_slice(bytes);
        self.at += bytes.len();
        Some(())
    }

    /// Writes bytes of a record, with page headers between them.
    fn put_record(&mut self, mut record: &[u8]) -> Option<()> {
        while !record.is_empty() {
            self.begin_page(record.len())?;
            let (here, rest) = record.split_at(record.len().min(self.room()));
            self.put(here)?;
            record = rest;
        }
        Some(())
    }

    /// Writes zeros up to where the next record can begin.
    fn pad(&mut self) -> Option<()> {
        let end = self.at + (self.lsn().wrapping_neg() % 8) as usize;
        self.run.get_mut(self.at..end)?.fill(0);
        self.at = end;
        Some(())
    }
}

impl Decoder {
    /// Fills `run` from what [`super::Encoder`] made of it. `what` is the object, for messages.
    pub fn decode(&mut self, transformed: &[u8], run: &mut [u8], what: &str) -> Result<()> {
        let mut input = Input::new(transformed, what, "its records cannot be put together");
        let fixed = input.take(FIXED)?;
        if fixed[0] != LAYOUT {
            return Err(FormatError::unsupported(what, format!("record layout {}", fixed[0])));
        }
        let number = |at| u32_at(fixed, at) as usize;
        let (before, start, stored, records) = (number(4), u64_at(fixed, 8), number(24), number(28));
        let (pages, classes) = (number(32), number(36));
        if fixed[1..4] != [0; 3] || number(40) != 0 {
            return Err(input.damaged("a byte that is always zero"));
        }
        // Nobody has more than fits into the run, and nothing below overflows.
        if classes > CLASSES || before.max(stored).max(records).max(pages) > run.len() {
            return Err(input.damaged("a number that cannot be"));
        }
        let mut table = Vec::new();
        for _ in 0..classes {
            table.push(Reading::read(&mut input)?);
        }
        let ids = input.take(records)?.iter().zip(input.take(records)?);
        let ids = ids.map(|(&low, &high)| usize::from(u16::from_le_bytes([low, high])));
        self.count(&mut table, ids.clone(), run.len(), &input)?;
        let before = input.take(before)?;
        let behind = input.take(stored)?;
        let headers = input.take(PAGE_HEADER * pages)?;
        let flags = headers.get(2 * pages..3 * pages).unwrap_or_default();
        let long = flags.iter().filter(|&&flags| flags & super::flag::LONG != 0).count();
        let long = input.take((LONG_PAGE_HEADER - PAGE_HEADER) * long)?.as_chunks().0;
        let image_count = self.read_classes(&mut table, &mut input)?;
        let mut images = Images::new(input, image_count, &mut self.images, what)?;
        let mut output = Output {
            run,
            at: 0,
            start,
            headers,
            headers_used: 0,
            long,
            header: [0; PAGE_HEADER],
        };
        let damaged = |why: &str| FormatError::damaged(what, format!("its records cannot be put together: {why}"));
        output.put(before).ok_or_else(|| damaged("its beginning is too long"))?;
        if !output.lsn().is_multiple_of(8) {
            return Err(damaged("a record at an odd place"));
        }
        let mut records = Records {
            rows: &self.rows,
            previous: u64_at(fixed, 16),
            output,
            images: &mut images,
        };
        for id in ids {
            records
                .put(&mut table[id], &mut self.record)
                .map_err(|failed| failed.unwrap_or_else(|| damaged("a record does not fit")))?;
        }
        let output = records.output;
        let is_used = output.headers_used == pages && output.long.is_empty();
        if !is_used || table.iter().any(|class| !class.tails.is_empty()) {
            return Err(damaged("something is left of what pages and records have"));
        }
        let (last, zeros) = output.run[output.at..]
            .split_at_mut_checked(stored)
            .ok_or_else(|| damaged("its end is too long"))?;
        last.copy_from_slice(behind);
        zeros.fill(0);
        images.end()
    }

    /// Gives each class its place among the rows.
    fn count(
        &mut self,
        table: &mut [Reading<'_>],
        ids: impl Iterator<Item = usize>,
        run_len: usize,
        input: &Input<'_>,
    ) -> Result<()> {
        self.counts.clear();
        self.counts.resize(table.len(), 0);
        for id in ids {
            *self
                .counts
                .get_mut(id)
                .ok_or_else(|| input.damaged("a record of no class"))? += 1;
        }
        let mut rows = 0;
        for (class, &count) in table.iter_mut().zip(&self.counts) {
            class.row = rows;
            rows += count * class.width;
        }
        // A row is shorter than its record.
        if rows > run_len {
            return Err(input.damaged("more rows than records"));
        }
        self.rows.resize(rows, 0);
        Ok(())
    }

    /// Rows and tails. Returns how many images there are.
    fn read_classes<'a>(&mut self, table: &mut [Reading<'a>], input: &mut Input<'a>) -> Result<usize> {
        let mut images = 0;
        for (class, &count) in table.iter_mut().zip(&self.counts) {
            class.read_rows(input, &mut self.rows[class.row..class.row + count * class.width])?;
            images += count * class.shape.images.len();
        }
        for class in table {
            class.read_tails(input)?;
        }
        Ok(images)
    }
}

/// Records in their order.
struct Records<'a, 'b, 'c> {
    rows: &'a [u8],
    previous: u64,
    output: Output<'b>,
    images: &'a mut Images<'b, 'c>,
}

impl Records<'_, '_, '_> {
    /// Puts the next record together, which is of this class. An error without a cause: it does not fit.
    fn put(&mut self, class: &mut Reading<'_>, buffer: &mut Vec<u8>) -> std::result::Result<(), Option<FormatError>> {
        let row = &self.rows[class.row..class.row + class.width];
        class.row += class.width;
        let tail = match class.fixed_tail {
            Some(tail) => tail,
            None => class.shape.tail_len(row).ok_or(None)?,
        };
        let (tail, rest) = class.tails.split_at_checked(tail).ok_or(None)?;
        class.tails = rest;
        let shape = &class.shape;
        let head_at = shape.head_at();
        let head = &row[head_at..head_at + shape.head];
        let images = shape.images.iter().map(|image| u16_at(head, image.header.into()));
        let len = RECORD_HEADER + row.len() - head_at + tail.len() + images.sum::<usize>();
        self.output.begin_page(0).ok_or(None)?;
        let lsn = self.output.lsn();
        let (at, is_here) = (self.output.at, len <= self.output.room());
        let record = match is_here {
            true => self.output.run.get_mut(at..at + len).ok_or(None)?,
            false if len > self.output.run.len() - at => return Err(None),
            false => {
                buffer.resize(len, 0);
                &mut buffer[..]
            }
        };
        let (header, body) = record.split_at_mut(RECORD_HEADER);
        header[..4].copy_from_slice(&(len as u32).to_le_bytes());
        header[4..8].copy_from_slice(&row[..4]);
        header[8..16].copy_from_slice(&self.previous.to_le_bytes());
        header[16..18].copy_from_slice(&row[4..6]);
        header[18..20].fill(0);
        if shape.images.is_empty() && tail.is_empty() {
            body.copy_from_slice(&row[head_at..]);
        } else {
            let (head, rest) = row[head_at..].split_at(shape.head);
            let (lead, main) = rest.split_at(shape.lead);
            let (to, body) = body.split_at_mut(head.len());
            to.copy_from_slice(head);
            let (mut middle, to) = body.split_at_mut(body.len() - main.len());
            to.copy_from_slice(main);
            let mut used = 0;
            for image in &shape.images {
                let before = usize::from(image.before);
                let header = &head[image.header.into()..];
                let (to, rest) = middle.split_at_mut(before - used);
                to.copy_from_slice(&lead[used..before]);
                let (to, rest) = rest.split_at_mut(u16_at(header, 0));
                self.images.next(header, to)?;
                (middle, used) = (rest, before);
            }
            let (to, rest) = middle.split_at_mut(lead.len() - used);
            to.copy_from_slice(&lead[used..]);
            rest.copy_from_slice(tail);
        }
        let crc = record_crc(record);
        record[20..RECORD_HEADER].copy_from_slice(&crc.to_le_bytes());
        match is_here {
            true => self.output.at += len,
            false => self.output.put_record(buffer).ok_or(None)?,
        }
        self.previous = lsn;
        self.output.pad().ok_or(None)
    }
}
