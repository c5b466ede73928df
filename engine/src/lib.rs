//! stub
pub mod backup;
pub mod commit;
pub mod dedup;
pub mod env;
pub mod error;
pub mod inspect;
pub mod pack;
pub mod postgres;
pub mod progress;
pub mod replication;
pub mod restore;
pub mod source;
pub mod stanza;
pub mod store;
pub mod verify;
pub mod wal;
