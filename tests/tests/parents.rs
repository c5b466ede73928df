//! What a backup builds on: on no backup that had not ended before it began, wherever the two were taken; and of one that
//! the repository has lost a part of, on what is left.

mod stores;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fairvault_engine::manifest::Outline;
use fairvault_engine::postgres::hints::mask;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_tests::fixture::{SMALL, field, number};
use fairvault_tests::{Fixture, Shape, code};
use serde_json::Value;

const PAGE: usize = 8192;

fn lsn(text: &str) -> Result<Lsn> {
    text.parse::<Lsn>().map_err(anyhow::Error::msg)
}

/// Restores a backup, without starting anything there; returns where it is.
fn restored(s: &Fixture, backup: &str) -> Result<PathBuf> {
    let id = field(backup, "id")?;
    let (exit, text) = s.restore(&id, &["--backup", &id, "--target", "immediate"]);
    ensure!(exit == 0, "{text}");
    Ok(s.scratch.join(&id))
}

/// Whether two directories say the same in a file of pages. What two servers of one history may differ in is no difference.
fn is_same(one: &Path, two: &Path, file: &str) -> Result<bool> {
    let (mut one, mut two) = (std::fs::read(one.join(file))?, std::fs::read(two.join(file))?);
    let pages = one.as_chunks_mut::<PAGE>().0.iter_mut();
    let same = pages.zip(two.as_chunks_mut::<PAGE>().0).all(|(one, two)| {
        mask(one);
        mask(two);
        one == two
    });
    Ok(same && one.len() == two.len())
}

fn text<'a>(backup: &'a Value, key: &str) -> &'a str {
    backup[key].as_str().unwrap_or_default()
}

/// No backup began before the end of the one that it is built on; returns how many are built on another one.
fn check_order(s: &Fixture) -> Result<usize> {
    let info: Value = serde_json::from_str(&s.ok(&["info", "acme", "--output", "json"])?)?;
    let backups = info["stanzas"][0]["backups"].as_array().context("backups")?;
    let mut count = 0;
    for child in backups.iter().filter(|child| !text(child, "parent").is_empty()) {
        let parent = backups.iter().find(|parent| parent["id"] == child["parent"]);
        let parent = parent.with_context(|| format!("no parent of {child}"))?;
        ensure!(
            lsn(text(parent, "stop_lsn"))? <= lsn(text(child, "start_lsn"))?,
            "{child} is built on {parent}"
        );
        count += 1;
    }
    Ok(count)
}

/// A backup of a primary reads a table after a change that a standby has not replayed. The standby's next backup begins
/// where that one began, and nothing changed in between: whoever took it for its parent, because it is the newest or
/// because it began early enough, would have the change, which is the standby's future.
#[test]
fn a_standby_builds_on_no_backup_that_has_seen_its_future() -> Result<()> {
    let s = Fixture::new(
        "future",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (n int, x text) with (fillfactor = 50)")?;
    s.sql("insert into t select i, md5(i::text) from generate_series(1, 20000) i")?;
    s.sql("vacuum (freeze) t")?;
    let table = s.sql("select pg_relation_filepath('t')")?;
    let first = s.backup_json(&["--type", "full"])?;
    s.flush_archive(&s.server)?;
    let standby = s.standby("standby", 5460, &[], "")?;
    let conninfo = standby.conninfo();
    let catch_up = || -> Result<()> {
        let at = s.sql("select pg_current_wal_lsn()")?;
        standby.wait_for(&s.scratch, &format!("select pg_last_wal_replay_lsn() >= '{at}'"), "t")?;
        standby.sql(&s.scratch, "checkpoint").map(drop)
    };

    // The table is in the last of three databases: its catalogs come before it, and two databases.
    let slowly = [
        "backup",
        "acme",
        "--fast",
        "--type",
        "full",
        "--source",
        "local",
        "--max-rate",
        "4MiB",
        "--progress",
        "none",
        "--output",
        "json",
    ];
    let reading =
        "select count(*) from pg_stat_activity where query like 'SELECT catalog_version_no%' and state = 'idle'";
    let (exit, later) = std::thread::scope(|scope| -> Result<(i32, String)> {
        let backup = scope.spawn(|| code(&mut s.command(&slowly)));
        s.server.wait_for(&s.scratch, reading, "1")?;
        catch_up()?;
        standby.sql(&s.scratch, "select pg_wal_replay_pause()")?;
        standby.wait_for(&s.scratch, "select pg_get_wal_replay_pause_state()", "paused")?;
        s.sql("update t set n = n + 1 where n % 50 = 0")?;
        s.sql("checkpoint")?;
        backup.join().map_err(|_| anyhow::anyhow!("panicked"))
    })?;
    ensure!(exit == 0, "{exit} {later}");
    let of_later = restored(&s, &later)?;
    ensure!(
        is_same(&of_later, &s.server.data, &table)?,
        "the table was read before it changed: this shows nothing"
    );
    ensure!(
        !is_same(&of_later, &standby.data, &table)?,
        "the standby has the change"
    );

    let on_standby = ["--conninfo", &conninfo, "--type", "incr", "--source", "local"];
    let lagging = s.backup_json(&on_standby)?;
    let start = lsn(&field(&lagging, "start_lsn")?)?;
    ensure!(
        start >= lsn(&field(&later, "start_lsn")?)? && start < lsn(&field(&later, "stop_lsn")?)?,
        "it does not begin while the other one was taken: {lagging}\n{later}"
    );
    ensure!(field(&lagging, "parent")? == field(&first, "id")?, "{lagging}");
    ensure!(
        is_same(&restored(&s, &lagging)?, &standby.data, &table)?,
        "it is not what the standby has"
    );

    // Once the standby has got there, it builds on its primary's; and the primary builds on the standby's.
    standby.sql(&s.scratch, "select pg_wal_replay_resume()")?;
    s.sql("checkpoint")?;
    catch_up()?;
    let ahead = s.backup_json(&on_standby)?;
    ensure!(field(&ahead, "parent")? == field(&later, "id")?, "{ahead}");
    ensure!(is_same(&restored(&s, &ahead)?, &s.server.data, &table)?, "{ahead}");
    s.sql("update t set n = n + 1 where n % 70 = 0")?;
    let last = s.backup_json(&["--type", "incr", "--source", "local"])?;
    ensure!(field(&last, "parent")? == field(&ahead, "id")?, "{last}");
    ensure!(is_same(&restored(&s, &last)?, &s.server.data, &table)?, "{last}");
    ensure!(check_order(&s)? == 3);
    Ok(())
}

/// A pack with a part of a table is gone: that part is read again, and nothing of what other packs hold.
#[test]
fn of_a_lost_pack_what_it_held_is_read_again_and_nothing_else() -> Result<()> {
    let s = Fixture::new(
        "lostpart",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            ..Default::default()
        },
    )?;
    // Hardly anything of it can be compressed: it fills two packs, and a part of the next one, where the manifest is.
    s.sql("create extension pgcrypto; create table t (x bytea)")?;
    s.sql("alter table t alter x set storage external")?;
    s.sql("insert into t select gen_random_bytes(1024) from generate_series(1, 70000) i")?;
    s.sql("vacuum (freeze) t")?;
    let table = s.sql("select pg_relation_filepath('t')")?;
    let full = s.backup_json(&["--type", "full"])?;
    let mut packs = s.objects("packs");
    packs.sort_by_key(|pack| pack.metadata().map_or(0, |meta| meta.len()));
    ensure!(packs.len() >= 3, "{packs:?}");
    let lost = packs.pop().context("a pack")?;
    let held = lost.metadata()?.len();
    ensure!(held >= 32 << 20, "{held} bytes");
    std::fs::remove_file(&lost)?;

    let incr = s.backup_json(&["--type", "incr", "--source", "local"])?;
    ensure!(field(&incr, "parent")? == field(&full, "id")?, "{incr}");
    let (read, cluster) = (number(&incr, "read_bytes")?, number(&incr, "plain_bytes")?);
    ensure!(
        read > held * 3 / 4 && read < cluster - (32 << 20),
        "{read} of {cluster} bytes were read for {held} that were lost"
    );
    ensure!(is_same(&restored(&s, &incr)?, &s.server.data, &table)?, "{incr}");
    // It has put everything in its place: the next one reads little.
    let next = s.backup_json(&["--type", "incr", "--source", "local"])?;
    ensure!(number(&next, "read_bytes")? < 16 << 20, "{next}");
    Ok(())
}

/// Why everything was read, as the manifest's root says it.
async fn reason_in_root(s: &Fixture, backup: &str) -> Result<String> {
    let log = stores::log_of(s).await?;
    let root = log.backup(&field(backup, "id")?)?.root.clone();
    let outline = Outline::read(log.stanza(), &root).await?;
    Ok(outline.root.info.unwrap_or_default().no_parent_reason)
}

/// The newest backup's own pack is gone, with its changed pages and its manifest: nothing is built on it, and why is said.
#[test]
fn without_the_manifest_of_the_newest_backup_everything_is_read() -> Result<()> {
    let s = Fixture::new(
        "lostmanifest",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            ..SMALL
        },
    )?;
    s.sql("create table t (n int, x text) with (fillfactor = 50)")?;
    s.sql("insert into t select i, md5(i::text) from generate_series(1, 20000) i")?;
    s.sql("vacuum (freeze) t")?;
    let table = s.sql("select pg_relation_filepath('t')")?;
    s.backup_json(&["--type", "full"])?;
    let before = s.objects("packs");
    s.sql("update t set n = n + 1 where n % 50 = 0")?;
    let lost = s.backup_json(&["--type", "incr"])?;
    let mut own = s.objects("packs");
    own.retain(|pack| !before.contains(pack));
    ensure!(!own.is_empty(), "nothing was stored");
    own.iter().try_for_each(std::fs::remove_file)?;
    s.sql("update t set n = n + 1 where n % 70 = 0")?;

    let anew = s.backup_json(&["--type", "incr"])?;
    let why = field(&anew, "no_parent_reason")?;
    let named = format!("the manifest of backup {}", field(&lost, "id")?);
    ensure!(field(&anew, "parent")?.is_empty() && why.contains(&named), "{anew}");
    // Not only the log says why.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let in_root = runtime.block_on(reason_in_root(&s, &anew))?;
    ensure!(in_root.contains(&named), "the root says {in_root:?}: {anew}");
    ensure!(is_same(&restored(&s, &anew)?, &s.server.data, &table)?, "{anew}");
    let (exit, text) = s.restore("lost", &["--backup", &field(&lost, "id")?]);
    ensure!(exit != 0, "a backup without its manifest was restored: {text}");
    // And it is one to build on.
    s.sql("update t set n = n + 1 where n % 90 = 0")?;
    let next = s.backup_json(&["--type", "incr"])?;
    ensure!(field(&next, "parent")? == field(&anew, "id")?, "{next}");
    ensure!(runtime.block_on(reason_in_root(&s, &next))?.is_empty(), "{next}");
    ensure!(is_same(&restored(&s, &next)?, &s.server.data, &table)?, "{next}");
    Ok(())
}

/// What later backups would take from a pack of which little is used, incremental ones too, they store again; then nobody
/// uses it, and it goes. Finds a parent whose content keeps such a pack for ever.
#[test]
fn a_pack_of_which_little_is_used_runs_dry() -> Result<()> {
    let s = Fixture::new(
        "rundry",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            more: "retention = { full = 1, incr = 1 }",
            ..Default::default()
        },
    )?;
    let gc = || -> Result<Value> {
        let quiet = ["--patience", "1s", "--progress", "none", "--output", "json"];
        let said = s.ok(&[&["gc", "acme"], &quiet[..]].concat())?;
        let line = said.lines().find(|line| line.starts_with("{\"")).context("no report")?;
        Ok(serde_json::from_str::<Value>(line)?["report"].clone())
    };
    s.backup_id(&["--type", "full"])?;
    let before = s.objects("packs");
    s.sql("create table small as select i, md5(i::text) as x from generate_series(1, 2000) i")?;
    s.sql("create table bulk as select md5(random()::text) as x from generate_series(1, 500000)")?;
    let first = s.backup_id(&["--type", "incr"])?;
    let mut packs = s.objects("packs");
    packs.retain(|pack| !before.contains(pack));
    packs.sort_by_key(|pack| std::fs::metadata(pack).map_or(0, |meta| meta.len()));
    let pack = packs.pop().context("a new pack")?;

    // Of that, the next one uses the small table, and not much else.
    s.sql("drop table bulk")?;
    let second = s.backup_id(&["--type", "incr"])?;
    let expire = |id: &str| -> Result<()> {
        let plan = s.ok(&["expire", "acme"])?;
        let goes = |line: &str| line.contains(id) && line.contains("  expires ");
        ensure!(plan.lines().any(goes), "{plan}");
        Ok(())
    };
    expire(&first)?;
    let done = gc()?;
    ensure!(
        done["thin_packs"]["objects"].as_u64() > Some(0) && pack.exists(),
        "{done}"
    );

    // The one after that stores it again, although it builds on that one, and nothing of it has changed.
    let third = s.backup_json(&["--type", "incr"])?;
    ensure!(field(&third, "parent")? == second, "{third}");
    expire(&second)?;
    let done = gc()?;
    ensure!(!pack.exists() && done["packs"]["objects"].as_u64() > Some(0), "{done}");
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    let (exit, text) = s.restore("r", &["--backup", &field(&third, "id")?, "--target", "immediate"]);
    ensure!(exit == 0, "{text}");
    Ok(())
}
