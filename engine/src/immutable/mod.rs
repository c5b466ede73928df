//! Buckets that keep versions and lock them: what is needed, what of it is hidden, and how long it is locked.
//!
//! In such a bucket a DELETE puts a marker above an object, and a PUT puts another version above it; nothing that is
//! locked is lost by either. Since fairvault never overwrites, it is always known which version is the right one: of an
//! object that is named by its hash, the one that matches it; of a log entry, the oldest one that follows on the entry
//! before; of anything else, the oldest one.

pub mod extend;
pub mod hidden;
pub mod needs;
pub(crate) mod pieces;
pub mod reliance;
mod seen;
pub mod written;

use crate::error::Result;
use crate::expire::rules::{Calendar, DAY_S, Keep, Retention, days};
use crate::store::Store;
use crate::store::versions::{Bucket, DAY_US};
use reliance::Reliance;

/// How long what is stored today is kept, seconds, as far as ages say so; `None` where numbers of backups or a calendar
/// decide, or nothing does.
pub fn kept_for(retention: &Retention, minimum_s: u64) -> Option<u64> {
    let age = |keep: &Option<Keep>| match keep {
        Some(Keep::Age(age)) => Some(*age),
        _ => None,
    };
    let ages = [
        age(&retention.full),
        age(&retention.diff),
        age(&retention.incr),
        retention.wal,
    ];
    let longest = ages.into_iter().flatten().max()?;
    Some(longest.max(minimum_s))
}

/// What may keep backups for longer than the ages of a retention, in words; `None` if only a hold may.
fn kept_otherwise(retention: &Retention) -> Option<String> {
    let mut kinds = [retention.full, retention.diff, retention.incr].into_iter();
    let has_count = kinds.any(|keep| matches!(keep, Some(Keep::Count(_))));
    let words = [
        (retention.calendar != Calendar::default(), "the calendar"),
        (has_count, "a number of backups"),
        (retention.wal.is_some(), "the window of WAL"),
        // Of one alone there is always a newer one, as long as backups are taken.
        (retention.min_full > 1, "`min_full`"),
    ];
    let said: Vec<&str> = words
        .into_iter()
        .filter(|(is_set, _)| *is_set)
        .map(|(_, word)| word)
        .collect();
    (!said.is_empty()).then(|| format!("{} or a hold", said.join(", ")))
}

/// What `check` says of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice {
    /// What it does.
    pub is: String,
    /// What does not fit together, and what to do.
    pub warnings: Vec<(String, String)>,
    /// Why backups are refused, and what to do.
    pub refused: Option<(String, String)>,
}

impl Advice {
    fn new(is: &str) -> Self {
        Self {
            is: is.to_owned(),
            warnings: Vec::new(),
            refused: None,
        }
    }
}

/// What a repository's bucket does, compared with what is to be kept, and with what backups rely on.
pub async fn advice(
    repository: &Store,
    retention: &Retention,
    minimum_s: u64,
    reliance: Option<&Reliance>,
) -> Result<Advice> {
    let Some(bucket) = repository.bucket().await? else {
        return Ok(Advice::new(
            "not known: only S3 buckets can be asked for versions and locks",
        ));
    };
    let mut advice = advice_on(bucket, retention, minimum_s);
    if let Some(reliance) = reliance.filter(|reliance| bucket.lock && reliance.refuses(bucket)) {
        // The warning says less.
        advice.warnings.clear();
        let days_locked = bucket.locks_until(0) / DAY_US;
        advice.refused = Some((
            format!(
                "backups are kept for {}, and what is stored is locked for {days_locked} d: no backup could rely on another one, so \
                 all but the first are refused",
                days(reliance.kept_s)
            ),
            reliance::WAYS_OUT.to_owned(),
        ));
    }
    Ok(advice)
}

fn advice_on(bucket: Bucket, retention: &Retention, minimum_s: u64) -> Advice {
    let mut advice = Advice::new("");
    if !bucket.versioning {
        "none: the bucket keeps no versions, and whoever may delete or overwrite can destroy backups"
            .clone_into(&mut advice.is);
        return advice;
    }
    let shrinks = "only `gc` with the right to delete versions makes it smaller";
    let Some((mode, locked_days)) = bucket.default.filter(|_| bucket.lock) else {
        advice.is = match bucket.lock {
            true => {
                format!("versions, which can be locked, and new ones are not: there is no default retention; {shrinks}")
            }
            false => format!("versions without locks: whoever may delete versions can destroy backups; {shrinks}"),
        };
        return advice;
    };
    advice.is = format!("versions, locked for {locked_days} days ({mode}); {shrinks}");
    let locked_s = u64::from(locked_days) * DAY_S;
    let Some(kept_s) = kept_for(retention, minimum_s) else {
        advice.is += "; how long backups are kept is not known by age, so `fairvault lock` needs --days";
        return advice;
    };
    if let Some(others) = kept_otherwise(retention) {
        advice.is += &format!(
            "; what {others} keeps for longer than {} is locked for a week ahead only, and by nobody but `fairvault lock`",
            days(kept_s)
        );
    }
    if locked_s < kept_s {
        advice.warnings.push((
            format!(
                "backups and WAL are kept for {}, and locked for {locked_days} days: after that they are not protected",
                days(kept_s)
            ),
            "run `fairvault lock` after each backup, or raise the bucket's default retention".to_owned(),
        ));
        return advice;
    }
    // A day less: so long may a backup take itself.
    let relied_on = match (locked_s.saturating_sub(kept_s) / DAY_S).saturating_sub(1) {
        0 => "nothing that is there".to_owned(),
        few => format!("what was stored in the last {few} days"),
    };
    advice.is += &format!("; unless locks are extended, {relied_on} is locked for as long as a new backup is kept");
    if locked_s > kept_s.saturating_mul(2) && locked_s > kept_s.saturating_add(7 * DAY_S) {
        advice.warnings.push((
            format!(
                "backups and WAL are kept for {}, and locked for {locked_days} days: what has expired is paid for all that time",
                days(kept_s)
            ),
            "lower the bucket's default retention, for objects that are still to come".to_owned(),
        ));
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::versions::Mode;

    fn of(locked: u32, full: Option<Keep>, minimum_s: u64) -> Advice {
        let bucket = Bucket {
            versioning: true,
            has_versions: true,
            lock: true,
            default: Some((Mode::Compliance, locked)),
        };
        let retention = Retention {
            full,
            ..Default::default()
        };
        advice_on(bucket, &retention, minimum_s)
    }

    #[test]
    fn locks_are_compared_with_what_is_kept() {
        let kept = |days| Some(Keep::Age(days * DAY_S));
        assert_eq!(of(30, kept(30), 0).warnings, []);
        assert_eq!(of(45, kept(30), 0).warnings, []);
        assert!(of(29, kept(30), 0).warnings[0].0.contains("not protected"));
        assert!(of(30, kept(7), 31 * DAY_S).warnings[0].0.contains("not protected"));
        assert!(of(90, kept(30), 0).warnings[0].0.contains("paid for"));
        assert!(of(31, kept(30), 0).is.contains("nothing that is there is"));
        assert!(of(45, kept(30), 0).is.contains("in the last 14 days is locked"));
        // Days are not much to pay for.
        assert_eq!(of(7, kept(1), 0).warnings, []);
        let counted = of(7, Some(Keep::Count(3)), 0);
        assert!(
            counted.warnings.is_empty() && counted.is.contains("--days"),
            "{counted:?}"
        );
    }

    #[test]
    fn what_outlives_the_ages_is_said_to_be_locked_by_nobody_else() {
        let bucket = Bucket {
            versioning: true,
            has_versions: true,
            lock: true,
            default: Some((Mode::Compliance, 30)),
        };
        let ages = Retention {
            full: Some(Keep::Age(7 * DAY_S)),
            min_full: 1,
            ..Default::default()
        };
        let said = |retention: &Retention| advice_on(bucket, retention, 0).is;
        assert!(!said(&ages).contains("fairvault lock"), "{}", said(&ages));
        let monthly = Retention {
            calendar: Calendar {
                monthly: 12,
                ..Default::default()
            },
            ..ages.clone()
        };
        let calendar = said(&monthly);
        assert!(
            calendar.contains("what the calendar or a hold keeps for longer than 7 d is locked for a week ahead only"),
            "{calendar}"
        );
        let all = said(&Retention {
            min_full: 3,
            diff: Some(Keep::Count(9)),
            ..monthly
        });
        assert!(
            all.contains("the calendar, a number of backups, `min_full` or a hold keeps"),
            "{all}"
        );
    }

    #[test]
    fn buckets_without_locks_are_said_to_be() {
        let plain = advice_on(Bucket::default(), &Retention::default(), 0);
        assert!(plain.is.contains("no versions"), "{plain:?}");
        let mut bucket = Bucket {
            versioning: true,
            has_versions: true,
            ..Default::default()
        };
        assert!(advice_on(bucket, &Retention::default(), 0).is.contains("without locks"));
        bucket.lock = true;
        assert!(
            advice_on(bucket, &Retention::default(), 0)
                .is
                .contains("no default retention")
        );
    }
}
