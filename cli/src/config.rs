//! The configuration file: TOML, unknown keys refused with the nearest known one, every value to be
//! overridden by a `FAIRVAULT__SECTION__KEY` variable.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fairvault_engine::error::{Error, Result};
use serde::Deserialize;
use zeroize::Zeroizing;

/// Where configuration is looked for, in this order.
pub const PATHS: [&str; 2] = ["/etc/fairvault/fairvault.toml", "./fairvault.toml"];
const VARIABLE_PREFIX: &str = "FAIRVAULT__";

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Repositories by name.
    #[serde(default)]
    pub repo: BTreeMap<String, Repo>,
    /// Settings of every stanza that does not say otherwise.
    #[serde(default)]
    pub defaults: Defaults,
    /// Stanzas by name.
    #[serde(default)]
    pub stanza: BTreeMap<String, StanzaConfig>,
    /// Folder for what this host remembers.
    pub cache: Option<PathBuf>,
}

/// `[repo.NAME]`
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repo {
    /// s3://, gs://, az:// or file://
    pub url: String,
    /// One that is away raises an alarm, and holds up nothing.
    #[serde(default)]
    pub optional: bool,
    /// Endpoint of an S3-compatible store.
    pub endpoint: Option<String>,
    /// Region.
    pub region: Option<String>,
    /// Bucket as host name.
    #[serde(default)]
    pub virtual_host: bool,
    /// Root certificates to trust instead of the system's, PEM.
    pub ca_file: Option<String>,
    /// Storage class of packs.
    pub storage_class: Option<String>,
    /// AES256 or aws:kms.
    pub server_side_encryption: Option<String>,
    /// KMS key id.
    pub kms_key: Option<String>,
    /// How the store checks what arrives: a SHA-256 or MD5 header, or neither.
    pub checksum: Option<Checksum>,
    /// Access key id.
    pub access_key: Option<String>,
    /// File with the secret access key.
    pub secret_key_file: Option<PathBuf>,
    /// Credentials that may delete: used by `gc`, `key erase`, `key remove-slot` and `repair --drop-entry`.
    pub deleter: Option<Credentials>,
    /// Credentials that may lock objects: used by `lock`, and by `backup` and `copy` for the packs that they rely on.
    pub keeper: Option<Credentials>,
    /// A backup stores again what is locked for less long than it is kept, and needs nobody who extends the locks of packs:
    /// so it is if nothing is said. `true`: what is not known to be locked as well; `false`: nothing.
    pub store_again: Option<bool>,
    /// What is kept, if the stanza does not say otherwise.
    pub retention: Option<Retention>,
    /// The store has no conditional create, and one writer is promised.
    #[serde(default)]
    pub single_writer: bool,
    /// How long a request may stand still.
    pub request_timeout: Option<String>,
    /// How long the store may stay away.
    pub retry_timeout: Option<String>,
}

/// `checksum`
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Checksum {
    /// SHA-256, or none.
    On(bool),
    /// Which one.
    Named(String),
}

/// `deleter` and `keeper`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// Access key id.
    pub access_key: String,
    /// File with the secret access key.
    pub secret_key_file: PathBuf,
}

/// A number, or an age such as "30d".
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Keep {
    /// The newest so many.
    Count(u32),
    /// As long as they are not older.
    Age(String),
}

/// `retention`
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    /// Full backups.
    pub full: Option<Keep>,
    /// Differential ones; without, as long as the full before them.
    pub diff: Option<Keep>,
    /// Incremental ones; without, as long as the full before them.
    pub incr: Option<Keep>,
    /// Full backups that stay however old they are.
    pub min_full: Option<u32>,
    /// How far back WAL is continuous.
    pub wal: Option<String>,
    /// Days of which the newest backup stays.
    #[serde(default)]
    pub daily: u32,
    /// Weeks.
    #[serde(default)]
    pub weekly: u32,
    /// Months.
    #[serde(default)]
    pub monthly: u32,
    /// Years.
    #[serde(default)]
    pub yearly: u32,
    /// Where days begin.
    pub timezone: Option<String>,
}

/// `compression`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compression {
    /// page-zstd or zstd.
    #[serde(default)]
    pub codec: Codec,
    /// Level.
    pub level: Option<i32>,
    /// zstd or records.
    #[serde(default)]
    pub wal: WalCodec,
}

/// How chunks of backups are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Codec {
    /// Pages are taken apart before zstd, where that pays.
    #[default]
    PageZstd,
    /// zstd only.
    Zstd,
}

/// How WAL is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WalCodec {
    /// zstd only.
    #[default]
    Zstd,
    /// Records are taken apart before zstd, where that pays.
    Records,
}

/// `[defaults]`
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Repositories: WAL goes to all, backups to the first that is not optional.
    #[serde(default)]
    pub repos: Vec<String>,
    /// Compression.
    pub compression: Option<Compression>,
    /// How long archived WAL of a backup may take to arrive.
    pub archive_timeout: Option<String>,
    /// What is kept.
    pub retention: Option<Retention>,
}

/// `key = { … }`: exactly one of them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeySource {
    /// A key file.
    pub file: Option<PathBuf>,
    /// A file with a passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// A variable.
    pub env: Option<String>,
    /// A command; its standard output is the key or passphrase.
    pub command: Option<Vec<String>>,
}

/// `[stanza.NAME]`
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StanzaConfig {
    /// Connection; it may have a password.
    #[serde(default, deserialize_with = "wiped")]
    pub conninfo: Option<Zeroizing<String>>,
    /// Key.
    pub key: Option<KeySource>,
    /// Repositories.
    #[serde(default)]
    pub repos: Vec<String>,
    /// Those that `backup` writes to.
    #[serde(default)]
    pub backup_repos: Vec<String>,
    /// Compression.
    pub compression: Option<Compression>,
    /// How long archived WAL of a backup may take to arrive.
    pub archive_timeout: Option<String>,
    /// What is kept.
    pub retention: Option<Retention>,
    /// What is kept in single repositories.
    #[serde(default)]
    pub repo_retention: BTreeMap<String, Retention>,
    /// WAL.
    #[serde(default)]
    pub wal: WalConfig,
    /// Which kind of backup a plain `backup` takes.
    #[serde(default)]
    pub schedule: Schedule,
}

/// Without its connection, which may have a password.
impl std::fmt::Debug for StanzaConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StanzaConfig").finish_non_exhaustive()
    }
}

/// `schedule = { … }`: cron expressions.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Full backups.
    pub full: Option<String>,
    /// Differential ones.
    pub diff: Option<String>,
    /// Incremental ones.
    pub incr: Option<String>,
    /// Whose clock.
    pub timezone: Option<String>,
}

/// `wal = { … }`
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WalConfig {
    /// `wal receive`: how long WAL may wait before it is stored.
    pub flush_interval: Option<String>,
    /// `wal receive`: bytes that do not wait.
    pub piece_size: Option<String>,
    /// `wal receive`: replication slot.
    pub slot: Option<String>,
    /// `wal receive`: folder of a durable spool on this host; WAL counts as received once it is there.
    pub receive_spool: Option<PathBuf>,
    /// `wal receive`: bytes that the spool may hold for each repository.
    pub receive_spool_size: Option<String>,
    /// `wal receive`: standbys on which a slot of the same name is kept, for a failover.
    #[serde(default)]
    pub standbys: Vec<String>,
    /// `wal receive`: seal pieces instead of storing segments anew.
    #[serde(default)]
    pub keep_pieces: bool,
    /// `wal push`: a background worker stores what is ready, several files at a time.
    #[serde(default, rename = "async")]
    pub asynchronous: bool,
    /// `wal push` and `wal get`: files that a background worker moves at once.
    pub parallel: Option<usize>,
    /// `wal push` with a background worker: how long one call waits before it says "try again".
    pub push_timeout: Option<String>,
    /// `wal push`: WAL that may wait in pg_wal before every call raises an alarm.
    pub max_backlog: Option<String>,
    /// `wal get`: WAL that is fetched ahead of recovery; 0 for none.
    pub prefetch: Option<String>,
    /// Folder for what background workers leave for the commands that PostgreSQL runs.
    pub spool: Option<PathBuf>,
}

/// A text that is wiped when it is dropped.
fn wiped<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Option<Zeroizing<String>>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.map(Zeroizing::new))
}

impl Config {
    /// Reads `path`, or the first default path that exists; with neither, the configuration is empty.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let found = match path {
            Some(path) => Some(path.to_owned()),
            None => PATHS.iter().map(PathBuf::from).find(|p| p.is_file()),
        };
        let text = match &found {
            None => Zeroizing::default(),
            Some(path) => std::fs::read_to_string(path)
                .map(Zeroizing::new)
                .map_err(|e| Error::usage(format!("reading the configuration {}", path.display())).caused_by(e))?,
        };
        let shown = found
            .as_ref()
            .map_or_else(|| "the configuration".to_owned(), |p| p.display().to_string());
        let config = Self::parse(&text, &shown, std::env::vars())?;
        // A file that was merely found where we stand, or that runs commands, must be of somebody we trust.
        let merely_found = path.is_none() && found.as_deref() == Some(Path::new(PATHS[1]));
        let runs_commands = config
            .stanza
            .values()
            .any(|s| s.key.as_ref().is_some_and(|k| k.command.is_some()));
        match &found {
            Some(found) if merely_found || runs_commands => check_owner(found)?,
            _ => {}
        }
        Ok(config)
    }

    fn parse(text: &str, shown: &str, variables: impl Iterator<Item = (String, String)>) -> Result<Self> {
        let mut table: toml::Table = text
            .parse()
            .map_err(|e: toml::de::Error| Error::usage(format!("{shown}{}: {}", line_of(text, &e), e.message())))?;
        for (name, value) in variables {
            if let Some(path) = name.strip_prefix(VARIABLE_PREFIX) {
                let keys: Vec<String> = path.split("__").map(str::to_lowercase).collect();
                set(&mut table, &keys, &value)
                    .ok_or_else(|| Error::usage(format!("variable {name}: it names no place in the configuration")))?;
            }
        }
        // Once more from the text where there is no variable, because only then an error knows its line.
        let parsed = match toml::from_str::<Self>(text) {
            Err(e) => Err((line_of(text, &e), e.message().to_owned())),
            Ok(_) => table
                .try_into::<Self>()
                .map_err(|e| (String::new(), e.message().to_owned())),
        };
        parsed.map_err(|(line, message)| {
            let error = Error::usage(format!("{shown}{line}: {message}"));
            match nearest(&message) {
                Some(near) => error.remedy(format!("did you mean {near:?}?")),
                None => error,
            }
        })
    }
}

/// Fails unless the file and its folder are ours or root's, and nobody else can write to them.
fn check_owner(path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let me = std::fs::metadata("/proc/self").map_or(0, |m| m.uid());
    let absolute = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    for part in [Some(absolute.as_path()), absolute.parent()].into_iter().flatten() {
        let meta = std::fs::metadata(part).map_err(|e| Error::io(format_args!("looking at {}", part.display()), e))?;
        let sticky = meta.is_dir() && meta.mode() & 0o1000 != 0 && part != absolute;
        if (meta.uid() != me && meta.uid() != 0) || (meta.mode() & 0o022 != 0 && !sticky) {
            return Err(Error::usage(format!(
                "{} is not used: {} can be changed by other users",
                path.display(),
                part.display()
            ))
            .remedy("make both belong to you or root and writable for nobody else, or name the file with --config"));
        }
    }
    Ok(())
}

fn line_of(text: &str, error: &toml::de::Error) -> String {
    error
        .span()
        .map(|span| format!(" line {}", text[..span.start.min(text.len())].matches('\n').count() + 1))
        .unwrap_or_default()
}

/// serde's message names the unknown key and the known ones in backticks.
fn nearest(message: &str) -> Option<String> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = message.starts_with("unknown field").then(|| quoted.next()).flatten()?;
    quoted
        .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
        .min()
        .filter(|(distance, known)| *distance <= known.len().max(3) / 2)
        .map(|(_, known)| known.to_owned())
}

fn set(table: &mut toml::Table, keys: &[String], value: &str) -> Option<()> {
    let (last, folders) = keys.split_last()?;
    let mut table = table;
    for folder in folders {
        table = table
            .entry(folder.clone())
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()?;
    }
    let parsed = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut t| t.remove("v"));
    table.insert(
        last.clone(),
        parsed.unwrap_or_else(|| toml::Value::String(value.to_owned())),
    );
    Some(())
}

/// Bytes from a size such as "20MiB".
pub fn size(key: &str, text: &str) -> Result<u64> {
    let bad = || Error::usage(format!("{key} {text:?} is no size")).remedy("write it as 500KiB, 20MiB or 1GiB");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| bad())?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" if number == 0 => 1,
        "kib" | "k" | "kb" => 1 << 10,
        "mib" | "m" | "mb" => 1 << 20,
        "gib" | "g" | "gb" => 1 << 30,
        _ => return Err(bad()),
    };
    number.checked_mul(unit).ok_or_else(bad)
}

/// A duration such as "30s", "5m" or "2h".
pub fn duration(key: &str, text: &str) -> Result<Duration> {
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|d| Duration::try_from(d).ok())
        .ok_or_else(|| {
            Error::usage(format!("{key} = {text:?} is no duration")).remedy("write it as \"30s\", \"5m\" or \"2h\"")
        })
}

/// Seconds of an age such as "30d", "4w" or "36h".
pub fn age(key: &str, text: &str) -> Result<u64> {
    let parsed = text.parse::<jiff::Span>().ok();
    parsed
        .and_then(|span| span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok())
        .and_then(|duration| u64::try_from(duration.as_secs()).ok())
        .ok_or_else(|| {
            Error::usage(format!("{key} = {text:?} is no age")).remedy("write it as \"30d\", \"4w\" or \"36h\"")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_name_their_line_and_the_nearest_known_key() {
        let error = Config::parse(
            "[repo.a]\nurl = \"file:///x\"\nreigon = \"eu\"\n",
            "f.toml",
            std::iter::empty(),
        )
        .unwrap_err();
        assert!(error.to_string().contains("f.toml line 3"), "{error}");
        assert_eq!(error.advice(), Some("did you mean \"region\"?"));
    }

    #[test]
    fn a_file_that_others_can_change_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("fairvault.toml");
        std::fs::write(&file, "").unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(folder.path(), 0o755);
        mode(&file, 0o644);
        check_owner(&file).unwrap();
        mode(&file, 0o664);
        assert!(check_owner(&file).is_err());
        mode(&file, 0o644);
        mode(folder.path(), 0o777);
        assert!(check_owner(&file).is_err());
    }

    #[test]
    fn variables_override_the_file() {
        let variables = [
            ("FAIRVAULT__STANZA__A__CONNINFO", "host=b"),
            ("FAIRVAULT__REPO__R__SINGLE_WRITER", "true"),
        ];
        let variables = variables.map(|(a, b)| (a.to_owned(), b.to_owned())).into_iter();
        let config = Config::parse(
            "[stanza.a]\nconninfo = \"host=a\"\n[repo.r]\nurl=\"memory://\"\n",
            "f",
            variables,
        )
        .unwrap();
        let conninfo = config.stanza["a"].conninfo.as_ref();
        assert_eq!(conninfo.map(|text| text.as_str()), Some("host=b"));
        assert!(config.repo["r"].single_writer);
    }
}
