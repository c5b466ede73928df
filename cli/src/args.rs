//! The command line, as clap knows it. What options mean is decided in `context` and in the commands.

mod key;
mod wal;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use key::{EraseArgs, KeyCommand, RotateArgs};
pub use wal::{GetArgs, PushArgs, ReceiveArgs, WalCommand};

/// PostgreSQL backup, WAL archive and point-in-time recovery into an encrypted, deduplicating repository.
#[derive(Debug, Parser)]
#[command(
    name = "fairvault",
    version,
    propagate_version = true,
    disable_help_subcommand = false
)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration file [default: /etc/fairvault/fairvault.toml, then ./fairvault.toml]
    #[arg(long, global = true, env = "FAIRVAULT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Use this repository of the configuration
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "repo_url")]
    pub repo: Option<String>,
    /// Use this repository, without configuration: file:///folder, s3://bucket/prefix, gs://…, az://…
    #[arg(long, global = true, env = "FAIRVAULT_REPO_URL", value_name = "URL")]
    pub repo_url: Option<String>,
    /// How to connect to the server: key=value pairs or a postgresql:// URI, without a password; PG* variables and
    /// .pgpass count
    #[arg(long, global = true, value_name = "CONNINFO")]
    pub conninfo: Option<String>,
    /// File with the stanza's key
    #[arg(
        long,
        global = true,
        env = "FAIRVAULT_KEY_FILE",
        value_name = "FILE",
        conflicts_with = "passphrase_file"
    )]
    pub key_file: Option<PathBuf>,
    /// File with the stanza's passphrase
    #[arg(long, global = true, env = "FAIRVAULT_PASSPHRASE_FILE", value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Folder for what this host remembers of its stanzas
    #[arg(long, global = true, env = "FAIRVAULT_CACHE", value_name = "FOLDER")]
    pub cache: Option<PathBuf>,
    /// error, warn, info, debug or trace
    #[arg(
        long,
        global = true,
        env = "FAIRVAULT_LOG_LEVEL",
        default_value = "info",
        value_name = "LEVEL"
    )]
    pub log_level: String,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// How results look
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

/// Looks of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Looks of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For machines: one object on standard output.
    Json,
}

/// Looks of progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    /// A line that moves on a terminal, plain lines otherwise.
    Auto,
    /// Lines.
    Plain,
    /// JSON events, one a line, on standard error.
    Json,
    /// Nothing.
    None,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create and list stanzas
    #[command(subcommand)]
    Stanza(StanzaCommand),
    /// Is a backup possible, and is WAL arriving?
    Check {
        /// Stanza
        stanza: String,
    },
    /// Take a backup
    Backup(BackupArgs),
    /// Restore a backup, to any moment
    Restore(RestoreArgs),
    /// Archive and fetch WAL
    #[command(subcommand)]
    Wal(WalCommand),
    /// Backups, WAL, and the window that can be restored
    Info {
        /// Stanza; without it, all stanzas of the repository that the configured keys open
        stanza: Option<String>,
    },
    /// Is everything in the repository there and unchanged?
    Verify {
        /// Stanza
        stanza: String,
        /// objects: every object is there and its hash holds; data: every frame opens and every page checks
        #[arg(long, value_enum, default_value_t = VerifyLevel::Objects)]
        level: VerifyLevel,
        /// How progress looks
        #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
        progress: ProgressMode,
    },
    /// Bring other repositories of a stanza up to date: backups and WAL that they do not have
    Copy(CopyArgs),
    /// Bring back what is hidden, make lost or damaged parts of the index anew, and say what content is lost
    Repair(RepairArgs),
    /// Decide which backups are needed no more, as `retention` says
    Expire(ExpireArgs),
    /// Delete what no backup and no reader needs
    Gc(GcArgs),
    /// In a bucket with object lock: lock what backups need for as long as they are kept
    Lock(LockArgs),
    /// Keep a backup until `unhold`, whatever the retention says
    Hold {
        /// Stanza
        stanza: String,
        /// Backup
        backup: String,
        /// Why
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Let the retention decide again about a backup that was held
    Unhold {
        /// Stanza
        stanza: String,
        /// Backup
        backup: String,
        /// Why
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Show or set what is kept at least, whoever asks for less; signed, and checked again before anything is deleted
    Policy(PolicyArgs),
    /// What was done, by whom, where and when: the stanza's log, verified from its first entry on
    Audit {
        /// Stanza
        stanza: String,
    },
    /// Make and manage keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Same as `wal push`
    #[command(name = "archive-push", hide = true)]
    ArchivePush(PushArgs),
    /// Same as `wal get`
    #[command(name = "archive-get", hide = true)]
    ArchiveGet(GetArgs),
    /// Same as `stanza create`
    #[command(name = "stanza-create", hide = true)]
    StanzaCreate(StanzaCreateArgs),
}

/// Verbs of `stanza`.
#[derive(Debug, Subcommand)]
pub enum StanzaCommand {
    /// Make a stanza for a server: layout, keys, first log entry
    Create(StanzaCreateArgs),
    /// Go on with the cluster that pg_upgrade has made of the stanza's
    Upgrade(UpgradeArgs),
    /// List the stanzas of the repository
    List,
    /// Stop writers that must not go on: all that are at work, or whoever goes on with an old timeline
    Fence(FenceArgs),
    /// Rely no more on block maps of a version of the WAL parser that was found to be wrong
    Distrust(DistrustArgs),
}

/// `copy`
#[derive(Debug, Args)]
pub struct CopyArgs {
    /// Stanza
    pub stanza: String,
    /// Copy from this repository [default: the first]
    #[arg(long, value_name = "NAME")]
    pub from_repo: Option<String>,
    /// Copy to this repository [default: all others]
    #[arg(long, value_name = "NAME")]
    pub to_repo: Option<String>,
    /// Only this backup, with WAL from its beginning on, whatever the retention says
    #[arg(long, value_name = "ID")]
    pub backup: Option<String>,
    /// Only say what would be copied
    #[arg(long)]
    pub dry_run: bool,
    /// How progress looks
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}

/// `repair`
#[derive(Debug, Args)]
pub struct RepairArgs {
    /// Stanza
    pub stanza: String,
    /// Only say what is lost, and what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How thoroughly packs are looked at: objects: the hash of every pack holds; data: every frame opens too
    #[arg(long, value_enum, default_value_t = VerifyLevel::Objects)]
    pub level: VerifyLevel,
    /// Do nothing but take away what lies where this entry of the log belongs and is no entry, so that the log can be
    /// read again; a copy of it is kept in the cache
    #[arg(long, value_name = "N")]
    pub drop_entry: Option<u64>,
    /// Where a bucket with versions has two logs that part at this entry: bring back the one that was written first, also
    /// if the one that can be seen has backups or decisions of its own, which are lost then
    #[arg(long, value_name = "N", conflicts_with = "drop_entry")]
    pub older_log: Option<u64>,
    /// How progress looks
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}

/// `expire`
#[derive(Debug, Args)]
pub struct ExpireArgs {
    /// Stanza
    pub stanza: String,
    /// Only say what would be decided, and why
    #[arg(long)]
    pub dry_run: bool,
    /// The clock of this host is right, although much time seems to lie between the last backups
    #[arg(long)]
    pub trust_clock: bool,
}

/// `gc`
#[derive(Debug, Args)]
pub struct GcArgs {
    /// Stanza
    pub stanza: String,
    /// Only say what would be deleted
    #[arg(long)]
    pub dry_run: bool,
    /// How long a sign of life of a backup or restore is waited for, at least 60s, before it counts as dead
    #[arg(long, value_name = "TIME", default_value = "90s")]
    pub patience: String,
    /// How progress looks
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}

/// `lock`
#[derive(Debug, Args)]
pub struct LockArgs {
    /// Stanza
    pub stanza: String,
    /// Lock everything that is needed for so many days from now on [default: as long as `retention` keeps it]
    #[arg(long, value_name = "N")]
    pub days: Option<u32>,
    /// Only say what would be locked
    #[arg(long)]
    pub dry_run: bool,
    /// The clock of this host is right, although the log makes it seem far ahead or behind
    #[arg(long)]
    pub trust_clock: bool,
    /// How progress looks
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}

/// `policy`
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// Stanza
    pub stanza: String,
    /// No backup expires before this age, such as 14d
    #[arg(long, value_name = "TIME")]
    pub minimum_retention: Option<String>,
    /// So many full backups never expire
    #[arg(long, value_name = "N")]
    pub minimum_full: Option<u32>,
}

/// `stanza fence`
#[derive(Debug, Args)]
pub struct FenceArgs {
    /// Stanza
    pub stanza: String,
    /// Close this timeline: it takes no more WAL. Without it, every backup and receiver at work is stopped
    #[arg(long, value_name = "N")]
    pub timeline: Option<u32>,
    /// Up to where its WAL is the right one [default: where the newest timeline left it]
    #[arg(long, value_name = "LSN", requires = "timeline")]
    pub after: Option<String>,
    /// Take back that the timeline was closed
    #[arg(long, requires = "timeline", conflicts_with = "after")]
    pub reopen: bool,
    /// Why, for the log and for whoever is stopped
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// `stanza distrust`
#[derive(Debug, Args)]
pub struct DistrustArgs {
    /// Stanza
    pub stanza: String,
    /// Version of the parser
    #[arg(long, value_name = "N")]
    pub parser: u32,
    /// Why, for the log
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// `stanza upgrade`
#[derive(Debug, Args)]
pub struct UpgradeArgs {
    /// Stanza
    pub stanza: String,
    /// The server was not made by pg_upgrade, but filled from a dump or by logical replication
    #[arg(long)]
    pub unrelated: bool,
    /// The upgrade was given up: the server is an earlier cluster of the stanza, which goes on
    #[arg(long, conflicts_with = "unrelated")]
    pub back: bool,
}

/// `stanza create`
#[derive(Debug, Args)]
pub struct StanzaCreateArgs {
    /// Stanza
    pub stanza: String,
    /// Store everything readable for whoever can read the repository
    #[arg(long)]
    pub no_encryption: bool,
    /// Seal content to a public key, so that hosts can have a key that writes only (`key add-slot --write-only`)
    #[arg(long, conflicts_with = "no_encryption")]
    pub public_key: bool,
}

/// `backup`
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Stanza
    pub stanza: String,
    /// Kind of backup
    #[arg(long = "type", value_enum, default_value_t = BackupType::Auto)]
    pub kind: BackupType,
    /// Read everything, and compare what an incremental backup would have left out with its parent: a difference is
    /// exit code 4
    #[arg(long)]
    pub audit: bool,
    /// Where the bytes come from
    #[arg(long, value_enum, default_value_t = Source::Auto)]
    pub source: Source,
    /// The server's data directory on this machine, if the server may not be asked for it
    #[arg(long, value_name = "DIR")]
    pub data_directory: Option<PathBuf>,
    /// A note to keep with the backup
    #[arg(long, value_name = "KEY=VALUE")]
    pub annotation: Vec<String>,
    /// Checkpoint at once instead of spread over time
    #[arg(long)]
    pub fast: bool,
    /// At most this much a second, such as 20MiB
    #[arg(long, value_name = "SIZE")]
    pub max_rate: Option<String>,
    /// zstd level
    #[arg(long, value_name = "N")]
    pub level: Option<i32>,
    /// Workers [default: one a core]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    pub workers: usize,
    /// How the WAL of the backup gets into the repository
    #[arg(long, value_enum, default_value_t = WalArg::Auto)]
    pub wal: WalArg,
    /// How progress looks
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
    /// A new stanza is to be stored readable for whoever can read the repository
    #[arg(long)]
    pub no_encryption: bool,
}

/// Kinds of backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackupType {
    /// incr if there is a backup to build on, else full
    Auto,
    /// Everything is read; what the repository has is not stored again
    Full,
    /// Only what changed since the newest full backup is read; the backup is complete all the same
    Diff,
    /// Only what changed since the newest backup is read; the backup is complete all the same
    Incr,
}

/// Sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// local if the data directory is on this machine and can be read, else sql if the role may, else stream
    Auto,
    /// Files of the data directory on this machine, read in parallel
    Local,
    /// Ranges of files over several ordinary connections
    Sql,
    /// BASE_BACKUP over the replication protocol.
    Stream,
}

/// WAL of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WalArg {
    /// archive if the server's archive_command is fairvault's, else stream
    Auto,
    /// Wait until `wal push`, or a receiver that is running, brought it
    Archive,
    /// Stream it on a second connection
    Stream,
}

/// Depth of verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VerifyLevel {
    /// Every object.
    Objects,
    /// Every frame and page.
    Data,
}

/// Words for `--target`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TargetWord {
    /// The end of all WAL
    Latest,
    /// As soon as the backup is consistent
    Immediate,
}

/// What happens at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActionArg {
    /// Wait for a person, open for reading
    Pause,
    /// Open for writing
    Promote,
    /// Stop the server
    Shutdown,
}

/// Whether the copy archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Archiving {
    /// The copy does not archive until it is told to
    Off,
    /// The copy replaces the original: settings stay as they were
    Keep,
}

/// `restore`
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Stanza
    pub stanza: String,
    /// New data directory
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Backup id, expired or not, or latest [default: the newest that can reach the target]
    #[arg(long, value_name = "ID")]
    pub backup: Option<String>,
    /// Recover to this time: RFC 3339, PostgreSQL's formats, or "yesterday 15:00"
    #[arg(long, value_name = "TIME", group = "goal")]
    pub target_time: Option<String>,
    /// Recover to this position
    #[arg(long, value_name = "LSN", group = "goal")]
    pub target_lsn: Option<String>,
    /// Recover to this transaction
    #[arg(long, value_name = "XID", group = "goal")]
    pub target_xid: Option<u32>,
    /// Recover to this restore point
    #[arg(long, value_name = "NAME", group = "goal")]
    pub target_name: Option<String>,
    /// Recover to this point
    #[arg(long, value_enum, group = "goal")]
    pub target: Option<TargetWord>,
    /// Time zone of --target-time if it names none [default: this machine's]
    #[arg(long, value_name = "ZONE")]
    pub timezone: Option<String>,
    /// Stop just before the target
    #[arg(long)]
    pub target_exclusive: bool,
    /// What to do at the target
    #[arg(long, value_enum)]
    pub target_action: Option<ActionArg>,
    /// Timeline: a number, latest or current
    #[arg(long, default_value = "latest", value_name = "TIMELINE")]
    pub target_timeline: String,
    /// Whether the copy archives WAL
    #[arg(long, value_enum, default_value_t = Archiving::Off)]
    pub archiving: Archiving,
    /// Reuse right files of a directory that is not empty
    #[arg(long)]
    pub delta: bool,
    /// Leave pages of zeros out, as holes in their files
    #[arg(long)]
    pub sparse: bool,
    /// Replace a data directory that is not empty
    #[arg(long, conflicts_with = "delta")]
    pub force: bool,
    /// Where a tablespace goes: its folder or oid, or all=FOLDER
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace_map: Vec<String>,
    /// Write tablespaces where they were
    #[arg(long)]
    pub keep_tablespaces: bool,
    /// Stay a standby that follows the archive
    #[arg(long)]
    pub standby: bool,
    /// Print what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// How progress looks
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}
