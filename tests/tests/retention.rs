//! Retention and collection on real backups: what expires is what was said, what is deleted is what nothing needs,
//! and what is left restores.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field, host_name, refused, signal};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::s3::S3;
use serde_json::Value;

const ARCHIVING: Shape<'static> = Shape {
    archiving: true,
    ..SMALL
};

fn retention(text: &'static str) -> Shape<'static> {
    Shape {
        more: text,
        ..ARCHIVING
    }
}

/// Rows that every backup adds: `t` has as many as there were backups.
fn backup(s: &Fixture, kind: &str) -> Result<String> {
    s.sql("create table if not exists t (x int); insert into t values (1); create table if not exists bulk (x text); truncate bulk; insert into bulk select md5(random()::text) from generate_series(1, 20000)")?;
    s.backup_id(&["--type", kind])
}

fn gc(s: &Fixture) -> Result<String> {
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])
}

fn restores(s: &Fixture, name: &str, more: &[&str], rows: usize) -> Result<()> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{text}");
    let copy = s.start(name, 5433)?;
    let found = s.rows(&copy)?;
    ensure!(
        found.trim() == rows.to_string(),
        "{name}: {found} rows instead of {rows}"
    );
    copy.stop(&s.scratch, "fast")?;
    Ok(())
}

#[test]
fn what_expired_is_collected_and_the_rest_restores() -> Result<()> {
    let s = Fixture::new(
        "retention",
        retention("retention = { full = 2, min_full = 1, wal = \"0s\" }"),
    )?;
    let (first, held, _lost) = (backup(&s, "full")?, backup(&s, "incr")?, backup(&s, "incr")?);
    s.flush_archive(&s.server)?;
    let second = backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    let (third, last) = (backup(&s, "full")?, backup(&s, "incr")?);
    s.flush_archive(&s.server)?;
    s.ok(&["hold", "acme", &held, "--reason", "a court wants it"])?;

    // The plan says why, and changes nothing.
    let packs = s.objects("packs").len();
    let plan = s.ok(&["expire", "acme", "--dry-run"])?;
    for (id, words) in [
        (&first, "no rule keeps it"),
        (&held, "held: a court wants it"),
        (&second, "one of the 2 newest full"),
        (&last, "the newest that can be restored"),
    ] {
        let line = plan
            .lines()
            .find(|line| line.contains(id.as_str()))
            .context("no line")?;
        ensure!(line.contains(words), "{line}");
    }
    ensure!(s.ok(&["info", "acme"])?.contains(&first));
    let plan = s.ok(&["gc", "acme", "--dry-run", "--progress", "none"])?;
    ensure!(
        s.objects("packs").len() == packs && plan.contains("would be deleted"),
        "{plan}"
    );

    let wal = s.objects("wal").len();
    let plan = s.ok(&["expire", "acme"])?;
    ensure!(
        plan.contains("no backup that stays needs it") && plan.contains("WAL from"),
        "{plan}"
    );
    ensure!(s.objects("wal").len() == wal);
    let info = s.ok(&["info", "acme"])?;
    ensure!(
        !info.contains(&first) && info.contains(&held) && info.contains("held: a court"),
        "{info}"
    );
    let said = gc(&s)?;
    ensure!(s.objects("packs").len() < packs, "{said}");
    ensure!(s.objects("roots").len() == 4, "{said}");
    ensure!(
        s.objects("wal").len() < wal && said.contains("objects of WAL"),
        "{said}"
    );
    ensure!(gc(&s)?.contains("nothing deleted"), "a second time");

    // Nothing is reported as missing; everything that is left restores, the held one too.
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    s.ok(&["check", "acme"])?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("MISSING") && !info.contains("gap"), "{info}");
    ensure!(info.contains("what lies between has expired"), "{info}");
    refused(
        s.restore("beyond", &["--backup", &held, "--target-time", "2100-01-01T00:00:00Z"]),
        3,
        "has expired",
    )?;
    restores(&s, "newest", &[], 6)?;
    restores(
        &s,
        "held",
        &["--backup", &held, "--target", "immediate", "--target-action", "promote"],
        2,
    )?;
    restores(
        &s,
        "second",
        &[
            "--backup",
            &second,
            "--target",
            "immediate",
            "--target-action",
            "promote",
        ],
        4,
    )?;
    refused(s.restore("first", &["--backup", &first]), 3, "no backup")?;

    // Later backups go on.
    ensure!(field(&s.ok(&["info", "acme", "--output", "json"])?, "restorable")? == "true");
    s.ok(&["unhold", "acme", &held])?;
    backup(&s, "incr")?;
    s.ok(&["expire", "acme"])?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&held));
    gc(&s)?;
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    restores(&s, "again", &[], 7)?;
    restores(
        &s,
        "third",
        &[
            "--backup",
            &third,
            "--target",
            "immediate",
            "--target-action",
            "promote",
        ],
        5,
    )
}

/// Segments that are in the repository.
fn segments(s: &Fixture) -> Vec<String> {
    let mut names: Vec<String> = s
        .objects("wal")
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_str()?.split_once('.')?.0.to_owned()))
        .filter(|name| name.len() == 24)
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Whether nothing is missing between the first and the last.
fn is_continuous(names: &[String]) -> Result<bool> {
    let mut numbers = Vec::new();
    for name in names {
        let part = |range| u64::from_str_radix(&name[range], 16);
        // Of segments of 1 MiB, 4096 have one number in the middle.
        numbers.push(part(8..16)? * 4096 + part(16..24)?);
    }
    Ok(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]))
}

#[test]
fn wal_of_the_window_stays_and_recovery_reaches_all_of_it() -> Result<()> {
    let s = Fixture::new("walwindow", retention("retention = { full = 1, wal = \"1s\" }"))?;
    s.flush_archive(&s.server)?;
    let first = backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    let second = backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    s.sql("insert into t values (3)")?;
    let time = s.sql("select to_char(now() at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")?;
    std::thread::sleep(Duration::from_secs(2));
    s.sql("insert into t values (4)")?;
    s.flush_archive(&s.server)?;
    let third = backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    let before = segments(&s);

    // The second is the newest that is older than a second: recovery into that second starts from it.
    let plan = s.ok(&["expire", "acme", "--dry-run"])?;
    let line = |id: &str| plan.lines().find(|l| l.contains(id)).unwrap_or_default().to_owned();
    ensure!(
        line(&first).contains("expires") && line(&second).contains("recovery into the last"),
        "{plan}"
    );
    ensure!(line(&third).contains("stays"), "{plan}");
    gc(&s)?;
    let now = segments(&s);
    ensure!(before.iter().all(|name| now.contains(name)), "{before:?} {now:?}");
    s.ok(&["expire", "acme"])?;
    gc(&s)?;
    let after = segments(&s);
    ensure!(after[0] > before[0] && is_continuous(&after)?, "{before:?} {after:?}");
    // Nothing new to say.
    ensure!(!s.ok(&["expire", "acme"])?.contains("expires,"));
    restores(
        &s,
        "between",
        &["--target-time", time.trim(), "--target-action", "promote"],
        3,
    )?;
    restores(&s, "end", &[], 5)?;

    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    s.ok(&["check", "acme"]).map(|_| ())
}

#[test]
fn wal_that_a_protected_backup_needs_is_not_collected() -> Result<()> {
    let s = Fixture::new("walpolicy", retention("retention = { full = 1, wal = \"0s\" }"))?;
    s.flush_archive(&s.server)?;
    backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    s.ok(&["expire", "acme"])?;
    // Said before the collector comes: it looks at the policy itself.
    s.ok(&["policy", "acme", "--minimum-retention", "1d"])?;
    let before = segments(&s);
    gc(&s)?;
    let protected = segments(&s);
    ensure!(
        protected.len() < before.len() && protected.len() > 3 && is_continuous(&protected)?,
        "{before:?} {protected:?}"
    );
    s.ok(&["policy", "acme", "--minimum-retention", "0s"])?;
    gc(&s)?;
    ensure!(segments(&s).len() < protected.len());
    restores(&s, "copy", &[], 2)
}

/// Whether a text has all of these words.
fn says(text: &str, words: &[&str]) -> bool {
    words.iter().all(|word| text.contains(word))
}

#[test]
fn what_has_expired_by_mistake_is_restored_for_as_long_as_it_is_there() -> Result<()> {
    let s = Fixture::new("mistake", retention("retention = { full = 1, wal = \"0s\" }"))?;
    s.flush_archive(&s.server)?;
    let first = backup(&s, "full")?;
    let sum = "select md5(string_agg(x, '' order by x)) from bulk";
    let content = s.sql(sum)?;
    // Where a segment has just ended, the first one gives the name of the one before.
    s.flush_archive(&s.server)?;
    let between = s.flush_archive(&s.server)?;
    for _ in 0..2 {
        backup(&s, "full")?;
        s.flush_archive(&s.server)?;
    }
    s.ok(&["expire", "acme"])?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&first));
    let by_whom = format!("backup {first} has expired, by ");
    let planned = |more: &[&str]| s.restore("planned", &[&["--backup", &first, "--dry-run"][..], more].concat());
    let (exit, said) = planned(&[]);
    let words = ["no rule keeps it", "nothing keeps it and its WAL", &by_whom];
    ensure!(exit == 0 && says(&said, &words), "{exit} {said}");

    // A policy that is raised before anything is collected keeps all of it.
    s.ok(&["policy", "acme", "--minimum-retention", "30d"])?;
    let kept = gc(&s)?;
    ensure!(kept.contains(&first) && kept.contains("its content stays"), "{kept}");
    let at_once = ["--target", "immediate", "--target-action", "promote"];
    let (exit, said) = s.restore("back", &[&["--backup", &first][..], &at_once].concat());
    let since = format!(" on {} at 2", host_name()?);
    let words = ["the signed policy keeps it", &by_whom, &since];
    ensure!(exit == 0 && says(&said, &words), "{exit} {said}");
    let copy = s.start("back", 5433)?;
    let found = copy.sql(&s.scratch, sum)?;
    ensure!(s.rows(&copy)? == "1" && found == content, "another content");
    copy.stop(&s.scratch, "fast")?;
    restores(&s, "end", &["--backup", &first], 3)?;
    // Without a name, it is none to choose from.
    let (exit, said) = s.restore("newest", &["--dry-run"]);
    ensure!(exit == 0 && !said.contains(&first), "{exit} {said}");

    // Of its WAL, what is missing is named before anything is written.
    let is_between = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(&between) && !name.contains("backup")
    };
    let lost = s.objects("wal").into_iter().find(is_between);
    std::fs::remove_file(lost.context("not archived")?)?;
    let later = planned(&["--target-time", "2100-01-01T00:00:00Z"]);
    refused(later, 3, &format!("{between} has expired"))?;
    let (exit, said) = planned(&at_once);
    ensure!(exit == 0, "{said}");

    // What nothing keeps any more is collected, and cannot be restored.
    s.ok(&["policy", "acme", "--minimum-retention", "0s"])?;
    gc(&s)?;
    let (exit, said) = s.restore("late", &["--backup", &first]);
    let words = ["has no backup", "any more: it has expired, by ", "its manifest is gone"];
    ensure!(exit == 3 && says(&said, &words), "{exit} {said}");
    ensure!(!s.scratch.join("late").exists(), "something was written");
    restores(&s, "last", &[], 3)
}

#[test]
fn the_signed_policy_outlives_what_a_configuration_asks_for() -> Result<()> {
    let s = Fixture::new("policy", retention("retention = { full = 1 }"))?;
    s.ok(&["policy", "acme", "--minimum-retention", "1d", "--minimum-full", "2"])?;
    let (first, _lost) = (backup(&s, "full")?, backup(&s, "incr")?);
    backup(&s, "full")?;
    let plan = s.ok(&["expire", "acme"])?;
    ensure!(plan.contains("younger than the 1 d of the signed policy"), "{plan}");
    // Nor does an entry of the log overrule it: the policy is looked at again before anything is deleted.
    s.ok(&["policy", "acme", "--minimum-retention", "0s", "--minimum-full", "0"])?;
    s.ok(&["expire", "acme"])?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&first));
    s.ok(&["policy", "acme", "--minimum-retention", "1d"])?;
    let (packs, said) = (s.objects("packs").len(), gc(&s)?);
    ensure!(
        said.contains("its content stays") && s.objects("packs").len() == packs,
        "{said}"
    );
    s.ok(&["policy", "acme", "--minimum-retention", "0s"])?;
    gc(&s)?;
    ensure!(s.objects("packs").len() < packs && s.objects("roots").len() == 1);
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])
        .map(|_| ())
}

#[test]
fn a_backup_at_work_is_waited_for_and_a_dead_one_is_not() -> Result<()> {
    let s = Fixture::new("gcbusy", retention("retention = { full = 1 }"))?;
    let first = backup(&s, "full")?;
    for kind in ["incr", "full"] {
        backup(&s, kind)?;
    }
    s.ok(&["expire", "acme"])?;
    let slow = [
        "backup",
        "acme",
        "--type",
        "full",
        "--max-rate",
        "1MiB",
        "--fast",
        "--progress",
        "none",
        "--source",
        "stream",
    ];
    let mut running: Command = s.command(&slow);
    let mut child = running.spawn()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while s.objects("leases").is_empty() {
        ensure!(Instant::now() < deadline, "no lease");
        std::thread::sleep(Duration::from_millis(50));
    }
    let (packs, wal) = (s.objects("packs").len(), segments(&s)[0].clone());
    // Hearts beat every 20 seconds.
    let patience = ["gc", "acme", "--patience", "25s", "--progress", "none"];
    let (exit, said) = s.fairvault(&patience);
    let since = format!(" on {} since 2", host_name()?);
    ensure!(
        exit == 5 && said.contains("waiting for backup") && said.contains(&since),
        "{exit} {said}"
    );
    ensure!(s.objects("packs").len() >= packs);
    // What has nothing to do with that backup is not waited for.
    ensure!(
        said.contains("objects of WAL deleted") && segments(&s)[0] > wal,
        "{said}"
    );
    signal(&child, "KILL")?;
    child.wait()?;
    // What is marked may go at any moment, and is not begun with.
    let marked = s.restore("marked", &["--backup", &first]);
    refused(marked, 5, "a collection has begun that may delete it")?;
    let said = gc(&s)?;
    ensure!(
        said.contains("no sign of life") && s.objects("packs").len() < packs,
        "{said}"
    );
    ensure!(s.objects("leases").is_empty(), "the lease of the dead one is left");
    ensure!(!s.ok(&["info", "acme"])?.contains("unfinished"));
    // One that was asleep for that long is told, by whom and when, as soon as it wakes up; what it did does not count.
    let count = || Ok::<_, anyhow::Error>(s.ok(&["info", "acme"])?.matches(" added ").count());
    let before = count()?;
    let sleeper = s.command(&slow).stderr(Stdio::piped()).spawn()?;
    while s.objects("leases").is_empty() {
        ensure!(Instant::now() < deadline + Duration::from_secs(60), "no lease");
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(1));
    signal(&sleeper, "STOP")?;
    gc(&s)?;
    signal(&sleeper, "CONT")?;
    let ended = sleeper.wait_with_output()?;
    let text = String::from_utf8_lossy(&ended.stderr);
    let by_whom = format!(" on {} at 2", host_name()?);
    let is_said = ["this session was fenced by", &by_whom, "no sign of life"];
    let is_said = is_said.iter().all(|word| text.contains(word));
    ensure!(ended.status.code() == Some(5) && is_said, "{} {text}", ended.status);
    ensure!(count()? == before && before > 0, "{before}");
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    backup(&s, "incr")?;
    restores(&s, "copy", &[], 4)
}

#[test]
fn the_most_particular_retention_is_obeyed() -> Result<()> {
    let s = Fixture::new("particular", SMALL)?;
    for _ in 0..4 {
        s.backup_id(&["--type", "full"])?;
    }
    let mut text = std::fs::read_to_string(s.scratch.join("fairvault.toml"))?;
    let stay = |text: &str| -> Result<usize> {
        s.scratch.write("fairvault.toml", text.as_bytes())?;
        Ok(s.ok(&["expire", "acme", "--dry-run"])?.matches("  stays  ").count())
    };
    ensure!(stay(&text)? == 4, "nobody has asked for less");
    text += "[defaults]\nretention = { full = 1 }\n";
    ensure!(stay(&text)? == 1, "[defaults]");
    text = text.replace("[stanza.acme]", "retention = { full = 2 }\n[stanza.acme]");
    ensure!(stay(&text)? == 2, "[repo.main]");
    text = text.replace("[defaults]", "retention = { full = 3 }\n[defaults]");
    ensure!(stay(&text)? == 3, "[stanza.acme]");
    // That of another repository is not meant.
    text = text.replace("[defaults]", "repo_retention.second = { full = 1 }\n[defaults]");
    ensure!(stay(&text)? == 3, "repo_retention.second");
    text = text.replace("[defaults]", "repo_retention.main = { full = 4 }\n[defaults]");
    ensure!(stay(&text)? == 4, "repo_retention.main");
    Ok(())
}

/// What a collection says that it did.
fn collected(s: &Fixture) -> Result<Value> {
    // Hearts beat every 20 seconds.
    let quiet = ["--patience", "25s", "--progress", "none", "--output", "json"];
    let said = s.ok(&[&["gc", "acme"], &quiet[..]].concat())?;
    let line = said.lines().find(|line| line.starts_with("{\""));
    let line = line.context(said.clone())?;
    Ok(serde_json::from_str::<Value>(line)?["report"].clone())
}

#[test]
fn a_restore_at_work_keeps_what_it_reads_although_that_has_expired() -> Result<()> {
    let shape = Shape {
        stanza: false,
        ..ARCHIVING
    };
    let mut s = Fixture::new("gcreader", shape)?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    let proxy = Proxy::start(Target::Port(s3.port))?;
    let rules = "retention = { full = 1, wal = \"0s\" }";
    s.use_s3(&s3.endpoint(), "s3://bucket/some/prefix", rules)?;
    // What archive_command reads, and what another host does, whose line can be made slow.
    let config = std::fs::read_to_string(s.scratch.join("s3.toml"))?;
    s.scratch.write("fairvault.toml", config.as_bytes())?;
    let slow = config.replace(&s3.endpoint(), &format!("http://127.0.0.1:{}", proxy.port));
    s.scratch.write("slow.toml", slow.as_bytes())?;
    s.ok(&["stanza", "create", "acme"])?;
    let first = backup(&s, "full")?;
    s.flush_archive(&s.server)?;
    // Under new keys, nothing that the first backup has stored is used by the second.
    s.ok(&["key", "rotate", "acme"])?;
    backup(&s, "full")?;
    s.flush_archive(&s.server)?;

    proxy.rate(500_000);
    let (said, to) = (s.path("restore.log"), s.path("copy"));
    let log = std::fs::File::create(&said)?;
    let mut command = s.scratch.command("env");
    command
        .arg(format!("HOME={}", s.path("")))
        .arg("FAIRVAULT_FAULT=quick hearts")
        .arg(s.path("fairvault"))
        .args(["--config", &s.path("slow.toml"), "--cache", &s.path("other")])
        .args(["restore", "acme", "--to", &to, "--backup", &first])
        .args(["--target", "immediate", "--target-action", "promote"])
        .args(["--progress", "plain"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut restore = command.spawn()?;
    let text = || std::fs::read_to_string(&said).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !text().contains("copying") {
        ensure!(restore.try_wait()?.is_none() && Instant::now() < deadline, "{}", text());
        std::thread::sleep(Duration::from_millis(20));
    }
    // It reads on, and does not get through.
    proxy.rate(10_000);
    s.ok(&["expire", "acme"])?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&first));
    let during = collected(&s)?;
    ensure!(restore.try_wait()?.is_none(), "nobody was at work any more: {}", text());
    let kept = during["kept"].to_string();
    ensure!(
        kept.contains(&format!("backup {first} has expired and is being read: restore on")),
        "{during}"
    );
    ensure!(
        during["packs"]["objects"] == 0 && during["roots"]["objects"] == 0,
        "{during}"
    );
    proxy.rate(0);
    let ended = restore.wait()?;
    ensure!(ended.success(), "{ended}: {}", text());
    let copy = s.start("copy", 5433)?;
    ensure!(s.rows(&copy)? == "1", "{}", s.rows(&copy)?);
    copy.stop(&s.scratch, "fast")?;

    // Now nobody reads it: all of that goes.
    let after = collected(&s)?;
    let gone = |what: &str| after[what]["objects"].as_u64();
    ensure!(
        gone("packs") > Some(0) && gone("roots") == Some(1) && gone("wal") > Some(0),
        "{after}"
    );
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    refused(s.restore("late", &["--backup", &first]), 3, "no backup")
}
