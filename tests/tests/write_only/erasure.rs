//! The end of a stanza: its keys are destroyed, and nothing brings it back but what somebody kept.

use anyhow::{Result, ensure};
use fairvault_tests::fixture::{SMALL, Shape, files, refused};
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
    ensure!(s.objects("keys").len() == 2 && !s.scratch.join("vault/acme/erased").exists());
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
        refused(
            s.fairvault(&[&["wal", "get", "acme", "x", &to], more].concat()),
            200,
            "",
        )?;
    }
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

    // A kit that was exported before still opens what is stored: it says so, and the log still knows.
    s.by_operator(&["key", "import", "acme", &kit])?;
    refused(s.as_operator(&["info", "acme"]), 1, "was erased at")?;
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
