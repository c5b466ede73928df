//! Slots on standbys: physical slots are not copied to them, so that a promoted standby could have removed WAL
//! that was not received yet. A slot of the receiver's name is made on each, and follows what is durable.
//!
//! What always holds: a standby's slot is never ahead of what the server was told to be durable; a standby that
//! is away holds up nothing.

use std::time::Duration;

use tokio::sync::watch;

use super::slot;
use crate::error::{Error, Result};
use crate::postgres::lsn::Lsn;
use crate::replication::connection::{Connection, Mode};
use crate::replication::conninfo::ConnInfo;
use crate::replication::wal_stream::Told;

/// How often the slots are moved: what they keep in between costs a standby's disk, nothing else.
const INTERVAL: Duration = Duration::from_secs(5);

/// Keeps `slot` on all of them, for ever.
pub async fn keep(standbys: &[ConnInfo], slot: &str, durable: &watch::Receiver<Told>) {
    let each = standbys.iter().map(|standby| keep_on(standby, slot, durable.clone()));
    futures::future::join_all(each).await;
}

async fn keep_on(standby: &ConnInfo, slot: &str, durable: watch::Receiver<Told>) {
    let mut trouble: Option<String> = None;
    let mut connection = None;
    loop {
        let name = standby
            .hosts
            .first()
            .map(|host| format!("{} port {}", host.name, host.port));
        let name = name.unwrap_or_default();
        // Not in the call: what is borrowed there is borrowed until that ends, and whoever reports would wait.
        let told = *durable.borrow();
        let now = match once(&mut connection, standby, slot, told).await {
            Ok(()) => None,
            Err(error) => {
                connection = None;
                Some(error.to_string())
            }
        };
        // Said once, not every few seconds.
        match (&trouble, &now) {
            (None, Some(why)) => tracing::warn!(
                "slot {slot} on standby {name} is not kept up: {why}. After a failover to it, WAL may be missing"
            ),
            (Some(_), None) => tracing::info!("slot {slot} on standby {name} is kept up again"),
            _ => {}
        }
        trouble = now;
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn once(connection: &mut Option<Connection>, standby: &ConnInfo, slot: &str, durable: Told) -> Result<()> {
    let connection = match connection {
        Some(connection) => connection,
        none => none.insert(Connection::open(standby, Mode::Sql).await?),
    };
    slot::check_name(slot)?;
    let rows = connection
        .query(&format!(
            "select slot_type, restart_lsn, pg_is_in_recovery(), pg_last_wal_replay_lsn(), active, wal_status, \
             (select timeline_id from pg_control_checkpoint()), \
             (select min_recovery_end_timeline from pg_control_recovery()) from (values (1)) as one(x) left join pg_replication_slots on slot_name = '{slot}'"
        ))
        .await?;
    let row = rows
        .first()
        .ok_or_else(|| Error::temporary("no answer about its slots"))?;
    let field = |at: usize| row.get(at).and_then(Option::as_deref);
    // A standby that was promoted is what is received from: its slot is moved by that.
    if field(2) != Some("t") || field(4) == Some("t") {
        return Ok(());
    }
    match field(0) {
        None => {
            let make = format!("select pg_create_physical_replication_slot('{slot}', true)");
            connection.query(&make).await?;
            tracing::info!("replication slot {slot} was made on a standby");
            let kept = connection
                .value(&format!(
                    "select restart_lsn from pg_replication_slots where slot_name = '{slot}'"
                ))
                .await?;
            let kept = kept.and_then(|text| text.parse::<Lsn>().ok()).unwrap_or_default();
            if let Some((_, durable)) = durable.filter(|(_, durable)| *durable < kept) {
                tracing::warn!(
                    "it keeps WAL from {kept} on, and {durable} is durable: a failover until then leaves a gap"
                );
            }
            return Ok(());
        }
        Some("physical") => {}
        Some(other) => return Err(Error::refused(format!("it is {other}, and a physical one is needed"))),
    }
    if field(5) == Some("lost") {
        return Err(Error::refused("it was invalidated: drop it there, it is made anew"));
    }
    let lsn = |at: usize| field(at).and_then(|text| text.parse::<Lsn>().ok()).unwrap_or_default();
    // What is durable counts on its own timeline only; the standby's control file may lag, which keeps more.
    let Some((timeline, durable)) = durable else {
        return Ok(());
    };
    let is_there = |at: usize| field(at).and_then(|text| text.parse().ok()) == Some(timeline);
    if !is_there(6) || !(is_there(7) || field(7) == Some("0")) {
        return Ok(());
    }
    // A slot cannot be moved beyond what is replayed, and never back.
    let to = durable.min(lsn(3));
    if to > lsn(1) {
        connection
            .query(&format!("select pg_replication_slot_advance('{slot}', '{to}')"))
            .await?;
    }
    Ok(())
}
