//! A session: what one writer does between `begin` and `commit` or `abort`.

use std::time::Duration;

use std::sync::Arc;

use fairvault_format::names;
use fairvault_format::proto::{self, Snapshot, log_entry::Kind as Entry};

use super::{Log, fence, rotated, state};
use crate::env::{self, Env};
use crate::error::{Error, Kind, Result};
use crate::stanza::Stanza;

/// How long noting the end of what has failed may take.
const GIVE_UP_TIME: Duration = Duration::from_secs(10);

/// The time and a letter, as far as no other backup or session has it.
pub fn timed_id(state: &Snapshot, env: &dyn Env, letter: char) -> String {
    let mut now_us = env.now_us();
    loop {
        let time = jiff::Timestamp::from_microsecond(now_us).unwrap_or_default();
        let id = format!("{}{letter}", time.strftime("%Y%m%d-%H%M%S"));
        if !state::is_taken(state, &id, "") {
            return id;
        }
        now_us += 1_000_000;
    }
}

/// Fails if another key epoch rules than the one that a stanza writes with.
fn same_keys(stanza: &Stanza, now: &Snapshot) -> Result<()> {
    match state::newest_epoch(now) == stanza.keys().epoch {
        true => Ok(()),
        false => Err(rotated(stanza)),
    }
}

/// An open session of this process. It begins and ends in one key epoch: what it stores is of that.
#[derive(Debug)]
pub struct Session {
    id: [u8; 16],
    backup: String,
    stanza: Arc<Stanza>,
    /// Index runs that were announced.
    pub announced: Vec<[u8; 32]>,
}

impl Session {
    /// Begins a session for the backup with the id that `name` gives to a state; it is asked again if
    /// somebody else takes that id first.
    pub async fn begin(log: &mut Log, what: &str, name: impl Fn(&Snapshot) -> String) -> Result<Self> {
        Self::begin_if(log, what, name, |_| Ok(())).await
    }

    /// The same, as long as `allowed` allows it.
    pub async fn begin_if(
        log: &mut Log,
        what: &str,
        name: impl Fn(&Snapshot) -> String,
        allowed: impl Fn(&Snapshot) -> Result<()>,
    ) -> Result<Self> {
        let stanza = log.stanza().clone();
        let id = env::id(stanza.env())?;
        loop {
            allowed(log.state())?;
            let backup = name(log.state());
            let begin = proto::Begin {
                session: id.to_vec(),
                what: what.to_owned(),
                backup: backup.clone(),
                seen_mark: log.state().newest_mark,
            };
            let free = |now: &Snapshot| match state::is_taken(now, &backup, what) {
                false => same_keys(&stanza, now).and_then(|()| allowed(now)),
                true => Err(Error::new(Kind::Held, format!("backup id {backup} is taken"))),
            };
            match log.append(Entry::Begin(begin), free).await {
                Ok(_) => {
                    return Ok(Self {
                        id,
                        backup,
                        stanza,
                        announced: Vec::new(),
                    });
                }
                // The state is newer now, and so is the next name.
                Err(error) if error.kind() == Kind::Held && state::is_taken(log.state(), &backup, what) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Its id.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// The id of its backup.
    pub fn backup(&self) -> &str {
        &self.backup
    }

    fn check(&self) -> impl Fn(&Snapshot) -> Result<()> + '_ {
        |now| match state::is_open(now, &self.id) && !state::is_committed(now, &self.backup) {
            true => same_keys(&self.stanza, now),
            false if env::has_fault("fence") => Ok(()),
            false if state::is_committed(now, &self.backup) => Err(Error::new(
                Kind::Held,
                format!("backup {} was committed by somebody else meanwhile", self.backup),
            )),
            false => Err(Error::new(
                Kind::Held,
                format!(
                    "this session was fenced{}; its backup does not count",
                    fence::by_whom(now)
                ),
            )
            .remedy("start it again; `fairvault audit` shows every fence")),
        }
    }

    /// Makes index runs known to whoever comes after, also if this session dies.
    pub async fn announce(&mut self, log: &mut Log, run: [u8; 32]) -> Result<()> {
        let entry = proto::Announce {
            session: self.id.to_vec(),
            index_runs: vec![run.to_vec()],
        };
        log.append(Entry::Announce(entry), self.check()).await?;
        self.announced.push(run);
        Ok(())
    }

    /// Commits the backup: from here on it counts. If that is refused, the session has ended without one.
    pub async fn commit(self, log: &mut Log, root: [u8; 32], info: proto::BackupInfo) -> Result<()> {
        let facts = info.clone();
        let allowed = |now: &Snapshot| {
            match &facts.copied_from {
                Some(origin) => state::is_new(now, origin)?,
                None => state::trusts_parsers(now, &facts)?,
            }
            if !env::has_fault("expired wal") {
                state::has_its_wal(now, &facts)?;
            }
            self.check()(now)
        };
        let entry = proto::Commit {
            session: self.id.to_vec(),
            root: root.to_vec(),
            index_runs: self.announced.iter().map(|run| run.to_vec()).collect(),
            info: Some(info),
        };
        let error = match log.append(Entry::Commit(entry), allowed).await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        // A commit that is not to be seen may still come, so what it names stays. That fault takes it away.
        if env::has_fault("absent") && error.kind() == Kind::Temporary {
            let is_absent = log.refresh().await.is_ok() && !state::is_committed(log.state(), &self.backup);
            let names = is_absent.then(|| names::root(&root));
            let _ = self.stanza.store().delete(names.as_slice()).await;
        }
        // What was refused never counts: nobody has to wait for it.
        if matches!(error.kind(), Kind::Refused | Kind::Held) && state::is_open(log.state(), &self.id) {
            self.give_up(log, &error).await;
        }
        Err(error)
    }

    /// Ends the session because of a failure, if that can be noted in a moment: else a collector does it.
    pub async fn give_up(self, log: &mut Log, why: &Error) {
        let reason = why.to_string();
        let noted = tokio::time::timeout(GIVE_UP_TIME, self.abort(log, &reason)).await;
        let failure = match noted {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "that takes too long".to_owned(),
        };
        tracing::warn!("that this has ended could not be noted; nothing is lost by it: {failure}");
    }

    /// Ends the session without a backup.
    pub async fn abort(self, log: &mut Log, reason: &str) -> Result<()> {
        let reason = reason.chars().take(500).collect();
        log.append(
            Entry::Abort(proto::Abort {
                session: self.id.to_vec(),
                reason,
            }),
            |_| Ok(()),
        )
        .await?;
        log.stanza().trace().mark_failure();
        Ok(())
    }
}
