use clap::Parser as _;
use fairvault_engine::error::Kind;
use jiff::tz::TimeZone;

use super::*;
use crate::args::Cli;

const DAY_S: u64 = 86_400;

fn load(text: &str) -> Result<Context> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("fairvault.toml");
    std::fs::write(&file, text).unwrap();
    let path = file.display().to_string();
    let cli = Cli::parse_from(["fairvault", "--config", path.as_str(), "expire", "acme"]);
    Context::load(cli.global, false)
}

/// What a configuration keeps of stanza `acme` in a repository.
fn retention(text: &str, repository: &str) -> Result<Retention> {
    load(text)?.retention(repository, "acme")
}

#[test]
fn what_the_policy_promises_counts_where_no_age_is_configured() {
    let kept_days = |rules: &str, minimum: u64| {
        let text = format!("[repo.eu]\nurl = \"file:///eu\"\n[stanza.acme]\nretention = {{ {rules} }}\n");
        let reliance = load(&text).unwrap().reliance("eu", "acme", minimum * DAY_S).unwrap();
        reliance.map(|reliance| reliance.kept_s / DAY_S)
    };
    assert_eq!(kept_days("full = 2", 0), None);
    assert_eq!(kept_days("full = 2", 30), Some(30));
    assert_eq!(kept_days("full = \"20d\"", 0), Some(20));
    // The later of the two.
    assert_eq!(kept_days("full = \"20d\"", 30), Some(30));
    assert_eq!(kept_days("full = \"20d\"", 10), Some(20));
}

#[test]
fn the_most_particular_retention_counts_as_a_whole() {
    let in_repository = |levels: usize, repository: &str| {
        let of = |level: usize, line: &'static str| if level <= levels { line } else { "" };
        let text = format!(
            "[defaults]\n{}\n[repo.eu]\nurl = \"file:///eu\"\n{}\n[repo.us]\nurl = \"file:///us\"\n[stanza.acme]\n{}\n{}\n",
            of(1, "retention = { full = 1, wal = \"7d\", min_full = 3 }"),
            of(2, "retention = { full = 2 }"),
            of(3, "retention = { full = 3, daily = 7 }"),
            of(4, "repo_retention.eu = { full = 4 }"),
        );
        retention(&text, repository).unwrap()
    };
    let only = |count| Retention {
        full: Some(Keep::Count(count)),
        min_full: 1,
        ..Default::default()
    };
    let defaults = Retention {
        wal: Some(7 * DAY_S),
        min_full: 3,
        ..only(1)
    };
    let of_stanza = Retention {
        calendar: Calendar {
            daily: 7,
            ..Default::default()
        },
        ..only(3)
    };
    // Nothing is kept for a reason that nobody gave, and nothing is taken over from what is less particular.
    for (levels, in_eu, in_us) in [
        (0, Retention::default(), Retention::default()),
        (1, defaults.clone(), defaults.clone()),
        (2, only(2), defaults),
        (3, of_stanza.clone(), of_stanza.clone()),
        (4, only(4), of_stanza),
    ] {
        assert_eq!(in_repository(levels, "eu"), in_eu, "{levels}");
        assert_eq!(in_repository(levels, "us"), in_us, "{levels}");
    }
}

#[test]
fn ages_numbers_and_zones_mean_what_they_say() {
    let of = |rules: &str| {
        let text = format!("[repo.eu]\nurl = \"file:///eu\"\n[stanza.acme]\nretention = {{ {rules} }}\n");
        retention(&text, "eu")
    };
    let all = of("full = \"4w\", diff = \"36h\", incr = 5, timezone = \"Europe/Berlin\"").unwrap();
    assert_eq!(all.full, Some(Keep::Age(28 * DAY_S)));
    assert_eq!(all.diff, Some(Keep::Age(36 * 3600)));
    assert_eq!(all.incr, Some(Keep::Count(5)));
    assert_eq!(all.timezone, TimeZone::get("Europe/Berlin").ok());
    assert!(all.timezone.is_some() && all.wal.is_none() && all.has_rules());
    // A month is not so many days.
    for bad in ["full = \"1mo\"", "diff = \"-5d\"", "wal = \"30\"", "incr = \"newest\""] {
        let error = of(bad).err().unwrap();
        assert_eq!(error.kind(), Kind::Usage, "{bad}: {error}");
    }
}
