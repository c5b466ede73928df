//! Key epochs in the log: old keys say nothing any more, rotations that die or meet leave nothing in the way, and slots
//! open everything or nothing.

mod stores;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::error::{Error, Kind};
use fairvault_engine::repair;
use fairvault_engine::stanza::create::{DataKeys, create, new_keys};
use fairvault_engine::stanza::memory::Memory;
use fairvault_engine::stanza::rotate::{self, Options, Rotated};
use fairvault_engine::stanza::slots::{self, Opens};
use fairvault_engine::stanza::{Access, Stanza, read_slot};
use fairvault_engine::store::{Store, StoreSettings};
use fairvault_format::header::Kind as ObjectKind;
use fairvault_format::keys::{EpochKeys, Secret};
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{names, object, sha256};
use fairvault_tests::Scratch;
use fairvault_tests::fixture::{files, host_name};
use object_store::memory::InMemory;
use object_store::throttle::{ThrottleConfig, ThrottledStore};

use stores::{CLUSTER, Fault, Faulty, access, forge, key, memory};

async fn open(access: &Access) -> Result<Log, Error> {
    Log::open(Stanza::open(access).await?).await
}

async fn rotated(access: &Access, options: &Options) -> Result<Rotated, Error> {
    let mut log = open(access).await?;
    let plan = rotate::plan(&mut log, access, options).await?;
    rotate::rotate(&log, access, options, plan).await
}

fn to_new(byte: u8) -> Options {
    Options {
        new_secret: key(byte),
        ..Options::default()
    }
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

fn hold(backup: &str) -> Entry {
    Entry::Hold(proto::Hold {
        backup: backup.to_owned(),
        ..Default::default()
    })
}

#[tokio::test]
async fn old_keys_say_nothing_any_more() -> Result<()> {
    let store = memory();
    let access = access(&store, key(1));
    create(&access, CLUSTER, "main").await?;
    let done = rotated(&access, &Options::default()).await?;
    ensure!((done.from, done.to) == (1, 2) && done.slots == ["main"] && done.dropped.is_empty());
    let mut log = open(&access).await?;
    let stanza = log.stanza().clone();
    ensure!(stanza.keys().epoch == 2, "the newest keys write");
    let old = stanza.keys_of(1)?.clone();

    // The operator's old key holds nothing, and makes no keys of its own the newest ones.
    forge(&store, &log, &old, hold("forged"), Vec::new()).await?;
    log.refresh().await?;
    let own = new_keys(stanza.env(), 9, DataKeys::Symmetric)?;
    let bundle = own.to_bundle();
    let epoch = proto::KeyEpoch {
        epoch: 9,
        writer_public_key: bundle.writer_public_key.clone(),
        operator_public_key: bundle.operator_public_key.clone(),
        ..Default::default()
    };
    forge(&store, &log, &old, Entry::KeyEpoch(epoch), Vec::new()).await?;
    // They keep their places, and the log goes on behind them.
    let seq = log.append(hold("honest"), |_| Ok(())).await?;
    ensure!(seq == 5, "{seq}");
    for log in [open(&access).await?, Log::replay(Stanza::open(&access).await?).await?] {
        let holds: Vec<_> = log.state().holds.iter().map(|hold| hold.backup.as_str()).collect();
        ensure!(holds == ["honest"] && log.state().key_epochs.len() == 2, "{holds:?}");
        ensure!((1..=5).filter(|seq| log.is_void(*seq)).eq([3, 4]));
    }

    // A role key signs for its own epoch only; and what no entry names is no epoch.
    let mixed = EpochKeys {
        operator_seed: old.operator_seed,
        ..stanza.keys().clone()
    };
    forge(&store, &log, &mixed, hold("mixed"), Vec::new()).await?;
    expect(open(&access).await, Kind::Damaged, "its signature is not")?;
    let unnamed = new_keys(stanza.env(), 3, DataKeys::Symmetric)?;
    slots::put(&stanza, &unnamed, "main", access.secret.as_ref()).await?;
    forge(&store, &log, &unnamed, hold("unnamed"), Vec::new()).await?;
    expect(open(&access).await, Kind::Damaged, "its signature is not")
}

/// Whose secret does not open the newest epoch cannot tell a good entry from a bad one, whatever epoch its header names.
#[tokio::test]
async fn with_old_keys_no_entry_is_dropped() -> Result<()> {
    let store = memory();
    let old = access(&store, key(1));
    create(&old, CLUSTER, "main").await?;
    rotated(&old, &to_new(2)).await?;
    let new = access(&store, key(2));
    let log = open(&new).await?;
    // It is void, and an entry.
    let void = log.state().seq + 1;
    forge(&store, &log, log.stanza().keys_of(1)?, hold("x"), Vec::new()).await?;
    ensure!(open(&new).await?.state().seq == void);
    let error = repair::entry::find(&old, void).await.err();
    let error = error.context("it would be dropped")?;
    ensure!(
        error.advice().is_some_and(|advice| advice.contains("every key epoch")),
        "{error} {:?}",
        error.advice()
    );
    Ok(())
}

#[tokio::test]
async fn a_state_made_with_old_keys_is_not_believed() -> Result<()> {
    let store = memory();
    let access = access(&store, key(1));
    let mut log = create(&access, CLUSTER, "main").await?;
    let before = log.state().clone();
    rotated(&access, &to_new(2)).await?;
    let access = Access {
        secret: key(2),
        ..access
    };
    while log.state().seq < 15 {
        log = open(&access).await?;
        log.append(hold("x"), |_| Ok(())).await?;
    }
    // As if there never had been a rotation.
    let stanza = log.stanza().clone();
    let old = stanza.keys_of(1)?;
    let state = proto::Snapshot {
        seq: 15,
        head: log.state().head.clone(),
        fence: 7,
        ..before
    };
    let sealed = object::seal_message(old, stanza.scope(), ObjectKind::Snapshot, [5; 32], "", &state)?;
    let hash = sha256(&sealed);
    let name = format!("acme/{}", names::snapshot(15, &hash));
    store.put_hashed(&name, Bytes::from(sealed).into()).await?;
    forge(&store, &log, old, hold("forged"), hash.to_vec()).await?;
    let mut fresh = open(&access).await?;
    ensure!(fresh.state().seq == 16 && fresh.state().fence == 0 && fresh.stanza().keys().epoch == 2);
    // An honest snapshot of the new epoch is begun with.
    while fresh.state().seq < 34 {
        fresh.append(hold("y"), |_| Ok(())).await?;
    }
    for seq in 2..=20 {
        store.delete(&[format!("acme/{}", names::log_context(seq))]).await?;
    }
    ensure!(open(&access).await?.state().seq == 34);
    Ok(())
}

#[tokio::test]
async fn a_session_does_not_outlive_its_keys() -> Result<()> {
    let store = memory();
    let access = access(&store, key(1));
    let mut log = create(&access, CLUSTER, "main").await?;
    let mut session = Session::begin(&mut log, "backup", |_| "a".into()).await?;
    let mut idle = open(&access).await?;
    rotated(&access, &Options::default()).await?;
    expect(session.announce(&mut log, [1; 32]).await, Kind::Held, "were rotated")?;
    let info = proto::BackupInfo::default();
    expect(
        session.commit(&mut log, [0; 32], info).await,
        Kind::Held,
        "were rotated",
    )?;
    ensure!(log.state().backups.is_empty() && log.state().index_runs.is_empty());
    // The next one is of the new keys; so is what a process writes that has waited since before.
    let begun = Session::begin(&mut idle, "backup", |_| "b".into()).await;
    expect(begun, Kind::Held, "were rotated")?;
    let session = Session::begin(&mut idle, "backup", |_| "b".into()).await?;
    session.commit(&mut idle, [0; 32], proto::BackupInfo::default()).await?;
    ensure!(idle.state().backups[0].key_epoch == 2 && idle.stanza().keys().epoch == 2);
    Ok(())
}

#[tokio::test]
async fn of_two_rotations_one_wins_and_one_that_died_is_gone_on_with() -> Result<()> {
    let store = memory();
    let access = access(&store, key(1));
    let options = Options::default();
    create(&access, CLUSTER, "main").await?;
    let (mut one, mut two) = (open(&access).await?, open(&access).await?);
    let plans = (
        rotate::plan(&mut one, &access, &options).await?,
        rotate::plan(&mut two, &access, &options).await?,
    );
    rotate::rotate(&one, &access, &options, plans.0).await?;
    let error = rotate::rotate(&two, &access, &options, plans.1).await.err();
    let error = error.context("both have won")?;
    let said = error.to_string();
    ensure!(
        error.kind() == Kind::Held && said.contains("somebody else rotates"),
        "{said}"
    );
    let host = host_name()?;
    ensure!(
        said.contains(&format!(" on {host} at 20")) && said.contains("(entry 2 of the log)"),
        "{said}"
    );

    // Slots without an entry: nobody writes with their keys, until the rotation is run again.
    let log = open(&access).await?;
    let left = new_keys(log.stanza().env(), 3, DataKeys::Symmetric)?;
    slots::put(log.stanza(), &left, "main", access.secret.as_ref()).await?;
    let mut log = open(&access).await?;
    ensure!(log.stanza().newest_slot() == 3 && log.stanza().keys().epoch == 2);
    log.append(hold("x"), |_| Ok(())).await?;
    ensure!(rotated(&access, &options).await?.to == 3);
    let log = open(&access).await?;
    ensure!(log.stanza().keys().encode() == left.encode());

    // But not if somebody else may know them.
    let left = new_keys(log.stanza().env(), 4, DataKeys::Symmetric)?;
    slots::put(log.stanza(), &left, "main", key(8).as_ref()).await?;
    ensure!(rotated(&access, &options).await?.to == 5);
    // A garbage slot is nobody's, and in nobody's way once it is left out.
    store
        .put_hashed("acme/keys/00000005/bad", Bytes::from_static(b"x").into())
        .await?;
    expect(rotated(&access, &options).await, Kind::Refused, "bad")?;
    let options = Options {
        drop_slots: true,
        ..options
    };
    let done = rotated(&access, &options).await?;
    ensure!(done.to == 6 && done.dropped == ["bad"]);
    Ok(())
}

#[tokio::test]
async fn whose_new_keys_a_secret_does_not_open_it_is_told_all_the_same() -> Result<()> {
    let store = memory();
    let access = access(&store, key(1));
    create(&access, CLUSTER, "main").await?;
    let (mut one, mut two) = (open(&access).await?, open(&access).await?);
    let (to_one, to_two) = (to_new(2), to_new(3));
    let plans = (
        rotate::plan(&mut one, &access, &to_one).await?,
        rotate::plan(&mut two, &access, &to_two).await?,
    );
    rotate::rotate(&one, &access, &to_one, plans.0).await?;
    let late = rotate::rotate(&two, &access, &to_two, plans.1).await;
    expect(late, Kind::Held, "(entry 2 of the log)")?;

    // A slot that no entry names yet says since when it is there.
    let store = memory();
    let access = self::access(&store, key(1));
    create(&access, CLUSTER, "main").await?;
    let mut log = open(&access).await?;
    let plan = rotate::plan(&mut log, &access, &Options::default()).await?;
    let other = new_keys(log.stanza().env(), 2, DataKeys::Symmetric)?;
    slots::put(log.stanza(), &other, "main", access.secret.as_ref()).await?;
    let outrun = rotate::rotate(&log, &access, &Options::default(), plan).await;
    expect(outrun, Kind::Held, "keys/00000002/main was made at 20")
}

#[tokio::test]
async fn a_host_that_remembers_hears_of_a_rotation_and_then_pays_no_more_than_before() -> Result<()> {
    let scratch = Scratch::new("keyhosts")?;
    let faulty = Faulty::new(Fault::None);
    let host = |name: &str, secret: Option<Secret>| Access {
        memory: Some(Memory::new(scratch.join(name))),
        ..access(&faulty.store(), secret)
    };
    let count = async |access: &Access| -> Result<(u64, u32), Error> {
        let before = faulty.requests.load(std::sync::atomic::Ordering::Relaxed);
        let log = open(access).await?;
        let now = faulty.requests.load(std::sync::atomic::Ordering::Relaxed);
        Ok((now - before, log.stanza().keys().epoch))
    };
    let (one, two) = (host("one", key(1)), host("two", key(1)));
    create(&one, CLUSTER, "main").await?;
    count(&two).await?;
    let (usual, epoch) = count(&two).await?;
    ensure!(usual == 2 && epoch == 1, "{usual} requests");
    rotated(&one, &Options::default()).await?;
    ensure!(count(&two).await?.1 == 2, "it has heard of it");
    for host in [&one, &two] {
        let (requests, epoch) = count(host).await?;
        ensure!(requests == usual && epoch == 2, "{requests} requests");
    }
    // With a new secret, the old one is refused, whatever this host remembers.
    rotated(&one, &to_new(2)).await?;
    for name in ["one", "two", "three"] {
        expect(open(&host(name, key(1))).await, Kind::Refused, "were rotated")?;
        ensure!(count(&host(name, key(2))).await?.1 == 3);
        ensure!(count(&host(name, key(2))).await? == (usual, 3));
    }
    Ok(())
}

#[tokio::test]
async fn slots_open_all_epochs_or_are_refused() -> Result<()> {
    let store = memory();
    let access = access(&store, key(1));
    create(&access, CLUSTER, "main").await?;
    rotated(&access, &Options::default()).await?;
    let with = |byte: u8| Access {
        secret: key(byte),
        ..access.clone()
    };
    let second = key(2).context("a key")?;
    let mut log = open(&access).await?;
    // As if it had died after the first of two epochs.
    slots::put(log.stanza(), log.stanza().keys_of(1)?, "spare", Some(&second)).await?;
    expect(open(&with(2)).await, Kind::Refused, "were rotated")?;
    ensure!(slots::add(&mut log, &access, "spare", &second, Opens::All).await? == 1);
    ensure!(
        slots::add(&mut log, &access, "spare", &second, Opens::All).await? == 0,
        "nothing to do"
    );
    ensure!(open(&with(2)).await?.stanza().keys().epoch == 2);
    let third = key(3).context("a key")?;
    expect(
        slots::add(&mut log, &access, "spare", &third, Opens::All).await,
        Kind::Refused,
        "already has another slot",
    )?;

    // Keys cannot be wrapped for a secret that is not at hand.
    expect(rotated(&access, &Options::default()).await, Kind::Refused, "spare")?;
    // What the configured secret needs is not removed; anything else is, in all epochs.
    expect(
        slots::remove(&mut log, &access, "main").await,
        Kind::Refused,
        "without slot main",
    )?;
    expect(
        slots::remove(&mut log, &access, "none").await,
        Kind::NotFound,
        "no slot",
    )?;
    let mut by_spare = open(&with(2)).await?;
    ensure!(slots::remove(&mut by_spare, &with(2), "main").await? == 2);
    expect(open(&access).await, Kind::Refused, "wrong key")?;
    // A rotation to a secret that has slots already keeps their name.
    let done = rotated(&with(2), &to_new(2)).await?;
    ensure!(done.slots == ["spare"] && done.dropped.is_empty() && done.to == 3);
    Ok(())
}

/// A store that takes its time, so that two who are at work take turns.
fn slow(inner: &Arc<InMemory>, delete: Duration) -> Store {
    let each = Duration::from_millis(1);
    let config = ThrottleConfig {
        wait_get_per_call: each,
        wait_put_per_call: each,
        wait_list_per_call: each,
        wait_delete_per_call: delete,
        ..Default::default()
    };
    let store = ThrottledStore::new(inner.clone(), config);
    Store::new(Arc::new(store), "", "slow://", StoreSettings::default())
}

/// A stanza with two slots, of two operators.
async fn with_two(store: &Store) -> Result<(Access, Access)> {
    let one = access(store, key(1));
    let mut log = create(&one, CLUSTER, "main").await?;
    let second = key(2).context("a key")?;
    slots::add(&mut log, &one, "other", &second, Opens::All).await?;
    let two = Access {
        secret: key(2),
        ..one.clone()
    };
    Ok((one, two))
}

#[tokio::test(start_paused = true)]
async fn of_two_who_remove_each_others_slot_one_is_refused() -> Result<()> {
    let store = slow(&Arc::default(), Duration::from_millis(1));
    let (one, two) = with_two(&store).await?;
    let (mut first, mut second) = (open(&one).await?, open(&two).await?);
    let (one_done, two_done) = tokio::join!(
        slots::remove(&mut first, &one, "other"),
        slots::remove(&mut second, &two, "main")
    );
    let left = store.list("acme/keys").await?;
    ensure!(left.len() == 1, "{left:?}");
    let (winner, loser) = match one_done.is_ok() {
        true => (one, two_done),
        false => (two, one_done),
    };
    expect(loser, Kind::Refused, "without slot")?;
    open(&winner).await?;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_slot_that_somebody_began_to_remove_counts_as_gone() -> Result<()> {
    let inner = Arc::new(InMemory::new());
    let store = slow(&inner, Duration::from_millis(1));
    let (one, two) = with_two(&store).await?;
    // Somebody stands still between the entry and the deletion.
    let stuck = access(&slow(&inner, Duration::from_secs(3600)), key(1));
    let mut log = open(&stuck).await?;
    let removal = slots::remove(&mut log, &stuck, "other");
    ensure!(tokio::time::timeout(Duration::from_secs(600), removal).await.is_err());
    ensure!(store.list("acme/keys").await?.len() == 2);
    let mut log = open(&two).await?;
    let refused = slots::remove(&mut log, &two, "main").await;
    expect(refused, Kind::Refused, "slot other (entry ")?;
    // What others write meanwhile is no reason.
    let mut beside = open(&two).await?;
    let holding = async {
        for at in 0..5 {
            beside.append(hold(&at.to_string()), |_| Ok(())).await?;
        }
        Ok::<_, Error>(())
    };
    // Another slot counts, and the one who stood still is run again.
    let second = key(2).context("a key")?;
    ensure!(slots::add(&mut log, &two, "spare", &second, Opens::All).await? == 1);
    let (removed, held) = tokio::join!(slots::remove(&mut log, &two, "main"), holding);
    held?;
    ensure!(removed? == 1);
    ensure!(slots::remove(&mut log, &two, "other").await? == 1);
    expect(open(&one).await, Kind::Refused, "wrong key")?;
    open(&two).await?;
    Ok(())
}

#[tokio::test]
async fn a_log_from_before_a_rotation_is_refused_where_the_newer_one_was_seen() -> Result<()> {
    let scratch = Scratch::new("rolledkeys")?;
    let store = memory();
    let remembered = Memory::new(scratch.join("cache"));
    let host = Access {
        memory: Some(remembered.clone()),
        ..access(&store, key(1))
    };
    create(&host, CLUSTER, "main").await?;
    rotated(&host, &Options::default()).await?;
    let mut log = open(&host).await?;
    log.append(hold("x"), |_| Ok(())).await?;
    let repository = log.stanza().scope().repository;

    // What is remembered of slots may be older than what is remembered of the log: that is no doubt, where all is there.
    let entry = format!("acme/{}", names::log_context(log.state().seq));
    let kept = store.get(&entry, 1 << 20).await?;
    let old = read_slot(&store.folder("acme"), &names::slot(1, "main"), &repository).await?;
    remembered.remember_slots(&host, std::slice::from_ref(&old));
    ensure!(open(&host).await?.state().seq == log.state().seq);
    store.delete(std::slice::from_ref(&entry)).await?;
    remembered.remember_slots(&host, std::slice::from_ref(&old));
    expect(open(&host).await, Kind::Damaged, "rolled back")?;
    store.put_hashed(&entry, kept.into()).await?;
    open(&host).await?;

    // All that was newer goes, and this host has the slots anew.
    let rotation = format!("acme/{}", names::log_context(log.state().seq - 1));
    let slot = format!("acme/{}", names::slot(2, "main"));
    store.delete(&[entry, rotation, slot]).await?;
    for _ in 0..2 {
        remembered.forget_slots(&host);
        expect(open(&host).await, Kind::Damaged, "rolled back")?;
        let replayed = Log::replay(Stanza::open(&host).await?).await;
        expect(replayed, Kind::Damaged, "does not open")?;
        let archiving = Log::open_to_archive(Stanza::open(&host).await?).await;
        expect(archiving, Kind::Damaged, "rolled back")?;
    }
    // A host without a memory cannot know.
    open(&access(&store, key(1))).await?;
    Ok(())
}

#[tokio::test]
async fn a_damaged_memory_of_the_log_holds_up_whoever_can_wait() -> Result<()> {
    let scratch = Scratch::new("tornhead")?;
    let store = memory();
    let host = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    create(&host, CLUSTER, "main").await?;
    let is_head = |path: &std::path::PathBuf| path.ends_with("head");
    let head = files(&scratch.join("cache")).into_iter().find(is_head);
    let head = head.context("a head")?;
    std::fs::write(&head, b"torn")?;
    let error = open(&host).await.err().context("it went well")?;
    let path = head.display().to_string();
    ensure!(
        error.kind() == Kind::Damaged && error.to_string().contains(&path),
        "{error}"
    );
    ensure!(error.advice().is_some_and(|advice| advice.contains(&path)));
    // WAL goes on, and what somebody has to look at stays.
    let mut log = Log::open_to_archive(Stanza::open(&host).await?).await?;
    log.append(hold("x"), |_| Ok(())).await?;
    ensure!(std::fs::read(&head)? == b"torn");
    std::fs::remove_file(&head)?;
    open(&host).await?;
    ensure!(head.exists());
    Ok(())
}
