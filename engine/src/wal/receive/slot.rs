//! The replication slot: the server keeps WAL until it was received.

use crate::error::{Error, Result};
use crate::replication::connection::Connection;
use crate::replication::wal_stream::is_logical;

/// Fails unless `name` can be the name of a slot.
pub fn check_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if (1..=63).contains(&name.len()) && name.bytes().all(good) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "slot name {name:?} is not possible: lower-case letters, digits and '_', at most 63"
    )))
}

/// Makes the slot unless it is there, and checks that it is a physical one.
pub async fn ensure(connection: &mut Connection, name: &str) -> Result<()> {
    check_name(name)?;
    if connection.major() >= 15 {
        let rows = match connection.query(&format!("READ_REPLICATION_SLOT {name}")).await {
            Err(error) if error.to_string().contains("SQLSTATE 0A000") => {
                return Err(is_logical(name, error));
            }
            answered => answered?,
        };
        let field = |at: usize| rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref);
        if field(0).is_some() {
            if field(1).is_none() {
                tracing::warn!(
                    "replication slot {name} keeps no WAL: it was invalidated (max_slot_wal_keep_size), or never used"
                );
            }
            return Ok(());
        }
    }
    match connection.create_slot(name, false, true).await {
        Ok(()) => {
            tracing::info!("replication slot {name} was made: the server keeps WAL until it was received");
            Ok(())
        }
        Err(error) if error.to_string().contains("SQLSTATE 42710") => Ok(()),
        Err(error) => Err(error
            .context(format_args!("making replication slot {name}"))
            .remedy("the role needs REPLICATION, and max_replication_slots must leave room")),
    }
}
