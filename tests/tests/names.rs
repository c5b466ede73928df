//! Names that people give stay names: none leads out of the folder that it belongs into, and each is refused in words.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use fairvault_tests::Fixture;
use fairvault_tests::fixture::{files, refused};

/// What would be made by a name that is taken for a path.
const OUTSIDE: &str = "fv-escaped";
/// No names of anything.
const BAD: [&str; 10] = [
    "../fv-escaped",
    "../../fv-escaped",
    "acme/../fv-escaped",
    "acme/../../fv-escaped",
    "/fv-escaped",
    "..",
    ".",
    "",
    "ac\\me",
    "ac\nme",
];

/// A repository with a stanza, and no server.
fn old(name: &str) -> Result<Fixture> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1");
    Fixture::of_repository(name, &folder, "")
}

/// Files and folders below a folder that only a name that was taken for a path makes.
fn escaped(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name() == OUTSIDE {
            found.push(path.clone());
        }
        if path.is_dir() {
            found.extend(escaped(&path));
        }
    }
    found
}

fn nothing_escaped(s: &Fixture, what: &str) -> Result<()> {
    let mut found = escaped(s.scratch.path());
    found.extend([Path::new("/").join(OUTSIDE)].into_iter().filter(|path| path.exists()));
    ensure!(found.is_empty(), "{what} has made {found:?}");
    Ok(())
}

/// Finds a command that puts something below a stanza's name before it has looked at that.
#[test]
fn no_stanza_name_is_a_path() -> Result<()> {
    let s = old("stanzanames")?;
    let (to, file, pushed) = (s.path("r"), s.path("slots"), s.path("pushed"));
    let (to, file, pushed) = (to.as_str(), file.as_str(), pushed.as_str());
    s.ok(&["key", "export", "acme", file])?;
    s.scratch.write("pushed", b"")?;
    let before = files(&s.scratch.join("vault"));
    let segment = "000000020000000000000016";
    for name in BAD {
        for verb in [
            &["info", name][..],
            &["check", name, "--conninfo", "host=/nowhere"],
            &["backup", name, "--conninfo", "host=/nowhere"],
            &["verify", name],
            &["gc", name],
            &["expire", name],
            &["audit", name],
            &["repair", name],
            &["lock", name, "--days", "1"],
            &["hold", name, "latest", "--reason", "a test"],
            &["key", "list", name],
            &["key", "import", name, file],
            &["key", "erase", name, "--confirm", name],
            &["stanza", "fence", name, "--reason", "a test"],
            &["restore", name, "--to", to],
        ] {
            refused(s.fairvault(verb), 2, "stanza name").map_err(|error| error.context(format!("{verb:?}")))?;
        }
        // PostgreSQL hears what it understands.
        let push = ["wal", "push", name, pushed];
        refused(s.fairvault(&push), 1, "stanza name")?;
        let get = ["wal", "get", name, segment, to, "--through", "0/2000000"];
        refused(s.fairvault(&get), 200, "stanza name")?;
        nothing_escaped(&s, name)?;
    }
    ensure!(files(&s.scratch.join("vault")) == before, "something was stored");

    // Not one of the configuration, either, where a worker would have a folder of that name.
    let config = std::fs::read_to_string(&s.options[1])?;
    let spool = s.path("spool");
    let stanza = format!(
        "{config}[stanza.\"../fv-escaped\"]\nwal = {{ async = true, spool = \"{spool}\", push_timeout = \"1s\" }}\n"
    );
    s.scratch.write("fairvault.toml", stanza.as_bytes())?;
    std::fs::create_dir_all(s.scratch.join("pg_wal/archive_status"))?;
    s.scratch.write(&format!("pg_wal/{segment}"), b"")?;
    s.scratch
        .write(&format!("pg_wal/archive_status/{segment}.ready"), b"")?;
    let path = s.path(&format!("pg_wal/{segment}"));
    refused(s.fairvault(&["wal", "push", "../fv-escaped", &path]), 1, "stanza name")?;
    nothing_escaped(&s, "a worker")
}

#[test]
fn no_backup_slot_or_wal_file_is_a_path() -> Result<()> {
    let s = old("othernames")?;
    let other = s.path("other");
    s.ok(&["key", "generate", &other])?;
    for name in BAD {
        if !name.is_empty() {
            refused(s.restore("r", &["--backup", name]), 3, "no backup")?;
            let hold = ["hold", "acme", name, "--reason", "a test"];
            refused(s.fairvault(&hold), 3, "no backup")?;
        }
        let add = ["key", "add-slot", "acme", name, "--secret-file", &other];
        refused(s.fairvault(&add), 2, "slot name")?;
        let rotate = ["key", "rotate", "acme", "--new-secret-file", &other, "--slot", name];
        refused(s.fairvault(&rotate), 2, "slot name")?;
        // That it is absent would end a recovery.
        let to = s.path("fetched");
        let (exit, text) = s.fairvault(&["wal", "get", "acme", name, &to]);
        ensure!(exit == 200 && !Path::new(&to).exists(), "{name:?}: {exit} {text}");
        nothing_escaped(&s, name)?;
    }
    ensure!(!s.scratch.join("r").exists(), "nothing is restored");
    let push = s.path("vault/..");
    refused(
        s.fairvault(&["wal", "push", "acme", &push]),
        1,
        "is not the name of a WAL file",
    )
}
