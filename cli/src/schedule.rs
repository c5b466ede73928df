//! Which kind of backup is due: what a plain `backup` takes where the stanza has a `schedule`.
//!
//! What always holds: a kind is due from the moment that its expression names until a backup of that kind, or of one
//! that reads more, has begun; of several kinds that are due, the one that reads most is taken. So a backup that was
//! missed, or that failed, is taken by whichever run comes next.

use std::str::FromStr;

use croner::Cron;
use fairvault_engine::backup::Kind;
use fairvault_engine::error::{Error, Result};
use fairvault_format::proto::BackupInfo;
use jiff::{Timestamp, Zoned};

use crate::config;
use crate::time;

/// When backups of each kind are due.
pub struct Schedule {
    /// From the kind that reads most to the one that reads least.
    kinds: Vec<(Kind, Cron)>,
    zone: jiff::tz::TimeZone,
}

/// A kind, and why.
pub struct Due {
    /// The kind.
    pub kind: Kind,
    /// For people.
    pub why: String,
}

impl Schedule {
    /// From the configuration of a stanza.
    pub fn new(configured: &config::Schedule) -> Result<Self> {
        let parse = |(kind, key, text): (Kind, &str, &Option<String>)| {
            let text = text.as_ref()?;
            let bad = |e| {
                Error::usage(format!("schedule.{key} = {text:?} is no cron expression"))
                    .caused_by(e)
                    .remedy("write minute, hour, day, month and weekday, such as \"0 2 * * SUN\"")
            };
            Some(Cron::from_str(text).map_err(bad).map(|cron| (kind, cron)))
        };
        let all = [
            (Kind::Full, "full", &configured.full),
            (Kind::Diff, "diff", &configured.diff),
            (Kind::Incr, "incr", &configured.incr),
        ];
        Ok(Self {
            kinds: all.into_iter().filter_map(parse).collect::<Result<_>>()?,
            zone: time::zone(configured.timezone.as_deref())?,
        })
    }

    /// What is due at `now`, after these backups. Where nothing is, the kind that reads least of those that are
    /// scheduled. `None` without any kind.
    pub fn due<'a>(&self, now: Timestamp, taken: impl Iterator<Item = &'a BackupInfo> + Clone) -> Option<Due> {
        let now = now.to_zoned(self.zone.clone());
        for (kind, cron) in &self.kinds {
            // An expression that never was is never due.
            let Ok(since) = cron.find_previous_occurrence(&now, true) else {
                continue;
            };
            let newest = taken
                .clone()
                .filter(|info| weight(&info.r#type) >= weight(name(*kind)))
                .map(|info| info.started_us)
                .max();
            if newest.is_none_or(|started| started < since.timestamp().as_microsecond()) {
                let why = format!("the schedule asks for {} since {}", name(*kind), shown(&since));
                return Some(Due { kind: *kind, why });
            }
        }
        let (kind, _) = self.kinds.last()?;
        Some(Due {
            kind: *kind,
            why: format!("nothing is due by the schedule, and {} reads least", name(*kind)),
        })
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Full => "full",
        Kind::Diff => "diff",
        Kind::Incr | Kind::Auto => "incr",
    }
}

fn weight(name: &str) -> u32 {
    match name {
        "full" => 2,
        "diff" => 1,
        _ => 0,
    }
}

fn shown(time: &Zoned) -> String {
    time.strftime("%Y-%m-%d %H:%M %Z").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(zone: &str) -> Schedule {
        Schedule::new(&config::Schedule {
            full: Some("0 2 * * SUN".into()),
            diff: Some("0 2 * * MON-SAT".into()),
            incr: Some("0 9-18 * * MON-FRI".into()),
            timezone: Some(zone.into()),
        })
        .unwrap()
    }

    fn taken(kind: &str, at: &str) -> BackupInfo {
        BackupInfo {
            r#type: kind.into(),
            started_us: at.parse::<Timestamp>().unwrap().as_microsecond(),
            ..Default::default()
        }
    }

    fn due(schedule: &Schedule, now: &str, taken: &[BackupInfo]) -> Kind {
        schedule.due(now.parse().unwrap(), taken.iter()).unwrap().kind
    }

    #[test]
    fn the_kind_that_reads_most_of_those_that_are_due_is_taken() {
        let berlin = schedule("Europe/Berlin");
        // 2026-11-22 is a Sunday; Berlin is an hour ahead.
        let mut all = Vec::new();
        assert_eq!(due(&berlin, "2026-11-22T01:00:00Z", &all), Kind::Full);
        all.push(taken("full", "2026-11-22T01:00:01Z"));
        assert_eq!(due(&berlin, "2026-11-23T00:59:59Z", &all), Kind::Incr);
        assert_eq!(due(&berlin, "2026-11-23T01:00:00Z", &all), Kind::Diff);
        all.push(taken("diff", "2026-11-23T01:00:01Z"));
        assert_eq!(due(&berlin, "2026-11-23T08:00:00Z", &all), Kind::Incr);
        all.push(taken("incr", "2026-11-23T08:00:01Z"));
        // Tuesday's differential one was missed: the hourly run makes up for it.
        assert_eq!(due(&berlin, "2026-11-24T08:00:00Z", &all), Kind::Diff);
        // So it is with a full one.
        assert_eq!(due(&berlin, "2026-11-30T08:00:00Z", &all), Kind::Full);
    }

    #[test]
    fn a_full_backup_by_hand_is_a_differential_one_too() {
        let utc = schedule("UTC");
        let all = [
            taken("full", "2026-11-22T02:00:01Z"),
            taken("full", "2026-11-24T02:30:00Z"),
        ];
        assert_eq!(due(&utc, "2026-11-24T08:00:00Z", &all), Kind::Incr);
    }

    #[test]
    fn an_hour_that_a_clock_skips_is_not_a_backup_that_is_skipped() {
        // In Berlin, 02:00 to 03:00 did not exist on 2026-03-29, a Sunday.
        let berlin = schedule("Europe/Berlin");
        let all = [taken("full", "2026-03-22T01:00:01Z")];
        assert_eq!(due(&berlin, "2026-03-29T06:00:00Z", &all), Kind::Full);
    }

    #[test]
    fn what_is_no_expression_is_named() {
        let bad = config::Schedule {
            diff: Some("at two".into()),
            ..Default::default()
        };
        let error = Schedule::new(&bad).err().unwrap();
        assert!(error.to_string().contains("schedule.diff = \"at two\""), "{error}");
        assert!(
            Schedule::new(&config::Schedule::default())
                .unwrap()
                .due(Timestamp::now(), [].iter())
                .is_none()
        );
    }
}
