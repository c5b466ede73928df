//! WAL taken apart into records (codec 3): pushed, received in pieces, restored, verified, and read by the independent
//! reader.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::tools::reader;
use fairvault_tests::{Fixture, Receiver, Shape};

const RECORDS: &str = "compression = { wal = \"records\" }";

/// Codecs of the sections with content in a WAL object.
fn codecs(object: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(object)?;
    let mut rest = bytes.get(80..).context("an object without a header")?;
    let mut all = Vec::new();
    while let Some(header) = rest.first_chunk::<16>() {
        all.push(header[1]);
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        rest = rest.get(16 + len as usize..).context("a section that is cut off")?;
    }
    ensure!(rest.is_empty() && all.len() > 1, "{}: {all:?}", object.display());
    Ok(all.split_off(1))
}

/// Fails unless every object here has sections of records; returns how many objects there are.
fn are_records(s: &Fixture, of_pieces: bool) -> Result<usize> {
    let mut count = 0;
    for object in s.objects("wal") {
        let name = object.display().to_string();
        if name.contains(".d/") != of_pieces || name.contains(".backup.") || name.contains(".history.") {
            continue;
        }
        let codecs = codecs(&object)?;
        ensure!(codecs.contains(&3), "{name}: {codecs:?}");
        count += 1;
    }
    Ok(count)
}

const LOAD: &str = "insert into t select i, md5(i::text), repeat('text ', i % 9) from generate_series(1, 20000) i; \
    checkpoint; update t set b = b || 'x' where a % 3 = 0; delete from t where a % 7 = 0";

#[test]
fn records_are_archived_restored_verified_and_read() -> Result<()> {
    for compression in ["off", "on"] {
        let settings = format!("wal_compression = {compression}\nwal_level = logical\n");
        let shape = Shape {
            archiving: true,
            more: RECORDS,
            settings: &settings,
            initdb: &["-k"],
            ..Default::default()
        };
        let s = Fixture::new(&format!("records-{compression}"), shape)?;
        s.sql("create table t (a int primary key, b text, c text); create index on t (b)")?;
        s.backup()?;
        s.sql(LOAD)?;
        let segment = s.flush_archive(&s.server)?;
        let rows = s.rows(&s.server)?;
        ensure!(are_records(&s, false)? > 1, "{:?}", s.objects("wal"));
        s.ok(&["wal", "get", "acme", &segment, &s.path("fetched")])?;
        let options = ["--key-file", &s.path("key")];
        reader(
            &[
                &[&*s.path("vault"), "wal", "acme", &*segment, &*s.path("read")],
                &options[..],
            ]
            .concat(),
        )?;
        let (fetched, read) = (std::fs::read(s.path("fetched"))?, std::fs::read(s.path("read"))?);
        ensure!(fetched == read, "engine and independent reader differ in {segment}");
        // The server still has it.
        let original = s.server.data.join("pg_wal").join(&segment);
        ensure!(
            !original.exists() || std::fs::read(original)? == fetched,
            "{segment} is not what was archived"
        );
        let (exit, text) = s.restore("r", &[]);
        ensure!(exit == 0, "{text}");
        ensure!(s.rows(&s.start("r", 5450)?)? == rows);
        let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
        ensure!(text.contains("all good"), "{text}");
    }
    Ok(())
}

#[test]
fn pieces_are_records_as_well() -> Result<()> {
    let shape = Shape {
        more: RECORDS,
        ..Default::default()
    };
    let s = Fixture::new("records-pieces", shape)?;
    let receiver = Receiver::start(&s, &["--flush-interval", "200ms", "--piece-size", "512KiB"])?;
    s.sql("create table t (a int primary key, b text, c text)")?;
    s.backup()?;
    s.sql(LOAD)?;
    let rows = s.rows(&s.server)?;
    wait_until_durable(&s, &s.server)?;
    // The machine is gone.
    receiver.kill()?;
    s.server.stop(&s.scratch, "immediate")?;
    let pieces = s
        .objects("wal")
        .into_iter()
        .filter(|p| p.display().to_string().contains(".d/"));
    let codecs = pieces.map(|piece| codecs(&piece)).collect::<Result<Vec<_>>>()?;
    ensure!(codecs.iter().flatten().any(|&codec| codec == 3), "{codecs:?}");
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5451)?)? == rows);
    let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}
