//! Moments as people write them.
//!
//! RFC 3339, PostgreSQL's formats (with an offset, a zone name, or none), and phrases: now, today, yesterday,
//! a weekday, with a time of day; "2 hours ago". What names no zone is meant in `zone`.

use fairvault_engine::error::{Error, Result};
use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{Span, Timestamp, Zoned};

/// The zone to use when a text names none.
pub fn zone(name: Option<&str>) -> Result<TimeZone> {
    match name {
        None => Ok(TimeZone::system()),
        Some(name) => TimeZone::get(name).map_err(|e| {
            Error::usage(format!("{name:?} is no time zone"))
                .caused_by(e)
                .remedy("use a name such as Europe/Berlin or UTC")
        }),
    }
}

/// Reads a moment; `now` is in the zone that is meant when none is named.
pub fn parse(text: &str, now: &Zoned) -> Result<Zoned> {
    let trimmed = text.trim();
    exact(trimmed, now)
        .or_else(|| phrase(trimmed, now))
        .unwrap_or_else(|| {
            Err(Error::usage(format!("{text:?} is not a time"))
                .remedy("write 2026-11-22T15:00:00Z, \"2026-11-22 15:00:00+01\", \"2026-11-22 15:00 Europe/Berlin\", \"yesterday 15:00\" or \"2 hours ago\""))
        })
}

/// A time of the clock on the wall. When clocks change, some happen twice and some never: a moment that
/// data is to be brought back to must not be guessed.
fn on_the_wall(zone: &TimeZone, time: DateTime) -> Result<Zoned> {
    let ambiguous = zone.to_ambiguous_zoned(time);
    let name = zone.iana_name().unwrap_or("this zone").to_owned();
    let (what, before, after) = match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { .. } => {
            return ambiguous
                .unambiguous()
                .map_err(|e| Error::usage(format!("{time} is out of range")).caused_by(e));
        }
        AmbiguousOffset::Fold { before, after } => ("happens twice", before, after),
        AmbiguousOffset::Gap { before, after } => ("does not exist", before, after),
    };
    Err(
        Error::usage(format!("{time} {what} in {name}: the clocks change then")).remedy(format!(
            "say which one is meant: \"{}{before}\" or \"{}{after}\"",
            time.strftime("%Y-%m-%d %H:%M:%S"),
            time.strftime("%Y-%m-%d %H:%M:%S")
        )),
    )
}

fn exact(text: &str, now: &Zoned) -> Option<Result<Zoned>> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Some(Ok(time.to_zoned(now.time_zone().clone())));
    }
    // A zone in brackets, as RFC 9557 has it.
    if let Some((time, name)) = text.strip_suffix(']').and_then(|t| t.split_once('[')) {
        let zone = TimeZone::get(name).ok()?;
        return match time.parse::<Timestamp>() {
            Ok(time) => Some(Ok(time.to_zoned(zone))),
            Err(_) => civil(time).map(|t| on_the_wall(&zone, t)),
        };
    }
    // A zone name behind the time.
    if let Some((time, name)) = text.rsplit_once(' ')
        && name.chars().next().is_some_and(char::is_alphabetic)
        && let Ok(zone) = TimeZone::get(name)
    {
        return civil(time).map(|t| on_the_wall(&zone, t));
    }
    // PostgreSQL's short offsets: +01, -0330, +05:30.
    let at = text
        .char_indices()
        .skip(11)
        .find(|(_, c)| matches!(c, '+' | '-'))
        .map(|(i, _)| i);
    if let Some(at) = at {
        let offset = offset(&text[at..])?;
        return civil(text[..at].trim_end()).map(|t| on_the_wall(&TimeZone::fixed(offset), t));
    }
    civil(text).map(|t| on_the_wall(now.time_zone(), t))
}

fn offset(text: &str) -> Option<jiff::tz::Offset> {
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let digits: String = text[1..].chars().filter(|c| *c != ':').collect();
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (hours, minutes) = match digits.len() {
        1 | 2 => (digits.parse::<i32>().ok()?, 0),
        4 => (digits[..2].parse().ok()?, digits[2..].parse::<i32>().ok()?),
        _ => return None,
    };
    jiff::tz::Offset::from_seconds(sign * (hours * 3600 + minutes * 60)).ok()
}

fn civil(text: &str) -> Option<DateTime> {
    // An annotation would be passed over.
    if text.contains('[') {
        return None;
    }
    if let Ok(time) = text.parse::<DateTime>() {
        return Some(time);
    }
    let (date, time) = text.split_once([' ', 'T'])?;
    Some(date.parse::<Date>().ok()?.to_datetime(time_of_day(time)?))
}

fn time_of_day(text: &str) -> Option<Time> {
    let lower = text.trim().to_lowercase();
    let (digits, shift) = match (lower.strip_suffix("am"), lower.strip_suffix("pm")) {
        (Some(rest), _) => (rest.trim().to_owned(), Some(0)),
        (_, Some(rest)) => (rest.trim().to_owned(), Some(12)),
        _ => (lower, None),
    };
    let parts: Vec<i8> = digits.split(':').map(|p| p.parse().ok()).collect::<Option<_>>()?;
    let (mut hour, minute, second) = match (parts.as_slice(), shift) {
        ([h], Some(_)) => (*h, 0, 0),
        ([h, m], _) => (*h, *m, 0),
        ([h, m, s], _) => (*h, *m, *s),
        _ => return None,
    };
    if let Some(shift) = shift {
        if !(1..=12).contains(&hour) {
            return None;
        }
        hour = hour % 12 + shift;
    }
    Time::new(hour, minute, second, 0).ok()
}

fn phrase(text: &str, now: &Zoned) -> Option<Result<Zoned>> {
    let lower = text.to_lowercase();
    if lower == "now" {
        return Some(Ok(now.clone()));
    }
    if let Some(ago) = lower.strip_suffix(" ago") {
        let (count, unit) = ago.trim().split_once(' ')?;
        let count: i64 = count.parse().ok()?;
        let span = match unit.trim().trim_end_matches('s') {
            "second" => Span::new().seconds(count),
            "minute" => Span::new().minutes(count),
            "hour" => Span::new().hours(count),
            "day" => Span::new().days(count),
            "week" => Span::new().weeks(count),
            _ => return None,
        };
        return now.checked_sub(span).ok().map(Ok);
    }
    let (word, rest) = lower.split_once(' ').unwrap_or((&lower, "00:00"));
    let date = match word {
        "today" => now.date(),
        "yesterday" => now.date().yesterday().ok()?,
        day => {
            let weekday = match day.get(..3)? {
                "mon" => Weekday::Monday,
                "tue" => Weekday::Tuesday,
                "wed" => Weekday::Wednesday,
                "thu" => Weekday::Thursday,
                "fri" => Weekday::Friday,
                "sat" => Weekday::Saturday,
                "sun" => Weekday::Sunday,
                _ => return None,
            };
            if ![
                "monday",
                "tuesday",
                "wednesday",
                "thursday",
                "friday",
                "saturday",
                "sunday",
            ]
            .iter()
            .any(|name| *name == day || &name[..3] == day)
            {
                return None;
            }
            now.date().nth_weekday(-1, weekday).ok()?
        }
    };
    let rest = rest.strip_prefix("at ").unwrap_or(rest);
    let time = date.to_datetime(time_of_day(rest)?);
    Some(on_the_wall(now.time_zone(), time))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Option<String> {
        let now: Zoned = "2026-11-22T10:00:00+01:00[Europe/Berlin]".parse().unwrap();
        parse(text, &now).ok().map(|z| z.timestamp().to_string())
    }

    #[test]
    fn all_forms() {
        for (text, expected) in [
            ("2026-11-21T15:00:00Z", "2026-11-21T15:00:00Z"),
            ("2026-11-21 15:00:00.25+00", "2026-11-21T15:00:00.25Z"),
            ("2026-11-21 15:00:00+0530", "2026-11-21T09:30:00Z"),
            ("2026-11-21 15:00:00 America/New_York", "2026-11-21T20:00:00Z"),
            ("2026-11-21 15:00", "2026-11-21T14:00:00Z"),
            ("yesterday 15:00", "2026-11-21T14:00:00Z"),
            ("yesterday 3 PM", "2026-11-21T14:00:00Z"),
            ("today at 9:30 am", "2026-11-22T08:30:00Z"),
            ("friday 12:00", "2026-11-20T11:00:00Z"),
            ("2 hours ago", "2026-11-22T07:00:00Z"),
            ("now", "2026-11-22T09:00:00Z"),
            ("2026-11-21T12:00:00[America/New_York]", "2026-11-21T17:00:00Z"),
            ("2026-11-21T12:00:00-05:00[America/New_York]", "2026-11-21T17:00:00Z"),
        ] {
            assert_eq!(at(text).as_deref(), Some(expected), "{text}");
        }
        for text in [
            "",
            "tomorrowish",
            "25:00",
            "yesterday 25:00",
            "yesterday 13 pm",
            "moonday 1:00",
            "é",
            "+",
        ] {
            assert_eq!(at(text), None, "{text}");
        }
    }

    #[test]
    fn times_at_a_change_of_clocks_are_not_guessed() {
        let now: Zoned = "2026-11-22T10:00:00+01:00[Europe/Berlin]".parse().unwrap();
        for (text, expected) in [
            ("2026-10-25 02:30", "happens twice"),
            ("2026-03-29 02:30", "does not exist"),
        ] {
            let error = parse(text, &now).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            let advice = error.advice().unwrap().to_owned();
            for form in advice.split('"').skip(1).step_by(2) {
                assert!(parse(form, &now).is_ok(), "{form}");
            }
        }
    }
}
