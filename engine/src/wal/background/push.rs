//! Archiving ahead of PostgreSQL: a worker stores every segment that is ready, several at a time, and
//! `archive_command` is answered from what it left.
//!
//! What always holds: an answer counts only for the very bytes that PostgreSQL asks about and for the
//! repositories that are configured now; answers are given in the order of PostgreSQL's requests, so that a
//! segment is acknowledged only after those before it are durable.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde::{Deserialize, Serialize};

use super::Exchange;
use crate::error::{Error, Kind, Result};

/// How long a worker that a command has started waits for more before it ends.
pub const IDLE: Duration = Duration::from_secs(5);
/// Files that are taken from the queue before it is looked at again.
const BATCH: usize = 64;

/// Why a file was not stored, on its way from the worker to `archive_command`.
#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    temporary: bool,
    message: String,
    remedy: Option<String>,
}

impl Failure {
    fn of(error: &Error) -> Self {
        Self {
            temporary: error.kind() == Kind::Temporary,
            message: error.to_string(),
            remedy: error.advice().map(str::to_owned),
        }
    }

    fn into_error(self) -> Error {
        let error = match self.temporary {
            true => Error::temporary(self.message),
            false => Error::refused(self.message),
        };
        match self.remedy {
            Some(remedy) => error.remedy(remedy),
            None => error,
        }
    }
}

/// What an answer is for: content with this hash under this name in these repositories.
fn tag(destinations: &str, name: &str, hash: &[u8; 32]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [destinations.as_bytes(), name.as_bytes(), hash] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().to_hex().to_string()
}

fn done(name: &str) -> String {
    format!("{name}.ok")
}

fn failed(name: &str) -> String {
    format!("{name}.error")
}

/// Names that wait in `archive_status`, in PostgreSQL's order: histories first.
pub fn waiting(pg_wal: &Path) -> Result<Vec<String>> {
    let folder = pg_wal.join("archive_status");
    let entries = std::fs::read_dir(&folder).map_err(|e| Error::io(format_args!("listing {}", folder.display()), e))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_suffix(".ready")?.to_owned()))
        .collect();
    names.sort_by_key(|name| (!name.ends_with(".history"), name.clone()));
    Ok(names)
}

/// Has a file, of which `hash` is the content's BLAKE3, stored by the worker: success means that it is durable. `start_worker` is called while none
/// is alive.
pub async fn hand_over(
    exchange: &Exchange,
    name: &str,
    hash: &[u8; 32],
    destinations: &str,
    patience: Duration,
    start_worker: impl Fn() -> Result<()>,
) -> Result<()> {
    let wanted = tag(destinations, name, hash);
    // What an earlier worker complained about is tried again.
    exchange.remove(&failed(name))?;
    let began = Instant::now();
    let mut started: Option<Instant> = None;
    loop {
        match exchange.read(&done(name))? {
            Some(answer) if answer == wanted => return Ok(()),
            // Of another file of this name, or for other repositories.
            Some(_) => exchange.remove(&done(name))?,
            None => {}
        }
        if let Some(text) = exchange.read(&failed(name))? {
            exchange.remove(&failed(name))?;
            let failure: Failure = serde_json::from_str(&text)
                .map_err(|e| Error::temporary("the background worker's answer cannot be read").caused_by(e))?;
            return Err(failure.into_error());
        }
        if started.is_none_or(|at| at.elapsed() > Duration::from_secs(1)) && !exchange.is_worked()? {
            start_worker()?;
            started = Some(Instant::now());
        }
        if began.elapsed() > patience {
            return Err(Error::temporary(format!(
                "the background worker has not stored it within {} s",
                patience.as_secs()
            ))
            .remedy(format!(
                "PostgreSQL asks again, and keeps the segment until then; what the worker does is in {}",
                exchange.folder().join("worker.log").display()
            )));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The worker: stores what is ready, `parallel` files at a time, until there is nothing more for `idle`; at once
/// if another one is at work.
/// `push` stores one file, and returns its content's hash; `stored` is called for each in order. Ends with
/// the first error, which whoever asks for that file is told.
pub async fn work<P, F>(
    exchange: &Exchange,
    pg_wal: &Path,
    destinations: &str,
    parallel: usize,
    idle: Duration,
    push: P,
    stored: impl AsyncFn(&str),
) -> Result<()>
where
    P: Fn(String) -> F,
    F: Future<Output = Result<[u8; 32]>> + Send + 'static,
{
    let Some(_lock) = exchange.lock()? else { return Ok(()) };
    // Answers of an earlier worker may be about a repository that is no more.
    forget_archived(exchange, &[])?;
    let mut idle_since = Instant::now();
    loop {
        let mut queue = waiting(pg_wal)?;
        forget_archived(exchange, &queue)?;
        queue.retain(|name| !exchange.folder().join(done(name)).exists());
        queue.truncate(BATCH);
        if queue.is_empty() {
            if idle_since.elapsed() > idle {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        let uploads = futures::stream::iter(queue).map(|name| {
            let task = tokio::spawn(push(name.clone()));
            async move {
                let ended = task.await;
                let ended = ended.unwrap_or_else(|e| Err(Error::failed("the background worker failed").caused_by(e)));
                (name, ended)
            }
        });
        let mut uploads = uploads.buffered(parallel);
        while let Some((name, ended)) = uploads.next().await {
            match ended {
                Ok(hash) => {
                    // Before the answer: after it, PostgreSQL may remove the file.
                    stored(&name).await;
                    exchange.publish(&done(&name), tag(destinations, &name, &hash).as_bytes())?;
                }
                Err(error) => {
                    let failure = serde_json::to_vec(&Failure::of(&error)).unwrap_or_default();
                    exchange.publish(&failed(&name), &failure)?;
                    return Err(error);
                }
            }
        }
        idle_since = Instant::now();
    }
}

/// Removes answers that PostgreSQL has read.
fn forget_archived(exchange: &Exchange, queue: &[String]) -> Result<()> {
    for file in exchange.names()? {
        if let Some(name) = file.strip_suffix(".ok")
            && !queue.iter().any(|waiting| waiting == name)
        {
            exchange.remove(&file)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn an_answer_counts_for_its_content_and_its_repositories_only() {
        const ONE: [u8; 32] = [1; 32];
        const TWO: [u8; 32] = [2; 32];
        let folder = tempfile::tempdir().unwrap();
        let exchange = Exchange::open(folder.path().join("x")).unwrap();
        let ask = async |content: &[u8; 32], destinations: &str| {
            let idle = || Ok(());
            hand_over(&exchange, "A", content, destinations, Duration::from_millis(30), idle).await
        };
        exchange.publish("A.ok", tag("here", "A", &ONE).as_bytes()).unwrap();
        ask(&ONE, "here").await.unwrap();
        assert_eq!(ask(&TWO, "here").await.unwrap_err().kind(), Kind::Temporary);
        exchange.publish("A.ok", tag("here", "A", &ONE).as_bytes()).unwrap();
        assert_eq!(ask(&ONE, "here, there").await.unwrap_err().kind(), Kind::Temporary);
    }

    #[tokio::test]
    async fn a_backlog_drains_several_files_at_a_time_and_no_more() {
        const PARALLEL: usize = 3;
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("archive_status");
        std::fs::create_dir(&status).unwrap();
        for number in 0..9 {
            std::fs::write(status.join(format!("{number:024}.ready")), "").unwrap();
        }
        let exchange = Exchange::open(folder.path().join("x")).unwrap();
        let (running, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        // Nobody is done before so many are at it: one at a time would wait for ever.
        let together = Arc::new(tokio::sync::Barrier::new(PARALLEL));
        let push = |_| {
            let (running, peak, together) = (running.clone(), peak.clone(), together.clone());
            async move {
                peak.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                together.wait().await;
                running.fetch_sub(1, Ordering::SeqCst);
                Ok([0; 32])
            }
        };
        let order = std::sync::Mutex::new(Vec::new());
        let stored = async |name: &str| order.lock().unwrap().push(name.to_owned());
        let working = work(&exchange, folder.path(), "here", PARALLEL, Duration::ZERO, push, stored);
        tokio::time::timeout(Duration::from_secs(20), working)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(peak.load(Ordering::SeqCst), PARALLEL);
        assert_eq!(*order.lock().unwrap(), waiting(folder.path()).unwrap());
    }

    #[tokio::test]
    async fn files_are_acknowledged_in_order_and_a_failure_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let status = folder.path().join("archive_status");
        std::fs::create_dir(&status).unwrap();
        for name in ["B", "A", "C", "00000002.history"] {
            std::fs::write(status.join(format!("{name}.ready")), "").unwrap();
        }
        assert_eq!(waiting(folder.path()).unwrap(), ["00000002.history", "A", "B", "C"]);
        let exchange = Exchange::open(folder.path().join("x")).unwrap();
        exchange.publish("old.ok", b"").unwrap();
        let push = |name: String| async move {
            match name.as_str() {
                "A" => tokio::time::sleep(Duration::from_millis(50)).await,
                "B" => return Err(Error::refused("no")),
                _ => {}
            }
            Ok([0; 32])
        };
        let stored = async |_: &str| {};
        work(&exchange, folder.path(), "here", 4, IDLE, push, stored)
            .await
            .unwrap_err();
        let mut left = exchange.names().unwrap();
        left.sort();
        assert_eq!(left, ["00000002.history.ok", "A.ok", "B.error", "worker.lock"]);
    }
}
