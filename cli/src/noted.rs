//! What a command leaves in the logs of the stanzas that it has read, where it has left nothing itself: each operation is
//! an entry.
//!
//! What always holds: this changes neither what a command prints nor how it ends, and nobody waits for it longer than a
//! moment. What moves WAL counts by itself, and a receiver says when it begins and ends: neither is noted here.

use fairvault_engine::error::Result;
use fairvault_engine::stanza::Access;
use fairvault_engine::tally::looks::{self, End};

use crate::args::{Command, KeyCommand, StanzaCommand};
use crate::commands::Outcome;
use crate::context::Context;

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct What {
    /// In words.
    words: &'static str,
    /// It only looks, or says what it would do: all of them are counted, also those that fail.
    is_look: bool,
}

/// What a command is, if it is noted here.
pub fn what(command: &Command) -> Option<What> {
    let look = |words| What { words, is_look: true };
    let act = |words| What { words, is_look: false };
    let unless_dry = |words, is_dry: bool, dry| if is_dry { look(dry) } else { act(words) };
    Some(match command {
        Command::Info { .. } => look("info"),
        Command::Check { .. } => look("check"),
        Command::Audit { .. } => look("audit"),
        Command::Verify { .. } => act("verify"),
        Command::Backup(_) => act("backup"),
        Command::Restore(args) => unless_dry("restore", args.dry_run, "restore --dry-run"),
        Command::Copy(args) => unless_dry("copy", args.dry_run, "copy --dry-run"),
        Command::Repair(args) => unless_dry("repair", args.dry_run, "repair --dry-run"),
        Command::Expire(args) => unless_dry("expire", args.dry_run, "expire --dry-run"),
        Command::Gc(args) => unless_dry("gc", args.dry_run, "gc --dry-run"),
        Command::Lock(args) => unless_dry("lock", args.dry_run, "lock --dry-run"),
        Command::Hold { .. } => act("hold"),
        Command::Unhold { .. } => act("unhold"),
        Command::Policy(args) if args.minimum_retention.is_none() && args.minimum_full.is_none() => look("policy"),
        Command::Policy(_) => act("policy"),
        Command::Stanza(StanzaCommand::Create(_)) | Command::StanzaCreate(_) => act("stanza create"),
        Command::Stanza(StanzaCommand::Upgrade(_)) => act("stanza upgrade"),
        Command::Stanza(StanzaCommand::Fence(_)) => act("stanza fence"),
        Command::Stanza(StanzaCommand::Distrust(_)) => act("stanza distrust"),
        Command::Key(KeyCommand::List { .. }) => look("key list"),
        Command::Key(KeyCommand::Check { .. }) => act("key check"),
        Command::Key(KeyCommand::Export { .. }) => act("key export"),
        Command::Key(KeyCommand::Import { .. }) => act("key import"),
        Command::Key(KeyCommand::AddSlot { .. }) => act("key add-slot"),
        Command::Key(KeyCommand::RemoveSlot { .. }) => act("key remove-slot"),
        Command::Key(KeyCommand::Rotate(_)) => act("key rotate"),
        Command::Key(KeyCommand::Erase(_)) => act("key erase"),
        // These open no stanza.
        Command::Stanza(StanzaCommand::List) | Command::Key(KeyCommand::Generate { .. }) => return None,
        Command::Wal(_) | Command::ArchivePush(_) | Command::ArchiveGet(_) => return None,
    })
}

/// Notes what a command that began at `began_us` and ended like this has not noted itself, in all stanzas at once.
pub async fn note(context: &Context, what: What, began_us: i64, result: &Result<Outcome>) {
    let opened = context.opened();
    let each = opened.iter().map(|access| note_in(access, what, began_us, result));
    futures::future::join_all(each).await;
}

async fn note_in(access: &Access, what: What, began_us: i64, result: &Result<Outcome>) {
    let trace = &access.trace;
    // Of a stanza that could not be opened, nobody can write the log.
    if !trace.was_read() {
        return;
    }
    let end = match result {
        Err(error) if !what.is_look => {
            if !trace.has_failure() {
                looks::failed(access, what.words, began_us, error).await;
            }
            return;
        }
        Err(error) => End::Failed(error),
        Ok(_) if trace.has_entry() => return,
        Ok(Outcome::DamageFound) => End::FoundDamage,
        Ok(Outcome::Held) => End::HasToWait,
        Ok(Outcome::Done | Outcome::Warnings | Outcome::Absent) => End::Done,
    };
    looks::looked(access, what.words, end).await;
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn what_only_looks_is_told_from_what_acts() {
        let of = |line: &str| {
            let words = format!("fairvault {line}");
            let found = what(&Cli::parse_from(words.split(' ')).command);
            found.map(|what| (what.words, what.is_look))
        };
        for line in [
            "info",
            "info acme",
            "check acme",
            "audit acme",
            "key list acme",
            "policy acme",
        ] {
            let (words, is_look) = of(line).unwrap();
            assert!(is_look && line.starts_with(words), "{line}: {words}");
        }
        for verb in ["gc", "expire", "lock", "copy", "repair"] {
            assert_eq!(
                of(&format!("{verb} acme")).map(|(words, is_look)| (words == verb, is_look)),
                Some((true, false))
            );
            let dry = format!("{verb} --dry-run");
            let found = of(&format!("{dry} acme"));
            assert_eq!(
                found.map(|(words, is_look)| (words == dry, is_look)),
                Some((true, true))
            );
        }
        assert_eq!(of("restore acme --to r"), Some(("restore", false)));
        assert_eq!(of("restore acme --to r --dry-run"), Some(("restore --dry-run", true)));
        assert_eq!(of("policy acme --minimum-full 1"), Some(("policy", false)));
        assert_eq!(of("stanza-create acme"), of("stanza create acme"));
        for line in [
            "key generate file",
            "stanza list",
            "wal push acme x",
            "wal push acme pg_wal --serve",
            "wal get acme x y",
            "wal receive acme",
            "archive-push acme x",
            "archive-get acme x y",
        ] {
            assert_eq!(of(line), None, "{line}");
        }
    }
}
