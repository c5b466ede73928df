//! What people and programs rely on changes on purpose only: help texts, messages about wrong configurations, and
//! the members of JSON objects. Run with `FAIRVAULT_SNAPSHOTS=write` to accept what is said now.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{Fixture, Shape};
use fairvault_tests::s3::S3;
use fairvault_tests::snapshot::{compare, shape};
use fairvault_tests::{Scratch, code, output, run};

/// The help text of a command, for a terminal of a hundred columns.
fn help(scratch: &Scratch, words: &[String]) -> Result<String> {
    let mut command = scratch.command("env");
    command
        .args(["-i", "COLUMNS=100"])
        .arg(scratch.join("fairvault"))
        .args(words)
        .arg("--help");
    let lines = run(&mut command)?;
    Ok(lines.lines().map(|line| format!("{}\n", line.trim_end())).collect())
}

/// The names below `Commands:`, but `help`.
fn children(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let named = lines.take_while(|line| !line.is_empty()).filter_map(|line| {
        let name = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '))?;
        name.split_whitespace().next().map(str::to_owned)
    });
    named.filter(|name| name != "help").collect()
}

/// What stands before the description of an option, if a line begins one.
fn option(line: &str) -> Option<&str> {
    let text = line.trim_start();
    text.starts_with('-').then(|| text.split("  ").next().unwrap_or(text))
}

/// A help text without the options that every command has.
fn without(help: &str, everywhere: &BTreeSet<&str>) -> String {
    let (mut out, mut is_left_out) = (String::new(), false);
    for line in help.lines() {
        if let Some(option) = option(line) {
            is_left_out = everywhere.contains(option);
        } else if !line.starts_with(' ') && !line.is_empty() {
            is_left_out = false;
        }
        if !is_left_out {
            out += line;
            out += "\n";
        }
    }
    let out = out.trim_end();
    out.strip_suffix("Options:").unwrap_or(out).trim_end().to_owned()
}

#[test]
fn the_help_texts_are_the_documented_ones() -> Result<()> {
    let scratch = Scratch::new("help")?;
    let top = help(&scratch, &[])?;
    let everywhere: BTreeSet<&str> = top.lines().filter_map(option).collect();
    ensure!(everywhere.len() > 8, "{everywhere:?}");
    let mut text = format!(
        "# Commands\n\nThe help texts, as `fairvault help COMMAND` prints them. What follows here is true of every command, and left out below.\n\n```\n{}\n```\n",
        top.trim_end()
    );
    let mut waiting: Vec<Vec<String>> = children(&top).into_iter().rev().map(|name| vec![name]).collect();
    let mut count = 0;
    while let Some(words) = waiting.pop() {
        let help = help(&scratch, &words)?;
        let below = children(&help);
        count += 1;
        write!(
            text,
            "\n## {}\n\n```\n{}\n```\n",
            words.join(" "),
            without(&help, &everywhere)
        )?;
        waiting.extend(below.into_iter().rev().map(|name| [words.clone(), vec![name]].concat()));
    }
    ensure!(count > 20, "only {count} commands were found");
    compare("docs/commands.md", &text)
}

/// What is wrong, the configuration, and a command that notices.
const WRONG: [(&str, &str, &[&str]); 30] = [
    ("no repository", "", &["info", "acme"]),
    ("not TOML", "[repo.main\n", &["info", "acme"]),
    (
        "an unknown section",
        "[repos.main]\nurl = \"file:///x\"",
        &["info", "acme"],
    ),
    ("an unknown key", "[repo.main]\nurll = \"file:///x\"", &["info", "acme"]),
    (
        "a repository without a URL",
        "[repo.main]\nregion = \"x\"",
        &["info", "acme"],
    ),
    (
        "an unknown kind of URL",
        "[repo.main]\nurl = \"ftp://x/y\"",
        &["info", "acme"],
    ),
    (
        "a folder that is not there",
        "[repo.main]\nurl = \"file://DIR/nowhere\"",
        &["info", "acme"],
    ),
    (
        "an empty folder",
        "[repo.main]\nurl = \"file://DIR/empty\"",
        &["info", "acme"],
    ),
    (
        "two repositories and no choice",
        "[repo.a]\nurl = \"file:///a\"\n[repo.b]\nurl = \"file:///b\"",
        &["info", "acme"],
    ),
    (
        "a repository that is not configured",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nrepos = [\"b\"]",
        &["info", "acme"],
    ),
    (
        "a key with no source",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nkey = { }",
        &["info", "acme"],
    ),
    (
        "a key with two sources",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nkey = { file = \"/x\", env = \"Y\" }",
        &["info", "acme"],
    ),
    (
        "a key file that is not there",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nkey = { file = \"DIR/none\" }",
        &["info", "acme"],
    ),
    (
        "a key file for everybody",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nkey = { file = \"DIR/open\" }",
        &["info", "acme"],
    ),
    (
        "a key file with something else",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nkey = { file = \"DIR/rubbish\" }",
        &["info", "acme"],
    ),
    (
        "a retention that is no number and no age",
        "[repo.a]\nurl = \"file:///a\"\n[defaults]\nretention = { full = \"many\" }",
        &["expire", "acme"],
    ),
    (
        "an unknown time zone",
        "[repo.a]\nurl = \"file:///a\"\n[defaults]\nretention = { daily = 1, timezone = \"Moon\" }",
        &["expire", "acme"],
    ),
    (
        "a negative number",
        "[repo.a]\nurl = \"file:///a\"\n[defaults]\nretention = { min_full = -1 }",
        &["expire", "acme"],
    ),
    (
        "an unknown codec",
        "[repo.a]\nurl = \"file:///a\"\n[defaults]\ncompression = { codec = \"lzma\" }",
        &["backup", "acme"],
    ),
    (
        "a level that is not possible",
        "[repo.a]\nurl = \"file:///a\"\n[defaults]\ncompression = { level = 99 }",
        &["backup", "acme"],
    ),
    (
        "a time without a unit",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\narchive_timeout = \"60\"",
        &["backup", "acme"],
    ),
    (
        "a conninfo with an unknown keyword",
        "[repo.a]\nurl = \"file:///a\"\n[stanza.acme]\nconninfo = \"hots=x\"",
        &["backup", "acme"],
    ),
    // What is known in each place is named: a key that is gone or new is seen.
    (
        "an unknown key of a deleter",
        "[repo.a]\nurl = \"file:///a\"\ndeleter = { zzzzzzzz = 1 }",
        &["info", "acme"],
    ),
    (
        "an unknown key of [defaults]",
        "[defaults]\nzzzzzzzz = 1",
        &["info", "acme"],
    ),
    (
        "an unknown key of compression",
        "[defaults]\ncompression = { zzzzzzzz = 1 }",
        &["info", "acme"],
    ),
    (
        "an unknown key of a stanza",
        "[stanza.a]\nzzzzzzzz = 1",
        &["info", "acme"],
    ),
    (
        "an unknown key of a key",
        "[stanza.a]\nkey = { zzzzzzzz = 1 }",
        &["info", "acme"],
    ),
    (
        "an unknown key of retention",
        "[stanza.a]\nretention = { zzzzzzzz = 1 }",
        &["info", "acme"],
    ),
    (
        "an unknown key of schedule",
        "[stanza.a]\nschedule = { zzzzzzzz = 1 }",
        &["info", "acme"],
    ),
    (
        "an unknown key of wal",
        "[stanza.a]\nwal = { zzzzzzzz = 1 }",
        &["info", "acme"],
    ),
];

#[test]
fn wrong_configurations_are_explained() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new("wrong")?;
    let dir = scratch.path().display().to_string();
    run(scratch.command("mkdir").arg(scratch.join("empty")))?;
    scratch.write("rubbish", b"no key\n")?;
    let open = scratch.write("open", b"no key\n")?;
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o644))?;
    let mut text = String::from("What is said of wrong configurations. DIR stands for a folder.\n");
    for (what, configuration, command) in WRONG {
        let config = scratch.write("fairvault.toml", configuration.replace("DIR", &dir).as_bytes())?;
        let mut arguments = vec!["--config", config.to_str().context("a path")?];
        arguments.extend(command);
        let (exit, said) = code(&mut scratch.fairvault(&arguments));
        ensure!(exit != 0, "{what} was taken: {said}");
        let said = said.replace(&dir, "DIR");
        write!(
            text,
            "\n## {what}\n{configuration}\n$ fairvault {}\n{said}exit code {exit}\n",
            command.join(" ")
        )?;
    }
    compare("tests/snapshots/configuration.txt", &text)
}

#[test]
fn the_members_of_json_objects_are_the_documented_ones() -> Result<()> {
    let s = Fixture::new(
        "json",
        Shape {
            more: "retention = { full = 1 }",
            ..Default::default()
        },
    )?;
    s.sql("create table t as select i from generate_series(1, 100) i")?;
    let mut text = String::from("The members of the JSON objects that commands print, and of what types they are.\n");
    // A command, and whether it is expected to succeed.
    let mut note = |arguments: &[&str], succeeds: bool| -> Result<()> {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let out = output(&mut s.command(&all))?;
        let said = fairvault_tests::text(&out);
        ensure!(out.status.success() == succeeds, "{arguments:?}: {said}");
        let object = if succeeds { &out.stdout } else { &out.stderr };
        let object = String::from_utf8_lossy(object);
        let line = object
            .lines()
            .rfind(|line| line.starts_with('{'))
            .context(said.clone())?;
        let verb: Vec<&str> = arguments.iter().take_while(|word| **word != "acme").copied().collect();
        write!(text, "\n## {}\n{}", verb.join(" "), shape(&serde_json::from_str(line)?))?;
        Ok(())
    };
    let quiet = ["--progress", "none"];
    let with = |words: &[&'static str]| [words, &quiet].concat();
    note(&["stanza", "create", "acme"], true)?;
    note(&["stanza", "list"], true)?;
    note(&with(&["backup", "acme", "--fast", "--annotation", "why=test"]), true)?;
    let id = s.backup_id(&["--type", "full"])?;
    note(&["check", "acme"], true)?;
    note(&["hold", "acme", &id, "--reason", "a trial"], true)?;
    note(&["info", "acme"], true)?;
    note(&["policy", "acme", "--minimum-full", "1"], true)?;
    note(&["expire", "acme"], true)?;
    note(&with(&["verify", "acme"]), true)?;
    note(&with(&["repair", "acme"]), true)?;
    note(&with(&["gc", "acme", "--patience", "1s"]), true)?;
    note(&["audit", "acme"], true)?;
    note(&["key", "list", "acme"], true)?;
    note(&["key", "check", "acme"], true)?;
    note(&["key", "rotate", "acme"], true)?;
    let to = s.path("copy");
    note(
        &["restore", "--dry-run", "acme", "--to", &to, "--progress", "none"],
        true,
    )?;
    note(&["restore", "acme", "--to", &to, "--progress", "none"], true)?;
    note(&["stanza", "upgrade", "acme"], true)?;
    note(&["stanza", "fence", "acme", "--reason", "a trial"], true)?;
    note(&["unhold", "acme", &id], true)?;
    // What fails says so in an object of its own.
    note(
        &["restore", "--backup", "none", "acme", "--to", &to, "--progress", "none"],
        false,
    )?;
    compare("tests/snapshots/json.txt", &text)
}

/// What a command that succeeds prints as JSON, as the snapshots have it.
fn members(s: &Fixture, arguments: &[&str]) -> Result<String> {
    let all = [arguments, &["--output", "json"]].concat();
    let out = output(&mut s.command(&all))?;
    let said = fairvault_tests::text(&out);
    ensure!(out.status.success(), "{arguments:?}: {said}");
    let printed = String::from_utf8_lossy(&out.stdout);
    let line = printed.lines().rfind(|line| line.starts_with('{')).context(said)?;
    let verb: Vec<&str> = arguments.iter().take_while(|word| **word != "acme").copied().collect();
    let shape = shape(&serde_json::from_str(line)?);
    Ok(format!("\n## {}\n{shape}", verb.join(" ")))
}

/// What the JSON lines have in common that a command writes to standard error, whatever comes of it.
fn told(s: &Fixture, what: &str, arguments: &[&str]) -> Result<String> {
    let out = output(&mut s.command(arguments))?;
    let said = String::from_utf8_lossy(&out.stderr);
    let mut shapes = BTreeSet::new();
    for line in said.lines().filter(|line| line.starts_with('{')) {
        shapes.insert(shape(&serde_json::from_str(line)?));
    }
    ensure!(shapes.len() == 1, "{arguments:?}: {shapes:?}\n{said}");
    Ok(format!("\n## {what}\n{}", shapes.into_iter().collect::<String>()))
}

#[test]
fn the_members_about_copies_locks_and_the_end_are_the_documented_ones() -> Result<()> {
    let quiet = ["--progress", "none"];
    let mut text = String::from("The members of more JSON objects that commands print, and of what types they are.\n");

    // Two repositories; the second keeps one full backup, so that one is left out.
    let shape = Shape {
        stanza: false,
        ..Default::default()
    };
    let s = Fixture::new("jsoncopy", shape)?;
    let dir = s.path("").trim_end_matches('/').to_owned();
    let configuration = format!(
        "cache = \"{dir}/cache\"\n[repo.main]\nurl = \"file://{dir}/vault\"\n[repo.second]\nurl = \"file://{dir}/second\"\n\
         [defaults]\nrepos = [\"main\", \"second\"]\n[stanza.acme]\nconninfo = \"host={dir} port=5432 user=postgres\"\n\
         key = {{ file = \"{dir}/key\" }}\nrepo_retention.second = {{ full = 1 }}\n"
    );
    s.scratch.write("fairvault.toml", configuration.as_bytes())?;
    s.ok(&["stanza", "create", "acme"])?;
    s.backup_id(&["--type", "full"])?;
    s.backup_id(&["--type", "full"])?;
    text += &members(&s, &[&["copy", "--dry-run", "acme"], &quiet[..]].concat())?;
    text += &members(&s, &[&["copy", "acme"], &quiet[..]].concat())?;

    // Lines about what goes on.
    let main = ["--repo", "main"];
    text += &told(
        &s,
        "--progress json",
        &[&main, &["verify", "acme", "--progress", "json"][..]].concat(),
    )?;
    // A time before every backup: it is told how it was understood, and why that cannot be reached.
    let to = s.path("nowhere");
    let long_ago = ["--target-time", "2020-01-01T00:00:00Z"];
    let restore = ["--log-format", "json", "restore", "acme", "--dry-run", "--to", &to];
    text += &told(&s, "--log-format json", &[&restore, &long_ago[..]].concat())?;

    // A bucket that can lock objects.
    let shape = Shape {
        stanza: false,
        ..Default::default()
    };
    let mut locked = Fixture::new("jsonlock", shape)?;
    let s3 = S3::start(&locked.scratch, "other")?;
    let lock = "x-amz-bucket-object-lock-enabled: true";
    s3.curl(&["-fsS", "-X", "PUT", "-H", lock, &format!("{}/locked", s3.endpoint())])?;
    locked.use_s3(&s3.endpoint(), "s3://locked/some/prefix", "retention = { full = 1 }")?;
    locked.ok(&["stanza", "create", "acme"])?;
    let to_lock = [&["lock", "acme", "--days", "1"], &quiet[..]].concat();
    text += &members(&locked, &to_lock)?;
    // What has expired is still locked there.
    locked.backup_id(&["--type", "full"])?;
    locked.ok(&to_lock)?;
    locked.backup_id(&["--type", "full"])?;
    locked.ok(&["expire", "acme"])?;
    text += &members(&locked, &[&["gc", "acme", "--patience", "1s"], &quiet[..]].concat())?;

    // Keys, and the end of it.
    let new_key = s.path("another.key");
    text += &members(&s, &["key", "generate", &new_key])?.replace(&new_key, "FILE");
    text += &members(&s, &["key", "add-slot", "acme", "other", "--secret-file", &new_key])?;
    text += &members(&s, &["key", "remove-slot", "acme", "other"])?;
    let kit = s.path("kit");
    text += &members(&s, &["key", "export", "acme", &kit])?;
    let slots = s.objects("keys");
    std::fs::rename(slots.first().context("a slot")?, s.path("slot.lost"))?;
    text += &members(&s, &["key", "import", "acme", &kit])?;
    text += &members(&s, &["key", "erase", "acme", "--confirm", "acme"])?;
    compare("tests/snapshots/json-copy-lock-erase.txt", &text)
}

/// What says that something is wrong has members that nothing has where all is well.
#[test]
fn the_members_about_damage_are_the_documented_ones() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v1");
    let s = Fixture::of_repository("jsondamage", &folder, "")?;
    let mut text = String::from("The members of JSON objects that say what is wrong, and of what types they are.\n");
    let mut note = |arguments: &[&str], exit: i32| -> Result<()> {
        let all = [arguments, &["--output", "json"]].concat();
        let out = output(&mut s.command(&all))?;
        let said = fairvault_tests::text(&out);
        ensure!(out.status.code() == Some(exit), "{arguments:?}: {said}");
        let printed = String::from_utf8_lossy(&out.stdout);
        let line = printed.lines().rfind(|line| line.starts_with('{')).context(said)?;
        let shape = shape(&serde_json::from_str(line)?);
        write!(text, "\n## {}\n{shape}", arguments.join(" "))?;
        Ok(())
    };
    let distrust = ["stanza", "distrust", "acme", "--parser", "1", "--reason", "a trial"];
    note(&distrust, 0)?;
    let mut packs = s.objects("packs");
    packs.sort_by_key(|pack| std::fs::metadata(pack).map_or(0, |meta| meta.len()));
    std::fs::remove_file(packs.last().context("a pack")?)?;
    std::fs::write(s.objects("index").first().context("a part of the index")?, b"rubbish")?;
    note(&["verify", "acme", "--progress", "none"], 4)?;
    note(&["repair", "acme", "--progress", "none"], 4)?;
    let next = s.objects("log").len() + 1;
    s.scratch.write(&format!("vault/acme/log/{next:020}"), b"no entry")?;
    let next = next.to_string();
    note(&["repair", "acme", "--drop-entry", &next, "--dry-run"], 0)?;
    let text = text.replace(&format!("--drop-entry {next}"), "--drop-entry N");
    compare("tests/snapshots/json-damage.txt", &text)
}
