//! The reader of WAL sees what PostgreSQL's own readers see, record by record.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::walker::Walker;
use fairvault_engine::wal::summary::summarize;
use fairvault_tests::server::sid_program;
use fairvault_tests::{Scratch, Server, run, tools};

const SEGMENT: u64 = 16 << 20;

/// One record, as every reader can tell it.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    lsn: u64,
    prev: u64,
    xid: u32,
    rmgr: u8,
    len: u32,
    blocks: Vec<Block>,
}

/// Tablespace, database and relation; fork; block; whether there is an image.
type Block = ([u32; 3], u8, u32, bool);

/// In the order of `access/rmgrlist.h`.
const RMGRS: [&str; 23] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
    "XLOG2",
];

fn rmgr(name: &str) -> Result<u8> {
    let at = RMGRS.iter().position(|known| *known == name.trim());
    Ok(at.with_context(|| format!("rmgr {name:?}"))? as u8)
}

fn blocks(text: &str) -> Result<Vec<Block>> {
    let forks = ["main", "fsm", "vm", "init"];
    let mut out = Vec::new();
    for part in text.split("blkref #").skip(1) {
        let word = |name: &str| {
            let rest = part.split_once(name)?.1;
            rest.split([' ', '\n', ',', ';']).next()
        };
        let rel = word("rel ").context("rel")?;
        let rel: Vec<u32> = rel.split('/').map(str::parse).collect::<Result<_, _>>()?;
        let fork = word("fork ").unwrap_or("main");
        let fork = forks.iter().position(|known| *known == fork).context("fork")? as u8;
        let block = word("blk ").context("blk")?.parse()?;
        out.push(([rel[0], rel[1], rel[2]], fork, block, part.contains("FPW")));
    }
    Ok(out)
}

fn lsn(text: &str) -> Result<u64> {
    Ok(text.trim().parse::<Lsn>().map_err(anyhow::Error::msg)?.0)
}

fn by_waldump(mut program: Command, pg_wal: &Path, first: &str, last: &str) -> Result<Vec<Row>> {
    let text = run(program.arg("-p").arg(pg_wal).args([first, last]))?;
    let mut rows = Vec::new();
    for line in text.lines().filter(|l| l.starts_with("rmgr: ")) {
        let field = |name: &str| {
            let rest = line.split_once(name).map(|(_, rest)| rest.trim_start());
            rest.and_then(|rest| rest.split([' ', ',']).next()).unwrap_or_default()
        };
        let lengths = line.split_once("(rec/tot):").context("lengths")?.1;
        let total = lengths.split_once('/').context("total")?.1;
        let total = total.split(',').next().unwrap_or_default();
        rows.push(Row {
            lsn: lsn(field(", lsn: "))?,
            prev: lsn(field(", prev "))?,
            xid: field(", tx: ").parse()?,
            rmgr: rmgr(field("rmgr: "))?,
            len: total.trim().parse()?,
            blocks: blocks(line)?,
        });
    }
    Ok(rows)
}

fn by_walinspect(server: &Server, scratch: &Scratch, from: u64, to: u64) -> Result<Vec<Row>> {
    server.sql(scratch, "create extension if not exists pg_walinspect")?;
    let text = server.sql(
        scratch,
        &format!(
            "select concat_ws('|', start_lsn, prev_lsn, xid, resource_manager, record_length, \
             replace(coalesce(block_ref, ''), E'\\n', ' ')) from pg_get_wal_records_info('{}', '{}')",
            Lsn(from),
            Lsn(to)
        ),
    )?;
    let mut rows = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.splitn(6, '|').collect();
        ensure!(fields.len() >= 5, "{line}");
        rows.push(Row {
            lsn: lsn(fields[0])?,
            prev: lsn(fields[1])?,
            xid: fields[2].parse()?,
            rmgr: rmgr(fields[3])?,
            len: fields[4].parse()?,
            blocks: blocks(fields.get(5).copied().unwrap_or_default())?,
        });
    }
    Ok(rows)
}

fn by_us(pg_wal: &Path, first: u64, last: u64) -> Result<Vec<Row>> {
    let name = |number: u64| format!("{:08X}{:08X}{:08X}", 1, number / 256, number % 256);
    let mut walker = Walker::new(Lsn(first * SEGMENT), SEGMENT);
    let mut rows = Vec::new();
    let mut strange = Vec::new();
    for number in first..=last {
        walker.feed(&std::fs::read(pg_wal.join(name(number)))?, |record| {
            let Some(decoded) = record.decode() else {
                strange.push(record.lsn);
                return;
            };
            let block = |b: &fairvault_engine::postgres::walker::BlockRef| {
                ([b.tablespace, b.database, b.relation], b.fork, b.block, b.has_image)
            };
            rows.push(Row {
                lsn: record.lsn.0,
                prev: record.prev.0,
                xid: record.xid,
                rmgr: record.rmgr,
                len: record.total_len(),
                blocks: decoded.blocks.iter().map(block).collect(),
            });
        });
    }
    ensure!(walker.stopped().is_none(), "{:?}", walker.stopped());
    ensure!(strange.is_empty(), "cannot be taken apart: {strange:?}");
    Ok(rows)
}

/// Whatever makes records of another kind.
const WORKLOAD: &[&str] = &[
    "create table h (i int primary key, t text, a int[], p point, r int4range, ts tsvector)",
    "create index on h using hash (t); create index on h using gin (a); create index on h using gist (p)",
    "create index on h using spgist (t); create index on h using brin (i); create index on h using gin (ts)",
    "insert into h select i, md5(i::text), array[i, i % 7], point(i, i), int4range(i, i + 3), to_tsvector('x' || i) from generate_series(1, 3000) i",
    "update h set t = t || 'x' where i % 3 = 0",
    "delete from h where i % 5 = 0",
    "vacuum h",
    "begin; savepoint a; insert into h (i) values (100000); savepoint b; insert into h (i) values (100001); rollback to b; commit",
    "begin; insert into h (i) values (100002); rollback",
    "begin; insert into h (i) values (100003); prepare transaction 'one'",
    "commit prepared 'one'",
    "begin; insert into h (i) values (100004); prepare transaction 'two'",
    "rollback prepared 'two'",
    "begin; select i from h where i < 50 for share; savepoint a; select i from h where i < 50 for update; commit",
    "create table toasted as select i, string_agg(md5((i * j)::text), '') as t from generate_series(1, 20) i, generate_series(1, 400) j group by i",
    "create unlogged table u (i int); insert into u values (1); create sequence s; select nextval('s') from generate_series(1, 100)",
    "select pg_logical_emit_message(true, 'large', repeat('x', 9000000))",
    "select pg_replication_origin_create('there')",
    "select pg_replication_origin_session_setup('there'); insert into h (i) select i from generate_series(300000, 300100) i",
    "create materialized view v as select * from h; refresh materialized view v",
    "reindex table h; cluster h using h_pkey",
    "vacuum full h",
    "truncate toasted; drop table u",
    "create database another",
    "drop database another",
    "checkpoint",
    "begin; lock table h in access exclusive mode; commit",
    "select pg_create_restore_point('here')",
    "update h set t = t || 'y'",
    "vacuum (freeze) h",
    "set wal_compression = on; checkpoint",
    "begin; set local wal_compression = on; update h set t = t || 'z' where i % 2 = 0; commit",
    "set wal_consistency_checking = 'all'; update h set t = 'w' where i < 100",
    "set synchronous_commit = off; insert into h (i) values (200000)",
];

/// `waldump`: PostgreSQL's program; without it, its extension.
fn compare(major: u32, waldump: Option<Command>) -> Result<()> {
    let scratch = Scratch::new(&format!("walker{major}"))?;
    let settings = "max_prepared_transactions = 5\ntrack_commit_timestamp = on\nwal_level = logical\nwal_keep_size = 4GB\nfsync = off\n";
    let server = Server::create(&scratch, major, 5432, settings)?;
    server.sql(&scratch, "select pg_switch_wal()")?;
    let number = |text: String| Ok::<_, anyhow::Error>(lsn(&text)? / SEGMENT);
    let first = number(server.sql(&scratch, "select pg_current_wal_lsn()")?)?;
    for sql in WORKLOAD {
        server.sql(&scratch, sql)?;
    }
    let mut compressed = 0;
    for compression in ["lz4", "zstd"] {
        // Where the server was built with it.
        let set = format!("set wal_compression = {compression}");
        if major >= 15 && server.sql(&scratch, &set).is_ok() {
            server.sql(&scratch, "checkpoint")?;
            server.sql(&scratch, &format!("{set}; update h set t = t || 'c'"))?;
            compressed += 1;
        }
    }
    // Debian's servers have both.
    ensure!(waldump.is_none() || compressed == 2, "{compressed} compressions");
    let last = number(server.sql(&scratch, "select pg_current_wal_lsn()")?)?;
    server.sql(&scratch, "select pg_switch_wal(); checkpoint")?;
    let pg_wal = server.data.join("pg_wal");
    let ours = by_us(&pg_wal, first, last)?;
    let name = |number: u64| format!("{:08X}{:08X}{:08X}", 1, number / 256, number % 256);
    let theirs = match waldump {
        Some(program) => by_waldump(program, &pg_wal, &name(first), &name(last))?,
        None => by_walinspect(&server, &scratch, ours[0].lsn, (last + 1) * SEGMENT)?,
    };
    ensure!(ours.len() > 20_000, "{} records", ours.len());
    for (a, b) in ours.iter().zip(&theirs) {
        ensure!(a == b, "{major}: {a:?}\nPostgreSQL says {b:?}");
    }
    ensure!(
        ours.len() == theirs.len(),
        "{} and {} records",
        ours.len(),
        theirs.len()
    );
    let kinds: std::collections::BTreeSet<u8> = ours.iter().map(|row| row.rmgr).collect();
    ensure!(kinds.len() >= 17, "only the resource managers {kinds:?}");
    ensure!(ours.iter().flat_map(|row| &row.blocks).any(|b| b.3), "no images");
    Ok(())
}

/// 14's own readers are not to be had; but the server counts records, images and bytes of a statement.
#[test]
fn as_many_as_postgresql_14_counts() -> Result<()> {
    let scratch = Scratch::new("counts")?;
    let settings = "autovacuum = off\nwal_level = logical\nwal_keep_size = 4GB\nfsync = off\n";
    let server = Server::create(&scratch, 14, 5432, settings)?;
    for sql in &WORKLOAD[..4] {
        server.sql(&scratch, sql)?;
    }
    let text = "(select string_agg(md5((i * j)::text), '') from generate_series(1, 400) j)";
    let toasted = format!("insert into h (i, t) select 50000 + i, {text} from generate_series(1, 20) i");
    server.sql(&scratch, "drop index h_t_idx, h_t_idx1")?;
    let statements = [
        "insert into h select i, md5(i::text), array[i, i % 7], point(i, i), int4range(i, i + 3), to_tsvector('x' || i) from generate_series(4000, 6000) i",
        "update h set t = t || 'x' where i % 3 = 0",
        "update h set a = array[1, 2], p = point(0, 0), ts = 'y' where i % 4 = 0",
        "delete from h where i % 5 = 0",
        "select i from h where i < 500 for share",
        "select i from h where i < 500 for update",
        toasted.as_str(),
    ];
    let number = |text: &str, key: &str| -> Result<u64> {
        let rest = text.split_once(&format!("\"{key}\": ")).context("a count")?.1;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        Ok(digits.parse()?)
    };
    let mut spans = Vec::new();
    for round in 0..4 {
        // In the second and fourth, every page comes with an image; in the last two, compressed.
        if round % 2 == 1 {
            server.sql(&scratch, "checkpoint")?;
        }
        let compression = if round >= 2 { "on" } else { "off" };
        for sql in statements {
            let text = server.sql(
                &scratch,
                &format!(
                    "begin; set local wal_compression = {compression}; select pg_current_wal_insert_lsn() as here; \
                     explain (analyze, wal, format json) {sql}; select pg_current_wal_insert_lsn() as here; rollback"
                ),
            )?;
            let mut positions = text.lines().filter_map(|line| lsn(line).ok());
            let (from, to) = (positions.next().context("from")?, positions.next().context("to")?);
            let counts = ["WAL Records", "WAL FPI", "WAL Bytes"].map(|key| number(&text, key));
            let [records, images, bytes] = counts;
            spans.push((sql, from, to, [records?, images?, bytes?]));
        }
    }
    let last = lsn(&server.sql(&scratch, "select pg_current_wal_lsn()")?)? / SEGMENT;
    server.sql(&scratch, "select pg_switch_wal()")?;
    let ours = by_us(&server.data.join("pg_wal"), 1, last)?;
    let mut images = 0;
    for (sql, from, to, counted) in spans {
        // What others write meanwhile: snapshots of running transactions, of nobody.
        let standby = 8;
        let span = ours
            .iter()
            .filter(|row| row.lsn >= from && row.lsn < to && row.rmgr != standby);
        let mut found = [0; 3];
        for row in span {
            found[0] += 1;
            found[1] += row.blocks.iter().filter(|block| block.3).count() as u64;
            found[2] += u64::from(row.len);
        }
        images += found[1];
        ensure!(found == counted, "{sql}: {found:?}, and the server counted {counted:?}");
    }
    ensure!(images > 300, "{images} images");
    Ok(())
}

#[test]
fn as_pg_waldump_of_15() -> Result<()> {
    compare(15, Some(Command::new("/usr/lib/postgresql/15/bin/pg_waldump")))
}

#[test]
fn as_pg_walinspect_of_16() -> Result<()> {
    compare(16, None)
}

#[test]
fn as_pg_walinspect_of_17() -> Result<()> {
    compare(17, None)
}

#[test]
fn as_pg_walinspect_of_18() -> Result<()> {
    compare(18, None)
}

#[test]
fn as_pg_waldump_of_17_18_and_19() -> Result<()> {
    if !tools::is_full() {
        eprintln!("the tools of 17 to 19 are part of `cargo xtask test --full`");
        return Ok(());
    }
    for major in [17, 18, 19] {
        compare(major, Some(sid_program(major, "pg_waldump")))?;
    }
    Ok(())
}

/// A record that says of which node a change comes has one more part (id byte 253, 3 bytes), which is no data.
#[test]
fn records_of_a_replication_origin_have_one_more_part() -> Result<()> {
    let scratch = Scratch::new("origin")?;
    let settings = "wal_level = logical\nautovacuum = off\nfsync = off\n";
    let server = Server::create(&scratch, 15, 5432, settings)?;
    server.sql(&scratch, "create table t (i int)")?;
    server.sql(&scratch, "select pg_replication_origin_create('there')")?;
    server.sql(&scratch, "insert into t values (0)")?;
    let here = "select pg_current_wal_insert_lsn()";
    let insert = "insert into t select generate_series(1, 100)";
    let mut inserts = Vec::new();
    for setup in ["", "select pg_replication_origin_session_setup('there'); "] {
        let from = lsn(&server.sql(&scratch, here)?)?;
        server.sql(&scratch, &format!("{setup}{insert}"))?;
        let number = from / SEGMENT;
        let content = std::fs::read(server.data.join(format!("pg_wal/0000000100000000{number:08X}")))?;
        let mut found = Vec::new();
        Walker::new(Lsn(number * SEGMENT), SEGMENT).feed(&content, |record| {
            let heap = 10;
            if record.lsn.0 >= from && record.rmgr == heap {
                let decoded = record.decode().map(|d| (d.blocks.len(), d.main.len()));
                found.push((record.total_len(), decoded));
            }
        });
        inserts.push(found.split_off(1));
    }
    // The first is left out: it may come with an image of the page.
    ensure!(inserts[0].len() == 99 && inserts[1].len() == 99, "{inserts:?}");
    for (without, with) in inserts[0].iter().zip(&inserts[1]) {
        ensure!(
            without.0 + 3 == with.0 && without.1 == with.1 && with.1.is_some(),
            "{without:?} {with:?}"
        );
    }
    Ok(())
}

/// What recovery to a time and `info` go by: the first and last commit of a segment.
#[test]
fn the_times_of_a_segment_are_those_that_the_server_tells() -> Result<()> {
    let scratch = Scratch::new("times")?;
    let settings = "track_commit_timestamp = on\nautovacuum = off\nmax_prepared_transactions = 5\nfsync = off\n";
    let server = Server::create(&scratch, 15, 5432, settings)?;
    server.sql(&scratch, "create table t (batch int)")?;
    for batch in 1..=3 {
        server.sql(&scratch, "select pg_switch_wal()")?;
        let at = lsn(&server.sql(&scratch, "select pg_current_wal_insert_lsn()")?)?;
        for _ in 0..4 {
            server.sql(&scratch, &format!("insert into t values ({batch})"))?;
        }
        let prepared = format!("begin; insert into t values ({batch}); prepare transaction 'p'");
        server.sql(&scratch, &prepared)?;
        server.sql(&scratch, "commit prepared 'p'")?;
        let expected = server.sql(
            &scratch,
            &format!(
                "select concat_ws('|', min(c), max(c)) from (select (extract(epoch from pg_xact_commit_timestamp(xmin)) \
                 * 1000000)::bigint as c from t where batch = {batch}) x"
            ),
        )?;
        let number = at / SEGMENT;
        let path = server.data.join(format!("pg_wal/0000000100000000{number:08X}"));
        let found = summarize(&std::fs::read(path)?, Lsn(number * SEGMENT), SEGMENT);
        let found = format!("{}|{}", found.min_time_us, found.max_time_us);
        ensure!(found == expected, "{found} and {expected}");
    }
    Ok(())
}
