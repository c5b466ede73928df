//! `global/pg_control`, as far as it is the same from 14 to 19: identifier, versions, checkpoint, settings
//! that recovery insists on (`catalog/pg_control.h`).

use super::lsn::Lsn;
use crate::error::{Error, Result};

/// Bytes of pg_control that hold data; the file is padded to 8 KiB.
pub const CONTROL_BYTES: usize = 512;

/// What fairvault reads of pg_control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlFile {
    /// System identifier.
    pub system_identifier: u64,
    /// PG_CONTROL_VERSION.
    pub control_version: u32,
    /// CATALOG_VERSION_NO.
    pub catalog_version: u32,
    /// DBState.
    pub state: u32,
    /// Latest checkpoint.
    pub checkpoint: Lsn,
    /// Its redo point.
    pub redo: Lsn,
    /// Its timeline.
    pub timeline: u32,
}

impl ControlFile {
    /// Reads the file. Fields behind the checkpoint differ between versions and are left alone.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bad = |why: String| Error::damaged(format!("global/pg_control is damaged: {why}"));
        if bytes.len() < CONTROL_BYTES {
            return Err(bad(format!(
                "it has {} bytes, expected at least {CONTROL_BYTES}",
                bytes.len()
            )));
        }
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let control = Self {
            system_identifier: u64_at(0),
            control_version: u32_at(8),
            catalog_version: u32_at(12),
            state: u32_at(16),
            checkpoint: Lsn(u64_at(32)),
            redo: Lsn(u64_at(40)),
            timeline: u32_at(48),
        };
        if !super::VERSIONS
            .iter()
            .any(|v| v.control_version == control.control_version)
        {
            return Err(Error::new(
                crate::error::Kind::Unsupported,
                format!(
                    "global/pg_control has version {}, which fairvault does not know",
                    control.control_version
                ),
            ));
        }
        // The CRC stands right behind the last field: at the first place where it matches.
        let matches = (200..CONTROL_BYTES - 4)
            .step_by(4)
            .any(|at| crc32c::crc32c(&bytes[..at]) == u32_at(at));
        if !matches {
            return Err(bad("its CRC does not match".into()));
        }
        Ok(control)
    }
}
