//! After damage: the index is made anew from packs, lost content is named to the byte, and the next backup stores it
//! again. Whatever happens to a repair, nothing is worse than before.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field, files, refused, signal};
use serde_json::Value;

const ARCHIVING: Shape<'static> = Shape {
    archiving: true,
    more: "retention = { full = 1 }",
    ..SMALL
};

fn set_up(name: &str, rows: u32) -> Result<Fixture> {
    let s = Fixture::new(name, ARCHIVING)?;
    s.sql(&format!(
        "create table t as select i, md5(i::text) as x from generate_series(1, {rows}) i"
    ))?;
    Ok(s)
}

fn repair(s: &Fixture, more: &[&str]) -> (i32, String) {
    s.fairvault(&[&["repair", "acme", "--progress", "none"], more].concat())
}

fn verify(s: &Fixture) -> (i32, String) {
    s.fairvault(&["verify", "acme", "--level", "data", "--progress", "none"])
}

fn report(s: &Fixture, verb: &str) -> Result<Value> {
    let (_, text) = s.fairvault(&[verb, "acme", "--progress", "none", "--output", "json"]);
    let line = text.lines().find(|line| line.starts_with('{')).context(text.clone())?;
    Ok(serde_json::from_str::<Value>(line)?["report"].clone())
}

/// Every object but log entries, snapshots, leases and WAL, with its content.
fn content(s: &Fixture) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let all = ["packs", "index", "roots", "keys", "distrusted"];
    let paths = all.iter().flat_map(|folder| s.objects(folder));
    paths.map(|path| Ok((path.clone(), std::fs::read(&path)?))).collect()
}

/// How much of a full backup was not known.
fn share_of_new(s: &Fixture) -> Result<f64> {
    let text = s.backup_json(&["--type", "full"])?;
    let number = |key: &str| -> Result<f64> { Ok(field(&text, key)?.parse()?) };
    Ok(number("new_plain_bytes")? / number("plain_bytes")?)
}

fn largest(s: &Fixture) -> Result<PathBuf> {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |meta| meta.len());
    s.objects("packs").into_iter().max_by_key(size).context("a pack")
}

fn flip(path: &PathBuf) -> Result<()> {
    let mut bytes = std::fs::read(path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    Ok(std::fs::write(path, &bytes)?)
}

#[test]
fn the_index_is_made_anew_from_packs() -> Result<()> {
    let s = set_up("reindex", 50_000)?;
    s.backup_id(&[])?;
    s.sql("create table u as select i from generate_series(1, 20000) i")?;
    s.backup_id(&[])?;
    let before = content(&s)?;
    let said = s.ok(&["repair", "acme", "--progress", "none"])?;
    ensure!(said.contains("nothing to repair") && content(&s)? == before, "{said}");
    // That somebody looked is in the log once an hour.
    refused(repair(&s, &["--dry-run"]), 0, "nothing to repair")?;

    for damage in ["gone", "rubbish", "half"] {
        // What earlier rounds have withdrawn.
        s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
        let runs = s.objects("index");
        ensure!(!runs.is_empty());
        for (number, run) in runs.iter().enumerate() {
            match damage {
                "gone" => std::fs::remove_file(run)?,
                "rubbish" => std::fs::write(run, b"rubbish")?,
                _ if number == 0 => {
                    let bytes = std::fs::read(run)?;
                    std::fs::write(run, &bytes[..bytes.len() / 2])?;
                }
                _ => {}
            }
        }
        refused(verify(&s), 4, "index/")?;
        let (before, entries) = (content(&s)?, s.objects("log").len());
        refused(repair(&s, &["--dry-run"]), 4, "would be put into it again")?;
        ensure!(
            content(&s)? == before && s.objects("log").len() == entries,
            "a dry run changes nothing"
        );
        let (exit, said) = repair(&s, &[]);
        ensure!(exit == 0 && said.contains("are in it again"), "{exit} {said}");
        refused(verify(&s), 0, "all good")?;
        ensure!(repair(&s, &[]).1.contains("nothing to repair"));
        let new = share_of_new(&s)?;
        ensure!(new < 0.1, "{damage}: {new} of a backup was not known");
    }
    let audit = s.ok(&["audit", "acme"])?;
    ensure!(audit.contains("packs are in the index again"), "{audit}");
    // What was withdrawn is collected, and the rest restores.
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    refused(verify(&s), 0, "all good")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "50000");
    Ok(())
}

/// Lost bytes of a backup by file, checked for what must be true of ranges.
fn lost_bytes(verdict: &Value) -> Result<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    for file in verdict["lost"].as_array().context("lost")? {
        let number = |value: &Value| value.as_u64().context("a number");
        let (mut end, mut sum) = (0, 0);
        for range in file["ranges"].as_array().context("ranges")? {
            let (from, to) = (number(&range["from"])?, number(&range["to"])?);
            ensure!(from >= end && to > from && (from == 0 || from > end), "{file}");
            sum += to - from;
            end = to;
        }
        ensure!(
            end <= number(&file["size"])? && sum == number(&file["lost_bytes"])?,
            "{file}"
        );
        all.insert(file["path"].as_str().context("path")?.to_owned(), sum);
    }
    Ok(all)
}

#[test]
fn lost_content_is_named_and_stored_again() -> Result<()> {
    for damage in ["gone", "rotten"] {
        let s = Fixture::new(&format!("lost{damage}"), ARCHIVING)?;
        let base = s.backup_id(&[])?;
        s.sql("create table t as select i, md5(i::text) as x from generate_series(1, 200000) i")?;
        let table = s.sql("select pg_relation_filepath('t')")?;
        let size: u64 = s.sql("select pg_relation_size('t')")?.parse()?;
        let first = s.backup_id(&["--type", "incr"])?;
        s.sql("create table later as select 1 as x")?;
        let second = s.backup_id(&["--type", "incr"])?;
        let pack = largest(&s)?;
        match damage {
            "gone" => std::fs::remove_file(&pack)?,
            _ => flip(&pack)?,
        }
        let (exit, said) = repair(&s, &[]);
        ensure!(
            exit == 4 && said.contains(&format!("backup {first}: CANNOT")) && said.contains("lost: "),
            "{exit} {said}"
        );
        let found = report(&s, "repair")?;
        let verified = report(&s, "verify")?;
        ensure!(
            found["backups"] == verified["backups"],
            "verify says the same: {found} {verified}"
        );
        let name = pack.file_name().context("a name")?.to_string_lossy().into_owned();
        ensure!(found["gone_packs"].to_string().contains(&name), "{found}");
        let verdicts = found["backups"].as_array().context("backups")?;
        ensure!(
            verdicts[0]["restorable"] == true,
            "what does not use the pack is as it was: {found}"
        );
        let (one, two) = (lost_bytes(&verdicts[1])?, lost_bytes(&verdicts[2])?);
        match damage {
            // The table is in the largest pack, whole.
            "gone" => ensure!(
                one.get(&table) == Some(&size) && two.get(&table) == Some(&size),
                "{one:?}"
            ),
            // One frame is hit, whoever uses it: a chunk has at most 512 KiB.
            _ => ensure!(
                one.values().all(|&lost| lost <= 512 << 10) && !one.is_empty(),
                "{one:?}"
            ),
        }
        ensure!(damage == "gone" || s.objects("distrusted").len() == 1);
        // What is said to be lost is what cannot be restored.
        refused(
            s.restore("bad", &["--backup", &first]),
            if damage == "gone" { 3 } else { 4 },
            &name,
        )?;

        // The next backups store it anew, the incremental one too.
        let third = s.backup_id(&["--type", "incr"])?;
        let fourth = s.backup_id(&["--type", "incr"])?;
        let (exit, text) = verify(&s);
        for id in [&base, &third, &fourth] {
            ensure!(text.contains(&format!("backup {id}: can be restored")), "{exit} {text}");
        }
        for id in [&first, &second] {
            ensure!(text.contains(&format!("backup {id}: CANNOT")), "{exit} {text}");
        }
        s.flush_archive(&s.server)?;
        let (exit, text) = s.restore("r", &["--backup", &fourth]);
        ensure!(exit == 0, "{text}");
        let copy = s.start("r", 5450)?;
        ensure!(s.rows(&copy)? == "200000");
        copy.stop(&s.scratch, "fast")?;

        // When the old ones have expired, nothing is left of the damage.
        s.backup_id(&["--type", "full"])?;
        s.ok(&["expire", "acme"])?;
        s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
        refused(verify(&s), 0, "all good")?;
        ensure!(repair(&s, &[]).1.contains("nothing to repair"));
    }
    Ok(())
}

#[test]
fn a_repair_that_is_killed_is_repeated() -> Result<()> {
    let s = set_up("rekill", 10)?;
    s.sql("create table big as select i, (select string_agg(decode(md5(random()::text || j), 'hex'), '') from generate_series(i - i + 1, 60) j) as x from generate_series(1, 90000) i")?;
    s.backup_id(&["--source", "stream"])?;
    let packs = s.objects("packs");
    let mut cut_short = 0;
    for pause_ms in (0..10).map(|n| 5 + 25 * n) {
        s.objects("index").iter().try_for_each(std::fs::remove_file)?;
        let mut child = s.command(&["repair", "acme", "--progress", "none"]).spawn()?;
        std::thread::sleep(Duration::from_millis(pause_ms));
        let _ = signal(&child, "KILL");
        cut_short += usize::from(child.wait()?.code().is_none());
        ensure!(s.objects("packs") == packs, "no pack is touched");
        ensure!(
            [0, 4].contains(&s.fairvault(&["verify", "acme", "--progress", "none"]).0),
            "after {pause_ms} ms"
        );
    }
    ensure!(cut_short > 2, "{cut_short}");
    ensure!(repair(&s, &[]).0 == 0);
    refused(verify(&s), 0, "all good")?;
    let new = share_of_new(&s)?;
    ensure!(new < 0.1, "{new} of a backup was not known");
    // What dead repairs have left is ended and collected.
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("unfinished"), "{info}");
    refused(verify(&s), 0, "all good")
}

#[test]
fn it_works_beside_backups_and_collection() -> Result<()> {
    let s = set_up("rebeside", 100_000)?;
    s.backup_id(&["--type", "full"])?;
    s.backup_id(&["--type", "full"])?;
    s.ok(&["expire", "acme"])?;
    s.sql("create table more as select i, md5(random()::text) from generate_series(1, 100000) i")?;
    let slow = [
        "backup",
        "acme",
        "--type",
        "full",
        "--max-rate",
        "8MiB",
        "--fast",
        "--progress",
        "none",
    ];
    let mut backup = s
        .command(&[slow.as_slice(), &["--source", "stream"]].concat())
        .spawn()?;
    while s.objects("leases").is_empty() {
        ensure!(backup.try_wait()?.is_none(), "it was too fast");
        std::thread::sleep(Duration::from_millis(20));
    }
    s.objects("index").iter().try_for_each(std::fs::remove_file)?;
    let mut gc = s
        .command(&["gc", "acme", "--patience", "25s", "--progress", "none"])
        .spawn()?;
    let (exit, said) = repair(&s, &[]);
    ensure!(exit == 0 && said.contains("are in it again"), "{exit} {said}");
    ensure!(backup.wait()?.success());
    let code = gc.wait()?.code();
    ensure!(code == Some(0) || code == Some(5), "{code:?}");
    // What the backup had announced when it was lost, its commit has named again.
    let (exit, said) = repair(&s, &[]);
    ensure!(exit == 0, "{said}");
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    refused(verify(&s), 0, "all good")?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "100000");
    Ok(())
}

#[test]
fn a_newer_format_is_left_alone() -> Result<()> {
    let s = set_up("renewer", 100)?;
    s.backup_id(&[])?;
    std::fs::remove_file(&s.objects("index")[0])?;
    let file = s.scratch.join("vault/fairvault.json");
    let text = std::fs::read_to_string(&file)?;
    let newer = text
        .replace("\"version\":1", "\"version\":2")
        .replace("\"version\": 1", "\"version\": 2");
    ensure!(newer != text);
    std::fs::write(&file, newer)?;
    // The server may still be archiving.
    let there = || -> Vec<_> {
        let all = files(&s.scratch.join("vault")).into_iter();
        all.filter(|path| !path.display().to_string().contains("/acme/wal/"))
            .collect()
    };
    let before = there();
    refused(repair(&s, &[]), 1, "not supported by this version")?;
    ensure!(there() == before);
    std::fs::write(&file, text)?;
    ensure!(repair(&s, &[]).0 == 0);
    Ok(())
}

/// What cannot be restored is no reason to give up what can.
#[test]
fn a_damaged_backup_takes_the_place_of_no_good_one() -> Result<()> {
    for damage in ["found", "gone"] {
        let s = set_up(&format!("place{damage}"), 20_000)?;
        let good = s.backup_id(&["--type", "full"])?;
        let before = s.objects("packs");
        s.sql("create table u as select i, md5((i * 7)::text) as x from generate_series(1, 20000) i")?;
        let bad = s.backup_id(&["--type", "full"])?;
        let mut new = s.objects("packs");
        new.retain(|pack| !before.contains(pack));
        new.sort_by_key(|pack| std::fs::metadata(pack).map_or(0, |meta| meta.len()));
        let pack = new.pop().context("a new pack")?;
        let dry_run = ["expire", "acme", "--dry-run"];
        let line = |text: &str, id: &str| text.lines().find(|l| l.contains(id)).unwrap_or_default().to_owned();
        let text = s.ok(&dry_run)?;
        ensure!(line(&text, &good).contains("expires"), "{text}");
        match damage {
            "found" => {
                flip(&pack)?;
                let (exit, text) = verify(&s);
                ensure!(exit == 4, "{exit} {text}");
                let info = s.ok(&["info", "acme"])?;
                ensure!(
                    line(&info, &bad).contains("DAMAGED") && !line(&info, &good).contains("DAMAGED"),
                    "{info}"
                );
            }
            _ => std::fs::remove_file(&pack)?,
        }
        let text = s.ok(&dry_run)?;
        ensure!(line(&text, &good).contains("stays"), "{text}");
        ensure!(
            text.contains(&format!("WARNING: backup {bad} cannot be restored as it is")),
            "{text}"
        );
        // Brought back, it is as good as before, although it was found damaged once.
        let lost = s.scratch.join("lost");
        if damage == "found" {
            std::fs::copy(&pack, &lost)?;
            flip(&pack)?;
            let text = s.ok(&dry_run)?;
            ensure!(
                line(&text, &good).contains("expires") && !text.contains("WARNING"),
                "{text}"
            );
            let info = s.ok(&["info", "acme"])?;
            ensure!(!info.contains("DAMAGED"), "{info}");
            std::fs::copy(&lost, &pack)?;
        }
        s.ok(&["expire", "acme"])?;
        s.ok(&["gc", "acme", "--patience", "0s", "--progress", "none"])?;
        s.ok(&["gc", "acme", "--patience", "0s", "--progress", "none"])?;
        let (exit, text) = s.restore("r", &["--backup", &good]);
        ensure!(exit == 0, "{text}");
        // With a new one that is whole, all is as before.
        let newest = s.backup_id(&["--type", "full"])?;
        let text = s.ok(&dry_run)?;
        for (id, word) in [(&good, "expires"), (&bad, "expires"), (&newest, "stays")] {
            ensure!(line(&text, id).contains(word), "{id}: {text}");
        }
    }
    Ok(())
}
