//! The end of a stanza: its keys are destroyed, and nothing brings it back but what somebody kept.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{SMALL, Shape, files, refused};
use fairvault_tests::run;
use fairvault_tests::tools::reader;

use crate::fixture::{QUIET, WriteOnly};

#[test]
fn an_erased_stanza_stays_erased() -> Result<()> {
    let s = WriteOnly::new("erase", Shape { stanza: false, ..SMALL })?;
    s.sql("create table t (x text)")?;
    s.fill(10)?;
    let id = s.backup_id(&[])?;
    let kit = s.path("kit");
    s.by_operator(&["key", "export", "acme", &kit])?;
    // A passphrase's unwrapped keys are remembered until another secret opens the stanza, or it is erased.
    let (phrase, cache) = (s.path("phrase"), s.path("phrase-cache"));
    s.scratch.write("phrase", b"correct horse battery staple")?;
    s.by_operator(&["key", "add-slot", "acme", "phrase", "--secret-file", &phrase])?;
    let by_phrase = ["info", "acme", "--cache", &cache, "--passphrase-file", &phrase];
    let remembers = || {
        files(std::path::Path::new(&cache))
            .iter()
            .any(|path| path.ends_with("keys"))
    };
    s.ok(&by_phrase)?;
    ensure!(remembers());
    s.ok(&["info", "acme", "--cache", &cache])?;
    ensure!(
        !remembers(),
        "a host that writes only has unwrapped keys of another secret"
    );
    s.ok(&by_phrase)?;
    ensure!(remembers());
    let (slots, copy) = (s.path("vault/acme/keys"), s.path("copy"));
    run(s.scratch.command("cp").args(["-a", &slots, &copy]))?;
    let erase = [
        "key",
        "erase",
        "acme",
        "--confirm",
        "acme",
        "--reason",
        "the customer has left",
    ];
    refused(
        s.as_operator(&["key", "erase", "acme", "--confirm", "amce"]),
        2,
        "the stanza is \"acme\"",
    )?;
    let dying = |fault: &str| {
        let mut command = s.scratch.command("env");
        command.arg(format!("FAIRVAULT_FAULT={fault}")).arg(s.path("fairvault"));
        command.args(&s.options).args(erase).args(&s.operator);
        fairvault_tests::code(&mut command)
    };
    let backup = [&["backup", "acme", "--fast"], &QUIET[..]].concat();
    let erased = "by postgres@";
    // The log says so before anything else; nothing goes on from there, and audit says what happened.
    refused(dying("erase before its note"), 1, "dies before its note")?;
    ensure!(s.objects("keys").len() == 3 && !s.scratch.join("vault/acme/erased").exists());
    for said in [
        "was erased at",
        "the customer has left",
        "run `fairvault key erase` again",
    ] {
        refused(s.fairvault(&backup), 1, said)?;
        refused(s.as_operator(&["info", "acme"]), 1, said)?;
    }
    let audit = s.by_operator(&["audit", "acme"])?;
    ensure!(
        audit.contains("the stanza was erased: its key slots are destroyed: the customer has left"),
        "{audit}"
    );
    // Half of the slots are gone: of others first.
    refused(dying("erase half-way"), 1, "dies before the last slots")?;
    let left = s.objects("keys");
    ensure!(left.len() == 1 && left[0].ends_with("main"), "{left:?}");
    let entries = s.objects("log").len();
    let said = s.by_operator(&erase)?;
    ensure!(
        said.contains("is erased (entry") && said.contains("`key export`"),
        "{said}"
    );
    ensure!(s.objects("keys").is_empty() && s.objects("log").len() == entries);
    // Once more, when nothing opens: nothing to do.
    s.by_operator(&erase)?;

    // Nobody opens it: not a host that remembers it, nor one that never saw it, nor a new stanza in its place.
    let (other, to) = (s.path("other"), s.path("r"));
    for more in [&[][..], &["--cache", &other]] {
        for words in [
            &backup[..],
            &["info", "acme"],
            &["restore", "acme", "--to", &to],
            &["repair", "acme"],
        ] {
            refused(s.fairvault(&[words, more].concat()), 1, "was erased at")?;
        }
        let get = ["wal", "get", "acme", "000000010000000000000001", &to];
        refused(s.fairvault(&[&get[..], more].concat()), 200, "was erased at")?;
    }
    ensure!(remembers());
    refused(s.fairvault(&by_phrase), 1, "was erased at")?;
    ensure!(!remembers(), "unwrapped keys of an erased stanza are left");
    refused(s.as_operator(&["stanza", "create", "acme"]), 1, "was erased at")?;
    let remembered = files(&s.scratch.join("cache"));
    ensure!(
        remembered
            .iter()
            .all(|path| !path.ends_with("slots") && !path.ends_with("keys")),
        "{remembered:?}"
    );
    let text = s.as_operator(&["info", "acme"]).1;
    ensure!(text.contains(erased) || text.contains("by root@"), "{text}");

    // A kit that was exported before is not imported: the note says why, and without it the log does.
    let import = ["key", "import", "acme", &kit];
    refused(s.as_operator(&import), 1, "was erased at")?;
    std::fs::remove_file(s.scratch.join("vault/acme/erased"))?;
    refused(s.as_operator(&import), 1, "was erased at")?;
    ensure!(s.objects("keys").is_empty());
    // Slots of a copy still open what is stored: only to a reader that does not ask.
    run(s.scratch.command("cp").args(["-aT", &copy, &slots]))?;
    ensure!(s.objects("keys").len() == 3);
    refused(s.as_operator(&["info", "acme"]), 1, "was erased at")?;
    let late = s.path("late");
    refused(s.as_operator(&["key", "export", "acme", &late]), 1, "was erased at")?;
    let vault = s.path("vault");
    reader(&[
        &vault,
        "restore",
        "acme",
        &id,
        &s.path("python"),
        "--key-file",
        &s.path("key"),
    ])?;
    // And it is erased once more.
    s.by_operator(&erase)?;
    ensure!(s.objects("keys").is_empty() && s.objects("log").len() == entries);
    ensure!(reader(&[&vault, "list", "acme", "--key-file", &s.path("key")]).is_err());
    Ok(())
}

#[test]
fn a_forged_note_destroys_nothing() -> Result<()> {
    let s = WriteOnly::new("forged", Shape { stanza: false, ..SMALL })?;
    let (wrong, nothing) = (s.path("wrong.key"), s.path("nothing"));
    s.ok(&["key", "generate", &wrong])?;
    let note = s.scratch.join("vault/acme/erased");
    let forged = r#"{"format": "fairvault-erased", "version": 1, "entry": 2, "time_us": 1, "host": "h", "user": "u"}"#;
    std::fs::write(&note, forged)?;
    let erase = ["key", "erase", "acme", "--confirm", "acme"];
    let slots = s.objects("keys");
    ensure!(slots.len() == 2);
    let with_wrong = [&erase[..], &["--key-file", &wrong, "--cache", &nothing]].concat();
    refused(s.fairvault(&with_wrong), 1, "nothing was deleted")?;
    refused(s.fairvault(&erase), 1, "the operator's key")?;
    ensure!(s.objects("keys") == slots);
    s.by_operator(&["info", "acme"])?;
    // It keeps no slots away: the log is asked, which an exported file opens.
    let kit = s.path("kit");
    s.by_operator(&["key", "export", "acme", &kit])?;
    for slot in &slots {
        std::fs::remove_file(slot)?;
    }
    let import = ["key", "import", "acme", &kit, "--cache", &nothing];
    refused(
        s.fairvault(&[&import[..], &["--key-file", &wrong]].concat()),
        1,
        "was erased at",
    )?;
    ensure!(s.objects("keys").is_empty());
    let said = s.fairvault(&[&import[..], &["--key-file", &s.path("key")]].concat());
    refused(said, 0, "the log does not")?;
    ensure!(s.objects("keys") == slots);
    // The log counts; what the note says is not written over, and is told.
    let said = s.by_operator(&erase)?;
    ensure!(said.contains("says something else than the log"), "{said}");
    ensure!(s.objects("keys").is_empty() && std::fs::read_to_string(&note)? == forged);
    Ok(())
}

#[test]
fn a_slot_that_is_added_beside_an_erasure_does_not_survive() -> Result<()> {
    let s = WriteOnly::new("erasebeside", Shape { stanza: false, ..SMALL })?;
    let spare = s.path("spare.key");
    s.ok(&["key", "generate", &spare])?;
    let mut adding = s.scratch.command("env");
    adding.arg("FAIRVAULT_FAULT=add-slot is slow").arg(s.path("fairvault"));
    adding
        .args(&s.options)
        .args(["key", "add-slot", "acme", "spare", "--secret-file", &spare])
        .args(&s.operator);
    let adding = adding.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    std::thread::sleep(Duration::from_secs(3));
    s.by_operator(&["key", "erase", "acme", "--confirm", "acme"])?;
    let ended = adding.wait_with_output()?;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    ensure!(
        ended.status.code() == Some(1) && said.contains("was erased at"),
        "{said}"
    );
    ensure!(said.contains("slots that were made meanwhile are deleted"), "{said}");
    ensure!(s.objects("keys").is_empty(), "{:?}", s.objects("keys"));
    Ok(())
}
