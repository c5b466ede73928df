//! `check`: is a backup possible, and is WAL arriving?

use std::sync::Arc;

use fairvault_engine::backup::source;
use fairvault_engine::bounded::bounded;
use fairvault_engine::commit::Log;
use fairvault_engine::copy::{self as engine, Options};
use fairvault_engine::env::SystemEnv;
use fairvault_engine::error::{Error, Result};
use fairvault_engine::immutable;
use fairvault_engine::inspect::info_of;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::{History, Segment};
use fairvault_engine::replication::connection::{Connection, Mode, is_denied};
use fairvault_engine::stanza::create::{Cluster, check_cluster};
use fairvault_engine::store::Store;
use fairvault_engine::store::probe::probe;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::coverage::Coverage;
use fairvault_format::names;
use serde::Serialize;

use super::wal::receive::slot_of;
use super::{Outcome, copy, slot};
use crate::args::Output;
use crate::away::{Away, PATIENCE};
use crate::context::Context;
use crate::output;

#[derive(Serialize)]
struct Line {
    what: String,
    ok: bool,
    /// It is of an optional repository: a failure is a warning.
    optional: bool,
    detail: String,
    remedy: Option<String>,
}

fn line(what: &str, result: Result<String>) -> Line {
    match result {
        Ok(detail) => Line {
            what: what.to_owned(),
            ok: true,
            optional: false,
            detail,
            remedy: None,
        },
        Err(error) => Line {
            what: what.to_owned(),
            ok: false,
            optional: false,
            detail: error.to_string(),
            remedy: error.advice().map(str::to_owned),
        },
    }
}

/// Runs it.
pub async fn run(context: &Arc<Context>, stanza: &str) -> Result<Outcome> {
    let mut lines = Vec::new();
    let server = server(context, stanza, &mut lines).await;
    let repositories = context.repositories(Some(stanza))?;
    context.backup_repositories(stanza)?;
    if server.is_some() {
        let required: Vec<&String> = repositories.iter().filter(|name| !context.is_optional(name)).collect();
        let wal = context.wal(stanza);
        for repository in &required {
            let mut names = vec![slot_of(wal.slot.as_deref(), stanza, repository, repositories.len())];
            // A receiver may have been started for the one that is required alone.
            if required.len() == 1 {
                names.push(slot_of(wal.slot.as_deref(), stanza, repository, 1));
            }
            let said = slot::look(&context.conninfo(stanza)?, &names, !wal.standbys.is_empty()).await;
            lines.extend(said.map(|said| line(&format!("receiver into {repository}"), said)));
        }
    }
    for repository in &repositories {
        let (at, name, of) = (context.clone(), repository.clone(), stanza.to_owned());
        if !context.is_optional(repository) {
            lines.extend(look(at, name, of, server).await);
            continue;
        }
        let away = Away::of(context, stanza);
        let found = bounded(
            PATIENCE * 4,
            move || async move { Ok(look(at, name, of, server).await) },
        )
        .await;
        let mut found = found.unwrap_or_else(|error| vec![line(&format!("repository {repository}"), Err(error))]);
        found.iter_mut().for_each(|line| line.optional = true);
        if found.iter().all(|line| line.ok) {
            away.clear(repository, true);
        }
        lines.extend(found);
    }
    for other in repositories.iter().skip(1) {
        let compared = compare(context, stanza, &repositories[0], other).await;
        let mut compared = line(&format!("repositories {} and {other}", repositories[0]), compared);
        compared.optional = context.is_optional(other);
        lines.push(compared);
    }
    let good = lines.iter().all(|l| l.ok || l.optional);
    if context.global.output == Output::Json {
        output::json(
            "check",
            &serde_json::json!({ "stanza": stanza, "ok": good, "checks": lines }),
        );
    } else {
        for l in &lines {
            let word = match (l.ok, l.optional) {
                (true, _) => "ok  ",
                (false, true) => "WARN",
                (false, false) => "FAIL",
            };
            output::line(format_args!("{word}  {}: {}", l.what, l.detail));
            if let Some(remedy) = &l.remedy {
                output::line(format_args!("      → {remedy}"));
            }
        }
    }
    match good {
        true if lines.iter().all(|l| l.ok) => Ok(Outcome::Done),
        true => Ok(Outcome::Warnings),
        false => Err(Error::failed("not everything is as it should be")),
    }
}

/// Looks at a repository and the stanza in it.
async fn look(context: Arc<Context>, repository: String, stanza: String, server: Option<Server>) -> Vec<Line> {
    let store = match context.open_repository(&repository, false) {
        Ok(store) => store,
        Err(error) => return vec![line(&format!("repository {repository}"), Err(error))],
    };
    let probed = match store.settings().single_writer {
        true => Ok("not probed: single_writer = true, nothing protects it against a second writer".to_owned()),
        false => probe(&store, &SystemEnv)
            .await
            .map(|()| "creates objects conditionally".to_owned()),
    };
    let mut lines = vec![line(&format!("repository {repository}"), probed)];
    lines.extend(immutability(&context, &repository, &stanza, &store).await);
    let opened = stanza_in(&context, &repository, &stanza, server.as_ref()).await;
    lines.push(line(&format!("stanza {stanza} in {repository}"), opened));
    lines
}

/// What the store does with what is overwritten and deleted, and what is hidden of what a stanza is opened with.
async fn immutability(context: &Context, repository: &str, stanza: &str, store: &Store) -> Vec<Line> {
    let what = format!("immutability of {repository}");
    let mut is_required = false;
    let look = async {
        let log = context.open_log_in(repository, stanza, true).await;
        let policy = log.ok().and_then(|log| log.state().policy.clone()).unwrap_or_default();
        let retention = context.retention(repository, stanza)?;
        let minimum_s = policy.minimum_retention_s;
        let reliance = context.reliance(repository, stanza, minimum_s)?;
        // Backups ask for the same, and are refused without.
        is_required = reliance.as_ref().is_some_and(|reliance| reliance.is_required);
        let advice = immutable::advice(store, &retention, minimum_s, reliance.as_ref()).await?;
        if is_required && store.bucket().await?.is_some_and(|bucket| bucket.lock) {
            store
                .folder(stanza)
                .versions(&format!("{}/", names::PACKS))
                .next()
                .await?;
        }
        Ok(advice)
    };
    let advice = match look.await {
        Ok(advice) => advice,
        // Not everybody may ask, and not everybody has to.
        Err(error) => {
            return vec![Line {
                optional: !is_required,
                ..line(&what, Err(error))
            }];
        }
    };
    let mut lines = vec![line(&what, Ok(advice.is))];
    let warnings = advice.warnings.into_iter().map(|(detail, remedy)| Line {
        optional: true,
        ..line(&what, Err(Error::failed(detail).remedy(remedy)))
    });
    lines.extend(warnings);
    if let Some((detail, remedy)) = advice.refused {
        lines.push(line(&what, Err(Error::refused(detail).remedy(remedy))));
    }
    let hidden = async {
        let access = context.access(repository, stanza, false, true)?;
        let mut hidden = immutable::hidden::of_opening(&access).await?;
        hidden.extend(immutable::hidden::deleted_entries(&store.folder(stanza)).await?);
        match hidden.first() {
            None => Ok(()),
            Some(first) => Err(Error::damaged(format!(
                "{} objects that everything relies on are hidden; {}: {}",
                hidden.len(),
                first.object,
                first.problem
            ))
            .remedy("somebody deleted or replaced them: find out who, then run `fairvault repair`")),
        }
    };
    if let Err(error) = hidden.await {
        lines.push(line(&what, Err(error)));
    }
    lines
}

/// What `copy` would bring from one repository to another. That one is behind is no fault.
async fn compare(context: &Arc<Context>, stanza: &str, one: &str, other: &str) -> Result<String> {
    let is_optional = context.is_optional(other);
    let source = copy::open(context, stanza, one, false).await?;
    let target = copy::open(context, stanza, other, is_optional).await?;
    let options = Options {
        backup: None,
        retention: context.retention(other, stanza)?,
        compression: 0.into(),
        reliance: None,
    };
    let plan = async {
        let plan = engine::plan(&source, &target, &options).await?;
        Ok::<_, Error>((plan, ends(&source).await?, ends(&target).await?))
    };
    let late = || Error::temporary("they could not be compared in time");
    let (plan, here, there) = match is_optional {
        true => tokio::time::timeout(PATIENCE * 4, plan).await.map_err(|_| late())??,
        false => plan.await?,
    };
    Ok(format!(
        "{one} has {here}; {other} has {there}; `copy` would bring {}",
        copy::brings(&plan)
    ))
}

/// The newest backup of a stanza, and the newest segment of its newest timeline.
async fn ends(log: &Log) -> Result<String> {
    let archive = Archive::open(log, None, 0)?;
    let coverage = Coverage::read(&archive).await?;
    let newest = log.state().backups.last().and_then(|backup| backup.info.as_ref());
    let backup = newest.map_or_else(|| "no backup".to_owned(), |info| format!("backup {}", info.id));
    let last = coverage.timelines.iter().next_back();
    let segment = last.and_then(|(&timeline, wal)| {
        let number = wal.segments.last().max(wal.parts.last()).copied()?;
        Some(Segment { timeline, number }.name(archive.segment_size))
    });
    Ok(format!(
        "{backup} and WAL up to {}",
        segment.unwrap_or_else(|| "none".to_owned())
    ))
}

#[derive(Clone, Copy)]
struct Server {
    cluster: Cluster,
    timeline: u32,
    /// Where its timeline began.
    began: Lsn,
    flush: Lsn,
    archiving: bool,
}

async fn server(context: &Context, stanza: &str, lines: &mut Vec<Line>) -> Option<Server> {
    let attempt = async {
        let mut connection = Connection::open_either(&context.conninfo(stanza)?).await?;
        let identity = connection.identify().await?;
        let segment_size = connection.wal_segment_size().await?;
        let history = match connection.timeline_history(identity.timeline).await {
            // What the role lacks is said with the sources.
            Err(error) if is_denied(&error) => None,
            history => history?,
        };
        let history = history
            .map(|content| History::parse(identity.timeline, &content))
            .transpose()?;
        let mode = connection.show("archive_mode").await?.unwrap_or_default();
        let command = connection.show("archive_command").await?.unwrap_or_default();
        let senders = connection.show("max_wal_senders").await?.unwrap_or_default();
        let checksums = connection.show("data_checksums").await?.unwrap_or_default();
        let level = connection.show("wal_level").await?.unwrap_or_default();
        if level == "minimal" {
            return Err(Error::refused("wal_level = minimal: no backup can be recovered")
                .remedy("set wal_level = replica and restart the server"));
        }
        let archiving = mode != "off" && !command.is_empty();
        let detail = format!(
            "PostgreSQL {}, {}, timeline {}, checksums {checksums}, max_wal_senders {senders}, {}",
            connection.major(),
            if connection.in_recovery() { "standby" } else { "primary" },
            identity.timeline,
            match (archiving, connection.mode()) {
                (true, _) => format!("archive_command = {command:?}"),
                (false, Mode::Replication) => {
                    "does not archive: backups stream their own WAL, and recovery ends with the last backup".to_owned()
                }
                (false, Mode::Sql) if senders == "0" => "does not archive, and sends no WAL: backups need \
                                                         `fairvault wal push`, or max_wal_senders above 0"
                    .to_owned(),
                (false, Mode::Sql) => "does not archive, and the role may not replicate: backups need \
                                       `fairvault wal receive` and `--wal archive`"
                    .to_owned(),
            }
        );
        let cluster = Cluster {
            system_identifier: identity.system_identifier,
            major: connection.major(),
            wal_segment_size: segment_size,
        };
        Ok((
            Server {
                cluster,
                timeline: identity.timeline,
                began: history.and_then(|h| h.start_of(identity.timeline)).unwrap_or_default(),
                flush: identity.flush,
                archiving,
            },
            detail,
        ))
    };
    match attempt.await {
        Ok((server, detail)) => {
            lines.push(line("server", Ok(detail)));
            lines.push(sources(context, stanza, server.cluster.system_identifier).await);
            Some(server)
        }
        Err(error) => {
            lines.push(line("server", Err(error)));
            None
        }
    }
}

/// What backups can be read from. That it is not much is no fault.
async fn sources(context: &Context, stanza: &str, system_identifier: u64) -> Line {
    let Ok(conninfo) = context.conninfo(stanza) else {
        return line("sources", Ok("stream".to_owned()));
    };
    let (mut good, mut bad) = (Vec::new(), String::new());
    for (name, usable) in source::usable(&conninfo, system_identifier).await {
        match usable {
            Ok(()) => good.push(name),
            Err(error) => {
                let remedy = error.advice().map(|advice| format!(" → {advice}")).unwrap_or_default();
                bad += &format!("; not {name}: {error}{remedy}");
            }
        }
    }
    match good.is_empty() {
        true => line("sources", Err(Error::refused(format!("none{bad}")))),
        false => line("sources", Ok(format!("{}{bad}", good.join(", ")))),
    }
}

async fn stanza_in(context: &Context, repository: &str, stanza: &str, server: Option<&Server>) -> Result<String> {
    let log = context.open_log_in(repository, stanza, true).await?;
    let Some(server) = server else {
        return Ok("opens; the server was not compared".to_owned());
    };
    check_cluster(&log, &server.cluster)?;
    let archive = Archive::open(&log, Some(server.cluster.system_identifier), 3)?;
    let coverage = Coverage::read(&archive).await?;
    let wal = coverage.timelines.get(&server.timeline);
    // Pieces are what a receiver leaves of the segment that is being written, and a standby's backup of its last one; or it
    // has brought what lies between backups.
    let backups = log.state().backups.iter().filter_map(|backup| backup.info.as_ref());
    let of_cluster = || {
        backups
            .clone()
            .filter(|info| info.system_identifier == server.cluster.system_identifier)
    };
    let is_end = |number: u64| of_cluster().any(|info| info.stop_lsn / archive.segment_size == number);
    let is_received = wal.is_some_and(|wal| wal.parts.iter().any(|&number| !is_end(number)))
        || coverage.bridges(server.timeline, of_cluster()).contains(&true);
    let size = archive.segment_size;
    let current = server.flush.0 / size;
    if server.archiving || is_received {
        let info = info_of(&log).await?;
        let mut windows = info.windows.iter().filter(|w| {
            w.timeline == server.timeline && w.system_identifier == server.cluster.system_identifier.to_string()
        });
        if let Some((first, last)) = windows.find_map(|w| w.hole.as_ref().zip(w.hole_end.as_ref())) {
            let of_server = info.wal.iter().filter(|line| {
                line.timeline == server.timeline
                    && line.system_identifier == server.cluster.system_identifier.to_string()
            });
            let gaps = of_server.flat_map(|line| &line.ranges);
            let more = match gaps.filter(|range| range.after == Some("gap")).count() {
                0 | 1 => String::new(),
                gaps => format!("; there are {gaps} gaps, see `fairvault info`"),
            };
            return Err(Error::damaged(format!(
                "WAL from {first} to {last} is missing, and later WAL is there: recovery from backups before it ends there{more}"
            ))
            .remedy(
                "archive it with `fairvault wal push` if the server's pg_wal still has it; else take a new backup",
            ));
        }
    }
    // What comes before the first segment of the server's timeline is of another one. A part is of one that is not complete.
    let (whole, part) = wal.map_or((None, None), |wal| {
        (wal.segments.last().copied(), wal.parts.last().copied())
    });
    let next = whole
        .map(|number| number + 1)
        .max(part)
        .max(Some(server.began.0 / size))
        .unwrap_or_default();
    let behind = current.saturating_sub(next);
    match whole.max(part) {
        _ if !server.archiving && !is_received => Ok(format!("opens, {} backups", log.state().backups.len())),
        // The segment that is being written, and one that is being archived.
        Some(_) if behind <= 1 => Ok(format!("opens, {} backups, WAL arrives", log.state().backups.len())),
        None if behind <= 1 => Ok("opens; no WAL segment is complete yet".to_owned()),
        _ => Err(
            Error::failed(format!("WAL in the repository is {behind} segments behind the server")).remedy(match server
                .archiving
            {
                true => "look at pg_stat_archiver and at the server's log for what archive_command says",
                false => "look at pg_stat_replication and at the log of `fairvault wal receive`",
            }),
        ),
    }
}
