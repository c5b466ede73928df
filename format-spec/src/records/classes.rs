//! Classes of records: what the records of one class have in common, and their rows, of one width, as columns of
//! bytes.
//!
//! A record behind its header is head, middle and main data, in this order. Head: what says what the rest is. Middle:
//! images and data of blocks; of a record without either, the main data. A row is transaction, info and resource
//! manager, a length where fields do not give it, the head, the lead (the first bytes of the middle, without images)
//! and the main data. What the middle has beyond its lead is the tail.

use super::{u16_at, u32_at};
use crate::columns::{Input, SAMPLE, differences_pay};
use crate::error::Result;

/// Bytes of a row before the head: transaction, info, resource manager.
pub const ROW_HEADER: usize = 6;
/// Bytes of the length, in rows of classes without fields.
const LENGTH: usize = 4;
/// Bytes of a class in the table, before images, fields and columns.
const FIXED: usize = 12;

/// How a column is stored.
mod column {
    pub const CONSTANT: u8 = 0;
    pub const PLAIN: u8 = 1;
    pub const DIFFERENCES: u8 = 2;
}

/// An image in the records of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageAt {
    /// Where in the head its length is, u16, followed by the offset of its hole, u16.
    pub header: u16,
    /// Bytes of the middle, without images, before it.
    pub before: u16,
}

/// A length in the head: data of a block, or main data where that is the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Where in the head it is.
    pub at: u16,
    /// Its bytes: 1, 2 or 4.
    pub width: u8,
}

/// What the records of a class have in common.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of the head.
    pub head: usize,
    /// Bytes of the lead.
    pub lead: usize,
    /// Bytes of the main data.
    pub main: usize,
    /// Images, in their order.
    pub images: Vec<ImageAt>,
    /// Fields whose sum is the length of the middle without images.
    pub fields: Vec<Field>,
}

impl Shape {
    /// Where in a row the head begins.
    pub fn head_at(&self) -> usize {
        match self.fields.is_empty() {
            true => ROW_HEADER + LENGTH,
            false => ROW_HEADER,
        }
    }

    /// Bytes of a row.
    pub fn width(&self) -> usize {
        self.head_at() + self.head + self.lead + self.main
    }

    /// Bytes that the tail of a row has; `None` if its fields say less than the lead.
    pub fn tail_len(&self, row: &[u8]) -> Option<usize> {
        if self.fields.is_empty() {
            return Some(u32_at(row, ROW_HEADER) as usize);
        }
        self.sum(row, self.head_at())?.checked_sub(self.lead)
    }

    /// The sum of the fields of a head that begins at `head_at`.
    pub fn sum(&self, bytes: &[u8], head_at: usize) -> Option<usize> {
        self.fields.iter().try_fold(0usize, |sum, field| {
            let at = head_at + usize::from(field.at);
            let value = match field.width {
                1 => bytes.get(at).copied().unwrap_or_default().into(),
                2 => u16_at(bytes, at),
                _ => u32_at(bytes, at) as usize,
            };
            sum.checked_add(value)
        })
    }

    /// Whether the columns that say how long a tail is are constant, by the kinds of all columns.
    fn is_length_constant(&self, kinds: &[u8]) -> bool {
        let constant = |at: usize, len: usize| kinds[at..at + len].iter().all(|&kind| kind == column::CONSTANT);
        match self.fields.is_empty() {
            true => constant(ROW_HEADER, LENGTH),
            false => {
                let mut fields = self.fields.iter();
                fields.all(|field| constant(ROW_HEADER + usize::from(field.at), field.width.into()))
            }
        }
    }

    fn write(&self, tail: usize, out: &mut Vec<u8>) {
        for value in [self.head, self.lead, self.main] {
            out.extend_from_slice(&(value as u16).to_le_bytes());
        }
        out.extend_from_slice(&[self.images.len() as u8, self.fields.len() as u8]);
        out.extend_from_slice(&(tail as u32).to_le_bytes());
        for image in &self.images {
            out.extend_from_slice(&image.header.to_le_bytes());
            out.extend_from_slice(&image.before.to_le_bytes());
        }
        for field in &self.fields {
            out.extend_from_slice(&field.at.to_le_bytes());
            out.push(field.width);
        }
    }

    /// Reads what [`Shape::write`] has written, and the bytes of all tails.
    fn read(input: &mut Input<'_>) -> Result<(Self, usize)> {
        let fixed = input.take(FIXED)?;
        let mut shape = Self {
            head: u16_at(fixed, 0),
            lead: u16_at(fixed, 2),
            main: u16_at(fixed, 4),
            ..Self::default()
        };
        let mut least = 0;
        for image in input.take(4 * usize::from(fixed[6]))?.as_chunks::<4>().0 {
            let image = ImageAt {
                header: u16_at(image, 0) as u16,
                before: u16_at(image, 2) as u16,
            };
            let before = usize::from(image.before);
            if usize::from(image.header) + 4 > shape.head || before < least || before > shape.lead {
                return Err(input.damaged("an image of a class"));
            }
            least = before;
            shape.images.push(image);
        }
        for &[low, high, width] in input.take(3 * usize::from(fixed[7]))?.as_chunks::<3>().0 {
            let at = u16::from_le_bytes([low, high]);
            if !matches!(width, 1 | 2 | 4) || usize::from(at) + usize::from(width) > shape.head {
                return Err(input.damaged("a field of a class"));
            }
            shape.fields.push(Field { at, width });
        }
        Ok((shape, u32_at(fixed, 8) as usize))
    }
}

/// A class that is being written.
#[derive(Debug, Default)]
pub struct Writing {
    /// What its records have in common.
    pub shape: Shape,
    /// Rows, one after the other.
    pub rows: Vec<u8>,
    /// Tails, one after the other.
    pub tails: Vec<u8>,
}

impl Writing {
    /// Appends the class to the table, and its columns to `planes`.
    pub fn write(&self, table: &mut Vec<u8>, planes: &mut Vec<u8>) {
        let width = self.shape.width();
        self.shape.write(self.tails.len(), table);
        let mut varies = vec![0u8; width];
        let first = self.rows.get(..width).unwrap_or(&varies).to_vec();
        for row in self.rows.chunks_exact(width) {
            for ((varies, byte), first) in varies.iter_mut().zip(row).zip(&first) {
                *varies |= byte ^ first;
            }
        }
        let mut varying = Vec::new();
        for (at, &varies) in varies.iter().enumerate() {
            let bytes = || self.rows.iter().skip(at).step_by(width).copied();
            let kind = match varies {
                0 => column::CONSTANT,
                _ if differences_pay(bytes().take(SAMPLE / 2)) => column::DIFFERENCES,
                _ => column::PLAIN,
            };
            table.push(kind);
            if kind != column::CONSTANT {
                varying.push((at, if kind == column::DIFFERENCES { 0xff } else { 0 }));
            }
        }
        for (&byte, &varies) in first.iter().zip(&varies) {
            if varies == 0 {
                table.push(byte);
            }
        }
        let count = self.rows.len() / width;
        let base = planes.len();
        planes.resize(base + varying.len() * count, 0);
        // A few columns at a time: each has a place of its own that is written to.
        for (columns, planes) in varying.chunks(32).zip(planes[base..].chunks_mut((32 * count).max(1))) {
            let mut before = [0u8; 32];
            for (number, row) in self.rows.chunks_exact(width).enumerate() {
                for ((&(at, mask), before), plane) in
                    columns.iter().zip(&mut before).zip(planes.chunks_exact_mut(count))
                {
                    plane[number] = row[at].wrapping_sub(*before & mask);
                    *before = row[at];
                }
            }
        }
    }
}

/// A class that is being read.
#[derive(Debug)]
pub struct Reading<'a> {
    /// What its records have in common.
    pub shape: Shape,
    /// Bytes of a row.
    pub width: usize,
    /// Bytes of every row's tail, where the columns that say it are constant.
    pub fixed_tail: Option<usize>,
    /// Where the next row begins among all rows.
    pub row: usize,
    /// Tails that have not been used.
    pub tails: &'a [u8],
    /// Bytes of all tails.
    tails_len: usize,
    kinds: &'a [u8],
    /// The constant bytes of a row, others being 0.
    template: Vec<u8>,
}

impl<'a> Reading<'a> {
    /// Reads a class of the table.
    pub fn read(input: &mut Input<'a>) -> Result<Self> {
        let (shape, tails_len) = Shape::read(input)?;
        let width = shape.width();
        let kinds = input.take(width)?;
        if kinds.iter().any(|&kind| kind > column::DIFFERENCES) {
            return Err(input.damaged("a column of an unknown kind"));
        }
        let is_constant = |(_, kind): &(&mut u8, &u8)| **kind == column::CONSTANT;
        let constants = input.take(kinds.iter().filter(|&&kind| kind == column::CONSTANT).count())?;
        let mut template = vec![0; width];
        for ((byte, _), &constant) in template.iter_mut().zip(kinds).filter(is_constant).zip(constants) {
            *byte = constant;
        }
        let fixed_tail = match shape.is_length_constant(kinds) {
            // Less than the lead: then there may be no row.
            true => shape.tail_len(&template),
            false => None,
        };
        Ok(Self {
            shape,
            width,
            fixed_tail,
            row: 0,
            tails: &[],
            tails_len,
            kinds,
            template,
        })
    }

    /// Fills `rows`, all rows of the class, from its columns.
    pub fn read_rows(&self, input: &mut Input<'a>, rows: &mut [u8]) -> Result<()> {
        let (width, count) = (self.width, rows.len() / self.width);
        let mut columns = Vec::with_capacity(width);
        for (at, &kind) in self
            .kinds
            .iter()
            .enumerate()
            .filter(|(_, kind)| **kind != column::CONSTANT)
        {
            columns.push((at, kind == column::DIFFERENCES, 0u8, input.take(count)?));
        }
        // Some rows at a time, which stay in the cache until all their columns are there.
        let block = (ROWS_BYTES / width).max(1);
        for (number, rows) in rows.chunks_mut(block * width).enumerate() {
            let (from, count) = (number * block, rows.len() / width);
            for row in rows.chunks_exact_mut(width) {
                row.copy_from_slice(&self.template);
            }
            for (at, is_difference, before, plane) in &mut columns {
                let bytes = &plane[from..from + count];
                match is_difference {
                    true => {
                        for (row, &byte) in rows.chunks_exact_mut(width).zip(bytes) {
                            *before = before.wrapping_add(byte);
                            row[*at] = *before;
                        }
                    }
                    false => {
                        for (row, &byte) in rows.chunks_exact_mut(width).zip(bytes) {
                            row[*at] = byte;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes its tails.
    pub fn read_tails(&mut self, input: &mut Input<'a>) -> Result<()> {
        self.tails = input.take(self.tails_len)?;
        Ok(())
    }
}

/// Bytes of rows that are filled at a time.
const ROWS_BYTES: usize = 16 << 10;
