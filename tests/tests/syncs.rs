//! In which order a restore makes durable what it wrote, as the kernel is asked for it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::files;
use fairvault_tests::{Fixture, Shape, run, tools};

/// What strace has seen, by number of the line.
#[derive(Default)]
struct Trace {
    /// The last write to each file.
    written: BTreeMap<String, usize>,
    /// Every sync of each file and folder.
    synced: BTreeMap<String, Vec<usize>>,
    /// What got each name.
    renamed: BTreeMap<String, usize>,
    /// What lost its name.
    removed: BTreeMap<String, usize>,
    /// The most syncs that were under way at the same time.
    at_once: usize,
}

impl Trace {
    /// Of lines `PID call(…) = 0`; descriptors are followed by `<path>`.
    fn of(text: &str) -> Self {
        let mut trace = Self::default();
        let mut under_way = 0;
        for (number, line) in text.lines().enumerate() {
            let call = line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
            if call.starts_with("<... fsync resumed>") {
                under_way -= 1;
                continue;
            }
            let Some((name, rest)) = call.split_once('(') else {
                continue;
            };
            let of_descriptor = || {
                let (_, path) = rest.split_once('<')?;
                Some(path.split_once('>')?.0.to_owned())
            };
            let last_word = || Some(rest.rsplit('"').nth(1)?.to_owned());
            match name {
                "pwrite64" => _ = of_descriptor().map(|path| trace.written.insert(path, number)),
                "fsync" => {
                    under_way += 1;
                    trace.at_once = trace.at_once.max(under_way);
                    under_way -= usize::from(!rest.ends_with("<unfinished ...>"));
                    let path = of_descriptor().unwrap_or_default();
                    trace.synced.entry(path).or_default().push(number);
                }
                "rename" | "renameat" | "renameat2" => {
                    _ = last_word().map(|path| trace.renamed.insert(path, number));
                }
                "unlink" | "unlinkat" => _ = last_word().map(|path| trace.removed.insert(path, number)),
                _ => {}
            }
        }
        trace
    }

    /// The one sync of a file.
    fn sync_of(&self, path: &Path) -> Result<usize> {
        let path = path.display().to_string();
        match self.synced.get(&path).map(Vec::as_slice) {
            Some([once]) => Ok(*once),
            other => anyhow::bail!(
                "{path} was synced {} times instead of once",
                other.map_or(0, <[usize]>::len)
            ),
        }
    }

    /// The last sync of a folder.
    fn last_sync_of(&self, path: &Path) -> Result<usize> {
        let synced = self.synced.get(&path.display().to_string());
        let last = synced.and_then(|synced| synced.last().copied());
        last.with_context(|| format!("{} was never synced", path.display()))
    }
}

/// Content, then the files of it, many at once and each one once, then folders, then the name of `pg_control`, then the
/// marker of an unfinished restore goes.
#[test]
fn a_restore_syncs_every_file_once_after_all_content_and_then_what_names_it() -> Result<()> {
    tools::install_strace()?;
    let s = Fixture::new("syncs", Shape::default())?;
    // One file that is written past the kernel's cache, beside all those of a new cluster that are not.
    s.sql("create table t as select i, repeat('x', 500) from generate_series(1, 10000) i")?;
    s.backup()?;
    let (new, log) = (s.scratch.join("made/for/it"), s.scratch.join("trace"));
    let to = new.display().to_string();
    let restore = s.command(&["restore", "acme", "--to", &to, "--progress", "none"]);
    let mut traced = Command::new("strace");
    traced
        .args(["-f", "-y", "-qq", "-s", "0", "-e", "signal=none"])
        .args([
            "-e",
            "trace=pwrite64,fsync,?rename,?renameat,renameat2,?unlink,unlinkat",
            "-o",
        ])
        .arg(&log)
        .arg(restore.get_program())
        .args(restore.get_args())
        .current_dir(s.scratch.path());
    run(&mut traced)?;
    let trace = Trace::of(&std::fs::read_to_string(&log)?);

    let relations = files(&new.join("base"));
    ensure!(relations.len() > 500, "only {} files were restored", relations.len());
    let syncs = relations.iter().map(|path| trace.sync_of(path));
    let syncs: Vec<usize> = syncs.collect::<Result<_>>()?;
    let (first, last) = (syncs.iter().min().copied(), syncs.iter().max().copied());
    let (first, last) = (first.unwrap_or_default(), last.unwrap_or_default());

    let of_relations = |path: &str| Path::new(path).starts_with(new.join("base"));
    let written: Vec<_> = trace.written.iter().filter(|(path, _)| of_relations(path)).collect();
    ensure!(written.len() > 200, "writes are not seen: {} files", written.len());
    for (path, at) in written {
        ensure!(*at < first, "{path} was written after the first file was synced");
    }
    ensure!(trace.at_once > 1, "files were synced one after the other");

    let control = new.join("global/pg_control");
    let named = trace.renamed.get(&control.display().to_string());
    let named = *named.context("pg_control got its name by no rename")?;
    for folder in ["base", "base/1", "base/5", "global", "pg_xact", ""] {
        let path = if folder.is_empty() {
            new.clone()
        } else {
            new.join(folder)
        };
        let synced = trace.synced.get(&path.display().to_string()).context(folder)?;
        let is_between = synced.iter().any(|at| last < *at && *at < named);
        ensure!(
            is_between,
            "folder {folder:?} was not synced between its files and the name of pg_control"
        );
    }
    let content = trace.sync_of(&new.join("global/pg_control.fairvault"))?;
    ensure!(
        content < named,
        "pg_control got its name before its content was durable"
    );

    let marker = new.join("fairvault.restoring");
    let removed = trace.removed.get(&marker.display().to_string());
    let removed = *removed.context("the marker of an unfinished restore did not go")?;
    let global = trace.last_sync_of(&new.join("global"))?;
    ensure!(
        named < global && global < removed,
        "the marker went before the name of pg_control was durable"
    );
    for above in new.ancestors().skip(1).take(3) {
        let synced = trace.last_sync_of(above)?;
        ensure!(
            last < synced && synced < removed,
            "what is in {} was not made durable",
            above.display()
        );
    }
    ensure!(
        removed < trace.last_sync_of(&new)?,
        "that the marker went was not made durable"
    );
    Ok(())
}
