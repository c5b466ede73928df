//! What the entries of a log amount to: a fold over them.

use std::collections::HashSet;

use fairvault_format::proto::{
    BackupInfo, CloseTimeline, CommittedBackup, CopiedFrom, Erased, ExpiredWal, Fenced, GcMark, Incarnation, KeyEpoch,
    LogEntry, OpenSession, Snapshot, log_entry::Kind as Entry,
};

use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;

/// What the session of a copy says that it does.
pub const COPY: &str = "copy";

/// The newest key epoch that a state names; 0 if it names none.
pub fn newest_epoch(state: &Snapshot) -> u32 {
    state.key_epochs.last().map_or(0, |named| named.epoch)
}

/// Whether an entry that is sealed with `key_epoch` has no effect on a state: it was written by somebody who had not seen
/// a fence, or who has old keys.
pub fn is_void(state: &Snapshot, entry: &LogEntry, key_epoch: u32) -> bool {
    entry.fence < state.fence || key_epoch < newest_epoch(state)
}

/// The key epoch that an entry makes the newest one, if it does.
pub fn named_epoch(state: &Snapshot, entry: &LogEntry, key_epoch: u32) -> Option<KeyEpoch> {
    let named = match entry.kind.as_ref()? {
        Entry::Genesis(genesis) => genesis.key_epoch.as_ref()?,
        Entry::KeyEpoch(epoch) => epoch,
        _ => return None,
    };
    (!is_void(state, entry, key_epoch) && named.epoch > newest_epoch(state)).then(|| named.clone())
}

/// Applies one entry that was opened and checked. `key_epoch` is the epoch that it is sealed with.
pub fn apply(state: &mut Snapshot, entry: &LogEntry, key_epoch: u32) -> Result<()> {
    let damaged = |why: &str| Error::damaged(format!("log entry {}: {why}", entry.seq));
    let kind = entry.kind.as_ref().ok_or_else(|| damaged("it says nothing"))?;
    let is_named = match kind {
        Entry::Genesis(genesis) => genesis.key_epoch.as_ref().is_some_and(|named| named.epoch == key_epoch),
        _ => key_epoch <= newest_epoch(state),
    };
    if !is_named {
        return Err(damaged(&format!(
            "it is of key epoch {key_epoch}, which no entry before it names"
        )));
    }
    if is_void(state, entry, key_epoch) {
        return Ok(());
    }
    state.key_epochs.extend(named_epoch(state, entry, key_epoch));
    match kind {
        Entry::Genesis(genesis) => {
            state.incarnations.extend(genesis.incarnation);
            state.genesis = Some(genesis.clone());
        }
        Entry::Begin(begin) => state.open_sessions.push(OpenSession {
            begin: Some(begin.clone()),
            seq: entry.seq,
            time_us: entry.time_us,
            fence: entry.fence,
            host: entry.host.clone(),
            index_runs: Vec::new(),
        }),
        Entry::Announce(announce) => {
            if let Some(session) = find(state, &announce.session) {
                session.index_runs.extend(announce.index_runs.iter().cloned());
            }
            add_runs(state, &announce.index_runs);
        }
        Entry::Commit(commit) => {
            let id = commit.info.as_ref().map(|i| i.id.as_str()).unwrap_or_default();
            if find(state, &commit.session).is_none() || is_committed(state, id) {
                // The session was fenced or has ended, or the id is taken: the commit does not count.
                return Ok(());
            }
            state.open_sessions.retain(|s| session_id(s) != commit.session);
            add_runs(state, &commit.index_runs);
            let backup = CommittedBackup {
                seq: entry.seq,
                root: commit.root.clone(),
                info: commit.info.clone(),
                key_epoch,
            };
            state.backups.insert(place(state, commit.info.as_ref()), backup);
        }
        Entry::Abort(abort) => state.open_sessions.retain(|s| session_id(s) != abort.session),
        Entry::SetFence(fence) => {
            if fence.fence > state.fence {
                state.fence = fence.fence;
                state.fenced = Some(Fenced {
                    seq: entry.seq,
                    time_us: entry.time_us,
                    host: entry.host.clone(),
                    user: entry.user.clone(),
                    reason: fence.reason.clone(),
                });
                state
                    .open_sessions
                    .retain(|s| !fence.sessions.iter().any(|f| f == session_id(s)));
            }
        }
        Entry::ArchiveEpoch(epoch) => state.archive_epochs.push(*epoch),
        Entry::Expired(expired) => {
            state
                .backups
                .retain(|b| b.info.as_ref().is_none_or(|i| i.id != expired.backup));
        }
        Entry::ExpiredWal(wal) => expire_wal(state, wal),
        Entry::Hold(hold) => {
            state.holds.retain(|h| h.backup != hold.backup);
            if !hold.released {
                state.holds.push(hold.clone());
            }
        }
        Entry::GcMark(mark) => {
            state.open_marks.push(GcMark {
                seq: entry.seq,
                ..mark.clone()
            });
            state.newest_mark = entry.seq;
        }
        Entry::GcSwept(swept) => {
            let before = state.open_marks.len();
            state.open_marks.retain(|mark| mark.seq != swept.mark);
            // Another collector has ended it: what that one withdrew rules.
            if state.open_marks.len() < before {
                let withdrawn: HashSet<&[u8]> = swept.index_runs.iter().map(Vec::as_slice).collect();
                state.index_runs.retain(|run| !withdrawn.contains(run.as_slice()));
                add_runs(state, &swept.new_runs);
            }
        }
        Entry::Policy(policy) => state.policy = Some(policy.clone()),
        Entry::Incarnation(incarnation) => {
            let is_it = |i: &Incarnation| i.system_identifier == incarnation.system_identifier;
            // The newest is the last one, also where a stanza returns to an earlier cluster.
            state.incarnations.retain(|i| !is_it(i));
            state.incarnations.push(*incarnation);
        }
        Entry::DistrustParser(parser) => state.distrusted.push(parser.clone()),
        Entry::CloseTimeline(closed) => {
            let key = |c: &CloseTimeline| (c.system_identifier, c.timeline);
            state.closed_timelines.retain(|c| key(c) != key(closed));
            if !closed.reopened {
                state.closed_timelines.push(closed.clone());
            }
        }
        // The first one says who did it; another one repeats it.
        Entry::Erasure(erasure) => {
            state.erased.get_or_insert_with(|| Erased {
                seq: entry.seq,
                time_us: entry.time_us,
                host: entry.host.clone(),
                user: entry.user.clone(),
                reason: erasure.reason.clone(),
            });
        }
        Entry::KeyEpoch(_) | Entry::Operation(_) => {}
    }
    Ok(())
}

/// Adds a range, joined with those that it meets.
fn expire_wal(state: &mut Snapshot, wal: &ExpiredWal) {
    if wal.from_lsn >= wal.to_lsn {
        return;
    }
    let key = |w: &ExpiredWal| (w.system_identifier, w.timeline);
    let meets = |w: &ExpiredWal| key(w) == key(wal) && w.from_lsn <= wal.to_lsn && wal.from_lsn <= w.to_lsn;
    let (met, mut rest): (Vec<_>, Vec<_>) = std::mem::take(&mut state.expired_wal).into_iter().partition(meets);
    let joined = met.iter().fold(wal.clone(), |all, w| ExpiredWal {
        from_lsn: all.from_lsn.min(w.from_lsn),
        to_lsn: all.to_lsn.max(w.to_lsn),
        ..all
    });
    rest.push(ExpiredWal {
        reason: String::new(),
        bytes: 0,
        ..joined
    });
    rest.sort_by_key(|w| (w.system_identifier, w.timeline, w.from_lsn));
    state.expired_wal = rest;
}

/// Fails if WAL that a backup itself needs has expired.
pub fn has_its_wal(state: &Snapshot, info: &BackupInfo) -> Result<()> {
    let mut expired = state.expired_wal.iter();
    let meets = |w: &&ExpiredWal| {
        (w.system_identifier, w.timeline) == (info.system_identifier, info.stop_timeline)
            && w.from_lsn < info.stop_lsn
            && info.start_lsn < w.to_lsn
    };
    match expired.find(meets) {
        None => Ok(()),
        Some(wal) => Err(Error::refused(format!(
            "backup {} needs WAL from {} to {} of timeline {}, which has expired up to {}",
            info.id,
            Lsn(info.start_lsn),
            Lsn(info.stop_lsn),
            info.stop_timeline,
            Lsn(wal.to_lsn)
        ))
        .remedy(
            "a standby that lags behind, or an abandoned timeline, can be the reason: take the backup from the primary",
        )),
    }
}

fn session_id(session: &OpenSession) -> &[u8] {
    session.begin.as_ref().map_or(&[], |b| b.session.as_slice())
}

fn find<'a>(state: &'a mut Snapshot, session: &[u8]) -> Option<&'a mut OpenSession> {
    state.open_sessions.iter_mut().find(|s| session_id(s) == session)
}

fn add_runs(state: &mut Snapshot, runs: &[Vec<u8>]) {
    // A set pays for those of a large backup or collection.
    if runs.len() > 16 {
        let mut known: HashSet<&[u8]> = state.index_runs.iter().map(Vec::as_slice).collect();
        let new = runs.iter().filter(|run| known.insert(run.as_slice()));
        let new: Vec<Vec<u8>> = new.cloned().collect();
        state.index_runs.extend(new);
        return;
    }
    for run in runs {
        if !state.index_runs.contains(run) {
            state.index_runs.push(run.clone());
        }
    }
}

/// Whether `session` is open, that is, neither committed, aborted nor fenced.
pub fn is_open(state: &Snapshot, session: &[u8]) -> bool {
    state.open_sessions.iter().any(|s| session_id(s) == session)
}

/// Whether a backup with this id was committed.
pub fn is_committed(state: &Snapshot, id: &str) -> bool {
    state
        .backups
        .iter()
        .any(|b| b.info.as_ref().is_some_and(|i| i.id == id))
}

/// Whether a backup id can no longer be given to a new session that does `what`. A copy has the id of its original, and
/// goes on where a copy died whose session is still open: whoever commits first has it.
pub fn is_taken(state: &Snapshot, id: &str, what: &str) -> bool {
    let announced = |s: &OpenSession| {
        let begin = s.begin.as_ref();
        begin.is_some_and(|b| b.backup == id && !(what == COPY && b.what == COPY))
    };
    is_committed(state, id) || state.open_sessions.iter().any(announced)
}

/// Where a backup that is committed now comes among those of a state: a copy where its original would be, by
/// incarnation, timeline and stop position; any other at the end.
pub fn place(state: &Snapshot, info: Option<&BackupInfo>) -> usize {
    let end = state.backups.len();
    let Some(info) = info.filter(|info| info.copied_from.is_some()) else {
        return end;
    };
    let position = |info: &BackupInfo| {
        let mut lives = state.incarnations.iter();
        let life = lives.position(|life| life.system_identifier == info.system_identifier);
        (life.unwrap_or(usize::MAX), info.stop_timeline, info.stop_lsn)
    };
    let comes_later = |backup: &CommittedBackup| backup.info.as_ref().is_some_and(|i| position(i) > position(info));
    state.backups.iter().position(comes_later).unwrap_or(end)
}

/// Which backup this one is, or is a copy of.
pub fn origin(state: &Snapshot, info: &BackupInfo) -> CopiedFrom {
    let own = || {
        let genesis = state.genesis.clone().unwrap_or_default();
        CopiedFrom {
            repository_id: genesis.repository_id,
            stanza_id: genesis.stanza_id,
            backup: info.id.clone(),
        }
    };
    info.copied_from.clone().unwrap_or_else(own)
}

/// The backup of a state that is, or is a copy of, `origin`.
pub fn find_origin<'a>(state: &'a Snapshot, wanted: &CopiedFrom) -> Option<&'a CommittedBackup> {
    let is_it = |b: &&CommittedBackup| b.info.as_ref().is_some_and(|i| origin(state, i) == *wanted);
    state.backups.iter().find(is_it)
}

/// Fails if a state has a copy of that backup: a second one would count for retention as if it were another backup.
pub fn is_new(state: &Snapshot, wanted: &CopiedFrom) -> Result<()> {
    match find_origin(state, wanted) {
        None => Ok(()),
        Some(_) => Err(Error::new(
            Kind::Held,
            format!("backup {} was copied by somebody else meanwhile", wanted.backup),
        )),
    }
}

/// Fails if a backup relies on a parser of WAL that was distrusted while it was taken. A copy is as good as its original.
pub fn trusts_parsers(state: &Snapshot, info: &BackupInfo) -> Result<()> {
    let mut distrusted = state.distrusted.iter();
    match distrusted.find(|d| info.parser_versions.contains(&d.parser_version)) {
        None => Ok(()),
        Some(d) => Err(Error::new(
            Kind::Held,
            format!(
                "backup {} relies on parser {}, which was distrusted meanwhile: {}",
                info.id, d.parser_version, d.reason
            ),
        )
        .remedy("take it again: it will not rely on that. `fairvault audit` shows who said so")),
    }
}

/// The archive epoch that rules at a position.
pub fn archive_epoch(state: &Snapshot, system_identifier: u64, timeline: u32, lsn: u64) -> u32 {
    state
        .archive_epochs
        .iter()
        .filter(|e| e.system_identifier == system_identifier && (e.timeline, e.lsn) <= (timeline, lsn))
        .map(|e| e.epoch)
        .max()
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use fairvault_format::proto::{DistrustParser, Genesis, Hold};

    use super::*;

    fn epoch(epoch: u32) -> KeyEpoch {
        KeyEpoch {
            epoch,
            ..Default::default()
        }
    }

    fn entry(kind: Entry) -> LogEntry {
        LogEntry {
            seq: 5,
            kind: Some(kind),
            ..Default::default()
        }
    }

    fn hold() -> LogEntry {
        entry(Entry::Hold(Hold {
            backup: "a".into(),
            ..Default::default()
        }))
    }

    #[test]
    fn what_relies_on_a_distrusted_parser_is_not_committed() {
        let of = |parser_versions: &[u32]| BackupInfo {
            parser_versions: parser_versions.to_vec(),
            ..Default::default()
        };
        let mut state = Snapshot::default();
        assert!(trusts_parsers(&state, &of(&[2])).is_ok());
        state.distrusted.push(DistrustParser {
            parser_version: 2,
            reason: "it is wrong".into(),
        });
        let error = trusts_parsers(&state, &of(&[1, 2])).unwrap_err();
        assert!(
            error.kind() == Kind::Held && error.to_string().contains("it is wrong"),
            "{error}"
        );
        // What reads everything relies on none, and on others it may.
        assert!(trusts_parsers(&state, &of(&[])).is_ok() && trusts_parsers(&state, &of(&[1, 3])).is_ok());
    }

    #[test]
    fn only_the_newest_key_epoch_has_a_say() {
        let mut state = Snapshot {
            key_epochs: vec![epoch(1)],
            ..Default::default()
        };
        let rotation = entry(Entry::KeyEpoch(epoch(3)));
        assert_eq!(named_epoch(&state, &rotation, 1), Some(epoch(3)));
        apply(&mut state, &rotation, 1).unwrap();
        assert_eq!((newest_epoch(&state), state.key_epochs.len()), (3, 2));
        // Old keys have none, not even for other ones.
        let before = state.clone();
        for old in [hold(), entry(Entry::KeyEpoch(epoch(4)))] {
            assert!(is_void(&state, &old, 1) && named_epoch(&state, &old, 1).is_none());
            apply(&mut state, &old, 1).unwrap();
            assert_eq!(state, before);
        }
        // An epoch that is not higher is none, and what nobody has named is damage.
        for number in [2, 3] {
            let lower = entry(Entry::KeyEpoch(epoch(number)));
            assert!(!is_void(&state, &lower, 3) && named_epoch(&state, &lower, 3).is_none());
            apply(&mut state, &lower, 3).unwrap();
            assert_eq!(state, before);
        }
        for strange in [2, 4] {
            let outcome = apply(&mut state, &hold(), strange);
            assert_eq!(outcome.is_err(), strange == 4, "{strange}");
            assert_eq!(state, before);
        }
        apply(&mut state, &hold(), 3).unwrap();
        assert_eq!(state.holds.len(), 1);
    }

    #[test]
    fn a_fence_is_above_the_keys() {
        let mut state = Snapshot {
            key_epochs: vec![epoch(1)],
            fence: 2,
            ..Default::default()
        };
        let fenced = LogEntry {
            fence: 1,
            ..entry(Entry::KeyEpoch(epoch(2)))
        };
        assert!(named_epoch(&state, &fenced, 1).is_none());
        apply(&mut state, &fenced, 1).unwrap();
        assert_eq!(newest_epoch(&state), 1);
    }

    #[test]
    fn genesis_is_of_the_epoch_that_it_pins() {
        let first = entry(Entry::Genesis(Genesis {
            key_epoch: Some(epoch(1)),
            ..Default::default()
        }));
        assert!(apply(&mut Snapshot::default(), &first, 2).is_err());
        let mut state = Snapshot::default();
        apply(&mut state, &first, 1).unwrap();
        assert_eq!(newest_epoch(&state), 1);
    }

    #[test]
    fn a_run_is_live_once_however_many_are_named() {
        let runs = |of: std::ops::Range<u8>| -> Vec<Vec<u8>> { of.map(|n| vec![n; 32]).collect() };
        let mut state = Snapshot::default();
        add_runs(&mut state, &runs(0..3));
        add_runs(&mut state, &runs(2..5));
        // Many at once, two of them the same.
        add_runs(&mut state, &[runs(1..40), runs(39..40)].concat());
        assert_eq!(state.index_runs, runs(0..40));
    }

    fn range(timeline: u32, from_lsn: u64, to_lsn: u64) -> ExpiredWal {
        ExpiredWal {
            system_identifier: 7,
            timeline,
            from_lsn,
            to_lsn,
            ..ExpiredWal::default()
        }
    }

    #[test]
    fn expired_ranges_are_joined() {
        let mut state = Snapshot::default();
        for wal in [
            range(1, 50, 60),
            range(1, 0, 20),
            range(2, 20, 50),
            range(1, 30, 30),
            range(1, 20, 40),
        ] {
            expire_wal(&mut state, &wal);
        }
        assert_eq!(state.expired_wal, [range(1, 0, 40), range(1, 50, 60), range(2, 20, 50)]);
        // Whether their sizes are known makes no other state.
        let wal = ExpiredWal {
            bytes: 20,
            ..range(1, 35, 55)
        };
        expire_wal(&mut state, &wal);
        assert_eq!(state.expired_wal, [range(1, 0, 60), range(2, 20, 50)]);
    }

    #[test]
    fn a_backup_without_its_wal_does_not_count() {
        let mut state = Snapshot::default();
        expire_wal(&mut state, &range(1, 10, 40));
        let backup = |timeline, start_lsn, stop_lsn| BackupInfo {
            system_identifier: 7,
            stop_timeline: timeline,
            start_lsn,
            stop_lsn,
            ..BackupInfo::default()
        };
        for (timeline, start, stop, is_there) in [
            (1, 39, 50, false),
            (1, 0, 11, false),
            (1, 20, 30, false),
            (1, 40, 50, true),
            (1, 5, 10, true),
            (2, 20, 30, true),
        ] {
            let has = has_its_wal(&state, &backup(timeline, start, stop));
            assert_eq!(has.is_ok(), is_there, "{timeline} {start} {stop}");
        }
    }
}
