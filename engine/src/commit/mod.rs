//! The stanza's log: one total order of everything that was decided.
//!
//! What always holds: an entry is appended only after everything before it was read, so that whoever wins
//! a sequence number has seen the whole past; a fenced writer learns of it before its entry counts; what is
//! written is of the newest key epoch, and what older keys have written since is void; a log that is shorter
//! than, or different from, what this host saw before is refused.

pub mod authors;
mod epochs;
pub mod erased;
pub mod expired;
pub mod fence;
mod later;
pub mod lease;
mod notes;
mod over;
mod seen;
pub mod session;
mod snapshots;
pub mod state;

use std::sync::Arc;

use fairvault_format::log::{Signers, open_entry, seal_entry};
use fairvault_format::proto::{self, LogEntry, Snapshot, log_entry::Kind as Entry};
use fairvault_format::{limits, names, sha256};

use crate::env;
use crate::error::{Error, Kind, Result};
use crate::stanza::Stanza;
use crate::store::Created;
use authors::Authors;
pub use epochs::rotated;
use expired::Expiry;
use seen::Purpose;

/// Entries fetched at once.
const BATCH: u64 = 16;

/// An open log.
#[derive(Debug, Clone)]
pub struct Log {
    stanza: Arc<Stanza>,
    state: Snapshot,
    signers: Signers,
    /// All entries, where they are kept.
    entries: Option<Vec<LogEntry>>,
    /// Of these, what only says what was announced, marked and swept is left out.
    backups_only: bool,
    /// Numbers of entries that were read and have no effect: a fence or a rotation of keys came before.
    void: Vec<u64>,
    /// Backups that have expired, where entries are kept.
    expired: Vec<Expiry>,
    /// The log of a stanza that was erased may be read.
    reads_erased: bool,
    /// Who wrote what was read of it.
    authors: Authors,
}

impl Log {
    /// A log without entries, for the first one.
    pub fn empty(stanza: Arc<Stanza>) -> Self {
        Self {
            stanza,
            state: Snapshot::default(),
            signers: Signers::default(),
            entries: None,
            backups_only: false,
            void: Vec::new(),
            expired: Vec::new(),
            reads_erased: false,
            authors: Authors::default(),
        }
    }

    /// The same, for whoever has to do with an erasure.
    #[must_use]
    pub fn also_erased(self) -> Self {
        Self {
            reads_erased: true,
            ..self
        }
    }

    /// The same, for reading all of it and keeping its entries.
    pub(crate) fn unread(stanza: Arc<Stanza>) -> Self {
        Self {
            entries: Some(Vec::new()),
            ..Self::empty(stanza)
        }
    }

    /// Fails unless these bytes are an entry that follows on what was read so far. Entries that are kept are not copied for
    /// that: there may be many.
    pub(crate) fn check_next(&self, bytes: &[u8]) -> Result<()> {
        let mut next = Self {
            state: self.state.clone(),
            signers: self.signers.clone(),
            ..Self::empty(self.stanza.clone())
        };
        next.apply(bytes)
    }

    /// Takes an entry that the store does not show, if it follows on what was read so far; if not, nothing changes.
    pub(crate) fn follow(&mut self, bytes: &[u8]) -> Result<()> {
        self.check_next(bytes)?;
        self.apply(bytes)
    }

    /// Reads all of the log, believing neither snapshots nor what this host remembers, and keeps its entries.
    pub async fn replay(stanza: Arc<Stanza>) -> Result<Self> {
        Self::unread(stanza).replayed().await
    }

    /// The same for somebody who wants to know of backups only: what the other entries hold is not kept, which for the
    /// collections of years would be much.
    pub async fn replay_backups(stanza: Arc<Stanza>) -> Result<Self> {
        let unread = Self {
            backups_only: true,
            ..Self::unread(stanza)
        };
        unread.replayed().await
    }

    /// Has the log's state from its entries. What an operator signs is decided by what entries say: a snapshot is not
    /// signed, and whoever has a key that writes can make one that leaves out holds, fences and the signed policy. What
    /// this host remembers may have begun with such a one, but for what it remembers of an earlier proof. Entries are not
    /// kept.
    pub async fn prove(&mut self) -> Result<()> {
        let mut this = Self::empty(self.stanza.clone());
        match self.stanza.memory().and_then(|memory| memory.proven(&self.stanza)) {
            Some(state) => {
                this.adopt(state);
                this.follow_keys().await?;
                let before = this.clone();
                let refreshed = this.refresh_proven().await;
                before.explain(this.state.seq, refreshed).await?;
                this.check_pins()?;
                // What follows on the remembered entry proves it.
                if this.state.seq == before.state.seq {
                    before.check_remembered_head().await?;
                }
            }
            None => this = Self::replay_backups(self.stanza.clone()).await?,
        }
        let (now, before) = (&this.state, &self.state);
        if now.seq < before.seq || (now.seq == before.seq && now.head != before.head) {
            return Err(Error::damaged(format!(
                "the log of {} is shorter than it was a moment ago, or another one",
                self.stanza.shown()
            )));
        }
        if now.seq == before.seq && now != before {
            tracing::warn!(
                "what this host took for the state of the log of {} is not what its entries say: a snapshot of it was \
                 made by another version, or forged",
                self.stanza.shown()
            );
        }
        if let Some(memory) = this.stanza.memory() {
            memory.remember_proven(&this.stanza, &this.state);
        }
        this.remember();
        *self = this;
        Ok(())
    }

    /// Reads all of a log of which nothing was read yet.
    pub(crate) async fn replayed(mut self) -> Result<Self> {
        let this = &mut self;
        this.refresh_proven().await?;
        this.check_seen()?;
        this.mark_read();
        Ok(self)
    }

    /// Fails unless the log, of which all entries were read, is that of this stanza and goes on from what this host saw.
    pub(crate) fn check_seen(&self) -> Result<()> {
        self.check_pins()?;
        let Some(seen) = self.remembered()? else {
            return Ok(());
        };
        // What follows on an entry says what that was.
        let next = self.entries().iter().find(|entry| entry.seq == seen.seq + 1);
        let there = next.map_or(&self.state.head, |entry| &entry.previous);
        match self.state.seq < seen.seq || *there != seen.head {
            true => Err(Error::damaged(format!(
                "the log of {} ends at entry {}, and this host saw another entry {}: it was rolled back or replaced",
                self.stanza.shown(),
                self.state.seq,
                seen.seq
            ))
            .remedy("where the bucket keeps versions, `fairvault repair` brings back what was written first")),
            false => Ok(()),
        }
    }

    /// The entries of a log that was replayed, the first of them first.
    pub fn entries(&self) -> &[LogEntry] {
        self.entries.as_deref().unwrap_or_default()
    }

    /// Whether an entry of a log that was replayed is void: its writer had been fenced before, or had old keys.
    pub fn is_void(&self, seq: u64) -> bool {
        self.void.binary_search(&seq).is_ok()
    }

    /// Reads the log to its end.
    pub async fn open(stanza: Arc<Stanza>) -> Result<Self> {
        let (log, _) = Self::open_with(stanza, Purpose::Any, async |_| ()).await?;
        Ok(log)
    }

    /// The same for whoever stores WAL. A server's disk fills up while that waits, and what is stored is never wrong by it: so
    /// a state of the log that this host remembers and cannot open is said, and holds up only others. A log that is known
    /// to be rolled back holds up everybody.
    pub async fn open_to_archive(stanza: Arc<Stanza>) -> Result<Self> {
        let (log, _) = Self::open_with(stanza, Purpose::Archiving, async |_| ()).await?;
        Ok(log)
    }

    /// Reads the log to its end for somebody who reads WAL, and does meanwhile what is likely to be needed, judging by
    /// what this host remembers of the log. That what it remembers is still there is looked at once a minute; that it cannot be
    /// opened keeps no recovery from its WAL.
    pub async fn open_beside<T>(
        stanza: Arc<Stanza>,
        beside: impl AsyncFnOnce(&Self) -> T,
    ) -> Result<(Self, Option<T>)> {
        Self::open_with(stanza, Purpose::Fetching, beside).await
    }

    async fn open_with<T>(
        stanza: Arc<Stanza>,
        purpose: Purpose,
        beside: impl AsyncFnOnce(&Self) -> T,
    ) -> Result<(Self, Option<T>)> {
        let mut this = Self::empty(stanza);
        let remembered = this.remembered();
        let is_in_doubt = remembered.is_err();
        let (done, is_news) = match remembered.ok().flatten() {
            Some(state) => {
                this.adopt(state);
                this.follow_keys().await?;
                let before = this.clone();
                // One request tells the usual: nothing is new. Then another that what was seen is still there; one after
                // the other, since a second connection costs more.
                let catch_up = async {
                    let refreshed = this.refresh().await;
                    before.explain(this.state.seq, refreshed).await?;
                    // What follows on the remembered head proves it.
                    let is_news = this.state.seq > before.state.seq;
                    let memory = this.stanza.memory().filter(|_| purpose == Purpose::Fetching);
                    let is_fresh = memory.is_some_and(|memory| memory.head_is_fresh(&this.stanza));
                    if !is_news && !is_fresh {
                        before.check_remembered_head().await?;
                        if let Some(memory) = memory {
                            memory.saw_head(&this.stanza);
                        }
                    }
                    Ok::<_, Error>(is_news)
                };
                let (is_news, done) = tokio::join!(catch_up, beside(&before));
                (Some(done), is_news?)
            }
            None => {
                this.start_from_snapshot().await?;
                this.refresh_proven().await?;
                (None, true)
            }
        };
        if this.state.seq == 0 {
            return Err(Error::not_found(format!("{} has keys and no log", this.stanza.shown()))
                .remedy("an interrupted `stanza create` leaves that, and can be run again; if there were backups, the objects below log/ were lost"));
        }
        this.check_pins()?;
        if is_in_doubt {
            this.check_doubtful_head(purpose).await?;
        }
        this.warn_of_unfinished_rotation();
        if is_news {
            this.remember();
        }
        this.mark_read();
        Ok((this, done))
    }

    fn adopt(&mut self, state: Snapshot) {
        self.signers = Signers::default();
        for epoch in &state.key_epochs {
            self.signers.add(epoch);
        }
        self.state = state;
    }

    /// Reads what was appended since.
    pub async fn refresh(&mut self) -> Result<()> {
        self.refresh_up_to(u64::MAX).await
    }

    /// The same, and nothing behind this entry.
    pub(crate) async fn refresh_up_to(&mut self, last: u64) -> Result<()> {
        self.read_on(last).await?;
        self.check_not_erased()
    }

    async fn read_on(&mut self, last: u64) -> Result<()> {
        let store = self.stanza.store().clone();
        self.follow_keys().await?;
        while self.state.seq < last {
            let from = self.state.seq + 1;
            // One probe tells whether there is anything; only then more are asked for at once.
            let first = store.get_opt(&names::log_context(from), limits::LOG_ENTRY_BYTES).await;
            let Some(first) = first.map_err(|error| self.stuck(from, error))? else {
                return Ok(());
            };
            self.apply(&first)?;
            self.follow_keys().await?;
            let end = from.saturating_add(BATCH).min(last.saturating_add(1));
            let batch = (from + 1..end).map(|seq| {
                let store = store.clone();
                async move { store.get_opt(&names::log_context(seq), limits::LOG_ENTRY_BYTES).await }
            });
            // Small batches first: the usual tail is short.
            let ahead = if from % limits::SNAPSHOT_INTERVAL < 8 {
                8
            } else {
                BATCH as usize
            };
            for bytes in futures::future::join_all(batch.take(ahead)).await {
                let bytes = bytes.map_err(|error| self.stuck(self.state.seq + 1, error))?;
                let Some(bytes) = bytes else { return Ok(()) };
                self.apply(&bytes)?;
                self.follow_keys().await?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, bytes: &[u8]) -> Result<()> {
        let seq = self.state.seq + 1;
        self.take(seq, bytes).map_err(|error| self.stuck(seq, error))
    }

    /// What to do about an entry that cannot be read.
    fn stuck(&self, seq: u64, error: Error) -> Error {
        match error.kind() {
            Kind::Damaged => error.remedy(format!(
                "bring {} back from a copy or an older version; if it never was an entry, and none follows on it, \
                 `fairvault repair {} --drop-entry {seq}` takes it away",
                names::log_context(seq),
                self.stanza.name()
            )),
            _ => error,
        }
    }

    fn take(&mut self, seq: u64, bytes: &[u8]) -> Result<()> {
        let previous: [u8; 32] = self.state.head.as_slice().try_into().unwrap_or([0; 32]);
        let keys = self.stanza.keys_for(bytes, "log entry")?;
        let entry = open_entry(keys, self.stanza.scope(), bytes, seq, &previous, &self.signers)?;
        let named = state::named_epoch(&self.state, &entry, keys.epoch);
        if let Some(epoch) = &named {
            self.check_signers(&self.stanza, epoch)?;
        }
        let is_void = state::is_void(&self.state, &entry, keys.epoch);
        if is_void {
            self.void.push(seq);
        } else if self.entries.is_some() {
            self.expired.extend(Expiry::of(&self.state, &entry));
        }
        state::apply(&mut self.state, &entry, keys.epoch)?;
        if !is_void {
            self.authors.see(&entry, named.is_some());
        }
        if let Some(epoch) = &named {
            self.signers.add(epoch);
        }
        self.state.seq = seq;
        self.state.head = sha256(bytes).to_vec();
        if let Some(entries) = &mut self.entries {
            let is_kept = !self.backups_only || matches!(entry.kind, Some(Entry::Commit(_) | Entry::Expired(_)));
            entries.push(match is_kept {
                true => entry,
                false => LogEntry { kind: None, ..entry },
            });
        }
        Ok(())
    }

    /// The log must be of the repository and stanza that the keys are of, and encrypted if a key is used.
    fn check_pins(&self) -> Result<()> {
        let genesis = self.state.genesis.clone().unwrap_or_default();
        let scope = self.stanza.scope();
        if genesis.repository_id != scope.repository || genesis.stanza_id != scope.stanza {
            return Err(Error::damaged(format!(
                "the log of {} is of another repository or stanza",
                self.stanza.shown()
            )));
        }
        if self.stanza.has_secret() && !genesis.encrypted {
            return Err(Error::refused(format!(
                "a key is configured, and {} is not encrypted",
                self.stanza.shown()
            ))
            .remedy("remove the key from the configuration if that is meant, or create an encrypted stanza"));
        }
        Ok(())
    }

    async fn check_remembered_head(&self) -> Result<()> {
        let name = names::log_context(self.state.seq);
        let there = self.stanza.store().get_opt(&name, limits::LOG_ENTRY_BYTES).await?;
        match there.map(|bytes| sha256(&bytes)) {
            Some(hash) if hash[..] == self.state.head => Ok(()),
            found => Err(Error::damaged(format!(
                "{}/{name} {}, yet this host saw another entry there: the log was rolled back or replaced",
                self.stanza.shown(),
                if found.is_some() { "is different" } else { "is gone" }
            ))
            .remedy(format!(
                "where the bucket keeps versions, `fairvault repair` brings back what was written first; if the repository \
                 was emptied or replaced on purpose, delete {}",
                self.stanza
                    .memory()
                    .map(|m| m.place(&self.stanza).display().to_string())
                    .unwrap_or_default()
            ))),
        }
    }

    fn remember(&self) {
        if let Some(memory) = self.stanza.memory() {
            memory.remember_head(&self.stanza, &self.state);
        }
    }

    /// The state that the log amounts to.
    pub fn state(&self) -> &Snapshot {
        &self.state
    }

    /// The stanza.
    pub fn stanza(&self) -> &Arc<Stanza> {
        &self.stanza
    }

    /// Appends an entry. `allowed` is asked before every attempt, with the state that the entry would
    /// follow: what it refuses is not appended.
    pub async fn append(&mut self, entry: Entry, allowed: impl Fn(&Snapshot) -> Result<()>) -> Result<u64> {
        let nonce = env::id(self.stanza.env())?.to_vec();
        self.check_single_writer(&entry)?;
        self.refresh_proven().await?;
        loop {
            allowed(&self.state)?;
            let seq = self.state.seq + 1;
            let bytes = self.sealed(entry.clone(), &nonce).await?;
            match self
                .stanza
                .store()
                .create(&names::log_context(seq), bytes.clone().into(), limits::LOG_ENTRY_BYTES)
                .await?
            {
                Created::Won => {
                    self.stanza.trace().mark_entry();
                    self.apply(&bytes)?;
                    self.follow_keys().await?;
                    self.remember();
                    return Ok(seq);
                }
                Created::Lost(other) => {
                    self.apply(&other)?;
                    self.refresh().await?;
                }
            }
        }
    }

    /// The bytes of an entry that follows on what was read; with every so many, a snapshot is stored.
    async fn sealed(&self, kind: Entry, nonce: &[u8]) -> Result<Vec<u8>> {
        let seq = self.state.seq + 1;
        let mut entry = LogEntry {
            seq,
            previous: if seq == 1 { vec![0; 32] } else { self.state.head.clone() },
            time_us: self.stanza.env().now_us(),
            fence: self.state.fence,
            nonce: nonce.to_vec(),
            host: self.stanza.host().to_owned(),
            user: self.stanza.user().to_owned(),
            snapshot: Vec::new(),
            kind: Some(kind),
        };
        if seq.is_multiple_of(limits::SNAPSHOT_INTERVAL) {
            entry.snapshot = self.write_snapshot().await?.to_vec();
        }
        // What readers could not apply must never be written.
        state::apply(&mut self.state.clone(), &entry, self.stanza.keys().epoch)?;
        let salt = env::salt(self.stanza.env())?;
        Ok(seal_entry(self.stanza.keys(), self.stanza.scope(), salt, &entry)?)
    }

    /// Either every writer relies on conditional create, or there is one writer.
    fn check_single_writer(&self, entry: &Entry) -> Result<()> {
        let configured = self.stanza.store().settings().single_writer;
        let agreed = match (entry, &self.state.genesis) {
            (Entry::Genesis(genesis), _) => genesis.single_writer,
            (_, Some(genesis)) => genesis.single_writer,
            (_, None) => configured,
        };
        match configured == agreed {
            true => Ok(()),
            false => Err(Error::refused(format!(
                "{} was created with single_writer = {agreed}, and here it is {configured}: two kinds of writers could overwrite each other",
                self.stanza.shown()
            ))
            .remedy(format!("set single_writer = {agreed} for this repository"))),
        }
    }

    /// The backup with this id, or the newest for "latest".
    pub fn backup(&self, id: &str) -> Result<&fairvault_format::proto::CommittedBackup> {
        let backups = &self.state.backups;
        let original = |b: &&proto::CommittedBackup| {
            let copied = b.info.as_ref().and_then(|i| i.copied_from.as_ref());
            copied.is_some_and(|original| original.backup == id)
        };
        let found = match id {
            "latest" => backups.last(),
            id => backups
                .iter()
                .find(|b| b.info.as_ref().is_some_and(|i| i.id == id))
                .or_else(|| backups.iter().find(original)),
        };
        found.ok_or_else(|| {
            let known: Vec<_> = backups
                .iter()
                .filter_map(|b| b.info.as_ref())
                .map(|i| i.id.as_str())
                .collect();
            Error::new(
                Kind::NotFound,
                format!("stanza {} has no backup {id:?}", self.stanza.name()),
            )
            .remedy(match known.len() {
                0 => "there are no backups yet: run `fairvault backup`".to_owned(),
                _ => format!("backups: {}", known.join(", ")),
            })
        })
    }
}
