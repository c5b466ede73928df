//! Copies of backups: recovered to a point, and compared with what replay makes and with the server's own files; what
//! PostgreSQL's tools say of them.

use super::*;

impl Torture {
    pub(super) fn compare(&mut self, backups: &[Taken], point: &str, occasion: Occasion) -> Result<()> {
        let s = &self.s;
        let to_point = ["--target-name", point, "--target-action", "shutdown"];
        if self.truth.is_none() {
            let truth = restored(s, "truth", 5460, &backups[0].id, &to_point)?;
            recover(s, &truth)?;
            self.truth = Some(truth);
            return Ok(());
        }
        let truth = self.truth.as_ref().context("a truth")?;
        for (number, backup) in backups.iter().enumerate() {
            // The last one is that of a server that stands still.
            let has_own = occasion == Occasion::Still && number + 1 == backups.len();
            self.compare_at_stop(truth, backup, has_own)?;
        }
        let settings = self.aimed(truth, &format!("recovery_target_name = '{point}'"))?;
        std::fs::write(truth.data.join("postgresql.auto.conf"), settings)?;
        recover(s, truth)?;
        for (number, Taken { id, .. }) in backups.iter().enumerate() {
            let copy = restored(s, "copy", 5461, id, &to_point)?;
            verify(s, &copy)?;
            recover(s, &copy)?;
            check_same(&truth.data, &copy, id, "what replay makes")?;
            if occasion == Occasion::Still {
                check_same(&s.server.data, &copy, id, "the server's own files")?;
            }
            // All copies are the same by now: one is enough, and of most versions now and then.
            let is_looked_into = occasion == Occasion::Still || copy.major() == 15;
            if judges_all() || is_looked_into && number + 1 == backups.len() {
                look_inside(s, &copy).with_context(|| format!("backup {id}"))?;
            }
            forget(s, "copy");
        }
        Ok(())
    }

    /// A backup as it is by itself, recovered to its stop, against the first full one, replayed to the same LSN; and
    /// against the server's own files, if they are those of that LSN.
    fn compare_at_stop(&self, truth: &Server, Taken { id, stop, .. }: &Taken, has_own: bool) -> Result<()> {
        let s = &self.s;
        // Its pages are on its disk, and it goes on from where it is afterwards: a copy of it goes to this LSN.
        for (from, to) in [("truth", "replayed"), ("truth-ts", "replayed-ts")] {
            let (from, to) = (s.path(from), s.path(to));
            run(s.scratch.command("cp").args(["-a", &from, &to]))?;
        }
        let replayed = s.copy("replayed", 5463);
        for link in std::fs::read_dir(replayed.data.join("pg_tblspc"))? {
            let link = link?.path();
            let folder = std::fs::read_link(&link)?.display().to_string();
            let folder = folder.replace(&s.path("truth-ts"), &s.path("replayed-ts"));
            run(s.scratch.command("ln").args(["-sfn", &folder]).arg(&link))?;
        }
        let settings = self.aimed(truth, &format!("recovery_target_lsn = '{stop}'"))?;
        let settings = settings + "recovery_target_inclusive = off\nrecovery_target_action = promote\n";
        std::fs::write(replayed.data.join("postgresql.auto.conf"), settings)?;
        settle(s, "replayed", &replayed)?;
        let to_stop = ["--target-lsn", stop, "--target-exclusive", "--target-action", "promote"];
        let copy = restored(s, "copy", 5461, id, &to_stop)?;
        settle(s, "copy", &copy)?;
        let who = format!("{id}, at its stop {stop},");
        check_same(&replayed.data, &copy, &who, "what replay makes")?;
        if has_own {
            check_same(&s.server.data, &copy, &who, "the server's own files")?;
        }
        if has_own || judges_all() {
            look_inside(s, &copy).with_context(|| format!("backup {who}"))?;
        }
        forget(s, "replayed");
        forget(s, "copy");
        Ok(())
    }

    /// The settings of the first full backup's copy, with another target.
    fn aimed(&self, truth: &Server, target: &str) -> Result<String> {
        let s = &self.s;
        let text = std::fs::read_to_string(truth.data.join("postgresql.auto.conf"))?;
        // Its first restore planned no further than to its first target.
        let get = format!("{} {} wal get acme %f %p", s.path("fairvault"), s.options.join(" "));
        let lines = text.lines().map(|line| match line.split(' ').next() {
            // In its place: a target that is set to nothing behind another one takes that away.
            Some("recovery_target_name") => target.to_owned(),
            Some("recovery_target_timeline") => format!("recovery_target_timeline = '{}'", self.timeline),
            Some("restore_command") => format!("restore_command = '{get}'"),
            _ => line.to_owned(),
        });
        Ok(lines.collect::<Vec<_>>().join("\n") + "\n")
    }
}

/// Restores a backup and its tablespace, without starting anything there.
fn restored(s: &Fixture, name: &str, port: u16, id: &str, target: &[&str]) -> Result<Server> {
    let map = format!("all={}", s.path(&format!("{name}-ts")));
    let (exit, text) = s.restore(name, &[target, &["--backup", id, "--tablespace-map", &map]].concat());
    ensure!(exit == 0, "{text}");
    Ok(s.copy(name, port))
}

fn forget(s: &Fixture, name: &str) {
    for folder in [name, &format!("{name}-ts")] {
        let _ = std::fs::remove_dir_all(s.scratch.join(folder));
    }
}

fn check_same(truth: &Path, copy: &Server, who: &str, what: &str) -> Result<()> {
    let found = differences(truth, &copy.data, 10)?;
    ensure!(
        found.is_empty(),
        "backup {who} differs from {what}:\n{}",
        found.join("\n")
    );
    Ok(())
}

/// Whether PostgreSQL's own tools judge every copy, and not only some: a soak has the time.
fn judges_all() -> bool {
    number("FAIRVAULT_TORTURE_JUDGE", 0) != 0
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

/// Recovers to the target and becomes a primary, which stops at once. A server that shuts down in recovery writes its
/// pages out only if it has seen a checkpoint; this one always does. Nobody connects, and nothing works there on its
/// own: no page changes behind the target.
fn settle(s: &Fixture, name: &str, server: &Server) -> Result<()> {
    s.configure(
        name,
        "hot_standby = off\nautovacuum = off\nmax_logical_replication_workers = 0\n",
    )?;
    server.try_start(&s.scratch, false)?;
    let began = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let status = std::fs::read_to_string(server.data.join("postmaster.pid")).unwrap_or_default();
        // The eighth line: "standby" until recovery has ended, if nobody may connect before.
        if status.lines().nth(7).is_some_and(|line| line.trim() == "ready") {
            return server.stop(&s.scratch, "fast");
        }
        let patience = Duration::from_secs(if status.is_empty() { 5 } else { 120 });
        ensure!(
            began.elapsed() < patience,
            "recovery does not end\n{}",
            server.log_text()
        );
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
