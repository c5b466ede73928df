//! Backup mode on an ordinary connection: from `pg_backup_start` to `pg_backup_stop`.
//!
//! What always holds: dropping the session ends backup mode, since the server ties it to the connection.

use std::sync::Arc;

use super::stream::Ended;
use super::{Chunk, Entry, Feed, Run};
use crate::error::{Context, Error, Result};
use crate::postgres::lsn::Lsn;
use crate::replication::connection::{Connection, Mode, quote_name, quote_text};
use crate::replication::conninfo::ConnInfo;

/// A server in backup mode.
pub struct BackupMode {
    /// The connection that must stay.
    pub connection: Connection,
    /// Start LSN.
    pub start: Lsn,
    /// Its timeline.
    pub timeline: u32,
}

/// What `pg_backup_stop` returned.
pub struct Stopped {
    /// Stop LSN.
    pub stop: Lsn,
    /// Its timeline.
    pub timeline: u32,
    /// Content of backup_label.
    pub label: String,
    /// Content of tablespace_map; empty without tablespaces.
    pub tablespace_map: String,
}

impl BackupMode {
    /// A connection that no time limit of the server ends.
    pub async fn connect(info: &ConnInfo) -> Result<Connection> {
        let mut connection = Connection::open(info, Mode::Sql).await?;
        let mut limits = vec![
            "statement_timeout",
            "lock_timeout",
            "idle_session_timeout",
            "idle_in_transaction_session_timeout",
        ];
        if connection.major() >= 17 {
            limits.push("transaction_timeout");
        }
        for limit in limits {
            connection.query(&format!("SET {limit} = 0")).await?;
        }
        Ok(connection)
    }

    /// Waits for the server's checkpoint.
    pub async fn start(mut connection: Connection, label: &str, fast: bool) -> Result<Self> {
        let label = label.replace('\'', "''");
        let start = match connection.major() {
            ..15 => format!("SELECT pg_start_backup('{label}', {fast}, false)"),
            _ => format!("SELECT pg_backup_start('{label}', {fast})"),
        };
        let start = connection.value(&start).await?;
        let start: Lsn = parse("the start of the backup", start)?;
        let timeline = connection
            .value("SELECT timeline_id FROM pg_control_checkpoint()")
            .await?;
        let timeline = parse("the timeline", timeline)?;
        Ok(Self {
            connection,
            start,
            timeline,
        })
    }

    /// The folder of this server in a tablespace.
    pub async fn version_folder(&mut self) -> Result<String> {
        let catalog = self
            .connection
            .value("SELECT catalog_version_no FROM pg_control_system()")
            .await?;
        let catalog: u32 = parse("its catalog version", catalog)?;
        Ok(format!("PG_{}_{catalog}", self.connection.major()))
    }

    /// Ends backup mode; does not wait for archiving.
    pub async fn stop(mut self) -> Result<Stopped> {
        let function = match self.connection.major() {
            ..15 => "pg_stop_backup(false, false)",
            _ => "pg_backup_stop(false)",
        };
        // On a standby, the timeline that has been replayed up to the stop.
        let query = format!(
            "SELECT lsn, labelfile, spcmapfile, CASE WHEN pg_is_in_recovery() \
             THEN (SELECT min_recovery_end_timeline FROM pg_control_recovery()) ELSE {} END FROM {function}",
            self.timeline
        );
        let rows = self.connection.query(&query).await?;
        let mut row = rows.into_iter().next().unwrap_or_default().into_iter();
        let stop = parse("the end of the backup", row.next().flatten())?;
        let label = row.next().flatten().unwrap_or_default();
        let tablespace_map = row.next().flatten().unwrap_or_default();
        let timeline = parse("the timeline", row.next().flatten())?;
        let said = label.lines().find_map(|line| line.strip_prefix("START TIMELINE: "));
        if said.and_then(|text| text.trim().parse().ok()) != Some(self.timeline) {
            return Err(Error::temporary(format!(
                "the backup began on timeline {}, and the server's label says {}",
                self.timeline,
                said.unwrap_or("nothing of it")
            )));
        }
        if label.contains('\u{FFFD}') || tablespace_map.contains('\u{FFFD}') {
            return Err(Error::refused("a tablespace's path is not UTF-8").remedy("use --source stream"));
        }
        Ok(Stopped {
            stop,
            timeline,
            label,
            tablespace_map,
        })
    }
}

/// How often pg_control is read again while the server writes it.
pub const CONTROL_READS: usize = 50;

/// The end of what is read: `pg_control`, whose content has been read last, then, backup mode being over, what
/// `pg_backup_stop` says.
pub async fn finish(session: BackupMode, feed: &mut Feed, control: Entry, content: Vec<u8>) -> Result<Ended> {
    whole(feed, control.clone(), content).await?;
    let stopped = session.stop().await.context(|| "ending the backup on the server")?;
    for (path, text) in [
        ("backup_label", stopped.label),
        ("tablespace_map", stopped.tablespace_map),
    ] {
        if !text.is_empty() {
            let entry = Entry {
                path: path.to_owned(),
                size: text.len() as u64,
                ..control.clone()
            };
            whole(feed, entry, text.into_bytes()).await?;
        }
    }
    Ok(Ended {
        stop: stopped.stop,
        timeline: stopped.timeline,
    })
}

/// A small file with its content.
async fn whole(feed: &mut Feed, entry: Entry, content: Vec<u8>) -> Result<()> {
    let path: Arc<str> = entry.path.as_str().into();
    let file = feed.entry(entry);
    let len = content.len() as u32;
    feed.chunk(Chunk {
        file,
        path,
        runs: Box::new([Run { offset: 0, len }]),
        bytes: content.into(),
        is_verified: false,
    })
    .await
}

fn parse<T: std::str::FromStr>(what: &str, text: Option<String>) -> Result<T> {
    let text = text.unwrap_or_default();
    text.parse()
        .map_err(|_| Error::failed(format!("the server says {text:?} for {what}")))
}

/// Functions that a source needs, of those in `functions`: `local`.
pub const LOCAL: usize = 2;
/// `sql`.
pub const ALL: usize = 5;

/// Fails unless the connection's role may call the first `count` functions; the remedy is the SQL that lets it.
pub async fn check_grants(connection: &mut Connection, count: usize) -> Result<()> {
    let functions = &functions(connection.major())[..count];
    let all: Vec<String> = functions
        .iter()
        .map(|function| format!("has_function_privilege({}, 'EXECUTE')", quote_text(function)))
        .collect();
    let may = connection.value(&format!("SELECT {}", all.join(" AND "))).await?;
    if may.as_deref() == Some("t") {
        return Ok(());
    }
    let role = connection.value("SELECT current_user").await?.unwrap_or_default();
    let what = match count {
        LOCAL => "put the server into backup mode",
        _ => "read the server's files over SQL",
    };
    Err(Error::refused(format!("{role} may not {what}")).remedy(format!(
        "GRANT EXECUTE ON FUNCTION {} TO {};",
        functions.join(", "),
        quote_name(&role)
    )))
}

fn functions(major: u32) -> [&'static str; ALL] {
    let [start, stop] = match major {
        ..15 => [
            "pg_start_backup(text, boolean, boolean)",
            "pg_stop_backup(boolean, boolean)",
        ],
        _ => ["pg_backup_start(text, boolean)", "pg_backup_stop(boolean)"],
    };
    [
        start,
        stop,
        "pg_read_binary_file(text, bigint, bigint, boolean)",
        "pg_ls_dir(text, boolean, boolean)",
        "pg_stat_file(text, boolean)",
    ]
}
