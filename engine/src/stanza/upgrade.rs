//! A stanza goes on with the cluster that came after the one that it knows: its next incarnation.
//!
//! What always holds: a stanza takes backups and WAL of no cluster that somebody has not said to be its own; what it
//! has of earlier clusters stays, below names of its own. A cluster that pg_upgrade has made is told from a stranger by
//! its WAL, which begins where the old one ended.

use fairvault_format::names;
use fairvault_format::proto::{self, Incarnation, log_entry::Kind as Entry};

use super::Access;
use super::create::Cluster;
use crate::commit::Log;
use crate::commit::authors::Deed;
use crate::error::{Error, Kind, Result};
use crate::postgres::lsn::Lsn;

/// What is claimed of the server beside what it says itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Claims {
    /// It was filled from a dump or by logical replication, not made by pg_upgrade.
    pub unrelated: bool,
    /// It is an earlier cluster of the stanza, to which that returns.
    pub back: bool,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upgraded {
    /// The cluster before.
    pub from: Incarnation,
    /// The cluster now; the same if there was nothing to do.
    pub to: Incarnation,
}

/// Makes `cluster`, whose WAL ends at `flush`, the one that the stanza is of.
pub async fn upgrade(log: &mut Log, access: &Access, cluster: Cluster, flush: Lsn, claims: Claims) -> Result<Upgraded> {
    log.refresh().await?;
    let from = newest(log.state())?;
    let to = Incarnation {
        system_identifier: cluster.system_identifier,
        server_major: cluster.major,
        wal_segment_size: cluster.wal_segment_size,
    };
    if from.system_identifier == to.system_identifier {
        return Ok(Upgraded { from, to: from });
    }
    let is_known = |i: &&Incarnation| i.system_identifier == to.system_identifier;
    match log.state().incarnations.iter().find(is_known) {
        Some(_) if !claims.back => {
            return Err(Error::refused(format!(
                "the server with system identifier {} is an earlier cluster of stanza {}, which went on with {}",
                to.system_identifier,
                log.stanza().name(),
                from.system_identifier
            ))
            .remedy("is the conninfo still that of the old server? If the upgrade was given up, say so with --back"));
        }
        Some(_) => {}
        None if claims.back => {
            return Err(Error::not_found(format!(
                "the server with system identifier {} was never a cluster of stanza {}",
                to.system_identifier,
                log.stanza().name()
            )));
        }
        None => {
            check_successor(log.state(), &from, &to, flush, claims)?;
            check_elsewhere(access, &to).await?;
        }
    }
    let unchanged = |now: &proto::Snapshot| match newest(now)? == from {
        true => Ok(()),
        false => Err(Error::new(Kind::Held, "somebody else has upgraded it")),
    };
    match log.append(Entry::Incarnation(to), unchanged).await {
        Ok(_) => Ok(Upgraded { from, to }),
        Err(error) if error.kind() == Kind::Held => Err(Error::new(
            Kind::Held,
            format!(
                "somebody else has upgraded stanza {} just now{}",
                log.stanza().name(),
                log.whose(Deed::Upgrade)
            ),
        )
        .remedy("run it again: it says whether the stanza is of this server's cluster now")),
        Err(error) => Err(error),
    }
}

fn newest(state: &proto::Snapshot) -> Result<Incarnation> {
    let newest = state.incarnations.last().copied();
    newest.ok_or_else(|| Error::damaged("the log says of no cluster that the stanza is of it"))
}

/// pg_upgrade leads to the same version or a later one, and lets WAL go on behind that of the old cluster.
fn check_successor(
    state: &proto::Snapshot,
    from: &Incarnation,
    to: &Incarnation,
    flush: Lsn,
    claims: Claims,
) -> Result<()> {
    if to.server_major < from.server_major {
        return Err(Error::refused(format!(
            "the server is PostgreSQL {}, and the stanza's cluster is {}: no upgrade leads there",
            to.server_major, from.server_major
        ))
        .remedy("is the conninfo of another server? A different cluster needs a stanza of its own"));
    }
    let infos = state.backups.iter().filter_map(|backup| backup.info.as_ref());
    let of_old = infos.filter(|info| info.system_identifier == from.system_identifier);
    let last = of_old.max_by_key(|info| info.stop_lsn);
    match last.filter(|info| Lsn(info.stop_lsn) > flush && !claims.unrelated) {
        None => Ok(()),
        Some(info) => Err(Error::refused(format!(
            "the server's WAL ends at {flush}, before backup {} of the stanza's cluster did ({}): pg_upgrade has not made it of that",
            info.id,
            Lsn(info.stop_lsn)
        ))
        .remedy(
            "is the conninfo of another server? If it takes the place of the old one, filled from a dump or by logical \
             replication, say so with --unrelated",
        )),
    }
}

/// A cluster whose WAL another stanza has is that stanza's.
async fn check_elsewhere(access: &Access, cluster: &Incarnation) -> Result<()> {
    for other in access.repository.folders().await? {
        let folder = format!("{other}/{}/{:016x}", names::WAL, cluster.system_identifier);
        if other != access.stanza && access.repository.has_any(&folder).await? {
            return Err(Error::refused(format!(
                "the server with system identifier {} is that of stanza {other}, which has WAL of it",
                cluster.system_identifier
            ))
            .remedy("check the conninfo: a cluster is of one stanza only"));
        }
    }
    Ok(())
}

/// What to do about a server that the stanza does not know.
pub fn remedy(stanza: &str) -> String {
    format!(
        "is the conninfo of another server? A different cluster needs a stanza of its own. If pg_upgrade has made this one of the stanza's, run `fairvault stanza upgrade {stanza}`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_is_not_older_and_its_wal_goes_on() {
        let of = |system_identifier, server_major| Incarnation {
            system_identifier,
            server_major,
            wal_segment_size: 1 << 20,
        };
        let state = proto::Snapshot {
            backups: vec![proto::CommittedBackup {
                info: Some(proto::BackupInfo {
                    system_identifier: 1,
                    stop_lsn: 100,
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        };
        let check = |major, flush, unrelated| {
            let claims = Claims { unrelated, back: false };
            check_successor(&state, &of(1, 15), &of(2, major), Lsn(flush), claims).is_ok()
        };
        assert!(check(15, 100, false) && check(17, 200, false) && check(15, 99, true));
        assert!(!check(15, 99, false) && !check(14, 200, false) && !check(14, 200, true));
    }
}
