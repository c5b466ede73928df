//! Two hosts that back up one server at the same time: neither holds up the other, both backups count and restore; and
//! a fence stops both, in words.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field, host_name};
use fairvault_tests::text;

const ARCHIVING: Shape<'static> = Shape {
    archiving: true,
    ..SMALL
};

/// A full backup by a host that remembers nothing of others, slow enough for somebody to begin beside it.
fn begin(s: &Fixture, host: &str) -> Result<Child> {
    let before = s.objects("leases").len();
    let cache = s.path(host);
    let slowly = [
        "--source",
        "stream",
        "--max-rate",
        "4MiB",
        "--fast",
        "--progress",
        "none",
    ];
    let words = [
        "backup", "acme", "--type", "full", "--output", "json", "--cache", &cache,
    ];
    let mut command = s.command(&[&words[..], &slowly].concat());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while s.objects("leases").len() <= before {
        ensure!(Instant::now() < deadline, "{host} does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}

fn end(child: Child) -> Result<(i32, String)> {
    let output = child.wait_with_output()?;
    Ok((output.status.code().unwrap_or(-1), text(&output)))
}

#[test]
fn two_hosts_at_once_take_two_backups() -> Result<()> {
    let s = Fixture::new("twohosts", ARCHIVING)?;
    s.sql("create table t as select i from generate_series(1, 1000) i")?;
    let (one, two) = (begin(&s, "one")?, begin(&s, "two")?);
    // Everybody sees who is at work, where and since when.
    let info = s.ok(&["info", "acme"])?;
    let at_work = info.lines().filter(|line| line.contains("unfinished: backup 2"));
    ensure!(
        at_work.clone().count() == 2
            && at_work
                .clone()
                .all(|line| line.contains(" on ") && line.contains(" since ")),
        "{info}"
    );
    let mut ids = Vec::new();
    for host in [one, two] {
        let (exit, said) = end(host)?;
        ensure!(exit == 0, "{exit} {said}");
        ids.push(field(&said, "id")?);
    }
    // The second began before the first had ended, or this shows nothing.
    let audit = s.ok(&["audit", "acme"])?;
    let place = |id: &str, what: &str| {
        let said = format!("backup {id} {what}");
        audit
            .find(&said)
            .with_context(|| format!("{said:?} is not in\n{audit}"))
    };
    for (id, other) in [(&ids[0], &ids[1]), (&ids[1], &ids[0])] {
        ensure!(place(id, "began")? < place(other, "is complete")?, "{audit}");
    }
    let info = s.ok(&["info", "acme"])?;
    ensure!(
        info.matches(" added ").count() == 2 && !info.contains("unfinished"),
        "{info}"
    );

    // Both hosts have stored the same content. What of that nobody uses goes, and both backups are whole.
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    let said = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(said.contains("all good"), "{said}");
    for (name, id) in ["a", "b"].into_iter().zip(&ids) {
        let exactly = ["--backup", id, "--target", "immediate", "--target-action", "promote"];
        let (exit, said) = s.restore(name, &exactly);
        ensure!(exit == 0, "{name}: {said}");
        let copy = s.start(name, 5433)?;
        ensure!(s.rows(&copy)? == "1000", "{name}");
        copy.stop(&s.scratch, "fast")?;
    }
    // A third host goes on from the newest.
    let next = [
        "backup",
        "acme",
        "--fast",
        "--type",
        "incr",
        "--progress",
        "none",
        "--output",
        "json",
    ];
    let parent = field(&s.ok(&next)?, "parent")?;
    ensure!(ids.contains(&parent), "{parent} {ids:?}");
    Ok(())
}

#[test]
fn a_fence_stops_both_and_says_by_whom() -> Result<()> {
    let s = Fixture::new("twofenced", ARCHIVING)?;
    let hosts = [begin(&s, "one")?, begin(&s, "two")?];
    let said = s.ok(&["stanza", "fence", "acme", "--reason", "one is enough"])?;
    ensure!(said.contains("2 unfinished sessions have ended"), "{said}");
    ensure!(!s.ok(&["info", "acme"])?.contains("unfinished"));
    for host in hosts {
        let (exit, said) = end(host)?;
        let by_whom = format!(" on {} at 2", host_name()?);
        let is_said = ["this session was fenced by", &by_whom, "one is enough"];
        let is_said = is_said.iter().all(|word| said.contains(word));
        ensure!(
            exit == 5 && is_said && said.contains("\"code\":\"held\""),
            "{exit} {said}"
        );
    }
    ensure!(s.ok(&["info", "acme"])?.contains("no backups"));
    // Whoever begins after it is not meant.
    s.backup()?;
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    let said = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(said.contains("all good"), "{said}");
    Ok(())
}
