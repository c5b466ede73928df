//! Which backups a retention keeps, and why; pure.
//!
//! What always holds: the newest backup that can be restored is kept, whatever the rules say; so is whatever is held,
//! what the signed policy protects, and the backup from which recovery into the WAL window starts. Without any rule
//! for backups, all are kept. Doubt about a time keeps.

#[cfg(test)]
mod tests;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;

pub(crate) const DAY_S: u64 = 86_400;

/// So many, or so old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The newest so many.
    Count(u32),
    /// As long as they are not older, seconds.
    Age(u64),
}

/// What the user wants to keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retention {
    /// Full backups.
    pub full: Option<Keep>,
    /// Differential ones; without, as long as the full before them.
    pub diff: Option<Keep>,
    /// Incremental ones; without, as long as the full before them.
    pub incr: Option<Keep>,
    /// Full backups that are kept however old they are.
    pub min_full: u32,
    /// WAL is continuous for this long, seconds; without, from the oldest kept backup on.
    pub wal: Option<u64>,
    /// The newest backup of each of so many days, weeks, months and years in which there is one.
    pub calendar: Calendar,
    /// Where days begin.
    pub timezone: Option<TimeZone>,
}

/// Numbers of periods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calendar {
    /// Days.
    pub daily: u32,
    /// Weeks, from Monday on.
    pub weekly: u32,
    /// Months.
    pub monthly: u32,
    /// Years.
    pub yearly: u32,
}

impl Retention {
    /// Whether it says anything about backups.
    pub fn has_rules(&self) -> bool {
        self.full.is_some() || self.diff.is_some() || self.incr.is_some() || self.calendar != Calendar::default()
    }

    /// Whether what it says depends on what time it is.
    pub fn has_times(&self) -> bool {
        let mut kinds = [self.full, self.diff, self.incr].into_iter();
        let has_age = kinds.any(|keep| matches!(keep, Some(Keep::Age(_))));
        has_age || self.wal.is_some() || self.calendar != Calendar::default()
    }
}

/// What is known of a backup.
#[derive(Debug, Clone, Default)]
pub struct Candidate {
    /// Id.
    pub id: String,
    /// full, diff, incr.
    pub kind: String,
    /// When it ended, microseconds since 1970.
    pub stopped_us: i64,
    /// The incarnation of its cluster.
    pub system_identifier: u64,
    /// Its own WAL is complete.
    pub restorable: bool,
    /// Why its content cannot be restored as it is, if that is known.
    pub damage: Option<String>,
    /// Timelines into whose younger WAL recovery can go from it.
    pub timelines: Vec<u32>,
    /// Why it is held, if it is.
    pub hold: Option<String>,
}

impl Candidate {
    /// Whether recovery can begin from it. One from which it cannot takes the place of none that rules by number keep.
    pub(crate) fn is_good(&self) -> bool {
        self.restorable && self.damage.is_none()
    }
}

/// What is to become of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Backup.
    pub id: String,
    /// It stays.
    pub keep: bool,
    /// Why, in words.
    pub why: String,
    /// Recovery into later WAL starts from it: that stays too, not only what the backup itself needs.
    pub goes_on: bool,
}

/// What the signed policy asks for at least.
#[derive(Debug, Clone, Copy, Default)]
pub struct Floor {
    /// Age before which nothing expires, seconds.
    pub age_s: u64,
    /// Full backups that stay.
    pub fulls: u32,
}

/// Times that can be believed, one for each backup in the order of the log: a time from the future is that of what
/// came after it, or now; one that is before an earlier backup's is that one's. So what is in doubt is young.
pub fn believed(mut times: Vec<i64>, now_us: i64) -> Vec<i64> {
    let mut after = now_us;
    for time in times.iter_mut().rev() {
        match *time > now_us {
            true => *time = after,
            false => after = *time,
        }
    }
    let mut before = i64::MIN;
    for time in &mut times {
        *time = (*time).max(before);
        before = *time;
    }
    times
}

/// Decides about all backups, given in the order of the log.
pub fn decide(backups: &[Candidate], retention: &Retention, floor: Floor, now_us: i64) -> Vec<Decision> {
    let times = believed(backups.iter().map(|b| b.stopped_us).collect(), now_us);
    let age = |n: usize| u64::try_from(now_us.saturating_sub(times[n]) / 1_000_000).unwrap_or(0);
    let mut why: Vec<Option<String>> = vec![None; backups.len()];
    let mut keep = |n: usize, reason: String| _ = why[n].get_or_insert(reason);

    // What nothing overrules.
    for (n, backup) in backups.iter().enumerate() {
        if let Some(reason) = &backup.hold {
            keep(n, format!("held: {reason}"));
        }
        if floor.age_s > 0 && age(n) < floor.age_s {
            keep(
                n,
                format!("younger than the {} of the signed policy", days(floor.age_s)),
            );
        }
    }
    let newest = backups
        .iter()
        .rposition(Candidate::is_good)
        .or(backups.len().checked_sub(1));
    if let Some(n) = newest {
        keep(n, "the newest that can be restored".to_owned());
    }
    if !retention.has_rules() {
        (0..backups.len()).for_each(|n| keep(n, "no retention of backups is configured".to_owned()));
    }
    let of_kind = |kind: &'static str| {
        let all = backups.iter().enumerate().rev();
        all.filter(move |(_, b)| b.kind == kind).map(|(n, _)| n)
    };
    // Down to the last of `count` good ones.
    let newest_of = |kind: &'static str, count: usize| {
        let mut good = 0;
        of_kind(kind).take_while(move |&n| {
            let is_wanted = good < count;
            good += usize::from(backups[n].is_good());
            is_wanted
        })
    };
    let fulls = retention.min_full.max(floor.fulls) as usize;
    for n in newest_of("full", fulls) {
        keep(n, format!("one of the {fulls} newest full backups"));
    }
    for (kind, rule) in [
        ("full", retention.full),
        ("diff", retention.diff),
        ("incr", retention.incr),
    ] {
        match rule {
            Some(Keep::Count(count)) => newest_of(kind, count as usize)
                .for_each(|n| keep(n, format!("one of the {count} newest {kind} backups"))),
            Some(Keep::Age(limit)) => of_kind(kind)
                .filter(|&n| age(n) < limit)
                .for_each(|n| keep(n, format!("{kind}, younger than {}", days(limit)))),
            // Full backups go by other rules, or not at all.
            None if kind == "full" && retention.calendar == Calendar::default() => {
                of_kind(kind).for_each(|n| keep(n, "no retention of full backups is configured".to_owned()));
            }
            None => {}
        }
    }
    // After a clock that was ahead, what came later is believed to be of the day that this one said. By what they say
    // themselves, backups are of other days, and what is from the future may take the place of others: what is kept either
    // way stays.
    let said: Vec<(usize, i64)> = backups.iter().map(|b| b.stopped_us).enumerate().collect();
    let past: Vec<(usize, i64)> = said.iter().copied().filter(|(_, time)| *time <= now_us).collect();
    let trusted: Vec<(usize, i64)> = times.iter().copied().enumerate().collect();
    for dated in [trusted, past, said] {
        by_calendar(backups, dated, retention, &mut keep);
    }
    let mut starts = BTreeSet::new();
    if let Some(window) = retention.wal {
        // Of each timeline of each incarnation: recovery to the beginning of the window starts from it.
        let mut anchors: BTreeMap<(u64, u32), usize> = BTreeMap::new();
        for (n, backup) in backups.iter().enumerate() {
            if backup.is_good() && age(n) >= window {
                let timelines = backup.timelines.iter();
                anchors.extend(timelines.map(|&timeline| ((backup.system_identifier, timeline), n)));
            }
        }
        for n in anchors.into_values().collect::<BTreeSet<_>>() {
            // Where a later life of the cluster has been going on for longer than that, nothing starts from it.
            // One that was gone back to goes on itself. What nothing starts from replaces nothing.
            let is_same = |m: usize| backups[m].system_identifier == backups[n].system_identifier;
            let last = (n..backups.len()).rev().find(|&m| is_same(m)).unwrap_or(n);
            let replaced = (last + 1..backups.len()).any(|m| age(m) >= window && backups[m].is_good());
            if !replaced {
                keep(n, format!("recovery into the last {} starts from it", days(window)));
                starts.insert(n);
            }
        }
    }
    // The others follow the full before them, last, when that is decided.
    for (n, backup) in backups.iter().enumerate() {
        let rule = match backup.kind.as_str() {
            "diff" => retention.diff,
            "incr" => retention.incr,
            _ => continue,
        };
        if rule.is_some() || why[n].is_some() {
            continue;
        }
        let full = (0..n).rev().find(|&m| backups[m].kind == "full");
        let kept = match full {
            Some(full) if why[full].is_some() => Some(format!("as long as {}", backups[full].id)),
            // It has no full before it, and counts as one.
            None => {
                let newer = (n..backups.len()).filter(|&m| backups[m].kind == "full").count();
                let expires = match retention.full {
                    Some(Keep::Age(limit)) => age(n) >= limit,
                    Some(Keep::Count(count)) => newer >= count as usize,
                    None => retention.calendar != Calendar::default(),
                };
                (!expires).then(|| "no full backup before it".to_owned())
            }
            _ => None,
        };
        why[n] = kept;
    }
    let decisions = backups.iter().zip(why).enumerate().map(|(n, (backup, why))| Decision {
        id: backup.id.clone(),
        keep: why.is_some(),
        goes_on: why.is_some()
            && retention
                .wal
                .is_none_or(|window| age(n) < window.max(floor.age_s) || starts.contains(&n)),
        why: why.unwrap_or_else(|| format!("{}, {} old: no rule keeps it", backup.kind, days(age(n)))),
    });
    decisions.collect()
}

/// Keeps what the calendar keeps of backups that ended at these times, in the order of the log.
fn by_calendar(
    backups: &[Candidate],
    dated: Vec<(usize, i64)>,
    retention: &Retention,
    keep: &mut impl FnMut(usize, String),
) {
    let zone = retention.timezone.clone().unwrap_or(TimeZone::UTC);
    let date = |us| {
        Timestamp::from_microsecond(us)
            .unwrap_or_default()
            .to_zoned(zone.clone())
    };
    let dates = dated.into_iter().map(|(n, us)| (n, date(us).date()));
    // The newest first, those from which recovery can begin before others.
    let (good, others): (Vec<_>, Vec<_>) = dates.rev().partition(|(n, _)| backups[*n].is_good());
    type Period = fn(jiff::civil::Date) -> String;
    let Calendar {
        daily,
        weekly,
        monthly,
        yearly,
    } = retention.calendar;
    let periods: [(u32, &str, Period); 4] = [
        (daily, "day", |date| date.to_string()),
        (weekly, "week", |date| {
            let week = date.iso_week_date();
            format!("{}-W{:02}", week.year(), week.week())
        }),
        (monthly, "month", |date| date.strftime("%Y-%m").to_string()),
        (yearly, "year", |date| date.strftime("%Y").to_string()),
    ];
    for (count, word, period) in periods {
        let mut newest = BTreeMap::new();
        for &(n, date) in good.iter().chain(&others) {
            if let Entry::Vacant(free) = newest.entry(period(date)) {
                free.insert(n);
            }
        }
        // Down to the last of `count` periods that have a good one.
        let mut found = 0;
        for (name, n) in newest.into_iter().rev() {
            if found == count {
                break;
            }
            found += u32::from(backups[n].is_good());
            keep(n, format!("the newest of {word} {name}"));
        }
    }
}

/// A length of time in the largest unit that fits.
pub fn days(seconds: u64) -> String {
    match seconds {
        s if s >= DAY_S => format!("{} d", s / DAY_S),
        s if s >= 3600 => format!("{} h", s / 3600),
        s if s >= 60 => format!("{} min", s / 60),
        s => format!("{s} s"),
    }
}
