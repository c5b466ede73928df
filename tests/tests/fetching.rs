//! What `wal get` answers, asked without processes: whole segments, parts, the ends of timelines, several repositories.

mod stores;

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::error::Kind;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::{Segment, WalFile};
use fairvault_engine::stanza::create::create;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::get::{self, Follow, Needs, Outcome};
use fairvault_tests::Scratch;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use stores::{CLUSTER, Fault, Faulty, access, key, memory};

const SIZE: usize = CLUSTER.wal_segment_size as usize;

/// Repositories of one stanza, and where a segment is fetched to.
struct World {
    logs: Vec<Log>,
    scratch: Scratch,
}

impl World {
    async fn new(name: &str, repositories: usize) -> Result<Self> {
        let mut logs = Vec::new();
        for _ in 0..repositories {
            logs.push(create(&access(&memory(), key(1)), CLUSTER, "main").await?);
        }
        let scratch = Scratch::new(name)?;
        Ok(Self { logs, scratch })
    }

    fn archive(&self, at: usize) -> Result<Archive> {
        Ok(Archive::open(&self.logs[at], None, 3)?)
    }

    async fn put(&self, at: usize, segment: Segment, byte: u8) -> Result<()> {
        let content = vec![byte; SIZE];
        self.archive(at)?
            .put_whole(segment, Default::default(), content)
            .await?;
        Ok(())
    }

    async fn history(&self, at: usize, timeline: u32, text: &str) -> Result<()> {
        let name = format!("{timeline:08X}.history");
        let file = WalFile::History(timeline);
        self.archive(at)?.put(file, &name, text.as_bytes().to_vec()).await?;
        Ok(())
    }

    async fn get(&self, segment: Segment, needs: Needs) -> fairvault_engine::error::Result<Outcome> {
        let name = segment.name(CLUSTER.wal_segment_size);
        let numbers: Vec<usize> = (0..self.logs.len()).collect();
        let open = async |at: &usize| Archive::open(&self.logs[*at], None, 3).map(Some);
        get::get(&numbers, open, &name, &self.scratch.join("got"), needs).await
    }

    fn got(&self) -> Result<Vec<u8>> {
        Ok(std::fs::read(self.scratch.join("got"))?)
    }
}

fn segment(timeline: u32, number: u64) -> Segment {
    Segment { timeline, number }
}

fn along(timeline: u32) -> Needs {
    Needs {
        follow: Follow::Timeline(timeline),
        ..Needs::default()
    }
}

/// An old primary that went on has archived a whole segment under the name in which its timeline had ended for others.
#[tokio::test]
async fn the_segment_of_a_switch_is_padded_from_the_switch_on() -> Result<()> {
    let w = World::new("switch", 1).await?;
    for number in 1..=3 {
        w.put(0, segment(1, number), 7).await?;
    }
    w.history(0, 2, "1\t0/2800000\tno recovery target specified\n").await?;
    w.put(0, segment(2, 3), 9).await?;
    ensure!(w.get(segment(1, 2), along(2)).await? == Outcome::Delivered);
    let got = w.got()?;
    ensure!(got.len() == SIZE && got[..0x80_0000].iter().all(|&b| b == 7) && got[0x80_0000..].iter().all(|&b| b == 0));
    // Before it, and along the old timeline, all of it.
    for (number, needs) in [(1, along(2)), (2, along(1)), (3, along(1)), (2, Needs::default())] {
        ensure!(w.get(segment(1, number), needs).await? == Outcome::Delivered);
        ensure!(w.got()? == vec![7; SIZE], "{number}");
    }
    // Beyond the switch, the old timeline is not part of the new one; before it, the new one had not begun.
    ensure!(w.get(segment(1, 3), along(2)).await? == Outcome::Absent);
    ensure!(w.get(segment(2, 1), along(2)).await? == Outcome::Absent);
    // The segment in which it began, if it is not there: what recovery has to reach tells.
    let reaching = |lsn| Needs {
        through: Some(Lsn(lsn)),
        ..along(2)
    };
    ensure!(
        w.get(segment(2, 1), reaching(0x300_0000)).await? == Outcome::Absent,
        "it had not begun"
    );
    let error = w
        .get(segment(2, 2), reaching(0x2c0_0000))
        .await
        .err()
        .context("a hole")?;
    ensure!(error.kind() == Kind::Damaged, "{error}");
    Ok(())
}

/// Where a segment is missing everywhere, any repository may have the later one that shows that this is a hole.
#[tokio::test]
async fn a_later_segment_in_any_repository_proves_a_hole() -> Result<()> {
    for (has_first, has_later) in [(0, 1), (1, 0), (0, 0), (1, 1)] {
        let w = World::new("everywhere", 2).await?;
        w.put(has_first, segment(1, 1), 7).await?;
        for needs in [along(1), Needs::default()] {
            ensure!(w.get(segment(1, 2), needs).await? == Outcome::Absent, "it is the end");
        }
        w.put(has_later, segment(1, 3), 7).await?;
        for needs in [along(1), Needs::default()] {
            let error = w.get(segment(1, 2), needs).await.err();
            let error = error.with_context(|| format!("{has_first} {has_later}: taken for the end"))?;
            ensure!(
                error.kind() == Kind::Damaged && error.to_string().contains("hole"),
                "{error}"
            );
        }
    }
    Ok(())
}

/// A repository that has not heard of the newest timeline does not end a standby that follows it.
#[tokio::test]
async fn a_standby_follows_the_newest_timeline_of_any_repository() -> Result<()> {
    let newest = Needs {
        follow: Follow::Newest,
        ..Needs::default()
    };
    for ahead in [0, 1] {
        let w = World::new("newest", 2).await?;
        for at in 0..2 {
            w.put(at, segment(1, 1), 7).await?;
        }
        w.history(ahead, 2, "1\t0/1800000\tno recovery target specified\n")
            .await?;
        w.put(ahead, segment(2, 1), 9).await?;
        w.put(ahead, segment(2, 2), 9).await?;
        for number in [1, 2] {
            ensure!(
                w.get(segment(2, number), newest).await? == Outcome::Delivered,
                "{ahead}"
            );
            ensure!(w.got()? == vec![9; SIZE]);
        }
        ensure!(w.get(segment(2, 3), newest).await? == Outcome::Absent);
    }
    Ok(())
}

/// Parts that contradict each other: in one repository that is damage; between two, what they have in common is used.
#[tokio::test]
async fn parts_that_contradict_each_other_are_used_as_far_as_they_agree() -> Result<()> {
    let w = World::new("contradict", 2).await?;
    let one = segment(1, 1);
    let content = |len: usize, other_from: usize| -> Vec<u8> {
        let byte = |at| if at < other_from { 7 } else { 9 };
        (0..len).map(byte).collect()
    };
    // Pieces may overlap, if they agree.
    let (first, second) = (w.archive(0)?, w.archive(1)?);
    first.put_piece(one, 0, content(20_000, usize::MAX)).await?;
    first.put_piece(one, 10_000, content(20_000, usize::MAX)).await?;
    ensure!(first.parts(one).await? == vec![7; 30_000]);
    // A longer one that agrees is used as a whole, wherever it is.
    second.put_piece(one, 0, content(40_000, usize::MAX)).await?;
    let both = || Ok::<_, anyhow::Error>(w.archive(0)?.beside(vec![w.archive(1)?]));
    ensure!(both()?.parts(one).await? == vec![7; 40_000]);
    // Of one that does not, the beginning: recovery that has to get further stops.
    let two = segment(1, 2);
    first.put_piece(two, 0, content(30_000, usize::MAX)).await?;
    second.put_piece(two, 0, content(40_000, 25_000)).await?;
    ensure!(both()?.parts(two).await? == vec![7; 25_000]);
    let needs = |offset: u64| Needs {
        through: Some(Lsn(0x200_0000 + offset)),
        ..along(1)
    };
    ensure!(w.get(two, needs(25_000)).await? == Outcome::Delivered);
    ensure!(w.got()?[..25_000] == vec![7; 25_000] && w.got()?[25_000..].iter().all(|&b| b == 0));
    let error = w.get(two, needs(28_000)).await.err().context("it has to get further")?;
    ensure!(
        error.kind() == Kind::Damaged && error.to_string().contains("only the part up to"),
        "{error}"
    );
    // In one repository, only a bad writer does that.
    let three = segment(1, 3);
    first.put_piece(three, 0, content(20_000, usize::MAX)).await?;
    first.put_piece(three, 10_000, content(20_000, 5_000)).await?;
    let error = first.parts(three).await.err().context("they contradict each other")?;
    ensure!(
        error.kind() == Kind::Damaged && error.to_string().contains("contradicts"),
        "{error}"
    );
    Ok(())
}

/// Between its two looks for the whole segment, somebody seals it and removes the pieces: what recovery gets is the whole,
/// and never the word that there is nothing.
#[tokio::test]
async fn pieces_that_are_sealed_while_they_are_read_hide_no_segment() -> Result<()> {
    let one = segment(1, 1);
    for fault in [Fault::SealedOnceListed, Fault::SealedOnceRead] {
        for pieces in [1, 2] {
            let faulty = Faulty::new(fault);
            let w = World {
                logs: vec![create(&access(&faulty.store(), key(1)), CLUSTER, "main").await?],
                scratch: Scratch::new("sealed")?,
            };
            w.put(0, one, 7).await?;
            let is_whole = |path: &Path| path.as_ref().contains("/wal/");
            let listed: Vec<Path> = faulty
                .inner
                .list(None)
                .map_ok(|meta| meta.location)
                .try_collect()
                .await?;
            let whole = listed.into_iter().find(is_whole).context("the segment")?;
            let content = faulty.inner.get(&whole).await?.bytes().await?;
            faulty.inner.delete(&whole).await?;
            for number in 0..pieces {
                w.archive(0)?.put_piece(one, number * 9000, vec![7; 9000]).await?;
            }
            *faulty.late.lock().expect("nobody else") = vec![(whole, content)];
            let unsure = Needs {
                through: Some(Lsn(0x150_0000)),
                ..along(1)
            };
            ensure!(w.get(one, unsure).await? == Outcome::Delivered, "{fault:?} {pieces}");
            ensure!(w.got()? == vec![7; SIZE], "{fault:?} {pieces}: only a part");
            ensure!(faulty.late.lock().expect("nobody else").is_empty(), "nothing happened");
        }
    }
    Ok(())
}
