//! What a new backup or a copy relies on is locked for as long as that is kept, or it is not relied on.

use super::*;

/// Adds a line to the repository's configuration.
fn configure(w: &World, line: &str) -> Result<()> {
    replace(w, "[stanza.acme]", &format!("{line}\n[stanza.acme]"))
}

/// Changes the configuration.
fn replace(w: &World, from: &str, to: &str) -> Result<()> {
    let path = w.s.scratch.join("s3.toml");
    let text = std::fs::read_to_string(&path)?;
    let changed = text.replace(from, to);
    ensure!(changed != text, "{text}");
    Ok(std::fs::write(&path, changed)?)
}

/// What a new backup relies on is locked for as long as that is kept, before it counts.
pub async fn what_a_backup_relies_on_is_locked_for_it(server: &Server) -> Result<()> {
    let w = World::new("relied", server, true, "retention = { full = \"20d\" }")?;
    let secret = w.s.path("s3.secret");
    w.backup()?;
    let late = async || -> Result<(BTreeSet<String>, BTreeSet<String>)> {
        let (mut late, mut early) = (BTreeSet::new(), BTreeSet::new());
        for pack in w.store.all_versions("acme/packs/").await? {
            let version = pack.contents().next().context(pack.name.clone())?;
            let lock = w.store.lock_of(&pack.name, &version.id).await?;
            let lasts = lock.is_some_and(|lock| lock.until_us > now_us() + 19 * DAY_US);
            let ends = if lasts { &mut late } else { &mut early };
            ends.insert(pack.name);
        }
        Ok((late, early))
    };
    let (none, before) = late().await?;
    ensure!(none.is_empty() && !before.is_empty());
    configure(
        &w,
        &format!("keeper = {{ access_key = \"{ACCESS_KEY}\", secret_key_file = \"{secret}\" }}"),
    )?;
    w.backup()?;
    let (after, early) = late().await?;
    ensure!(
        after.iter().any(|pack| before.contains(pack)),
        "nothing of the first is relied on, or its lock is as it was: {after:?}"
    );
    ensure!(after.iter().any(|pack| !before.contains(pack)), "{after:?}");
    ensure!(
        early.is_subset(&before),
        "what was stored just now ends early: {early:?}"
    );
    Ok(())
}

/// Where nobody extends locks, what is locked for less long than a backup is kept is stored again.
pub async fn what_is_not_locked_for_long_enough_is_stored_again(server: &Server) -> Result<()> {
    let w = World::new("again", server, true, "retention = { full = \"20d\" }")?;
    bucket::set_default(server, "again", 20)?;
    let text = w.s.backup_json(&["--type", "full"])?;
    ensure!(text.contains("nothing that is there could be relied on"), "{text}");
    bucket::set_default(server, "again", 60)?;
    let first: u64 = field(&text, "new_stored_bytes")?.parse()?;
    let stored = || -> Result<u64> { Ok(field(&w.s.backup_json(&["--type", "full"])?, "new_stored_bytes")?.parse()?) };
    // This host has seen that the default was another one when that was stored. Stores tell whole seconds.
    std::thread::sleep(Duration::from_millis(1100));
    let again = stored()?;
    ensure!(again * 2 > first, "{first} {again}");
    // What has come since is locked for long enough.
    let relied = stored()?;
    ensure!(first > 0 && relied * 4 < first, "{first} {relied}");
    // It is not known yet that it has been.
    configure(&w, "store_again = true")?;
    let again = stored()?;
    ensure!(again * 2 > first, "{first} {again}");
    let as_known_for_long = || -> Result<()> {
        for path in files(&w.s.scratch.join("cache")) {
            if path.ends_with("locks") {
                let mut known: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
                known["since_us"] = 1.into();
                std::fs::write(&path, known.to_string())?;
            }
        }
        Ok(())
    };
    as_known_for_long()?;
    let last = stored()?;
    ensure!(last * 4 < first, "{first} {last}");
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;

    // Of another default nothing is known yet.
    bucket::set_default(server, "again", 59)?;
    replace(&w, "store_again = true", "store_again = false")?;
    let relied = stored()?;
    ensure!(relied * 4 < first, "{first} {relied}");

    // A copy does as a backup does, by what is configured for where it goes.
    add_second(&w, server, "again")?;
    let copied = || -> Result<u64> {
        let (exit, report) = w.report(&["copy"])?;
        ensure!(exit == 0, "{report}");
        let backups = report["backups"].as_array().context("backups")?.iter();
        Ok(backups.filter_map(|backup| backup["stored_bytes"].as_u64()).sum())
    };
    let all = copied()?;
    stored()?;
    let relied = copied()?;
    ensure!(all > 0 && relied * 4 < all, "{all} {relied}");
    replace(&w, "[repo.second]", "[repo.second]\nstore_again = true")?;
    stored()?;
    let again = copied()?;
    ensure!(again * 2 > all, "{all} {again}");
    as_known_for_long()?;
    stored()?;
    let last = copied()?;
    ensure!(last * 4 < all, "{all} {last}");
    w.s.ok(&["--repo", "second", "verify", "acme", "--progress", "none"])?;
    Ok(())
}

/// A default that was raised locks nothing that was stored before.
pub async fn a_raised_default_is_not_believed_of_what_is_older(server: &Server) -> Result<()> {
    let w = World::new("raised", server, true, "retention = { full = \"20d\", wal = \"5d\" }")?;
    w.backup()?;
    bucket::set_default(server, "raised", 60)?;
    let (exit, done) = w.report(&["lock"])?;
    let extended = done["extended"]["objects"].as_u64();
    ensure!(exit == 0 && extended > Some(8), "{done}");
    let end = now_us() + 19 * DAY_US;
    let mut needed = 0;
    for object in w
        .objects()
        .await?
        .iter()
        .filter(|object| object.name.contains("/packs/"))
    {
        let version = object.contents().next().context("a version")?;
        let lock = w.store.lock_of(&object.name, &version.id).await?.context("a lock")?;
        ensure!(lock.until_us > end, "{}: {lock:?}", object.name);
        needed += 1;
    }
    ensure!(needed > 0);
    // What was found is remembered: only what has come since is asked for.
    w.backup()?;
    let (exit, again) = w.report(&["lock"])?;
    ensure!(exit == 0 && again["extended"]["objects"] == 0, "{again}");
    ensure!(again["requests"].as_u64() < done["requests"].as_u64(), "{again} {done}");
    Ok(())
}

/// What the signed policy promises counts, too, where no age is configured. Finds a backup that relies on packs whose locks
/// end before it may expire.
pub async fn what_the_policy_promises_is_locked_for_it(server: &Server) -> Result<()> {
    let w = World::new("promised", server, true, "retention = { full = 5 }")?;
    let secret = w.s.path("s3.secret");
    configure(
        &w,
        &format!("keeper = {{ access_key = \"{ACCESS_KEY}\", secret_key_file = \"{secret}\" }}"),
    )?;
    let ends = async || -> Result<Vec<i64>> {
        let mut ends = Vec::new();
        for pack in w.store.all_versions("acme/packs/").await? {
            let version = pack.contents().next().context(pack.name.clone())?;
            let lock = w.store.lock_of(&pack.name, &version.id).await?.context("a lock")?;
            ends.push(lock.until_us);
        }
        Ok(ends)
    };
    let late = || now_us() + 19 * DAY_US;
    w.backup()?;
    let before = ends().await?;
    ensure!(
        !before.is_empty() && before.iter().all(|end| *end < late()),
        "{before:?}"
    );
    w.s.ok(&["policy", "acme", "--minimum-retention", "20d"])?;
    w.backup()?;
    let after = ends().await?;
    let extended = after.iter().filter(|end| **end > late()).count();
    // What it has stored, and what it relies on.
    ensure!(extended > after.len() - before.len(), "{before:?} {after:?}");
    Ok(())
}
