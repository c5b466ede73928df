//! What an incremental backup stores of a change: all of it, wherever it is in a relation, whatever file times say; and
//! little beside it, in few objects and requests, however many relations there are.

mod stores;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use fairvault_engine::manifest::Manifest;
use fairvault_format::limits::CHUNK_BYTES;
use fairvault_tests::fixture::{SMALL, field, number};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Shape, run};

/// Bytes of a page, and of a relation's file.
const PAGE: u64 = 8192;
const FILE: u64 = 1 << 30;

/// Restores a backup to `r`, without starting anything there.
fn restore(s: &Fixture, backup: &str, more: &[&str]) -> Result<()> {
    let id = field(backup, "id")?;
    let (exit, text) = s.restore("r", &[&["--backup", &id, "--target", "immediate"], more].concat());
    ensure!(exit == 0, "{text}");
    Ok(())
}

fn len(path: &Path) -> Result<u64> {
    Ok(path.metadata()?.len())
}

/// The files of a relation in a backup are, byte by byte, what the server has on its disk: nobody has touched them since.
fn has_both_files(s: &Fixture, backup: &str, path: &str) -> Result<()> {
    restore(s, backup, &["--sparse"])?;
    for file in [path.to_owned(), format!("{path}.1")] {
        let (there, here) = (s.server.data.join(&file), s.scratch.join("r").join(&file));
        run(Command::new("cmp").arg(there).arg(here)).with_context(|| format!("{file} in {backup}"))?;
    }
    Ok(std::fs::remove_dir_all(s.scratch.join("r"))?)
}

/// A table of more than 1 GiB, whose rows are at the end of its first file and in its second: changed on both sides of
/// the boundary, cut at it, and filled anew. Blocks that are numbered by file instead of by relation, and what is kept of
/// a file that was cut, would be found.
#[test]
fn a_relation_of_two_files_is_followed_across_their_boundary() -> Result<()> {
    let s = Fixture::new(
        "boundary",
        Shape {
            settings: "autovacuum = off\n",
            ..Default::default()
        },
    )?;
    s.sql("create table big (x int); insert into big values (0)")?;
    let path = s.sql("select pg_relation_filepath('big')")?;
    let (first, second) = (s.server.data.join(&path), s.server.data.join(format!("{path}.1")));
    s.server.stop(&s.scratch, "fast")?;
    // Pages of zeros are new pages: the next row goes into the last one.
    File::options().write(true).open(&first)?.set_len(FILE)?;
    s.server.start(&s.scratch)?;
    s.sql("insert into big select generate_series(1, 320000)")?;
    let on_last = "ctid >= '(131071,0)' and ctid < '(131072,0)'";
    let rows: u32 = s.sql(&format!("select count(*) from big where {on_last}"))?.parse()?;
    ensure!(
        rows > 100 && len(&second)? > 1000 * PAGE,
        "{rows} rows, {} bytes",
        len(&second)?
    );
    let full = s.backup_json(&["--type", "full"])?;
    let incremental = |source: &str| -> Result<()> {
        let text = s.backup_json(&["--type", "incr", "--source", source])?;
        // A stream sends everything.
        let is_partial = source == "stream" || number(&text, "read_bytes")? < 64 << 20;
        ensure!(
            !field(&text, "parent")?.is_empty() && is_partial && number(&text, "new_stored_bytes")? < 8 << 20,
            "{text}"
        );
        has_both_files(&s, &text, &path)
    };

    // The last page of the first file, the first of the second, and where the new rows go.
    s.sql("update big set x = -x where ctid >= '(131071,0)' and ctid < '(131073,0)' and x % 2 = 0")?;
    incremental("local")?;

    s.sql("delete from big where ctid >= '(131072,0)'")?;
    s.sql("vacuum big")?;
    ensure!(
        len(&first)? == FILE && len(&second)? == 0,
        "{} and {} bytes: it was not cut at the boundary",
        len(&first)?,
        len(&second)?
    );
    incremental("sql")?;

    // What is free in the first file is forgotten: rows go to the end.
    s.server.stop(&s.scratch, "fast")?;
    std::fs::remove_file(s.server.data.join(format!("{path}_fsm")))?;
    s.server.start(&s.scratch)?;
    s.sql("insert into big select generate_series(1, 50000)")?;
    ensure!(len(&second)? > 100 * PAGE, "{} bytes", len(&second)?);
    incremental("stream")?;
    ensure!(number(&full, "plain_bytes")? > FILE, "{full}");
    Ok(())
}

/// Files that are no main forks are compared by content, main forks by what WAL says: length and time of a file say
/// nothing. Whoever passes over a file by its time brings back what it was.
#[test]
fn what_changed_is_stored_although_length_and_time_are_as_before() -> Result<()> {
    let s = Fixture::new(
        "sametime",
        Shape {
            settings: "autovacuum = off\n",
            ..SMALL
        },
    )?;
    s.sql("create table t (id int, n int) with (fillfactor = 50)")?;
    s.sql("insert into t select i, 0 from generate_series(1, 20000) i")?;
    s.sql("vacuum (freeze) t")?;
    s.sql("checkpoint")?;
    let table = s.sql("select pg_relation_filepath('t')")?;
    // One is read at once, the other one in chunks.
    let own = [("notes", 100_000), ("long_notes", 700_000)];
    for (name, len) in own {
        s.scratch.write(&format!("data5432/{name}"), &vec![b'a'; len])?;
    }
    // A transaction's end, and a page that is no longer visible to all.
    let others = ["pg_xact/0000".to_owned(), format!("{table}_vm"), table];
    let names: Vec<String> = own.iter().map(|(name, _)| (*name).to_owned()).chain(others).collect();
    let content = || -> Result<Vec<Vec<u8>>> {
        let read = names.iter().map(|name| std::fs::read(s.server.data.join(name)));
        Ok(read.collect::<std::io::Result<_>>()?)
    };
    s.backup_json(&["--type", "full"])?;
    let mut before = content()?;
    for (round, source) in ["local", "sql", "stream"].into_iter().enumerate() {
        let times = names.iter().map(|name| s.server.data.join(name).metadata()?.modified());
        let times: Vec<SystemTime> = times.collect::<std::io::Result<_>>()?;
        s.sql(&format!("update t set n = n + 1 where id = {}", round * 3000 + 1))?;
        s.sql("checkpoint")?;
        for (name, len) in own {
            std::fs::write(s.server.data.join(name), vec![b'b' + round as u8; len])?;
        }
        for (name, time) in names.iter().zip(times) {
            let file = File::options().write(true).open(s.server.data.join(name))?;
            file.set_modified(time)?;
        }
        let now = content()?;
        for (name, (was, is)) in names.iter().zip(before.iter().zip(&now)) {
            ensure!(was.len() == is.len() && was != is, "{source}: {name} is no test");
        }
        let text = s.backup_json(&["--type", "incr", "--source", source])?;
        ensure!(!field(&text, "parent")?.is_empty(), "{text}");
        restore(&s, &text, &[])?;
        for (name, is) in names.iter().zip(&now) {
            let there = std::fs::read(s.scratch.join("r").join(name))?;
            ensure!(there == *is, "{source}: {name} is not as the server had it");
        }
        std::fs::remove_dir_all(s.scratch.join("r"))?;
        before = now;
    }
    Ok(())
}

async fn manifest(s: &Fixture, backup: &str) -> Result<Manifest> {
    let log = stores::log_of(s).await?;
    let root = log.backup(&field(backup, "id")?)?.root.clone();
    Ok(Manifest::read(log.stanza(), &root).await?)
}

/// Of pages that changed all over a file, as many go into a frame as it takes: a frame for each of them, or for each run,
/// would be hundreds of small ones.
#[test]
fn scattered_pages_of_a_file_are_gathered_into_full_frames() -> Result<()> {
    let s = Fixture::new(
        "gathered",
        Shape {
            settings: "autovacuum = off\nwal_keep_size = 1GB\n",
            ..Default::default()
        },
    )?;
    s.sql("create table t (id int primary key, n int, x text) with (fillfactor = 50)")?;
    s.sql("insert into t select i, 0, md5(i::text) || md5((i * 3)::text) from generate_series(1, 150000) i")?;
    s.sql("vacuum (freeze) t")?;
    let path = s.sql("select pg_relation_filepath('t')")?;
    let full = s.backup_json(&["--type", "full"])?;
    // A row on each eighth page; its new version finds room there.
    s.sql("update t set n = 1 where (ctid::text::point)[0]::int % 8 = 0 and (ctid::text::point)[1]::int = 1")?;
    let changed: u64 = s.sql("select (pg_relation_size('t') / 8192 + 7) / 8")?.parse()?;
    ensure!(changed > 400, "{changed} pages");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let of_full = runtime.block_on(manifest(&s, &full))?;
    let known: HashSet<[u8; 32]> = of_full.frames.iter().map(|frame| frame.id).collect();
    let packs = s.objects("packs").len();
    for (round, source) in ["local", "sql", "stream"].into_iter().enumerate() {
        let text = s.backup_json(&["--type", "diff", "--source", source])?;
        ensure!(field(&text, "parent")? == field(&full, "id")?, "{text}");
        let manifest = runtime.block_on(manifest(&s, &text))?;
        let table = manifest.files.iter().position(|file| file.path == path);
        let table = table.context("the table")? as u32;
        // What of the table is in frames that the full backup does not have.
        let mut new: BTreeMap<u32, u64> = BTreeMap::new();
        for part in manifest.placements.iter().filter(|part| part.file == table) {
            if !known.contains(&manifest.frames[part.frame as usize].id) {
                *new.entry(part.frame).or_default() += u64::from(part.len);
            }
        }
        let bytes: u64 = new.values().sum();
        ensure!(bytes == changed * PAGE, "{source}: {bytes} bytes of {changed} pages");
        let chunk = u64::from(CHUNK_BYTES);
        let full_ones = new.values().filter(|len| **len == chunk).count() as u64;
        ensure!(
            new.len() as u64 == bytes.div_ceil(chunk) && full_ones == bytes / chunk,
            "{source}: {new:?}"
        );
        // Another source finds the same pages, and the repository has them by then.
        ensure!(s.objects("packs").len() <= packs + 2 * (round + 1), "{source}");
    }
    Ok(())
}

/// Thousands of relations cost an incremental backup nothing that grows with them: what it stores, the objects that it
/// makes and the requests that it sends follow from what changed, also where that is a page in each of many files.
#[test]
fn of_many_relations_an_incremental_makes_few_objects_and_requests() -> Result<()> {
    let mut s = Fixture::new(
        "manyobjects",
        Shape {
            stanza: false,
            settings: "autovacuum = off\nmax_locks_per_transaction = 1000\nwal_keep_size = 4GB\n",
            ..Default::default()
        },
    )?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    let proxy = Proxy::start(Target::Port(s3.port))?;
    s.use_s3(&format!("http://127.0.0.1:{}", proxy.port), "s3://bucket/x", "")?;
    s.ok(&["stanza", "create", "acme"])?;
    let each = |count: u32, what: &str| s.sql(&format!("do $$ begin for i in 1..{count} loop {what} end loop; end $$"));
    for part in 0..20 {
        each(
            100,
            &format!(
                "execute format('create table t_{part}_%s (id int primary key, n int)', i); \
                 execute format('insert into t_{part}_%s values (1, 0)', i);"
            ),
        )?;
    }
    // Ten pages each. They are looked at once, so that no hints are left to be set.
    each(
        300,
        "execute format('create table w_%s (id int, n int) with (fillfactor = 50)', i); \
         execute format('insert into w_%s select j, 0 from generate_series(1, 1200) j', i);",
    )?;
    each(300, "execute format('select count(*) from w_%s', i);")?;
    let objects = || -> Result<usize> {
        let url = format!("{}/bucket?list-type=2&prefix=x/acme/", s3.endpoint());
        Ok(s3.curl(&["-fs", &url])?.matches("<Key>").count())
    };
    let taken = |kind: &str| -> Result<(String, u64, usize)> {
        let (requests, before) = (proxy.requests(), objects()?);
        let text = s.backup_json(&["--type", kind])?;
        Ok((text, proxy.requests() - requests, objects()?.saturating_sub(before)))
    };
    let (full, requests, _) = taken("full")?;
    ensure!(number(&full, "files")? > 5000, "{full}");
    let mib: u64 = s
        .sql("select sum(pg_database_size(oid))::bigint >> 20 from pg_database")?
        .parse()?;
    let allowed = mib / 16 + 50;
    ensure!(
        requests <= allowed,
        "{requests} requests for a full backup of {mib} MiB"
    );
    let before = proxy.requests();
    let (exit, text) = s.restore("r", &[]);
    let requests = proxy.requests() - before;
    ensure!(
        exit == 0 && requests <= allowed,
        "{requests} requests for a restore of {mib} MiB: {text}"
    );
    s.sql("update t_7_7 set n = 1")?;
    let one = taken("incr")?;
    each(300, "execute format('update w_%s set n = 1 where id = 600', i);")?;
    let scattered = taken("incr")?;
    let again = taken("diff")?;
    for (what, limit, (text, requests, objects)) in [
        ("a row", 400 << 10, &one),
        ("a page in each of 300 files", 2 << 20, &scattered),
        ("both", 2 << 20, &again),
    ] {
        let stored = number(text, "new_stored_bytes")?;
        println!("{what}: {stored} bytes, {objects} objects, {requests} requests");
        ensure!(!field(text, "parent")?.is_empty(), "{what}: {text}");
        ensure!(stored < limit, "{what}: {text}");
        ensure!(
            *objects <= 15 && *requests < 150,
            "{what}: {objects} objects, {requests} requests"
        );
    }
    Ok(())
}
