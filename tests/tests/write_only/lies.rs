//! What a stolen key that writes only can spoil, and where that ends.

use anyhow::{Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::commit::session::Session;
use fairvault_engine::env;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_format::frame::{FRAME_HEADER_LEN, FrameKey};
use fairvault_format::index::{IndexEntry, IndexRun, PackRef, seal_run};
use fairvault_format::keys::Secret;
use fairvault_format::pack::{DirectoryEntry, seal_tail};
use fairvault_format::{names, sha256};
use fairvault_tests::fixture::refused;
use fairvault_tests::run;

use crate::fixture::{ARCHIVING, WriteOnly};
use crate::stores;

/// Whoever has the host's key stores a frame under the id of other content, and announces it.
async fn lie(s: &WriteOnly, content: &[u8]) -> Result<()> {
    let url = RepositoryUrl {
        url: format!("file://{}", s.path("vault")),
        ..Default::default()
    };
    let secret = Secret::from_text(&std::fs::read(s.path("host.key"))?)?;
    let access = stores::access(&url.open(false)?, Some(secret));
    let mut log = Log::open(Stanza::open(&access).await?).await?;
    let stanza = log.stanza().clone();
    let (keys, false_content) = (stanza.keys(), b"not that".to_vec());
    let (header, key) = FrameKey::of_new_pack(keys, stanza.scope(), env::fresh(stanza.env())?)?;
    let mut frame = vec![0; FRAME_HEADER_LEN];
    frame.extend_from_slice(&false_content);
    key.seal(0, 0, false_content.len() as u32, &mut frame);
    let (id, stored_len) = (keys.chunk_id(content), frame.len() as u32);
    let mut bytes = header.encode().to_vec();
    let entry = IndexEntry {
        id,
        pack: 0,
        ordinal: 0,
        offset: bytes.len() as u32,
        stored_len,
    };
    bytes.extend(frame);
    let directory = DirectoryEntry {
        id,
        stored_len,
        plain_len: content.len() as u32,
    };
    bytes.extend(seal_tail(keys, stanza.scope(), &header, &[directory])?);
    let pack = PackRef {
        name: sha256(&bytes),
        header,
    };
    stanza
        .store()
        .put_hashed(&names::pack(&pack.name), bytes.into())
        .await?;
    let index = IndexRun {
        packs: vec![pack],
        entries: vec![entry],
    };
    let sealed = seal_run(keys, stanza.scope(), env::salt(stanza.env())?, index)?;
    let hash = sha256(&sealed);
    stanza
        .store()
        .put_hashed(&names::index_run(&hash), sealed.into())
        .await?;
    let mut session = Session::begin(&mut log, "backup", |_| "20200101-000000F".to_owned()).await?;
    session.announce(&mut log, hash).await?;
    session.abort(&mut log, "it lies").await?;
    // Whoever runs this test is not the one who runs backups.
    let vault = s.path("vault");
    let mut owner = std::process::Command::new("chown");
    run(owner.args(["-R", "--reference", &vault, &vault]))?;
    Ok(())
}

#[test]
fn a_lie_about_a_chunk_is_loud_and_ends() -> Result<()> {
    let s = WriteOnly::new("lies", ARCHIVING)?;
    s.sql("create table t (x text)")?;
    let content: Vec<u8> = (0..300_000u32).map(|at| (at % 251) as u8).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(lie(&s, &content))?;
    std::fs::write(s.server.data.join("noise"), &content)?;
    let full = ["--type", "full"];
    let believed = s.backup_id(&full)?;
    // It is no wrong data: the restore fails, and verifying finds it and takes the pack out of use.
    refused(
        s.as_operator(&["restore", "acme", "--to", &s.path("r"), "--progress", "none"]),
        4,
        "",
    )?;
    let verify = ["verify", "acme", "--level", "data", "--progress", "none"];
    refused(s.as_operator(&verify), 4, "noise")?;
    let good = s.backup_id(&full)?;
    s.by_operator(&[
        "restore",
        "acme",
        "--to",
        &s.path("good"),
        "--backup",
        &good,
        "--progress",
        "none",
    ])?;
    ensure!(std::fs::read(s.path("good/noise"))? == content);

    // A lie under other keys than those that rule is believed by nobody.
    let other: Vec<u8> = content.iter().map(|byte| byte ^ 1).collect();
    runtime.block_on(lie(&s, &other))?;
    s.by_operator(&["key", "rotate", "acme", "--drop-slots"])?;
    let host = s.path("host.key");
    s.by_operator(&[
        "key",
        "add-slot",
        "acme",
        "host",
        "--write-only",
        "--secret-file",
        &host,
    ])?;
    std::fs::write(s.server.data.join("noise"), &other)?;
    let last = s.backup_id(&full)?;
    s.by_operator(&[
        "restore",
        "acme",
        "--to",
        &s.path("last"),
        "--backup",
        &last,
        "--progress",
        "none",
    ])?;
    ensure!(std::fs::read(s.path("last/noise"))? == other && believed != last);
    Ok(())
}
