//! Several repositories of one stanza, each with its own keys: copies are complete and go on where they died, restores
//! take what one repository has lost from another, and an optional one holds up nothing.

mod stores;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::session::Session;
use fairvault_engine::commit::{Log, state};
use fairvault_engine::copy as copying;
use fairvault_engine::error::Kind;
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::progress::Progress;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::stanza::create::create;
use fairvault_engine::wal::archive::Archive;
use fairvault_format::proto;
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field, files, refused, signal};
use fairvault_tests::receiver::{Receiver, wait_until_durable};
use fairvault_tests::run;

use stores::{CLUSTER, access, key, memory};

/// A server with the repositories `main` and `second`, a cluster in each with keys of its own.
fn fixture(name: &str, archiving: bool, second: &str, stanza: &str) -> Result<Fixture> {
    let s = Fixture::new(
        name,
        Shape {
            stanza: false,
            archiving,
            settings: "archive_timeout = 60\nmax_wal_size = 2GB\n",
            ..SMALL
        },
    )?;
    let dir = s.path("").trim_end_matches('/').to_owned();
    let text = format!(
        "cache = \"{dir}/cache\"\n[repo.main]\nurl = \"file://{dir}/vault\"\n[repo.second]\nurl = \"file://{dir}/second\"\n{second}\n\
         [defaults]\nrepos = [\"main\", \"second\"]\n[stanza.acme]\nconninfo = \"host={dir} port=5432 user=postgres\"\n\
         key = {{ file = \"{dir}/key\" }}\n{stanza}\n"
    );
    s.scratch.write("fairvault.toml", text.as_bytes())?;
    s.ok(&["stanza", "create", "acme"])?;
    s.sql("create table t (x text)")?;
    Ok(s)
}

fn insert(s: &Fixture, rows: u32) -> Result<()> {
    s.sql(&format!(
        "insert into t select md5(random()::text) from generate_series(1, {rows})"
    ))?;
    Ok(())
}

fn copy(s: &Fixture, more: &[&str]) -> Result<String> {
    s.ok(&[&["copy", "acme", "--progress", "none", "--output", "json"], more].concat())
}

fn number(text: &str, key: &str) -> Result<u64> {
    field(text, key)?.parse().with_context(|| format!("{key} in {text}"))
}

/// Hides a repository, as an unmounted disk would.
fn hide(s: &Fixture, name: &str) -> Result<()> {
    Ok(std::fs::rename(s.path(name), s.path(&format!("{name}.away")))?)
}

fn show(s: &Fixture, name: &str) -> Result<()> {
    Ok(std::fs::rename(s.path(&format!("{name}.away")), s.path(name))?)
}

fn restores(s: &Fixture, name: &str, more: &[&str], rows: &str) -> Result<String> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{text}");
    let copy = s.start(name, 5433)?;
    let found = s.rows(&copy)?;
    ensure!(found.trim() == rows, "{name}: {found} rows instead of {rows}\n{text}");
    copy.stop(&s.scratch, "fast")?;
    Ok(text)
}

fn verified(s: &Fixture, repository: &str) -> Result<()> {
    let text = s.ok(&[
        "--repo",
        repository,
        "verify",
        "acme",
        "--level",
        "data",
        "--progress",
        "none",
    ])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}

fn segment_objects(s: &Fixture, vault: &str) -> Vec<PathBuf> {
    let all = files(&s.scratch.join(vault).join("acme/wal"));
    let is_segment = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().len() == 29);
    all.into_iter().filter(is_segment).collect()
}

#[test]
fn a_copy_under_other_keys_is_incremental_and_restores_alone() -> Result<()> {
    let s = fixture("copies", false, "", "")?;
    insert(&s, 60_000)?;
    let full = s.backup_id(&["--type", "full"])?;
    // The number of an entry is another one in each.
    for option in ["--older-log", "--drop-entry"] {
        refused(s.fairvault(&["repair", "acme", option, "5"]), 2, "for one repository")?;
    }
    let plan = s.ok(&["copy", "acme", "--dry-run"])?;
    ensure!(plan.contains(&full) && plan.contains("1 backups"), "{plan}");
    ensure!(
        files(&s.scratch.join("second/acme/packs")).is_empty(),
        "a dry run copied"
    );
    let first = copy(&s, &[])?;
    ensure!(first.contains(&full), "{first}");
    verified(&s, "second")?;

    // Under other keys nothing is alike, and yet only what is new is fetched and stored.
    insert(&s, 500)?;
    let incr = s.backup_id(&["--type", "incr"])?;
    let stored = number(&first, "stored_bytes")?;
    let second = copy(&s, &[])?;
    ensure!(second.contains(&incr) && !second.contains(&full), "{second}");
    let added = number(&second, "stored_bytes")?;
    ensure!(
        added * 3 < stored,
        "an incremental copy stored {added} of {stored} bytes"
    );
    let third = copy(&s, &[])?;
    // Who read what is in the log of where it was read, as far as anything was.
    let audit = s.ok(&["--repo", "main", "audit", "acme"])?;
    let noted = audit
        .lines()
        .filter(|line| line.contains("  copy, ") && line.contains("copied to "));
    let noted: Vec<&str> = noted.collect();
    ensure!(noted.len() == 2, "{audit}");
    ensure!(noted.iter().all(|line| line.contains(": 1 backups and ")), "{audit}");
    let audit = s.ok(&["--repo", "second", "audit", "acme"])?;
    let came = audit
        .lines()
        .filter(|line| line.contains("  copy, ") && line.contains(" objects of WAL copied from "));
    ensure!(came.count() == 2, "{audit}");
    ensure!(
        third.contains("\"backups\":[]") && number(&third, "segments")? == 0,
        "{third}"
    );

    // The copies stand in the order of their originals, with their facts.
    let info = s.ok(&["--repo", "second", "info", "acme"])?;
    let (a, b) = (info.find(&full).context("full")?, info.find(&incr).context("incr")?);
    ensure!(a < b && !info.contains("NOT RESTORABLE"), "{info}");

    // With the original gone for good, from the copy; and it says so.
    std::fs::remove_dir_all(s.path("vault"))?;
    let text = restores(&s, "r", &[], "60500")?;
    ensure!(text.contains("could not be used") && text.contains("second"), "{text}");
    verified(&s, "second")
}

#[test]
fn a_copy_that_is_killed_at_any_moment_is_done_by_the_next() -> Result<()> {
    let s = fixture("killed", false, "", "")?;
    insert(&s, 150_000)?;
    let ids = [s.backup_id(&["--type", "full"])?, {
        insert(&s, 2_000)?;
        s.backup_id(&["--type", "incr"])?
    }];
    let mut killed = 0;
    // Ever later moments, until one run gets through.
    for round in 0..100u64 {
        let mut child = s.command(&["copy", "acme", "--progress", "none"]);
        let quiet = || std::process::Stdio::null();
        let mut child = child.stdout(quiet()).stderr(quiet()).spawn()?;
        std::thread::sleep(Duration::from_millis(3 + 7 * round));
        if child.try_wait()?.is_some() {
            break;
        }
        child.kill()?;
        child.wait()?;
        killed += 1;
    }
    ensure!(killed >= 8, "{killed} copies were killed");
    copy(&s, &[])?;
    let info = s.ok(&["--repo", "second", "info", "acme"])?;
    for id in &ids {
        let lines = info
            .lines()
            .filter(|line| line.contains(id.as_str()) && line.contains("added"));
        ensure!(lines.count() == 1, "{id} in {info}");
    }
    verified(&s, "second")?;
    let plan = s.ok(&["copy", "acme", "--dry-run"])?;
    ensure!(plan.contains("0 backups") && plan.contains("0 WAL objects"), "{plan}");
    std::fs::remove_dir_all(s.path("vault"))?;
    restores(&s, "r", &[], "152000")?;
    Ok(())
}

/// Whatever is wrong with the first repository, the next one is asked; but not for what the caller has to say.
#[test]
fn a_repository_that_refuses_is_passed_over() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let s = fixture("denied", true, "", "backup_repos = [\"main\", \"second\"]")?;
    insert(&s, 1_000)?;
    s.backup_id(&["--type", "full"])?;
    s.flush_archive(&s.server)?;
    let set_mode = |vault: &str, mode: u32| {
        let roots = s.path(&format!("{vault}/acme/roots"));
        std::fs::set_permissions(roots, std::fs::Permissions::from_mode(mode))
    };
    set_mode("vault", 0)?;
    let text = restores(&s, "denied", &[], "1000")?;
    let said: Vec<&str> = text.lines().filter(|line| line.starts_with("note: ")).collect();
    ensure!(
        said.iter()
            .any(|line| line.contains("not from") && line.contains("/vault/")),
        "{text}"
    );
    ensure!(
        said.iter()
            .any(|line| line.contains("restored from") && line.contains("/second/")),
        "{text}"
    );

    // If none will do, it is said what is wrong with the first.
    set_mode("second", 0)?;
    let (exit, text) = s.restore("none", &[]);
    let last = text.lines().find(|line| line.starts_with("fairvault: "));
    ensure!(
        exit == 1 && last.is_some_and(|line| line.contains("/vault/acme/roots")),
        "{exit} {text}"
    );
    set_mode("vault", 0o700)?;
    set_mode("second", 0o700)?;

    // The newest backup wants a word about its tablespace: an older one without it, from the second, is no answer.
    run(s.scratch.command("mkdir").arg(s.path("ts")))?;
    s.sql(&format!("create tablespace ts location '{}'", s.path("ts")))?;
    s.backup_id(&["--repo", "main", "--type", "full"])?;
    let (exit, text) = s.restore("unmapped", &[]);
    ensure!(exit == 1 && text.contains("was not mapped"), "{exit} {text}");
    ensure!(!text.contains("trying the next repository"), "{text}");
    ensure!(!s.scratch.join("unmapped").exists(), "something was restored");
    Ok(())
}

/// The name of the segment, of 1 MiB, that a position of timeline 1 lies in.
fn first_segment(lsn: &str) -> Result<std::ffi::OsString> {
    let (high, low) = lsn.split_once('/').context("no position")?;
    let lsn = u64::from_str_radix(high, 16)? << 32 | u64::from_str_radix(low, 16)?;
    let number = lsn >> 20;
    Ok(format!("00000001{:08X}{:08X}", number / 4096, number % 4096).into())
}

#[test]
fn what_one_repository_has_lost_comes_from_another() -> Result<()> {
    let s = fixture("lost", true, "", "backup_repos = [\"main\", \"second\"]")?;
    insert(&s, 60_000)?;
    // Into both in one run.
    s.backup_id(&["--type", "full"])?;
    ensure!(
        !files(&s.scratch.join("second/acme/roots")).is_empty(),
        "the backup is in one only"
    );
    insert(&s, 3_000)?;
    s.flush_archive(&s.server)?;
    insert(&s, 4_000)?;
    s.flush_archive(&s.server)?;

    // WAL spread over both: from the backup on, each lacks every other segment. What comes before is needed by nobody.
    let info = s.ok(&["--repo", "main", "info", "acme", "--output", "json"])?;
    let first = first_segment(&field(&info, "start_lsn")?)?;
    let is_earlier = |path: &&PathBuf| path.file_name().is_some_and(|name| *name < *first);
    let (one, two) = (segment_objects(&s, "vault"), segment_objects(&s, "second"));
    let earlier = one.iter().filter(is_earlier).count();
    ensure!(one.len() == two.len() && one.len() > earlier + 2, "{one:?} {two:?}");
    for (number, (a, b)) in one.iter().zip(&two).enumerate().skip(earlier) {
        std::fs::remove_file(if number % 2 == 0 { a } else { b })?;
    }
    // One pack gone, another damaged.
    let packs = files(&s.scratch.join("vault/acme/packs"));
    let biggest = packs
        .iter()
        .max_by_key(|path| path.metadata().map_or(0, |m| m.len()))
        .context("no pack")?;
    let mut bytes = std::fs::read(biggest)?;
    let at = bytes.len() / 3;
    bytes[at] ^= 1;
    std::fs::write(biggest, bytes)?;
    let text = restores(&s, "damaged", &[], "67000")?;
    ensure!(text.contains("comes from the copy of this backup"), "{text}");
    std::fs::remove_file(biggest)?;
    let text = restores(&s, "gone", &[], "67000")?;
    ensure!(text.contains("comes from the copy of this backup"), "{text}");

    // What only one has is copied, both ways; what both have under one name must be the same.
    let (exit, text) = s.fairvault(&["check", "acme"]);
    ensure!(text.contains("WAL objects"), "{exit} {text}");
    copy(&s, &[])?;
    copy(&s, &["--from-repo", "second", "--to-repo", "main"])?;
    ensure!(segment_objects(&s, "vault").len() == one.len(), "not all came back");
    ensure!(segment_objects(&s, "second").len() == two.len(), "not all came");
    Ok(())
}

async fn put(log: &Log, number: u64, byte: u8) -> Result<()> {
    let archive = Archive::open(log, None, 3)?;
    let content = vec![byte; archive.segment_size as usize];
    archive
        .put_whole(Segment { timeline: 1, number }, proto::WalSummary::default(), content)
        .await?;
    Ok(())
}

#[tokio::test]
async fn other_content_under_one_name_is_an_error_that_names_it() -> Result<()> {
    let source = create(&access(&memory(), key(1)), CLUSTER, "main").await?;
    let mut target = create(&access(&memory(), key(2)), CLUSTER, "main").await?;
    for (log, number, byte) in [(&source, 1, 7), (&target, 1, 7), (&source, 2, 8)] {
        put(log, number, byte).await?;
    }
    let progress = Arc::new(Progress::default());
    let options = copying::Options::default();
    let report = copying::run(&source, &mut target, &options, &progress, std::future::pending()).await?;
    ensure!(report.wal.segments == 1 && report.wal.compared == 1, "{:?}", report.wal);
    put(&source, 3, 9).await?;
    put(&target, 3, 10).await?;
    let failed = copying::run(&source, &mut target, &options, &progress, std::future::pending()).await;
    let error = failed.err().context("it went well")?;
    ensure!(
        error.kind() == Kind::Refused && error.to_string().contains("000000010000000000000003"),
        "{error}"
    );
    let archive = Archive::open(&target, None, 3)?;
    let there = archive.whole_segment(Segment { timeline: 1, number: 3 }).await?;
    ensure!(there.is_some_and(|content| content[0] == 10), "it was overwritten");
    Ok(())
}

#[tokio::test]
async fn copies_stand_where_their_originals_would() -> Result<()> {
    let store = memory();
    let mut log = create(&access(&store, key(1)), CLUSTER, "main").await?;
    let original = |id: &str| proto::CopiedFrom {
        backup: id.to_owned(),
        ..Default::default()
    };
    for (id, stop_lsn, is_copy) in [
        ("c", 300, false),
        ("b", 200, true),
        ("e", 500, false),
        ("a", 100, true),
        ("d", 400, true),
    ] {
        // Two copies of one backup may be at work: what is committed first counts.
        let what = if is_copy { state::COPY } else { "backup" };
        let session = Session::begin(&mut log, what, |_| id.into()).await?;
        let late = match is_copy {
            true => Some(Session::begin(&mut log, what, |_| id.into()).await?),
            false => None,
        };
        let info = proto::BackupInfo {
            id: id.to_owned(),
            system_identifier: CLUSTER.system_identifier,
            stop_timeline: 1,
            stop_lsn,
            copied_from: is_copy.then(|| original(id)),
            ..Default::default()
        };
        session.commit(&mut log, [0; 32], info.clone()).await?;
        if let Some(late) = late {
            let error = late
                .commit(&mut log, [1; 32], info)
                .await
                .err()
                .context("committed twice")?;
            ensure!(error.kind() == Kind::Held, "{error}");
        }
    }
    let again = Log::replay(Stanza::open(&access(&store, key(1))).await?).await?;
    for log in [&log, &again] {
        let ids: Vec<&str> = log
            .state()
            .backups
            .iter()
            .filter_map(|b| Some(b.info.as_ref()?.id.as_str()))
            .collect();
        ensure!(ids == ["a", "b", "c", "d", "e"], "{ids:?}");
        ensure!(log.state().backups.iter().all(|b| b.root == [0; 32]));
    }
    ensure!(state::find_origin(log.state(), &original("b")).is_some());
    Ok(())
}

#[test]
fn an_optional_repository_that_is_away_holds_up_nothing() -> Result<()> {
    let s = fixture(
        "optional",
        true,
        "optional = true",
        "backup_repos = [\"main\", \"second\"]",
    )?;
    insert(&s, 20_000)?;
    s.backup_id(&["--type", "full"])?;
    let held = segment_objects(&s, "second").len();
    hide(&s, "second")?;
    let began = Instant::now();
    for _ in 0..4 {
        insert(&s, 5_000)?;
        s.flush_archive(&s.server)?;
    }
    ensure!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let log = s.server.log_text();
    ensure!(log.matches("ALARM").count() == 1, "one alarm a spell: {log}");
    ensure!(Path::new(&s.path("cache/spool/acme/away-second")).exists(), "no mark");

    // A backup is done, with a warning; so is what `check` and `info` say.
    let (exit, text) = s.fairvault(&["backup", "acme", "--fast", "--progress", "none", "--type", "incr"]);
    ensure!(exit == 6 && text.contains("second"), "{exit} {text}");
    let (exit, text) = s.fairvault(&["check", "acme"]);
    ensure!(
        exit == 6 && text.contains("WARN") && text.contains("second"),
        "{exit} {text}"
    );
    let text = s.ok(&["info", "acme"])?;
    ensure!(text.contains("second is away"), "{text}");

    // Back again: what it missed is filled in.
    show(&s, "second")?;
    let text = copy(&s, &[])?;
    ensure!(number(&text, "segments")? >= 4, "{text}");
    ensure!(segment_objects(&s, "second").len() > held, "nothing came");
    ensure!(
        !Path::new(&s.path("cache/spool/acme/away-second")).exists(),
        "the mark stays"
    );
    s.flush_archive(&s.server)?;
    let (exit, text) = s.fairvault(&["check", "acme"]);
    ensure!(exit == 0 && text.contains("0 backups"), "{exit} {text}");
    std::fs::remove_dir_all(s.path("vault"))?;
    restores(&s, "r", &[], "40000")?;
    // A recovery that would end before it is where it had to get is stopped.
    let (name, to) = ("000000010000000000000FF0", s.path("fetched"));
    let get = ["wal", "get", "acme", name, &to, "--timeline", "1"];
    refused(
        s.fairvault(&[&get[..], &["--through", "0/FF080000"]].concat()),
        200,
        "cannot be read",
    )?;
    refused(s.fairvault(&get), 200, "main")?;
    verified(&s, "second")
}

#[test]
fn a_receiver_goes_on_without_an_optional_repository() -> Result<()> {
    let s = fixture(
        "received",
        false,
        "optional = true",
        "wal = { flush_interval = \"200ms\" }",
    )?;
    insert(&s, 10_000)?;
    s.backup_id(&["--type", "full"])?;
    let wal = |vault: &str| files(&s.scratch.join(vault).join("acme/wal")).len();
    let wait_for_more = |vault: &str, than: usize| -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(40);
        while wal(vault) <= than {
            ensure!(Instant::now() < deadline, "nothing came into {vault}");
            insert(&s, 100)?;
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    };
    let (before, held) = (wal("vault"), wal("second"));
    hide(&s, "second")?;
    let log = s.path("receive.log");
    let mut child = s.command(&["wal", "receive", "acme"]);
    let mut child = child.stderr(std::fs::File::create(&log)?).spawn()?;
    wait_for_more("vault", before + 1)?;
    // The server keeps WAL for the required one only.
    ensure!(
        s.sql("select count(*) from pg_replication_slots")?.trim() == "1",
        "slots"
    );
    show(&s, "second")?;
    wait_for_more("second", held)?;
    std::thread::sleep(Duration::from_secs(10));
    signal(&child, "TERM")?;
    let ended = child.wait()?;
    let said = std::fs::read_to_string(&log)?;
    ensure!(ended.success(), "{ended}: {said}");
    ensure!(said.matches("ALARM").count() == 1 && said.contains("is back"), "{said}");
    // A hole is left where it was away; `copy` fills it.
    insert(&s, 100)?;
    copy(&s, &[])?;
    let rows = s.sql("select count(*) from t")?;
    ensure!(rows.trim().parse::<u64>()? > 10_000, "{rows}");
    std::fs::remove_dir_all(s.path("vault"))?;
    let (exit, text) = s.restore("r", &["--dry-run"]);
    ensure!(exit == 0, "{text}");
    verified(&s, "second")
}

#[test]
fn configurations_that_protect_nothing_are_refused() -> Result<()> {
    let s = fixture("configured", false, "", "backup_repos = [\"secnod\"]")?;
    refused(s.fairvault(&["backup", "acme"]), 2, "secnod")?;
    refused(s.fairvault(&["copy", "acme", "--to-repo", "third"]), 2, "third")?;
    refused(
        s.fairvault(&["copy", "acme", "--to-repo", "main", "--from-repo", "main"]),
        2,
        "main",
    )?;
    let config = s.path("fairvault.toml");
    let text = std::fs::read_to_string(&config)?.replace("url =", "optional = true\nurl =");
    std::fs::write(&config, text)?;
    refused(s.fairvault(&["info", "acme"]), 2, "optional")
}

#[test]
fn a_tail_that_is_in_one_repository_only_is_enough() -> Result<()> {
    let receiving = "wal = { flush_interval = \"200ms\" }";
    let s = fixture("tail", false, "optional = true", receiving)?;
    insert(&s, 1000)?;
    s.backup_id(&["--type", "full"])?;
    copy(&s, &[])?;
    hide(&s, "second")?;
    let receiver = Receiver::start(&s, &["--repo", "main"])?;
    insert(&s, 500)?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    s.server.stop(&s.scratch, "immediate")?;
    show(&s, "second")?;
    // Both can be read, and what one does not have is no hole.
    restores(&s, "r", &[], "1500").map(drop)
}

#[test]
fn wal_that_has_expired_in_the_second_does_not_come_again() -> Result<()> {
    let s = fixture(
        "copyexpired",
        true,
        "",
        "repo_retention.second = { full = 1, wal = \"0s\" }",
    )?;
    for _ in 0..2 {
        insert(&s, 20_000)?;
        s.backup_id(&["--type", "full"])?;
        s.flush_archive(&s.server)?;
    }
    copy(&s, &[])?;
    let before = segment_objects(&s, "second").len();
    s.ok(&["--repo", "second", "expire", "acme"])?;
    s.ok(&[
        "--repo",
        "second",
        "gc",
        "acme",
        "--patience",
        "1s",
        "--progress",
        "none",
    ])?;
    let after = segment_objects(&s, "second").len();
    ensure!(after < before, "{after} of {before} segments are left");
    let again = copy(&s, &[])?;
    ensure!(
        number(&again, "segments")? == 0 && segment_objects(&s, "second").len() == after,
        "{again}"
    );
    s.ok(&["check", "acme"])?;
    // The next backup is copied with its WAL, and what the second keeps is whole.
    insert(&s, 100)?;
    s.backup_id(&["--type", "incr"])?;
    s.flush_archive(&s.server)?;
    copy(&s, &[])?;
    verified(&s, "second")?;
    hide(&s, "vault")?;
    restores(&s, "alone", &[], "40100")?;
    show(&s, "vault")
}

/// Every repository's receiver is a standby of the same name: a server that waits for as many as there are repositories has
/// in each what it has acknowledged.
#[test]
fn commits_can_wait_for_every_repository() -> Result<()> {
    let s = fixture("syncall", false, "", "")?;
    s.backup()?;
    copy(&s, &[])?;
    let receiver = Receiver::start(&s, &["--synchronous"])?;
    s.sql("alter system set synchronous_standby_names = '2 (fairvault)'")?;
    s.sql("alter system set synchronous_commit = on")?;
    s.sql("select pg_reload_conf()")?;
    let sync = "select count(*) from pg_stat_replication where sync_state = 'sync'";
    s.server.wait_for(&s.scratch, sync, "2")?;
    insert(&s, 100)?;
    for _ in 0..20 {
        insert(&s, 1)?;
    }
    // Everything but the repositories is lost at once.
    let postmaster = std::fs::read_to_string(s.server.data.join("postmaster.pid"))?;
    let postmaster = postmaster.lines().next().context("pid")?.to_owned();
    run(Command::new("kill").args(["-9", &receiver.pid().to_string(), &postmaster]))?;
    receiver.kill()?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    for (name, repository, port) in [("a", "main", 5450), ("b", "second", 5451)] {
        let (exit, text) = s.restore(name, &["--repo", repository]);
        ensure!(exit == 0, "{repository}: {text}");
        s.configure(name, "synchronous_standby_names = ''\n")?;
        let rows = s.rows(&s.start(name, port)?)?;
        ensure!(rows == "120", "{repository}: {rows}");
    }
    Ok(())
}
