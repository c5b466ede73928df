//! The policies of docs/access.md as policies of a bucket, by a server that has policies of its own: Ceph's gateway. With
//! them each role does what it is for, and is refused what others are for.
//!
//! To somebody who may list under a condition, most versions of the gateway do not say that an object is absent: the
//! condition of `s3:ListBucket` is left out. That it holds for lists is tested with a user of its own.

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use fairvault_engine::error::Error;
use fairvault_engine::store::Store;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_tests::fixture::{Fixture, SMALL, Shape, refused};
use fairvault_tests::rgw::{self, Rgw};
use fairvault_tests::{Scratch, policy, tools};
use serde_json::{Value, json};

const BUCKET: &str = "bucket";
const REFUSED: &str = "refused the credentials";

/// Statements of a block of the documentation: a policy, or what stands between others.
fn statements(block: &str) -> Result<Vec<Value>> {
    let all: Value = match serde_json::from_str::<Value>(block) {
        Ok(mut policy) if policy.get("Statement").is_some() => policy["Statement"].take(),
        _ => serde_json::from_str(&format!("[{block}]"))?,
    };
    match all {
        Value::Array(all) => Ok(all),
        other => bail!("no list of statements: {other}"),
    }
}

/// What blocks give to a user of the gateway, with or without the condition under which it may list.
fn granted(blocks: &[&str], user: &str, is_conditional: bool) -> Result<Vec<Value>> {
    let mut out = Vec::new();
    for block in blocks {
        for mut statement in statements(block)? {
            statement["Principal"] = json!({ "AWS": [format!("arn:aws:iam:::user/{user}")] });
            let lists = statement["Action"] == "s3:ListBucket";
            if let Some(fields) = statement.as_object_mut().filter(|_| lists && !is_conditional) {
                ensure!(fields.remove("Condition").is_some(), "there is no condition");
            }
            out.push(statement);
        }
    }
    Ok(out)
}

/// The policy of the bucket: five users, each with what the documentation gives to its role.
fn whole_policy() -> Result<String> {
    let [reader, writer, founder, deleter] = policy::access()?;
    let all = [
        granted(&[&reader], "reader", false)?,
        granted(&[&reader, &writer], "writer", false)?,
        granted(&[&reader, &writer, &founder], "founder", false)?,
        granted(&[&reader, &deleter], "deleter", false)?,
        granted(&[&reader], "lister", true)?,
    ];
    Ok(json!({ "Version": "2012-10-17", "Statement": all.concat() }).to_string())
}

fn open(gateway: &Rgw, user: &str, prefix: &str) -> Result<Store> {
    let url = RepositoryUrl {
        url: format!("s3://{BUCKET}/{prefix}"),
        endpoint: Some(gateway.endpoint()),
        region: Some("us-east-1".into()),
        access_key: Some(user.to_owned()),
        secret_key: Some(rgw::SECRET_KEY.to_owned().into()),
        ..Default::default()
    };
    Ok(url.open(false)?)
}

fn is_refused<T: std::fmt::Debug>(what: &str, result: std::result::Result<T, Error>) -> Result<()> {
    match result {
        Err(error) if error.to_string().contains(REFUSED) => Ok(()),
        other => bail!("{what}: {other:?}"),
    }
}

/// From now on with this access key.
fn use_key(s: &Fixture, key: &str, more: &str) -> Result<()> {
    let text = std::fs::read_to_string(s.scratch.join("s3.toml"))?;
    let lines = text.lines().filter(|line| !line.starts_with("deleter"));
    let lines = lines.map(|line| match line.starts_with("access_key") {
        true => format!("access_key = \"{key}\"\n{more}"),
        false => line.to_owned(),
    });
    let text: Vec<String> = lines.collect();
    s.scratch.write("s3.toml", (text.join("\n") + "\n").as_bytes())?;
    Ok(())
}

const GC: [&str; 6] = ["gc", "acme", "--patience", "1s", "--progress", "none"];
const BACKUP: [&str; 7] = ["backup", "acme", "--fast", "--wal", "stream", "--progress", "none"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_are_what_the_gateway_makes_of_them() -> Result<()> {
    if !tools::is_full() {
        eprintln!("Ceph's radosgw is part of `cargo xtask test --full`");
        return Ok(());
    }
    let scratch = Scratch::new("rolesrgw")?;
    let gateway = Rgw::start(&scratch)?;
    gateway.bucket(BUCKET)?;
    for user in ["reader", "writer", "founder", "deleter", "lister"] {
        gateway.add_user(user)?;
    }
    let mut s = Fixture::new("roles", Shape { stanza: false, ..SMALL })?;
    let retention = "retention = { full = 1, wal = \"0s\" }";
    s.use_s3(&gateway.endpoint(), &format!("s3://{BUCKET}/prefix"), retention)?;
    s.scratch.write("s3.secret", rgw::SECRET_KEY.as_bytes())?;

    // Without a policy, nobody but the bucket's owner does anything.
    use_key(&s, "writer", "")?;
    refused(s.fairvault(&["stanza", "create", "acme"]), 1, REFUSED)?;
    gateway.set_policy(BUCKET, &whole_policy()?)?;

    // The founder makes the stanza.
    refused(s.fairvault(&["stanza", "create", "acme"]), 1, REFUSED)?;
    use_key(&s, "founder", "")?;
    s.ok(&["stanza", "create", "acme"])?;

    // The writer: everything but deleting, and keys.
    use_key(&s, "writer", "")?;
    refused(s.fairvault(&["key", "rotate", "acme"]), 1, REFUSED)?;
    for kind in ["full", "full", "incr"] {
        s.sql("create table if not exists t (x int); insert into t values (1); create table if not exists bulk (x text); truncate bulk; insert into bulk select md5(random()::text) from generate_series(1, 20000)")?;
        s.backup_id(&["--type", kind, "--wal", "stream"])?;
    }
    s.ok(&["expire", "acme"])?;
    s.ok(&["check", "acme"])?;
    refused(s.fairvault(&GC), 1, REFUSED)?;

    // The reader: restores, and stores nothing.
    use_key(&s, "reader", "")?;
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;
    let (exit, text) = s.restore("copy", &[]);
    ensure!(exit == 0, "{text}");
    let copy = s.start("copy", 5433)?;
    ensure!(s.rows(&copy)? == "3");
    copy.stop(&s.scratch, "fast")?;
    refused(s.fairvault(&BACKUP), 1, REFUSED)?;

    // The deleter: what the writer may not.
    let secret = s.path("s3.secret");
    let deleter = format!("deleter = {{ access_key = \"deleter\", secret_key_file = \"{secret}\" }}");
    use_key(&s, "writer", &deleter)?;
    let said = s.ok(&GC)?;
    ensure!(
        said.contains("manifests deleted") && said.contains("objects of WAL deleted"),
        "{said}"
    );
    s.ok(&["verify", "acme", "--level", "data", "--progress", "none"])?;

    // Whoever has stolen one of them does not get beyond it.
    let garbage = || Bytes::from_static(b"garbage");
    let free = |folder: &str| format!("acme/{folder}/{}", "f".repeat(64));
    let owner = open(&gateway, rgw::ACCESS_KEY, "prefix")?;
    open(&gateway, rgw::ACCESS_KEY, "other")?
        .put_hashed("x", garbage().into())
        .await?;
    // The same of another stanza in the repository.
    owner.put_hashed("other/packs/x", garbage().into()).await?;
    let packs = owner.list("acme/packs").await?;
    let [(pack, _), ..] = &packs[..] else {
        bail!("no packs");
    };
    for user in ["reader", "writer", "founder", "deleter", "lister"] {
        let store = open(&gateway, user, "prefix")?;
        if user != "deleter" {
            let deleted = store.delete(std::slice::from_ref(pack)).await;
            is_refused(&format!("{user} deletes"), deleted)?;
        }
        for folder in ["packs", "log", "keys"] {
            let put = store.put_hashed(&free(folder), garbage().into()).await;
            let is_own = match user {
                "writer" => folder != "keys",
                "founder" => true,
                "deleter" => folder == "log",
                _ => false,
            };
            match is_own {
                true => put?,
                false => is_refused(&format!("{user} stores in {folder}"), put)?,
            }
        }
        // Nor into what stands above stanzas, or into another one.
        for name in ["fairvault.json", "acme/erased", "other/packs/y", "other/log/y"] {
            let is_own = matches!((user, name), ("founder", "fairvault.json") | ("deleter", "acme/erased"));
            if !is_own {
                let put = store.put_hashed(name, garbage().into()).await;
                is_refused(&format!("{user} stores {name}"), put)?;
            }
        }
        is_refused(
            &format!("{user} reads another stanza"),
            store.get("other/packs/x", 100).await,
        )?;
        // Nor into another folder of the bucket.
        let other = open(&gateway, user, "other")?;
        let put = other.put_hashed("x", garbage().into()).await;
        is_refused(&format!("{user} stores elsewhere"), put)?;
        is_refused(&format!("{user} reads elsewhere"), other.get("x", 100).await)?;
    }
    ensure!(owner.list("acme/packs").await?.contains(&packs[0]), "a pack is gone");

    // The condition holds for lists. An object that is not there is why it cannot stay.
    let lister = open(&gateway, "lister", "prefix")?;
    ensure!(lister.list("acme/roots").await? == owner.list("acme/roots").await?);
    let elsewhere = open(&gateway, "lister", "other")?;
    is_refused("a list of another folder", elsewhere.list("acme").await)?;
    is_refused("what is absent", lister.get_opt("acme/log/absent", 100).await)?;
    let reader = open(&gateway, "reader", "prefix")?;
    ensure!(reader.get_opt("acme/log/absent", 100).await?.is_none());
    Ok(())
}
