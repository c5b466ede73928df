//! Two logs, each of which opens: whoever has a key that writes hides the end of the log below entries of his own, or a
//! host that remembers nothing goes on above entries that somebody has deleted.

use fairvault_engine::commit::Log;
use fairvault_format::log::seal_entry;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_format::{names, sha256};

use super::*;

const GC: [&str; 6] = ["gc", "acme", "--patience", "1s", "--progress", "none"];
const REPAIR: [&str; 4] = ["repair", "acme", "--progress", "none"];

/// The log as a host sees it that remembers nothing, with all of its entries.
async fn replay(w: &World) -> Result<Log> {
    let access = w.access(Arc::new(SystemEnv))?;
    Ok(Log::replay(Stanza::open(&access).await?).await?)
}

/// Stores other entries from `from` on, up to the end of the log, with the key of a host that writes.
async fn shadow(w: &World, log: &Log, from: u64) -> Result<()> {
    let keys = log.stanza().keys().write_only();
    let first = log.entries().iter().find(|entry| entry.seq == from);
    let mut previous = first.context("no such entry")?.previous.clone();
    for seq in from..=log.state().seq {
        let entry = proto::LogEntry {
            seq,
            previous,
            fence: log.state().fence,
            kind: Some(Entry::Operation(proto::Operation::default())),
            ..Default::default()
        };
        let sealed = seal_entry(&keys, log.stanza().scope(), [seq as u8; 32], &entry)?;
        previous = sha256(&sealed).to_vec();
        let name = format!("acme/{}", names::log_context(seq));
        w.store.put_hashed(&name, Bytes::from(sealed).into()).await?;
    }
    Ok(())
}

/// Stores an entry that follows on the last one of this log, whatever lies there.
async fn put_next(w: &World, log: &Log) -> Result<()> {
    let entry = proto::LogEntry {
        seq: log.state().seq + 1,
        previous: log.state().head.clone(),
        fence: log.state().fence,
        kind: Some(Entry::Operation(proto::Operation::default())),
        ..Default::default()
    };
    let keys = log.stanza().keys().write_only();
    let sealed = seal_entry(&keys, log.stanza().scope(), [!(entry.seq as u8); 32], &entry)?;
    let name = format!("acme/{}", names::log_context(entry.seq));
    w.store.put_hashed(&name, Bytes::from(sealed).into()).await?;
    Ok(())
}

/// Finds a repair that leaves a log nobody can read, if one before it has died after the first entry of several that it
/// makes room for.
async fn a_repair_that_died_is_gone_on_with(w: &World) -> Result<()> {
    let log = replay(w).await?;
    let end = log.state().seq;
    shadow(w, &log, end).await?;
    for _ in 0..3 {
        put_next(w, &replay(w).await?).await?;
    }
    let name = format!("acme/{}", names::log_context(end + 3));
    let third = w.store.get(&name, 1 << 20).await?;
    put_next(w, &log).await?;
    forget(w);
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(exit == 0, "{exit} {repaired}");
    let now = replay(w).await?;
    ensure!(now.state().seq >= end + 3 && w.store.get(&name, 1 << 20).await? != third);
    let next = now.entries().iter().find(|entry| entry.seq == end + 1);
    ensure!(next.is_some_and(|next| next.previous == log.state().head));
    forget(w);
    w.s.ok(&["audit", "acme"])?;
    Ok(())
}

/// As a host that sees the repository for the first time, also if this one remembers nothing yet.
fn forget(w: &World) {
    let _ = std::fs::remove_dir_all(w.s.scratch.join("cache"));
}

/// Every version with content but those of the log: whoever looks says so there.
async fn content(w: &World) -> Result<BTreeSet<(String, String)>> {
    let mut all = w.contents().await?;
    all.retain(|(name, _)| !["/log/", "/snapshots/"].iter().any(|folder| name.contains(folder)));
    Ok(all)
}

/// Whether the log that can be seen has these backups, for a host that remembers nothing.
async fn has(w: &World, there: &[&str], gone: &[&str]) -> Result<()> {
    let log = replay(w).await?;
    for id in there {
        log.backup(id)?;
    }
    for id in gone {
        ensure!(log.backup(id).is_err(), "{id} is in the log");
    }
    Ok(())
}

/// Finds whoever takes the newest version of an entry for the right one because it is signed and follows on the one
/// before: last night's backup is gone then, and a collector deletes its packs.
pub async fn the_end_of_the_log_is_not_shadowed(server: &Server) -> Result<()> {
    let w = World::new("shadowed", server, false, "retention = { full = 2 }")?;
    let (first, _) = w.backup()?;
    let from = replay(&w).await?.state().seq + 1;
    let (last, _) = w.backup()?;
    let other = w.s.path("other");
    w.s.ok(&["info", "acme", "--cache", &other])?;
    let log = replay(&w).await?;
    let end = log.state().seq;
    ensure!(from < end);
    shadow(&w, &log, from).await?;
    has(&w, &[&first], &[&last]).await?;
    let before = (w.contents().await?, w.packs().await?);

    // Whoever saw the end refuses; whoever sees the repository for the first time, and looks, is told.
    refused(w.s.fairvault(&["info", "acme", "--cache", &other]), 4, "replaced")?;
    let named = names::log_context(from);
    forget(&w);
    refused(w.s.fairvault(&["audit", "acme"]), 4, &named)?;
    forget(&w);
    let (exit, text) = w.s.fairvault(&GC);
    ensure!(
        exit == 4 && text.contains("nothing is deleted") && text.contains(&named) && text.contains("fairvault repair"),
        "{exit} {text}"
    );
    ensure!(w.packs().await? == before.1, "gc deletes");
    forget(&w);
    let (exit, verified) = w.report(&["verify"])?;
    let findings = names_of(&verified["findings"], "object");
    ensure!(
        exit == 4 && (from..=end).all(|seq| findings.contains(&names::log_context(seq))),
        "{exit} {verified}"
    );

    // `verify` has noted itself in the other log, which is longer now, and which this host remembers.
    ensure!(replay(&w).await?.state().seq > end, "nothing lies behind the first log");
    let seen = content(&w).await?;
    let (exit, plan) = w.report(&["repair", "--dry-run"])?;
    let would = names_of(&plan["hidden"], "object");
    ensure!(
        exit == 4 && (from..=end).all(|seq| would.contains(&names::log_context(seq))),
        "{exit} {plan}"
    );
    ensure!(plan["hidden"].to_string().contains("another log begins here"), "{plan}");
    ensure!(content(&w).await? == seen, "a dry run changes something");
    let (exit, repaired) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && names_of(&repaired["hidden"], "object") == would,
        "{exit} {repaired}"
    );
    ensure!(w.contents().await?.is_superset(&before.0), "a version is lost");

    // The log goes on from what was written first, for everybody.
    has(&w, &[&first, &last], &[]).await?;
    w.s.ok(&["info", "acme", "--cache", &other])?;
    ensure!(w.s.ok(&["audit", "acme"])?.contains("had an entry here"));
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    let (exit, again) = w.report(&["repair"])?;
    ensure!(exit == 0 && again["hidden"] == Value::Array(Vec::new()), "{again}");
    let (exit, done) = w.gc()?;
    ensure!(exit == 0, "{done}");
    w.backup()?;
    let (exit, said) = w.s.restore("copy", &[]);
    ensure!(exit == 0, "{said}");
    a_repair_that_died_is_gone_on_with(&w).await
}

/// Finds a repair that gives up backups of an innocent host unasked, and a collector that deletes what one of two logs
/// needs.
pub async fn of_two_logs_with_backups_nobody_chooses_unasked(server: &Server) -> Result<()> {
    let w = World::new("forked", server, false, "retention = { full = 3 }")?;
    let (first, _) = w.backup()?;
    let from = replay(&w).await?.state().seq + 1;
    let (hidden, _) = w.backup()?;
    for seq in from..=replay(&w).await?.state().seq {
        let name = format!("acme/{}", names::log_context(seq));
        w.store.delete(&[name]).await?;
    }
    // Hidden, and nothing above it yet.
    forget(&w);
    refused(w.s.fairvault(&GC), 4, "nothing is deleted")?;
    forget(&w);
    // Backups are called by the second, and this host does not know of the other.
    std::thread::sleep(Duration::from_millis(1100));
    let (innocent, _) = w.backup()?;
    ensure!(innocent != hidden);
    has(&w, &[&first, &innocent], &[&hidden]).await?;
    let before = (w.contents().await?, content(&w).await?, w.packs().await?);

    refused(w.s.fairvault(&GC), 4, "another log begins here")?;
    let ways: [&[&str]; 2] = [&[], &["--dry-run"]];
    for dry_run in ways {
        let (exit, text) = w.s.fairvault(&[&REPAIR[..], dry_run].concat());
        let option = format!("--older-log {from}");
        ensure!(
            exit == 4
                && [&hidden, &innocent, &option]
                    .iter()
                    .all(|word| text.contains(word.as_str())),
            "{exit} {text}"
        );
    }
    let choose = |seq: u64| {
        w.s.fairvault(&[&REPAIR[..], &["--older-log", &seq.to_string()]].concat())
    };
    refused(choose(from + 1), 4, "two logs")?;
    ensure!(content(&w).await? == before.1, "something was changed unasked");
    ensure!(w.packs().await? == before.2, "gc deletes");
    has(&w, &[&first, &innocent], &[&hidden]).await?;

    let (exit, text) = choose(from);
    ensure!(exit == 0, "{exit} {text}");
    has(&w, &[&first, &hidden], &[&innocent]).await?;
    ensure!(w.contents().await?.is_superset(&before.0), "a version is lost");
    refused(choose(from), 1, "has one log")?;
    w.s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    let (exit, done) = w.gc()?;
    ensure!(exit == 0, "{done}");
    w.s.ok(&["audit", "acme"])?;
    Ok(())
}
