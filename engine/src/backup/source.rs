//! The choice of a source, and what all of them have in common.

use fairvault_format::proto;

use super::{Options, Server, SourceKind};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::progress::Progress;
use crate::replication::base_backup::{self, BaseBackup};
use crate::replication::connection::{Connection, MORE_SENDERS, Mode, has_no_sender, is_denied};
use crate::replication::conninfo::ConnInfo;
use crate::source::Reading;
use crate::source::backup_mode::{ALL, BackupMode, LOCAL, check_grants};
use crate::source::local::{self, Local};
use crate::source::sql::Sql;
use crate::source::{Feed, stream};

/// A source whose server is in backup mode.
pub enum Source<'a> {
    /// BASE_BACKUP.
    Stream(BaseBackup<'a>),
    /// Files; until they are read.
    Local(Option<Box<Local>>),
    /// Ranges over ordinary connections; until they are read.
    Sql(Option<Box<Sql>>),
}

impl<'a> Source<'a> {
    /// Chooses, and waits for the server's checkpoint.
    pub(super) async fn open(
        server: &'a mut Server,
        options: &Options,
        label: &str,
        readers: usize,
        progress: &Progress,
    ) -> Result<Self> {
        use SourceKind as K;
        if matches!(options.source, K::Auto | K::Local) {
            match open_local(server, options, label, readers).await {
                Ok(local) => return Ok(Self::Local(Some(Box::new(local)))),
                Err(error) if options.source == K::Local => return Err(error.context("--source local")),
                Err(error) => tracing::debug!("the data directory is not read directly: {error}"),
            }
        }
        if matches!(options.source, K::Auto | K::Sql) {
            match open_sql(server, options, label, readers).await {
                Ok(sql) => return Ok(Self::Sql(Some(Box::new(sql)))),
                Err(error) if options.source == K::Sql => return Err(error.context("--source sql")),
                Err(error) => tracing::debug!("files are not read over SQL: {error}"),
            }
        }
        if server.connection.mode() == Mode::Sql {
            // There was none for replication. This says why.
            let opened = Connection::open(&options.conninfo, Mode::Replication).await;
            let mut connection = opened.map_err(|error| match is_denied(&error) {
                false if has_no_sender(&error) => error.remedy(MORE_SENDERS),
                true => error.remedy("`fairvault check` prints what `local` and `sql` need, or let the role replicate"),
                false => error,
            })?;
            if connection.identify().await?.system_identifier != server.system_identifier {
                return Err(another());
            }
            server.connection = connection;
        }
        let request = base_backup::Options {
            label: label.to_owned(),
            fast: options.fast,
            max_rate_kib: options.max_rate_kib,
        };
        let backup = BaseBackup::start(&mut server.connection, &request).await?;
        progress
            .total_bytes
            .set(backup.tablespaces.iter().filter_map(|t| t.size_bytes).sum());
        Ok(Self::Stream(backup))
    }

    /// What the backup's facts call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stream(_) => "stream",
            Self::Local(_) => "local",
            Self::Sql(_) => "sql",
        }
    }

    /// Start LSN and its timeline.
    pub fn position(&self) -> (Lsn, u32) {
        let position = match self {
            Self::Stream(backup) => Some((backup.start, backup.timeline)),
            Self::Local(local) => local.as_ref().map(|l| (l.start(), l.timeline())),
            Self::Sql(sql) => sql.as_ref().map(|s| (s.start(), s.timeline())),
        };
        position.unwrap_or((Lsn(0), 0))
    }

    /// Tablespaces, for the manifest.
    pub fn tablespaces(&self) -> Vec<proto::Tablespace> {
        match self {
            Self::Stream(backup) => stream::tablespaces(backup),
            Self::Local(local) => local.as_ref().map(|l| l.listed.clone()).unwrap_or_default(),
            Self::Sql(sql) => sql.as_ref().map(|s| s.listed.clone()).unwrap_or_default(),
        }
    }

    /// Reads everything; the server is out of backup mode afterwards.
    pub async fn read(&mut self, feed: &mut Feed) -> Result<stream::Ended> {
        let again = || Error::failed("the source was read before");
        match self {
            Self::Stream(backup) => stream::read(backup, feed).await,
            Self::Local(local) => local.take().ok_or_else(again)?.read(feed).await,
            Self::Sql(sql) => sql.take().ok_or_else(again)?.read(feed).await,
        }
    }
}

fn rate(options: &Options) -> Option<u64> {
    options.max_rate_kib.map(|kib| u64::from(kib) << 10)
}

/// An ordinary connection to the same server.
async fn connect(server: &Server, options: &Options) -> Result<Connection> {
    let mut connection = BackupMode::connect(&options.conninfo).await?;
    let identifier = connection
        .value("SELECT system_identifier FROM pg_control_system()")
        .await?;
    let is_same = identifier.is_some_and(|text| text == server.system_identifier.to_string())
        && connection.in_recovery() == server.connection.in_recovery();
    match is_same {
        true => Ok(connection),
        false => Err(another()),
    }
}

/// The second connection reached another server than the first.
pub fn another() -> Error {
    Error::failed("the second connection reached another server")
        .remedy("name one host in conninfo, or use target_session_attrs")
}

/// Functions that `local` needs. Over an ordinary connection, WAL is read as `sql` reads files.
fn of_local(mode: Mode) -> usize {
    match mode {
        Mode::Replication => LOCAL,
        Mode::Sql => ALL,
    }
}

fn reading(server: &Server, options: &Options, readers: usize) -> Reading {
    Reading {
        readers,
        rate: rate(options),
        checksums: server.checksums,
    }
}

/// The data directory on this machine, its server in backup mode.
async fn open_local(server: &Server, options: &Options, label: &str, readers: usize) -> Result<Local> {
    let mut connection = connect(server, options).await?;
    let directory = options.data_directory.as_deref();
    let directory = local::find(&mut connection, directory, server.system_identifier).await?;
    check_grants(&mut connection, of_local(server.connection.mode())).await?;
    let session = BackupMode::start(connection, label, options.fast).await?;
    Local::open(session, directory, reading(server, options, readers)).await
}

/// The server in backup mode, if the role may read its files.
async fn open_sql(server: &Server, options: &Options, label: &str, readers: usize) -> Result<Sql> {
    let mut connection = connect(server, options).await?;
    check_grants(&mut connection, ALL).await?;
    let session = BackupMode::start(connection, label, options.fast).await?;
    let (info, mode) = (options.conninfo.clone(), server.directory_mode);
    Sql::open(session, info, mode, reading(server, options, readers)).await
}

/// Whether each source can be used, and if not, why: `stream`, `local`, `sql`.
pub async fn usable(info: &ConnInfo, system_identifier: u64) -> [(&'static str, Result<()>); 3] {
    let stream = Connection::open(info, Mode::Replication).await.map(|_| ());
    let mode = if stream.is_ok() { Mode::Replication } else { Mode::Sql };
    let local = async {
        let mut connection = BackupMode::connect(info).await?;
        local::find(&mut connection, None, system_identifier).await?;
        check_grants(&mut connection, of_local(mode)).await
    };
    let sql = async { check_grants(&mut BackupMode::connect(info).await?, ALL).await };
    [("stream", stream), ("local", local.await), ("sql", sql.await)]
}
