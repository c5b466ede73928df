//! Keys, log, snapshots and index runs: what everything else is found and opened with.

use std::collections::BTreeSet;
use std::sync::Arc;

use fairvault_format::{limits, names, sha256};

use super::Report;
use crate::commit::Log;
use crate::error::{Error, Kind};
use crate::immutable::{hidden, written};
use crate::stanza::{Access, Stanza, keys_in, read_repository, read_slot};

/// Checks `fairvault.json` and the key slots: each can be read, and the configured secret opens one of every key epoch.
pub async fn check_keys(access: &Access, log: &Log, report: &mut Report) {
    let stanza = log.stanza();
    report.objects += 1;
    match read_repository(&access.repository).await {
        Ok(repository) if repository.id().is_ok_and(|id| id == stanza.scope().repository) => {}
        Ok(_) => report.add(names::REPOSITORY, "it has another id than the keys of this stanza"),
        Err(error) => report.note(names::REPOSITORY, &error),
    }
    let mut opened = BTreeSet::new();
    let listed = match stanza.store().list(names::KEYS).await {
        Ok(listed) => listed,
        Err(error) => return report.note(names::KEYS, &error),
    };
    for (name, _) in listed {
        report.objects += 1;
        match read_slot(stanza.store(), &name, &stanza.scope().repository).await {
            Ok(slot) => opened.extend(keys_in(&slot, access.secret.as_ref(), stanza.scope()).map(|keys| keys.epoch)),
            Err(error) => report.note(name, &error),
        }
    }
    let mut named = log.state().key_epochs.iter().map(|named| named.epoch);
    if let Some(epoch) = named.find(|epoch| !opened.contains(epoch)) {
        report.add(
            names::KEYS,
            format!(
                "no slot of key epoch {epoch} is opened by the configured key: without what this host remembers, what is of \
                 it could not be restored"
            ),
        );
    }
}

/// Reads all of the log, and the snapshots. It was opened from what this host remembers or from a snapshot.
pub async fn check_log(log: &Log, report: &mut Report) {
    let mut fresh = Log::empty(log.stanza().clone());
    if let Err(error) = fresh.refresh_proven().await {
        report.note(names::log_context(fresh.state().seq + 1), &error);
    } else if fresh.state().seq < log.state().seq {
        report.add(
            names::log_context(fresh.state().seq + 1),
            "it is missing, and later entries were seen before",
        );
    }
    report.objects += fresh.state().seq;
    let store = log.stanza().store();
    let listed = match store.list(names::SNAPSHOTS).await {
        Ok(listed) => listed,
        Err(error) => return report.note(names::SNAPSHOTS, &error),
    };
    for (name, _) in listed {
        report.objects += 1;
        let hash = name
            .rsplit('/')
            .next()
            .and_then(names::parse_snapshot)
            .map(|(_, hash)| hash);
        match store.get(&name, limits::OBJECT_BYTES).await {
            Ok(bytes) if hash == Some(sha256(&bytes)) => {}
            Ok(_) => report.add(
                &name,
                "it does not match its name; the log is read from an older one instead",
            ),
            Err(error) => report.note(&name, &error),
        }
    }
}

/// Names what is needed and hidden, in a bucket that keeps versions.
pub async fn check_hidden(access: &Access, stanza: &Arc<Stanza>, report: &mut Report) {
    let find = async {
        let mut log = Log::unread(stanza.clone());
        let mut all = hidden::of_opening(access).await?;
        all.extend(written::of_log(&mut log).await?.hidden);
        all.extend(hidden::of_content(&log).await?);
        Ok::<_, Error>(all)
    };
    match find.await {
        Ok(all) => all.iter().for_each(|hidden| {
            report.add(
                &hidden.object,
                format_args!("{}: `fairvault repair` brings it back", hidden.problem),
            )
        }),
        // What is wrong with the log was said.
        Err(error) if error.kind() == Kind::Damaged => {}
        Err(error) => report.note(names::LOG, &error.context("looking for what is hidden")),
    }
}

/// Checks index runs; returns the packs that they name.
pub async fn check_runs(log: &Log, report: &mut Report) -> BTreeSet<[u8; 32]> {
    let mut packs = BTreeSet::new();
    let stanza = log.stanza();
    for run in &log.state().index_runs {
        let Ok(hash) = <[u8; 32]>::try_from(run.as_slice()) else {
            continue;
        };
        let name = names::index_run(&hash);
        report.objects += 1;
        let opened = async {
            let bytes = stanza.store().get(&name, limits::OBJECT_BYTES).await?;
            if sha256(&bytes) != hash {
                return Err(Error::damaged(format!(
                    "its {} bytes do not match its name; it only speeds up backups and can be rebuilt from packs",
                    bytes.len()
                )));
            }
            let keys = stanza.keys_for(&bytes, &name)?;
            let run = fairvault_format::index::open_run(keys, stanza.scope(), &bytes, &name)?;
            Ok((run, bytes.len() as u64))
        };
        match opened.await {
            Ok((run, len)) => {
                report.bytes += len;
                packs.extend(run.packs.iter().map(|p| p.name));
            }
            Err(error) => report.note(&name, &error),
        }
    }
    packs
}
