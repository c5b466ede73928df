//! What `lock` extends, for how long, and what it leaves.

use super::*;

pub async fn locks_are_left_and_extended(server: &Server) -> Result<()> {
    let w = World::new("extended", server, true, "retention = { full = 1 }")?;
    let (first, _) = w.backup()?;
    w.until_packs_are_unused()?;
    ensure!(!w.s.ok(&["info", "acme"])?.contains(&first));

    // What has expired is locked: it is left, and that is no error.
    let before = w.contents().await?;
    let (exit, done) = w.gc()?;
    ensure!(exit == 0, "{exit} {done}");
    let versions = &done["versions"];
    ensure!(done["packs"]["objects"].as_u64() > Some(0), "{done}");
    ensure!(
        versions["deleted"]["objects"] == 0 && versions["locked"]["objects"].as_u64() > Some(0),
        "{done}"
    );
    ensure!(
        versions["locked_until_s"].as_i64().context("until")? * 1_000_000 > now_us(),
        "{done}"
    );
    ensure!(w.contents().await?.is_superset(&before), "a locked version is gone");

    // It is not known for how long one backup is kept.
    refused(w.s.fairvault(&["lock", "acme"]), 2, "--days")?;
    let (exit, plan) = w.report(&["lock", "--days", "30", "--dry-run"])?;
    ensure!(exit == 0 && plan["extended"] == plan["needed"], "{plan}");
    let end = now_us() + 30 * DAY_US;
    let ends = async || -> Result<(usize, usize)> {
        let (mut early, mut late) = (0, 0);
        for object in w.objects().await? {
            let Some(version) = object.contents().next().filter(|_| !object.name.contains("/leases/")) else {
                continue;
            };
            let lock = w
                .store
                .lock_of(&object.name, &version.id)
                .await?
                .context(object.name.clone())?;
            ensure!(lock.mode == Mode::Compliance, "{lock:?}");
            let is_needed = object.is_visible() && !object.name.starts_with("probe/");
            match lock.until_us > end {
                true if is_needed => late += 1,
                true => anyhow::bail!("{} was locked although nothing needs it", object.name),
                false => early += 1,
            }
        }
        Ok((early, late))
    };
    ensure!(ends().await?.1 == 0, "the dry run has extended locks");
    let (exit, done) = w.report(&["lock", "--days", "30"])?;
    ensure!(exit == 0, "{done}");
    let (early, late) = ends().await?;
    ensure!(
        Some(late as u64) == done["extended"]["objects"].as_u64() && late > 8,
        "{late} {done}"
    );
    // Packs and a manifest of the backup that has expired, WAL from before the other one, probes.
    ensure!(early > 2, "{early}");
    let (exit, again) = w.report(&["lock", "--days", "30"])?;
    ensure!(exit == 0 && again["extended"]["objects"] == 0, "{again}");
    // The log says so of the run that did it. That entry is locked too, or the second run would have had to do it.
    let audit = w.s.ok(&["audit", "acme"])?;
    let noted = audit
        .lines()
        .filter(|line| line.contains("  lock, ") && line.contains(" objects extended"));
    ensure!(noted.count() == 1, "{audit}");
    Ok(())
}

pub async fn locks_last_as_long_as_the_retention(server: &Server) -> Result<()> {
    let w = World::new("ages", server, true, "retention = { full = \"20d\", wal = \"5d\" }")?;
    let (_, first) = w.backup()?;
    w.backup()?;
    // How many are locked beyond so many days from now, and what of the others is no probe and no lease.
    let beyond = async |days: i64| -> Result<(u64, Vec<String>)> {
        let (mut late, mut early) = (0, Vec::new());
        let end = now_us() + days * DAY_US;
        for object in w.objects().await? {
            let is_control = ["/leases/", "probe/"].iter().any(|part| object.name.contains(part));
            let Some(version) = object.contents().next().filter(|_| !is_control) else {
                continue;
            };
            let lock = w.store.lock_of(&object.name, &version.id).await?;
            match lock.context(object.name.clone())?.until_us > end {
                true => late += 1,
                false => early.push(object.name),
            }
        }
        Ok((late, early))
    };
    ensure!(beyond(2).await?.0 == 0);
    let (exit, done) = w.report(&["lock"])?;
    ensure!(exit == 0, "{done}");
    // The longest age counts from when the backup ended, which is a moment ago, and a week comes on top; three days more of
    // what the next one builds on.
    let (late, early) = beyond(26).await?;
    ensure!(
        Some(late) == done["extended"]["objects"].as_u64() && late > 8,
        "{late} {done}"
    );
    ensure!(beyond(31).await?.0 == 0, "locked for longer than asked for");
    let before_it = |name: &String| name.starts_with("acme/wal/") && name.rsplit('/').next() < Some(&first);
    ensure!(early.iter().all(before_it), "{early:?}");
    let (exit, again) = w.report(&["lock"])?;
    ensure!(exit == 0 && again["extended"]["objects"] == 0, "{again}");

    // What the signed policy keeps longer is locked longer.
    w.s.ok(&["policy", "acme", "--minimum-retention", "40d"])?;
    let (exit, done) = w.report(&["lock"])?;
    ensure!(
        exit == 0 && done["extended"]["objects"].as_u64() >= Some(late),
        "{done}"
    );
    ensure!(beyond(46).await?.0 >= late, "{:?}", beyond(46).await?);
    Ok(())
}
