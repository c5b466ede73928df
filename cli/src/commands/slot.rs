//! `check`: the replication slot of a receiver, as the server has it. A slot that nobody uses keeps WAL until the
//! server's disk is full, or until `max_slot_wal_keep_size` makes a hole of what was not received.

use fairvault_engine::error::{Error, Result};
use fairvault_engine::replication::connection::{Connection, Mode};
use fairvault_engine::replication::conninfo::ConnInfo;

use crate::output;

/// What a server has of a slot.
struct Slot {
    is_active: bool,
    /// The server is a standby, on which the receiver moves it along, and nobody uses it.
    is_kept: bool,
    /// `reserved`, `extended`, `unreserved` or `lost`; empty before anything was reserved.
    wal_status: String,
    /// Bytes of WAL since the oldest that it keeps.
    behind: Option<u64>,
    /// Where that is.
    restart: String,
    /// Bytes that may still be written before WAL that it needs is removed.
    safe: Option<u64>,
}

/// Says how far the receiver behind the first of these slots is that is there; `None` if none is. Whoever may not ask is told
/// so: that is no fault. `on_standbys`: the receiver moves slots of this name along on standbys, where nobody uses them.
pub async fn look(info: &ConnInfo, names: &[String], on_standbys: bool) -> Option<Result<String>> {
    match read(info, names).await {
        Ok(slot) => slot.map(|(name, mut slot)| {
            slot.is_kept &= on_standbys;
            judge(&slot, &name)
        }),
        Err(error) => Some(Ok(format!("its replication slot was not looked at: {error}"))),
    }
}

async fn read(info: &ConnInfo, names: &[String]) -> Result<Option<(String, Slot)>> {
    let mut connection = Connection::open(info, Mode::Sql).await?;
    let quoted = |name: &String| format!("'{}'", name.replace('\'', "''"));
    let names: Vec<String> = names.iter().map(quoted).collect();
    let query = format!(
        "select active, coalesce(wal_status, ''), coalesce(restart_lsn::text, ''), safe_wal_size, \
         case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end - restart_lsn, \
         slot_name, pg_is_in_recovery() from pg_replication_slots where slot_name in ({}) order by slot_name <> {} limit 1",
        names.join(", "),
        names.first().map_or("''", String::as_str)
    );
    let rows = connection.query(&query).await?;
    let Some(row) = rows.into_iter().next() else {
        return Ok(None);
    };
    let field = |at: usize| row.get(at).cloned().flatten();
    let number = |at: usize| field(at).and_then(|text| text.parse::<i64>().ok());
    let bytes = |at: usize| number(at).map(|n| n.max(0).cast_unsigned());
    let slot = Slot {
        is_active: field(0).as_deref() == Some("t"),
        is_kept: field(6).as_deref() == Some("t"),
        wal_status: field(1).unwrap_or_default(),
        restart: field(2).unwrap_or_default(),
        safe: bytes(3),
        behind: bytes(4),
    };
    Ok(field(5).map(|name| (name, slot)))
}

fn judge(slot: &Slot, name: &str) -> Result<String> {
    let behind = output::bytes(slot.behind.unwrap_or_default());
    match slot.wal_status.as_str() {
        "lost" => Err(Error::damaged(format!(
            "replication slot {name} is lost: the server has removed WAL that was not received (max_slot_wal_keep_size)"
        ))
        .remedy(format!(
            "drop it (select pg_drop_replication_slot('{name}')), start `fairvault wal receive`, which makes it anew, \
             and take a backup"
        ))),
        "unreserved" => Err(Error::failed(format!(
            "replication slot {name} is {behind} behind: the server removes WAL that was not received at its next \
             checkpoint (max_slot_wal_keep_size)"
        ))
        .remedy(match slot.is_active {
            true => "raise max_slot_wal_keep_size now; then see why `fairvault wal receive` does not keep up",
            false => "start `fairvault wal receive` now, or raise max_slot_wal_keep_size",
        })),
        _ if slot.is_kept => Ok(format!("slot {name} is kept on this standby, {behind} behind")),
        _ if !slot.is_active => Err(Error::failed(format!(
            "no receiver uses replication slot {name}, and the server keeps {behind} of WAL for it"
        ))
        .remedy(format!(
            "start `fairvault wal receive`; if there is to be no receiver, select pg_drop_replication_slot('{name}')"
        ))),
        "" => Ok(format!("slot {name} is in use, and keeps no WAL yet")),
        _ => {
            let safe = slot
                .safe
                .map(|left| format!("; {} more until WAL is lost", output::bytes(left)));
            Ok(format!(
                "receives through slot {name}; durable up to {}, {behind} behind{}",
                slot.restart,
                safe.unwrap_or_default()
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(is_active: bool, wal_status: &str) -> Slot {
        Slot {
            is_active,
            is_kept: false,
            wal_status: wal_status.to_owned(),
            behind: Some(3 << 20),
            restart: "0/3000000".to_owned(),
            safe: None,
        }
    }

    #[test]
    fn a_slot_that_needs_a_person_is_an_error() {
        assert!(judge(&slot(true, "reserved"), "x").unwrap().contains("3.0 MiB behind"));
        assert!(judge(&slot(true, "extended"), "x").is_ok());
        for (bad, word) in [
            (slot(false, "reserved"), "keeps 3.0 MiB"),
            (slot(true, "unreserved"), "next checkpoint"),
            (slot(false, "unreserved"), "next checkpoint"),
            (slot(false, "lost"), "was not received"),
        ] {
            let error = judge(&bad, "x").unwrap_err();
            assert!(error.to_string().contains(word) && error.advice().is_some(), "{error}");
        }
    }
}
