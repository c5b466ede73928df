//! START_REPLICATION PHYSICAL: WAL as the server writes it.
//!
//! The caller reports what is durable, and answers when the server asks; nothing is sent on its own.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use postgres_protocol::message::backend::Message as M;
use postgres_protocol::message::frontend;
use tokio::sync::watch;

use super::codec::{Message, broken, server_error};
use super::connection::{Connection, GOODBYE, detach, quote_name};
use crate::error::{Error, Result};
use crate::postgres::EPOCH_2000_US;
use crate::postgres::lsn::Lsn;

/// WAL or the end of it.
#[derive(Debug)]
pub enum WalItem {
    /// Bytes from `start` on.
    Data {
        /// Position of the first byte.
        start: Lsn,
        /// WAL.
        bytes: Bytes,
    },
    /// The server has nothing new; its current end of WAL.
    Idle {
        /// End of WAL on the server.
        end: Lsn,
        /// It wants to hear from us now: the caller reports.
        wants_answer: bool,
    },
    /// The timeline ended: [`WalStream::finish`] asks what comes next.
    TimelineEnd,
}

/// What a server was told to be durable: timeline and position; `None` while there is no stream.
pub type Told = Option<(u32, Lsn)>;

/// A stream of WAL.
pub struct WalStream {
    connection: Connection,
    timeline: u32,
    flushed: Lsn,
    told: Option<watch::Sender<Told>>,
}

impl Drop for WalStream {
    fn drop(&mut self) {
        if let Some(told) = &self.told {
            told.send_replace(None);
        }
    }
}

/// A slot is not one for WAL as it is.
pub fn is_logical(slot: &str, cause: Error) -> Error {
    Error::refused(format!(
        "replication slot {slot} is a logical one, and a physical one is needed"
    ))
    .remedy("choose another name with --slot")
    .caused_by(cause)
}

impl WalStream {
    /// Starts streaming at `from` on `timeline`, through `slot` if there is one.
    pub async fn start(mut connection: Connection, slot: Option<&str>, from: Lsn, timeline: u32) -> Result<Self> {
        let slot_name = slot;
        let slot = slot.map(|s| format!("SLOT {} ", quote_name(s))).unwrap_or_default();
        connection
            .send_query(&format!("START_REPLICATION {slot}PHYSICAL {from} TIMELINE {timeline}"))
            .await?;
        loop {
            match connection.wire.receive().await? {
                Message::CopyBoth => {
                    return Ok(Self {
                        connection,
                        timeline,
                        flushed: Lsn(0),
                        told: None,
                    });
                }
                Message::Other(M::ErrorResponse(body)) => {
                    let error = server_error(body.fields());
                    let said = error.to_string();
                    return Err(if said.contains("SQLSTATE 58P01") {
                        error.remedy(
                            "the server no longer has this WAL; use a replication slot, or take a new full backup",
                        )
                    } else if let (true, Some(name)) = (said.contains("SQLSTATE 55000"), slot_name) {
                        // Before 15, a slot could not be asked what it is.
                        if said.contains("logical replication slot") {
                            return Err(is_logical(name, error));
                        }
                        error.remedy(
                            "a slot that was invalidated is of no more use: `select pg_drop_replication_slot('…')`, and it is made anew",
                        )
                    } else {
                        error
                    });
                }
                Message::Other(M::ReadyForQuery(_)) => return Err(broken("no stream after START_REPLICATION")),
                _ => {}
            }
        }
    }

    /// Has `told` know what the server is told to be durable.
    pub fn tell(&mut self, told: watch::Sender<Told>) {
        self.told = Some(told);
    }

    /// The next item. Cancelling it loses nothing: it only reads.
    pub async fn next(&mut self) -> Result<WalItem> {
        loop {
            match self.connection.wire.receive().await? {
                Message::CopyData(mut data) => match data.first() {
                    Some(b'w') if data.len() >= 25 => {
                        data.advance(1);
                        let start = Lsn(data.get_u64());
                        data.advance(16);
                        return Ok(WalItem::Data {
                            start,
                            bytes: detach(&data),
                        });
                    }
                    Some(b'k') if data.len() >= 18 => {
                        data.advance(1);
                        let end = Lsn(data.get_u64());
                        data.advance(8);
                        let wants_answer = data.get_u8() == 1;
                        return Ok(WalItem::Idle { end, wants_answer });
                    }
                    _ => return Err(broken("a strange message in a WAL stream")),
                },
                Message::CopyDone => return Ok(WalItem::TimelineEnd),
                Message::Other(M::ErrorResponse(body)) => return Err(server_error(body.fields())),
                _ => {}
            }
        }
    }

    /// After the end of a timeline: the next one and where it begins, if the server tells.
    pub async fn finish(&mut self) -> Result<Option<(u32, Lsn)>> {
        let mut out = BytesMut::new();
        frontend::copy_done(&mut out);
        self.connection.wire.send(&out).await?;
        let mut next = None;
        loop {
            match self.connection.wire.receive().await? {
                Message::Other(M::DataRow(body)) => {
                    let row = super::codec::row(&body)?;
                    let field = |i: usize| row.get(i).and_then(Option::as_deref);
                    if let (Some(Ok(timeline)), Some(Ok(start))) = (field(0).map(str::parse), field(1).map(str::parse))
                    {
                        next = Some((timeline, start));
                    }
                }
                Message::Other(M::ReadyForQuery(_)) => return Ok(next),
                Message::Other(M::ErrorResponse(body)) => return Err(server_error(body.fields())),
                _ => {}
            }
        }
    }

    /// Tells the server what has arrived and what is durable here (0: nothing is promised). `wants_answer`
    /// asks for an answer: a server that is gone gives none.
    pub async fn report(&mut self, received: Lsn, flushed: Lsn, wants_answer: bool) -> Result<()> {
        if flushed > self.flushed {
            self.flushed = flushed;
            if let Some(told) = &self.told {
                told.send_replace(Some((self.timeline, flushed)));
            }
        }
        let mut body = BytesMut::with_capacity(34);
        body.put_u8(b'r');
        // A server that shuts down waits until everything is written, or flushed if that is told.
        body.put_u64(received.max(self.flushed).0);
        body.put_u64(self.flushed.0);
        body.put_u64(0);
        body.put_i64(jiff::Timestamp::now().as_microsecond() - EPOCH_2000_US);
        body.put_u8(wants_answer.into());
        let mut out = BytesMut::new();
        frontend::CopyData::new(body.freeze())
            .map_err(|e| Error::failed("a status message").caused_by(e))?
            .write(&mut out);
        self.connection.wire.send(&out).await
    }

    /// Ends the stream politely.
    pub async fn stop(&mut self) {
        let mut out = BytesMut::new();
        frontend::copy_done(&mut out);
        frontend::terminate(&mut out);
        let _ = tokio::time::timeout(GOODBYE, self.connection.wire.send(&out)).await;
    }
}
