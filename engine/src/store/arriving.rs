//! An object while it arrives, for threads that open its beginning before its end is here.
//!
//! What always holds: what is read is the object's bytes in their order; an end that comes too early is an error; nobody
//! waits longer than half a minute for what comes next, not even where a system call hangs.

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fairvault_format::error::check_limit;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::{GetResultPayload, ObjectStoreExt};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::Store;
use crate::error::{Error, Kind, Result};

/// How long nothing may come of an object that has begun to arrive.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes of a file that are read at once.
const PART_BYTES: u64 = 1 << 20;

/// An object that was asked for. Whoever drops it no longer wants it.
#[derive(Debug)]
pub struct Arriving {
    shown: String,
    /// Bytes that were not read yet.
    left: u64,
    /// Never more than the object has, which was compared with a limit.
    parts: UnboundedReceiver<Result<Bytes>>,
    /// What was not read yet of the last part.
    part: Bytes,
}

impl Store {
    /// Asks for an object of at most `limit` bytes; `None` if there is none.
    pub async fn arriving(&self, name: &str, limit: u64) -> Result<Option<Arriving>> {
        let path = self.path(name)?;
        let found = match self.throttled(|| self.inner.get(&path)).await {
            Ok(found) => found,
            Err(error) => match self.error("reading", name, error) {
                error if error.kind() == Kind::NotFound => return Ok(None),
                error => return Err(error),
            },
        };
        let shown = format!("{}/{name}", self.shown);
        let left = found.meta.size;
        check_limit(&shown, left, limit)?;
        let mut stream: BoxStream<'static, Result<Bytes>> = match found.payload {
            GetResultPayload::File(file, _) => parts_of(file, shown.clone()).boxed(),
            GetResultPayload::Stream(stream) => {
                let what = format!("reading {shown}");
                stream
                    .map(move |part| part.map_err(|e| Error::temporary(&what).caused_by(e)))
                    .boxed()
            }
        };
        let (send, parts) = unbounded_channel();
        let what = shown.clone();
        tokio::spawn(async move {
            let mut wanted = left;
            while wanted > 0 {
                let part = match tokio::time::timeout(SILENCE, stream.next()).await {
                    Ok(None) => break,
                    Ok(Some(part)) => part,
                    Err(_) => Err(Error::temporary(format!(
                        "reading {what}: nothing came for {} seconds",
                        SILENCE.as_secs()
                    ))),
                };
                // A store that sends more than it said gets no memory for it.
                let part = part.map(|mut part| {
                    part.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
                    part
                });
                wanted = part.as_ref().map_or(0, |part| wanted - part.len() as u64);
                if send.send(part).is_err() {
                    break;
                }
            }
        });
        Ok(Some(Arriving {
            shown,
            left,
            parts,
            part: Bytes::new(),
        }))
    }
}

/// A file in parts, each read by a thread that may hang.
fn parts_of(file: File, shown: String) -> impl futures::Stream<Item = Result<Bytes>> {
    futures::stream::try_unfold(file, move |mut file| {
        let what = format!("reading {shown}");
        async move {
            let read = move || {
                let mut part = Vec::with_capacity(PART_BYTES as usize);
                let read = file.by_ref().take(PART_BYTES).read_to_end(&mut part);
                read.map(|_| (part, file))
            };
            let done = tokio::task::spawn_blocking(read).await;
            let (part, file) = done
                .map_err(|e| Error::failed(&what).caused_by(e))?
                .map_err(|e| Error::io(&what, e))?;
            Ok((!part.is_empty()).then(|| (part.into(), file)))
        }
    })
}

impl From<Bytes> for Arriving {
    /// One that has arrived.
    fn from(part: Bytes) -> Self {
        Self {
            shown: String::new(),
            left: part.len() as u64,
            parts: unbounded_channel().1,
            part,
        }
    }
}

impl Arriving {
    /// Appends the next `len` bytes, or as many as are left. Waits for them, so it is for threads that may.
    pub fn read(&mut self, into: &mut Vec<u8>, len: usize) -> Result<()> {
        let end = into.len() + usize::try_from(self.left).map_or(len, |left| left.min(len));
        into.reserve_exact(end - into.len());
        while into.len() < end {
            if self.part.is_empty() {
                let next = self.parts.blocking_recv();
                self.part = next.unwrap_or_else(|| Err(self.ends_early()))?;
            }
            let now = self.part.split_to(self.part.len().min(end - into.len()));
            into.extend_from_slice(&now);
            self.left -= now.len() as u64;
        }
        Ok(())
    }

    /// All that was not read yet.
    pub async fn rest(mut self) -> Result<Bytes> {
        let mut all = BytesMut::with_capacity(self.left as usize);
        all.extend_from_slice(&self.part);
        while (all.len() as u64) < self.left {
            let next = self.parts.recv().await;
            all.extend_from_slice(&next.unwrap_or_else(|| Err(self.ends_early()))?);
        }
        Ok(all.freeze())
    }

    fn ends_early(&self) -> Error {
        Error::temporary(format!("{} ended before all of it was read", self.shown))
    }
}
