//! The log: one order of everything, that nobody can rewrite, shorten or forge unseen.

mod stores;

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::commit::state;
use fairvault_engine::error::{Error, Kind};
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::repair;
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::stanza::memory::Memory;
use fairvault_engine::stanza::upgrade::{Claims, upgrade};
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::Store;
use fairvault_format::keys::{self, EpochKeys};
use fairvault_format::log::seal_entry;
use fairvault_format::names;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_tests::Scratch;

use stores::{CLUSTER, Fault, Faulty, access, key, memory};

fn entry(seq: u64) -> String {
    format!("acme/log/{seq:020}")
}

async fn open(store: &Store) -> Result<Log, Error> {
    Log::open(Stanza::open(&access(store, key(1))).await?).await
}

/// A stanza with `sessions` sessions that were begun and aborted.
async fn with_sessions(store: &Store, sessions: usize) -> Result<Log> {
    let mut log = create(&access(store, key(1)), CLUSTER, "main").await?;
    for _ in 0..sessions {
        Session::begin(&mut log, "test", |_| "x".into())
            .await?
            .abort(&mut log, "")
            .await?;
    }
    Ok(log)
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

#[tokio::test]
async fn a_dead_creator_leaves_nothing_in_the_way() -> Result<()> {
    let store = memory();
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    // As if it had died between the key slot and the first log entry.
    store.delete(&[format!("acme/log/{:020}", 1)]).await?;
    ensure!(create(&access(&store, key(1)), CLUSTER, "main").await?.state().seq == 1);
    Ok(())
}

/// A store that has these of another one's objects; others of them come as soon as a folder is listed.
async fn with_late(of: &Faulty, folder: &'static str, late: &str, left_out: &str) -> Result<Arc<Faulty>> {
    let store = Faulty::new(Fault::LateOnceListed(folder));
    for (path, bytes) in of.objects().await? {
        let name = path.to_string();
        if name.contains(late) {
            store.late.lock().expect("one at a time").push((path, bytes));
        } else if !name.contains(left_out) {
            store.store().put_hashed(&name, bytes.into()).await?;
        }
    }
    Ok(store)
}

#[tokio::test]
async fn whoever_comes_second_is_told_who_was_first() -> Result<()> {
    let host = fairvault_tests::fixture::host_name()?;
    let first = Faulty::new(Fault::None);
    let mut log = create(&access(&first.store(), key(1)), CLUSTER, "main").await?;
    let by = format!(" on {host} at 20");

    // Two create it: a slot says since when, an entry says who.
    let store = with_late(&first, "keys", "acme/keys/", "acme/log/").await?.store();
    let said = create(&access(&store, key(1)), CLUSTER, "main").await;
    expect(said, Kind::Held, "just now: keys/00000001/main was made at 20")?;
    let store = with_late(&first, "packs", "acme/log/", "nothing").await?.store();
    let said = create(&access(&store, key(1)), CLUSTER, "main").await;
    expect(said, Kind::Held, &by)?;
    create(&access(&store, key(1)), CLUSTER, "main").await?;

    // Two go on with another cluster each.
    let to = |system_identifier| Cluster {
        system_identifier,
        ..CLUSTER
    };
    upgrade(
        &mut log,
        &access(&first.store(), key(1)),
        to(8),
        Lsn(0),
        Claims::default(),
    )
    .await?;
    let late = with_late(&first, "", &entry(2), "nothing").await?;
    let hidden = std::mem::take(&mut *late.late.lock().expect("one at a time"));
    let access = access(&late.store(), key(1));
    let mut log = Log::open(Stanza::open(&access).await?).await?;
    *late.late.lock().expect("one at a time") = hidden;
    let said = upgrade(&mut log, &access, to(9), Lsn(0), Claims::default()).await;
    let said = said.err().context("both have won")?;
    ensure!(said.kind() == Kind::Held, "{said}");
    let said = said.to_string();
    ensure!(said.contains(&by) && said.contains("(entry 2 of the log)"), "{said}");
    Ok(())
}

#[tokio::test]
async fn lost_key_slots_are_not_replaced_by_new_ones() -> Result<()> {
    let scratch = Scratch::new("slots")?;
    let store = memory();
    with_sessions(&store, 1).await?;
    for (name, _) in store.list("acme/keys").await? {
        store.delete(&[name]).await?;
    }
    expect(
        create(&access(&store, key(1)), CLUSTER, "main").await,
        Kind::Refused,
        "no key slots",
    )?;
    // The same with only packs left, and with nothing left but what this host remembers.
    let store = memory();
    store.put_hashed("acme/packs/00/00", Bytes::new().into()).await?;
    expect(
        create(&access(&store, key(1)), CLUSTER, "main").await,
        Kind::Refused,
        "no key slots",
    )?;
    let remembering = |store: &Store| Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(store, key(1))
    };
    create(&remembering(&memory()), CLUSTER, "main").await?;
    expect(
        create(&remembering(&memory()), CLUSTER, "main").await,
        Kind::Refused,
        "this host knows",
    )?;
    Ok(())
}

#[tokio::test]
async fn a_creation_that_died_is_not_continued_with_keys_that_are_gone() -> Result<()> {
    let scratch = Scratch::new("died")?;
    let store = memory();
    let remembering = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    create(&remembering, CLUSTER, "main").await?;
    // As if it had died before its log was remembered, and then everything was deleted.
    for head in fairvault_tests::fixture::files(&scratch.join("cache")) {
        if head.ends_with("head") {
            std::fs::remove_file(head)?;
        }
    }
    for (name, _) in store.list("acme").await? {
        store.delete(&[name]).await?;
    }
    expect(
        create(&remembering, CLUSTER, "main").await,
        Kind::Refused,
        "this host knows",
    )
}

#[tokio::test]
async fn a_lost_log_and_a_lost_description_are_not_made_anew() -> Result<()> {
    let store = memory();
    let log = with_sessions(&store, 1).await?;
    store.put_hashed("acme/roots/00", Bytes::new().into()).await?;
    // The description's id is in every slot.
    store.delete(&["fairvault.json".to_owned()]).await?;
    let again = create(&access(&store, key(1)), CLUSTER, "main").await?;
    ensure!(again.stanza().scope() == log.stanza().scope() && again.state() == log.state());
    for (name, _) in store.list("acme/log").await? {
        store.delete(&[name]).await?;
    }
    expect(
        create(&access(&store, key(1)), CLUSTER, "main").await,
        Kind::Damaged,
        "its log was lost",
    )
}

#[tokio::test]
async fn a_bad_slot_does_not_lock_out_the_others() -> Result<()> {
    let store = memory();
    let log = with_sessions(&store, 0).await?;
    store
        .put_hashed("acme/keys/00000001/aaa", Bytes::from_static(b"garbage").into())
        .await?;
    let foreign = keys::Scope {
        stanza: [9; 16],
        ..*log.stanza().scope()
    };
    let sealed = keys::seal_slot(
        &foreign,
        log.stanza().keys(),
        "bbb",
        key(7).as_ref(),
        keys::default_argon2(),
        [1; 32],
        0,
    )?;
    store
        .put_hashed("acme/keys/00000001/bbb", Bytes::from(sealed).into())
        .await?;
    open(&store).await?;
    Ok(())
}

#[tokio::test]
async fn a_log_that_was_rolled_back_is_refused() -> Result<()> {
    let scratch = Scratch::new("memory")?;
    let store = memory();
    let with_memory = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    let mut log = create(&with_memory, CLUSTER, "main").await?;
    for _ in 0..3 {
        Session::begin(&mut log, "test", |_| "x".into())
            .await?
            .abort(&mut log, "")
            .await?;
    }
    store.delete(&[format!("acme/log/{:020}", log.state().seq)]).await?;
    let error = Log::open(Stanza::open(&with_memory).await?)
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(error.contains("rolled back"), "{error}");
    // A host without a memory cannot know.
    Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    Ok(())
}

/// Finds whoever is told to drop an entry of another log that is longer than what this host saw.
#[tokio::test]
async fn another_log_that_goes_on_is_not_called_a_bad_entry() -> Result<()> {
    let scratch = Scratch::new("other")?;
    let store = memory();
    let last = with_sessions(&store, 1).await?.state().seq;
    let with_memory = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    let mut remembering = Log::open(Stanza::open(&with_memory).await?).await?;
    remembering.prove().await?;
    store.delete(&[entry(last)]).await?;
    let mut other = open(&store).await?;
    while other.state().seq <= last {
        other.append(Entry::Hold(proto::Hold::default()), |_| Ok(())).await?;
    }
    let word = "this host saw another entry";
    expect(Log::open(Stanza::open(&with_memory).await?).await, Kind::Damaged, word)?;
    expect(remembering.prove().await, Kind::Damaged, word)
}

#[tokio::test]
async fn a_missing_entry_is_not_taken_for_the_end() -> Result<()> {
    let store = memory();
    let mut log = with_sessions(&store, 4).await?;
    store.delete(&[entry(5)]).await?;
    expect(open(&store).await, Kind::Damaged, "is missing")?;
    // Whoever has read it before goes on, and a new entry never fills the gap.
    log.append(Entry::Hold(proto::Hold::default()), |_| Ok(())).await?;
    ensure!(store.len(&entry(5)).await?.is_none() && store.len(&entry(10)).await?.is_some());
    Ok(())
}

#[tokio::test]
async fn two_backups_of_one_second_get_two_names() -> Result<()> {
    let store = memory();
    let mut log = with_sessions(&store, 0).await?;
    let mut other = open(&store).await?;
    let name = |now: &proto::Snapshot| {
        let free = ["a", "b", "c"]
            .into_iter()
            .find(|id| !state::is_taken(now, id, "backup"));
        free.unwrap_or_default().to_owned()
    };
    let first = Session::begin(&mut log, "backup", name).await?;
    let second = Session::begin(&mut other, "backup", name).await?;
    ensure!((first.backup(), second.backup()) == ("a", "b"));
    for (session, log) in [(first, &mut log), (second, &mut other)] {
        let info = proto::BackupInfo {
            id: session.backup().to_owned(),
            ..Default::default()
        };
        session.commit(log, [0; 32], info).await?;
    }
    // A writer that commits a taken id all the same, in a session of another name: it is void, and the log opens.
    let session = Session::begin(&mut other, "backup", |_| "c".into()).await?;
    let info = proto::BackupInfo {
        id: "a".into(),
        ..Default::default()
    };
    session.commit(&mut other, [1; 32], info).await?;
    let log = open(&store).await?;
    ensure!(log.state().backups.len() == 2, "{}", log.state().backups.len());
    ensure!(log.backup("a")?.root == [0; 32]);
    Ok(())
}

#[tokio::test]
async fn a_fenced_session_cannot_commit() -> Result<()> {
    let store = memory();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    let mut other = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    let session = Session::begin(&mut log, "backup", |_| "b".into()).await?;
    other.refresh().await?;
    let begun = other.state().open_sessions[0].begin.clone().unwrap_or_default();
    let fence = proto::Fence {
        fence: 1,
        sessions: vec![begun.session],
        reason: "test".into(),
    };
    other.append(Entry::SetFence(fence), |_| Ok(())).await?;
    let error = session
        .commit(&mut log, [0; 32], proto::BackupInfo::default())
        .await
        .err();
    ensure!(error.is_some_and(|e| e.kind() == Kind::Held));
    ensure!(log.state().backups.is_empty());
    Ok(())
}

#[tokio::test]
async fn tampering_with_the_log_is_found() -> Result<()> {
    let store = memory();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    Session::begin(&mut log, "test", |_| "x".into())
        .await?
        .abort(&mut log, "")
        .await?;
    for (seq, from) in [(2u64, 3u64), (3, 2)] {
        let name = |n: u64| format!("acme/log/{n:020}");
        let (there, other) = (
            store.get(&name(seq), 1 << 20).await?,
            store.get(&name(from), 1 << 20).await?,
        );
        store.put_hashed(&name(seq), other.into()).await?;
        let error = Log::open(Stanza::open(&access(&store, key(1))).await?)
            .await
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        ensure!(error.contains("does not open"), "an entry in another's place: {error}");
        let mut flipped = there.to_vec();
        flipped[100] ^= 1;
        store.put_hashed(&name(seq), Bytes::from(flipped).into()).await?;
        ensure!(Log::open(Stanza::open(&access(&store, key(1))).await?).await.is_err());
        let mut newer = there.to_vec();
        newer[4] = 2;
        store.put_hashed(&name(seq), Bytes::from(newer).into()).await?;
        let error = Log::open(Stanza::open(&access(&store, key(1))).await?).await.err();
        ensure!(
            error.is_some_and(|e| e.kind() == Kind::Unsupported),
            "a newer version is unsupported, not damaged"
        );
        store.put_hashed(&name(seq), there.into()).await?;
    }
    Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    Ok(())
}

#[tokio::test]
async fn a_log_that_is_signed_by_others_is_forged() -> Result<()> {
    let store = memory();
    let log = with_sessions(&store, 0).await?;
    let stanza = log.stanza().clone();
    // Somebody who knows the metadata key, but not the signing keys, writes a log of their own.
    let forged = EpochKeys {
        writer_seed: Some([8; 32]),
        operator_seed: Some([9; 32]),
        ..stanza.keys().clone()
    };
    let bundle = forged.to_bundle();
    let mut genesis = log.state().genesis.clone().context("genesis")?;
    if let Some(epoch) = &mut genesis.key_epoch {
        epoch.writer_public_key = bundle.writer_public_key.clone();
        epoch.operator_public_key = bundle.operator_public_key.clone();
    }
    let first = proto::LogEntry {
        seq: 1,
        previous: vec![0; 32],
        kind: Some(Entry::Genesis(genesis)),
        ..Default::default()
    };
    let sealed = seal_entry(&forged, stanza.scope(), [3; 32], &first)?;
    store.put_hashed(&entry(1), Bytes::from(sealed).into()).await?;
    expect(open(&store).await, Kind::Damaged, "forged")?;
    Ok(())
}

#[tokio::test]
async fn damaged_snapshots_only_cost_reading() -> Result<()> {
    let store = memory();
    let log = with_sessions(&store, 40).await?;
    let snapshots = store.list("acme/snapshots").await?;
    ensure!(snapshots.len() >= 4);
    for (name, _) in snapshots {
        let mut bytes = store.get(&name, 1 << 20).await?.to_vec();
        bytes[100] ^= 1;
        store.put_hashed(&name, Bytes::from(bytes).into()).await?;
    }
    ensure!(open(&store).await?.state() == log.state());
    Ok(())
}

/// Whoever may create objects can put something where the next entry belongs, and then nobody gets past it: until an
/// operator takes it away, on purpose and by its number.
#[tokio::test]
async fn what_is_no_entry_is_dropped_on_purpose() -> Result<()> {
    let store = memory();
    let last = with_sessions(&store, 3).await?.state().seq;
    let good = store.get(&entry(last), 1 << 20).await?;
    let mut flipped = good.to_vec();
    flipped[100] ^= 1;
    let mut epoch = good.to_vec();
    epoch[8..12].copy_from_slice(&77u32.to_le_bytes());
    let bad = [
        // More than an entry may have.
        Bytes::from(vec![7; 17 << 20]),
        Bytes::new(),
        Bytes::from_static(b"garbage"),
        good.slice(..good.len() - 1),
        good.clone(),
        flipped.into(),
        epoch.into(),
    ];
    let access = access(&store, key(1));
    let mut seq = last;
    for content in bad {
        seq += 1;
        store.put_hashed(&entry(seq), content.clone().into()).await?;
        let error = open(&store).await.err().context("it is read")?;
        let advice = error.advice().unwrap_or_default().to_owned();
        ensure!(
            error.kind() == Kind::Refused || advice.contains(&format!("--drop-entry {seq}")),
            "{error} {advice}"
        );
        for other in [1, seq - 1, seq + 1] {
            expect(
                repair::entry::find(&access, other).await,
                Kind::Refused,
                &format!("--drop-entry {seq}"),
            )?;
        }
        let found = repair::entry::find(&access, seq).await?;
        ensure!(content.starts_with(&found.content) && found.len == content.len() as u64);
        ensure!(found.object == names::log_context(seq));
        found.drop().await?;
        // It says so itself, in the place of what it dropped; and the log goes on.
        let log = open(&store).await?;
        ensure!(log.state().seq == seq);
        let all = Log::replay(log.stanza().clone()).await?;
        let said = all.entries().last().and_then(|entry| entry.kind.clone());
        ensure!(
            matches!(&said, Some(Entry::Operation(o)) if o.result.contains("no entry") && o.bytes == content.len() as u64),
            "{said:?}"
        );
        expect(
            repair::entry::find(&access, seq).await,
            Kind::Refused,
            "nothing to drop",
        )?;
    }
    Ok(())
}

/// What whoever may create objects leaves behind the end of the log is no sign of an entry that is missing, wherever it lies,
/// and each of it can be taken away.
#[tokio::test]
async fn what_is_no_entry_stops_nobody_from_behind_the_end() -> Result<()> {
    let store = memory();
    let mut log = with_sessions(&store, 3).await?;
    let (last, access) = (log.state().seq, access(&store, key(1)));
    let far = 999_999;
    // The bytes of an entry, in a folder below: that is no name of the log.
    let (number, there) = (last - 1, store.get(&entry(last - 1), 1 << 20).await?);
    store
        .put_hashed(&format!("acme/log/z/{number:020}"), there.into())
        .await?;
    let put = async |seq: u64, content: Bytes| store.put_hashed(&entry(seq), content.into()).await;
    put(far, Bytes::from_static(b"garbage")).await?;
    // An entry of another place, one of a newer version, one of unknown keys, and more than one may have.
    let good = store.get(&entry(last), 1 << 20).await?;
    let (mut newer, mut epoch) = (good.to_vec(), good.to_vec());
    newer[4] = 2;
    epoch[8..12].copy_from_slice(&77u32.to_le_bytes());
    let others = [good, newer.into(), epoch.into(), Bytes::from(vec![7; 17 << 20])];
    for (number, content) in (10..).zip(others) {
        put(last + number, content).await?;
    }
    ensure!(open(&store).await?.state().seq == last);
    Log::replay(log.stanza().clone()).await?;
    log.append(Entry::Hold(proto::Hold::default()), |_| Ok(())).await?;
    let found = repair::entry::find(&access, far).await?;
    ensure!(found.object == names::log_context(far) && &found.content[..] == b"garbage");
    found.drop().await?;
    expect(
        repair::entry::find(&access, far).await,
        Kind::Refused,
        "nothing to drop",
    )?;
    ensure!(store.len(&entry(far)).await?.is_none());
    let all = Log::replay(log.stanza().clone()).await?;
    let said = all.entries().last().and_then(|entry| entry.kind.clone());
    ensure!(
        matches!(&said, Some(Entry::Operation(o)) if o.subject == names::log_context(far)),
        "{said:?}"
    );
    // What a newer version wrote stays.
    expect(
        repair::entry::find(&access, last + 11).await,
        Kind::Unsupported,
        "version 2",
    )?;
    // Two beside each other: one goes after the other, the one that the log is stuck at first.
    let next = all.state().seq + 1;
    for seq in [next, next + 1] {
        put(seq, Bytes::from_static(b"garbage")).await?;
    }
    expect(
        repair::entry::find(&access, next + 1).await,
        Kind::Refused,
        &format!("--drop-entry {next}"),
    )?;
    for seq in [next, next + 1] {
        let error = open(&store).await.err().context("it is read")?;
        let advice = format!("--drop-entry {seq}");
        ensure!(error.advice().is_some_and(|text| text.contains(&advice)), "{error}");
        repair::entry::find(&access, seq).await?.drop().await?;
    }
    ensure!(open(&store).await?.state().seq == next + 1);
    Ok(())
}

/// An entry that proves itself says that those before it are missing: then nobody goes on, and nothing is dropped.
#[tokio::test]
async fn a_later_entry_shows_that_one_is_missing() -> Result<()> {
    let store = memory();
    let log = with_sessions(&store, 3).await?;
    let (last, access) = (log.state().seq, access(&store, key(1)));
    let later = |seq: u64, keys: &EpochKeys| -> Result<Bytes> {
        let later = proto::LogEntry {
            seq,
            previous: vec![5; 32],
            kind: Some(Entry::Operation(proto::Operation::default())),
            ..Default::default()
        };
        Ok(seal_entry(keys, log.stanza().scope(), [seq as u8; 32], &later)?.into())
    };
    // Sealed with the right key, and signed by nobody who may.
    let forged = EpochKeys {
        writer_seed: Some([8; 32]),
        ..log.stanza().keys().clone()
    };
    let content = later(last + 9, &forged)?;
    store.put_hashed(&entry(last + 9), content.into()).await?;
    open(&store).await?;
    let content = later(last + 9, log.stanza().keys())?;
    store.put_hashed(&entry(last + 9), content.into()).await?;
    expect(open(&store).await, Kind::Damaged, "is missing")?;
    store
        .put_hashed(&entry(last + 5), Bytes::from_static(b"garbage").into())
        .await?;
    for seq in [last + 5, last + 9] {
        expect(repair::entry::find(&access, seq).await, Kind::Damaged, "is missing")?;
    }
    store
        .put_hashed(&entry(last + 1), Bytes::from_static(b"garbage").into())
        .await?;
    expect(
        repair::entry::find(&access, last + 1).await,
        Kind::Damaged,
        "it was an entry once",
    )
}

/// A host that remembers the log knows what was an entry, and what was taken away with it.
#[tokio::test]
async fn what_this_host_has_seen_is_not_dropped() -> Result<()> {
    let store = memory();
    let last = with_sessions(&store, 3).await?.state().seq;
    let scratch = Scratch::new("seenentry")?;
    let access = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    Log::open(Stanza::open(&access).await?).await?;
    for rotten in [last, last - 1] {
        // What is behind it is gone, so that it looks like the end.
        for gone in rotten + 1..=last {
            store.delete(&[entry(gone)]).await?;
        }
        store
            .put_hashed(&entry(rotten), Bytes::from_static(b"bit rot").into())
            .await?;
        let found = repair::entry::find(&access, rotten).await.map(|_| ());
        expect(found, Kind::Damaged, &format!("this host saw another entry {last}"))?;
    }
    // The first one is what the stanza was created with.
    store
        .put_hashed(&entry(1), Bytes::from_static(b"bit rot").into())
        .await?;
    for gone in 2..=last {
        store.delete(&[entry(gone)]).await?;
    }
    let forgetful = Access { memory: None, ..access };
    let error = repair::entry::find(&forgetful, 1)
        .await
        .err()
        .context("it would be dropped")?;
    ensure!(
        error.advice().is_some_and(|advice| advice.contains("the first entry")),
        "{error}"
    );
    Ok(())
}

/// What was an entry once, what a newer version wrote, and what this secret does not open stays.
#[tokio::test]
async fn what_may_be_an_entry_is_not_dropped() -> Result<()> {
    let store = memory();
    let last = with_sessions(&store, 3).await?.state().seq;
    let access = access(&store, key(1));
    let middle = store.get(&entry(last - 1), 1 << 20).await?;
    store
        .put_hashed(&entry(last - 1), Bytes::from_static(b"bit rot").into())
        .await?;
    expect(
        repair::entry::find(&access, last - 1).await,
        Kind::Damaged,
        "it was an entry once",
    )?;
    store.put_hashed(&entry(last - 1), middle.clone().into()).await?;
    let mut newer = middle.to_vec();
    newer[4] = 2;
    store.put_hashed(&entry(last + 1), Bytes::from(newer).into()).await?;
    expect(repair::entry::find(&access, last + 1).await, Kind::Unsupported, "")?;
    // Between the look and the deed, somebody else has put the log in order, and has written on.
    store
        .put_hashed(&entry(last + 1), Bytes::from_static(b"garbage").into())
        .await?;
    let (one, other) = (
        repair::entry::find(&access, last + 1).await?,
        repair::entry::find(&access, last + 1).await?,
    );
    one.drop().await?;
    expect(other.drop().await, Kind::Temporary, "is another object by now")?;
    ensure!(open(&store).await?.state().seq == last + 1);
    Ok(())
}
