//! `cargo xtask bench replay`: recovery with WAL from an S3 server, beside a `cp` from a local folder.

use anyhow::{Result, ensure};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Shape, run, tools};

use super::{elsewhere, make_wal, results, timed};

/// Builds with optimisation, and runs there.
pub fn run_it(segments: usize) -> Result<()> {
    if elsewhere(&["replay", &segments.to_string()])? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_ministack()?;
    let mut s = Fixture::new(
        "benchreplay",
        Shape {
            stanza: false,
            settings: "wal_keep_size = 64GB\nmax_wal_size = 2GB\nshared_buffers = 512MB\n",
            ..Default::default()
        },
    )?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    s.use_s3(&s3.endpoint(), "s3://bucket/x", "")?;
    s.ok(&["stanza", "create", "acme"])?;
    s.backup()?;
    let first = s.sql("select pg_walfile_name(pg_current_wal_lsn())")?;
    make_wal(&s, segments)?;
    let current = s.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")?;
    let rows = s.sql("select count(*) from mixed")?;
    s.server.stop(&s.scratch, "fast")?;
    // Every segment since the backup: into the store, and beside it for `cp`.
    let pg_wal = s.server.data.join("pg_wal");
    run(s.scratch.command("mkdir").arg("copies"))?;
    let mut names: Vec<String> = std::fs::read_dir(&pg_wal)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.len() == 24 && *name >= first && *name < current)
        .collect();
    names.sort();
    println!("archiving {} segments", names.len());
    for name in &names {
        s.ok(&["wal", "push", "acme", &pg_wal.join(name).display().to_string()])?;
        run(s.scratch.command("cp").arg(pg_wal.join(name)).arg("copies"))?;
    }
    let mut table = String::from("| restore_command | recovery (s) | CPU (s) |\n|---|---|---|\n");
    let mut walls = Vec::new();
    for round in 0..2 {
        for (what, is_cp) in [("cp from a local folder", true), ("fairvault, from S3", false)] {
            let name = format!("r{round}{}", u8::from(is_cp));
            let (exit, text) = s.restore(&name, &[]);
            ensure!(exit == 0, "{text}");
            if is_cp {
                let conf = s.path(&format!("{name}/postgresql.auto.conf"));
                let copies = s.path("copies");
                let more = format!("restore_command = 'cp {copies}/%f \"%p\"'\n");
                std::fs::write(&conf, std::fs::read_to_string(&conf)? + &more)?;
            }
            let mut copied = None;
            let (wall, cpu) = timed(|| {
                copied = Some(s.start(&name, 5450)?);
                Ok(())
            })?;
            if let Some(copy) = &copied {
                let there = copy.sql(&s.scratch, "select count(*) from mixed")?;
                ensure!(there == rows, "{there} rows of {rows}");
                copy.stop(&s.scratch, "immediate")?;
            }
            println!("{what:<24} {wall:>6.1} s, {cpu:>6.1} s of CPU");
            table += &format!("| {what} | {wall:.1} | {cpu:.1} |\n");
            walls.push(wall);
            std::fs::remove_dir_all(s.scratch.join(&name))?;
        }
    }
    let ratio = (walls[1] + walls[3]) / (walls[0] + walls[2]);
    table += &format!(
        "\n{} segments; fairvault takes {ratio:.2} times as long.\n",
        names.len()
    );
    let file = results()?.join("replay.md");
    std::fs::write(&file, &table)?;
    println!("\n{table}\nwritten to {}", file.display());
    Ok(())
}
