//! Keys are rotated under a real server: backups and WAL from before and after restore, with the secret that rules, and
//! whoever is at work goes on with the new keys or begins anew.

mod stores;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fairvault_engine::commit::Log;
use fairvault_engine::stanza::Stanza;
use fairvault_engine::store::url::RepositoryUrl;
use fairvault_format::keys::Secret;
use fairvault_format::proto::{self, log_entry::Kind as Entry};
use fairvault_tests::fixture::{Fixture, SMALL, Shape, field, files, refused};
use fairvault_tests::receiver::{Receiver, wait_until_durable};
use fairvault_tests::tools::reader;
use serde_json::Value;

const ARCHIVING: Shape<'static> = Shape {
    archiving: true,
    ..SMALL
};

const QUIET: [&str; 2] = ["--progress", "none"];

/// The key epoch that an object says it is of.
fn epoch_of(path: &Path) -> Result<u32> {
    let bytes = std::fs::read(path)?;
    let epoch = bytes.get(8..12).with_context(|| format!("{}", path.display()))?;
    Ok(u32::from_le_bytes(epoch.try_into()?))
}

fn all_good(s: &Fixture, more: &[&str]) -> Result<()> {
    let text = s.ok(&[&["verify", "acme", "--level", "data"], &QUIET[..], more].concat())?;
    ensure!(text.contains("all good"), "{text}");
    Ok(())
}

fn restores(s: &Fixture, name: &str, more: &[&str], rows: &str) -> Result<()> {
    let (exit, text) = s.restore(name, more);
    ensure!(exit == 0, "{name}: {text}");
    let copy = s.start(name, 5450)?;
    let found = s.rows(&copy)?;
    ensure!(found == rows, "{name}: {found} rows instead of {rows}");
    copy.stop(&s.scratch, "fast")
}

fn fill(s: &Fixture, rows: u32) -> Result<()> {
    s.sql(&format!(
        "insert into t select md5(random()::text) from generate_series(1, {rows})"
    ))?;
    Ok(())
}

/// What a backup has stored.
fn stored_bytes(s: &Fixture, id: &str) -> Result<u64> {
    let info: Value = serde_json::from_str(&s.ok(&["info", "acme", "--output", "json"])?)?;
    let backups = info["stanzas"][0]["backups"].as_array().context("backups")?.clone();
    let backup = backups
        .iter()
        .find(|backup| backup["id"] == *id)
        .context("the backup")?;
    backup["new_stored_bytes"]
        .as_u64()
        .with_context(|| format!("bytes in {backup}"))
}

/// A key file.
fn generate(s: &Fixture, name: &str) -> Result<String> {
    let path = s.path(name);
    s.ok(&["key", "generate", &path])?;
    Ok(path)
}

/// The configuration names another key file from now on.
fn configure_key(s: &Fixture, name: &str) -> Result<()> {
    let path = s.path("fairvault.toml");
    let text = std::fs::read_to_string(&path)?;
    let line = text.lines().find(|line| line.starts_with("key = ")).context("a key")?;
    let new = format!("key = {{ file = \"{}\" }}", s.path(name));
    Ok(std::fs::write(&path, text.replace(line, &new))?)
}

#[test]
fn backups_from_before_and_after_a_rotation_restore() -> Result<()> {
    let s = Fixture::new(
        "rotate",
        Shape {
            more: "retention = { full = 1 }",
            ..ARCHIVING
        },
    )?;
    s.sql("create table t (x text)")?;
    fill(&s, 20_000)?;
    let first = s.backup_id(&[])?;
    fill(&s, 1)?;
    s.sql("select pg_create_restore_point('before')")?;
    fill(&s, 1)?;
    s.flush_archive(&s.server)?;
    let said = s.ok(&["key", "rotate", "acme"])?;
    ensure!(said.contains("key epoch 2 follows on 1, opened by slot main"), "{said}");

    fill(&s, 1)?;
    let segment = s.flush_archive(&s.server)?;
    let is_it = |path: &PathBuf| path.display().to_string().contains(&segment);
    let object = s.objects("wal").into_iter().find(is_it).context("a segment")?;
    ensure!(epoch_of(&object)? == 2, "what is archived is of the new keys");
    // An incremental backup refers to what is under the old keys; a full one stores everything anew.
    let incremental = s.backup_id(&[])?;
    fill(&s, 1)?;
    let full = s.backup_id(&["--type", "full"])?;
    let (a, b, c) = (
        stored_bytes(&s, &first)?,
        stored_bytes(&s, &incremental)?,
        stored_bytes(&s, &full)?,
    );
    ensure!(incremental.ends_with('I') && b < a / 4 && c > a / 2, "{a}, {b}, {c}");
    s.sql("select pg_create_restore_point('after')")?;
    fill(&s, 1)?;
    s.flush_archive(&s.server)?;
    ensure!(epoch_of(s.objects("log").last().context("an entry")?)? == 2);

    all_good(&s, &[])?;
    restores(&s, "a", &["--target-name", "before"], "20001")?;
    restores(&s, "b", &["--backup", &first], "20005")?;
    restores(&s, "c", &["--backup", &incremental, "--target-name", "after"], "20004")?;
    restores(&s, "d", &[], "20005")?;
    let check = s.ok(&["key", "check", "acme"])?;
    for epoch in 1..=2 {
        ensure!(
            check.contains(&format!("opens key epoch {epoch} (a manifest")),
            "{check}"
        );
    }
    let vault = s.path("vault");
    let key = s.path("key");
    let list = reader(&[&vault, "list", "acme", "--key-file", &key])?;
    ensure!(list.lines().count() == 3, "{list}");
    for (id, to) in [(&first, "python1"), (&incremental, "python2")] {
        reader(&[&vault, "restore", "acme", id, &s.path(to), "--key-file", &key])?;
    }
    let audit = s.ok(&["audit", "acme"])?;
    ensure!(audit.contains("key epoch 2 began, opened by main"), "{audit}");

    // Slots of both epochs are exported, and come back.
    let kit = s.path("kit");
    s.ok(&["key", "export", "acme", &kit])?;
    std::fs::remove_dir_all(s.scratch.join("vault/acme/keys"))?;
    s.ok(&["key", "import", "acme", &kit])?;
    ensure!(s.ok(&["key", "check", "acme"])? == check);
    // A slot of one epoch is missed by whoever verifies.
    let slot = s.scratch.join("vault/acme/keys/00000001/main");
    std::fs::rename(&slot, s.path("slot"))?;
    let (exit, text) = s.fairvault(&[&["verify", "acme"], &QUIET[..]].concat());
    ensure!(exit == 4 && text.contains("no slot of key epoch 1"), "{exit} {text}");
    let (exit, text) = s.fairvault(&["key", "check", "acme"]);
    ensure!(exit != 0 && text.contains("epoch 1"), "{exit} {text}");
    std::fs::rename(s.path("slot"), &slot)?;

    // The index is made anew from packs of both epochs; what is old expires and is collected.
    for run in s.objects("index") {
        std::fs::remove_file(run)?;
    }
    s.fairvault(&[&["repair", "acme"], &QUIET[..]].concat());
    all_good(&s, &[])?;
    s.ok(&["expire", "acme"])?;
    s.ok(&[&["gc", "acme", "--patience", "1s"], &QUIET[..]].concat())?;
    ensure!(!s.ok(&["info", "acme"])?.contains(&first));
    let packs = s.objects("packs");
    for pack in &packs {
        ensure!(epoch_of(pack)? == 2, "packs of old keys that nobody needs are gone");
    }
    ensure!(!packs.is_empty());
    all_good(&s, &[])?;
    restores(&s, "e", &[], "20005")
}

#[test]
fn a_new_secret_opens_everything_and_the_old_one_what_was() -> Result<()> {
    let s = Fixture::new("newsecret", ARCHIVING)?;
    s.sql("create table t (x text)")?;
    fill(&s, 1000)?;
    let before = s.backup_id(&[])?;
    let (new, spare) = (generate(&s, "new")?, generate(&s, "spare")?);
    s.ok(&["key", "add-slot", "acme", "spare", "--secret-file", &spare])?;
    let rotate = ["key", "rotate", "acme", "--new-secret-file", &new];
    refused(s.fairvault(&rotate), 1, "spare")?;
    let rotate = [&rotate[..], &["--drop-slots"]].concat();
    // It dies when the slots are there, and the entry is not: all goes on as before.
    let mut dying = s.scratch.command("env");
    dying.arg("FAIRVAULT_FAULT=rotate").arg(s.path("fairvault"));
    dying.args(&s.options).args(&rotate);
    refused(fairvault_tests::code(&mut dying), 1, "dies before its entry")?;
    let list = s.ok(&["key", "list", "acme"])?;
    ensure!(
        list.contains("epoch 2 slot key2 (key, of a rotation that was not finished)"),
        "{list}"
    );
    let between = s.backup_id(&[])?;
    for path in s.objects("log").iter().chain(&s.objects("roots")) {
        ensure!(epoch_of(path)? == 1, "{}", path.display());
    }
    let said = s.ok(&rotate)?;
    ensure!(
        said.contains("key epoch 2 follows on 1, opened by slot key2") && said.contains("slot main, spare"),
        "{said}"
    );
    // Run again, it has nothing to do.
    ensure!(s.ok(&rotate)?.contains("nothing to do"));

    // Neither the old key nor what was left out opens what comes: nothing is archived meanwhile, and nothing lost.
    let backup = [&["backup", "acme", "--fast"], &QUIET[..]].concat();
    refused(s.fairvault(&backup), 1, "were rotated")?;
    refused(s.fairvault(&["info", "acme"]), 1, "were rotated")?;
    refused(
        s.fairvault(&["info", "acme", "--key-file", &spare, "--cache", &s.path("other")]),
        1,
        "were rotated",
    )?;
    fill(&s, 1)?;
    s.sql("select pg_switch_wal()")?;
    s.server
        .wait_for(&s.scratch, "select failed_count > 0 from pg_stat_archiver", "t")?;
    configure_key(&s, "new")?;
    s.flush_archive(&s.server)?;
    let after = s.backup_id(&[])?;
    ensure!(after.ends_with('I'), "{after}");
    let check = s.ok(&["key", "check", "acme"])?;
    ensure!(
        check.contains("epoch 1 (a manifest") && check.contains("epoch 2 (a manifest"),
        "{check}"
    );
    all_good(&s, &[])?;
    restores(&s, "a", &["--backup", &before], "1001")?;
    restores(&s, "b", &["--backup", &between], "1001")?;
    restores(&s, "c", &[], "1001")?;

    // The old slots go, also if somebody died over it; what was left out comes back for everything.
    let mut dying = s.scratch.command("env");
    dying.arg("FAIRVAULT_FAULT=remove-slot").arg(s.path("fairvault"));
    dying.args(&s.options).args(["key", "remove-slot", "acme", "main"]);
    refused(fairvault_tests::code(&mut dying), 1, "dies before it deletes")?;
    ensure!(s.ok(&["key", "list", "acme"])?.contains("main ("));
    s.ok(&["key", "remove-slot", "acme", "main"])?;
    let list = s.ok(&["key", "list", "acme"])?;
    ensure!(
        !list.contains("main (") && list.contains("slot spare does not open key epoch 2"),
        "{list}"
    );
    s.ok(&["key", "add-slot", "acme", "spare", "--secret-file", &spare])?;
    let by_spare = ["--key-file", &spare, "--cache", &s.path("other")];
    s.ok(&[&["key", "check", "acme"], &by_spare[..]].concat())?;
    refused(
        s.fairvault(&["key", "remove-slot", "acme", "key2"]),
        1,
        "without slot key2",
    )?;
    refused(s.fairvault(&["key", "remove-slot", "acme", "none"]), 3, "no slot")?;
    let said = s.ok(&["key", "remove-slot", "acme", "spare"])?;
    ensure!(
        said.contains("2 objects") && said.contains("fairvault key rotate acme"),
        "{said}"
    );
    let audit = s.ok(&["audit", "acme"])?;
    for said in [
        "key slot spare added: done",
        "removal of key slot main: began: keys/00000001/main ",
        "removal of key slot main: failed: the removal dies",
        "key slot main removed: done",
        "key remove-slot: failed: stanza acme has no slot",
        "opened by key2",
    ] {
        ensure!(audit.contains(said), "{said:?} is not in\n{audit}");
    }
    Ok(())
}

/// What somebody says with the old keys that are left to them, as an entry behind the last one.
fn say_with_old_keys(s: &Fixture, kind: Entry) -> Result<()> {
    let url = RepositoryUrl {
        url: format!("file://{}", s.path("vault")),
        ..Default::default()
    };
    let store = url.open(false)?;
    let secret = Secret::from_text(&std::fs::read(s.path("key"))?)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let log = Log::open(Stanza::open(&stores::access(&store, Some(secret))).await?).await?;
        let old = log.stanza().keys_of(1)?.clone();
        stores::forge(&store, &log, &old, kind, Vec::new()).await
    })
}

#[test]
fn what_old_keys_say_is_void_for_every_reader() -> Result<()> {
    let s = Fixture::new("void", Shape::default())?;
    s.sql("create table t (x text)")?;
    let id = s.backup_id(&[])?;
    s.ok(&["key", "rotate", "acme"])?;
    let expired = proto::Expired {
        backup: id.clone(),
        ..Default::default()
    };
    say_with_old_keys(&s, Entry::Expired(expired))?;
    // A host that has seen the log before, one that has not, and a reader that shares no code with them.
    let cache = s.path("elsewhere");
    for more in [&[][..], &["--cache", &cache]] {
        ensure!(s.ok(&[&["info", "acme"], more].concat())?.contains(&id));
    }
    let (vault, key) = (s.path("vault"), s.path("key"));
    let list = || reader(&[&vault, "list", "acme", "--key-file", &key]);
    ensure!(list()?.contains(&id));
    let audit = s.ok(&["audit", "acme"])?;
    let line = audit
        .lines()
        .find(|line| line.contains(&format!("backup {id} has expired")));
    ensure!(line.context("a line")?.contains("VOID"), "{audit}");
    ensure!(audit.matches("VOID").count() == 1, "{audit}");
    // The log goes on behind it.
    let next = s.backup_id(&[])?;
    ensure!(list()?.contains(&id) && list()?.contains(&next));
    s.ok(&[&["gc", "acme", "--patience", "1s"], &QUIET[..]].concat())?;
    all_good(&s, &[])
}

#[test]
fn a_passphrase_is_changed_without_touching_data() -> Result<()> {
    let s = Fixture::new("passphrase", Shape::default())?;
    s.sql("create table t (x text)")?;
    fill(&s, 10)?;
    s.backup()?;
    s.ok(&["key", "rotate", "acme"])?;
    s.scratch.write("pass", b"a new one\n")?;
    let pass = s.path("pass");
    let data = [s.objects("packs"), s.objects("roots"), s.objects("wal")];
    s.ok(&["key", "add-slot", "acme", "words", "--secret-file", &pass])?;
    let with_words = |words: &[&str]| s.fairvault(&[words, &["--passphrase-file", &pass]].concat());
    let on_other_host = |words: &[&str]| with_words(&[words, &["--cache", &s.path("other")]].concat());
    for words in [
        &["key", "check", "acme"][..],
        &["key", "remove-slot", "acme", "main"],
        &["info", "acme", "--cache", &s.path("other")],
        &["key", "rotate", "acme"],
        &["backup", "acme", "--fast", "--progress", "none"],
    ] {
        let (exit, text) = with_words(words);
        ensure!(exit == 0, "{text}");
        if words.contains(&"remove-slot") {
            ensure!(data == [s.objects("packs"), s.objects("roots"), s.objects("wal")]);
        }
    }
    refused(s.fairvault(&["info", "acme"]), 1, "of a kind that no slot")?;
    let (exit, text) = s.restore("r", &["--passphrase-file", &pass]);
    ensure!(exit == 0, "{text}");
    ensure!(s.rows(&s.start("r", 5450)?)? == "10");
    // Whoever archives never stretches: another host has to do that once more for the new epoch.
    let segment = s.sql("select pg_walfile_name(pg_switch_wal())")?;
    let path = format!("{}/pg_wal/{segment}", s.server.data.display());
    let push = ["wal", "push", "acme", &path];
    refused(on_other_host(&push), 1, "no cached key")?;
    for (exit, text) in [
        with_words(&push),
        on_other_host(&["info", "acme"]),
        on_other_host(&push),
    ] {
        ensure!(exit == 0, "{text}");
    }
    Ok(())
}

#[test]
fn a_receiver_goes_on_under_new_keys() -> Result<()> {
    for spool in [false, true] {
        let s = Fixture::new(
            if spool { "rotspool" } else { "rotreceive" },
            Shape {
                more: "wal = { flush_interval = \"100ms\" }",
                ..SMALL
            },
        )?;
        let dir = s.path("spool");
        let more: &[&str] = if spool { &["--spool", &dir] } else { &[] };
        let mut receiver = Receiver::start(&s, more)?;
        s.sql("create table t (x text)")?;
        fill(&s, 1000)?;
        s.backup()?;
        s.ok(&["key", "rotate", "acme"])?;
        let newest = || -> Result<u32> {
            let mut newest = 0;
            for path in s.objects("wal") {
                // Pieces come and go.
                newest = newest.max(epoch_of(&path).unwrap_or_default());
            }
            Ok(newest)
        };
        let began = std::time::Instant::now();
        while newest()? < 2 {
            ensure!(began.elapsed().as_secs() < 60, "{}", receiver.text());
            fill(&s, 100)?;
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        receiver.wait_for_line("were rotated")?;
        for _ in 0..3 {
            fill(&s, 3000)?;
        }
        s.sql("select pg_switch_wal()")?;
        fill(&s, 1)?;
        wait_until_durable(&s, &s.server)?;
        let rows = s.rows(&s.server)?;
        if spool {
            let journals = files(&s.scratch.join("spool"));
            let is_new = |path: &PathBuf| {
                path.extension().is_some_and(|end| end == "wal") && epoch_of(path).is_ok_and(|epoch| epoch == 2)
            };
            ensure!(journals.iter().any(is_new), "{journals:?}");
        }
        let text = receiver.stop()?;
        ensure!(!text.contains("GAP"), "{text}");
        s.server.stop(&s.scratch, "immediate")?;
        restores(&s, "r", &[], &rows)?;
        all_good(&s, &[])?;
    }
    Ok(())
}

#[test]
fn copies_go_on_over_rotations_on_both_sides() -> Result<()> {
    let s = Fixture::new(
        "rotcopy",
        Shape {
            stanza: false,
            ..ARCHIVING
        },
    )?;
    let dir = s.path("").trim_end_matches('/').to_owned();
    let text = format!(
        "cache = \"{dir}/cache\"\n[repo.main]\nurl = \"file://{dir}/vault\"\n[repo.second]\nurl = \"file://{dir}/second\"\n\
         [defaults]\nrepos = [\"main\", \"second\"]\n[stanza.acme]\nconninfo = \"host={dir} port=5432 user=postgres\"\n\
         key = {{ file = \"{dir}/key\" }}\n"
    );
    s.scratch.write("fairvault.toml", text.as_bytes())?;
    s.ok(&["stanza", "create", "acme"])?;
    s.sql("create table t (x text)")?;
    fill(&s, 10_000)?;
    s.backup()?;
    let copy = || -> Result<u64> {
        let said = s.ok(&[&["copy", "acme", "--output", "json"], &QUIET[..]].concat())?;
        Ok(field(&said, "stored_bytes")?.parse()?)
    };
    let everything = copy()?;
    // The target: what it has under its old keys is not built on, and not taken for something else.
    s.ok(&["--repo", "second", "key", "rotate", "acme"])?;
    fill(&s, 10)?;
    s.backup()?;
    let anew = copy()?;
    fill(&s, 10)?;
    s.backup()?;
    let little = copy()?;
    ensure!(
        anew > everything / 2 && little < everything / 4,
        "{everything}, {anew}, {little}"
    );
    // The source: other ids of the same content, which the target knows.
    s.ok(&["--repo", "main", "key", "rotate", "acme"])?;
    s.backup_id(&["--type", "full"])?;
    let known = copy()?;
    ensure!(known < everything / 2, "{everything}, {known}");
    // Both at once, to a new secret.
    let new = generate(&s, "new")?;
    let said = s.ok(&["key", "rotate", "acme", "--new-secret-file", &new])?;
    ensure!(
        said.contains("main: key epoch 3 follows on 2") && said.contains("second: key epoch 3 follows on 2"),
        "{said}"
    );
    configure_key(&s, "new")?;
    fill(&s, 10)?;
    s.backup()?;
    copy()?;
    for repository in ["main", "second"] {
        all_good(&s, &["--repo", repository])?;
        restores(&s, &format!("of-{repository}"), &["--repo", repository], "10030")?;
    }
    Ok(())
}
