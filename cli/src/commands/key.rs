//! `key generate`, `list`, `add-slot`, `check`, `export`, `import`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fairvault_engine::commit::Log;
use fairvault_engine::env::{self, Env, SystemEnv};
use fairvault_engine::error::{Error, Result};
use fairvault_engine::restore::plan::Manifest;
use fairvault_engine::stanza::{Access, Stanza};
use fairvault_engine::store::Created;
use fairvault_format::keys::{self, Secret};
use fairvault_format::{limits, names};

use super::Outcome;
use crate::args::{KeyCommand, Output};
use crate::context::{Context, secret_from_file};
use crate::output;

/// Runs a verb.
pub async fn run(context: &Context, command: KeyCommand) -> Result<Outcome> {
    match command {
        KeyCommand::Generate { file } => generate(&file),
        KeyCommand::List { stanza } => list(context, &stanza).await,
        KeyCommand::Check { stanza } => check(context, &stanza).await,
        KeyCommand::Export { stanza, file } => export(context, &stanza, &file).await,
        KeyCommand::Import { stanza, file } => import(context, &stanza, &file).await,
        KeyCommand::AddSlot {
            stanza,
            name,
            secret_file,
        } => add_slot(context, &stanza, &name, &secret_file).await,
    }
}

fn generate(path: &std::path::Path) -> Result<Outcome> {
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
    output::line(format_args!(
        "{} is made (mode 0600). Keep a copy away from this machine and away from the repository: without it nothing can be restored.",
        path.display()
    ));
    Ok(Outcome::Done)
}

async fn list(context: &Context, stanza: &str) -> Result<Outcome> {
    let mut all = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        let opened = Stanza::open(&access).await?;
        for (name, _) in opened.store().list(names::KEYS).await? {
            let slot = keys::decode_slot(&opened.store().get(&name, limits::SLOT_BYTES).await?, &name)?;
            let kind = slot
                .kind()
                .as_str_name()
                .trim_start_matches("SLOT_")
                .to_lowercase()
                .replace('_', "-");
            if context.global.output == Output::Text {
                output::line(format_args!(
                    "{repository}: epoch {} slot {} ({kind})",
                    slot.epoch, slot.name
                ));
            }
            all.push(
                serde_json::json!({ "repository": repository, "epoch": slot.epoch, "slot": slot.name, "kind": kind }),
            );
        }
    }
    if context.global.output == Output::Json {
        output::json("keys", &serde_json::json!({ "slots": all }));
    }
    Ok(Outcome::Done)
}

async fn add_slot(context: &Context, stanza: &str, name: &str, secret_file: &std::path::Path) -> Result<Outcome> {
    names::check_name("slot name", name)?;
    let secret = secret_from_file(secret_file)?;
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        let opened = Stanza::open(&access).await?;
        if !opened.has_secret() {
            return Err(Error::refused(format!(
                "stanza {stanza} is not encrypted: a slot would protect nothing"
            )));
        }
        let keys = opened.keys();
        let sealed = keys::seal_slot(
            opened.scope(),
            keys,
            name,
            Some(&secret),
            keys::default_argon2(),
            env::salt(&SystemEnv)?,
            SystemEnv.now_us(),
        )?;
        if let Created::Lost(_) = opened
            .store()
            .create(&names::slot(keys.epoch, name), sealed.into(), limits::SLOT_BYTES)
            .await?
        {
            return Err(
                Error::refused(format!("stanza {stanza} already has a slot {name:?}")).remedy("choose another name")
            );
        }
        if let Some(memory) = &access.memory {
            memory.forget_slots(&access);
        }
        output::line(format_args!("{repository}: slot {name} opens stanza {stanza} now"));
    }
    Ok(Outcome::Done)
}

/// Opens everything anew, from the repository alone.
async fn check(context: &Context, stanza: &str) -> Result<Outcome> {
    let mut all = Vec::new();
    for repository in context.repositories(Some(stanza))? {
        let access = Access {
            memory: None,
            ..context.access(&repository, stanza, false, true)?
        };
        let log = Log::replay(Stanza::open(&access).await?).await?;
        let opened = log.stanza();
        for epoch in &log.state().key_epochs {
            let number = epoch.epoch;
            let keys = opened.keys_of(number)?;
            let missing = |what: &str, can: &str| {
                Error::refused(format!(
                    "the key opens key epoch {number} of {} without {what}: it cannot {can}",
                    opened.shown()
                ))
            };
            if keys.data_key.is_none() {
                return Err(missing("the data key", "restore"));
            }
            if keys.operator_seed.is_none() {
                return Err(missing("the operator's key", "expire, fence or collect"));
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
            all.push(serde_json::json!({ "repository": repository, "epoch": number }));
            if context.global.output == Output::Text {
                let proof = newest.map_or(
                    "there is no backup of it yet",
                    |_| "a manifest and the log were opened with it",
                );
                output::line(format_args!("{repository}: the key opens key epoch {number} ({proof})"));
            }
        }
    }
    if context.global.output == Output::Json {
        output::json("key-check", &serde_json::json!({ "opened": all }));
    }
    Ok(Outcome::Done)
}

/// First word of a line with a slot in an exported file.
const SLOT: &str = "slot";

/// Slots are wrapped: the file alone opens nothing.
async fn export(context: &Context, stanza: &str, path: &Path) -> Result<Outcome> {
    let mut text = format!(
        "# Key slots of stanza {stanza}, written by fairvault {}.\n\
         # Together with a key file or passphrase that belongs to one of them, they open the stanza.\n\
         # If the objects below {stanza}/keys/ are lost: fairvault key import {stanza} FILE\n",
        env!("CARGO_PKG_VERSION")
    );
    for repository in context.repositories(Some(stanza))? {
        let access = context.access(&repository, stanza, false, true)?;
        let opened = Stanza::open(&access).await?;
        text += &format!(
            "repository {} {}\n",
            hex::encode(opened.scope().repository),
            opened.shown()
        );
        for (name, _) in opened.store().list(names::KEYS).await? {
            let slot = opened.store().get(&name, limits::SLOT_BYTES).await?;
            text += &format!("{SLOT} {name} {}\n", hex::encode(slot));
        }
    }
    let what = || format!("writing {}", path.display());
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(|e| Error::io(what(), e).remedy("an existing file is never overwritten"))?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|e| Error::io(what(), e))?;
    output::line(format_args!(
        "{} is written. Keep it apart from the key or passphrase that it needs",
        path.display()
    ));
    Ok(Outcome::Done)
}

async fn import(context: &Context, stanza: &str, path: &Path) -> Result<Outcome> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(format_args!("reading {}", path.display()), e))?;
    let bad = |why: &str| Error::usage(format!("{}: {why}", path.display()));
    let mut slots = Vec::new();
    for line in text.lines().filter(|line| line.starts_with(SLOT)) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, name, slot] = words.as_slice() else {
            return Err(bad("a line with a slot has three words"));
        };
        let bytes = hex::decode(slot).map_err(|_| bad("a slot is not hexadecimal"))?;
        let decoded = keys::decode_slot(&bytes, name)?;
        if *name != names::slot(decoded.epoch, &decoded.name) {
            return Err(bad("a slot has the name of another"));
        }
        slots.push((decoded, bytes));
    }
    let mut count = 0;
    for repository in context.repositories(Some(stanza))? {
        let store = context.open_repository(&repository, false)?;
        let id = fairvault_engine::stanza::read_repository(&store).await?.id()?;
        let store = store.folder(stanza);
        for (slot, bytes) in slots.iter().filter(|(slot, _)| slot.repository_id == id) {
            let name = names::slot(slot.epoch, &slot.name);
            match store.create(&name, bytes.clone().into(), limits::SLOT_BYTES).await? {
                Created::Won => output::line(format_args!("{repository}: {name} is there")),
                Created::Lost(_) => {
                    return Err(Error::refused(format!(
                        "{}/{name} is there, and another one",
                        store.shown()
                    )));
                }
            }
            count += 1;
        }
    }
    match count {
        0 => Err(bad("it holds no slot of a configured repository")),
        _ => Ok(Outcome::Done),
    }
}
