//! Rules of the repository, on a directory, in memory and on an S3 server over HTTP.

mod stores;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::env::SystemEnv;
use fairvault_engine::error::Kind;
use fairvault_engine::postgres::segment::{Segment, WalFile};
use fairvault_engine::stanza::create::{Cluster, create};
use fairvault_engine::stanza::memory::Memory;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::probe::probe;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_engine::store::{Created, Store, StoreSettings};
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::get::{self, Needs};
use fairvault_format::keys::Secret;
use fairvault_tests::rgw::{self, Rgw};
use fairvault_tests::s3::{S3, free_port};
use fairvault_tests::{Scratch, tools};
use object_store::path::Path;
use object_store::{Attribute, ObjectStoreExt};

use stores::{CLUSTER, Fault, Faulty, access, key, memory};

/// The rules that every store has to carry.
async fn conformance(store: &Store) -> Result<()> {
    probe(store, &SystemEnv).await?;
    // Create-only, with the outcome known.
    ensure!(store.create("a/b", Bytes::from_static(b"1"), 64).await? == Created::Won);
    ensure!(
        store.create("a/b", Bytes::from_static(b"1"), 64).await? == Created::Won,
        "our own bytes are a win"
    );
    ensure!(store.create("a/b", Bytes::from_static(b"2"), 64).await? == Created::Lost(Bytes::from_static(b"1")));
    ensure!(store.get_opt("a/none", 64).await?.is_none() && store.len("a/none").await?.is_none());
    store
        .put_hashed("a/c", Bytes::from_static(b"0123456789").into())
        .await?;
    store
        .put_hashed("a/c", Bytes::from_static(b"0123456789").into())
        .await?;
    ensure!(store.get_range("a/c", 2..5).await? == "234" && store.get_range("a/c", 8..100).await? == "89");
    ensure!(store.list("a").await? == [("a/b".to_owned(), 1), ("a/c".to_owned(), 10)]);
    store.delete(&["a/c".to_owned(), "a/none".to_owned()]).await?;
    ensure!(store.get_opt("a/c", 64).await?.is_none());

    // A stanza: created twice is the same, another cluster or a wrong key is refused.
    let log = create(&access(store, key(1)), CLUSTER, "main").await?;
    ensure!(log.state().seq == 1);
    ensure!(create(&access(store, key(1)), CLUSTER, "main").await?.state().seq == 1);
    let other = Cluster {
        system_identifier: 8,
        ..CLUSTER
    };
    ensure!(
        create(&access(store, key(1)), other, "main")
            .await
            .is_err_and(|e| e.to_string().contains("system identifier"))
    );
    for (secret, word) in [
        (key(2), "wrong key"),
        (None, "is encrypted"),
        (Some(Secret::Passphrase(b"x".to_vec())), "of a kind"),
    ] {
        match Stanza::open(&access(store, secret)).await {
            Ok(_) => bail!("{word}: it opened"),
            Err(error) => ensure!(
                error.to_string().contains(word) && error.kind() == Kind::Refused,
                "{error}"
            ),
        }
    }
    // Writers at once: every entry has its own place.
    let writers = (0..6).map(|i| {
        let store = store.clone();
        async move {
            let mut log = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
            let session = Session::begin(&mut log, "test", |_| format!("b{i}")).await?;
            session.abort(&mut log, "over").await
        }
    });
    for result in futures::future::join_all(writers).await {
        result?;
    }
    let log = Log::open(Stanza::open(&access(store, key(1))).await?).await?;
    ensure!(
        log.state().seq == 13 && log.state().open_sessions.is_empty(),
        "{}",
        log.state().seq
    );
    Ok(())
}

#[tokio::test]
async fn conformance_in_memory() -> Result<()> {
    conformance(&memory()).await
}

#[tokio::test]
async fn conformance_in_a_directory() -> Result<()> {
    let scratch = Scratch::new("dir")?;
    let url = RepositoryUrl {
        url: format!("file://{}/repo", scratch.path().display()),
        ..Default::default()
    };
    ensure!(
        url.open(false).is_err_and(|e| e.kind() == Kind::Temporary),
        "a missing folder is never made in passing"
    );
    conformance(&url.open(true)?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_is_in_the_folder_although_that_comes_and_goes() -> Result<()> {
    let scratch = Scratch::new("comesandgoes")?;
    let (folder, aside) = (scratch.join("repo"), scratch.join("aside"));
    let url = RepositoryUrl {
        url: format!("file://{}", folder.display()),
        retry_timeout: Some(Duration::from_millis(1)),
        ..Default::default()
    };
    let store = url.open(true)?;
    std::fs::write(folder.join("fairvault.json"), "{}")?;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (from, to, stopped) = (folder.clone(), aside.clone(), stop.clone());
    let mover = std::thread::spawn(move || -> std::io::Result<()> {
        while !stopped.load(Ordering::Relaxed) {
            std::fs::rename(&from, &to)?;
            std::thread::sleep(Duration::from_millis(1));
            // A write that was on its way may have made a new folder in its place.
            while std::fs::rename(&to, &from).is_err() {
                let _ = std::fs::remove_dir_all(&from);
            }
            std::thread::sleep(Duration::from_millis(8));
        }
        Ok(())
    });
    let mut won = Vec::new();
    let began = std::time::Instant::now();
    let mut number = 0;
    while began.elapsed() < Duration::from_secs(4) {
        number += 1;
        let name = format!("wal/{number}/x");
        match store.create(&name, Bytes::from_static(b"1"), 64).await {
            Ok(Created::Won) => won.push(name),
            _ => tokio::time::sleep(Duration::from_micros(200)).await,
        }
    }
    stop.store(true, Ordering::Relaxed);
    ensure!(mover.join().is_ok_and(|moved| moved.is_ok()));
    ensure!(won.len() > 100, "{} of {number} were stored", won.len());
    for name in &won {
        ensure!(folder.join(name).exists(), "{name} was acknowledged, and is lost");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conformance_on_s3() -> Result<()> {
    let scratch = Scratch::new("s3")?;
    let server = S3::start(&scratch, "bucket")?;
    let url = RepositoryUrl {
        url: "s3://bucket/some/prefix".into(),
        endpoint: Some(server.endpoint()),
        region: Some("us-east-1".into()),
        access_key: Some("test".into()),
        secret_key: Some("testsecret".to_owned().into()),
        ..Default::default()
    };
    conformance(&url.open(false)?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conformance_on_radosgw() -> Result<()> {
    if !tools::is_full() {
        eprintln!("Ceph's radosgw is part of `cargo xtask test --full`");
        return Ok(());
    }
    let scratch = Scratch::new("rgw")?;
    let server = Rgw::start(&scratch)?;
    server.bucket("bucket")?;
    let url = RepositoryUrl {
        url: "s3://bucket/some/prefix".into(),
        endpoint: Some(server.endpoint()),
        region: Some("us-east-1".into()),
        access_key: Some(rgw::ACCESS_KEY.into()),
        secret_key: Some(rgw::SECRET_KEY.to_owned().into()),
        ..Default::default()
    };
    conformance(&url.open(false)?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conformance_on_azure() -> Result<()> {
    if !tools::is_full() {
        eprintln!("the emulator of Azure is part of `cargo xtask test --full`");
        return Ok(());
    }
    // The account of the emulator, which is the same everywhere.
    const ACCOUNT: &str = "devstoreaccount1";
    const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
    let scratch = Scratch::new("azure")?;
    let port = free_port()?.to_string();
    let mut server = std::process::Command::new(tools::install_azurite()?)
        .args([
            "--inMemoryPersistence",
            "--skipApiVersionCheck",
            "--silent",
            "--blobPort",
            &port,
        ])
        .current_dir(scratch.path())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let endpoint = format!("http://127.0.0.1:{port}/{ACCOUNT}");
    let url = RepositoryUrl {
        url: "az://vault/some/prefix".into(),
        endpoint: Some(endpoint),
        access_key: Some(ACCOUNT.into()),
        secret_key: Some(KEY.to_owned().into()),
        ..Default::default()
    };
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let made = fairvault_tests::run(std::process::Command::new("python3").args(["-c", MAKE_CONTAINER, &port, KEY]));
    let result = match made {
        Ok(_) => conformance(&url.open(false)?).await,
        Err(error) => Err(error),
    };
    server.kill()?;
    server.wait()?;
    result
}

/// Makes the container `vault` on the Azure emulator, by a request signed with the account's key.
const MAKE_CONTAINER: &str = r#"
import base64, email.utils, hashlib, hmac, sys, urllib.request
port, key = sys.argv[1:]
date = email.utils.formatdate(usegmt=True)
resource = "/devstoreaccount1/devstoreaccount1/vault\nrestype:container"
text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n{resource}"
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
request = urllib.request.Request(
    f"http://127.0.0.1:{port}/devstoreaccount1/vault?restype=container", method="PUT",
    headers={"x-ms-date": date, "x-ms-version": "2021-08-06", "Authorization": f"SharedKey devstoreaccount1:{signature}"})
urllib.request.urlopen(request).read()
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_probe_sees_through_s3s_fs() -> Result<()> {
    if !tools::is_full() {
        eprintln!("s3s-fs is part of `cargo xtask test --full`");
        return Ok(());
    }
    let scratch = Scratch::new("s3s")?;
    let root = scratch.join("root");
    std::fs::create_dir_all(root.join("bucket"))?;
    let port = free_port()?.to_string();
    let mut server = std::process::Command::new(tools::install_s3s_fs()?)
        .args([
            "--access-key",
            "test",
            "--secret-key",
            "testsecret",
            "--host",
            "127.0.0.1",
            "--port",
            &port,
        ])
        .arg(&root)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let url = RepositoryUrl {
        url: "s3://bucket".into(),
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        region: Some("us-east-1".into()),
        access_key: Some("test".into()),
        secret_key: Some("testsecret".to_owned().into()),
        retry_timeout: Some(std::time::Duration::from_secs(10)),
        ..Default::default()
    };
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let probed = probe(&url.open(false)?, &SystemEnv).await;
    server.kill()?;
    server.wait()?;
    let error = probed.err().map(|e| (e.kind(), e.to_string()));
    ensure!(
        error
            .as_ref()
            .is_some_and(|(kind, text)| *kind == Kind::Refused && text.contains("conditionally")),
        "{error:?}"
    );
    Ok(())
}

#[tokio::test]
async fn an_unencrypted_stanza_must_be_meant() -> Result<()> {
    let store = memory();
    create(&access(&store, None), CLUSTER, "main").await?;
    Stanza::open(&access(&store, None)).await?;
    let error = Stanza::open(&access(&store, key(1)))
        .await
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(error.contains("not encrypted"), "{error}");
    Ok(())
}

#[tokio::test]
async fn opening_stays_cheap_after_ten_thousand_entries() -> Result<()> {
    let faulty = Faulty::new(Fault::None);
    let store = faulty.store();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    while log.state().seq < 10_007 {
        Session::begin(&mut log, "test", |_| "x".into())
            .await?
            .abort(&mut log, "")
            .await?;
    }
    let before = faulty.requests.load(Ordering::Relaxed);
    let fresh = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    let cost = faulty.requests.load(Ordering::Relaxed) - before;
    ensure!(fresh.state().seq == log.state().seq);
    ensure!(cost <= 24, "a host without a memory needed {cost} requests");
    // A host with a memory.
    let scratch = Scratch::new("cheap")?;
    let with_memory = Access {
        memory: Some(Memory::new(scratch.join("cache"))),
        ..access(&store, key(1))
    };
    Log::open(Stanza::open(&with_memory).await?).await?;
    let before = faulty.requests.load(Ordering::Relaxed);
    Log::open(Stanza::open(&with_memory).await?).await?;
    let cost = faulty.requests.load(Ordering::Relaxed) - before;
    ensure!(cost <= 2, "a host with a memory needed {cost} requests");
    Ok(())
}

#[tokio::test]
async fn lost_answers_are_resolved() -> Result<()> {
    let faulty = Faulty::new(Fault::LostAnswers);
    let store = faulty.store();
    for i in 0..30 {
        let name = format!("x/{i}");
        ensure!(
            store.create(&name, Bytes::from_static(b"mine"), 64).await? == Created::Won,
            "{i}"
        );
        ensure!(
            store.create(&name, Bytes::from_static(b"other"), 64).await? == Created::Lost(Bytes::from_static(b"mine"))
        );
    }
    let mut log = create(
        &Access {
            ..access(&Faulty::new(Fault::None).store(), key(1))
        },
        CLUSTER,
        "main",
    )
    .await?;
    Session::begin(&mut log, "test", |_| "x".into())
        .await?
        .abort(&mut log, "")
        .await?;
    Ok(())
}

#[tokio::test]
async fn throttled_lists_are_asked_again() -> Result<()> {
    let store = Faulty::new(Fault::ThrottledLists).store();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    for _ in 0..10 {
        Session::begin(&mut log, "test", |_| "x".into())
            .await?
            .abort(&mut log, "")
            .await?;
        store.list("acme/log").await?;
    }
    Ok(())
}

/// Absence is said only after a second look: the segment may have been completed, and its pieces removed, meanwhile.
#[tokio::test]
async fn a_segment_that_is_stored_while_it_is_looked_for_is_found() -> Result<()> {
    let faulty = Faulty::new(Fault::LateWal);
    let log = create(&access(&faulty.store(), key(1)), CLUSTER, "main").await?;
    let archive = Archive::open(&log, None, 3)?;
    let scratch = Scratch::new("late")?;
    let to = scratch.join("segment");
    let segment = Segment { timeline: 1, number: 1 };
    let content = vec![7; CLUSTER.wal_segment_size as usize];
    archive.put_whole(segment, Default::default(), content.clone()).await?;
    let open = async |_: &()| Ok(Some(Archive::open(&log, None, 3)?));
    let get = async |segment: Segment| {
        let name = segment.name(CLUSTER.wal_segment_size);
        get::get(&[()], open, &name, &to, Needs::default()).await
    };
    ensure!(get(segment).await? == get::Outcome::Delivered && std::fs::read(&to)? == content);
    ensure!(get(segment.next()).await? == get::Outcome::Absent, "there is none");
    Ok(())
}

#[tokio::test]
async fn a_segment_is_written_while_it_arrives_and_again_if_it_breaks_off() -> Result<()> {
    let faulty = Faulty::new(Fault::CutWal);
    let log = create(&access(&faulty.store(), key(1)), CLUSTER, "main").await?;
    let archive = Archive::open(&log, None, 3)?;
    let scratch = Scratch::new("arriving")?;
    let (segment, size) = (Segment { timeline: 1, number: 1 }, CLUSTER.wal_segment_size as usize);
    // A part compresses, so that sections differ in length.
    let mut random = 1u64;
    let content: Vec<u8> = (0..size)
        .map(|at| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if at < size / 3 { 7 } else { (random >> 56) as u8 }
        })
        .collect();
    archive.put_whole(segment, Default::default(), content.clone()).await?;
    let to = scratch.join("segment");
    for time in 0..8 {
        ensure!(archive.write_whole(segment, &to).await?, "{time}");
        ensure!(std::fs::read(&to)? == content, "{time}");
        std::fs::remove_file(&to)?;
    }
    // Asked for beforehand, to be waited for as a whole or not.
    let name = segment.name(CLUSTER.wal_segment_size);
    let open = async |others: &bool| Archive::open_for(log.stanza().clone(), None, &name, *others).await;
    for others in [false, true] {
        for time in 0..4 {
            let outcome = get::get(&[others], open, &name, &to, Needs::default()).await?;
            ensure!(outcome == get::Outcome::Delivered, "{time}");
            ensure!(std::fs::read(&to)? == content, "{time}");
            std::fs::remove_file(&to)?;
        }
    }
    ensure!(
        !archive.write_whole(segment.next(), &to).await? && !to.exists(),
        "there is none"
    );
    // Of a damaged one, nothing stays.
    let name = archive.object_name(&WalFile::Segment(segment), &name);
    let path = Path::from(format!("acme/{name}"));
    let mut bytes = faulty.inner.get(&path).await?.bytes().await?.to_vec();
    let at = bytes.len() - 100_000;
    bytes[at] ^= 1;
    faulty.inner.put(&path, bytes.into()).await?;
    for time in 0..4 {
        let error = archive.write_whole(segment, &to).await.err().map(|e| e.kind());
        ensure!(error == Some(Kind::Damaged), "{time}: {error:?}");
        ensure!(!to.exists(), "{time}");
    }
    Ok(())
}

#[tokio::test]
async fn a_store_that_overwrites_is_refused() -> Result<()> {
    let faulty = Faulty::new(Fault::NoConditionalCreate);
    let error = create(&access(&faulty.store(), key(1)), CLUSTER, "main").await.err();
    let error = error.map(|e| (e.to_string(), e.advice().map(str::to_owned)));
    ensure!(
        error
            .as_ref()
            .is_some_and(|(text, advice)| text.contains("conditionally")
                && advice.as_ref().is_some_and(|a| a.contains("single_writer"))),
        "{error:?}"
    );
    // Said explicitly, it works.
    let settings = StoreSettings {
        single_writer: true,
        ..Default::default()
    };
    let faulty = Faulty::new(Fault::NoConditionalCreate);
    let store = Store::new(faulty.clone(), "", "faulty://", settings.clone());
    let error = create(&access(&store, key(1)), CLUSTER, "main").await.err();
    ensure!(
        error.is_some_and(|e| e.to_string().contains("cache folder")),
        "without a lock, processes of one host could meet"
    );
    let scratch = Scratch::new("single")?;
    let settings = StoreSettings {
        lock_file: Some(scratch.join("lock")),
        ..settings
    };
    let store = Store::new(faulty.clone(), "", "faulty://", settings);
    create(&access(&store, key(1)), CLUSTER, "main").await?;
    // Writers of this host wait for each other.
    let writers = (0..6).map(|i| {
        let store = store.clone();
        async move {
            let mut log = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
            Session::begin(&mut log, "test", |_| format!("b{i}")).await?;
            Ok::<_, fairvault_engine::error::Error>(())
        }
    });
    for result in futures::future::join_all(writers).await {
        result?;
    }
    let mut log = Log::open(Stanza::open(&access(&store, key(1))).await?).await?;
    ensure!(log.state().seq == 7 && log.state().open_sessions.len() == 6);
    // Who relies on conditional create must not join in.
    let other = Log::open(Stanza::open(&access(&faulty.store(), key(1))).await?).await;
    let error = Session::begin(&mut other?, "test", |_| "x".into()).await.err();
    ensure!(error.as_ref().is_some_and(|e| e.kind() == Kind::Refused), "{error:?}");
    log.refresh().await?;
    ensure!(log.state().seq == 7);
    Ok(())
}

#[tokio::test]
async fn sizes_and_classes_are_kept_to() -> Result<()> {
    let inner = Arc::new(object_store::memory::InMemory::new());
    let settings = StoreSettings {
        storage_class: Some("STANDARD_IA".into()),
        ..Default::default()
    };
    let store = Store::new(inner.clone(), "", "memory://", settings);
    for name in ["packs/00/ab", "roots/ab", "index/ab"] {
        store.put_hashed(name, Bytes::from_static(b"0123456789").into()).await?;
        let class = inner
            .get(&Path::from(name))
            .await?
            .attributes
            .get(&Attribute::StorageClass)
            .map(|value| value.to_string());
        ensure!(class.is_some() == name.starts_with("packs/"), "{name}: {class:?}");
    }
    ensure!(store.get("roots/ab", 10).await?.len() == 10);
    let error = store.get("roots/ab", 9).await.err();
    ensure!(error.as_ref().is_some_and(|e| e.kind() == Kind::Damaged), "{error:?}");
    ensure!(store.get_range("roots/ab", 20..30).await?.is_empty(), "behind the end");
    let url = RepositoryUrl {
        url: "s3://bucket".into(),
        storage_class: Some("deep_archive".into()),
        ..Default::default()
    };
    ensure!(url.open(false).is_err_and(|e| e.kind() == Kind::Usage));
    Ok(())
}
