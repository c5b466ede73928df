//! `backup --audit`: of pages that changed on the disk and not in the WAL it names each one, and none beside; it says
//! what it will fetch before it begins; and the backup itself is right. From every source.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{self, field};
use fairvault_tests::{Fixture, Shape};
use serde_json::{Value, json};

const PAGE: usize = 8192;
/// What of the table's content no compression makes smaller, MiB.
const TABLE: u64 = 8;

fn page(s: &Fixture, file: &str, block: u32) -> Result<[u8; PAGE]> {
    let mut page = [0; PAGE];
    File::open(s.path(file))?.read_exact_at(&mut page, u64::from(block) * PAGE as u64)?;
    Ok(page)
}

/// While the server is down, the disk changes a byte in the first row of each of these blocks.
fn rot(s: &Fixture, file: &str, blocks: &[u32]) -> Result<()> {
    s.sql("checkpoint")?;
    s.server.stop(&s.scratch, "fast")?;
    for &block in blocks {
        let mut page = page(s, file, block)?;
        let pointer = u32::from_le_bytes([page[24], page[25], page[26], page[27]]);
        // Behind the row's header and its number, in the middle of what is random.
        let at = (pointer & 0x7FFF) as usize + 200;
        page[at] ^= 1;
        let file = File::options().write(true).open(s.path(file))?;
        file.write_all_at(&page, u64::from(block) * PAGE as u64)?;
    }
    s.server.start(&s.scratch)
}

/// Exit code, everything printed, and the result.
fn audit(s: &Fixture, source: &str) -> Result<(i32, String, Value)> {
    let (exit, text) = s.fairvault(&[
        "--log-level",
        "debug",
        "backup",
        "acme",
        "--fast",
        "--progress",
        "none",
        "--output",
        "json",
        "--type",
        "incr",
        "--audit",
        "--source",
        source,
    ]);
    let result = text.lines().find(|line| line.contains("\"missed_blocks\""));
    let result = result.with_context(|| format!("{exit} {text}"))?;
    let result = serde_json::from_str(result)?;
    Ok((exit, text, result))
}

/// What it says that it will fetch, MiB; before it reads anything.
fn announced(text: &str) -> Result<u64> {
    let begin = text.find("auditing: ").context("it announces nothing")?;
    let copying = text.find("DEBUG copying").context("it copies nothing")?;
    ensure!(begin < copying, "it says what it fetches once it is under way: {text}");
    let rest = text[begin..]
        .split_once("about ")
        .context("it does not say how much")?
        .1;
    let (mib, _) = rest.split_once(" MiB of the parent").context("of the parent")?;
    Ok(mib.parse()?)
}

#[test]
fn an_audit_names_the_pages_that_changed_without_wal_and_no_others() -> Result<()> {
    let s = Fixture::new(
        "audited",
        Shape {
            archiving: true,
            settings: "autovacuum = off\n",
            // With checksums, such pages would be damaged ones.
            initdb: &["--no-locale"],
            ..Default::default()
        },
    )?;
    ensure!(s.sql("show data_checksums")? == "off", "this needs a cluster without");
    s.sql("create extension pgcrypto; create table t (n int, x bytea)")?;
    let rows = (TABLE << 10) + 100;
    s.sql(&format!(
        "insert into t select i, gen_random_bytes(1024) from generate_series(1, {rows}) i"
    ))?;
    s.sql("vacuum (freeze) t")?;
    let path = s.sql("select pg_relation_filepath('t')")?;
    let file = format!("data5432/{path}");
    let full = s.backup_json(&["--type", "full"])?;
    let most = (fixture::number(&full, "new_stored_bytes")? >> 20) + 2;
    let mut parent = field(&full, "id")?;
    let rotten: [(&str, &[u32]); 3] = [
        ("local", &[0, 7, 8, 1000]),
        ("sql", &[63, 64, 700]),
        ("stream", &[3, 500, 501, 502]),
    ];
    for (number, (source, blocks)) in rotten.into_iter().enumerate() {
        rot(&s, &file, blocks)?;
        // What the WAL names is no difference, nor are hints.
        s.sql(&format!("update t set n = -n where ctid = '({},1)'", 30 + number))?;
        s.sql("select count(*) from t")?;
        let (exit, text, result) = audit(&s, source)?;
        let missed: Vec<Value> = blocks
            .iter()
            .map(|block| json!({ "path": path, "block": block }))
            .collect();
        ensure!(
            exit == 4 && result["missed_blocks"] == Value::Array(missed),
            "{source}: {exit} {result}"
        );
        ensure!(
            result["parent"] == parent.as_str() && result["source"] == source,
            "{result}"
        );
        let count = format!("{} blocks changed although the WAL since backup {parent}", blocks.len());
        ensure!(text.contains(&count), "{source}: {text}");
        let mib = announced(&text)?;
        ensure!(
            (TABLE..=most).contains(&mib),
            "{source}: about {mib} MiB, and not {TABLE} to {most}"
        );
        // It counts, and has what is on the disk.
        parent = result["id"].as_str().context("an id")?.to_owned();
        let (exit, text) = s.restore("r", &["--backup", &parent, "--target", "immediate"]);
        ensure!(exit == 0, "{text}");
        for &block in blocks {
            let (there, here) = (page(&s, &file, block)?, page(&s, &format!("r/{path}"), block)?);
            ensure!(there == here, "{source}: block {block} is not what the server has");
        }
        std::fs::remove_dir_all(s.path("r"))?;
        // It is known by now.
        let (exit, _, result) = audit(&s, source)?;
        ensure!(
            exit == 0 && result["missed_blocks"] == json!([]),
            "{source}: {exit} {result}"
        );
        parent = result["id"].as_str().context("an id")?.to_owned();
    }
    Ok(())
}
