//! The choice of a source, and what all of them have in common.

use fairvault_format::proto;

use super::{Options, Server, SourceKind};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::progress::Progress;
use crate::replication::base_backup::{self, BaseBackup};
use crate::source::backup_mode::BackupMode;
use crate::source::local::{self, Local, Reading};
use crate::source::{Feed, stream};

/// A source whose server is in backup mode.
pub enum Source<'a> {
    /// BASE_BACKUP.
    Stream(BaseBackup<'a>),
    /// Files; until they are read.
    Local(Option<Box<Local>>),
}

impl<'a> Source<'a> {
    /// Chooses, and waits for the server's checkpoint.
    pub async fn open(
        server: &'a mut Server,
        options: &Options,
        label: &str,
        readers: usize,
        progress: &Progress,
    ) -> Result<Self> {
        if options.source != SourceKind::Stream {
            match open_local(server, options, label, readers).await {
                Ok(local) => return Ok(Self::Local(Some(Box::new(local)))),
                Err(error) if options.source == SourceKind::Local => {
                    return Err(error.context("--source local"));
                }
                Err(error) => tracing::debug!("the data directory is not read directly: {error}"),
            }
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
        }
    }

    /// Start LSN and its timeline.
    pub fn position(&self) -> (Lsn, u32) {
        match self {
            Self::Stream(backup) => (backup.start, backup.timeline),
            Self::Local(local) => local.as_ref().map_or((Lsn(0), 0), |l| (l.start(), l.timeline())),
        }
    }

    /// Tablespaces, for the manifest.
    pub fn tablespaces(&self) -> Vec<proto::Tablespace> {
        match self {
            Self::Stream(backup) => stream::tablespaces(backup),
            Self::Local(local) => local.as_ref().map(|l| l.listed.clone()).unwrap_or_default(),
        }
    }

    /// Reads everything; the server is out of backup mode afterwards.
    pub async fn read(&mut self, feed: &mut Feed) -> Result<stream::Ended> {
        match self {
            Self::Stream(backup) => stream::read(backup, feed).await,
            Self::Local(local) => match local.take() {
                Some(local) => local.read(feed).await,
                None => Err(Error::failed("the source was read before")),
            },
        }
    }
}

/// The data directory on this machine, its server in backup mode.
async fn open_local(server: &Server, options: &Options, label: &str, readers: usize) -> Result<Local> {
    let mut connection = BackupMode::connect(&options.conninfo).await?;
    if connection.in_recovery() != server.connection.in_recovery() {
        return Err(Error::failed("the second connection reached another server")
            .remedy("name one host in conninfo, or use target_session_attrs"));
    }
    let directory = options.data_directory.as_deref();
    let directory = local::find(&mut connection, directory, server.system_identifier).await?;
    let session = BackupMode::start(connection, label, options.fast).await?;
    let rate = options.max_rate_kib.map(|kib| u64::from(kib) << 10);
    Local::open(session, directory, Reading { readers, rate }).await
}
