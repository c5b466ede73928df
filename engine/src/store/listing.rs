//! Lists of objects with all of their versions.

use std::collections::VecDeque;

use object_store::signer::Method;
use serde::Deserialize;

use super::Store;
use super::versions::{Object, Version};
use crate::error::{Error, Result};

/// Versions of one object that are looked at; of more, the newest and the oldest ones count.
const MOST_VERSIONS: usize = 10_000;
#[derive(Debug, Deserialize)]
struct ListVersionsResult {
    #[serde(rename = "$value", default)]
    members: Vec<Member>,
}

/// In the order of the answer: versions and markers of an object stand side by side.
#[derive(Debug, Deserialize)]
enum Member {
    Version(Entry),
    DeleteMarker(Entry),
    IsTruncated(bool),
    NextKeyMarker(String),
    NextVersionIdMarker(String),
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    key: String,
    version_id: String,
    last_modified: String,
    #[serde(default)]
    size: u64,
    #[serde(default, rename = "ETag")]
    etag: String,
}

/// Pages of objects with their versions.
#[derive(Debug)]
pub struct Listing<'a> {
    store: &'a Store,
    prefix: String,
    /// Where the next page begins; `None` behind the last one.
    from: Option<(String, String)>,
    /// An object of which the next page may have more versions.
    last: Option<Object>,
}

impl<'a> Listing<'a> {
    /// Of the objects whose names in the bucket begin like this.
    pub fn new(store: &'a Store, prefix: String) -> Self {
        Self {
            store,
            prefix,
            from: Some((String::new(), String::new())),
            last: None,
        }
    }

    /// The next objects, in the order of their names; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Object>>> {
        let Some((key, version)) = self.from.take() else {
            return Ok(self.last.take().map(|last| vec![last]));
        };
        let mut query = vec![("versions", ""), ("max-keys", "1000"), ("prefix", self.prefix.as_str())];
        if !key.is_empty() {
            query.push(("key-marker", &key));
        }
        if !version.is_empty() {
            query.push(("version-id-marker", &version));
        }
        let doing = "listing versions";
        let answer = self.store.ask(Method::GET, "", &query, doing).await?;
        let page: ListVersionsResult = self.store.parse(answer, doing, "s3:ListBucketVersions")?;
        let mut objects: VecDeque<Object> = self.last.take().into_iter().collect();
        let (mut is_truncated, mut next) = (false, (String::new(), String::new()));
        let skip = self.store.key("").len();
        for member in page.members {
            match member {
                Member::Version(entry) => add(&mut objects, entry.version(self.store, false)?, skip),
                Member::DeleteMarker(entry) => add(&mut objects, entry.version(self.store, true)?, skip),
                Member::IsTruncated(truncated) => is_truncated = truncated,
                Member::NextKeyMarker(key) => next.0 = key,
                Member::NextVersionIdMarker(version) => next.1 = version,
                Member::Other => {}
            }
        }
        if is_truncated {
            // A page that leads nowhere would be asked for again and again.
            if next.0.is_empty() || next == (key, version) {
                return Err(Error::failed(format!(
                    "{}: {doing}: the store does not say where the list goes on",
                    self.store.shown
                )));
            }
            self.from = Some(next);
            self.last = objects.pop_back();
        }
        Ok(Some(objects.into()))
    }
}

impl Entry {
    fn version(self, store: &Store, is_marker: bool) -> Result<(String, Version)> {
        let version = Version {
            id: self.version_id,
            is_marker,
            modified_us: store.time(&self.last_modified)?,
            size: self.size,
            etag: self.etag,
        };
        Ok((self.key, version))
    }
}

/// Adds a version; `skip` is the length of what is in front of names.
fn add(objects: &mut VecDeque<Object>, (key, version): (String, Version), skip: usize) {
    let Some(name) = key.get(skip..).filter(|name| !name.is_empty()) else {
        return;
    };
    match objects.back_mut() {
        Some(last) if last.name == name => {
            last.versions.truncate(MOST_VERSIONS);
            last.versions.push(version);
        }
        _ => objects.push_back(Object {
            name: name.to_owned(),
            versions: vec![version],
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::StoreSettings;

    #[test]
    fn versions_and_markers_keep_their_order() {
        let text = "<?xml version=\"1.0\"?><ListVersionsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
            <Name>b</Name><Prefix>p/</Prefix><IsTruncated>true</IsTruncated><NextKeyMarker>p/b</NextKeyMarker>\
            <DeleteMarker><Key>p/a</Key><VersionId>3</VersionId><IsLatest>true</IsLatest>\
            <LastModified>2026-11-24T01:02:04.000Z</LastModified><Owner><ID>o</ID></Owner></DeleteMarker>\
            <Version><Key>p/a</Key><VersionId>2</VersionId><IsLatest>false</IsLatest>\
            <LastModified>2026-11-24T01:02:03.000Z</LastModified><ETag>&quot;x&quot;</ETag><Size>7</Size></Version>\
            <DeleteMarker><Key>p/a</Key><VersionId>1</VersionId><LastModified>2026-11-24T01:02:02Z</LastModified>\
            </DeleteMarker><Version><Key>p/b</Key><VersionId>null</VersionId>\
            <LastModified>2026-11-24T01:02:03Z</LastModified><Size>1</Size></Version></ListVersionsResult>";
        let page: ListVersionsResult = quick_xml::de::from_str(text).unwrap();
        let client = Arc::new(object_store::memory::InMemory::new());
        let store = Store::new(client, "p", "s3://b/p", StoreSettings::default());
        let mut objects = VecDeque::new();
        let mut truncated = false;
        for member in page.members {
            match member {
                Member::Version(entry) => add(&mut objects, entry.version(&store, false).unwrap(), 2),
                Member::DeleteMarker(entry) => add(&mut objects, entry.version(&store, true).unwrap(), 2),
                Member::IsTruncated(is) => truncated = is,
                _ => {}
            }
        }
        assert!(truncated);
        let short: Vec<_> = objects
            .iter()
            .map(|object| {
                let ids: Vec<_> = object.versions.iter().map(|v| (v.id.as_str(), v.is_marker)).collect();
                (object.name.as_str(), ids)
            })
            .collect();
        let expected = vec![
            ("a", vec![("3", true), ("2", false), ("1", true)]),
            ("b", vec![("null", false)]),
        ];
        assert_eq!(short, expected);
        assert!(!objects[0].is_visible() && objects[1].is_visible());
        let content: Vec<_> = objects[0].contents().map(|v| (v.size, v.etag.as_str())).collect();
        assert_eq!(content, [(7, "\"x\"")]);
    }
}
