//! The command line of `wal`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Verbs of `wal`.
#[derive(Debug, Subcommand)]
pub enum WalCommand {
    /// Archive a file: archive_command = 'fairvault wal push STANZA %p'
    Push(PushArgs),
    /// Fetch a file: restore_command = 'fairvault wal get STANZA %f "%p"'
    Get(GetArgs),
    /// Receive WAL as it is written, until stopped
    Receive(ReceiveArgs),
}

/// `wal receive`
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Stanza
    pub stanza: String,
    /// Replication slot; made if it is not there [default: fairvault_STANZA]
    #[arg(long, value_name = "NAME", conflicts_with = "no_slot")]
    pub slot: Option<String>,
    /// Without a slot: the server may remove WAL that was not received
    #[arg(long)]
    pub no_slot: bool,
    /// Store whatever arrives at once: for a member of synchronous_standby_names
    #[arg(long)]
    pub synchronous: bool,
    /// How long WAL may wait before it is stored [default: 5s]
    #[arg(long, value_name = "DURATION")]
    pub flush_interval: Option<String>,
    /// Bytes that do not wait [default: 4MiB]
    #[arg(long, value_name = "SIZE")]
    pub piece_size: Option<String>,
    /// Durable spool on this host: WAL counts as received once it is there, and the repository follows
    #[arg(long, value_name = "FOLDER")]
    pub spool: Option<PathBuf>,
    /// Bytes that the spool may hold for each repository [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    pub spool_size: Option<String>,
    /// A standby on which a slot of the same name is kept, so that a failover loses nothing; may be repeated
    #[arg(long, value_name = "CONNINFO", conflicts_with = "no_slot")]
    pub standby: Vec<String>,
    /// Seal the pieces of a segment instead of storing it anew: where deleting costs as much as keeping
    #[arg(long)]
    pub keep_pieces: bool,
    /// Pass over WAL that is missing and cannot be had any more: take a new backup then
    #[arg(long)]
    pub skip_gap: bool,
}

/// `wal push`
#[derive(Debug, Args)]
pub struct PushArgs {
    /// Stanza
    pub stanza: String,
    /// The file, %p
    pub path: PathBuf,
    /// Be the background worker all the time, as a service: the path is that of pg_wal
    #[arg(long)]
    pub serve: bool,
    /// Be the background worker
    #[arg(long, hide = true, conflicts_with = "serve")]
    pub worker: bool,
}

/// `wal get`
#[derive(Debug, Args)]
pub struct GetArgs {
    /// Stanza
    pub stanza: String,
    /// Name of the file, %f
    pub name: String,
    /// Where to, %p
    pub destination: PathBuf,
    /// Recovery must get at least to this position
    #[arg(long, value_name = "LSN")]
    pub through: Option<String>,
    /// Recovery has a target, which it has reached there
    #[arg(long, requires = "through")]
    pub stops: bool,
    /// Recovery must not get beyond this position: what was archived after the restore was planned
    #[arg(long, value_name = "LSN")]
    pub until: Option<String>,
    /// Recovery follows this timeline, or the latest
    #[arg(long, value_name = "N|latest")]
    pub timeline: Option<String>,
    /// System identifier of the cluster, where the stanza has had several
    #[arg(long, value_name = "N")]
    pub system_identifier: Option<u64>,
    /// Be the background worker
    #[arg(long, hide = true)]
    pub worker: bool,
}
