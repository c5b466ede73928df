//! `cargo xtask bench incr`: incremental backups after different amounts of change, beside pgBackRest with block
//! incremental, on one server, both encrypting, both with two workers. fairvault archives the WAL meanwhile, as it does
//! for real; the peer archives nothing.

use anyhow::{Context, Result, ensure};
use fairvault_tests::{Fixture, Shape, run, tools};

use super::compare::{Cost, Run, Tool};
use super::{elsewhere, results, size_of};

/// What pgBackRest needs for its block incremental.
const BLOCK: &str = "repo1-bundle=y\nrepo1-block=y\n";
/// Incrementals whose last one is restored.
const MANY: usize = 200;
/// How often that, and a full backup, are.
const RESTORES: usize = 3;

/// A change of the data between two backups.
struct Load {
    name: &'static str,
    /// Of all pages of the large table, this part is changed, in parts per ten thousand.
    pages: u32,
    /// Rows that are added, per GB.
    rows: u32,
    /// Where they are added: a table, its columns, and what is selected for row `i`.
    row: [&'static str; 2],
    /// What is promised, of what the peer takes and stores: wall time and bytes.
    most: [f64; 2],
}

/// Seconds of an incremental with nothing changed, its checkpoint included.
const NOTHING: f64 = 0.5;
/// What a month stores, of what the peer stores.
const MONTH: f64 = 0.4;
/// Nothing is promised.
const NONE: [f64; 2] = [f64::INFINITY; 2];

/// Says that a promise was not kept, if that is so.
fn broken(what: &str, found: f64, most: f64) -> Option<String> {
    (found.is_nan() || found > most).then(|| format!("{what}: {found:.3}, and {most} at most is promised"))
}

/// Of 64 characters, 32 bytes are random.
const DIGESTS: [&str; 2] = ["log (id, what)", "i, md5(i::text) || md5((i * 3)::text) || ' happened'"];
/// Numbers, a time, one of some words.
const EVENTS: [&str; 2] = [
    "events",
    "i, now() + i * interval '37 ms', (random() * 1e6)::int, (random() * 1e4)::numeric(9, 2), \
     (array['created', 'paid', 'shipped', 'returned'])[1 + i % 4], 'order ' || (random() * 1e6)::int",
];

const LOADS: [Load; 6] = [
    Load {
        name: "nothing changed",
        pages: 0,
        rows: 0,
        row: DIGESTS,
        most: NONE,
    },
    Load {
        name: "0.05 % of pages",
        pages: 5,
        rows: 0,
        row: DIGESTS,
        most: [0.1, 0.05],
    },
    Load {
        name: "1 % of pages",
        pages: 100,
        rows: 0,
        row: DIGESTS,
        most: [0.2, 0.3],
    },
    Load {
        name: "10 % of pages",
        pages: 1000,
        rows: 0,
        row: DIGESTS,
        most: [0.5, 0.6],
    },
    Load {
        name: "5 % appended, random digests",
        pages: 0,
        rows: 340_000,
        row: DIGESTS,
        // Random bytes alone are 0.7 of what the peer stores.
        most: [0.5, 1.0],
    },
    Load {
        name: "5 % appended, events",
        pages: 0,
        rows: 650_000,
        row: EVENTS,
        most: [0.5, 0.6],
    },
];

/// Builds with optimisation, and runs there. `size` is in GB; with `many`, the last of many small incrementals is
/// restored beside a full backup, each after changes on so many percent of the pages.
pub fn run_it(size: u32, many: Option<f64>) -> Result<()> {
    let mut arguments = vec!["incr".to_owned(), size.to_string()];
    if let Some(percent) = many {
        arguments.extend(["many".to_owned(), percent.to_string()]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if elsewhere(&arguments)? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_time()?;
    tools::install_sid()?;
    tools::install_pgbackrest()?;
    let compared = compare(size, many);
    tools::unmount_sid();
    compared
}

/// A month of backups: a full every week, a diff every night, an incremental every hour of eight, 0.5 % of the pages
/// changed between them; what both repositories hold in the end. Of a few hundred MB.
pub fn run_month() -> Result<()> {
    if elsewhere(&["month"])? {
        return Ok(());
    }
    tools::install_debian()?;
    tools::install_time()?;
    tools::install_sid()?;
    tools::install_pgbackrest()?;
    let month = month();
    tools::unmount_sid();
    month
}

fn month() -> Result<()> {
    let s = set_up(20)?;
    let (peer, ours) = at_work(&s)?;
    let hour = Load {
        name: "an hour",
        pages: 50,
        rows: 0,
        row: DIGESTS,
        most: NONE,
    };
    let (mut round, mut totals) = (0, [Cost::default(); 2]);
    for day in 0..28 {
        let night = if day % 7 == 0 { "full" } else { "diff" };
        for kind in std::iter::once(night).chain(["incr"; 8]) {
            round += 1;
            change(&s, &hour, 1, round)?;
            for (tool, total) in [&peer, &ours].into_iter().zip(&mut totals) {
                let cost = backup(tool, kind)?;
                total.wall += cost.wall;
                total.cpu += cost.cpu;
                total.stored += cost.stored;
            }
        }
        println!("day {day}: {:.1} and {:.1} MiB", totals[0].stored, totals[1].stored);
    }
    let [peer, ours] = totals;
    let text = format!(
        "{round} backups in a month: {:.1} MiB of pgBackRest, {:.1} of fairvault: {:.2}; wall time {:.2}, CPU {:.2}\n",
        peer.stored,
        ours.stored,
        ours.stored / peer.stored,
        ours.wall / peer.wall,
        ours.cpu / peer.cpu
    );
    std::fs::write(results()?.join("month.md"), &text)?;
    print!("{text}");
    let broken = broken("stored in a month", ours.stored / peer.stored, MONTH);
    ensure!(broken.is_none(), "{}", broken.unwrap_or_default());
    Ok(())
}

/// A server with a pgbench database that leaves room in its pages.
fn set_up(scale: u32) -> Result<Fixture> {
    let settings = "shared_buffers = 512MB\nmax_wal_size = 16GB\nmin_wal_size = 4GB\nmaintenance_work_mem = 256MB\nautovacuum = off\n";
    let s = Fixture::new(
        "benchincr",
        Shape {
            stanza: false,
            settings,
            ..Default::default()
        },
    )?;
    run(&mut s
        .server
        .pgbench(&s.scratch, &["-i", "-q", "-F", "90", "-s", &scale.to_string()]))?;
    s.sql("create table log (id bigint, at timestamptz default now(), what text)")?;
    s.sql("create table events (id bigint, at timestamptz, account int, amount numeric, kind text, what text)")?;
    s.sql("select pg_switch_wal(); checkpoint")?;
    Ok(s)
}

/// Both tools with empty repositories; fairvault archives.
fn at_work(s: &Fixture) -> Result<(Run<'_>, Run<'_>)> {
    let [peer, ours] = [Tool::PeerZstd, Tool::Ours].map(|tool| Run {
        s,
        tool,
        s3: None,
        id: format!("-{}", tool as u8),
        more: BLOCK,
    });
    peer.prepare()?;
    ours.prepare()?;
    // Archiving begins with the stanza.
    let push = format!(
        "{} --config {} wal push acme %p",
        s.path("fairvault"),
        ours.path("conf")
    );
    s.sql("alter system set archive_mode = on")?;
    s.sql(&format!("alter system set archive_command = '{push}'"))?;
    s.server.stop(&s.scratch, "fast")?;
    s.server.start(&s.scratch)?;
    Ok((peer, ours))
}

fn compare(size: u32, many: Option<f64>) -> Result<()> {
    let s = set_up(size * 68)?;
    let (peer, ours) = at_work(&s)?;
    let mut table = String::from(
        "| change | pgBackRest s | fairvault s | ratio | pgBackRest CPU s | fairvault CPU s | ratio | pgBackRest MiB | fairvault MiB | ratio |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut row = |name: &str, [peer, ours]: [Cost; 2]| {
        let line = format!(
            "| {name} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} | {:.3} |\n",
            peer.wall,
            ours.wall,
            ours.wall / peer.wall,
            peer.cpu,
            ours.cpu,
            ours.cpu / peer.cpu,
            peer.stored,
            ours.stored,
            ours.stored / peer.stored
        );
        print!("{line}");
        table += &line;
    };
    let mut missed = Vec::new();
    row("full", [backup(&peer, "full")?, backup(&ours, "full")?]);
    for (number, load) in LOADS.iter().enumerate() {
        change(&s, load, size, number as u32 + 1)?;
        let (of_peer, of_ours) = (backup(&peer, "incr")?, backup(&ours, "incr")?);
        row(load.name, [of_peer, of_ours]);
        let [wall, stored] = load.most;
        let name = |what: &str| format!("{}, {what}", load.name);
        missed.extend(broken(&name("wall"), of_ours.wall / of_peer.wall, wall));
        missed.extend(broken(&name("stored"), of_ours.stored / of_peer.stored, stored));
        if load.pages + load.rows == 0 {
            missed.extend(broken(&name("seconds"), of_ours.wall, NOTHING));
        }
    }
    row(
        "restore",
        [peer.measure(peer.restore(false))?, ours.measure(ours.restore(false))?],
    );
    if let Some(percent) = many {
        let load = Load {
            name: "one of many",
            pages: (percent * 100.0).round() as u32,
            rows: 0,
            row: DIGESTS,
            most: NONE,
        };
        // What the changes above scattered is not what is measured.
        backup(&ours, "full")?;
        for number in 0..MANY {
            change(&s, &load, size, 10 + number as u32)?;
            let cost = backup(&ours, "incr")?;
            if (number + 1) % 20 == 0 {
                println!("{}: {} of {MANY}, {:.1} MiB", load.name, number + 1, cost.stored);
            }
        }
        let last = newest(&ours)?;
        backup(&ours, "full")?;
        let full = newest(&ours)?;
        // In turn, so that both find the machine in the same state; the middle one of each counts.
        let (mut of_last, mut of_full) = (Vec::new(), Vec::new());
        for round in 0..RESTORES {
            of_last.push(restore_into(&ours, &format!("last{round}"), &last)?);
            of_full.push(restore_into(&ours, &format!("full{round}"), &full)?);
        }
        let name = format!("restore of a full (left), and of the last of {MANY} incrementals of {percent} %");
        let (full, last) = (middle(of_full), middle(of_last));
        row(&name, [full, last]);
        let most = if percent <= 0.05 { 1.2 } else { 2.0 };
        missed.extend(broken(&name, last.wall / full.wall, most));
    }
    let file = results()?.join("incremental.md");
    std::fs::write(&file, &table)?;
    println!("\n{table}\nwritten to {}", file.display());
    ensure!(missed.is_empty(), "{}", missed.join("\n"));
    Ok(())
}

/// What a backup costs, and by how much its repository grows without the WAL.
fn backup(run: &Run<'_>, kind: &str) -> Result<Cost> {
    let stored = || {
        let folder = run.s.scratch.join(&run.name("repo"));
        let wal = size_of(&folder.join("acme/wal"));
        (size_of(&folder) - wal) as f64 / 1_048_576.0
    };
    let before = stored();
    let mut cost = run.measure(run.backup(kind))?;
    cost.stored = stored() - before;
    Ok(cost)
}

/// The id of the newest backup; ids are times.
fn newest(ours: &Run<'_>) -> Result<String> {
    let info = run(&mut ours.command(&["info", "acme", "--output", "json"]))?;
    let info: serde_json::Value = serde_json::from_str(&info)?;
    let backups = info["stanzas"][0]["backups"].as_array().context("backups")?;
    let ids = backups.iter().filter_map(|backup| backup["id"].as_str());
    Ok(ids.max().context("a backup")?.to_owned())
}

fn restore_into(run: &Run<'_>, name: &str, id: &str) -> Result<Cost> {
    let to = run.s.path(name);
    let command = run.command(&["restore", "acme", "--to", &to, "--backup", id, "--progress", "none"]);
    run.measure(command).context("restoring")
}

/// By wall time.
fn middle(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by(|a, b| a.wall.total_cmp(&b.wall));
    costs[costs.len() / 2]
}

fn change(s: &Fixture, load: &Load, size: u32, round: u32) -> Result<()> {
    if load.pages > 0 {
        // A row on each of some pages; its new version finds room there.
        s.sql(&format!(
            "select setseed({seed}); update pgbench_accounts set abalance = abalance + 1 where ctid = any (array( \
             select format('(%s,%s)', b, 1 + ({round} + b) % 50)::tid \
             from generate_series(0, pg_relation_size('pgbench_accounts') / 8192 - 1) b where random() < {part}))",
            seed = f64::from(round % 1000) / 1000.0,
            part = f64::from(load.pages) / 10_000.0
        ))?;
    }
    if load.rows > 0 {
        let (rows, [table, values]) = (load.rows * size, load.row);
        s.sql(&format!(
            "select setseed(0.5); insert into {table} select {values} from generate_series(1, {rows}) i"
        ))?;
    }
    s.sql("checkpoint").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_was_promised_is_said() {
        assert_eq!(broken("wall", 0.1, 0.1), None);
        assert!(broken("wall", 0.11, 0.1).is_some_and(|said| said.contains("wall: 0.110")));
        assert!(broken("stored", f64::NAN, 1.0).is_some());
    }
}
