//! `key generate`, `list`, `add-slot`, `remove-slot`, `rotate`, `check`; `export`, `import` and `erase` are beside it.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fairvault_engine::commit::Log;
use fairvault_engine::env::{self, SystemEnv};
use fairvault_engine::error::{Context as _, Error, Kind, Result};
use fairvault_engine::manifest::Manifest;
use fairvault_engine::stanza::slots::Opens;
use fairvault_engine::stanza::{Access, Stanza, rotate, slots};
use fairvault_format::keys::Secret;

use super::{Outcome, kit};
use crate::args::{KeyCommand, Output, RotateArgs};
use crate::context::{Context, secret_from_file};
use crate::output;

/// Runs a verb.
pub async fn run(context: &Context, command: KeyCommand) -> Result<Outcome> {
    match command {
        KeyCommand::Generate { file } => generate(context, &file),
        KeyCommand::List { stanza } => list(context, &stanza).await,
        KeyCommand::Check { stanza } => check(context, &stanza).await,
        KeyCommand::Export { stanza, file } => kit::export(context, &stanza, &file).await,
        KeyCommand::Import { stanza, file } => kit::import(context, &stanza, &file).await,
        KeyCommand::AddSlot {
            stanza,
            name,
            secret_file,
            write_only,
            no_content,
        } => {
            let opens = match (write_only, no_content) {
                (true, _) => Opens::Writing,
                (false, true) => Opens::Deciding,
                (false, false) => Opens::All,
            };
            add_slot(context, &stanza, &name, &secret_file, opens).await
        }
        KeyCommand::RemoveSlot { stanza, name } => remove_slot(context, &stanza, &name).await,
        KeyCommand::Rotate(args) => rotate(context, &args).await,
        KeyCommand::Erase(args) => super::erase::run(context, &args).await,
    }
}

fn generate(context: &Context, path: &Path) -> Result<Outcome> {
    let what = || format!("making the key file {}", path.display());
    let text = Secret::key_text(&env::salt(&SystemEnv)?);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| Error::io(what(), e).remedy("an existing key is never overwritten: choose another name"))?;
    writeln!(file, "{}", text.as_str())
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::io(what(), e))?;
    if context.global.output == Output::Json {
        output::json(
            "key-generate",
            &serde_json::json!({ "file": path.display().to_string() }),
        );
        return Ok(Outcome::Done);
    }
    output::line(format_args!(
        "{} is made (mode 0600). Keep a copy away from this machine and away from the repository: without it nothing can be restored.",
        path.display()
    ));
    Ok(Outcome::Done)
}

async fn list(context: &Context, stanza: &str) -> Result<Outcome> {
    let mut all = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let log = context.open_log_in(&repository, stanza, true).await?;
        let named: Vec<u32> = log.state().key_epochs.iter().map(|named| named.epoch).collect();
        let slots = slots::all(&log).await?;
        for object in &slots {
            let kind = object.slot.as_ref().map(|slot| {
                let kind = slot.kind().as_str_name().trim_start_matches("SLOT_");
                kind.to_lowercase().replace('_', "-")
            });
            let kind = kind.unwrap_or_else(|| "unreadable".to_owned());
            let write_only = object.slot.as_ref().is_some_and(|slot| slot.write_only);
            let (epoch, name, in_use) = (object.epoch, &object.name, named.contains(&object.epoch));
            if context.global.output == Output::Text {
                let unused = if in_use {
                    ""
                } else {
                    ", of a rotation that was not finished"
                };
                let writes = if write_only { ", writes only" } else { "" };
                output::line(format_args!(
                    "{repository}: epoch {epoch} slot {name} ({kind}{writes}{unused})"
                ));
            }
            all.push(
                serde_json::json!({ "repository": repository, "epoch": epoch, "slot": name, "kind": kind, "in_use": in_use,
                    "write_only": write_only }),
            );
        }
        let names: BTreeSet<&str> = slots.iter().map(|object| object.name.as_str()).collect();
        for name in names.into_iter().filter(|_| context.global.output == Output::Text) {
            let opens = |epoch: &u32| slots.iter().any(|o| o.name == name && o.epoch == *epoch);
            let missing: Vec<_> = named.iter().filter(|epoch| !opens(epoch)).map(u32::to_string).collect();
            if !missing.is_empty() {
                let missing = missing.join(", ");
                output::line(format_args!(
                    "{repository}: slot {name} does not open key epoch {missing}"
                ));
            }
        }
    }
    if context.global.output == Output::Json {
        output::json("keys", &serde_json::json!({ "slots": all }));
    }
    Ok(Outcome::Done)
}

async fn add_slot(context: &Context, stanza: &str, name: &str, secret_file: &Path, opens: Opens) -> Result<Outcome> {
    let secret = secret_from_file(secret_file)?;
    let mut all = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        let mut log = open(&access).await?;
        let count = slots::add(&mut log, &access, name, &secret, opens).await?;
        all.push(serde_json::json!({ "repository": repository, "objects": count }));
        match count {
            _ if context.global.output == Output::Json => {}
            0 if opens == Opens::All => output::line(format_args!(
                "{repository}: nothing to do, slot {name} opens all of stanza {stanza}"
            )),
            0 => output::line(format_args!(
                "{repository}: nothing to do, slot {name} is there, in every key epoch of stanza {stanza}"
            )),
            _ if opens == Opens::Writing => output::line(format_args!(
                "{repository}: slot {name} writes to stanza {stanza} now, and reads nothing of what is stored"
            )),
            _ if opens == Opens::Deciding => output::line(format_args!(
                "{repository}: slot {name} expires and collects in stanza {stanza} now, and reads nothing of what is stored"
            )),
            _ => output::line(format_args!("{repository}: slot {name} opens stanza {stanza} now")),
        }
    }
    if context.global.output == Output::Json {
        // As a slot says it: it has no key that opens content.
        let write_only = opens != Opens::All;
        output::json(
            "key-add-slot",
            &serde_json::json!({ "stanza": stanza, "slot": name, "write_only": write_only, "added": all }),
        );
    }
    Ok(Outcome::Done)
}

async fn remove_slot(context: &Context, stanza: &str, name: &str) -> Result<Outcome> {
    let mut removed = Vec::new();
    let mut not_found = None;
    for repository in context.repositories(Some(stanza))? {
        let (mut log, access) = context.open_to_delete(&repository, stanza).await?;
        let count = match slots::remove(&mut log, &access, name).await {
            // An earlier run got as far as here, or it was never in this one.
            Err(error) if error.kind() == Kind::NotFound => {
                not_found = Some(error);
                continue;
            }
            count => count?,
        };
        removed.push(serde_json::json!({ "repository": repository, "objects": count }));
        if context.global.output == Output::Text {
            output::line(format_args!(
                "{repository}: slot {name} is removed ({count} objects). That takes nothing back: whoever has its secret and a copy of \
                 it, or a host that remembers it, still opens what there is. If the secret is no longer trusted: fairvault key rotate {stanza}"
            ));
        }
    }
    if let (Some(error), true) = (not_found, removed.is_empty()) {
        return Err(error);
    }
    if context.global.output == Output::Json {
        output::json(
            "key-remove-slot",
            &serde_json::json!({ "stanza": stanza, "slot": name, "removed": removed }),
        );
    }
    Ok(Outcome::Done)
}

/// In every repository, or nothing is begun in any.
async fn rotate(context: &Context, args: &RotateArgs) -> Result<Outcome> {
    let stanza = &args.stanza;
    let options = rotate::Options {
        new_secret: args.new_secret_file.as_deref().map(secret_from_file).transpose()?,
        slot: args.slot.clone(),
        drop_slots: args.drop_slots,
        public_key: args.public_key,
    };
    let (mut planned, mut current) = (Vec::new(), Vec::new());
    let prints = context.global.output == Output::Text;
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        let context = || format!("repository {repository}; nothing was rotated");
        let mut log = match open(&access).await {
            // An earlier run got as far as here.
            Err(error) if error.kind() == Kind::Refused && is_done(&access, &options).await => {
                if prints {
                    output::line(format_args!(
                        "{repository}: nothing to do, the new secret opens it, and the configured one does not open what comes"
                    ));
                }
                current.push(repository);
                continue;
            }
            opened => opened.context(context)?,
        };
        let plan = rotate::plan(&mut log, &access, &options).await.context(context)?;
        planned.push((repository, access, log, plan));
    }
    let mut all = Vec::new();
    for (repository, access, log, plan) in planned {
        let done = rotate::rotate(&log, &access, &options, plan).await;
        let done = done.context(|| format!("rotating the keys in repository {repository}"))?;
        if prints {
            output::line(format_args!(
                "{repository}: key epoch {} follows on {}, opened by slot {}. What is there stays readable; the next full backup \
                 stores everything anew",
                done.to,
                done.from,
                done.slots.join(", ")
            ));
            if !done.dropped.is_empty() {
                output::line(format_args!(
                    "{repository}: does not open what comes from now on: slot {}",
                    done.dropped.join(", ")
                ));
            }
        }
        all.push(
            serde_json::json!({ "repository": repository, "from": done.from, "to": done.to, "slots": done.slots,
            "dropped": done.dropped }),
        );
    }
    if context.global.output == Output::Json {
        output::json(
            "key-rotate",
            &serde_json::json!({ "stanza": stanza, "rotated": all, "current": current }),
        );
    } else if args.new_secret_file.is_some() {
        output::line("Configure the new secret now, on every host of the stanza: the old one is refused from here on.");
    }
    Ok(Outcome::Done)
}

async fn open(access: &Access) -> Result<Log> {
    Log::open(Stanza::open(access).await?).await
}

/// Whether the new secret opens everything that the log of a repository names.
async fn is_done(access: &Access, options: &rotate::Options) -> bool {
    let with_new = Access {
        secret: options.new_secret.clone(),
        memory: None,
        ..access.clone()
    };
    // The configured one is not just any secret.
    options.new_secret.is_some() && Stanza::open(access).await.is_ok() && open(&with_new).await.is_ok()
}

/// Opens everything anew, from the repository alone.
async fn check(context: &Context, stanza: &str) -> Result<Outcome> {
    let mut all = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let access = Access {
            memory: None,
            ..context.access(&repository, stanza, false, true)?
        };
        let mut log = Log::replay(Stanza::open(&access).await?).await?;
        let began_us = log.stanza().env().now_us();
        let checked = check_in(context, &repository, &log, &mut all).await;
        let end = checked
            .as_ref()
            .map(|()| "it opens everything that it should".to_owned());
        log.note_end("key check", began_us, 0, end).await;
        checked?;
    }
    if context.global.output == Output::Json {
        output::json("key-check", &serde_json::json!({ "opened": all }));
    }
    Ok(Outcome::Done)
}

/// In one repository, whose log was opened.
async fn check_in(context: &Context, repository: &str, log: &Log, all: &mut Vec<serde_json::Value>) -> Result<()> {
    let opened = log.stanza();
    for epoch in &log.state().key_epochs {
        let number = epoch.epoch;
        let keys = opened.keys_of(number)?;
        if keys.can_read() && keys.operator_seed.is_none() {
            return Err(Error::refused(format!(
                "the key opens a part of key epoch {number} of {}, and it is neither an operator's nor one that opens no content",
                opened.shown()
            )));
        }
        if !keys.can_read() {
            all.push(serde_json::json!({ "repository": repository, "epoch": number, "write_only": true }));
            if context.global.output == Output::Text {
                let does = match keys.operator_seed.is_some() {
                    true => "expires and collects",
                    false => "writes",
                };
                let (log, other) = ("the log was opened with it", "restoring needs the operator's key");
                output::line(format_args!(
                    "{repository}: the key {does} in key epoch {number}, and reads nothing of it ({log}; {other})"
                ));
            }
            continue;
        }
        // Nothing proves more than opening what is there.
        let newest = log
            .state()
            .backups
            .iter()
            .rev()
            .find(|backup| backup.key_epoch == number);
        if let Some(backup) = newest {
            Manifest::read(opened, &backup.root).await?;
        }
        all.push(serde_json::json!({ "repository": repository, "epoch": number, "write_only": false }));
        if context.global.output == Output::Text {
            let proof = newest.map_or(
                "there is no backup of it yet",
                |_| "a manifest and the log were opened with it",
            );
            output::line(format_args!("{repository}: the key opens key epoch {number} ({proof})"));
        }
    }
    Ok(())
}
