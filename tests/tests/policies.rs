//! The policies of docs/access.md with what docs/immutability.md adds to them, as they stand there: with them each role
//! can do what it is for, and whoever has stolen it nothing that another one is for.

#[allow(dead_code)]
mod bucket;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use fairvault_engine::store::Store;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_engine::store::versions::{DAY_US, Deleted, Lock, Mode};
use fairvault_format::names;
use fairvault_tests::fixture::{Fixture, SMALL, Shape, refused};
use fairvault_tests::policy::{self, Act, LOCKED_DAYS, PREFIX, Policy};
use fairvault_tests::proxy::{Proxy, S3Request, Target};
use fairvault_tests::s3::S3;

use bucket::{Server, World};

const BUCKET: &str = "bucket";
const REFUSED: &str = "refused the credentials";

/// By role.
static POLICIES: LazyLock<BTreeMap<&str, Policy>> = LazyLock::new(|| documented().unwrap_or_default());
/// What was done, and with whose access key.
static DONE: Mutex<BTreeSet<(String, &str)>> = Mutex::new(BTreeSet::new());

fn documented() -> Result<BTreeMap<&'static str, Policy>> {
    let [reader, writer, founder, deleter] = policy::access()?;
    let blocks = policy::blocks("docs/immutability.md")?;
    let [versions, deletes, locks] = &blocks[..] else {
        bail!("{} policies instead of three", blocks.len());
    };
    let of = |more: &[&str]| Policy::of(&[&[reader.as_str(), versions.as_str()], more].concat());
    // A deleter that may not ask whether the bucket keeps versions.
    let blind = reader.replace("\"s3:GetBucketVersioning\", ", "");
    ensure!(blind != reader, "{reader}");
    Ok(BTreeMap::from([
        ("reader", of(&[])?),
        ("writer", of(&[writer.as_str()])?),
        ("founder", of(&[writer.as_str(), founder.as_str()])?),
        ("deleter", of(&[deleter.as_str(), deletes.as_str()])?),
        ("keeper", of(&[locks.as_str()])?),
        (
            "blind",
            Policy::of(&[&blind, versions, &deleter, deletes].map(String::as_str))?,
        ),
    ]))
}

/// Access keys are roles with a number: tests run side by side.
fn allows(request: &S3Request<'_>) -> bool {
    let role = request.key.trim_end_matches(|c: char| c.is_ascii_digit());
    let acts = policy::acts(request);
    let is_allowed = POLICIES
        .get(role)
        .is_some_and(|own| acts.iter().all(|act| own.allows(act)));
    if is_allowed {
        let mut done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
        done.extend(acts.iter().map(|act| (request.key.to_owned(), act.action)));
    }
    is_allowed
}

/// What was done with an access key.
fn done_by(key: &str) -> BTreeSet<&'static str> {
    let done = DONE.lock().unwrap_or_else(PoisonError::into_inner);
    done.iter()
        .filter(|(by, _)| by == key)
        .map(|(_, action)| *action)
        .collect()
}

/// A stanza in a bucket that can lock objects and does not do so by itself; all that fairvault asks for is guarded.
struct Place {
    w: World,
    proxy: Proxy,
    number: u32,
    /// The configuration of somebody who may do everything.
    original: String,
    s3: S3,
}

impl Place {
    fn new(name: &str, number: u32, more: &str) -> Result<Self> {
        let shape = Shape {
            archiving: true,
            stanza: false,
            ..SMALL
        };
        let mut s = Fixture::new(name, shape)?;
        let s3 = S3::start(&s.scratch, "other")?;
        let lock = "x-amz-bucket-object-lock-enabled: true";
        s3.curl(&["-fsS", "-X", "PUT", "-H", lock, &format!("{}/{BUCKET}", s3.endpoint())])?;
        let proxy = Proxy::start(Target::Guarded(s3.port, allows))?;
        let url = format!("s3://{BUCKET}/prefix");
        s.use_s3(&format!("http://127.0.0.1:{}", proxy.port), &url, more)?;
        let original = std::fs::read_to_string(s.scratch.join("s3.toml"))?;
        let store = open(&s3.endpoint(), "test")?;
        let this = Self {
            w: World { s, store },
            proxy,
            number,
            original,
            s3,
        };
        this.configure("founder", &["deleter", "keeper"])?;
        this.w.s.ok(&["stanza", "create", "acme"])?;
        this.nothing_was_denied("making a stanza")?;
        this.configure("writer", &["deleter", "keeper"])?;
        Ok(this)
    }

    fn key(&self, role: &str) -> String {
        format!("{role}{}", self.number)
    }

    /// From now on with the credentials of `role`, and those of others for what they are for; so is `archive_command`.
    fn configure(&self, role: &str, others: &[&str]) -> Result<()> {
        let secret = self.w.s.path("s3.secret");
        let mut lines = format!("access_key = \"{}\"\n", self.key(role));
        for other in others {
            let key = self.key(other);
            lines += &format!("{other} = {{ access_key = \"{key}\", secret_key_file = \"{secret}\" }}\n");
        }
        let text = self.original.replace("access_key = \"test\"\n", &lines);
        ensure!(text != self.original, "{text}");
        for name in ["s3.toml", "fairvault.toml"] {
            self.w.s.scratch.write(name, text.as_bytes())?;
        }
        Ok(())
    }

    fn nothing_was_denied(&self, what: &str) -> Result<()> {
        let denied = self.proxy.denied();
        ensure!(
            denied.is_empty(),
            "{what} needs more than the policies give: {denied:?}"
        );
        Ok(())
    }

    /// The repository as somebody sees it who has stolen the credentials of `role`.
    fn stolen(&self, role: &str) -> Result<Store> {
        open(&format!("http://127.0.0.1:{}", self.proxy.port), &self.key(role))
    }
}

fn open(endpoint: &str, access_key: &str) -> Result<Store> {
    let url = RepositoryUrl {
        url: format!("s3://{BUCKET}/prefix"),
        endpoint: Some(endpoint.to_owned()),
        region: Some("us-east-1".into()),
        access_key: Some(access_key.to_owned()),
        secret_key: Some("test".to_owned().into()),
        ..Default::default()
    };
    Ok(url.open(false)?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_role_can_do_what_it_is_for() -> Result<()> {
    let place = Place::new("roles", 1, "retention = { full = 1 }")?;
    let (w, s) = (&place.w, &place.w.s);
    let (first, segment) = w.backup()?;
    s.ok(&["hold", "acme", &first, "--reason", "a test"])?;
    s.ok(&["unhold", "acme", &first])?;
    for verb in ["info", "check", "audit"] {
        s.ok(&[verb, "acme"])?;
    }
    s.ok(&["verify", "acme", "--progress", "none"])?;
    s.ok(&["wal", "get", "acme", &segment, &s.path("fetched")])?;
    let (exit, text) = s.restore("copy", &[]);
    ensure!(exit == 0, "{text}");
    place.nothing_was_denied("a writer")?;

    // Only the keeper locks.
    let (exit, done) = w.report(&["lock", "--days", "60"])?;
    ensure!(exit == 0 && done["extended"] == done["needed"], "{exit} {done}");
    ensure!(done["extended"]["objects"].as_u64() > Some(8), "{done}");
    place.nothing_was_denied("lock")?;

    // New keys: nothing of the first backup is used by the second.
    place.configure("founder", &["deleter", "keeper"])?;
    s.ok(&["key", "rotate", "acme"])?;
    place.configure("writer", &["deleter", "keeper"])?;
    w.backup()?;
    s.ok(&["expire", "acme"])?;
    place.nothing_was_denied("a writer")?;
    let (exit, done) = w.gc()?;
    ensure!(
        exit == 0 && done["packs"]["objects"].as_u64() > Some(0),
        "{exit} {done}"
    );
    // What `lock` has locked stays; leases of the writer, which may not delete them, go for good.
    let versions = &done["versions"];
    ensure!(versions["locked"]["objects"].as_u64() > Some(0), "{done}");
    ensure!(versions["deleted"]["objects"].as_u64() > Some(0), "{done}");
    place.nothing_was_denied("gc")?;

    // A manifest is hidden: it is locked all the same, which reads it, and is brought back.
    let objects = w.objects().await?;
    let is_manifest = |name: &str| name.starts_with("acme/roots/");
    let root = objects.iter().find(|o| is_manifest(&o.name) && o.is_visible());
    let root = root.context("no manifest")?.name.clone();
    w.store.delete(std::slice::from_ref(&root)).await?;
    let hidden = root.trim_start_matches("acme/").to_owned();
    let (exit, done) = w.report(&["lock", "--days", "60"])?;
    ensure!(
        exit == 4 && done["hidden"].to_string().contains(&hidden),
        "{exit} {done}"
    );
    let (exit, done) = w.report(&["repair"])?;
    ensure!(
        exit == 0 && done["hidden"].to_string().contains(&hidden),
        "{exit} {done}"
    );
    place.nothing_was_denied("lock or repair")?;

    let spare = s.path("spare");
    s.ok(&["key", "generate", &spare])?;
    place.configure("founder", &["deleter", "keeper"])?;
    s.ok(&["key", "add-slot", "acme", "spare", "--secret-file", &spare])?;
    s.ok(&["key", "remove-slot", "acme", "spare"])?;
    place.nothing_was_denied("adding or removing a slot")?;

    // That went by these credentials, each for its own.
    let writer = done_by("writer1");
    for action in ["s3:PutObject", "s3:GetObjectVersion", "s3:ListBucketVersions"] {
        ensure!(writer.contains(action), "{action}: {writer:?}");
    }
    let deleter = done_by("deleter1");
    for action in [
        "s3:DeleteObject",
        "s3:DeleteObjectVersion",
        "s3:GetObjectRetention",
        "s3:PutObject",
    ] {
        ensure!(deleter.contains(action), "{action}: {deleter:?}");
    }
    let keeper = done_by("keeper1");
    for action in ["s3:PutObjectRetention", "s3:GetObjectRetention", "s3:GetObjectVersion"] {
        ensure!(keeper.contains(action), "{action}: {keeper:?}");
    }
    Ok(())
}

/// Before a backup counts, its writer asks how long the packs are locked that it relies on.
#[test]
fn a_writer_asks_for_locks() -> Result<()> {
    let place = Place::new("asks", 4, "retention = { full = \"20d\" }")?;
    bucket::set_default(&Server::of(&place.s3), BUCKET, 60)?;
    place.configure("writer", &["deleter"])?;
    place.w.backup()?;
    place.w.backup()?;
    let writer = done_by("writer4");
    ensure!(writer.contains("s3:GetObjectRetention"), "{writer:?}");
    place.nothing_was_denied("a backup that relies on packs")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_stolen_does_not_do_what_others_are_for() -> Result<()> {
    let place = Place::new("stolen", 2, "")?;
    let (w, s) = (&place.w, &place.w.s);
    w.backup()?;
    let (exit, done) = w.report(&["lock", "--days", "30"])?;
    ensure!(exit == 0, "{done}");
    place.nothing_was_denied("lock")?;
    let before = w.contents().await?;
    let objects = w.objects().await?;
    // Of each folder the newest: WAL from before the backup is locked by nobody.
    let of = |folder: &str| {
        let below = format!("acme/{folder}/");
        let found = objects.iter().rfind(|object| object.name.starts_with(&below));
        found.with_context(|| format!("nothing in {below}"))
    };
    let now_us = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as i64;
    let for_days = |days: i64| Lock {
        mode: Mode::Compliance,
        until_us: now_us + days * DAY_US,
    };
    let garbage = || Bytes::from_static(b"garbage");
    let free = |folder: &str| format!("acme/{folder}/{}", "f".repeat(64));

    for role in ["writer", "deleter", "keeper"] {
        let store = place.stolen(role)?;
        for folder in ["packs", "roots", "index", "keys", "log", "wal"] {
            let object = of(folder)?;
            let version = object.contents().next().context("no content")?;
            // Versions go by nobody: those of the deleter are locked.
            let deleted = store.delete_version(&object.name, &version.id).await?;
            ensure!(matches!(deleted, Deleted::Refused(_)), "{role} deleted {}", object.name);
            if role != "deleter" {
                let deleted = store.delete(std::slice::from_ref(&object.name)).await;
                ensure!(deleted.is_err(), "{role} hid {}", object.name);
            }
            // Nor does anybody end a lock; who may extend it, not for ever.
            let locked = |days| store.set_lock(&object.name, &version.id, for_days(days));
            ensure!(locked(1).await.is_err(), "{role} ended the lock of {}", object.name);
            ensure!(locked(102).await.is_err(), "{role} locked {} for long", object.name);
            ensure!(locked(90).await.is_ok() == (role == "keeper"), "{role} {}", object.name);
            let is_own = match role {
                "writer" => folder != "keys",
                "deleter" => ["log", "index"].contains(&folder),
                _ => false,
            };
            let put = store.put_hashed(&free(folder), garbage().into()).await;
            ensure!(put.is_ok() == is_own, "{role} {folder}: {put:?}");
        }
        // Nor what stands above stanzas, nor another stanza, nor that this one was erased.
        for name in ["fairvault.json", "other/log/x", "other/packs/x", "acme/erased"] {
            if (role, name) != ("deleter", "acme/erased") {
                let put = store.put_hashed(name, garbage().into()).await;
                let said = put.err().map(|error| error.to_string()).unwrap_or_default();
                ensure!(said.contains(REFUSED), "{role} stored {name}: {said}");
            }
        }
        let read = store.get_opt("other/keys/00000001/x", 100).await;
        ensure!(read.is_err(), "{role} reads another stanza: {read:?}");
        let listed = store.list("other").await;
        ensure!(listed.is_err(), "{role} lists another stanza: {listed:?}");
    }
    let after = w.contents().await?;
    ensure!(after.is_superset(&before), "a version is lost");
    ensure!(!place.proxy.denied().is_empty());

    // The same of commands: in words that name the right, or whose credentials it takes.
    let lock = |days| s.fairvault(&["lock", "acme", "--days", days, "--progress", "none"]);
    refused(lock("120"), 1, "s3:PutObjectRetention")?;
    place.configure("writer", &[])?;
    refused(lock("95"), 1, "s3:PutObjectRetention")?;
    refused(s.fairvault(&["key", "rotate", "acme"]), 1, REFUSED)?;
    place.configure("keeper", &["deleter", "keeper"])?;
    for words in [
        &["backup", "acme", "--fast", "--progress", "none"][..],
        &["hold", "acme", "latest", "--reason", "a test"],
    ] {
        refused(s.fairvault(words), 1, REFUSED)?;
    }
    Ok(())
}

/// Finds a collector that takes what is hidden for gone where it may not ask whether the bucket keeps versions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_may_not_ask_for_versions_deletes_nothing() -> Result<()> {
    let place = Place::new("blind", 5, "retention = { full = 1 }")?;
    let (w, s) = (&place.w, &place.w.s);
    w.backup()?;
    let first = w.store.all_versions("acme/roots/").await?;
    // Nothing of the first backup is used by the second.
    place.configure("founder", &["deleter", "keeper"])?;
    s.ok(&["key", "rotate", "acme"])?;
    place.configure("writer", &["deleter", "keeper"])?;
    w.backup()?;
    s.ok(&["expire", "acme"])?;
    s.ok(&["policy", "acme", "--minimum-retention", "1d"])?;
    let names: Vec<String> = first.into_iter().map(|root| root.name).collect();
    ensure!(names.len() == 1, "{names:?}");
    w.store.delete(&names).await?;
    let visible = async || -> Result<BTreeSet<String>> {
        let packs = w.store.all_versions("acme/packs/").await?;
        Ok(packs
            .into_iter()
            .filter(|pack| pack.is_visible())
            .map(|pack| pack.name)
            .collect())
    };
    let before = visible().await?;
    for name in ["s3.toml", "fairvault.toml"] {
        let text = std::fs::read_to_string(s.scratch.join(name))?;
        let blind = text.replace(&place.key("deleter"), &place.key("blind"));
        ensure!(blind != text, "{text}");
        s.scratch.write(name, blind.as_bytes())?;
    }
    let gc = s.fairvault(&["gc", "acme", "--patience", "1s", "--progress", "none"]);
    refused(gc, 1, "s3:GetBucketVersioning")?;
    ensure!(visible().await? == before, "packs are gone");
    Ok(())
}

#[test]
fn a_stanza_is_erased_with_the_deleters_credentials() -> Result<()> {
    let place = Place::new("erases", 3, "")?;
    let (exit, text) = place.w.s.fairvault(&["key", "erase", "acme", "--confirm", "acme"]);
    place.nothing_was_denied("key erase")?;
    ensure!(
        exit == 0 && text.contains("1 slots and 1 older versions"),
        "{exit} {text}"
    );
    refused(place.w.s.fairvault(&["info", "acme"]), 1, "was erased at")
}

#[test]
fn no_role_changes_the_bucket_or_ends_a_lock() -> Result<()> {
    let policies = documented()?;
    for (role, own) in &policies {
        for action in [
            "s3:PutBucketVersioning",
            "s3:PutBucketObjectLockConfiguration",
            "s3:PutLifecycleConfiguration",
            "s3:PutBucketPolicy",
            "s3:DeleteBucket",
            "s3:BypassGovernanceRetention",
            "s3:PutObjectLegalHold",
        ] {
            for name in ["", "prefix/fairvault.json", "prefix/acme/log/00000000000000000001"] {
                ensure!(!own.allows(&Act::new(action, BUCKET, name)), "{role} {action} {name}");
            }
        }
        ensure!(
            !own.allows(&Act::new("s3:GetObject", "another", "prefix/fairvault.json")),
            "{role}"
        );
        ensure!(
            own.allows(&Act::new("s3:GetObject", BUCKET, "prefix/fairvault.json")),
            "{role}"
        );
        for action in ["s3:ListBucket", "s3:ListBucketVersions"] {
            let lists = |prefix: &str| own.allows(&Act::new(action, BUCKET, "").with(PREFIX, prefix));
            ensure!(
                lists("prefix/acme/log/") && !lists("") && !lists("other/"),
                "{role} {action}"
            );
            let is_founder = (*role, action) == ("founder", "s3:ListBucket");
            ensure!(lists("prefix/other/log/") == is_founder, "{role} {action}");
        }
    }
    let may = |role: &str, action, name: &str| policies[role].allows(&Act::new(action, BUCKET, name));
    let stores = |role: &str, name: &str| may(role, "s3:PutObject", &format!("prefix/{name}"));
    for folder in [
        names::PACKS,
        names::ROOTS,
        names::INDEX,
        names::WAL,
        names::LOG,
        names::SNAPSHOTS,
        names::LEASES,
        names::DISTRUSTED,
    ] {
        for role in ["writer", "founder"] {
            ensure!(stores(role, &format!("acme/{folder}/x")), "{role} {folder}");
            ensure!(!stores(role, &format!("other/{folder}/x")), "{role} {folder}");
        }
        ensure!(!may("writer", "s3:DeleteObject", &format!("prefix/acme/{folder}/x")));
    }
    ensure!(stores("writer", "probe/x") && !stores("reader", "probe/x") && !stores("reader", "acme/log/1"));
    for (name, is_founders) in [
        ("acme/keys/00000001/main", true),
        ("fairvault.json", true),
        ("acme/erased", false),
        ("acme/x", false),
        ("other/keys/00000001/main", false),
    ] {
        ensure!(!stores("writer", name), "{name}");
        ensure!(stores("founder", name) == is_founders, "{name}");
    }
    ensure!(stores("deleter", "acme/log/1") && !stores("deleter", "acme/packs/1"));
    ensure!(!stores("deleter", "acme/keys/00000001/log"));
    ensure!(!stores("keeper", "acme/log/1") && !may("keeper", "s3:DeleteObject", "prefix/acme/log/1"));
    let locks = |days: &str| {
        let act = Act::new("s3:PutObjectRetention", BUCKET, "prefix/acme/log/1");
        policies["keeper"].allows(&act.with(LOCKED_DAYS, days))
    };
    ensure!(locks("100") && !locks("101") && !locks("100000000000000000000") && !locks(""));
    ensure!(
        !may("keeper", "s3:PutObjectRetention", "prefix/acme/log/1"),
        "for how long is not said"
    );
    Ok(())
}
