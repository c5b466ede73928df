//! WAL in and out of the repository.
//!
//! [`archive`] stores, [`whole`] moves complete segments, [`push`] is `archive_command`, [`fetch`] reads, [`get`] is `restore_command`,
//! [`coverage`] knows what is there, [`stream`] takes WAL from the server during a backup, [`receive`] all the
//! time; `known` and [`same`] compare what is stored with what the server has; [`background`] works ahead of PostgreSQL's
//! commands.

pub mod archive;
pub mod background;
mod beside;
pub mod coverage;
pub mod fetch;
pub mod get;
mod known;
pub mod push;
pub mod receive;
pub mod same;
pub mod stream;
pub mod summary;
pub mod whole;
