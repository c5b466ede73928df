//! Fetching ahead of recovery: a worker fetches the segments that come next, and `restore_command` takes
//! them by renaming.
//!
//! What always holds: only whole segments that the recovery is known to need are fetched ahead; whatever
//! decides where recovery ends (parts, absence, errors) is left to the command. What a worker fetched is
//! used only while that worker lives.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::Exchange;
use crate::error::{Error, Result};
use crate::postgres::segment::{Segment, WalFile};

/// How long a worker waits for the next request before it ends.
const IDLE: Duration = Duration::from_secs(5);
/// The folder of the living worker.
const CURRENT: &str = "current";
/// The segment that was asked for last.
const ASKED: &str = "asked";

/// What the worker had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// The segment is at its destination.
    Delivered,
    /// It is not here and does not come: fetch it.
    NotHere,
    /// There is no worker.
    NoWorker,
}

/// Takes a segment from the worker, and tells it how far recovery is.
pub async fn take(exchange: &Exchange, name: &str, destination: &Path) -> Result<Taken> {
    if !exchange.is_worked()? {
        return Ok(Taken::NoWorker);
    }
    let Some(current) = exchange.read(CURRENT)? else {
        return Ok(Taken::NotHere);
    };
    exchange.publish(ASKED, name.as_bytes())?;
    let folder = exchange.folder().join(&current);
    let (ready, coming) = (folder.join(name), folder.join(part(name)));
    let mut is_coming = true;
    loop {
        match std::fs::rename(&ready, destination) {
            Ok(()) => return Ok(Taken::Delivered),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(_) => {
                // Another file system: copying is what renaming would have saved.
                let copied = std::fs::copy(&ready, destination);
                let _ = std::fs::remove_file(&ready);
                copied.map_err(|e| Error::io(format_args!("writing {}", destination.display()), e))?;
                return Ok(Taken::Delivered);
            }
        }
        if !is_coming || !exchange.is_worked()? {
            return Ok(Taken::NotHere);
        }
        // It may become ready between the two looks: then the next one finds it.
        is_coming = coming.exists();
        if is_coming {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn part(name: &str) -> String {
    format!("{name}.part")
}

/// How far ahead a worker fetches.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// Segments that may wait.
    pub segments: u64,
    /// Segments that are fetched at once.
    pub parallel: usize,
}

/// The worker: fetches what comes after `first`, until nobody asks any more. `fetch` writes a whole
/// segment to a file, or says `false` where fetching ahead ends.
pub async fn work<P, F>(exchange: &Exchange, first: Segment, segment_size: u64, window: Window, fetch: P) -> Result<()>
where
    P: Fn(Segment, PathBuf) -> F,
    F: Future<Output = Result<bool>> + Send + 'static,
{
    let Some(_lock) = exchange.lock()? else { return Ok(()) };
    for name in exchange.names()? {
        let old = exchange.folder().join(&name);
        if old.is_dir() {
            let _ = std::fs::remove_dir_all(old);
        } else if [CURRENT, ASKED].contains(&name.as_str()) {
            exchange.remove(&name)?;
        }
    }
    let run = format!("{:x}", std::process::id());
    let folder = exchange.folder().join(&run);
    let made = std::fs::create_dir(&folder);
    made.map_err(|e| Error::io(format_args!("making {}", folder.display()), e))?;
    exchange.publish(CURRENT, run.as_bytes())?;
    let mut ahead = Ahead {
        folder: folder.clone(),
        segment_size,
        window,
        asked: first,
        started: BTreeSet::new(),
        ended_at: None,
    };
    let mut fetches = JoinSet::new();
    let mut count = 0u64;
    let mut heard = Instant::now();
    while heard.elapsed() < IDLE {
        let asked = exchange.read(ASKED)?;
        let asked = asked.and_then(|name| WalFile::parse(&name, segment_size).ok());
        if let Some(WalFile::Segment(asked)) = asked
            && asked != ahead.asked
        {
            heard = Instant::now();
            ahead.move_to(asked);
        }
        while let Some(segment) = ahead.next(fetches.len()) {
            let path = ahead.folder.join(segment.name(segment_size));
            let coming = ahead.folder.join(part(&segment.name(segment_size)));
            std::fs::write(&coming, b"").map_err(|e| Error::io(format_args!("writing {}", coming.display()), e))?;
            // Of its own: an older fetch of the same segment may still be on its way.
            count += 1;
            let temporary = ahead.folder.join(format!("{count}.tmp"));
            let fetched = fetch(segment, temporary.clone());
            fetches.spawn(async move {
                let fetched = fetched.await;
                let there = matches!(fetched, Ok(true)) && std::fs::rename(&temporary, &path).is_ok();
                let _ = std::fs::remove_file(&coming);
                if let Err(error) = &fetched {
                    tracing::warn!("{} was not fetched ahead: {error}", path.display());
                }
                (segment, there)
            });
        }
        tokio::select! {
            Some(fetched) = fetches.join_next() => match fetched {
                Ok((segment, there)) => ahead.fetched(segment, there),
                Err(error) => return Err(Error::failed("fetching ahead").caused_by(error)),
            },
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    let _ = exchange.remove(CURRENT);
    let _ = std::fs::remove_dir_all(&folder);
    Ok(())
}

/// What is to be fetched.
struct Ahead {
    folder: PathBuf,
    segment_size: u64,
    window: Window,
    asked: Segment,
    started: BTreeSet<u64>,
    /// The command has to find out what this one is.
    ended_at: Option<u64>,
}

impl Ahead {
    /// Recovery has asked for `asked`: what comes before it is not needed any more.
    fn move_to(&mut self, asked: Segment) {
        let before = self.asked;
        self.asked = asked;
        // Another timeline, or back: from the beginning. What lies there is in nobody's way but the disk's.
        let goes_on = asked.timeline == before.timeline && asked.number > before.number;
        let gone = match goes_on {
            true => {
                let rest = self.started.split_off(&asked.number);
                std::mem::replace(&mut self.started, rest)
            }
            false => std::mem::take(&mut self.started),
        };
        self.ended_at = self.ended_at.filter(|&at| goes_on && asked.number < at);
        for number in gone {
            self.remove(Segment { number, ..before });
        }
    }

    fn remove(&self, segment: Segment) {
        let _ = std::fs::remove_file(self.folder.join(segment.name(self.segment_size)));
    }

    fn fetched(&mut self, segment: Segment, there: bool) {
        if segment.timeline != self.asked.timeline || !self.started.contains(&segment.number) {
            self.remove(segment);
        } else if !there {
            self.ended_at = Some(self.ended_at.map_or(segment.number, |at| at.min(segment.number)));
        }
    }

    /// The next segment to fetch, if there is room.
    fn next(&mut self, running: usize) -> Option<Segment> {
        let last = self.asked.number.saturating_add(self.window.segments);
        let number = (self.asked.number + 1..=last).find(|number| !self.started.contains(number))?;
        if running >= self.window.parallel || self.ended_at.is_some_and(|at| number > at) {
            return None;
        }
        self.started.insert(number);
        Some(Segment { number, ..self.asked })
    }
}
