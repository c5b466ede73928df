//! What people and machines see: progress on standard error, results on standard output.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fairvault_engine::error::Error;
use fairvault_engine::progress::Progress;
use serde::Serialize;

use crate::args::{Output, ProgressMode};

/// Bytes for people.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Seconds for people.
pub fn seconds(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// A time, from seconds since 1970.
pub fn time(seconds: i64) -> String {
    let time = jiff::Timestamp::from_second(seconds).unwrap_or_default();
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Prints a line on standard output. A closed pipe is no error of ours.
pub fn line(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints a result as JSON, with its schema.
pub fn json(kind: &str, value: &impl Serialize) {
    let mut object = serde_json::json!({ "schema": "fairvault/v1", "kind": kind });
    if let (Some(map), Ok(serde_json::Value::Object(fields))) = (object.as_object_mut(), serde_json::to_value(value)) {
        map.extend(fields);
    }
    line(object);
}

/// Prints an error: cause, then what to do.
pub fn error(error: &Error, output: Output) {
    let mut stderr = std::io::stderr().lock();
    if output == Output::Json {
        let object = serde_json::json!({
            "schema": "fairvault/v1", "kind": "error", "code": error.kind().code(),
            "message": error.to_string(), "remedy": error.advice(),
        });
        let _ = writeln!(stderr, "{object}");
        return;
    }
    let _ = writeln!(stderr, "fairvault: {error}");
    if let Some(advice) = error.advice() {
        let _ = writeln!(stderr, "  → {advice}");
    }
}

/// Shows progress until it is dropped. However short a phase was, it is told that it was gone through.
pub struct Display {
    screen: Arc<Screen>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Display {
    /// Starts to show.
    pub fn start(mode: ProgressMode, progress: Arc<Progress>, stored_word: &'static str) -> Self {
        let screen = Arc::new(Screen {
            progress,
            is_json: mode == ProgressMode::Json,
            is_terminal: mode == ProgressMode::Auto && std::io::stderr().is_terminal(),
            stored_word,
            started: Instant::now(),
            phases_shown: AtomicUsize::new(0),
        });
        let every = Duration::from_millis(match (screen.is_terminal, screen.is_json) {
            (true, _) => 250,
            (_, true) => 1000,
            _ => 10_000,
        });
        let shared = screen.clone();
        let task = (mode != ProgressMode::None).then(|| {
            tokio::spawn(async move {
                let mut ticker = tokio::time::interval(Duration::from_millis(250));
                let mut last: Option<Instant> = None;
                loop {
                    ticker.tick().await;
                    let is_due = last.is_none_or(|last| last.elapsed() >= every);
                    if shared.show(is_due) {
                        last = Some(Instant::now());
                    }
                }
            })
        });
        Self { screen, task }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        let Some(task) = self.task.take() else { return };
        task.abort();
        if self.screen.is_terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[2K");
        } else {
            self.screen.show(false);
        }
    }
}

/// Where progress is written, and what is there already.
struct Screen {
    progress: Arc<Progress>,
    is_json: bool,
    is_terminal: bool,
    stored_word: &'static str,
    started: Instant,
    phases_shown: AtomicUsize,
}

impl Screen {
    /// Shows the phases that were not shown yet, or how far the present one is if that `is_due`. Says whether
    /// anything was shown.
    fn show(&self, is_due: bool) -> bool {
        let phases = self.progress.phases();
        let shown = self.phases_shown.swap(phases.len(), Relaxed);
        let new = match is_due && shown == phases.len() {
            true => phases.len().saturating_sub(1)..phases.len(),
            false => shown..phases.len(),
        };
        let mut stderr = std::io::stderr().lock();
        for at in new.clone() {
            let phase = phases[at];
            let text = match self.is_json {
                true => event(&self.progress, phase, self.started.elapsed()),
                false if at + 1 < phases.len() => format!("{phase} …"),
                false => status(&self.progress, phase, self.started.elapsed(), self.stored_word),
            };
            let _ = match self.is_terminal {
                true => write!(stderr, "\r\x1b[2K{text}").and_then(|()| stderr.flush()),
                false => writeln!(stderr, "{text}"),
            };
        }
        !new.is_empty()
    }
}

fn status(progress: &Progress, phase: &str, elapsed: Duration, stored_word: &str) -> String {
    let (read, total) = (progress.read_bytes.get(), progress.total_bytes.get());
    if read == 0 {
        return format!("{phase} …");
    }
    let rate = read as f64 / elapsed.as_secs_f64().max(0.001);
    let mut out = format!("{phase}  {}", bytes(read));
    if total > 0 {
        out += &format!(
            " of {} ({:.0} %)",
            bytes(total),
            (read as f64 / total as f64 * 100.0).min(100.0)
        );
    }
    out += &format!(
        "  {}/s  {} {stored_word}",
        bytes(rate as u64),
        bytes(progress.stored_bytes.get())
    );
    let new = read.saturating_sub(progress.deduplicated_bytes.get());
    let stored = progress.stored_bytes.get();
    if stored > 0 && new > 0 {
        out += &format!("  ratio {:.1}", new as f64 / stored as f64);
    }
    if progress.deduplicated_bytes.get() > 0 {
        out += &format!(
            "  {:.0} % known",
            progress.deduplicated_bytes.get() as f64 / read as f64 * 100.0
        );
    }
    if total > read {
        out += &format!(
            "  {} left",
            seconds(Duration::from_secs_f64((total - read) as f64 / rate.max(1.0)))
        );
    }
    out
}

fn event(progress: &Progress, phase: &str, elapsed: Duration) -> String {
    serde_json::json!({
        "schema": "fairvault/v1", "kind": "progress", "phase": phase,
        "elapsed_ms": elapsed.as_millis() as u64,
        "read_bytes": progress.read_bytes.get(), "total_bytes": progress.total_bytes.get(),
        "deduplicated_bytes": progress.deduplicated_bytes.get(), "stored_bytes": progress.stored_bytes.get(),
        "files": progress.files.get(), "wal_bytes": progress.wal_bytes.get(),
    })
    .to_string()
}
