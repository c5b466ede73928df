//! Connection strings as libpq understands them: `key=value` pairs or URIs, completed from a service file,
//! the `PG*` variables, `.pgpass` and defaults, in libpq's order (manual: "Database Connection Control
//! Functions").

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use zeroize::Zeroizing;

use super::keepalive::Keepalive;
use super::passfile;
use crate::error::{Error, Result};

/// One address to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Host name, or a folder with a Unix socket.
    pub name: String,
    /// Address to connect to instead of resolving the name.
    pub address: Option<String>,
    /// Port.
    pub port: u16,
}

impl Host {
    /// Whether it is a Unix socket's folder.
    pub fn is_socket(&self) -> bool {
        self.name.starts_with('/') || self.name.starts_with('@')
    }
}

/// How much TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only if the server insists.
    Allow,
    /// If the server offers it.
    Prefer,
    /// Always; the certificate is not checked (unless a root certificate file is there).
    Require,
    /// Always; the chain is checked.
    VerifyCa,
    /// Always; chain and host name are checked.
    VerifyFull,
}

/// Which servers are acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionAttrs {
    /// Any.
    Any,
    /// One that accepts writes.
    ReadWrite,
    /// One that does not.
    ReadOnly,
    /// Not in recovery.
    Primary,
    /// In recovery.
    Standby,
    /// A standby if there is one.
    PreferStandby,
}

/// Everything needed to connect.
#[derive(Clone)]
pub struct ConnInfo {
    /// Addresses in the order of trying.
    pub hosts: Vec<Host>,
    /// User.
    pub user: String,
    /// Database.
    pub database: String,
    /// Password from conninfo or PGPASSWORD.
    pub password: Option<Zeroizing<String>>,
    /// Password file.
    pub passfile: Option<PathBuf>,
    /// TLS.
    pub sslmode: SslMode,
    /// Root certificates; `system` for the machine's.
    pub sslrootcert: Option<String>,
    /// Client certificate.
    pub sslcert: Option<PathBuf>,
    /// Its key.
    pub sslkey: Option<PathBuf>,
    /// Channel binding must be used.
    pub require_channel_binding: bool,
    /// Channel binding must not be used.
    pub disable_channel_binding: bool,
    /// Which servers are acceptable.
    pub session_attrs: SessionAttrs,
    /// For each address.
    pub connect_timeout: Option<Duration>,
    /// How a dead peer is noticed.
    pub keepalive: Keepalive,
    /// application_name.
    pub application_name: String,
    /// `options`: settings of the session.
    pub options: Option<String>,
    /// No connection for replication is tried where an ordinary one will do: the server was found to allow none.
    pub ordinary_only: bool,
}

impl std::fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "ConnInfo {{ hosts: {:?}, user: {:?}, database: {:?} }}",
            self.hosts, self.user, self.database
        )
    }
}

/// Keys that libpq knows and that have no effect here.
const IGNORED: &[&str] = &[
    "fallback_application_name",
    "gssencmode",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "sslcompression",
    "sslsni",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "client_encoding",
    "replication",
    "load_balance_hosts",
    "sslnegotiation",
    "sslcertmode",
    "min_protocol_version",
    "max_protocol_version",
    "servicefile",
];
const KNOWN: &[&str] = &[
    "host",
    "hostaddr",
    "port",
    "user",
    "dbname",
    "password",
    "passfile",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "channel_binding",
    "target_session_attrs",
    "connect_timeout",
    "application_name",
    "options",
    "service",
    "requirepeer",
    "sslpassword",
    "sslcrl",
    "sslcrldir",
    "require_auth",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
];
/// Keys that would weaken what the user asked for if they were passed over.
const REFUSED: &[&str] = &["requirepeer", "sslpassword", "sslcrl", "sslcrldir", "require_auth"];

const VARIABLES: &[(&str, &str)] = &[
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("user", "PGUSER"),
    ("dbname", "PGDATABASE"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("application_name", "PGAPPNAME"),
    ("options", "PGOPTIONS"),
    ("service", "PGSERVICE"),
    ("requirepeer", "PGREQUIREPEER"),
    ("require_auth", "PGREQUIREAUTH"),
];

impl ConnInfo {
    /// Parses `text` and completes it from the process's environment.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_with(text, &|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    /// The same with another environment.
    pub fn parse_with(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut values = values_of(text)?;
        if let Some(service) = values.get("service").cloned().or_else(|| env("PGSERVICE")) {
            for (key, value) in service_values(&service, env)? {
                values.entry(key).or_insert(value);
            }
        }
        for (key, variable) in VARIABLES {
            if !values.contains_key(*key)
                && let Some(value) = env(variable)
            {
                values.insert((*key).to_owned(), value);
            }
        }
        for key in values.keys() {
            if REFUSED.contains(&key.as_str()) {
                return Err(Error::usage(format!(
                    "conninfo: {key} is not supported, and leaving it out would weaken the connection"
                )));
            }
            if !KNOWN.contains(&key.as_str()) && !IGNORED.contains(&key.as_str()) {
                return Err(Error::usage(format!("conninfo: {key:?} is not a connection parameter")));
            }
        }
        Self::from_values(values, env)
    }

    fn from_values(mut values: BTreeMap<String, String>, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        // Taken, and not copied: the rest is not wiped.
        let password = values.remove("password").map(Zeroizing::new);
        let get = |key: &str| values.get(key).filter(|v| !v.is_empty()).cloned();
        let home = env("HOME").map(PathBuf::from);
        let in_home = |file: &str| {
            home.as_ref()
                .map(|h| h.join(".postgresql").join(file))
                .filter(|p| p.is_file())
        };
        let user = get("user")
            .or_else(|| env("USER"))
            .or_else(|| env("LOGNAME"))
            .unwrap_or_else(|| "postgres".to_owned());
        let sslrootcert = get("sslrootcert").or_else(|| in_home("root.crt").map(|p| p.to_string_lossy().into_owned()));
        let sslmode = match get("sslmode").as_deref() {
            None if sslrootcert.as_deref() == Some("system") => SslMode::VerifyFull,
            None | Some("prefer") => SslMode::Prefer,
            Some("disable") => SslMode::Disable,
            Some("allow") => SslMode::Allow,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            Some(other) => {
                return Err(bad_value(
                    "sslmode",
                    other,
                    "disable, allow, prefer, require, verify-ca or verify-full",
                ));
            }
        };
        let session_attrs = match get("target_session_attrs").as_deref() {
            None | Some("any") => SessionAttrs::Any,
            Some("read-write") => SessionAttrs::ReadWrite,
            Some("read-only") => SessionAttrs::ReadOnly,
            Some("primary") => SessionAttrs::Primary,
            Some("standby") => SessionAttrs::Standby,
            Some("prefer-standby") => SessionAttrs::PreferStandby,
            Some(other) => {
                return Err(bad_value(
                    "target_session_attrs",
                    other,
                    "any, read-write, read-only, primary, standby or prefer-standby",
                ));
            }
        };
        let connect_timeout = match get("connect_timeout") {
            None => None,
            Some(text) => match text.trim().parse::<i64>() {
                Ok(seconds) if seconds <= 0 => None,
                Ok(seconds) => Some(Duration::from_secs(seconds.max(2).unsigned_abs())),
                Err(_) => return Err(bad_value("connect_timeout", &text, "seconds")),
            },
        };
        let binding = get("channel_binding");
        if let Some(other) = binding
            .as_deref()
            .filter(|b| !["disable", "prefer", "require"].contains(b))
        {
            return Err(bad_value("channel_binding", other, "disable, prefer or require"));
        }
        Ok(Self {
            hosts: hosts(get("host"), get("hostaddr"), get("port"))?,
            database: get("dbname").unwrap_or_else(|| user.clone()),
            user,
            password: password.filter(|password| !password.is_empty()),
            passfile: get("passfile")
                .map(PathBuf::from)
                .or_else(|| home.as_ref().map(|h| h.join(".pgpass"))),
            sslmode,
            sslrootcert,
            sslcert: get("sslcert").map(PathBuf::from).or_else(|| in_home("postgresql.crt")),
            sslkey: get("sslkey").map(PathBuf::from).or_else(|| in_home("postgresql.key")),
            require_channel_binding: binding.as_deref() == Some("require"),
            disable_channel_binding: binding.as_deref() == Some("disable"),
            session_attrs,
            connect_timeout,
            keepalive: Keepalive::parse(&get)?,
            application_name: get("application_name").unwrap_or_else(|| "fairvault".to_owned()),
            options: get("options"),
            ordinary_only: false,
        })
    }

    /// The password for `host`: from conninfo, else from the password file.
    pub fn password_for(&self, host: &Host, database: &str) -> Option<Zeroizing<String>> {
        if self.password.is_some() {
            return self.password.clone();
        }
        let path = self.passfile.as_ref()?;
        if !passfile::is_private(path) {
            tracing::warn!(
                "password file {} is readable by others and therefore not used",
                path.display()
            );
            return None;
        }
        let text = Zeroizing::new(std::fs::read_to_string(path).ok()?);
        let name = if host.is_socket() { "localhost" } else { &host.name };
        passfile::lookup(&text, &[name, &host.port.to_string(), database, &self.user])
    }
}

/// Whether a connection string itself, without what the environment adds, has a password or that of a key. An error if it
/// cannot be read.
pub fn has_password(text: &str) -> Result<bool> {
    let mut values = values_of(text)?;
    let secrets = ["password", "sslpassword"].map(|key| values.remove(key).map(Zeroizing::new));
    Ok(secrets.into_iter().flatten().any(|secret| !secret.is_empty()))
}

/// What a connection string says, as it stands there.
fn values_of(text: &str) -> Result<BTreeMap<String, String>> {
    match text.starts_with("postgresql://") || text.starts_with("postgres://") {
        true => parse_uri(text),
        false => parse_pairs(text),
    }
}

fn bad_value(key: &str, value: &str, expected: &str) -> Error {
    Error::usage(format!("conninfo: {key}={value:?} is not valid; expected {expected}"))
}

fn hosts(host: Option<String>, hostaddr: Option<String>, port: Option<String>) -> Result<Vec<Host>> {
    let names: Vec<String> = match (&host, &hostaddr) {
        (Some(host), _) => host.split(',').map(str::to_owned).collect(),
        (None, Some(address)) => address.split(',').map(str::to_owned).collect(),
        (None, None) => vec![default_socket_folder()],
    };
    let addresses: Vec<&str> = hostaddr.as_deref().map(|a| a.split(',').collect()).unwrap_or_default();
    if !addresses.is_empty() && addresses.len() != names.len() {
        return Err(Error::usage(
            "conninfo: host and hostaddr have a different number of entries",
        ));
    }
    let port = port.unwrap_or_else(|| "5432".to_owned());
    let ports: Vec<&str> = port.split(',').collect();
    if ports.len() != 1 && ports.len() != names.len() {
        return Err(Error::usage(
            "conninfo: host and port have a different number of entries",
        ));
    }
    names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let port = ports[if ports.len() == 1 { 0 } else { i }];
            let port = if port.is_empty() { "5432" } else { port };
            Ok(Host {
                name: if name.is_empty() {
                    default_socket_folder()
                } else {
                    name.clone()
                },
                address: addresses.get(i).filter(|a| !a.is_empty()).map(|a| (*a).to_owned()),
                port: port
                    .trim()
                    .parse()
                    .map_err(|_| bad_value("port", port, "a number from 1 to 65535"))?,
            })
        })
        .collect()
}

fn default_socket_folder() -> String {
    ["/var/run/postgresql", "/run/postgresql"]
        .into_iter()
        .find(|p| Path::new(p).is_dir())
        .unwrap_or("/tmp")
        .to_owned()
}

fn parse_pairs(text: &str) -> Result<BTreeMap<String, String>> {
    let mut values = BTreeMap::new();
    let mut chars = text.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(values);
        }
        let mut key = String::new();
        while let Some(c) = chars.next_if(|&c| c != '=' && !c.is_whitespace()) {
            key.push(c);
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        if chars.next() != Some('=') {
            // It may be the rest of a password with a space in it.
            let shown = match values.contains_key("password") || values.contains_key("sslpassword") {
                true => "a word after the password".to_owned(),
                false => format!("{key:?}"),
            };
            return Err(Error::usage(format!("conninfo: {shown} is not followed by ="))
                .remedy("write key=value pairs, such as host=/run/postgresql user=backup, or a postgresql:// URI"));
        }
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        // One that grows leaves parts of itself behind.
        let mut value = String::with_capacity(text.len());
        let quoted = chars.next_if_eq(&'\'').is_some();
        loop {
            match chars.next_if(|&c| quoted || !c.is_whitespace()) {
                None if quoted => return Err(Error::usage(format!("conninfo: the quote of {key} is not closed"))),
                None => break,
                Some('\'') if quoted => break,
                Some('\\') => value.extend(chars.next()),
                Some(c) => value.push(c),
            }
        }
        values.insert(key, value);
    }
}

fn parse_uri(text: &str) -> Result<BTreeMap<String, String>> {
    let bad = |why: &str| {
        Error::usage(format!("conninfo URI: {why}")).remedy("postgresql://user@host:port/database?key=value")
    };
    let (_, rest) = text.split_once("://").ok_or_else(|| bad("no scheme"))?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    // Or a part of the password would be taken for a port, and shown.
    if login.is_empty() && database.contains('@') {
        return Err(bad(
            "a / in a user or a password is written %2F, an @ in a database %40",
        ));
    }
    let mut values = BTreeMap::new();
    let mut put = |key: &str, value: &str| -> Result<()> {
        if !value.is_empty() {
            values.insert(
                key.to_owned(),
                decode_percent(value).ok_or_else(|| bad("a wrong % escape"))?,
            );
        }
        Ok(())
    };
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    put("user", user)?;
    put("password", password)?;
    put("dbname", database)?;
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for host in hosts.split(',').filter(|h| !h.is_empty()) {
        let (name, port) = match host.strip_prefix('[') {
            Some(v6) => {
                let (name, rest) = v6.split_once(']').ok_or_else(|| bad("an unclosed ["))?;
                (name, rest.strip_prefix(':').unwrap_or(""))
            }
            None => host.rsplit_once(':').unwrap_or((host, "")),
        };
        names.push(name);
        ports.push(if port.is_empty() { "5432" } else { port });
    }
    put("host", &names.join(","))?;
    put("port", &ports.join(","))?;
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| bad("a parameter without ="))?;
        put(
            if key == "ssl" { "sslmode" } else { key },
            if key == "ssl" && value == "true" {
                "require"
            } else {
                value
            },
        )?;
    }
    Ok(values)
}

fn decode_percent(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let digits = [bytes.next()?, bytes.next()?];
            out.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

fn service_values(service: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Vec<(String, String)>> {
    let candidates = [
        env("PGSERVICEFILE").map(PathBuf::from),
        env("HOME").map(|h| PathBuf::from(h).join(".pg_service.conf")),
        env("PGSYSCONFDIR").map(|d| PathBuf::from(d).join("pg_service.conf")),
        Some(PathBuf::from("/etc/postgresql-common/pg_service.conf")),
    ];
    for path in candidates.into_iter().flatten() {
        let Ok(text) = std::fs::read_to_string(&path).map(Zeroizing::new) else {
            continue;
        };
        let mut inside = false;
        let mut found = Vec::new();
        let mut seen = false;
        for line in text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                inside = name == service;
                seen |= inside;
            } else if inside {
                let (key, value) = line
                    .split_once('=')
                    .ok_or_else(|| Error::usage(format!("{}: {line:?} is no key=value line", path.display())))?;
                found.push((key.trim().to_owned(), value.trim().to_owned()));
            }
        }
        if seen {
            return Ok(found);
        }
    }
    Err(Error::usage(format!(
        "conninfo: service {service:?} is in no service file"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn pairs_quotes_and_several_hosts() {
        let info = ConnInfo::parse_with(
            r"host=a,/run/pg port=5433,5434 user='o''' password='it\'s' dbname = x",
            &none,
        );
        assert!(info.is_err(), "a quote inside quotes must be escaped");
        let info = ConnInfo::parse_with(
            r"host=a,/run/pg port=5433,5434 user=u password='it\'s' dbname = x",
            &none,
        )
        .unwrap();
        assert_eq!(
            info.hosts[1],
            Host {
                name: "/run/pg".into(),
                address: None,
                port: 5434
            }
        );
        assert_eq!(info.password.as_ref().map(|p| p.as_str()), Some("it's"));
        assert_eq!(info.database, "x");
        for bad in [
            "host",
            "hots=a",
            "sslmode=maybe",
            "host=a,b port=1,2,3",
            "password='x",
            "port=99999",
            "sslcrl=x",
        ] {
            assert!(ConnInfo::parse_with(bad, &none).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_password_is_found_wherever_it_stands() {
        for text in [
            "password=x",
            "host=a password = 'x y'",
            "postgresql://u:x@h/db",
            "postgres://h/db?password=x",
            "sslkey=k sslpassword=x",
        ] {
            assert!(has_password(text).unwrap(), "{text}");
        }
        for text in [
            "",
            "host=a passfile=/x",
            "password=",
            "postgresql://u@h:1/db",
            "postgresql://u:@h/db",
            "user=password",
        ] {
            assert!(!has_password(text).unwrap(), "{text}");
        }
        // What cannot be read is no reason to tell a part of it.
        let error = has_password("host=a password=two words").unwrap_err().to_string();
        assert!(!error.contains("words"), "{error}");
    }

    #[test]
    fn uris_and_the_environment() {
        let env = |name: &str| (name == "PGPASSWORD").then(|| "secret".to_owned());
        let info = ConnInfo::parse_with(
            "postgresql://us%20er@h1:1,[::1]:2/db?sslmode=verify-full&target_session_attrs=standby",
            &env,
        )
        .unwrap();
        assert_eq!(info.user, "us er");
        assert_eq!(
            info.hosts.iter().map(|h| (h.name.as_str(), h.port)).collect::<Vec<_>>(),
            [("h1", 1), ("::1", 2)]
        );
        assert_eq!(
            (info.sslmode, info.session_attrs),
            (SslMode::VerifyFull, SessionAttrs::Standby)
        );
        assert_eq!(info.password.as_ref().map(|p| p.as_str()), Some("secret"));
        assert!(!format!("{info:?}").contains("secret"));
    }
}
