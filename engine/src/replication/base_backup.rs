//! BASE_BACKUP, in the form of 14 and in that of 15 and later, as one stream of items.

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message as M;

use super::codec::{self, Message, Row, broken, server_error};
use super::connection::{Connection, quote_text};
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;

/// What to ask for.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Label, visible in backup_label.
    pub label: String,
    /// Checkpoint at once instead of spread.
    pub fast: bool,
    /// KiB a second, 32 to 1048576.
    pub max_rate_kib: Option<u32>,
}

/// A tablespace that the server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceRow {
    /// `None` for the data directory itself.
    pub oid: Option<u32>,
    /// Absolute, or relative to the data directory for an in-place tablespace.
    pub location: String,
    /// Estimate, bytes.
    pub size_bytes: Option<u64>,
}

/// Next thing of the stream.
#[derive(Debug)]
pub enum Item {
    /// The archive of a tablespace begins.
    Archive {
        /// `None` for the data directory itself.
        tablespace: Option<u32>,
    },
    /// Bytes of the current archive (tar, without a terminator). They share the read buffer.
    Data(Bytes),
    /// The backup has ended well.
    End {
        /// Stop LSN.
        lsn: Lsn,
        /// Its timeline.
        timeline: u32,
    },
}

/// A base backup under way.
pub struct BaseBackup<'a> {
    connection: &'a mut Connection,
    /// Start LSN.
    pub start: Lsn,
    /// Its timeline.
    pub timeline: u32,
    /// What will be sent, in this order.
    pub tablespaces: Vec<TablespaceRow>,
    next_archive: usize,
    in_manifest: bool,
}

fn command(options: &Options, major: u32) -> String {
    let label = quote_text(&options.label);
    if major >= 15 {
        let checkpoint = if options.fast { "fast" } else { "spread" };
        let rate = options
            .max_rate_kib
            .map(|r| format!(", MAX_RATE {r}"))
            .unwrap_or_default();
        // Up to 15, asking for the map leaves out in-place tablespaces; the links are sent instead.
        let map = major >= 16;
        format!(
            "BASE_BACKUP (LABEL {label}, PROGRESS, CHECKPOINT '{checkpoint}', WAIT 'false', TABLESPACE_MAP '{map}', \
             VERIFY_CHECKSUMS 'false', MANIFEST 'no'{rate})"
        )
    } else {
        let fast = if options.fast { " FAST" } else { "" };
        let rate = options
            .max_rate_kib
            .map(|r| format!(" MAX_RATE {r}"))
            .unwrap_or_default();
        format!("BASE_BACKUP LABEL {label} PROGRESS{fast} NOWAIT{rate} NOVERIFY_CHECKSUMS MANIFEST 'no'")
    }
}

impl<'a> BaseBackup<'a> {
    /// Starts a base backup; returns once the server's checkpoint is done.
    pub async fn start(connection: &'a mut Connection, options: &Options) -> Result<Self> {
        if let Some(rate) = options.max_rate_kib.filter(|r| !(32..=1_048_576).contains(r)) {
            return Err(Error::usage(format!(
                "a rate of {rate} KiB/s is not possible: 32 to 1048576"
            )));
        }
        let command = command(options, connection.major());
        connection.send_query(&command).await?;
        let (start, timeline) = position(&result_set(connection).await?)?;
        let tablespaces = result_set(connection)
            .await?
            .iter()
            .map(tablespace)
            .collect::<Result<_>>()?;
        Ok(Self {
            connection,
            start,
            timeline,
            tablespaces,
            next_archive: 0,
            in_manifest: false,
        })
    }

    /// The next item. After `End` the connection is idle again.
    pub async fn next(&mut self) -> Result<Item> {
        let old_form = self.connection.major() < 15;
        loop {
            match self.connection.wire.receive().await? {
                Message::CopyOut if old_form => {
                    if self.next_archive < self.tablespaces.len() {
                        return Ok(self.archive());
                    }
                    self.in_manifest = true;
                }
                Message::CopyOut | Message::CopyDone => {}
                Message::CopyData(_) if self.in_manifest && old_form => {}
                Message::CopyData(data) if old_form => return Ok(Item::Data(data)),
                Message::CopyData(mut data) => {
                    if data.is_empty() {
                        return Err(broken("an empty message in a base backup"));
                    }
                    match data.get_u8() {
                        b'n' => {
                            self.in_manifest = false;
                            if self.next_archive >= self.tablespaces.len() {
                                return Err(broken("more archives than tablespaces"));
                            }
                            return Ok(self.archive());
                        }
                        b'm' => self.in_manifest = true,
                        b'd' if self.in_manifest => {}
                        b'd' => return Ok(Item::Data(data)),
                        b'p' => {}
                        other => {
                            return Err(broken(format!(
                                "a message of type {:?} in a base backup",
                                other as char
                            )));
                        }
                    }
                }
                Message::Other(M::RowDescription(_)) => {
                    let rows = rows_until_complete(self.connection).await?;
                    let (lsn, timeline) = position(&rows)?;
                    self.finish().await?;
                    return Ok(Item::End { lsn, timeline });
                }
                Message::Other(M::ErrorResponse(body)) => return Err(server_error(body.fields())),
                Message::Other(_) => {}
                Message::CopyBoth => return Err(broken("CopyBoth in a base backup")),
            }
        }
    }

    fn archive(&mut self) -> Item {
        let tablespace = self.tablespaces[self.next_archive].oid;
        self.next_archive += 1;
        Item::Archive { tablespace }
    }

    async fn finish(&mut self) -> Result<()> {
        if self.next_archive != self.tablespaces.len() {
            return Err(broken("the base backup ended before all tablespaces were sent"));
        }
        loop {
            match self.connection.wire.receive().await? {
                Message::Other(M::ReadyForQuery(_)) => return Ok(()),
                Message::Other(M::ErrorResponse(body)) => return Err(server_error(body.fields())),
                _ => {}
            }
        }
    }
}

fn position(rows: &[Row]) -> Result<(Lsn, u32)> {
    let bad = || broken("no position in a base backup");
    let row = rows.first().ok_or_else(bad)?;
    let field = |i: usize| row.get(i).and_then(Option::as_deref).ok_or_else(bad);
    Ok((
        field(0)?.parse().map_err(|_| bad())?,
        field(1)?.parse().map_err(|_| bad())?,
    ))
}

fn tablespace(row: &Row) -> Result<TablespaceRow> {
    let bad = || broken("a strange list of tablespaces");
    let field = |i: usize| row.get(i).and_then(Option::as_deref);
    Ok(TablespaceRow {
        oid: field(0).map(|oid| oid.parse().map_err(|_| bad())).transpose()?,
        location: field(1).unwrap_or_default().to_owned(),
        size_bytes: field(2)
            .and_then(|kib| kib.parse::<u64>().ok())
            .map(|kib| kib.saturating_mul(1024)),
    })
}

/// Reads one result set, from its RowDescription to its CommandComplete.
async fn result_set(connection: &mut Connection) -> Result<Vec<Row>> {
    loop {
        match connection.wire.receive().await? {
            Message::Other(M::RowDescription(_)) => return rows_until_complete(connection).await,
            Message::Other(M::ErrorResponse(body)) => {
                let error = server_error(body.fields());
                // Leave the connection usable for another attempt.
                while !matches!(connection.wire.receive().await?, Message::Other(M::ReadyForQuery(_))) {}
                return Err(error);
            }
            Message::Other(_) => {}
            _ => return Err(broken("copy data before the base backup's result sets")),
        }
    }
}

async fn rows_until_complete(connection: &mut Connection) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    loop {
        match connection.wire.receive().await? {
            Message::Other(M::DataRow(body)) => rows.push(codec::row(&body)?),
            Message::Other(M::CommandComplete(_)) => return Ok(rows),
            Message::Other(M::ErrorResponse(body)) => return Err(server_error(body.fields())),
            Message::Other(_) => {}
            _ => return Err(broken("copy data inside a result set")),
        }
    }
}
