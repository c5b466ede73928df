//! Images of pages, in groups that the transform of codec 2 takes apart.

use super::{GROUP_PAGES, IMAGE_BYTES, u16_at, u32_at};
use crate::columns::Input;
use crate::error::Result;
use crate::pages;

/// How an image is kept.
mod kind {
    /// As it is.
    pub const PLAIN: u8 = 0;
    /// As a page with zeros in its hole.
    pub const PAGE: u8 = 1;
}

/// Words of a heap tuple's body, and of other items, that become columns.
const WORDS: usize = 4;

/// The hole of an image of `len` bytes that is a page: where it begins. `None` if the image cannot be one.
fn hole_of(len: usize, hole_at: usize) -> Option<usize> {
    ((IMAGE_BYTES..=pages::PAGE).contains(&len) && hole_at <= len).then_some(hole_at)
}

/// Images that are being taken apart.
#[derive(Debug, Default)]
pub struct Writing {
    kinds: Vec<u8>,
    plain: Vec<u8>,
    pages: Vec<u8>,
    encoder: pages::Encoder,
}

impl Writing {
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.kinds.clear();
        self.plain.clear();
        self.pages.clear();
    }

    /// Adds an image; `header` is what its record says of it.
    pub fn push(&mut self, header: &[u8], image: &[u8], is_compressed: bool) {
        match hole_of(image.len(), u16_at(header, 2)).filter(|_| !is_compressed) {
            None => {
                self.kinds.push(kind::PLAIN);
                self.plain.extend_from_slice(image);
            }
            Some(hole_at) => {
                self.kinds.push(kind::PAGE);
                let (before, behind) = image.split_at(hole_at);
                self.pages.extend_from_slice(before);
                self.pages.resize(self.pages.len() + pages::PAGE - image.len(), 0);
                self.pages.extend_from_slice(behind);
            }
        }
    }

    /// Appends all of them.
    pub fn write(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.kinds);
        let mut groups = Vec::new();
        for group in self.pages.chunks(GROUP_PAGES * pages::PAGE) {
            let from = groups.len();
            let plan = self.encoder.propose(group, WORDS, WORDS);
            self.encoder.encode(group, &plan, &mut groups);
            out.extend_from_slice(&((groups.len() - from) as u32).to_le_bytes());
        }
        out.append(&mut groups);
        out.extend_from_slice(&self.plain);
    }
}

/// Images that are being put together, in their order.
pub struct Reading<'a, 'b> {
    kinds: &'a [u8],
    groups: std::vec::IntoIter<&'a [u8]>,
    /// Images that are kept as they are, and whatever may be behind them.
    plain: Input<'a>,
    /// Pages that are not in a group that was read.
    left: usize,
    buffers: &'b mut Buffers,
    what: &'a str,
}

/// What [`Reading`] keeps from one run to the next.
#[derive(Debug, Default)]
pub struct Buffers {
    pages: Vec<u8>,
    used: usize,
    decoder: pages::Decoder,
}

impl<'a, 'b> Reading<'a, 'b> {
    /// Begins to read `count` images, which are all that is left of `input`.
    pub fn new(mut input: Input<'a>, count: usize, buffers: &'b mut Buffers, what: &'a str) -> Result<Self> {
        let kinds = input.take(count)?;
        if kinds.iter().any(|&kind| kind > kind::PAGE) {
            return Err(input.damaged("an image of an unknown kind"));
        }
        let left = kinds.iter().filter(|&&kind| kind == kind::PAGE).count();
        let lengths = input.take(4 * left.div_ceil(GROUP_PAGES))?.as_chunks::<4>().0;
        let groups: Result<Vec<_>> = lengths.iter().map(|len| input.take(u32_at(len, 0) as usize)).collect();
        buffers.pages.clear();
        buffers.used = 0;
        Ok(Self {
            kinds,
            groups: groups?.into_iter(),
            plain: input,
            left,
            buffers,
            what,
        })
    }

    /// Fills `image`, the next one; `header` is what its record says of it.
    pub fn next(&mut self, header: &[u8], image: &mut [u8]) -> Result<()> {
        let (kind, rest) = self.kinds.split_first().unwrap_or((&kind::PLAIN, &[]));
        self.kinds = rest;
        if *kind == kind::PLAIN {
            image.copy_from_slice(self.plain.take(image.len())?);
            return Ok(());
        }
        let hole_at =
            hole_of(image.len(), u16_at(header, 2)).ok_or_else(|| self.plain.damaged("an image of a page"))?;
        let page = self.page()?;
        let hole_end = hole_at + pages::PAGE - image.len();
        let (before, behind) = image.split_at_mut(hole_at);
        before.copy_from_slice(&page[..hole_at]);
        behind.copy_from_slice(&page[hole_end..]);
        Ok(())
    }

    fn page(&mut self) -> Result<&[u8]> {
        let Buffers { pages, used, decoder } = &mut *self.buffers;
        if *used == pages.len() {
            let count = self.left.min(GROUP_PAGES);
            self.left -= count;
            pages.resize(count * pages::PAGE, 0);
            *used = 0;
            decoder.decode(self.groups.next().unwrap_or_default(), pages, self.what)?;
        }
        let page = pages
            .get(*used..*used + pages::PAGE)
            .ok_or_else(|| self.plain.damaged("a page is missing"))?;
        *used += pages::PAGE;
        Ok(page)
    }

    /// Fails if anything is left.
    pub fn end(&self) -> Result<()> {
        self.plain.end()
    }
}
