//! The log: one order of everything, that nobody can rewrite, shorten or forge unseen.

mod damaged;
#[path = "../stores/mod.rs"]
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
