//! Messages of the backend: framing with a cap, and the few bodies that `postgres-protocol` does not know.

use bytes::{Buf, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{self, ErrorFields};

use crate::error::{Error, Kind, Result};

/// Longest message that is accepted, bytes. The server's own largest are WAL and file data (≤ 128 KiB);
/// rows of catalog queries stay far below as well.
pub const MAX_MESSAGE: usize = 16 << 20;

/// A message of the backend.
pub enum Message {
    /// CopyData: its payload.
    CopyData(Bytes),
    /// CopyBothResponse.
    CopyBoth,
    /// CopyOutResponse.
    CopyOut,
    /// CopyDone.
    CopyDone,
    /// Everything else.
    Other(backend::Message),
}

/// Takes the next complete message out of `buffer`. `None`: more bytes are needed; room for them is
/// reserved.
pub fn next(buffer: &mut BytesMut) -> Result<Option<Message>> {
    let Some(header) = buffer.first_chunk::<5>() else {
        return Ok(None);
    };
    let (tag, len) = (
        header[0],
        i32::from_be_bytes([header[1], header[2], header[3], header[4]]),
    );
    let len = usize::try_from(len)
        .ok()
        .filter(|&len| len >= 4)
        .ok_or_else(|| broken(format!("a message of length {len}")))?;
    if len > MAX_MESSAGE {
        return Err(broken(format!(
            "a message of {len} bytes (type {:?}); at most {MAX_MESSAGE} are accepted",
            tag as char
        )));
    }
    if buffer.len() < len + 1 {
        buffer.reserve(len + 1 - buffer.len());
        return Ok(None);
    }
    let mut frame = buffer.split_to(len + 1);
    Ok(Some(match tag {
        b'd' => {
            frame.advance(5);
            Message::CopyData(frame.freeze())
        }
        b'W' => Message::CopyBoth,
        b'H' => Message::CopyOut,
        b'c' => Message::CopyDone,
        _ => match backend::Message::parse(&mut frame).map_err(|e| broken(e.to_string()))? {
            Some(message) => Message::Other(message),
            None => return Err(broken(format!("a cut-off message of type {:?}", tag as char))),
        },
    }))
}

/// The server said something that the protocol does not allow.
pub fn broken(what: impl std::fmt::Display) -> Error {
    Error::failed(format!("the server does not follow the protocol: {what}"))
}

/// An ErrorResponse as an error.
pub fn server_error(fields: ErrorFields<'_>) -> Error {
    let (mut message, mut code, mut detail, mut hint) = (String::new(), String::new(), None, None);
    let mut fields = fields;
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'M' => message = value,
            b'C' => code = value,
            b'D' => detail = Some(value),
            b'H' => hint = Some(value),
            _ => {}
        }
    }
    let kind = match code.get(..2).unwrap_or_default() {
        "08" | "53" | "57" => Kind::Temporary,
        // Such as a replication slot that is still in use by the connection before this one.
        _ if code == "55006" => Kind::Temporary,
        _ => Kind::Failed,
    };
    let mut text = format!("PostgreSQL: {message} (SQLSTATE {code})");
    if let Some(detail) = detail {
        text += &format!("; {detail}");
    }
    let error = Error::new(kind, text);
    match hint {
        Some(hint) => error.remedy(hint),
        None => error,
    }
}

/// A result row as text.
pub type Row = Vec<Option<String>>;

/// A result row as it came.
pub type RawRow = Vec<Option<Vec<u8>>>;

/// Decodes a DataRow as text.
pub fn row(body: &backend::DataRowBody) -> Result<Row> {
    let text = |value: Vec<u8>| String::from_utf8_lossy(&value).into_owned();
    Ok(raw_row(body)?.into_iter().map(|value| value.map(text)).collect())
}

/// Decodes a DataRow.
pub fn raw_row(body: &backend::DataRowBody) -> Result<RawRow> {
    let mut ranges = body.ranges();
    let mut row = RawRow::new();
    while let Some(range) = ranges.next().map_err(|e| broken(e.to_string()))? {
        let value = match range {
            None => None,
            Some(range) => {
                let bytes = body
                    .buffer()
                    .get(range)
                    .ok_or_else(|| broken("a row that ends early"))?;
                Some(bytes.to_vec())
            }
        };
        row.push(value);
    }
    Ok(row)
}

/// Reads every field of a message that the client ever reads; for fuzzing.
pub fn touch(message: &Message) {
    match message {
        Message::Other(backend::Message::DataRow(body)) => _ = row(body),
        Message::Other(backend::Message::ErrorResponse(body)) => _ = server_error(body.fields()),
        Message::Other(backend::Message::ParameterStatus(body)) => _ = (body.name(), body.value()),
        Message::Other(backend::Message::AuthenticationSasl(body)) => _ = body.mechanisms().count(),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_lengths_are_refused_before_they_are_buffered() {
        for len in [-1i32, 0, 3, i32::MAX] {
            let mut bytes = BytesMut::from(&b"d"[..]);
            bytes.extend_from_slice(&len.to_be_bytes());
            assert!(next(&mut bytes).is_err(), "{len}");
        }
        let mut cut = BytesMut::from(&b"d\0\0\0\x08ab"[..]);
        assert!(next(&mut cut).unwrap().is_none());
        cut.extend_from_slice(b"cd");
        assert!(matches!(next(&mut cut).unwrap(), Some(Message::CopyData(d)) if &d[..] == b"abcd"));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_message_an_error_or_too_few(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = next(&mut buffer) {}
        }
    }
}
