//! Whether clocks can be believed. By one that is ahead, backups that are young expire, and locks that nobody can take back
//! last for years; by one that is behind, locks end too soon.
//!
//! What always holds: a doubt comes from what the log says, and nothing but somebody who vouches for the clock overcomes
//! it. A clock that stays ahead is believed once it has taken backups on three days.

use fairvault_format::proto::{LogEntry, log_entry::Kind as Entry};

use super::rules::days;
use crate::commit::Log;
use crate::error::{Error, Result};
use crate::restore::target::info;
use crate::store::versions::DAY_US;

/// Time without a backup from which on a clock is doubted, however rare backups are, microseconds.
pub(crate) const QUIET_US: i64 = 45 * DAY_US;
/// Time without a backup that is never too long where expiry is decided: a long weekend, microseconds.
const WEEKEND_US: i64 = 4 * DAY_US;
/// What was taken within this time counts as one, microseconds: how often says nothing then.
const AT_ONCE_US: i64 = DAY_US / 2;
/// So many of the newest times without a backup are looked at: the one before now, and the one before the newest backup.
const DOUBTED: usize = 2;
/// How long is too long follows from so many times without a backup that came before.
const BEFORE: usize = 5;
/// Fewer say nothing of it.
const LEAST_BEFORE: usize = 3;
/// So many times the longest of those is not too long: one backup, or two, may have failed.
const TIMES: i64 = 3;
/// Clocks of two hosts may differ by that, microseconds.
const APART_US: i64 = DAY_US / 24;

/// A time without a backup that is too long. All in microseconds, the first two since 1970.
#[derive(Debug, PartialEq, Eq)]
struct Quiet {
    from_us: i64,
    to_us: i64,
    limit_us: i64,
}

/// What is too long for backups that are as rare as these: times between them, the newest first.
fn usual(before: &[i64]) -> i64 {
    let longest = before.iter().take(BEFORE).max();
    match longest.filter(|_| before.len() >= LEAST_BEFORE) {
        Some(longest) => longest.saturating_mul(TIMES).clamp(WEEKEND_US, QUIET_US),
        None => QUIET_US,
    }
}

/// The newest of the last times without a backup that is too long, given when backups were taken, and now. What is too long
/// `limit` says, given those that came before.
fn too_long(mut times: Vec<i64>, limit: impl Fn(&[i64]) -> i64) -> Option<Quiet> {
    times.sort_unstable_by(|a, b| b.cmp(a));
    times.dedup_by(|older, newer| newer.saturating_sub(*older) < AT_ONCE_US);
    let between: Vec<i64> = times.windows(2).map(|pair| pair[0].saturating_sub(pair[1])).collect();
    let mut last = times.windows(2).enumerate().take(DOUBTED).map(|(n, pair)| Quiet {
        from_us: pair[1],
        to_us: pair[0],
        limit_us: limit(&between[n + 1..]),
    });
    last.find(|quiet| quiet.to_us.saturating_sub(quiet.from_us) > quiet.limit_us)
}

/// When backups were taken, given in the order of the log, without those that come from the future, if there are later ones
/// of two days that do not: then the clock of whoever took them was wrong, and is no more.
fn believable(mut said: Vec<i64>, now_us: i64) -> Vec<i64> {
    let since = said
        .iter()
        .rposition(|time_us| *time_us > now_us)
        .map_or(0, |last| last + 1);
    let later = &said[since..];
    let spans = |later: &[i64]| Some(later.iter().max()?.saturating_sub(*later.iter().min()?));
    if spans(later).is_some_and(|span_us| span_us >= 2 * DAY_US - AT_ONCE_US) {
        said.retain(|time_us| *time_us <= now_us);
    }
    said
}

/// Fails if backups seem to be old because a clock is ahead: this host's, or that of whoever took the newest ones.
pub fn check(log: &Log, now_us: i64) -> Result<()> {
    let backups: Vec<_> = log.state().backups.iter().map(info).collect();
    let mut times = believable(backups.iter().map(|info| info.stopped_us).collect(), now_us);
    times.push(now_us);
    // How often somebody copies says nothing of how often backups are taken.
    let is_copied = backups.last().is_some_and(|info| info.copied_from.is_some());
    match too_long(times, |before| if is_copied { QUIET_US } else { usual(before) }) {
        None => Ok(()),
        Some(quiet) => Err(in_doubt(log, &quiet, now_us, "backups that are young would expire")),
    }
}

/// Fails if locks would last too long because this host's clock is ahead by weeks, or end too soon because it is behind. How
/// often backups are taken says nothing here: what is not locked because of a doubt is protected for less long, and what is
/// locked for some days too long costs some days. Where entries of the log are kept, they count as well: locks that were
/// extended say that the clock was believed then.
pub fn check_for_locks(log: &Log, now_us: i64) -> Result<()> {
    let backups = &log.state().backups;
    let entries = || log.entries().iter().filter(move |entry| !log.is_void(entry.seq));
    // Notes are no evidence: whoever is behind leaves some by looking, and by being refused.
    let is_note = |entry: &&LogEntry| matches!(entry.kind, Some(Entry::Operation(_)));
    let newest = match entries().rfind(|entry| !is_note(entry)) {
        Some(entry) => Some((entry.seq, entry.time_us)),
        None => backups
            .iter()
            .max_by_key(|backup| backup.seq)
            .map(|backup| (backup.seq, info(backup).stopped_us)),
    };
    if let Some((seq, time_us)) = newest.filter(|(_, time_us)| time_us.saturating_sub(now_us) > APART_US) {
        return Err(Error::refused(format!(
            "by this host's clock it is {}, and entry {seq} of the log of {}, the newest, is of {}: if this host's clock is \
             behind, locks would end too soon",
            shown(now_us),
            log.stanza().shown(),
            shown(time_us)
        ))
        .remedy(VOUCH));
    }
    let is_lock = |entry: &&LogEntry| matches!(&entry.kind, Some(Entry::Operation(done)) if done.what == "lock" && done.result.starts_with(EXTENDED));
    let locked = entries().filter(is_lock).map(|entry| entry.time_us);
    let mut times: Vec<i64> = backups.iter().map(|b| info(b).stopped_us).chain(locked).collect();
    // Nothing is locked for longer because of what comes from the future.
    times.retain(|time_us| *time_us <= now_us);
    if times.is_empty() {
        times.extend(entries().next().map(|entry| entry.time_us));
    }
    times.push(now_us);
    match too_long(times, |_| QUIET_US) {
        None => Ok(()),
        Some(quiet) => Err(in_doubt(
            log,
            &quiet,
            now_us,
            "locks would last too long, and nobody can take them back",
        )),
    }
}

/// How the note of a `lock` that went as it should begins: a clock was believed then.
pub(crate) const EXTENDED: &str = "the locks of ";

const VOUCH: &str = "if the clock is right, say so with --trust-clock";

fn in_doubt(log: &Log, quiet: &Quiet, now_us: i64, what: &str) -> Error {
    let days = |us: i64| days(u64::try_from(us / 1_000_000).unwrap_or(0));
    Error::refused(format!(
        "from {} to {} no backup of {} seems to have been taken, for {}, and more than {} is in doubt; by this host's clock it \
         is {}: if a clock is ahead, {what}",
        shown(quiet.from_us),
        shown(quiet.to_us),
        log.stanza().shown(),
        days(quiet.to_us.saturating_sub(quiet.from_us)),
        days(quiet.limit_us),
        shown(now_us)
    ))
    .remedy(VOUCH)
}

fn shown(us: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(us).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = DAY_US / 24;

    /// What is in doubt of backups that were taken so many hours before now, in whole days.
    fn doubted(hours: &[i64]) -> Option<i64> {
        // Nobody takes them to the minute.
        let taken = hours
            .iter()
            .zip(0_i64..)
            .map(|(hours, n)| -hours * HOUR - n % 7 * 60_000_000);
        let quiet = too_long(taken.chain([0]).collect(), usual)?;
        Some((quiet.to_us - quiet.from_us + HOUR) / DAY_US)
    }

    /// So many backups, so many hours apart, the newest so many hours ago.
    fn each(every: i64, count: i64, ago: i64) -> Vec<i64> {
        (0..count).rev().map(|n| n * every + ago).collect()
    }

    #[test]
    fn one_from_the_future_is_passed_over_once_others_have_come() {
        let now = 1000 * DAY_US;
        let ahead = now + 300 * DAY_US;
        let nights = |count: i64| (0..count).rev().map(move |n| now - n * DAY_US);
        let all = |later: i64| {
            [now - 9 * DAY_US, ahead]
                .into_iter()
                .chain(nights(later))
                .collect::<Vec<_>>()
        };
        assert_eq!(believable(all(2), now), all(2), "they are of one day");
        assert!(!believable(all(3), now).contains(&ahead));
        // It is this host that is behind.
        let behind = vec![now - DAY_US, now + DAY_US, now + 2 * DAY_US];
        assert_eq!(believable(behind.clone(), now), behind);
    }

    #[test]
    fn what_is_usual_is_not_in_doubt() {
        // Nobody knows how often.
        for hours in [&[][..], &[0], &[1000], &[24, 0], &[900, 24], &[1000, 990, 980, 970]] {
            assert_eq!(doubted(hours), None, "{hours:?}");
        }
        // Each night; one or two have failed.
        for missed in 0..3 {
            assert_eq!(doubted(&each(24, 30, 1 + missed * 24)), None);
            assert_eq!(doubted(&[each(24, 30, 24 * (missed + 1)), vec![0]].concat()), None);
        }
        // A full one each week and a differential one each night; full ones alone, of which one has failed.
        assert_eq!(doubted(&[each(24, 60, 2), each(7 * 24, 9, 3)].concat()), None);
        assert_eq!(doubted(&each(7 * 24, 5, 13 * 24)), None);
        assert_eq!(doubted(&[each(7 * 24, 5, 14 * 24), vec![0]].concat()), None);
        // On workdays: each night, and each hour from eight to six.
        let night = |n: i64| (n / 5 * 7 + n % 5) * 24;
        let nights: Vec<i64> = (0..20).map(|n| night(19) + 3 * 24 - night(n)).collect();
        assert_eq!(doubted(&nights), None, "after a weekend");
        assert_eq!(doubted(&nights[15..]), None, "after the first");
        let hours = (0..5).flat_map(|day| (8..=18).map(move |hour| day * 24 + hour));
        let hours: Vec<i64> = hours.map(|hour| 7 * 24 + 8 - hour).collect();
        assert_eq!(doubted(&hours), None);
        // Many at once say nothing of how often they are taken.
        assert_eq!(doubted(&[34 * 24 + 3, 34 * 24 + 2, 34 * 24 + 1, 34 * 24]), None);
    }

    #[test]
    fn what_is_far_more_than_usual_is_in_doubt() {
        assert_eq!(doubted(&[46 * 24]), Some(46));
        for ahead in [8, 40, 1000] {
            let by_it = |days: i64| [each(24, 8, (ahead + days - 1) * 24), each(24, days, 0)].concat();
            // This host's clock alone; then backups were taken by it on one day, and on two.
            assert_eq!(doubted(&each(24, 8, ahead * 24)), Some(ahead));
            assert_eq!(doubted(&by_it(1)), Some(ahead));
            assert_eq!(doubted(&by_it(2)), Some(ahead));
            assert_eq!(doubted(&by_it(3)), None, "it is believed at last");
        }
        assert_eq!(doubted(&each(7 * 24, 8, 22 * 24)), Some(22));
        // One is from the future: another host's clock is ahead, or this one is behind.
        assert_eq!(doubted(&[each(24, 8, 1), vec![-10 * 24]].concat()), Some(10));
        // Two at a time are one.
        let twice = each(24, 8, 8 * 24).into_iter().flat_map(|hours| [hours + 1, hours]);
        assert_eq!(doubted(&twice.collect::<Vec<_>>()), Some(8));
    }
}
