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
    replace(
        &w,
        "store_again = false",
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

    // A keeper whose secret is no longer right.
    bucket::set_default(server, "relied", 18)?;
    w.backup()?;
    w.s.scratch.write("wrong.secret", b"wrong")?;
    replace(&w, &secret_line(&secret), &secret_line(&w.s.path("wrong.secret")))?;
    w.s.sql("insert into t values (2)")?;
    let before = w.pack_locks().await?;
    // What there is was extended for as long as this one is kept, but for the time since then.
    w.s.ok(&["policy", "acme", "--minimum-retention", "29d"])?;
    let backups = || -> Result<usize> { Ok(w.s.ok(&["info", "acme"])?.matches("PostgreSQL").count()) };
    let taken = backups()?;
    refused(
        w.s.fairvault(&["backup", "acme", "--type", "full"]),
        1,
        "locked for 18 d only",
    )?;
    let said = w.s.fairvault(&["backup", "acme", "--type", "full"]).1;
    ensure!(
        said.contains("keeper") && said.contains("store_again = false"),
        "{said}"
    );
    ensure!(backups()? == taken && w.pack_locks().await? == before, "{said}");
    // It helps to store again what is there.
    bucket::set_default(server, "relied", 60)?;
    let said = w.s.backup_json(&["--type", "full"])?;
    ensure!(
        said.contains("could not be extended") && said.contains("stored again"),
        "{said}"
    );
    let again = w.pack_locks().await?;
    ensure!(again.is_superset(&before), "{before:?} {again:?}");
    let stored: u64 = field(&said, "new_stored_bytes")?.parse()?;
    let said = w.s.backup_json(&["--type", "full"])?;
    let relied: u64 = field(&said, "new_stored_bytes")?.parse()?;
    ensure!(relied * 4 < stored, "{said}");
    // Somebody has decided that backups matter more.
    bucket::set_default(server, "relied", 1)?;
    w.s.ok(&["policy", "acme", "--minimum-retention", "90d"])?;
    configure(&w, "store_again = false")?;
    let said = w.s.backup_json(&["--type", "full"])?;
    ensure!(
        said.contains("could not be extended") && said.contains("fairvault lock"),
        "{said}"
    );
    let relied: u64 = field(&said, "new_stored_bytes")?.parse()?;
    ensure!(relied * 4 < stored, "{said}");
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    Ok(())
}

fn secret_line(path: &str) -> String {
    format!("secret_key_file = \"{path}\" }}")
}

/// Where nobody extends locks, what is locked for less long than a backup is kept is stored again.
pub async fn what_is_not_locked_for_long_enough_is_stored_again(server: &Server) -> Result<()> {
    let w = World::new("again", server, true, "retention = { full = \"20d\" }")?;
    bucket::set_default(server, "again", 20)?;
    replace(&w, "store_again = false\n", "")?;
    // The first relies on nothing.
    let text = w.s.backup_json(&["--type", "full"])?;
    ensure!(text.contains("is locked for 20 d, and kept for 20 d"), "{text}");
    for kind in ["full", "incr"] {
        let (exit, said) = w.s.fairvault(&["backup", "acme", "--type", kind]);
        ensure!(exit == 1 && said.contains("locked for 20 d only"), "{exit} {said}");
        ensure!(said.contains("store_again = false"), "{said}");
    }
    refused(w.s.fairvault(&["check", "acme"]), 1, "all but the first are refused")?;
    // Of what is there that says nothing: the store is asked.
    bucket::set_default(server, "again", 40)?;
    w.s.ok(&["check", "acme"])?;
    let first: u64 = field(&text, "new_stored_bytes")?.parse()?;
    let stored = || -> Result<u64> { Ok(field(&w.s.backup_json(&["--type", "full"])?, "new_stored_bytes")?.parse()?) };
    let again = stored()?;
    ensure!(again * 2 > first, "{first} {again}");
    // What has come since is locked for long enough.
    let relied = stored()?;
    ensure!(first > 0 && relied * 4 < first, "{first} {relied}");
    // Also for a host that sees all of that for the first time.
    w.forget()?;
    let relied = stored()?;
    ensure!(relied * 4 < first, "{first} {relied}");
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;

    // What is kept for longer from now on needs longer locks.
    w.s.ok(&["policy", "acme", "--minimum-retention", "39d"])?;
    refused(
        w.s.fairvault(&["backup", "acme", "--type", "full"]),
        1,
        "locked for 40 d only",
    )?;
    configure(&w, "store_again = false")?;
    let relied = stored()?;
    ensure!(relied * 4 < first, "{first} {relied}");
    w.s.ok(&["policy", "acme", "--minimum-retention", "0s"])?;

    // A copy does as a backup does, by what is configured for where it goes.
    add_second(&w, server, "again")?;
    let copied = || -> Result<u64> {
        let (exit, report) = w.report(&["copy"])?;
        ensure!(exit == 0, "{report}");
        let backups = report["backups"].as_array().context("backups")?.iter();
        Ok(backups.filter_map(|backup| backup["stored_bytes"].as_u64()).sum())
    };
    // The second of what one run copies relies on the first.
    let all = copied()?;
    ensure!(all * 2 < first * 3, "{all} {first}");
    stored()?;
    let relied = copied()?;
    ensure!(all > 0 && relied * 4 < all, "{all} {relied}");
    bucket::set_default(server, "again", 100)?;
    replace(&w, "full = \"20d\"", "full = \"80d\"")?;
    stored()?;
    let again = copied()?;
    ensure!(again * 2 > all, "{all} {again}");
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
    replace(
        &w,
        "store_again = false",
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
