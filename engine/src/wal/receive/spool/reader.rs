//! Reading a spool in order, on its way into the repository.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::files::{OpenPart, Part};
use super::{Position, Spool};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;

/// Reads the spool in order, and waits where it ends.
pub struct Reader {
    spool: Arc<Spool>,
    at: Position,
    until: Lsn,
    generation: u64,
    open: Option<OpenPart>,
    changes: watch::Receiver<()>,
}

impl Spool {
    /// Reads from `from` on, and not beyond `until` where that is given.
    pub fn reader(self: &Arc<Self>, from: Position, until: Option<Lsn>) -> Reader {
        self.state().taken = None;
        self.reading(from, until)
    }

    fn reading(self: &Arc<Self>, from: Position, until: Option<Lsn>) -> Reader {
        Reader {
            at: from,
            until: until.unwrap_or(Lsn(u64::MAX)),
            generation: self.state().generation,
            open: None,
            changes: self.changes(),
            spool: self.clone(),
        }
    }

    /// BLAKE3 of what was acknowledged from `from` to `to`; `None` where the spool does not have all of it.
    pub fn hash(self: &Arc<Self>, from: Position, to: Lsn) -> Result<Option<blake3::Hash>> {
        let mut reader = self.reading(from, Some(to));
        let mut hasher = blake3::Hasher::new();
        while let Some((_, bytes)) = reader.find()? {
            hasher.update(&bytes);
        }
        Ok((reader.at.lsn == to).then(|| hasher.finalize()))
    }
}

impl Reader {
    /// The next bytes and where they begin; `None` once the timeline has ended. Cancelling it loses nothing.
    pub async fn next(&mut self) -> Result<Option<(Lsn, Bytes)>> {
        loop {
            self.changes.borrow_and_update();
            {
                let mut state = self.spool.state();
                if state.generation != self.generation {
                    return Err(Error::temporary("the spool goes on at another place"));
                }
                state.taken = state.taken.max(Some(self.at));
            }
            if let Some(found) = self.find()? {
                return Ok(Some(found));
            }
            if self.at.lsn < self.until && self.spool.has_hole(self.at) {
                return Err(Error::temporary(format!(
                    "the spool has no WAL at {}, and has some behind it",
                    self.at.lsn
                )));
            }
            if self.at.lsn >= self.until || self.spool.has_ended(self.at.timeline) {
                return Ok(None);
            }
            if self.changes.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    /// The next bytes, if they are there.
    fn find(&mut self) -> Result<Option<(Lsn, Bytes)>> {
        let at = self.at;
        if at.lsn >= self.until {
            return Ok(None);
        }
        let part = {
            let state = self.spool.state();
            let holds = |part: &&Part| part.timeline == at.timeline && part.start <= at.lsn && at.lsn < part.end;
            match state.parts.iter().find(holds) {
                Some(part) => part.clone(),
                None => return Ok(None),
            }
        };
        let name = part.name();
        let is_open = |open: &OpenPart| open.name == name && open.at <= at.lsn;
        if !self.open.as_ref().is_some_and(is_open) {
            self.open = Some(self.spool.open_part(&part)?.0);
        }
        let Some(open) = &mut self.open else { return Ok(None) };
        loop {
            let Some((start, content)) = open.section()? else {
                let end = part.end;
                let why = format!("it cannot be read beyond {}, and was written up to {end}", open.at);
                return Err(self.spool.damaged(&name, why));
            };
            // Behind its end there may be what did not count.
            let (from, to) = (at.lsn.max(start), open.at.min(part.end).min(self.until));
            if from >= to {
                continue;
            }
            let bytes = Bytes::from(content).slice((from.0 - start.0) as usize..(to.0 - start.0) as usize);
            self.at.lsn = to;
            return Ok(Some((from, bytes)));
        }
    }

    /// The repository has WAL up to `lsn`.
    pub fn stored(&self, lsn: Lsn) {
        self.spool.stored(self.at.timeline, lsn);
    }

    /// The repository has all of this timeline.
    pub fn stored_timeline(&self) {
        self.spool.stored_timeline(self.at.timeline, self.at.lsn);
    }
}
