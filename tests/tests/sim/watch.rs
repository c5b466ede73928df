//! Shows every change of the stores to their witnesses, and hands out copies of the stores to whoever looks closer.
//!
//! What always holds: what is looked at is the store right after a change, before anybody does anything else; and looking
//! changes nothing in the world.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};

use anyhow::{Error, Result};
use bytes::Bytes;
use futures::FutureExt;
use object_store::memory::InMemory;
use tokio::sync::{Notify, mpsc};

use super::witness::Witness;

/// A repository's number, and all of it at a moment.
pub type Fork = (usize, Arc<InMemory>);

/// The witnesses of both repositories.
#[derive(Debug, Default)]
pub struct Watch {
    witnesses: [Mutex<Option<Witness>>; 2],
    forks: Mutex<Option<mpsc::UnboundedSender<Fork>>>,
    objection: Mutex<Option<Error>>,
    objects: Notify,
}

impl Watch {
    /// From now on, every change of a repository is looked at.
    pub fn begin(&self, repo: usize, witness: Witness) {
        *self.witnesses[repo].lock().unwrap() = Some(witness);
    }

    /// From now on, each repository is handed out as it is after each entry of its log.
    pub fn forks(&self) -> mpsc::UnboundedReceiver<Fork> {
        let (send, receive) = mpsc::unbounded_channel();
        *self.forks.lock().unwrap() = Some(send);
        receive
    }

    /// Whether a backup is, or was, in the log and counted.
    pub fn has_counted(&self, repo: usize, backup: &str) -> bool {
        let witness = self.witnesses[repo].lock().unwrap();
        witness.as_ref().is_some_and(|witness| witness.has_counted(backup))
    }

    /// Fails if something was seen that may not be.
    pub fn verdict(&self) -> Result<()> {
        match self.objection.lock().unwrap().take() {
            Some(objection) => Err(objection),
            None => Ok(()),
        }
    }

    /// Waits until something is seen that may not be.
    pub async fn objection(&self) -> Result<()> {
        loop {
            self.verdict()?;
            self.objects.notified().await;
        }
    }

    /// The server was told that WAL of these segments is durable.
    pub fn told(&self, segments: RangeInclusive<u64>) {
        if let Some(witness) = self.witnesses[0].lock().unwrap().as_ref() {
            self.heed(witness.told(segments).now_or_never().expect("in memory"));
        }
    }

    fn heed(&self, seen: Result<()>) {
        if let Err(objection) = seen {
            // The first one is the reason of the others.
            _ = self.objection.lock().unwrap().get_or_insert(objection);
            self.objects.notify_one();
        }
    }

    /// An object of the stanza in a repository has changed. In memory nothing is waited for, so nothing else happens
    /// meanwhile.
    pub fn show(&self, repo: usize, inner: &InMemory, name: &str, before: Option<Bytes>, now: Option<Bytes>) {
        let is_entry = name.starts_with("log/") && before.is_none() && now.is_some();
        if let Some(witness) = self.witnesses[repo].lock().unwrap().as_mut() {
            self.heed(witness.saw(name, before, now).now_or_never().expect("in memory"));
        }
        if let Some(forks) = self.forks.lock().unwrap().as_ref().filter(|_| is_entry) {
            // Nobody is there to take it once the day is over.
            _ = forks.send((repo, Arc::new(inner.fork())));
        }
    }
}
