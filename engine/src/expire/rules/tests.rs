//! What rules keep of backups that are made by hand.

use super::*;

const HOUR: i64 = 3600 * 1_000_000;
const DAY: i64 = 24 * HOUR;
/// A Tuesday, 12:00 UTC.
const NOW: i64 = 1_795_521_600 * 1_000_000;

fn backups(list: &[(&str, i64)]) -> Vec<Candidate> {
    let all = list.iter().enumerate().map(|(n, (kind, age_us))| Candidate {
        id: format!("{n}{kind}"),
        kind: (*kind).to_owned(),
        stopped_us: NOW - age_us,
        system_identifier: 1,
        restorable: true,
        damage: None,
        timelines: vec![1],
        hold: None,
    });
    all.collect()
}

fn kept(backups: &[Candidate], retention: &Retention) -> Vec<String> {
    let all = decide(backups, retention, Floor::default(), NOW);
    all.into_iter().filter(|d| d.keep).map(|d| d.id).collect()
}

fn age(days: u64) -> Option<Keep> {
    Some(Keep::Age(days * DAY_S))
}

#[test]
fn without_rules_everything_stays() {
    let all = backups(&[("full", 900 * DAY), ("incr", 800 * DAY)]);
    assert_eq!(kept(&all, &Retention::default()).len(), 2);
}

#[test]
fn by_number_the_others_follow_their_full() {
    let all = backups(&[
        ("full", 9),
        ("incr", 8),
        ("full", 7),
        ("diff", 6),
        ("incr", 5),
        ("full", 4),
    ]);
    let retention = Retention {
        full: Some(Keep::Count(2)),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["2full", "3diff", "4incr", "5full"]);
    let retention = Retention {
        diff: Some(Keep::Count(0)),
        ..retention
    };
    assert_eq!(kept(&all, &retention), ["2full", "4incr", "5full"]);
}

#[test]
fn by_age_with_a_floor() {
    let all = backups(&[
        ("full", 50 * DAY),
        ("full", 40 * DAY),
        ("incr", 39 * DAY),
        ("full", 35 * DAY),
    ]);
    let retention = Retention {
        full: age(30),
        incr: age(7),
        min_full: 2,
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["1full", "3full"]);
    let floor = Floor {
        age_s: 45 * DAY_S,
        fulls: 3,
    };
    let all = decide(&all, &retention, floor, NOW);
    assert!(all.iter().all(|d| d.keep), "{all:?}");
}

#[test]
fn the_newest_that_can_be_restored_stays() {
    let mut all = backups(&[("full", 50 * DAY), ("full", 40 * DAY)]);
    all[1].restorable = false;
    let retention = Retention {
        full: age(30),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["0full"]);
    all[0].restorable = false;
    assert_eq!(kept(&all, &retention), ["1full"]);
}

#[test]
fn a_damaged_one_takes_nobodys_place() {
    let list = [
        ("full", 9 * DAY),
        ("incr", 8 * DAY),
        ("full", 7 * DAY),
        ("full", 6 * DAY),
        ("incr", 5 * DAY),
    ];
    let mut all = backups(&list);
    for n in [3, 4] {
        all[n].damage = Some("a pack is gone".to_owned());
    }
    let retention = Retention {
        full: Some(Keep::Count(1)),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["2full", "3full", "4incr"]);
    // By age and by calendar too, the newest from which recovery can begin stays.
    let retention = Retention {
        full: age(3),
        incr: age(3),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["2full"]);
    let retention = Retention {
        calendar: Calendar {
            monthly: 1,
            ..Default::default()
        },
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention)[0], "2full");
    // Where none is good, none goes.
    all.iter_mut().for_each(|b| b.restorable = false);
    let retention = Retention {
        full: Some(Keep::Count(1)),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention).len(), 5);
    let window = Retention {
        full: Some(Keep::Count(1)),
        wal: Some(6 * DAY_S + 3600),
        ..Default::default()
    };
    let mut all = backups(&list);
    all[2].damage = Some("its root is gone".to_owned());
    assert_eq!(
        kept(&all, &window),
        ["1incr", "3full", "4incr"],
        "the window begins at the one before"
    );
}

#[test]
fn recovery_reaches_the_beginning_of_the_window() {
    let all = backups(&[
        ("full", 50 * DAY),
        ("full", 20 * DAY),
        ("incr", 9 * DAY),
        ("full", 2 * DAY),
    ]);
    let retention = Retention {
        full: Some(Keep::Count(1)),
        wal: Some(7 * DAY_S),
        ..Default::default()
    };
    // Every backup is complete: an incremental will do, without the full before it.
    assert_eq!(kept(&all, &retention), ["2incr", "3full"]);
}

#[test]
fn of_each_life_of_a_cluster() {
    let mut all = backups(&[("full", 50 * DAY), ("full", 5 * DAY)]);
    all[1].system_identifier = 2;
    let retention = Retention {
        full: Some(Keep::Count(1)),
        wal: Some(7 * DAY_S),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["0full", "1full"]);
    all[1].stopped_us = NOW - 8 * DAY;
    assert_eq!(kept(&all, &retention), ["1full"]);
    // What somebody has committed as a backup of another cluster, and is none, ends nothing.
    for (restorable, damage) in [(false, None), (true, Some("its root is gone".to_owned()))] {
        (all[1].restorable, all[1].damage) = (restorable, damage);
        let decided = decide(&all, &retention, Floor::default(), NOW);
        assert!(decided[0].keep && decided[0].goes_on, "{decided:?}");
    }
}

#[test]
fn the_calendar_keeps_the_newest_of_each_period() {
    let mut list: Vec<(&str, i64)> = (0..800).rev().map(|n| ("incr", n * DAY)).collect();
    list.push(("incr", HOUR));
    let all = backups(&list);
    let retention = Retention {
        calendar: Calendar {
            daily: 3,
            weekly: 3,
            monthly: 3,
            yearly: 2,
        },
        ..Default::default()
    };
    let ages = |n: &String| {
        let n: usize = n.trim_end_matches("incr").parse().unwrap();
        (NOW - all[n].stopped_us) / DAY
    };
    // Today (the newer of two), yesterday and the day before; Sundays; ends of months; the end of last year.
    let days: Vec<_> = kept(&all, &retention).iter().map(ages).collect();
    assert_eq!(days, [328, 55, 24, 9, 2, 1, 0]);
}

#[test]
fn clocks_that_jumped_make_nothing_old() {
    // The second was taken by a host whose clock was in 1970, the third by one a year ahead.
    let all = backups(&[("full", 10 * DAY), ("full", NOW), ("full", -365 * DAY), ("full", DAY)]);
    let times = all.iter().map(|b| b.stopped_us).collect();
    let ages: Vec<_> = believed(times, NOW).iter().map(|t| (NOW - t) / DAY).collect();
    assert_eq!(ages, [10, 10, 1, 1]);
    let retention = Retention {
        full: age(30),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention).len(), 4);
}

/// Each day's backup was taken by a right clock, but for one that was ten days ahead; or this host's clock is behind.
#[test]
fn clocks_that_jumped_take_no_days_from_the_calendar() {
    let list: Vec<(&str, i64)> = (0..=20).rev().map(|days| ("incr", days * DAY + HOUR)).collect();
    let right = backups(&list);
    let mut ahead = right.clone();
    ahead[8].stopped_us += 10 * DAY;
    let retention = Retention {
        calendar: Calendar {
            daily: 14,
            ..Default::default()
        },
        ..Default::default()
    };
    let kept_at = |all: &[Candidate], now_us| -> Vec<usize> {
        let decided = decide(all, &retention, Floor::default(), now_us);
        (0..all.len()).filter(|&n| decided[n].keep).collect()
    };
    let last: Vec<usize> = (7..=20).collect();
    assert_eq!(kept_at(&right, NOW), last);
    // The day before the one that it said, that day, and the days after.
    for (newest, now_us) in [17, 18, 19, 20]
        .into_iter()
        .zip((0..4).rev().map(|days| NOW - days * DAY))
    {
        let all = kept_at(&ahead[..=newest], now_us);
        let mut others = (newest - 13..=newest).filter(|n| *n != 8);
        assert!(others.all(|n| all.contains(&n)), "{newest} {all:?}");
    }
    for behind in [1, 10, 30] {
        let all = kept_at(&right, NOW - behind * DAY);
        assert!(last.iter().all(|n| all.contains(n)), "{behind} {all:?}");
    }
}

#[test]
fn only_times_need_a_clock() {
    let counts = Retention {
        full: Some(Keep::Count(3)),
        incr: Some(Keep::Count(3)),
        min_full: 2,
        ..Default::default()
    };
    assert!(!counts.has_times() && !Retention::default().has_times());
    for (diff, wal, daily) in [(age(1), None, 0), (None, Some(0), 0), (None, None, 1)] {
        let timed = Retention {
            diff,
            wal,
            calendar: Calendar {
                daily,
                ..Default::default()
            },
            ..counts.clone()
        };
        assert!(timed.has_times(), "{timed:?}");
    }
}

#[test]
fn a_hold_outlives_every_rule() {
    let mut all = backups(&[("full", 50 * DAY), ("full", 40 * DAY), ("full", 1)]);
    all[0].hold = Some("evidence".to_owned());
    let retention = Retention {
        full: Some(Keep::Count(1)),
        ..Default::default()
    };
    assert_eq!(kept(&all, &retention), ["0full", "2full"]);
}

/// Backups that ended at these times.
fn dated(list: &[(&str, &str)]) -> Vec<Candidate> {
    let ages: Vec<(&str, i64)> = list
        .iter()
        .map(|(kind, time)| (*kind, NOW - time.parse::<Timestamp>().unwrap().as_microsecond()))
        .collect();
    backups(&ages)
}

#[test]
fn by_age_each_kind_goes_by_itself() {
    let all = backups(&[
        ("full", 40 * DAY),
        ("diff", 20 * DAY),
        ("diff", 14 * DAY),
        ("diff", 14 * DAY - 1),
        ("incr", 10 * DAY),
        ("incr", 6 * DAY),
        ("full", DAY),
    ]);
    let retention = Retention {
        full: Some(Keep::Count(1)),
        diff: age(14),
        incr: age(7),
        ..Default::default()
    };
    // The full before them has gone; what is as old as the limit is not younger.
    assert_eq!(kept(&all, &retention), ["3diff", "5incr", "6full"]);
    let decided = decide(&all, &retention, Floor::default(), NOW);
    assert_eq!(decided[3].why, "diff, younger than 14 d");
    assert_eq!(decided[2].why, "diff, 14 d old: no rule keeps it");
    // One without a rule of its own follows the full before it: here that goes, and then it stays.
    let follows = Retention {
        incr: None,
        ..retention
    };
    assert_eq!(kept(&all, &follows), ["3diff", "6full"]);
    let longer = Retention {
        full: age(41),
        ..follows
    };
    assert_eq!(kept(&all, &longer), ["0full", "3diff", "4incr", "5incr", "6full"]);
}

#[test]
fn what_has_no_full_before_it_counts_as_one() {
    let all = backups(&[("incr", 50 * DAY), ("incr", 10 * DAY), ("full", DAY)]);
    let by = |full| Retention {
        full,
        ..Default::default()
    };
    assert_eq!(kept(&all, &by(age(30))), ["1incr", "2full"]);
    assert_eq!(kept(&all, &by(Some(Keep::Count(1)))), ["2full"]);
    assert_eq!(kept(&all, &by(Some(Keep::Count(2)))).len(), 3);
    let monthly = Retention {
        calendar: Calendar {
            monthly: 1,
            ..Default::default()
        },
        ..Default::default()
    };
    assert_eq!(kept(&all, &monthly), ["2full"]);
}

#[test]
fn days_weeks_months_and_years_begin_where_the_zone_says() {
    let none = Calendar::default();
    let daily = Calendar { daily: 9, ..none };
    let weekly = Calendar { weekly: 9, ..none };
    let monthly = Calendar { monthly: 9, ..none };
    let yearly = Calendar { yearly: 9, ..none };
    let all_three = ["0incr", "1incr", "2incr"];
    let two = ["0incr", "2incr"];
    // In Berlin it is midnight between the first and the second, an hour earlier than in UTC, in summer two. The
    // third is today's, and of the second's week and year.
    for (calendar, first, second, in_berlin) in [
        (daily, "2026-11-21T22:30:00Z", "2026-11-21T23:30:00Z", &all_three[..]),
        (daily, "2026-07-14T21:30:00Z", "2026-07-14T22:30:00Z", &all_three[..]),
        (weekly, "2026-11-22T22:30:00Z", "2026-11-22T23:30:00Z", &two[..]),
        (monthly, "2026-08-31T21:30:00Z", "2026-08-31T22:30:00Z", &all_three[..]),
        (yearly, "2025-12-31T22:30:00Z", "2025-12-31T23:30:00Z", &two[..]),
    ] {
        let all = dated(&[("incr", first), ("incr", second), ("incr", "2026-11-24T11:00:00Z")]);
        let in_zone = |timezone| Retention {
            calendar,
            timezone,
            ..Default::default()
        };
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        assert_eq!(kept(&all, &in_zone(Some(berlin))), in_berlin, "{first}");
        // Of no zone, it is UTC.
        assert_eq!(kept(&all, &in_zone(None)), ["1incr", "2incr"], "{first}");
    }
}

#[test]
fn a_week_in_two_years_is_one() {
    // A Sunday; of the next week, a day of 2025 and one of 2026; and today.
    let all = dated(&[
        ("incr", "2025-12-28T12:00:00Z"),
        ("incr", "2025-12-30T12:00:00Z"),
        ("incr", "2026-01-02T12:00:00Z"),
        ("incr", "2026-11-24T11:00:00Z"),
    ]);
    let weeks = |weekly| Retention {
        calendar: Calendar {
            weekly,
            ..Default::default()
        },
        ..Default::default()
    };
    assert_eq!(kept(&all, &weeks(9)), ["0incr", "2incr", "3incr"]);
    assert_eq!(kept(&all, &weeks(2)), ["2incr", "3incr"]);
}

#[test]
fn a_period_of_which_nothing_can_be_restored_takes_the_place_of_none() {
    let mut all = backups(&[("full", 3 * DAY), ("full", 2 * DAY), ("full", DAY), ("full", HOUR)]);
    all[2].damage = Some("a pack is gone".to_owned());
    let retention = Retention {
        calendar: Calendar {
            daily: 2,
            ..Default::default()
        },
        ..Default::default()
    };
    // What becomes of the damaged one itself is another matter.
    let mut left = kept(&all, &retention);
    left.retain(|id| id != "2full");
    assert_eq!(left, ["1full", "3full"]);
}
