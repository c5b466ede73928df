//! `wal receive` with a spool: what is acknowledged is on this host's disk, and the repository follows.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::host_name;
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::receiver::wait_until_durable;
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Receiver, Shape, run, tools};

/// Segments of 1 MiB.
const SMALL: Shape<'static> = Shape {
    major: 15,
    archiving: false,
    stanza: true,
    more: "wal = { flush_interval = \"100ms\", receive_spool_size = \"8MiB\" }",
    flags: false,
    settings: "",
    initdb: &["-k", "--wal-segsize=1"],
};

const FILL: &str = "insert into t select md5(i::text) from generate_series(1, 3000) i";

fn restored_rows(s: &Fixture) -> Result<String> {
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    s.configure("r", "synchronous_standby_names = ''\n")?;
    s.rows(&s.start("r", 5450)?)
}

fn all_good(s: &Fixture) -> Result<()> {
    let text = s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}

/// Journals, in their order.
fn journals(s: &Fixture) -> Vec<PathBuf> {
    let mut files = fairvault_tests::fixture::files(&s.scratch.join("spool"));
    files.retain(|path| path.extension().is_some_and(|e| e == "wal"));
    files
}

/// Bytes in journals.
fn spooled(s: &Fixture) -> u64 {
    let journals = journals(s);
    let lengths = journals.iter().filter_map(|path| path.metadata().ok());
    lengths.map(|meta| meta.len()).sum()
}

fn destroy(s: &Fixture) -> Result<()> {
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("lost"))?;
    Ok(())
}

#[test]
fn commits_go_on_while_the_store_is_away_and_nothing_acknowledged_is_lost() -> Result<()> {
    let mut s = Fixture::new(
        "spool",
        Shape {
            stanza: false,
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = on\n",
            ..SMALL
        },
    )?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    let proxy = Proxy::start(Target::Port(s3.port))?;
    s.use_s3(
        &format!("http://127.0.0.1:{}", proxy.port),
        "s3://bucket/x",
        "wal = { flush_interval = \"100ms\" }",
    )?;
    s.ok(&["stanza", "create", "acme"])?;
    s.sql("set synchronous_commit = local; create table t (x text)")?;
    s.backup()?;
    let spool = s.path("spool");
    let options = ["--synchronous", "--spool", &spool];
    let mut acknowledged = 0;
    let mut commit = |times: usize| -> Result<()> {
        for _ in 0..times {
            s.sql("insert into t values (1)")?;
            acknowledged += 1;
        }
        Ok(())
    };
    let receiver = Receiver::start(&s, &options)?;
    commit(3)?;
    proxy.away(true);
    let began = Instant::now();
    commit(10)?;
    ensure!(began.elapsed() < Duration::from_secs(20), "commits wait for the store");
    receiver.kill()?;
    // A receiver that starts while the store is away goes on where its spool ends.
    let receiver = Receiver::start(&s, &options)?;
    commit(10)?;
    ensure!(!receiver.text().contains("error"), "{}", receiver.text());
    receiver.kill()?;
    let receiver = Receiver::start(&s, &options)?;
    commit(2)?;
    // The server dies; what was acknowledged is in the spool alone.
    destroy(&s)?;
    receiver.kill()?;
    proxy.away(false);
    let mut receiver = Receiver::spawn(&s, &options)?;
    receiver.wait_for_line("the spool holds WAL")?;
    std::thread::sleep(Duration::from_secs(2));
    receiver.stop()?;
    let there: u32 = restored_rows(&s)?.parse()?;
    ensure!(there >= acknowledged, "{there} of {acknowledged}");
    all_good(&s)
}

#[test]
fn a_full_spool_makes_the_server_wait_and_then_drains() -> Result<()> {
    let s = Fixture::new("spoolfull", SMALL)?;
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    s.backup()?;
    let mut receiver = Receiver::start(&s, &["--spool", &spool])?;
    s.sql(FILL)?;
    wait_until_durable(&s, &s.server)?;
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    for _ in 0..40 {
        s.sql(FILL)?;
    }
    receiver.wait_for_line("ALARM: the spool is full")?;
    ensure!(spooled(&s) < 18 << 20, "{} bytes", spooled(&s));
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    wait_until_durable(&s, &s.server)?;
    let text = receiver.stop()?;
    ensure!(text.contains("trying again"), "{text}");
    // Only the segment that is being filled is left.
    ensure!(spooled(&s) < 3 << 20, "{} bytes", spooled(&s));
    destroy(&s)?;
    ensure!(restored_rows(&s)? == "123000");
    all_good(&s)
}

#[test]
fn a_full_disk_under_the_spool_loses_nothing() -> Result<()> {
    if !tools::is_root() {
        eprintln!("a small file system can only be mounted by root");
        return Ok(());
    }
    let s = Fixture::new("spooldisk", SMALL)?;
    let small = s.scratch.join("spool");
    std::fs::create_dir(&small)?;
    let mount = ["-t", "tmpfs", "-o", "size=4m,mode=0777", "tmpfs"];
    run(Command::new("mount").args(mount).arg(&small))?;
    let test = || -> Result<()> {
        s.sql("create table t (x text)")?;
        s.backup()?;
        let mut receiver = Receiver::start(&s, &["--spool", &s.path("spool")])?;
        std::fs::rename(s.path("vault"), s.path("hidden"))?;
        for _ in 0..30 {
            s.sql(FILL)?;
        }
        receiver.wait_for_line("No space left")?;
        std::fs::rename(s.path("hidden"), s.path("vault"))?;
        wait_until_durable(&s, &s.server)?;
        receiver.kill()?;
        // Again, with its end torn.
        let receiver = Receiver::start(&s, &["--spool", &s.path("spool")])?;
        s.sql(FILL)?;
        wait_until_durable(&s, &s.server)?;
        receiver.stop()?;
        Ok(())
    };
    let tested = test();
    let umount = run(Command::new("umount").arg("-l").arg(&small));
    tested?;
    umount?;
    destroy(&s)?;
    ensure!(restored_rows(&s)? == "93000");
    all_good(&s)
}

#[test]
fn a_promotion_is_followed_through_the_spool_and_slots_on_standbys_are_kept() -> Result<()> {
    let s = Fixture::new("spoolfailover", SMALL)?;
    let hosts = format!(
        "host={0},{0} port=5432,5460 user=postgres target_session_attrs=primary",
        s.scratch.path().display()
    );
    let standby_conninfo = format!("host={} port=5460 user=postgres", s.scratch.path().display());
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    let options = ["--conninfo", &hosts, "--spool", &spool, "--standby", &standby_conninfo];
    let mut receiver = Receiver::start(&s, &options)?;
    s.backup()?;
    receiver.wait_for_line("is not kept up")?;
    wait_until_durable(&s, &s.server)?;
    let standby = s.standby("standby", 5460, &[], "")?;
    s.sql(FILL)?;
    s.sql("select pg_switch_wal()")?;
    s.sql(FILL)?;
    standby.wait_for(&s.scratch, "select count(*) from t", "6000")?;
    wait_until_durable(&s, &s.server)?;
    // The slot is there, and has come after what is durable; never beyond it.
    let slot = "from pg_replication_slots where slot_name = 'fairvault_acme_main'";
    standby.wait_for(
        &s.scratch,
        &format!("select count(*) {slot} and slot_type = 'physical'"),
        "1",
    )?;
    let told = s.sql(&format!("select restart_lsn {slot}"))?;
    standby.wait_for(
        &s.scratch,
        &format!("select restart_lsn > '{told}'::pg_lsn - 1048576 and restart_lsn <= '{told}' {slot}"),
        "t",
    )?;
    s.server.stop(&s.scratch, "immediate")?;
    // The receiver is down while the standby is promoted: its slot keeps what is not received.
    let text = receiver.stop()?;
    ensure!(text.contains("is kept up again"), "{text}");
    s.promote(&standby)?;
    for _ in 0..10 {
        standby.sql(&s.scratch, &format!("{FILL}; select pg_switch_wal(); checkpoint"))?;
    }
    let receiver = Receiver::start(&s, &options)?;
    standby.sql(&s.scratch, "insert into t values (2)")?;
    wait_until_durable(&s, &standby)?;
    let text = receiver.stop()?;
    ensure!(!text.contains("MISSING") && !text.contains("is missing"), "{text}");
    let info = s.ok(&["info", "acme"])?;
    ensure!(info.contains("restorable on timeline 2"), "{info}");
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("r", 5461)?;
    ensure!(s.rows(&copy)? == "36001", "{}", s.rows(&copy)?);
    all_good(&s)
}

#[test]
fn a_hole_before_the_spool_is_filled_beside_it() -> Result<()> {
    let s = Fixture::new("spoolfill", SMALL)?;
    let spool = s.path("spool");
    let receiver = Receiver::start(&s, &["--spool", &spool])?;
    s.sql("create table t (x text)")?;
    let first = s.backup_id(&[])?;
    for _ in 0..10 {
        s.sql(FILL)?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    // Somebody loses a segment, and the server still has it.
    let segments = s.objects("wal");
    let segment = |path: &std::path::PathBuf| !path.display().to_string().contains(".d/");
    let lost: Vec<_> = segments.iter().filter(|path| segment(path)).collect();
    std::fs::remove_file(lost[lost.len() / 2])?;
    ensure!(s.ok(&["info", "acme"])?.contains("gap"), "there is no gap to fill");
    let more = ["--spool", &spool];
    let receiver = Receiver::start_until(&s, &more, "filling what is missing")?;
    s.sql(FILL)?;
    wait_until_durable(&s, &s.server)?;
    std::thread::sleep(Duration::from_secs(1));
    receiver.stop()?;
    let info = s.ok(&["info", "acme"])?;
    ensure!(!info.contains("gap"), "{info}");
    destroy(&s)?;
    let (exit, text) = s.restore("r", &["--backup", &first]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "33000");
    Ok(())
}

/// While nobody can fill the hole before it, what the spool holds is stored all the same, and the hole is said.
#[test]
fn a_hole_before_the_spool_is_said_while_the_server_is_away() -> Result<()> {
    let s = Fixture::new(
        "spoolhole",
        Shape {
            settings: "wal_keep_size = 64MB\n",
            ..SMALL
        },
    )?;
    let spool = s.path("spool");
    let more = ["--spool", &spool];
    let receiver = Receiver::start(&s, &more)?;
    s.sql("create table t (x text)")?;
    let first = s.backup_id(&[])?;
    for _ in 0..5 {
        s.sql(FILL)?;
    }
    wait_until_durable(&s, &s.server)?;
    let segment = |path: &std::path::PathBuf| !path.display().to_string().contains(".d/");
    let segments: Vec<_> = s.objects("wal").into_iter().filter(segment).collect();
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    for _ in 0..20 {
        s.sql(FILL)?;
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    let received = format!(
        "select flush_lsn >= '{}' from pg_stat_replication",
        s.sql("select pg_current_wal_flush_lsn()")?
    );
    while s.sql(&received)? != "t" {
        ensure!(Instant::now() < deadline, "the spool does not take it");
        std::thread::sleep(Duration::from_millis(50));
    }
    receiver.kill()?;
    s.server.stop(&s.scratch, "fast")?;
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    // Somebody loses a segment meanwhile.
    let lost = &segments[segments.len() / 2];
    let name = lost.file_name().unwrap_or_default().to_string_lossy()[..24].to_owned();
    std::fs::remove_file(lost)?;
    let mut receiver = Receiver::start_until(&s, &more, &format!("GAP: {name} is not filled in now"))?;
    let whole = || s.objects("wal").into_iter().filter(segment).count();
    let deadline = Instant::now() + Duration::from_secs(30);
    while whole() < segments.len() + 3 {
        ensure!(
            Instant::now() < deadline,
            "what the spool holds waits for the server: {}",
            receiver.text()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(s.ok(&["info", "acme"])?.contains("gap"));
    // Once the server is back, the hole is filled.
    s.server.start(&s.scratch)?;
    receiver.wait_for_line("receiving WAL from")?;
    let deadline = Instant::now() + Duration::from_secs(90);
    while s.ok(&["info", "acme"])?.contains("gap") {
        ensure!(Instant::now() < deadline, "the hole is not filled: {}", receiver.text());
        std::thread::sleep(Duration::from_millis(200));
    }
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    destroy(&s)?;
    let (exit, text) = s.restore("r", &["--backup", &first]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "75000");
    Ok(())
}

#[test]
fn a_damaged_journal_is_said_and_nothing_is_made_of_it() -> Result<()> {
    let s = Fixture::new("spooldamage", SMALL)?;
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    s.backup()?;
    let mut receiver = Receiver::start(&s, &["--spool", &spool])?;
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    for _ in 0..15 {
        s.sql(FILL)?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.wait_for_line("trying again")?;
    receiver.kill()?;
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    let journals = journals(&s);
    let middle = journals.get(journals.len() / 2).context("journals")?;
    let mut bytes = std::fs::read(middle)?;
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(middle, bytes)?;
    // A second receiver on one spool is refused as well.
    let holder = Receiver::start(&s, &["--spool", &spool])?;
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--spool", &spool]);
    ensure!(exit == 5 && text.contains("another receiver"), "{exit} {text}");
    let process = format!("process {} on {} since 2", holder.pid(), host_name()?);
    ensure!(text.contains(&process), "{process:?} is not in {text}");
    let (exit, text) = holder.wait()?;
    ensure!(exit == 4 && text.contains("cannot be read beyond"), "{exit} {text}");
    // Out of its way: the server still has everything.
    std::fs::rename(&spool, s.path("aside"))?;
    let receiver = Receiver::start(&s, &["--spool", &spool])?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    ensure!(!s.ok(&["info", "acme"])?.contains("gap"));
    Ok(())
}

#[test]
fn connections_that_come_and_go_do_not_fill_the_spool() -> Result<()> {
    let s = Fixture::new(
        "spoolcuts",
        Shape {
            settings: "synchronous_standby_names = 'fairvault'\nsynchronous_commit = local\n",
            ..SMALL
        },
    )?;
    let link = Proxy::start(Target::Socket(s.scratch.join(".s.PGSQL.5432")))?;
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    s.backup()?;
    let conninfo = format!("host=127.0.0.1 port={} user=postgres sslmode=disable", link.port);
    let options = [
        "--synchronous",
        "--spool",
        &spool,
        "--spool-size",
        "4MiB",
        "--conninfo",
        &conninfo,
    ];
    let mut receiver = Receiver::start(&s, &options)?;
    for round in 0..5 {
        s.sql("set synchronous_commit = on; set statement_timeout = '20s'; insert into t values ('x')")?;
        link.cut();
        receiver.wait_for_line("trying again in")?;
        std::thread::sleep(Duration::from_millis(600));
        ensure!(round == 0 || spooled(&s) < 3 << 20, "{} bytes", spooled(&s));
    }
    s.sql("set synchronous_commit = on; set statement_timeout = '20s'; insert into t values ('last')")?;
    let text = receiver.stop()?;
    ensure!(!text.contains("ALARM"), "{text}");
    destroy(&s)?;
    ensure!(restored_rows(&s)? == "6");
    Ok(())
}

#[test]
fn a_spool_that_others_have_overtaken_is_stored_and_left() -> Result<()> {
    let s = Fixture::new(
        "spoolstale",
        Shape {
            settings: "max_wal_size = 2MB\nmin_wal_size = 2MB\n",
            ..SMALL
        },
    )?;
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    s.backup()?;
    let mut receiver = Receiver::start(&s, &["--spool", &spool, "--no-slot"])?;
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    s.sql("insert into t values ('first')")?;
    receiver.wait_for_line("trying again")?;
    std::thread::sleep(Duration::from_millis(500));
    receiver.kill()?;
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    // Another receiver goes on, and the server forgets.
    let other = Receiver::start(&s, &["--slot", "other"])?;
    for _ in 0..8 {
        s.sql("insert into t select md5(i::text) from generate_series(1, 9000) i; checkpoint")?;
    }
    wait_until_durable(&s, &s.server)?;
    other.stop()?;
    s.sql("select pg_drop_replication_slot('other')")?;
    let receiver = Receiver::start(&s, &["--spool", &spool])?;
    s.sql("insert into t values ('last')")?;
    wait_until_durable(&s, &s.server)?;
    let text = receiver.stop()?;
    ensure!(text.contains("what it holds is stored first"), "{text}");
    destroy(&s)?;
    ensure!(restored_rows(&s)? == "72002");
    all_good(&s)
}

#[test]
fn a_server_that_was_set_back_is_refused_by_what_the_spool_holds() -> Result<()> {
    let s = Fixture::new("spoolback", SMALL)?;
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    s.sql("checkpoint")?;
    s.server.stop(&s.scratch, "fast")?;
    let copy = ["-a", &s.path("data5432"), &s.path("snapshot")];
    run(s.scratch.command("cp").args(copy))?;
    s.server.start(&s.scratch)?;
    s.backup()?;
    let receiver = Receiver::start(&s, &["--spool", &spool, "--no-slot"])?;
    s.sql("insert into t select 'right' from generate_series(1, 1000)")?;
    std::thread::sleep(Duration::from_secs(1));
    receiver.stop()?;
    destroy(&s)?;
    let back = ["-a", &s.path("snapshot"), &s.path("data5432")];
    run(s.scratch.command("cp").args(back))?;
    s.server.start(&s.scratch)?;
    // It goes on, beyond where the spool ends, with other rows.
    for _ in 0..3 {
        s.sql("insert into t select 'wrong' from generate_series(1, 2000); select pg_switch_wal()")?;
    }
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--no-slot", "--spool", &spool]);
    ensure!(exit == 1 && text.contains("set back or replaced"), "{exit} {text}");
    s.server.stop(&s.scratch, "immediate")?;
    std::fs::rename(&s.server.data, s.scratch.join("wrong"))?;
    ensure!(restored_rows(&s)? == "1000");
    Ok(())
}

#[test]
fn what_a_crash_leaves_of_a_spool_is_understood() -> Result<()> {
    let s = Fixture::new("spoolcrash", SMALL)?;
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    s.backup()?;
    // Two journals of one segment, not stored.
    let options = ["--spool", &spool, "--flush-interval", "60s"];
    let fill = "insert into t select md5(i::text) from generate_series(1, 1000) i";
    for _ in 0..2 {
        let receiver = Receiver::start(&s, &options)?;
        s.sql(fill)?;
        wait_until_durable(&s, &s.server)?;
        receiver.kill()?;
    }
    let all = journals(&s);
    ensure!(all.len() >= 2, "{all:?}");
    let last = all[all.len() - 1].clone();
    let good = std::fs::read(&last)?;
    ensure!(good.len() > 8192, "{} bytes", good.len());
    // A torn end is cut off; what was written before it counts.
    std::fs::write(&last, [&good[..], &[7; 100]].concat())?;
    let receiver = Receiver::start(&s, &options)?;
    wait_until_durable(&s, &s.server)?;
    let text = receiver.kill()?;
    ensure!(text.contains("does not open, as after a write"), "{text}");
    // A head that does not open, with content behind it, is damage: nothing is removed.
    let good = std::fs::read(&last)?;
    let mut bad = good.clone();
    bad[100] ^= 1;
    std::fs::write(&last, bad)?;
    let (exit, text) = s.fairvault(&["wal", "receive", "acme", "--spool", &spool]);
    ensure!(exit == 4 && last.exists(), "{exit} {text}");
    std::fs::write(&last, good)?;
    // The store is away when it is asked to stop: what is not stored yet is said, and the code is "try again".
    let mut receiver = Receiver::start(&s, &["--spool", &spool, "--flush-interval", "200ms"])?;
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    s.sql(fill)?;
    receiver.wait_for_line("trying again")?;
    run(Command::new("kill").args(["-TERM", &receiver.pid().to_string()]))?;
    let (exit, text) = receiver.wait()?;
    ensure!(exit == 75 && text.contains("keep the spool"), "{exit} {text}");
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    let receiver = Receiver::start(&s, &["--spool", &spool, "--flush-interval", "200ms"])?;
    for _ in 0..8 {
        s.sql(fill)?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    // A release that died between two journals: the rest goes with the next start.
    let left = journals(&s);
    let first = left.first().context("a journal")?.clone();
    let name = first.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let start = u64::from_str_radix(name.split('-').nth(1).unwrap_or_default(), 16)?;
    let leftover = first.with_file_name(format!("00000001-{:016X}.wal", start - (512 << 10)));
    std::fs::copy(&first, &leftover)?;
    run(Command::new("chown").arg("postgres:").arg(&leftover))?;
    let released = first.with_file_name("released");
    ensure!(std::fs::read_to_string(&released)?.contains(&format!("{start:016X}")));
    let receiver = Receiver::start(&s, &["--spool", &spool, "--flush-interval", "200ms"])?;
    s.sql(fill)?;
    wait_until_durable(&s, &s.server)?;
    receiver.stop()?;
    ensure!(!leftover.exists());
    destroy(&s)?;
    ensure!(restored_rows(&s)? == "12000");
    all_good(&s)
}

#[test]
fn what_lies_beyond_a_closed_timeline_is_put_aside() -> Result<()> {
    closed(false)
}

#[test]
fn a_restore_puts_aside_what_lies_beyond_a_closed_timeline() -> Result<()> {
    closed(true)
}

/// Either the next receiver stores what is in the spool, or it is found as journals of the repository by a restore.
fn closed(is_in_repository: bool) -> Result<()> {
    let s = Fixture::new("spoolclosed", SMALL)?;
    let dir = s.scratch.path().display().to_string();
    let hosts = format!("host={dir},{dir} port=5432,5460 user=postgres target_session_attrs=primary");
    let spool = s.path("spool");
    s.sql("create table t (x text)")?;
    let options = ["--conninfo", &hosts, "--spool", &spool, "--spool-size", "8MiB"];
    let mut receiver = Receiver::start(&s, &options)?;
    s.backup()?;
    let standby = s.standby("standby", 5460, &[], "restore_command = ''")?;
    s.sql("insert into t values ('both')")?;
    standby.wait_for(&s.scratch, "select count(*) from t", "1")?;
    wait_until_durable(&s, &s.server)?;
    standby.stop(&s.scratch, "fast")?;
    // What the old primary commits now, only the spool has; and it is of a history that will be given up.
    std::fs::rename(s.path("vault"), s.path("hidden"))?;
    for _ in 0..24 {
        s.sql(FILL)?;
    }
    wait_until_durable(&s, &s.server)?;
    receiver.wait_for_line("trying again")?;
    s.server.stop(&s.scratch, "immediate")?;
    standby.start(&s.scratch)?;
    s.promote(&standby)?;
    standby.sql(&s.scratch, "insert into t values ('new')")?;
    wait_until_durable(&s, &standby)?;
    receiver.kill()?;
    std::fs::rename(s.path("hidden"), s.path("vault"))?;
    let history = std::fs::read_to_string(standby.data.join("pg_wal/00000002.history"))?;
    let switch = history.split_whitespace().nth(1).context("a switch")?.to_owned();
    let close = ["--timeline", "1", "--after", &switch, "--reason", "failover"];
    s.ok(&[&["stanza", "fence", "acme"][..], &close].concat())?;
    let mut folder = "spool";
    if is_in_repository {
        folder = "vault/acme/journals";
        run(s.scratch.command("mkdir").arg(s.path(folder)))?;
        run(s
            .scratch
            .command("mv")
            .arg(s.path("spool/acme/main"))
            .arg(s.path(&format!("{folder}/host"))))?;
    } else {
        let mut receiver = Receiver::start_until(&s, &options, "is given up: the timeline was closed")?;
        wait_until_durable(&s, &standby)?;
        std::thread::sleep(Duration::from_secs(2));
        // What was given up takes no room from what comes: without the store, there is some for minutes.
        std::fs::rename(s.path("vault"), s.path("hidden"))?;
        standby.sql(&s.scratch, "create table more (x text)")?;
        for _ in 0..12 {
            standby.sql(&s.scratch, &FILL.replace("into t", "into more"))?;
        }
        wait_until_durable(&s, &standby)?;
        receiver.wait_for_line("trying again")?;
        std::fs::rename(s.path("hidden"), s.path("vault"))?;
        std::thread::sleep(Duration::from_secs(2));
        receiver.stop()?;
    }
    drop(standby);
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    let files = fairvault_tests::fixture::files(&s.scratch.join(folder));
    let closed = files
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "closed"));
    ensure!(closed.count() > 1, "{files:?}");
    let copy = s.start("r", 5461)?;
    ensure!(copy.sql(&s.scratch, "select string_agg(x, ',' order by x) from t")? == "both,new");
    all_good(&s)
}
