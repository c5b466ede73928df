//! What the restored copy is told: recovery target, restore_command, no archiving, its tablespaces.
//!
//! Everything goes into a block at the end of postgresql.auto.conf, which PostgreSQL reads last. Leftovers
//! of earlier recoveries are blanked *before* the new target, because PostgreSQL refuses two targets.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::layout::Layout;
use super::plan::Plan;
use super::target::{Action, Target, format_time};
use super::{Options, sync_directory};
use crate::error::{Error, Result};
use crate::stanza::Stanza;
use crate::wal::push::RESTORED_MARKER;

/// First and last line of what a restore adds.
const BLOCK_BEGIN: &str = "# Begin of what fairvault restore wrote.";
const BLOCK_END: &str = "# End of what fairvault restore wrote.";
const AUTO_CONF: &str = "postgresql.auto.conf";
/// Settings that describe a recovery target: exactly one may be set.
const TARGETS: [&str; 5] = [
    "recovery_target",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "recovery_target_lsn",
];

/// A value for postgresql.conf.
fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// A word for the shell that runs restore_command.
pub fn shell_word(word: &str) -> String {
    let plain = !word.is_empty()
        && word
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"/._-=:,+".contains(&b));
    if plain {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Writes a file of its own in the place of whatever is there: never through a link.
fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let what = || format!("writing {}", path.display());
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(what(), e)),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| Error::io(what(), e))?;
    file.write_all(content)
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io(what(), e))
}

fn restore_command(plan: &Plan, options: &Options, stanza: &Stanza) -> String {
    // `%` is special in restore_command.
    let mut command = format!(
        "{} wal get {} %f \"%p\" --system-identifier {} --through {}",
        options.command.replace('%', "%%"),
        shell_word(stanza.name()),
        plan.info.system_identifier,
        plan.reachable.through
    );
    match follows_newest(plan, options) {
        true => command += " --timeline latest",
        false => command += &format!(" --timeline {}", plan.reachable.history.timeline),
    }
    if plan.reachable.setting.is_some() && !options.standby {
        command += " --stops";
    }
    // A standby without a target goes on with whatever is archived later.
    let is_open_ended = options.standby && plan.reachable.setting.is_none();
    if let Some(until) = plan.reachable.until.filter(|_| !is_open_ended) {
        command += &format!(" --until {until}");
    }
    command
}

/// A standby goes with every promotion of its primary, if PostgreSQL finds the planned timeline by itself.
fn follows_newest(plan: &Plan, options: &Options) -> bool {
    options.standby && plan.reachable.is_newest
}

fn block(plan: &Plan, options: &Options, stanza: &Stanza, has_pid_file: bool) -> String {
    let mut out = format!("\n{BLOCK_BEGIN}\n");
    let mut set = |name: &str, value: &str| out.push_str(&format!("{name} = {}\n", quote(value)));
    for name in [
        "recovery_end_command",
        "archive_cleanup_command",
        "primary_conninfo",
        "primary_slot_name",
    ] {
        if !(options.standby && name.starts_with("primary")) {
            set(name, "");
        }
    }
    if has_pid_file {
        // Elsewhere it would overwrite the original server's.
        set("external_pid_file", "postmaster.external.pid");
    }
    set("recovery_min_apply_delay", "0");
    for name in TARGETS {
        set(name, "");
    }
    set("restore_command", &restore_command(plan, options, stanza));
    match follows_newest(plan, options) {
        true => set("recovery_target_timeline", "latest"),
        false => set("recovery_target_timeline", &plan.reachable.history.timeline.to_string()),
    }
    set(
        "recovery_target_inclusive",
        if options.exclusive { "off" } else { "on" },
    );
    match (&plan.reachable.setting, &options.target) {
        (Some((name, value)), _) => set(name, value),
        // A standby waits for a time that has not come yet; any other recovery would fail at the end.
        (None, Target::Time(time_us)) if options.standby => set("recovery_target_time", &format_time(*time_us)),
        _ => {}
    }
    let action = match options.action {
        Action::Pause => "pause",
        Action::Promote => "promote",
        Action::Shutdown => "shutdown",
    };
    set("recovery_target_action", action);
    if options.action == Action::Pause {
        // Without it, PostgreSQL would shut down instead of pausing.
        set("hot_standby", "on");
    }
    if !options.keep_archiving {
        set("archive_mode", "off");
    }
    out.push_str(BLOCK_END);
    out.push('\n');
    out
}

/// The auto.conf of the backup without settings that a recovery must not inherit, and without what an
/// earlier restore wrote. `was_restored`: the backup is of a restored copy; ALTER SYSTEM keeps settings and
/// drops comments, so that archive_mode may stand there without its block.
fn without_leftovers(text: &str, was_restored: bool) -> String {
    let dropped = |line: &str| {
        let name = line.split(['=', ' ', '\t']).next().unwrap_or_default();
        was_restored && name == "archive_mode"
            || TARGETS.contains(&name)
            || matches!(
                name,
                "recovery_target_timeline" | "recovery_target_action" | "recovery_target_inclusive" | "restore_command"
            )
    };
    let mut ours = false;
    text.lines()
        .filter(|line| {
            ours |= *line == BLOCK_BEGIN;
            let keep = !ours && !dropped(line.trim_start());
            ours &= *line != BLOCK_END;
            keep
        })
        .map(|line| format!("{line}\n"))
        .collect()
}

/// Whether the restored configuration names an external_pid_file.
fn names_pid_file(directory: &Path, auto_conf: &str) -> bool {
    let main = std::fs::read_to_string(directory.join("postgresql.conf")).unwrap_or_default();
    main.lines()
        .chain(auto_conf.lines())
        .any(|line| line.trim_start().starts_with("external_pid_file"))
}

/// Writes everything. Returns the paths of manifest files that are no longer what the backup held.
pub fn write(plan: &Plan, layout: &Layout, options: &Options, stanza: &Stanza) -> Result<Vec<String>> {
    let directory = &layout.directory;
    let mut changed = vec![AUTO_CONF.to_owned()];
    let path = directory.join(AUTO_CONF);
    let before = match std::fs::read(&path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io(format_args!("reading {}", path.display()), e)),
    };
    let was_restored = plan.files.iter().any(|f| f.path == RESTORED_MARKER);
    write_file(
        &path,
        format!(
            "{}{}",
            without_leftovers(&before, was_restored),
            block(plan, options, stanza, names_pid_file(directory, &before))
        )
        .as_bytes(),
    )?;
    for leftover in [
        "standby.signal",
        "recovery.signal",
        "backup_label.old",
        "tablespace_map.old",
        RESTORED_MARKER,
    ] {
        let path = directory.join(leftover);
        match std::fs::remove_file(&path) {
            Ok(()) => changed.push(leftover.to_owned()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(format_args!("removing {}", path.display()), e)),
        }
    }
    let label = directory.join("backup_label");
    let text =
        std::fs::read_to_string(&label).map_err(|e| Error::io(format_args!("reading {}", label.display()), e))?;
    if text.contains("INCREMENTAL FROM") {
        return Err(Error::refused(
            "backup_label says that this is a native incremental backup; PostgreSQL would refuse to start on it",
        ));
    }
    if write_tablespace_map(plan, directory)? {
        changed.push("tablespace_map".to_owned());
    }
    if !options.keep_archiving {
        let text = "This data directory was restored by fairvault. `fairvault wal push` refuses to archive from it.\n\
                    If it replaces the original for good: delete this file and remove archive_mode from postgresql.auto.conf.\n";
        write_file(&directory.join(RESTORED_MARKER), text.as_bytes())?;
        changed.push(RESTORED_MARKER.to_owned());
    }
    let signal = if options.standby {
        "standby.signal"
    } else {
        "recovery.signal"
    };
    write_file(&directory.join(signal), b"")?;
    sync_directory(directory)?;
    Ok(changed)
}

/// PostgreSQL makes the links of tablespaces from tablespace_map at its first start: it must say what this
/// restore decided, not where the tablespaces were.
fn write_tablespace_map(plan: &Plan, directory: &Path) -> Result<bool> {
    let path = directory.join("tablespace_map");
    if !path.exists() {
        return Ok(false);
    }
    let mut text = String::new();
    for (oid, location) in plan.tablespaces.iter().filter_map(|(oid, l)| Some((oid, l.as_ref()?))) {
        // As do_pg_backup_start writes it: a line feed or backslash in a path is escaped.
        let escaped: String = location
            .chars()
            .flat_map(|c| matches!(c, '\\' | '\n' | '\r').then_some('\\').into_iter().chain([c]))
            .collect();
        text.push_str(&format!("{oid} {escaped}\n"));
    }
    write_file(&path, text.as_bytes())?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_is_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (other, path) = (folder.path().join("other"), folder.path().join("recovery.signal"));
        std::fs::write(&other, "of somebody else").unwrap();
        symlink(&other, &path).unwrap();
        write_file(&path, b"ours").unwrap();
        assert_eq!(std::fs::read(&other).unwrap(), b"of somebody else");
        assert_eq!(std::fs::read(&path).unwrap(), b"ours");
        assert!(path.symlink_metadata().unwrap().is_file());
        write_file(&path, b"again").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"again");
    }
}
