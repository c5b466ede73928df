//! Stores as their providers speak: TLS with an authority of one's own, buckets as host names, server-side
//! encryption, and Google's store. In each, a backup is taken, verified and restored by the binary.

use std::process::Command;

use anyhow::{Result, ensure};
use fairvault_tests::proxy::{Proxy, Target};
use fairvault_tests::s3::S3;
use fairvault_tests::{Fixture, Shape, code};

struct Setup {
    s: Fixture,
    s3: S3,
}

impl Setup {
    fn new(name: &str, tls: bool) -> Result<Self> {
        let s = Fixture::new(
            name,
            Shape {
                stanza: false,
                ..Default::default()
            },
        )?;
        s.sql("create table t as select generate_series(1, 1000) as x")?;
        s.scratch.write("s3.secret", b"test")?;
        let s3 = match tls {
            true => S3::start_tls(&s.scratch, "bucket")?,
            false => S3::start(&s.scratch, "bucket")?,
        };
        Ok(Self { s, s3 })
    }

    /// fairvault with this repository and these variables.
    fn command(&self, repo: &str, variables: &[String], arguments: &[&str]) -> Result<Command> {
        let dir = self.s.scratch.path().display().to_string();
        let text = format!(
            "cache = \"{dir}/cache\"\n[repo.main]\n{repo}\nretry_timeout = \"5s\"\n\
             [stanza.acme]\nconninfo = \"{}\"\nkey = {{ file = \"{dir}/key\" }}\n",
            self.s.server.conninfo()
        );
        self.s.scratch.write("dialect.toml", text.as_bytes())?;
        let mut command = self.s.scratch.command("env");
        command
            .arg(format!("HOME={dir}"))
            .args(variables)
            .arg(self.s.scratch.join("fairvault"))
            .args(["--config", &format!("{dir}/dialect.toml")])
            .args(arguments);
        Ok(command)
    }

    /// The whole way there and back.
    fn there_and_back(&self, repo: &str, variables: &[String]) -> Result<()> {
        let to = self.s.path("r");
        let _ = std::fs::remove_dir_all(&to);
        let _ = std::fs::remove_dir_all(self.s.path("cache"));
        for arguments in [
            &["stanza", "create", "acme"][..],
            &["check", "acme"],
            &["backup", "acme", "--fast", "--progress", "none"],
            &["verify", "acme", "--level", "data", "--progress", "none"],
            &["restore", "acme", "--to", &to, "--progress", "none"],
        ] {
            let (exit, text) = code(&mut self.command(repo, variables, arguments)?);
            // `check` warns that nobody archives.
            let fine = exit == 0 || (arguments[0] == "check" && exit == 6);
            ensure!(fine, "{arguments:?} ended with {exit}: {text}");
        }
        let copy = self.s.copy("r", 5450);
        std::fs::write(copy.data.join("recovery.done"), "")?;
        let (exit, text) = code(&mut self.command(repo, variables, &["info", "acme"])?);
        ensure!(exit == 0 && text.contains("restorable on timeline 1"), "{text}");
        ensure!(copy.data.join("global/pg_control").exists());
        Ok(())
    }

    fn s3_repo(&self, prefix: &str, more: &str) -> String {
        format!(
            "url = \"s3://bucket/{prefix}\"\nregion = \"us-east-1\"\naccess_key = \"test\"\nsecret_key_file = \"{}\"\n{more}",
            self.s.path("s3.secret")
        )
    }
}

#[test]
fn tls_with_an_authority_of_ones_own_and_server_side_encryption() -> Result<()> {
    let setup = Setup::new("tls", true)?;
    let endpoint = format!("endpoint = \"{}\"", setup.s3.endpoint());
    let stranger = setup.s3_repo("stranger", &endpoint);
    let (exit, text) = code(&mut setup.command(&stranger, &[], &["stanza", "create", "acme"])?);
    ensure!(exit == 75 && text.contains("certificate"), "{exit} {text}");
    let ca = format!("{endpoint}\nca_file = \"{}\"", setup.s.path("ca.crt"));
    setup.there_and_back(&setup.s3_repo("plain", &ca), &[])?;
    let head = |prefix: &str| {
        let url = format!("{}/bucket/{prefix}/fairvault.json", setup.s3.endpoint());
        setup.s3.curl(&["-fsI", &url])
    };
    ensure!(!head("plain")?.to_lowercase().contains("aws:kms"));
    let kms = format!("{ca}\nserver_side_encryption = \"aws:kms\"\nkms_key = \"alias/own\"");
    setup.there_and_back(&setup.s3_repo("kms", &kms), &[])?;
    let headers = head("kms")?.to_lowercase();
    ensure!(
        headers.contains("x-amz-server-side-encryption: aws:kms") && headers.contains("alias/own"),
        "{headers}"
    );
    let aes = format!("{ca}\nserver_side_encryption = \"AES256\"");
    setup.there_and_back(&setup.s3_repo("aes", &aes), &[])?;
    ensure!(
        head("aes")?
            .to_lowercase()
            .contains("x-amz-server-side-encryption: aes256")
    );
    // Checksum headers, as buckets with object lock want them.
    setup.there_and_back(&setup.s3_repo("sums", &format!("{ca}\nchecksum = true")), &[])
}

#[test]
fn buckets_as_host_names() -> Result<()> {
    let setup = Setup::new("vhost", true)?;
    // No name server knows them: a proxy finds the way.
    let proxy = Proxy::start(Target::Tunnel(setup.s3.port))?;
    let repo = setup.s3_repo(
        "x",
        &format!(
            "endpoint = \"https://s3.localhost:{}\"\nvirtual_host = true\nca_file = \"{}\"",
            setup.s3.port,
            setup.s.path("ca.crt")
        ),
    );
    let variables = [format!("HTTPS_PROXY=http://127.0.0.1:{}", proxy.port)];
    setup.there_and_back(&repo, &variables)?;
    let asked = proxy.hosts();
    ensure!(
        !asked.is_empty() && asked.iter().all(|host| host.starts_with("bucket.s3.localhost:")),
        "{asked:?}"
    );
    Ok(())
}

#[test]
fn as_to_google() -> Result<()> {
    let setup = Setup::new("gcs", false)?;
    let proxy = Proxy::start(Target::Gcs(setup.s3.port))?;
    let endpoint = format!("http://127.0.0.1:{}", proxy.port);
    let account = format!(
        r#"{{"gcs_base_url":"{endpoint}","disable_oauth":true,"client_email":"","private_key":"","private_key_id":""}}"#
    );
    let variables = [format!("GOOGLE_SERVICE_ACCOUNT_KEY={account}")];
    setup.there_and_back(
        &format!("url = \"gs://bucket/x\"\nendpoint = \"{endpoint}\""),
        &variables,
    )
}
