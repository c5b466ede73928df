//! A `backup_manifest` of what was restored, for `pg_verifybackup` (manual: "Backup Manifest Format").
//!
//! It lists the files as they now are: those that the restore had to change get their new length and CRC.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use fairvault_format::proto::{FileEntry, FileKind};
use serde::Serialize;
use sha2::Digest;

use super::layout::Layout;
use super::plan::Plan;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;

#[derive(Serialize)]
struct File<'a> {
    #[serde(rename = "Path")]
    path: &'a str,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Last-Modified")]
    last_modified: String,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: &'static str,
    #[serde(rename = "Checksum")]
    checksum: String,
}

/// CRC-32C as PostgreSQL prints it: the bytes of the value in memory order.
fn checksum(crc: u32) -> String {
    hex::encode(crc.to_le_bytes())
}

/// Writes `backup_manifest`. `changed` are paths of files that the restore changed, `crcs` the CRCs of files whose
/// manifest does not have it, by number.
pub fn write(plan: &Plan, layout: &Layout, changed: &[String], crcs: &HashMap<u32, u32>) -> Result<()> {
    let version = if plan.info.server_version >= 170_000 { 2 } else { 1 };
    let mut text = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n");
    if version >= 2 {
        text.push_str(&format!("\"System-Identifier\": {},\n", plan.info.system_identifier));
    }
    text.push_str("\"Files\": [");
    let mut first = true;
    // What the restore added is listed too: pg_verifybackup tolerates no strangers.
    let added = changed
        .iter()
        .filter(|path| !plan.files.iter().any(|f| &f.path == *path))
        .map(|path| FileEntry {
            path: path.clone(),
            mtime_us: plan.info.stopped_us,
            ..FileEntry::default()
        });
    let added: Vec<FileEntry> = added.collect();
    let numbered = plan.files.iter().enumerate();
    let numbered = numbered.map(|(number, file)| (Some(number as u32), file));
    for (number, file) in numbered
        .filter(|(_, f)| f.kind() == FileKind::FileRegular)
        .chain(added.iter().map(|file| (None, file)))
    {
        let computed = number.and_then(|number| crcs.get(&number));
        let (mut size, mut crc) = (file.size, computed.copied().unwrap_or(file.crc32c));
        if changed.iter().any(|c| c == &file.path) {
            let path = layout.directory.join(&file.path);
            let Ok(content) = std::fs::read(&path) else { continue };
            (size, crc) = (content.len() as u64, crc32c::crc32c(&content));
        }
        let time = jiff::Timestamp::from_microsecond(file.mtime_us).unwrap_or_default();
        let line = File {
            path: &file.path,
            size,
            last_modified: time.strftime("%Y-%m-%d %H:%M:%S GMT").to_string(),
            algorithm: "CRC32C",
            checksum: checksum(crc),
        };
        text.push_str(if first { "\n" } else { ",\n" });
        first = false;
        text.push_str(
            &serde_json::to_string(&line).map_err(|e| Error::failed("writing backup_manifest").caused_by(e))?,
        );
    }
    let range = format!(
        "{{ \"Timeline\": {}, \"Start-LSN\": \"{}\", \"End-LSN\": \"{}\" }}",
        plan.info.start_timeline,
        Lsn(plan.info.start_lsn),
        Lsn(plan.info.stop_lsn)
    );
    text.push_str(&format!("\n],\n\"WAL-Ranges\": [\n{range}\n],\n"));
    let hash = hex::encode(sha2::Sha256::digest(text.as_bytes()));
    text.push_str(&format!("\"Manifest-Checksum\": \"{hash}\"}}\n"));
    let path = layout.directory.join("backup_manifest");
    let result = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut f| {
            f.write_all(text.as_bytes())?;
            f.sync_all()
        });
    result.map_err(|e| Error::io(format_args!("writing {}", path.display()), e))
}
