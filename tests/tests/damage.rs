//! Damage in the repository and in the source: found, named, and never restored as if nothing had happened.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{field, files, signal};
use fairvault_tests::{Fixture, Shape, code, run, tools};

fn set_up(name: &str) -> Result<Fixture> {
    Fixture::new(
        name,
        Shape {
            flags: true,
            stanza: false,
            ..Default::default()
        },
    )
}

#[test]
fn verify_finds_every_flip_cut_and_loss() -> Result<()> {
    let s = set_up("verify")?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 100000) i")?;
    s.backup()?;
    s.sql("create table u as select 1 as x")?;
    s.backup()?;
    let verify = |level: &str| s.fairvault(&["verify", "acme", "--level", level, "--progress", "none"]);
    for level in ["objects", "data"] {
        let (exit, text) = verify(level);
        ensure!(exit == 0 && text.contains("all good"), "{exit} {text}");
    }
    let mut tried = 0;
    for folder in ["packs", "index", "roots", "wal", "log"] {
        let objects = s.objects(folder);
        ensure!(!objects.is_empty(), "{folder}");
        for object in &objects {
            let good = std::fs::read(object)?;
            let len = good.len();
            let mut spots = vec![0, 5, 20, 81, len / 3, len / 2, len - 40, len - 1];
            spots.retain(|&at| at < len);
            let flips = spots.into_iter().map(|at| {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                (format!("bit at {at}"), Some(bad))
            });
            let cuts = [
                ("cut".to_owned(), Some(good[..len / 2].to_vec())),
                ("empty".to_owned(), Some(Vec::new())),
                ("gone".to_owned(), None),
            ];
            for (what, bad) in flips.chain(cuts) {
                match bad {
                    Some(bad) => std::fs::write(object, bad)?,
                    None => std::fs::remove_file(object)?,
                }
                let (exit, text) = verify("objects");
                ensure!(exit != 0, "{what} of {} was not found: {text}", object.display());
                tried += 1;
            }
            std::fs::write(object, &good)?;
        }
    }
    ensure!(tried > 60, "{tried}");
    let (exit, text) = verify("data");
    ensure!(exit == 0, "everything was put back: {text}");

    // What is lost is named; the other backup is not touched.
    let pack = s
        .objects("packs")
        .into_iter()
        .max_by_key(|p| std::fs::metadata(p).map_or(0, |m| m.len()))
        .context("a pack")?;
    let good = std::fs::read(&pack)?;
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    std::fs::write(&pack, &bad)?;
    let (exit, text) = verify("objects");
    ensure!(
        exit == 4 && text.contains("CANNOT be restored completely") && text.contains("lost: "),
        "{exit} {text}"
    );
    let to = s.scratch.join("r").display().to_string();
    let (exit, text) = s.fairvault(&["restore", "acme", "--to", &to, "--progress", "none"]);
    ensure!(
        exit == 4 && text.contains("does not open") && !Path::new(&to).join("global/pg_control").exists(),
        "{exit} {text}"
    );
    Ok(())
}

#[test]
fn damaged_pages_of_the_source_are_reported_and_kept() -> Result<()> {
    let s = set_up("pages")?;
    s.sql("create table t as select i from generate_series(1, 100000) i; create table fine as select 1 as x")?;
    let path = s.sql("select pg_relation_filepath('t')")?;
    s.server.stop(&s.scratch, "fast")?;
    let file = s.server.data.join(&path);
    let mut content = std::fs::read(&file)?;
    content[3 * 8192 + 4000] ^= 1;
    std::fs::write(&file, &content)?;
    s.server.start(&s.scratch)?;
    for source in ["local", "sql", "stream"] {
        let full = [
            "backup",
            "acme",
            "--fast",
            "--type",
            "full",
            "--progress",
            "none",
            "--source",
            source,
        ];
        let (exit, text) = s.fairvault(&full);
        ensure!(
            exit == 6 && text.contains(&format!("page 3 of {path}")) && text.contains("damaged"),
            "{source}: {exit} {text}"
        );
    }
    let (exit, text) = s.fairvault(&["verify", "acme", "--level", "data", "--progress", "none"]);
    ensure!(exit == 0, "the repository holds what the server had: {text}");
    ensure!(s.fairvault(&["info", "acme"]).1.contains("1 DAMAGED PAGES"));
    let to = s.scratch.join("r").display().to_string();
    ensure!(s.fairvault(&["restore", "acme", "--to", &to, "--progress", "none"]).0 == 0);
    ensure!(std::fs::read(Path::new(&to).join(&path))? == content);
    Ok(())
}

#[test]
fn a_killed_backup_leaves_a_valid_repository_and_its_packs_are_used_again() -> Result<()> {
    let s = set_up("killed")?;
    // Incompressible: several packs.
    s.sql(
        "create extension pgcrypto; create table t as select i, gen_random_bytes(960) as x from generate_series(1, 440000) i",
    )?;
    ensure!(s.fairvault(&["stanza", "create", "acme"]).0 == 0);
    let slow = [
        "backup",
        "acme",
        "--fast",
        "--type",
        "full",
        "--max-rate",
        "48MiB",
        "--progress",
        "none",
    ];
    let mut child = s.command(&slow).spawn()?;
    // Until the first packs are announced: genesis, begin, announce.
    let entry = s.scratch.join(&format!("vault/acme/log/{:020}", 3));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !entry.exists() {
        ensure!(
            std::time::Instant::now() < deadline && child.try_wait()?.is_none(),
            "no packs were announced"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    signal(&child, "KILL")?;
    child.wait()?;
    let (exit, text) = s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(exit == 0, "{text}");
    ensure!(s.fairvault(&["info", "acme"]).1.contains("unfinished: backup"));
    let (exit, text) = s.fairvault(&["backup", "acme", "--fast", "--progress", "none", "--output", "json"]);
    ensure!(exit == 0, "{text}");
    let number = |key: &str| -> Result<u64> { Ok(field(&text, key)?.parse()?) };
    let known = number("plain_bytes")? - number("new_plain_bytes")?;
    ensure!(
        known > 200 << 20,
        "only {known} bytes of the dead session were used again"
    );
    ensure!(
        s.fairvault(&["verify", "acme", "--level", "data", "--progress", "none"])
            .0
            == 0
    );

    // So does a killed restore: it never starts, and the same command again completes it.
    let to = s.path("r");
    let restore = ["restore", "acme", "--to", &to, "--progress", "none"];
    let mut child = s.command(&restore).spawn()?;
    let marker = s.scratch.join("r/fairvault.restoring");
    while !marker.exists() || files(Path::new(&to)).len() < 200 {
        ensure!(child.try_wait()?.is_none(), "it was too fast");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    signal(&child, "KILL")?;
    child.wait()?;
    ensure!(marker.exists() && !Path::new(&to).join("global/pg_control").exists());
    ensure!(s.copy("r", 5450).start(&s.scratch).is_err());
    let (exit, text) = s.fairvault(&restore);
    ensure!(exit == 0 && !marker.exists(), "{exit} {text}");
    ensure!(s.start("r", 5450)?.sql(&s.scratch, "select count(*) from t")? == "440000");

    // A polite stop ends the session.
    let mut child = s.command(&slow).spawn()?;
    std::thread::sleep(std::time::Duration::from_millis(700));
    signal(&child, "TERM")?;
    let status = child.wait()?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(
        s.fairvault(&["info", "acme"]).1.matches("unfinished").count() == 1,
        "only the killed one"
    );
    Ok(())
}

#[test]
fn a_full_disk_and_a_server_that_is_away_are_temporary() -> Result<()> {
    let s = set_up("full")?;
    if !tools::is_root() {
        eprintln!("a small file system can only be mounted by root");
        return Ok(());
    }
    let small = s.scratch.join("small");
    std::fs::create_dir(&small)?;
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=600k,mode=0777", "tmpfs"])
        .arg(&small))?;
    let url = format!("file://{}/vault", small.display());
    let key = s.options[3].clone();
    let conninfo = s.server.conninfo();
    let (exit, text) = code(&mut s.scratch.fairvault(&[
        "--repo-url",
        &url,
        "--key-file",
        &key,
        "--conninfo",
        &conninfo,
        "backup",
        "acme",
        "--fast",
        "--progress",
        "none",
    ]));
    let umount = run(Command::new("umount").arg(&small));
    ensure!(exit == 75 && text.to_lowercase().contains("no space"), "{exit} {text}");
    umount?;
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.fairvault(&["backup", "acme", "--progress", "none"]);
    ensure!(exit == 75 && text.contains("is the server running"), "{exit} {text}");
    Ok(())
}

#[test]
fn what_is_lost_or_rotten_is_stored_again_by_the_next_backup() -> Result<()> {
    let s = set_up("again")?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 100000) i")?;
    s.backup()?;
    let largest = |s: &Fixture| -> Result<PathBuf> {
        let packs = s.objects("packs");
        let largest = packs
            .into_iter()
            .max_by_key(|p| std::fs::metadata(p).map_or(0, |m| m.len()));
        largest.context("a pack")
    };
    let restorable = |id: &str| -> Result<()> {
        let text = s
            .fairvault(&["verify", "acme", "--level", "data", "--progress", "none"])
            .1;
        ensure!(text.contains(&format!("backup {id}: can be restored")), "{text}");
        Ok(())
    };
    // A pack is gone: what it held is stored anew.
    let lost = largest(&s)?;
    std::fs::remove_file(&lost)?;
    let second = s.backup_id(&[])?;
    ensure!(lost.exists() || largest(&s)? != lost);
    restorable(&second)?;
    // A pack is shorter than its frames need.
    let short = largest(&s)?;
    let bytes = std::fs::read(&short)?;
    std::fs::write(&short, &bytes[..bytes.len() / 2])?;
    let third = s.backup_id(&[])?;
    restorable(&third)?;
    // A pack rots: verify finds it and marks it.
    let rotten = largest(&s)?;
    let mut bytes = std::fs::read(&rotten)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&rotten, &bytes)?;
    ensure!(s.fairvault(&["verify", "acme", "--progress", "none"]).0 == 4);
    let fourth = s.backup_id(&[])?;
    restorable(&fourth)?;
    // Index runs are damaged or gone: a warning, and more is stored.
    for (number, run) in s.objects("index").into_iter().enumerate() {
        match number % 2 {
            0 => std::fs::write(&run, b"rubbish")?,
            _ => std::fs::remove_file(&run)?,
        }
    }
    let (exit, text) = s.fairvault(&["backup", "acme", "--fast", "--progress", "none"]);
    ensure!(exit == 0 && text.contains("cannot be used"), "{exit} {text}");
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.start("r", 5450)?.sql(&s.scratch, "select count(*) from t")? == "100000");
    Ok(())
}

#[test]
fn verify_reads_keys_snapshots_and_histories_too() -> Result<()> {
    let s = set_up("metadata")?;
    for _ in 0..6 {
        s.backup()?;
    }
    let verify = || s.fairvault(&["verify", "acme", "--progress", "none"]);
    ensure!(verify().0 == 0);
    let repository = s.scratch.join("vault/fairvault.json");
    let mut objects = [s.objects("keys"), s.objects("snapshots")].concat();
    ensure!(objects.len() >= 2, "{objects:?}");
    objects.push(repository);
    for object in objects {
        let good = std::fs::read(&object)?;
        for bad in [&good[..good.len() / 2], b"", b"{}"] {
            std::fs::write(&object, bad)?;
            let (exit, text) = verify();
            ensure!(exit == 4, "{}: {exit} {text}", object.display());
        }
        std::fs::remove_file(&object)?;
        let (exit, text) = verify();
        let is_snapshot = object.display().to_string().contains("snapshots");
        ensure!(
            exit == if is_snapshot { 0 } else { 4 },
            "{} gone: {exit} {text}",
            object.display()
        );
        std::fs::write(&object, &good)?;
    }
    ensure!(verify().0 == 0);
    Ok(())
}
