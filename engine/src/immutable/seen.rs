//! What this host has seen of locks, so that not every lock is asked for every time.
//!
//! A bucket's default locks what is stored from now on. It says nothing of what was stored while it was another one, so it
//! counts only for objects that are younger than the moment when this host first saw it. The ends of older ones are asked
//! for, and remembered: locks are never shortened.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::stanza::Stanza;
use crate::store::versions::{Bucket, DAY_US, Lock, Mode, Version};

const FILE: &str = "locks";

/// What was seen.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    default: Option<(Mode, u32)>,
    /// Objects that were stored later are locked by the default, microseconds since 1970.
    since_us: i64,
    /// When the locks of others end, by name and version: of those that nobody ends early.
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
        self.known(name, version).map_or(0, |(_, end)| end).max(by_default)
    }

    /// What is remembered of a version.
    pub fn known(&self, name: &str, version: &Version) -> Option<(String, i64)> {
        let key = key(name, version);
        let end = *self.ends.get(&key)?;
        Some((key, end))
    }

    /// Remembers, of all that are needed, what was found: names and ends.
    pub fn keep(self, stanza: &Stanza, found: BTreeMap<String, i64>) {
        Self { ends: found, ..self }.note(stanza);
    }

    /// Remembers what was found beside what was known before, as long as it lasts.
    pub fn keep_also(mut self, stanza: &Stanza, found: BTreeMap<String, i64>) {
        self.ends.extend(found);
        let now_us = stanza.env().now_us();
        self.ends.retain(|_, end| *end > now_us);
        self.note(stanza);
    }

    fn note(&self, stanza: &Stanza) {
        if let Some(memory) = stanza.memory()
            && let Ok(text) = serde_json::to_vec(self)
        {
            memory.take_note(stanza, FILE, &text);
        }
    }
}

fn key(name: &str, version: &Version) -> String {
    format!("{name}#{}", version.id)
}

/// What to remember of a lock that was asked for or made.
pub fn to_remember(name: &str, version: &Version, lock: Lock) -> Option<(String, i64)> {
    (lock.mode == Mode::Compliance).then(|| (key(name, version), lock.until_us))
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
            id: "v".to_owned(),
            is_marker: false,
            modified_us,
            size: 1,
            etag: String::new(),
        };
        let seen = Seen::default().with(bucket(1), 5 * DAY_US);
        assert_eq!(seen.end(bucket(1), "a", &version(5 * DAY_US)), 0);
        assert_eq!(seen.end(bucket(1), "a", &version(6 * DAY_US)), 7 * DAY_US);
        let seen = Seen {
            ends: [("a#v".to_owned(), 6 * DAY_US)].into(),
            ..seen.with(bucket(1), 9 * DAY_US)
        };
        assert_eq!(seen.since_us, 6 * DAY_US, "it is as it was");
        assert_eq!(seen.end(bucket(1), "a", &version(0)), 6 * DAY_US);
        let seen = seen.with(bucket(30), 9 * DAY_US);
        assert_eq!(seen.end(bucket(30), "b", &version(9 * DAY_US)), 0);
        assert_eq!(seen.end(bucket(30), "b", &version(10 * DAY_US)), 40 * DAY_US);
        assert_eq!(seen.end(bucket(30), "a", &version(0)), 6 * DAY_US);
        let another = Version {
            id: "w".to_owned(),
            ..version(0)
        };
        assert_eq!(seen.end(bucket(30), "a", &another), 0, "it was stored anew");
        let lock = |mode| Lock { mode, until_us: 5 };
        assert_eq!(
            to_remember("a", &another, lock(Mode::Compliance)),
            Some(("a#w".to_owned(), 5))
        );
        assert_eq!(
            to_remember("a", &another, lock(Mode::Governance)),
            None,
            "it may be ended early"
        );
    }
}
