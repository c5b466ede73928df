//! The independent reader restores what the engine restores, byte for byte.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};
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
    Ok(())
}
