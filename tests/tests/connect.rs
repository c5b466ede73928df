//! Ways to reach a server: sockets and TCP, TLS with every sslmode, every password method, several hosts.

use std::process::Command;

use anyhow::{Result, ensure};
use fairvault_tests::s3::free_port;
use fairvault_tests::{Scratch, Server, code, run};

struct Setup {
    scratch: Scratch,
    server: Server,
    tcp: u16,
}

impl Setup {
    fn new(name: &str) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let dir = scratch.path().display().to_string();
        run(&mut scratch.fairvault(&["key", "generate", &format!("{dir}/key")]))?;
        // A certificate authority and a server certificate for "localhost", and one for a client.
        let openssl = |arguments: &str| run(scratch.command("openssl").args(arguments.split(' ')));
        openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt")?;
        scratch.write("san", b"subjectAltName=DNS:localhost\n")?;
        openssl("req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr")?;
        openssl(
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -sha384 -extfile san -out server.crt",
        )?;
        openssl("req -newkey rsa:2048 -nodes -subj /CN=certuser -keyout client.key -out client.csr")?;
        openssl(
            "x509 -req -in client.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile san -out client.crt",
        )?;
        let tcp = free_port()?;
        let settings = format!(
            "ssl = on\nssl_cert_file = '{dir}/server.crt'\nssl_key_file = '{dir}/server.key'\nssl_ca_file = '{dir}/ca.crt'\n"
        );
        let server = Server::create(&scratch, 15, tcp, &settings)?;
        for (user, method) in [("scram", "scram-sha-256"), ("md5user", "md5")] {
            server.sql(
                &scratch,
                &format!("set password_encryption = '{method}'; create role {user} replication login password 'p:w'"),
            )?;
        }
        server.sql(&scratch, "create role certuser replication login")?;
        let hba = "local all,replication postgres trust\nhostssl replication certuser localhost cert\n\
                   host replication scram localhost scram-sha-256\nhost replication md5user localhost md5\n";
        scratch.write(&format!("data{tcp}/pg_hba.conf"), hba.as_bytes())?;
        server.stop(&scratch, "fast")?;
        let conf = server.data.join("postgresql.auto.conf");
        std::fs::write(&conf, "")?;
        let mut start = server.program(&scratch, "pg_ctl");
        start
            .arg("-D")
            .arg(&server.data)
            .args(["-w", "-l"])
            .arg(scratch.join("tcp.log"))
            .arg("-o");
        start
            .arg(format!("-p {tcp} -k {dir} -c listen_addresses=localhost"))
            .arg("start");
        start
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        ensure!(
            start.status()?.success(),
            "{}",
            std::fs::read_to_string(scratch.join("tcp.log"))?
        );
        Ok(Self { scratch, server, tcp })
    }

    /// `stanza create` over a connection: exit code and output. Each attempt has its own repository.
    fn connect(&self, conninfo: &str, variables: &[&str]) -> (i32, String) {
        let dir = self.scratch.path().display();
        for folder in ["vault", ".cache"] {
            let _ = std::fs::remove_dir_all(self.scratch.join(folder));
        }
        let mut command: Command = self.scratch.command("env");
        command
            .arg(format!("HOME={dir}"))
            .args(variables)
            .arg(self.scratch.join("fairvault"));
        command.args([
            "--repo-url",
            &format!("file://{dir}/vault"),
            "--key-file",
            &format!("{dir}/key"),
        ]);
        code(command.args(["--conninfo", conninfo, "stanza", "create", "acme"]))
    }
}

#[test]
fn passwords_tls_and_hosts() -> Result<()> {
    let s = Setup::new("connect")?;
    let dir = s.scratch.path().display().to_string();
    let port = s.tcp;
    let good = |conninfo: &str, variables: &[&str]| -> Result<()> {
        let (exit, text) = s.connect(conninfo, variables);
        ensure!(exit == 0, "{conninfo}: {exit} {text}");
        Ok(())
    };
    let bad = |conninfo: &str, variables: &[&str], word: &str| -> Result<()> {
        let (exit, text) = s.connect(conninfo, variables);
        ensure!(
            exit != 0 && text.contains(word),
            "{conninfo}: expected {word:?}, got {exit} {text}"
        );
        ensure!(!text.contains("p:w"), "a password in an error");
        Ok(())
    };
    good(&format!("host={dir} port={port} user=postgres"), &[])?;
    good("user=postgres", &[&format!("PGHOST={dir}"), &format!("PGPORT={port}")])?;
    let scram = format!("host=localhost port={port} user=scram");
    good(&scram, &["PGPASSWORD=p:w"])?;
    bad(&scram, &["PGPASSWORD=wrong"], "password authentication failed")?;
    bad(&scram, &[], "asks for a password")?;
    for (mode, extra) in [
        ("disable", ""),
        ("require", ""),
        ("verify-ca", "root"),
        ("verify-full", "root"),
    ] {
        let root = if extra.is_empty() {
            String::new()
        } else {
            format!(" sslrootcert={dir}/ca.crt")
        };
        good(&format!("{scram} sslmode={mode}{root}"), &["PGPASSWORD=p:w"])?;
    }
    // SCRAM bound to the channel, with a certificate whose signature uses SHA-384.
    good(
        &format!("{scram} sslmode=require channel_binding=require"),
        &["PGPASSWORD=p:w"],
    )?;
    bad(
        &format!("{scram} sslmode=disable channel_binding=require"),
        &["PGPASSWORD=p:w"],
        "channel_binding",
    )?;
    good(
        &format!("{scram} sslmode=require channel_binding=disable"),
        &["PGPASSWORD=p:w"],
    )?;
    good(
        &format!("host=localhost port={port} user=md5user sslmode=disable"),
        &["PGPASSWORD=p:w"],
    )?;
    // The name is not in the certificate; the authority is another one.
    bad(
        &format!("host=127.0.0.1 port={port} user=scram sslmode=verify-full sslrootcert={dir}/ca.crt"),
        &["PGPASSWORD=p:w"],
        "TLS",
    )?;
    bad(
        &format!("{scram} sslmode=verify-full sslrootcert={dir}/client.crt"),
        &["PGPASSWORD=p:w"],
        "TLS",
    )?;
    bad(
        &format!("{scram} sslmode=verify-full"),
        &["PGPASSWORD=p:w"],
        "sslrootcert",
    )?;
    let cert = format!("host=localhost port={port} user=certuser sslmode=verify-full sslrootcert={dir}/ca.crt");
    good(&format!("{cert} sslcert={dir}/client.crt sslkey={dir}/client.key"), &[])?;
    ensure!(s.connect(&cert, &[]).0 != 0, "without a client certificate");
    // .pgpass and service files.
    s.scratch
        .write(".pgpass", format!("localhost:{port}:*:scram:p\\:w\n").as_bytes())?;
    good(&scram, &[])?;
    s.scratch.write(
        ".pg_service.conf",
        format!("[main]\nhost=localhost\nport={port}\nuser=scram\n").as_bytes(),
    )?;
    good("service=main", &[])?;
    bad("service=other", &[], "no service file")?;
    // Several hosts: the first is not there, then the kind of server is wrong.
    good(
        &format!("host=/nonexistent,{dir} port={port} user=postgres target_session_attrs=primary"),
        &[],
    )?;
    bad(
        &format!("host={dir} port={port} user=postgres target_session_attrs=standby"),
        &[],
        "target_session_attrs",
    )?;
    let local = format!("host={dir} port={port} user=postgres");
    for attrs in ["any", "read-write", "primary", "prefer-standby"] {
        good(&format!("{local} target_session_attrs={attrs}"), &[])?;
    }
    for attrs in ["read-only", "standby"] {
        bad(
            &format!("{local} target_session_attrs={attrs}"),
            &[],
            "target_session_attrs",
        )?;
    }
    // The server says by itself that its transactions only read.
    s.server
        .sql(&s.scratch, "alter system set default_transaction_read_only = on")?;
    s.server.sql(&s.scratch, "select pg_reload_conf(), pg_sleep(0.5)")?;
    for attrs in ["read-only", "any", "primary", "prefer-standby"] {
        good(&format!("{local} target_session_attrs={attrs}"), &[])?;
    }
    for attrs in ["read-write", "standby"] {
        bad(
            &format!("{local} target_session_attrs={attrs}"),
            &[],
            "target_session_attrs",
        )?;
    }
    s.server.stop(&s.scratch, "fast")?;
    let (exit, text) = s.connect(&scram, &["PGPASSWORD=p:w"]);
    ensure!(exit == 75, "{exit} {text}");
    Ok(())
}
