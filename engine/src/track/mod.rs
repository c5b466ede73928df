//! Which blocks changed: WAL → block maps, and what a backup has to read because of them.
//!
//! What always holds: doubt reads more. Whatever the tracker does not understand, or has no WAL for, ends in "read
//! everything", with the reason. Only main forks are tracked: WAL does not name every change of the others (clearing a
//! bit of a visibility map registers no block), and they are small.

pub mod audit;
mod distrust;
pub mod map;
pub mod range;
pub mod records;
pub mod segment;
pub mod selection;

pub use distrust::distrust;

/// Version of what [`records`] understands. It rises when that changes, so that maps of a faulty parser can be
/// distrusted.
pub const PARSER_VERSION: u32 = 2;

/// Versions that were found to be faulty: what they made counts as absent, and backups that rely on it are no parents.
/// Version 1 took a segment for empty that begins with the last 8 or 16 bytes of a record which look like a switch's.
pub const FAULTY_PARSERS: [u32; 1] = [1];
