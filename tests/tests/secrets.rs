//! What must stay secret is in nothing that this program says, writes or leaves, and others may not read its files.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairvault_tests::fixture::{SMALL, files};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Receiver, Scratch, Shape, code, run};

const S3_SECRET: &str = "the-canary-of-the-bucket";
const PASSWORD: &str = "the-canary-of-the-server";
const DELETER_SECRET: &str = "the-canary-of-the-deleter";
const KEEPER_SECRET: &str = "the-canary-of-the-keeper";
const PASSPHRASE: &str = "the canary that opens everything";

fn holds(content: &[u8], secret: &str) -> bool {
    content.windows(secret.len()).any(|part| part == secret.as_bytes())
}

#[test]
fn secrets_are_in_no_message_file_argument_or_entry() -> Result<()> {
    let shape = Shape { stanza: false, ..SMALL };
    let mut s = Fixture::new("canary", shape)?;
    let s3 = S3::start(&s.scratch, "bucket")?;
    let more = "wal = { flush_interval = \"200ms\" }";
    s.use_s3(&s3.endpoint(), "s3://bucket/x", more)?;
    s.scratch.write("s3.secret", S3_SECRET.as_bytes())?;
    s.scratch.write("deleter.secret", DELETER_SECRET.as_bytes())?;
    s.scratch.write("keeper.secret", KEEPER_SECRET.as_bytes())?;
    s.scratch.write("passphrase", format!("{PASSPHRASE}\n").as_bytes())?;
    let config = std::fs::read_to_string(s.scratch.join("s3.toml"))?;
    let config: Vec<String> = config
        .lines()
        .map(|line| match line {
            line if line.starts_with("secret_key") => format!(
                "secret_key_file = \"{}\"\ndeleter = {{ access_key = \"deleter\", secret_key_file = \"{}\" }}\n\
                 keeper = {{ access_key = \"keeper\", secret_key_file = \"{}\" }}",
                s.path("s3.secret"),
                s.path("deleter.secret"),
                s.path("keeper.secret")
            ),
            line if line.starts_with("conninfo") => {
                line.replace("user=postgres", &format!("user=postgres password={PASSWORD}"))
            }
            line => line.to_owned(),
        })
        .collect();
    let config = config.join("\n") + "\n";
    let says = |word: &str| config.contains(word);
    ensure!(
        says(PASSWORD) && says("s3.secret") && says("deleter.secret") && says("keeper.secret"),
        "{config}"
    );
    s.scratch.write("s3.toml", config.as_bytes())?;
    let key = std::fs::read_to_string(s.path("key"))?.trim().to_owned();
    let digits = key.rsplit(':').next().context("a key")?.to_owned();
    let secrets = [
        S3_SECRET,
        DELETER_SECRET,
        KEEPER_SECRET,
        PASSWORD,
        PASSPHRASE,
        digits.as_str(),
    ];
    let passphrase = s.path("passphrase");
    let mut said = String::new();
    let mut run = |arguments: &[&str]| {
        let (_, text) = s.fairvault(&[&["--log-level", "trace"], arguments].concat());
        said += &text;
        said += "\n";
    };
    run(&["stanza", "create", "acme"]);
    run(&["backup", "acme", "--fast", "--progress", "none"]);
    run(&["info", "acme"]);
    run(&["check", "acme"]);
    run(&["verify", "acme", "--progress", "none"]);
    run(&["audit", "acme", "--output", "json"]);
    run(&["key", "add-slot", "acme", "spare", "--secret-file", &passphrase]);
    run(&["key", "list", "acme"]);
    run(&["gc", "acme", "--patience", "1s", "--progress", "none"]);
    // The bucket locks nothing.
    run(&["lock", "acme", "--days", "1", "--progress", "none"]);
    // What a passphrase opens is kept, and the command that fetches WAL says where it is.
    let to = s.path("r");
    let by_passphrase = ["--passphrase-file", &passphrase];
    run(&[
        &["restore", "acme", "--to", &to, "--progress", "none"],
        &by_passphrase[..],
    ]
    .concat());
    ensure!(
        std::fs::read_to_string(s.scratch.join("r/postgresql.auto.conf"))?.contains(&passphrase),
        "the passphrase has opened nothing"
    );
    // Who listens at a process hears no secret either, nor does a core dump tell it.
    let receiver = Receiver::start(&s, &["--log-level", "trace"])?;
    let process = |file: &str| std::fs::read(format!("/proc/{}/{file}", receiver.pid()));
    let arguments = process("cmdline")?;
    let limits = String::from_utf8_lossy(&process("limits")?).into_owned();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap_or_default();
    ensure!(
        core.split_whitespace().nth(4) == Some("0") && core.split_whitespace().nth(5) == Some("0"),
        "{core}"
    );
    std::thread::sleep(Duration::from_secs(1));
    said += &receiver.stop()?;
    // What has failed is in the log, too, with why.
    said += &s.restore("r", &by_passphrase).1;
    let audit = s.ok(&["audit", "acme", "--output", "json"])?;
    ensure!(
        audit.contains("failed: ") && audit.contains("key slot spare added"),
        "{audit}"
    );
    said += &audit;
    // Failures say where and why, not with what.
    let wrong = config.replace("s3.secret", "missing.secret");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    let mut run = |arguments: &[&str]| said += &s.fairvault(&[&["--log-level", "trace"], arguments].concat()).1;
    run(&["info", "acme"]);
    run(&[&["info", "acme"], &by_passphrase[..]].concat());
    let wrong = config.replace("deleter.secret", "missing.secret");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    run(&["gc", "acme", "--progress", "none"]);
    let wrong = config.replace("keeper.secret", "missing-keeper.secret");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    run(&["lock", "acme", "--days", "1", "--progress", "none"]);
    // Whoever has a retention by age asks for locks before a backup.
    let kept = format!("{config}retention = {{ full = \"20d\" }}\n");
    s.scratch.write("s3.toml", kept.as_bytes())?;
    run(&["backup", "acme", "--fast", "--progress", "none"]);
    let wrong = config.replace(&s3.endpoint(), "http://127.0.0.1:1");
    let wrong = wrong.replace("retry_timeout = \"5s\"", "retry_timeout = \"1s\"");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    run(&["gc", "acme", "--progress", "none"]);
    run(&["lock", "acme", "--days", "1", "--progress", "none"]);
    let wrong = config.replace("port=5432", "port=5999");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    run(&["backup", "acme", "--progress", "none"]);
    run(&["check", "acme"]);
    let wrong = config.replace("s3://bucket/", "s3://nobucket/");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    run(&["backup", "acme", "--progress", "none"]);
    run(&["gc", "acme", "--progress", "none"]);
    run(&["lock", "acme", "--days", "1", "--progress", "none"]);
    let wrong = config.replace("[stanza.acme]", "[stanza.acme]\nnonsense = 1");
    s.scratch.write("s3.toml", wrong.as_bytes())?;
    run(&["info", "acme"]);
    let another = format!("fairvault-key-1:{}\n", "0123456789abcdef".repeat(4));
    s.scratch.write("key", another.as_bytes())?;
    s.scratch.write("s3.toml", config.as_bytes())?;
    run(&["info", "acme"]);
    ensure!(said.len() > 5_000, "{said}");
    ensure!(
        said.contains("missing-keeper.secret") && said.contains("onnection refused"),
        "the keeper was not asked for, or nobody was away: {said}"
    );
    for secret in secrets {
        if let Some(line) = said.lines().find(|line| line.contains(secret)) {
            anyhow::bail!("{secret} is in: {line}");
        }
        ensure!(!holds(&arguments, secret), "{secret} is in the arguments");
        // What it leaves: the cache, and the restored copy's settings.
        for folder in ["cache", "r"] {
            for path in files(&s.scratch.join(folder)) {
                ensure!(
                    !holds(&std::fs::read(&path)?, secret),
                    "{secret} is in {}",
                    path.display()
                );
            }
        }
    }
    Ok(())
}

/// What a command says that finds these variables in its environment.
fn said_with(scratch: &Scratch, environment: &[String], arguments: &[&str]) -> String {
    let mut command = scratch.command("env");
    command
        .arg(format!("HOME={}", scratch.path().display()))
        .args(environment)
        .arg(scratch.join("fairvault"))
        .args(["--config", "other.toml", "--log-level", "trace"])
        .args(arguments);
    code(&mut command).1
}

/// Azure and GCS, from the configuration or from variables: nobody listens where they are said to be.
#[test]
fn secrets_of_other_stores_are_in_no_message() -> Result<()> {
    // A key of an account is Base64: of "the canary of the account".
    const ACCOUNT_KEY: &str = "dGhlIGNhbmFyeSBvZiB0aGUgYWNjb3VudA==";
    const NO_KEY: &str = "the canary that is no key of an account";
    const WORD: &str = "the-canary-in-a-variable";
    let scratch = Scratch::new("others")?;
    run(&mut scratch.fairvault(&["key", "generate", "key"]))?;
    scratch.write("account.secret", ACCOUNT_KEY.as_bytes())?;
    scratch.write("wrong.secret", NO_KEY.as_bytes())?;
    run(scratch
        .command("openssl")
        .args("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out service.pem".split(' ')))?;
    let pem = std::fs::read_to_string(scratch.join("service.pem"))?;
    let line = |number: usize| pem.lines().nth(number).context("a private key");
    let service = |private_key: &str| {
        let account = serde_json::json!({
            "private_key": private_key, "private_key_id": "1", "client_email": "nobody@nowhere.invalid",
        });
        account.to_string()
    };
    scratch.write("service.json", service(&pem).as_bytes())?;

    let azure = "url = \"az://vault/x\"\nendpoint = \"http://127.0.0.1:1/account\"";
    let configured = |file: &str| {
        let secret = scratch.join(file);
        format!(
            "{azure}\naccess_key = \"account\"\nsecret_key_file = \"{}\"",
            secret.display()
        )
    };
    let google = "url = \"gs://vault/x\"\nendpoint = \"http://127.0.0.1:1\"";
    let of_account = |more: &[&str]| -> Vec<String> {
        let name = ["AZURE_STORAGE_ACCOUNT_NAME=account"];
        name.iter().chain(more).map(|&variable| variable.to_owned()).collect()
    };
    let secret = format!("AZURE_CLIENT_SECRET={WORD}");
    let client: [&str; 4] = [
        "AZURE_CLIENT_ID=client",
        "AZURE_TENANT_ID=tenant",
        "AZURE_AUTHORITY_HOST=http://127.0.0.1:1",
        secret.as_str(),
    ];
    let whole = service(&pem);
    let cut = whole.get(..300).context("a service account")?;
    let in_variable = |key: &str| vec![format!("GOOGLE_SERVICE_ACCOUNT_KEY={key}")];
    let away = "onnection refused";
    let cases: [(&str, String, Vec<String>, &str); 10] = [
        ("a key", configured("account.secret"), Vec::new(), away),
        ("no key", configured("wrong.secret"), Vec::new(), "is no Base64"),
        (
            "a key in a variable",
            azure.to_owned(),
            of_account(&[&format!("AZURE_STORAGE_ACCOUNT_KEY={ACCOUNT_KEY}")]),
            away,
        ),
        (
            "a signature",
            azure.to_owned(),
            of_account(&[&format!("AZURE_STORAGE_SAS_KEY=sv=2021-08-06&sp=rwl&sig={WORD}")]),
            away,
        ),
        (
            "a token",
            azure.to_owned(),
            of_account(&[&format!("AZURE_STORAGE_TOKEN={WORD}")]),
            away,
        ),
        ("a client's secret", azure.to_owned(), of_account(&client), away),
        ("a service account", google.to_owned(), in_variable(&whole), away),
        (
            "a service account's file",
            google.to_owned(),
            vec![format!(
                "GOOGLE_SERVICE_ACCOUNT={}",
                scratch.path().join("service.json").display()
            )],
            away,
        ),
        (
            "no private key",
            google.to_owned(),
            in_variable(&service(WORD)),
            "the GCS client cannot be made",
        ),
        (
            "half of a service account",
            google.to_owned(),
            in_variable(cut),
            "the GCS client cannot be made",
        ),
    ];
    let secrets = [
        ACCOUNT_KEY,
        "the canary of the account",
        NO_KEY,
        WORD,
        line(2)?,
        line(3)?,
    ];
    for (what, repository, environment, word) in cases {
        let dir = scratch.path().display();
        let config = format!(
            "cache = \"{dir}/cache\"\n[repo.main]\n{repository}\nretry_timeout = \"100ms\"\n\
             [stanza.acme]\nkey = {{ file = \"{dir}/key\" }}\n"
        );
        scratch.write("other.toml", config.as_bytes())?;
        for form in ["text", "json"] {
            let said = said_with(&scratch, &environment, &["info", "acme", "--output", form]);
            ensure!(said.contains(word), "{what}: {said}");
            for secret in secrets {
                ensure!(!said.contains(secret), "{what}: {secret} is in: {said}");
            }
        }
    }
    Ok(())
}

/// Everybody can read arguments, and a background worker gets those of the command that starts it.
#[test]
fn a_password_is_taken_from_no_argument() -> Result<()> {
    let shape = Shape {
        more: "wal = { async = true }",
        ..SMALL
    };
    let s = Fixture::new("argument", shape)?;
    let dir = s.path("");
    let dir = dir.trim_end_matches('/');
    let refuses = |option: &str, value: &str, arguments: &[&str], expected: i32| -> Result<()> {
        let (exit, text) = s.fairvault(&[arguments, &[option, value]].concat());
        ensure!(
            exit == expected && text.contains(&format!("{option} has a password")) && text.contains("PGPASSFILE"),
            "{arguments:?} {value}: {exit} {text}"
        );
        ensure!(!text.contains(PASSWORD), "the password is in: {text}");
        Ok(())
    };
    // One that a worker would be started for.
    let name = "000000010000000000000001";
    let ready = format!("data5432/pg_wal/archive_status/{name}.ready");
    s.scratch.write(&ready, b"")?;
    let segment = s.path(&format!("data5432/pg_wal/{name}"));
    let pairs = format!("host={dir} port=5432 user=postgres password={PASSWORD}");
    for value in [
        pairs,
        format!("postgresql://postgres:{PASSWORD}@localhost/postgres"),
        format!("postgresql://localhost/postgres?user=postgres&password={PASSWORD}"),
    ] {
        refuses("--conninfo", &value, &["check", "acme"], 2)?;
        refuses("--conninfo", &value, &["backup", "acme", "--progress", "none"], 2)?;
        refuses("--conninfo", &value, &["info", "acme"], 2)?;
        // What connects to no server goes on without: archiving does not end over that.
        let (exit, text) = s.fairvault(&["--conninfo", &value, "wal", "push", "acme", &segment]);
        ensure!(
            text.contains("--conninfo has a password") && text.contains(name),
            "{exit} {text}"
        );
        ensure!(!text.contains(PASSWORD), "the password is in: {text}");
        refuses("--standby", &value, &["wal", "receive", "acme"], 2)?;
    }
    for path in files(&s.scratch.join("cache")) {
        let name = path.display();
        ensure!(!holds(&std::fs::read(&path)?, PASSWORD), "the password is in {name}");
    }
    // From where it belongs it is taken: the server asks for none, and gets none.
    let config = std::fs::read_to_string(s.scratch.join("fairvault.toml"))?;
    let with = config.replace("user=postgres", &format!("user=postgres password={PASSWORD}"));
    ensure!(with != config);
    s.scratch.write("fairvault.toml", with.as_bytes())?;
    s.backup()?;
    let without = format!("host={dir} port=5432 user=postgres");
    s.backup_id(&["--conninfo", &without]).map(|_| ())
}

#[test]
fn what_is_made_is_for_its_owner_alone() -> Result<()> {
    let s = Fixture::new("modes", SMALL)?;
    s.sql("create table t (x int)")?;
    s.backup()?;
    let mode = |path: &std::path::Path| Ok::<_, anyhow::Error>(std::fs::metadata(path)?.permissions().mode() & 0o777);
    let spool = s.path("spool");
    let receiver = Receiver::start(&s, &["--spool", &spool])?;
    s.sql("insert into t values (1)")?;
    std::thread::sleep(Duration::from_secs(1));
    receiver.stop()?;
    let made = s.scratch.join("made.key");
    s.ok(&["key", "generate", &made.display().to_string()])?;
    let exported = s.scratch.join("exported.key");
    s.ok(&["key", "export", "acme", &exported.display().to_string()])?;
    let (exit, text) = s.restore("r", &[]);
    ensure!(exit == 0, "{text}");
    for file in [made, exported] {
        ensure!(mode(&file)? & 0o177 == 0, "{:o}", mode(&file)?);
    }
    for folder in ["vault", "spool", "cache", "r"] {
        ensure!(
            mode(&s.scratch.join(folder))? & 0o077 == 0,
            "{folder}: {:o}",
            mode(&s.scratch.join(folder))?
        );
    }
    for path in files(&s.scratch.join("spool")) {
        ensure!(mode(&path)? & 0o177 == 0, "{}: {:o}", path.display(), mode(&path)?);
    }
    Ok(())
}

/// Nobody else reads what commands leave in the cache, whichever of them makes its folder, also where a umask forbids nothing.
#[test]
fn what_the_cache_keeps_is_for_its_owner_alone() -> Result<()> {
    let s = Fixture::new("keptmodes", Shape { stanza: false, ..SMALL })?;
    let dir = s.path("");
    let dir = dir.trim_end_matches('/');
    let config = format!(
        "[repo.main]\nurl = \"file://{dir}/vault\"\nsingle_writer = true\n\
         [repo.gone]\nurl = \"file://{dir}/nowhere\"\noptional = true\n\
         [defaults]\nrepos = [\"main\", \"gone\"]\n\
         [stanza.acme]\nconninfo = \"host={dir} port=5432 user=postgres\"\nkey = {{ file = \"{dir}/key\" }}\n"
    );
    s.scratch.write("fairvault.toml", config.as_bytes())?;
    let into = |cache: &str, arguments: &[&str]| -> Result<()> {
        let mut command = s.scratch.command("sh");
        command
            .args(["-c", "umask 0; exec \"$@\"", "sh"])
            .arg(s.scratch.join("fairvault"))
            .args(&s.options)
            .args(["--cache", &s.path(cache)]);
        run(command.args(arguments)).map(drop)
    };
    into("first", &["--repo", "main", "stanza", "create", "acme"])?;
    let segment = s.sql("select pg_walfile_name(pg_current_wal_lsn())")?;
    s.sql("create table t (x int); select pg_switch_wal()")?;
    let path = s.path(&format!("data5432/pg_wal/{segment}"));
    into("second", &["wal", "push", "acme", &path])?;
    let next = s.objects("log").len() + 1;
    s.scratch.write(&format!("vault/acme/log/{next:020}"), b"no entry")?;
    let number = next.to_string();
    let drops = [
        "--repo",
        "main",
        "repair",
        "acme",
        "--progress",
        "none",
        "--drop-entry",
        &number,
    ];
    into("third", &drops)?;
    // By a background worker.
    let ready = format!("data5432/pg_wal/archive_status/{segment}.ready");
    s.scratch.write(&ready, b"")?;
    let asynchronous = format!("{config}wal = {{ async = true }}\n");
    s.scratch.write("fairvault.toml", asynchronous.as_bytes())?;
    into("fourth", &["wal", "push", "acme", &path])?;

    for (cache, end) in [
        ("first", "single-writer.lock"),
        ("second", "away-gone"),
        ("third", ".dropped"),
        ("fourth", "worker.log"),
    ] {
        let all = files(&s.scratch.join(cache));
        let is_there = all.iter().any(|path| path.to_string_lossy().ends_with(end));
        ensure!(is_there, "no {end} in {all:?}");
        for path in &all {
            // The worker takes away what nobody needs any more.
            let Ok(meta) = std::fs::metadata(path) else { continue };
            let mode = meta.permissions().mode();
            ensure!(mode & 0o177 == 0, "{}: {mode:o}", path.display());
            // The folders above it, up to the cache itself.
            for folder in path
                .ancestors()
                .skip(1)
                .take_while(|folder| *folder != s.scratch.path())
            {
                let mode = std::fs::metadata(folder)?.permissions().mode();
                ensure!(mode & 0o077 == 0, "{}: {mode:o}", folder.display());
            }
        }
    }
    Ok(())
}
