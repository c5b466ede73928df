//! Buckets that keep versions and lock them: whoever has the writer's credentials can hide objects and lose none;
//! what is hidden is named and brought back; collection deletes versions once they are not locked; locks are extended.

#[path = "../bucket/mod.rs"]
mod bucket;
mod clocks;
mod collected;
mod erased;
mod forks;
mod locks;
mod reliance;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fairvault_engine::commit::lease::Lease;
use fairvault_engine::env::SystemEnv;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::store::Store;
use fairvault_engine::store::versions::{DAY_US, Deleted, Mode, Object};
use fairvault_tests::fixture::{Fixture, SMALL, field, refused};
use fairvault_tests::rgw::{self, ACCESS_KEY, Rgw};
use fairvault_tests::s3::S3;
use fairvault_tests::{Receiver, Scratch, Server as PostgreSQL, tools};
use serde_json::Value;

use bucket::{Server, World};
use collected::{
    pieces_are_needed_until_something_whole_has_their_bytes, versions_are_collected, wal_that_has_expired_stays_away,
    what_is_protected_and_hidden_is_not_collected, what_is_read_and_hidden_is_not_collected,
};
use erased::{a_note_that_somebody_left_is_no_erasure, slots_go_as_far_as_they_are_not_locked};
use forks::{of_two_logs_with_backups_nobody_chooses_unasked, the_end_of_the_log_is_not_shadowed};
use locks::{locks_are_left_and_extended, locks_last_as_long_as_the_retention};
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
