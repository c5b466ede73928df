//! The sweep of a mark.
//!
//! Everything that is deleted was unused at a point of the log where the mark was open and all sessions from before
//! it had ended. Later sessions do not use what the mark names, so it stays unused for good; the entry that ends
//! the mark withdraws it from the index, also where a reader still holds it.

use std::collections::{BTreeSet, HashSet};

use fairvault_format::proto::log_entry::Kind as Entry;
use fairvault_format::{names, proto};

use super::history::Past;
use super::usage::Usage;
use super::{Options, Report, runs};
use crate::commit::Log;
use crate::commit::fence::by_whom;
use crate::commit::lease::{self, Found};
use crate::env::has_fault;
use crate::error::{Error, Kind, Result};

/// Objects deleted in one go.
const BATCH: usize = 256;

/// Sweeps a mark; `false` if somebody's end has to be waited for.
pub async fn run(log: &mut Log, mark: &proto::GcMark, options: &Options, report: &mut Report) -> Result<bool> {
    let stanza = log.stanza().clone();
    let swept_before = report.swept_bytes();
    // Also what was deleted before somebody came between: whoever deletes versions goes by it.
    let mut gone_roots = BTreeSet::new();
    loop {
        let at_work = end_dead_sessions(log, mark.seq, options).await?;
        if !at_work.is_empty() {
            report.waiting.extend(at_work.iter().map(words));
            return Ok(false);
        }
        if !is_open(log, mark) {
            return Ok(true);
        }
        let (past, usage) = Usage::of_needed(log).await?;
        if !is_open(log, mark) {
            return Ok(true);
        }
        // Read after the mark was written: whoever takes one later reads a log with the mark.
        let held = Held::by_readers(log, &past, options, report).await?;
        let unused: BTreeSet<[u8; 32]> = hashes(&mark.packs).filter(|pack| !usage.uses(pack)).collect();
        let packs: Vec<_> = unused.iter().filter(|pack| !held.usage.uses(*pack)).copied().collect();
        let thin = usage.thin(&stanza.store().list_hashes(names::PACKS).await?);
        drop(usage);
        let mut leave: HashSet<[u8; 32]> = unused.iter().copied().collect();
        leave.extend(thin.iter().map(|(pack, _)| *pack));
        let changes = runs::without(log, &leave).await?;

        let needed: HashSet<&[u8]> = past.needed().map(|backup| backup.root.as_slice()).collect();
        let is_free = |root: &[u8; 32]| !needed.contains(&root[..]) && !held.roots.contains(root);
        let roots: Vec<_> = hashes(&mark.roots).filter(is_free).collect();
        let live: HashSet<&[u8]> = log.state().index_runs.iter().map(Vec::as_slice).collect();
        let orphans: Vec<_> = hashes(&mark.index_runs)
            .filter(|run| !live.contains(&run[..]))
            .collect();
        delete(log, &packs, names::pack, names::PACKS, &mut report.packs).await?;
        delete(log, &roots, names::root, names::ROOTS, &mut report.roots).await?;
        gone_roots.extend(roots);
        delete(log, &orphans, names::index_run, names::INDEX, &mut report.index_runs).await?;

        // In order, as they come out of the set.
        let kept = hashes(&mark.packs).filter(|pack| packs.binary_search(pack).is_err());
        let swept = proto::GcSwept {
            mark: mark.seq,
            kept: kept.map(|pack| pack.to_vec()).collect(),
            index_runs: changes.withdrawn.clone(),
            new_runs: changes.new,
            bytes: report.swept_bytes() - swept_before,
            roots: gone_roots.iter().map(|root| root.to_vec()).collect(),
        };
        let (before, seen) = (live_roots(log.state()), log.state().seq);
        let (policy, runs) = (log.state().policy.clone(), log.state().index_runs.clone());
        let number = mark.seq;
        let unchanged = |now: &proto::Snapshot| match live_roots(now) == before
            && now.policy == policy
            && are_live(&runs, now)
            && now.open_marks.iter().any(|open| open.seq == number)
        {
            true => Ok(()),
            false => Err(Error::temporary("the log has grown")),
        };
        match log.append(Entry::GcSwept(swept), unchanged).await {
            Ok(_) => {
                for (_, len) in &thin {
                    report.thin_packs.add(*len);
                }
                let withdrawn: Vec<_> = hashes(&changes.withdrawn).collect();
                delete(log, &withdrawn, names::index_run, names::INDEX, &mut report.index_runs).await?;
                return Ok(true);
            }
            // What is used has changed, or another collector has ended the mark: look again.
            Err(_) if log.state().seq > seen => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether a state names all of these index runs.
pub fn are_live(runs: &[Vec<u8>], now: &proto::Snapshot) -> bool {
    let live: HashSet<&Vec<u8>> = now.index_runs.iter().collect();
    runs.iter().all(|run| live.contains(run))
}

fn is_open(log: &Log, mark: &proto::GcMark) -> bool {
    log.state().open_marks.iter().any(|open| open.seq == mark.seq)
}

fn live_roots(state: &proto::Snapshot) -> Vec<Vec<u8>> {
    state.backups.iter().map(|backup| backup.root.clone()).collect()
}

/// The hashes in a list of the log.
pub fn hashes<'a>(list: impl IntoIterator<Item = &'a Vec<u8>>) -> impl Iterator<Item = [u8; 32]> {
    list.into_iter().filter_map(|hash| hash.as_slice().try_into().ok())
}

/// Who it is that is waited for.
fn words(session: &proto::OpenSession) -> String {
    let begin = session.begin.clone().unwrap_or_default();
    let since = jiff::Timestamp::from_microsecond(session.time_us).unwrap_or_default();
    format!(
        "{} {} on {} since {}",
        begin.what,
        begin.backup,
        session.host,
        since.strftime("%Y-%m-%dT%H:%M:%SZ")
    )
}

/// Fences the sessions from before an entry whose heart stands still; returns those that go on.
pub async fn end_dead_sessions(log: &mut Log, before: u64, options: &Options) -> Result<Vec<proto::OpenSession>> {
    let stanza = log.stanza().clone();
    log.refresh().await?;
    let id = |session: &proto::OpenSession| session.begin.as_ref().map(|b| b.session.clone()).unwrap_or_default();
    let open = |log: &Log| -> Vec<proto::OpenSession> {
        let all = log.state().open_sessions.iter();
        all.filter(|session| session.seq < before).cloned().collect()
    };
    let suspects: Vec<_> = open(log).iter().map(id).collect();
    if suspects.is_empty() || has_fault("open sessions") {
        return Ok(Vec::new());
    }
    let living = lease::of_sessions(&stanza, &suspects, options.patience).await?;
    log.refresh().await?;
    let is_alive = |session: &proto::OpenSession| living.iter().any(|lease| lease.is_of(&id(session)));
    let (alive, dead): (Vec<_>, Vec<_>) = open(log).into_iter().partition(is_alive);
    if !dead.is_empty() {
        let fence = proto::Fence {
            fence: log.state().fence + 1,
            sessions: dead.iter().map(id).collect(),
            reason: "no sign of life was seen by a collector".to_owned(),
        };
        tracing::warn!("{} sessions that show no sign of life are ended", dead.len());
        let number = fence.fence;
        let has_effect = |now: &proto::Snapshot| match now.fence < number {
            true => Ok(()),
            false => Err(
                Error::new(Kind::Held, format!("writers were fenced just now{}", by_whom(now)))
                    .remedy("run this again"),
            ),
        };
        log.append(Entry::SetFence(fence), has_effect).await?;
    }
    Ok(alive)
}

/// What readers hold that has expired.
struct Held {
    usage: Usage,
    roots: HashSet<[u8; 32]>,
}

impl Held {
    async fn by_readers(log: &Log, past: &Past, options: &Options, report: &mut Report) -> Result<Self> {
        let stanza = log.stanza();
        let mut this = Self {
            usage: Usage::default(),
            roots: HashSet::new(),
        };
        let needed: HashSet<&[u8]> = past.needed().map(|backup| backup.root.as_slice()).collect();
        let held = |lease: &Found| -> Vec<proto::CommittedBackup> {
            let named = past.named(lease.backup());
            named.filter(|b| !needed.contains(b.root.as_slice())).cloned().collect()
        };
        let leases: Vec<Found> = lease::all(stanza).await?;
        let matters: Vec<Found> = leases.into_iter().filter(|lease| !held(lease).is_empty()).collect();
        if matters.is_empty() || has_fault("leases") {
            return Ok(this);
        }
        let living = lease::living(stanza, matters.clone(), options.patience).await?;
        let is_alive = |lease: &Found| living.iter().any(|other| other.name == lease.name);
        for lease in &living {
            for backup in held(lease) {
                let Ok(root) = backup.root.as_slice().try_into() else {
                    continue;
                };
                match this.usage.add(stanza, &backup).await {
                    Ok(()) => {}
                    // A root that is gone protects nothing any more; one that somebody has hidden does.
                    Err(error) if error.kind() == Kind::NotFound => {
                        let is_hidden = this.usage.add_hidden(stanza, &backup).await?;
                        // Earlier sweeps hide them too, and whoever reads all backups holds these: nobody reads them.
                        if !is_hidden || lease.backup().is_empty() {
                            continue;
                        }
                    }
                    Err(error) => return Err(error),
                }
                this.roots.insert(root);
                report.kept.push(format!(
                    "backup {} has expired and is being read: {lease}",
                    crate::restore::target::info(&backup).id
                ));
            }
        }
        let dead: Vec<Found> = matters.into_iter().filter(|lease| !is_alive(lease)).collect();
        lease::bury(stanza, &dead).await?;
        Ok(this)
    }
}

/// Deletes what is listed, and counts it.
async fn delete(
    log: &Log,
    hashes: &[[u8; 32]],
    name: impl Fn(&[u8; 32]) -> String,
    folder: &str,
    count: &mut super::Count,
) -> Result<()> {
    if hashes.is_empty() {
        return Ok(());
    }
    let store = log.stanza().store();
    let listed = store.list_hashes(folder).await?;
    for batch in hashes.chunks(BATCH) {
        let names: Vec<String> = batch.iter().map(&name).collect();
        store.delete(&names).await?;
        for hash in batch {
            if let Ok(at) = listed.binary_search_by_key(hash, |(name, _)| *name) {
                count.add(listed[at].1);
            }
        }
    }
    Ok(())
}
