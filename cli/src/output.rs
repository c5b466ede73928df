//! What people and machines see: progress on standard error, results on standard output.

use std::io::{IsTerminal, Write};
use std::sync::Arc;
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

/// Shows progress until it is dropped.
pub struct Display {
    stop: Option<tokio::task::JoinHandle<()>>,
    terminal: bool,
}

impl Display {
    /// Starts to show.
    pub fn start(mode: ProgressMode, progress: Arc<Progress>, stored_word: &'static str) -> Self {
        let terminal = mode == ProgressMode::Auto && std::io::stderr().is_terminal();
        if mode == ProgressMode::None {
            return Self {
                stop: None,
                terminal: false,
            };
        }
        let every = Duration::from_millis(if terminal {
            250
        } else if mode == ProgressMode::Json {
            1000
        } else {
            10_000
        });
        let started = Instant::now();
        let task = tokio::spawn(async move {
            let mut shown = "";
            let mut ticker = tokio::time::interval(Duration::from_millis(250));
            let mut last = Instant::now().checked_sub(every).unwrap_or(started);
            loop {
                ticker.tick().await;
                let phase = progress.current_phase();
                if last.elapsed() < every && phase == shown {
                    continue;
                }
                last = Instant::now();
                let text = match mode {
                    ProgressMode::Json => event(&progress, started.elapsed()),
                    _ => status(&progress, started.elapsed(), stored_word),
                };
                let mut stderr = std::io::stderr().lock();
                let _ = match terminal {
                    true => write!(stderr, "\r\x1b[2K{text}").and_then(|()| stderr.flush()),
                    false => writeln!(stderr, "{text}"),
                };
                shown = phase;
            }
        });
        Self {
            stop: Some(task),
            terminal,
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(task) = self.stop.take() {
            task.abort();
            if self.terminal {
                let _ = write!(std::io::stderr(), "\r\x1b[2K");
            }
        }
    }
}

fn status(progress: &Progress, elapsed: Duration, stored_word: &str) -> String {
    let (read, total) = (progress.read_bytes.get(), progress.total_bytes.get());
    let phase = progress.current_phase();
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

fn event(progress: &Progress, elapsed: Duration) -> String {
    serde_json::json!({
        "schema": "fairvault/v1", "kind": "progress", "phase": progress.current_phase(),
        "elapsed_ms": elapsed.as_millis() as u64,
        "read_bytes": progress.read_bytes.get(), "total_bytes": progress.total_bytes.get(),
        "deduplicated_bytes": progress.deduplicated_bytes.get(), "stored_bytes": progress.stored_bytes.get(),
        "files": progress.files.get(), "wal_bytes": progress.wal_bytes.get(),
    })
    .to_string()
}
