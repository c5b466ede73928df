//! The server of the simulation: its WAL, and what stores that. Segments are short, and what is in them follows from
//! their numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::{Segment, WalFile};
use fairvault_engine::replication::connection::SystemIdentity;
use fairvault_engine::replication::conninfo::ConnInfo;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::receive::Options;
use fairvault_engine::wal::receive::given::{Given, receive};
use fairvault_format::names;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::actors::{open, passing};
use super::store::World;

/// Bytes of a segment.
pub const SEGMENT: u64 = 16 << 10;
/// The cluster.
pub const SYSTEM: u64 = 7;
/// How much of its newest segment the server has written.
const WRITTEN: u64 = 9_000;
/// Header of the first page of a segment, bytes.
const LONG_HEADER: usize = 40;

/// A segment with a record that its number fills, behind which the server switched to the next one.
pub fn wal(number: u64) -> Vec<u8> {
    let mut wal = Vec::with_capacity(SEGMENT as usize);
    wal.extend(0xD110u16.to_le_bytes());
    wal.extend(2u16.to_le_bytes());
    wal.extend(1u32.to_le_bytes());
    wal.extend((number * SEGMENT).to_le_bytes());
    wal.resize(24, 0);
    wal.extend(SYSTEM.to_le_bytes());
    wal.extend((SEGMENT as u32).to_le_bytes());
    wal.extend(8192u32.to_le_bytes());
    assert_eq!(wal.len(), LONG_HEADER);
    let mut body = vec![255, 200];
    body.extend((0..200).map(|at| (((number + 7) * (at + 1) * 2_654_435_761) >> 13) as u8));
    let noop = number * SEGMENT + wal.len() as u64;
    record(&mut wal, 0, 0x20, &body);
    record(&mut wal, noop, 0x40, &[]);
    wal.resize(SEGMENT as usize, 0);
    wal
}

/// A record of the resource manager XLOG.
fn record(wal: &mut Vec<u8>, previous: u64, info: u8, body: &[u8]) {
    let mut record = Vec::new();
    record.extend((24 + body.len() as u32).to_le_bytes());
    record.extend(0u32.to_le_bytes());
    record.extend(previous.to_le_bytes());
    record.extend([info, 0, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
    record.extend(crc.to_le_bytes());
    record.extend(body);
    wal.extend(record);
    wal.resize(wal.len().next_multiple_of(8), 0);
}

/// What the server was told. It keeps all of its WAL.
#[derive(Debug)]
pub struct Server {
    /// The segment that it archives next: all before it are durable, as it was told.
    position: AtomicU64,
    /// Where receivers began, and up to where they have said that WAL is durable.
    heard: Mutex<BTreeMap<u64, u64>>,
}

impl Server {
    /// One that has archived nothing.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            position: AtomicU64::new(1),
            heard: Mutex::default(),
        })
    }

    /// The segment that it archives next.
    pub fn archived(&self) -> u64 {
        self.position.load(Ordering::SeqCst)
    }

    /// What receivers have said to be durable.
    pub fn received(&self) -> Vec<Range<u64>> {
        let heard = self.heard.lock().unwrap();
        heard.iter().map(|(from, to)| *from..*to).collect()
    }

    /// It writes one segment ahead of what is archived, and a part of another.
    fn written(&self) -> u64 {
        (self.archived() + 1) * SEGMENT + WRITTEN
    }

    /// Archives the next segment, again and again until that is known to be durable; then the server goes on.
    pub async fn push(&self, world: &Arc<World>) -> Result<()> {
        let number = self.archived();
        let segment = Segment { timeline: 1, number };
        let push = async {
            let mut log = open(world, 0).await?;
            let archive = Archive::open(&log, None, 0)?;
            let name = segment.name(SEGMENT);
            archive.put(WalFile::Segment(segment), &name, wal(number)).await?;
            archive.check_fence(&mut log).await
        };
        let position = &self.position;
        match push.await {
            Ok(()) => {
                _ = position.compare_exchange(number, number + 1, Ordering::SeqCst, Ordering::SeqCst);
                world.watch.told(number..=number);
            }
            Err(error) => passing(error)?,
        }
        Ok(())
    }

    /// A receiver on one connection, which lasts for some minutes.
    pub async fn stream(self: &Arc<Self>, world: &Arc<World>) -> Result<()> {
        let options = Options {
            conninfo: ConnInfo::parse("host=sim")?,
            slot: Some("sim".to_owned()),
            standbys: Vec::new(),
            flush_interval: Duration::from_secs(1 + world.roll(20)),
            piece_size: 4096,
            synchronous: world.roll(2) == 0,
            keep_pieces: world.roll(3) == 0,
            skip_gap: false,
            compression: 0.into(),
            taken: Arc::default(),
        };
        let identify = || SystemIdentity {
            system_identifier: SYSTEM,
            timeline: 1,
            flush: Lsn(self.written()),
        };
        let (wal_in, wal_out) = mpsc::channel(2);
        let durable = watch::Sender::new(Lsn(0));
        let mut told = durable.subscribe();
        let from = watch::Sender::new(None);
        let mut asked = from.subscribe();
        let receiving = async {
            let given = Given { wal: wal_out, durable };
            receive(open(world, 0).await?, &options, identify, SEGMENT, |lsn| {
                from.send_replace(Some(lsn.0));
                given
            })
            .await
        };
        let sending = async {
            let from = asked.wait_for(Option::is_some).await.ok().and_then(|from| *from);
            if let Some(from) = from {
                self.send(world, from, wal_in).await;
            }
        };
        let hearing = async {
            while told.changed().await.is_ok() {
                let lsn = told.borrow_and_update().0;
                // What it begins with was there, and is compared before anything is said.
                if let (Some(from), true) = (*from.borrow(), lsn > 0) {
                    let before = {
                        let mut heard = self.heard.lock().unwrap();
                        let to = heard.entry(from).or_insert(from);
                        std::mem::replace(to, lsn.max(*to))
                    };
                    world.watch.told(before / SEGMENT..=lsn / SEGMENT);
                }
            }
        };
        let received = async {
            tokio::select! {
                biased;
                received = receiving => received,
                () = async { tokio::join!(sending, hearing); std::future::pending::<()>().await } => Ok(()),
            }
        };
        match received.await {
            Ok(()) => Ok(()),
            Err(error) => passing(error).context("a receiver"),
        }
    }

    /// Sends WAL in small runs, for some minutes.
    async fn send(&self, world: &Arc<World>, from: u64, to: mpsc::Sender<(Lsn, Bytes)>) {
        let until = tokio::time::Instant::now() + Duration::from_secs(100 + world.roll(300));
        let mut at = from;
        let mut segment = wal(at / SEGMENT);
        while tokio::time::Instant::now() < until {
            let end = self.written().min((at / SEGMENT + 1) * SEGMENT);
            let len = end.saturating_sub(at).min(1 + world.roll(6_000));
            if len > 0 {
                let offset = (at % SEGMENT) as usize;
                let run = Bytes::copy_from_slice(&segment[offset..offset + len as usize]);
                if to.send((Lsn(at), run)).await.is_err() {
                    return;
                }
                at += len;
                if at.is_multiple_of(SEGMENT) {
                    segment = wal(at / SEGMENT);
                }
            }
            sleep(Duration::from_millis(world.roll(6_000))).await;
        }
    }
}

/// Numbers of the segments that are there as a whole.
pub async fn segments(log: &Log) -> Result<BTreeSet<u64>> {
    let listed = log.stanza().store().list(names::WAL).await?;
    let mut numbers = BTreeSet::new();
    for (object, _) in &listed {
        let name = names::parse_wal(object).context("a name")?;
        match WalFile::parse(name.file, SEGMENT)? {
            WalFile::Segment(_) if name.is_piece => {}
            WalFile::Segment(segment) => _ = numbers.insert(segment.number),
            other => bail!("{other:?}"),
        }
    }
    Ok(numbers)
}
