//! The independent reader restores what the engine restores, byte for byte.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_format::pages::Encoder;
use fairvault_tests::fixture::files;
use fairvault_tests::tools::reader;
use fairvault_tests::{Scratch, Server, run};

/// Path → mode and content, of files.
fn tree(root: &Path, folder: &Path, out: &mut BTreeMap<String, (u32, Vec<u8>)>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let meta = std::fs::metadata(&path)?;
        if meta.is_dir() {
            tree(root, &path, out)?;
        } else {
            let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
            out.insert(name, (meta.permissions().mode() & 0o777, std::fs::read(&path)?));
        }
    }
    Ok(())
}

#[test]
fn engine_and_independent_reader_agree() -> Result<()> {
    let scratch = Scratch::new("reader")?;
    let dir = scratch.path().display().to_string();
    run(&mut scratch.fairvault(&["key", "generate", &format!("{dir}/key")]))?;
    let server = Server::create(&scratch, 15, 5432, "")?;
    run(scratch.command("mkdir").arg(scratch.join("ts")))?;
    server.sql(&scratch, &format!("create tablespace ts location '{dir}/ts'"))?;
    server.sql(
        &scratch,
        "create table t tablespace ts as select i, md5(i::text) from generate_series(1, 50000) i",
    )?;
    server.sql(
        &scratch,
        "create table big as select i, repeat(md5(i::text), 10) from generate_series(1, 20000) i",
    )?;
    for secret in ["key", "pass"] {
        scratch.write("pass", b"a passphrase\n")?;
        let option = if secret == "key" {
            "--key-file"
        } else {
            "--passphrase-file"
        };
        let (repo, file) = (format!("{dir}/vault-{secret}"), format!("{dir}/{secret}"));
        let url = format!("file://{repo}");
        let with = |more: &[&str]| {
            let conninfo = server.conninfo();
            let mut all = vec!["--repo-url", &url, option, &file, "--conninfo", &conninfo];
            all.extend(more);
            run(&mut scratch.fairvault(&all))
        };
        with(&["backup", "acme", "--fast", "--progress", "none"])?;
        server.sql(&scratch, "insert into t values (0, 'more')")?;
        with(&["backup", "acme", "--fast", "--progress", "none"])?;
        let list = reader(&[&repo, "list", "acme", option, &file])?;
        ensure!(list.lines().count() == 2, "{list}");
        let by_engine = scratch.join(&format!("engine-{secret}"));
        with(&[
            "restore",
            "acme",
            "--to",
            &by_engine.display().to_string(),
            "--tablespace-map",
            &format!("all={dir}/spaces-{secret}"),
            "--progress",
            "none",
        ])?;
        let by_reader = scratch.join(&format!("python-{secret}"));
        reader(&[
            &repo,
            "restore",
            "acme",
            "latest",
            &by_reader.display().to_string(),
            option,
            &file,
        ])?;
        let (mut a, mut b) = (BTreeMap::new(), BTreeMap::new());
        tree(&by_engine, &by_engine, &mut a)?;
        tree(&by_reader, &by_reader, &mut b)?;
        // What the engine adds for recovery.
        for name in [
            "postgresql.auto.conf",
            "recovery.signal",
            "backup_manifest",
            "fairvault.restored",
            "tablespace_map",
        ] {
            a.remove(name);
            b.remove(name);
        }
        ensure!(a.len() > 900, "{} files", a.len());
        ensure!(
            a.keys().eq(b.keys()),
            "{:?}",
            a.keys()
                .filter(|k| !b.contains_key(*k))
                .chain(b.keys().filter(|k| !a.contains_key(*k)))
                .collect::<Vec<_>>()
        );
        for (name, content) in &a {
            ensure!(b.get(name) == Some(content), "{name} differs");
        }
        // WAL as well.
        let wal = std::fs::read_dir(scratch.join(&format!("vault-{secret}/acme/wal")))?.next();
        ensure!(wal.is_some());
        let name = with(&["info", "acme", "--output", "json"])?;
        let segment = name
            .split("\"first\":\"")
            .nth(1)
            .and_then(|r| r.get(..24))
            .unwrap_or_default()
            .to_owned();
        reader(&[
            &repo,
            "wal",
            "acme",
            &segment,
            &format!("{dir}/wal-python"),
            option,
            &file,
        ])?;
        with(&["wal", "get", "acme", &segment, &format!("{dir}/wal-engine")])?;
        ensure!(std::fs::read(scratch.join("wal-python"))? == std::fs::read(scratch.join("wal-engine"))?);
    }
    server.stop(&scratch, "fast")?;
    pages_are_put_together(&scratch, &server.data.join("base/5"))
}

/// In the reader's folder: what was taken apart against what it was.
const PUT_TOGETHER: &str = "\
import pathlib, sys
import pages
apart = sorted(pathlib.Path(sys.argv[1]).glob('*.apart'))
for file in apart:
    plain = file.with_suffix('.plain').read_bytes()
    assert pages.Decoder(file.read_bytes(), len(plain), file.name).decode() == plain, file.name
print(len(apart))
";

/// Whatever is chosen for a backup's chunks: the reader puts together the pages of this database, heap and index.
fn pages_are_put_together(scratch: &Scratch, database: &Path) -> Result<()> {
    let folder = scratch.join("apart");
    std::fs::create_dir(&folder)?;
    let (mut encoder, mut taken) = (Encoder::default(), 0);
    let relations = files(database);
    for (number, file) in relations.iter().enumerate() {
        let mut plain = std::fs::read(file)?;
        plain.truncate(512 << 10);
        let (plan, mut apart) = (encoder.propose(&plain, number % 9, number % 5), Vec::new());
        taken += encoder.encode(&plain, &plan, &mut apart);
        std::fs::write(folder.join(format!("{number}.plain")), plain)?;
        std::fs::write(folder.join(format!("{number}.apart")), apart)?;
    }
    ensure!(taken > 500, "{taken} pages");
    let reader = Path::new(env!("CARGO_MANIFEST_DIR")).join("../format-spec/reader");
    let mut python = Command::new("python3");
    let said = run(python.args(["-B", "-c", PUT_TOGETHER]).arg(&folder).current_dir(reader))?;
    ensure!(
        said.trim() == relations.len().to_string(),
        "{said} of {}",
        relations.len()
    );
    Ok(())
}

/// What the map of `format-spec/vectors/v1/wal-map` was made of (format-spec/tests/golden/of_wal.rs, and the engine's
/// track/segment/tests.rs, which makes it of WAL).
const GOLDEN_MAP: &str = "\
parser 2, server 15
records from 0/200038 to 0/200258, behind 0/1FFFD8
relation 1663/5/16384 blocks 0 1 300 131079
relation 1663/5/16385 from 7 blocks 2
relation 1663/5/16386 from 0 blocks 0
relation 1664/0/1262 blocks 3
database 1663/6
head 09000000fe03000000eeeeee
tail 31000000000000005802200000000000, of the record at 0/2FFFF0
";

/// The same of `piece-seal`.
const GOLDEN_SEAL: &str = "\
parser 2, server 15
records from 0/300028 to 0/300060, behind 0/200258
everything: the record at 0/300060 (resource manager 30, info 00) is not understood
relation 1663/5/16384 blocks 5
the record before goes on nowhere
";

/// Golden vectors are of one repository: put in their places, the independent reader opens it.
#[test]
fn the_reader_says_what_golden_block_maps_hold() -> Result<()> {
    let scratch = Scratch::new("readermap")?;
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../format-spec/vectors/v1");
    let wal = |number: u32| format!("acme/wal/0000000000001234/00000001/0000000100000000{number:08X}.0001");
    for (vector, object) in [
        ("fairvault.json", "fairvault.json".to_owned()),
        ("slot-key", "acme/keys/00000001/main".to_owned()),
        ("log-1-genesis", format!("acme/log/{:020}", 1)),
        ("log-2-begin", format!("acme/log/{:020}", 2)),
        ("wal-map", wal(2)),
        ("piece-seal", wal(3)),
        // Under another name, it is nothing.
        ("wal-map", wal(4)),
        ("wal-segment", wal(1)),
    ] {
        let path = scratch.join("vault").join(object);
        std::fs::create_dir_all(path.parent().context("a folder")?)?;
        std::fs::copy(vectors.join(vector), path)?;
    }
    scratch.write("key", format!("fairvault-key-1:{}\n", "15".repeat(32)).as_bytes())?;
    let (vault, key) = (
        scratch.join("vault").display().to_string(),
        scratch.join("key").display().to_string(),
    );
    let map = |number: u32| {
        let segment = format!("0000000100000000{number:08X}");
        reader(&[&vault, "map", "acme", &segment, "--key-file", &key])
    };
    let (said, of_seal) = (map(2)?, map(3)?);
    ensure!(said == GOLDEN_MAP, "{said}");
    ensure!(of_seal == GOLDEN_SEAL, "{of_seal}");
    for (number, why) in [
        (4, "does not open"),
        // An older vector, whose header does not say of which cluster it is.
        (1, "is of another place"),
        (5, "not in the archive"),
    ] {
        let refusal = map(number).err().context("it was read")?.to_string();
        ensure!(refusal.contains(why), "{refusal}");
    }
    // The content, too.
    let out = scratch.join("content").display().to_string();
    let segment = "000000010000000000000002";
    reader(&[&vault, "wal", "acme", segment, &out, "--key-file", &key])?;
    ensure!(std::fs::read(&out)? == vec![0xAB; 1 << 20]);
    Ok(())
}
