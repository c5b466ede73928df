//! Block maps that are kept with the WAL: those of WAL that was received are all that a backup reads of it, and those that
//! nobody may rely on are made anew from what is archived.

mod stores;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::{Segment, WalFile};
use fairvault_engine::track::PARSER_VERSION;
use fairvault_engine::wal::archive::{Archive, Stored};
use fairvault_format::proto::{SegmentMap, WalSummary};
use fairvault_tests::fixture::{SMALL, field, files, number};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::{Fixture, Receiver, Shape, code, run};

/// Bytes of a segment.
const SIZE: u64 = 1 << 20;

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

async fn open(s: &Fixture) -> Result<Archive> {
    Ok(Archive::open(&stores::log_of(s).await?, None, 3)?)
}

/// Segments that are in the repository as a whole and come after the end of a backup, in order.
fn segments_after(s: &Fixture, backup: &str) -> Result<Vec<Segment>> {
    let stop = field(backup, "stop_lsn")?.parse::<Lsn>().map_err(anyhow::Error::msg)?;
    let last = Segment::of(1, Lsn(stop.0 - 1), SIZE);
    let mut found = Vec::new();
    for object in s.objects("wal") {
        let file = object.file_name().context("a name")?.to_string_lossy().into_owned();
        let name = file.strip_suffix(".0001").unwrap_or_default();
        if let Ok(WalFile::Segment(segment)) = WalFile::parse(name, SIZE)
            && segment > last
        {
            found.push(segment);
        }
    }
    found.sort();
    Ok(found)
}

/// Damages the end of an object; its header opens all the same.
fn spoil(object: &Path) -> Result<()> {
    let mut bytes = std::fs::read(object)?;
    *bytes.last_mut().context("an empty object")? ^= 1;
    Ok(std::fs::write(object, bytes)?)
}

/// Of WAL that nobody pushed, a backup needs what the receiver has noted of each segment, and no more: it would fail over
/// what is damaged here, or read everything because of it. A receiver that keeps no map, in any of its forms or after it
/// was killed inside a segment, is found out by that; one that leaves blocks out, by the pages that are looked at.
#[test]
fn maps_of_received_wal_are_enough() -> Result<()> {
    let s = Fixture::new(
        "mapreceived",
        Shape {
            settings: "autovacuum = off\n",
            ..SMALL
        },
    )?;
    s.sql("create table t (id int primary key, n int, x text) with (fillfactor = 80)")?;
    s.sql("insert into t select i, 0, md5(i::text) from generate_series(1, 50000) i")?;
    s.sql("vacuum (freeze) t")?;
    s.sql("create table filler (x text)")?;
    let receive = |form: &[&str]| Receiver::start(&s, &[&["--flush-interval", "100ms"], form].concat());
    // Some segments, and a part of the next one.
    let change = |round: usize| -> Result<()> {
        s.sql(&format!("update t set n = n + 1 where id % 1000 = {round}"))?;
        s.sql("insert into filler select md5(i::text) from generate_series(1, 30000) i")?;
        wait_until_durable(&s, &s.server)
    };
    let receiver = receive(&[])?;
    let full = s.backup_json(&[])?;
    change(1)?;
    receiver.kill()?;
    let receiver = receive(&["--keep-pieces"])?;
    change(2)?;
    receiver.kill()?;
    let spool = s.path("spool");
    let receiver = receive(&["--spool", spool.as_str()])?;
    change(3)?;
    receiver.stop()?;

    let runtime = runtime()?;
    let archive = runtime.block_on(open(&s))?;
    let (mut whole, mut sealed) = (0, 0);
    for segment in segments_after(&s, &full)? {
        let name = segment.name(SIZE);
        ensure!(runtime.block_on(archive.whole_segment(segment))?.is_some(), "{name}");
        let object = archive.object_name(&WalFile::Segment(segment), &name);
        let object = s.scratch.join("vault/acme").join(object);
        match runtime.block_on(archive.is_one_object(segment))? {
            false => {
                sealed += 1;
                for piece in files(&object.with_extension("d")) {
                    spoil(&piece)?;
                }
            }
            true => {
                whole += 1;
                spoil(&object)?;
            }
        }
        let read = runtime.block_on(archive.whole_segment(segment));
        ensure!(read.is_err(), "{name} can be read all the same");
    }
    ensure!(
        whole >= 4 && sealed >= 2,
        "{whole} whole segments, {sealed} sealed ones"
    );

    let query = "select (select count(*) || '/' || sum(n) from t), \
                 (select count(*) || '/' || md5(string_agg(x, ',' order by x)) from filler)";
    let now = s.sql(query)?;
    // With a stream, every page is looked at: one that changed, and that no map names, is an alarm.
    for (kind, source) in [("incr", "local"), ("diff", "stream")] {
        let text = s.backup_json(&["--type", kind, "--source", source])?;
        ensure!(
            field(&text, "parent")? == field(&full, "id")? && field(&text, "no_parent_reason")?.is_empty(),
            "{kind}: {text}"
        );
        let (exit, said) = s.restore(kind, &["--backup", &field(&text, "id")?, "--target", "immediate"]);
        ensure!(exit == 0, "{said}");
        let copy = s.start(kind, 5450)?;
        let there = copy.sql(&s.scratch, query)?;
        ensure!(there == now, "{kind}: {there} instead of {now}");
        copy.stop(&s.scratch, "immediate")?;
    }
    Ok(())
}

/// What is archived of a segment.
struct Kept {
    segment: Segment,
    summary: WalSummary,
    content: Vec<u8>,
}

async fn read(s: &Fixture, segments: &[Segment]) -> Result<Vec<Kept>> {
    let archive = open(s).await?;
    let mut kept = Vec::new();
    for &segment in segments {
        let (header, content) = archive.whole_with_header(segment).await?.context("it is there")?;
        kept.push(Kept {
            segment,
            summary: header.summary.context("it has a summary")?,
            content,
        });
    }
    Ok(kept)
}

/// Puts the same segments in their places, with maps of this parser that say that nothing changed; or with none.
async fn put(s: &Fixture, kept: &[Kept], parser: Option<u32>) -> Result<()> {
    let archive = open(s).await?;
    for Kept {
        segment,
        summary,
        content,
    } in kept
    {
        let object = archive.object_name(&WalFile::Segment(*segment), &segment.name(SIZE));
        archive.stanza.store().delete(&[object]).await?;
        let map = parser.zip(summary.map.clone()).map(|(parser_version, map)| SegmentMap {
            parser_version,
            changes: None,
            ..map
        });
        let summary = WalSummary { map, ..summary.clone() };
        let stored = archive.put_whole(*segment, summary, content.clone()).await?;
        ensure!(stored == Stored::New, "{stored:?}");
    }
    Ok(())
}

/// The same, as the servers' user would have stored them.
fn plant(s: &Fixture, kept: &[Kept], parser: Option<u32>) -> Result<()> {
    runtime()?.block_on(put(s, kept, parser))?;
    // Whoever runs this test is not the one who runs backups.
    let vault = s.path("vault");
    run(Command::new("chown").args(["-R", "--reference", &vault, &vault]))?;
    Ok(())
}

/// Whether a backup has a file as the server has it on its disk: since the last checkpoint, nobody has changed it.
fn has_as_it_is(s: &Fixture, backup: &str, path: &str) -> Result<bool> {
    let (exit, text) = s.restore("r", &["--backup", &field(backup, "id")?, "--target", "immediate"]);
    ensure!(exit == 0, "{text}");
    let is_same = std::fs::read(s.server.data.join(path))? == std::fs::read(s.scratch.join("r").join(path))?;
    std::fs::remove_dir_all(s.scratch.join("r"))?;
    Ok(is_same)
}

/// Maps that are missing, or of a parser that is wrong or not known, are made of the WAL that is archived, which the
/// server no longer has; one that was planted is not believed. Whoever believes it misses what changed, as is shown.
#[test]
fn maps_that_nobody_may_rely_on_are_made_anew() -> Result<()> {
    let s = Fixture::new(
        "mapplanted",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            ..SMALL
        },
    )?;
    s.sql("create table t (id int primary key, n int, x text) with (fillfactor = 80)")?;
    s.sql("insert into t select i, 0, md5(i::text) from generate_series(1, 50000) i")?;
    s.sql("vacuum (freeze) t")?;
    let path = s.sql("select pg_relation_filepath('t')")?;
    s.flush_archive(&s.server)?;
    let full = s.backup_json(&["--type", "full"])?;
    s.sql("update t set n = 1 where id % 1000 = 0")?;
    s.flush_archive(&s.server)?;
    s.sql("checkpoint")?;
    ensure!(!has_as_it_is(&s, &full, &path)?, "nothing has changed");
    let segments = segments_after(&s, &full)?;
    ensure!(!segments.is_empty());
    for segment in &segments {
        let name = segment.name(SIZE);
        ensure!(
            !s.server.data.join("pg_wal").join(&name).exists(),
            "the server has {name}: whoever asks it needs no archive"
        );
    }
    let kept = runtime()?.block_on(read(&s, &segments))?;
    let differential = || s.backup_json(&["--type", "diff", "--source", "local"]);

    for (what, parser) in [
        ("no map", None),
        ("one of a parser that was found to be wrong", Some(1)),
        ("one of a parser that is not known", Some(PARSER_VERSION + 1)),
    ] {
        plant(&s, &kept, parser)?;
        let text = differential()?;
        ensure!(field(&text, "parent")? == field(&full, "id")?, "{what}: {text}");
        ensure!(
            number(&text, "read_bytes")? < number(&text, "plain_bytes")? / 2,
            "{what}: {text}"
        );
        ensure!(has_as_it_is(&s, &text, &path)?, "{what}: what changed was not read");
    }

    // One of this parser is relied on: it is in the header, and the content is not walked.
    plant(&s, &kept, Some(PARSER_VERSION))?;
    let text = differential()?;
    ensure!(field(&text, "parent")? == field(&full, "id")?, "{text}");
    ensure!(!has_as_it_is(&s, &text, &path)?, "what was planted does no harm");

    // Once that is distrusted, this version has no other one: everything is read.
    let parser = PARSER_VERSION.to_string();
    s.ok(&["stanza", "distrust", "acme", "--parser", &parser, "--reason", "a test"])?;
    let text = differential()?;
    let why = field(&text, "no_parent_reason")?;
    ensure!(
        field(&text, "parent")?.is_empty() && why.contains("the parser of this version is distrusted"),
        "{text}"
    );
    ensure!(has_as_it_is(&s, &text, &path)?, "what changed was not read");
    Ok(())
}

/// A parser is found to be wrong while a backup is under way that relies on it: the backup does not count. Without that,
/// it would be there after everybody was told which backups may lack changes.
#[test]
fn a_backup_whose_parser_is_distrusted_meanwhile_does_not_count() -> Result<()> {
    let s = Fixture::new("distrustbeside", SMALL)?;
    s.sql("create table t as select i, md5(i::text) from generate_series(1, 50000) i")?;
    let full = s.backup_json(&[])?;
    s.sql("update t set i = i + 1 where i % 1000 = 0")?;
    // What is no main fork is read as a whole, some seconds long.
    let slowly = [
        "backup",
        "acme",
        "--fast",
        "--type",
        "incr",
        "--source",
        "local",
        "--max-rate",
        "1MiB",
        "--progress",
        "none",
    ];
    let parser = PARSER_VERSION.to_string();
    let reading =
        "select count(*) from pg_stat_activity where query like 'SELECT catalog_version_no%' and state = 'idle'";
    let (exit, text) = std::thread::scope(|scope| -> Result<(i32, String)> {
        let backup = scope.spawn(|| code(&mut s.command(&slowly)));
        s.server.wait_for(&s.scratch, reading, "1")?;
        s.ok(&["stanza", "distrust", "acme", "--parser", &parser, "--reason", "a test"])?;
        backup.join().map_err(|_| anyhow::anyhow!("panicked"))
    })?;
    ensure!(
        exit == 5 && text.contains("was distrusted meanwhile: a test"),
        "{exit} {text}"
    );
    let info: serde_json::Value = serde_json::from_str(&s.ok(&["info", "acme", "--output", "json"])?)?;
    let stanza = &info["stanzas"][0];
    ensure!(
        stanza["backups"].as_array().is_some_and(|backups| backups.len() == 1)
            && stanza["backups"][0]["id"] == field(&full, "id")?,
        "{info}"
    );
    // Nor does anybody wait for its end.
    ensure!(stanza["sessions"].as_array().is_some_and(Vec::is_empty), "{info}");
    let next = s.backup_json(&["--type", "incr"])?;
    ensure!(field(&next, "no_parent_reason")?.contains("distrusted"), "{next}");
    Ok(())
}
