//! Objects made of sections: everything binary but packs (SPEC.md, section 3).
//!
//! A section is sealed with the object's data or metadata key; its position is its nonce and is
//! authenticated together with the object header and the object's name, where that is not its hash.

use prost::Message;

use crate::error::{FormatError, Result, check_limit};
use crate::header::{HEADER_LEN, Kind, ObjectHeader};
use crate::keys::{EpochKeys, KeyRole, ObjectKey, Scope, TAG_LEN};
use crate::public::Fresh;
use crate::{limits, records};

/// Length of a section header, bytes.
pub const SECTION_HEADER_LEN: usize = 16;

/// Codec byte of sections and frames.
pub mod codec {
    /// Stored as it is.
    pub const RAW: u8 = 0;
    /// Zstandard.
    pub const ZSTD: u8 = 1;
    /// Pages taken apart ([`crate::pages`]), then zstd; in frames only.
    pub const PAGES: u8 = 2;
    /// WAL taken apart into records ([`crate::records`]), then zstd; in data sections of WAL objects only.
    pub const RECORDS: u8 = 3;
}

/// zstd level of structured objects: they are small, and written once.
const STRUCTURE_LEVEL: i32 = 3;

/// Compresses `plain` if that makes it smaller. Returns codec and output.
pub fn compress(plain: &[u8], level: i32) -> (u8, Vec<u8>) {
    let mut packer = Packer::default();
    match packer.pack(plain, level) {
        Some(_) => (codec::ZSTD, packer.buffer),
        None => (codec::RAW, plain.to_vec()),
    }
}

/// A zstd context and its output, kept from one section to the next: what is fresh each time costs the machine
/// more than compressing does.
#[derive(Default)]
struct Packer {
    context: Option<(i32, zstd::bulk::Compressor<'static>)>,
    buffer: Vec<u8>,
    records: records::Checked,
}

impl Packer {
    /// The packed form, if that is smaller.
    fn pack(&mut self, plain: &[u8], level: i32) -> Option<&[u8]> {
        if plain.len() < 64 {
            return None;
        }
        let context = match &mut self.context {
            Some((of_level, context)) if *of_level == level => context,
            other => &mut other.insert((level, zstd::bulk::Compressor::new(level).ok()?)).1,
        };
        self.buffer.clear();
        self.buffer.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        let len = context.compress_to_buffer(plain, &mut self.buffer).ok()?;
        (len < plain.len()).then_some(&self.buffer[..len])
    }

    /// The packed form of a run of WAL whose first byte is at the LSN `start`, with its codec, if that is smaller.
    fn pack_records(&mut self, plain: &[u8], start: u64, level: i32) -> Option<(u8, &[u8])> {
        let mut checked = std::mem::take(&mut self.records);
        let transformed = checked.transform(plain, start);
        let packed = transformed.and_then(|transformed| self.pack(transformed, level).map(<[u8]>::to_vec));
        self.records = checked;
        // Where it is not clear, both ways are tried; always doing so would cost twice.
        let is_clear = |packed: &[u8]| plain.len() >= FEW_BYTES && packed.len() <= plain.len() / 2;
        match packed.filter(|packed| packed.len() < plain.len()) {
            Some(packed)
                if is_clear(&packed) || self.pack(plain, level).is_none_or(|other| packed.len() <= other.len()) =>
            {
                self.buffer = packed;
                Some((codec::RECORDS, &self.buffer))
            }
            Some(_) => Some((codec::ZSTD, &self.buffer)),
            None => self.pack(plain, level).map(|packed| (codec::ZSTD, packed)),
        }
    }
}

/// Runs of WAL below this are packed in both ways.
const FEW_BYTES: usize = 256 << 10;

/// Decodes `bytes` to exactly `plain_len` bytes; never allocates more than that.
pub fn decompress(codec_byte: u8, bytes: Vec<u8>, plain_len: usize, what: &str) -> Result<Vec<u8>> {
    let plain = match codec_byte {
        codec::RAW => bytes,
        codec::ZSTD => {
            zstd::bulk::decompress(&bytes, plain_len).map_err(|e| FormatError::damaged(what, format!("zstd: {e}")))?
        }
        other => return Err(FormatError::unsupported(what, format!("codec {other}"))),
    };
    match plain.len() == plain_len {
        true => Ok(plain),
        false => Err(wrong_length(what, plain.len(), plain_len)),
    }
}

pub(crate) fn wrong_length(what: &str, len: usize, expected: usize) -> FormatError {
    FormatError::damaged(what, format!("decoded to {len} bytes instead of {expected}"))
}

pub(crate) struct SectionHeader {
    pub role: KeyRole,
    pub codec: u8,
    pub sealed_len: u32,
    pub plain_len: u32,
    pub ordinal: u32,
}

impl SectionHeader {
    pub fn encode(&self) -> [u8; SECTION_HEADER_LEN] {
        let mut out = [0u8; SECTION_HEADER_LEN];
        out[0] = self.role as u8;
        out[1] = self.codec;
        out[4..8].copy_from_slice(&self.sealed_len.to_le_bytes());
        out[8..12].copy_from_slice(&self.plain_len.to_le_bytes());
        out[12..16].copy_from_slice(&self.ordinal.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8], what: &str) -> Result<Self> {
        let Some(b) = bytes.first_chunk::<SECTION_HEADER_LEN>() else {
            return Err(FormatError::damaged(what, "it ends inside a section header"));
        };
        let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let role = match b[0] {
            0 => KeyRole::Data,
            1 => KeyRole::Meta,
            other => return Err(FormatError::unsupported(what, format!("section role {other}"))),
        };
        if !matches!(b[1], codec::RAW | codec::ZSTD | codec::RECORDS) {
            return Err(FormatError::unsupported(what, format!("codec {}", b[1])));
        }
        if b[2..4] != [0; 2] {
            return Err(FormatError::unsupported(what, "section flags"));
        }
        let header = Self {
            role,
            codec: b[1],
            sealed_len: word(4),
            plain_len: word(8),
            ordinal: word(12),
        };
        check_limit(what, header.sealed_len.into(), limits::SECTION_BYTES)?;
        check_limit(what, header.plain_len.into(), limits::SECTION_BYTES)?;
        if (header.sealed_len as usize) < TAG_LEN {
            return Err(FormatError::damaged(what, "a section is shorter than its tag"));
        }
        Ok(header)
    }
}

/// Associated data of a section.
pub(crate) fn aad(header: &[u8; HEADER_LEN], section: &[u8; SECTION_HEADER_LEN], context: &str) -> Vec<u8> {
    let mut aad = Vec::with_capacity(HEADER_LEN + SECTION_HEADER_LEN + context.len());
    aad.extend_from_slice(header);
    aad.extend_from_slice(section);
    aad.extend_from_slice(context.as_bytes());
    aad
}

/// Keys of one object, derived when first needed.
struct ObjectKeys<'a> {
    keys: &'a EpochKeys,
    scope: &'a Scope,
    header: ObjectHeader,
    data: Option<ObjectKey>,
    meta: Option<ObjectKey>,
}

impl<'a> ObjectKeys<'a> {
    fn new(keys: &'a EpochKeys, scope: &'a Scope, header: ObjectHeader) -> Self {
        Self {
            keys,
            scope,
            header,
            data: None,
            meta: None,
        }
    }

    fn get(&mut self, role: KeyRole) -> Result<&ObjectKey> {
        let slot = match role {
            KeyRole::Data => &mut self.data,
            KeyRole::Meta => &mut self.meta,
        };
        match slot {
            Some(key) => Ok(key),
            empty => Ok(empty.insert(self.keys.object_key(self.scope, &self.header, role)?)),
        }
    }
}

/// Builds an object section by section.
pub struct ObjectWriter<'a> {
    keys: ObjectKeys<'a>,
    header: [u8; HEADER_LEN],
    context: String,
    out: Vec<u8>,
    sections: u32,
    packer: Packer,
}

impl<'a> ObjectWriter<'a> {
    /// Begins an object, of metadata in an epoch with a public key. `context` is its name below the stanza, empty if it is named by its hash; `salt`
    /// must be fresh and random.
    pub fn new(keys: &'a EpochKeys, scope: &'a Scope, kind: Kind, salt: [u8; 32], context: &str) -> Self {
        let header = ObjectHeader::new(kind, keys.epoch, salt);
        let bytes = header.encode();
        Self {
            keys: ObjectKeys::new(keys, scope, header),
            header: bytes,
            context: context.to_owned(),
            out: bytes.to_vec(),
            sections: 0,
            packer: Packer::default(),
        }
    }

    /// Begins an object with content, which is sealed to the epoch's public key where there is one.
    pub fn with_data(
        keys: &'a EpochKeys,
        scope: &'a Scope,
        kind: Kind,
        fresh: impl Into<Fresh>,
        context: &str,
    ) -> Result<Self> {
        let (header, key) = keys.seal_data(scope, kind, fresh)?;
        let bytes = header.encode();
        let mut keys = ObjectKeys::new(keys, scope, header);
        keys.data = Some(key);
        Ok(Self {
            keys,
            header: bytes,
            context: context.to_owned(),
            out: bytes.to_vec(),
            sections: 0,
            packer: Packer::default(),
        })
    }

    /// Adds a section; `level` is the zstd level to try.
    pub fn section(&mut self, role: KeyRole, plain: &[u8], level: i32) -> Result<()> {
        check_limit("a section", plain.len() as u64, limits::SECTION_BYTES)?;
        let mut packer = std::mem::take(&mut self.packer);
        let added = match packer.pack(plain, level) {
            Some(packed) => self.encoded_section(role, codec::ZSTD, packed, plain.len()),
            None => self.encoded_section(role, codec::RAW, plain, plain.len()),
        };
        self.packer = packer;
        added
    }

    /// Adds a run of WAL whose first byte is at the LSN `start`, taken apart into records where that makes it smaller.
    pub fn records_section(&mut self, run: &[u8], start: u64, level: i32) -> Result<()> {
        check_limit("a run of WAL", run.len() as u64, limits::WAL_SECTION_BYTES as u64)?;
        let mut packer = std::mem::take(&mut self.packer);
        let added = match packer.pack_records(run, start, level) {
            Some((codec, packed)) => self.encoded_section(KeyRole::Data, codec, packed, run.len()),
            None => self.encoded_section(KeyRole::Data, codec::RAW, run, run.len()),
        };
        self.packer = packer;
        added
    }

    /// Leaves room for the first section, which [`ObjectWriter::finish_with_first`] adds: what it says may be
    /// known only after the others.
    pub fn leave_first(&mut self) {
        debug_assert_eq!(self.sections, 0);
        self.sections = 1;
    }

    /// The object's bytes, with the first section that was left out before.
    pub fn finish_with_first(mut self, role: KeyRole, message: &impl Message) -> Result<Vec<u8>> {
        let rest = std::mem::replace(&mut self.out, self.header.to_vec());
        self.sections = 0;
        self.message(role, message)?;
        let mut out = rest;
        let first = self.out.split_off(HEADER_LEN);
        out.splice(HEADER_LEN..HEADER_LEN, first);
        Ok(out)
    }

    /// Adds a section whose body is already encoded with `codec`.
    pub fn encoded_section(&mut self, role: KeyRole, codec: u8, packed: &[u8], plain_len: usize) -> Result<()> {
        check_limit(
            "sections of an object",
            u64::from(self.sections) + 1,
            limits::SECTIONS.into(),
        )?;
        check_limit(
            "a section",
            plain_len.max(packed.len() + TAG_LEN) as u64,
            limits::SECTION_BYTES,
        )?;
        let section = SectionHeader {
            role,
            codec,
            sealed_len: (packed.len() + TAG_LEN) as u32,
            plain_len: plain_len as u32,
            ordinal: self.sections,
        }
        .encode();
        let aad = aad(&self.header, &section, &self.context);
        self.out.reserve(SECTION_HEADER_LEN + packed.len() + TAG_LEN);
        self.out.extend_from_slice(&section);
        let from = self.out.len();
        self.out.extend_from_slice(packed);
        let ordinal = self.sections.into();
        self.keys.get(role)?.seal(ordinal, &aad, &mut self.out, from);
        self.sections += 1;
        Ok(())
    }

    /// Adds a message as a metadata or data section.
    pub fn message(&mut self, role: KeyRole, message: &impl Message) -> Result<()> {
        self.section(role, &message.encode_to_vec(), STRUCTURE_LEVEL)
    }

    /// The object's bytes.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

/// Opens an object section by section, from its bytes or from their beginning.
pub struct ObjectReader<'a> {
    keys: ObjectKeys<'a>,
    header: [u8; HEADER_LEN],
    context: String,
    what: String,
    bytes: &'a [u8],
    at: usize,
    sections: u32,
    unpacker: Unpacker,
}

/// A zstd context and a sealed section, kept from one section to the next.
#[derive(Default)]
struct Unpacker {
    context: Option<zstd::bulk::Decompressor<'static>>,
    body: Vec<u8>,
    transformed: Vec<u8>,
    records: records::Decoder,
}

impl Unpacker {
    /// Decodes the body to exactly `plain_len` bytes; never allocates more than that.
    fn unpack(&mut self, codec_byte: u8, plain_len: usize, plain: &mut Vec<u8>, what: &str) -> Result<()> {
        if codec_byte == codec::RAW {
            std::mem::swap(plain, &mut self.body);
            return same_length(what, plain.len(), plain_len);
        }
        plain.resize(plain_len, 0);
        self.unpack_to(codec_byte, plain, what)
    }

    /// Decodes the body to as many bytes as `plain` has.
    fn unpack_to(&mut self, codec_byte: u8, plain: &mut [u8], what: &str) -> Result<()> {
        let failed = |e: std::io::Error| FormatError::damaged(what, format!("zstd: {e}"));
        if codec_byte == codec::RAW {
            same_length(what, self.body.len(), plain.len())?;
            plain.copy_from_slice(&self.body);
            return Ok(());
        }
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(zstd::bulk::Decompressor::new().map_err(failed)?),
        };
        match codec_byte {
            codec::ZSTD => {
                let len = context.decompress_to_buffer(&self.body, plain).map_err(failed)?;
                same_length(what, len, plain.len())
            }
            codec::RECORDS => {
                let largest = records::largest(plain.len());
                self.transformed.clear();
                self.transformed.reserve(largest);
                let transformed = &mut self.transformed;
                context.decompress_to_buffer(&self.body, transformed).map_err(failed)?;
                check_limit(what, transformed.len() as u64, largest as u64)?;
                self.records.decode(transformed, plain, what)
            }
            other => Err(FormatError::unsupported(what, format!("codec {other}"))),
        }
    }
}

fn same_length(what: &str, len: usize, expected: usize) -> Result<()> {
    match len == expected {
        true => Ok(()),
        false => Err(wrong_length(what, len, expected)),
    }
}

impl<'a> ObjectReader<'a> {
    /// Reads the header. `what` names the object in errors, `context` as in [`ObjectWriter::new`].
    pub fn new(
        keys: &'a EpochKeys,
        scope: &'a Scope,
        kind: Kind,
        bytes: &'a [u8],
        context: &str,
        what: &str,
    ) -> Result<Self> {
        let header = ObjectHeader::decode_kind(bytes, kind, what)?;
        Ok(Self {
            keys: ObjectKeys::new(keys, scope, header),
            header: header.encode(),
            context: context.to_owned(),
            what: what.to_owned(),
            bytes,
            at: HEADER_LEN,
            sections: 0,
            unpacker: Unpacker::default(),
        })
    }

    /// Bytes from the beginning of the object that must be at hand to read the next section; beyond the
    /// section header it is a guess until that is there.
    pub fn next_section_end(&self) -> Result<usize> {
        let Some(rest) = self.bytes.get(self.at..).filter(|r| r.len() >= SECTION_HEADER_LEN) else {
            return Ok(self.at + SECTION_HEADER_LEN);
        };
        Ok(self.at + SECTION_HEADER_LEN + SectionHeader::decode(rest, &self.what)?.sealed_len as usize)
    }

    /// Another reader at the same place.
    pub fn again(&self) -> Self {
        Self {
            keys: ObjectKeys::new(self.keys.keys, self.keys.scope, self.keys.header),
            header: self.header,
            context: self.context.clone(),
            what: self.what.clone(),
            bytes: self.bytes,
            at: self.at,
            sections: self.sections,
            unpacker: Unpacker::default(),
        }
    }

    /// The header and the sealed bytes of the section that comes next.
    fn next(&self) -> Result<(SectionHeader, &'a [u8])> {
        let rest = &self.bytes[self.at..];
        let section = self.header_of(self.sections, rest)?;
        let sealed = &rest[SECTION_HEADER_LEN..];
        let sealed = &sealed[..sealed.len().min(section.sealed_len as usize)];
        self.check_arrived(&section, sealed.len())?;
        Ok((section, sealed))
    }

    /// Fails unless all of a section is there.
    pub(crate) fn check_arrived(&self, section: &SectionHeader, len: usize) -> Result<()> {
        match len == section.sealed_len as usize {
            true => Ok(()),
            false => Err(FormatError::damaged(
                self.called(section.ordinal),
                format!("it needs {} bytes and {len} are left", section.sealed_len),
            )),
        }
    }

    /// What a section is called in errors.
    pub(crate) fn called(&self, ordinal: u32) -> String {
        format!("{}, section {ordinal}", self.what)
    }

    /// The header of a section, which begins with `bytes`.
    pub(crate) fn header_of(&self, ordinal: u32, bytes: &[u8]) -> Result<SectionHeader> {
        check_limit(&self.what, u64::from(ordinal) + 1, limits::SECTIONS.into())?;
        let section = SectionHeader::decode(bytes, &self.called(ordinal))?;
        if section.ordinal != ordinal {
            return Err(FormatError::damaged(
                self.called(ordinal),
                format!("it says that it is section {}", section.ordinal),
            ));
        }
        let is_wal = matches!(self.keys.header.kind, Kind::WalSegment | Kind::WalPiece | Kind::WalSide);
        if section.codec == codec::RECORDS {
            if !(is_wal && section.role == KeyRole::Data) {
                return Err(FormatError::unsupported(
                    self.called(ordinal),
                    "codec 3 where no WAL is",
                ));
            }
            check_limit(
                &self.called(ordinal),
                section.plain_len.into(),
                limits::WAL_SECTION_BYTES as u64,
            )?;
        }
        Ok(section)
    }

    fn pass(&mut self, section: &SectionHeader) {
        self.at += SECTION_HEADER_LEN + section.sealed_len as usize;
        self.sections += 1;
    }

    /// The next section's plaintext, `None` at the end. Its role must be `role`.
    pub fn section(&mut self, role: KeyRole) -> Result<Option<Vec<u8>>> {
        let mut plain = Vec::new();
        Ok(self.section_into(role, &mut plain)?.then_some(plain))
    }

    /// The same into a buffer that is used again; `false` at the end.
    pub fn section_into(&mut self, role: KeyRole, plain: &mut Vec<u8>) -> Result<bool> {
        if self.at == self.bytes.len() {
            return Ok(false);
        }
        let (section, what) = self.open_next(role)?;
        self.unpacker
            .unpack(section.codec, section.plain_len as usize, plain, &what)?;
        self.pass(&section);
        Ok(true)
    }

    /// A section of this object that is elsewhere, sealed, into as many bytes as it has. `sealed` is left for the next.
    pub(crate) fn section_apart(
        &mut self,
        section: &SectionHeader,
        sealed: &mut Vec<u8>,
        role: KeyRole,
        plain: &mut [u8],
    ) -> Result<()> {
        let what = self.called(section.ordinal);
        same_length(&what, section.plain_len as usize, plain.len())?;
        std::mem::swap(sealed, &mut self.unpacker.body);
        self.open_body(section, role, &what)?;
        self.unpacker.unpack_to(section.codec, plain, &what)
    }

    /// Decrypts the next section; returns its header and what it is called.
    fn open_next(&mut self, role: KeyRole) -> Result<(SectionHeader, String)> {
        let (section, sealed) = self.next()?;
        let what = self.called(self.sections);
        self.unpacker.body.clear();
        self.unpacker.body.extend_from_slice(sealed);
        self.open_body(&section, role, &what)?;
        Ok((section, what))
    }

    /// Decrypts a section where it is.
    fn open_body(&mut self, section: &SectionHeader, role: KeyRole, what: &str) -> Result<()> {
        if section.role != role {
            return Err(FormatError::damaged(
                what,
                format!("it is sealed as {:?}, expected {role:?}", section.role),
            ));
        }
        let aad = aad(&self.header, &section.encode(), &self.context);
        let key = self.keys.get(role)?;
        key.open(section.ordinal.into(), &aad, &mut self.unpacker.body, what)
    }

    /// The next section as a message.
    pub fn message<M: Message + Default>(&mut self, role: KeyRole) -> Result<M> {
        let what = self.what.clone();
        let plain = self
            .section(role)?
            .ok_or_else(|| FormatError::damaged(&what, "a section is missing"))?;
        M::decode(plain.as_slice()).map_err(|e| FormatError::damaged(what, e.to_string()))
    }

    /// Fails if anything is left.
    pub fn end(&self) -> Result<()> {
        match self.bytes.len() - self.at {
            0 => Ok(()),
            n => Err(FormatError::damaged(
                &self.what,
                format!("{n} bytes after its last section"),
            )),
        }
    }
}

/// Seals one metadata message as a whole object.
pub fn seal_message(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    salt: [u8; 32],
    context: &str,
    message: &impl Message,
) -> Result<Vec<u8>> {
    let mut writer = ObjectWriter::new(keys, scope, kind, salt, context);
    writer.message(KeyRole::Meta, message)?;
    Ok(writer.finish())
}

/// Opens an object that is one metadata message.
pub fn open_message<M: Message + Default>(
    keys: &EpochKeys,
    scope: &Scope,
    kind: Kind,
    bytes: &[u8],
    context: &str,
    what: &str,
) -> Result<M> {
    let mut reader = ObjectReader::new(keys, scope, kind, bytes, context, what)?;
    let message = reader.message(KeyRole::Meta)?;
    reader.end()?;
    Ok(message)
}

/// Seals a lone section at ordinal 0 with an empty context: the directory of a pack.
pub fn seal_section(
    keys: &EpochKeys,
    scope: &Scope,
    header: &ObjectHeader,
    role: KeyRole,
    plain: &[u8],
) -> Result<Vec<u8>> {
    let mut writer = ObjectWriter {
        keys: ObjectKeys::new(keys, scope, *header),
        header: header.encode(),
        context: String::new(),
        out: Vec::new(),
        sections: 0,
        packer: Packer::default(),
    };
    writer.section(role, plain, STRUCTURE_LEVEL)?;
    Ok(writer.finish())
}

/// Opens what [`seal_section`] made.
pub fn open_section(
    keys: &EpochKeys,
    scope: &Scope,
    header: &ObjectHeader,
    role: KeyRole,
    bytes: &[u8],
    what: &str,
) -> Result<Vec<u8>> {
    let mut reader = ObjectReader {
        keys: ObjectKeys::new(keys, scope, *header),
        header: header.encode(),
        context: String::new(),
        what: what.to_owned(),
        bytes,
        at: 0,
        sections: 0,
        unpacker: Unpacker::default(),
    };
    let plain = reader
        .section(role)?
        .ok_or_else(|| FormatError::damaged(what, "it has no directory"))?;
    reader.end()?;
    Ok(plain)
}
