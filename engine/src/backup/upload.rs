//! Finished packs into the store, a few at once, and announced every now and then, so that a session that
//! dies leaves something for the next one.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;

use crate::commit::Log;
use crate::commit::session::Session;
use crate::dedup::store_run;
use crate::error::Result;
use crate::pack::{FinishedPack, UploadedPack, index_run};
use crate::progress::Progress;
use crate::stanza::Stanza;

/// Packs under way at once. With the open pack and the one that waits, this bounds memory.
pub const CONCURRENT: usize = 2;
/// Packs after which an index run is announced.
const ANNOUNCE_PACKS: usize = 8;
/// Chunks after which one is announced, 12 MiB: who reads runs holds one of them at a time.
const ANNOUNCE_CHUNKS: usize = 1 << 18;

/// Stores packs until the channel closes.
pub async fn run(
    stanza: Arc<Stanza>,
    mut finished: mpsc::Receiver<FinishedPack>,
    log: &mut Log,
    session: &mut Session,
    progress: &Progress,
) -> Result<()> {
    let mut uploads = FuturesUnordered::new();
    let mut waiting: Vec<UploadedPack> = Vec::new();
    let mut open = true;
    while open || !uploads.is_empty() {
        tokio::select! {
            biased;
            pack = finished.recv(), if open && uploads.len() < CONCURRENT => match pack {
                Some(pack) => {
                    let stanza = stanza.clone();
                    let len = pack.len();
                    uploads.push(async move { Ok::<_, crate::error::Error>((pack.upload(&stanza).await?, len)) });
                }
                None => open = false,
            },
            Some(uploaded) = uploads.next() => {
                let (pack, len) = uploaded?;
                progress.stored_bytes.add(len);
                waiting.push(pack);
                let chunks: usize = waiting.iter().map(UploadedPack::frames).sum();
                if waiting.len() >= ANNOUNCE_PACKS || chunks >= ANNOUNCE_CHUNKS {
                    announce(&stanza, &std::mem::take(&mut waiting), log, session).await?;
                }
            }
        }
    }
    announce(&stanza, &waiting, log, session).await
}

async fn announce(stanza: &Stanza, packs: &[UploadedPack], log: &mut Log, session: &mut Session) -> Result<()> {
    if packs.is_empty() {
        return Ok(());
    }
    let hash = store_run(stanza, index_run(packs)).await?;
    session.announce(log, hash).await
}
