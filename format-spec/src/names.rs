//! Names of objects below a stanza (SPEC.md, section 1).

use crate::error::{FormatError, Result};

/// Name of the repository's description, at its root.
pub const REPOSITORY: &str = "fairvault.json";

/// Checks a stanza or slot name.
pub fn check_name(what: &'static str, name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && name.len() <= 64 && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return Ok(());
    }
    Err(FormatError::Invalid {
        what,
        value: name.to_owned(),
        expected: "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
    })
}

/// Name of the note in a stanza's folder that says that it was erased.
pub const ERASED: &str = "erased";
/// Folder of all slots.
pub const KEYS: &str = "keys";
/// Folder of the log.
pub const LOG: &str = "log";
/// Folder of the snapshots.
pub const SNAPSHOTS: &str = "snapshots";
/// Folder of the packs.
pub const PACKS: &str = "packs";
/// Folder of the index runs.
pub const INDEX: &str = "index";
/// Folder of the manifest roots.
pub const ROOTS: &str = "roots";
/// Folder of the WAL.
pub const WAL: &str = "wal";

/// `keys/<epoch>/<slot>`
pub fn slot(epoch: u32, name: &str) -> String {
    format!("{KEYS}/{epoch:08}/{name}")
}

/// `log/<seq>`, which is also the entry's context.
pub fn log_context(seq: u64) -> String {
    format!("{LOG}/{seq:020}")
}

/// The sequence number in the file name of a log entry.
pub fn parse_log(file: &str) -> Option<u64> {
    (file.len() == 20 && file.bytes().all(|b| b.is_ascii_digit()))
        .then(|| file.parse().ok())
        .flatten()
}

/// `snapshots/<seq>-<hash>`: the state after entry `seq`.
pub fn snapshot(seq: u64, hash: &[u8; 32]) -> String {
    format!("{SNAPSHOTS}/{seq:020}-{}", hex::encode(hash))
}

/// The sequence number and hash in a snapshot's file name.
pub fn parse_snapshot(file: &str) -> Option<(u64, [u8; 32])> {
    let (seq, hash) = file.split_once('-')?;
    let mut out = [0u8; 32];
    hex::decode_to_slice(hash, &mut out).ok()?;
    (seq.len() == 20)
        .then(|| seq.parse().ok())
        .flatten()
        .map(|seq| (seq, out))
}

/// `packs/<2 hex>/<sha-256>`
pub fn pack(hash: &[u8; 32]) -> String {
    let hash = hex::encode(hash);
    format!("{PACKS}/{}/{hash}", &hash[..2])
}

/// Folder of the notes about packs that must not be used again.
pub const DISTRUSTED: &str = "distrusted";

/// `distrusted/<sha-256 of a pack>`: the pack was found damaged, and no later backup may rely on it.
pub fn distrusted(hash: &[u8; 32]) -> String {
    format!("{DISTRUSTED}/{}", hex::encode(hash))
}

/// The hash that is the last component of an object's name.
pub fn parse_hash(name: &str) -> Option<[u8; 32]> {
    let mut out = [0u8; 32];
    hex::decode_to_slice(name.rsplit('/').next()?, &mut out).ok()?;
    Some(out)
}

/// Folder of the leases.
pub const LEASES: &str = "leases";

/// `leases/<id>`, which is also the lease's context.
pub fn lease(id: &[u8; 16]) -> String {
    format!("{LEASES}/{}", hex::encode(id))
}

/// `index/<sha-256>`
pub fn index_run(hash: &[u8; 32]) -> String {
    format!("{INDEX}/{}", hex::encode(hash))
}

/// `roots/<sha-256>`
pub fn root(hash: &[u8; 32]) -> String {
    format!("{ROOTS}/{}", hex::encode(hash))
}

/// `wal/<incarnation>/<timeline>`: everything of one timeline.
pub fn wal_folder(system_identifier: u64, timeline: u32) -> String {
    format!("{WAL}/{system_identifier:016x}/{timeline:08X}")
}

/// A file of the archive: `wal/<incarnation>/<timeline>/<file>.<epoch>`.
pub fn wal_file(system_identifier: u64, timeline: u32, file: &str, archive_epoch: u32) -> String {
    format!("{}/{file}.{archive_epoch:04}", wal_folder(system_identifier, timeline))
}

/// A piece of a segment.
pub fn wal_piece(
    system_identifier: u64,
    timeline: u32,
    segment: &str,
    start: u64,
    end: u64,
    archive_epoch: u32,
) -> String {
    format!(
        "{}/{segment}.d/{start:016X}-{end:016X}.{archive_epoch:04}",
        wal_folder(system_identifier, timeline)
    )
}

/// Start, end and archive epoch in the file name of a piece.
pub fn parse_piece(file: &str) -> Option<(u64, u64, u32)> {
    let (range, epoch) = file.split_once('.')?;
    let (start, end) = range.split_once('-')?;
    let lsn = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok()).flatten();
    Some((lsn(start)?, lsn(end)?, epoch.parse().ok()?))
}

/// What the name of a WAL object says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalName<'a> {
    /// The incarnation.
    pub system_identifier: u64,
    /// The timeline.
    pub timeline: u32,
    /// The file as PostgreSQL knows it; of a piece, its segment.
    pub file: &'a str,
    /// The archive epoch.
    pub epoch: u32,
    /// A piece, not the file as a whole.
    pub is_piece: bool,
}

/// Reads the name of any object below `wal/`.
pub fn parse_wal(object: &str) -> Option<WalName<'_>> {
    let parts: Vec<&str> = object.split('/').collect();
    let (system_identifier, timeline, file, epoch, is_piece) = match parts.as_slice() {
        [WAL, life, timeline, file] => {
            let (name, epoch) = parse_wal_file(file)?;
            (life, timeline, name, epoch, false)
        }
        [WAL, life, timeline, of, file] => {
            let (_, _, epoch) = parse_piece(file)?;
            (life, timeline, of.strip_suffix(".d")?, epoch, true)
        }
        _ => return None,
    };
    Some(WalName {
        system_identifier: u64::from_str_radix(system_identifier, 16).ok()?,
        timeline: u32::from_str_radix(timeline, 16).ok()?,
        file,
        epoch,
        is_piece,
    })
}

/// File name and archive epoch in the last component of a WAL object's name.
pub fn parse_wal_file(file: &str) -> Option<(&str, u32)> {
    let (name, epoch) = file.rsplit_once('.')?;
    (epoch.len() >= 4 && epoch.bytes().all(|b| b.is_ascii_digit()))
        .then(|| epoch.parse().ok())
        .flatten()
        .map(|e| (name, e))
}
