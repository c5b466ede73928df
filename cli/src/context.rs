//! From options and configuration to opened repositories, stanzas and secrets.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fairvault_engine::commit::Log;
use fairvault_engine::env::SystemEnv;
use fairvault_engine::error::{Context as _, Error, Result};
use fairvault_engine::expire::rules::{Calendar, Keep, Retention};
use fairvault_engine::immutable::kept_for;
use fairvault_engine::immutable::reliance::Reliance;
use fairvault_engine::replication::conninfo::{self, ConnInfo};
use fairvault_engine::restore::settings::shell_word;
use fairvault_engine::stanza::memory::Memory;
use fairvault_engine::stanza::{Access, Stanza, Trace};
use fairvault_engine::store::{Store, url::RepositoryUrl};
use fairvault_format::keys::Secret;
use fairvault_format::{names, wal};
use zeroize::Zeroizing;

use crate::args::Global;
use crate::config::{
    self, Codec, Compression, Config, Credentials, KeySource, Repo, StanzaConfig, WalCodec, WalConfig,
};
use crate::repository::{from_environment, read_trimmed, repository_url};
use crate::schedule::Schedule;

/// Name of the repository that --repo-url makes.
const FLAG_REPO: &str = "url";

/// zstd level of backups, if nothing else is said.
const BACKUP_LEVEL: i32 = 1;
/// zstd level of WAL, if nothing else is said.
const WAL_LEVEL: i32 = 3;

/// Fails if the connection string of an option has a password: whoever works on this host can read the arguments of
/// every process, and background workers get the same ones.
pub fn check_no_password(option: &str, text: &str) -> Result<()> {
    match conninfo::has_password(text)? {
        false => Ok(()),
        true => Err(Error::usage(format!(
            "{option} has a password, and arguments can be read by everybody on this host"
        ))
        .remedy(
            "put it into a password file (~/.pgpass, or the one that passfile or PGPASSFILE names; mode 0600), into \
             conninfo of the configuration (which others must not be able to read then), or into PGPASSWORD",
        )),
    }
}

/// Options and configuration together.
pub struct Context {
    /// Options.
    pub global: Global,
    config: Config,
    /// How each stanza was to be opened last, by its repository and name: what was done leaves entries in their logs.
    opened: Mutex<BTreeMap<(String, String), Access>>,
}

impl Context {
    /// Reads the configuration. A password in an option is an error; what moves WAL, and connects to no server, only warns of
    /// it (`moves_wal`): archiving and recovery do not end over that.
    pub fn load(mut global: Global, moves_wal: bool) -> Result<Self> {
        if let Some(text) = &global.conninfo {
            match check_no_password("--conninfo", text) {
                Err(error) if moves_wal => {
                    tracing::warn!("{error}");
                    // No worker inherits it.
                    global.conninfo = None;
                }
                checked => checked?,
            }
        }
        let config = Config::load(global.config.as_deref())?;
        Ok(Self {
            global,
            config,
            opened: Mutex::default(),
        })
    }

    fn stanza(&self, name: &str) -> Option<&StanzaConfig> {
        self.config.stanza.get(name)
    }

    /// Whether the repository was given by an option rather than by configuration.
    pub fn is_from_flags(&self) -> bool {
        self.global.repo_url.is_some()
    }

    /// Names of the repositories of a stanza, optional ones last: WAL goes to all, backups to the first. Every command asks
    /// for them before it makes anything that is called like the stanza: what is no name is refused here.
    pub fn repositories(&self, stanza: Option<&str>) -> Result<Vec<String>> {
        stanza.map_or(Ok(()), |name| names::check_name("stanza name", name))?;
        let mut names = self.configured_repositories(stanza)?;
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|name| seen.insert(name.clone()));
        if names.iter().all(|name| self.is_optional(name)) {
            return Err(Error::usage(format!("all repositories are optional: {}", names.join(", ")))
                .remedy("WAL counts as archived when every repository that is not optional has it: at least one must not be"));
        }
        names.sort_by_key(|name| self.is_optional(name));
        Ok(names)
    }

    /// Whether a repository may be away without holding anything up. One that was asked for by name is not.
    pub fn is_optional(&self, name: &str) -> bool {
        self.global.repo.is_none() && self.config.repo.get(name).is_some_and(|repo| repo.optional)
    }

    /// Those of a stanza's repositories that backups go to: taken into the first, and copied to the others.
    pub fn backup_repositories(&self, stanza: &str) -> Result<Vec<String>> {
        let all = self.repositories(Some(stanza))?;
        let chosen = self.stanza(stanza).map(|s| s.backup_repos.clone()).unwrap_or_default();
        if chosen.is_empty() || self.global.repo.is_some() || self.global.repo_url.is_some() {
            return Ok(all.into_iter().take(1).collect());
        }
        if let Some(stranger) = chosen.iter().find(|name| !all.contains(name)) {
            return Err(Error::usage(format!(
                "backup_repos names {stranger:?}, which is no repository of stanza {stanza}"
            ))
            .remedy(format!("repositories: {}", all.join(", "))));
        }
        let chosen: Vec<String> = all.into_iter().filter(|name| chosen.contains(name)).collect();
        match self.is_optional(&chosen[0]) {
            true => Err(Error::usage("backup_repos names optional repositories only")
                .remedy("a backup is taken into one that is not optional, and copied to others")),
            false => Ok(chosen),
        }
    }

    fn configured_repositories(&self, stanza: Option<&str>) -> Result<Vec<String>> {
        if self.global.repo_url.is_some() {
            return Ok(vec![FLAG_REPO.to_owned()]);
        }
        if let Some(name) = &self.global.repo {
            return Ok(vec![name.clone()]);
        }
        let own = stanza
            .and_then(|s| self.stanza(s))
            .map(|s| s.repos.clone())
            .filter(|r| !r.is_empty());
        let names = own.unwrap_or_else(|| self.config.defaults.repos.clone());
        match (names.is_empty(), self.config.repo.len()) {
            (false, _) => Ok(names),
            (true, 1) => Ok(self.config.repo.keys().cloned().collect()),
            (true, 0) => Err(Error::usage("no repository is configured")
                .remedy("write a [repo.NAME] section with a url, or give --repo-url file:///folder")),
            (true, _) => Err(Error::usage(
                "several repositories are configured, and `repos` does not say which to use",
            )
            .remedy("set repos under [defaults] or the stanza, or give --repo")),
        }
    }

    /// Opens a repository's store.
    pub fn open_repository(&self, name: &str, create: bool) -> Result<Store> {
        if name == FLAG_REPO
            && let Some(url) = &self.global.repo_url
        {
            return RepositoryUrl {
                url: url.clone(),
                lock_file: self.lock_file(),
                ..from_environment()
            }
            .open(create);
        }
        let url = repository_url(self.repository(name)?).context(|| format!("[repo.{name}]"))?;
        RepositoryUrl {
            lock_file: self.lock_file(),
            ..url
        }
        .open(create)
    }

    fn repository(&self, name: &str) -> Result<&Repo> {
        self.config.repo.get(name).ok_or_else(|| {
            let known: Vec<_> = self.config.repo.keys().map(String::as_str).collect();
            Error::usage(format!("there is no [repo.{name}] in the configuration"))
                .remedy(format!("repositories: {}", known.join(", ")))
        })
    }

    /// Whatever says which store a repository is; to be compared, not shown.
    pub fn identity(&self, name: &str) -> Result<String> {
        match &self.global.repo_url {
            Some(url) if name == FLAG_REPO => Ok(format!("{url} {:?}", std::env::var("AWS_ENDPOINT_URL"))),
            _ => Ok(format!("{:?}", self.repository(name)?)),
        }
    }

    /// What keeps the processes of this host apart where one writer is promised.
    fn lock_file(&self) -> Option<PathBuf> {
        self.memory().map(|memory| memory.root().join("single-writer.lock"))
    }

    /// The secret of a stanza, from options or configuration.
    pub fn secret(&self, stanza: &str) -> Result<Option<Secret>> {
        let flags = KeySource {
            file: self.global.key_file.clone(),
            passphrase_file: self.global.passphrase_file.clone(),
            env: None,
            command: None,
        };
        if flags.file.is_some() || flags.passphrase_file.is_some() {
            return read_secret(&flags).map(Some);
        }
        match self.stanza(stanza).and_then(|s| s.key.as_ref()) {
            None => Ok(None),
            Some(source) => read_secret(source)
                .context(|| format!("the key of stanza {stanza}"))
                .map(Some),
        }
    }

    /// How to open a stanza in a repository.
    pub fn access(&self, repository: &str, stanza: &str, create: bool, may_stretch: bool) -> Result<Access> {
        let access = Access {
            repository: self.open_repository(repository, create)?,
            stanza: stanza.to_owned(),
            secret: self.secret(stanza)?,
            memory: self.memory(),
            may_stretch,
            env: Arc::new(SystemEnv),
            trace: Trace::default(),
        };
        Ok(self.remembered(repository, access))
    }

    /// Remembers how a stanza is to be opened. All that is opened of one stanza shares a trace.
    fn remembered(&self, repository: &str, mut access: Access) -> Access {
        let name = (repository.to_owned(), access.stanza.clone());
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = opened.get(&name) {
            access.trace = before.trace.clone();
        }
        opened.insert(name, access.clone());
        access
    }

    /// How each stanza was to be opened last.
    pub fn opened(&self) -> Vec<Access> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.values().cloned().collect()
    }

    /// Opens a stanza's log in a repository.
    pub async fn open_log_in(&self, repository: &str, stanza: &str, may_stretch: bool) -> Result<Log> {
        let access = self.access(repository, stanza, false, may_stretch)?;
        Log::open(Stanza::open(&access).await?).await
    }

    fn memory(&self) -> Option<Memory> {
        self.cache_folder().map(Memory::new)
    }

    fn cache_folder(&self) -> Option<PathBuf> {
        let chosen = self.global.cache.clone().or_else(|| self.config.cache.clone());
        let home = || {
            std::env::var_os("HOME")
                .filter(|h| !h.is_empty())
                .map(|h| PathBuf::from(h).join(".cache"))
        };
        let standard = || {
            std::env::var_os("XDG_CACHE_HOME")
                .filter(|h| !h.is_empty())
                .map(PathBuf::from)
                .or_else(home)
        };
        chosen.or_else(|| standard().map(|cache| cache.join("fairvault")))
    }

    /// Keeps something in the cache's folder, for its owner alone; where it is. An error if there is no such folder.
    pub fn keep(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let folder = self.cache_folder().ok_or_else(|| {
            Error::usage("there is no folder to keep a copy in").remedy("set `cache`, or --cache FOLDER")
        })?;
        let path = folder.join(name);
        let write = || {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            let mut options = std::fs::File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        let written = write();
        written.map_err(|e| Error::io(format_args!("writing {}", path.display()), e))?;
        Ok(path)
    }

    /// Opens a stanza's log with the credentials that may delete, where there are such.
    pub async fn open_log_to_delete(&self, repository: &str, stanza: &str) -> Result<Log> {
        Ok(self.open_to_delete(repository, stanza).await?.0)
    }

    /// The same, and how it was opened.
    pub async fn open_to_delete(&self, repository: &str, stanza: &str) -> Result<(Log, Access)> {
        let access = self.access_to_delete(repository, stanza)?;
        let log = Log::open(Stanza::open(&access).await?).await?;
        Ok((log, access))
    }

    /// Opens a stanza's log with the credentials that may lock objects, where there are such; and its repository.
    pub async fn open_log_to_lock(&self, repository: &str, stanza: &str) -> Result<(Log, Store)> {
        // These write no entries: what is remembered are the repository's own.
        let access = self.access_as(repository, stanza, |repo| repo.keeper.as_ref())?;
        let log = Log::open(Stanza::open(&access).await?).await?;
        Ok((log, access.repository))
    }

    /// How to open a stanza with the credentials that may delete, where there are such.
    pub fn access_to_delete(&self, repository: &str, stanza: &str) -> Result<Access> {
        let access = self.access_as(repository, stanza, |repo| repo.deleter.as_ref())?;
        Ok(self.remembered(repository, access))
    }

    fn access_as(
        &self,
        repository: &str,
        stanza: &str,
        role: impl Fn(&Repo) -> Option<&Credentials>,
    ) -> Result<Access> {
        let mut access = self.access(repository, stanza, false, true)?;
        if let Some(credentials) = self.config.repo.get(repository).and_then(role) {
            access.repository = self.open_repository_as(repository, credentials)?;
        }
        Ok(access)
    }

    fn open_repository_as(&self, repository: &str, credentials: &Credentials) -> Result<Store> {
        let url = RepositoryUrl {
            access_key: Some(credentials.access_key.clone()),
            secret_key: Some(read_trimmed(&credentials.secret_key_file)?),
            has_deleter: false,
            lock_file: self.lock_file(),
            ..repository_url(self.repository(repository)?)?
        };
        url.open(false)
    }

    /// How long the packs must be locked that a backup relies on, unless the configuration says that nobody cares, and where
    /// the retention, or the signed policy with its minimum, says how long that is.
    pub fn reliance(&self, repository: &str, stanza: &str, minimum_s: u64) -> Result<Option<Reliance>> {
        // One that is given by its URL alone has no settings.
        let settings = self.config.repo.get(repository);
        let store_again = settings.and_then(|repo| repo.store_again);
        let is_required = store_again != Some(false);
        let keeper = settings.and_then(|repo| repo.keeper.as_ref());
        if keeper.is_none() && !is_required {
            return Ok(None);
        }
        // Whatever decides, the policy lets no backup expire before.
        let promised = Some(minimum_s).filter(|minimum_s| *minimum_s > 0);
        let retention = self.retention(repository, stanza)?;
        let Some(kept_s) = kept_for(&retention, minimum_s).or(promised) else {
            if store_again == Some(true) {
                tracing::warn!(
                    "store_again of repository {repository} has no effect: neither a retention by age nor a signed policy says how long \
                     backups are kept"
                );
            }
            return Ok(None);
        };
        let keeper = match keeper.map(|credentials| self.open_repository_as(repository, credentials)) {
            // Its secret may be where `lock` runs, and nowhere else.
            Some(Err(error)) => {
                tracing::warn!("this backup extends no locks (`fairvault lock` does): {error}");
                if !is_required {
                    return Ok(None);
                }
                None
            }
            Some(Ok(store)) => Some(store),
            None => None,
        };
        Ok(Some(Reliance {
            kept_s,
            window_s: retention.wal,
            keeper,
            is_required,
        }))
    }

    /// What is kept of a stanza in a repository: the most particular of what is configured.
    pub fn retention(&self, repository: &str, stanza: &str) -> Result<Retention> {
        let of_stanza = self.stanza(stanza);
        let configured = of_stanza
            .and_then(|s| s.repo_retention.get(repository).or(s.retention.as_ref()))
            .or_else(|| self.config.repo.get(repository)?.retention.as_ref())
            .or(self.config.defaults.retention.as_ref());
        let Some(configured) = configured else {
            return Ok(Retention::default());
        };
        let keep = |key: &str, keep: &Option<config::Keep>| -> Result<Option<Keep>> {
            Ok(match keep {
                None => None,
                Some(config::Keep::Count(count)) => Some(Keep::Count(*count)),
                Some(config::Keep::Age(text)) => Some(Keep::Age(config::age(key, text)?)),
            })
        };
        let zone = |name: &String| {
            let found = jiff::tz::TimeZone::get(name);
            found.map_err(|e| Error::usage(format!("retention.timezone = {name:?} is no time zone")).caused_by(e))
        };
        Ok(Retention {
            full: keep("retention.full", &configured.full)?,
            diff: keep("retention.diff", &configured.diff)?,
            incr: keep("retention.incr", &configured.incr)?,
            min_full: configured.min_full.unwrap_or(1),
            wal: configured
                .wal
                .as_deref()
                .map(|t| config::age("retention.wal", t))
                .transpose()?,
            calendar: Calendar {
                daily: configured.daily,
                weekly: configured.weekly,
                monthly: configured.monthly,
                yearly: configured.yearly,
            },
            timezone: configured.timezone.as_ref().map(zone).transpose()?,
        })
    }

    /// Which kind of backup is due when.
    pub fn schedule(&self, stanza: &str) -> Result<Schedule> {
        let configured = self.stanza(stanza).map(|s| s.schedule.clone());
        Schedule::new(&configured.unwrap_or_default())
    }

    /// How to connect to a stanza's server.
    pub fn conninfo(&self, stanza: &str) -> Result<ConnInfo> {
        let configured = || Some(self.stanza(stanza)?.conninfo.as_ref()?.as_str());
        let text = self.global.conninfo.as_deref().or_else(configured);
        ConnInfo::parse(text.unwrap_or_default())
    }

    /// Where background workers leave what they did.
    pub fn spool(&self, stanza: &str) -> Option<PathBuf> {
        let chosen = self.stanza(stanza).and_then(|s| s.wal.spool.clone());
        chosen.or_else(|| Some(self.memory()?.root().join("spool")))
    }

    /// Settings for WAL.
    pub fn wal(&self, stanza: &str) -> WalConfig {
        self.stanza(stanza).map(|s| s.wal.clone()).unwrap_or_default()
    }

    fn compression(&self, stanza: &str) -> Option<&Compression> {
        let of_stanza = self.stanza(stanza).and_then(|s| s.compression.as_ref());
        of_stanza.or(self.config.defaults.compression.as_ref())
    }

    /// How chunks of backups are compressed: codec and zstd level.
    pub fn backup_compression(&self, stanza: &str, flag: Option<i32>) -> Result<(Codec, i32)> {
        let codec = self.compression(stanza).map(|c| c.codec).unwrap_or_default();
        Ok((codec, self.level(stanza, flag, BACKUP_LEVEL)?))
    }

    /// How WAL is compressed.
    pub fn wal_compression(&self, stanza: &str) -> Result<wal::Compression> {
        let codec = self.compression(stanza).map(|c| c.wal).unwrap_or_default();
        Ok(wal::Compression {
            level: self.level(stanza, None, WAL_LEVEL)?,
            records: codec == WalCodec::Records,
        })
    }

    fn level(&self, stanza: &str, flag: Option<i32>, default: i32) -> Result<i32> {
        let configured = self.compression(stanza).and_then(|c| c.level);
        let level = flag.or(configured).unwrap_or(default);
        match (-7..=22).contains(&level) {
            true => Ok(level),
            false => Err(Error::usage(format!(
                "compression level {level} is not possible: -7 to 22"
            ))),
        }
    }

    /// How long archived WAL of a backup may take to arrive.
    pub fn archive_timeout(&self, stanza: &str) -> Result<Duration> {
        let text = self.stanza(stanza).and_then(|s| s.archive_timeout.as_ref()).or(self
            .config
            .defaults
            .archive_timeout
            .as_ref());
        text.map_or(Ok(Duration::from_secs(300)), |text| {
            config::duration("archive_timeout", text)
        })
    }

    /// The words before `wal get` in a restore_command that uses the same repository and key.
    pub fn command_words(&self) -> Result<String> {
        let binary = std::env::current_exe().map_err(|e| Error::io("finding this program's path", e))?;
        let mut words = vec![binary];
        let mut option = |name: &str, value: Option<&PathBuf>| -> Result<()> {
            if let Some(value) = value {
                let absolute =
                    std::path::absolute(value).map_err(|e| Error::io(format_args!("{}", value.display()), e))?;
                words.push(name.into());
                words.push(absolute);
            }
            Ok(())
        };
        let config = self
            .global
            .config
            .clone()
            .or_else(|| config::PATHS.iter().map(PathBuf::from).find(|p| p.is_file()));
        option("--config", config.as_ref())?;
        option("--key-file", self.global.key_file.as_ref())?;
        option("--passphrase-file", self.global.passphrase_file.as_ref())?;
        option("--cache", self.global.cache.as_ref())?;
        if let Some(url) = &self.global.repo_url {
            words.extend(["--repo-url".into(), PathBuf::from(url)]);
        }
        if let Some(repo) = &self.global.repo {
            words.extend(["--repo".into(), PathBuf::from(repo)]);
        }
        Ok(words
            .iter()
            .map(|word| shell_word(&word.to_string_lossy()))
            .collect::<Vec<_>>()
            .join(" "))
    }
}

/// A secret from a file; it must not be readable for everybody.
pub fn secret_from_file(path: &Path) -> Result<Secret> {
    use std::os::unix::fs::PermissionsExt;
    let what = || format!("reading the key file {}", path.display());
    let meta = std::fs::metadata(path).map_err(|e| {
        let error = Error::usage(what()).caused_by(e);
        error.remedy(format!(
            "make a new key with `fairvault key generate {}`",
            path.display()
        ))
    })?;
    if meta.permissions().mode() & 0o007 != 0 {
        return Err(Error::usage(format!(
            "the key file {} can be used by everybody on this machine",
            path.display()
        ))
        .remedy(format!("chmod 0600 {}", path.display())));
    }
    if meta.len() > 64 << 10 {
        return Err(Error::usage(format!(
            "{} has {} bytes: that is no key file",
            path.display(),
            meta.len()
        )));
    }
    let text = Zeroizing::new(std::fs::read(path).map_err(|e| Error::usage(what()).caused_by(e))?);
    Secret::from_text(&text)
        .map_err(Error::from)
        .context(|| path.display().to_string())
}

fn read_secret(source: &KeySource) -> Result<Secret> {
    match (&source.file, &source.passphrase_file, &source.env, &source.command) {
        (Some(path), None, None, None) => match secret_from_file(path)? {
            key @ Secret::Key(_) => Ok(key),
            Secret::Passphrase(_) => Err(Error::usage(format!("{} holds no key", path.display()))
                .remedy("a key file is made by `fairvault key generate`; a passphrase goes into passphrase_file")),
        },
        (None, Some(path), None, None) => secret_from_file(path),
        (None, None, Some(name), None) => {
            let text =
                std::env::var(name).map_err(|_| Error::usage(format!("the variable {name} for the key is not set")))?;
            Ok(Secret::from_text(Zeroizing::new(text).as_bytes())?)
        }
        (None, None, None, Some(command)) => {
            let (program, arguments) = command
                .split_first()
                .ok_or_else(|| Error::usage("the command for the key is empty"))?;
            let output = std::process::Command::new(program)
                .args(arguments)
                .stdin(std::process::Stdio::null())
                .stderr(std::process::Stdio::inherit())
                .output()
                .map_err(|e| Error::usage(format!("running {program} for the key")).caused_by(e))?;
            if !output.status.success() {
                return Err(Error::temporary(format!(
                    "{program}, which gives the key, ended with {}",
                    output.status
                )));
            }
            Ok(Secret::from_text(&Zeroizing::new(output.stdout))?)
        }
        _ => Err(Error::usage(
            "key needs exactly one of file, passphrase_file, env and command",
        )),
    }
}

#[cfg(test)]
mod tests;
