//! Which chunks the repository already holds.
//!
//! The index of all live runs is a sorted array of 48 bytes a chunk. What this session meets, new or not,
//! gets a *handle*: a number that is known at once, while its place in a pack may come later.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use fairvault_format::index::{self, IndexEntry, PackRef};
use fairvault_format::proto::Snapshot;
use fairvault_format::{limits, names, sha256};

use crate::env::{self, has_fault};
use crate::error::{Error, Result};
use crate::manifest::{FrameRef, Manifest};
use crate::stanza::Stanza;

/// Runs fetched at once.
const FETCH: usize = 8;

/// All chunks that committed or announced packs hold.
#[derive(Debug, Default)]
pub struct Index {
    packs: Vec<PackRef>,
    entries: Vec<IndexEntry>,
    /// Every pack that a run names, of whatever key epoch.
    named: HashSet<[u8; 32]>,
}

impl Index {
    /// Loads every live run of the stanza. Entries of other key epochs can never match and are left out, and
    /// so are those of packs that are not there, are too short, or were found damaged: their chunks are
    /// stored again. A run that cannot be read only costs its savings.
    pub async fn load(stanza: &Stanza, state: &Snapshot) -> Result<Self> {
        Self::load_without(stanza, state, &HashSet::new()).await
    }

    /// The same without what some packs hold: it is stored again, also where a parent has it.
    pub async fn load_without(stanza: &Stanza, state: &Snapshot, without: &HashSet<[u8; 32]>) -> Result<Self> {
        let mut this = Self::default();
        let mut listed: HashMap<[u8; 32], u64> = list_packs(stanza).await?;
        for hash in distrusted(stanza).await?.iter().chain(without) {
            listed.remove(hash);
        }
        let marked = marked(state);
        for batch in state.index_runs.chunks(FETCH) {
            let fetched = futures::future::join_all(batch.iter().map(|hash| read_run(stanza, hash))).await;
            for run in fetched {
                match run {
                    Ok(run) => this.add(run, stanza.keys().epoch, &listed, &marked),
                    Err(error) => {
                        tracing::warn!("a part of the index cannot be used, and what it names is stored again: {error}")
                    }
                }
            }
        }
        this.entries.sort_unstable_by_key(|e| e.id);
        this.entries.dedup_by_key(|e| e.id);
        this.named.retain(|pack| !without.contains(pack));
        Ok(this)
    }

    fn add(&mut self, run: index::IndexRun, epoch: u32, listed: &HashMap<[u8; 32], u64>, marked: &HashSet<&[u8]>) {
        self.named.extend(run.packs.iter().map(|pack| pack.name));
        let base = self.packs.len() as u32;
        let mut need = vec![0u64; run.packs.len()];
        for e in &run.entries {
            let end = u64::from(e.offset) + u64::from(e.stored_len);
            need[e.pack as usize] = need[e.pack as usize].max(end);
        }
        let usable: Vec<bool> = run
            .packs
            .iter()
            .zip(need)
            .map(|(p, need)| {
                let there = listed.get(&p.name).is_some_and(|&len| len >= need);
                there && p.header.epoch == epoch && !marked.contains(&p.name[..])
            })
            .collect();
        self.entries.extend(
            run.entries
                .iter()
                .filter(|e| usable[e.pack as usize])
                .map(|e| IndexEntry {
                    pack: base + e.pack,
                    ..*e
                }),
        );
        self.packs.extend(run.packs);
    }

    /// Where a chunk is.
    pub fn find(&self, id: &[u8; 32]) -> Option<(&PackRef, &IndexEntry)> {
        let at = self.entries.binary_search_by_key(id, |e| e.id).ok()?;
        let entry = &self.entries[at];
        Some((&self.packs[entry.pack as usize], entry))
    }

    /// Whether a run names the pack. One that none names is to run dry: collection has found it thin.
    pub fn names_pack(&self, pack: &[u8; 32]) -> bool {
        self.named.contains(pack)
    }

    /// Chunks known.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no chunk is known.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// Stores an index run; returns its hash. It counts once the log names it.
pub async fn store_run(stanza: &Stanza, run: index::IndexRun) -> Result<[u8; 32]> {
    let salt = env::salt(stanza.env())?;
    let sealed = index::seal_run(stanza.keys(), stanza.scope(), salt, run)?;
    let hash = sha256(&sealed);
    let name = names::index_run(&hash);
    stanza.store().put_hashed(&name, sealed.into()).await?;
    Ok(hash)
}

/// Reads an index run.
pub async fn read_run(stanza: &Stanza, hash: &[u8]) -> Result<index::IndexRun> {
    let hash: [u8; 32] = hash
        .try_into()
        .map_err(|_| Error::damaged("the log names an index run without a hash"))?;
    let name = names::index_run(&hash);
    let bytes = stanza.store().get(&name, limits::OBJECT_BYTES).await?;
    if sha256(&bytes) != hash {
        return Err(Error::damaged(format!(
            "{}/{name} does not match its name",
            stanza.shown()
        )));
    }
    let keys = stanza.keys_for(&bytes, &name)?;
    Ok(index::open_run(keys, stanza.scope(), &bytes, &name)?)
}

/// The packs that the store lists, with their lengths.
pub async fn list_packs(stanza: &Stanza) -> Result<HashMap<[u8; 32], u64>> {
    let listed = stanza.store().list_hashes(names::PACKS).await?;
    Ok(listed.into_iter().collect())
}

/// The packs that were found damaged.
pub async fn distrusted(stanza: &Stanza) -> Result<HashSet<[u8; 32]>> {
    let listed = stanza.store().list_hashes(names::DISTRUSTED).await?;
    Ok(listed.into_iter().map(|(pack, _)| pack).collect())
}

/// The packs that open marks name.
pub fn marked(state: &Snapshot) -> HashSet<&[u8]> {
    if has_fault("marked packs") {
        return HashSet::new();
    }
    let marks = state.open_marks.iter();
    marks.flat_map(|m| m.packs.iter().map(Vec::as_slice)).collect()
}

/// Which packs of a parent's manifest a new backup may go on using: those that are there, long enough, were not
/// found damaged, are not marked, and are still named by the index.
pub async fn usable_packs(stanza: &Stanza, state: &Snapshot, index: &Index, parent: &Manifest) -> Result<Vec<bool>> {
    let listed = list_packs(stanza).await?;
    let (bad, marked) = (distrusted(stanza).await?, marked(state));
    let mut need = vec![0u64; parent.packs.len()];
    for frame in &parent.frames {
        let need = &mut need[frame.pack as usize];
        *need = (*need).max(u64::from(frame.offset) + u64::from(frame.stored_len));
    }
    let packs = parent.packs.iter().zip(need);
    let usable = packs.map(|(pack, need)| {
        listed.get(&pack.name).is_some_and(|&len| len >= need)
            && !bad.contains(&pack.name)
            && !marked.contains(&pack.name[..])
            && index.names_pack(&pack.name)
    });
    Ok(usable.collect())
}

/// Fails unless every pack that a backup relies on is in the store, as long as its frames need it: asked
/// before the backup counts, for packs that were just stored too.
pub async fn confirm_packs(stanza: &Stanza, known: &[Known], packs: &[PackRef]) -> Result<()> {
    if has_fault("unconfirmed packs") {
        return Ok(());
    }
    let listed = list_packs(stanza).await?;
    let distrusted = distrusted(stanza).await?;
    let mut need = vec![0u64; packs.len()];
    for place in known.iter().filter_map(|k| k.place) {
        let end = u64::from(place.offset) + u64::from(place.stored_len);
        let need = &mut need[place.pack as usize];
        *need = end.max(*need);
    }
    for (pack, need) in packs.iter().zip(need) {
        let name = names::pack(&pack.name);
        // LIST is a hint: what it does not show is asked for.
        let len = match listed.get(&pack.name) {
            Some(&len) => Some(len),
            None => stanza.store().len(&name).await?,
        };
        let problem = match len {
            None => Some("is not there".to_owned()),
            Some(len) if len < need => Some(format!("has only {len} bytes")),
            Some(_) if distrusted.contains(&pack.name) => Some("was found damaged meanwhile".to_owned()),
            Some(_) => None,
        };
        if let Some(problem) = problem {
            return Err(
                Error::damaged(format!("{}/{name}, which this backup needs, {problem}", stanza.shown(),))
                    .remedy("the backup does not count; start it again: it will store the content anew"),
            );
        }
    }
    Ok(())
}

/// A chunk's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Position in the session's pack table.
    pub pack: u32,
    /// Position of the frame in the pack.
    pub ordinal: u32,
    /// Offset of the frame, bytes.
    pub offset: u32,
    /// Length as stored, bytes.
    pub stored_len: u32,
}

/// A chunk that this session met.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Its id.
    pub id: [u8; 32],
    /// Length of its plaintext.
    pub plain_len: u32,
    /// Its place; `None` while a worker is still packing it.
    pub place: Option<Place>,
}

/// What to do with a chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is, or will be, stored: use this handle.
    Present(u32),
    /// The caller must store it and then say where.
    New(u32),
}

#[derive(Debug, Default)]
struct Tables {
    handles: HashMap<[u8; 32], u32>,
    chunks: Vec<Known>,
    packs: Vec<Option<PackRef>>,
    pack_numbers: HashMap<[u8; 32], u32>,
}

impl Tables {
    /// The number of a pack that is stored.
    fn number(&mut self, pack: &PackRef) -> u32 {
        if let Some(&number) = self.pack_numbers.get(&pack.name) {
            return number;
        }
        let number = self.packs.len() as u32;
        self.packs.push(Some(*pack));
        self.pack_numbers.insert(pack.name, number);
        number
    }
}

/// The chunks and packs of one session.
#[derive(Debug)]
pub struct SessionChunks {
    index: Index,
    tables: Mutex<Tables>,
}

impl SessionChunks {
    /// A session over an index.
    pub fn new(index: Index) -> Self {
        Self {
            index,
            tables: Mutex::default(),
        }
    }

    fn tables(&self) -> std::sync::MutexGuard<'_, Tables> {
        // A panicking worker aborts the backup; its tables are only read for the error report.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a chunk or claims the right to store it.
    pub fn claim(&self, id: [u8; 32], plain_len: u32) -> Claim {
        let mut t = self.tables();
        if let Some(&handle) = t.handles.get(&id) {
            return Claim::Present(handle);
        }
        let handle = t.chunks.len() as u32;
        t.handles.insert(id, handle);
        let known = self.index.find(&id).map(|(pack, entry)| Place {
            pack: t.number(pack),
            ordinal: entry.ordinal,
            offset: entry.offset,
            stored_len: entry.stored_len,
        });
        t.chunks.push(Known {
            id,
            plain_len,
            place: known,
        });
        if known.is_some() {
            Claim::Present(handle)
        } else {
            Claim::New(handle)
        }
    }

    /// A chunk that the parent has, where it has it.
    pub fn adopt(&self, pack: &PackRef, frame: &FrameRef) -> u32 {
        let mut t = self.tables();
        if let Some(&handle) = t.handles.get(&frame.id) {
            return handle;
        }
        let handle = t.chunks.len() as u32;
        t.handles.insert(frame.id, handle);
        let place = Place {
            pack: t.number(pack),
            ordinal: frame.ordinal,
            offset: frame.offset,
            stored_len: frame.stored_len,
        };
        t.chunks.push(Known {
            id: frame.id,
            plain_len: frame.plain_len,
            place: Some(place),
        });
        handle
    }

    /// Says where a claimed chunk was put.
    pub fn stored(&self, handle: u32, place: Place) {
        self.tables().chunks[handle as usize].place = Some(place);
    }

    /// A number for a pack that is being filled.
    pub fn new_pack(&self) -> u32 {
        let mut t = self.tables();
        t.packs.push(None);
        t.packs.len() as u32 - 1
    }

    /// The pack got its name.
    pub fn pack_named(&self, number: u32, pack: PackRef) {
        self.tables().packs[number as usize] = Some(pack);
    }

    /// Whether the pack was there before this session.
    pub fn was_there(&self, pack: &PackRef) -> bool {
        self.index.names_pack(&pack.name)
    }

    /// All chunks and packs, once every worker and upload is done.
    pub fn finish(&self) -> Result<(Vec<Known>, Vec<PackRef>)> {
        let t = self.tables();
        let packs = t
            .packs
            .iter()
            .map(|p| p.ok_or_else(|| Error::failed("a pack was not finished")))
            .collect::<Result<_>>()?;
        if t.chunks.iter().any(|c| c.place.is_none()) {
            return Err(Error::failed("a chunk was not stored"));
        }
        Ok((t.chunks.clone(), packs))
    }
}
