//! What each role may do in a bucket is enough for what it does: a writer that deletes nothing and makes no keys, a reader
//! that writes nothing, a collector with credentials of its own.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, refused};
use fairvault_tests::policy::{self, Policy};
use fairvault_tests::proxy::{Proxy, S3Request, Target};
use fairvault_tests::receiver::{Receiver, wait_until_durable};
use fairvault_tests::s3::S3;

/// By access key.
static POLICIES: LazyLock<BTreeMap<&str, Policy>> = LazyLock::new(|| documented().unwrap_or_default());

fn documented() -> Result<BTreeMap<&'static str, Policy>> {
    let [reader, writer, founder, deleter] = policy::access()?;
    let (reader, writer) = (reader.as_str(), writer.as_str());
    Ok(BTreeMap::from([
        ("reader", Policy::of(&[reader])?),
        ("writer", Policy::of(&[reader, writer])?),
        ("founder", Policy::of(&[reader, writer, founder.as_str()])?),
        ("deleter", Policy::of(&[reader, deleter.as_str()])?),
    ]))
}

fn allows(request: &S3Request<'_>) -> bool {
    let acts = policy::acts(request);
    let own = POLICIES.get(request.key);
    own.is_some_and(|own| acts.iter().all(|act| own.allows(act)))
}

struct Bucket {
    s: Fixture,
    proxy: Proxy,
    _s3: S3,
}

impl Bucket {
    fn new(name: &str, more: &str) -> Result<Self> {
        let shape = Shape { stanza: false, ..SMALL };
        let mut s = Fixture::new(name, shape)?;
        let s3 = S3::start(&s.scratch, "bucket")?;
        let proxy = Proxy::start(Target::Guarded(s3.port, allows))?;
        s.use_s3(&format!("http://127.0.0.1:{}", proxy.port), "s3://bucket/prefix", more)?;
        let this = Self { s, proxy, _s3: s3 };
        this.use_key("writer", "")?;
        refused(this.s.fairvault(&["stanza", "create", "acme"]), 1, REFUSED)?;
        this.proxy.denied();
        this.use_key("founder", "")?;
        this.s.ok(&["stanza", "create", "acme"])?;
        this.only_probes_stay()?;
        this.use_key("writer", "")?;
        Ok(this)
    }

    /// What somebody tried of the store, they could not take away; nothing else was denied.
    fn only_probes_stay(&self) -> Result<()> {
        let denied = self.proxy.denied();
        let is_known = |line: &String| line.contains(" DELETE ") && line.contains("/probe/");
        ensure!(denied.iter().all(is_known), "{denied:?}");
        Ok(())
    }

    /// The credentials that delete, as a line of the configuration.
    fn deleter(&self) -> String {
        let secret = self.s.path("s3.secret");
        format!("deleter = {{ access_key = \"deleter\", secret_key_file = \"{secret}\" }}")
    }

    /// From now on with this access key.
    fn use_key(&self, key: &str, more: &str) -> Result<()> {
        let file = self.s.scratch.join("s3.toml");
        let text = std::fs::read_to_string(&file)?;
        let lines = text.lines().filter(|line| !line.starts_with("deleter"));
        let lines = lines.map(|line| match line.starts_with("access_key") {
            true => format!("access_key = \"{key}\"\n{more}"),
            false => line.to_owned(),
        });
        let text: Vec<String> = lines.collect();
        self.s.scratch.write("s3.toml", (text.join("\n") + "\n").as_bytes())?;
        Ok(())
    }

    /// Two fulls and an incremental, of which the first full has expired, and what came between.
    fn fill(&self) -> Result<()> {
        let s = &self.s;
        for kind in ["full", "full", "incr"] {
            s.sql("create table if not exists t (x int); insert into t values (1); create table if not exists bulk (x text); truncate bulk; insert into bulk select md5(random()::text) from generate_series(1, 20000)")?;
            s.backup_id(&["--type", kind, "--wal", "stream"])?;
        }
        s.ok(&["expire", "acme"])?;
        Ok(())
    }
}

const RETENTION: &str = "retention = { full = 1, wal = \"0s\" }";
const REFUSED: &str = "refused the credentials";

#[test]
fn a_writer_never_deletes_and_the_collector_has_credentials_of_its_own() -> Result<()> {
    let bucket = Bucket::new("accesswriter", RETENTION)?;
    let (s, proxy) = (&bucket.s, &bucket.proxy);
    let deleter = bucket.deleter();
    bucket.use_key("writer", &deleter)?;
    bucket.fill()?;
    let newest = s.backup_id(&["--type", "incr", "--wal", "stream"])?;
    s.ok(&["hold", "acme", &newest, "--reason", "a test"])?;
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    s.ok(&["check", "acme"])?;
    ensure!(s.restore("copy", &[]).0 == 0);
    let denied = proxy.denied();
    ensure!(
        denied.is_empty(),
        "a writer needs more than its policy gives: {denied:?}"
    );

    let said = s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    ensure!(
        said.contains("manifests deleted") && said.contains("objects of WAL deleted"),
        "{said}"
    );
    let denied = proxy.denied();
    ensure!(
        denied.is_empty(),
        "the collector needs more than its policy gives: {denied:?}"
    );
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;

    // Without them, a collection is refused by the store, and that is said.
    bucket.use_key("writer", "")?;
    s.sql("truncate bulk")?;
    s.ok(&["unhold", "acme", &newest])?;
    s.backup_id(&["--type", "full", "--wal", "stream"])?;
    s.ok(&["expire", "acme"])?;
    let (exit, text) = s.fairvault(&["gc", "acme", "--patience", "1s", "--progress", "none"]);
    ensure!(exit == 1 && text.contains(REFUSED), "{exit} {text}");
    ensure!(!proxy.denied().is_empty());
    bucket.use_key("writer", &deleter)?;
    s.ok(&["gc", "acme", "--patience", "1s", "--progress", "none"])?;
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])
        .map(|_| ())
}

/// WAL by hand and from a receiver, and a backup out of another repository.
#[test]
fn a_writer_archives_receives_and_copies_with_its_policy_alone() -> Result<()> {
    let bucket = Bucket::new("accesswal", "")?;
    let s = &bucket.s;
    bucket.use_key("writer", &bucket.deleter())?;
    let segment = s.sql("select pg_walfile_name(pg_current_wal_lsn())")?;
    s.sql("create table t (x int); insert into t values (1); select pg_switch_wal()")?;
    let path = s.server.data.join("pg_wal").join(&segment).display().to_string();
    s.ok(&["wal", "push", "acme", &path])?;
    s.ok(&["wal", "get", "acme", &segment, &s.path("fetched")])?;
    ensure!(std::fs::read(s.path("fetched"))? == std::fs::read(&path)?);
    let receiver = Receiver::start(s, &["--flush-interval", "200ms"])?;
    s.sql("insert into t values (2)")?;
    wait_until_durable(s, &s.server)?;
    receiver.stop()?;

    let local = s.path("vault");
    let more =
        format!("[repo.local]\nurl = \"file://{local}\"\n[defaults]\nrepos = [\"main\", \"local\"]\n[stanza.acme]");
    let text = std::fs::read_to_string(s.scratch.join("s3.toml"))?;
    s.scratch
        .write("s3.toml", text.replace("[stanza.acme]", &more).as_bytes())?;
    s.ok(&["--repo", "local", "stanza", "create", "acme"])?;
    s.backup_id(&["--repo", "local", "--wal", "stream"])?;
    let copy = ["copy", "acme", "--from-repo", "local", "--to-repo", "main"];
    s.ok(&[&copy[..], &["--progress", "none"]].concat())?;
    let (exit, text) = s.restore("copied", &["--repo", "main"]);
    ensure!(exit == 0, "{text}");
    for verb in ["info", "audit"] {
        s.ok(&[verb, "acme", "--repo", "main"])?;
    }
    let denied = bucket.proxy.denied();
    ensure!(
        denied.is_empty(),
        "a writer needs more than its policy gives: {denied:?}"
    );
    Ok(())
}

#[test]
fn stanzas_and_keys_are_made_with_the_founders_credentials() -> Result<()> {
    let bucket = Bucket::new("accessfounder", RETENTION)?;
    let s = &bucket.s;
    let (key, spare, conninfo) = (s.path("key"), s.path("spare"), s.server.conninfo());
    s.ok(&["key", "generate", &spare])?;
    let slots = s.ok(&["key", "list", "acme"])?;
    let rotate = ["key", "rotate", "acme"];
    let add = ["key", "add-slot", "acme", "spare", "--secret-file", &spare];
    let other = ["stanza", "create", "other", "--key-file", &key, "--conninfo", &conninfo];
    for words in [&rotate[..], &add, &other] {
        refused(s.fairvault(words), 1, REFUSED)?;
    }
    ensure!(s.ok(&["key", "list", "acme"])? == slots, "a slot was made");
    bucket.proxy.denied();

    bucket.use_key("founder", "")?;
    s.ok(&rotate)?;
    s.ok(&add)?;
    ensure!(s.ok(&["key", "list", "acme"])?.contains("spare"));
    bucket.only_probes_stay()?;
    // Those of one stanza make no other one.
    refused(s.fairvault(&other), 1, REFUSED)?;
    bucket.use_key("writer", "")?;
    bucket.fill()
}

#[test]
fn a_stanza_is_erased_with_the_collectors_credentials() -> Result<()> {
    let bucket = Bucket::new("accesserase", "")?;
    let (s, proxy) = (&bucket.s, &bucket.proxy);
    proxy.denied();
    let deleter = bucket.deleter();
    bucket.use_key("writer", &deleter)?;
    let (exit, text) = s.fairvault(&["key", "erase", "acme", "--confirm", "acme"]);
    let denied = proxy.denied();
    ensure!(
        denied.is_empty(),
        "erasing needs more than the policy gives: {denied:?}"
    );
    ensure!(
        exit == 0 && text.contains("1 slots and 0 older versions"),
        "{exit} {text}"
    );
    refused(s.fairvault(&["info", "acme"]), 1, "was erased at")
}

#[test]
fn a_reader_restores_and_writes_nothing() -> Result<()> {
    let bucket = Bucket::new("accessreader", RETENTION)?;
    let s = &bucket.s;
    bucket.fill()?;
    bucket.use_key("reader", "")?;
    bucket.proxy.denied();
    s.ok(&["info", "acme"])?;
    s.ok(&["audit", "acme"])?;
    s.ok(&["key", "check", "acme"])?;
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    let (exit, text) = s.restore("copy", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("copy", 5433)?;
    ensure!(s.rows(&copy)?.trim() == "3");
    copy.stop(&s.scratch, "fast")?;
    // Its lease and its note in the log were tried, and nothing else.
    let denied = bucket.proxy.denied();
    let is_known = |line: &&String| line.contains(" PUT ") && (line.contains("/leases/") || line.contains("/log/"));
    ensure!(denied.iter().all(|line| is_known(&line)), "{denied:?}");

    let before = s.ok(&["info", "acme"])?;
    refused(
        s.fairvault(&["backup", "acme", "--fast", "--wal", "stream", "--progress", "none"]),
        1,
        REFUSED,
    )?;
    ensure!(s.ok(&["info", "acme"])? == before);
    Ok(())
}
