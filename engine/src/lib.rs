//! The fairvault engine: everything that moves PostgreSQL backups and WAL. ARCHITECTURE.md says how a byte
//! travels through these modules.
//!
//! What always holds: no module prints or exits; errors are [`error::Error`]; time and randomness come from
//! [`mod@env`]; what comes from a server or a store is compared with a limit before it is believed.

pub mod audit;
pub mod backup;
pub mod bounded;
mod cached;
pub mod codec;
pub mod commit;
pub mod copy;
mod crc;
pub mod dedup;
pub mod env;
pub mod error;
pub mod expire;
pub mod gc;
pub mod immutable;
pub mod inspect;
pub mod manifest;
pub mod pack;
pub mod postgres;
pub mod progress;
pub mod repair;
pub mod replication;
pub mod restore;
pub mod source;
pub mod stanza;
pub mod store;
pub mod tally;
pub mod track;
pub mod verify;
pub mod wal;
