//! Buckets that keep versions and lock them: whoever has the writer's credentials can hide objects and lose none;
//! what is hidden is named and brought back; collection deletes versions once they are not locked; locks are extended.

#[path = "../bucket/mod.rs"]
mod bucket;
mod clocks;
mod forks;
mod reliance;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fairvault_engine::commit::lease::Lease;
use fairvault_engine::env::SystemEnv;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::Store;
use fairvault_engine::store::versions::{DAY_US, Deleted, Mode, Object};
use fairvault_format::keys::Secret;
use fairvault_tests::fixture::{Fixture, SMALL, field, refused};
use fairvault_tests::rgw::{self, ACCESS_KEY, Rgw};
use fairvault_tests::s3::S3;
use fairvault_tests::{Receiver, Scratch, Server as PostgreSQL, tools};
use serde_json::Value;

use bucket::{Server, World};
use forks::{of_two_logs_with_backups_nobody_chooses_unasked, the_end_of_the_log_is_not_shadowed};
use reliance::{
    a_raised_default_is_not_believed_of_what_is_older, what_a_backup_relies_on_is_locked_for_it,
    what_is_not_locked_for_long_enough_is_stored_again, what_the_policy_promises_is_locked_for_it,
};

/// Does everything to an object that a writer may: it is deleted, replaced, or both, by turns.
async fn hide(store: &Store, number: usize, object: &Object) -> Result<()> {
    let (delete, garbage) = (
        std::slice::from_ref(&object.name),
        Bytes::from(format!("garbage {number}")),
    );
    match number % 4 {
        0 => store.delete(delete).await?,
        1 => store.put_hashed(&object.name, garbage.into()).await?,
        2 => {
            store.put_hashed(&object.name, garbage.into()).await?;
            store.delete(delete).await?;
        }
        _ => {
            store.delete(delete).await?;
            store.put_hashed(&object.name, garbage.into()).await?;
        }
    }
    Ok(())
}

fn names_of(list: &Value, member: &str) -> BTreeSet<String> {
    let all = list.as_array().into_iter().flatten();
    all.filter_map(|entry| entry[member].as_str().map(str::to_owned))
        .collect()
}

/// All that is in the tables of a server.
fn rows_of(w: &World, server: &PostgreSQL) -> Result<String> {
    let all = "select (select count(*) from t) || ' ' || (select md5(string_agg(x, ',' order by x)) from bulk)";
    server.sql(&w.s.scratch, all)
}

/// Every backup restores to where it ended, with all that was there then.
fn every_backup_restores(w: &World, backups: &[(String, String)]) -> Result<()> {
    let info = w.s.ok(&["info", "acme", "--output", "json"])?;
    ensure!(
        info.matches("\"restorable\":true").count() == backups.len(),
        "not all of {backups:?}: {info}"
    );
    for (number, (id, rows)) in backups.iter().enumerate() {
        let name = format!("every{number}");
        let at_once = ["--backup", id, "--target", "immediate", "--target-action", "promote"];
        let (exit, said) = w.s.restore(&name, &at_once);
        ensure!(exit == 0, "{id}: {said}");
        let copy = w.s.start(&name, 5433)?;
        let found = rows_of(w, &copy)?;
        ensure!(found == *rows, "{id}: {found} instead of {rows}");
        copy.stop(&w.s.scratch, "fast")?;
    }
    Ok(())
}

async fn nothing_locked_is_lost(server: &Server) -> Result<()> {
    let w = World::new("locked", server, true, "retention = { full = \"1d\" }")?;
    let (id, first) = w.backup()?;
    let mut backups = vec![(id, rows_of(&w, &w.s.server)?)];
    let (id, _) = w.backup()?;
    backups.push((id, rows_of(&w, &w.s.server)?));
    ensure!(backups[0].1 != backups[1].1, "{backups:?}");
    let said = w.s.ok(&["check", "acme"])?;
    ensure!(said.contains("locked for 1 days (COMPLIANCE)"), "{said}");
    let before = w.contents().await?;
    let objects = w.objects().await?;

    // Nobody deletes what is locked.
    for object in objects.iter().filter(|object| !object.name.contains("/leases/")) {
        for version in object.contents() {
            let deleted = w.store.delete_version(&object.name, &version.id).await?;
            ensure!(matches!(deleted, Deleted::Refused(_)), "{} was deleted", object.name);
        }
    }

    // What backups are made of is hidden: all of it is named, and nothing else.
    let of = |folder: &str| format!("acme/{folder}/");
    let is_content = |name: &str| {
        let is_needed_wal = name.starts_with(&of("wal")) && name.rsplit('/').next() >= Some(&first);
        is_needed_wal || ["packs", "roots", "index"].iter().any(|f| name.starts_with(&of(f)))
    };
    let mut hidden = BTreeSet::new();
    for (number, object) in objects.iter().filter(|object| is_content(&object.name)).enumerate() {
        hide(&w.store, number, object).await?;
        hidden.insert(object.name.trim_start_matches("acme/").to_owned());
    }
    ensure!(hidden.len() > 8, "{hidden:?}");
    refused(w.s.restore("lost", &[]), 4, "").or_else(|_| refused(w.s.restore("lost2", &[]), 3, ""))?;
    let (exit, verified) = w.report(&["verify"])?;
    ensure!(exit == 4, "{exit} {verified}");
    let findings = verified["findings"].as_array().context("findings")?.iter();
    let repairable = findings.filter(|f| f["problem"].as_str().is_some_and(|p| p.contains("fairvault repair")));
    let named: BTreeSet<String> = repairable
        .filter_map(|f| f["object"].as_str().map(str::to_owned))
        .collect();
    ensure!(
        named == hidden,
        "{:?}",
        named.symmetric_difference(&hidden).collect::<Vec<_>>()
    );

    // So is what a stanza is opened with.
    let is_opening =
        |name: &str| name == "fairvault.json" || [of("keys"), of("log")].iter().any(|f| name.starts_with(f));
    let now = w.objects().await?;
    for (number, object) in now.iter().filter(|object| is_opening(&object.name)).enumerate() {
        hide(&w.store, number, object).await?;
        hidden.insert(object.name.trim_start_matches("acme/").to_owned());
    }
    w.forget()?;
    let (exit, said) = w.s.fairvault(&["check", "acme"]);
    ensure!(
        exit == 1 && said.contains("everything relies on are hidden"),
        "{exit} {said}"
    );

    let (_, said) = w.s.fairvault(&["repair", "acme", "--dry-run", "--progress", "none"]);
    ensure!(
        said.contains("without --dry-run brings back") && said.contains("fairvault.json"),
        "{said}"
    );
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(exit == 0, "{exit} {repaired}");
    ensure!(names_of(&repaired["hidden"], "object") == hidden, "{repaired}");
    ensure!(w.contents().await?.is_superset(&before), "a version is lost");

    let (exit, again) = w.report(&["repair"])?;
    ensure!(exit == 0 && again["hidden"] == Value::Array(Vec::new()), "{again}");
    w.s.ok(&["check", "acme"])?;
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    every_backup_restores(&w, &backups)?;
    // And to the end of the WAL.
    let (exit, said) = w.s.restore("copy", &[]);
    ensure!(exit == 0, "{said}");
    let copy = w.s.start("copy", 5433)?;
    ensure!(w.s.rows(&copy)?.trim() == "2");
    next_name_is_taken(&w).await?;
    copies(&w, server)?;
    Ok(())
}

/// The number of the entry that comes next.
async fn next_number(w: &World) -> Result<u64> {
    let objects = w.objects().await?;
    let numbers = objects
        .iter()
        .filter_map(|o| o.name.strip_prefix("acme/log/")?.parse::<u64>().ok());
    Ok(numbers.max().context("a log")? + 1)
}

/// Somebody puts something where the next entry of the log belongs: nobody gets past it until it is dropped on purpose.
async fn next_name_is_taken(w: &World) -> Result<()> {
    let next = next_number(w).await?;
    // Twice, with another content.
    for garbage in ["first", "nobody gets past this"] {
        w.store
            .put_hashed(
                &format!("acme/log/{next:020}"),
                Bytes::from_static(garbage.as_bytes()).into(),
            )
            .await?;
    }
    let (exit, said) = w.s.restore("stuck", &[]);
    ensure!(
        exit == 4 && said.contains(&format!("--drop-entry {next}")),
        "{exit} {said}"
    );
    refused(
        w.s.fairvault(&["repair", "acme", "--progress", "none"]),
        4,
        "--drop-entry",
    )?;
    let drop = ["repair", "acme", "--progress", "none", "--drop-entry"];
    refused(
        w.s.fairvault(&[&drop[..], &[&(next - 1).to_string()]].concat()),
        1,
        "it would be",
    )?;
    let number = next.to_string();
    let said = w.s.ok(&[&drop[..], &[&number, "--dry-run"]].concat())?;
    ensure!(said.contains("it would be dropped"), "{said}");
    let said = w.s.ok(&[&drop[..], &[&number]].concat())?;
    let kept = said
        .split("is kept in ")
        .nth(1)
        .and_then(|rest| rest.split(';').next())
        .context("where it is kept")?;
    ensure!(std::fs::read(kept)? == b"nobody gets past this");
    let (exit, said) = w.s.restore("unstuck", &[]);
    ensure!(exit == 0, "{said}");
    // What says that a newer version wrote it, and is deleted: the entry that comes there proves that it was none.
    let next = next_number(w).await?;
    let last = format!("acme/log/{:020}", next - 1);
    let mut newer = w.store.get(&last, 1 << 20).await?.to_vec();
    newer[4] = 2;
    let name = format!("acme/log/{next:020}");
    w.store.put_hashed(&name, Bytes::from(newer).into()).await?;
    w.store.delete(&[name]).await?;
    w.backup()?;
    w.s.ok(&["check", "acme"])?;
    ensure!(
        w.s.ok(&["audit", "acme"])?.contains("no entry"),
        "the audit does not tell"
    );
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && repaired["hidden"] == Value::Array(Vec::new()),
        "{repaired}"
    );
    Ok(())
}

async fn versions_are_collected(server: &Server) -> Result<()> {
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
async fn what_is_protected_and_hidden_is_not_collected(server: &Server) -> Result<()> {
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
    let packs = async || -> Result<BTreeSet<String>> {
        let packs = w.store.all_versions("acme/packs/").await?;
        let visible = packs.into_iter().filter(Object::is_visible);
        Ok(visible.map(|pack| pack.name).collect())
    };
    let before = packs().await?;
    let (exit, done) = w.gc()?;
    ensure!(exit == 0 && done["packs"]["objects"] == 0, "{exit} {done}");
    ensure!(packs().await? == before);
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
async fn what_is_read_and_hidden_is_not_collected(server: &Server) -> Result<()> {
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
    let access = Access {
        repository: w.store.clone(),
        stanza: "acme".to_owned(),
        secret: Some(Secret::from_text(&std::fs::read(w.s.path("key"))?)?),
        memory: None,
        may_stretch: true,
        env: Arc::new(SystemEnv),
        trace: Default::default(),
    };
    let stanza = Stanza::open(&access).await?;
    let packs = async || -> Result<BTreeSet<String>> {
        let packs = w.store.all_versions("acme/packs/").await?;
        let visible = packs.into_iter().filter(Object::is_visible);
        Ok(visible.map(|pack| pack.name).collect())
    };
    let before = packs().await?;

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
        ensure!(packs().await? == before, "a pack is gone from below a reader");
        let now = w.store.all_versions(&manifest.name).await?;
        let content = now.iter().flat_map(Object::contents).count();
        ensure!(content == 1, "the manifest is gone from below a reader: {now:?}");
    }

    // Without the reader they go.
    reader.abort();
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["packs"]["objects"].as_u64() > Some(0) && packs().await?.len() < before.len(),
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

async fn locks_are_left_and_extended(server: &Server) -> Result<()> {
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

async fn pieces_are_needed_until_something_whole_has_their_bytes(server: &Server) -> Result<()> {
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

async fn locks_last_as_long_as_the_retention(server: &Server) -> Result<()> {
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

async fn wal_that_has_expired_stays_away(server: &Server, is_locked: bool) -> Result<()> {
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

/// Backups and WAL go on into another repository in the bucket.
fn copies(w: &World, server: &Server) -> Result<()> {
    add_second(w, server, "locked")?;
    w.s.ok(&["copy", "acme", "--progress", "none"])?;
    w.s.ok(&["--repo", "second", "verify", "acme", "--progress", "none"])?;
    Ok(())
}

/// The stanza in another repository in the bucket.
fn add_second(w: &World, server: &Server, bucket: &str) -> Result<()> {
    let config = std::fs::read_to_string(w.s.scratch.join("s3.toml"))?;
    let dir = w.s.scratch.path().display();
    let second = format!(
        "[repo.second]\nurl = \"s3://{bucket}/second\"\nendpoint = \"{}\"\nregion = \"us-east-1\"\naccess_key = \"{ACCESS_KEY}\"\nsecret_key_file = \"{dir}/s3.secret\"\nsingle_writer = {}\n[defaults]\nrepos = [\"main\", \"second\"]\n[stanza.acme]",
        server.endpoint, server.single_writer
    );
    w.s.scratch
        .write("s3.toml", config.replace("[stanza.acme]", &second).as_bytes())?;
    w.s.ok(&["--repo", "second", "stanza", "create", "acme"])?;
    Ok(())
}

fn now_us() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_micros() as i64)
}

/// A stanza is erased as far as its bucket lets it, and what is left is said.
async fn slots_go_as_far_as_they_are_not_locked(server: &Server) -> Result<()> {
    let erase = ["key", "erase", "acme", "--confirm", "acme"];
    for (name, is_locked) in [("erased", false), ("erasedsuspended", false), ("erasedlocked", true)] {
        let w = World::new(name, server, is_locked, "")?;
        w.backup()?;
        let is_suspended = name == "erasedsuspended";
        if is_suspended {
            // What it has kept so far is still there.
            bucket::set_versioning(server, name, "Suspended")?;
        }
        let slots = async || -> Result<Vec<Object>> { Ok(w.store.all_versions("acme/keys/").await?) };
        ensure!(slots().await?.len() == 1);
        let (exit, text) = w.s.fairvault(&erase);
        let left: usize = slots().await?.iter().map(|slot| slot.contents().count()).sum();
        match is_locked {
            false => ensure!(
                exit == 0 && text.contains("1 older versions") && left == 0,
                "{exit} {text}"
            ),
            true => ensure!(
                exit == 6
                    && text.contains("NOT destroyed: a version of keys/00000001/main is locked until")
                    && left == 1,
                "{exit} {text}"
            ),
        }
        // It can be run again, and what is below a marker is not brought back by accident.
        ensure!(w.s.fairvault(&erase).0 == exit);
        refused(
            w.s.fairvault(&["repair", "acme", "--progress", "none"]),
            1,
            "was erased at",
        )?;
        refused(w.s.fairvault(&["info", "acme"]), 1, "was erased at")?;
        ensure!(slots().await?.iter().all(|slot| !slot.is_visible()));
        // Without its note, what the bucket hides stays hidden: where a slot is left that opens the log, that says so, also if
        // its end is hidden; where none is, the note does, for as long as the bucket hides it, too.
        if !is_suspended {
            let mut gone = vec!["acme/erased".to_owned()];
            if is_locked {
                let objects = w.objects().await?;
                let log = objects.iter().filter(|object| object.name.starts_with("acme/log/"));
                gone.extend(log.map(|object| object.name.clone()).max());
            }
            w.store.delete(&gone).await?;
            let why = if is_locked {
                "its log says so"
            } else {
                "which is hidden by a deletion"
            };
            let repair = w.s.fairvault(&["repair", "acme", "--progress", "none"]);
            refused(repair, 1, why)?;
            ensure!(slots().await?.iter().all(|slot| !slot.is_visible()));
        }
    }
    Ok(())
}

/// Whoever hides keys and log may also write that the stanza was erased, or anything in the place of that. The log is behind
/// it, and says that it was not.
async fn a_note_that_somebody_left_is_no_erasure(server: &Server) -> Result<()> {
    let w = World::new("noted", server, true, "")?;
    w.backup()?;
    let forged = r#"{"format": "fairvault-erased", "version": 1, "entry": 3, "time_us": 1, "host": "h", "user": "u"}"#;
    let is_opening = |name: &str| name.starts_with("acme/keys/") || name.starts_with("acme/log/");
    let put = async |name: &str, text: &'static str| {
        let content = Bytes::from_static(text.as_bytes());
        w.store.put_hashed(&format!("acme/{name}"), content.into()).await
    };
    let hide_all = async || -> Result<BTreeSet<String>> {
        let mut hidden = BTreeSet::new();
        let now = w.objects().await?;
        for (number, object) in now.iter().filter(|object| is_opening(&object.name)).enumerate() {
            hide(&w.store, number, object).await?;
            hidden.insert(object.name.trim_start_matches("acme/").to_owned());
        }
        w.forget()?;
        Ok(hidden)
    };
    // No note at all, one that says what it likes, and one that the bucket hides.
    for note in ["garbage", forged, ""] {
        match note {
            "" => w.store.delete(&["acme/erased".to_owned()]).await?,
            note => put("erased", note).await?,
        }
        let hidden = hide_all().await?;
        if note == forged {
            refused(w.s.fairvault(&["info", "acme"]), 1, "they ask the log")?;
            let (exit, said) = w.s.fairvault(&["repair", "acme", "--dry-run", "--progress", "none"]);
            ensure!(
                exit == 1 && said.contains("without --dry-run brings back") && said.contains("the log does not"),
                "{exit} {said}"
            );
        }
        let (exit, repaired) = w.report(&["repair"])?;
        ensure!(
            exit == 0 && names_of(&repaired["hidden"], "object") == hidden,
            "{hidden:?} {exit} {repaired}"
        );
        w.s.ok(&["verify", "acme", "--progress", "none"])?;
    }
    // Together with something where the next entry belongs, and behind it: keys come back, and then that goes.
    let numbers = w.objects().await?;
    let numbers = numbers
        .iter()
        .filter_map(|object| object.name.strip_prefix("acme/log/")?.parse::<u64>().ok());
    let next = numbers.max().context("a log")? + 1;
    hide_all().await?;
    put("erased", forged).await?;
    put(&format!("log/{next:020}"), "garbage").await?;
    put(&format!("log/{:020}", 999_999), "garbage").await?;
    let drop = ["repair", "acme", "--progress", "none", "--drop-entry"];
    let number = next.to_string();
    refused(
        w.s.fairvault(&["repair", "acme", "--progress", "none"]),
        4,
        &format!("--drop-entry {next}"),
    )?;
    // Entries are hidden as well: what is no entry goes first, since it is what the log is stuck at.
    w.s.ok(&[&drop[..], &[&number]].concat())?;
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(exit == 0, "{repaired}");
    // What lies behind the end stops no backup and no restore.
    w.backup()?;
    w.forget()?;
    let (exit, said) = w.s.restore("copy", &[]);
    ensure!(exit == 0, "{said}");
    w.s.ok(&[&drop[..], &["999999"]].concat())?;
    let audit = w.s.ok(&["audit", "acme"])?;
    ensure!(audit.contains(&format!("log/{:020}", 999_999)), "{audit}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backups_rely_on_what_is_locked_for_long_enough_on_ministack() -> Result<()> {
    let scratch = Scratch::new("reliedstore")?;
    let server = S3::start(&scratch, "other")?;
    what_a_backup_relies_on_is_locked_for_it(&Server::of(&server)).await?;
    what_the_policy_promises_is_locked_for_it(&Server::of(&server)).await?;
    what_is_not_locked_for_long_enough_is_stored_again(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_locked_is_lost_on_ministack() -> Result<()> {
    let scratch = Scratch::new("lockstore")?;
    let server = S3::start(&scratch, "other")?;
    nothing_locked_is_lost(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_log_is_not_shadowed_on_ministack() -> Result<()> {
    let scratch = Scratch::new("shadowstore")?;
    let server = S3::start(&scratch, "other")?;
    the_end_of_the_log_is_not_shadowed(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_logs_with_backups_nobody_chooses_unasked_on_ministack() -> Result<()> {
    let scratch = Scratch::new("forkstore")?;
    let server = S3::start(&scratch, "other")?;
    of_two_logs_with_backups_nobody_chooses_unasked(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_go_as_far_as_they_are_not_locked_on_ministack() -> Result<()> {
    let scratch = Scratch::new("erasure")?;
    let server = S3::start(&scratch, "other")?;
    slots_go_as_far_as_they_are_not_locked(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_note_that_somebody_left_is_no_erasure_on_ministack() -> Result<()> {
    let scratch = Scratch::new("notestore")?;
    let server = S3::start(&scratch, "other")?;
    a_note_that_somebody_left_is_no_erasure(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn versions_are_collected_on_ministack() -> Result<()> {
    let scratch = Scratch::new("versionstore")?;
    let server = S3::start(&scratch, "other")?;
    versions_are_collected(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_protected_and_hidden_is_not_collected_on_ministack() -> Result<()> {
    let scratch = Scratch::new("protectedstore")?;
    let server = S3::start(&scratch, "other")?;
    what_is_protected_and_hidden_is_not_collected(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_read_and_hidden_is_not_collected_on_ministack() -> Result<()> {
    let scratch = Scratch::new("readhiddenstore")?;
    let server = S3::start(&scratch, "other")?;
    what_is_read_and_hidden_is_not_collected(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_are_left_and_extended_on_ministack() -> Result<()> {
    let scratch = Scratch::new("extendstore")?;
    let server = S3::start(&scratch, "other")?;
    locks_are_left_and_extended(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_last_as_long_as_the_retention_on_ministack() -> Result<()> {
    let scratch = Scratch::new("agestore")?;
    let server = S3::start(&scratch, "other")?;
    locks_last_as_long_as_the_retention(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_raised_default_is_not_believed_of_what_is_older_on_ministack() -> Result<()> {
    let scratch = Scratch::new("raisedstore")?;
    let server = S3::start(&scratch, "other")?;
    a_raised_default_is_not_believed_of_what_is_older(&Server::of(&server)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_that_has_expired_stays_away_on_ministack() -> Result<()> {
    let scratch = Scratch::new("walstore")?;
    let server = S3::start(&scratch, "other")?;
    wal_that_has_expired_stays_away(&Server::of(&server), false).await?;
    wal_that_has_expired_stays_away(&Server::of(&server), true).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_are_needed_until_something_whole_has_their_bytes_on_ministack() -> Result<()> {
    let scratch = Scratch::new("piecestore")?;
    let server = S3::start(&scratch, "other")?;
    pieces_are_needed_until_something_whole_has_their_bytes(&Server::of(&server)).await
}

/// Ceph's gateway.
fn of_gateway(gateway: &Rgw) -> Server {
    Server {
        endpoint: gateway.endpoint(),
        secret: rgw::SECRET_KEY,
        single_writer: true,
    }
}

/// What matters most is shown against a second implementation of locks in every run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_locked_is_lost_on_radosgw() -> Result<()> {
    let scratch = Scratch::new("lockrgw")?;
    let gateway = Rgw::start(&scratch)?;
    nothing_locked_is_lost(&of_gateway(&gateway)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_else_on_radosgw() -> Result<()> {
    if !tools::is_full() {
        eprintln!("the other tests on Ceph's radosgw are part of `cargo xtask test --full`");
        return Ok(());
    }
    let scratch = Scratch::new("elsergw")?;
    let gateway = Rgw::start(&scratch)?;
    let server = of_gateway(&gateway);
    versions_are_collected(&server).await?;
    what_is_protected_and_hidden_is_not_collected(&server).await?;
    locks_are_left_and_extended(&server).await?;
    locks_last_as_long_as_the_retention(&server).await?;
    what_a_backup_relies_on_is_locked_for_it(&server).await?;
    what_the_policy_promises_is_locked_for_it(&server).await?;
    wal_that_has_expired_stays_away(&server, false).await?;
    wal_that_has_expired_stays_away(&server, true).await?;
    a_raised_default_is_not_believed_of_what_is_older(&server).await?;
    pieces_are_needed_until_something_whole_has_their_bytes(&server).await
}

#[test]
fn other_stores_say_that_they_lock_nothing() -> Result<()> {
    let s = Fixture::new("nolocks", SMALL)?;
    refused(s.fairvault(&["lock", "acme", "--days", "1"]), 1, "locks no objects")?;
    let said = s.ok(&["check", "acme"])?;
    ensure!(said.contains("only S3 buckets"), "{said}");
    Ok(())
}
