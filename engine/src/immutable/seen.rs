//! What this host has seen of locks, so that not every lock is asked for every time.
//!
//! A bucket's default locks what is stored from now on. It says nothing of what was stored while it was another one, so it
//! counts only for objects that are younger than the moment when this host first saw it. The ends of older ones are asked
//! for, and remembered: locks are never shortened.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::stanza::Stanza;
use crate::store::versions::{Bucket, DAY_US, Mode, Version};

const FILE: &str = "locks";

/// What was seen.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    default: Option<(Mode, u32)>,
    /// Objects that were stored later are locked by the default, microseconds since 1970.
    since_us: i64,
    /// When the locks of others end, by name.
    ends: BTreeMap<String, i64>,
}

impl Seen {
    /// What is remembered, if the bucket still is as it was.
    pub fn load(stanza: &Stanza, bucket: Bucket) -> Self {
        let text = stanza.memory().and_then(|memory| memory.note(stanza, FILE));
        let seen: Option<Self> = text.and_then(|text| serde_json::from_slice(&text).ok());
        seen.unwrap_or_default().with(bucket, stanza.env().now_us())
    }

    fn with(self, bucket: Bucket, now_us: i64) -> Self {
        if self.default == bucket.default && self.since_us != 0 {
            return self;
        }
        Self {
            default: bucket.default,
            // The store's clock may be ahead of this host's.
            since_us: now_us.saturating_add(DAY_US),
            ends: self.ends,
        }
    }

    /// Until when a version is locked at least, as far as that is known.
    pub fn end(&self, bucket: Bucket, name: &str, version: &Version) -> i64 {
        let by_default = match version.modified_us >= self.since_us {
            true => bucket.locks_until(version.modified_us),
            false => 0,
        };
        self.ends.get(name).copied().unwrap_or(0).max(by_default)
    }

    /// Remembers, of all that are needed, what was found: names and ends.
    pub fn keep(self, stanza: &Stanza, found: BTreeMap<String, i64>) {
        let seen = Self { ends: found, ..self };
        if let Some(memory) = stanza.memory()
            && let Ok(text) = serde_json::to_vec(&seen)
        {
            memory.take_note(stanza, FILE, &text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_says_nothing_of_what_is_older() {
        let bucket = |days| Bucket {
            default: Some((Mode::Compliance, days)),
            ..Bucket::default()
        };
        let version = |modified_us| Version {
            id: String::new(),
            is_marker: false,
            modified_us,
            size: 1,
            etag: String::new(),
        };
        let seen = Seen::default().with(bucket(1), 5 * DAY_US);
        assert_eq!(seen.end(bucket(1), "a", &version(5 * DAY_US)), 0);
        assert_eq!(seen.end(bucket(1), "a", &version(6 * DAY_US)), 7 * DAY_US);
        let seen = Seen {
            ends: [("a".to_owned(), 6 * DAY_US)].into(),
            ..seen.with(bucket(1), 9 * DAY_US)
        };
        assert_eq!(seen.since_us, 6 * DAY_US, "it is as it was");
        assert_eq!(seen.end(bucket(1), "a", &version(0)), 6 * DAY_US);
        let seen = seen.with(bucket(30), 9 * DAY_US);
        assert_eq!(seen.end(bucket(30), "b", &version(9 * DAY_US)), 0);
        assert_eq!(seen.end(bucket(30), "b", &version(10 * DAY_US)), 40 * DAY_US);
        assert_eq!(seen.end(bucket(30), "a", &version(0)), 6 * DAY_US);
    }
}
