//! Where WAL on its way into the repository comes from: the server, the spool, or somebody in the same process.

use super::Options;
use super::given::Given;
use super::spool::Reader;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::postgres::segment::Segment;
use crate::replication::wal_stream::{WalItem, WalStream};

/// A source of WAL.
pub enum Origin {
    /// The server; it is told what is durable in the repository.
    Server(WalStream),
    /// The server, for a hole before what the spool holds: up to this segment. It is told nothing.
    ServerUntil(WalStream, Segment),
    /// The spool; it keeps what is not yet in the repository.
    Spool(Box<Reader>),
    /// Somebody in the same process.
    Given(Given),
}

impl Origin {
    /// The next item. Cancelling it loses nothing.
    pub async fn next(&mut self) -> Result<WalItem> {
        match self {
            Self::Server(stream) | Self::ServerUntil(stream, _) => stream.next().await,
            Self::Spool(reader) => Ok(match reader.next().await? {
                Some((start, bytes)) => WalItem::Data { start, bytes },
                None => WalItem::TimelineEnd,
            }),
            Self::Given(given) => match given.wal.recv().await {
                Some((start, bytes)) => Ok(WalItem::Data { start, bytes }),
                None => Err(Error::temporary("nobody is there any more who hands over WAL")),
            },
        }
    }

    /// Whether silence means that something is wrong.
    pub fn is_server(&self) -> bool {
        matches!(self, Self::Server(_) | Self::ServerUntil(..))
    }

    /// Whether it is told up to where WAL is durable.
    pub fn counts(&self, options: &Options) -> bool {
        match self {
            Self::Server(_) => options.slot.is_some() || options.synchronous,
            Self::ServerUntil(..) => false,
            Self::Spool(_) | Self::Given(_) => true,
        }
    }

    /// Whether what is received now comes from elsewhere.
    pub fn is_over(&self, now: Segment) -> bool {
        matches!(self, Self::ServerUntil(_, until) if now.timeline == until.timeline && now.number >= until.number)
    }

    /// Up to where WAL has arrived, and is durable in the repository.
    pub async fn report(&mut self, received: Lsn, flushed: Lsn, wants_answer: bool) -> Result<()> {
        match self {
            Self::Server(stream) | Self::ServerUntil(stream, _) => stream.report(received, flushed, wants_answer).await,
            Self::Spool(reader) => {
                reader.stored(flushed);
                Ok(())
            }
            Self::Given(given) => {
                given.durable.send_replace(flushed);
                Ok(())
            }
        }
    }

    /// The timeline has ended: what comes next, in words.
    pub async fn timeline_ended(&mut self) -> Result<String> {
        let next = match self {
            Self::Server(stream) | Self::ServerUntil(stream, _) => stream.finish().await?,
            Self::Spool(_) | Self::Given(_) => None,
        };
        Ok(next.map_or("a new one".to_owned(), |(timeline, at)| {
            format!("timeline {timeline} from {at}")
        }))
    }

    /// All of the timeline that has ended is in the repository.
    pub fn all_stored(&mut self) {
        if let Self::Spool(reader) = self {
            reader.stored_timeline();
        }
    }

    /// A polite end.
    pub async fn stop(&mut self) {
        match self {
            Self::Server(stream) | Self::ServerUntil(stream, _) => stream.stop().await,
            Self::Spool(_) | Self::Given(_) => {}
        }
    }
}
