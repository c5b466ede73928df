//! The data sets of `bench compare`, always the same: the seed is fixed.

use anyhow::Result;
use fairvault_tests::{Fixture, run};

/// A data set.
pub struct Data {
    /// Name.
    pub name: &'static str,
    /// In words.
    pub about: &'static str,
    make: fn(&Fixture, u32) -> Result<()>,
}

/// All of them. `size` 1 is a few hundred MB each.
pub const ALL: [Data; 4] = [
    Data {
        name: "pgbench",
        about: "pgbench, with transactions",
        make: pgbench,
    },
    Data {
        name: "mixed",
        about: "events, measurements, customers, partitions; text, jsonb, uuid, numeric, arrays, TOAST; B-tree, hash, GIN, BRIN",
        make: mixed,
    },
    Data {
        name: "small",
        about: "20,000 small tables",
        make: small,
    },
    Data {
        name: "blobs",
        about: "blobs that do not compress",
        make: blobs,
    },
];

impl Data {
    /// Fills the server's database.
    pub fn make(&self, s: &Fixture, size: u32) -> Result<()> {
        (self.make)(s, size)?;
        s.sql("vacuum analyze")?;
        s.sql("checkpoint").map(drop)
    }
}

fn pgbench(s: &Fixture, size: u32) -> Result<()> {
    let scale = (40 * size).to_string();
    run(&mut s.server.pgbench(&s.scratch, &["-i", "-q", "-s", &scale]))?;
    let transactions = ["-n", "-c", "4", "-j", "2", "-t", "15000", "--random-seed", "1"];
    run(&mut s.server.pgbench(&s.scratch, &transactions)).map(drop)
}

const MIXED: &str = "
select setseed(0.5);
create table events (id bigserial primary key, at timestamptz not null, account int not null, kind text, payload jsonb, amount numeric(12,2), ref uuid);
insert into events (at, account, kind, payload, amount, ref)
  select timestamptz '2026-01-01' + i * interval '7 seconds' + random() * interval '3 seconds', (random() * 50000)::int,
    (array['login','logout','order','refund','view'])[1 + (random() * 4.99)::int],
    jsonb_build_object('ip', (random() * 255)::int || '.' || (random() * 255)::int || '.1.7', 'session', md5(random()::text),
      'items', (random() * 20)::int, 'agent', (array['Mozilla/5.0 (X11; Linux x86_64)','curl/8.5.0','okhttp/4.12'])[1 + (random() * 2.99)::int]),
    (random() * 10000)::numeric(12,2), md5(random()::text)::uuid
  from generate_series(1, 700000 * SIZE) i;
create index on events (at);
create index on events (account);
create index on events (kind, at);
create index on events using gin (payload jsonb_path_ops);
create table measured (id int, at timestamptz, v float8, w float4);
insert into measured select i % 100, timestamptz '2026-01-01' + i * interval '1 second', 20 + 5 * sin(i / 1000.0) + random(), (random() * 10)::float4
  from generate_series(1, 1500000 * SIZE) i;
create index on measured (id, at);
create table customer (id int primary key, name text, email text, city text, tags text[], bio text, created date, active bool);
insert into customer select i, initcap(substr(md5(i::text), 1, 6)) || ' ' || initcap(substr(md5((i * 7)::text), 1, 9)), 'user' || i || '@example.org',
    (array['Oslo','Lima','Kyoto','Berlin','Austin','Quito'])[1 + (random() * 5.99)::int], array['t' || (random() * 30)::int, 't' || (random() * 30)::int],
    (select string_agg(md5((i * n)::text) || ' lorem ipsum dolor sit amet', ' ') from generate_series(1, 1 + (random() * 70)::int) n),
    date '2010-01-01' + (random() * 5000)::int, random() < 0.8
  from generate_series(1, 50000 * SIZE) i;
create index on customer (email);
create index on customer using gin (tags);
create index on customer (city, created);
create table part (id bigint, part int, quantity int, price numeric, note varchar(40)) partition by hash (id);
create table part0 partition of part for values with (modulus 4, remainder 0);
create table part1 partition of part for values with (modulus 4, remainder 1);
create table part2 partition of part for values with (modulus 4, remainder 2);
create table part3 partition of part for values with (modulus 4, remainder 3);
insert into part select i, (random() * 1000)::int, (random() * 50)::int, (random() * 500)::numeric(8,2),
    case when random() < 0.5 then null else 'note ' || (random() * 1000)::int end
  from generate_series(1, 700000 * SIZE) i;
create index on part (part);
create index on part using hash (id);
create index on part using brin (id);
update part set quantity = quantity + 1 where part < 100;
delete from events where account < 1000;
";

fn mixed(s: &Fixture, size: u32) -> Result<()> {
    s.sql(&MIXED.replace("SIZE", &size.to_string())).map(drop)
}

fn small(s: &Fixture, _: u32) -> Result<()> {
    // In portions: each table is a lock.
    for from in (0..20_000).step_by(500) {
        s.sql(&format!(
            "do $$ begin for i in {from}..{from} + 499 loop execute format('create table t%s (id int primary key, name text, at timestamptz)', i); \
             execute format('insert into t%s select n, md5(n::text), timestamptz ''2026-01-01'' + n * interval ''1 hour'' from generate_series(1, 1 + %s %% 90) n', i, i); end loop; end $$"
        ))?;
    }
    Ok(())
}

fn blobs(s: &Fixture, size: u32) -> Result<()> {
    // Hashes of numbers: always the same, and nothing makes them smaller.
    s.sql(&format!(
        "create table blob (id int, content bytea); alter table blob alter content set storage external; \
         insert into blob select i, string_agg(sha512((i * 10000 + n)::text::bytea), '') \
         from generate_series(1, 4000 * {size}) i, generate_series(1, 1600) n group by i"
    ))
    .map(drop)
}
