//! Fencing: what a person says when two writers cannot both be right.
//!
//! A fence ends every session and stops every writer that began before it. A closed timeline takes no more WAL
//! beyond a position: an old primary that comes back cannot add to it. What is stored stays, and is shown.

use fairvault_format::proto::{self, CloseTimeline, log_entry::Kind as Entry};

use super::Log;
use super::authors::who;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::wal::archive::Archive;
use crate::wal::coverage::Coverage;

/// Longest reason that is kept, characters.
const REASON: usize = 500;

fn shortened(reason: &str) -> String {
    reason.chars().take(REASON).collect()
}

/// Who set the newest fence, when and why, for those whom it stops: ` by root on db1 at … (entry 7 of the log): reason`.
pub fn by_whom(now: &proto::Snapshot) -> String {
    let Some(fenced) = &now.fenced else {
        return String::new();
    };
    let because = match fenced.reason.as_str() {
        "" => String::new(),
        reason => format!(": {reason}"),
    };
    let by = who(&fenced.user, &fenced.host, fenced.time_us, fenced.seq);
    format!(" by {by}{because}")
}

/// Ends all open sessions, and stops all writers that are at work; returns how many sessions that were.
pub async fn fence_writers(log: &mut Log, reason: &str) -> Result<usize> {
    // One that is not higher than the newest has no effect.
    log.prove().await?;
    loop {
        let state = log.state();
        let sessions: Vec<Vec<u8>> = state
            .open_sessions
            .iter()
            .filter_map(|s| Some(s.begin.as_ref()?.session.clone()))
            .collect();
        let (count, before) = (sessions.len(), state.seq);
        let fence = proto::Fence {
            fence: state.fence + 1,
            sessions,
            reason: shortened(reason),
        };
        // A session that begins meanwhile has to be named too.
        let unchanged = |now: &proto::Snapshot| match now.seq == before {
            true => Ok(()),
            false => Err(Error::temporary("the log has grown")),
        };
        match log.append(Entry::SetFence(fence), unchanged).await {
            Ok(_) => return Ok(count),
            Err(_) if log.state().seq > before => {}
            Err(error) => return Err(error),
        }
    }
}

/// Closes a timeline of the newest incarnation: at `after`, or where the newest timeline left it. Returns where.
pub async fn close_timeline(log: &mut Log, timeline: u32, after: Option<Lsn>, reason: &str) -> Result<Lsn> {
    log.refresh().await?;
    let archive = Archive::open(log, None, 0)?;
    let after = match after {
        Some(after) => after,
        None => {
            let coverage = Coverage::read(&archive).await?;
            let newest = coverage
                .histories()
                .filter(|h| h.timeline > timeline)
                .max_by_key(|h| h.timeline);
            let left = newest.and_then(|h| h.end_of(timeline).ok().flatten());
            left.ok_or_else(|| {
                Error::usage(format!(
                    "no newer timeline in the archive says where timeline {timeline} ended"
                ))
                .remedy("say with --after up to which position its WAL is the right one")
            })?
        }
    };
    let entry = CloseTimeline {
        system_identifier: archive.system_identifier,
        timeline,
        lsn: after.0,
        reason: shortened(reason),
        reopened: false,
    };
    log.append(Entry::CloseTimeline(entry), |_| Ok(())).await?;
    Ok(after)
}

/// Takes back that a timeline was closed.
pub async fn reopen_timeline(log: &mut Log, timeline: u32, reason: &str) -> Result<()> {
    log.refresh().await?;
    let system_identifier = Archive::open(log, None, 0)?.system_identifier;
    let is_it = |c: &CloseTimeline| c.system_identifier == system_identifier && c.timeline == timeline;
    let entry = CloseTimeline {
        system_identifier,
        timeline,
        lsn: 0,
        reason: shortened(reason),
        reopened: true,
    };
    let is_closed = |now: &proto::Snapshot| match now.closed_timelines.iter().any(is_it) {
        true => Ok(()),
        false => Err(Error::not_found(format!("timeline {timeline} is not closed"))),
    };
    log.append(Entry::CloseTimeline(entry), is_closed).await?;
    Ok(())
}
