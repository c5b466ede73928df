//! Journals: WAL on a receiver's own disk, on its way into the repository (SPEC.md, section 14).
//!
//! A journal grows section by section. What always holds: nothing is appended behind a section that may be
//! torn, so that no ordinal is used twice; what does not open ends the journal.

use prost::Message;

use crate::error::{FormatError, Result, check_limit};
use crate::header::{HEADER_LEN, Kind, ObjectHeader};
use crate::keys::{EpochKeys, KeyRole, ObjectKey, Scope, TAG_LEN};
use crate::limits;
use crate::object::{SECTION_HEADER_LEN, SectionHeader, aad, codec};
use crate::proto::WalHeader;

/// Seals or opens the sections of one journal, in their order.
pub struct Journal {
    key: ObjectKey,
    header: [u8; HEADER_LEN],
    context: String,
    next: u32,
}

/// Context of the journal with this file name.
fn context(name: &str) -> String {
    format!("journal/{name}")
}

impl Journal {
    /// Begins a journal with the file name `name`; `salt` must be fresh and random. Returns the bytes that it
    /// begins with.
    pub fn begin(
        keys: &EpochKeys,
        scope: &Scope,
        salt: [u8; 32],
        name: &str,
        head: &WalHeader,
    ) -> Result<(Self, Vec<u8>)> {
        let header = ObjectHeader::new(Kind::Journal, keys.epoch, salt);
        let mut this = Self {
            key: keys.object_key(scope, &header, KeyRole::Meta)?,
            header: header.encode(),
            context: context(name),
            next: 0,
        };
        let mut out = this.header.to_vec();
        out.extend(this.seal(&head.encode_to_vec())?);
        Ok((this, out))
    }

    /// Opens a journal by its object header; its sections follow, the first is its [`Journal::head`].
    pub fn open(keys: &EpochKeys, scope: &Scope, bytes: &[u8], name: &str) -> Result<Self> {
        let header = ObjectHeader::decode_kind(bytes, Kind::Journal, name)?;
        Ok(Self {
            key: keys.object_key(scope, &header, KeyRole::Meta)?,
            header: header.encode(),
            context: context(name),
            next: 0,
        })
    }

    /// Whether no section can be added.
    pub fn is_full(&self) -> bool {
        self.next >= limits::SECTIONS
    }

    /// Seals the next section.
    pub fn seal(&mut self, content: &[u8]) -> Result<Vec<u8>> {
        let what = "a section of a journal";
        check_limit(what, content.len() as u64, limits::JOURNAL_SECTION_BYTES as u64)?;
        check_limit(what, u64::from(self.next) + 1, limits::SECTIONS.into())?;
        let section = SectionHeader {
            role: KeyRole::Meta,
            codec: codec::RAW,
            sealed_len: (content.len() + TAG_LEN) as u32,
            plain_len: content.len() as u32,
            ordinal: self.next,
        }
        .encode();
        let mut out = Vec::with_capacity(SECTION_HEADER_LEN + content.len() + TAG_LEN);
        out.extend_from_slice(&section);
        out.extend_from_slice(content);
        let aad = aad(&self.header, &section, &self.context);
        self.key.seal(self.next.into(), &aad, &mut out, SECTION_HEADER_LEN);
        self.next += 1;
        Ok(out)
    }

    /// Bytes of a section as stored, by its first [`SECTION_HEADER_LEN`] bytes.
    pub fn section_len(&self, bytes: &[u8]) -> Result<usize> {
        let section = SectionHeader::decode(bytes, &self.context)?;
        let largest = (limits::JOURNAL_SECTION_BYTES + TAG_LEN) as u64;
        check_limit(&self.context, section.sealed_len.into(), largest)?;
        Ok(SECTION_HEADER_LEN + section.sealed_len as usize)
    }

    /// Opens the next section, of which `bytes` are all bytes as stored.
    pub fn content(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let what = format!("{}, section {}", self.context, self.next);
        let damaged = |why: &str| FormatError::damaged(&what, why);
        let section = SectionHeader::decode(bytes, &what)?;
        if section.role != KeyRole::Meta || section.codec != codec::RAW || section.ordinal != self.next {
            return Err(damaged("it is not the section that comes next"));
        }
        if bytes.len() != self.section_len(bytes)? {
            return Err(damaged("its length is not what it says"));
        }
        let mut body = bytes[SECTION_HEADER_LEN..].to_vec();
        let aad = aad(&self.header, &section.encode(), &self.context);
        self.key.open(self.next.into(), &aad, &mut body, &what)?;
        if body.len() != section.plain_len as usize {
            return Err(damaged("its content is not as long as it says"));
        }
        self.next += 1;
        Ok(body)
    }

    /// Opens the first section.
    pub fn head(&mut self, bytes: &[u8]) -> Result<WalHeader> {
        let plain = self.content(bytes)?;
        WalHeader::decode(plain.as_slice()).map_err(|e| FormatError::damaged(&self.context, e.to_string()))
    }
}
