//! Versions of objects, and their locks: what a bucket keeps of what is overwritten and deleted. S3 only.

use bytes::Bytes;
use object_store::signer::Method;
use object_store::{GetOptions, ObjectStore, path::Path};
use serde::{Deserialize, Serialize};

use fairvault_format::error::check_limit;

use super::Store;
use super::listing::Listing;
use super::s3::{Answer, Request, S3};
use crate::error::{Error, Kind, Result};

/// Microseconds of a day.
pub const DAY_US: i64 = 24 * 3600 * 1_000_000;

/// How strict a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// Whoever has the right to may end it early.
    Governance,
    /// Nobody ends it early.
    Compliance,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Governance => "GOVERNANCE",
            Self::Compliance => "COMPLIANCE",
        })
    }
}

/// What a bucket does with what is overwritten and deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Bucket {
    /// It keeps versions.
    pub versioning: bool,
    /// It keeps versions, or has kept them until that was suspended: older ones may be there.
    #[serde(skip)]
    pub has_versions: bool,
    /// Versions can be locked.
    pub lock: bool,
    /// How new versions are locked, and for how many days.
    pub default: Option<(Mode, u32)>,
}

impl Bucket {
    /// Until when a version is locked at least that was stored then, if the default was this one.
    pub fn locks_until(&self, modified_us: i64) -> i64 {
        let days = self.default.map_or(0, |(_, days)| days);
        modified_us.saturating_add(DAY_US.saturating_mul(days.into()))
    }
}

/// The lock of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// How strict it is.
    pub mode: Mode,
    /// When it ends, microseconds since 1970.
    pub until_us: i64,
}

/// A version of an object, or a marker that says that it was deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Its id.
    pub id: String,
    /// It is a delete marker: whoever asks for the object hears that there is none.
    pub is_marker: bool,
    /// When it was stored, microseconds since 1970.
    pub modified_us: i64,
    /// Bytes.
    pub size: u64,
    /// The store's name for its content.
    pub etag: String,
}

/// All versions of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Name, relative to the store.
    pub name: String,
    /// The newest first; there is at least one.
    pub versions: Vec<Version>,
}

impl Object {
    /// Whoever asks for it gets something.
    pub fn is_visible(&self) -> bool {
        self.versions.first().is_some_and(|newest| !newest.is_marker)
    }

    /// Versions with content, the oldest first.
    pub fn contents(&self) -> impl Iterator<Item = &Version> {
        self.versions.iter().rev().filter(|version| !version.is_marker)
    }
}

/// What became of a version that was to be deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deleted {
    /// It is gone.
    Gone,
    /// The store refused, in these words.
    Refused(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct VersioningConfiguration {
    status: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ObjectLockConfiguration {
    object_lock_enabled: String,
    rule: Option<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Rule {
    default_retention: Option<DefaultRetention>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DefaultRetention {
    mode: Mode,
    days: Option<u32>,
    years: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Retention {
    mode: Mode,
    retain_until_date: String,
}

impl Store {
    /// What this bucket does with what is overwritten and deleted; `None` for a store that is no S3 bucket.
    pub async fn bucket(&self) -> Result<Option<Bucket>> {
        if self.s3.is_none() {
            return Ok(None);
        }
        let doing = "asking whether the bucket keeps versions";
        let answer = self.ask(Method::GET, "", &[("versioning", "")], doing).await?;
        let versioning: VersioningConfiguration = match answer.status {
            // A store that has never heard of it.
            405 | 501 => VersioningConfiguration::default(),
            _ => self.parse(answer, doing, "s3:GetBucketVersioning")?,
        };
        let is_versioned = versioning.status == "Enabled";
        let has_versions = !versioning.status.is_empty();
        // Locks are of versions. "Suspended" ends new versions; those that are there stay.
        if !is_versioned {
            return Ok(Some(Bucket {
                has_versions,
                ..Bucket::default()
            }));
        }
        let doing = "asking whether the bucket locks objects";
        let answer = self.ask(Method::GET, "", &[("object-lock", "")], doing).await?;
        let lock: ObjectLockConfiguration = match answer.status {
            // In the words of several stores: it does not.
            400 | 404 | 405 | 409 | 501 => ObjectLockConfiguration::default(),
            _ => self.parse(answer, doing, "s3:GetBucketObjectLockConfiguration")?,
        };
        let default = lock.rule.and_then(|rule| rule.default_retention);
        Ok(Some(Bucket {
            versioning: is_versioned,
            has_versions,
            lock: lock.object_lock_enabled == "Enabled",
            default: default.map(|rule| {
                let days = rule.days.unwrap_or(0) + rule.years.unwrap_or(0) * 365;
                (rule.mode, days)
            }),
        }))
    }

    /// What the bucket does, for whoever can do without: the answer "nothing" where it cannot be asked.
    pub async fn bucket_or_plain(&self) -> Result<Bucket> {
        match self.bucket().await {
            Ok(bucket) => Ok(bucket.unwrap_or_default()),
            Err(error) if error.kind() == Kind::Temporary => Err(error),
            Err(error) => {
                tracing::warn!("older versions of objects are not looked at: {error}");
                Ok(Bucket::default())
            }
        }
    }

    /// All objects whose names begin like this, with all of their versions, page by page.
    pub fn versions(&self, prefix: &str) -> Listing<'_> {
        Listing::new(self, self.key(prefix))
    }

    /// All versions of objects whose names begin like this, at once: for folders with few objects.
    pub async fn all_versions(&self, prefix: &str) -> Result<Vec<Object>> {
        let (mut listing, mut all) = (self.versions(prefix), Vec::new());
        while let Some(page) = listing.next().await? {
            all.extend(page);
        }
        Ok(all)
    }

    /// The content of a version; `None` if it is gone.
    pub async fn get_version(&self, name: &str, id: &str, limit: u64) -> Result<Option<Bytes>> {
        let path = self.path(name)?;
        let fetch = || async {
            let options = GetOptions {
                version: Some(id.to_owned()),
                ..Default::default()
            };
            let found = self.inner.get_opts(&path, options).await?;
            match check_limit(&format!("{}/{name}", self.shown), found.meta.size, limit) {
                Ok(()) => Ok(Ok(found.bytes().await?)),
                Err(error) => Ok(Err(error)),
            }
        };
        match self.throttled(fetch).await {
            Ok(bytes) => Ok(Some(bytes?)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.error("reading a version of", name, error)),
        }
    }

    /// Deletes one version for good; one that is not there counts as deleted.
    pub async fn delete_version(&self, name: &str, id: &str) -> Result<Deleted> {
        let doing = "deleting a version of";
        let answer = self.ask(Method::DELETE, name, &[("versionId", id)], doing).await?;
        match answer.status {
            200..300 | 404 => Ok(Deleted::Gone),
            403 => Ok(Deleted::Refused(answer.words())),
            _ => Err(self.refused(&answer, &format!("{doing} {name}"), "s3:DeleteObjectVersion")),
        }
    }

    /// How a version is locked.
    pub async fn lock_of(&self, name: &str, id: &str) -> Result<Option<Lock>> {
        let doing = "asking for the lock of";
        let query = [("retention", ""), ("versionId", id)];
        let answer = self.ask(Method::GET, name, &query, doing).await?;
        if matches!(answer.status, 400 | 404 | 405 | 409 | 501) {
            return Ok(None);
        }
        let found: Retention = self.parse(answer, &format!("{doing} {name}"), "s3:GetObjectRetention")?;
        Ok(Some(Lock {
            mode: found.mode,
            until_us: self.time(&found.retain_until_date)?,
        }))
    }

    /// Locks a version until then, if it is not locked for longer.
    pub async fn set_lock(&self, name: &str, id: &str, lock: Lock) -> Result<()> {
        let until = jiff::Timestamp::from_microsecond(lock.until_us)
            .map_err(|e| Error::usage("the lock would end in no year that there is").caused_by(e))?;
        let body = format!(
            "<Retention xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Mode>{}</Mode><RetainUntilDate>{}</RetainUntilDate></Retention>",
            lock.mode,
            until.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        );
        let query = [("retention", ""), ("versionId", id)];
        let doing = format!("locking {name}");
        let answer = self.send(Method::PUT, name, &query, body, &doing).await?;
        match answer.is_success() {
            true => Ok(()),
            false => Err(self.refused(&answer, &doing, "s3:PutObjectRetention")),
        }
    }

    pub(super) async fn ask(
        &self,
        method: Method,
        name: &str,
        query: &[(&'static str, &str)],
        doing: &str,
    ) -> Result<Answer> {
        let doing = format!("{doing} {name}");
        self.send(method, name, query, String::new(), doing.trim_end()).await
    }

    /// Sends a request about an object, or about the bucket if `name` is empty.
    async fn send(
        &self,
        method: Method,
        name: &str,
        query: &[(&'static str, &str)],
        body: String,
        doing: &str,
    ) -> Result<Answer> {
        let path = match name {
            "" => Path::default(),
            name => self.path(name)?,
        };
        let request = Request {
            method,
            path: &path,
            query: query.iter().map(|(key, value)| (*key, (*value).to_owned())).collect(),
            body,
        };
        let doing = format!("{}: {doing}", self.shown);
        self.requests()?
            .send(&request, self.settings.retry_timeout, &doing)
            .await
    }

    fn requests(&self) -> Result<std::sync::Arc<S3>> {
        match &self.s3 {
            Some(s3) => s3.client(),
            None => Err(
                Error::refused(format!("{} has no versions and no locks of objects", self.shown))
                    .remedy("that is known of S3 buckets only: see immutability in the documentation"),
            ),
        }
    }

    pub(super) fn parse<T: serde::de::DeserializeOwned>(&self, answer: Answer, doing: &str, right: &str) -> Result<T> {
        if !answer.is_success() {
            return Err(self.refused(&answer, doing, right));
        }
        let parsed = answer.parse();
        parsed.map_err(|e| Error::failed(format!("{}: {doing}: the answer cannot be read", self.shown)).caused_by(e))
    }

    /// A time in an answer, microseconds since 1970.
    pub(super) fn time(&self, text: &str) -> Result<i64> {
        match text.parse::<jiff::Timestamp>() {
            Ok(time) => Ok(time.as_microsecond()),
            Err(error) => {
                Err(Error::failed(format!("{}: the store says {text:?} for a time", self.shown)).caused_by(error))
            }
        }
    }

    fn refused(&self, answer: &Answer, doing: &str, right: &str) -> Error {
        let error = Error::failed(format!(
            "{}: {doing}: the store answered {}",
            self.shown,
            answer.words()
        ));
        match answer.status {
            403 => error.remedy(format!("the credentials need the right {right}")),
            _ => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_buckets_are_read() {
        let lock: ObjectLockConfiguration = quick_xml::de::from_str(
            "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>\
             <Mode>COMPLIANCE</Mode><Years>2</Years></DefaultRetention></Rule></ObjectLockConfiguration>",
        )
        .unwrap();
        let rule = lock.rule.unwrap().default_retention.unwrap();
        assert_eq!((rule.mode, rule.days, rule.years), (Mode::Compliance, None, Some(2)));
        let none: VersioningConfiguration = quick_xml::de::from_str("<VersioningConfiguration/>").unwrap();
        assert_eq!(none.status, "");
        let bucket = Bucket {
            default: Some((Mode::Governance, 2)),
            ..Default::default()
        };
        assert_eq!(bucket.locks_until(5), 5 + 2 * DAY_US);
    }
}
