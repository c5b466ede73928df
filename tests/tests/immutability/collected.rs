//! What `gc` deletes of versions, and what it leaves: what is needed, read, protected or locked, whatever hides it.

use super::*;

pub async fn versions_are_collected(server: &Server) -> Result<()> {
    let w = World::new("versions", server, false, "retention = { full = 1 }")?;
    w.backup()?;
    w.until_packs_are_unused()?;
    let before = w.objects().await?;
    let (exit, done) = w.gc()?;
    ensure!(exit == 0, "{done}");
    let gone = &done["versions"]["deleted"];
    ensure!(done["versions"]["locked"]["objects"] == 0, "{done}");
    ensure!(gone["bytes"].as_u64() >= done["packs"]["bytes"].as_u64(), "{done}");
    let after = w.objects().await?;
    let is_collected = |name: &str| {
        ["packs", "roots", "index", "wal"]
            .iter()
            .any(|f| name.starts_with(&format!("acme/{f}/")))
    };
    let versions = |objects: &[Object]| -> usize {
        let all = objects.iter().filter(|object| is_collected(&object.name));
        all.map(|object| object.versions.len()).sum()
    };
    ensure!(versions(&after) < versions(&before), "{before:?} {after:?}");
    for object in after.iter().filter(|object| is_collected(&object.name)) {
        ensure!(object.is_visible() && object.versions.len() == 1, "{object:?}");
    }
    let leases = after.iter().filter(|object| object.name.starts_with("acme/leases/"));
    ensure!(leases.count() == 0, "{after:?}");

    // Whoever hides what is needed does not have it deleted.
    let needed: Vec<_> = after.iter().filter(|object| is_collected(&object.name)).collect();
    for object in &needed {
        w.store.delete(std::slice::from_ref(&object.name)).await?;
    }
    let (exit, said) = w.s.fairvault(&["gc", "acme", "--patience", "1s", "--progress", "none"]);
    ensure!(exit != 0, "a backup's manifest cannot be seen: {said}");
    for object in needed.iter().filter(|object| object.name.starts_with("acme/roots/")) {
        let hidden = w.store.all_versions(&object.name).await?;
        ensure!(w.store.delete_version(&object.name, &hidden[0].versions[0].id).await? == Deleted::Gone);
    }
    let (exit, done) = w.gc()?;
    ensure!(exit == 0, "{done}");
    let contents: BTreeMap<_, _> = w
        .objects()
        .await?
        .into_iter()
        .map(|object| (object.name.clone(), object))
        .collect();
    for object in needed {
        let now = contents.get(&object.name).context(object.name.clone())?;
        ensure!(now.contents().count() == 1, "{now:?}");
    }
    w.report(&["repair"])?;
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    Ok(())
}

/// A manifest that somebody hides is no reason to let go of what the signed policy protects.
pub async fn what_is_protected_and_hidden_is_not_collected(server: &Server) -> Result<()> {
    let w = World::new("protected", server, false, "retention = { full = 1 }")?;
    w.backup()?;
    w.until_packs_are_unused()?;
    // One backup is live, the newest; the others have expired, and are protected from now on.
    let visible = async || -> Result<Vec<Object>> {
        let mut roots = w.store.all_versions("acme/roots/").await?;
        roots.retain(Object::is_visible);
        roots.sort_by_key(|root| root.versions[0].modified_us);
        Ok(roots)
    };
    let roots = visible().await?;
    let (_, expired) = roots.split_last().context("a manifest")?;
    ensure!(!expired.is_empty());
    w.s.ok(&["policy", "acme", "--minimum-retention", "1d"])?;
    for root in expired {
        w.store.delete(std::slice::from_ref(&root.name)).await?;
    }
    let before = w.packs().await?;
    let (exit, done) = w.gc()?;
    ensure!(exit == 0 && done["packs"]["objects"] == 0, "{exit} {done}");
    ensure!(w.packs().await? == before);
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(exit == 0 && visible().await?.len() == roots.len(), "{repaired}");
    // Without the policy they go.
    w.s.ok(&["policy", "acme", "--minimum-retention", "0s"])?;
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["packs"]["objects"].as_u64() > Some(0) && visible().await?.len() == 1,
        "{exit} {done}"
    );
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    Ok(())
}

/// Nor is it one to let go of what is being read, although it has expired. Finds a sweep that takes a hidden manifest for
/// one that is gone, and deletes packs below a restore; and one that has kept a manifest, and lets it go once it is hidden.
/// Without the reader it goes for good: so it would be if another collector, who saw no reader, had deleted it meanwhile.
pub async fn what_is_read_and_hidden_is_not_collected(server: &Server) -> Result<()> {
    let w = World::new("readhidden", server, false, "retention = { full = 1 }")?;
    let (first, _) = w.backup()?;
    let manifests = w.store.all_versions("acme/roots/").await?;
    let [manifest] = &manifests[..] else {
        anyhow::bail!("{} manifests", manifests.len());
    };
    // Nothing of the first backup is used by what comes under other keys.
    w.s.ok(&["key", "rotate", "acme"])?;
    w.backup()?;
    w.s.ok(&["expire", "acme"])?;
    let access = w.access(Arc::new(SystemEnv))?;
    let stanza = Stanza::open(&access).await?;
    let before = w.packs().await?;

    // A reader whose heart beats faster than that of a restore.
    let lease = Lease::take(&stanza, [7; 16], "restore", &first).await?;
    let backup = first.clone();
    let reader = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if lease.narrow(&backup).await.is_err() {
                break;
            }
        }
    });
    // A sweep while everything can be seen has kept it, and has not deleted it.
    for is_hidden in [false, true] {
        if is_hidden {
            w.store.delete(std::slice::from_ref(&manifest.name)).await?;
        }
        let (exit, done) = w.report(&["gc", "--patience", "5s"])?;
        ensure!(exit == 0 && done["packs"]["objects"] == 0, "{exit} {done}");
        ensure!(done["kept"].to_string().contains("is being read"), "{done}");
        ensure!(w.packs().await? == before, "a pack is gone from below a reader");
        let now = w.store.all_versions(&manifest.name).await?;
        let content = now.iter().flat_map(Object::contents).count();
        ensure!(content == 1, "the manifest is gone from below a reader: {now:?}");
    }

    // Without the reader they go.
    reader.abort();
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["packs"]["objects"].as_u64() > Some(0) && w.packs().await?.len() < before.len(),
        "{exit} {done}"
    );
    // No listing shows the manifest, and yet that collection has marked it and says that it is gone.
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["versions"]["deleted"]["objects"].as_u64() > Some(0),
        "{exit} {done}"
    );
    let left = w.store.all_versions(&manifest.name).await?;
    ensure!(left.is_empty(), "a manifest that nobody needs stays for ever: {left:?}");
    // Once only.
    let marks = || -> Result<usize> { Ok(w.s.ok(&["audit", "acme"])?.matches("to be collected").count()) };
    let before = marks()?;
    let (exit, done) = w.gc()?;
    ensure!(exit == 0 && marks()? == before, "{exit} {done}");
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    Ok(())
}

pub async fn pieces_are_needed_until_something_whole_has_their_bytes(server: &Server) -> Result<()> {
    let w = World::new("pieces", server, false, "wal = { flush_interval = \"200ms\" }")?;
    w.backup()?;
    let pieces = async || -> Result<Vec<Object>> {
        let wal = w.store.all_versions("acme/wal/").await?;
        Ok(wal.into_iter().filter(|object| object.name.contains(".d/")).collect())
    };
    let receiver = Receiver::start(&w.s, &[])?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !pieces().await?.iter().any(Object::is_visible) {
        ensure!(Instant::now() < deadline, "no pieces: {}", receiver.text());
        w.s.sql("insert into t values (1)")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    receiver.stop()?;
    let mut hidden = BTreeSet::new();
    for piece in pieces().await?.iter().filter(|piece| piece.is_visible()) {
        w.store.delete(std::slice::from_ref(&piece.name)).await?;
        hidden.insert(piece.name.trim_start_matches("acme/").to_owned());
    }
    w.gc()?;
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && names_of(&repaired["hidden"], "object").is_superset(&hidden),
        "{hidden:?} {repaired}"
    );

    // Now the segment is there: its pieces are needed no more, and no version of them stays.
    w.s.flush_archive(&w.s.server)?;
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["versions"]["deleted"]["objects"].as_u64() >= Some(hidden.len() as u64),
        "{done}"
    );
    ensure!(pieces().await?.is_empty(), "{:?}", pieces().await?);
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && repaired["hidden"] == Value::Array(Vec::new()),
        "{repaired}"
    );
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    Ok(())
}

pub async fn wal_that_has_expired_stays_away(server: &Server, is_locked: bool) -> Result<()> {
    let name = if is_locked { "lockedwal" } else { "oldwal" };
    let w = World::new(name, server, is_locked, "retention = { full = 1 }")?;
    let (_, old) = w.backup()?;
    w.s.flush_archive(&w.s.server)?;
    let (_, first) = w.backup()?;
    let segments = async || -> Result<Vec<Object>> {
        let all = w.store.all_versions("acme/wal/").await?;
        let is_segment = |object: &Object| {
            object
                .name
                .rsplit('/')
                .next()
                .is_some_and(|name| name.starts_with("0000"))
        };
        Ok(all.into_iter().filter(is_segment).collect())
    };
    let is_old = |object: &Object| object.name.rsplit('/').next().is_some_and(|name| name[..24] < *first);
    let (expired, needed): (Vec<_>, Vec<_>) = segments().await?.into_iter().partition(is_old);
    ensure!(!needed.is_empty() && expired.iter().any(|object| object.name.contains(&old)));
    let content = |objects: &[Object]| objects.iter().map(|object| object.contents().count()).sum::<usize>();
    w.s.ok(&["expire", "acme"])?;
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["wal"]["objects"].as_u64() >= Some(expired.len() as u64),
        "{done}"
    );

    // By version where nothing is locked; else the versions stay, below delete markers.
    let now = segments().await?;
    let left: Vec<_> = now.iter().filter(|object| is_old(object)).cloned().collect();
    ensure!(left.iter().all(|object| !object.is_visible()), "{left:?}");
    match is_locked {
        true => ensure!(content(&left) == content(&expired), "{left:?}"),
        false => ensure!(left.is_empty(), "{left:?}"),
    }
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && repaired["hidden"] == Value::Array(Vec::new()),
        "{repaired}"
    );

    // Of what somebody hides, what is needed comes back, and only that; collection in between changes nothing.
    let mut hidden = BTreeSet::new();
    for object in &needed {
        w.store.delete(std::slice::from_ref(&object.name)).await?;
        hidden.insert(object.name.trim_start_matches("acme/").to_owned());
    }
    let (exit, done) = w.gc()?;
    ensure!(exit == 0, "{done}");
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && names_of(&repaired["hidden"], "object") == hidden,
        "{hidden:?} {repaired}"
    );
    let now = segments().await?;
    ensure!(
        now.iter().all(|object| object.is_visible() != is_old(object)),
        "{now:?}"
    );
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    let (exit, said) = w.s.restore("copy", &[]);
    ensure!(exit == 0, "{said}");
    Ok(())
}
