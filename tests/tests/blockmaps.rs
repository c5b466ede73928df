//! Block maps beside the summaries that PostgreSQL 17 and later makes of its own WAL.

mod stores;

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::postgres::walker::Walker;
use fairvault_engine::stanza::create::create;
use fairvault_engine::track::PARSER_VERSION;
use fairvault_engine::track::map::{BlockMap, RelationId};
use fairvault_engine::track::records;
use fairvault_engine::wal::archive::Archive;
use fairvault_engine::wal::summary::summarize;
use fairvault_format::proto;
use fairvault_tests::tools::reader;
use fairvault_tests::{Fixture, Scratch, Server, Shape};
use prost::Message;

use stores::{CLUSTER, access, key, memory};

const SEGMENT: u64 = 16 << 20;

/// What the server says of a relation's main fork.
#[derive(Default)]
struct Summary {
    limit: Option<u32>,
    blocks: Vec<u32>,
}

fn work(server: &Server, scratch: &Scratch) -> Result<()> {
    for sql in [
        "create table a (i int primary key, t text, j jsonb)",
        "create index on a using gin (j); create index on a using hash (t)",
        "insert into a select i, md5(i::text), json_build_object('a', i % 7)::jsonb from generate_series(1, 20000) i",
        "update a set t = t || 'x' where i % 3 = 0",
        "delete from a where i > 5000",
        "vacuum a",
        "create table b as select * from a",
        "truncate b",
        "insert into b select * from a",
        "begin; create table c as select * from a; rollback",
        "create sequence s; select nextval('s') from generate_series(1, 100)",
        "drop table b",
        "create database d template template0 strategy wal_log",
        "create database e template template0 strategy file_copy",
        "drop database e",
        "vacuum full a",
        "reindex table a",
        "checkpoint",
    ] {
        for statement in sql.split(';') {
            let whole = if sql.starts_with("begin") { sql } else { statement };
            server.sql(scratch, whole)?;
            if sql.starts_with("begin") {
                break;
            }
        }
    }
    Ok(())
}

/// Walks the server's own WAL.
fn map(server: &Server, timeline: u32, from: Lsn, to: Lsn) -> Result<BlockMap> {
    let mut map = BlockMap::default();
    let mut segment = Segment::of(timeline, from, SEGMENT);
    let mut walker = Walker::new(segment.start(SEGMENT), SEGMENT);
    while segment.start(SEGMENT) < to {
        let content = std::fs::read(server.data.join("pg_wal").join(segment.name(SEGMENT)))?;
        walker.feed(&content, |record| {
            if (from..to).contains(&record.lsn) {
                records::note(&mut map, record);
            }
        });
        segment = segment.next();
    }
    ensure!(
        walker.stopped().is_none_or(|stop| stop.at >= to),
        "{:?}",
        walker.stopped()
    );
    Ok(map)
}

fn compare(major: u32) -> Result<()> {
    let scratch = Scratch::new(&format!("maps{major}"))?;
    let settings = "summarize_wal = on\nwal_keep_size = 2GB\nautovacuum = off\n";
    let server = Server::create(&scratch, major, 5432, settings)?;
    server.sql(&scratch, "checkpoint")?;
    work(&server, &scratch)?;
    let at = server.sql(&scratch, "select pg_current_wal_lsn()")?;
    server.sql(&scratch, "checkpoint")?;
    server.wait_for(
        &scratch,
        &format!("select count(*) > 0 from pg_available_wal_summaries() where end_lsn >= '{at}'"),
        "t",
    )?;
    let summaries = server.sql(
        &scratch,
        "select tli, start_lsn, end_lsn from pg_available_wal_summaries() order by 2",
    )?;
    let (mut relations, mut blocks) = (0, 0);
    for line in summaries.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        let lsn = |text: &str| text.parse::<Lsn>().map_err(anyhow::Error::msg);
        let (from, to) = (lsn(fields[1])?, lsn(fields[2])?);
        let ours = map(&server, fields[0].parse()?, from, to)?;
        ensure!(ours.unknown().is_none(), "{:?}", ours.unknown());
        let contents = server.sql(
            &scratch,
            &format!(
                "select reltablespace, reldatabase, relfilenode, relblocknumber, is_limit_block \
                 from pg_wal_summary_contents({}, '{from}', '{to}') where relforknumber = 0",
                fields[0]
            ),
        )?;
        let mut theirs: BTreeMap<RelationId, Summary> = BTreeMap::new();
        for row in contents.lines() {
            let row: Vec<&str> = row.split('|').collect();
            let number = |at: usize| row[at].parse::<u32>().context("a number");
            let id = RelationId {
                tablespace: number(0)?,
                database: number(1)?,
                relation: number(2)?,
            };
            let summary = theirs.entry(id).or_default();
            match row[4] {
                "t" => summary.limit = Some(number(3)?),
                _ => summary.blocks.push(number(3)?),
            }
        }
        for (id, summary) in &theirs {
            relations += 1;
            // A database that was made or dropped has an entry without a relation.
            if id.relation == 0 {
                ensure!(ours.has_database(*id), "database {}", id.database);
                continue;
            }
            for &block in &summary.blocks {
                blocks += 1;
                ensure!(
                    ours.has(*id, block),
                    "{id:?} block {block} is missing in {from} to {to}"
                );
            }
            let limit = ours.changes(*id).and_then(|changes| changes.limit());
            ensure!(
                limit == summary.limit,
                "{id:?}: limit {limit:?}, the server says {:?}",
                summary.limit
            );
        }
        for (id, changes) in ours.relations() {
            let summary = theirs.get(&id);
            for block in changes.blocks(0, u32::MAX) {
                let is_there =
                    summary.is_some_and(|s| s.blocks.contains(&block) || s.limit.is_some_and(|limit| block >= limit));
                ensure!(is_there, "{id:?} block {block} is only in ours, {from} to {to}");
            }
        }
    }
    ensure!(
        relations > 50 && blocks > 1000,
        "{relations} relations, {blocks} blocks"
    );
    Ok(())
}

#[test]
fn maps_of_17_are_what_the_server_summarizes() -> Result<()> {
    compare(17)
}

#[test]
fn maps_of_18_are_what_the_server_summarizes() -> Result<()> {
    compare(18)
}

/// Kept maps are a thousandth of the WAL that they describe.
#[test]
fn maps_of_a_pgbench_load_are_small() -> Result<()> {
    let s = Fixture::new(
        "mapsize",
        Shape {
            archiving: true,
            settings: "autovacuum = off\nmax_wal_size = 4GB\nshared_buffers = 256MB\n",
            ..Default::default()
        },
    )?;
    fairvault_tests::run(&mut s.server.pgbench(&s.scratch, &["-i", "-q", "-s", "20"]))?;
    s.sql("checkpoint")?;
    let from = s.flush_archive(&s.server)?;
    fairvault_tests::run(
        &mut s
            .server
            .pgbench(&s.scratch, &["-n", "-c", "4", "-j", "2", "-t", "20000"]),
    )?;
    s.flush_archive(&s.server)?;
    let (mut wal, mut maps) = (0, 0);
    for entry in std::fs::read_dir(s.server.data.join("pg_wal"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() != 24 || name <= from {
            continue;
        }
        let content = std::fs::read(entry.path())?;
        let number = u64::from_str_radix(&name[16..], 16)?;
        let summary = summarize(&content, Lsn(number * SEGMENT), SEGMENT);
        // Segments that are kept for later use hold older WAL.
        let Some(map) = summary.map.filter(|_| summary.records > 0 && summary.stopped_at == 0) else {
            continue;
        };
        wal += SEGMENT;
        maps += zstd::bulk::compress(&map.encode_to_vec(), 3)?.len() as u64;
    }
    ensure!(wal > 3 * SEGMENT, "{wal} bytes of WAL");
    ensure!(maps * 1000 <= wal, "{maps} bytes for {wal}");
    println!("{maps} bytes for {} MiB of WAL", wal >> 20);
    Ok(())
}

/// What the independent reader is to say of a segment's block map: from its WAL, with no map that was ever encoded.
fn lines(content: &[u8], start: Lsn) -> Result<String> {
    let (mut map, mut first) = (BlockMap::default(), None);
    let mut walker = Walker::new(start, SEGMENT);
    walker.feed(content, |record| {
        first.get_or_insert((record.lsn, record.prev));
        records::note(&mut map, record);
    });
    let mut out = format!("parser {PARSER_VERSION}, server {}\n", walker.major());
    if let (Some((first, previous)), Some(last)) = (first, walker.last_record()) {
        writeln!(out, "records from {first} to {last}, behind {previous}")?;
    }
    if let Some(why) = map.unknown() {
        writeln!(out, "everything: {why}")?;
    }
    for (id, changes) in map.relations() {
        write!(out, "relation {}/{}/{}", id.tablespace, id.database, id.relation)?;
        if let Some(limit) = changes.limit() {
            write!(out, " from {limit}")?;
        }
        let blocks: Vec<String> = changes.blocks(0, u32::MAX).map(|block| block.to_string()).collect();
        if !blocks.is_empty() {
            write!(out, " blocks {}", blocks.join(" "))?;
        }
        out.push('\n');
    }
    for (tablespace, database) in map.databases() {
        writeln!(out, "database {tablespace}/{database}")?;
    }
    if walker.drops_unfinished() {
        out.push_str("the record before goes on nowhere\n");
    }
    let (head, tail) = (
        walker.head().context("a short head")?,
        walker.tail().context("a short tail")?,
    );
    if !head.is_empty() {
        writeln!(out, "head {}", hex::encode(head))?;
    }
    if walker.unfinished().is_some() {
        writeln!(
            out,
            "tail {}, of the record at {}",
            hex::encode(tail),
            walker.next_record()
        )?;
    }
    Ok(out)
}

#[test]
fn the_independent_reader_says_of_archived_maps_what_their_wal_says() -> Result<()> {
    let s = Fixture::new(
        "mapread",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            ..Default::default()
        },
    )?;
    work(&s.server, &s.scratch)?;
    s.flush_archive(&s.server)?;
    let (mut count, mut all) = (0, String::new());
    for object in s.objects("wal") {
        let name = object.file_name().context("a name")?.to_string_lossy().into_owned();
        let Some(segment) = name.strip_suffix(".0001").filter(|segment| segment.len() == 24) else {
            continue;
        };
        let fetched = s.path(segment);
        s.ok(&["wal", "get", "acme", segment, &fetched])?;
        let number = u64::from_str_radix(&segment[16..], 16)?;
        let expected = lines(&std::fs::read(&fetched)?, Lsn(number * SEGMENT))?;
        let said = reader(&[&s.path("vault"), "map", "acme", segment, "--key-file", &s.path("key")])?;
        ensure!(
            said == expected,
            "{segment}: the reader says\n{said}\nand the WAL\n{expected}"
        );
        all.push_str(&said);
        count += 1;
    }
    ensure!(count > 0);
    for what in [" blocks ", " from 0", "\ndatabase 1663/"] {
        ensure!(all.contains(what), "{what:?} is nowhere in {count} segments");
    }
    Ok(())
}

/// A segment whose first page begins with the last eight bytes of a record, which look like those of a switch.
fn segment_that_begins_like_a_switch(number: u64, behind: u8) -> Vec<u8> {
    let mut content = vec![behind; SEGMENT as usize];
    let mut page = Vec::new();
    page.extend_from_slice(&0xD116u16.to_le_bytes()); // PostgreSQL 17
    page.extend_from_slice(&3u16.to_le_bytes()); // a long header, and a record goes on
    page.extend_from_slice(&1u32.to_le_bytes());
    page.extend_from_slice(&(number * SEGMENT).to_le_bytes());
    page.extend_from_slice(&8u64.to_le_bytes()); // bytes that remain
    page.extend_from_slice(&CLUSTER.system_identifier.to_le_bytes());
    page.extend_from_slice(&(SEGMENT as u32).to_le_bytes());
    page.extend_from_slice(&8192u32.to_le_bytes());
    page.extend_from_slice(&[0x40, 0, 0, 0, 1, 2, 3, 4]);
    content[..page.len()].copy_from_slice(&page);
    content
}

#[tokio::test]
async fn what_a_faulty_parser_said_of_a_segment_is_made_anew() -> Result<()> {
    let log = create(&access(&memory(), key(1)), CLUSTER, "main").await?;
    let archive = Archive::open(&log, None, 3)?;
    for (number, behind, switched) in [(1, 0x77, false), (2, 0, true)] {
        let segment = Segment { timeline: 1, number };
        let content = segment_that_begins_like_a_switch(number, behind);
        let right = summarize(&content, segment.start(SEGMENT), SEGMENT);
        ensure!(right.switched == switched, "{right:?}");
        ensure!((right.stopped_at == 0) == switched, "{right:?}");
        let said = proto::WalSummary {
            parser_version: 1,
            switched: true,
            ..Default::default()
        };
        archive.put_whole(segment, said, content).await?;
        let header = archive.segment_header(segment).await?.context("it is there")?;
        ensure!(header.summary == Some(right), "{header:?}");
    }
    Ok(())
}
