//! Packs that a new backup would rely on although their locks end before it expires: it would be protected for less long
//! than it seems. Where somebody may extend locks, theirs are extended before the backup counts; where nobody may, they are
//! left alone, and their content is stored again, unless the configuration says that nobody cares.
//!
//! What always holds: a lock lasts as long as is known of it, or, where nobody has asked for that, as long as the bucket's
//! default says as far as this host has seen it. The oldest version counts, since nothing was
//! ever overwritten: whoever stores another one above it makes no lock longer.

use std::collections::HashSet;

use fairvault_format::names;
use fairvault_format::proto::Snapshot;

use super::extend;
use super::seen::Seen;
use crate::error::{Context, Error, Kind, Result};
use crate::expire::rules::days;
use crate::stanza::Stanza;
use crate::store::Store;
use crate::store::versions::DAY_US;

/// For how long the packs must be locked that a backup relies on.
#[derive(Debug, Clone)]
pub struct Reliance {
    /// How long backups are kept, seconds.
    pub kept_s: u64,
    /// The repository with credentials that may extend locks. Without, what is not locked for long enough is stored again.
    pub keeper: Option<Store>,
    /// Somebody has asked for that: then only what is known of a lock counts, and a bucket that may not be asked is an
    /// error. Otherwise the bucket's default is taken to have been what it is.
    pub is_asked_for: bool,
}

/// How long the signed policy keeps every backup, seconds.
pub fn minimum_s(state: &Snapshot) -> u64 {
    state.policy.as_ref().map_or(0, |policy| policy.minimum_retention_s)
}

impl Reliance {
    /// The same for what is kept for as long as the signed policy says, at least.
    #[must_use]
    pub fn under(self, state: &Snapshot) -> Self {
        let kept_s = self.kept_s.max(minimum_s(state));
        Self { kept_s, ..self }
    }

    /// Packs whose content is to be stored again: none where somebody extends locks. If that would be everything every
    /// time, it is none as well, with a note: a backup that relies on what is there is better than none.
    pub async fn stored_again(&self, stanza: &Stanza, notes: &mut Vec<String>) -> Result<HashSet<[u8; 32]>> {
        if self.keeper.is_some() {
            return Ok(HashSet::new());
        }
        match ending(stanza, self.kept_s, self.is_asked_for).await {
            Err(error) if error.kind() == Kind::Refused || (!self.is_asked_for && error.kind() != Kind::Temporary) => {
                notes.push(format!("nothing is stored again because of its lock: {error}"));
                Ok(HashSet::new())
            }
            other => {
                let ending = other?;
                if !ending.is_empty() {
                    notes.push(format!(
                        "{} packs are locked for less long than this backup is kept: what it needs of them is stored again",
                        ending.len()
                    ));
                }
                Ok(ending)
            }
        }
    }

    /// Has the locks of packs that a backup relies on extended, where somebody may. A note says if that fails; where
    /// somebody has asked for it, that is an error.
    pub async fn extend_locks(
        &self,
        stanza: &Stanza,
        packs: &HashSet<[u8; 32]>,
        notes: &mut Vec<String>,
    ) -> Result<()> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        match extend::packs(stanza, keeper, packs, self.kept_s).await {
            Ok(extended) => tracing::debug!("the locks of {extended} packs were extended"),
            Err(error) if self.is_asked_for => {
                return Err(error).context(|| "extending the locks of what this backup relies on (store_again = true)");
            }
            Err(error) => notes.push(format!(
                "the locks of what this backup relies on could not be extended, and some of them may end before it expires \
                 (`fairvault lock`): {error}"
            )),
        }
        Ok(())
    }
}

/// Until when something must be locked, microseconds since 1970.
pub(super) fn until_us(stanza: &Stanza, kept_s: u64) -> i64 {
    let kept_us = i64::try_from(kept_s.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
    stanza.env().now_us().saturating_add(kept_us)
}

/// Packs whose locks do not last as long as a backup that begins now is kept, or, if `is_strict`, of which that is not
/// known. Nothing is asked of single packs: that what was extended is not known here stores it again.
async fn ending(stanza: &Stanza, kept_s: u64, is_strict: bool) -> Result<HashSet<[u8; 32]>> {
    let store = stanza.store();
    let Some(bucket) = store.bucket().await?.filter(|bucket| bucket.lock) else {
        return Ok(HashSet::new());
    };
    // Since when the default has been what it is: noted also where it is too short, or nobody would know later that it was.
    let seen = Seen::load(stanza, bucket);
    seen.note(stanza);
    let locked_us = bucket.locks_until(0);
    // A backup may take a day itself.
    let until_us = until_us(stanza, kept_s).saturating_add(DAY_US);
    if locked_us <= until_us.saturating_sub(stanza.env().now_us()) {
        return Err(Error::refused(format!(
            "backups are kept for {}, and what is stored is locked for {} d: nothing that is there could be relied on, and \
             every backup would store everything again",
            days(kept_s),
            locked_us / DAY_US
        ))
        .remedy("raise the bucket's default retention to twice of what is kept, or extend locks (`keeper`) instead"));
    }
    let mut ending = HashSet::new();
    let folder = format!("{}/", names::PACKS);
    let mut listing = store.versions(&folder);
    while let Some(page) = listing.next().await? {
        for object in page {
            let oldest = object.contents().next();
            let end = oldest.map(|version| match is_strict {
                true => seen.end(bucket, &object.name, version),
                false => seen.likely_end(bucket, &object.name, version),
            });
            if end.is_none_or(|end| end < until_us) {
                ending.extend(names::parse_hash(&object.name));
            }
        }
    }
    Ok(ending)
}
