//! Entries that were changed, forged or lost, and what is none: each is found, and only what is no entry goes.

use super::*;

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
