//! The 80-byte header that every binary object begins with (SPEC.md, section 2).

use crate::error::{FormatError, Result};

/// Length of the header, bytes.
pub const HEADER_LEN: usize = 80;
const MAGIC: &[u8; 4] = b"FVLT";
const VERSION: u8 = 1;
/// Feature bit of manifest roots: frame tables and extents may be relative ([`crate::manifest`]).
const RELATIVE: u16 = 1;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Frames.
    Pack = 1,
    /// Index run.
    IndexRun = 2,
    /// Manifest root.
    Root = 3,
    /// Log entry.
    LogEntry = 4,
    /// Log snapshot.
    Snapshot = 5,
    /// Complete WAL segment.
    WalSegment = 6,
    /// Piece of a WAL segment.
    WalPiece = 7,
    /// History, backup history or partial segment.
    WalSide = 8,
    /// A reader at work.
    Lease = 10,
    /// Pieces declared to be a segment.
    PieceSeal = 11,
    /// WAL on a receiver's own disk; never in a repository.
    Journal = 12,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Pack,
            2 => Self::IndexRun,
            3 => Self::Root,
            4 => Self::LogEntry,
            5 => Self::Snapshot,
            6 => Self::WalSegment,
            7 => Self::WalPiece,
            8 => Self::WalSide,
            10 => Self::Lease,
            11 => Self::PieceSeal,
            12 => Self::Journal,
            _ => return None,
        })
    }

    /// Feature bits that this version knows and writes.
    fn features(self) -> u16 {
        match self {
            Self::Root => RELATIVE,
            _ => 0,
        }
    }
}

/// How the data key of an object is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyMode {
    /// From the epoch's symmetric data key.
    Symmetric,
    /// Encapsulated to the epoch's public key (32 bytes, HPKE).
    PublicKey([u8; 32]),
}

/// The plaintext header of an object; all of it is associated data of everything sealed in the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ObjectHeader {
    /// What the object is.
    pub kind: Kind,
    /// Feature bits.
    pub features: u16,
    /// Key epoch.
    pub epoch: u32,
    /// Where the data key comes from.
    pub key_mode: KeyMode,
    /// Random, never used for two objects.
    pub salt: [u8; 32],
}

impl ObjectHeader {
    /// A header in symmetric mode.
    pub fn new(kind: Kind, epoch: u32, salt: [u8; 32]) -> Self {
        Self {
            kind,
            features: kind.features(),
            epoch,
            key_mode: KeyMode::Symmetric,
            salt,
        }
    }

    /// The 80 bytes as stored.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0u8; HEADER_LEN];
        out[..4].copy_from_slice(MAGIC);
        out[4] = VERSION;
        out[5] = self.kind as u8;
        out[6..8].copy_from_slice(&self.features.to_le_bytes());
        out[8..12].copy_from_slice(&self.epoch.to_le_bytes());
        out[16..48].copy_from_slice(&self.salt);
        if let KeyMode::PublicKey(encapsulated) = &self.key_mode {
            out[12] = 1;
            out[48..80].copy_from_slice(encapsulated);
        }
        out
    }

    /// Reads a header from the beginning of `bytes`; `what` names the object in errors.
    pub fn decode(bytes: &[u8], what: &str) -> Result<Self> {
        let Some(bytes) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(FormatError::damaged(
                what,
                format!("{} bytes are no object header ({HEADER_LEN} bytes)", bytes.len()),
            ));
        };
        if &bytes[..4] != MAGIC {
            return Err(FormatError::damaged(what, "it does not begin with FVLT"));
        }
        if bytes[4] != VERSION {
            return Err(FormatError::unsupported(what, format!("format version {}", bytes[4])));
        }
        let kind = Kind::from_byte(bytes[5])
            .ok_or_else(|| FormatError::unsupported(what, format!("object kind {}", bytes[5])))?;
        let features = u16::from_le_bytes([bytes[6], bytes[7]]);
        let unknown = features & !kind.features();
        if unknown != 0 {
            return Err(FormatError::unsupported(what, format!("feature bits {unknown:#06x}")));
        }
        let mut salt = [0u8; 32];
        salt.copy_from_slice(&bytes[16..48]);
        let mut tail = [0u8; 32];
        tail.copy_from_slice(&bytes[48..80]);
        let key_mode = match bytes[12] {
            0 if tail == [0; 32] => KeyMode::Symmetric,
            0 => return Err(FormatError::damaged(what, "key mode 0 with an encapsulated key")),
            1 => KeyMode::PublicKey(tail),
            other => return Err(FormatError::unsupported(what, format!("key mode {other}"))),
        };
        if bytes[13..16] != [0; 3] {
            return Err(FormatError::damaged(what, "reserved header bytes are not zero"));
        }
        let epoch = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        Ok(Self {
            kind,
            features,
            epoch,
            key_mode,
            salt,
        })
    }

    /// Like [`ObjectHeader::decode`], and the kind must be `kind`.
    pub fn decode_kind(bytes: &[u8], kind: Kind, what: &str) -> Result<Self> {
        let header = Self::decode(bytes, what)?;
        if header.kind != kind {
            return Err(FormatError::damaged(
                what,
                format!("it is a {:?}, expected a {kind:?}", header.kind),
            ));
        }
        Ok(header)
    }
}
