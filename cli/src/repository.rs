//! From configuration to what a store is reached with.

use std::path::Path;

use fairvault_engine::error::{Error, Result};
use fairvault_engine::store::url::{Check, RepositoryUrl};
use zeroize::Zeroizing;

use crate::config::{self, Checksum, Repo};

/// Settings of a store that is given by URL alone.
pub fn from_environment() -> RepositoryUrl {
    let variable = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    RepositoryUrl {
        endpoint: variable("AWS_ENDPOINT_URL"),
        region: variable("AWS_REGION"),
        ..RepositoryUrl::default()
    }
}

/// A secret from a file, without the end of its line.
pub fn read_trimmed(path: &Path) -> Result<Zeroizing<String>> {
    let text = std::fs::read_to_string(path).map(Zeroizing::new);
    let text = text.map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
    Ok(Zeroizing::new(text.trim_end().to_owned()))
}

fn check(repo: &Repo) -> Result<Check> {
    match &repo.checksum {
        None | Some(Checksum::On(true)) => Ok(Check::Sha256),
        Some(Checksum::On(false)) => Ok(Check::None),
        Some(Checksum::Named(name)) => match name.as_str() {
            "sha256" => Ok(Check::Sha256),
            "md5" => Ok(Check::Md5),
            other => Err(Error::usage(format!("checksum = {other:?} is not known")).remedy("true, false or \"md5\"")),
        },
    }
}

/// How a repository is reached.
pub fn repository_url(repo: &Repo) -> Result<RepositoryUrl> {
    let time = |key: &str, text: &Option<String>| text.as_deref().map(|t| config::duration(key, t)).transpose();
    let secret_key = match &repo.secret_key_file {
        None => None,
        Some(path) => Some(read_trimmed(path)?),
    };
    Ok(RepositoryUrl {
        url: repo.url.clone(),
        endpoint: repo.endpoint.clone(),
        region: repo.region.clone(),
        virtual_host: repo.virtual_host,
        ca_file: repo.ca_file.clone(),
        storage_class: repo.storage_class.clone(),
        server_side_encryption: repo.server_side_encryption.clone(),
        kms_key: repo.kms_key.clone(),
        checksum: check(repo)?,
        access_key: repo.access_key.clone(),
        secret_key,
        single_writer: repo.single_writer,
        has_deleter: repo.deleter.is_some(),
        lock_file: None,
        request_timeout: time("request_timeout", &repo.request_timeout)?,
        retry_timeout: time("retry_timeout", &repo.retry_timeout)?,
    })
}
