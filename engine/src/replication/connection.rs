//! A connection to a server: addresses, TLS, startup, simple queries.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::backend::Message as M;
use postgres_protocol::message::frontend;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::codec::{self, Message, RawRow, Row, broken, server_error};
use super::conninfo::{ConnInfo, Host, SessionAttrs, SslMode};
use super::{auth, tls};
use crate::error::{Context, Error, Result};
use crate::postgres::lsn::Lsn;

trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// Framed bytes in both directions.
pub struct Wire {
    socket: Box<dyn Socket>,
    buffer: BytesMut,
    private: bool,
}

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 256 << 10;

impl Wire {
    fn new(socket: Box<dyn Socket>, private: bool) -> Self {
        Self {
            socket,
            buffer: BytesMut::with_capacity(READ_BYTES),
            private,
        }
    }

    /// Nobody on the way can read along: TLS or a Unix socket.
    pub fn is_private(&self) -> bool {
        self.private
    }

    /// Sends bytes and flushes them.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.socket.write_all(bytes).await.map_err(lost)?;
        self.socket.flush().await.map_err(lost)
    }

    /// The next message. Cancelling it loses nothing.
    pub async fn receive(&mut self) -> Result<Message> {
        loop {
            if let Some(message) = codec::next(&mut self.buffer)? {
                return Ok(message);
            }
            if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 {
                self.buffer.reserve(READ_BYTES);
            }
            if self.socket.read_buf(&mut self.buffer).await.map_err(lost)? == 0 {
                return Err(Error::temporary("the server closed the connection"));
            }
        }
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::temporary("the connection to the server was lost").caused_by(error)
}

/// What the session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A walsender: replication commands and simple queries without a database.
    Replication,
    /// Ordinary SQL.
    Sql,
}

/// Answer of IDENTIFY_SYSTEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemIdentity {
    /// System identifier.
    pub system_identifier: u64,
    /// Current timeline.
    pub timeline: u32,
    /// Current flush position.
    pub flush: Lsn,
}

/// An idle connection.
pub struct Connection {
    pub(super) wire: Wire,
    mode: Mode,
    host: Host,
    server_version: u32,
    in_recovery: bool,
    read_only: bool,
}

impl Connection {
    /// Connects to the first acceptable host.
    pub async fn open(info: &ConnInfo, mode: Mode) -> Result<Self> {
        let passes: &[SessionAttrs] = match info.session_attrs {
            SessionAttrs::PreferStandby => &[SessionAttrs::Standby, SessionAttrs::Any],
            ref one => std::slice::from_ref(one),
        };
        let mut failures: Vec<Error> = Vec::new();
        for attrs in passes {
            for host in &info.hosts {
                match Self::open_host(info, host, mode).await {
                    Ok(connection) if connection.acceptable(*attrs) => return Ok(connection),
                    // It may become one: a failover is on its way.
                    Ok(_) => failures.push(Error::temporary(format!(
                        "{} port {}: not the kind of server that target_session_attrs asks for",
                        host.name, host.port
                    ))),
                    Err(error) => failures.push(error),
                }
            }
        }
        if failures.len() == 1 {
            return Err(failures.remove(0));
        }
        let texts: Vec<_> = failures.iter().map(ToString::to_string).collect();
        Err(Error::temporary(format!(
            "none of the servers can be used: {}",
            texts.join("; ")
        )))
    }

    /// For replication, if the server lets this role and has senders of WAL; else an ordinary one to a primary, over which
    /// identity, timeline histories and WAL come from functions and files.
    pub async fn open_either(info: &ConnInfo) -> Result<Self> {
        if info.ordinary_only {
            return Self::open(info, Mode::Sql).await;
        }
        let denied = match Self::open(info, Mode::Replication).await {
            Err(error) if is_denied(&error) => error,
            Err(error) if has_no_sender(&error) => error.remedy(MORE_SENDERS),
            opened => return opened,
        };
        let mut ordinary = match Self::open(info, Mode::Sql).await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::debug!("an ordinary connection is none either: {error}");
                return Err(denied);
            }
        };
        // One that has senders, and none to spare just now, may have one in a moment.
        if !is_denied(&denied) {
            match ordinary.show("max_wal_senders").await {
                Ok(Some(senders)) if senders == "0" => {}
                _ => return Err(denied),
            }
        }
        // A standby does not tell its timeline and its end of WAL in any other way.
        match ordinary.in_recovery {
            false => Ok(ordinary),
            true => Err(denied),
        }
    }

    fn acceptable(&self, attrs: SessionAttrs) -> bool {
        match attrs {
            SessionAttrs::Any | SessionAttrs::PreferStandby => true,
            SessionAttrs::Primary => !self.in_recovery,
            SessionAttrs::Standby => self.in_recovery,
            SessionAttrs::ReadWrite => !self.in_recovery && !self.read_only,
            SessionAttrs::ReadOnly => self.in_recovery || self.read_only,
        }
    }

    async fn open_host(info: &ConnInfo, host: &Host, mode: Mode) -> Result<Self> {
        let connecting = Self::open_unlimited(info, host, mode);
        let result = match info.connect_timeout {
            None => connecting.await,
            Some(limit) => tokio::time::timeout(limit, connecting).await.unwrap_or_else(|_| {
                Err(Error::temporary(format!(
                    "no connection within {} s (connect_timeout)",
                    limit.as_secs()
                )))
            }),
        };
        result.context(|| format!("server {} port {}", host.name, host.port))
    }

    async fn open_unlimited(info: &ConnInfo, host: &Host, mode: Mode) -> Result<Self> {
        match (
            Self::attempt(info, host, mode, info.sslmode != SslMode::Allow).await,
            info.sslmode,
        ) {
            (Err(first), SslMode::Allow) if !host.is_socket() => {
                Self::attempt(info, host, mode, true).await.map_err(|_| first)
            }
            (result, _) => result,
        }
    }

    async fn attempt(info: &ConnInfo, host: &Host, mode: Mode, may_use_tls: bool) -> Result<Self> {
        let (wire, binding) = open_wire(info, host, may_use_tls).await?;
        let mut this = Self {
            wire,
            mode,
            host: host.clone(),
            server_version: 0,
            in_recovery: false,
            read_only: false,
        };
        let database = match mode {
            Mode::Replication => "replication",
            Mode::Sql => &info.database,
        };
        let mut parameters = vec![
            ("user", info.user.as_str()),
            ("application_name", info.application_name.as_str()),
            ("client_encoding", "UTF8"),
            // A backup outlives every timeout that is meant for applications.
            ("statement_timeout", "0"),
            ("lock_timeout", "0"),
            ("idle_in_transaction_session_timeout", "0"),
            ("idle_session_timeout", "0"),
            ("DateStyle", "ISO"),
        ];
        match mode {
            Mode::Replication => parameters.push(("replication", "true")),
            Mode::Sql => parameters.push(("database", &info.database)),
        }
        if let Some(options) = &info.options {
            parameters.push(("options", options));
        }
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out)
            .map_err(|e| Error::usage("conninfo holds a NUL byte").caused_by(e))?;
        this.wire.send(&out).await?;
        auth::authenticate(&mut this.wire, info, host, database, binding).await?;
        loop {
            match this.wire.receive().await? {
                Message::Other(M::ReadyForQuery(_)) => break,
                Message::Other(M::ErrorResponse(body)) => return Err(server_error(body.fields())),
                Message::Other(M::ParameterStatus(body)) => {
                    let value = body.value().unwrap_or_default();
                    match body.name().unwrap_or_default() {
                        "server_version" => this.server_version = parse_version(value),
                        "in_hot_standby" => this.in_recovery = value == "on",
                        "default_transaction_read_only" => this.read_only = value == "on",
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        if this.server_version < 140_000 {
            return Err(Error::new(
                crate::error::Kind::Unsupported,
                format!("PostgreSQL {} is not supported", this.server_version / 10_000),
            )
            .remedy("fairvault backs up PostgreSQL 14 to 19"));
        }
        Ok(this)
    }

    /// Version as in `server_version_num`.
    pub fn server_version(&self) -> u32 {
        self.server_version
    }

    /// Major version.
    pub fn major(&self) -> u32 {
        self.server_version / 10_000
    }

    /// Whether the server is a standby.
    pub fn in_recovery(&self) -> bool {
        self.in_recovery
    }

    /// What the session is for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The host that was connected to.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Sends a simple query.
    pub(crate) async fn send_query(&mut self, query: &str) -> Result<()> {
        let mut out = BytesMut::new();
        frontend::query(query, &mut out).map_err(|e| Error::usage("a query holds a NUL byte").caused_by(e))?;
        self.wire.send(&out).await
    }

    /// Runs a simple query and returns its rows, of all result sets.
    pub async fn query(&mut self, query: &str) -> Result<Vec<Row>> {
        let text = |value: Vec<u8>| String::from_utf8_lossy(&value).into_owned();
        let rows = self.query_bytes(query).await?;
        Ok(rows
            .into_iter()
            .map(|row| row.into_iter().map(|value| value.map(text)).collect())
            .collect())
    }

    async fn query_bytes(&mut self, query: &str) -> Result<Vec<RawRow>> {
        self.send_query(query).await?;
        let mut rows = Vec::new();
        let mut failure = None;
        loop {
            match self.wire.receive().await? {
                Message::Other(M::DataRow(body)) => rows.push(codec::raw_row(&body)?),
                Message::Other(M::ErrorResponse(body)) => failure = Some(server_error(body.fields())),
                Message::Other(M::ReadyForQuery(_)) => break,
                Message::Other(_) => {}
                _ => return Err(broken("copy data in answer to a query")),
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(rows),
        }
    }

    /// The answer to a COPY TO STDOUT that was sent.
    pub(crate) fn copy_out(&mut self) -> CopyOut<'_> {
        CopyOut {
            connection: self,
            failure: None,
        }
    }

    /// The one value that a query returns.
    pub async fn value(&mut self, query: &str) -> Result<Option<String>> {
        Ok(self
            .query(query)
            .await?
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next())
            .flatten())
    }

    /// IDENTIFY_SYSTEM; on an ordinary connection to a primary, functions that anybody may call.
    pub async fn identify(&mut self) -> Result<SystemIdentity> {
        if self.mode == Mode::Sql {
            return self.identify_by_functions().await;
        }
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let bad = || broken("a strange answer to IDENTIFY_SYSTEM");
        let row = rows.first().ok_or_else(bad)?;
        let field = |i: usize| row.get(i).and_then(Option::as_deref).ok_or_else(bad);
        Ok(SystemIdentity {
            system_identifier: field(0)?.parse().map_err(|_| bad())?,
            timeline: field(1)?.parse().map_err(|_| bad())?,
            flush: field(2)?.parse().map_err(|_| bad())?,
        })
    }

    async fn identify_by_functions(&mut self) -> Result<SystemIdentity> {
        let query = "SELECT s.system_identifier, pg_walfile_name(l), l \
                     FROM pg_control_system() s, pg_current_wal_flush_lsn() l";
        let rows = self.query(query).await?;
        let bad = || broken("a strange answer to who it is");
        let row = rows.first().ok_or_else(bad)?;
        let field = |i: usize| row.get(i).and_then(Option::as_deref).ok_or_else(bad);
        // SQL knows no number without a sign.
        let signed: i64 = field(0)?.parse().map_err(|_| bad())?;
        let timeline = field(1)?.get(..8).ok_or_else(bad)?;
        Ok(SystemIdentity {
            system_identifier: signed.cast_unsigned(),
            timeline: u32::from_str_radix(timeline, 16).map_err(|_| bad())?,
            flush: field(2)?.parse().map_err(|_| bad())?,
        })
    }

    /// Bytes of a file below the data directory, on an ordinary connection; fewer if it ends before.
    pub(crate) async fn read_file(&mut self, path: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        let query = format!(
            "SELECT encode(pg_read_binary_file({}, {offset}, {len}, false), 'hex')",
            quote_text(path)
        );
        let text = self.value(&query).await.map_err(grants)?.unwrap_or_default();
        hex::decode(&text).map_err(|e| broken(format!("no bytes of {path}: {e}")))
    }

    /// SHOW. `None` if the server does not tell this role.
    pub async fn show(&mut self, name: &str) -> Result<Option<String>> {
        match self.value(&format!("SHOW {name}")).await {
            Ok(value) => Ok(value),
            Err(error) if error.to_string().contains("SQLSTATE 42") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// wal_segment_size, bytes.
    pub async fn wal_segment_size(&mut self) -> Result<u64> {
        let text = self.show("wal_segment_size").await?.unwrap_or_default();
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let unit = match &text[split..] {
            "MB" => 1u64 << 20,
            "GB" => 1 << 30,
            _ => return Err(broken(format!("wal_segment_size = {text:?}"))),
        };
        let size = text[..split]
            .parse::<u64>()
            .map_err(|e| broken(e.to_string()))?
            .saturating_mul(unit);
        if !crate::postgres::segment::valid_segment_size(size) {
            return Err(broken(format!("wal_segment_size = {text:?}")));
        }
        Ok(size)
    }

    /// TIMELINE_HISTORY: the content of the history file, which is all that an ordinary connection reads; `None` for
    /// timeline 1.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<Option<Vec<u8>>> {
        if timeline == 1 {
            return Ok(None);
        }
        if self.mode == Mode::Sql {
            let path = format!("pg_wal/{timeline:08X}.history");
            let content = self.read_file(&path, 0, HISTORY_BYTES).await?;
            return match (content.len() as u64) < HISTORY_BYTES {
                true => Ok(Some(content)),
                false => Err(Error::failed(format!("{path} has {HISTORY_BYTES} bytes or more"))),
            };
        }
        // Bytes, not text: the file may hold a restore point's name in any encoding.
        let rows = self.query_bytes(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.into_iter().next().and_then(|row| row.into_iter().nth(1)).flatten();
        content
            .map(Some)
            .ok_or_else(|| broken("no content in TIMELINE_HISTORY"))
    }

    /// CREATE_REPLICATION_SLOT … PHYSICAL; a temporary slot lives as long as the connection.
    pub async fn create_slot(&mut self, name: &str, temporary: bool, reserve_wal: bool) -> Result<()> {
        let temporary = if temporary { " TEMPORARY" } else { "" };
        let reserve = match (reserve_wal, self.major() >= 15) {
            (false, _) => "",
            (true, true) => " (RESERVE_WAL)",
            (true, false) => " RESERVE_WAL",
        };
        self.query(&format!(
            "CREATE_REPLICATION_SLOT {}{temporary} PHYSICAL{reserve}",
            quote_name(name)
        ))
        .await?;
        Ok(())
    }

    /// DROP_REPLICATION_SLOT.
    pub async fn drop_slot(&mut self, name: &str) -> Result<()> {
        self.query(&format!("DROP_REPLICATION_SLOT {} WAIT", quote_name(name)))
            .await?;
        Ok(())
    }
}

/// No timeline history has as many bytes.
const HISTORY_BYTES: u64 = 1 << 20;

/// The server refuses the role: by pg_hba.conf or its password (class 28), or because it lacks a right.
pub fn is_denied(error: &Error) -> bool {
    let text = error.to_string();
    text.contains("SQLSTATE 28") || text.contains("SQLSTATE 42501")
}

/// The server has no sender of WAL to spare, or none at all. That there are too many connections of any kind has the same
/// code, and other words.
pub fn has_no_sender(error: &Error) -> bool {
    let text = error.to_string();
    text.contains("SQLSTATE 53300") && text.contains("max_wal_senders")
}

/// What to do about that.
pub const MORE_SENDERS: &str = "raise max_wal_senders and restart the server, or archive with `fairvault wal push`: then \
                                the primary is backed up over ordinary connections";

/// What to do about a function that the role may not run.
pub(crate) fn grants(error: Error) -> Error {
    match error.to_string().contains("SQLSTATE 42501") {
        true => error.remedy("`fairvault check` prints what to grant"),
        false => error,
    }
}

/// An identifier for the replication grammar.
pub(crate) fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The data of a COPY TO STDOUT.
pub(crate) struct CopyOut<'a> {
    connection: &'a mut Connection,
    failure: Option<Error>,
}

impl CopyOut<'_> {
    /// The next data; `None` when the query is over.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let message = match self.connection.wire.receive().await {
                Ok(message) => message,
                // It said why before it went.
                Err(error) => return Err(self.failure.take().unwrap_or(error)),
            };
            match message {
                Message::CopyData(data) => return Ok(Some(data)),
                Message::CopyOut | Message::CopyDone => {}
                Message::Other(M::ErrorResponse(body)) => self.failure = Some(server_error(body.fields())),
                Message::Other(M::ReadyForQuery(_)) => return self.failure.take().map_or(Ok(None), Err),
                Message::Other(_) => {}
                _ => return Err(broken("a strange answer to COPY")),
            }
        }
    }
}

/// A string literal for the replication grammar.
pub(crate) fn quote_text(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// `server_version` as a number such as `server_version_num`.
fn parse_version(text: &str) -> u32 {
    let digits = |s: &str| {
        s.chars()
            .take_while(char::is_ascii_digit)
            .collect::<String>()
            .parse::<u32>()
            .unwrap_or(0)
    };
    let mut parts = text.splitn(2, '.');
    let major = parts.next().map_or(0, digits);
    let minor = parts.next().map_or(0, digits);
    major.saturating_mul(10_000).saturating_add(minor)
}

async fn open_wire(info: &ConnInfo, host: &Host, may_use_tls: bool) -> Result<(Wire, Option<Option<Vec<u8>>>)> {
    if host.is_socket() {
        let path = format!("{}/.s.PGSQL.{}", host.name, host.port);
        let socket = UnixStream::connect(&path).await.map_err(|e| {
            Error::temporary(format!("connecting to {path}"))
                .caused_by(e)
                .remedy("is the server running, and is the path its unix_socket_directories?")
        })?;
        return Ok((Wire::new(Box::new(socket), true), None));
    }
    let target = host.address.as_deref().unwrap_or(&host.name);
    let mut socket = TcpStream::connect((target, host.port)).await.map_err(|e| {
        Error::temporary(format!("connecting to {target}"))
            .caused_by(e)
            .remedy("is the server running and listening there?")
    })?;
    let _ = socket.set_nodelay(true);
    info.keepalive.apply(&socket);
    if info.sslmode == SslMode::Disable || !may_use_tls {
        return Ok((Wire::new(Box::new(socket), false), None));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await.map_err(lost)?;
    // Exactly one byte: whatever came after it in clear text would be an injection.
    let answer = socket.read_u8().await.map_err(lost)?;
    if answer != b'S' {
        if info.sslmode >= SslMode::Require {
            return Err(
                Error::refused("the server does not offer TLS").remedy("set up TLS there, or choose another sslmode")
            );
        }
        return Ok((Wire::new(Box::new(socket), false), None));
    }
    let config = tls::config(info)?;
    let name = ServerName::try_from(host.name.clone())
        .map_err(|e| Error::usage(format!("{:?} is no host name that TLS can check", host.name)).caused_by(e))?;
    let stream = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect(name, socket)
        .await
        .map_err(|e| {
            Error::failed("TLS with the server failed")
                .caused_by(e)
                .remedy("check sslrootcert, sslmode and the server's certificate")
        })?;
    let end_point = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .and_then(|certificate| tls::server_end_point(certificate));
    Ok((Wire::new(Box::new(stream), true), Some(end_point)))
}

/// Copies a payload out of the read buffer, so that keeping it does not keep the buffer.
pub(super) fn detach(payload: &[u8]) -> Bytes {
    Bytes::copy_from_slice(payload)
}

/// How long an unanswered shutdown of a stream may take.
pub(super) const GOODBYE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_without_senders_is_told_from_a_full_one() {
        let of = |text: &str| has_no_sender(&Error::temporary(format!("PostgreSQL: {text} (SQLSTATE 53300)")));
        assert!(of(
            "number of requested standby connections exceeds max_wal_senders (currently 0)"
        ));
        assert!(of(
            "number of requested standby connections exceeds \"max_wal_senders\" (currently 0)"
        ));
        assert!(!of("sorry, too many clients already"));
        assert!(!has_no_sender(&Error::failed("SHOW max_wal_senders (SQLSTATE 42501)")));
    }

    #[test]
    fn versions() {
        assert_eq!(parse_version("15.18 (Debian 15.18-0+deb12u1)"), 150_018);
        assert_eq!(parse_version("19rc1"), 190_000);
    }
}
