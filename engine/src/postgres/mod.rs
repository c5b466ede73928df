//! What PostgreSQL is: LSNs, file names, pages, the control file and WAL records, for versions 14 to 19.
//!
//! Nothing here does I/O. Everything takes bytes from a possibly damaged cluster and never panics.

pub mod control;
pub mod files;
pub mod hints;
pub mod lsn;
pub mod page;
pub mod segment;
pub mod walker;

/// Size of a page, bytes (BLCKSZ). Servers built with another one are refused.
pub const BLOCK_BYTES: u32 = 8192;
/// Pages in a relation's file (RELSEG_SIZE): 1 GiB.
pub const BLOCKS_PER_SEGMENT: u32 = 131_072;

/// What depends on the major version, in one table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Major version.
    pub major: u32,
    /// Magic of WAL pages.
    pub wal_magic: u16,
    /// Version of pg_control.
    pub control_version: u32,
}

/// The versions that fairvault knows. WAL magics and control versions change while a version is in beta;
/// 19 is as of its release candidate.
pub const VERSIONS: &[Version] = &[
    Version {
        major: 14,
        wal_magic: 0xD10D,
        control_version: 1300,
    },
    Version {
        major: 15,
        wal_magic: 0xD110,
        control_version: 1300,
    },
    Version {
        major: 16,
        wal_magic: 0xD113,
        control_version: 1300,
    },
    Version {
        major: 17,
        wal_magic: 0xD116,
        control_version: 1700,
    },
    Version {
        major: 18,
        wal_magic: 0xD118,
        control_version: 1800,
    },
    Version {
        major: 19,
        wal_magic: 0xD122,
        control_version: 1905,
    },
];

/// The version with this major number.
pub fn version(major: u32) -> Option<&'static Version> {
    VERSIONS.iter().find(|v| v.major == major)
}

/// The version whose WAL has this magic.
pub fn version_of_magic(magic: u16) -> Option<&'static Version> {
    VERSIONS.iter().find(|v| v.wal_magic == magic)
}

/// Microseconds from 1970-01-01 to 2000-01-01: PostgreSQL's timestamps count from the latter.
pub const EPOCH_2000_US: i64 = 946_684_800_000_000;
