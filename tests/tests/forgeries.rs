//! Whoever has a key that writes, and may write to the store, says in the log what only an operator may say: everybody
//! refuses it, and nothing is deleted by it. What an operator says against the signed policy is looked at again before
//! anything is deleted. And nobody decides by a snapshot what goes.

mod stores;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fairvault_engine::commit::session::Session;
use fairvault_engine::commit::{Log, fence};
use fairvault_engine::env;
use fairvault_engine::error::{Error, Kind};
use fairvault_engine::expire::rules::{Keep, Retention};
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::store::Store;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::{expire, gc, repair};
use fairvault_format::header::{Kind as ObjectKind, ObjectHeader};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, seal_run};
use fairvault_format::keys::{EpochKeys, KeyRole};
use fairvault_format::log::{required_role, seal_entry};
use fairvault_format::object::{ObjectWriter, open_message, seal_message};
use fairvault_format::proto::{self, Role, log_entry::Kind as Entry};
use fairvault_format::{names, sha256};

use stores::{CLUSTER, access, forge, key, memory};

/// Bytes of a segment of WAL.
const SEGMENT: u64 = 1 << 20;
const SHORT: Cluster = Cluster {
    wal_segment_size: SEGMENT,
    ..CLUSTER
};
const DAY_US: i64 = 86_400_000_000;
/// Bytes of a pack.
const PACK: usize = 500;
/// Backups, by the segment in which they lie, and how many days ago they were taken.
const BACKUPS: [(u8, i64); 3] = [(2, 20), (3, 10), (4, 1)];

async fn open(store: &Store) -> Result<Log, Error> {
    Log::open(Stanza::open(&access(store, key(1))).await?).await
}

async fn replay(store: &Store) -> Result<Log, Error> {
    Log::replay(Stanza::open(&access(store, key(1))).await?).await
}

fn expect<T>(result: Result<T, Error>, kind: Kind, word: &str) -> Result<()> {
    let error = result.err().context("it went well")?;
    ensure!(
        error.kind() == kind && error.to_string().contains(word),
        "{:?} {error}",
        error.kind()
    );
    Ok(())
}

/// A stanza with three full backups, each with a pack, a part of the index and a segment of its own; and WAL before and
/// after them.
async fn world(store: &Store) -> Result<Log> {
    let mut log = create(&access(store, key(1)), SHORT, "main").await?;
    let archive = Archive::open(&log, None, 0)?;
    for number in 1..=5 {
        let segment = Segment { timeline: 1, number };
        let content = vec![number as u8; SEGMENT as usize];
        archive.put_whole(segment, Default::default(), content).await?;
    }
    for (number, days) in BACKUPS {
        back_up(&mut log, number, days).await?;
    }
    Ok(log)
}

/// Takes a backup whose files nobody asks for.
async fn back_up(log: &mut Log, number: u8, days: i64) -> Result<()> {
    let stanza = log.stanza().clone();
    let (keys, scope) = (stanza.keys(), stanza.scope());
    let content = vec![number; PACK];
    let pack = PackRef {
        name: sha256(&content),
        header: ObjectHeader::new(ObjectKind::Pack, keys.epoch, [number; 32]),
    };
    stanza
        .store()
        .put_hashed(&names::pack(&pack.name), Bytes::from(content).into())
        .await?;
    let run = IndexRun {
        packs: vec![pack],
        entries: vec![IndexEntry {
            id: [number; 32],
            pack: 0,
            ordinal: 0,
            offset: 80,
            stored_len: 100,
        }],
    };
    let run = seal_run(keys, scope, env::salt(stanza.env())?, run)?;
    let hash = sha256(&run);
    stanza
        .store()
        .put_hashed(&names::index_run(&hash), Bytes::from(run).into())
        .await?;
    let mut session = Session::begin(log, "backup", |_| number.to_string()).await?;
    session.announce(log, hash).await?;
    let start_lsn = u64::from(number) * SEGMENT;
    let info = proto::BackupInfo {
        id: number.to_string(),
        r#type: "full".to_owned(),
        system_identifier: SHORT.system_identifier,
        wal_segment_size: SEGMENT,
        start_timeline: 1,
        stop_timeline: 1,
        start_lsn: start_lsn + 40,
        stop_lsn: start_lsn + 400,
        stopped_us: stanza.env().now_us() - days * DAY_US,
        ..Default::default()
    };
    let usage = proto::Usage {
        packs: pack.name.to_vec(),
        live_bytes: vec![PACK as u64],
    };
    let facts = proto::Root {
        info: Some(info.clone()),
        ..Default::default()
    };
    let mut root = ObjectWriter::new(keys, scope, ObjectKind::Root, env::salt(stanza.env())?, "");
    root.message(KeyRole::Meta, &usage)?;
    root.message(KeyRole::Data, &facts)?;
    let root = root.finish();
    let hash = sha256(&root);
    stanza
        .store()
        .put_hashed(&names::root(&hash), Bytes::from(root).into())
        .await?;
    session.commit(log, hash, info).await?;
    Ok(())
}

/// Everything that a collection may delete, with lengths.
async fn content(store: &Store) -> Result<Vec<(String, u64)>> {
    let mut all = Vec::new();
    for folder in [names::PACKS, names::ROOTS, names::INDEX, names::WAL] {
        all.extend(store.list(&format!("acme/{folder}")).await?);
    }
    Ok(all)
}

/// The part of it below a folder.
fn below<'a>(content: &'a [(String, u64)], folder: &str) -> Vec<&'a str> {
    let prefix = format!("acme/{folder}/");
    let listed = content.iter().map(|(name, _)| name.as_str());
    listed.filter(|name| name.starts_with(&prefix)).collect()
}

async fn collect(log: &Log) -> Result<gc::Report, Error> {
    let options = gc::Options {
        dry_run: false,
        patience: Duration::from_millis(10),
    };
    gc::run(log, &options, &Progress::default()).await
}

/// The newest full backup stays, and what is held.
fn by_number() -> expire::Options {
    expire::Options {
        retention: Retention {
            full: Some(Keep::Count(1)),
            ..Default::default()
        },
        ..Default::default()
    }
}

fn hashes(content: &[(String, u64)], folder: &str) -> Vec<Vec<u8>> {
    let listed = below(content, folder).into_iter();
    listed.filter_map(names::parse_hash).map(|hash| hash.to_vec()).collect()
}

/// A mark that names all there is.
async fn everything(store: &Store) -> Result<Entry> {
    let content = content(store).await?;
    Ok(Entry::GcMark(proto::GcMark {
        packs: hashes(&content, names::PACKS),
        roots: hashes(&content, names::ROOTS),
        index_runs: hashes(&content, names::INDEX),
        seq: 0,
    }))
}

fn expired(backup: u8) -> Entry {
    Entry::Expired(proto::Expired {
        backup: backup.to_string(),
        ..Default::default()
    })
}

/// All WAL that there is.
fn expired_wal() -> Entry {
    Entry::ExpiredWal(proto::ExpiredWal {
        system_identifier: SHORT.system_identifier,
        timeline: 1,
        from_lsn: 0,
        to_lsn: 6 * SEGMENT,
        ..Default::default()
    })
}

/// Puts an entry behind the last one that is signed with the key of a host that writes, whoever it says has signed it.
/// Returns its number.
async fn sign_as(store: &Store, log: &Log, kind: Entry, role: Role) -> Result<u64> {
    let (scope, host) = (log.stanza().scope(), log.stanza().keys().write_only());
    ensure!(host.operator_seed.is_none() && host.writer_seed.is_some());
    let pretending = EpochKeys {
        operator_seed: host.writer_seed,
        ..host.clone()
    };
    let entry = proto::LogEntry {
        seq: log.state().seq + 1,
        previous: log.state().head.clone(),
        fence: log.state().fence,
        kind: Some(kind),
        ..Default::default()
    };
    let name = names::log_context(entry.seq);
    let salt = [entry.seq as u8; 32];
    let sealed = seal_entry(&pretending, scope, salt, &entry)?;
    let mut signed: proto::SignedEntry = open_message(&host, scope, ObjectKind::LogEntry, &sealed, &name, "an entry")?;
    signed.role = role as i32;
    let sealed = seal_message(
        &host,
        scope,
        ObjectKind::LogEntry,
        salt.map(|byte| !byte),
        &name,
        &signed,
    )?;
    store
        .put_hashed(&format!("acme/{name}"), Bytes::from(sealed).into())
        .await?;
    Ok(entry.seq)
}

/// A state without its place in the log.
fn placeless(state: &proto::Snapshot) -> proto::Snapshot {
    proto::Snapshot {
        seq: 0,
        head: Vec::new(),
        ..state.clone()
    }
}

/// Finds a kind of entry that a writer may say although it decides what goes, a signature that is not compared with the
/// role that the kind needs, and a collection that deletes before it has read the log to its end.
#[tokio::test]
async fn what_a_writer_says_in_the_operators_place_is_refused_and_deletes_nothing() -> Result<()> {
    let store = memory();
    let mut log = world(&store).await?;
    let access = access(&store, key(1));
    expire::hold(&mut log, "2", "a test", false).await?;
    expire::set_policy(&mut log, Some(86_400), Some(1)).await?;
    let before = (content(&store).await?, placeless(log.state()));
    let own = log.stanza().keys().to_bundle();
    let kinds = [
        expired(2),
        expired_wal(),
        everything(&store).await?,
        Entry::GcSwept(proto::GcSwept {
            index_runs: hashes(&before.0, names::INDEX),
            ..Default::default()
        }),
        Entry::Hold(proto::Hold {
            backup: "2".to_owned(),
            released: true,
            ..Default::default()
        }),
        Entry::Policy(proto::Policy::default()),
        Entry::SetFence(proto::Fence {
            fence: 7,
            ..Default::default()
        }),
        Entry::CloseTimeline(proto::CloseTimeline {
            system_identifier: SHORT.system_identifier,
            timeline: 1,
            ..Default::default()
        }),
        // Keys of its own, under which it would be the operator.
        Entry::KeyEpoch(proto::KeyEpoch {
            epoch: 2,
            writer_public_key: own.writer_public_key.clone(),
            operator_public_key: own.writer_public_key.clone(),
            ..Default::default()
        }),
        Entry::DistrustParser(proto::DistrustParser {
            parser_version: 2,
            ..Default::default()
        }),
        Entry::Erasure(proto::Erasure::default()),
    ];
    for kind in kinds {
        let entry = proto::LogEntry {
            kind: Some(kind.clone()),
            ..Default::default()
        };
        ensure!(required_role(&entry) == Some(Role::Operator), "{kind:?}");
        for (role, word) in [
            (Role::Writer, "it is signed as Writer and needs Operator"),
            (Role::Operator, "its signature is not of a key that may say this"),
        ] {
            let seq = sign_as(&store, &log, kind.clone(), role).await?;
            expect(open(&store).await, Kind::Damaged, word)?;
            expect(replay(&store).await, Kind::Damaged, word)?;
            let mut reader = log.clone();
            expect(reader.refresh().await, Kind::Damaged, word)?;
            ensure!(reader.state() == log.state(), "{kind:?} has an effect");
            let session = Session::begin(&mut log.clone(), "backup", |_| "later".to_owned()).await;
            expect(session, Kind::Damaged, word)?;
            expect(expire::run(&mut log.clone(), &by_number()).await, Kind::Damaged, word)?;
            expect(collect(&log).await, Kind::Damaged, word)?;
            ensure!(content(&store).await? == before.0, "{kind:?} has deleted something");
            // It stops everybody, as anything in that place would: until an operator takes it away.
            repair::entry::find(&access, seq).await?.drop().await?;
            log = open(&store).await?;
            ensure!(log.state().seq == seq && placeless(log.state()) == before.1, "{kind:?}");
        }
    }
    collect(&log).await?;
    ensure!(content(&store).await? == before.0);
    Ok(())
}

/// Finds a collection that believes marks, and what the log says has expired, without looking at what is used and at the
/// policy itself.
#[tokio::test]
async fn what_an_operator_says_against_the_policy_deletes_nothing_that_it_protects() -> Result<()> {
    let store = memory();
    let mut log = world(&store).await?;
    expire::set_policy(&mut log, Some(30 * 86_400), Some(2)).await?;
    let all = content(&store).await?;
    for entry in [expired(2), expired(3), expired_wal(), everything(&store).await?] {
        log.append(entry, |_| Ok(())).await?;
    }
    ensure!(log.state().backups.len() == 1 && log.state().open_marks.len() == 1);
    let report = collect(&log).await?;
    for id in ["2", "3"] {
        let line = format!("backup {id} has expired, and the signed policy keeps");
        ensure!(report.kept.iter().any(|kept| kept.starts_with(&line)), "{report:?}");
    }
    // Of WAL, what comes before the oldest of them is nobody's.
    let left = content(&store).await?;
    let gone: Vec<_> = all.iter().filter(|object| !left.contains(object)).collect();
    let first = Segment { timeline: 1, number: 1 };
    ensure!(
        gone.len() == 1 && gone[0].0.contains(&first.name(SEGMENT)) && left.len() + 1 == all.len(),
        "{gone:?}"
    );
    log.refresh().await?;
    ensure!(log.state().open_marks.is_empty(), "the mark has ended");

    // One who was fenced is not heard, although the key is the operator's.
    let fenced = log.state().fence;
    log.append(
        Entry::SetFence(proto::Fence {
            fence: fenced + 1,
            ..Default::default()
        }),
        |_| Ok(()),
    )
    .await?;
    let (seq, keys) = (log.state().seq + 1, log.stanza().keys().clone());
    let entry = proto::LogEntry {
        seq,
        previous: log.state().head.clone(),
        fence: fenced,
        kind: Some(expired(4)),
        ..Default::default()
    };
    let sealed = seal_entry(&keys, log.stanza().scope(), [seq as u8; 32], &entry)?;
    let name = format!("acme/{}", names::log_context(seq));
    store.put_hashed(&name, Bytes::from(sealed).into()).await?;
    let log = replay(&store).await?;
    ensure!(log.is_void(seq) && log.state().backups.len() == 1, "{:?}", log.state());
    collect(&log).await?;
    ensure!(content(&store).await? == left);

    // All of that is there to be deleted, once the operator lowers the policy.
    let mut log = log;
    expire::set_policy(&mut log, Some(0), Some(0)).await?;
    collect(&log).await?;
    let left = content(&store).await?;
    for folder in [names::PACKS, names::ROOTS, names::INDEX] {
        ensure!(below(&left, folder).len() == 1, "{left:?}");
    }
    let own = Segment { timeline: 1, number: 4 };
    let wal = below(&left, names::WAL);
    ensure!(wal.len() == 1 && wal[0].contains(&own.name(SEGMENT)), "{wal:?}");
    Ok(())
}

/// Somebody with a key that writes makes a snapshot of what the log should have said, and an entry that names it. Returns
/// the log as a host sees it that remembers nothing: it begins there.
async fn pretend(store: &Store, log: &mut Log, change: impl FnOnce(&mut proto::Snapshot)) -> Result<Log> {
    while !(log.state().seq + 1).is_multiple_of(16) {
        log.append(Entry::Operation(proto::Operation::default()), |_| Ok(()))
            .await?;
    }
    let host = log.stanza().keys().write_only();
    let mut state = log.state().clone();
    change(&mut state);
    ensure!(state != *log.state());
    let salt = [state.seq as u8; 32];
    let sealed = seal_message(&host, log.stanza().scope(), ObjectKind::Snapshot, salt, "", &state)?;
    let hash = sha256(&sealed);
    let name = format!("acme/{}", names::snapshot(state.seq, &hash));
    store.put_hashed(&name, Bytes::from(sealed).into()).await?;
    let entry = Entry::Operation(proto::Operation::default());
    forge(store, log, &host, entry, hash.to_vec()).await?;
    log.refresh().await?;
    let fresh = open(store).await?;
    ensure!(
        placeless(fresh.state()) == placeless(&state),
        "it is not begun with, and this shows nothing"
    );
    Ok(fresh)
}

/// Finds whoever signs as an operator what a snapshot made him believe.
#[tokio::test]
async fn nobody_decides_by_a_snapshot_what_goes() -> Result<()> {
    let store = memory();
    let mut log = world(&store).await?;
    expire::hold(&mut log, "2", "a test", false).await?;
    let all = content(&store).await?;
    let mut fresh = pretend(&store, &mut log, |state| state.holds.clear()).await?;
    let report = expire::run(&mut fresh, &by_number()).await?;
    let stays: Vec<_> = report
        .backups
        .iter()
        .filter(|b| b.keep)
        .map(|b| b.id.as_str())
        .collect();
    ensure!(stays == ["2", "4"], "{report:?}");
    collect(&fresh).await?;
    let left = content(&store).await?;
    ensure!(
        below(&left, names::PACKS).len() == 2 && all.len() > left.len(),
        "{left:?}"
    );

    // A policy that is not to be seen is not lowered by saying something else of it.
    log.refresh().await?;
    expire::set_policy(&mut log, Some(30 * 86_400), None).await?;
    let mut fresh = pretend(&store, &mut log, |state| state.policy = None).await?;
    let policy = expire::set_policy(&mut fresh, None, Some(3)).await?;
    ensure!((policy.minimum_retention_s, policy.minimum_full) == (30 * 86_400, 3));

    // Nor is a fence set that has no effect, because a higher one is hidden.
    log.refresh().await?;
    fence::fence_writers(&mut log, "one").await?;
    fence::fence_writers(&mut log, "another").await?;
    let fences = log.state().fence;
    let mut fresh = pretend(&store, &mut log, |state| state.fence = 0).await?;
    fence::fence_writers(&mut fresh, "a third").await?;
    let now = replay(&store).await?;
    ensure!(now.state().fence == fences + 1, "{} {fences}", now.state().fence);
    ensure!(!now.is_void(now.state().seq));
    Ok(())
}
