//! Appending to a spool: what was appended counts once it is synced, and not before.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use bytes::Bytes;
use fairvault_format::journal::Journal;
use fairvault_format::limits;

use super::files::Part;
use super::{Cluster, Position, Spool, sync_folder};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::store::owner;

/// A journal that is being written.
struct OpenJournal {
    /// Where it begins.
    start: Lsn,
    /// Up to where what it holds counts.
    counts_to: Lsn,
    file: File,
    journal: Journal,
    /// Bytes that were written.
    len: u64,
    /// Bytes of the file, zeros at its end included.
    reserved: u64,
}

/// Appends to the spool. After an error it is of no use: nothing may follow what could be torn.
pub struct Writer {
    spool: Arc<Spool>,
    cluster: Cluster,
    at: Position,
    fast: bool,
    open: Option<OpenJournal>,
}

impl Spool {
    /// Goes on with WAL at `from`, in a new journal. `fast` has journals written full of zeros first: then a sync
    /// has no change of a file's size to wait for.
    pub fn writer(self: &Arc<Self>, cluster: Cluster, from: Position, fast: bool) -> Result<Writer> {
        // The segment that is received stays until it is stored as a whole, and there must be more room.
        let least = 3 * cluster.segment_size;
        if self.limit < least {
            return Err(Error::usage(format!(
                "the spool may hold {} MiB, and needs {} at least: three segments",
                self.limit >> 20,
                least >> 20
            )));
        }
        let mut state = self.state();
        state.cluster = Some(cluster);
        state.ended.remove(&from.timeline);
        if state.end() != Some(from) {
            // What an earlier release was about is gone, and its positions may come again.
            self.note_released(0, Lsn(0))
                .map_err(self.io("writing", "what is released in"))?;
            // A timeline that follows the one before is read in its turn; anything else is begun anew.
            if state.parts.is_empty() {
                state.generation += 1;
                state.taken = None;
                state.stored = None;
            }
        }
        drop(state);
        self.changed.send_replace(());
        Ok(Writer {
            spool: self.clone(),
            cluster,
            at: from,
            fast,
            open: None,
        })
    }
}

fn write_zeros(file: &mut File, len: u64) -> std::io::Result<()> {
    let zeros = vec![0u8; 256 << 10];
    let mut left = len;
    while left > 0 {
        let now = left.min(zeros.len() as u64);
        file.write_all(&zeros[..now as usize])?;
        left -= now;
    }
    Ok(())
}

impl Writer {
    /// Where it is.
    pub fn at(&self) -> Position {
        self.at
    }

    /// Appends what was received, and syncs it: then it counts. It blocks.
    pub fn append(&mut self, received: &[Bytes]) -> Result<()> {
        let size = self.cluster.segment_size;
        for bytes in received {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let left = (size - self.at.lsn.0 % size) as usize;
                let (now, later) = rest.split_at(rest.len().min(left).min(limits::JOURNAL_SECTION_BYTES));
                self.write(now)?;
                rest = later;
            }
        }
        self.sync()
    }

    fn write(&mut self, content: &[u8]) -> Result<()> {
        let at_segment = self.at.lsn.0.is_multiple_of(self.cluster.segment_size);
        let is_full = self.open.as_ref().is_none_or(|open| open.journal.is_full());
        if at_segment || is_full {
            self.begin()?;
        }
        let Some(open) = &mut self.open else {
            return Err(Error::failed("the spool has no journal to write to"));
        };
        let sealed = open.journal.seal(content)?;
        open.file
            .write_all(&sealed)
            .map_err(|e| Error::io(format_args!("writing to the spool {}", self.spool.folder.display()), e))?;
        self.at.lsn.0 += content.len() as u64;
        open.len += sealed.len() as u64;
        let more = open.len.saturating_sub(open.reserved);
        open.reserved += more;
        self.spool.state().bytes += more;
        Ok(())
    }

    /// Begins a journal here.
    fn begin(&mut self) -> Result<()> {
        self.sync()?;
        self.close();
        let spool = self.spool.clone();
        let part = Part {
            timeline: self.at.timeline,
            start: self.at.lsn,
            end: self.at.lsn,
        };
        let name = part.name();
        let (journal, bytes) = spool.begin_journal(self.cluster, &part)?;
        // The rest of the segment, and what sections take around it.
        let size = self.cluster.segment_size;
        let left = size - self.at.lsn.0 % size;
        let reserved = if self.fast { left + left / 16 } else { 0 };
        // One that is there under this name holds nothing that counts.
        {
            let mut state = spool.state();
            state.parts.retain(|there| there.name() != name);
            state.bytes = state.bytes.saturating_sub(spool.len_of(&part));
        }
        let create = || -> std::io::Result<File> {
            let _ = std::fs::remove_file(spool.path(&name));
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600);
            let mut file = options.open(spool.path(&name))?;
            if reserved > 0 {
                write_zeros(&mut file, reserved)?;
                file.sync_all()?;
                file.rewind()?;
            }
            file.write_all(&bytes)?;
            sync_folder(&spool.folder)?;
            Ok(file)
        };
        let file = owner::write(spool.owner.as_ref(), create, super::may_not).map_err(spool.io("writing", &name))?;
        let len = bytes.len() as u64;
        let reserved = reserved.max(len);
        let mut state = spool.state();
        state.bytes += reserved;
        state.parts.push(part);
        self.open = Some(OpenJournal {
            start: self.at.lsn,
            counts_to: self.at.lsn,
            file,
            journal,
            len,
            reserved,
        });
        Ok(())
    }

    /// Gives back the zeros at the end of a journal that nothing is written to any more.
    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if open.reserved > open.len && open.file.set_len(open.len).is_ok() {
            let mut state = self.spool.state();
            state.bytes = state.bytes.saturating_sub(open.reserved - open.len);
        }
    }

    /// What was written counts from here on.
    fn sync(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        // All of it counts already, and it may be in the repository, and gone.
        if open.counts_to == self.at.lsn {
            return Ok(());
        }
        open.file
            .sync_data()
            .map_err(|e| Error::io(format_args!("syncing the spool {}", self.spool.folder.display()), e))?;
        let mut state = self.spool.state();
        let last = state.parts.last_mut();
        let Some(part) = last.filter(|part| (part.timeline, part.start) == (self.at.timeline, open.start)) else {
            return Err(Error::temporary(format!(
                "the journal of the spool that begins at {} is gone while it is written to",
                open.start
            )));
        };
        part.end = self.at.lsn;
        open.counts_to = self.at.lsn;
        drop(state);
        self.spool.changed.send_replace(());
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use fairvault_format::keys::Secret;

    use super::*;
    use crate::env::SystemEnv;
    use crate::stanza::create::{self, create};
    use crate::stanza::{Access, Stanza};
    use crate::store::owner::tests::{SOMEBODY, owners, somebodys};
    use crate::store::{Store, StoreSettings};

    const SIZE: u64 = 1 << 20;

    fn at(lsn: u64) -> Position {
        Position {
            timeline: 1,
            lsn: Lsn(lsn),
        }
    }

    async fn stanza(repository: Store) -> Arc<Stanza> {
        let access = Access {
            repository,
            stanza: "acme".into(),
            secret: Some(Secret::Key([1; 32])),
            memory: None,
            may_stretch: true,
            env: Arc::new(SystemEnv),
            trace: Default::default(),
        };
        let cluster = create::Cluster {
            system_identifier: 7,
            major: 17,
            wal_segment_size: SIZE,
        };
        let log = create(&access, cluster, "main").await.unwrap();
        log.stanza().clone()
    }

    async fn spool(folder: &std::path::Path) -> Arc<Spool> {
        let memory = Arc::new(object_store::memory::InMemory::new());
        let stanza = stanza(Store::new(memory, "", "memory://", StoreSettings::default())).await;
        Spool::open(stanza, folder.join("spool"), 8 * SIZE).unwrap()
    }

    const CLUSTER: Cluster = Cluster {
        system_identifier: 7,
        segment_size: SIZE,
    };

    /// A segment is stored at the very moment at which the journal of the next one was begun.
    #[tokio::test]
    async fn a_journal_that_was_just_begun_is_not_released() {
        let folder = tempfile::tempdir().unwrap();
        let spool = spool(folder.path()).await;
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE), false).unwrap();
        writer.append(&[vec![7; SIZE as usize].into()]).unwrap();
        writer.begin().unwrap();
        spool.stored(1, Lsn(9 * SIZE));
        assert_eq!(spool.begin(), Some(at(9 * SIZE)));
        writer.append(&[vec![9; 100].into()]).unwrap();
        assert_eq!(spool.end(), Some(at(9 * SIZE + 100)));
        let mut reader = spool.reader(at(9 * SIZE), None);
        let (from, bytes) = reader.next().await.unwrap().unwrap();
        assert_eq!((from, &bytes[..]), (Lsn(9 * SIZE), &[9; 100][..]));
        // And from the disk, as after a crash.
        drop((writer, reader));
        assert_eq!(spool.scan().unwrap().end(), Some(at(9 * SIZE + 100)));
    }

    /// A timeline was taken for ended, and goes on after all: what has come since was not stored with it.
    #[tokio::test]
    async fn a_timeline_that_goes_on_is_released_as_far_as_it_was_read() {
        let folder = tempfile::tempdir().unwrap();
        let spool = spool(folder.path()).await;
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE), false).unwrap();
        writer.append(&[vec![7; SIZE as usize].into()]).unwrap();
        spool.end_timeline(1);
        let mut writer = spool.writer(CLUSTER, at(9 * SIZE), false).unwrap();
        writer.append(&[vec![9; 100].into()]).unwrap();
        spool.stored_timeline(1, Lsn(9 * SIZE));
        assert_eq!(spool.begin(), Some(at(9 * SIZE)));
        assert_eq!(spool.end(), Some(at(9 * SIZE + 100)));
        // In mid-segment: what is there of it in pieces stays, whether it goes on or ends once more meanwhile.
        let mut writer = spool.writer(CLUSTER, at(9 * SIZE + 100), false).unwrap();
        writer.append(&[vec![9; 50].into()]).unwrap();
        spool.stored_timeline(1, Lsn(9 * SIZE + 100));
        assert_eq!(spool.begin(), Some(at(9 * SIZE)));
        spool.end_timeline(1);
        spool.stored_timeline(1, Lsn(9 * SIZE + 100));
        assert_eq!(spool.begin(), Some(at(9 * SIZE)));
        // All of it, and what was only begun.
        let mut writer = spool.writer(CLUSTER, at(9 * SIZE + 150), false).unwrap();
        writer.begin().unwrap();
        spool.end_timeline(1);
        spool.stored_timeline(1, Lsn(9 * SIZE + 150));
        assert_eq!(spool.begin(), None);
    }

    /// Of a timeline that was closed inside a journal, what comes before is stored, and then all of it goes.
    #[tokio::test]
    async fn a_timeline_that_was_closed_is_released() {
        let folder = tempfile::tempdir().unwrap();
        let spool = spool(folder.path()).await;
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE), false).unwrap();
        writer.append(&[vec![7; 2 * SIZE as usize].into()]).unwrap();
        spool.end_timeline(1);
        let closed = Lsn(8 * SIZE + 500);
        spool.give_up(1, closed).unwrap();
        assert_eq!(spool.end(), Some(at(8 * SIZE + 500)));
        let mut reader = spool.reader(at(8 * SIZE), Some(closed));
        while reader.next().await.unwrap().is_some() {}
        reader.stored_timeline();
        assert_eq!(spool.begin(), None);
        let aside = std::fs::read_dir(folder.path().join("spool")).unwrap().flatten();
        let aside = aside.filter(|entry| entry.file_name().to_string_lossy().ends_with(".closed"));
        assert_eq!(aside.count(), 2);
    }

    /// Nobody waits for what will not come, or takes it for the end.
    #[tokio::test]
    async fn a_hole_in_the_spool_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let spool = spool(folder.path()).await;
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE + 500), false).unwrap();
        writer.append(&[vec![7; 100].into()]).unwrap();
        let mut reader = spool.reader(at(8 * SIZE), None);
        assert!(reader.next().await.is_err());
        spool.end_timeline(1);
        assert!(reader.next().await.is_err());
        let mut reader = spool.reader(at(8 * SIZE + 500), None);
        assert_eq!(reader.next().await.unwrap().unwrap().0, Lsn(8 * SIZE + 500));
        assert!(reader.next().await.unwrap().is_none());
    }

    /// Root receives into a repository of somebody else, and that user has to go on with the journals.
    #[tokio::test]
    async fn journals_in_a_repository_belong_to_its_owner() {
        let Some((folder, repository)) = somebodys() else {
            return;
        };
        let stanza = stanza(repository).await;
        let journals = stanza.store().directory().unwrap().join("journals/host");
        let spool = Spool::open(stanza.clone(), journals.clone(), 8 * SIZE).unwrap();
        spool.put_history(2, b"1\t0/800000\tno recovery target\n").unwrap();
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE), false).unwrap();
        writer.append(&[vec![7; SIZE as usize + 100].into()]).unwrap();
        // The lock, what is released, a history, two journals.
        assert_eq!(owners(&journals), (vec![SOMEBODY], 5));
        // Whoever opens it next writes the last journal anew.
        drop((writer, spool));
        let spool = Spool::open(stanza, journals.clone(), 8 * SIZE).unwrap();
        assert_eq!(spool.end(), Some(at(9 * SIZE + 100)));
        assert_eq!(owners(&journals), (vec![SOMEBODY], 5));
        assert_eq!(owners(folder.path()).0, [SOMEBODY]);
    }

    /// Nothing counts that went into a journal which is not there any more.
    #[tokio::test]
    async fn what_is_written_to_a_journal_that_is_gone_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let spool = spool(folder.path()).await;
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE), false).unwrap();
        writer.append(&[vec![7; 100].into()]).unwrap();
        spool.clear();
        let error = writer.append(&[vec![7; 100].into()]).unwrap_err();
        assert!(error.to_string().contains("is gone while it is written to"), "{error}");
        assert_eq!(spool.end(), None);
        // All of a segment that counts may be stored, and gone, before the next one is begun.
        let mut writer = spool.writer(CLUSTER, at(8 * SIZE), false).unwrap();
        writer.append(&[vec![7; SIZE as usize].into()]).unwrap();
        spool.stored(1, Lsn(9 * SIZE));
        assert_eq!(spool.end(), None);
        writer.append(&[vec![9; 100].into()]).unwrap();
        assert_eq!(spool.end(), Some(at(9 * SIZE + 100)));
    }
}
