//! A client for PostgreSQL's streaming replication protocol (manual: "Streaming Replication Protocol").
//!
//! conninfo → connect (TLS, authentication) → [`connection::Connection`], which is idle; BASE_BACKUP and
//! START_REPLICATION borrow or take it, so that nothing else can be said while they run.
//!
//! What always holds: no message is buffered before its length was compared with [`codec::MAX_MESSAGE`];
//! passwords appear in no log and no error.

pub mod auth;
pub mod base_backup;
pub mod codec;
pub mod connection;
pub mod conninfo;
pub mod keepalive;
pub mod passfile;
pub mod reread;
pub mod tls;
pub mod wal_files;
pub mod wal_stream;
