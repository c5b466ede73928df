//! What happens to the cluster: all kinds of definitions, changes, transactions and ends of them, at random.

use super::*;

impl Torture {
    /// Something happens.
    pub(super) fn step(&mut self) -> Result<()> {
        if self.dice.roll(5) == 0 {
            return self.crowd();
        }
        let n = self.dice.roll(TABLES) as usize;
        let t = format!("t{n}");
        if !self.tables[n] {
            self.tables[n] = true;
            let space = ["", "tablespace ts"][self.dice.roll(2) as usize];
            let kind = ["", "", "unlogged"][self.dice.roll(3) as usize];
            // What is long in the last column is stored out of line, as it is.
            self.sql(&format!(
                "create {kind} table {t} (id bigserial, a int, b text, c jsonb, p point, d timestamptz default now(), w text) \
                 {space}; alter table {t} alter w set storage external"
            ))?;
            for index in self.indexes() {
                if self.dice.roll(2) == 0 {
                    self.sql(&format!("create index on {t} using {index}"))?;
                }
            }
            return self.grow(&t);
        }
        let part = 1 + self.dice.roll(30);
        let what = match self.dice.roll(30) {
            0..=4 => return self.grow(&t),
            5 | 6 => format!("update {t} set b = b || 'u' where id % {part} = 0"),
            7 | 8 => format!("update {t} set a = a + 1, p = point(a, id) where id % {part} = 0"),
            9 => format!("update {t} set w = w || 'u' where id % {part} = 0"),
            10 => format!("delete from {t} where id % {part} = 0"),
            11 => format!("delete from {t} where id > (select max(id) / 2 from {t})"),
            12..=14 => {
                let how = self.dice.pick(&[
                    "",
                    "(freeze)",
                    "(full)",
                    "(full, analyze)",
                    "(disable_page_skipping, truncate off)",
                    "(index_cleanup on, parallel 2)",
                ]);
                format!("vacuum {how} {t}")
            }
            15 => format!("truncate {t}"),
            16 => format!("reindex table {} {t}", self.dice.pick(&["", "concurrently"])),
            17 => {
                let key = self.dice.pick(&["a", "d", "id"]);
                self.sql(&format!("create index if not exists {t}_by_{key} on {t} ({key})"))?;
                format!("cluster {t} using {t}_by_{key}")
            }
            18 => {
                let indexes = self.indexes();
                let index = self.dice.pick(indexes);
                format!("drop index if exists {t}_other; create index {t}_other on {t} using {index}")
            }
            19 => {
                self.tables[n] = false;
                format!("drop table {t}")
            }
            20 => format!(
                "alter table {t} set tablespace {}",
                self.dice.pick(&["ts", "pg_default"])
            ),
            21 => format!("alter table {t} set {}", self.dice.pick(&["logged", "unlogged"])),
            22 => return self.database(),
            23 | 24 => return self.transactions(&t),
            25 => {
                let values = "select nextval('numbers') from generate_series(1, 100)";
                (*self.dice.pick(&[values, "alter sequence numbers restart"])).to_owned()
            }
            26 => "insert into los select lo_from_bytea(0, repeat('lo', 5000)::bytea) from generate_series(1, 5)"
                .to_owned(),
            27 => "select lo_unlink(id) from los where id::bigint % 2 = 0; delete from los where id::bigint % 2 = 0"
                .to_owned(),
            28 => "checkpoint".to_owned(),
            _ => return self.crash(),
        };
        self.sql(&what).map(drop)
    }

    /// Many at once fill a table, or it is cut to nothing. Where many wait for room, the server adds more of it than
    /// anybody uses at once: pages of zeros that no WAL names.
    fn crowd(&mut self) -> Result<()> {
        if self.dice.roll(3) == 0 {
            self.sql("delete from wide")?;
            return self.sql("vacuum wide").map(drop);
        }
        println!("    a crowd");
        let script = b"insert into wide select i, repeat('w', 1900) from generate_series(1, 10) i;\n";
        let script = self.s.scratch.write("crowd.sql", script)?.display().to_string();
        let times = (1 + self.dice.roll(20)).to_string();
        let arguments = ["-n", "-f", &script, "-c", "8", "-j", "2", "-t", &times];
        run(&mut self.s.server.pgbench(&self.s.scratch, &arguments)).map(drop)
    }

    /// In one round, rows that never were fill a table and are cleared away, and its file keeps its length. In the next
    /// one it is cut, by a record that names no block, and its file grows without WAL, as by a crash after it was
    /// extended: whoever overlooks that it was cut brings back the pages that it had.
    pub(super) fn cut(&mut self, round: u64) -> Result<()> {
        if round.is_multiple_of(2) {
            self.sql("truncate cut")?;
            // What was rolled back can go, whatever other transactions are open.
            self.sql("begin; insert into cut select repeat('c', 1900) from generate_series(1, 400); rollback")?;
            return self.sql("vacuum (truncate off) cut").map(drop);
        }
        self.sql("vacuum cut")?;
        // Whoever recovers from a crash would cut it again.
        self.sql("checkpoint")?;
        let file = self.sql("select pg_relation_filepath('cut')")?;
        let file = self.s.server.data.join(file);
        self.s.server.stop(&self.s.scratch, "immediate")?;
        let len = file.metadata()?.len();
        ensure!(len == 0, "a table without rows was not cut: {len} bytes");
        std::fs::File::options().write(true).open(&file)?.set_len(60 * 8192)?;
        self.s.server.start(&self.s.scratch)
    }

    fn grow(&mut self, t: &str) -> Result<()> {
        let rows = 10 + self.dice.roll(3000);
        // Long values are compressed where they are, or stored out of line.
        let (b, w, rows) = match self.dice.roll(8) {
            0 => ("|| repeat(md5((i * 7)::text), 100)", "null", rows / 20 + 1),
            1 | 2 => ("", "repeat(md5((i * 7)::text), 100)", rows / 20 + 1),
            _ => ("", "null", rows),
        };
        let select = format!(
            "select i % 97, md5(i::text) {b}, json_build_object('k', i % 13, 'v', md5(i::text))::jsonb, \
             point(i % 100, i), {w}::text from generate_series(1, {rows}) i"
        );
        // COPY extends by many pages at a time.
        match self.dice.roll(2) {
            0 => self.sql(&format!("insert into {t} (a, b, c, p, w) {select}")).map(drop),
            _ => {
                let file = self.s.path("rows");
                self.sql(&format!("copy ({select}) to '{file}'"))?;
                self.sql(&format!("copy {t} (a, b, c, p, w) from '{file}'")).map(drop)
            }
        }
    }

    fn database(&mut self) -> Result<()> {
        let n = self.dice.roll(DATABASES) as usize;
        if self.databases[n] && self.dice.roll(3) == 0 {
            self.databases[n] = false;
            return self.sql(&format!("drop database d{n}")).map(drop);
        }
        if self.databases[n] && self.dice.roll(3) == 0 {
            let space = self.dice.pick(&["ts", "pg_default"]);
            self.sql(&format!("alter database d{n} set tablespace {space}"))?;
            // That the old folder is gone is logged after the commit, and a crash may lose it.
            return self.sql("checkpoint").map(drop);
        }
        if !self.databases[n] {
            self.databases[n] = true;
            let strategy = match self.s.server.major() >= 15 {
                true => format!("strategy {}", self.dice.pick(&["wal_log", "file_copy"])),
                false => String::new(),
            };
            self.s
                .sql(&format!("create database d{n} template template0 {strategy}"))?;
        }
        let name = format!("x{}", self.dice.roll(1000));
        let make =
            format!("create table if not exists {name} as select i, md5(i::text) from generate_series(1, 2000) i");
        self.s.server.sql_in(&self.s.scratch, &format!("d{n}"), &make).map(drop)
    }

    /// Transactions that end in unusual ways.
    fn transactions(&mut self, t: &str) -> Result<()> {
        if let Some(name) = self.prepared.pop() {
            let end = self.dice.pick(&["commit", "rollback"]);
            return self.sql(&format!("{end} prepared '{name}'")).map(drop);
        }
        let number = self.dice.roll(1_000_000);
        let what = match self.dice.roll(6) {
            0 => {
                self.prepared.push(format!("p{number}"));
                format!(
                    "begin; create table q{number} as select generate_series(1, 500) as i; \
                     insert into busy values (10000 + {number}, 1, 'p'); prepare transaction 'p{number}'"
                )
            }
            1 => {
                self.sql(&format!(
                    "create table q{number} as select generate_series(1, 500) as i"
                ))?;
                self.prepared.push(format!("p{number}"));
                format!(
                    "begin; drop table q{number}; create table r{number} as select generate_series(1, 500) as i; \
                     prepare transaction 'p{number}'"
                )
            }
            // More subtransactions than shared memory has room for, in a commit that drops files as well.
            2 => format!(
                "do $$ begin truncate {t}; for i in 1..200 loop begin insert into {t} (a, b) values (i, 'sub'); \
                 if i % 3 = 0 then raise exception 'none of it'; end if; \
                 exception when raise_exception then null; end; end loop; end $$"
            ),
            3 => format!(
                "begin; truncate {t}; create table q{number} as select generate_series(1, 500) as i; \
                 insert into {t} (a, b) select i, 'aborted' from generate_series(1, 2000) i; rollback"
            ),
            4 => format!(
                "begin; insert into {t} (a, b) select i, 'one' from generate_series(1, 200) i; savepoint s; truncate {t}; \
                 insert into {t} (a, b) select i, 'two' from generate_series(1, 900) i; rollback to s; \
                 insert into {t} (a, b) select i, 'three' from generate_series(1, 200) i; commit"
            ),
            _ => format!(
                "begin; truncate {t}; insert into {t} (a, b) select i, 'anew' from generate_series(1, 700) i; commit"
            ),
        };
        self.sql(&what).map(drop)
    }

    pub(super) fn crash(&mut self) -> Result<()> {
        self.s.server.stop(&self.s.scratch, "immediate")?;
        self.s.server.start(&self.s.scratch)
    }

    /// From 17 on, the initial fork of a bloom index of an unlogged table is not in the WAL: PostgreSQL itself loses it.
    fn indexes(&self) -> &'static [&'static str] {
        match self.s.server.major() {
            ..17 => &INDEXES,
            _ => &INDEXES[..INDEXES.len() - 1],
        }
    }
}
