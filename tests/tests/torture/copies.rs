//! Copies of backups: recovered to a point, and compared with what replay makes and with the server's own files; what
//! PostgreSQL's tools say of them.

use super::*;

impl Torture {
    pub(super) fn compare(&mut self, ids: &[String], point: &str, occasion: Occasion) -> Result<()> {
        let s = &self.s;
        let restored = |name: &str, port, id: &str| -> Result<Server> {
            let target = ["--target-name", point, "--target-action", "shutdown", "--backup", id];
            let map = format!("all={}", s.path(&format!("{name}-ts")));
            let (exit, text) = s.restore(name, &[&target[..], &["--tablespace-map", &map]].concat());
            ensure!(exit == 0, "{text}");
            Ok(s.copy(name, port))
        };
        if self.truth.is_none() {
            let truth = restored("truth", 5460, &ids[0])?;
            recover(s, &truth)?;
            self.truth = Some(truth);
            return Ok(());
        }
        let truth = self.truth.as_ref().context("a truth")?;
        let auto = truth.data.join("postgresql.auto.conf");
        let text = std::fs::read_to_string(&auto)?;
        // Its first restore planned no further than to its first target.
        let get = format!("{} {} wal get acme %f %p", s.path("fairvault"), s.options.join(" "));
        let with_point = text.lines().map(|line| match line.split(' ').next() {
            Some("recovery_target_name") => format!("recovery_target_name = '{point}'"),
            Some("recovery_target_timeline") => format!("recovery_target_timeline = '{}'", self.timeline),
            Some("restore_command") => format!("restore_command = '{get}'"),
            _ => line.to_owned(),
        });
        std::fs::write(&auto, with_point.collect::<Vec<_>>().join("\n") + "\n")?;
        recover(s, truth)?;
        for id in ids {
            let copy = restored("copy", 5461, id)?;
            verify(s, &copy)?;
            recover(s, &copy)?;
            let found = differences(&truth.data, &copy.data, 10)?;
            ensure!(
                found.is_empty(),
                "backup {id} differs from what replay makes:\n{}",
                found.join("\n")
            );
            if occasion == Occasion::Still {
                let found = differences(&s.server.data, &copy.data, 10)?;
                ensure!(
                    found.is_empty(),
                    "backup {id} differs from the server's own files:\n{}",
                    found.join("\n")
                );
            }
            // All copies are the same by now: one is enough, and of most versions now and then.
            let is_looked_into = occasion == Occasion::Still || copy.major() == 15;
            if is_looked_into && ids.last() == Some(id) {
                look_inside(s, &copy).with_context(|| format!("backup {id}"))?;
            }
            for name in ["copy", "copy-ts"] {
                let _ = std::fs::remove_dir_all(s.scratch.join(name));
            }
        }
        Ok(())
    }
}

/// What PostgreSQL's own tools say of a copy that was recovered: tables and indexes agree, and everything can be read.
fn look_inside(s: &Fixture, copy: &Server) -> Result<()> {
    s.configure("copy", "recovery_target_action = 'promote'\n")?;
    copy.start(&s.scratch)?;
    copy.wait_for(&s.scratch, "select pg_is_in_recovery()", "f")?;
    // What is prepared holds locks that the tools would wait for.
    for name in copy.sql(&s.scratch, "select gid from pg_prepared_xacts")?.lines() {
        copy.sql(&s.scratch, &format!("commit prepared '{name}'"))?;
    }
    let (host, port) = (s.path(""), copy.port.to_string());
    let judge = |mut command: Command, arguments: &[&str]| {
        run(command
            .args(["-h", &host, "-p", &port, "-U", "postgres"])
            .args(arguments))
    };
    // This one works across versions.
    judge(
        s.scratch.command(tools::bin(15).join("pg_amcheck")),
        &["--all", "--install-missing", "--heapallindexed", "--parent-check"],
    )?;
    let dump = match copy.major() {
        ..=15 => Some(s.scratch.command(tools::bin(15).join("pg_dumpall"))),
        // A newer one reads older servers; 16 has none of its own here.
        major if tools::is_full() => Some(sid_program(major.max(17), "pg_dumpall")),
        _ => None,
    };
    match dump {
        Some(command) => {
            let dump = judge(command, &[])?;
            ensure!(
                dump.contains("PostgreSQL database cluster dump complete"),
                "the dump ends early"
            );
        }
        None => read_all(s, copy)?,
    }
    copy.stop(&s.scratch, "immediate")
}

/// Reads every row of every table, with what is stored out of line.
fn read_all(s: &Fixture, copy: &Server) -> Result<()> {
    let each = "do $$ declare r regclass; n bigint; begin \
                for r in select oid from pg_class where relkind in ('r', 'm') loop \
                execute format('select count(whole_row::text) from %s as whole_row', r) into n; \
                end loop; end $$";
    let databases = copy.sql(&s.scratch, "select datname from pg_database where datallowconn")?;
    databases
        .lines()
        .try_for_each(|database| copy.sql_in(&s.scratch, database, each).map(drop))
}

/// Recovers to the target, where the server shuts down.
fn recover(s: &Fixture, server: &Server) -> Result<()> {
    let before = server.log_text().len();
    server.try_start(&s.scratch, false)?;
    let began = Instant::now();
    std::thread::sleep(Duration::from_millis(300));
    while server.data.join("postmaster.pid").exists() {
        ensure!(
            began.elapsed() < Duration::from_secs(120),
            "recovery does not end\n{}",
            server.log_text()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let all = server.log_text();
    let log = all.get(before..).unwrap_or(&all);
    match log.contains("FATAL") || log.contains("PANIC") {
        true => bail!("{log}"),
        false => Ok(()),
    }
}

/// The restored files against the `backup_manifest` that the restore wrote, where there is a tool for it.
fn verify(s: &Fixture, copy: &Server) -> Result<()> {
    if copy.major() > 16 || !Path::new(&copy.data.join("backup_manifest")).exists() {
        return Ok(());
    }
    let tool = tools::bin(15).join("pg_verifybackup");
    run(s.scratch.command(tool).arg("-n").arg(&copy.data)).map(drop)
}
