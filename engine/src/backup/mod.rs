//! The way forward: source → chunks → dedup → codec → seal → pack → store → commit.
//!
//! A backup counts only once its log entry is committed, and it is committed only when all WAL from its
//! start to its stop is in the repository.

pub mod cut;
pub mod judge;
pub mod manifest;
pub mod parent;
pub mod pipeline;
pub mod remembered;
pub mod source;
pub mod upload;
mod wal;

use remembered::Draft;
use source::{Source, another};
use wal::{WalTask, check_archived, may_not_stream, store_histories, wait_for_archive};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fairvault_format::wal::Compression;
use fairvault_format::{limits, names, proto, sha256};
use tokio::sync::{mpsc, watch};

use crate::commit::Log;
use crate::commit::lease::{Lease, NO_BACKUP};
use crate::commit::session::{Session, timed_id};
use crate::dedup::{Index, SessionChunks, confirm_packs};
use crate::error::{Context, Error, Kind as ErrorKind, Result};
use crate::immutable::reliance::{Locks, Reliance};
use crate::pack::Packer;
use crate::postgres::BLOCK_BYTES;
use crate::progress::Progress;
use crate::replication::connection::{Connection, Mode};
use crate::replication::conninfo::ConnInfo;
use crate::source::{Entry, Feed, PIPELINE_GONE};
use crate::track::audit::{Audit, Missed};
use crate::track::range::Range;
use crate::track::selection::Selection;
use crate::wal::archive::Archive;
use crate::wal::same;
use crate::wal::stream::{Until, capture};

/// What a backup builds on. Whatever it is, the backup is complete, and restores by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `Incr` if there is a backup to build on, else `Full`.
    Auto,
    /// Nothing: everything is read.
    Full,
    /// The newest full backup.
    Diff,
    /// The newest backup.
    Incr,
}

impl Kind {
    /// As it is written in a backup's facts, and the last letter of its id.
    fn words(self) -> (&'static str, char) {
        match self {
            Self::Auto | Self::Full => ("full", 'F'),
            Self::Diff => ("diff", 'D'),
            Self::Incr => ("incr", 'I'),
        }
    }
}

/// How WAL from start to stop gets into the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalMethod {
    /// `Archive` if the server's archive_command is fairvault's, else `Stream`.
    Auto,
    /// Wait for `wal push`, or for a receiver that is running.
    Archive,
    /// Stream it on a connection of its own.
    Stream,
}

/// Where the bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// `Local` if the data directory is on this machine and can be read, else `Sql` if the role may, else `Stream`.
    Auto,
    /// Files of the data directory on this machine.
    Local,
    /// Ranges of files over ordinary connections.
    Sql,
    /// BASE_BACKUP over the replication protocol.
    Stream,
}

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// What it builds on.
    pub kind: Kind,
    /// Read everything, and compare what would have been left out with the parent.
    pub audit: bool,
    /// Source.
    pub source: SourceKind,
    /// Where the server's data directory is on this machine; without, the server is asked.
    pub data_directory: Option<PathBuf>,
    /// Server.
    pub conninfo: ConnInfo,
    /// Checkpoint at once.
    pub fast: bool,
    /// KiB a second.
    pub max_rate_kib: Option<u32>,
    /// zstd level.
    pub level: i32,
    /// Pages are taken apart before zstd, where that pays.
    pub pages: bool,
    /// Records are taken apart before zstd, in WAL that the backup stores itself.
    pub wal_records: bool,
    /// Workers; 0 for one a core.
    pub workers: usize,
    /// WAL.
    pub wal: WalMethod,
    /// How long archived WAL may take to arrive.
    pub archive_timeout: Duration,
    /// Free-form notes.
    pub annotations: BTreeMap<String, String>,
    /// How long the packs that it relies on must be locked; without, locks are nobody's concern.
    pub reliance: Option<Reliance>,
}

/// What a backup came to.
#[derive(Debug, Clone)]
pub struct Report {
    /// Facts.
    pub info: proto::BackupInfo,
    /// Pages whose checksum was wrong, judged.
    pub page_failures: Vec<proto::PageFailure>,
    /// Blocks that changed although the WAL does not say so, if that was looked for.
    pub missed: Vec<Missed>,
    /// Other things a person should know.
    pub notes: Vec<String>,
}

/// What is known of the server before the backup starts.
struct Server {
    connection: Connection,
    system_identifier: u64,
    segment_size: u64,
    checksums: bool,
    directory_mode: u32,
    wal: WalMethod,
}

/// Takes a backup. When `cancelled` completes, it stops cleanly and its session is ended.
pub async fn run(
    log: &mut Log,
    options: &Options,
    progress: Arc<Progress>,
    cancelled: impl Future<Output = ()>,
) -> Result<Report> {
    if options.audit {
        log.stanza().check_reads("comparing with the parent")?;
    }
    progress.phase("connecting");
    let server = inspect(options).await?;
    let compression = Compression {
        level: options.level,
        records: options.wal_records,
    };
    let archive = Archive::open(log, Some(server.system_identifier), compression)?;
    if archive.segment_size != server.segment_size {
        return Err(Error::refused(format!(
            "the server's WAL segments have {} bytes, the stanza's {}",
            server.segment_size, archive.segment_size
        )));
    }
    let env = log.stanza().clone();
    let has_parent = parent::is_there(log.state(), options.kind, server.system_identifier);
    let kind = match options.kind {
        Kind::Auto if has_parent => Kind::Incr,
        Kind::Auto => Kind::Full,
        kind => kind,
    };
    let mut options = Options {
        kind,
        ..options.clone()
    };
    options.conninfo.ordinary_only = server.connection.mode() == Mode::Sql;
    let options = &options;
    let mut session = Session::begin(log, "backup", |state| timed_id(state, env.env(), kind.words().1)).await?;
    let id = session.backup().to_owned();
    let lease = match Lease::take(&env, session.id(), "backup", NO_BACKUP).await {
        Ok(lease) => lease,
        Err(error) => {
            session.abort(log, &error.to_string()).await?;
            return Err(error);
        }
    };
    let outcome = tokio::select! {
        outcome = transfer(log, &mut session, server, archive, options, &id, progress.clone()) => outcome,
        () = cancelled => Err(Error::interrupted()),
    };
    let ended = match outcome {
        Ok((root, report)) => {
            progress.phase("committing");
            let committed = session.commit(log, root, report.info.clone()).await;
            if committed.is_ok() && !env.keys().can_read() {
                remembered::forget_others(log.stanza(), log.state());
            }
            committed.map(|()| report)
        }
        Err(error) => {
            session.give_up(log, &error).await;
            Err(error)
        }
    };
    lease.release().await;
    ended
}

async fn inspect(options: &Options) -> Result<Server> {
    let mut connection = Connection::open_either(&options.conninfo).await?;
    let identity = connection.identify().await?;
    let segment_size = connection.wal_segment_size().await?;
    let checksums = connection.show("data_checksums").await?.as_deref() == Some("on");
    if connection
        .show("block_size")
        .await?
        .is_some_and(|size| size != BLOCK_BYTES.to_string())
    {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the server was built with another block size than 8192",
        ));
    }
    if connection.show("segment_size").await?.is_some_and(|size| size != "1GB") {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "the server was built with another segment size of relations than 1 GB",
        ));
    }
    let mode = connection.show("data_directory_mode").await?.unwrap_or_default();
    let directory_mode = u32::from_str_radix(&mode, 8).unwrap_or(0o700);
    let wal = match options.wal {
        WalMethod::Auto => {
            let mode = connection.show("archive_mode").await?.unwrap_or_default();
            let command = connection.show("archive_command").await?.unwrap_or_default();
            // A standby cannot make its primary finish the last segment: its WAL is always streamed.
            if mode != "off" && !connection.in_recovery() && command.contains("fairvault") {
                WalMethod::Archive
            } else {
                WalMethod::Stream
            }
        }
        WalMethod::Archive if connection.in_recovery() => {
            return Err(Error::usage(
                "--wal archive needs a primary: a standby cannot have the last segment of the backup archived",
            )
            .remedy("use --wal stream, which is also what --wal auto does on a standby"));
        }
        chosen => chosen,
    };
    Ok(Server {
        connection,
        system_identifier: identity.system_identifier,
        segment_size,
        checksums,
        directory_mode,
        wal,
    })
}

#[allow(clippy::too_many_arguments)]
async fn transfer(
    log: &mut Log,
    session: &mut Session,
    mut server: Server,
    archive: Archive,
    options: &Options,
    id: &str,
    progress: Arc<Progress>,
) -> Result<([u8; 32], Report)> {
    let stanza = log.stanza().clone();
    let started_us = stanza.env().now_us();
    let workers = match options.workers {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        workers => workers,
    };
    progress.phase("loading the index");
    let mut notes = Vec::new();
    let locks = Locks::of(log, options.reliance.clone(), &mut notes).await?;
    let index = Index::load_without(&stanza, log.state(), locks.ending()).await?;
    tracing::debug!("{} chunks are known", index.len());
    let slot = format!("fairvault_{}", hex::encode(crate::env::id(stanza.env())?));
    let wal_connection = match server.wal {
        WalMethod::Stream => {
            // Not by the name that a receiver has: no commit may wait for this, or count by it.
            let mut conninfo = options.conninfo.clone();
            // A name has 63 bytes at most.
            let kept = conninfo.application_name.chars().take(48);
            conninfo.application_name = kept.chain("_backup".chars()).collect();
            let opened = Connection::open(&conninfo, Mode::Replication).await;
            let mut connection = opened
                .context(|| "streaming the WAL of this backup")
                .map_err(may_not_stream)?;
            if connection.identify().await?.system_identifier != server.system_identifier {
                return Err(another());
            }
            connection
                .create_slot(&slot, true, true)
                .await
                .context(|| "making a temporary replication slot for the WAL of this backup")
                .map_err(|e| {
                    e.remedy("raise max_replication_slots and max_wal_senders, or archive with `fairvault wal push`")
                })?;
            Some(connection)
        }
        _ => None,
    };

    progress.phase("waiting for the server's checkpoint");
    let from_standby = server.connection.in_recovery();
    let server_version = server.connection.server_version();
    let label = format!("fairvault {id}");
    let (system_identifier, checksums) = (server.system_identifier, server.checksums);
    let mut source = Source::open(&mut server, options, &label, workers, &progress).await?;
    let (start, timeline) = source.position();
    let tablespaces = source.tablespaces();

    let (until, until_seen) = watch::channel(None);
    let mut wal_task = WalTask::new(wal_connection.map(|connection| {
        tokio::spawn(capture(
            connection,
            archive.clone(),
            slot,
            start,
            timeline,
            until_seen,
            progress.clone(),
        ))
    }));

    if options.kind != Kind::Full {
        progress.phase("finding what changed");
    }
    let connect = async || Connection::open_either(&options.conninfo).await;
    let doubt = match same::check(&archive, timeline, start, connect).await {
        Err(error) if error.kind() == ErrorKind::Refused => return Err(error),
        compared => compared.err(),
    };
    let child = parent::Child {
        system_identifier,
        server_version,
        checksums,
        start,
        timeline,
        doubt,
    };
    let choosing = parent::choose(log, &archive, options, &index, &child);
    let (basis, no_parent_reason) = tokio::select! {
        choice = choosing => match choice? {
            parent::Choice::Parent(basis) => (Some(basis), String::new()),
            parent::Choice::None(why) => (None, why),
        },
        error = wal_task.failure() => return Err(error),
    };
    match &basis {
        Some(basis) => tracing::info!("building on backup {}", basis.parent.id),
        None if options.kind != Kind::Full => tracing::warn!("everything is read: {no_parent_reason}"),
        None => {}
    }
    let audited = basis.clone().filter(|_| options.audit);
    let audit = audited.map(|basis| Arc::new(Audit::new(stanza.clone(), basis)));
    match &audit {
        Some(audit) => tracing::info!(
            "auditing: everything is read, and about {} MiB of the parent are fetched",
            audit.to_fetch().div_ceil(1 << 20)
        ),
        None if options.audit => {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("there is nothing to audit: {no_parent_reason}"),
            )
            .remedy("take a backup first, and audit the next one"));
        }
        None => {}
    }
    progress.phase("copying");
    let chunks = Arc::new(SessionChunks::new(index));
    let (finished_in, finished_out) = mpsc::channel(1);
    let shared = Arc::new(pipeline::Shared {
        stanza: stanza.clone(),
        chunks: chunks.clone(),
        packer: Packer::new(stanza.clone(), chunks.clone(), finished_in),
        level: options.level,
        pages: options.pages,
        checksums,
        basis: basis.clone(),
        audit: audit.clone(),
        progress: progress.clone(),
    });
    let (chunks_in, chunks_out) = mpsc::channel(workers * 4);
    let selection = Selection {
        basis: basis.clone(),
        audit: audit.clone(),
    };
    let mut feed = Feed::new(chunks_in, progress.clone(), selection);

    // The workers, then the manifest segments, which go through the same packer.
    let worker_shared = shared.clone();
    let (entries_in, entries_out) = tokio::sync::oneshot::channel::<Vec<Entry>>();
    drop(shared);
    let work = tokio::task::spawn_blocking(move || -> Result<Packed> {
        let results = pipeline::run(&worker_shared, workers, chunks_out)?;
        let entries = entries_out
            .blocking_recv()
            .map_err(|_| Error::failed("the source has ended early"))?;
        // Packs of content must have their names before a manifest can point to them.
        let extents = manifest::extents(&worker_shared, &entries, results.done)?;
        let (known, packs) = worker_shared.chunks.finish()?;
        let mut draft = (!worker_shared.stanza.keys().can_read()).then(Draft::default);
        let segments = manifest::store_segments(&worker_shared, draft.as_mut(), &entries, &extents, &known, &packs)?;
        worker_shared.packer.close()?;
        let mut bad_pages = results.bad_pages;
        bad_pages.retain(|page| !entries[page.entry as usize].is_gone);
        Ok(Packed {
            entries,
            segments,
            bad_pages,
            draft,
        })
    });
    let name = source.name();
    let source = async {
        let ended = source.read(&mut feed).await;
        let entries = feed.finish();
        let ended = ended?;
        let _ = entries_in.send(entries);
        Ok::<_, Error>(ended)
    };
    let storing = upload::run(stanza.clone(), finished_out, log, session, &progress);
    let working = async {
        work.await
            .map_err(|e| Error::failed("the pipeline panicked").caused_by(e))?
    };
    let transferring = async { tokio::join!(source, working, storing) };
    let (ended, packed, stored) = tokio::select! {
        all = transferring => all,
        error = wal_task.failure() => return Err(error),
    };
    let (ended, packed) = first_cause(ended, packed, stored)?;

    progress.phase("waiting for WAL");
    let _ = until.send(Some(Until {
        stop: ended.stop,
        whole_segment: !from_standby,
    }));
    match wal_task.finish().await? {
        true => notes.push(
            "the WAL of this backup was streamed with it: the backup can be restored on its own; recovery to a later moment needs \
             continuous WAL (`fairvault wal push` as archive_command)"
                .to_owned(),
        ),
        false => wait_for_archive(&archive, timeline, start, ended.stop, options.archive_timeout).await?,
    }
    store_histories(&mut server.connection, &archive, ended.timeline).await?;
    if server.wal == WalMethod::Archive {
        let compared = check_archived(&archive, server.connection, connect, timeline, ended.stop).await?;
        notes.extend(compared);
    }
    let page_failures = judge::judge(
        &archive,
        &options.conninfo,
        timeline,
        start,
        ended.stop,
        &packed.bad_pages,
    )
    .await?;
    let missed = match &audit {
        None => Vec::new(),
        Some(audit) => {
            let during = Range {
                timeline,
                from: start,
                to: ended.stop,
            };
            audit.finish(&archive, &options.conninfo, during).await
        }
    };

    let (known, packs) = chunks.finish()?;
    confirm_packs(&stanza, &known, &packs).await?;
    let stopped_us = stanza.env().now_us();
    let used = packs.iter().map(|pack| (pack.name, chunks.was_there(pack)));
    locks.confirm(log, used, stopped_us, &mut notes).await?;
    let entries = || packed.entries.iter().filter(|entry| !entry.is_gone);
    let info = proto::BackupInfo {
        id: id.to_owned(),
        r#type: options.kind.words().0.to_owned(),
        parser_versions: basis.as_ref().map(|basis| basis.parser_versions()).unwrap_or_default(),
        parent: basis.map(|basis| basis.parent.id.clone()).unwrap_or_default(),
        no_parent_reason: match options.kind {
            Kind::Full => String::new(),
            _ => no_parent_reason,
        },
        read_bytes: progress.read_bytes.get(),
        system_identifier: server.system_identifier,
        server_version,
        start_timeline: timeline,
        stop_timeline: ended.timeline,
        start_lsn: start.0,
        stop_lsn: ended.stop.0,
        started_us,
        stopped_us,
        wal_segment_size: archive.segment_size,
        block_size: BLOCK_BYTES,
        data_checksums: server.checksums,
        from_standby,
        files: entries().count() as u64,
        plain_bytes: entries().map(|e| e.size).sum(),
        new_plain_bytes: progress
            .read_bytes
            .get()
            .saturating_sub(progress.deduplicated_bytes.get()),
        new_stored_bytes: progress.stored_bytes.get(),
        source: name.to_owned(),
        label,
        annotations: options.annotations.clone().into_iter().collect(),
        tablespaces,
        failed_pages: page_failures.len() as u32,
        damaged_pages: page_failures.iter().filter(|f| judge::is_damage(f)).count() as u32,
        wal_method: if server.wal == WalMethod::Stream {
            "stream"
        } else {
            "archive"
        }
        .to_owned(),
        data_directory_mode: server.directory_mode,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    };
    let (usage, root_message) =
        manifest::root_of(info.clone(), &packed.segments, &known, &packs, page_failures.clone())?;
    let root = manifest::seal_root(&stanza, &usage, &root_message)?;
    fairvault_format::error::check_limit("the manifest root", root.len() as u64, limits::SECTION_BYTES)?;
    let hash = sha256(&root);
    stanza.store().put_hashed(&names::root(&hash), root.into()).await?;
    // It counts only if the log names this root.
    if let Some(draft) = packed.draft {
        draft.keep(&stanza, &hash, usage, root_message);
    }
    Ok((
        hash,
        Report {
            info,
            page_failures,
            missed,
            notes,
        },
    ))
}

/// When a stage fails, its neighbours only see that it is gone: report the one that knows why.
fn first_cause<A, B>(source: Result<A>, pipeline: Result<B>, stored: Result<()>) -> Result<(A, B)> {
    stored?;
    match (source, pipeline) {
        (Ok(a), Ok(b)) => Ok((a, b)),
        (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
        (Err(source), Err(pipeline)) => Err(
            if source.kind() == ErrorKind::Failed && source.to_string() == PIPELINE_GONE {
                pipeline
            } else {
                source
            },
        ),
    }
}

struct Packed {
    entries: Vec<Entry>,
    segments: Vec<(String, u32, Vec<u32>)>,
    bad_pages: Vec<pipeline::BadPage>,
    /// Of a host that cannot read its manifest back.
    draft: Option<Draft>,
}
