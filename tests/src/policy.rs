//! Policies of S3 as the documentation has them, and which requests they allow.
//!
//! As far as the documentation uses them: statements that allow, wildcards in actions and resources, two kinds of
//! conditions. What is not known here is an error, and is not passed over.

use std::ops::Range;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::proxy::S3Request;

/// When a lock ends, in days from now: what a condition may limit.
pub const LOCKED_DAYS: &str = "s3:object-lock-remaining-retention-days";
/// What names begin with that are listed.
pub const PREFIX: &str = "s3:prefix";

/// What somebody wants to do, in S3's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Act {
    /// `s3:GetObject`, …
    pub action: &'static str,
    /// `arn:aws:s3:::bucket/name`.
    pub resource: String,
    /// What conditions may be about, with its values.
    pub context: Vec<(&'static str, String)>,
}

impl Act {
    /// On a bucket (`name` is empty), or on an object in it.
    pub fn new(action: &'static str, bucket: &str, name: &str) -> Self {
        let slash = if name.is_empty() { "" } else { "/" };
        Self {
            action,
            resource: format!("arn:aws:s3:::{bucket}{slash}{name}"),
            context: Vec::new(),
        }
    }

    /// The same with a value for conditions.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.context.push((key, value.into()));
        self
    }
}

/// What its holder may do. Everything else is denied.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    statements: Vec<Statement>,
}

#[derive(Debug, Clone)]
struct Statement {
    actions: Vec<String>,
    resources: Vec<String>,
    conditions: Vec<Condition>,
}

#[derive(Debug, Clone)]
struct Condition {
    operator: Operator,
    key: String,
    values: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
enum Operator {
    StringLike,
    NumericLessThanEquals,
}

/// The blocks of JSON on a page of the documentation, by its path from the top of the checkout.
pub fn blocks(page: &str) -> Result<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let blocks = text.split("\n```json\n").skip(1);
    Ok(blocks
        .map(|rest| rest.split("```").next().unwrap_or_default().to_owned())
        .collect())
}

/// The blocks of docs/access.md, which are about stanza `acme` in `s3://bucket/prefix`: those of a reader, a writer, a
/// founder and a deleter. The reader's is for all of them, the writer's also for the founder.
pub fn access() -> Result<[String; 4]> {
    let blocks = blocks("docs/access.md")?;
    let count = blocks.len();
    let four = <[String; 4]>::try_from(blocks).ok();
    four.with_context(|| format!("{count} policies instead of four"))
}

impl Policy {
    /// Of blocks: each is a policy, or statements as they stand between others.
    pub fn of(blocks: &[&str]) -> Result<Self> {
        let mut statements = Vec::new();
        for block in blocks {
            let whole = serde_json::from_str::<Value>(block).ok();
            let list = match whole.filter(|policy| policy.get("Statement").is_some()) {
                Some(policy) => {
                    ensure!(policy["Version"] == "2012-10-17", "{policy}");
                    policy["Statement"].clone()
                }
                None => serde_json::from_str(&format!("[{block}]")).with_context(|| (*block).to_owned())?,
            };
            for statement in list.as_array().context("no list of statements")? {
                statements.push(Statement::of(statement)?);
            }
        }
        ensure!(!statements.is_empty(), "no statements");
        Ok(Self { statements })
    }

    /// Whether it allows that.
    pub fn allows(&self, act: &Act) -> bool {
        self.statements.iter().any(|statement| statement.allows(act))
    }
}

impl Statement {
    fn of(value: &Value) -> Result<Self> {
        let fields = value.as_object().context("a statement is no object")?;
        let known = ["Effect", "Action", "Resource", "Condition"];
        ensure!(fields.keys().all(|name| known.contains(&name.as_str())), "{value}");
        ensure!(value["Effect"] == "Allow", "{value}");
        let mut conditions = Vec::new();
        let by_operator = value["Condition"].as_object().into_iter().flatten();
        for (operator, keys) in by_operator {
            let operator = match operator.as_str() {
                "StringLike" => Operator::StringLike,
                "NumericLessThanEquals" => Operator::NumericLessThanEquals,
                other => bail!("the condition {other} is not known here"),
            };
            for (key, values) in keys.as_object().context("a condition without keys")? {
                conditions.push(Condition {
                    operator,
                    key: key.clone(),
                    values: strings(values)?,
                });
            }
        }
        Ok(Self {
            actions: strings(&value["Action"])?,
            resources: strings(&value["Resource"])?,
            conditions,
        })
    }

    fn allows(&self, act: &Act) -> bool {
        self.actions.iter().any(|action| is_like(action, act.action))
            && self.resources.iter().any(|resource| is_like(resource, &act.resource))
            && self.conditions.iter().all(|condition| condition.holds(act))
    }
}

impl Condition {
    /// Of what is not said, none holds.
    fn holds(&self, act: &Act) -> bool {
        let Some((_, said)) = act.context.iter().find(|(key, _)| *key == self.key) else {
            return false;
        };
        let number = |text: &str| text.parse::<i64>().ok();
        self.values.iter().any(|value| match self.operator {
            Operator::StringLike => is_like(value, said),
            Operator::NumericLessThanEquals => match (number(said), number(value)) {
                (Some(said), Some(limit)) => said <= limit,
                _ => false,
            },
        })
    }
}

/// A text, or a list of texts.
fn strings(value: &Value) -> Result<Vec<String>> {
    let all = match value {
        Value::Array(all) => all.iter().collect(),
        one => vec![one],
    };
    let texts = all.into_iter().map(|text| text.as_str().map(str::to_owned));
    let texts: Option<Vec<String>> = texts.collect();
    texts.with_context(|| format!("{value} is no text"))
}

/// Whether a text is like a pattern: `*` stands for any characters, also slashes, and `?` for one.
fn is_like(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut at, mut read) = (0, 0);
    // The last `*`, and what of the text it has not taken yet.
    let mut star = None;
    while read < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, read));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[read] => {
                at += 1;
                read += 1;
            }
            _ => {
                let Some((position, taken)) = star else {
                    return false;
                };
                star = Some((position, taken + 1));
                at = position + 1;
                read = taken + 1;
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

/// What a request does: all of it must be allowed. One that is not known here does what no policy names.
pub fn acts(request: &S3Request<'_>) -> Vec<Act> {
    let (path, query) = request.path.split_once('?').unwrap_or((request.path, ""));
    let path = path.trim_start_matches('/');
    let (bucket, name) = path.split_once('/').unwrap_or((path, ""));
    let name = decoded(name);
    let parameters: Vec<(&str, &str)> = query
        .split('&')
        .map(|part| part.split_once('=').unwrap_or((part, "")))
        .collect();
    let value = |wanted: &str| {
        let found = parameters.iter().find(|(key, _)| *key == wanted);
        found.map(|(_, value)| decoded(value))
    };
    let has = |wanted: &str| value(wanted).is_some();
    let act = |action| Act::new(action, bucket, &name);
    let listing = |action| match value("prefix") {
        Some(prefix) => act(action).with(PREFIX, prefix),
        None => act(action),
    };
    match (request.method, name.is_empty()) {
        ("GET", true) if has("versioning") => vec![act("s3:GetBucketVersioning")],
        ("GET", true) if has("object-lock") => vec![act("s3:GetBucketObjectLockConfiguration")],
        ("GET", true) if has("versions") => vec![listing("s3:ListBucketVersions")],
        ("GET", true) if has("list-type") => vec![listing("s3:ListBucket")],
        ("GET", false) if has("retention") => vec![act("s3:GetObjectRetention")],
        ("PUT", false) if has("retention") => {
            let act = act("s3:PutObjectRetention");
            vec![match locked_days(request.body) {
                Some(days) => act.with(LOCKED_DAYS, days.to_string()),
                None => act,
            }]
        }
        ("GET" | "HEAD", false) if has("versionId") => vec![act("s3:GetObjectVersion")],
        // That there is none is told only to whoever may list it.
        ("GET" | "HEAD", false) => vec![
            act("s3:GetObject"),
            Act::new("s3:ListBucket", bucket, "").with(PREFIX, name.as_str()),
        ],
        ("DELETE", false) if has("versionId") => vec![act("s3:DeleteObjectVersion")],
        ("DELETE", false) if query.is_empty() => vec![act("s3:DeleteObject")],
        ("PUT", false) if query.is_empty() => vec![act("s3:PutObject")],
        _ => vec![act("not known")],
    }
}

/// In how many days the lock ends that a request asks for.
fn locked_days(body: &str) -> Option<i64> {
    let date = body.split("<RetainUntilDate>").nth(1)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs() / 86_400;
    Some(day(date)? - i64::try_from(now).ok()?)
}

/// Days from 1970-01-01 to the date that a text begins with.
fn day(text: &str) -> Option<i64> {
    let number = |range: Range<usize>| text.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    // Of years that begin in March, the day that comes every four years is the last one.
    let (year, month) = match month > 2 {
        true => (year, month - 3),
        false => (year - 1, month + 9),
    };
    let leap_days = year / 4 - year / 100 + year / 400;
    Some(year * 365 + leap_days + (month * 153 + 2) / 5 + day - 1 - 719_468)
}

/// Text of a URL.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let byte = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend(&part.as_bytes()[2..]);
            }
            None => bytes.extend(format!("%{part}").bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
