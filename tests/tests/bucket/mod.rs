//! Buckets that keep versions, with a stanza in them.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fairvault_engine::env::Env;
use fairvault_engine::postgres::lsn::Lsn;
use fairvault_engine::postgres::segment::Segment;
use fairvault_engine::stanza::Access;
use fairvault_engine::store::Store;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_engine::store::versions::Object;
use fairvault_format::keys::Secret;
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field};
use fairvault_tests::rgw::{ACCESS_KEY, signed_put};
use fairvault_tests::s3::S3;
use serde_json::Value;

/// Where buckets are made.
pub struct Server {
    /// URL.
    pub endpoint: String,
    /// Secret access key.
    pub secret: &'static str,
    /// It takes every conditional create where a bucket keeps versions.
    pub single_writer: bool,
}

impl Server {
    /// It compares the signatures of URLs with this secret.
    pub fn of(server: &S3) -> Self {
        Self {
            endpoint: server.endpoint(),
            secret: "test",
            single_writer: false,
        }
    }
}

/// A fixture that archives into a bucket, and the repository as an attacker with the writer's credentials sees it.
pub struct World {
    /// The fixture.
    pub s: Fixture,
    /// The repository.
    pub store: Store,
}

/// Every new version is locked for so many days.
pub fn set_default(server: &Server, bucket: &str, days: u32) -> Result<()> {
    let rule = format!("<Rule><DefaultRetention><Mode>COMPLIANCE</Mode><Days>{days}</Days></DefaultRetention></Rule>");
    let body = format!(
        "<ObjectLockConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
         <ObjectLockEnabled>Enabled</ObjectLockEnabled>{rule}</ObjectLockConfiguration>"
    );
    let url = format!("{}/{bucket}?object-lock=", server.endpoint);
    signed_put(server.secret, &url, &["--data", &body]).map(|_| ())
}

impl World {
    /// Makes a bucket with versions, and locks for a day if that is asked for.
    pub fn new(name: &str, server: &Server, is_locked: bool, retention: &'static str) -> Result<Self> {
        let shape = Shape {
            archiving: true,
            stanza: false,
            ..SMALL
        };
        let mut s = Fixture::new(name, shape)?;
        let (endpoint, secret) = (&server.endpoint, server.secret);
        let bucket = format!("{endpoint}/{name}");
        match is_locked {
            true => {
                signed_put(secret, &bucket, &["-H", "x-amz-bucket-object-lock-enabled: true"])?;
                set_default(server, name, 1)?;
            }
            false => {
                signed_put(secret, &bucket, &[])?;
                set_versioning(server, name, "Enabled")?;
            }
        }
        let url = format!("s3://{name}/some/prefix");
        s.use_s3(endpoint, &url, retention)?;
        s.scratch.write("s3.secret", secret.as_bytes())?;
        // What archive_command reads.
        let mut config = std::fs::read_to_string(s.scratch.join("s3.toml"))?;
        if server.single_writer {
            config = config.replace("[stanza.acme]", "single_writer = true\n[stanza.acme]");
        }
        // Whoever leaves deleting to others brings hidden objects back without deleting markers.
        if is_locked && !server.single_writer {
            let secret = s.path("s3.secret");
            let deleter = format!("deleter = {{ access_key = \"{ACCESS_KEY}\", secret_key_file = \"{secret}\" }}");
            config = config.replace("[stanza.acme]", &format!("{deleter}\n[stanza.acme]"));
        }
        // A day is less than anything is kept for.
        if is_locked {
            config = config.replace("[stanza.acme]", "store_again = false\n[stanza.acme]");
        }
        s.scratch.write("s3.toml", config.as_bytes())?;
        s.scratch.write("fairvault.toml", config.as_bytes())?;
        s.ok(&["stanza", "create", "acme"])?;
        let store = RepositoryUrl {
            url,
            endpoint: Some(endpoint.clone()),
            region: Some("us-east-1".into()),
            access_key: Some(ACCESS_KEY.into()),
            secret_key: Some(secret.to_owned().into()),
            ..Default::default()
        };
        let store = store.open(false)?;
        Ok(Self { s, store })
    }

    /// A backup with one more row in `t`, and packs of its own. Returns its id, and the first segment that it needs.
    pub fn backup(&self) -> Result<(String, String)> {
        self.s.sql("create table if not exists t (x int); insert into t values (1); create table if not exists bulk (x text); truncate bulk; insert into bulk select md5(random()::text) from generate_series(1, 20000)")?;
        let said = self.s.backup_json(&["--type", "full"])?;
        let start: Lsn = field(&said, "start_lsn")?.parse().map_err(anyhow::Error::msg)?;
        self.s.flush_archive(&self.s.server)?;
        Ok((field(&said, "id")?, Segment::of(1, start, 1 << 20).name(1 << 20)))
    }

    /// How a host opens the stanza that remembers nothing, with this clock.
    pub fn access(&self, env: Arc<dyn Env>) -> Result<Access> {
        Ok(Access {
            repository: self.store.clone(),
            stanza: "acme".to_owned(),
            secret: Some(Secret::from_text(&std::fs::read(self.s.path("key"))?)?),
            memory: None,
            may_stretch: true,
            env,
            trace: Default::default(),
        })
    }

    /// Packs that can be seen.
    pub async fn packs(&self) -> Result<BTreeSet<String>> {
        let packs = self.store.all_versions("acme/packs/").await?;
        let visible = packs.into_iter().filter(Object::is_visible);
        Ok(visible.map(|pack| pack.name).collect())
    }

    /// Until when each pack is locked, microseconds since 1970.
    pub async fn pack_locks(&self) -> Result<BTreeSet<(String, i64)>> {
        let mut all = BTreeSet::new();
        for pack in self.store.all_versions("acme/packs/").await? {
            let version = pack.contents().next().context(pack.name.clone())?;
            let lock = self.store.lock_of(&pack.name, &version.id).await?.context("a lock")?;
            all.insert((pack.name, lock.until_us));
        }
        Ok(all)
    }

    pub async fn objects(&self) -> Result<Vec<Object>> {
        Ok(self.store.all_versions("").await?)
    }

    /// Every version with content, of objects that are not leases.
    pub async fn contents(&self) -> Result<BTreeSet<(String, String)>> {
        let objects = self.objects().await?;
        let lasting = objects.iter().filter(|object| !object.name.contains("/leases/"));
        let all = lasting.flat_map(|object| object.contents().map(|v| (object.name.clone(), v.id.clone())));
        Ok(all.collect())
    }

    pub fn report(&self, words: &[&str]) -> Result<(i32, Value)> {
        let all = [words, &["acme", "--progress", "none", "--output", "json"]].concat();
        let (exit, text) = self.s.fairvault(&all);
        let line = text
            .lines()
            .find(|line| line.starts_with("{\""))
            .context(text.clone())?;
        Ok((exit, serde_json::from_str::<Value>(line)?["report"].clone()))
    }

    /// As a host that sees the repository for the first time.
    pub fn forget(&self) -> Result<()> {
        Ok(std::fs::remove_dir_all(self.s.scratch.join("cache"))?)
    }

    /// Takes backups until an earlier one leaves a pack that nothing uses; packs of which little is used run dry.
    pub fn until_packs_are_unused(&self) -> Result<()> {
        for _ in 0..6 {
            self.backup()?;
            self.s.ok(&["expire", "acme"])?;
            let (exit, plan) = self.report(&["gc", "--dry-run"])?;
            ensure!(exit == 0, "{plan}");
            if plan["packs"]["objects"].as_u64() > Some(0) {
                return Ok(());
            }
            self.gc()?;
        }
        anyhow::bail!("every pack is still used")
    }

    pub fn gc(&self) -> Result<(i32, Value)> {
        self.report(&["gc", "--patience", "1s"])
    }
}

/// Has a bucket keep versions ("Enabled"), or those only that it has ("Suspended").
pub fn set_versioning(server: &Server, bucket: &str, status: &str) -> Result<()> {
    let configuration = format!(
        "<VersioningConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Status>{status}</Status></VersioningConfiguration>"
    );
    let url = format!("{}/{bucket}?versioning=", server.endpoint);
    signed_put(server.secret, &url, &["--data", &configuration])?;
    Ok(())
}
