//! `key generate`, `key list`, `key add-slot`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use fairvault_engine::env::{self, Env, SystemEnv};
use fairvault_engine::error::{Error, Result};
use fairvault_engine::stanza::Stanza;
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
